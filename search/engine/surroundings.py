"""What a local Ray needs of this machine, looked at before it starts: it would say "timed out", after half a minute.

Raises StudyError with the path or limit that is in the way, and the setting that mends it. No Ray.
"""

from __future__ import annotations

import os
import resource
import socket
import sys
import tempfile
from pathlib import Path

from allocators.core.errors import StudyError

FILES = 256  # that one process may have open at once: Ray's own have some hundred
LONGEST_SOCKET = 107 if sys.platform.startswith("linux") else 103  # bytes of a socket's path
_SOCKET = "ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"  # as Ray names them, at its longest
_SHARED = Path("/dev/shm")  # noqa: S108  # Linux's, no temporary file


def check() -> None:
    """Raises StudyError for the first that is missing."""
    _check_open_files()
    _check_temporary_folder()
    _check_home()


def store() -> str | None:
    """Where Ray's object store goes; None: where Ray puts it, in shared memory."""
    if not _SHARED.is_dir() or _is_writable(_SHARED):
        return None
    return _temporary()


def answers(address: str, *, seconds: float = 3.0) -> bool:
    """Whether anything listens at HOST:PORT, as a cluster would."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=seconds).close()
    except (OSError, ValueError):
        return False
    return True


def _check_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= FILES:
        if soft != resource.RLIM_INFINITY and soft < FILES:
            resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, hard))
        return
    raise StudyError(
        f"a process may have {hard} files open here (ulimit -n), and Ray needs {FILES}: raise the limit "
        "(ulimit -n, or your administrator's limits.conf), or train without Ray by workers=process"
    )


def _check_temporary_folder() -> None:
    folder = _temporary()
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    room = LONGEST_SOCKET - len(_SOCKET) - 1
    if len(os.fsencode(folder)) > room:
        raise StudyError(
            f"{name}={folder} is too long for the paths of Ray's sockets ({len(os.fsencode(folder))} bytes, at most "
            f"{room}): set RAY_TMPDIR=/tmp, or to another short folder that you may write"
        )
    if not _is_writable(Path(folder)):
        raise StudyError(
            f"{folder} is no folder that can be written, and Ray keeps its sockets and logs there: set RAY_TMPDIR to "
            "one that you may write"
        )


def _check_home() -> None:
    """Ray keeps the token there that its processes know each other by."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token" or {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & {*os.environ}:
        return
    home = Path("~").expanduser()
    if (home / ".ray" / "auth_token").is_file() or _is_writable(home / ".ray", make=True):
        return
    raise StudyError(
        f"{home / '.ray'} cannot be written, and Ray keeps its token there: set HOME to a folder that you may write, "
        "or RAY_AUTH_TOKEN_PATH=FILE, or RAY_AUTH_MODE=disabled on a machine of your own"
    )


def _temporary() -> str:
    """The folder in which Ray makes its own."""
    fallback = "/tmp"  # noqa: S108  # Ray's own choice
    return os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or fallback


def _is_writable(folder: Path, *, make: bool = False) -> bool:
    try:
        if make:
            folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
