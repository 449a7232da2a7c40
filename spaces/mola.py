"""Which hand-made layout of LoRA experts over the layers (MoLA) is best: more below, more above, or both ends?

    python -m search.run space=mola model=tiny-dense

Knobs
    allocator       mola | uniform | random
    pattern         2468 | 8642 | 8228 | 2882 | 5555 | 8888: experts a layer in four groups of layers, low to high
    total_experts   T of the controls, 1 .. 8 a layer in steps of half a layer
    rank, lora_alpha, scaled_rate       1 .. 32, 8 .. 256, 5e-4 .. 0.5, logarithmic (docs/recipes.md says what they are)
    top_k           1 .. 4 experts per token

Starting points: uniform and random at T = 5 a layer, and the layouts 2468, 8642, 8228 and 2882, which have the same T
where four divides the number of layers, with the study's recipe (rank 4, lora_alpha 64, scaled rate 0.1 unless task or
command line suggest another); 2468 with the paper's (rank 8, lora_alpha 16, learning_rate 3e-4, top-2). Needs no
signal.

Measured in the papers' coordinates (lora_alpha = 2·rank), on task=tiny_backcipher with select_on=test, trials=8 and
evaluations=1, one seed (± about .02), on one CPU core: 3.5 minutes. At 1.23M parameters 8228 .973, uniform .970, 8642
.920, random .887, 2882 .793, 2468 .710.
"""

from __future__ import annotations

from typing import Any

from allocators.core.types import ModelShape, Point

from ._knobs import PAPERS, controls, dense_knobs, dense_recipe

BASE = "dense"
ALLOCATORS = ("mola", "uniform", "random")


def suggest(trial: Any, shape: ModelShape) -> Point:
    """Allocator, its knobs and a recipe."""
    allocator = trial.suggest_categorical("allocator", list(ALLOCATORS))
    return Point(allocator, dense_knobs(trial, allocator, shape), dense_recipe(trial, allocator))


def starting_points(shape: ModelShape) -> list[dict[str, Any]]:
    """The controls, and MoLA rising, falling, with more experts at both ends, and with more in the middle."""
    layouts = [{"allocator": "mola", "pattern": pattern} for pattern in ("2468", "8642", "8228", "2882")]
    return [*controls(shape), *layouts, layouts[0] | PAPERS]
