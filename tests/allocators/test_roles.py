"""Roles of an MoE model as knobs of every rule: what is adapted, with which ranks, counted by hand."""

from __future__ import annotations

from typing import Any

import pytest

from allocators import _roles, sieve, uniform_ranks
from allocators.core import plugins
from allocators.core.errors import InfeasibleError, StudyError
from allocators.core.shapes import shape_from_config
from allocators.core.types import Allocation, ExpertSelection, ModelShape, ModuleRanks
from search.config import parse
from search.problem import corners, placeholder
from search.session.prepare import prepare_training
from tests.allocators.models import dense_shape, routing

QWEN = {
    "model_type": "qwen2_moe",
    "hidden_size": 16,
    "intermediate_size": 32,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
SHAPE = shape_from_config(QWEN, name="tiny qwen2_moe")
LAYERS = 2
# r(in + out) of rank one, a layer: by hand from the sizes above
ATTENTION, ROUTER, SHARED, GATE, EXPERT = 4 * 32, 16 + 8, 3 * (16 + 24), 16 + 1, 3 * (16 + 8)


def asked(module: Any = sieve, shape: ModelShape = SHAPE, *, rank: int = 4, **knobs: Any) -> Allocation:
    signal = None if module.NEEDS is None else routing(shape)
    return _roles.call(module, signal, shape, knobs, rank=rank)


def test_the_defaults_leave_a_selection_as_it_is() -> None:
    plain = plugins.call(sieve, routing(SHAPE), SHAPE, {"fraction": 0.25})
    sames: list[dict[str, Any]] = [
        {},
        {"roles": "default"},
        {"expert_rank": "r"},
        {"roles": "experts+shared+router+attention"},
    ]
    for knobs in sames:
        same = asked(fraction=0.25, **knobs)
        assert isinstance(same, ExpertSelection)
        assert same.digest == plain.digest
    always = LAYERS * (ATTENTION + ROUTER + SHARED)
    assert plain.trainable_params(SHAPE, rank=4) == 4 * (always + LAYERS * 2 * EXPERT), "the gate is never counted"


@pytest.mark.parametrize(
    ("roles", "expert_rank", "a_layer"),
    [
        ("all", "r", 4 * (ATTENTION + ROUTER + SHARED) + GATE + 4 * 2 * EXPERT),
        ("experts", "r", 4 * 2 * EXPERT),
        ("attention+experts", "r", 4 * (ATTENTION + 2 * EXPERT)),
        ("router", "r", 4 * ROUTER),
        ("gate", "r", GATE),
        ("shared+gate", "r", 4 * SHARED + GATE),
        ("default", "r/k", 4 * (ATTENTION + ROUTER + SHARED) + 2 * 2 * EXPERT),
        ("experts", "r/E", 1 * 2 * EXPERT),
    ],
)
def test_every_role_costs_what_it_has(roles: str, expert_rank: str, a_layer: int) -> None:
    allocation = asked(fraction=0.25, roles=roles, expert_rank=expert_rank)
    assert isinstance(allocation, ModuleRanks)
    assert allocation.trainable_params(SHAPE) == LAYERS * a_layer
    if "experts" in roles:
        assert allocation.selection(SHAPE) == plugins.call(sieve, routing(SHAPE), SHAPE, {"fraction": 0.25})


@pytest.mark.parametrize("rank", [3, 4, 16])
def test_rules_for_ranks_spend_the_budget_of_the_roles(rank: int) -> None:
    def uniform(**knobs: Any) -> int:
        return asked(uniform_ranks, rank=rank, **knobs).trainable_params(SHAPE, rank=rank)

    def capped(cost: int, full: int, r: int = rank) -> int:
        return cost * min(r, full)

    experts = 8 * capped(EXPERT, 8)
    assert uniform(roles="default") == LAYERS * (capped(ATTENTION, 16) + capped(SHARED, 16) + experts)
    assert uniform(roles="experts+router") == LAYERS * (experts + rank * ROUTER)
    assert uniform(roles="attention", expert_rank="r/k") == LAYERS * capped(ATTENTION, 16)
    assert uniform(roles="experts", expert_rank="r/k") == LAYERS * 8 * EXPERT * max(1, rank // 2)
    random_ranks = plugins.load("allocators", "random_ranks")
    parts: dict[str, Any] = {"roles": "attention+experts", "expert_rank": "r/k"}
    drawn = asked(random_ranks, rank=rank, **parts).trainable_params(SHAPE, rank=rank)
    assert 0.98 * uniform(**parts) < drawn <= uniform(**parts)


def test_k_comes_from_the_config_and_where_it_is_not_known_that_is_said() -> None:
    assert SHAPE.active_experts == 2
    assert ModelShape.from_json(SHAPE.to_json()) == SHAPE
    assert shape_from_config({**QWEN, "num_experts_per_tok": None}, name="x").active_experts == 0
    assert shape_from_config({k: v for k, v in QWEN.items() if "per_tok" not in k}, name="x").active_experts == 4
    older = {key: value for key, value in SHAPE.to_json().items() if key != "active_experts"}
    with pytest.raises(InfeasibleError, match=r"does not say how many experts are active: use r/E or r"):
        asked(shape=ModelShape.from_json(older), fraction=0.25, expert_rank="r/k")


def test_a_wrong_word_is_named() -> None:
    with pytest.raises(StudyError, match=r"unknown role 'routers'.*did you mean 'router'"):
        asked(roles="attention+routers")
    with pytest.raises(StudyError, match="r/j"):
        asked(expert_rank="r/j")
    with pytest.raises(StudyError, match=r"roles is a knob of MoE models, and dense is dense"):
        asked(uniform_ranks, dense_shape(), roles="attention")


@pytest.mark.parametrize("space", ["sieve", "ranks"])
def test_a_space_has_the_knobs_only_where_they_are_asked_for(space: str) -> None:
    plain = prepare_training(parse([f"space={space}", "model=tiny-moe"]))
    assert not {"roles", "expert_rank"} & {name for _, params in corners(plain) for name in params}
    one = prepare_training(parse([f"space={space}", "model=tiny-moe", "space.roles=attention+experts"]))
    assert {point.knobs["roles"] for point, _ in corners(one)} == {"attention+experts"}
    assert one.pins["roles"] == "attention+experts"
    free = prepare_training(parse([f"space={space}", "model=tiny-moe", "space.roles=any", "space.expert_rank=any"]))
    assert {params["roles"] for _, params in corners(free)} > {"default", "experts"}
    assert {params["expert_rank"] for _, params in corners(free)} == {"r", "r/k", "r/E"}
    assert free.pins == {"roles": "any", "expert_rank": "any"}
    assert free.free == {"roles": "default", "expert_rank": "r"}, "starting points are what they were"
    with pytest.raises(StudyError, match=r"value of space\.roles 'atention'.*did you mean 'attention'"):
        prepare_training(parse([f"space={space}", "model=tiny-moe", "space.roles=atention"]))


def test_a_placeholder_has_every_row_that_a_rule_may_read() -> None:
    signal = placeholder("routing", SHAPE)
    assert isinstance(_roles.call(sieve, signal, SHAPE, {"roles": "all"}, rank=2), ModuleRanks)
