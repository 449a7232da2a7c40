"""Which weight matrices deserve experts by their gradients (LoRA-SMoE), and how many of them should be kept?

    python -m search.run space=lora_smoe model=tiny-dense

Knobs
    allocator           lora_smoe | uniform | random
    retention           share of the blocks kept, 0.2 .. 1 in steps of 0.1; the paper: 0.6
    strategy            S: attention and MLP ranked separately; U: together
    experts_per_block   1 .. 8 experts a kept block; the paper has one a data set that votes for the block, up to 8
    total_experts       T of the controls, 1 .. 8 a layer in steps of half a layer
    rank, lora_alpha, scaled_rate       1 .. 32, 8 .. 256, 5e-4 .. 0.5, logarithmic (docs/recipes.md says what they are)
    top_k               1 .. 4 experts per token (controls; LoRA-SMoE's gates are soft over all)

Starting points: uniform and random at T = 5 a layer, retention 0.6 with S and with U at 8 experts a block (4.8 a block
on average), all with the study's recipe (rank 4, lora_alpha 64, scaled rate 0.1 unless task or command line suggest
another); S with the paper's (rank 8, lora_alpha 16, learning_rate 5e-5).

Measured in the papers' coordinates (lora_alpha = 2·rank), on task=tiny_backcipher with select_on=test, trials=8 and
evaluations=1, one seed (± about .02), on one CPU core: 3.7 minutes. S .903 at 732k parameters, U .880 at 712k; uniform
.970 and random .887 at 1.23M.
"""

from __future__ import annotations

from typing import Any

from allocators.core.types import ModelShape, Point

from ._knobs import controls, dense_knobs, dense_recipe

BASE = "dense"
ALLOCATORS = ("lora_smoe", "uniform", "random")
PAPER = {"rank": 8, "lora_alpha": 16.0, "scaled_rate": 16 * 5e-5}


def suggest(trial: Any, shape: ModelShape) -> Point:
    """Allocator, its knobs and a recipe."""
    allocator = trial.suggest_categorical("allocator", list(ALLOCATORS))
    return Point(allocator, dense_knobs(trial, allocator, shape), dense_recipe(trial, allocator))


def starting_points(shape: ModelShape) -> list[dict[str, Any]]:
    """The controls, and LoRA-SMoE with both of its strategies."""
    kept = {"allocator": "lora_smoe", "retention": 0.6, "experts_per_block": 8}
    both = [kept | {"strategy": strategy} for strategy in ("S", "U")]
    return [*controls(shape), *both, both[0] | PAPER]
