"""Stratified random ranks: random inside each quarter of the depth, each with as many parameters as uniform has there.

The stronger control: where guided placements were compared with it on equal terms, it was the best of them.

    python -m allocators.show model=tiny-dense allocator=stratified_ranks
"""

from __future__ import annotations

from allocators._ranks import groups_of_layers, matrices_of
from allocators.core.types import ModelShape, ModuleRanks, Signal
from allocators.random_ranks import drawn

NEEDS = None
BASE = "any"
GIVES = "ranks"
FIXED_COST = True


def allocate(
    signal: Signal | None, shape: ModelShape, *, rank: int = 8, share: float | None = None, seed: int = 0
) -> ModuleRanks:
    """`random_ranks` on each quarter of the layers alone; of models with fewer than four layers on each layer.

    rank    the parameters of a quarter are those of this rank on all of its matrices
    share   of each quarter's matrices that have ranks; not given: all have, and the ranks differ
    seed    of the draw

    Raises InfeasibleError for a rank below 1 or a share that is no matrix of a quarter.
    """
    matrices = matrices_of(shape)
    group = groups_of_layers(shape, min(4, shape.num_layers))
    ranks: dict[str, int] = {}
    stacks: dict[str, tuple[int, ...]] = {}
    for quarter in range(max(group) + 1):
        inside = [m for m in matrices if group[m.module.layer] == quarter]
        if inside:  # layers without a candidate have nothing to draw
            part = drawn(inside, rank=rank, share=share, seed=f"{seed} {quarter}")
            ranks |= part.ranks
            stacks |= part.experts  # a stack lies in one layer, and so in one quarter
    return ModuleRanks(ranks, stacks)
