"""At equal parameters, which rule places LoRA experts best on this model and task?

    python -m search.run space=dense_table model=tiny-dense                             embedded model, offline
    python -m search.run space=dense_table model=tiny-dense dry_run=true               the rows and their parameters
    python -m search.run space=dense_table model=HuggingFaceTB/SmolLM2-135M task=arc_easy seeds=3

A table: every row is trained, none is searched, with 5 seeds (`seeds=`), seed by seed. Before a search it tells whether
placement matters at all here; `space=dense` then searches knobs and recipe as well.

Knobs
    recipe              tuned (rank 4, lora_alpha 64, scaled rate 0.1) | paper (lora_alpha = 2·rank: 8, 16, 0.05)
    allocator           uniform | random | mola | alphalora | sensitivity | lora_smoe, all at five experts a layer
    pattern             2468 | 8642 (mola)
    metric              hill | alpha_hat | stable_rank (alphalora)
    strategy            S | U (lora_smoe)

Settings are the papers': β = 2.5 for spectra, retention 0.6; sensitivity has β = 0.5, because gradient norms spread far
wider than spectra. LoRA-SMoE's experts share their A and thus have fewer parameters each: a matrix that is kept gets as
many as come nearest below uniform's parameters if exactly six tenths of the matrices are kept. Every seed of `random`
draws its own layout.

Measured on tiny-dense with five seeds (90 trainings, hill rounds to uniform), tuned / paper: stable_rank .841 / .671,
uniform .788 / .476, alpha_hat .627 / .407; of sixteen differences from uniform LoRA-SMoE S's alone, tuned, is more than
the noise of so many tests: −.229 (docs/comparisons.md).

Comparisons: every rule against uniform. With nine of them about one study in three shows a difference where there is
none (1 − 0.95⁹, were they independent): read the intervals, not the verdicts.
"""

from __future__ import annotations

from typing import Any

from allocators.core.layers import blocks, total_or_default
from allocators.core.tables import Comparison
from allocators.core.types import ExpertCounts, ModelShape, Point

from ._tables import recipe_of_row, tuned_against_paper, with_each_recipe

BASE = "dense"
TABLE = True
SEEDS = 5
ALLOCATORS = ("uniform", "random", "mola", "alphalora", "sensitivity", "lora_smoe")
RETENTION = 0.6

UNIFORM = {"allocator": "uniform"}
_MOLA, _ALPHALORA = "MoLA, arXiv:2402.08562", "AlphaLoRA, arXiv:2410.10054"
COMPARISONS = with_each_recipe(
    (
        Comparison("random − uniform", {"allocator": "random"}, UNIFORM, "no difference is expected", "control"),
        Comparison("MoLA-2468 − uniform", {"pattern": "2468"}, UNIFORM, "upper layers need more", _MOLA),
        Comparison("MoLA-8642 − uniform", {"pattern": "8642"}, UNIFORM, "lower layers need less", _MOLA),
        *(
            Comparison(f"alphalora {m} − uniform", {"metric": m}, UNIFORM, "hill is better, and best", _ALPHALORA)
            for m in ("hill", "alpha_hat", "stable_rank")
        ),
        Comparison("sensitivity − uniform", {"allocator": "sensitivity"}, UNIFORM, "not published", "equation 6 here"),
        *(
            Comparison(f"lora_smoe {s} − uniform", {"strategy": s}, UNIFORM, "better", "LoRA-SMoE, arXiv:2505.06272")
            for s in ("S", "U")
        ),
    )
) + tuned_against_paper({"uniform": UNIFORM})


def suggest(trial: Any, shape: ModelShape) -> Point:
    """One row: a rule, and those of its knobs that the table varies."""
    recipe = recipe_of_row(trial)
    allocator = trial.suggest_categorical("allocator", list(ALLOCATORS))
    total = {"total_experts": total_or_default(shape, None)}
    match allocator:
        case "random":
            return Point(allocator, total | {"draw": "each"}, recipe)
        case "mola":
            return Point(allocator, {"pattern": trial.suggest_categorical("pattern", ["2468", "8642"])}, recipe)
        case "alphalora":
            metric = trial.suggest_categorical("metric", ["hill", "alpha_hat", "stable_rank"])
            return Point(allocator, total | {"metric": metric, "beta": 2.5, "rounding": "largest_remainder"}, recipe)
        case "sensitivity":
            return Point(allocator, total | {"beta": 0.5}, recipe)
        case "lora_smoe":
            knobs = {"retention": RETENTION, "strategy": trial.suggest_categorical("strategy", ["S", "U"])}
            return Point(
                allocator, knobs | {"experts_per_block": experts_per_block(shape, rank=recipe["rank"])}, recipe
            )
        case _:
            return Point(allocator, total, recipe)


def experts_per_block(shape: ModelShape, *, rank: int) -> int:
    """Most LoRA-SMoE experts a kept matrix whose parameters stay within uniform's: retention · cost(N) ≤ cost(uniform).

    `rank` is that of the row: the share that A and the routers take depends a little on it.
    """

    def cost(n: int, gating: Any) -> int:
        return ExpertCounts({b.path: n for b in blocks(shape)}, gating=gating).trainable_params(shape, rank=rank)

    budget = cost(total_or_default(shape, None) // shape.num_layers, "routed")
    n = 1
    while RETENTION * cost(n + 1, "hydra") <= budget:
        n += 1
    return n
