"""The front of accuracy against trainable parameters: who is on it, how much it covers, where it bends.

    python -m search.report studies/demo        # prints what these functions find in a study

A point is anything with `trainable_params` and `accuracy`; a point whose accuracy is None or not finite has no place
on a front and is left out everywhere here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from allocators.core.types import Outcome, Trial, digest_of


class Point(Protocol):
    @property
    def trainable_params(self) -> int: ...
    @property
    def accuracy(self) -> float | None: ...


P = TypeVar("P", bound=Point)


def _valid(points: Iterable[P]) -> list[P]:
    return [p for p in points if p.accuracy is not None and math.isfinite(p.accuracy)]


def _rows(points: Sequence[Point]) -> list[tuple[float, float]]:
    return [(float(p.trainable_params), float(p.accuracy or 0.0)) for p in points]


def front(points: Iterable[P]) -> list[P]:
    """Points that no other point beats: fewer parameters at no less accuracy, or more accuracy at no more parameters.

    Ascending in parameters. Points that tie in both are all kept: neither is better, and dropping one would depend
    on the order of arrival.
    """
    valid = _valid(points)
    if not valid:
        return []
    import moocore  # here: it brings numpy, which nobody who only imports this module needs

    keep = moocore.is_nondominated(_rows(valid), maximise=[False, True], keep_weakly=True)
    return sorted((p for p, on in zip(valid, keep, strict=True) if on), key=lambda p: p.trainable_params)


def hypervolume(points: Iterable[Point], *, reference: tuple[float, float]) -> float:
    """Area that the points dominate up to `reference` = (trainable parameters, accuracy), a point worse than all.

    In parameters × accuracy. Points beyond the reference add nothing; no points cover 0.
    """
    valid = _valid(points)
    if not valid:
        return 0.0
    import moocore

    return float(moocore.hypervolume(_rows(valid), list(reference), maximise=[False, True]))


def knee(points: Iterable[P]) -> P | None:
    """The point of the front after which parameters buy less: farthest above the chord between the front's ends.

    With x = log(parameters) and y = accuracy, both scaled so that the ends of the front are (0, 0) and (1, 1), it is
    the point with the largest y - x. None for fewer than three different points, or where the front never rises above
    its chord: then there is no bend to speak of. Ties go to the smaller point.
    """
    ends = front(points)
    if len({(p.trainable_params, p.accuracy) for p in ends}) < 3:
        return None
    rows = [(math.log(max(params, 1.0)), accuracy) for params, accuracy in _rows(ends)]
    (x0, y0), (x1, y1) = rows[0], rows[-1]
    rises = [(y - y0) / (y1 - y0) - (x - x0) / (x1 - x0) for x, y in rows]
    best = max(range(len(ends)), key=lambda i: (rises[i], -i))
    return ends[best] if rises[best] > 1e-9 else None


@dataclass(frozen=True)
class Candidate:
    """All runs of one point: same allocation, recipe, model and task, different seeds.

    accuracy         mean over the seeds that ran to the end; None where none did
    stderr           standard error of that accuracy, from the evaluation's own and from the spread over seeds where
                     there are several; None where neither is known
    spread           standard deviation over the seeds; None for fewer than two
    question_error   standard error of the evaluation alone (the largest `stderr` of a last rung): more seeds do not
                     lower it, as all answer the same questions
    """

    runs: tuple[Outcome, ...]
    accuracy: float | None
    stderr: float | None
    spread: float | None = None
    question_error: float | None = None

    @property
    def trainable_params(self) -> int:
        return self.runs[0].trainable_params

    @property
    def complete(self) -> tuple[Outcome, ...]:
        return tuple(run for run in self.runs if run.status == "complete" and run.accuracy is not None)

    @property
    def by_task(self) -> dict[str, tuple[float, float]]:
        """Of several tasks each one's accuracy, a mean over the seeds like theirs, and its standard error."""
        runs = [run.by_task for run in self.complete]
        labels = [label for label in runs[0] if all(label in run for run in runs)] if runs else []
        return {
            label: (
                statistics.fmean(accuracies := [run[label]["accuracy"] for run in runs]),
                math.hypot(max(run[label]["stderr"] for run in runs), *_error_of_mean(accuracies)),
            )
            for label in labels
        }

    @property
    def best(self) -> Outcome:
        """The run whose adapter to load: the most accurate complete one."""
        return self.by_accuracy[0]

    @property
    def by_accuracy(self) -> list[Outcome]:
        """All runs, complete ones first, the most accurate first."""
        return sorted(self.runs, key=lambda run: (run.status != "complete", -(run.accuracy or 0.0)))


def point_of(trial: Trial) -> str:
    """Digest of all but the seed: the trials of one point share it.

    Where every seed draws its own random experts (`draw=each`), the rule is the point and not what it drew.
    """
    data = trial.to_json()
    what = ("allocator", "knobs") if trial.knobs.get("draw") == "each" else ("allocation",)
    return digest_of({key: data[key] for key in (*what, "recipe", "model", "task")})


def candidates(outcomes: Iterable[Outcome]) -> list[Candidate]:
    """Groups outcomes that differ in the seed only, in order of appearance.

    Only complete runs give an accuracy: one that was stopped early was trained less than its rivals.
    """
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(point_of(outcome.trial), []).append(outcome)
    return [_candidate(tuple(runs)) for runs in groups.values()]


def _candidate(runs: tuple[Outcome, ...]) -> Candidate:
    complete = [run for run in runs if run.status == "complete" and run.accuracy is not None]
    if not complete:
        return Candidate(runs, None, None)
    accuracies = [run.accuracy or 0.0 for run in complete]
    errors = [error for run in complete if run.rungs and (error := run.rungs[-1].stderr) is not None]
    question_error = max(errors, default=None)
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else None
    parts = [] if question_error is None else [question_error]
    parts += _error_of_mean(accuracies)
    return Candidate(runs, statistics.fmean(accuracies), math.hypot(*parts) if parts else None, spread, question_error)


def _error_of_mean(accuracies: Sequence[float]) -> list[float]:
    """s/√n of the seeds; nothing for one."""
    return [statistics.stdev(accuracies) / math.sqrt(len(accuracies))] if len(accuracies) > 1 else []
