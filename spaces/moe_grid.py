"""What is there to find among rules, shares of experts, ranks and learning rates on an MoE model? All of it, trained.

    python -m search.run space=moe_grid                                embedded model and task, offline
    python -m search.run space=moe_grid dry_run=true                   the rows and their parameters
    python -m search.replay export studies/moe_grid-tiny-moe-default to=mine.parquet

A table: every row is trained, none is searched, with 3 seeds (`seeds=`), seed by seed. Exported, its trainings answer
searches in seconds (`replay=`), and say how far a searcher's front is from everything that there was to find. Coarser
than `space=sieve`, which searches the same rules.

Knobs
    allocator       all | none | sieve | random | greedy | coverage | esft
    fraction        1/16 | 1/8 | 1/4 | 1/2 of each layer's experts (sieve, random) or of all experts (greedy)
    score           count | mass (sieve)
    share           0.25 | 0.5 | 0.75 of a layer's routed tokens (coverage)
    p               0.2 | 0.5 of a layer's tokens, by ESFT's rule (esft)
    rank            4 | 16, lora_alpha = 2·rank
    learning_rate   0.001 | 0.003 | 0.01

Every seed of `random` draws its own experts.

Comparison: the rows at rank 4 and learning rate 0.003, hot 25 % against random 25 %.
"""

from __future__ import annotations

from typing import Any

from allocators.core.types import ModelShape, Point
from spaces._knobs import table_of_experts
from spaces._tables import Comparison

BASE = "moe"
TABLE = True
SEEDS = 3
ALLOCATORS = ("all", "none", "sieve", "random", "greedy", "coverage", "esft")
FRACTIONS = (0.0625, 0.125, 0.25, 0.5)

_MIDDLE = {"fraction": 0.25, "rank": 4, "learning_rate": 0.003}
COMPARISONS = (
    Comparison(
        "hot 25 % − random 25 %",
        {"allocator": "sieve", "score": "count"} | _MIDDLE,
        {"allocator": "random"} | _MIDDLE,
        "hot is about 2.5 points better",
        "MoE-Sieve, arXiv:2603.24044",
    ),
)


def suggest(trial: Any, shape: ModelShape) -> Point:
    """One row; lora_alpha is twice the rank."""
    allocator = trial.suggest_categorical("allocator", list(ALLOCATORS))
    knobs = table_of_experts(trial, allocator, FRACTIONS)
    rank = trial.suggest_categorical("rank", [4, 16])
    rate = trial.suggest_categorical("learning_rate", [0.001, 0.003, 0.01])
    return Point(allocator, knobs, {"rank": rank, "lora_alpha": 2.0 * rank, "learning_rate": rate})
