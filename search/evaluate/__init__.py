"""Evaluates a winner of a study on another task, beside its base without an adapter, question by question.

    python -m search.evaluate studies/sieve-tiny-moe-default task=tiny_cipher            # the most accurate point
    python -m search.evaluate studies/sieve-tiny-moe-default point=knee task=tiny_cipher,tiny_backcipher
    python -m search.evaluate studies/sieve-tiny-moe-default task=arc_easy limit=500 num_fewshot=5
    python -m search.evaluate studies/ranks_table-tiny-moe-default point=all forgetting=held_out
    python -m search.evaluate help

The split is the one that lm-eval reports: a task's test split, else its validation split. Nothing is trained, and
nothing of the study changes: a line is added to evaluations.jsonl in its folder. Where no task is named, the study's
own task is evaluated with the study's settings. A task needs a training split, as in a study. `forgetting=` measures
instead how much the loss on general text rose with the adapters of one point, of the front or of all trainings that are
kept (`forgotten.py`).

A difference is paired over the questions: d = mean of (score with the adapter − score of the base), and its standard
error is that of the mean of these differences.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocators.core import words
from allocators.core.errors import StudyError
from allocators.core.types import Outcome
from search import door, records
from search.config import load_arguments
from search.evaluate.forgotten import forgotten
from search.evaluate.lines import record
from search.export import find, locate
from search.records import mirror
from search.report import Report
from search.text import run_id
from trainers import forgetting, models, storage, tasks

if TYPE_CHECKING:  # a request that cannot work is refused without torch
    from trainers.models import Loaded
    from trainers.tasks import AnyTask, Evaluation

TASK_SETTINGS = ("metric", "num_fewshot", "fewshot_seed", "chat_template", "limit")


@dataclass(frozen=True)
class Request:
    """What the command line asks for besides the study's folder."""

    point: str = words.key(
        "best",
        "best (the most accurate), knee, or a run's id (its first digits, if unique); with forgetting= also front "
        "or all, whose adapters are kept",
    )
    forgetting: str = words.key(
        "", "loss on this text less that of the base, as forgetting= of a study (held_out, a file, a task)"
    )
    task: str = words.key("", "task, task file or group, several with commas (empty: the study's own task)")
    limit: int = words.key(0, "evaluate on the first N questions of each task only (0: all)", least=0)
    metric: str = words.key("", "what accuracy is, e.g. acc_norm (empty: as the task says)")
    num_fewshot: int = words.key(-1, "examples before each question (-1: as the task says)", least=0, unset=-1)
    chat_template: bool = words.key(False, "put prompts into the tokenizer's chat template")
    batch_size: int = words.key(32, "sequences of one forward pass", least=1)
    base: bool = words.key(True, "evaluate the base without the adapter too")
    model: str = words.key("", "where the base model is now, if it has moved since the study")
    device: str = words.key("", "torch device (empty: cuda where there is one)")


@dataclass(frozen=True)
class Compared:
    """One task: accuracy and standard error of the base (None where it was not evaluated) and with the adapter.

    difference, error   paired over the questions; None without the base, error None with fewer than two questions
    """

    task: str
    questions: int
    metric: str
    base: tuple[float, float] | None
    adapted: tuple[float, float]
    difference: float | None
    error: float | None

    @property
    def line(self) -> str:
        """The row in words."""
        said = f"{self.task}: {_score(self.adapted)} with the adapter"
        if self.base is not None and self.difference is not None:
            error = "unknown" if self.error is None else f"{self.error:.3f}"
            said += f", {_score(self.base)} without: {self.difference:+.3f} (standard error {error}, paired)"
        return f"{said}; {self.metric} of {self.questions:,} question{'s' if self.questions > 1 else ''}"


def _score(of: tuple[float, float]) -> str:
    return f"{of[0]:.3f} ± {of[1]:.3f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 the request cannot work."""
    return door.answer(argv, told=help_text, act=_evaluate)


def _evaluate(given: Sequence[str]) -> Iterator[str]:
    folder, request = parse(given)
    return evaluate(mirror.here(folder), request)


def help_text() -> str:
    """Usage, keys with their defaults, and the rest of this file's docstring."""
    return door.help_text("search.evaluate STUDY [key=value ...]", Request, __doc__)


def parse(given: Sequence[str]) -> tuple[str, Request]:
    """The study's folder, and the rest. Raises StudyError with one line for what cannot work."""
    return door.one_study(given, Request, example="search.evaluate STUDY task=NAME")


def evaluate(folder: str | Path, request: Request) -> Iterator[str]:
    """Evaluates one point; yields what to tell the user, line by line, and adds the result to the study's folder.

    Raises StudyError where the study, the point, its adapter, its base or the task is missing, and where the right
    answer of a row does not score 1.
    """
    report = Report(records.read(folder))
    settings = report.records.header["config"]
    if settings.get("replay"):
        raise StudyError(f"{folder} asked a recorded table, which has no adapters: evaluate a study that trained")
    if request.forgetting:
        yield from _forgotten(report, request)
        return
    candidate, run = find(report, request.point)
    where = locate(report, run)
    task = _task(request, settings)
    yield f"run {run_id(run)}: {report.label(run)} ({report.accuracy_words(candidate)})"
    loaded = _load(report, request, run.trial.model)
    limits = tasks.Limits.of(loaded.model.config.to_dict(), recipe={})
    yield from (f"note: {note}" for note in tasks.look(task, loaded.tokenizer, limits, trains=False).notes)
    task.prepare(loaded.tokenizer, rank=0, world_size=1)
    base = _evaluated(loaded, task, None) if request.base else None
    compared = _compared(request.task or settings["task"], base, _evaluated(loaded, task, where))
    yield from (row.line for row in compared)
    _record(report, run, request, task.data_hash, compared)


def _load(report: Report, request: Request, model: str) -> Loaded:
    arguments = load_arguments(report.records.header["config"])
    return models.load(request.model or model, device=models.device_or_default(request.device), **arguments)


def _forgotten(report: Report, request: Request) -> Iterator[str]:
    """`forgetting=`: of one training, or of all of the front or of the study whose adapters are kept.

    Raises StudyError where a task or a setting of one is asked as well, or no adapter is kept.
    """
    if request.task:
        raise StudyError("forgetting= and task= are two questions: ask one after the other")
    defaults = Request()
    for name in (*(name for name in TASK_SETTINGS if hasattr(defaults, name)), "batch_size", "base"):
        if getattr(request, name) != getattr(defaults, name):
            raise StudyError(f"{name}= is of a task's questions, and forgetting= takes its text as it is: leave it out")
    if request.point in ("front", "all"):
        points = report.front if request.point == "front" else report.points
        places = ((run, report.records.adapter_of(run)) for point in points for run in point.complete)
        runs = [(run, where) for run, where in places if where and storage.exists(where)]
    else:
        run = find(report, request.point)[1]
        runs = [(run, locate(report, run))]
    if not runs:
        raise StudyError(
            f"point={request.point}: no adapter of {report.records.folder} is kept: train with keep=all, or keep=front "
            "for the front"
        )
    forgetting.check(request.forgetting, model=runs[0][0].trial.model)
    yield from forgotten(report, runs, text=request.forgetting, loaded=_load(report, request, runs[0][0].trial.model))


def _task(request: Request, settings: Mapping[str, Any]) -> AnyTask:
    """The task on the split that is reported; of the study's own task the study's settings hold where none is asked."""
    options: dict[str, Any] = {name: getattr(request, name) for name in TASK_SETTINGS if hasattr(request, name)}
    if not request.task:
        defaults = Request()
        asked = {name for name in options if options[name] != getattr(defaults, name)}
        options |= {name: settings[name] for name in TASK_SETTINGS if name in settings and name not in asked}
    if options["num_fewshot"] < 0:
        options["num_fewshot"] = None
    name = request.task or settings["task"]
    return tasks.load_task(name, select_on="test", batch_size=request.batch_size, **options)


def _evaluated(loaded: Loaded, task: AnyTask, where: str | None) -> Evaluation:
    """The base, with the adapter that lies at `where` if there is one."""
    from trainers import adapter

    loaded.model.eval()
    if where is None:
        return task.evaluate(loaded.model)
    with adapter.applied(loaded.model, where):
        loaded.model.eval()
        return task.evaluate(loaded.model)


def _compared(name: str, base: Evaluation | None, adapted: Evaluation) -> list[Compared]:
    """A row of each task; of several tasks their mean is the last one, in which each task counts the same."""
    parts = [
        row
        for label, part in adapted.parts.items()
        for row in _compared(label, None if base is None else base.parts[label], part)
    ]
    if parts:
        errors = [row.error for row in parts if row.error is not None]
        error = math.hypot(*errors) / len(parts) if len(errors) == len(parts) else None
    else:
        error = None if base is None else _paired_error(base.correct, adapted.correct)
    mean = Compared(
        task=f"mean of {len(parts)} tasks" if parts else name,
        questions=sum(row.questions for row in parts) if parts else len(adapted.correct),
        metric=adapted.metric,
        base=None if base is None else (base.accuracy, base.stderr),
        adapted=(adapted.accuracy, adapted.stderr),
        difference=None if base is None else adapted.accuracy - base.accuracy,
        error=error,
    )
    return [*parts, mean]


def _paired_error(before: Sequence[float], after: Sequence[float]) -> float | None:
    """Standard error of the mean difference over questions; one question has none."""
    changes = [new - old for old, new in zip(before, after, strict=True)]
    return statistics.stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else None


def _record(report: Report, run: Outcome, request: Request, data: str, compared: Sequence[Compared]) -> None:
    asked = {name: getattr(request, name) for name in ("task", *TASK_SETTINGS) if hasattr(request, name)}
    results = [
        {"task": c.task, "questions": c.questions, "metric": c.metric, "accuracy": c.adapted[0]}
        | {"stderr": c.adapted[1], "base": c.base and c.base[0], "difference": c.difference, "error": c.error}
        for c in compared
    ]
    record(report, run, asked=asked, data=data, results=results)
