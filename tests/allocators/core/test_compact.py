"""Allocations in few bytes: the same allocation comes back, and no text asks for more than there can be."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocators.core.errors import ToolkitError
from allocators.core.types import (
    Allocation,
    ExpertCounts,
    ExpertSelection,
    ModuleRanks,
    Recipe,
    Trial,
    allocation_from_json,
    as_ranges,
    digest_of,
    of_ranges,
)

IDS = st.lists(st.integers(0, 70), unique=True, max_size=30).map(tuple)
SELECTIONS = st.dictionaries(st.integers(0, 60), IDS, max_size=8).map(ExpertSelection)
PATHS = st.one_of(
    st.builds("model.layers.{}.{}".format, st.integers(0, 60), st.sampled_from(["q_proj", "mlp.1.up_proj", "a.02.b"])),
    st.sampled_from(["lm_head", "a.*.b", "a.*.3.b", "*", "a.007.b", "7.a", "a.7", "a.123456789123.b"]),
)
COUNTS = st.builds(
    ExpertCounts, st.dictionaries(PATHS, st.integers(0, 9), max_size=30), st.sampled_from(["routed", "hydra"])
)
RANKS = st.builds(
    lambda plain, stacks: ModuleRanks(plain, {f"s.{path}": ranks for path, ranks in stacks.items()}),
    st.dictionaries(PATHS, st.integers(0, 9), max_size=20),
    st.dictionaries(PATHS, st.lists(st.sampled_from([0, 0, 4, 7]), max_size=9).map(tuple), max_size=20),
)
ALLOCATIONS = st.one_of(SELECTIONS, COUNTS, RANKS)


@given(ALLOCATIONS)
def test_an_allocation_comes_back_from_either_form_with_its_digest(allocation: Allocation) -> None:
    for form in (allocation.to_json(), allocation.to_compact()):
        again = allocation_from_json(json.loads(json.dumps(form)))
        assert again == allocation
        assert again.digest == allocation.digest == digest_of(allocation.to_json())


@given(st.sets(st.integers(0, 200), min_size=1))
def test_ranges_are_the_numbers(numbers: set[int]) -> None:
    assert of_ranges(as_ranges(numbers), "n", high=200) == tuple(sorted(numbers))


@given(ALLOCATIONS, st.integers(0, 9))
def test_a_trials_names_are_digests_of_all_that_it_is(allocation: Allocation, seed: int) -> None:
    trial = Trial(allocation, Recipe(rank=seed + 1), "m", "t", seed)
    whole = {"allocation": allocation.to_json(), "recipe": trial.recipe.to_json(), "model": "m", "task": "t"}
    assert trial.point == digest_of(whole)
    assert trial.digest == digest_of(whole | {"seed": seed})


def test_the_largest_models_take_few_bytes() -> None:
    draw = random.Random(0)
    everywhere = ExpertSelection({layer: tuple(range(256)) for layer in range(3, 61)})
    assert json.dumps(everywhere.to_compact()) == '{"kind": "expert_selection", "experts": {"3-60": "0-255"}}'
    quarter = ExpertSelection({layer: tuple(draw.sample(range(256), 64)) for layer in range(3, 61)})
    assert len(json.dumps(quarter.to_compact())) < 58 * 80
    layout = ExpertCounts({f"model.layers.{n}.mlp.up_proj": 2 + n // 8 for n in range(16)})
    assert layout.to_compact()["counts"] == {"model.layers.*.mlp.up_proj": {"0-7": 2, "8-15": 3}}


@pytest.mark.parametrize(
    "experts",
    [
        {"0-9999": "x" + "f" * 16_384},
        {"0-999999999": "0"},
        {"0": "0-999999999"},
        {"0": "5-2"},
        {"0": "1,1"},
        {"0-3": "1", "2": [1]},
        {"0": "x"},
        {"0": "x-1"},
        {"0": ""},
        {"-1": "1"},
        {"0": "x" + "f" * 100_000},
        {"0": 7},
    ],
)
def test_a_text_that_is_no_allocation_is_refused_at_once(experts: dict[str, Any]) -> None:
    with pytest.raises((ValueError, ToolkitError)):
        allocation_from_json({"kind": "expert_selection", "experts": experts})


@pytest.mark.parametrize("n", [{"0-99999": 1}, {"": 1}, {"0": "1"}, {"0": -1}, {"x": 1}, {"0": {"0": 1}}, "1", None])
def test_counts_that_are_none_are_refused(n: Any) -> None:
    with pytest.raises((ValueError, ToolkitError)):
        allocation_from_json({"kind": "expert_counts", "gating": "routed", "counts": {"a.*.b": n}})


@pytest.mark.parametrize("ranks", ["4*99999999", "4", "-1*2", "a*2", "", {"0-9": 7}, {"0-9999": "1*60000"}])
def test_ranks_that_are_none_are_refused(ranks: Any) -> None:
    with pytest.raises((ValueError, TypeError, ToolkitError)):
        allocation_from_json({"kind": "module_ranks", "ranks": {}, "experts": {"a.*.b": ranks}})
