"""`space=sieve` in the coordinates of the papers, which this project's first spaces had.

    python -m search.run plugins=tests/benchmarks/papers_coordinates.py space=papers_coordinates dry_run=true

The same allocators, knobs and allocations as `space=sieve`; another recipe. It is what `coordinates.py` compares with.

Knobs
    allocator, fraction, share, p, score, esft_score    as in `space=sieve`
    rank                                                4 .. 32 in steps of 4; lora_alpha = 2·rank, as in the papers
    learning_rate                                       1e-4 .. 2e-2, logarithmic

Starting points: none, all, random 25 % and hot 25 %, at rank 8 and learning_rate .003, as the embedded tasks had it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from allocators.core.types import ModelShape, Point
from spaces import sieve

BASE = sieve.BASE
ALLOCATORS = sieve.ALLOCATORS
RECIPE = {"rank": 8, "learning_rate": 0.003}


class _Allocation:
    """A trial that answers for the allocation alone: the recipe is asked for by `suggest`."""

    def __init__(self, trial: Any) -> None:
        self._trial = trial

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        return self._trial.suggest_categorical(name, choices)

    def suggest_float(self, name: str, low: float, high: float, **options: Any) -> Any:
        return low if options.get("log") else self._trial.suggest_float(name, low, high, **options)

    def suggest_int(self, name: str, low: int, high: int, **options: Any) -> int:
        return low


def suggest(trial: Any, shape: ModelShape) -> Point:
    """A point of `space=sieve` with a recipe in the papers' coordinates."""
    point = sieve.suggest(_Allocation(trial), shape)
    rank = trial.suggest_int("rank", 4, 32, step=4)
    rate = trial.suggest_float("learning_rate", 1e-4, 2e-2, log=True)
    return replace(point, recipe={"rank": rank, "lora_alpha": 2.0 * rank, "learning_rate": rate})


def starting_points(shape: ModelShape) -> list[dict[str, Any]]:
    """Those of `space=sieve` but for the paper's recipe."""
    return [point | RECIPE for point in sieve.starting_points(shape) if "rank" not in point]
