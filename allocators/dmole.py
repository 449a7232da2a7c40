"""D-MoLE: LoRA on the half of the matrices with the largest gradients, wherever they lie.

D-MoLE (arXiv:2506.11672) scores a matrix by its gradient norm on the task and adapts the upper half of all; its experts
for a sequence of tasks are another matter and not here.

    python -m allocators.show model=tiny-dense allocator=dmole
"""

from __future__ import annotations

from allocators._ranks import Equal, largest, matrices_of, on_chosen, scores_of
from allocators.core.apportion import check_share, nearest_share
from allocators.core.errors import InfeasibleError
from allocators.core.types import ModelShape, ModuleRanks, Signal

NEEDS = "sensitivity"
BASE = "any"
GIVES = "ranks"
FIXED_COST = False


def allocate(
    signal: Signal,
    shape: ModelShape,
    *,
    rank: int = 8,
    share: float = 0.5,
    equal: Equal = "parameters",
    metric: str = "sum_sq_grad",
) -> ModuleRanks:
    """One rank for the int(share·n + 0.5) matrices of largest score, first on ties; none for the others.

    rank     the parameters (equal=parameters), or the rank of a chosen matrix (equal=rank, as published)
    share    of all matrices, 0.5 (the paper's)
    equal    parameters: the chosen share what `rank` on every matrix has; rank: each has `rank`
    metric   of the signal; squared norms have the order of norms

    Raises InfeasibleError for a share outside (0, 1] or one that is no matrix; StudyError where the signal lacks the
    metric.
    """
    check_share(share)
    matrices = matrices_of(shape)
    chosen = largest(scores_of(signal, matrices, metric), nearest_share(share, len(matrices)))
    if not chosen:
        raise InfeasibleError(f"share {share} of {len(matrices)} matrices is no matrix: raise share")
    return on_chosen([matrices[i] for i in sorted(chosen)], matrices, rank=rank, equal=equal)
