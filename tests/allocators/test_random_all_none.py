"""The controls: random at the budget of another allocator, everything, nothing."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocators import all as all_experts
from allocators import none, random_, sieve
from allocators.core.errors import InfeasibleError
from allocators.core.types import ExpertCounts, ExpertSelection, ModelShape
from tests.allocators.laws import inside
from tests.allocators.models import dense_shape, moe_shape, routing

seeds = st.integers(0, 10**6)


def chosen_at_random(shape: ModelShape, **knobs: Any) -> ExpertSelection:
    """The answer for an MoE model."""
    allocation = random_.allocate(None, shape, **knobs)
    assert isinstance(allocation, ExpertSelection)
    return allocation


def counted_at_random(shape: ModelShape, **knobs: Any) -> ExpertCounts:
    """The answer for a dense model."""
    allocation = random_.allocate(None, shape, **knobs)
    assert isinstance(allocation, ExpertCounts)
    return allocation


@given(st.floats(0.125, 1), seeds)
def test_has_sieves_budget_in_every_layer(fraction: float, seed: int) -> None:
    shape = moe_shape(layers=3, experts=8, dense_first=1)
    ours = chosen_at_random(shape, fraction=fraction, seed=seed)
    theirs = sieve.allocate(routing(shape), shape, fraction=fraction)
    assert [len(ours.in_layer(n)) for n in shape.moe_layers] == [len(theirs.in_layer(n)) for n in shape.moe_layers]
    assert ours.trainable_params(shape, rank=4) == theirs.trainable_params(shape, rank=4)


@given(st.integers(1, 8), st.integers(1, 8), seeds)
def test_one_seeds_choices_are_nested(a: int, b: int, seed: int) -> None:
    shape = moe_shape(experts=8)
    small, large = (chosen_at_random(shape, experts_kept=n, seed=seed) for n in sorted((a, b)))
    assert inside(small, large)


@given(st.integers(1, 24), seeds)
def test_a_total_over_all_layers(total: int, seed: int) -> None:
    shape = moe_shape(layers=3, experts=8)
    chosen = random_.allocate(None, shape, total_experts=total, seed=seed)
    chosen.check(shape)
    assert chosen.total_experts == total


def test_a_seed_is_a_choice_and_layers_differ() -> None:
    shape = moe_shape(layers=4, experts=16)
    one = chosen_at_random(shape, seed=1)
    assert one == random_.allocate(None, shape, seed=1)
    assert len({random_.allocate(None, shape, seed=s) for s in range(20)}) == 20
    assert len(set(one.experts.values())) > 1


def test_known_choice() -> None:
    """Pinned: the same seed must mean the same experts on every machine and in every version."""
    assert dict(chosen_at_random(moe_shape(layers=2, experts=8), seed=2).experts) == {0: (4, 5), 1: (2, 3)}


def test_every_set_of_experts_is_equally_likely() -> None:
    shape = moe_shape(layers=1, experts=4)
    seen = Counter(chosen_at_random(shape, fraction=0.5, seed=s).in_layer(0) for s in range(3000))
    assert len(seen) == 6
    for times in seen.values():  # 500 expected; five standard deviations
        assert abs(times - 500) < 5 * math.sqrt(3000 * (1 / 6) * (5 / 6))


@given(st.integers(0, 30), st.integers(0, 3), seeds)
def test_dense_is_a_composition_with_the_floor(extra: int, floor: int, seed: int) -> None:
    shape = dense_shape(layers=4)
    total = 4 * floor + extra
    chosen = counted_at_random(shape, total_experts=total, min_experts=floor, seed=seed)
    chosen.check(shape)
    counts = [{chosen.counts.get(m.path, 0) for m in shape.modules if m.layer == layer} for layer in range(4)]
    assert all(len(same) == 1 for same in counts)  # all seven modules of a layer have the layer's count
    assert sum(n for (n,) in counts) == total
    assert min(n for (n,) in counts) >= floor
    assert chosen.gating == "routed"


def test_every_composition_is_equally_likely() -> None:
    shape = dense_shape(layers=3)
    first = [next(m.path for m in shape.modules if m.layer == layer) for layer in range(3)]
    seen: Counter[tuple[int, ...]] = Counter()
    for seed in range(3000):
        counts = counted_at_random(shape, total_experts=5, min_experts=1, seed=seed).counts
        seen[tuple(counts[path] for path in first)] += 1
    assert len(seen) == math.comb(4, 2)
    for times in seen.values():
        assert abs(times - 500) < 5 * math.sqrt(3000 * (1 / 6) * (5 / 6))


def test_dense_takes_five_a_layer_unless_told() -> None:
    shape = dense_shape(layers=4)
    assert random_.allocate(None, shape).total_experts == 7 * 5 * 4


@pytest.mark.parametrize(
    ("shape", "knobs", "message"),
    [
        (dense_shape(), {"fraction": 0.5}, "random takes no fraction here, got 0.5: dense is dense: use total_experts"),
        (dense_shape(), {"experts_kept": 2}, "takes no experts_kept here"),
        (dense_shape(layers=4), {"total_experts": 3}, r"total_experts must be at least 4 \(1 a layer\), got 3"),
        (dense_shape(layers=4), {"total_experts": -1, "min_experts": 0}, "must be at least 0"),
        (dense_shape(layers=4), {"total_experts": 9, "min_experts": -1}, "min_experts must not be negative"),
        (moe_shape(), {"min_experts": 1}, "moe is an MoE model: use fraction"),
        (moe_shape(), {"total_experts": 3, "experts_kept": 1}, "takes no experts_kept here"),
        (moe_shape(), {"total_experts": 3, "fraction": 0.5}, "give fraction or total_experts"),
        (moe_shape(experts=8), {"fraction": 0.1}, "no expert: raise fraction"),
    ],
)
def test_bad_knobs(shape: ModelShape, knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(InfeasibleError, match=message):
        random_.allocate(None, shape, **knobs)


def test_all_and_none_are_the_ends() -> None:
    shape = moe_shape(layers=3, experts=8, dense_first=1)
    everything, nothing = all_experts.allocate(None, shape), none.allocate(None, shape)
    assert everything == sieve.allocate(routing(shape), shape, fraction=1)
    assert everything.total_experts == shape.total_experts == 16
    assert nothing == ExpertSelection({})
    always = sum(m.lora_params(4) for m in shape.of_role("attention", "router", "shared_expert"))
    assert nothing.trainable_params(shape, rank=4) == always
