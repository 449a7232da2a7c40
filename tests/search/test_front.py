"""Fronts, hypervolumes and knees against brute force, and the laws they obey."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from allocators.core.types import ExpertSelection, Forgetting, Outcome, Recipe, Rung, Trial
from search import front as module
from search.front import Candidate, Points, candidates, front, hypervolume, knee
from tests.search.studies import outcome, selection


class Place(NamedTuple):
    trainable_params: int
    accuracy: float  # None where a training has no result: NOT_POINTS


# Few different values, so that ties and duplicates are common
ACCURACY = st.integers(0, 10).map(lambda n: n / 10)
POINTS = st.lists(st.builds(Place, st.integers(1, 30).map(lambda n: n * 1_000), ACCURACY), max_size=12)
NOT_POINTS = st.lists(st.builds(Place, st.integers(1, 30), st.sampled_from([None, math.nan, math.inf])), max_size=3)


def beats(a: Place, b: Place) -> bool:
    return a.trainable_params <= b.trainable_params and a.accuracy >= b.accuracy and a != b


def brute_front(points: list[Place]) -> list[Place]:
    return sorted(p for p in points if not any(beats(q, p) for q in points))


def brute_hypervolume(points: list[Place], reference: tuple[float, float]) -> float:
    """Slices between neighbouring parameter counts, each as high as the best point to its left."""
    inside = sorted(p for p in points if p.trainable_params < reference[0] and p.accuracy > reference[1])
    edges = [*sorted({p.trainable_params for p in inside}), reference[0]]
    return sum(
        (right - left) * (max(p.accuracy for p in inside if p.trainable_params <= left) - reference[1])
        for left, right in pairwise(edges)
    )


@given(POINTS, NOT_POINTS)
def test_front_is_what_brute_force_finds(points: list[Place], others: list[Place]) -> None:
    assert sorted(front(others + points)) == brute_front(points)


@given(POINTS)
def test_front_rises(points: list[Place]) -> None:
    members = front(points)
    assert members == sorted(members)


@given(POINTS, NOT_POINTS, st.integers(5_000, 40_000), st.sampled_from([0.0, 0.25, 0.5]))
def test_hypervolume_is_what_brute_force_finds(
    points: list[Place], others: list[Place], most: int, least: float
) -> None:
    reference = (float(most), least)
    assert hypervolume(points + others, reference=reference) == pytest.approx(brute_hypervolume(points, reference))


@given(POINTS.flatmap(lambda points: st.tuples(st.just(points), st.permutations(points))))
def test_order_does_not_matter(pair: tuple[list[Place], list[Place]]) -> None:
    points, shuffled = pair
    assert front(points) == front(shuffled)
    assert knee(points) == knee(shuffled)
    reference = (40_000.0, 0.0)
    assert hypervolume(points, reference=reference) == pytest.approx(hypervolume(shuffled, reference=reference))


@given(POINTS.filter(len), st.integers(0, 5_000), st.sampled_from([0.0, 0.1, 0.3]), st.data())
def test_a_beaten_point_changes_nothing(points: list[Place], more: int, less: float, data: st.DataObject) -> None:
    winner = data.draw(st.sampled_from(points))
    beaten = Place(winner.trainable_params + more, winner.accuracy - less)
    assume(beaten != winner)
    assert front([*points, beaten]) == front(points)
    assert knee([*points, beaten]) == knee(points)
    reference = (40_000.0, 0.0)
    both = [hypervolume(p, reference=reference) for p in ([*points, beaten], points)]
    assert both[0] == pytest.approx(both[1])


@given(POINTS.filter(len), st.builds(Place, st.integers(1, 30_000), ACCURACY))
def test_hypervolume_never_shrinks(points: list[Place], another: Place) -> None:
    reference = (40_000.0, -0.1)
    before, after = (hypervolume(p, reference=reference) for p in (points, [*points, another]))
    assert after >= before * (1 - 1e-12)
    assert (after > before * (1 + 1e-12)) == (another in front([*points, another]) and another not in points)


@given(POINTS, st.integers(2, 9))
def test_knee_is_the_farthest_above_the_chord_in_any_unit(points: list[Place], factor: int) -> None:
    bend = knee(points)
    rises = _rises(front(points))
    assert (bend is None) == (max(rises.values(), default=0.0) <= 1e-9)
    if bend is not None:
        assert rises[bend] == pytest.approx(max(rises.values()))
        moved = knee([Place(p.trainable_params * factor, 3 * p.accuracy) for p in points])
        assert moved is not None
        back = next(p for p in rises if p.trainable_params * factor == moved.trainable_params)
        assert rises[back] == pytest.approx(rises[bend])  # equally far points may swap by rounding


@given(POINTS, NOT_POINTS, st.data())
def test_points_without_a_finite_accuracy_change_nothing_wherever_they_stand(
    points: list[Place], others: list[Place], data: st.DataObject
) -> None:
    mixed = data.draw(st.permutations(points + others))
    reference = (40_000.0, 0.0)
    assert front(mixed) == front(points)
    assert knee(mixed) == knee(points)
    assert hypervolume(mixed, reference=reference) == pytest.approx(hypervolume(points, reference=reference))


@given(POINTS, st.data())
def test_duplicates_cover_nothing_new_and_are_all_kept(points: list[Place], data: st.DataObject) -> None:
    again = data.draw(st.lists(st.sampled_from(points), max_size=5)) if points else []
    reference = (40_000.0, 0.0)
    assert hypervolume(points + again, reference=reference) == pytest.approx(hypervolume(points, reference=reference))
    assert sorted(front(points + again)) == sorted(p for p in points + again if p in front(points))


@given(st.builds(Place, st.integers(1, 50_000), ACCURACY), st.integers(1, 50_000), ACCURACY)
def test_one_point_is_its_own_front_and_covers_a_rectangle(point: Place, most: int, least: float) -> None:
    assert front([point]) == [point]
    width, height = max(most - point.trainable_params, 0), max(point.accuracy - least, 0.0)
    assert hypervolume([point], reference=(float(most), least)) == pytest.approx(width * height)


def _rises(ends: list[Place]) -> dict[Place, float]:
    """Height above the chord, in units of the front's height, at log parameters in units of its width."""
    if len(set(ends)) < 3:
        return {}
    (p0, a0), (p1, a1) = ends[0], ends[-1]
    return {p: (p.accuracy - a0) / (a1 - a0) - math.log(p.trainable_params / p0, p1 / p0) for p in ends}


def test_no_point_one_point_two_points() -> None:
    one, two = Place(100, 0.4), Place(1_000, 0.6)
    assert front([]) == []
    assert hypervolume([], reference=(10.0, 0.0)) == 0.0
    assert front([one, one]) == [one, one]
    assert [knee(p) for p in ([], [one], [one, two], [one, one, two])] == [None] * 4


def test_a_knee_by_hand() -> None:
    # In log10(parameters): 2, 3, 4, 5. The chord from (2, .3) to (5, .6) rises .1 a decade.
    points = [Place(100, 0.30), Place(1_000, 0.50), Place(10_000, 0.55), Place(100_000, 0.60)]
    assert knee(points) == points[1]
    straight = [Place(100, 0.3), Place(1_000, 0.4), Place(10_000, 0.5)]
    assert knee(straight) is None
    hollow = [Place(100, 0.3), Place(1_000, 0.31), Place(10_000, 0.5)]
    assert knee(hollow) is None


def test_a_hypervolume_by_hand() -> None:
    points = [Place(1, 0.5), Place(300, 0.9), Place(5_000, 1.0)]
    # up to 1000 parameters: .5 from 1 on, .4 more from 300 on; the third lies beyond the reference
    assert hypervolume(points, reference=(1_000.0, 0.0)) == pytest.approx(0.5 * 999 + 0.4 * 700)


def test_seeds_of_one_point_are_one_candidate() -> None:
    accuracies = (0.5, 0.6, 0.7)
    same = [outcome(selection(4), accuracy=a, seed=s) for s, a in enumerate(accuracies)]
    other = outcome(selection(5), accuracy=0.4)
    first, second = candidates([same[0], other, *same[1:]])
    assert first.accuracy == pytest.approx(0.6)
    assert [run.trial.seed for run in first.complete] == [0, 1, 2]
    assert first.best == same[2]
    assert second.runs == (other,)
    # spread .1 over three seeds, and the evaluation's own sqrt(.5 * .5 / 200) of the widest
    assert first.stderr == pytest.approx(math.sqrt(0.1**2 / 3 + 0.5 * 0.5 / 200))


def test_only_complete_runs_count() -> None:
    stopped = outcome(selection(4), status="stopped", accuracy=0.9)
    diverged = outcome(selection(5), status="diverged")
    [a, b] = candidates([stopped, diverged])
    assert stopped.accuracy is not None
    assert (a.accuracy, b.accuracy, a.stderr) == (None, None, None)
    assert front([a, b]) == []


def test_a_candidate_without_rungs_has_no_standard_error() -> None:
    bare: Outcome = outcome(selection(4)).updated(rungs=())
    assert candidates([bare])[0].stderr is None


# --- the same, training by training

RUNS = st.builds(
    lambda number, size, seed, accuracy, status, each: Outcome(
        Trial(ExpertSelection({0: (number,)}), Recipe(), "m", "t", seed, "random", {"draw": "each"} if each else {}),
        status,
        size * 1_000 if each else (number % 3) * 1_000,  # points of one size; a point whose draws differ in size
        accuracy if status in ("complete", "stopped") else None,
        (Rung(9, 900, accuracy, stderr=0.1),) if number % 2 else (),
    ),
    number=st.integers(0, 6),
    size=st.integers(0, 3),
    seed=st.integers(0, 2),
    accuracy=st.sampled_from([0.1, 0.2, 0.2, 0.3, 0.4, 0.5, None, math.nan, math.inf]),
    status=st.sampled_from(["complete", "complete", "complete", "stopped", "diverged", "failed"]),
    each=st.booleans(),
)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.sampled_from(["add", "add", "add", "add", "discard"]), RUNS), max_size=40))
def test_points_are_at_any_time_what_the_functions_say_of_all_outcomes(
    events: list[tuple[str, Outcome]],
) -> None:
    points = Points()
    known: dict[str, Outcome] = {}
    for verb, run in events:
        known.pop(run.digest, None)
        if verb == "add":
            known[run.digest] = run
            changed = points.add(run)
            assert changed is points.candidate_of(run.digest) is points.at(changed.point)
            assert run in changed.runs
        else:
            points.discard(run.digest)
        everything = candidates(known.values())
        assert [as_text(one) for one in points] == [as_text(one) for one in everything]
        assert [as_text(one) for one in points.front] == [as_text(one) for one in front(everything)]
        on_front = {one.point for one in front(everything)}
        assert [points.is_on_front(one) for one in points] == [one.point in on_front for one in points]
        assert len(points) == len(everything)
        assert list(points.outcomes) == list(known)


def as_text(candidate: Candidate) -> str:
    """Comparable where an accuracy is NaN."""
    return repr(candidate)


def test_points_build_one_candidate_a_training_and_compare_it_with_the_front_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built, compared = [], []
    build, beats = module._candidate, module._Entry.beats

    def counted_build(runs: tuple[Outcome, ...]) -> Candidate:
        built.append(runs)
        return build(runs)

    def counted_beats(one: module._Entry[Candidate], other: module._Entry[Candidate]) -> bool:
        compared.append(1)
        return beats(one, other)

    monkeypatch.setattr(module, "_candidate", counted_build)
    monkeypatch.setattr(module._Entry, "beats", counted_beats)
    draw, points = random.Random(0), Points()
    for seed in range(500):
        run = outcome(selection(draw.randint(1, 15), seed=seed), accuracy=draw.random())
        points.add(run)
    assert len(points) == len(built) == 500
    assert len(compared) <= 5 * 500


# --- three objectives

THREE = st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4))


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.booleans(), THREE), max_size=30))
def test_the_front_of_three_is_moocores_whatever_came_and_went(events: list[tuple[str, bool, tuple[int, ...]]]) -> None:
    points = module.UnbeatenOfThree[str]()
    known: dict[str, tuple[int, int, int]] = {}
    for number, (name, comes, (cost, accuracy, forgetting)) in enumerate(events):
        before = set(points)
        points.drop(name)
        known.pop(name, None)
        if comes:
            points.put(name, name, cost=cost, accuracy=accuracy, number=number, forgetting=forgetting)
            known[name] = (accuracy, cost, forgetting)
        keep = module.unbeaten(list(known.values()))
        expected = {name for name, on in zip(known, keep, strict=True) if on}
        assert set(points) == {name for name in known if name in points} == expected
        assert [known[name][1] for name in points] == sorted(known[name][1] for name in expected)
        assert len(points) == len(expected)
        assert before - expected <= set(points.left())
        assert points.height(2) == max((a for a, c, _ in known.values() if c <= 2), default=-math.inf)


def test_with_three_objectives_what_forgets_less_is_on_the_front_too_and_what_is_not_known_is_not() -> None:
    runs = [
        outcome(selection(number), accuracy=accuracy).updated(
            forgetting=None if rise is None else Forgetting(1.0, 1.0 + rise)
        )
        for number, accuracy, rise in ((2, 0.6, 0.3), (3, 0.5, 0.1), (4, 0.5, 0.2), (5, 0.9, None))
    ]
    assert [c.accuracy for c in Points(runs).front] == [0.6, 0.9]
    assert [c.accuracy for c in Points(runs, of_three=True).front] == [0.6, 0.5]
    assert [c.accuracy for c in Points(runs, of_three=True, max_forgetting=0.25).front] == [0.5]
