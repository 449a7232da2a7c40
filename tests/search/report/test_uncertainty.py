"""Differences between points and how sure they are: laws, scipy's own tests as reference, examples by hand."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from search.front import Candidate, candidates
from search.report.uncertainty import Noise, compare, equivalence, holm, interval, paired, pooled, selection_bias
from tests.search.studies import QUESTIONS, outcome, selection

ACCURACIES = st.dictionaries(st.integers(0, 9), st.floats(0, 1), min_size=2)


def point(*accuracies: float, experts: int = 4, questions: bool = True) -> Candidate:
    runs = [outcome(selection(experts), accuracy=a, seed=seed) for seed, a in enumerate(accuracies)]
    if not questions:
        runs = [run.updated(rungs=()) for run in runs]
    (found,) = candidates(runs)
    return found


@given(ACCURACIES, ACCURACIES)
def test_the_paired_test_is_scipys_and_turns_its_sign_with_the_sides(a: dict[int, float], b: dict[int, float]) -> None:
    shared = sorted(a.keys() & b.keys())
    pair = paired(a, b)
    if not shared:
        assert pair is None
        return
    other = paired(b, a)
    assert pair is not None
    assert other is not None
    assert pair.n == len(shared)
    assert other.difference == pytest.approx(-pair.difference)
    if pair.p is None:
        return
    assert pair.spread is not None
    assume(pair.spread > 1e-6)
    reference = stats.ttest_rel([a[s] for s in shared], [b[s] for s in shared])
    interval = reference.confidence_interval(0.95)
    assert pair.p == pytest.approx(reference.pvalue, abs=1e-9)
    assert (pair.low, pair.high) == pytest.approx((interval.low, interval.high), abs=1e-9)
    assert other.p == pytest.approx(pair.p)


def test_one_seed_or_no_spread_is_not_tested() -> None:
    one, same = paired({0: 0.5}, {0: 0.4}), paired({0: 0.5, 1: 0.6}, {0: 0.4, 1: 0.5})
    assert one is not None
    assert one.p is None
    assert same is not None
    assert (same.n, same.difference, same.p, equivalence(same, margin=0.02)) == (2, pytest.approx(0.1), None, None)


def test_equivalence_is_the_ninety_percent_interval_inside_the_margin() -> None:
    a = {seed: 0.5 + d for seed, d in enumerate((0.01, -0.01, 0.005, -0.005, 0.0, 0.012, -0.008, 0.002))}
    b = dict.fromkeys(range(8), 0.5)
    pair = paired(a, b)
    assert pair is not None
    inner = stats.ttest_rel(list(a.values()), list(b.values())).confidence_interval(0.9)
    reach = max(abs(inner.low), abs(inner.high))
    assert equivalence(pair, margin=reach) == pytest.approx(0.05)
    wide, narrow = equivalence(pair, margin=0.02), equivalence(pair, margin=0.002)
    assert wide is not None
    assert narrow is not None
    assert wide < 0.05 < narrow


def test_one_seed_each_leaves_the_questions_error_alone() -> None:
    low, high = point(0.5), point(0.6, experts=8)
    found = compare(low, high, noise=None)
    error = math.hypot(math.sqrt(0.25 / QUESTIONS), math.sqrt(0.24 / QUESTIONS))
    assert (found.rise, found.stderr) == pytest.approx((0.1, error))
    assert found.chance == pytest.approx(stats.norm.cdf(0.1 / error))


def test_without_questions_error_it_is_welchs_test() -> None:
    """One-sided Welch p is 1 − P(higher is better) under a flat prior."""
    a, b = (0.50, 0.54, 0.49, 0.53), (0.55, 0.60, 0.52)
    low, high = point(*a, questions=False), point(*b, experts=8, questions=False)
    reference = stats.ttest_ind(b, a, equal_var=False, alternative="greater")
    assert compare(low, high, noise=None).chance == pytest.approx(1 - reference.pvalue)


def test_a_single_seed_borrows_the_spread_of_the_others() -> None:
    low, high = point(0.5), point(0.6, experts=8)
    several = [point(0.4, 0.5, 0.6, experts=2), point(0.3, 0.3, experts=3)]
    noise = pooled([low, high, *several])
    assert noise is not None
    assert (noise.variance, noise.freedom) == (pytest.approx(2 * 0.01 / 3), 3)
    alone, informed = compare(low, high, noise=None), compare(low, high, noise=noise)
    assert alone.stderr is not None
    assert informed.stderr == pytest.approx(math.hypot(alone.stderr, math.sqrt(2 * noise.variance)))
    assert informed.chance is not None
    assert alone.chance is not None
    assert 0.5 < informed.chance < alone.chance
    assert pooled([low, high]) is None


@given(st.lists(st.floats(0.1, 0.9), min_size=1, max_size=4), st.lists(st.floats(0.1, 0.9), min_size=1, max_size=4))
def test_the_chances_of_both_orders_sum_to_one(a: list[float], b: list[float]) -> None:
    low, high = point(*a), point(*b, experts=8)
    up, down = compare(low, high, noise=None).chance, compare(high, low, noise=None).chance
    assert up is not None
    assert down is not None
    assert up + down == pytest.approx(1)


def test_nothing_known_is_said_to_be_nothing() -> None:
    found = compare(point(0.5, questions=False), point(0.6, experts=8, questions=False), noise=None)
    assert (found.stderr, found.chance) == (None, None)


@pytest.mark.parametrize(("before", "after"), [(0.0, 1.0), (1.0, 1.0), (1.0, 0.0)])
def test_one_question_or_questions_answered_alike_say_nothing_of_others(before: float, after: float) -> None:
    lower, higher = point(before), point(after, experts=8)
    found = compare(lower, higher, noise=None)
    assert (found.rise, found.stderr, found.chance, found.inside_noise) == (after - before, None, None, False)
    assert found.reading == "standard error unknown"
    assert interval(lower, noise=None) is None
    assert (lower.stderr, lower.question_error) == (None, None)
    assert compare(point(before, before), point(after, after), noise=None).chance is None


def test_the_winners_curse_is_the_pick_against_its_fresh_seeds() -> None:
    found = selection_bias([point(0.8, 0.7, 0.72), point(0.6, 0.55), point(0.9)], seed=0)
    assert found is not None
    assert (found.points, found.fresh) == (2, 3)
    assert (found.picked, found.mean) == pytest.approx((0.7, 0.63))
    assert found.stderr == pytest.approx(statistics.stdev([0.09, 0.05]) / math.sqrt(2))
    assert selection_bias([point(0.9)], seed=0) is None


def test_an_interval_is_that_of_students_t_about_the_mean() -> None:
    three = point(0.5, 0.6, 0.55, questions=False)
    reference = stats.t.interval(0.95, 2, loc=0.55, scale=stats.sem([0.5, 0.6, 0.55]))
    assert interval(three, noise=None) == pytest.approx(reference)
    one = point(0.5)
    error = math.sqrt(0.25 / QUESTIONS)
    assert interval(one, noise=None) == pytest.approx(stats.norm.interval(0.95, loc=0.5, scale=error))
    assert interval(point(1.0), noise=Noise(0.01, 10)) == pytest.approx((1 - stats.t.ppf(0.975, 10) * 0.1, 1.0))
    assert interval(point(0.5, questions=False), noise=None) is None


def test_several_intervals_hold_at_once() -> None:
    low, high = point(0.5), point(0.6, experts=8)
    found = compare(low, high, noise=None)
    assert found.stderr is not None
    assert found.reach() == pytest.approx(stats.norm.ppf(0.975) * found.stderr)
    assert found.reach(comparisons=10) == pytest.approx(stats.norm.ppf(1 - 0.0025) * found.stderr)
    welch = compare(point(0.5, 0.6, questions=False), point(0.7, 0.75, experts=8, questions=False), noise=None)
    reference = stats.ttest_ind((0.7, 0.75), (0.5, 0.6), equal_var=False).confidence_interval(0.95)
    assert welch.reach() == pytest.approx((reference.high - reference.low) / 2)
    assert compare(point(0.5, questions=False), point(0.6, questions=False), noise=None).reach() is None


def test_a_rule_that_draws_anew_for_every_seed_is_one_point() -> None:
    trials = [outcome(selection(4, seed=seed), seed=seed, allocator="random").trial for seed in range(2)]
    assert trials[0].point != trials[1].point
    drawn = [t.__class__(t.allocation, t.recipe, t.model, t.task, t.seed, "random", {"draw": "each"}) for t in trials]
    assert drawn[0].point == drawn[1].point
    assert drawn[0].digest == trials[0].digest


def test_holm_by_hand() -> None:
    """.01 counts four times, .02 three times, .03 twice, but no less than .02's .06; .5 once."""
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([]) == []
