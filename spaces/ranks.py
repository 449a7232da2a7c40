"""Where should a model get LoRA rank, and which rule should say so? Every matrix has its own rank, also 0.

    python -m search.run space=ranks model=tiny-dense
    python -m search.run space=ranks model=tiny-moe space.allocator=spectrum
    python -m search.run space=ranks model=HuggingFaceTB/SmolLM2-135M task=arc_easy recipe.epochs=1

Every rule spends the parameters that LoRA of the recipe's rank on every matrix has, so that rules at one rank are
compared at equal parameters and not at equal sums of ranks. lora_alpha/rank is the same for every matrix: a placement
is compared, and no scale. On an MoE model every expert's projection is a matrix of its own, and routers stay frozen.

Knobs
    allocator           uniform_ranks | random_ranks | stratified_ranks (the controls) | sensitivity_ranks |
                        hill_ranks | hilo | kappatune | spectrum | dmole | aletheia | domlora | eva | plop
    sensitivity_beta    sensitivity_ranks: 0.25 .. 1 in steps of 0.25
    beta                hill_ranks: 1 .. 4 in steps of 0.5
    pattern             hilo: 2468 | 8642 | 8228 | 2882
    share               kappatune, dmole, aletheia: 0.1 .. 0.9 of the matrices (aletheia: of the layers) in steps of 0.1
    snr_share           spectrum: the same share of each type's matrices; the least step is one that is a whole matrix
    rho                 eva: 1 .. 4 in steps of 0.5; no matrix has more than rho times the recipe's rank
    types               plop: 1 .. 5 of the types of matrices
    order               plop: lowest | highest (the paper's control)
    equal               kappatune, spectrum, dmole, aletheia, plop: parameters | rank. With rank a chosen matrix has the
                        recipe's rank, as in the papers, and the adapter has fewer parameters
    number              domlora: 1 .. 8 matrices, each with the recipe's rank
    roles, expert_rank  only where they are asked for, on an MoE model, as in space=sieve: space.roles=experts.
                        By default attention, shared experts, experts and MLPs of dense layers have ranks; router and
                        gate, where they are adapted, have the recipe's rank whatever the rule. The budget is that of
                        the roles
    rank, lora_alpha, scaled_rate       1 .. 32, 8 .. 256, 5e-4 .. 0.5, logarithmic (docs/recipes.md says what they are)

Starting points, with the study's recipe (rank 4, lora_alpha 64, scaled rate 0.1 unless task or command line suggest
another): the three controls, then one point of every rule at its paper's setting, at the controls' parameters (β = 0.5
for sensitivity_ranks, whose scores span orders of magnitude); domlora on one matrix, the left end of the front.

Measured as a table (space=ranks_table): with one recipe no rule beats uniform_ranks at equal parameters on the embedded
models; rules that choose few matrices lose most.
"""

from __future__ import annotations

import math
from typing import Any

from allocators.core.types import ModelShape, Point

from ._knobs import PATTERNS, lora_recipe, role_knobs

BASE = "any"
CONTROLS = ("uniform_ranks", "random_ranks", "stratified_ranks")
ALLOCATORS = (
    *CONTROLS,
    *("sensitivity_ranks", "hill_ranks", "hilo", "kappatune", "spectrum", "dmole", "aletheia", "domlora"),
    *("eva", "plop"),
)


def suggest(trial: Any, shape: ModelShape) -> Point:
    """A rule, its own knobs, and a recipe whose rank is the budget."""
    allocator = trial.suggest_categorical("allocator", list(ALLOCATORS))
    knobs: dict[str, Any] = {}
    match allocator:
        case "sensitivity_ranks":
            knobs["beta"] = trial.suggest_float("sensitivity_beta", 0.25, 1.0, step=0.25)
        case "hill_ranks":
            knobs["beta"] = trial.suggest_float("beta", 1.0, 4.0, step=0.5)
        case "hilo":
            knobs["pattern"] = trial.suggest_categorical("pattern", list(PATTERNS[:4]))
        case "domlora":
            knobs["number"] = trial.suggest_int("number", 1, 8)
        case "spectrum":
            low = _one_of_a_type(shape)
            knobs["share"] = trial.suggest_float("snr_share", low, max(low, 0.9), step=0.1)
            knobs["equal"] = trial.suggest_categorical("equal", ["parameters", "rank"])
        case "eva":
            knobs["rho"] = trial.suggest_float("rho", 1.0, 4.0, step=0.5)
        case "plop":
            knobs["types"] = trial.suggest_int("types", 1, 5)
            knobs["order"] = trial.suggest_categorical("order", ["lowest", "highest"])
            knobs["equal"] = trial.suggest_categorical("equal", ["parameters", "rank"])
        case "kappatune" | "dmole" | "aletheia":
            knobs["share"] = trial.suggest_float("share", 0.1, 0.9, step=0.1)
            knobs["equal"] = trial.suggest_categorical("equal", ["parameters", "rank"])
    return Point(allocator, knobs | role_knobs(trial, shape), lora_recipe(trial))


def starting_points(shape: ModelShape) -> list[dict[str, Any]]:
    """The controls, and one point of every rule at their parameters, but for domlora's one matrix."""
    return [
        *({"allocator": name} for name in CONTROLS),
        {"allocator": "sensitivity_ranks", "sensitivity_beta": 0.5},
        {"allocator": "hill_ranks", "beta": 2.5},
        {"allocator": "hilo", "pattern": "2468"},
        {"allocator": "kappatune", "share": 0.2, "equal": "parameters"},
        {"allocator": "spectrum", "snr_share": max(0.5, _one_of_a_type(shape)), "equal": "parameters"},
        {"allocator": "dmole", "share": 0.5, "equal": "parameters"},
        {"allocator": "aletheia", "share": 0.5, "equal": "parameters"},
        {"allocator": "domlora", "number": 1},
        {"allocator": "eva", "rho": 2.0},
        {"allocator": "plop", "types": 3, "order": "lowest", "equal": "parameters"},
    ]


def _one_of_a_type(shape: ModelShape) -> float:
    """The first tenth at which a type with a matrix a layer has one to keep."""
    return min(1.0, math.ceil(10 / shape.num_layers) / 10)
