"""Sieve: laws, golden selections, messages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocators import sieve
from allocators.core.errors import InfeasibleError, StudyError
from allocators.core.ranking import Score
from tests import GOLDEN
from tests.allocators.laws import Case, inside, measured, permuted
from tests.allocators.models import moe_shape, routing

PUBLISHED = json.loads((GOLDEN / "allocation.json").read_text())["moe_sieve"]
scores = st.sampled_from(["count", "mass"])


@given(measured(), st.integers(1, 9), scores)
def test_keeps_that_many_and_none_better_is_left_out(case: Case, kept: int, score: Score) -> None:
    signal, shape = case
    kept = min(kept, shape.experts_in(shape.moe_layers[0]))
    chosen = sieve.allocate(signal, shape, experts_kept=kept, score=score)
    for layer in shape.moe_layers:
        values, ids = signal.metric(layer, score), chosen.in_layer(layer)
        assert len(ids) == kept
        left = set(range(len(values))) - set(ids)
        for i in ids:  # nobody left out is better, or as good with a lower id
            assert all((-values[i], i) < (-values[j], j) for j in left)


@given(measured(), st.floats(0.5, 1), st.floats(0.5, 1), scores)
def test_a_larger_fraction_keeps_the_smaller_ones_choice(case: Case, a: float, b: float, score: Score) -> None:
    signal, shape = case
    small, large = (sieve.allocate(signal, shape, fraction=f, score=score) for f in sorted((a, b)))
    assert inside(small, large)


@given(measured(distinct=True), st.integers(1, 2), st.data())
def test_names_of_experts_do_not_matter(case: Case, kept: int, data: st.DataObject) -> None:
    signal, shape = case
    orders = {n: data.draw(st.permutations(range(shape.experts_in(n)))) for n in shape.moe_layers}
    chosen = sieve.allocate(signal, shape, experts_kept=kept)
    renamed = sieve.allocate(permuted(signal, orders), shape, experts_kept=kept)
    for layer in shape.moe_layers:
        assert renamed.in_layer(layer) == tuple(sorted(orders[layer][i] for i in chosen.in_layer(layer)))


@given(measured(), st.integers(2, 100))
def test_more_tokens_in_the_same_proportions_change_nothing(case: Case, factor: int) -> None:
    signal, shape = case
    scaled = {n: [factor * c for c in signal.metric(n, "count")] for n in shape.moe_layers}
    assert sieve.allocate(routing(shape, scaled), shape, experts_kept=1) == sieve.allocate(
        signal, shape, experts_kept=1
    )


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda c: f"{c['counts']}-{c['fraction']}")
def test_golden(case: dict[str, Any]) -> None:
    shape = moe_shape(layers=1, experts=len(case["counts"]))
    signal = routing(shape, {0: case["counts"]})
    if isinstance(case["selected"], str):
        with pytest.raises(
            InfeasibleError, match=r"fraction 0.25 of the 3 experts .* raise fraction to at least 0.3333"
        ):
            sieve.allocate(signal, shape, fraction=case["fraction"])
    else:
        assert list(sieve.allocate(signal, shape, fraction=case["fraction"]).in_layer(0)) == case["selected"]


def test_by_hand() -> None:
    """Six experts: half of them by tokens are 1, 4, 5; by gate weight 0, 1, 4."""
    shape = moe_shape(layers=1, experts=6)
    signal = routing(shape, {0: [1, 9, 2, 2, 5, 6]}, {0: [4, 4, 0.5, 0.5, 4, 1]})
    assert sieve.allocate(signal, shape, fraction=0.5).in_layer(0) == (1, 4, 5)
    assert sieve.allocate(signal, shape, fraction=0.5, score="mass").in_layer(0) == (0, 1, 4)
    assert sieve.allocate(signal, shape, experts_kept=3) == sieve.allocate(signal, shape, fraction=0.5)


def test_a_quarter_unless_told() -> None:
    shape = moe_shape(experts=8)
    signal = routing(shape)
    assert sieve.allocate(signal, shape) == sieve.allocate(signal, shape, fraction=0.25)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"fraction": 0.0}, "fraction must be above 0 and at most 1, got 0.0"),
        ({"fraction": 1.5}, "at most 1, got 1.5"),
        ({"fraction": 0.1}, r"no expert: raise fraction to at least 0.125 \(1/8\), or set experts_kept=1"),
        ({"experts_kept": 0}, r"experts_kept must be 1..8 in layer 0"),
        ({"experts_kept": 9}, r"experts_kept must be 1..8 in layer 0"),
        ({"fraction": 0.5, "experts_kept": 2}, "give fraction or experts_kept, got both"),
        ({"score": "counts"}, "score must be one of count, mass, reap, ean, got 'counts'; did you mean 'count'"),
    ],
)
def test_bad_knobs(knobs: dict[str, Any], message: str) -> None:
    shape = moe_shape(experts=8)
    with pytest.raises(InfeasibleError, match=message):
        sieve.allocate(routing(shape), shape, **knobs)


def test_a_routing_of_another_model_is_refused() -> None:
    with pytest.raises(StudyError, match="measured on another model"):
        sieve.allocate(routing(moe_shape(experts=4)), moe_shape(experts=8))
    with pytest.raises(StudyError, match="no 'count' for '2'"):
        sieve.allocate(routing(moe_shape(layers=2)), moe_shape(layers=3))


@pytest.mark.parametrize("counts", [[0, 0, 0, 0], [1, float("nan"), 1, 1], [1, -1, 1, 1]])
def test_a_useless_routing_is_refused(counts: Sequence[float]) -> None:
    shape = moe_shape(layers=1, experts=4)
    with pytest.raises(StudyError, match="routing signal of layer 0 holds no usable count"):
        sieve.allocate(routing(shape, {0: counts}, {0: [1, 1, 1, 1]}), shape)
