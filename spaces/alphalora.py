"""Does giving badly trained layers more LoRA experts (AlphaLoRA) pay, and with how many experts, which β and metric?

    python -m search.run space=alphalora model=tiny-dense
    python -m search.run space=alphalora model=meta-llama/Llama-2-7b-hf task=arc_easy space.total_experts=160

Knobs
    allocator       alphalora | uniform | random (the controls at the same T)
    total_experts   T, 1 .. 8 a layer in steps of half a layer; the paper: 80, 160, 224 on 32 layers
    beta            1 .. 4 in steps of 0.5; the paper: 2, 2.5, 3
    metric          hill | alpha_hat | stable_rank
    rank, lora_alpha, scaled_rate       1 .. 32, 8 .. 256, 5e-4 .. 0.5, logarithmic (docs/recipes.md says what they are)
    top_k           1 .. 4 experts per token

Starting points, all at T = 5 a layer: uniform, random, and alphalora with hill and β = 2.5 with the study's recipe
(rank 4, lora_alpha 64, scaled rate 0.1 unless task or command line suggest another); the same alphalora with the
paper's (rank 8, lora_alpha 16, learning_rate 3e-4, top-2). Rounding is `largest_remainder`; `space.rounding` does not
exist because equation 7 as published can load one layer with every correction. Needs no data for its signal.

Measured in the papers' coordinates (lora_alpha = 2·rank), on task=tiny_backcipher with select_on=test, trials=8 and
evaluations=1, one seed (± about .02), on one shared CPU core: 8.4 minutes. At T = 40 uniform .970 and random .887; hill
with β = 2.5 rounds to uniform there, since tiny-dense's layers hardly differ in hill (2.04 to 2.18). What the sampler
drew was no better. The metrics paired over five seeds: space=dense_table.
"""

from __future__ import annotations

from typing import Any

from allocators.core.types import ModelShape, Point

from ._knobs import PAPERS, controls, dense_knobs, dense_recipe

BASE = "dense"
ALLOCATORS = ("alphalora", "uniform", "random")


def suggest(trial: Any, shape: ModelShape) -> Point:
    """Allocator, its knobs and a recipe."""
    allocator = trial.suggest_categorical("allocator", list(ALLOCATORS))
    return Point(allocator, dense_knobs(trial, allocator, shape), dense_recipe(trial, allocator))


def starting_points(shape: ModelShape) -> list[dict[str, Any]]:
    """The controls, and AlphaLoRA with the paper's β."""
    points = controls(shape)
    alphalora = points[0] | {"allocator": "alphalora", "beta": 2.5, "metric": "hill"}
    return [*points, alphalora, alphalora | PAPERS]
