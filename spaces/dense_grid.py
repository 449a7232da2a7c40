"""What is there to find among rules, numbers of experts, ranks and learning rates on a dense model? All of it, trained.

    python -m search.run space=dense_grid model=tiny-dense task=tiny_backcipher select_on=test     embedded, offline
    python -m search.run space=dense_grid model=tiny-dense dry_run=true        the rows and their parameters
    python -m search.replay export studies/dense_grid-tiny-dense-tiny_backcipher to=mine.parquet

A table: every row is trained, none is searched, with 3 seeds (`seeds=`), seed by seed. Exported, its trainings answer
searches in seconds (`replay=`), and say how far a searcher's front is from everything that there was to find. Coarser
than `space=dense`, which searches the same rules.

Knobs
    allocator           uniform | random | mola | alphalora | sensitivity | lora_smoe
    experts_per_layer   1 | 2.5 | 5 (uniform, random, alphalora, sensitivity)
    pattern             2468 | 8642 | 1234 | 4321 (mola)
    metric              alpha_hat | stable_rank (alphalora, β = 2.5)
    retention           0.4 | 0.8 of the matrices, with 4 experts each (lora_smoe)
    strategy            S | U (lora_smoe)
    rank                1 | 4, lora_alpha = 2·rank
    learning_rate       0.003 | 0.01

The shipped table tiny-dense was recorded with the first command, in the papers' coordinates (lora_alpha = 2·rank) and
on the test split, before the spaces proposed the scaled rate: `space=moe_grid` has the new ones. Small ranks, because
the embedded task is solved whatever the layout at larger ones. AlphaLoRA's `hill` is left out: it rounds to uniform on
the embedded model.

Every seed of `random` draws its own layout. `total_experts` in the records is experts_per_layer times layers.

Comparisons: every rule against uniform at 2.5 experts a layer, rank 4 and learning rate 0.003.
"""

from __future__ import annotations

import math
from typing import Any

from allocators.core.types import ModelShape, Point
from spaces._tables import Comparison

BASE = "dense"
TABLE = True
SEEDS = 3
ALLOCATORS = ("uniform", "random", "mola", "alphalora", "sensitivity", "lora_smoe")

_MOLA, _PAPER = "MoLA, arXiv:2402.08562", "AlphaLoRA, arXiv:2410.10054"
_RECIPE = {"rank": 4, "learning_rate": 0.003}
_MIDDLE = {"experts_per_layer": 2.5} | _RECIPE
_UNIFORM = {"allocator": "uniform"} | _MIDDLE
_ALPHALORA = {"allocator": "alphalora"} | _MIDDLE
COMPARISONS = (
    Comparison("random − uniform", {"allocator": "random"} | _MIDDLE, _UNIFORM, "no difference is expected", "control"),
    Comparison("MoLA-1234 − uniform", {"pattern": "1234"} | _RECIPE, _UNIFORM, "upper layers need more", _MOLA),
    Comparison("MoLA-4321 − uniform", {"pattern": "4321"} | _RECIPE, _UNIFORM, "lower layers need less", _MOLA),
    *(
        Comparison(f"alphalora {m} − uniform", _ALPHALORA | {"metric": m}, _UNIFORM, "better", _PAPER)
        for m in ("alpha_hat", "stable_rank")
    ),
    Comparison(
        "sensitivity − uniform", {"allocator": "sensitivity"} | _MIDDLE, _UNIFORM, "not published", "equation 6 here"
    ),
)


def suggest(trial: Any, shape: ModelShape) -> Point:
    """One row; each rule has a few values of its own knobs."""
    allocator = trial.suggest_categorical("allocator", list(ALLOCATORS))
    knobs: dict[str, Any] = {}
    match allocator:
        case "mola":
            knobs["pattern"] = trial.suggest_categorical("pattern", ["2468", "8642", "1234", "4321"])
        case "lora_smoe":
            knobs["retention"] = trial.suggest_categorical("retention", [0.4, 0.8])
            knobs["strategy"] = trial.suggest_categorical("strategy", ["S", "U"])
            knobs["experts_per_block"] = 4
        case _:
            each = trial.suggest_categorical("experts_per_layer", [1, 2.5, 5])
            knobs["total_experts"] = math.floor(each * shape.num_layers + 0.5)
    match allocator:
        case "alphalora":
            knobs["metric"] = trial.suggest_categorical("metric", ["alpha_hat", "stable_rank"])
            knobs |= {"beta": 2.5, "rounding": "largest_remainder"}
        case "sensitivity":
            knobs["beta"] = 0.5
        case "random":
            knobs["draw"] = "each"
    rank = trial.suggest_categorical("rank", [1, 4])
    rate = trial.suggest_categorical("learning_rate", [0.003, 0.01])
    return Point(allocator, knobs, {"rank": rank, "lora_alpha": 2.0 * rank, "learning_rate": rate})
