"""Which layers and modules of a dense model should get LoRA experts, how many, and which method should decide?

    python -m search.run space=dense model=tiny-dense
    python -m search.run space=dense model=HuggingFaceTB/SmolLM2-135M task=arc_easy recipe.epochs=1

Every published rule is a candidate beside uniform and random, each with its own knobs and no other's.

Knobs
    allocator           uniform | random | mola | alphalora | lora_smoe | sensitivity | layermoe
    total_experts       T (all but mola and lora_smoe): 1 .. 8 a layer in steps of half a layer
    pattern             mola: 2468 | 8642 | 8228 | 2882 | 5555 | 8888
    beta, metric        alphalora: 1 .. 4 in steps of 0.5; hill | alpha_hat | stable_rank
    sensitivity_beta    sensitivity: 0.25 .. 1 in steps of 0.25 (gradient norms spread far wider than spectra)
    retention, strategy, experts_per_block      lora_smoe: 0.2 .. 1, S | U, 1 .. 8
    rank, lora_alpha, scaled_rate       1 .. 32, 8 .. 256, 5e-4 .. 0.5, logarithmic (docs/recipes.md says what they are)
    top_k               1 .. 4 experts per token (routed LoRA-MoE; lora_smoe's gates are soft over all)

Starting points, all at T = 5 a layer (or nearest) with the study's recipe (rank 4, lora_alpha 64, scaled rate 0.1
unless task or command line suggest another): uniform, random, uniform at one expert a layer, where the front is
cheap, MoLA-2468, alphalora with hill and β = 2.5, sensitivity with β = 0.5, lora_smoe S at retention 0.6 with 8 experts
a block; the same alphalora with the paper's recipe (rank 8, lora_alpha 16, learning_rate 3e-4, top-2); layermoe.

Measured in the papers' coordinates (lora_alpha = 2·rank), on task=tiny_backcipher with select_on=test, on two CPU
cores, both signals included: 16 trials in 4.3 minutes, 3.8 GiB at peak. One seed: at T = 40 uniform .970, sensitivity
.950, random .887 ± .02; lora_smoe .903 at six tenths of the parameters.
"""

from __future__ import annotations

from typing import Any

from allocators.core.types import ModelShape, Point

from ._knobs import PAPERS, controls, dense_knobs, dense_recipe

BASE = "dense"
ALLOCATORS = ("uniform", "random", "mola", "alphalora", "lora_smoe", "sensitivity", "layermoe")


def suggest(trial: Any, shape: ModelShape) -> Point:
    """Allocator, its knobs and a recipe."""
    allocator = trial.suggest_categorical("allocator", list(ALLOCATORS))
    return Point(allocator, dense_knobs(trial, allocator, shape), dense_recipe(trial, allocator))


def starting_points(shape: ModelShape) -> list[dict[str, Any]]:
    """The controls, one expert a layer, and one point of every other rule; where it takes a total, the controls'."""
    points = controls(shape)
    same_total = points[0]
    alphalora = same_total | {"allocator": "alphalora", "beta": 2.5, "metric": "hill"}
    return [
        *points,
        {"allocator": "uniform", "total_experts": shape.num_layers},
        {"allocator": "mola", "pattern": "2468"},
        alphalora,
        same_total | {"allocator": "sensitivity", "sensitivity_beta": 0.5},
        {"allocator": "lora_smoe", "retention": 0.6, "strategy": "S", "experts_per_block": 8},
        alphalora | PAPERS,
        same_total | {"allocator": "layermoe"},
    ]
