"""Sieve: in every layer the experts that the task's tokens use most.

MoE-Sieve: routing is skewed (the top quarter of the experts takes 37–53 % of a task's tokens), so LoRA on the hot
experts, attention, router and shared experts matches LoRA on all of them with about 70 % fewer parameters.

    python -m allocators.show model=tiny-moe allocator=sieve
"""

from __future__ import annotations

from allocators.core.apportion import floor_share
from allocators.core.errors import InfeasibleError
from allocators.core.ranking import Score, ranked, routing_scores
from allocators.core.types import ExpertSelection, ModelShape, Signal

NEEDS = "routing"
BASE = "moe"
FIXED_COST = True


def allocate(
    signal: Signal,
    shape: ModelShape,
    *,
    fraction: float | None = None,
    experts_kept: int | None = None,
    score: Score = "count",
) -> ExpertSelection:
    """The top floor(fraction · E) experts of every layer by (−score, id).

    fraction       share of a layer's experts, 0.25 (the paper's) unless experts_kept is given
    experts_kept   the same as a number
    score          count: tokens dispatched to the expert; mass: the sum of its gate weights; reap: gate weight times
                   the norm of the expert's output, mean over its tokens; ean: that norm alone

    Raises InfeasibleError where that is no expert or more than there are.
    """
    kept = {layer: how_many(shape, layer, fraction, experts_kept) for layer in shape.moe_layers}
    scores = routing_scores(signal, shape, score=score)
    return ExpertSelection({layer: tuple(ranked(scores[layer])[:n]) for layer, n in kept.items()})


def how_many(shape: ModelShape, layer: int, fraction: float | None, experts_kept: int | None) -> int:
    """Experts to keep in a layer; the budget that random and greedy share with sieve."""
    size = shape.experts_in(layer)
    if experts_kept is not None:
        if fraction is not None:
            raise InfeasibleError(f"give fraction or experts_kept, got both ({fraction} and {experts_kept})")
        if not 1 <= experts_kept <= size:
            raise InfeasibleError(
                f"experts_kept must be 1..{size} in layer {layer} of {shape.name}, got {experts_kept}"
            )
        return experts_kept
    fraction = 0.25 if fraction is None else fraction
    if not 0 < fraction <= 1:
        raise InfeasibleError(f"fraction must be above 0 and at most 1, got {fraction}")
    kept = floor_share(fraction, size)
    if not kept:
        raise InfeasibleError(
            f"fraction {fraction} of the {size} experts in layer {layer} of {shape.name} is no expert: "
            f"raise fraction to at least {1 / size:.4g} (1/{size}), or set experts_kept=1"
        )
    return kept
