"""A copy of a study's records at the place of its workers, where that is a URI: other machines find the study there.

    mirror.collect("studies/demo", "s3://bucket/demo")      # before a study opens: what another machine has recorded
    with mirror.kept("studies/demo", "s3://bucket/demo") as changed:
        changed()                                           # copies the records soon, and at the end once more
    mirror.here("s3://bucket/demo")                         # studies/demo, for what reads a study

The records on the machine that runs the study are the truth, and an object store has neither locks nor appending: a
copy is replaced as a whole. Of two machines that go on with one study at the same time the first that notices ends.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from allocators.core.errors import StudyError
from search import interrupts
from search.records.files import EVALUATIONS, HEADER, LINES, SIGNALS, UNTRAINED, read_bytes, write_atomically
from search.records.redact import redacted
from trainers import storage

RECORDS = "records"  # folder beside `adapters/` and `checkpoints/`
SELDOM = 3.0  # seconds between two copies
SMALL = (UNTRAINED, EVALUATIONS, f"{SIGNALS}/routing.json", f"{SIGNALS}/sensitivity.json", f"{SIGNALS}/spectrum.json")
log = logging.getLogger(__name__)


def collect(folder: str | Path, place: str) -> bool:
    """Takes the records at the place over into the folder, where they know more; whether they did.

    Raises StudyError where the place cannot be reached, or each of both has something that the other lacks.
    """
    folder, away = Path(folder), storage.join(place, RECORDS)
    if (theirs := _read(storage.join(away, LINES))) is None:
        return False
    ours = read_bytes(folder, LINES) if (folder / LINES).exists() else b""
    if ours.startswith(theirs):
        return False
    if not theirs.startswith(ours):
        raise StudyError(
            f"the records in {folder} and those in {redacted(away)} have gone different ways, as if two machines had "
            "run this study at once: remove one of the two, or start another study with name=NEW"
        )
    header = _read(storage.join(away, HEADER))
    if header is None:
        raise StudyError(
            f"{redacted(away)} has {LINES} but no {HEADER}: remove it, or start another study with name=NEW"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name in SMALL:
        if (data := _read(storage.join(away, name))) is not None:
            (folder / name).parent.mkdir(exist_ok=True)
            write_atomically(folder / name, data)
    write_atomically(folder / LINES, theirs)
    try:  # the file's number is how a study knows that it is no copy
        moved = {**json.loads(header), "inode": (folder / LINES).stat().st_ino}
    except (ValueError, TypeError) as error:
        raise StudyError(f"{redacted(storage.join(away, HEADER))} is damaged ({error})") from None
    write_atomically(folder / HEADER, json.dumps(moved, indent=1) + "\n")
    return True


def here(location: str) -> str:
    """A folder of this machine with the records of a study: `location` itself, or `studies/NAME` for a URI.

    Raises StudyError where no records lie at the URI, and what `collect` raises.
    """
    if not storage.is_uri(location):
        return location
    place = location.rstrip("/")
    folder = Path("studies") / place.rpartition("/")[2]
    if not collect(folder, place) and not storage.exists(storage.join(place, RECORDS, LINES)):
        raise StudyError(f"no study at '{redacted(place)}': give URI/NAME, as storage=URI name=NAME made it")
    return str(folder)


@contextlib.contextmanager
def kept(folder: str | Path, place: str) -> Iterator[Callable[[], None]]:
    """Copies the records whenever they have changed, by a thread of its own, and at the end of the block.

    The copy is a service: where it fails, that is said once, and the study goes on.
    """
    copy, wake, over = _Copy(Path(folder), storage.join(place, RECORDS)), threading.Event(), threading.Event()

    def run() -> None:
        while not over.is_set():
            wake.wait()
            wake.clear()
            copy.update()
            over.wait(SELDOM)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    wake.set()
    try:
        yield wake.set
    finally:
        over.set()
        wake.set()
        thread.join()
        copy.update()


class _Copy:
    """The copy at one place, and what it holds."""

    def __init__(self, folder: Path, away: str) -> None:
        self._folder, self._away = folder, away
        self._copied: dict[str, bytes] = {}
        self._failed = self._refused = False

    def update(self) -> None:
        """Copies what has changed, the header first and the lines last."""
        if self._refused:
            return
        try:
            self._look()
            for name in (HEADER, *SMALL, LINES):
                with contextlib.suppress(FileNotFoundError):
                    self._put(name, read_bytes(self._folder, name))
            self._failed = False
        except (StudyError, OSError) as error:
            if not self._failed:
                log.warning("the records are not copied to %s for now: %s", redacted(self._away), error)
            self._failed = True

    def _put(self, name: str, data: bytes) -> None:
        if self._copied.get(name) == data or self._refused:
            return
        with storage.replacing(storage.join(self._away, name)) as file:
            file.write_bytes(data)
        self._copied[name] = data

    def _look(self) -> None:
        """Ends the study where the lines at the place are not those that were copied there last."""
        theirs, last = _read(storage.join(self._away, LINES)) or b"", self._copied.get(LINES)
        ours = read_bytes(self._folder, LINES)
        if theirs != last and not ours.startswith(theirs):
            self._refused = True
            interrupts.fail(
                StudyError(
                    f"another machine writes the records in {redacted(self._away)}: it goes on with this study, and "
                    "this run ends"
                )
            )


def _read(location: str) -> bytes | None:
    if not storage.exists(location):
        return None
    with storage.reading(location) as file:
        return file.read_bytes()
