"""Greedy: one budget over all layers, never covering less than sieve does with it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocators import greedy, sieve
from allocators.core.errors import InfeasibleError
from allocators.core.ranking import Score
from allocators.core.types import ExpertSelection, ModelShape, Signal
from tests.allocators.laws import Case, covered, inside, measured
from tests.allocators.models import moe_shape, routing

scores = st.sampled_from(["count", "mass"])


def whole_coverage(signal: Signal, shape: ModelShape, selection: ExpertSelection, score: Score = "count") -> float:
    return sum(covered(signal, selection, layer, score) for layer in shape.moe_layers)


@given(measured(), st.floats(0.5, 1), scores)
def test_covers_at_least_what_sieve_covers_with_the_same_budget(case: Case, fraction: float, score: Score) -> None:
    signal, shape = case
    ours = greedy.allocate(signal, shape, fraction=fraction, score=score)
    theirs = sieve.allocate(signal, shape, fraction=fraction, score=score)
    assert ours.total_experts == theirs.total_experts
    assert whole_coverage(signal, shape, ours, score) >= whole_coverage(signal, shape, theirs, score) - 1e-12


@given(st.data())
def test_no_selection_of_that_size_covers_more(data: st.DataObject) -> None:
    """Brute force over every set of experts of a small model."""
    shape = moe_shape(layers=2, experts=4)
    counts = {n: data.draw(st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(any)) for n in (0, 1)}
    signal = routing(shape, counts)
    total = data.draw(st.integers(1, 8))
    everyone = [(layer, expert) for layer in (0, 1) for expert in range(4)]
    best = max(
        whole_coverage(signal, shape, ExpertSelection({n: tuple(e for at, e in some if at == n) for n in (0, 1)}))
        for some in itertools.combinations(everyone, total)
    )
    chosen = greedy.allocate(signal, shape, total_experts=total)
    assert chosen.total_experts == total
    assert whole_coverage(signal, shape, chosen) == pytest.approx(best)


@given(measured(), st.data())
def test_a_larger_budget_keeps_the_choice_of_a_smaller(case: Case, data: st.DataObject) -> None:
    signal, shape = case
    a, b = sorted(data.draw(st.integers(1, shape.total_experts)) for _ in range(2))
    assert inside(greedy.allocate(signal, shape, total_experts=a), greedy.allocate(signal, shape, total_experts=b))


def test_by_hand() -> None:
    """Shares .7 .2 .1 and .4 .3 .3: three experts are 0 of the first layer and 0, 1 of the second."""
    shape = moe_shape(layers=2, experts=3)
    signal = routing(shape, {0: [7, 2, 1], 1: [40, 30, 30]})
    assert greedy.allocate(signal, shape, total_experts=3) == ExpertSelection({0: (0,), 1: (0, 1)})
    assert greedy.allocate(signal, shape, total_experts=1) == ExpertSelection({0: (0,)})  # the other layer stays empty


def test_a_quarter_of_all_unless_told() -> None:
    shape = moe_shape(layers=3, experts=8)
    assert greedy.allocate(routing(shape), shape).total_experts == 6


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"total_experts": 0}, r"total_experts must be 1..24 for moe, got 0"),
        ({"total_experts": 25}, r"total_experts must be 1..24"),
        ({"total_experts": 4, "fraction": 0.5}, "give fraction or total_experts, got both"),
        ({"fraction": 0.1}, "is no expert: raise fraction"),
    ],
)
def test_bad_knobs(knobs: dict[str, Any], message: str) -> None:
    shape = moe_shape(layers=3, experts=8)
    with pytest.raises(InfeasibleError, match=message):
        greedy.allocate(routing(shape), shape, **knobs)
