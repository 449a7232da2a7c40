"""All: every expert of an MoE model, the full LoRA that a selection is compared with.

python -m allocators.show model=tiny-moe allocator=all
"""

from __future__ import annotations

from allocators.core.types import ExpertSelection, ModelShape, Signal

NEEDS = None
BASE = "moe"
FIXED_COST = True


def allocate(signal: Signal | None, shape: ModelShape) -> ExpertSelection:
    """Every routed expert of every layer."""
    return ExpertSelection({layer: tuple(range(shape.experts_in(layer))) for layer in shape.moe_layers})
