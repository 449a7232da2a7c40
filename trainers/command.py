"""How a command of this toolkit is run: with streams that outlast the terminal, and a home folder.

    if __name__ == "__main__":
        sys.exit(command.run(main))

Nothing may end a study for what it prints. A reader that has gone (`| head`), a closed stream or a lost terminal drop
what is written from then on; a character that the terminal's encoding lacks is written as `?`. A container often runs
as a user without a name or a home, and libraries look both up when they are imported.

A ToolkitWarning is one line, without the place in this project's code that gave it; so is Ctrl-C, with exit code 130.
"""

from __future__ import annotations

import getpass
import os
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO, cast

from allocators.core.errors import ToolkitWarning

INTERRUPTED = 130  # what a shell says of a process that Ctrl-C ended


def run(main: Callable[[], int]) -> int:
    """The exit code of `main`, which runs as the file's head says. Of a whole process: it changes its streams."""
    _open_standard_streams()
    sys.stdout, sys.stderr = lasting(sys.stdout), lasting(sys.stderr)
    _name_user_and_home()
    warnings.formatwarning = _one_line_if_ours
    try:
        return main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


_with_its_place = warnings.formatwarning


def _one_line_if_ours(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if issubclass(category, ToolkitWarning):
        return f"warning: {message}\n"
    return _with_its_place(message, category, filename, lineno, line)


def lasting(stream: TextIO) -> TextIO:
    """The same stream, where a write never fails: see the file's head."""
    return cast("TextIO", _Lasting(stream))


class _Lasting:
    """A text stream that goes on into nothing where its other end has gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        if stream.errors != "backslashreplace" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):  # ValueError: it is closed
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._drop()

    def _drop(self) -> None:
        """Leads the file descriptor into nothing, so that what is still buffered, and child processes, do not fail."""
        nothing = os.open(os.devnull, os.O_WRONLY)
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError):
            self._stream = os.fdopen(nothing, "w", encoding="utf-8")
        else:
            os.dup2(nothing, descriptor)
            os.close(nothing)


def _open_standard_streams() -> None:
    """Opens closed ones on nothing: else a file that is opened later, such as a study's records, takes their place."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # open takes the lowest free number: this one
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, closefd=False)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", errors="backslashreplace", closefd=False)


def _name_user_and_home() -> None:
    """Sets USER and HOME where the system knows neither; says so of a home, because caches do not stay in it."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"user-{os.getuid()}"
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = home = _own_folder(Path(tempfile.gettempdir()) / f"home-{os.getuid()}")
        print(
            f"note: this user has no home folder: {home} is used; set HOME to keep caches and tokens", file=sys.stderr
        )


def _own_folder(folder: Path) -> str:
    """This folder where nobody else can have made it, else a new one: another user's caches are not to be trusted."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.lstat()
    except OSError:
        return tempfile.mkdtemp(prefix="home-")
    mine = stat.S_ISDIR(state.st_mode) and state.st_uid == os.getuid() and not state.st_mode & 0o022
    return str(folder) if mine else tempfile.mkdtemp(prefix="home-")
