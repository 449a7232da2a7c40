"""How much does a search flatter what it picks, and what is its front worth? Replayed studies say.

    python -m tests.benchmarks.optimism                                     both shipped tables, 20 studies a variant
    python -m tests.benchmarks.optimism tables=tiny-moe studies=50 trials=16,40 variants=once,auto

A study searches a recorded table (search/replay/tables/) with `sampler=ehvi`, one training after another. Studies take
the table's seeds in turn and differ in what the sampler draws. The search sees accuracies on the validation split; its
front is what it would report, the points that no other point beats by the mean of the seeds that it tried. The test
split, which it never sees, judges:

    optimism   validation less test accuracy of the front's own trainings, a mean over its points. What sets the two
               splits apart without any selection is printed beside it: the same of all rows of the table
    fresh      validation accuracy of the front's own trainings less the test accuracy of the same points at all seeds
               of the table: what a user misses who trains the winner again
    share      hypervolume of the front, by test accuracy at all seeds of the table, as a share of that of the whole
               table (log parameters, accuracy above the table's worst): what the search was worth

Variants
    once       every point is tried with one seed (`seeds=1`)
    three      the members of the front are trained until they have three seeds (`seeds=3`); repeats come on top
    auto       the sampler decides which points it tries again, among the trials (`seeds=auto`)
    even       as once, but all scaled rates count alike: without trust in the recipe of the starting points
    random     random points, once: what searching adds

Printed are means over the studies ± their standard errors; `gain` is the share less that of the first variant, study by
study. The JSON line's `ratios` are TABLE/VARIANT@TRIALS/WHAT.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from allocators.core import words
from allocators.core.errors import unknown
from allocators.core.types import Outcome
from search import replay
from search.front import Candidate, Points, candidates, hypervolume
from search.problem import Proposal
from search.propose.sampler import Proposer
from search.replay.problem import TableProblem, table_problem
from search.report.splits import optimism
from tests.benchmarks._shared import parse
from trainers.versions import versions

VARIANTS = ("once", "three", "auto", "even", "random")
THREE = 3
COLUMNS = ("optimism", "fresh", "share")


@dataclass(frozen=True)
class Settings:
    """The keys of the command line."""

    tables: str = words.key("tiny-moe,tiny-dense", "shipped tables or FILE.parquet, separated by commas")
    studies: int = words.key(20, "studies of each variant", least=1)
    trials: tuple[int, ...] = words.key((16,), "trainings of a study, several separated by commas")
    variants: str = words.key(",".join(VARIANTS), "separated by commas")


@dataclass(frozen=True)
class Place:
    """A point by its size and its accuracy on the test split, a mean over all seeds of the table."""

    trainable_params: int
    accuracy: float | None


@dataclass(frozen=True)
class Study:
    """What one study came to; None where no training of its front has a test score."""

    optimism: float | None
    fresh: float | None
    share: float
    trainings: int


@dataclass(frozen=True)
class Judge:
    """What points of a table are worth by the test split, at all of its seeds."""

    table: replay.Table

    @cached_property
    def places(self) -> dict[str, Place]:
        """By point; diverged trainings are left out."""
        scores: dict[str, list[float]] = {}
        sizes: dict[str, int] = {}
        for outcome in self.table.outcomes.values():
            if outcome.judged is not None:
                scores.setdefault(outcome.trial.point, []).append(outcome.judged)
                sizes[outcome.trial.point] = outcome.trainable_params
        return {point: Place(sizes[point], statistics.fmean(found)) for point, found in scores.items()}

    @cached_property
    def unselected(self) -> float | None:
        """Validation less test accuracy over all rows: nothing was selected."""
        measured = optimism(candidates(self.table.outcomes.values()))
        return measured.value if measured else None

    def share(self, points: Iterable[str]) -> float:
        """Of the table's hypervolume, what these points have."""
        return self._area(self.places[point] for point in points if point in self.places) / self._whole

    def share_of(self, places: Iterable[Place]) -> float:
        """Of the table's hypervolume, what trainings have that may be no rows of it.

        A place outside the range of the table's sizes and accuracies counts as one at its edge: what is smaller or
        better than all of the table makes good for nothing that is missing elsewhere.
        """
        return self._area(self._inside(place) for place in places) / self._whole

    def _inside(self, place: Place) -> Place:
        known = self.places.values()
        least, best = min(p.trainable_params for p in known), max(p.accuracy or 0.0 for p in known)
        accuracy = None if place.accuracy is None else min(place.accuracy, best)
        return Place(max(place.trainable_params, least), accuracy)

    @cached_property
    def _whole(self) -> float:
        return self._area(self.places.values())

    @cached_property
    def _worst(self) -> tuple[float, float]:
        places = self.places.values()
        return float(max(map(_log, places))), min(place.accuracy or 0.0 for place in places)

    def _area(self, places: Iterable[Place]) -> float:
        """Of log parameters (in millionths, because sizes are whole) and accuracy, up to the table's worst."""
        return hypervolume((Place(_log(place), place.accuracy) for place in places), reference=self._worst)


def _log(place: Place) -> int:
    return round(1e6 * math.log(place.trainable_params))


def study(judge: Judge, *, number: int, trials: int, variant: str) -> Study:
    """Searches the table once and judges what it would report."""
    table = judge.table
    problem = table_problem(table, seed=table.seeds[number % len(table.seeds)])
    sampler = "random" if variant == "random" else "ehvi"
    proposer = Proposer(problem, sampler=sampler, repeats=variant == "auto", trust=variant != "even", draws=number)
    points, trained = Points(), 0
    while trained < trials and (proposal := proposer.propose()) is not None:
        outcome = _answer(table, proposal)
        proposer.tell(outcome)
        points.add(outcome)
        trained += 1
    if variant == "three":
        trained += _repeat(table, problem, points)
    return judged(judge, points.front, trained)


def _answer(table: replay.Table, proposal: Proposal) -> Outcome:
    return table.rows[proposal.trial.digest].outcome.updated(trial=proposal.trial)


def _repeat(table: replay.Table, problem: TableProblem, points: Points) -> int:
    """Trains the front again until its members have three seeds; how many trainings that took."""
    trained = 0
    while True:
        lacking = [c for c in points.front if len(c.runs) < min(THREE, len(problem.seeds_of(c.runs[0].trial)))]
        if not lacking:
            return trained
        first = min(lacking, key=lambda candidate: len(candidate.runs)).runs
        seed = problem.seeds_of(first[0].trial)[len(first)]
        digest = problem.repeat(first[0].trial, seed).digest
        points.add(table.rows[digest].outcome)
        trained += 1


def judged(judge: Judge, front: Sequence[Candidate], trained: int) -> Study:
    """By the test split."""
    measured = optimism(front)
    fresh = [(c.accuracy or 0.0) - (judge.places[c.point].accuracy or 0.0) for c in front if c.tested]
    return Study(
        measured.value if measured else None,
        statistics.fmean(fresh) if fresh else None,
        judge.share(candidate.point for candidate in front),
        trained,
    )


def summary(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (0 for one value)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def row_of(studies: Sequence[Study]) -> Mapping[str, tuple[float, float]]:
    """Each number over the studies; without those that no study has."""
    columns = {name: [getattr(one, name) for one in studies] for name in (*COLUMNS, "trainings")}
    return {name: summary(known) for name, values in columns.items() if (known := [v for v in values if v is not None])}


def main(arguments: Sequence[str]) -> None:
    """Prints a line a variant and number of trials, and the JSON line."""
    settings = parse(arguments, Settings)
    variants = settings.variants.split(",")
    for variant in variants:
        if variant not in VARIANTS:
            raise unknown("variant", variant, VARIANTS)
    ratios: dict[str, float] = {}
    for name in settings.tables.split(","):
        table = replay.load(name)
        judge = Judge(table)
        gap = judge.unselected
        said = "unknown" if gap is None else f"{gap:+.4f}"
        print(
            f"\n{table.name}: {len(table.rows)} trainings, {len(table.seeds)} seeds; all rows: validation − test {said}"
        )
        heads = "".join(f"{what:>20}" for what in (*COLUMNS, "gain"))
        print(f"{'variant':<10}{'trials':>7}{'trainings':>11}{heads}")
        for trials in settings.trials:
            first: list[Study] = []
            for variant in variants:
                done = [study(judge, number=n, trials=trials, variant=variant) for n in range(settings.studies)]
                first = first or done
                row = dict(row_of(done))
                if done is not first:
                    row["gain"] = summary([one.share - other.share for one, other in zip(done, first, strict=True)])
                shown = (*COLUMNS, "gain")
                cells = (f"{row[what][0]:+.4f} ± {row[what][1]:.4f}" if what in row else "" for what in shown)
                line = "".join(f"{cell:>20}" for cell in cells)
                print(f"{variant:<10}{trials:>7}{row['trainings'][0]:>11.1f}{line}", flush=True)
                ratios |= {f"{table.name}/{variant}@{trials}/{what}": round(row[what][0], 4) for what in row}
        if gap is not None:
            ratios[f"{table.name}/unselected"] = round(gap, 4)
    record = {"benchmark": "optimism", "device": "none", "versions": versions(), "settings": vars(settings)}
    print(json.dumps(record | {"ratios": ratios}))


if __name__ == "__main__":
    words.run(main)
