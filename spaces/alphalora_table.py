"""At the same number of experts, is AlphaLoRA better than uniform and MoLA-2468, and with which spectral metric?

    python -m search.run space=alphalora_table model=tiny-dense                        embedded model, offline
    python -m search.run space=alphalora_table model=tiny-dense dry_run=true           the rows and their parameters
    python -m search.run space=alphalora_table model=meta-llama/Llama-2-7b-hf task=openbookqa space.recipe=paper \\
        recipe.rank=8 recipe.lora_alpha=16 recipe.lora_dropout=0.05 recipe.learning_rate=3e-4 recipe.top_k=2 \\
        space.experts_per_layer=5

A table: every row is trained, none is searched, with 5 seeds (`seeds=`; the paper names none), seed by seed. The last
command has the paper's recipe and keeps its main budget, T = 160.

Knobs
    recipe              tuned (rank 4, lora_alpha 64, scaled rate 0.1) | paper (lora_alpha = 2·rank: 8, 16, 0.05)
    allocator           uniform | mola | alphalora
    experts_per_layer   2.5 | 5 | 7: the paper's T = 80, 160 and 224 on 32 layers, at any depth
    metric              hill | alpha_hat | stable_rank (alphalora)

MoLA's layout rises by the same steps at each budget: 1234, 2468, 4-6-8-10, low layers to high; where four does not
divide the layers its T is only near. alphalora has the paper's β = 2.5 and the rounding `largest_remainder` (each layer
within one of its share): equation 7 as published can load one layer with every correction.

Comparisons: hill against uniform at each budget; against MoLA, alpha_hat and stable_rank at 5 a layer.

Measured with the first command (140 trainings; hill at 5 a layer rounds to uniform), test accuracy at 5 a layer,
tuned / paper: stable_rank .841 / .671, uniform .788 / .476, MoLA-2468 .704 / .408, alpha_hat .627 / .407. Uniform
against MoLA-2468 is +.084 (95 % interval −.012 to +.179) and +.068 (+.004 to +.131), the reverse of the paper's order;
hill differs from uniform by less than the noise at 2.5 and 7, since this model's hill hardly differs between layers.
The tuned recipe is worth +.312 (+.227 to +.397) at uniform, with half of the parameters.
"""

from __future__ import annotations

import math
from typing import Any

from allocators.core.tables import Comparison, Published
from allocators.core.types import ModelShape, Point

from ._tables import recipe_of_row, tuned_against_paper, with_each_recipe

BASE = "dense"
TABLE = True
SEEDS = 5
ALLOCATORS = ("uniform", "mola", "alphalora")
LAYOUTS = {5: "2468", 2.5: "1234", 7: "4-6-8-10"}  # the main budget first

PAPER = "AlphaLoRA, arXiv:2410.10054"
PAPERS = {"recipe": "paper"}
SIX = "the mean of six tasks, each fine-tuned alone"
UNIFORM = {"allocator": "uniform", "experts_per_layer": 5}
MOLA = {"allocator": "mola", "experts_per_layer": 5}
HILL = {"allocator": "alphalora", "experts_per_layer": 5, "metric": "hill"}

PUBLISHED = (
    Published("Llama-2-7b-hf", SIX, UNIFORM | PAPERS, 0.8414, PAPER),
    Published("Llama-2-7b-hf", SIX, MOLA | PAPERS, 0.8459, PAPER),
    Published("Llama-2-7b-hf", SIX, HILL | PAPERS, 0.8497, PAPER),
    Published("Mistral-7B-v0.1", SIX, UNIFORM | PAPERS, 0.8765, PAPER),
    Published("Mistral-7B-v0.1", SIX, MOLA | PAPERS, 0.8832, PAPER),
    Published("Mistral-7B-v0.1", SIX, HILL | PAPERS, 0.8916, PAPER),
)

_BEST = "hill is the best metric"
COMPARISONS = with_each_recipe(
    (
        Comparison("hill − uniform, 5 a layer", HILL, UNIFORM, "+0.8 points (Llama), +1.5 (Mistral)", PAPER),
        Comparison("hill − MoLA-2468, 5 a layer", HILL, MOLA, "+0.4 points (Llama), +0.8 (Mistral)", PAPER),
        Comparison("hill − alpha_hat, 5 a layer", HILL, HILL | {"metric": "alpha_hat"}, _BEST, PAPER),
        Comparison("hill − stable_rank, 5 a layer", HILL, HILL | {"metric": "stable_rank"}, _BEST, PAPER),
        *(
            Comparison(
                f"hill − uniform, {n} a layer",
                HILL | {"experts_per_layer": n},
                UNIFORM | {"experts_per_layer": n},
                "swept by the paper",
                PAPER,
            )
            for n in (2.5, 7)
        ),
    )
) + tuned_against_paper({"uniform, 5 a layer": UNIFORM})


def suggest(trial: Any, shape: ModelShape) -> Point:
    """One row: a recipe, a number of experts a layer, a rule, and the metric of AlphaLoRA."""
    recipe = recipe_of_row(trial)
    each = trial.suggest_categorical("experts_per_layer", list(LAYOUTS))
    allocator = trial.suggest_categorical("allocator", list(ALLOCATORS))
    total = math.floor(each * shape.num_layers + 0.5)
    match allocator:
        case "mola":
            return Point(allocator, {"pattern": LAYOUTS[each]}, recipe)
        case "alphalora":
            metric = trial.suggest_categorical("metric", ["hill", "alpha_hat", "stable_rank"])
            knobs = {"total_experts": total, "metric": metric, "beta": 2.5, "rounding": "largest_remainder"}
            return Point(allocator, knobs, recipe)
        case _:
            return Point(allocator, {"total_experts": total}, recipe)
