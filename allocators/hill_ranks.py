"""Hill ranks: more rank where the weight spectrum says that a layer is less well trained. AlphaLoRA's metric, as ranks.

AlphaLoRA (arXiv:2410.10054) gives such layers more experts; here they get more rank. Needs no data.

    python -m allocators.show model=tiny-dense allocator=hill_ranks
"""

from __future__ import annotations

import math
from typing import Literal

from allocators._ranks import by_layer, matrices_of, scores_of, weighted
from allocators.core.apportion import powers
from allocators.core.errors import InfeasibleError, did_you_mean
from allocators.core.types import ModelShape, ModuleRanks, Signal

NEEDS = "spectrum"
BASE = "any"
GIVES = "ranks"
FIXED_COST = False


def allocate(
    signal: Signal,
    shape: ModelShape,
    *,
    rank: int = 8,
    beta: float = 2.5,
    metric: str = "hill",
    by: Literal["layer", "matrix"] = "layer",
    min_rank: int = 1,
    max_rank: int | None = None,
) -> ModuleRanks:
    """r ∝ v^β, v the mean metric of the layer (equation 6 of AlphaLoRA), at the parameters of `rank`.

    rank       the parameters are those of this rank on every matrix
    beta       β, 2.5; larger: more unequal
    metric     hill, alpha_hat, stable_rank, hill_window, hill_peak, hill_median: whatever the signal holds
    by         layer: all matrices of a layer have its mean, as AlphaLoRA does; matrix: each has its own value
    min_rank   least rank
    max_rank   most; no more than the matrix has unless given

    Raises InfeasibleError for a negative value (alpha_hat can be) or bounds that leave the budget no room; StudyError
    where the signal lacks the metric.
    """
    if by not in ("layer", "matrix"):
        raise InfeasibleError(f"by must be layer or matrix, got '{by}'{did_you_mean(str(by), ('layer', 'matrix'))}")
    matrices = matrices_of(shape)
    values = scores_of(signal, matrices, metric)
    if by == "layer":
        means = [math.fsum(of) / len(of) if of else 0.0 for of in by_layer(values, matrices, shape)]
        values = [means[m.module.layer] for m in matrices]
    if negative := [m.key for m, value in zip(matrices, values, strict=True) if value < 0]:
        raise InfeasibleError(
            f"{metric} at {negative[0]} is negative, and a share v^beta needs values that are not: use metric=hill or "
            "stable_rank"
        )
    return weighted(powers(values, beta), matrices, rank=rank, min_rank=min_rank, max_rank=max_rank)
