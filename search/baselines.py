"""What anybody would train without a search: one-line recipes, the controls among them.

    one_line(points)["random 25 %"]          # the most accurate point that is such a recipe

A search is worth what its front has over these, so they are evaluated on the test split as the front is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from allocators.core.types import Trial
from search.front import Candidate

ONE_LINE: Mapping[str, Callable[[Trial], bool]] = {
    "uniform": lambda trial: trial.allocator == "uniform",
    "MoLA-2468": lambda trial: trial.allocator == "mola" and str(trial.knobs.get("pattern")) == "2468",
    "top 25 % routed": lambda trial: (
        trial.allocator == "sieve" and trial.knobs.get("fraction") == 0.25 and trial.knobs.get("score") == "count"
    ),
    "random 25 %": lambda trial: trial.allocator == "random" and trial.knobs.get("fraction") == 0.25,
    "random layout": lambda trial: trial.allocator == "random" and "fraction" not in trial.knobs,
    "uniform ranks": lambda trial: trial.allocator == "uniform_ranks",
    "random ranks": lambda trial: trial.allocator == "random_ranks",
    "stratified random ranks": lambda trial: trial.allocator == "stratified_ranks",
    "all experts": lambda trial: trial.allocator == "all",
    "no expert": lambda trial: trial.allocator == "none",
}


def recipes_of(candidate: Candidate) -> list[str]:
    """Names of the one-line recipes that a point is."""
    return [name for name, is_it in ONE_LINE.items() if any(is_it(run.trial) for run in candidate.runs)]


def better(one: Candidate, other: Candidate) -> bool:
    """Whether `one` is the more accurate; of equals it is the smaller, then the one with the smaller digest."""
    return _order(one) > _order(other)


def _order(candidate: Candidate) -> tuple[float, int, str]:
    return (candidate.accuracy or 0.0, -candidate.trainable_params, candidate.point)


def tried(points: Iterable[Candidate]) -> dict[str, list[Candidate]]:
    """By recipe the points that are one and have an accuracy, the best first; without recipes that nobody tried."""
    by_recipe: dict[str, list[Candidate]] = {name: [] for name in ONE_LINE}
    for candidate in points:
        if candidate.accuracy is not None:
            for name in recipes_of(candidate):
                by_recipe[name].append(candidate)
    return {name: sorted(found, key=_order, reverse=True) for name, found in by_recipe.items() if found}


def one_line(points: Iterable[Candidate]) -> dict[str, Candidate]:
    """By recipe the most accurate point that is one; recipes that nobody tried are left out."""
    return {name: points[0] for name, points in tried(points).items()}
