"""Rounding: laws first, then the published numbers and cases to check by hand."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocators.core.apportion import ROUNDINGS, Rounding, apportion, floor_share, largest_remainder, paper_rounding
from allocators.core.errors import InfeasibleError, ToolkitWarning
from tests import GOLDEN

PUBLISHED = json.loads((GOLDEN / "allocation.json").read_text())

weights_ = st.lists(st.integers(1, 10**6), min_size=1, max_size=24)
floats_ = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=24)


@given(floats_, st.integers(0, 300), st.integers(0, 3), st.sampled_from(ROUNDINGS))
def test_sums_to_the_total_and_keeps_the_floor(
    weights: Sequence[float], extra: int, floor: int, rounding: Rounding
) -> None:
    total = floor * len(weights) + extra
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ToolkitWarning)
        counts = apportion(weights, total, rounding=rounding, min_experts=floor)
    assert sum(counts) == total
    assert min(counts) >= floor


@given(floats_, st.integers(0, 300), st.integers(0, 3))
def test_heavier_never_gets_less(weights: Sequence[float], extra: int, floor: int) -> None:
    counts = largest_remainder(weights, floor * len(weights) + extra, minimum=floor)
    ordered = [n for _, n in sorted(zip(weights, counts, strict=True))]
    assert ordered == sorted(ordered)


@given(weights_, st.integers(0, 300), st.integers(2, 10**6))
def test_scale_changes_nothing(weights: list[int], total: int, factor: int) -> None:
    assert largest_remainder([w * factor for w in weights], total) == largest_remainder(weights, total)


@given(weights_, st.integers(0, 300))
def test_without_bounds_every_count_is_within_one_of_its_share(weights: Sequence[float], total: int) -> None:
    for w, n in zip(weights, largest_remainder(weights, total), strict=True):
        assert abs(n - w * total / sum(weights)) < 1


@given(weights_, st.integers(0, 4), st.integers(0, 8), st.data())
def test_bounds_hold_and_clamped_shares_are_proportional(
    weights: Sequence[float], low: int, width: int, data: st.DataObject
) -> None:
    high = low + width
    total = data.draw(st.integers(low * len(weights), high * len(weights)))
    counts = largest_remainder(weights, total, minimum=low, maximum=high)
    assert sum(counts) == total
    assert all(low <= n <= high for n in counts)
    free = [(w, n) for w, n in zip(weights, counts, strict=True) if low + 1 < n < high - 1]
    for w, n in free:  # away from the bounds the ratio of counts is the ratio of weights, up to rounding by one
        for v, m in free:
            assert (n - 1) * v <= (m + 1) * w


@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.integers(0, 12))
def test_largest_remainder_is_the_nearest_composition(weights: Sequence[float], total: int) -> None:
    """Brute force: no composition of the total has a smaller sum of squared distances to the exact shares."""

    def compositions(parts: int, rest: int) -> Iterator[tuple[int, ...]]:
        if parts == 1:
            yield (rest,)
        else:
            for first in range(rest + 1):
                yield from ((first, *tail) for tail in compositions(parts - 1, rest - first))

    def distance(counts: Sequence[int]) -> float:
        return sum((n * sum(weights) - w * total) ** 2 for w, n in zip(weights, counts, strict=True))

    best = min(distance(c) for c in compositions(len(weights), total))
    assert distance(largest_remainder(weights, total)) == best


@pytest.mark.parametrize("case", PUBLISHED["mapping"], ids=lambda c: f"{c['v']}-{c['T']}")
def test_golden_mapping(case: dict[str, Any]) -> None:
    weights = [v ** case["beta"] for v in case["v"]]
    assert paper_rounding(weights, case["T"]) == tuple(case["paper_and_code"])
    assert largest_remainder(weights, case["T"]) == tuple(case["largest_remainder"])


def test_golden_mistral_7b() -> None:
    case = PUBLISHED["mistral_7b"]
    weights = [v ** case["beta"] for v in case["v"]]
    assert apportion(weights, case["T"], rounding="paper", min_experts=0) == tuple(case["expected"])


def test_equation_7_runs_away_and_says_so() -> None:
    """Six layers at 1.6 of eight experts: eq. 6 gives 1 each, eq. 7 gives all the rest to the first."""
    weights = [100, 101, 102, 103, 104, 105]
    with pytest.warns(ToolkitWarning, match="layer 0 from 1 to 3"):
        assert apportion(weights, 8, rounding="paper") == (3, 1, 1, 1, 1, 1)
    assert apportion(weights, 8, rounding="largest_remainder") == (1, 1, 1, 1, 2, 2)


def test_equation_7_takes_nothing_below_the_floor() -> None:
    """Five layers at 1.6 of eight: eq. 6 gives 2 each, and two must go. Ties: the first gives, then gives again."""
    with pytest.warns(ToolkitWarning, match="layer 0 from 2 to 0"):
        assert apportion([1, 1, 1, 1, 1], 8, min_experts=0) == (0, 2, 2, 2, 2)
    assert apportion([1, 1, 1, 1, 1], 8, min_experts=1) == (1, 1, 2, 2, 2)


@pytest.mark.parametrize(
    ("weights", "total", "options", "message"),
    [
        ([1, 1, 1], 2, {}, "at least 3"),
        ([0, 0], 4, {}, "positive"),
        ([], 4, {}, "positive"),
        ([1, float("nan")], 4, {}, "nan at position 1"),
        ([1, -2.0], 4, {}, "-2.0 at position 1"),
        ([1, 2], 4, {"rounding": "papre"}, "did you mean 'paper'"),
        ([1, 2], 4, {"min_experts": -1}, "negative"),
    ],
)
def test_bad_input_is_one_clear_line(
    weights: Sequence[float], total: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InfeasibleError, match=message) as error:
        apportion(weights, total, **options)
    assert "\n" not in str(error.value)


def test_maximum_out_of_reach() -> None:
    with pytest.raises(InfeasibleError, match="at most 6"):
        largest_remainder([1, 2], 7, maximum=3)
    with pytest.raises(InfeasibleError, match="1 of 2 weights are zero"):
        largest_remainder([1, 0], 5, maximum=3)


def test_shares_mean_what_is_written() -> None:
    assert int(0.29 * 100) == 28  # what binary floats say
    assert floor_share(0.29, 100) == 29
    assert floor_share(0.25, 3) == 0


@given(st.integers(1, 512), st.data())
def test_every_whole_share_is_reached(size: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, size))
    assert floor_share(kept / size, size) == kept
    assert floor_share((kept + 0.999) / size, size) == kept
