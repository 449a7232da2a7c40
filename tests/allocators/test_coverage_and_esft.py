"""Coverage and ESFT: the fewest experts that hold a share of a layer's routing. Laws, then the published example."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocators import coverage, esft
from allocators.core.errors import InfeasibleError
from allocators.core.ranking import Score
from tests import GOLDEN
from tests.allocators.laws import Case, covered, inside, measured, permuted
from tests.allocators.models import moe_shape, routing

PUBLISHED = json.loads((GOLDEN / "allocation.json").read_text())["esft"]
scores = st.sampled_from(["count", "mass"])
shares = st.integers(1, 100).map(lambda percent: percent / 100)


@given(measured(), shares, scores)
def test_covers_the_share_with_the_fewest_experts(case: Case, share: float, score: Score) -> None:
    """Brute force: no smaller set of experts reaches the share."""
    signal, shape = case
    chosen = coverage.allocate(signal, shape, share=share, score=score)
    for layer in shape.moe_layers:
        values, size = signal.metric(layer, score), len(chosen.in_layer(layer))
        assert covered(signal, chosen, layer, score) >= share - 1e-9
        smaller = itertools.combinations(values, size - 1)
        assert all(sum(some) < share * sum(values) - 1e-9 for some in smaller)


@given(measured(), shares, shares, scores)
def test_more_coverage_keeps_the_choice_of_less(case: Case, a: float, b: float, score: Score) -> None:
    signal, shape = case
    small, large = (coverage.allocate(signal, shape, share=s, score=score) for s in sorted((a, b)))
    assert inside(small, large)


@given(measured(distinct=True), shares, st.data())
def test_names_of_experts_do_not_matter(case: Case, share: float, data: st.DataObject) -> None:
    signal, shape = case
    orders = {n: data.draw(st.permutations(range(shape.experts_in(n)))) for n in shape.moe_layers}
    chosen = coverage.allocate(signal, shape, share=share)
    renamed = coverage.allocate(permuted(signal, orders), shape, share=share)
    for layer in shape.moe_layers:
        assert renamed.in_layer(layer) == tuple(sorted(orders[layer][i] for i in chosen.in_layer(layer)))


@given(measured(), shares)
def test_esft_is_coverage_of_a_layers_shares(case: Case, p: float) -> None:
    """ESFT normalises over the experts of a layer, which leaves the order and the crossing where they are."""
    signal, shape = case
    assert esft.allocate(signal, shape, p=p) == coverage.allocate(signal, shape, share=p)
    assert esft.allocate(signal, shape, p=p, score="gate") == coverage.allocate(signal, shape, share=p, score="mass")


def test_esft_published_example() -> None:
    """Token scores of DeepSeek's ESFT-Token example, layer by layer; rows are rounded and sum to 1 ± 0.0006."""
    layers = {int(n): scores for n, scores in PUBLISHED["token_scores"].items()}
    shape = moe_shape(layers=14, experts=64, dense_first=1)
    chosen = esft.allocate(routing(shape, layers), shape, p=PUBLISHED["top_p"])
    for layer, ids in PUBLISHED["expected"].items():
        assert chosen.in_layer(int(layer)) == tuple(sorted(ids)), layer


def test_esft_by_hand() -> None:
    shape = moe_shape(layers=1, experts=5)
    case = PUBLISHED["synthetic"]
    chosen = esft.allocate(routing(shape, {0: case["scores"]}), shape, p=case["p"])
    assert chosen.in_layer(0) == tuple(sorted(case["selected"]))


def test_the_papers_p_unless_told() -> None:
    """Seven equal experts of 0.143 each: token's 0.2 needs two of them, gate's 0.1 one."""
    shape = moe_shape(layers=1, experts=7)
    signal = routing(shape, {0: [3] * 7})
    assert esft.allocate(signal, shape).in_layer(0) == (0, 1)
    assert esft.allocate(signal, shape, score="gate").in_layer(0) == (0,)


def test_the_expert_that_crosses_is_in_and_an_exact_hit_stops() -> None:
    shape = moe_shape(layers=1, experts=10)
    signal = routing(shape, {0: [1] * 10})
    assert coverage.allocate(signal, shape, share=0.3).in_layer(0) == (0, 1, 2)  # 0.1 + 0.1 + 0.1 is above 0.3
    assert coverage.allocate(signal, shape, share=0.31).in_layer(0) == (0, 1, 2, 3)
    assert coverage.allocate(signal, shape, share=1).in_layer(0) == tuple(range(10))
    assert esft.allocate(signal, shape, p=0.8).in_layer(0) == tuple(range(8))  # eight times 0.1 is 0.7999999999999999


def test_unused_experts_are_never_needed() -> None:
    shape = moe_shape(layers=1, experts=4)
    assert coverage.allocate(routing(shape, {0: [0, 5, 0, 3]}), shape, share=1.0).in_layer(0) == (1, 3)


@pytest.mark.parametrize("bad", [0, -0.1, 1.01, float("nan")])
def test_bad_shares(bad: float) -> None:
    shape = moe_shape()
    with pytest.raises(InfeasibleError, match="must be above 0 and at most 1"):
        coverage.allocate(routing(shape), shape, share=bad)
    with pytest.raises(InfeasibleError, match="must be above 0 and at most 1"):
        esft.allocate(routing(shape), shape, p=bad)


def test_bad_score() -> None:
    shape = moe_shape()
    with pytest.raises(InfeasibleError, match="score must be one of token, gate, got 'gates'; did you mean 'gate'"):
        esft.allocate(routing(shape), shape, score="gates")  # type: ignore[arg-type]  # refused
