"""Files of a study folder: written as a whole, and never outside of it.

A study folder may come from somebody else. Symbolic links in it follow one rule: the study folder itself may be a
link, and a link in it may lead to another place in it. Where one leads out of it, what is behind it is not read, not
written and not deleted: reading leaves it out or says so, and a study is not opened for writing before it is gone.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from allocators.core.errors import StudyError

HEADER = "study.json"
LINES = "outcomes.jsonl"
UNTRAINED = "untrained.json"  # accuracy and stderr of the base, and by_task
EVALUATIONS = "evaluations.jsonl"  # of other tasks, and of what was forgotten (search/evaluate/)
LOCK = ".lock"
ADAPTERS, CHECKPOINTS, SIGNALS = "adapters", "checkpoints", "signals"
LOGS = "logs"  # of the workers
ORDERS = "orders"  # to the driver (orders.py)
RAY = ".ray"  # Ray Train's own notes: a resume needs none of them
WRITTEN = (
    HEADER,
    LINES,
    UNTRAINED,
    EVALUATIONS,
    LOCK,
    LOGS,
    RAY,
    ADAPTERS,
    CHECKPOINTS,
    SIGNALS,
    ORDERS,
)  # reports replace links by files


def leads_out(path: Path, folder: Path) -> bool:
    """Whether the path, links followed, lies outside the folder. A link to nowhere inside does not."""
    try:
        return not path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a circle of links
        return True


def inside(folder: Path, *names: str) -> Path:
    """A path in a study folder. Raises StudyError where a link on the way leads out of the folder."""
    path = folder.joinpath(*names)
    if leads_out(path, folder):
        raise _refused(path, folder)
    return path


def plain_file(folder: Path, *names: str) -> Path:
    """A file of a study folder, to be read.

    Raises StudyError where a link leads out of the folder or it is no file (a pipe would never end), OSError where it
    is missing.
    """
    path = inside(folder, *names)
    if not stat.S_ISREG(path.stat().st_mode):
        raise StudyError(f"{path} is no plain file: put it back from a copy")
    return path


def append_line(text: str, folder: Path, name: str) -> None:
    """Adds a line to a file of a study folder, which is made where it is missing.

    Raises StudyError where it is a link that leads out of the folder, no file, or cannot be written.
    """
    try:
        path = plain_file(folder, name) if (folder / name).exists() else inside(folder, name)
        with path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
    except OSError as error:
        raise StudyError(f"{folder / name} cannot be written ({error.strerror})") from None


def read_bytes(folder: Path, *names: str) -> bytes:
    """Contents of a file of a study folder. Raises what `plain_file` raises."""
    return plain_file(folder, *names).read_bytes()


def has_links_out(path: Path, folder: Path) -> bool:
    """Whether the path, or anything below it, is a link that leads out of the study folder."""
    return any(leads_out(link, folder) for link in (path, *_links(path)))


def refuse_links_out(path: Path, folder: Path) -> None:
    """Raises StudyError where the path, or anything below it, is a link that leads out of the study folder."""
    for link in (path, *_links(path)):
        if leads_out(link, folder):
            raise _refused(link, folder)


def refuse_links(folder: Path) -> None:
    """Raises StudyError where something that a study writes or deletes is a link that leads out of its folder."""
    for name in WRITTEN:
        path = inside(folder, name)
        if name != RAY:  # links below it may lead anywhere: they are removed as links, and never followed
            refuse_links_out(path, folder)


def _links(path: Path) -> Iterator[Path]:
    """All symbolic links below a folder; links are not followed."""
    if not path.is_dir():
        return
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_symlink():
                yield Path(entry.path)
            elif entry.is_dir(follow_symlinks=False):
                yield from _links(Path(entry.path))


def _refused(path: Path, folder: Path) -> StudyError:
    way = [part for part in (*reversed(path.parents), path) if part != folder and part.is_relative_to(folder)]
    link = next((part for part in way if part.is_symlink()), path)
    return StudyError(
        f"{link} is a link that leads out of the study folder, and is neither read nor written: put a copy of what it "
        "points to in its place, or remove it (a whole study, or storage=FOLDER, may lie behind a link)"
    )


def refuse_other_kind(path: Path, begins: bytes, *, kind: str) -> None:
    """Raises StudyError where a file that a user names would take the place of one of another kind, or is a folder.

    begins   how every file of the kind begins: a study's records, a database or a model do not
    kind     "a picture", for the message

    Raises OSError where it cannot be looked at.
    """
    if path.is_dir():
        raise StudyError(f"{path} is a folder: name a file in it")
    if not path.is_file():  # a terminal or a pipe, which reading would wait for, has nothing to lose
        return
    with path.open("rb") as file:
        found = file.read(len(begins))
    if found and found != begins:
        raise StudyError(f"{path} is there and is not {kind}: it is left as it is; name another file, or remove it")


def write_atomically(path: Path, data: str | bytes) -> None:
    """Readers see the old file or the new one, never half of it, after a power cut too. A link is replaced."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        with temporary.open("xb") as file:  # x: never through a link that somebody left there
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
