"""DomLoRA: LoRA on the one matrix that the loss depends on most, or on the few. The left end of the front.

DomLoRA (arXiv:2605.06183) puts one adapter where the energy of the first adapter gradient is largest, a shallow
down_proj as a rule. With A as it starts that energy is r·‖∂loss/∂W‖²/(3·in), so that our squared gradients divided by
`in` give the order (sample by sample, where the paper takes a batch). The paper's own formula was not at hand.

    python -m allocators.show model=tiny-dense allocator=domlora
"""

from __future__ import annotations

from allocators._ranks import Equal, largest, matrices_of, on_chosen, scores_of
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
    number: int = 1,
    equal: Equal = "rank",
    metric: str = "sum_sq_grad",
) -> ModuleRanks:
    """`rank` for the matrices with the largest squared gradient over `in`, first on ties; none for the others.

    rank     of a chosen matrix (equal=rank), or what gives the parameters (equal=parameters)
    number   of matrices
    equal    rank, as the paper: a small adapter; parameters: the chosen share what `rank` on every matrix has, up to
             their full rank
    metric   of the signal

    Raises InfeasibleError for a number that the model does not have; StudyError where the signal lacks the metric.
    """
    matrices = matrices_of(shape)
    if not 1 <= number <= len(matrices):
        raise InfeasibleError(f"number must be 1..{len(matrices)} for {shape.name}, got {number}")
    scores = [s / m.module.in_features for s, m in zip(scores_of(signal, matrices, metric), matrices, strict=True)]
    chosen = sorted(largest(scores, number))
    return on_chosen([matrices[i] for i in chosen], matrices, rank=rank, equal=equal)
