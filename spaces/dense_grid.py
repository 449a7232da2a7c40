"""What is there to find among rules, numbers of experts, ranks and rates on a dense model? All of it, trained.

    python -m search.run space=dense_grid model=tiny-dense             embedded, offline
    python -m search.run space=dense_grid model=tiny-dense dry_run=true        the rows and their parameters
    python -m search.replay export studies/dense_grid-tiny-dense-default to=mine.parquet

A table: every row is trained, none is searched, with 5 seeds (`seeds=`), seed by seed. Exported, its trainings answer
searches in seconds (`replay=`), and say how far a searcher's front is from everything that there was to find. Coarser
than `space=dense`, which searches the same rules.

Knobs
    allocator           uniform | random | mola | alphalora | sensitivity | lora_smoe
    experts_per_layer   1 | 2.5 | 5 (uniform); random, alphalora and sensitivity have 2.5
    pattern             4321 (mola: more experts in lower layers)
    metric              stable_rank (alphalora, β = 2.5)
    retention           0.4 of the matrices, with 4 experts each (lora_smoe, strategy S)
    rank                2 | 8
    scaled_rate         learning_rate·lora_alpha: 0.04 | 0.1 | 0.25, at lora_alpha 64

AlphaLoRA's `hill` is left out: it rounds to uniform on the embedded model. Rank and scaled rate are a full grid at
every allocation, so that the table also says whether the best scaled rate depends on either.

Every seed of `random` draws its own layout. `total_experts` in the records is experts_per_layer times layers.

Comparisons: every rule against uniform at 2.5 experts a layer, rank 8 and scaled rate 0.1.
"""

from __future__ import annotations

import math
from typing import Any

from allocators.core.types import ModelShape, Point
from spaces._tables import Comparison

BASE = "dense"
TABLE = True
SEEDS = 5
ALLOCATORS = ("uniform", "random", "mola", "alphalora", "sensitivity", "lora_smoe")

_MOLA, _PAPER = "MoLA, arXiv:2402.08562", "AlphaLoRA, arXiv:2410.10054"
_RECIPE = {"rank": 8, "scaled_rate": 0.1}
_MIDDLE = {"experts_per_layer": 2.5} | _RECIPE
_UNIFORM = {"allocator": "uniform"} | _MIDDLE
COMPARISONS = (
    Comparison("random − uniform", {"allocator": "random"} | _RECIPE, _UNIFORM, "no difference is expected", "control"),
    Comparison("MoLA-4321 − uniform", {"allocator": "mola"} | _RECIPE, _UNIFORM, "lower layers need less", _MOLA),
    Comparison("alphalora stable_rank − uniform", {"allocator": "alphalora"} | _RECIPE, _UNIFORM, "better", _PAPER),
    Comparison(
        "sensitivity − uniform", {"allocator": "sensitivity"} | _RECIPE, _UNIFORM, "not published", "equation 6 here"
    ),
)
EACH, ALPHA = 2.5, 64.0


def suggest(trial: Any, shape: ModelShape) -> Point:
    """One row; each rule has a few values of its own knobs, and all have the same lora_alpha."""
    allocator = trial.suggest_categorical("allocator", list(ALLOCATORS))
    rank = trial.suggest_categorical("rank", [2, 8])
    rate = trial.suggest_categorical("scaled_rate", [0.04, 0.1, 0.25])
    recipe = {"rank": rank, "lora_alpha": ALPHA, "scaled_rate": rate}
    match allocator:
        case "mola":
            return Point(allocator, {"pattern": "4321"}, recipe)
        case "lora_smoe":
            return Point(allocator, {"retention": 0.4, "strategy": "S", "experts_per_block": 4}, recipe)
        case "uniform":
            each = trial.suggest_categorical("experts_per_layer", [1, EACH, 5])
        case _:
            each = EACH
    knobs: dict[str, Any] = {"total_experts": math.floor(each * shape.num_layers + 0.5)}
    match allocator:
        case "alphalora":
            knobs |= {"metric": "stable_rank", "beta": 2.5, "rounding": "largest_remainder"}
        case "sensitivity":
            knobs["beta"] = 0.5
        case "random":
            knobs["draw"] = "each"
    return Point(allocator, knobs, recipe)


def starting_points(shape: ModelShape) -> list[dict[str, Any]]:
    """Of a search of the recorded rows: every rule at the middle of its knobs."""
    recipe = {"rank": 8, "scaled_rate": 0.1}
    others = [{"allocator": name} for name in ("random", "mola", "alphalora", "sensitivity", "lora_smoe")]
    return [point | recipe for point in ({"allocator": "uniform", "experts_per_layer": EACH}, *others)]
