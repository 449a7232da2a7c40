"""Forgetting as a third objective: the criterion against moocore and draws, and what is proposed with it.

python -m pytest tests/search/propose/test_of_three.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import moocore
import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocators.core.types import Forgetting, Outcome
from search.propose import criterion
from search.propose.candidates import Known
from search.propose.ehvi import EHVISampler
from search.propose.of_three import Normal, Terrain, expected_gain, expected_gain_of_repeats
from search.propose.sampler import Proposer
from tests.search.propose.proposals import next_proposal, recalled
from tests.search.propose.test_sampler import problem

REFERENCE = (10.0, 0.0, -1.0)  # cost down, accuracy and what is spared up
TENTHS = st.integers(-2, 10).map(lambda n: n / 10)
PLACE = st.tuples(st.integers(0, 12), TENTHS, TENTHS.map(lambda n: -n))
PLACES = st.lists(PLACE, max_size=8)
Place = tuple[float, float, float]


def volume(points: Sequence[Place]) -> float:
    if not points:
        return 0.0
    return float(moocore.hypervolume(np.array(points), ref=list(REFERENCE), maximise=[False, True, True]))


def terrain(points: Sequence[Place]) -> Terrain:
    cost, accuracy, spared = np.array(points, dtype=float).reshape(-1, 3).T
    return Terrain(cost, accuracy, spared, REFERENCE)


def gain(place: Place, stds: tuple[float, float], points: Sequence[Place]) -> float:
    cost, *means = place
    accuracy, spared = (Normal(np.array([mean]), np.array([std])) for mean, std in zip(means, stds, strict=True))
    return float(expected_gain(accuracy, spared, np.array([float(cost)]), terrain(points))[0])


@settings(max_examples=200, deadline=None)
@given(PLACES, PLACE)
def test_without_doubt_it_is_the_volume_that_the_point_adds(points: list[Place], place: Place) -> None:
    assert gain(place, (0.0, 0.0), points) == pytest.approx(volume([*points, place]) - volume(points), abs=1e-9)
    assert gain(place, (1e-9, 1e-9), points) == pytest.approx(gain(place, (0.0, 0.0), points), abs=1e-6)


@settings(max_examples=10, deadline=None)
@given(PLACES, PLACE, st.floats(0.02, 0.5), st.floats(0.02, 0.5), st.integers(0, 2**32 - 1))
def test_it_is_the_mean_of_what_moocore_measures_on_draws(
    points: list[Place], place: Place, first: float, second: float, seed: int
) -> None:
    cost, accuracy, spared = place
    draws = np.random.default_rng(seed).normal((accuracy, spared), (first, second), (1500, 2))
    there = volume(points)
    gains = np.array([volume([*points, (cost, a, s)]) - there for a, s in draws])
    error = 5 * float(gains.std()) / math.sqrt(len(draws)) + 1e-3
    assert gain(place, (first, second), points) == pytest.approx(float(gains.mean()), abs=error)


@given(PLACES, PLACE, st.floats(0.01, 0.5))
def test_where_all_spare_alike_it_is_the_area_times_what_is_spared(
    points: list[Place], place: Place, std: float
) -> None:
    """The criterion of two objectives, as wide as the reference of the third is away."""
    flat = [(cost, accuracy, 0.5) for cost, accuracy, _ in points]
    cost, accuracy, _ = place
    height = np.array([accuracy for _, accuracy, _ in flat])
    two = criterion.Landscape(np.array([float(cost) for cost, *_ in flat]), height, REFERENCE[:2])
    (area,) = criterion.expected_hypervolume_improvement(
        np.array([accuracy]), np.array([std]), np.array([float(cost)]), two
    )
    assert gain((cost, accuracy, 0.5), (std, 0.0), flat) == pytest.approx(1.5 * area, abs=1e-9)


@settings(max_examples=10, deadline=None)
@given(PLACES.filter(len), st.integers(0, 7), st.floats(0.02, 0.4), st.integers(0, 2**32 - 1))
def test_a_repeat_gains_what_moocore_measures_on_draws_of_the_moved_means(
    points: list[Place], chosen: int, std: float, seed: int
) -> None:
    chosen %= len(points)
    cost, accuracy, spared = points[chosen]
    others = [point for place, point in enumerate(points) if place != chosen]
    draws = np.random.default_rng(seed).normal((accuracy, spared), std, (1500, 2))
    there = volume(points)
    gains = np.array([volume([*others, (cost, a, s)]) - there for a, s in draws])
    moves = np.array([std])
    (found,) = expected_gain_of_repeats((moves, moves), np.array([chosen]), terrain(points))
    assert found == pytest.approx(float(gains.mean()), abs=5 * float(gains.std()) / math.sqrt(1500) + 1e-3)


class Space:
    """Accuracy rises with a and b alike; b makes the model forget, a does not; all points cost the same."""

    def __call__(self, trial: Any) -> Known:
        a, b = trial.suggest_float("a", 0.0, 1.0), trial.suggest_float("b", 0.0, 1.0)
        return Known(f"{a} {b}", 1000)


def values(a: float, b: float) -> tuple[float, float]:
    """Accuracy and forgetting: the front has b = 0 until a is used up."""
    return 0.4 * a + 0.4 * b * (1 - a / 2), 0.5 * b


def searched(sampler: optuna.samplers.BaseSampler, number: int) -> list[tuple[float, float]]:
    study = optuna.create_study(directions=["maximize", "minimize", "minimize"], sampler=sampler)
    done = []
    for _ in range(number):
        trial = study.ask()
        Space()(trial)
        accuracy, forgetting = values(trial.params["a"], trial.params["b"])
        done.append((accuracy, forgetting))
        study.tell(trial, (accuracy, 1000.0, forgetting))
    return done


def area_of(done: list[tuple[float, float]]) -> float:
    return float(moocore.hypervolume(np.array(done), ref=[0.0, 0.5], maximise=[True, False]))


def test_it_finds_what_is_accurate_and_spares_where_chance_does_not() -> None:
    ours = [area_of(searched(EHVISampler(Space(), seed=seed, of_three=True), 16)) for seed in range(2)]
    chance = [area_of(searched(optuna.samplers.RandomSampler(seed=seed), 16)) for seed in range(2)]
    assert min(ours) > max(chance)
    # all there is to gain: a = 1 alone has .4 · .5, and with b up to 1 up to .6 · .5
    assert min(ours) > 0.4 * 0.5


def test_a_study_of_other_objectives_is_refused() -> None:
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=EHVISampler(Space(), of_three=True))
    with pytest.raises(ValueError, match="minimises parameters"):
        Space()(study.ask())


def answered(run: Any, cost: int, *, forgets: Callable[[int], float | None]) -> Outcome:
    number = run.allocation.total_experts
    lost = forgets(number)
    return Outcome(
        run,
        "complete",
        cost,
        0.3 + 0.01 * number,
        forgetting=None if lost is None else Forgetting(1.0, 1.0 + lost, 0.01),
    )


@pytest.mark.parametrize("sampler", ["ehvi", "gp", "tpe", "nsga2", "random"])
def test_every_sampler_takes_three_objectives_and_goes_on_from_records(sampler: str) -> None:
    def forgets(number: int) -> float | None:
        return None if number % 7 == 3 else 0.02 * number  # some have no finite loss: they count as failed

    first, known = Proposer(problem(), sampler=sampler, of_three=True), []
    for _ in range(9):
        proposal = next_proposal(first)
        done = answered(proposal.trial, proposal.trainable_params, forgets=forgets)
        known.append((done, proposal.params))
        first.tell(done)
    states = [trial.state.name for trial in first._study.get_trials(deepcopy=False)]
    assert all(len(trial.values) == 3 for trial in first._study.get_trials(deepcopy=False) if trial.values)
    assert "COMPLETE" in states
    again = Proposer(problem(), sampler=sampler, of_three=True)
    recalled(again, known)
    assert next_proposal(again).params == next_proposal(first).params
