"""Uniform ranks: plain LoRA with one rank on every matrix. What every rule for ranks is compared with.

python -m allocators.show model=tiny-dense allocator=uniform_ranks
"""

from __future__ import annotations

from allocators._ranks import matrices_of, on_chosen
from allocators.core.types import ModelShape, ModuleRanks, Signal

NEEDS = None
BASE = "any"
GIVES = "ranks"
FIXED_COST = True


def allocate(signal: Signal | None, shape: ModelShape, *, rank: int = 8) -> ModuleRanks:
    """`rank` for every projection of attention, MLP, shared experts and experts, where the matrix has as much.

    rank   of every matrix

    Raises InfeasibleError for a rank below 1.
    """
    matrices = matrices_of(shape)
    return on_chosen(matrices, matrices, rank=rank, equal="rank")
