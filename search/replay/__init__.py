"""Recorded trainings as a table, and studies that ask the table instead of training: a search in seconds.

    python -m search.replay export studies/a studies/b to=mine.parquet        # studies that differ in the seed only
    python -m search.run replay=mine.parquet sampler=tpe trials=40 seed=1     # the same Tune, sampler and scheduler
    python -m search.run replay=tiny-moe                                      # a table of search/replay/tables/

A table has one row for every training that ended by itself (complete, diverged, out of memory):

    param.NAME        the sampler's parameters of the point; null where its branch of the space has no such parameter
    seed, study_seed  of the training; of its study, which is what allocators that draw were given
    status, accuracy, stderr, trainable_params, tokens, seconds, message
    rungs             list of {step, tokens, accuracy, stderr, loss, seconds}
    digest, trial     the training's name, and its allocation, recipe, model and task as JSON
    versions          of the libraries and the device, as JSON

and, in the file's metadata under `lora-expert-search`, what the studies share: identity, sizes of the model, signals.

Nothing is made up: a point that the table does not hold is answered as infeasible. So that points are found, numeric
knobs are drawn as the space draws them and then take the nearest of the table's values, and categorical ones are drawn
from those that occur. A table of a full grid therefore holds nearly every point that is asked for.

Time is virtual and counts trained tokens. `TableBoard` stands where the workers' board stands: it passes the next
report on only when every simulated worker is busy or known to be idle, the one that comes first by its clock. So
asynchronous workers, and schedulers that decide by order of arrival, meet what they would meet, in Ray Tune as it is.
`tests/benchmarks/search_tables.py` drives the same samplers without Ray, where a hundred searches are wanted.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol

from allocators.core import words
from allocators.core.errors import InfeasibleError, StudyError, ToolkitError, unknown
from allocators.core.types import (
    Allocation,
    ModelShape,
    Outcome,
    Point,
    Recipe,
    Signal,
    Trial,
    canonical_json,
    digest_of,
)
from search.config import keys
from search.export.model_card import portable, portable_command
from search.problem import PinnedTrial, Problem, load_space
from search.propose.sampler import Proposal
from search.records import read

METADATA = b"lora-expert-search"
FORMAT = 1
SHIPPED = Path(__file__).parent / "tables"
KEPT = ("complete", "diverged", "out_of_memory")  # a failed or stopped run says what happened to it, not to its point
WORKERS = 4


@dataclass(frozen=True)
class Row:
    """One recorded training: what it came to, the sampler's parameters of its point, its study's own seed."""

    outcome: Outcome
    params: Mapping[str, Any]
    study_seed: int


@dataclass(frozen=True)
class Table:
    """Recorded trainings of one space, model and task.

    about   format, identity (what the studies' results depend on), shape, signals, studies
    rows    by digest
    """

    name: str
    about: Mapping[str, Any]
    rows: Mapping[str, Row]

    @cached_property
    def values(self) -> dict[str, list[Any]]:
        """The values of every parameter that occur, in order."""
        found: dict[str, set[Any]] = {}
        for row in self.rows.values():
            for name, value in row.params.items():
                found.setdefault(name, set()).add(value)
        return {name: sorted(values, key=lambda v: (isinstance(v, str), v)) for name, values in found.items()}

    @property
    def seeds(self) -> list[int]:
        return sorted({row.outcome.trial.seed for row in self.rows.values()})

    @property
    def settings(self) -> dict[str, Any]:
        """Keys of a study that the table fixes: space, model, task, evaluations, ..."""
        own = {*keys(decides="proposals")} - {*keys(where="space")}  # the user's to choose, or in the rows already
        return {key: value for key, value in self.about["identity"].items() if key not in own}

    def problem(
        self, *, seed: int, max_trainable_params: int = 0, pins: Mapping[str, Any] = MappingProxyType({})
    ) -> TableProblem:
        """What a study against the table searches; needs neither the model nor the task.

        Raises StudyError for a seed that was not recorded, or a budget below the table's smallest row.
        """
        if seed not in self.seeds:
            listed = ", ".join(map(str, self.seeds))
            raise StudyError(f"seed={seed} is not in the table {self.name}: choose from {listed}")
        rows = [row for row in self.rows.values() if row.outcome.trial.seed == seed]
        smallest = min(row.outcome.trainable_params for row in rows)
        if 0 < max_trainable_params < smallest:
            raise StudyError(
                f"max_trainable_params={max_trainable_params:,} is below the smallest row of the table {self.name}, "
                f"{smallest:,}: raise it"
            )
        shape = ModelShape.from_json(self.about["shape"])
        recipes = [row.outcome.trial.recipe for row in rows]
        same = {f.name: getattr(recipes[0], f.name) for f in fields(Recipe)}
        same = {name: value for name, value in same.items() if all(getattr(r, name) == value for r in recipes)}
        return TableProblem(
            space=load_space(self.about["identity"]["space"], shape),
            shape=shape,
            model=rows[0].outcome.trial.model,
            task=rows[0].outcome.trial.task,
            seed=seed,
            max_trainable_params=max_trainable_params,
            signals={kind: Signal.from_json(signal) for kind, signal in self.about["signals"].items()},
            task_recipe=same,
            pins=dict(pins),
            table=self,
            study_seed=rows[0].study_seed,
        )

    @cached_property
    def mark(self) -> str:
        """Its name and the digest of its rows, as `replayed` in the versions of every outcome that it answers."""
        return f"{self.name} {digest_of(sorted(self.rows))}"

    def answers(self) -> dict[str, dict[str, Any]]:
        """What the board needs: outcomes as JSON by digest, marked as recorded."""
        marked = {"replayed": self.mark}
        return {
            key: row.outcome.updated(adapter="", versions={**row.outcome.versions, **marked}).to_json()
            for key, row in self.rows.items()
        }


@dataclass(frozen=True)
class TableProblem(Problem):
    """A problem whose points are rows of a table. Signals, shape and recipe are those it was recorded with."""

    table: Table = field(kw_only=True)
    study_seed: int = 0

    @property
    def is_table(self) -> bool:
        return False  # recorded as a grid of which every row was trained; now it is searched

    def ask(self, trial: Any) -> tuple[Point, dict[str, Any]]:
        pinned = PinnedTrial(_Nearest(trial, self.table.values), self.pins)
        return self.suggest(pinned, self.shape), pinned.params

    def allocate(self, point: Point, *, seed: int | None = None) -> Allocation:
        """As the recording study allocated: a draw that all seeds share was made with that study's own seed."""
        with_its_seed = Problem(**{f.name: getattr(self, f.name) for f in fields(Problem)} | {"seed": self.study_seed})
        return with_its_seed.allocate(point, seed=self.seed if seed is None else seed)

    def resolve(self, point: Point) -> tuple[Trial, int]:
        trial, cost = super().resolve(point)
        if trial.digest not in self.table.rows:
            raise InfeasibleError(f"the table {self.table.name} has no row for this point at seed {trial.seed}")
        return trial, cost


class _Nearest:
    """A trial whose values are those that a table has: the nearest to what the real trial suggests.

    Choices among three or more numbers are drawn as the ordered parameter that they are, from half a gap below the
    first to half a gap above the last, so that every choice is equally likely where they are equally far apart.
    """

    def __init__(self, trial: Any, values: Mapping[str, Sequence[Any]]) -> None:
        self._trial = trial
        self._values = values

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        known = [choice for choice in choices if choice in self._values.get(name, choices)] or list(choices)
        if len(known) < 3 or not all(_is_number(choice) for choice in known):
            return self._trial.suggest_categorical(name, known)
        ordered = sorted(known)
        log = ordered[0] > 0 and ordered[-1] / ordered[0] >= 10
        scale: Callable[[float], float] = math.log if log else float
        back: Callable[[float], float] = math.exp if log else float
        places = [scale(value) for value in ordered]
        low = back(places[0] - (places[1] - places[0]) / 2)
        high = back(places[-1] + (places[-1] - places[-2]) / 2)
        return _nearest(ordered, self._trial.suggest_float(name, low, high, log=log), log=log)

    def suggest_float(self, name: str, low: float, high: float, **options: Any) -> float:
        value = self._trial.suggest_float(name, low, high, **options)
        return float(_nearest(self._numbers(name), value, log=options.get("log", False)))

    def suggest_int(self, name: str, low: int, high: int, **options: Any) -> int:
        value = self._trial.suggest_int(name, low, high, **options)
        return int(_nearest(self._numbers(name), value, log=options.get("log", False)))

    def _numbers(self, name: str) -> list[Any]:
        return [value for value in self._values.get(name, ()) if _is_number(value)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _nearest(values: Sequence[Any], value: float, *, log: bool) -> Any:
    """Of the values the nearest, the smaller of two; the value itself where there are none."""
    if not values:
        return value
    if log:
        return min(values, key=lambda v: (abs(math.log(v / value)), v) if v > 0 else (math.inf, v))
    return min(values, key=lambda v: (abs(v - value), v))


class TableBoard:
    """Stands where `engine/workers.py`'s Board stands, with simulated workers that read a table. Runs as an actor.

    A job that was cancelled and is submitted again goes on behind the rungs it had reached, and reports those again at
    once, as a worker does that goes on from a checkpoint.
    """

    def __init__(self, answers: Mapping[str, Mapping[str, Any]], workers: int) -> None:
        self._answers = answers
        self._workers = workers
        self._now = 0.0  # tokens
        self._order = itertools.count()
        self._due: dict[str, list[tuple[float, int, dict[str, Any]]]] = {}  # running job -> its reports to come
        self._reached: dict[str, float] = {}  # tokens that a job was trained for when it last left its worker
        self._began: dict[str, float] = {}
        self._asking: dict[str, asyncio.Future] = {}
        self._idle = self._over = False

    async def submit(self, job_id: str, job: Mapping[str, Any]) -> None:
        """A free worker begins, or goes on with, a training."""
        outcome = self._answers.get(job_id)
        if outcome is None:
            done: dict[str, Any] = {"done": True, "error": "the table has no row for this training"}
            self._due[job_id] = [(self._now, next(self._order), done)]
        else:
            # whoever proposed it knows it by another allocator's name, perhaps: the row keeps to what was asked
            told = dict(outcome) | {"trial": json.loads(job["trial"])}
            reports = [(rung["tokens"], {"done": False, "rung": json.dumps(rung)}) for rung in outcome["rungs"]]
            reports.append((outcome["tokens"], {"done": True, "outcome": json.dumps(told)}))
            start = self._began[job_id] = self._now - self._reached.get(job_id, 0.0)
            self._due[job_id] = [
                (max(start + tokens, self._now), next(self._order), message) for tokens, message in reports
            ]
        self._pass_on()

    async def next_report(self, job_id: str) -> dict[str, Any]:
        """The job's next report, when the clock has come to it."""
        report = self._asking[job_id] = asyncio.get_running_loop().create_future()
        self._pass_on()
        return await report

    async def cancel(self, job_id: str) -> None:
        """The job leaves its worker."""
        if job_id in self._due:
            del self._due[job_id]
            self._reached[job_id] = self._now - self._began.get(job_id, self._now)
            self._pass_on()

    async def idle(self, *, over: bool) -> None:
        """Free workers stay free until the next report, or for good where the study is `over`."""
        self._idle, self._over = True, self._over or over
        self._pass_on()

    async def close(self) -> None:
        self._due.clear()

    def _pass_on(self) -> None:
        """Answers the job whose report comes first, once all that run have asked and no worker is about to begin."""
        while self._due and all(job in self._asking for job in self._due):
            if not (self._idle or self._over or len(self._due) >= self._workers):
                return
            job_id = min(self._due, key=lambda job: self._due[job][0][:2])
            self._now, _, message = self._due[job_id].pop(0)
            if message["done"]:
                del self._due[job_id]
            self._idle = False
            self._asking.pop(job_id).set_result(message)


class Workers(Protocol):
    """Simulated workers, from the driver's side (`TablePool` in search/engine/workers.py)."""

    def idle(self, over: bool) -> None: ...
    def cancel(self, job_id: str) -> None: ...


class Announcing:
    """A conductor that lets the simulated workers know when a free one is given nothing, and when a job is no more."""

    def __init__(self, conductor: Any, workers: Workers) -> None:
        self._conductor = conductor
        self._workers = workers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._conductor, name)

    def propose(self) -> Proposal | Literal["wait"] | None:
        proposal = self._conductor.propose()
        if proposal is None or proposal == "wait":
            self._workers.idle(proposal is None)
        return proposal

    def lost(self, digest: str, reason: str) -> None:
        self._workers.cancel(digest)
        self._conductor.lost(digest, reason)


def load(name: str) -> Table:
    """A shipped table by its name, or a file. Raises StudyError where there is none, or it is no such table."""
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    file = Path(name) if Path(name).is_file() else SHIPPED / f"{name}.parquet"
    if not file.is_file():
        if name.endswith(".parquet") or "/" in name:
            raise StudyError(f"replay={name}: there is no such file")
        raise unknown("table of replay=", name, [shipped.stem for shipped in SHIPPED.glob("*.parquet")])
    try:
        content = pq.read_table(file)
        about = json.loads((content.schema.metadata or {})[METADATA])
        if about["format"] != FORMAT:
            raise StudyError(f"{file} has format {about['format']}, this version reads {FORMAT}: export it again")
        rows = [_row(line, about) for line in content.to_pylist()]
    except (ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise StudyError(
            f"{file} is no table of recorded trainings ({type(error).__name__}): make one with "
            "python -m search.replay export STUDY to=FILE.parquet"
        ) from None
    # by the digest of today: a recipe may have got a setting since, at a default that changes nothing
    return Table(file.stem, about, {row.outcome.digest: row for row in rows})


def _row(line: Mapping[str, Any], about: Mapping[str, Any]) -> Row:
    params = {k.removeprefix("param."): v for k, v in line.items() if k.startswith("param.") and v is not None}
    outcome = Outcome(
        Trial.from_json(json.loads(line["trial"])),
        line["status"],
        line["trainable_params"],
        line["accuracy"],
        tuple(line["rungs"]),
        line["seconds"],
        line["tokens"],
        message=line["message"],
        versions=json.loads(line["versions"]),
    )
    return Row(outcome, params, line["study_seed"])


def export(folders: Iterable[str | Path], file: str | Path) -> Table:
    """Writes the trainings of studies that differ in their seed only into one table, and returns it.

    Raises StudyError where the studies do not belong together, hold nothing, or the file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    studies = [read(folder) for folder in folders]
    about: dict[str, Any] = {}
    lines: dict[str, dict[str, Any]] = {}
    for records in studies:
        identity = {key: value for key, value in records.header["identity"].items() if key != "seed"}
        signals = {f.stem: json.loads(f.read_text()) for f in sorted((records.folder / "signals").glob("*.json"))}
        found = {"format": FORMAT, "identity": identity, "shape": records.shape.to_json(), "signals": signals}
        about = about or found
        for part in ("identity", "shape", "signals"):
            if found[part] != about[part]:
                raise StudyError(
                    f"{records.folder} and {studies[0].folder} differ in their {part}: a table holds one space, model "
                    "and task; export them into two"
                )
        for digest, outcome in records.finished.items():
            if outcome.status in KEPT:
                lines.setdefault(digest, _line(outcome, records.params_of(digest), records.header["identity"]["seed"]))
    if not lines:
        raise StudyError(f"no finished training in {', '.join(str(r.folder) for r in studies)}: nothing to export")
    names = ("name", "id", "started", "versions")
    about["studies"] = [  # a table is handed on: it names no folder of this machine
        {name: records.header[name] for name in names} | {"command": portable_command(records.header["command"])}
        for records in studies
    ]
    ordered = sorted(lines.values(), key=lambda line: (line["seed"], line["trainable_params"], line["digest"]))
    columns = sorted({name for line in ordered for name in line if name.startswith("param.")})
    columns += [name for name in ordered[0] if not name.startswith("param.")]
    try:
        content = pa.Table.from_pydict({name: [line.get(name) for line in ordered] for name in columns})
    except pa.ArrowException as error:
        raise StudyError(f"a parameter has values of different kinds, which no column can hold ({error})") from None
    try:
        with pq.ParquetWriter(
            file, content.schema.with_metadata({METADATA: canonical_json(about).encode()}), compression="zstd"
        ) as writer:
            writer.write_table(content.replace_schema_metadata({METADATA: canonical_json(about).encode()}))
    except OSError as error:
        raise StudyError(f"{file} cannot be written ({error.strerror or error}): choose another with to=FILE") from None
    return load(str(file))


def _line(outcome: Outcome, params: Mapping[str, Any], study_seed: int) -> dict[str, Any]:
    measured = ("step", "tokens", "accuracy", "stderr", "loss", "seconds")
    rungs = [{name: rung.get(name) for name in measured} for rung in outcome.rungs]
    return {f"param.{name}": value for name, value in params.items()} | {
        "seed": outcome.trial.seed,
        "study_seed": study_seed,
        "status": outcome.status,
        "accuracy": outcome.accuracy,
        "stderr": rungs[-1]["stderr"] if rungs else None,
        "trainable_params": outcome.trainable_params,
        "tokens": outcome.tokens,
        "seconds": outcome.seconds,
        "message": portable(outcome.message),
        "rungs": rungs,
        "digest": outcome.digest,
        "trial": canonical_json(outcome.trial.to_json()),
        "versions": canonical_json(dict(outcome.versions)),
    }


@dataclass(frozen=True)
class Target:
    """The key of the command line."""

    to: str = words.key("", "the table to write, a .parquet file")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 the request cannot work."""
    given = list(sys.argv[1:] if argv is None else argv)
    usage = "usage: python -m search.replay export STUDY [STUDY ...] to=FILE.parquet"
    if words.asks_for_help(given):
        print("\n".join([usage, "", *words.help_of(Target)]))
        return 0
    try:
        bare, pairs = words.split(given)
        target = words.build(Target, pairs)
        if bare[:1] != ["export"] or not bare[1:] or not target.to:
            print(usage, file=sys.stderr)
            return 2
        table = export(bare[1:], target.to)
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    points = len({canonical_json(dict(row.params)) for row in table.rows.values()})
    size = Path(target.to).stat().st_size
    print(
        f"{len(table.rows)} trainings of {points} points with seeds {', '.join(map(str, table.seeds))}, "
        f"{size / 1024:.0f} KiB\npython -m search.run {shlex.quote(f'replay={target.to}')}"
    )
    return 0
