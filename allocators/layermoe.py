"""LayerMoE: more LoRA experts in the layers where tasks look less alike.

LayerMoE (arXiv:2505.22582, ACL 2025) adds experts for new languages: s_l is the mean cosine similarity of hidden states
after attention between languages, and layer l gets ⌈(1/s_l)/Σ(1/s)·K⌉. Here s is between the tasks of a mixture
(`task=a+b`); with one task between its documents. The paper chooses K so that the total is right, which is done here by
adding one expert after another where the next ceiling comes first, so that every total is met.

    python -m allocators.show model=tiny-dense allocator=layermoe
"""

from __future__ import annotations

from allocators.core.apportion import ceilings
from allocators.core.errors import InfeasibleError
from allocators.core.layers import on_layers, total_or_default
from allocators.core.types import ExpertCounts, ModelShape, Signal

NEEDS = "representation"
BASE = "dense"
FIXED_COST = True


def allocate(signal: Signal, shape: ModelShape, *, total_experts: int | None = None) -> ExpertCounts:
    """⌈K/s_l⌉ experts for every module of layer l, at least one.

    total_experts   over the layers, T; five a layer unless given

    Raises InfeasibleError where a similarity is not positive, or for less than one expert a layer.
    """
    values = [signal.metric(layer, "similarity")[0] for layer in range(shape.num_layers)]
    for layer, value in enumerate(values):
        if not value > 0:
            raise InfeasibleError(
                f"the similarity of layer {layer} of {shape.name} is {value:.4g}, and 1/s needs positive ones: take "
                "more samples, or another rule"
            )
    return on_layers(ceilings([1 / value for value in values], total_or_default(shape, total_experts)), shape)
