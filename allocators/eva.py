"""EVA: rank where a matrix's inputs spread over many directions of the task's tokens.

EVA (Paischer et al. 2024, arXiv:2410.07170): the shares of variance that each matrix's inputs have in their main
directions lie in one pool; the largest win, and a matrix's rank is the number of its winners. EVA also begins A with
these directions, which is an initialisation and not done here.

    python -m allocators.show model=tiny-dense allocator=eva
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from allocators._ranks import Equal, Matrix, as_ranks, budget_of, matrices_of
from allocators.core.apportion import nearest_share
from allocators.core.errors import InfeasibleError, did_you_mean
from allocators.core.types import ModelShape, ModuleRanks, Signal

NEEDS = "representation"
BASE = "any"
GIVES = "ranks"
FIXED_COST = False

MISSING = 1e-3  # of the variance: less is rounding, and wins no rank


def allocate(
    signal: Signal, shape: ModelShape, *, rank: int = 8, rho: float = 2.0, equal: Equal = "parameters"
) -> ModuleRanks:
    """As many of the largest shares as the budget pays for, first on ties.

    rank    the parameters are those of this rank on every matrix
    rho     a matrix has at most rho times this rank (EVA's ρ)
    equal   what the budget is: parameters, or rank, the sum of ranks, as published (matrices differ in size)

    Raises InfeasibleError for a rho below 1 or another `equal`, and where a matrix may have more ranks than shares were
    measured: it could not win them, and the ranks would be nearer to uniform than the rule's.
    """
    if equal not in ("parameters", "rank"):
        raise InfeasibleError(
            f"equal must be parameters or rank, got '{equal}'{did_you_mean(str(equal), ('parameters', 'rank'))}"
        )
    if not 1 <= rho <= 64:
        raise InfeasibleError(f"rho must be from 1 to 64, got {rho}")
    matrices = matrices_of(shape)
    most = [min(m.full, nearest_share(rho, m.of(rank))) for m in matrices]
    shares = [signal.rows.get(m.key, {}).get("explained", ())[:n] for m, n in zip(matrices, most, strict=True)]
    _refuse_more_than_measured(signal, matrices, most, rank=rank, rho=rho)
    if not any(map(any, shares)):
        raise InfeasibleError(f"the inputs of no matrix of {shape.name} vary: measure on more than one token")
    if equal == "rank":
        return as_ranks(matrices, winners(shares, [1] * len(matrices), sum(m.of(rank) for m in matrices)))
    return as_ranks(matrices, winners(shares, [m.cost for m in matrices], budget_of(matrices, rank)))


def _refuse_more_than_measured(
    signal: Signal, matrices: Sequence[Matrix], most: Sequence[int], *, rank: int, rho: float
) -> None:
    """Where shares are missing, those that are there do not sum to one. A signal keeps the largest of each matrix."""
    for m, wanted in zip(matrices, most, strict=True):
        shares = signal.rows.get(m.key, {}).get("explained", ())
        if len(shares) < wanted and any(shares) and math.fsum(shares) < 1 - MISSING:
            raise InfeasibleError(
                f"rho {rho:g} times rank {rank} is up to {wanted} ranks, and the signal holds the {len(shares)} "
                f"largest shares of {m.key}: lower rho or rank until their product is at most {len(shares)}"
            )


def winners(shares: Sequence[Sequence[float]], costs: Sequence[int], budget: int) -> list[int]:
    """Of every matrix how many of its shares are among the largest of all that the budget pays for.

    One that costs more than is left is passed over, and so are the smaller ones of its matrix.
    """
    pool = sorted(((-share, i) for i, own in enumerate(shares) for share in own if share > 0), key=lambda entry: entry)
    ranks, left, closed = [0] * len(shares), budget, set[int]()
    for _, i in pool:
        if i in closed:
            continue
        if costs[i] > left:
            closed.add(i)
            continue
        ranks[i] += 1
        left -= costs[i]
    return ranks
