"""Sensitivity ranks: more rank where the loss depends more on a matrix (FIM-LoRA).

FIM-LoRA (arXiv:2605.16800) scores a matrix by the mean squared gradient of its B and fills ranks up like water. With A
as it starts, E‖∂loss/∂B‖² = r·‖∂loss/∂W‖²/(3·in), so that the mean over B's entries is a third of that over W's: what
the sensitivity signal holds, divided by the matrix's size. (Scoring A would give zero everywhere, because B starts at
zero.) Its authors found no gain over uniform: 88.6 against 88.7 on GLUE.

    python -m allocators.show model=tiny-dense allocator=sensitivity_ranks
"""

from __future__ import annotations

from allocators._ranks import matrices_of, scores_of, weighted
from allocators.core.apportion import powers
from allocators.core.errors import InfeasibleError
from allocators.core.types import ModelShape, ModuleRanks, Signal

NEEDS = "sensitivity"
BASE = "any"
GIVES = "ranks"
FIXED_COST = False  # sizes differ: a rest below the price of a rank may stay unspent


def allocate(
    signal: Signal,
    shape: ModelShape,
    *,
    rank: int = 8,
    min_rank: int = 1,
    max_rank: int | None = None,
    beta: float = 1.0,
    metric: str = "sum_sq_grad",
) -> ModuleRanks:
    """r ∝ score^β, score = squared gradient over in·out, by water-filling and largest remainder within the bounds.

    rank       the parameters are those of this rank on every matrix
    min_rank   least rank; what lifts a matrix to it is taken from the least important ones
    max_rank   most, 2·rank unless given; what a matrix cannot take is shared again among the others
    beta       1 (the paper's); below 1 flatter, as scores span orders of magnitude
    metric     of the signal: sum_sq_grad, weight_grad, fisher, hutchinson

    Raises InfeasibleError for a negative score or bounds that leave the budget no room; StudyError where the signal
    lacks the metric.
    """
    matrices = matrices_of(shape)
    sizes = [m.module.in_features * m.module.out_features for m in matrices]
    scores = [score / size for score, size in zip(scores_of(signal, matrices, metric), sizes, strict=True)]
    if negative := [m.key for m, score in zip(matrices, scores, strict=True) if score < 0]:
        raise InfeasibleError(f"{metric} of {negative[0]} is negative, and has no share: use metric=sum_sq_grad")
    most = 2 * rank if max_rank is None else max_rank
    return weighted(powers(scores, beta), matrices, rank=rank, min_rank=min_rank, max_rank=most)
