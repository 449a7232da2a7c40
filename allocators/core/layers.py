"""What the allocators for dense bases share: one value a layer, equation 6 on it, one count for a layer's modules.

values = layer_values(signal, shape, metric="hill")           # plain mean over q, k, v, o, gate, up, down
counts = proportional(signal, shape, metric="hill", total_experts=160, beta=2.5, rounding="paper", min_experts=1)
allocation = on_layers(counts, shape)                         # every module of layer l gets counts[l]
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from allocators.core.apportion import Rounding, apportion, powers
from allocators.core.errors import InfeasibleError
from allocators.core.types import ExpertCounts, Gating, ModelShape, ModuleShape, Signal


def blocks(shape: ModelShape) -> tuple[ModuleShape, ...]:
    """The weight matrices of a dense base that take added experts: q, k, v, o, gate, up, down of every layer."""
    return shape.of_role("attention", "mlp")


def layer_values(signal: Signal, shape: ModelShape, *, metric: str) -> list[float]:
    """Value of every layer, first to last: the plain mean over its modules, whatever their sizes (as AlphaLoRA does).

    A row that holds several values (one a data set) enters with their mean.

    Raises StudyError where the signal lacks the metric for a module.
    """
    rows = {m.path: signal.metric(m.path, metric) for m in blocks(shape)}
    layers: list[list[float]] = [[] for _ in range(shape.num_layers)]
    for m in blocks(shape):
        layers[m.layer].append(math.fsum(rows[m.path]) / len(rows[m.path]))
    return [math.fsum(values) / len(values) for values in layers]


def proportional(
    signal: Signal,
    shape: ModelShape,
    *,
    metric: str,
    total_experts: int | None,
    beta: float,
    rounding: Rounding,
    min_experts: int,
) -> tuple[int, ...]:
    """AlphaLoRA's equation 6, N_l = round(v_l^β / Σv^β · T), with v the layer values of any signal's metric.

    Raises InfeasibleError for a negative layer value or β (they have no share) or a total out of reach.
    """
    values = layer_values(signal, shape, metric=metric)
    for layer, value in enumerate(values):
        if not value >= 0:
            other = " (hill · log10 of the largest eigenvalue, which is below 1 here): use metric=hill or stable_rank"
            raise InfeasibleError(
                f"{metric} of layer {layer} of {shape.name} is {value:.4g}, and a share v^beta needs values that are "
                f"not negative{other if metric == 'alpha_hat' else ''}"
            )
    return apportion(
        powers(values, beta), total_or_default(shape, total_experts), rounding=rounding, min_experts=min_experts
    )


def total_or_default(shape: ModelShape, total_experts: int | None) -> int:
    """T as given, else five a layer: the papers' T = 160 on 32 layers, for a model of any depth."""
    return 5 * shape.num_layers if total_experts is None else total_experts


def on_layers(counts: Sequence[int], shape: ModelShape, *, gating: Gating = "routed") -> ExpertCounts:
    """Layer l's count on each of its modules, routed as MoLA and AlphaLoRA do unless `gating` says otherwise.

    Raises InfeasibleError where no layer gets an expert.
    """
    if not any(counts):
        raise InfeasibleError(f"no layer of {shape.name} gets an expert: ask for at least one")
    return ExpertCounts({m.path: counts[m.layer] for m in blocks(shape)}, gating)
