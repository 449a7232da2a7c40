"""The one writer of a study folder.

    with StudyFolder.open("studies/demo", config=config, identity=identity, shape=shape) as study:
        for outcome, params in study.in_flight: ...        # what a killed driver left behind: train these again
        study.append_started(outcome, params)              # before a worker gets it
        study.append_rung(outcome.digest, Rung(step=10, tokens=900, accuracy=0.4, loss=1.2))
        study.append_finished(outcome.updated(status="complete", accuracy=0.5), params)

One process at a time; every append is on disk when it returns. What workers wrote is deleted here and nowhere else:
below the study's own folder (or its own part of a storage URI), by digest, never through a link.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, get_args

from filelock import FileLock, Timeout

from allocators.core import checks
from allocators.core.errors import StudyError
from allocators.core.types import FINISHED, ModelShape, Outcome, Rung, Score
from search.records import Reason, Records, adapter_name, flattened, mirror
from search.records.files import (
    ADAPTERS,
    CHECKPOINTS,
    HEADER,
    LINES,
    LOCK,
    RAY,
    UNTRAINED,
    inside,
    read_bytes,
    refuse_links,
    write_atomically,
)
from search.records.header import read_header
from search.records.orders import Order
from search.records.redact import redacted, redacted_command
from trainers import storage
from trainers.versions import versions

log = logging.getLogger(__name__)

MOST_NAMED = 5  # changed contents in a message
LOOK = 0.3  # seconds that a lock may be held by somebody who looks whether a driver holds it (search/serve)


class StudyFolder(Records):
    """A study folder open for writing."""

    _lock: FileLock | None
    _descriptor: int
    _changed: Callable[[], None]  # copies the records to their place, where that is a URI
    _mirror: contextlib.ExitStack

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        config: Mapping[str, Any],
        identity: Mapping[str, Any],
        shape: ModelShape,
        command: str = "",
        place: str = "",
        defaults: Mapping[str, Any] = MappingProxyType({}),
        table: Mapping[str, Any] = MappingProxyType({}),
        contents: Mapping[str, str] = MappingProxyType({}),
        lock: bool = True,
    ) -> Self:
        """Locks the folder, checks that it is the same study, reads what is there.

        config     the whole RunConfig as plain JSON; the latest one is kept
        identity   the part that results depend on (space, model, task, recipe, seed, ...)
        command    what the user typed, for the report
        place      where the workers write, with its login: URI/<name>; empty: as the config's storage says
        defaults   of the identity's keys: a folder that an earlier version made lacks those that came later
        table      what a table space says about its paper (`allocators/core/tables.py`), for the report
        contents   hashes of what results depend on besides the identity, by what it is; "" where it is not known
        lock       False: the file system has no locks, and no other driver runs here

        Passwords and keys are taken out of all of them before they are written.

        Raises StudyError where the folder cannot be written, is in use, belongs to another study, or has a link in it
        that leads out of it.
        """
        folder = Path(folder)
        asked = {"config": redacted(config), "identity": redacted(identity), "command": redacted_command(command)}
        asked |= {"shape": shape.to_json(), "versions": versions(), "table": dict(table)}
        asked |= {"contents": dict(contents)} if contents else {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            refuse_links(folder)
            held = FileLock(folder / LOCK) if lock else None
            if held is not None:
                _check_locks(folder)
                held.acquire(timeout=LOOK)
        except Timeout:
            raise StudyError(
                f"study folder {folder} is in use by another driver: wait until it ends, or start another study with "
                f"name=NEW"
            ) from None
        except OSError as error:
            raise _unwritable(folder, error) from None
        try:
            return cls._open_locked(folder, held, asked, defaults, place)
        except OSError as error:
            _release(held)
            raise _unwritable(folder, error) from None
        except BaseException:
            _release(held)
            raise

    @classmethod
    def _open_locked(
        cls, folder: Path, lock: FileLock | None, asked: dict[str, Any], defaults: Mapping[str, Any], place: str
    ) -> Self:
        descriptor = os.open(folder / LINES, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o644)
        try:
            header = _header(folder, os.fstat(descriptor), asked, defaults)
            write_atomically(folder / HEADER, json.dumps(header, indent=1) + "\n")
            study = cls(folder, header, place=place)
            study._lock, study._descriptor = lock, descriptor
            data = read_bytes(folder, LINES)
            whole = study.take_in(data)
            if whole < len(data):
                log.warning("%s: the last line was cut off in mid-write and is dropped", folder / LINES)
                os.ftruncate(descriptor, whole)
            elif data and not data.endswith(b"\n"):
                os.write(descriptor, b"\n")
        except BaseException:
            os.close(descriptor)
            raise
        for problem in study.problems:
            log.warning(problem)
        study._mirror, study._changed = contextlib.ExitStack(), lambda: None
        if storage.is_uri(study.place):
            study._changed = study._mirror.enter_context(mirror.kept(folder, study.place))
        return study

    def append_started(self, outcome: Outcome, params: Mapping[str, Any], *, sampler_seconds: float = 0.0) -> None:
        """A point is about to be given to a worker."""
        assert outcome.status not in FINISHED, outcome.status
        line = {"event": "started", "outcome": _recorded(outcome), "params": dict(params)}
        self._append(line | {"sampler_seconds": round(sampler_seconds, 4)})

    def append_rung(self, digest: str, rung: Rung) -> None:
        """An evaluation on the way."""
        self._append({"event": "rung", "digest": digest, "rung": rung.to_json()})

    def append_lost(self, digest: str, reason: str) -> None:
        """The platform took a training away before it had ended."""
        self._append({"event": "lost", "digest": digest, "reason": redacted(reason)})

    def append_finished(self, outcome: Outcome, params: Mapping[str, Any], *, reused: str = "") -> None:
        """A run is over, well or not; `reused` names the study that trained it, where it was another one."""
        assert outcome.status in FINISHED, outcome.status
        line = {"event": "finished", "outcome": _recorded(outcome), "params": dict(params)}
        self._append(line | ({"reused": reused} if reused else {}))

    def append_tested(self, digest: str, score: Score) -> None:
        """The adapter of a finished training has been evaluated on the test split."""
        self._append({"event": "tested", "digest": digest, "test": score.to_json()})

    def append_answered(
        self, params: Mapping[str, Any], *, reason: Reason, digest: str | None = None, message: str = ""
    ) -> None:
        """A point needed no training."""
        assert reason in get_args(Reason), reason
        line = {"event": "answered", "params": dict(params), "reason": reason, "digest": digest}
        self._append(line | {"message": redacted(message)})

    def append_ordered(self, order: Order, answer: str) -> None:
        """Somebody asked something of the driver, and this is what it said."""
        self._append({"event": "ordered", "order": order.to_json(), "answer": redacted(answer)})

    def _append(self, line: dict[str, Any]) -> None:
        """One line, on disk when this returns; memory then holds what reading the file again would give.

        Raises StudyError where the disk does not take it.
        """
        text = json.dumps(_plain(line | {"time": round(time.time(), 3)}), allow_nan=False) + "\n"
        rest = memoryview(text.encode())
        size = os.fstat(self._descriptor).st_size
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            os.fsync(self._descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, size)  # half a line would swallow the next one
            raise StudyError(
                f"{self.folder / LINES} cannot be written ({error.strerror}): make room and run the same command again"
            ) from None
        self.apply(json.loads(text))
        self._changed()

    # --- what workers wrote

    def has_adapter(self, digest: str) -> bool:
        """Whether a trained adapter lies in the study's own place."""
        return storage.exists(storage.join(self.place, ADAPTERS, checks.digest(digest)))

    def drop_adapter(self, digest: str) -> None:
        """Deletes a trained adapter in the study's own place, whatever path an outcome records."""
        self._delete(ADAPTERS, checks.digest(digest))

    def drop_checkpoint(self, digest: str) -> None:
        """Deletes the checkpoint of a training that has ended; there may be none."""
        self._delete(CHECKPOINTS, checks.digest(digest))

    def drop_ray_notes(self) -> None:
        """Removes Ray Train's own notes: a resume needs none of them."""
        self._delete(RAY)

    def _delete(self, *names: str) -> None:
        """Removes a folder of the study's own place; of a link the link, not what it points to."""
        if storage.is_uri(self.place):
            storage.delete_folder(storage.join(self.place, *names))
            return
        path = inside(self.folder, *names[:-1]) / names[-1]
        if path.is_symlink():
            path.unlink()
        else:
            storage.delete_folder(path)

    def close(self) -> None:
        """Gives the lock back."""
        if self._descriptor >= 0:
            self._mirror.close()
            os.close(self._descriptor)
            self._descriptor = -1
            _release(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_locks(folder: Path) -> None:
    """Raises StudyError where the file system cannot lock a file: filelock would say that another one holds it."""
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StudyError(
                f"the file system of {folder} has no locks ({error.strerror}): choose another with storage=FOLDER, or, "
                "where no other driver runs this study at the same time, go on with lock=false"
            ) from None


def _release(lock: FileLock | None) -> None:
    """Removes the lock's file while the lock is held, so that nobody else can have it, and gives the lock back."""
    if lock is None:
        return
    with contextlib.suppress(OSError):
        os.unlink(lock.lock_file)
    lock.release()


def _unwritable(folder: Path, error: OSError) -> StudyError:
    return StudyError(f"study folder {folder} cannot be written ({error.strerror}): choose another with storage=FOLDER")


def _header(folder: Path, lines: os.stat_result, asked: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """study.json of a new study, or of one that goes on: with what is asked for now.

    A copy of a study is another study, with another id: MLflow's runs and Ray's actors go by it. It is told by the
    file of its lines, which is another file.
    """
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    this: dict[str, Any] = {"name": folder.name, "inode": lines.st_ino}
    if not (folder / HEADER).exists():
        if lines.st_size:
            raise StudyError(
                f"{folder} has {LINES} but no {HEADER}, so it cannot be told which study it is: put {HEADER} back, or "
                f"start another study with name=NEW"
            )
        return {"id": uuid.uuid4().hex, "name": folder.name, "started": now, "resumed": []} | asked | this
    old = read_header(folder)
    _refuse_another_study(folder, {**defaults, **old["identity"]}, asked["identity"])
    if "contents" in asked:
        recorded = old.get("contents") if lines.st_size else {}
        asked |= {"contents": _same_contents(folder, recorded, asked["contents"])}
        if not lines.st_size and old.get("contents") != asked["contents"]:
            (folder / UNTRAINED).unlink(missing_ok=True)  # of another base or other questions
    is_copy = old["inode"] != lines.st_ino if "inode" in old else old["name"] != folder.name
    if is_copy:
        log.warning("%s is a copy of a study: it goes on as a study of its own", folder)
        this |= {"id": uuid.uuid4().hex}
    return old | asked | this | {"resumed": [*old["resumed"], now]}


def _refuse_another_study(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Results of different settings must not end up in one front."""
    before, after = flattened(old), flattened(new)
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    if changed:
        what = ", ".join(f"{key} ({before.get(key)} -> {after.get(key)})" for key in changed)
        raise StudyError(
            f"study folder {folder} was made with other settings: {what}; start another study with name=NEW, or "
            f"go back to the old settings to resume"
        )


def _same_contents(folder: Path, old: Mapping[str, str] | None, new: Mapping[str, str]) -> dict[str, str]:
    """What a study that goes on keeps on record of its contents.

    old   empty where nothing is on record that depends on them; None where an earlier version kept none

    Raises StudyError where something is not what it was: results of two contents would stand in one front.
    """
    if old is None:
        log.warning(
            "%s was made by an earlier version, which kept no hashes of model, tokenizer, task and data: whether these "
            "have changed since cannot be checked",
            folder,
        )
        return dict(new)
    names = dict.fromkeys([*old, *new])
    changed = [name for name in names if name not in old or name not in new or _differ(old[name], new[name])]
    if old and changed:
        more = f" and {len(changed) - MOST_NAMED} more" if len(changed) > MOST_NAMED else ""
        raise StudyError(
            f"what the results in {folder} depend on has changed since they were made: "
            f"{'; '.join(changed[:MOST_NAMED])}{more}; put back what was there to go on, or start another study with "
            "name=NEW"
        )
    return {name: new[name] or old[name] for name in new}


def _differ(old: str, new: str) -> bool:
    """Whether two hashes are known and not the same."""
    return bool(old and new) and old != new


def _recorded(outcome: Outcome) -> dict[str, Any]:
    """An outcome as a line has it: without secrets in its message, and with an adapter that is named by its digest."""
    adapter = adapter_name(outcome.digest) if outcome.adapter else ""
    return outcome.updated(adapter=adapter, message=redacted(outcome.message)).to_json(compact=True)


def _plain(value: Any) -> Any:
    """What JSON and UTF-8 hold: a number that is not finite is written as null, half a surrogate pair as its code."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str) and not value.isascii():
        return value.encode("utf-8", "backslashreplace").decode()
    return value
