"""What is there to find among rules, shares of experts, ranks and rates on an MoE model? Every point is trained.

    python -m search.run space=moe_grid                                embedded model and task, offline
    python -m search.run space=moe_grid dry_run=true                   the rows and their parameters
    python -m search.replay export studies/moe_grid-tiny-moe-default to=mine.parquet

A table: every row is trained, none is searched, with 5 seeds (`seeds=`), seed by seed. `search.replay` exports it as a
table that answers searches in seconds (`replay=`); it says how far a searcher's front is from the best. It is coarser
than `space=sieve`, which searches more rules.

Knobs
    allocator       all | none | sieve | random
    fraction        1/16 | 1/8 | 1/4 | 1/2 of each layer's experts (sieve, random)
    rank            2 | 4 | 16
    scaled_rate     learning_rate·lora_alpha: 0.05 | 0.1 | 0.2, at lora_alpha 64

Every seed of `random` draws its own experts. Rank and scaled rate are a full grid at every allocation, so that the
table also says whether the best scaled rate depends on either (`python -m tests.benchmarks.transfer`).

Comparison: the rows at rank 4 and scaled rate 0.1, hot 25 % against random 25 %.
"""

from __future__ import annotations

from typing import Any

from allocators.core.tables import Comparison
from allocators.core.types import ModelShape, Point

BASE = "moe"
TABLE = True
SEEDS = 5
ALLOCATORS = ("all", "none", "sieve", "random")
FRACTIONS = (0.0625, 0.125, 0.25, 0.5)
ALPHA = 64.0

_MIDDLE = {"fraction": 0.25, "rank": 4, "scaled_rate": 0.1}
COMPARISONS = (
    Comparison(
        "hot 25 % − random 25 %",
        {"allocator": "sieve"} | _MIDDLE,
        {"allocator": "random"} | _MIDDLE,
        "hot is about 2.5 points better",
        "MoE-Sieve, arXiv:2603.24044",
    ),
)


def suggest(trial: Any, shape: ModelShape) -> Point:
    """One row; all have the same lora_alpha."""
    allocator = trial.suggest_categorical("allocator", list(ALLOCATORS))
    knobs: dict[str, Any] = {}
    match allocator:
        case "sieve":
            knobs = {"fraction": trial.suggest_categorical("fraction", list(FRACTIONS)), "score": "count"}
        case "random":
            knobs = {"fraction": trial.suggest_categorical("fraction", list(FRACTIONS)), "draw": "each"}
    rank = trial.suggest_categorical("rank", [2, 4, 16])
    rate = trial.suggest_categorical("scaled_rate", [0.05, 0.1, 0.2])
    return Point(allocator, knobs, {"rank": rank, "lora_alpha": ALPHA, "scaled_rate": rate})


def starting_points(shape: ModelShape) -> list[dict[str, Any]]:
    """Of a search of the recorded rows: no expert, every expert, a quarter at random and by MoE-Sieve."""
    recipe = {"rank": 4, "scaled_rate": 0.1}
    points = ({"allocator": "none"}, {"allocator": "all"}, {"allocator": "random", "fraction": 0.25})
    return [point | recipe for point in (*points, {"allocator": "sieve", "fraction": 0.25})]
