"""How many weight matrices need experts, and are those with the largest gradients (LoRA-SMoE) better than all equally?

    python -m search.run space=smoe_table model=tiny-dense                             embedded model, offline
    python -m search.run space=smoe_table model=tiny-dense dry_run=true                the rows and their parameters
    python -m search.run space=smoe_table model=Qwen/Qwen2.5-3B task=arc_easy space.recipe=paper \\
        recipe.rank=8 recipe.learning_rate=5e-5

A table: every row is trained, none is searched, with 5 seeds (`seeds=`; the paper names none), seed by seed. The last
command has the paper's recipe.

Knobs
    recipe              tuned (rank 4, lora_alpha 64, scaled rate 0.1) | paper (lora_alpha = 2·rank: 8, 16, 0.05)
    allocator           lora_smoe | uniform (the control)
    retention           0.6 | 0.4 | 0.8 | 1.0: share of the weight matrices that keep experts, and of 8 experts a layer
                        that uniform puts on every matrix. LoRA-SMoE keeps what is strictly above a percentile, so at
                        1.0 it leaves out the lowest matrix of a group
    strategy            S: attention and MLP ranked separately; U: together (lora_smoe)
    experts_per_block   8: what the vote of the task's one data set is worth. With eight data sets, as in the paper,
                        every vote is worth one expert: space.experts_per_block=1

All rows are HydraLoRA adapters (one A, N B's, soft gates), uniform too, so that only the placement differs. Matrices
differ in size, so rows at one retention have nearly, and not exactly, the same parameters: the report shows both.

Comparisons: S and U against uniform at 0.6, S against U, and S at 0.6 against the other retentions.

Measured on tiny-dense with the first command (120 trainings; test accuracy): tuned, at 40, 60, 80 and 100 %, S .513,
.569, .651 and .661, U .439, .557, .652 and .658, uniform .703, .716, .662 and .668 with nearly the parameters. At 60 %,
S − uniform is −.147 (95 % interval −.226 to −.068) tuned and −.012 (−.069 to +.046) with the papers' recipe, U −
uniform −.159 (−.224 to −.095) and +.020 (−.032 to +.072). Placement by gradients shows no gain over uniform here, and a
loss where the recipe is good: U's stays below .05 when corrected for thirteen tests (docs/comparisons.md).
"""

from __future__ import annotations

import math
from typing import Any

from allocators.core.tables import Comparison
from allocators.core.types import ModelShape, Point

from ._tables import recipe_of_row, tuned_against_paper, with_each_recipe

BASE = "dense"
TABLE = True
SEEDS = 5
ALLOCATORS = ("lora_smoe", "uniform")
EXPERTS = 8  # of a matrix that every data set votes for

PAPER = "LoRA-SMoE, arXiv:2505.06272"
S = {"allocator": "lora_smoe", "retention": 0.6, "strategy": "S"}
U = S | {"strategy": "U"}
UNIFORM = {"allocator": "uniform", "retention": 0.6}

_BEST = "LoRA-SMoE is best (Qwen2.5-3B, eight tasks)"
COMPARISONS = with_each_recipe(
    (
        Comparison("S − uniform, 60 %", S, UNIFORM, _BEST, PAPER),
        Comparison("U − uniform, 60 %", U, UNIFORM, _BEST, PAPER),
        Comparison("S − U, 60 %", S, U, "both are the paper's", PAPER),
        *(
            Comparison(f"S, 60 % − {100 * n:g} %", S, S | {"retention": n}, "60 % is its choice", PAPER)
            for n in (0.4, 0.8, 1.0)
        ),
    )
) + tuned_against_paper({"uniform, 60 %": UNIFORM})


def suggest(trial: Any, shape: ModelShape) -> Point:
    """One row; uniform has as many experts in all as LoRA-SMoE keeps."""
    recipe = recipe_of_row(trial)
    retention = trial.suggest_categorical("retention", [0.6, 0.4, 0.8, 1.0])
    allocator = trial.suggest_categorical("allocator", list(ALLOCATORS))
    if allocator == "uniform":
        total = math.floor(retention * EXPERTS * shape.num_layers + 0.5)
        return Point(allocator, {"total_experts": total, "gating": "hydra"}, recipe)
    strategy = trial.suggest_categorical("strategy", ["S", "U"])
    each = trial.suggest_int("experts_per_block", EXPERTS, EXPERTS)
    return Point(allocator, {"retention": retention, "strategy": strategy, "experts_per_block": each}, recipe)
