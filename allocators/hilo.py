"""HILO: a pattern of ranks by the depth, low layers to high. Looks at neither model nor data.

HILO (arXiv:2502.03884): what MoLA does with counts of experts, with ranks. The pattern says how the ranks of the
quarters of the depth relate to each other; the budget says how large they are.

    python -m allocators.show model=tiny-dense allocator=hilo
"""

from __future__ import annotations

from allocators._ranks import budget_of, groups_of_layers, matrices_of, weighted
from allocators.core.errors import InfeasibleError
from allocators.core.types import ModelShape, ModuleRanks, Signal
from allocators.mola import groups_in

NEEDS = None
BASE = "any"
GIVES = "ranks"
FIXED_COST = True


def allocate(signal: Signal | None, shape: ModelShape, *, rank: int = 8, pattern: str | int = "2468") -> ModuleRanks:
    """Ranks in proportion to a number for each of G consecutive groups of layers, low to high.

    rank      the parameters are those of this rank on every matrix; at rank 5 the pattern 2468 is the ranks themselves
    pattern   as MoLA's: digits (`2468`, `8642`, of any length), or numbers with dashes (`4-6-8-10`); 0: no LoRA there

    Raises InfeasibleError for a pattern that is none, has more groups than the model has layers, or is all zeros.
    """
    numbers = groups_in(pattern, shape)
    if not any(numbers):
        raise InfeasibleError(f"pattern '{pattern}' is all zeros: no matrix would get a rank")
    group, matrices = groups_of_layers(shape, len(numbers)), matrices_of(shape)
    chosen = [m for m in matrices if numbers[group[m.module.layer]]]  # nothing is left over for groups of 0
    weights = [float(numbers[group[m.module.layer]]) for m in chosen]
    return weighted(weights, chosen, rank=rank, budget=budget_of(matrices, rank))
