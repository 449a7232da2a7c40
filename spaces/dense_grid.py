"""What is there to find among rules, numbers of experts, ranks and rates on a dense model? Every point is trained.

    python -m search.run space=dense_grid model=tiny-dense                     embedded, offline
    python -m search.run space=dense_grid model=tiny-dense dry_run=true        the rows and their parameters
    python -m search.replay export studies/dense_grid-tiny-dense-tiny_turncipher to=mine.parquet

A table: every row is trained, none is searched, with 5 seeds (`seeds=`), seed by seed. `search.replay` exports it as a
table that answers searches in seconds (`replay=`); it says how far a searcher's front is from the best. It is coarser
than `space=dense`, which searches the same rules.

Knobs
    allocator           uniform | random | mola | alphalora | sensitivity | lora_smoe
    experts_per_layer   1 | 2.5 | 5 (uniform; 2.5 for random, alphalora with alpha_hat and β = 2.5, and sensitivity)
    pattern             1234 (mola)
    retention           0.4 of the matrices, with 4 experts each (lora_smoe, strategy S)
    rank                1 | 4
    scaled_rate         learning_rate·lora_alpha: 0.05 | 0.1 | 0.2, at lora_alpha 64

Every seed of `random` draws its own layout. `total_experts` in the records is experts_per_layer times layers.
AlphaLoRA's `hill` is left out: it rounds to uniform on the embedded model. Rank and scaled rate are a full grid at
every allocation, so that the table also says whether the best scaled rate depends on either
(`python -m tests.benchmarks.transfer tables=tiny-dense`).

Comparisons: every rule against uniform at 2.5 experts a layer, rank 4 and scaled rate 0.1.

Measured with the first command (240 trainings), on the test split, paired over five seeds, 95 %: random −.036 (−.092 to
+.020), MoLA-1234 −.083 (−.166 to −.001), alphalora −.074 (−.161 to +.012), sensitivity +.068 (−.047 to +.183).
"""

from __future__ import annotations

import math
from typing import Any

from allocators.core.tables import Comparison
from allocators.core.types import ModelShape, Point

BASE = "dense"
TABLE = True
SEEDS = 5
ALLOCATORS = ("uniform", "random", "mola", "alphalora", "sensitivity", "lora_smoe")
ALPHA = 64.0

_MOLA, _PAPER = "MoLA, arXiv:2402.08562", "AlphaLoRA, arXiv:2410.10054"
_RECIPE = {"rank": 4, "scaled_rate": 0.1}
_MIDDLE = {"experts_per_layer": 2.5} | _RECIPE
_UNIFORM = {"allocator": "uniform"} | _MIDDLE
COMPARISONS = (
    Comparison("random − uniform", {"allocator": "random"} | _MIDDLE, _UNIFORM, "no difference is expected", "control"),
    Comparison("MoLA-1234 − uniform", {"allocator": "mola"} | _RECIPE, _UNIFORM, "upper layers need more", _MOLA),
    Comparison("alphalora − uniform", {"allocator": "alphalora"} | _MIDDLE, _UNIFORM, "better", _PAPER),
    Comparison(
        "sensitivity − uniform", {"allocator": "sensitivity"} | _MIDDLE, _UNIFORM, "not published", "equation 6 here"
    ),
)


def suggest(trial: Any, shape: ModelShape) -> Point:
    """One row; uniform has three sizes, every other rule one."""
    allocator = trial.suggest_categorical("allocator", list(ALLOCATORS))
    knobs: dict[str, Any] = {}
    match allocator:
        case "mola":
            knobs["pattern"] = "1234"
        case "lora_smoe":
            knobs = {"retention": 0.4, "strategy": "S", "experts_per_block": 4}
        case _:
            sizes = [1, 2.5, 5] if allocator == "uniform" else [2.5]
            each = trial.suggest_categorical("experts_per_layer", sizes)
            knobs["total_experts"] = math.floor(each * shape.num_layers + 0.5)
    match allocator:
        case "alphalora":
            knobs |= {"metric": "alpha_hat", "beta": 2.5, "rounding": "largest_remainder"}
        case "sensitivity":
            knobs["beta"] = 0.5
        case "random":
            knobs["draw"] = "each"
    rank = trial.suggest_categorical("rank", [1, 4])
    rate = trial.suggest_categorical("scaled_rate", [0.05, 0.1, 0.2])
    return Point(allocator, knobs, {"rank": rank, "lora_alpha": ALPHA, "scaled_rate": rate})


def starting_points(shape: ModelShape) -> list[dict[str, Any]]:
    """Of a search of the recorded rows, those of `space=dense`: the controls, one expert a layer, every other rule."""
    middle = ("uniform", "random", "mola", "alphalora", "sensitivity", "lora_smoe")
    points = [{"allocator": name} | (_RECIPE if name in ("mola", "lora_smoe") else _MIDDLE) for name in middle]
    return [*points[:2], {"allocator": "uniform", "experts_per_layer": 1} | _RECIPE, *points[2:]]
