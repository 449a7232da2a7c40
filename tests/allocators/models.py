"""Shapes and routing signals that tests of several files build on; no weights, no torch."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from allocators.core.types import ModelShape, ModuleShape, Signal


def moe_shape(
    *, layers: int = 3, experts: int = 8, hidden: int = 8, width: int = 4, dense_first: int = 0
) -> ModelShape:
    """An OLMoE-like shape; the first `dense_first` layers have a dense MLP instead of experts."""
    modules: list[ModuleShape] = []
    for layer in range(layers):
        at = f"model.layers.{layer}"
        attention = ("q_proj", "k_proj", "v_proj", "o_proj")
        modules += [ModuleShape(f"{at}.self_attn.{n}", layer, hidden, hidden, role="attention") for n in attention]
        sizes = (("gate_proj", hidden, width), ("up_proj", hidden, width), ("down_proj", width, hidden))
        if layer < dense_first:
            modules += [ModuleShape(f"{at}.mlp.{n}", layer, i, o, role="mlp") for n, i, o in sizes]
        else:
            modules.append(ModuleShape(f"{at}.mlp.gate", layer, hidden, experts, role="router"))
            modules += [ModuleShape(f"{at}.mlp.experts.{n}", layer, i, o, experts, "expert") for n, i, o in sizes]
    return ModelShape("moe", tuple(modules), layers)


def dense_shape(*, layers: int = 4, hidden: int = 8, width: int = 16) -> ModelShape:
    """A Llama-like shape."""
    return ModelShape("dense", moe_shape(layers=layers, hidden=hidden, width=width, dense_first=layers).modules, layers)


def routing(
    shape: ModelShape,
    counts: Mapping[int, Sequence[float]] | None = None,
    mass: Mapping[int, Sequence[float]] | None = None,
    *,
    seed: int = 0,
) -> Signal:
    """A routing signal with the given counts (random ones by default) and masses (half the counts by default)."""
    rng = random.Random(seed)
    rows = {}
    for layer in shape.moe_layers:
        count = counts[layer] if counts else [rng.randrange(1, 1000) for _ in range(shape.experts_in(layer))]
        rows[str(layer)] = {"count": tuple(count), "mass": tuple(mass[layer] if mass else (c / 2 for c in count))}
    return Signal("routing", rows, "expert", "tokens", {"seed": seed})
