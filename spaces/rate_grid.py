"""At which scaled rate does this model learn this task, and does that move with the rank?

    python -m search.run space=rate_grid model=tiny-dense task=tiny_backcipher          embedded model, offline
    python -m search.run space=rate_grid model=tiny-moe dry_run=true                    the rows and their parameters
    python -m search.replay export studies/rate_grid-tiny-dense-tiny_backcipher to=rates.parquet
    python -m tests.benchmarks.transfer tables=rates.parquet                            best rate by rank, a plot

A table: every row is trained, none is searched, with 2 seeds (`seeds=`), seed by seed. Every matrix of the model gets
LoRA of the same rank, so that allocations play no part. `recipe.steps=`, `recipe.batch_size=` and the other settings of
the recipe hold for all rows; what comes out is a scaled rate for `recipe.scaled_rate=`, or for the task file.

Knobs
    allocator     uniform_ranks
    rank          1 | 4 | 16
    scaled_rate   learning_rate·lora_alpha: 0.035 | 0.07 | 0.14 | 0.28, at lora_alpha 64

Comparisons: the rate 0.14 against 0.07, at every rank.

Measured with task=tiny_backcipher, two seeds: the best rate at ranks 1, 4 and 16 is .072, .111 and .165 on tiny-moe,
and at most .035, .100 and .090 on tiny-dense (between the rates by a parabola). A training takes some six seconds on
one CPU core, 24 of them two and a half minutes.
"""

from __future__ import annotations

from typing import Any

from allocators.core.tables import Comparison
from allocators.core.types import ModelShape, Point

BASE = "any"
TABLE = True
SEEDS = 2
ALLOCATORS = ("uniform_ranks",)
ALPHA = 64.0
RANKS = (1, 4, 16)

COMPARISONS = tuple(
    Comparison(
        f"0.14 − 0.07 at rank {rank}",
        {"rank": rank, "scaled_rate": 0.14},
        {"rank": rank, "scaled_rate": 0.07},
        "the best rate rises with √r (rsLoRA), or not at all (LoRA Without Regret)",
        "rsLoRA, arXiv:2312.03732",
    )
    for rank in RANKS
)


def suggest(trial: Any, shape: ModelShape) -> Point:
    """One row."""
    allocator = trial.suggest_categorical("allocator", list(ALLOCATORS))
    rank = trial.suggest_categorical("rank", list(RANKS))
    rate = trial.suggest_categorical("scaled_rate", [0.035, 0.07, 0.14, 0.28])
    return Point(allocator, {}, {"rank": rank, "lora_alpha": ALPHA, "scaled_rate": rate})


def starting_points(shape: ModelShape) -> list[dict[str, Any]]:
    """Of a search of the recorded rows: the middle rank at both middle rates."""
    return [{"allocator": "uniform_ranks", "rank": 4, "scaled_rate": rate} for rate in (0.07, 0.14)]
