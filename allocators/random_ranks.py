"""Random ranks: the control. The parameters of another rule for ranks, spent without looking at the model or the data.

python -m allocators.show model=tiny-dense allocator=random_ranks
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from allocators._ranks import Matrix, matrices_of, on_chosen, weighted
from allocators.core.apportion import check_share, floor_share
from allocators.core.errors import InfeasibleError
from allocators.core.types import ModelShape, ModuleRanks, Signal

NEEDS = None
BASE = "any"
GIVES = "ranks"
FIXED_COST = True


def allocate(
    signal: Signal | None, shape: ModelShape, *, rank: int = 8, share: float | None = None, seed: int = 0
) -> ModuleRanks:
    """Ranks that follow weights drawn from the exponential distribution: every split of the budget is equally likely.

    rank    the parameters are those of this rank on every matrix
    share   of the matrices, drawn at random, that have one rank together and all of the parameters: the control of
            rules that choose matrices (kappatune, spectrum, dmole). Not given: all have ranks, which differ
    seed    of the draw

    Raises InfeasibleError for a rank below 1 or a share that is no matrix.
    """
    matrices = matrices_of(shape)
    return drawn(matrices, rank=rank, share=share, seed=f"{seed}")


def drawn(matrices: Sequence[Matrix], *, rank: int, share: float | None, seed: str) -> ModuleRanks:
    """The same on some matrices; one seed gives one answer on every machine and Python version."""
    rng = random.Random(seed)
    if share is None:
        return weighted([rng.expovariate(1.0) for _ in matrices], matrices, rank=rank)
    check_share(share)
    number = floor_share(share, len(matrices))
    if not number:
        raise InfeasibleError(
            f"share {share} of {len(matrices)} matrices is no matrix: raise share to at least {1 / len(matrices):.4g}"
        )
    chosen = sorted(rng.sample(range(len(matrices)), number))
    return on_chosen([matrices[i] for i in chosen], matrices, rank=rank, equal="parameters")
