"""Does the embedded task leave something to find? Span, ceiling, steps of the front and agreement of seeds.

    python -m tests.benchmarks.open_task                                    the shipped tables
    python -m tests.benchmarks.open_task tables=mine.parquet                of a table that search.replay exported

A table is a full grid of allocations and recipes with several seeds; nothing is trained here. An accuracy is the mean
over the seeds, on the test split where the table has it. A task on which everything is solved, or on which seeds
disagree, tells no allocation from another, whatever is searched.

The JSON line's `ratios` are
    TABLE/span_one_recipe      the largest allocation less the smallest (all experts less no expert, or five experts a
                               layer less one), both with the recipe that is best on average over allocations
    TABLE/span_best_recipes    the same, each with its own best recipe (no expert at rank 16 has more parameters than a
                               few experts at rank 2: what parameters buy)
    TABLE/ceiling              the best row
    TABLE/steps                points of the front, each better than the one before by two standard errors (of the
                               questions and of the spread between seeds, pooled over the rows with the same recipe)
    TABLE/agreement            Spearman's rank correlation of the rows between two seeds, mean over the pairs of seeds
    TABLE/agreement_one_rate   the same over the rows with the scaled rate that is best on average
    TABLE/agreement_one_recipe the same over the allocations with the one recipe
    TABLE/seed_sd              standard deviation between the seeds of a row, pooled
    TABLE/seed_sd_one_rate     the same of the rows with that scaled rate
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from allocators.core import words
from allocators.core.types import Outcome
from search import replay
from search.early import rank_correlation
from tests.benchmarks._shared import allocation_of, parse
from tests.benchmarks.transfer import best_on_average
from trainers.versions import versions

Recipe = tuple[int, float]  # rank, scaled rate


@dataclass(frozen=True)
class Settings:
    """The keys of the command line."""

    tables: str = words.key("tiny-moe,tiny-dense", "shipped tables or FILE.parquet, separated by commas")


@dataclass(frozen=True)
class Row:
    """An allocation with a recipe: its parameters, accuracy by seed, standard error over the questions."""

    allocation: str
    recipe: Recipe
    trainable_params: int
    by_seed: Mapping[int, float]
    question_error: float

    @property
    def accuracy(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.by_seed.values())


def rows_of(table: replay.Table) -> list[Row]:
    """One a point; a training that diverged counts as 0."""
    outcomes: dict[str, list[Outcome]] = {}
    for row in table.rows.values():
        outcomes.setdefault(row.outcome.trial.point, []).append(row.outcome)
    return [_row(found) for found in outcomes.values()]


def _row(outcomes: Sequence[Outcome]) -> Row:
    settings = outcomes[0].trial.recipe
    scores = {o.trial.seed: o.judged or 0.0 for o in outcomes}
    errors = [o.test.stderr if o.test else (o.rungs[-1].stderr or 0.0 if o.rungs else 0.0) for o in outcomes]
    recipe = (settings.rank, float(f"{settings.scaled_rate:.6g}"))
    return Row(allocation_of(outcomes[0]), recipe, outcomes[0].trainable_params, scores, max(errors))


def best_recipe(rows: Sequence[Row]) -> Recipe:
    """The recipe with the highest accuracy on average over the allocations."""
    recipes = sorted({row.recipe for row in rows})
    return max(recipes, key=lambda recipe: statistics.fmean(r.accuracy for r in rows if r.recipe == recipe))


def span(rows: Sequence[Row]) -> float:
    """The largest allocation less the smallest (on MoE bases all experts less none), each at its best of these rows."""
    sizes = {row.allocation: min(r.trainable_params for r in rows if r.allocation == row.allocation) for row in rows}
    largest, smallest = max(sizes, key=sizes.__getitem__), min(sizes, key=sizes.__getitem__)
    best = {name: max(r.accuracy for r in rows if r.allocation == name) for name in (largest, smallest)}
    return best[largest] - best[smallest]


def seed_variance(rows: Sequence[Row]) -> float:
    """Between the seeds of one row, pooled over the rows; 0 for one seed."""
    spreads = [statistics.variance(row.by_seed.values()) for row in rows if len(row.by_seed) > 1]
    return statistics.fmean(spreads) if spreads else 0.0


def steps(rows: Sequence[Row]) -> list[Row]:
    """Points in the order of their parameters, each better than the one before by two standard errors."""
    variances = {recipe: seed_variance([r for r in rows if r.recipe == recipe]) for recipe in {r.recipe for r in rows}}
    chosen: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.trainable_params, -row.accuracy)):
        if not chosen:
            chosen.append(row)
            continue
        before = chosen[-1]
        error = math.sqrt(sum(r.question_error**2 + variances[r.recipe] / len(r.by_seed) for r in (before, row)))
        if row.trainable_params == before.trainable_params and row.accuracy > before.accuracy:
            chosen[-1] = row
        elif row.accuracy - before.accuracy > 2 * error:
            chosen.append(row)
    return chosen


def agreement(rows: Sequence[Row]) -> float | None:
    """Mean rank correlation between two seeds; None where there are no two, or too few rows."""
    seeds = sorted({seed for row in rows for seed in row.by_seed})
    found = [
        rank_correlation([(row.by_seed[a], row.by_seed[b]) for row in rows if {a, b} <= row.by_seed.keys()])
        for a, b in itertools.combinations(seeds, 2)
    ]
    known = [correlation for correlation in found if correlation is not None]
    return statistics.fmean(known) if known else None


def main(arguments: Sequence[str]) -> None:
    """Prints what is asked of a task, the steps of its front, and the JSON line."""
    ratios: dict[str, float] = {}
    for name in parse(arguments, Settings).tables.split(","):
        table = replay.load(name)
        rows = rows_of(table)
        recipe = best_recipe(rows)
        with_it = [row for row in rows if row.recipe == recipe]
        rate = best_on_average({(row.allocation, *row.recipe): row.accuracy for row in rows})
        at_it = [row for row in rows if row.recipe[1] == rate]
        told_apart = steps(rows)
        print(
            f"\n{table.name}: {len(rows)} rows, {len(table.seeds)} seeds; best recipe on average: rank {recipe[0]}, "
            f"scaled rate {recipe[1]:g}; best rate on average: {rate:g}"
        )
        for row in sorted(with_it, key=lambda row: row.trainable_params):
            seeds = " ".join(f"{accuracy:.3f}" for accuracy in row.by_seed.values())
            print(f"  {row.allocation:<36}{row.trainable_params:>9,}  {row.accuracy:.3f}   {seeds}")
        print("points of the front that two standard errors tell apart")
        for row in told_apart:
            print(f"  {row.allocation:<36}{row.trainable_params:>9,}  {row.accuracy:.3f}   recipe {row.recipe}")
        numbers = {
            "span_one_recipe": span(with_it),
            "span_best_recipes": span(rows),
            "ceiling": max(row.accuracy for row in rows),
            "steps": len(told_apart),
            "agreement": agreement(rows),
            "agreement_one_rate": agreement(at_it),
            "agreement_one_recipe": agreement(with_it),
            "seed_sd": math.sqrt(seed_variance(rows)),
            "seed_sd_one_rate": math.sqrt(seed_variance(at_it)),
        }
        for what, value in numbers.items():
            if value is not None:
                print(f"  {what:<24}{value:.3f}")
                ratios[f"{table.name}/{what}"] = round(value, 4)
    print(json.dumps({"benchmark": "open_task", "device": "none", "versions": versions(), "ratios": ratios}))


if __name__ == "__main__":
    words.run(main)
