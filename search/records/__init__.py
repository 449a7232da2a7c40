"""The study folder: what was asked, and one line for everything that happened. All views are rebuilt from it.

    read("studies/demo").finished        # without a lock, while the study runs too; `folder.py` is the one writer

A folder holds
    study.json          config, identity and contents (which a rerun must share), sizes of the model, versions
    outcomes.jsonl      the truth; appended by the one process that holds the folder's lock, fsynced line by line
    adapters/<digest>/  checkpoints/<digest>/  signals/  untrained.json  front.csv  points.csv  front.png  report.html
With storage=URI, adapters and checkpoints lie at URI/<name of the study>/, beside a copy of the records (`mirror.py`).

Lines of outcomes.jsonl, each with its `time` (seconds since 1970):
    {"event": "started",  "outcome": Outcome, "params": {...}, "sampler_seconds": what it took to propose the point}
    {"event": "rung",     "digest": "...", "rung": {"step", "tokens", "accuracy", "loss", ...}}
    {"event": "lost",     "digest": "...", "reason": why the platform took the training away; it is trained again}
    {"event": "finished", "outcome": Outcome, "params": {...}, "reused": name of the study that trained it, or none}
    {"event": "tested",   "digest": "...", "test": {"accuracy", "stderr"} of its adapter on the test split}
    {"event": "ordered",  "order": {"do": "stop"|"try"|"end", ...}, "answer": what the driver said to it}
    {"event": "answered", "params": {...}, "reason": "duplicate"|"infeasible"|"over_budget", "digest", "message"}
`params` is the sampler's flat dictionary of the point; of an adapter that was cut from a training (`search/truncate/`,
its trial names the parent) it says from which, and how much was kept. Every line stands by itself, so that a damaged
one costs only itself; the allocation, the longest part of a trial, is therefore written in ranges (`to_compact` in
core/types.py). Lines of earlier versions, which list every expert, are read as well. The last end of a digest wins, and
what has ended does not begin again: lines in another order are the same study. A driver that is killed in mid-write
leaves a torn last line, which is dropped; a damaged line elsewhere is named and skipped.

A folder may come from anybody: every value is checked when it is read, and no path that a line records is followed.
Whether an adapter was saved is on record, where it lies follows from its digest: a copy of a study has adapters of its
own.
One recorded location is followed, the header's `storage` where it is a URI: adapters are read there, by digest; nothing
is written or deleted by it.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

from allocators.core import checks
from allocators.core.errors import StudyError, ToolkitError
from allocators.core.types import FINISHED, ModelShape, Outcome, Rung, Score, Signal, Trial, canonical_json
from search.config import THREE
from search.front import Points
from search.records.files import (
    ADAPTERS,
    HEADER,
    LINES,
    SIGNALS,
    UNTRAINED,
    has_links_out,
    read_bytes,
    write_atomically,
)
from search.records.header import place_of, read_header
from search.records.orders import Obeyed, Order
from search.records.redact import redacted
from trainers import storage

__all__ = [
    "HEADER",
    "LINES",
    "UNTRAINED",
    "Answered",
    "Reason",
    "Records",
    "flattened",
    "measured_signals",
    "read",
    "write_atomically",
]

log = logging.getLogger(__name__)

Reason = Literal["duplicate", "infeasible", "over_budget"]

# What earlier versions recorded as a failure of the trial, and was one of the platform.
_LOST = re.compile(
    r"^(no worker is left|its worker died|its Tune trial ended|the worker group ended|cannot (read|write|delete|open) '"
    r"|the checkpoint .* is damaged|cannot save the adapter|OSError|\w+Error: \[Errno|WorkerGroupError|ActorDiedError)"
)

# What a line may raise that is no line of ours.
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, ToolkitError)


@dataclass(frozen=True)
class Answered:
    """A point that was answered without training. `digest` names the run it repeats, None where there is none."""

    params: Mapping[str, Any]
    reason: Reason
    digest: str | None
    message: str


class Event(NamedTuple):
    """What happened, in the order of the lines.

    what     the line's event, of those that decide what is proposed next
    digest   of the training; "" where a point was answered without one
    number   step of a rung; place in `answered` of an answered point
    """

    what: Literal["started", "rung", "finished", "answered"]
    digest: str = ""
    number: int = 0


class Records:
    """What a study folder says, as of its last line.

    folder     the study folder
    header     contents of study.json
    place      where the workers write adapters: the study folder, or URI/<name>
    shape      sizes of the model
    outcomes   last known outcome of every digest, in the order in which they were started or finished
    points     those that finished, as points and their front
    tried      (point, seed) of everything that was started
    answered   points answered without training, in order
    events     everything that what is proposed next follows from, in order
    orders     what was asked of the driver while it ran (`orders.py`), and its answers
    problems   one sentence for everything that is damaged
    sampler_seconds   what it took to propose each point that was started
    lost       digest -> how often the platform took the training away
    reused     digest -> the study of the same storage that trained it, of outcomes that were not trained here
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], *, place: str = "") -> None:
        self.folder = folder
        self.header = header
        self.place = place or place_of(folder, header)
        self.shape = ModelShape.from_json(header["shape"])
        self.outcomes: dict[str, Outcome] = {}
        self.points = Points(
            max_forgetting=float(header["config"].get("max_forgetting", 0.0)),
            of_three=header["config"].get("objectives") == THREE,
        )
        self.tried: set[tuple[str, int]] = set()
        self.answered: list[Answered] = []
        self.events: list[Event] = []
        self.orders: list[Obeyed] = []
        self.problems: list[str] = []
        self.sampler_seconds: list[float] = []
        self.lost: Counter[str] = Counter()
        self.reused: dict[str, str] = {}
        self._trained: dict[str, Outcome] = {}
        self._params: dict[str, dict[str, Any]] = {}
        self._rungs: dict[str, dict[int, Rung]] = {}
        self._scores: dict[str, Score] = {}

    @property
    def name(self) -> str:
        """The name that its folder had when it was last opened for writing."""
        name: str = self.header["name"]
        return name

    @property
    def seed(self) -> int:
        """The study's own seed; a run with another one repeats a point."""
        seed: int = self.header["identity"].get("seed", 0)
        return seed

    @cached_property
    def untrained(self) -> Mapping[str, Any] | None:
        """accuracy, stderr and by_task of the base before training, and the same on the test split in `test`.

        None where it was not evaluated; an earlier version's has no `test`.
        """
        try:
            base = checks.mapping(json.loads(read_bytes(self.folder, UNTRAINED)), UNTRAINED)
            Rung.from_json({"step": 0, "tokens": 0, **base})
            checks.number(base["stderr"], "stderr", low=0)
            checks.number(base["accuracy"], "accuracy")
            if base.get("test") is not None:
                Score.from_json(base["test"])
        except FileNotFoundError:
            return None
        except (OSError, *_DAMAGE) as error:
            self.problems.append(_damaged(f"{self.folder / UNTRAINED} is damaged and was left out", error))
            return None
        return base

    @cached_property
    def signals(self) -> dict[str, Signal]:
        """Measured signals by kind; a damaged file counts as not measured."""
        signals, damaged = measured_signals(self.folder)
        self.problems += damaged
        return signals

    @property
    def finished(self) -> Mapping[str, Outcome]:
        """Outcomes by digest, in the order in which they finished: complete, stopped, diverged, failed, ..."""
        return MappingProxyType(self.points.outcomes)

    @property
    def trained(self) -> Mapping[str, Outcome]:
        """Those of `finished` that were trained here: not reused from another study, not cut from a training."""
        return MappingProxyType(self._trained)

    @property
    def in_flight(self) -> list[tuple[Outcome, dict[str, Any]]]:
        """Started and not finished, with the point's parameters and the rungs so far."""
        return [(o, self._params[digest]) for digest, o in self.outcomes.items() if o.status not in FINISHED]

    def params_of(self, digest: str) -> dict[str, Any]:
        """Sampler parameters of the point that was trained as this digest (KeyError where there is none)."""
        return self._params[digest]

    def adapter_of(self, outcome: Outcome) -> str | None:
        """Where its adapter lies: a URI, or a folder of the study that is still there and has no link out of it."""
        if not outcome.adapter:
            return None
        here = self.folder.absolute() / ADAPTERS / outcome.digest
        if here.is_dir():
            return None if has_links_out(here, self.folder) else str(here)
        return storage.join(self.place, ADAPTERS, outcome.digest) if storage.is_uri(self.place) else None

    def apply(self, line: Mapping[str, Any]) -> None:
        """Takes one line in; raises one of _DAMAGE and changes nothing where it is no such line."""
        match line["event"]:
            case "started" | "finished":
                self._apply_outcome(line)
            case "rung":
                digest, rung = checks.digest(line["digest"]), Rung.from_json(line["rung"])
                # by step: a run that goes on from its checkpoint reports some rungs a second time
                if rung.step not in self._rungs.setdefault(digest, {}):
                    self.events.append(Event("rung", digest, rung.step))
                self._rungs[digest][rung.step] = rung
                if digest in self.outcomes and self.outcomes[digest].status not in FINISHED:
                    self.outcomes[digest] = self.outcomes[digest].updated(rungs=self._curve(digest))
            case "lost":
                self._apply_lost(checks.digest(line["digest"]), checks.text(line["reason"], "reason"))
            case "ordered":
                order, answer = Order.from_json(line["order"]), checks.text(line["answer"], "answer")
                self.orders.append(Obeyed(order, answer))
            case "tested":
                self._apply_test(checks.digest(line["digest"]), Score.from_json(line["test"]))
            case "answered":
                if line["reason"] not in get_args(Reason):
                    raise ValueError("unknown reason")
                repeated = None if line["digest"] is None else checks.digest(line["digest"])
                params, message = checks.scalars(line["params"], "params"), checks.text(line["message"], "message")
                self.events.append(Event("answered", number=len(self.answered)))
                self.answered.append(Answered(params, line["reason"], repeated, message))
            case _:
                raise ValueError("unknown event")

    def _apply_outcome(self, line: Mapping[str, Any]) -> None:
        outcome, params = Outcome.from_json(line["outcome"]), checks.scalars(line["params"], "params")
        self._check_ours(outcome.trial)
        outcome.check_count(self.shape)
        if outcome.status == "failed" and (was_lost := _LOST.search(outcome.message)) is not None:
            log.info("%s was lost, not failed: %s", outcome.digest, was_lost[0])  # as earlier versions recorded it
            outcome, line = outcome.updated(status="lost", rungs=()), {**line, "event": "started"}
            self.lost[outcome.digest] += 1
        if (outcome.status in FINISHED) != (line["event"] == "finished"):
            raise ValueError(f"a '{line['event']}' line cannot have status '{outcome.status}'")
        seconds = checks.number(line.get("sampler_seconds") or 0.0, "sampler_seconds", low=0)
        reused = checks.text(line.get("reused") or "", "reused")
        digest = outcome.digest
        if outcome.adapter:
            outcome = outcome.updated(adapter=adapter_name(digest))
        if not outcome.rungs:
            outcome = outcome.updated(rungs=self._curve(digest))
        if outcome.test is None and outcome.status == "complete":
            outcome = outcome.updated(test=self._scores.get(digest))
        if seconds:
            self.sampler_seconds.append(float(seconds))
        self.tried.add((outcome.trial.point, outcome.trial.seed))
        if outcome.status not in FINISHED and digest in self.points.outcomes:
            return  # the lines are in another order: what has ended does not begin again
        if reused:
            self.reused[digest] = reused
        for known in (self.outcomes, self._trained):  # to the end: dictionaries keep the order of events
            known.pop(digest, None)
        self.outcomes[digest] = outcome
        self.events.append(Event("finished" if outcome.status in FINISHED else "started", digest))
        self._params[digest] = params
        if outcome.status not in FINISHED:
            return
        self.points.add(outcome)
        if digest not in self.reused and not outcome.trial.parent:
            self._trained[digest] = outcome

    def _check_ours(self, trial: Trial) -> None:
        """Raises ValueError for a training of another model or task: its accuracy says nothing here."""
        for key in ("model", "task"):
            ours, theirs = self.header["identity"].get(key), getattr(trial, key)
            if ours not in (None, theirs) and ours != redacted(theirs):
                raise ValueError(f"it is a training with {key}={redacted(theirs)}, and the study has {key}={ours}")

    def _apply_lost(self, digest: str, reason: str) -> None:
        self.lost[digest] += 1
        if digest in self.outcomes and self.outcomes[digest].status not in FINISHED:
            self.outcomes[digest] = self.outcomes[digest].updated(status="lost", message=reason)

    def _apply_test(self, digest: str, score: Score) -> None:
        """For a training that has finished, or whose end was on a line that is damaged, until it ends again."""
        self._scores[digest] = score
        if digest in self.points.outcomes and self.outcomes[digest].status == "complete":
            outcome = self.outcomes[digest] = self.outcomes[digest].updated(test=score)
            self.points.update(outcome)
            if digest in self._trained:
                self._trained[digest] = outcome

    def _curve(self, digest: str) -> tuple[Rung, ...]:
        rungs = self._rungs.get(digest, {})
        return tuple(rungs[step] for step in sorted(rungs))

    def take_in(self, data: bytes) -> int:
        """Takes in all whole lines; returns the length of what is not a torn last line."""
        *lines, tail = data.split(b"\n")
        for number, text in enumerate(lines, start=1):
            if error := self._take(text):
                line = f"{self.folder / LINES} line {number}"
                self.problems.append(_damaged(f"{line} is damaged and was skipped", error))
        # Torn between the closing brace and the newline: nothing is missing, so nothing is lost.
        return len(data) if not tail or self._take(tail) is None else len(data) - len(tail)

    def _take(self, text: bytes) -> Exception | None:
        """Applies one line of the file; returns what is wrong with it where it cannot."""
        try:
            self.apply(json.loads(text))
        except _DAMAGE as error:
            return error
        return None


def adapter_name(digest: str) -> str:
    """An adapter's path in its study, as records name it."""
    return f"{ADAPTERS}/{digest}"


def measured_signals(folder: Path) -> tuple[dict[str, Signal], list[str]]:
    """Signals by kind that a study folder holds, and a sentence for every damaged one; none of a folder without any."""
    signals: dict[str, Signal] = {}
    problems: list[str] = []
    for file in sorted((folder / SIGNALS).glob("*.json")):
        try:
            signal = Signal.from_json(json.loads(read_bytes(folder, SIGNALS, file.name)))
            canonical_json(signal.to_json())  # raises ValueError where a number is not finite
            signals[file.stem] = signal
        except (OSError, *_DAMAGE) as error:
            problems.append(_damaged(f"{file} is damaged and was left out", error))
    return signals, problems


def _damaged(what: str, error: Exception) -> str:
    """One line about what could not be read, safe to print and to write, whatever the error quotes."""
    reason = re.sub(r"\s+", " ", str(error))[:200].encode("ascii", "backslashreplace").decode()
    return f"{what}: {type(error).__name__}: {reason}"


def read(folder: str | Path) -> Records:
    """What a study folder says now; takes no lock and writes nothing.

    Raises StudyError where there is no study in the folder.
    """
    folder = Path(folder)
    records = Records(folder, read_header(folder))
    try:
        records.take_in(read_bytes(folder, LINES))
    except OSError as error:
        raise StudyError(f"{folder / LINES} cannot be read ({error.strerror}): is {folder} a study folder?") from None
    for problem in records.problems:
        log.warning(problem)
    return records


def flattened(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level with dotted keys.

    >>> flattened({"seed": 1, "recipe": {"rank": 8}})
    {'seed': 1, 'recipe.rank': 8}
    """
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flattened(item, f"{prefix}{key}.") if isinstance(item, Mapping) and item else {f"{prefix}{key}": item}
    return flat
