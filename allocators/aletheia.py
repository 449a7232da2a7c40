"""Aletheia: LoRA on the half of the layers with the largest gradients, with more rank in the MLP if asked.

Aletheia (arXiv:2604.15351) sums a layer's gradient norms over five batches of one; its gain is speed, and a follow-up
at equal compute found none in quality. Here a layer's norm is the root of its matrices' squared gradients.

    python -m allocators.show model=tiny-dense allocator=aletheia
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from allocators._ranks import Equal, budget_of, by_layer, largest, matrices_of, on_chosen, scores_of, weighted
from allocators.core.apportion import check_share, floor_share
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
    mlp_ratio: float = 1.0,
    equal: Equal = "parameters",
    metric: str = "sum_sq_grad",
) -> ModuleRanks:
    """Ranks on all matrices of the max(1, int(L·share)) layers of largest score, first on ties.

    rank        the parameters (equal=parameters), or the mean rank of a chosen matrix (equal=rank, as published)
    share       of the layers, 0.5 (the published default)
    mlp_ratio   rank of an MLP's or expert's matrix over that of attention; the published option is 4 (64 and 16)
    equal       parameters: the chosen share what `rank` on every matrix has; rank: what `rank` on theirs has
    metric      of the signal

    Raises InfeasibleError for a share outside (0, 1] or a ratio that is not positive; StudyError where the signal lacks
    the metric.
    """
    if not (math.isfinite(mlp_ratio) and mlp_ratio > 0):
        raise InfeasibleError(f"mlp_ratio must be positive, got {mlp_ratio}")
    matrices = matrices_of(shape)
    scores = by_layer(scores_of(signal, matrices, metric), matrices, shape)
    layers = set(top_layers([math.sqrt(max(math.fsum(of), 0.0)) for of in scores], share))
    chosen = [m for m in matrices if m.module.layer in layers]
    if mlp_ratio == 1:
        return on_chosen(chosen, matrices, rank=rank, equal=equal)
    weights = [1.0 if m.module.role == "attention" else mlp_ratio for m in chosen]
    budget = budget_of(matrices if equal == "parameters" else chosen, rank)
    return weighted(weights, chosen, rank=rank, budget=budget)


def top_layers(scores: Sequence[float], share: float) -> list[int]:
    """The max(1, int(L·share)) layers of largest score, first on ties, in their order."""
    check_share(share)
    return largest(scores, max(1, floor_share(share, len(scores))))
