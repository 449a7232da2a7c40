"""AlphaLoRA: more experts where a layer's weight spectrum says that it is less well trained.

AlphaLoRA (arXiv:2410.10054): the heavier the tail of a layer's eigenvalues (a small exponent `hill`), the better it is
trained, and the fewer experts it needs. Needs no data.

    python -m allocators.show model=tiny-dense allocator=alphalora
"""

from __future__ import annotations

from allocators.core.apportion import Rounding
from allocators.core.layers import on_layers, proportional
from allocators.core.types import ExpertCounts, ModelShape, Signal

NEEDS = "spectrum"
BASE = "dense"
FIXED_COST = True  # layers of one size: the cost is Σ N_l times one layer's


def allocate(
    signal: Signal,
    shape: ModelShape,
    *,
    total_experts: int | None = None,
    beta: float = 2.5,
    metric: str = "hill",
    rounding: Rounding = "paper",
    min_experts: int = 1,
) -> ExpertCounts:
    """N_l = round(v_l^β / Σv^β · T) (equation 6), corrected until ΣN = T (equation 7); v_l the layer's mean metric.

    total_experts   T over all layers; five a layer unless given (the paper's 160 on 32 layers; it also ran 80 and 224)
    beta            β, 2.5; the paper swept 2, 2.5, 3. Larger: more unequal
    metric          hill (the paper's choice), alpha_hat or stable_rank; hill_window, hill_peak, hill_median for other
                    rules of where the tail begins (signals/spectrum/tails.py); or any metric of the signal
    rounding        `paper`: equation 7 as published, which can load one layer with every correction (it warns)
                    `largest_remainder`: each layer within one of its share
    min_experts     least number a layer gets, 1; 0 with `paper` gives the published numbers

    Raises InfeasibleError for a negative metric (alpha_hat can be) or a T below min_experts a layer; StudyError where
    the signal lacks the metric.
    """
    counts = proportional(
        signal,
        shape,
        metric=metric,
        total_experts=total_experts,
        beta=beta,
        rounding=rounding,
        min_experts=min_experts,
    )
    return on_layers(counts, shape)
