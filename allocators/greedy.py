"""Greedy: one budget for the whole model, each expert given to the layer where it covers most.

MoE-Sieve's ablation of a budget that is equal in every layer; the paper found it no better than Sieve.

    python -m allocators.show model=tiny-moe allocator=greedy
"""

from __future__ import annotations

import math

from allocators.core.errors import InfeasibleError
from allocators.core.ranking import Score, ranked, routing_scores
from allocators.core.types import ExpertSelection, ModelShape, Signal
from allocators.sieve import how_many

NEEDS = "routing"
BASE = "moe"
FIXED_COST = True


def allocate(
    signal: Signal,
    shape: ModelShape,
    *,
    fraction: float | None = None,
    total_experts: int | None = None,
    score: Score = "count",
) -> ExpertSelection:
    """Step by step the expert with the largest marginal coverage, its share of its layer's score, over all layers.

    What an expert adds does not depend on those chosen before it, so this greedy is exact: no selection of the same
    size covers more, summed over the layers. Ties: lower layer, then lower id. A layer may stay empty.

    fraction        the budget that sieve spends at this fraction, 0.25 unless total_experts is given
    total_experts   experts over all layers
    score           as in sieve

    Raises InfeasibleError where that is no expert or more than there are.
    """
    total = budget(shape, fraction, total_experts)
    scores = routing_scores(signal, shape, score=score)
    gains: list[float] = []
    where: list[tuple[int, int]] = []
    for layer, values in scores.items():
        whole = math.fsum(values)
        gains += [v / whole for v in values]
        where += [(layer, i) for i in range(len(values))]
    chosen: dict[int, tuple[int, ...]] = {}
    for i in ranked(gains)[:total]:
        layer, expert = where[i]
        chosen[layer] = (*chosen.get(layer, ()), expert)
    return ExpertSelection(chosen)


def budget(shape: ModelShape, fraction: float | None, total_experts: int | None) -> int:
    """Experts over all layers: as given, or what sieve spends at the fraction."""
    if total_experts is None:
        return sum(how_many(shape, layer, fraction, None) for layer in shape.moe_layers)
    if fraction is not None:
        raise InfeasibleError(f"give fraction or total_experts, got both ({fraction} and {total_experts})")
    if not 1 <= total_experts <= shape.total_experts:
        raise InfeasibleError(f"total_experts must be 1..{shape.total_experts} for {shape.name}, got {total_experts}")
    return total_experts
