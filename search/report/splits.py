"""Which split an accuracy is from: validation, which the search selects on, or test, which nothing was selected on.

    on_test = tested(records, points)        # by point: it as the test split has it, for `compare`, `front`, `pooled`
    splits_of(records, points)               # ("validation", "test"): what a table of the study has columns for

A study with `select_on=test` has one split and one number, "accuracy", as a study of an earlier version has.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from search.front import Candidate
from search.records import Records
from search.text import Split


def selects_on_test(records: Records) -> bool:
    """Whether the search saw the test split; an earlier version, whose studies do not say, always did."""
    select_on: str = records.header["identity"].get("select_on", "test")
    return select_on == "test"


def splits_of(records: Records, points: Iterable[Candidate]) -> tuple[Split, ...]:
    """The accuracies that points of the study have; "test" only where one was evaluated there."""
    if selects_on_test(records):
        return ("accuracy",)
    return ("validation", "test") if any(point.tested for point in points) else ("validation",)


def tested(records: Records, points: Iterable[Candidate]) -> dict[str, Candidate]:
    """By point those that were evaluated on the test split, as it has them; empty where the search selected on it."""
    if selects_on_test(records):
        return {}
    return {point.point: point.on_test for point in points if point.on_test}


def same_split(
    points: Sequence[Candidate], on_test: Mapping[str, Candidate], *, otherwise: Split
) -> tuple[Split, list[Candidate]]:
    """The points as the test split has them where all were evaluated there, else as they are; and which split it is."""
    if points and all(point.point in on_test for point in points):
        return "test", [on_test[point.point] for point in points]
    return otherwise, list(points)


@dataclass(frozen=True)
class Optimism:
    """Validation less test accuracy of the same trainings, on average over points.

    points             that were evaluated on the test split
    validation, test   their accuracies, means over the points
    stderr             of the difference: over the points; of one point that of the questions of both splits
    """

    points: int
    validation: float
    test: float
    stderr: float

    @property
    def value(self) -> float:
        """What selecting on the validation split added to the accuracy there, and whatever else sets both apart."""
        return self.validation - self.test


def optimism(points: Iterable[Candidate]) -> Optimism | None:
    """Over those of the points that were evaluated on the test split; None where none was."""
    chosen = [(point, point.on_test) for point in points if point.on_test]
    if not chosen:
        return None
    tests, drops = [judged.accuracy or 0.0 for _, judged in chosen], [point.optimism or 0.0 for point, _ in chosen]
    if len(chosen) > 1:
        error = statistics.stdev(drops) / math.sqrt(len(drops))
    else:
        error = math.hypot(*(side.question_error or 0.0 for side in chosen[0]))
    test = statistics.fmean(tests)
    return Optimism(len(chosen), test + statistics.fmean(drops), test, error)
