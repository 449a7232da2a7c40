"""Sensitivity by layer: AlphaLoRA's mapping on LoRA-SMoE's signal, so that signal and mapping can be told apart.

Ours. A layer whose weights' gradients are large on the task gets more experts.

    python -m allocators.show model=tiny-dense allocator=sensitivity
"""

from __future__ import annotations

from allocators.core.apportion import Rounding
from allocators.core.layers import on_layers, proportional
from allocators.core.types import ExpertCounts, ModelShape, Signal

NEEDS = "sensitivity"
BASE = "dense"
FIXED_COST = True  # layers of one size: the cost is Σ N_l times one layer's


def allocate(
    signal: Signal,
    shape: ModelShape,
    *,
    total_experts: int | None = None,
    beta: float = 1.0,
    metric: str = "sum_sq_grad",
    rounding: Rounding = "largest_remainder",
    min_experts: int = 1,
) -> ExpertCounts:
    """N_l = round(v_l^β / Σv^β · T), AlphaLoRA's equation 6; v_l the layer's mean score over modules and data sets.

    total_experts   T over all layers; five a layer unless given
    beta            1: shares proportional to the score. Scores span orders of magnitude, hill does not: AlphaLoRA's 2.5
                    would give nearly everything to one layer
    metric          sum_sq_grad, weight_grad, fisher, hutchinson: whatever the signal holds, of any kind
    rounding        largest_remainder; `paper` compares v^β with counts, which means little for numbers of any scale
    min_experts     least number a layer gets

    Raises InfeasibleError for a negative score or a T below min_experts a layer; StudyError where the signal lacks the
    metric.
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
