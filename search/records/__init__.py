"""The study folder: what was asked, and one line for everything that happened. All views are rebuilt from it.

    with Study.open("studies/demo", config=config, identity=identity, shape=shape) as study:
        for outcome, params in study.in_flight: ...        # what a killed driver left behind: train these again
        study.append_started(outcome, params)              # before a worker gets it
        study.append_rung(outcome.digest, {"step": 10, "tokens": 900, "accuracy": 0.4, "loss": 1.2})
        study.append_finished(outcome.updated(status="complete", accuracy=0.5), params)
    read("studies/demo").finished                          # without a lock, while the study runs too

A folder holds
    study.json          config, identity (what must not change between reruns), sizes of the model, versions
    outcomes.jsonl      the truth; appended by one process that holds the lock on it, fsynced line by line
    adapters/<digest>/  checkpoints/<digest>/  signals/  front.csv  points.csv  front.png  report.html

Lines of outcomes.jsonl, each with its `time` (seconds since 1970):
    {"event": "started",  "outcome": Outcome, "params": {...}, "sampler_seconds": what it took to propose the point}
    {"event": "rung",     "digest": "...", "rung": {"step", "tokens", "accuracy", "loss", ...}}
    {"event": "finished", "outcome": Outcome, "params": {...}, "reused": name of the study that trained it, or none}
    {"event": "answered", "params": {...}, "reason": "duplicate"|"infeasible"|"over_budget", "digest", "message"}
`params` is the sampler's flat dictionary of the point. The last line of a digest wins. A driver that is killed in
mid-write leaves a torn last line, which is dropped; a damaged line elsewhere is named and skipped.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import re
import shlex
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self, get_args

from allocators.core import words
from allocators.core.errors import StudyError, ToolkitError
from allocators.core.types import FINISHED, ModelShape, Outcome
from trainers.versions import versions

log = logging.getLogger(__name__)

Reason = Literal["duplicate", "infeasible", "over_budget"]
HEADER = "study.json"
LINES = "outcomes.jsonl"
UNTRAINED = "untrained.json"  # accuracy and stderr of the base, and by_task

_SECRET_KEY = re.compile(r"(^|[._-])(password|passwd|secret|token|api_?key|secret_?key|credentials)$", re.IGNORECASE)
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
_URL_SECRET = re.compile(r"([?&][^=&\s]*(?:key|secret|token|password|signature)[^=&\s]*=)[^&\s]+", re.IGNORECASE)


@dataclass(frozen=True)
class Answered:
    """A point that was answered without training. `digest` names the run it repeats, None where there is none."""

    params: Mapping[str, Any]
    reason: Reason
    digest: str | None
    message: str


class Records:
    """What a study folder says, as of its last line.

    folder     the study folder
    header     contents of study.json
    shape      sizes of the model
    outcomes   last known outcome of every digest, in the order in which they were started or finished
    answered   points answered without training, in order
    problems   one sentence for every damaged line
    sampler_seconds   what it took to propose each point that was started
    reused     digest -> the study of the same storage that trained it, of outcomes that were not trained here
    """

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        self.folder = folder
        self.header = header
        self.shape = ModelShape.from_json(header["shape"])
        self.outcomes: dict[str, Outcome] = {}
        self.answered: list[Answered] = []
        self.problems: list[str] = []
        self.sampler_seconds: list[float] = []
        self.reused: dict[str, str] = {}
        self._params: dict[str, dict[str, Any]] = {}
        self._rungs: dict[str, dict[int, Mapping[str, Any]]] = {}

    @property
    def name(self) -> str:
        return self.header["name"]

    @cached_property
    def untrained(self) -> Mapping[str, Any] | None:
        """accuracy, stderr and by_task of the base before training; None where it was not evaluated."""
        file = self.folder / UNTRAINED
        return json.loads(file.read_text()) if file.exists() else None

    @property
    def finished(self) -> dict[str, Outcome]:
        """Outcomes by digest, in the order in which they finished: complete, stopped, diverged, failed, ..."""
        return {digest: outcome for digest, outcome in self.outcomes.items() if outcome.status in FINISHED}

    @property
    def trained(self) -> dict[str, Outcome]:
        """Those of `finished` that were trained here, and not reused from another study."""
        return {digest: outcome for digest, outcome in self.finished.items() if digest not in self.reused}

    @property
    def in_flight(self) -> list[tuple[Outcome, dict[str, Any]]]:
        """Started and not finished, with the point's parameters and the rungs so far."""
        return [(o, self._params[digest]) for digest, o in self.outcomes.items() if o.status not in FINISHED]

    def params_of(self, digest: str) -> dict[str, Any]:
        """Sampler parameters of the point that was trained as this digest (KeyError where there is none)."""
        return self._params[digest]

    def adapter_of(self, outcome: Outcome) -> str | None:
        """Where its adapter lies: a URI, or a folder that is still there (with the study, if it was moved)."""
        if not outcome.adapter or "://" in outcome.adapter:
            return outcome.adapter or None
        recorded, moved = Path(outcome.adapter), self.folder / "adapters" / outcome.digest
        return next((str(folder.absolute()) for folder in (recorded, moved) if folder.is_dir()), None)

    def apply(self, line: Mapping[str, Any]) -> None:
        """Takes one line in; raises ValueError, KeyError or TypeError and changes nothing where it is no such line."""
        match line["event"]:
            case "started" | "finished":
                outcome, params = Outcome.from_json(line["outcome"]), dict(line["params"])
                if (outcome.status in FINISHED) != (line["event"] == "finished"):
                    raise ValueError(f"a '{line['event']}' line cannot have status '{outcome.status}'")
                digest = outcome.digest
                self.outcomes.pop(digest, None)  # to the end: dictionaries keep the order of events
                self.outcomes[digest] = outcome if outcome.rungs else outcome.updated(rungs=self._curve(digest))
                self._params[digest] = params
                if line.get("sampler_seconds"):
                    self.sampler_seconds.append(float(line["sampler_seconds"]))
                if line.get("reused"):
                    self.reused[digest] = str(line["reused"])
            case "rung":
                digest, rung = line["digest"], dict(line["rung"])
                # by step: a run that goes on from its checkpoint reports some rungs a second time
                self._rungs.setdefault(digest, {})[int(rung["step"])] = rung
                if digest in self.outcomes and self.outcomes[digest].status not in FINISHED:
                    self.outcomes[digest] = self.outcomes[digest].updated(rungs=self._curve(digest))
            case "answered":
                if line["reason"] not in get_args(Reason):
                    raise ValueError(f"unknown reason '{line['reason']}'")
                self.answered.append(
                    Answered(dict(line["params"]), line["reason"], line["digest"], str(line["message"]))
                )
            case other:
                raise ValueError(f"unknown event '{other}'")

    def _curve(self, digest: str) -> tuple[Mapping[str, Any], ...]:
        rungs = self._rungs.get(digest, {})
        return tuple(rungs[step] for step in sorted(rungs))

    def _load(self, data: bytes) -> int:
        """Takes in all whole lines; returns the length of what is not a torn last line."""
        *lines, tail = data.split(b"\n")
        for number, text in enumerate(lines, start=1):
            if fault := self._take(text):
                self.problems.append(f"{self.folder / LINES} line {number} is damaged and was skipped: {fault}")
        # Torn between the closing brace and the newline: nothing is missing, so nothing is lost.
        return len(data) if not tail or self._take(tail) is None else len(data) - len(tail)

    def _take(self, text: bytes) -> str | None:
        """Applies one line of the file; says what is wrong with it where it cannot."""
        try:
            self.apply(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError, ToolkitError) as error:
            return f"{type(error).__name__}: {error}"
        return None


class Study(Records):
    """A study folder open for writing. One process at a time; every append is on disk when it returns."""

    _descriptor: int

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        config: Mapping[str, Any],
        identity: Mapping[str, Any],
        shape: ModelShape,
        command: str = "",
        defaults: Mapping[str, Any] = MappingProxyType({}),
        table: Mapping[str, Any] = MappingProxyType({}),
    ) -> Self:
        """Locks the folder, checks that it is the same study, reads what is there.

        config     the whole RunConfig as plain JSON; the latest one is kept
        identity   the part that results depend on (space, model, task, recipe, seed, ...)
        command    what the user typed, for the report
        defaults   of the identity's keys: a folder that an earlier version made lacks those that came later
        table      what a table space says about its paper (`spaces/_tables.py`), for the report

        Passwords and keys are taken out of all three before they are written.

        Raises StudyError where the folder cannot be written, is in use, or belongs to another study.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / LINES, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise StudyError(
                f"study folder {folder} cannot be written ({error.strerror}): choose another with storage=FOLDER"
            ) from None
        try:
            return cls._open_locked(folder, descriptor, config, identity, shape, command, defaults, table)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def _open_locked(
        cls,
        folder: Path,
        descriptor: int,
        config: Mapping[str, Any],
        identity: Mapping[str, Any],
        shape: ModelShape,
        command: str,
        defaults: Mapping[str, Any],
        table: Mapping[str, Any],
    ) -> Self:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StudyError(
                f"study folder {folder} is in use by another driver: wait until it ends, or start another study with "
                f"name=NEW"
            ) from None
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        asked = {"config": redacted(config), "identity": redacted(identity), "command": _redacted_command(command)}
        asked |= {"shape": shape.to_json(), "versions": versions(), "table": dict(table)}
        if (folder / HEADER).exists():
            old = _read_header(folder)
            _refuse_another_study(folder, {**defaults, **old["identity"]}, asked["identity"])
            header = old | asked | {"resumed": [*old["resumed"], now]}
        elif os.fstat(descriptor).st_size:
            raise StudyError(
                f"{folder} has {LINES} but no {HEADER}, so it cannot be told which study it is: put {HEADER} back, or "
                f"start another study with name=NEW"
            )
        else:
            header = {"id": uuid.uuid4().hex, "name": folder.name, "started": now, "resumed": []} | asked
        try:
            write_atomically(folder / HEADER, json.dumps(header, indent=1) + "\n")
            study = cls(folder, header)
            study._descriptor = descriptor
            data = (folder / LINES).read_bytes()
            whole = study._load(data)
            if whole < len(data):
                log.warning("%s: the last line was cut off in mid-write and is dropped", folder / LINES)
                os.ftruncate(descriptor, whole)
            elif data and not data.endswith(b"\n"):
                os.write(descriptor, b"\n")
        except OSError as error:
            raise StudyError(
                f"study folder {folder} cannot be written ({error.strerror}): choose another with storage=FOLDER"
            ) from None
        for problem in study.problems:
            log.warning(problem)
        return study

    def append_started(self, outcome: Outcome, params: Mapping[str, Any], *, sampler_seconds: float = 0.0) -> None:
        """A point is about to be given to a worker."""
        assert outcome.status not in FINISHED, outcome.status
        line = {"event": "started", "outcome": outcome.to_json(), "params": dict(params)}
        self._append(line | {"sampler_seconds": round(sampler_seconds, 4)})

    def append_rung(self, digest: str, rung: Mapping[str, Any]) -> None:
        """An evaluation on the way."""
        self._append({"event": "rung", "digest": digest, "rung": dict(rung)})

    def append_finished(self, outcome: Outcome, params: Mapping[str, Any], *, reused: str = "") -> None:
        """A run is over, well or not; `reused` names the study that trained it, where it was another one."""
        assert outcome.status in FINISHED, outcome.status
        line = {"event": "finished", "outcome": outcome.to_json(), "params": dict(params)}
        self._append(line | ({"reused": reused} if reused else {}))

    def append_answered(
        self, params: Mapping[str, Any], *, reason: Reason, digest: str | None = None, message: str = ""
    ) -> None:
        """A point needed no training."""
        assert reason in get_args(Reason), reason
        self._append(
            {"event": "answered", "params": dict(params), "reason": reason, "digest": digest, "message": message}
        )

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

    def close(self) -> None:
        """Gives the lock back."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Followed:
    """Another study's records, read on from where they were read to the last time; no lock, nothing written.

    A line counts when its newline is there, so one that is being written, or was torn, is left for later.

    Raises StudyError where there is no study in the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.records = _records(folder)
        self._read = 0

    def update(self) -> Records:
        """The records as of now. Raises OSError where the folder is gone."""
        with (self.records.folder / LINES).open("rb") as file:
            file.seek(self._read)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read += len(whole + newline)
        self.records._load(whole + newline)
        return self.records


def read(folder: str | Path) -> Records:
    """What a study folder says now; takes no lock and writes nothing.

    Raises StudyError where there is no study in the folder.
    """
    folder = Path(folder)
    records = _records(folder)
    try:
        records._load((folder / LINES).read_bytes())
    except OSError as error:
        raise StudyError(f"{folder / LINES} cannot be read ({error.strerror}): is {folder} a study folder?") from None
    for problem in records.problems:
        log.warning(problem)
    return records


def _records(folder: Path) -> Records:
    """Records of a folder whose lines were not read yet."""
    header = _read_header(folder)
    try:
        return Records(folder, header)
    except (KeyError, TypeError) as error:
        raise StudyError(f"{folder / HEADER} is damaged ({error!r}): put it back from a copy") from None


def _read_header(folder: Path) -> dict[str, Any]:
    try:
        header = json.loads((folder / HEADER).read_text())
        missing = {"id", "name", "started", "resumed", "config", "identity", "command", "shape", "versions"} - set(
            header
        )
        if missing:
            raise ValueError(f"it has no '{min(missing)}'")
        return header
    except OSError as error:
        raise StudyError(
            f"no study in {folder} ({HEADER}: {error.strerror}): give the folder that search.run named when it started"
        ) from None
    except (ValueError, TypeError) as error:
        raise StudyError(
            f"{folder / HEADER} is damaged ({error}): put it back from a copy, or start another study with name=NEW"
        ) from None


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


def flattened(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level with dotted keys.

    >>> flattened({"seed": 1, "recipe": {"rank": 8}})
    {'seed': 1, 'recipe.rank': 8}
    """
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flattened(item, f"{prefix}{key}.") if isinstance(item, Mapping) and item else {f"{prefix}{key}": item}
    return flat


def redacted(value: Any, key: str = "") -> Any:
    """The same JSON value without passwords: logins and secret queries in URLs, values of keys named like a secret.

    >>> redacted({"tracking": "http://me:pw@host/", "api_key": "x"})
    {'tracking': 'http://***@host/', 'api_key': '***'}
    """
    if isinstance(value, Mapping):
        return {str(k): redacted(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item, key) for item in value]
    if isinstance(value, str) and value:
        return "***" if _SECRET_KEY.search(key) else _URL_SECRET.sub(r"\1***", _URL_LOGIN.sub("***@", value))
    return value


def _redacted_command(command: str) -> str:
    """Word by word: a secret in a quoted word ends before the quote."""
    return shlex.join(redacted(word) for word in words.shell_words(command))


def write_atomically(path: Path, data: str | bytes) -> None:
    """Readers see the old file or the new one, never half of it, after a power cut too."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
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


def _plain(value: Any) -> Any:
    """JSON knows no NaN: a loss that is not finite is written as null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
