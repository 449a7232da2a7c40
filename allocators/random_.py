"""Random: the control. The same budget as another allocator, spent without looking at the model or the data.

python -m allocators.show model=tiny-moe allocator=random
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from typing import TypeVar

from allocators.core.errors import InfeasibleError
from allocators.core.types import Allocation, ExpertCounts, ExpertSelection, ModelShape, Signal
from allocators.greedy import budget
from allocators.sieve import how_many

T = TypeVar("T")

NEEDS = None
BASE = "any"
FIXED_COST = True


def allocate(
    signal: Signal | None,
    shape: ModelShape,
    *,
    fraction: float | None = None,
    experts_kept: int | None = None,
    total_experts: int | None = None,
    min_experts: int | None = None,
    seed: int = 0,
) -> Allocation:
    """MoE base: as many experts a layer as sieve takes with the same fraction or experts_kept, each set equally likely;
    with total_experts any that many experts of the model. One seed's choices are nested: more experts keep the fewer.

    Dense base: total_experts T (five a layer unless given, as AlphaLoRA's T = 160 on 32 layers) split over the layers,
    every composition with at least min_experts (1) a layer equally likely; all dense modules of layer l get N_l.

    Raises InfeasibleError for a budget that does not exist or a knob of the other kind of base.
    """
    if not shape.is_moe:
        given = {"fraction": fraction, "experts_kept": experts_kept}
        _refuse(given, f"{shape.name} is dense: use total_experts and min_experts")
        total = 5 * shape.num_layers if total_experts is None else total_experts
        return _composition(shape, total, 1 if min_experts is None else min_experts, seed)
    _refuse({"min_experts": min_experts}, f"{shape.name} is an MoE model: use fraction, experts_kept or total_experts")
    if total_experts is not None:
        _refuse({"experts_kept": experts_kept}, "total_experts is given")
        everyone = [(layer, expert) for layer in shape.moe_layers for expert in range(shape.experts_in(layer))]
        drawn = _shuffled(everyone, f"{seed}")[: budget(shape, fraction, total_experts)]
        return ExpertSelection({layer: tuple(e for at, e in drawn if at == layer) for layer in shape.moe_layers})
    kept = {layer: how_many(shape, layer, fraction, experts_kept) for layer in shape.moe_layers}
    return ExpertSelection(
        {n: tuple(_shuffled(range(shape.experts_in(n)), f"{seed} {n}")[:size]) for n, size in kept.items()}
    )


def _composition(shape: ModelShape, total: int, minimum: int, seed: int) -> ExpertCounts:
    layers = shape.num_layers
    spare = total - layers * minimum
    if minimum < 0:
        raise InfeasibleError(f"min_experts must not be negative, got {minimum}")
    if spare < 0:
        raise InfeasibleError(f"total_experts must be at least {layers * minimum} ({minimum} a layer), got {total}")
    # stars and bars: layers − 1 bars among spare stars, every placement once
    bars = sorted(random.Random(f"{seed}").sample(range(spare + layers - 1), layers - 1))
    edges = [-1, *bars, spare + layers - 1]
    counts = [minimum + right - left - 1 for left, right in itertools.pairwise(edges)]
    return ExpertCounts({m.path: counts[m.layer] for m in shape.of_role("attention", "mlp")})


def _shuffled(items: Iterable[T], seed: str) -> list[T]:
    order = list(items)
    random.Random(seed).shuffle(order)  # seeded by text: equal on every machine and Python version
    return order


def _refuse(given: dict[str, float | None], why: str) -> None:
    for knob, value in given.items():
        if value is not None:
            raise InfeasibleError(f"random takes no {knob} here, got {value}: {why}")
