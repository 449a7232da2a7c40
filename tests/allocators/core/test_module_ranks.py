"""Ranks by module as a value: equality, JSON, digest, validation, counting; and a budget of parameters as ranks."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocators.core.apportion import ranks_for
from allocators.core.errors import InfeasibleError, StudyError
from allocators.core.types import ModuleRanks, Recipe, Trial, allocation_from_json
from tests.allocators.models import dense_shape, moe_shape

MOE = moe_shape(layers=2, experts=3, hidden=8, width=4)
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.experts.up_proj"

ranks_ = st.dictionaries(st.sampled_from([m.path for m in MOE.modules if not m.num_experts]), st.integers(0, 9))
stacks_ = st.dictionaries(
    st.sampled_from([m.path for m in MOE.modules if m.num_experts]), st.tuples(*[st.integers(0, 9)] * 3)
)


@given(ranks_, stacks_)
def test_what_is_written_is_read_and_zeros_say_nothing(
    ranks: dict[str, int], stacks: dict[str, tuple[int, ...]]
) -> None:
    allocation = ModuleRanks(ranks, stacks)
    assert allocation_from_json(json.loads(json.dumps(allocation.to_json()))) == allocation
    assert pickle.loads(pickle.dumps(allocation)) == allocation
    bare = ModuleRanks({p: r for p, r in ranks.items() if r}, {p: r for p, r in stacks.items() if any(r)})
    assert (bare, bare.digest, hash(bare)) == (allocation, allocation.digest, hash(allocation))
    backwards = ModuleRanks(dict(reversed(ranks.items())), dict(reversed(stacks.items())))
    assert backwards.digest == allocation.digest
    allocation.check(MOE)
    assert allocation.total_rank == sum(sum(allocation.of(m)) for m in MOE.modules)
    assert allocation.trainable_params(MOE) == sum(m.lora_params(r) for m in MOE.modules for r in allocation.of(m))


def test_by_hand() -> None:
    allocation = ModuleRanks({Q: 2}, {UP: (0, 3, 1)})
    assert allocation.trainable_params(MOE, rank=64) == 2 * (8 + 8) + (3 + 1) * (8 + 4)
    assert (allocation.total_rank, allocation.total_experts) == (6, 2)
    assert allocation != ModuleRanks({Q: 2}, {UP: (0, 1, 3)})
    assert allocation != {"kind": "module_ranks"}
    assert json.dumps(allocation.to_json()) == json.dumps(
        {"kind": "module_ranks", "ranks": {Q: 2}, "experts": {UP: [0, 3, 1]}}
    )


def test_the_scale_is_the_recipes_and_two_recipes_of_one_scale_are_two_trials() -> None:
    one, other = (Trial(ModuleRanks({Q: 2}), Recipe(rank=r, lora_alpha=a), "m", "t", 0) for r, a in ((4, 8), (8, 16)))
    assert one.recipe.lora.scale == other.recipe.lora.scale == 2.0
    assert one.digest != other.digest
    assert Trial.from_json(json.loads(json.dumps(one.to_json()))) == one


@pytest.mark.parametrize("rank", [-1, 2.5, 2.0, True, None, "3", float("nan"), 1 << 17])
def test_a_rank_is_a_whole_number(rank: Any) -> None:
    for build in (lambda: ModuleRanks({Q: rank}), lambda: ModuleRanks({}, {UP: (1, rank, 1)})):
        with pytest.raises(InfeasibleError, match=f"the rank of .* must be a whole number from 0 to {1 << 16}, got"):
            build()


def test_a_numpy_whole_number_is_one() -> None:
    import numpy as np

    assert ModuleRanks({Q: np.int64(3)}) == ModuleRanks({Q: 3})  # type: ignore[dict-item]
    assert json.dumps(ModuleRanks({Q: np.int64(3)}).to_json())  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "data",
    [
        {"kind": "module_ranks", "ranks": {Q: 1.5}, "experts": {}},
        {"kind": "module_ranks", "ranks": {Q: True}, "experts": {}},
        {"kind": "module_ranks", "ranks": {Q: -1}, "experts": {}},
        {"kind": "module_ranks", "ranks": [1], "experts": {}},
        {"kind": "module_ranks", "ranks": {}, "experts": {UP: 3}},
        {"kind": "module_ranks", "ranks": {}, "experts": {UP: [1, "2"]}},
        {"kind": "module_ranks", "ranks": {UP: 1}, "experts": {UP: [1]}},
        {"kind": "module_ranks", "ranks": {}},
    ],
)
def test_a_file_that_holds_no_ranks_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises((ValueError, KeyError, InfeasibleError)):
        allocation_from_json(data)


def test_an_unknown_kind_names_the_three() -> None:
    with pytest.raises(StudyError, match="possible are expert_selection, expert_counts, module_ranks"):
        allocation_from_json({"kind": "ranks"})


# --- parameters as ranks


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=20),
    st.integers(0, 3),
    st.floats(0, 1),
)
def test_a_budget_is_spent_and_never_overdrawn(modules: list[tuple[float, int, int]], least: int, share: float) -> None:
    weights, costs, most = zip(*modules, strict=True)
    if not any(weights):
        return
    low = [min(least, m) for m in most]
    floor, full = (sum(c * r for c, r in zip(costs, of, strict=True)) for of in (low, most))
    budget = floor + int(share * (full - floor))
    ranks = ranks_for(weights, costs, budget, maximum=most, minimum=low)
    spent = sum(c * r for c, r in zip(costs, ranks, strict=True))
    assert all(a <= r <= b for a, r, b in zip(low, ranks, most, strict=True))
    room = [c for c, r, m, w in zip(costs, ranks, most, weights, strict=True) if r < m and w]
    assert budget - spent >= 0
    assert not room or budget - spent < min(room) or budget - spent < max(costs)
    assert ranks_for([4 * w for w in weights], costs, budget, maximum=most, minimum=low) == ranks


def test_modules_without_weight_take_what_the_others_cannot() -> None:
    assert ranks_for([1.0, 0, 0], [4, 4, 4], 48, maximum=[8, 8, 8]) == (8, 2, 2)
    assert ranks_for([1.0, 0, 0], [4, 4, 4], 30, maximum=[8, 8, 8]) == (7, 0, 0)  # the rest of 2 is nobody's


def test_what_cannot_be_spent_is_said() -> None:
    with pytest.raises(InfeasibleError, match="15 parameters are below the 16 of the least rank"):
        ranks_for([1, 1], [8, 8], 15, maximum=[4, 4], minimum=[1, 1])
    with pytest.raises(InfeasibleError, match="weights must be finite and not negative"):
        ranks_for([1, -1], [8, 8], 32, maximum=[4, 4])
    with pytest.raises(InfeasibleError, match="at least one weight must be positive"):
        ranks_for([0, 0], [8, 8], 32, maximum=[4, 4])


def test_equal_weights_are_the_uniform_rank_whatever_the_sizes() -> None:
    costs = [m.in_features + m.out_features for m in dense_shape().modules]
    assert set(ranks_for([1.0] * len(costs), costs, 5 * sum(costs), maximum=[64] * len(costs))) == {5}
