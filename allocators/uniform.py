"""Uniform: the same number of LoRA experts in every layer. The baseline every other allocator is compared with.

python -m allocators.show model=tiny-dense allocator=uniform
"""

from __future__ import annotations

from allocators.core.apportion import largest_remainder
from allocators.core.errors import InfeasibleError
from allocators.core.layers import on_layers, total_or_default
from allocators.core.types import ExpertCounts, Gating, ModelShape, Signal

NEEDS = None
BASE = "dense"
FIXED_COST = True


def allocate(
    signal: Signal | None,
    shape: ModelShape,
    *,
    experts_per_layer: int | None = None,
    total_experts: int | None = None,
    min_experts: int = 1,
    gating: Gating = "routed",
) -> ExpertCounts:
    """N experts on every module of every layer, or a total T split as evenly as whole numbers allow.

    experts_per_layer   N
    total_experts       T over all layers, five a layer unless N is given (AlphaLoRA's T = 160 on 32 layers); where the
                        layers do not divide it, their counts differ by one
    min_experts         least number a layer may get when T is split
    gating              routed (MoLA, AlphaLoRA) or hydra: LoRA-SMoE's adapter, to compare it with at its own terms

    Raises InfeasibleError for both N and T, no expert at all, a T below the floor, or another gating.
    """
    if experts_per_layer is None:
        total = total_or_default(shape, total_experts)
        return on_layers(largest_remainder([1] * shape.num_layers, total, minimum=min_experts), shape, gating=gating)
    if total_experts is not None:
        raise InfeasibleError(
            f"give experts_per_layer or total_experts, got both ({experts_per_layer} and {total_experts})"
        )
    if experts_per_layer < 1:
        raise InfeasibleError(f"experts_per_layer must be at least 1, got {experts_per_layer}")
    return on_layers([experts_per_layer] * shape.num_layers, shape, gating=gating)
