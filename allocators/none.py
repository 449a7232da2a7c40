"""None: no routed expert; attention, router and shared experts only, the smallest adapter of an MoE model.

python -m allocators.show model=tiny-moe allocator=none
"""

from __future__ import annotations

from allocators.core.types import ExpertSelection, ModelShape, Signal

NEEDS = None
BASE = "moe"
FIXED_COST = True


def allocate(signal: Signal | None, shape: ModelShape) -> ExpertSelection:
    """The empty selection."""
    return ExpertSelection({})
