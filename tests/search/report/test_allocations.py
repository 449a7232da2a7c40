"""What an allocation is worth, where that was planted: its size is found, and nothing where nothing was planted."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from allocators.core.types import Outcome, Recipe, Rung, Trial
from search import report
from search.front import Candidate, candidates
from search.report.allocations import (
    EQUAL,
    Worth,
    allocations,
    by_size,
    in_words,
    sections,
    spread,
    worths,
)
from search.report.uncertainty import picked_elsewhere
from tests.search.report.written import data_of
from tests.search.studies import identity_of, moe_shape, open_study, selection

QUESTION_ERROR, SEED_ERROR = 0.01, 0.02
RATES = (0.01, 0.03, 0.1)  # scaled; the best one is .03
LOSS = {0.01: 0.15, 0.03: 0.0, 0.1: 0.3}
SIZES = (2, 4, 8)


def done(
    allocator: str, count: int, rate: float, accuracy: float | None, *, seed: int = 0, draw: int = 0, rank: int = 4
) -> Outcome:
    """A training of `count` experts a layer at a scaled rate; each rule chooses experts of its own."""
    allocation = selection(count, seed=draw + 1000 * (allocator == "random"))
    recipe = Recipe(rank=rank, lora_alpha=64, learning_rate=rate / 64, steps=9)
    trial = Trial(allocation, recipe, "m", "t", seed, allocator, {"fraction": count / 16})
    rungs = () if accuracy is None else (Rung(9, 9, accuracy, stderr=QUESTION_ERROR),)
    cost = allocation.trainable_params(moe_shape(), rank=rank)
    return Outcome(trial, "complete" if rungs else "diverged", cost, accuracy=accuracy, rungs=rungs)


def planted(effect: float, *, seeds: int, draws: int = 1, seed: int = 0) -> list[Candidate]:
    """A full grid: accuracy of size and scaled rate, `effect` more where experts were not drawn at random, noise.

    Seeds differ where there are several: with one, their error cannot be known, and all noise is the questions'.
    """
    noise, error = random.Random(seed), SEED_ERROR if seeds > 1 else QUESTION_ERROR
    return candidates(
        done(
            rule,
            count,
            rate,
            0.4 + 0.03 * count + effect * (rule != "random") - LOSS[rate] + noise.gauss(0, error),
            seed=of,
            draw=draw,
        )
        for rule in ("sieve", "random")
        for draw in range(draws)
        for count in SIZES
        for rate in RATES
        for of in range(seeds)
    )


@pytest.mark.parametrize("seeds", [1, 4])
def test_a_planted_effect_is_found_with_its_size(seeds: int) -> None:
    points = planted(0.12, seeds=seeds)
    found = worths(points, noise=allocations(points).noise)
    assert [w.control.trainable_params for w in found] == sorted({c.trainable_params for c in points})
    assert all(w.fresh == (seeds > 1) for w in found)
    for worth in found:
        assert (worth.rule.best.trial.allocator, worth.control.best.trial.allocator) == ("sieve", "random")
        assert worth.reach is not None
        assert abs(worth.rise - 0.12) < worth.reach < 0.12
        assert worth.reading == "more than noise"
        assert (worth.rivals, worth.controls, worth.recipes) == (3, 3, (3, 3))
    (said, *_) = in_words(allocations(points), found, spread(points))
    assert "each side at its best recipe: at " in said
    assert "more than noise at 3" in said
    assert statistics.fmean(w.rise for w in found) == pytest.approx(0.12, abs=0.03)


@pytest.mark.parametrize("seeds", [1, 3])
def test_where_nothing_was_planted_nothing_is_found(seeds: int) -> None:
    """Each interval keeps its 95 %, whatever was picked: the best of several rules is not worth anything by itself."""
    found: list[Worth] = []
    for seed in range(20):
        # one draw of the controls, four of the rules: their best is the luckiest of four
        points = [
            c
            for c in planted(0.0, seeds=seeds, draws=4, seed=seed)
            if c.best.trial.allocator != "random" or c.best.trial.allocation in {selection(n, seed=1000) for n in SIZES}
        ]
        found += worths(points, noise=allocations(points).noise)
    assert len(found) == 20 * len(SIZES)
    assert {w.rivals for w in found} == {4 * len(RATES)}
    wrong = sum(w.reading == "more than noise" for w in found)
    assert wrong <= 0.1 * len(found)
    if seeds > 1:  # picked at the other seeds: not even the mean is flattered
        assert abs(statistics.fmean(w.rise for w in found)) < 0.01


def test_the_best_recipe_and_what_a_fixed_one_loses_by_hand() -> None:
    points = candidates(
        [
            done("sieve", 2, 0.03, 0.50),
            done("sieve", 2, 0.10, 0.70),  # its best
            done("sieve", 4, 0.03, 0.80),
            done("sieve", 4, 0.10, 0.40),
            done("all", 16, 0.03, 0.90),
            done("all", 16, 0.10, None),  # diverged: no recipe for all
        ]
    )
    tried = allocations(points)
    assert tried.fixed is not None
    assert tried.fixed.scaled_rate == pytest.approx(0.03)
    best = {a.names: (a.best.accuracy, a.recipe.scaled_rate, len(a.points)) for a in tried.allocations}
    assert best == {
        ("sieve fraction=0.125",): (0.70, pytest.approx(0.10), 2),
        ("sieve fraction=0.25",): (0.80, pytest.approx(0.03), 2),
        ("all fraction=1",): (0.90, pytest.approx(0.03), 1),
    }
    assert [a.fixed_loss for a in tried.allocations] == [pytest.approx(0.2), pytest.approx(0.0), None]
    (said,) = in_words(tried, [], None)
    assert "one recipe for all (learning_rate 0.000469, scaled_rate 0.03) loses 0.100 on average and 0.200" in said


def test_without_a_recipe_that_was_tried_everywhere_the_median_one_loses() -> None:
    """As in a search, where few recipes stand behind an allocation and no two have the same."""
    points = candidates(
        [
            *(done("sieve", 2, rate, a) for rate, a in ((0.01, 0.5), (0.02, 0.9), (0.03, 0.6))),
            done("sieve", 4, 0.05, 0.8),
        ]
    )
    tried = allocations(points)
    assert tried.fixed is None
    assert [a.fixed_loss for a in tried.allocations] == [pytest.approx(0.3), None]
    (section,) = sections(tried, [])
    assert "no recipe was tried with all" in section.notes[0]
    assert [row[5] for row in section.rows] == ["3", "1"]


def test_rules_that_chose_the_same_experts_are_one_allocation() -> None:
    first = done("sieve", 4, 0.03, 0.5)
    trial = first.trial
    second = done("sieve", 4, 0.1, 0.6).updated(
        trial=Trial(trial.allocation, Recipe(rank=8, steps=9), "m", "t", 0, "greedy", {"fraction": 0.25})
    )
    (allocated,) = allocations(candidates([first, second])).allocations
    assert allocated.names == ("sieve fraction=0.25", "greedy fraction=0.25")
    assert len(allocated.points) == 2


def test_a_rule_that_draws_anew_for_every_seed_is_one_allocation() -> None:
    drawn = [
        Outcome(
            Trial(o.trial.allocation, o.trial.recipe, "m", "t", seed, "random", {"fraction": 0.25, "draw": "each"}),
            "complete",
            o.trainable_params,
            accuracy=0.5 + seed / 10,
        )
        for seed in range(2)
        for o in [done("random", 4, 0.03, 0.5, draw=seed)]
    ]
    (allocated,) = allocations(candidates(drawn)).allocations
    assert allocated.best.accuracy == pytest.approx(0.55)


def test_sizes_are_equal_within_a_share_and_a_smaller_rule_stands_in() -> None:
    base = done("random", 8, 0.03, 0.5)

    def of_size(allocator: str, params: int, accuracy: float, draw: int) -> Outcome:
        return done(allocator, 8, 0.03, accuracy, draw=draw).updated(trainable_params=params)

    control = base.updated(trainable_params=1000)
    equal, larger = of_size("sieve", 1020, 0.7, 2), of_size("sieve", 1050, 0.9, 3)
    smaller, far = of_size("sieve", 850, 0.6, 4), of_size("sieve", 700, 0.8, 5)
    (found,) = worths(candidates([control, equal, larger, smaller, far]), noise=None)
    assert found.rule.accuracy == 0.7
    (found,) = worths(candidates([control, larger, smaller, far]), noise=None)
    assert found.rule.accuracy == 0.6
    assert worths(candidates([control, larger, far]), noise=None) == []
    sizes = [[c.trainable_params for c in size] for size in by_size(candidates([control, equal, larger]))]
    assert sizes == [[1000, 1020], [1050]]
    assert 1020 <= 1000 * (1 + EQUAL) < 1050


def test_controls_that_were_hardly_tried_are_no_measure() -> None:
    """One recipe of the control, a broken one, says nothing against the best of three."""
    points = candidates([*(done("sieve", 4, rate, 0.8) for rate in RATES), done("random", 4, 0.5, 0.25)])
    (worth,) = worths(points, noise=None)
    assert (worth.is_fair, worth.reading) == (False, "too few recipes with controls")
    assert "is not said" in in_words(allocations(points), [worth], None)[0]


def test_the_best_of_equals_is_flattered_and_what_is_picked_elsewhere_is_not() -> None:
    draw = random.Random(0)
    flattered, fresh = [], []
    for number in range(200):
        points = candidates(
            done("sieve", 4, rate, 0.5 + draw.gauss(0, 0.1), seed=seed, draw=number)
            for rate in (0.01, 0.02, 0.03, 0.04)
            for seed in range(3)
        )
        elsewhere = picked_elsewhere(points)
        assert elsewhere is not None
        flattered.append(max(c.accuracy or 0.0 for c in points))
        fresh.append(statistics.fmean(elsewhere.values()))
    assert statistics.fmean(flattered) > 0.54
    assert statistics.fmean(fresh) == pytest.approx(0.5, abs=0.015)
    assert picked_elsewhere(planted(0.1, seeds=1)) is None


def test_the_spread_within_a_size_by_hand() -> None:
    points = candidates(
        [
            done("sieve", 2, 0.03, 0.5),
            done("sieve", 2, 0.10, 0.1),  # not at its best
            done("random", 2, 0.03, 0.3),
            done("sieve", 8, 0.03, 0.9),
        ]
    )
    found = spread(points)
    assert found is not None
    assert (found.n, found.sizes) == (3, 1)
    assert found.in_size == pytest.approx(statistics.stdev([0.5, 0.3]))
    assert found.over_all == pytest.approx(statistics.stdev([0.5, 0.3, 0.9]))
    assert spread(candidates([done("sieve", 2, 0.03, 0.5), done("sieve", 8, 0.03, 0.9)])) is None


def test_nothing_measured_is_nothing_said() -> None:
    for points in ([], candidates([done("sieve", 2, 0.03, None)])):
        tried = allocations(points)
        assert (tried.allocations, worths(points, noise=None), spread(points)) == ((), [], None)
        assert in_words(tried, [], None) == sections(tried, []) == []


def every_training() -> Iterator[Outcome]:
    for candidate in planted(0.12, seeds=3):
        yield from candidate.runs


def test_the_answer_stands_above_the_shares_in_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainings = list(every_training())
    with open_study(tmp_path / "demo", identity=identity_of(trainings[0].trial)) as study:
        for outcome in trainings:
            study.append_finished(outcome, {})
    written = report.write(tmp_path / "demo")
    report.show(written)
    said = " ".join(capsys.readouterr().out.split())
    titles = [section["title"] for section in data_of(tmp_path / "demo")["sections"]]
    assert titles[:2] == ["What the choice of the allocation is worth", "Allocations, each at its best recipe"]
    assert all(title in said for title in titles)
    assert "What the choice of the allocation is worth, each side at its best recipe" in said
    rows = next(s for s in data_of(tmp_path / "demo")["sections"] if s["title"] == titles[1])["rows"]
    assert len(rows) == 2 * len(SIZES)
    assert all(row[4].endswith("scaled_rate 0.03") and row[5] == "3" for row in rows)
