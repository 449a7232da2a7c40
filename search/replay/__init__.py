"""Recorded trainings as a table, and studies that ask the table instead of training: a search in seconds.

    python -m search.replay export studies/a studies/b to=mine.parquet        # studies that differ in the seed only
    python -m search.run replay=mine.parquet sampler=tpe trials=40 seed=1     # the same sampler and scheduler
    python -m search.run replay=tiny-moe                                      # a table of search/replay/tables/

A table has one row for every training that ended by itself (complete, diverged, out of memory):

    param.NAME        the sampler's parameters of the point; null where its branch of the space has no such parameter
    seed, study_seed  of the training; of its study, which is what allocators that draw were given
    status, accuracy, stderr, trainable_params, tokens, seconds, message
    rungs             list of {step, tokens, accuracy, stderr, loss, eval_loss, seconds}; older tables have no eval_loss
    forgetting        before, after and stderr of the loss on general text; only where a training measured it
    digest, trial     the training's name, and its allocation, recipe, model and task as JSON
    versions          of the libraries and the device, as JSON

and, in the file's metadata under `lora-expert-search`, what the studies share: identity, sizes of the model, signals.

What a study against a table searches: `problem.py`. Who answers it, and by which clock: `search/engine/simulated.py`.
`tests/benchmarks/search_tables.py` drives the same samplers without records, where a hundred searches are wanted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from allocators.core import checks, words
from allocators.core.errors import StudyError, ToolkitError, unknown
from allocators.core.types import ModelShape, Outcome, Signal, canonical_json, digest_of
from search.config import before, keys
from search.records import read
from search.records.files import refuse_other_kind
from search.records.header import check_settings, check_shape
from search.records.redact import portable, portable_command

METADATA = b"lora-expert-search"
FORMAT = 1
SHIPPED = Path(__file__).parent / "tables"
KEPT = ("complete", "diverged", "out_of_memory")  # a failed or stopped run says what happened to it, not to its point


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
        occurring: dict[str, set[Any]] = {}
        for row in self.rows.values():
            for name, value in row.params.items():
                occurring.setdefault(name, set()).add(value)
        return {name: sorted(values, key=lambda v: (isinstance(v, str), v)) for name, values in occurring.items()}

    @property
    def seeds(self) -> list[int]:
        """The seeds that rows were trained with, ascending."""
        return sorted({row.outcome.trial.seed for row in self.rows.values()})

    @cached_property
    def seeds_of(self) -> dict[str, set[int]]:
        """The seeds that each point, by its digest, was trained with."""
        trained: dict[str, set[int]] = {}
        for row in self.rows.values():
            trained.setdefault(row.outcome.trial.point, set()).add(row.outcome.trial.seed)
        return trained

    @property
    def settings(self) -> dict[str, Any]:
        """Keys of a study that the table fixes: space, model, task, evaluations, ..."""
        own = {*keys(decides="proposals")} - {*keys(where="space")}  # the user's to choose, or in the rows already
        fixed = {name for name in keys(decides="results") if name not in ("replay", *own)}
        older = {name: value for name, value in before().items() if name in fixed}
        return older | {key: value for key, value in self.about["identity"].items() if key not in own}

    @cached_property
    def mark(self) -> str:
        """Its name and the digest of its rows, as `replayed` in the versions of every outcome that it answers."""
        return f"{self.name} {digest_of(sorted(self.rows))}"

    @property
    def outcomes(self) -> dict[str, Outcome]:
        """By digest."""
        return {digest: row.outcome for digest, row in self.rows.items()}


def file_of(name: str) -> Path:
    """Where a table lies, or would lie: the file of that name, else a shipped one."""
    typed = words.path(name, "replay")
    return typed if typed.is_file() else SHIPPED / f"{name}.parquet"


def load(name: str) -> Table:
    """A shipped table by its name, or a file. Raises StudyError where there is none, or it is no such table."""
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    file = file_of(name)
    if not file.is_file():
        if name.endswith(".parquet") or "/" in name:
            raise StudyError(f"replay={name}: there is no such file")
        raise unknown("table of replay=", name, [shipped.stem for shipped in SHIPPED.glob("*.parquet")])
    damage = (ArrowException, OSError, KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError)
    try:
        content = pq.read_table(file)
        about = checks.mapping(json.loads((content.schema.metadata or {})[METADATA]), "what it is about")
        known = about["format"] == FORMAT
        shape = ModelShape.from_json(about["shape"]) if known and _check(about) else None
        rows = [_row(line, shape) for line in content.to_pylist()] if shape else []
    except (*damage, ToolkitError) as error:
        raise StudyError(
            f"{file} is no table of recorded trainings ({type(error).__name__}: {words.shown(ascii(error.args[:1]))}): "
            "make one with python -m search.replay export STUDY to=FILE.parquet"
        ) from None
    if not known:
        version = words.shown(ascii(about["format"]))
        raise StudyError(f"{file} has format {version}, this version reads {FORMAT}: export it again")
    if not rows:
        raise StudyError(f"{file} holds no training: export a study with finished ones")
    # by the digest of today: a recipe may have got a setting since, at a default that changes nothing
    return Table(file.stem, about, {row.outcome.digest: row for row in rows})


def _check(about: Mapping[str, Any]) -> bool:
    """Raises KeyError, ValueError or TypeError where a field of a table's metadata is none; else True."""
    check_settings(about["identity"], "identity")
    checks.text(about["identity"]["space"], "space")
    check_shape(about["shape"])
    for kind, signal in checks.mapping(about["signals"], "signals").items():
        if Signal.from_json(signal).kind != kind:
            raise ValueError(f"the signal {kind} is another one")
    return True


def _row(line: Mapping[str, Any], shape: ModelShape) -> Row:
    params = {k.removeprefix("param."): v for k, v in line.items() if k.startswith("param.") and v is not None}
    tested = line.get("test_accuracy")  # none in a table of an earlier version
    trial, versions = json.loads(line["trial"]), json.loads(line["versions"])
    test = None if tested is None else {"accuracy": tested, "stderr": line["test_stderr"]}
    names = ("status", "accuracy", "rungs", "seconds", "tokens", "message", "trainable_params")
    outcome = Outcome.from_json(
        {**{name: line[name] for name in names}, "trial": trial, "versions": versions, "test": test}
        | {"forgetting": line.get("forgetting")}
    )
    outcome.check_count(shape)
    if outcome.status not in KEPT:
        raise ValueError(f"a row has status {outcome.status}")
    return Row(
        outcome, checks.scalars(params, "params"), checks.whole(line["study_seed"], "study_seed", low=-checks.MOST)
    )


def _compared(part: Mapping[str, Any]) -> dict[str, Any]:
    """Without what earlier versions kept no record of."""
    return {key: value for key, value in part.items() if key != "active_experts"}


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
        signals = {kind: signal.to_json() for kind, signal in records.signals.items()}
        own: dict[str, Any] = {"format": FORMAT, "identity": identity}
        own |= {"shape": records.shape.to_json(), "signals": signals}
        about = about or own
        for part in ("identity", "shape", "signals"):
            if _compared(own[part]) != _compared(about[part]):
                raise StudyError(
                    f"{records.folder} and {studies[0].folder} differ in their {part}: a table holds one space, model "
                    "and task; export them into two"
                )
        for digest, outcome in records.finished.items():
            if outcome.status in KEPT and not outcome.trial.parent:
                lines.setdefault(digest, _line(outcome, records.params_of(digest), records.seed))
    if not lines:
        raise StudyError(f"no finished training in {', '.join(str(r.folder) for r in studies)}: nothing to export")
    names = ("name", "id", "started", "versions")
    about["studies"] = [  # a table is handed on: it names no folder of this machine
        {name: records.header[name] for name in names} | {"command": portable_command(records.header["command"])}
        for records in studies
    ]
    ordered = sorted(lines.values(), key=lambda line: (line["seed"], line["trainable_params"], line["digest"]))
    columns = sorted({name for line in ordered for name in line if name.startswith("param.")})
    columns += list(dict.fromkeys(name for line in ordered for name in line if not name.startswith("param.")))
    try:
        content = pa.Table.from_pydict({name: [line.get(name) for line in ordered] for name in columns})
    except pa.ArrowException as error:
        raise StudyError(f"a parameter has values of different kinds, which no column can hold ({error})") from None
    try:
        refuse_other_kind(Path(file), b"PAR1", kind="a table")
        with pq.ParquetWriter(
            file, content.schema.with_metadata({METADATA: canonical_json(about).encode()}), compression="zstd"
        ) as writer:
            writer.write_table(content.replace_schema_metadata({METADATA: canonical_json(about).encode()}))
    except OSError as error:
        raise StudyError(f"{file} cannot be written ({error.strerror or error}): choose another with to=FILE") from None
    return load(str(file))


def _line(outcome: Outcome, params: Mapping[str, Any], study_seed: int) -> dict[str, Any]:
    measured = ("step", "tokens", "accuracy", "stderr", "loss", "eval_loss", "seconds")
    rungs = [{name: getattr(rung, name) for name in measured} for rung in outcome.rungs]
    return {f"param.{name}": value for name, value in params.items()} | {
        "seed": outcome.trial.seed,
        "study_seed": study_seed,
        "status": outcome.status,
        "accuracy": outcome.accuracy,
        "stderr": rungs[-1]["stderr"] if rungs else None,
        "test_accuracy": outcome.test.accuracy if outcome.test else None,
        "test_stderr": outcome.test.stderr if outcome.test else None,
        "trainable_params": outcome.trainable_params,
        "tokens": outcome.tokens,
        "seconds": outcome.seconds,
        "message": portable(outcome.message),
        "rungs": rungs,
        **({"forgetting": asdict(outcome.forgetting)} if outcome.forgetting else {}),
        "digest": outcome.digest,
        "trial": canonical_json(outcome.trial.to_json()),
        "versions": canonical_json(dict(outcome.versions)),
    }
