"""Proposing points: repeats and impossible points never reach a worker, and the sampler hears of all of them."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import spaces.sieve
import spaces.sieve_ablation
from allocators.core.errors import StudyError
from allocators.core.types import ModelShape, ModuleShape, Outcome, Rung, Signal, Status
from search.points.starting import UPDATES, starting_points
from search.problem import Problem, Proposal, cheapest, check_budget, check_pins, corners, placeholder
from search.propose import RUN, STDERR
from search.propose.sampler import Answered, Proposer
from tests.search.propose.proposals import next_proposal, recalled


def moe_shape(layers: int = 3, experts: int = 16, hidden: int = 8) -> ModelShape:
    modules = []
    for layer in range(layers):
        at = f"model.layers.{layer}"
        modules.append(ModuleShape(f"{at}.self_attn.q_proj", layer, hidden, hidden, role="attention"))
        modules.append(ModuleShape(f"{at}.mlp.gate", layer, hidden, experts, role="router"))
        modules.append(ModuleShape(f"{at}.mlp.experts.up_proj", layer, hidden, 4, experts, "expert"))
    return ModelShape("small", tuple(modules), layers)


def routing(shape: ModelShape) -> Signal:
    rows = {
        str(layer): {
            "count": tuple(float(1 + (e * 7 + layer) % 16) for e in range(shape.experts_in(layer))),
            "mass": tuple(float(1 + (e * 5 + layer) % 16) for e in range(shape.experts_in(layer))),
        }
        for layer in shape.moe_layers
    }
    return Signal("routing", rows, axis="expert", unit="tokens", provenance={})


def problem(**changes: Any) -> Problem:
    shape = moe_shape()
    made = Problem(space=spaces.sieve, shape=shape, model="small", task="t", signals={"routing": routing(shape)})
    return replace(made, **changes)


def result(proposal: Proposal, accuracy: float | None = 0.5) -> Outcome:
    status: Status = "complete" if accuracy is not None else "diverged"
    return Outcome(proposal.trial, status, proposal.trainable_params, accuracy=accuracy)


def test_starting_points_come_first_with_the_studys_recipe() -> None:
    proposer = Proposer(problem(task_recipe={"rank": 12, "learning_rate": 2e-3}))
    first = [next_proposal(proposer) for _ in range(4)]
    assert [p.trial.allocator for p in first] == ["none", "all", "random", "sieve"]
    assert {p.trial.recipe.rank for p in first} == {12}
    assert {p.trial.recipe.learning_rate for p in first} == {2e-3}
    assert [p.trial.allocation.total_experts for p in first] == [0, 48, 12, 12]


def test_the_first_points_of_a_search_have_about_the_recipe_of_the_starting_points() -> None:
    proposer = Proposer(problem(task_recipe={"lora_alpha": 32.0, "learning_rate": 2e-3}))
    proposals = [next_proposal(proposer) for _ in range(12)]  # all at once: no result says anything
    recipes = [p.trial.recipe for p in proposals]
    assert {recipe.scaled_rate for recipe in recipes[:4]} == {0.064}
    assert all(0.064 / 4 < recipe.scaled_rate < 0.064 * 4 for recipe in recipes[5:])  # the fifth is the paper's
    assert all(32 / 4 < recipe.lora_alpha < 32 * 4 for recipe in recipes[5:])


@pytest.mark.parametrize("value", ["x", None, 0, -3.0, math.nan, math.inf, [1]])
@pytest.mark.parametrize("name", UPDATES)
def test_a_starting_point_that_no_recipe_can_have_is_one_line(name: str, value: Any) -> None:
    space = ModuleType("user_plugins.odd")
    vars(space).update(vars(spaces.sieve), __name__="user_plugins.odd")
    space.starting_points = lambda shape: [{"allocator": "none", name: value}]  # type: ignore[attr-defined]
    with pytest.raises(StudyError, match="starting point 1 of space=odd is none of its points: ") as raised:
        Proposer(problem(space=space))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("wrong", [{"allocator": "nobody"}, {"allocator": "none", "rank": "x"}])
def test_a_starting_point_that_the_space_cannot_have_is_one_line(wrong: dict[str, Any]) -> None:
    space = ModuleType("user_plugins.odd")
    vars(space).update(vars(spaces.sieve), __name__="user_plugins.odd")
    space.starting_points = lambda shape: [wrong]  # type: ignore[attr-defined]
    with pytest.raises(StudyError, match="starting point 1 of space=odd is none of its points: ") as raised:
        Proposer(problem(space=space))
    assert "\n" not in str(raised.value)


def test_a_table_space_may_have_no_starting_points() -> None:
    assert starting_points(problem(space=spaces.sieve_ablation)) == []


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["tpe", "nsga2", "random"]))
def test_no_digest_is_proposed_twice_and_costs_are_exact(seed: int, sampler: str) -> None:
    asked = problem(seed=seed, pins={"rank": 8, "lora_alpha": 16, "scaled_rate": 0.016})
    proposer, seen = Proposer(asked, sampler=sampler), set()
    answered: list[Answered] = []
    proposer._answered = answered.append
    for number in range(40):
        proposal = proposer.propose()
        assert proposal is not None
        assert proposal.trial.digest not in seen
        seen.add(proposal.trial.digest)
        assert proposal.trainable_params == proposal.trial.allocation.trainable_params(asked.shape, rank=8)
        proposer.tell(result(proposal, accuracy=number / 40))
    assert all(point.reason == "duplicate" and point.digest in seen for point in answered)


def test_optunas_gaussian_process_is_driven_like_the_others() -> None:
    proposer, digests = Proposer(problem(), sampler="gp"), set()
    for number in range(13):  # after ten results it has a model
        proposal = next_proposal(proposer)
        digests.add(proposal.trial.digest)
        proposer.tell(result(proposal, accuracy=None if number == 6 else 0.3 + 0.01 * number))
    assert len(digests) == 13


def test_with_repeats_a_point_that_is_proposed_again_is_trained_with_its_next_seed() -> None:
    pins = {"allocator": "all", "rank": 8, "lora_alpha": 16, "scaled_rate": 0.016}
    answered: list[Answered] = []
    proposer = Proposer(problem(pins=pins, seed=3), sampler="tpe", repeats=True, answered=answered.append)
    proposals = [next_proposal(proposer) for _ in range(3)]
    assert [proposal.trial.seed for proposal in proposals] == [3, 4, 5]
    assert len({proposal.trial.point for proposal in proposals}) == 1
    proposer.tell(result(proposals[1], 0.5))
    known = [(result(proposal, 0.5), proposal.params) for proposal in proposals[:2]]
    later = Proposer(problem(pins=pins, seed=3), sampler="tpe", repeats=True)
    recalled(later, known)
    later.recall(proposals[2].trial, proposals[2].params)
    assert [next_proposal(later).trial.seed for _ in range(2)] == [6, 7]


def test_the_sampler_hears_how_large_the_error_of_the_questions_is() -> None:
    proposer = Proposer(problem())
    proposal = next_proposal(proposer)
    rung = Rung(10, 100, 0.5, stderr=0.03)
    proposer.tell(result(proposal).updated(rungs=(rung,)))
    (trial,) = proposer._study.get_trials()
    assert trial.user_attrs == {RUN: proposal.trial.digest, STDERR: 0.03}


def test_a_space_with_one_point_is_used_up_after_it() -> None:
    pins = {"allocator": "all", "rank": 8, "lora_alpha": 16, "scaled_rate": 0.016}
    answered: list[Answered] = []
    proposer = Proposer(problem(pins=pins), answered=answered.append)
    assert next_proposal(proposer).trial.allocator == "all"
    assert proposer.propose() is None
    assert {point.reason for point in answered} == {"duplicate"}


def test_points_over_the_budget_are_answered_and_the_rest_fit() -> None:
    limit = 1000
    answered: list[Answered] = []
    proposer = Proposer(problem(max_trainable_params=limit), answered=answered.append)
    costs = [next_proposal(proposer).trainable_params for _ in range(12)]
    assert max(costs) <= limit
    assert "over_budget" in {point.reason for point in answered}


def test_what_an_earlier_run_proposed_is_not_proposed_again_finished_or_not() -> None:
    first = Proposer(problem())
    proposals = [next_proposal(first) for _ in range(6)]
    known = [(result(p, 0.1 * i), p.params) for i, p in enumerate(proposals[:4])]
    second = Proposer(problem())
    recalled(second, known)
    for proposal in proposals[4:]:
        second.recall(proposal.trial, proposal.params)
    old = {p.trial.digest for p in proposals}
    assert all(next_proposal(second).trial.digest not in old for _ in range(10))


def test_a_diverged_point_is_told_as_a_failure_not_as_a_number() -> None:
    proposer = Proposer(problem())
    proposal = next_proposal(proposer)
    proposer.tell(result(proposal, accuracy=None))
    assert [t.state.name for t in proposer._study.get_trials()][:1] == ["FAIL"]


def test_the_corners_of_a_space_reach_every_branch_and_its_extremes() -> None:
    asked = problem(pins={"scaled_rate": 1e-3})
    low, high = list(corners(asked)), list(corners(asked, high=True))
    assert {point.allocator for point, _ in low} == set(spaces.sieve.ALLOCATORS)
    assert {params["score"] for _, params in low if "score" in params} == {"count", "mass"}
    assert cheapest(asked) == min(asked.resolve(point)[1] for point, _ in [*low, *high])


@pytest.mark.parametrize(
    ("pins", "said"),
    [
        ({"fractoin": 0.5}, "did you mean 'fraction'?"),
        ({"allocator": "seive"}, "did you mean 'sieve'?"),
        ({"rank": 2.5}, "space.rank=2.5 is not possible: it must be whole"),
        ({"fraction": "half"}, "space.fraction=half is not possible: it must be a number"),
    ],
)
def test_a_pin_that_cannot_work_is_said_before_anything_starts(
    pins: dict[str, str] | dict[str, float], said: str
) -> None:
    with pytest.raises(StudyError) as error:
        check_pins(problem(pins=pins))
    assert said in str(error.value)


def test_a_budget_below_the_smallest_allocation_names_it() -> None:
    with pytest.raises(StudyError, match=r"max_trainable_params=10 is below the smallest allocation of small .* 120"):
        check_budget(problem(max_trainable_params=10))


def test_a_fraction_that_chooses_nobody_says_what_to_raise() -> None:
    with pytest.raises(Exception, match="fraction"):
        check_budget(problem(pins={"allocator": "sieve", "fraction": 0.01}))


@given(st.lists(st.integers(0, 1000), min_size=16, max_size=16).filter(any), st.floats(0.05, 0.95))
def test_flat_routing_bounds_the_cost_of_every_real_routing(counts: list[int], share: float) -> None:
    shape = moe_shape(layers=1)
    picks = tuple(map(float, counts))
    real = Signal("routing", {"0": {"count": picks, "mass": picks}}, axis="expert", unit="tokens", provenance={})
    from allocators import coverage

    flat = coverage.allocate(placeholder("routing", shape), shape, share=share)
    assert coverage.allocate(real, shape, share=share).total_experts <= flat.total_experts


def test_where_all_points_cost_the_same_it_is_accuracy_that_is_searched() -> None:
    """A reference at the largest cost would leave no area to gain, and the first candidate would be taken."""
    far: dict[str, list[float]] = {"ehvi": [], "random": []}
    for sampler, distances in far.items():
        proposer = Proposer(
            problem(pins={"allocator": "all", "rank": 8, "lora_alpha": 16}), sampler=sampler, trust=False
        )
        for _ in range(14):
            proposal = next_proposal(proposer)
            distances.append(abs(math.log(proposal.params["scaled_rate"] / 0.02)) / 7)
            done = Outcome(proposal.trial, "complete", proposal.trainable_params, 1 - distances[-1])
            proposer.tell(done)
    assert statistics.median(far["ehvi"][-4:]) < 0.1 < statistics.median(far["random"][-4:])
