"""The sampler that models accuracy alone: its criterion against Monte Carlo and moocore, its candidates, proposals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import moocore
import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from optuna.distributions import BaseDistribution

from allocators.core.errors import BudgetError, InfeasibleError
from allocators.core.types import ModuleRanks, Outcome, Recipe, Trial
from search.propose import RUN
from search.propose.candidates import Candidate, Known, _draw, _move, _unit, _value, features, resolver
from search.propose.criterion import (
    Landscape,
    expected_gain_of_repeats,
    expected_hypervolume_improvement,
    expected_improvement,
    learnt,
)
from search.propose.ehvi import EHVISampler, Tried, _beyond, _floor, _front
from search.propose.sampler import Proposer
from tests.allocators.models import dense_shape
from tests.search.propose.proposals import next_proposal
from tests.search.propose.test_sampler import problem, result

REFERENCE = (10.0, 0.0)
POINTS = st.lists(st.tuples(st.integers(0, 12), st.integers(-2, 10).map(lambda n: n / 10)), max_size=8)


def ehvi(
    candidates: list[tuple[int, float, float]],
    points: list[tuple[int, float]],
    *,
    reference: tuple[float, float] = REFERENCE,
) -> np.ndarray:
    cost, mean, std = (np.array(column, dtype=float) for column in zip(*candidates, strict=True))
    return expected_hypervolume_improvement(mean, std, cost, landscape(points, reference))


def landscape(points: Sequence[tuple[float, float]], reference: tuple[float, float]) -> Landscape:
    cost, height = np.array(points, dtype=float).reshape(-1, 2).T
    return Landscape(cost, height, reference)


def area(points: Sequence[tuple[float, float]], *, reference: tuple[float, float] = REFERENCE) -> float:
    rows = np.array(points, dtype=float).reshape(-1, 2)
    return moocore.hypervolume(rows, ref=list(reference), maximise=[False, True]) if len(rows) else 0.0


@given(POINTS, st.integers(0, 12), st.integers(-2, 12).map(lambda n: n / 10))
def test_without_doubt_it_is_the_hypervolume_that_the_point_adds(
    points: list[tuple[int, float]], cost: int, accuracy: float
) -> None:
    gain = area([*points, (cost, accuracy)]) - area(points)
    assert ehvi([(cost, accuracy, 1e-9)], points)[0] == pytest.approx(gain, abs=1e-6)


@settings(max_examples=15, deadline=None)
@given(POINTS, st.integers(0, 11), st.floats(-0.2, 1.0), st.floats(0.02, 0.5), st.integers(0, 2**32 - 1))
def test_it_is_the_mean_of_what_moocore_measures_on_draws(
    points: list[tuple[int, float]], cost: int, mean: float, std: float, seed: int
) -> None:
    draws = np.random.default_rng(seed).normal(mean, std, 4000)
    # in 200 quantile groups: moocore runs once a group, and the area is piecewise linear in the accuracy
    groups = np.sort(draws).reshape(200, -1).mean(axis=1)
    gains = np.array([area([*points, (cost, accuracy)]) for accuracy in groups]) - area(points)
    error = 4 * (REFERENCE[0] * std / math.sqrt(len(draws)) + 1e-3)
    assert ehvi([(cost, mean, std)], points)[0] == pytest.approx(gains.mean(), abs=error)


@given(POINTS, st.permutations(range(8)), st.integers(0, 11), st.floats(-0.2, 1.0), st.floats(0.01, 0.5))
def test_order_and_beaten_points_change_nothing(
    points: list[tuple[int, float]], order: list[int], cost: int, mean: float, std: float
) -> None:
    there = ehvi([(cost, mean, std)], points)[0]
    shuffled = [points[i] for i in order if i < len(points)]
    beaten = [(x + 1, y - 0.1) for x, y in points]
    assert ehvi([(cost, mean, std)], [*shuffled, *beaten])[0] == pytest.approx(there, abs=1e-12)


@given(POINTS.filter(len), st.integers(0, 11), st.floats(-0.2, 1.0), st.floats(0.01, 0.5))
def test_more_known_points_leave_less_to_gain_and_cheaper_is_better(
    points: list[tuple[int, float]], cost: int, mean: float, std: float
) -> None:
    fewer, all_ = ehvi([(cost, mean, std)], points[1:])[0], ehvi([(cost, mean, std)], points)[0]
    assert -1e-12 <= all_ <= fewer + 1e-12
    assert ehvi([(cost - 1, mean, std)], points)[0] >= all_ - 1e-12


def test_by_hand() -> None:
    # Up to cost 10 nothing is known: 6 wide, and E[max(Y, 0)] of a standard normal variable is 1/√(2π).
    assert ehvi([(4, 0.0, 1.0)], [])[0] == pytest.approx(6 / math.sqrt(2 * math.pi))
    # A point of accuracy .5 at cost 7 leaves 3 of the 6 as they were, and raises the bar on the other 3.
    bar = expected_improvement(np.array([0.0]), np.array([1.0]), 0.5)[0]
    assert ehvi([(4, 0.0, 1.0)], [(7, 0.5)])[0] == pytest.approx(3 / math.sqrt(2 * math.pi) + 3 * bar)
    assert ehvi([(10, 5.0, 1.0)], [])[0] == 0.0


def test_candidates_far_below_the_front_are_told_apart() -> None:
    mean = np.linspace(-15, 3, 60)
    improvement = expected_improvement(mean, np.full(60, 0.5), 0.0)
    assert (np.diff(improvement) > 0).all()


@settings(max_examples=15, deadline=None)
@given(POINTS.filter(len), st.integers(0, 7), st.floats(0.02, 0.5), st.integers(0, 2**32 - 1))
def test_a_repeat_gains_what_moocore_measures_on_draws_of_the_moved_mean(
    points: list[tuple[int, float]], chosen: int, std: float, seed: int
) -> None:
    chosen %= len(points)
    cost, height = points[chosen]
    others = [point for place, point in enumerate(points) if place != chosen]
    draws = np.random.default_rng(seed).normal(height, std, 4000)
    groups = np.sort(draws).reshape(200, -1).mean(axis=1)
    gains = np.array([area([*others, (cost, value)]) for value in groups]) - area(points)
    (gain,) = expected_gain_of_repeats(np.array([std]), np.array([chosen]), landscape(points, REFERENCE))
    assert gain == pytest.approx(gains.mean(), abs=4 * (REFERENCE[0] * std / math.sqrt(len(draws)) + 1e-3))
    assert gain >= -1e-12, "to learn more never does harm"


def test_what_a_further_run_is_expected_to_move_by_hand() -> None:
    # σ² = 1 before any result of the point: a result of variance v moves the mean by N(0, 1 / (1 + v))
    assert learnt(np.array([1.0]), np.inf, 0.25)[0] == pytest.approx(math.sqrt(1 / 1.25))
    # then σ² is 1 / (1 + 4) = .2, and with a second run 1 / (1 + 8): the mean moves by the rest
    assert learnt(np.array([math.sqrt(0.2)]), 0.25, 0.125)[0] == pytest.approx(math.sqrt(0.2 - 1 / 9))
    assert learnt(np.array([0.3]), 0.25, 0.25)[0] == pytest.approx(0.0, abs=1e-8)


def test_a_point_that_matters_and_is_noisy_is_tried_again_and_one_without_noise_is_not() -> None:
    def again(noise: float, seed: int) -> int:
        random = np.random.default_rng(seed)
        study = make(lambda trial: replace(Space()(trial), seeds=4), seed)
        tried: dict[str, int] = {}
        for number in range(30):
            trial = study.ask()
            known = Space()(trial)
            tried[known.key] = tried.get(known.key, 0) + 1
            trial.set_user_attr(RUN, f"run {number}")
            study.tell(trial, (accuracy(trial.params) + random.normal(0, noise), known.cost))
        assert max(tried.values()) <= 4
        return 30 - len(tried)

    without, noisy = (sum(again(noise, seed) for seed in range(4)) for noise in (0.0, 0.1))
    assert 2 * without < 30 < noisy, "of 120 trainings each"


@given(arrays.arrays(float, st.integers(1, 20), elements=st.floats(-50, 50)))
def test_improvement_is_never_negative_even_where_it_underflows(mean: np.ndarray) -> None:
    assert (expected_improvement(mean, np.full(len(mean), 0.5), 0.0) >= 0).all()


DISTRIBUTIONS = [
    optuna.distributions.FloatDistribution(1e-4, 2e-2, log=True),
    optuna.distributions.FloatDistribution(0.1, 0.9, step=0.05),
    optuna.distributions.FloatDistribution(-1.0, 3.0),
    optuna.distributions.IntDistribution(4, 32, step=4),
    optuna.distributions.IntDistribution(1, 1000, log=True),
    optuna.distributions.IntDistribution(3, 3),
    optuna.distributions.CategoricalDistribution(["count", "mass", None]),
]


@given(st.sampled_from(DISTRIBUTIONS), st.integers(0, 2**32 - 1))
def test_drawn_and_moved_values_belong_to_their_distribution(distribution: BaseDistribution, seed: int) -> None:
    random = np.random.default_rng(seed)
    value = _draw(distribution, random)
    for _ in range(5):
        assert distribution._contains(distribution.to_internal_repr(value))
        if not isinstance(distribution, optuna.distributions.CategoricalDistribution):
            assert 0.0 <= _unit(distribution, value) <= 1.0
            assert _value(distribution, _unit(distribution, value)) == pytest.approx(value)
        value = _move(distribution, value, random)


def test_every_step_of_an_ordered_knob_is_drawn_equally_often() -> None:
    distribution, random = optuna.distributions.FloatDistribution(0.1, 0.9, step=0.2), np.random.default_rng(0)
    counts = np.unique([round(_draw(distribution, random), 6) for _ in range(2000)], return_counts=True)
    assert counts[0].tolist() == [0.1, 0.3, 0.5, 0.7, 0.9]
    assert counts[1].min() > 320


def test_an_outlier_does_not_take_the_range_of_the_model() -> None:
    assert _floor(np.array([0.4, 0.5, 0.6, 0.7, -40.0])) == pytest.approx(0.4 - 1.5 * (0.6 - 0.4) + 0.0, abs=1e-9)
    assert _floor(np.array([0.4, 0.5, 0.6, 0.7])) == 0.4


# --- the sampler on a small conditional space


class Space:
    """Width and depth, and a rate that only the branch 'deep' has; cost is exact, accuracy known to the test."""

    def __init__(self, limit: int = 10**9) -> None:
        self.limit = limit

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        point = {"kind": trial.suggest_categorical("kind", ["flat", "deep"]), "width": trial.suggest_int("width", 1, 9)}
        if point["kind"] == "deep":
            point["rate"] = trial.suggest_float("rate", 1e-4, 1e-1, log=True)
        return point

    def __call__(self, trial: optuna.Trial) -> Known:
        point = self.suggest(trial)
        if point["width"] == 5:
            raise InfeasibleError("five is impossible")
        cost = 100 * point["width"] * (2 if "rate" in point else 1)
        if cost > self.limit:
            raise BudgetError("too many")
        rate = f"{math.log10(point['rate']):.1f}" if "rate" in point else "-"
        return Known(f"{point['kind']} {point['width']} {rate}", cost)


def accuracy(params: dict[str, Any]) -> float:
    width: int = params["width"]
    if "rate" not in params:
        return 0.3 + 0.02 * width
    return 0.3 + 0.05 * width - 0.1 * abs(math.log10(params["rate"]) + 2)


def make(
    space: Callable[[optuna.Trial], Known], seed: int = 0, expected: Mapping[str, float] | None = None
) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = EHVISampler(space, expected=expected or {}, seed=seed)
    return optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)


@settings(max_examples=3, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([10**9, 900]))
def test_it_never_proposes_what_was_tried_is_impossible_or_costs_too_much(seed: int, limit: int) -> None:
    space = Space(limit)
    study, seen = make(space, seed), set()
    for number in range(14):
        trial = study.ask()
        known = space(trial)  # raises where the point is none
        assert known.key not in seen
        seen.add(known.key)
        if number % 5 == 4:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        elif number % 5 != 3:  # every fifth goes on running
            study.tell(trial, (accuracy(trial.params), known.cost))


def test_equal_seeds_propose_equal_points() -> None:
    runs = []
    for _ in range(2):
        study, space = make(Space(), 7), Space()
        for _ in range(12):
            trial = study.ask()
            known = space(trial)
            study.tell(trial, (accuracy(trial.params), known.cost))
        runs.append([t.params for t in study.get_trials()])
    assert runs[0] == runs[1]


@pytest.mark.parametrize("results", [4, 16])
def test_what_a_gain_counts_near_and_far_from_the_expected_value_by_hand(results: int) -> None:
    """Twice off is one standard deviation; eight results weigh as much as what is expected; flat has no rate."""
    rates: list[dict[str, Any]] = [{"rate": 1e-2}, {"rate": 2e-2}, {"rate": 2.5e-3}, {"kind": "flat"}]
    points = [Candidate(params, {}, Known(str(place), 1), {}) for place, params in enumerate(rates)]
    trust = EHVISampler(Space(), expected={"rate": 1e-2})._trust(points, results)
    np.testing.assert_allclose(trust, [1, math.exp(-4 / results), math.exp(-16 / results), 1])
    np.testing.assert_array_equal(EHVISampler(Space())._trust(points, results), 1)


def test_the_expected_scaled_rate_rises_with_the_fourth_root_of_the_rank_by_hand() -> None:
    rates: list[dict[str, Any]] = [
        {"rank": 4, "scaled_rate": 0.1},
        {"rank": 64, "scaled_rate": 0.2},
        {"rank": 64, "scaled_rate": 0.1},
    ]
    points = [Candidate(params, {}, Known(str(place), 1), {}) for place, params in enumerate([*rates, {"rank": 64}])]
    trust = EHVISampler(Space(), expected={"rank": 4.0, "scaled_rate": 0.1})._trust(points, 4)
    np.testing.assert_allclose(trust, [1, 1, math.exp(-1), 1])
    flat = EHVISampler(Space(), expected={"scaled_rate": 0.1})._trust(points, 4)
    np.testing.assert_allclose(flat, [1, math.exp(-1), 1, 1])


def test_few_results_keep_to_the_expected_value_and_many_find_the_best_wherever_it_is() -> None:
    """The best rate is 10 times the expected one."""
    study, space = make(Space(), expected={"rate": 1e-3}), Space()
    for _ in range(60):
        trial = study.ask()
        cost = space(trial).cost
        study.tell(trial, (accuracy(trial.params), cost))
    off = [abs(math.log10(t.params["rate"] / 1e-3)) for t in study.get_trials() if "rate" in t.params]
    assert max(off[:4]) < 0.7  # 1.3 on average where nothing is expected
    assert min(abs(one - 1) for one in off) < 0.1


def test_workers_that_ask_at_the_same_time_are_sent_to_different_places() -> None:
    space, study = Space(), make(Space())
    for _ in range(12):
        trial = study.ask()
        known = space(trial)
        study.tell(trial, (accuracy(trial.params), known.cost))
    keys = [space(study.ask()).key for _ in range(4)]
    assert len(set(keys)) == 4


def test_it_leaves_less_unfound_than_random_on_a_conditional_space() -> None:
    def missing(sampler: optuna.samplers.BaseSampler) -> float:
        study, space = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler), Space()
        found: list[tuple[float, float]] = []
        while len(found) < 24:
            trial = study.ask()
            try:
                known = space(trial)
            except InfeasibleError:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                continue
            found.append((math.log(known.cost), accuracy(trial.params)))
            study.tell(trial, (found[-1][1], known.cost))
        best = [(math.log(200 * w), 0.3 + 0.05 * w) for w in (1, 2, 3, 4, 6, 7, 8, 9)]
        best += [(math.log(100 * w), 0.3 + 0.02 * w) for w in (1, 2, 3, 4, 6, 7, 8, 9)]
        reference = (math.log(2000), 0.0)
        return area(best, reference=reference) - area(found, reference=reference)

    ours = [missing(EHVISampler(Space(), seed=seed)) for seed in range(3)]
    random = [missing(optuna.samplers.RandomSampler(seed=seed)) for seed in range(3)]
    assert sum(ours) < sum(random) / 2


def test_partly_fixed_trials_and_used_up_spaces_fall_back_to_random_draws() -> None:
    study = make(Space())
    study.enqueue_trial({"kind": "flat"})
    trial = study.ask()
    assert Space().suggest(trial)["kind"] == "flat"

    def one_point(trial: optuna.Trial) -> Known:
        return Known(str(trial.suggest_int("width", 2, 2)), 1)

    study = make(one_point)
    for _ in range(3):
        trial = study.ask()
        assert one_point(trial).key == "2"
        study.tell(trial, (0.5, 1))


@pytest.mark.parametrize("cost", [lambda width: 1000, lambda width: 10**9 + width, lambda width: 1000 + width])
def test_where_all_cost_the_same_the_improvement_is_that_of_accuracy_alone(cost: Callable[[int], int]) -> None:
    def space(trial: optuna.Trial) -> Known:
        width = trial.suggest_int("width", 0, 100)
        return Known(str(width), cost(width))

    study = make(space)
    found = []
    for _ in range(16):
        trial = study.ask()
        known = space(trial)
        found.append(1 - abs(trial.params["width"] - 70) / 100)
        study.tell(trial, (found[-1], known.cost))
    assert max(found) >= 0.97, "a point at random is 97 % good with a chance of 7 in 101"
    assert np.mean(found[8:]) > 0.71, "the mean of points at random"


@pytest.mark.parametrize("accuracy", [0.5, 0.0])
def test_where_all_are_as_good_it_goes_on_with_points_that_cost_less(accuracy: float) -> None:
    study, space, costs = make(Space()), Space(), []
    for _ in range(9):
        trial = study.ask()
        costs.append(space(trial).cost)
        study.tell(trial, (accuracy, costs[-1]))
    assert costs[1] == min(costs), "the first that is chosen by a model"


def test_one_point_on_record_and_one_candidate_left() -> None:
    def space(trial: optuna.Trial) -> Known:
        width = trial.suggest_int("width", 1, 6)
        return Known(str(width), 10 * width)

    study = make(space)
    widths = set()
    for _ in range(6):
        trial = study.ask()
        widths.add(space(trial).key)
        study.tell(trial, (0.5, space(trial).cost))
    assert len(widths) == 6


@given(st.lists(st.floats(0, 30), min_size=1, max_size=5))
def test_the_reference_cost_lies_beyond_the_largest_by_a_tenth_at_least(costs: list[float]) -> None:
    assert _beyond(np.array(costs)) - max(costs) == pytest.approx(0.1 * max(max(costs) - min(costs), 1.0))


def test_a_study_with_other_objectives_is_refused() -> None:
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=EHVISampler(Space()))
    with pytest.raises(ValueError, match="maximises accuracy"):
        Space().suggest(study.ask())


def test_the_front_that_candidates_are_drawn_near() -> None:
    tried = [(3, 0.5), (1, 0.2), (2, 0.2), (3, 0.4), (9, 0.7)]
    points = [
        Tried(Candidate({}, {}, Known(str(i), cost), {}), i, {"": value}) for i, (cost, value) in enumerate(tried)
    ]
    assert [each.point.known.key for each in _front(points)] == ["1", "0", "4"]
    points[1].runs["b"] = 0.4  # what counts is the mean of a point's runs
    assert [each.point.known.key for each in _front(points)] == ["1", "0", "4"]
    points[4].runs["b"] = 0.1
    assert [each.point.known.key for each in _front(points)] == ["1", "0"]


# --- on the project's own spaces


def test_it_proposes_through_the_proposer_and_keeps_to_the_budget() -> None:
    asked = problem(max_trainable_params=6000)
    proposer, costs, digests = Proposer(asked, sampler="ehvi"), [], set()
    for number in range(14):
        proposal = next_proposal(proposer)
        costs.append(proposal.trainable_params)
        digests.add(proposal.trial.digest)
        proposer.tell(result(proposal, accuracy=None if number == 6 else 0.3 + 0.01 * number))
    assert max(costs) <= 6000
    assert len(digests) == 14


def test_features_of_allocations_by_hand() -> None:
    asked = problem()
    resolve = resolver(asked)

    def known(**params: Any) -> Known:
        return resolve(optuna.trial.FixedTrial({"rank": 4, "lora_alpha": 16.0, "scaled_rate": 1e-2} | params))

    all_, none = known(allocator="all").features, known(allocator="none").features
    assert all_ == {"depth": pytest.approx(0.5), "routed": pytest.approx(1.0)}
    assert none == {"depth": 0.5, "routed": 0.0}
    hot = known(allocator="sieve", fraction=0.25, score="count").features["routed"]
    cold = known(allocator="random", fraction=0.25).features["routed"]
    assert hot > cold
    # the busiest 4 of 16 experts take 13 + 14 + 15 + 16 of 1 + ... + 16 picks in every layer
    assert hot == pytest.approx(58 / 136)


def test_the_depth_of_ranks_is_weighted_by_rank() -> None:
    shape = dense_shape(layers=5)
    ranks = ModuleRanks({"model.layers.0.self_attn.q_proj": 1, "model.layers.4.self_attn.q_proj": 3})
    assert features(Trial(ranks, Recipe(), "m", "t", 0), shape, {}) == {"depth": 0.75}


def test_without_a_routing_signal_the_depth_is_still_known() -> None:
    asked = replace(problem(), signals={})
    outcome: Outcome = result(next_proposal(Proposer(problem())))
    assert set(features(outcome.trial, asked.shape, {})) == {"depth"}
