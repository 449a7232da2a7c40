"""KappaTune: LoRA on the matrices with the smallest condition number, which is said to forget least.

KappaTune (arXiv:2506.16289): κ = σ_max/(σ_min + 10⁻⁸); a matrix with a small κ treats all directions alike, and
training it disturbs what the model knows the least. A matrix of almost zero weights has the smallest κ of all, because
of the 10⁻⁸; it is no well-conditioned matrix but a dead one, and comes last here, with a warning. In PEFT, a stack of
experts has the mean κ of its experts; here every expert has its own.

    python -m allocators.show model=tiny-dense allocator=kappatune
"""

from __future__ import annotations

from collections.abc import Sequence

from allocators._ranks import Equal, dead, matrices_of, on_chosen, scores_of, warn_of_dead
from allocators.core.apportion import check_share, floor_share
from allocators.core.errors import InfeasibleError
from allocators.core.types import ModelShape, ModuleRanks, Signal

NEEDS = "spectrum"
BASE = "any"
GIVES = "ranks"
FIXED_COST = False

LARGEST = 16_384  # a matrix with a longer side is skipped, as published
DEAD = 0.5  # σ_max ≥ σ_min: a κ that is clearly below 1 is made by the 10⁻⁸ alone


def allocate(
    signal: Signal,
    shape: ModelShape,
    *,
    rank: int = 8,
    share: float | None = None,
    number: int | None = None,
    threshold: float | None = None,
    equal: Equal = "parameters",
) -> ModuleRanks:
    """One rank for the matrices of smallest κ, first on ties; the others are left alone.

    rank        the parameters (equal=parameters), or the rank of a chosen matrix (equal=rank, as published)
    share       of the matrices, at least one; 0.2 (the published default) unless number or threshold is given
    number      of matrices
    threshold   all matrices with a κ of at most this
    equal       parameters: the chosen share what `rank` on every matrix has; rank: each has `rank`

    Raises InfeasibleError for several of share, number and threshold, or where that is no matrix; StudyError where the
    signal lacks the condition number.
    """
    matrices = [m for m in matrices_of(shape) if max(m.module.in_features, m.module.out_features) <= LARGEST]
    if not matrices:
        raise InfeasibleError(f"every matrix of {shape.name} has a side above {LARGEST:,}, and kappatune skips those")
    kappa = scores_of(signal, matrices, "condition")
    buried = [gone or k < DEAD for gone, k in zip(dead(signal, matrices), kappa, strict=True)]
    warn_of_dead(sum(buried), len(matrices), what="makes their condition number the smallest")
    chosen = lowest(kappa, share=share, number=number, threshold=threshold, dead=buried)
    return on_chosen([matrices[i] for i in sorted(chosen)], matrices_of(shape), rank=rank, equal=equal)


def lowest(
    kappa: Sequence[float],
    *,
    share: float | None = None,
    number: int | None = None,
    threshold: float | None = None,
    dead: Sequence[bool] = (),
) -> list[int]:
    """Positions of the smallest condition numbers in their order, first on ties.

    Dead matrices are behind all others, those of the smallest condition number last.
    """
    given = [
        f"{name}={v}" for name, v in (("share", share), ("number", number), ("threshold", threshold)) if v is not None
    ]
    if len(given) > 1:
        raise InfeasibleError(f"give one of share, number and threshold, got {' and '.join(given)}")
    last = list(dead) or [False] * len(kappa)
    order = sorted(range(len(kappa)), key=lambda i: (last[i], -kappa[i] if last[i] else kappa[i]))
    if threshold is not None:
        chosen = [i for i in order if kappa[i] <= threshold and not last[i]]
        if not chosen:
            raise InfeasibleError(
                f"no condition number is at most {threshold}: the smallest is {kappa[order[0]]:.4g}; raise threshold"
            )
        return chosen
    if number is None:
        share = 0.2 if share is None else share
        check_share(share)
        number = max(1, floor_share(share, len(kappa)))
    if not 1 <= number <= len(kappa):
        raise InfeasibleError(f"number must be 1..{len(kappa)}, got {number}")
    return order[:number]
