"""What a report says in words: a difference counts above the noise only, and seeds are named."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from allocators.core.types import Outcome
from search.records import UNTRAINED
from search.report import Report, write
from tests.search.report.written import data_of, rows_of
from tests.search.studies import (
    CONFIG,
    QUESTIONS,
    open_study,
    outcome,
    selection,
)


def words_of(folder: Path, *outcomes: Outcome, **changes: Any) -> str:
    with open_study(folder, **changes) as study:
        for done in outcomes:
            study.append_finished(done, {})
        return "\n".join(Report(study).words)


def test_differences_inside_the_noise_are_called_that(tmp_path: Path) -> None:
    # 200 questions at 0.5: a standard error of .035 each, .05 of a difference; .06 is less than two of those
    close = words_of(tmp_path / "a", outcome(selection(2), accuracy=0.47), outcome(selection(9), accuracy=0.53))
    assert QUESTIONS == 200
    assert "rises by 0.060, within two standard errors of a difference (0.100)" in close
    assert "cannot be told apart" in close
    far = words_of(
        tmp_path / "b",
        outcome(selection(2), accuracy=0.3),
        outcome(selection(6), accuracy=0.55),
        outcome(selection(9), accuracy=0.57),
    )
    assert "1 of 2 differences are within two standard errors" in far
    assert "cannot be told apart" not in far


def test_an_unknown_error_is_said_to_be_unknown(tmp_path: Path) -> None:
    bare = [outcome(selection(n), accuracy=n / 10).updated(rungs=()) for n in (2, 6)]
    assert "standard error of the evaluation is not known" in words_of(tmp_path, *bare)


@pytest.mark.parametrize(("base", "reading"), [(0.3, "more than noise"), (0.56, "inside the noise")])
def test_what_training_gained_over_the_base_is_said_and_drawn(tmp_path: Path, base: float, reading: str) -> None:
    assert "ntrained, the base" not in words_of(tmp_path / "a", outcome(accuracy=0.6))
    folder = tmp_path / "b"
    with open_study(folder) as study:
        study.append_finished(outcome(accuracy=0.6), {})
        (folder / UNTRAINED).write_text(json.dumps({"accuracy": base, "stderr": 0.035, "by_task": {}}))
        said, report = "\n".join(Report(study).words), write(folder)
    assert f"Untrained, the base has {base:.3f} ± 0.035: training is worth {0.6 - base:+.3f}" in said
    assert reading in said
    assert data_of(folder)["untrained"]["accuracy"] == base
    assert report.metrics["untrained_accuracy"] == base


@pytest.mark.parametrize("reached", [1.0, 0.0])
def test_one_question_is_said_to_say_nothing(tmp_path: Path, reached: float) -> None:
    with open_study(tmp_path) as study:
        study.append_finished(outcome(accuracy=reached), {})
        (tmp_path / UNTRAINED).write_text(json.dumps({"accuracy": 0.0, "stderr": 0.0, "by_task": {}}))
        said = "\n".join(Report(study).words)
    assert f"training is worth {reached:+.3f} at the most accurate point (standard error unknown: one question" in said
    assert "more than noise" not in said


def test_seeds_are_named(tmp_path: Path) -> None:
    assert "One seed stands behind each point" in words_of(tmp_path / "a", outcome())
    several = [outcome(selection(4), seed=s, accuracy=0.5 + s / 100) for s in range(3)]
    assert "3 seeds stand behind each point" in words_of(tmp_path / "b", *several)
    mixed = words_of(tmp_path / "c", *several, outcome(selection(9), accuracy=0.7))
    assert "1 to 3 seeds stand behind each point" in mixed


def test_the_winners_curse_is_measured_where_seeds_are_fresh(tmp_path: Path) -> None:
    lucky = [outcome(selection(4), seed=s, accuracy=a) for s, a in enumerate((0.6, 0.5, 0.52))]
    said = words_of(tmp_path / "a", *lucky)
    assert "accuracy 0.600 at the seed they were picked at, 0.510 on average over 2 fresh trainings of 1 picked" in said
    assert "picking flattered them by 0.090, so the front goes by the means" in said
    assert "between seeds of one point accuracy has a standard deviation of 0.053, estimated with 2 degrees" in said
    modest = [outcome(selection(4), seed=s, accuracy=a) for s, a in enumerate((0.5, 0.52))]
    assert "picking did not flatter them (difference -0.020)" in words_of(tmp_path / "b", *modest)
    assert "Winner's curse" not in words_of(tmp_path / "c", outcome())


def test_runs_of_the_search_and_repeats_are_counted_apart(tmp_path: Path) -> None:
    runs = [outcome(selection(4), seed=s) for s in range(3)]
    said = words_of(tmp_path, *runs, config=CONFIG | {"seeds": 3})
    assert "1 of 24 runs are finished, and 2 repeats with other seeds: 3 complete." in said


def test_probabilities_agree_with_the_words(tmp_path: Path) -> None:
    close = outcome(selection(2), accuracy=0.47), outcome(selection(9), accuracy=0.53)
    with open_study(tmp_path) as study:
        for done in close:
            study.append_finished(done, {})
        report = Report(study)
        assert list(report.chances) == [close[1].digest]
        assert 0.5 < report.chances[close[1].digest] < 0.977  # two standard errors
    write(tmp_path)
    assert [row["better_than_next_smaller"][:3] for row in rows_of(tmp_path / "front.csv")] == ["", "0.8"]


def early(first: list[float], last: list[float]) -> Iterator[Outcome]:
    for n, (a, b) in enumerate(zip(first, last, strict=True), start=2):
        done = outcome(selection(n), accuracy=b)
        yield done.updated(rungs=(replace(done.rungs[0], accuracy=a), *done.rungs[1:]))


def test_a_first_rung_that_misleads_is_warned_of_with_its_n(tmp_path: Path) -> None:
    last = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    assert "Warning" not in words_of(tmp_path / "a", *early([x / 2 for x in last], last))
    said = words_of(tmp_path / "b", *early([0.4, 0.1, 0.3, 0.2, 0.5, 0.25], last))
    assert "(rank correlation 0.09, n = 6, below 0.8)" in said
    assert "Warning" not in words_of(tmp_path / "c", *early([0.4, 0.1], last[:2])), "two runs have no ranks"


def test_baselines_are_compared_at_equal_parameters_and_recipe(tmp_path: Path) -> None:
    hot, random = (
        outcome(selection(4, seed=1), accuracy=0.6),
        outcome(selection(4, seed=2), accuracy=0.4, allocator="random"),
    )
    smaller = outcome(selection(2), accuracy=0.9)
    other_rank = outcome(selection(4, seed=3), accuracy=0.8, rank=8)
    said = words_of(tmp_path / "a", hot, random, smaller, other_rank)
    assert "At 14.08k parameters (rank 4) sieve fraction=0.25 has 0.600 and random 0.400 (difference +0.200, " in said
    assert "standard error 0.049: more than noise" in said
    losing = words_of(tmp_path / "b", hot.updated(accuracy=0.38), random)
    assert "(difference -0.020, standard error 0.049: inside the noise)" in losing


def test_of_many_comparisons_inside_the_noise_only_the_number_is_told(tmp_path: Path) -> None:
    pairs = [
        (outcome(selection(n), accuracy=0.5), outcome(selection(n, seed=9), accuracy=0.49, allocator="random"))
        for n in (1, 2, 3, 5, 6, 7)
    ]
    loser = outcome(selection(4, seed=2), accuracy=0.2, allocator="random")
    said = words_of(tmp_path, outcome(selection(4), accuracy=0.5), loser, *(run for pair in pairs for run in pair))
    assert said.count(" and random ") == 1
    assert "In 6 more comparisons of random or uniform with the best other rule" in said


def test_the_budget_of_the_study_or_round_numbers(tmp_path: Path) -> None:
    points = [outcome(selection(n), accuracy=0.2 + n / 30) for n in (1, 4, 12)]  # 7.17k, 14.08k, 32.51k parameters
    limited = words_of(tmp_path / "a", *points, config=CONFIG | {"max_trainable_params": 15_000})
    assert "Best under 15k parameters: sieve fraction=0.25 (14.08k" in limited
    free = words_of(tmp_path / "b", *points)
    assert re.findall(r"Best under (\w+) parameters: (\S+ \S+)", free) == [
        ("10k", "sieve fraction=0.0625"),
        ("20k", "sieve fraction=0.25"),
    ]
    two = words_of(tmp_path / "c", points[0], outcome(selection(16), accuracy=0.9))  # nothing between 7.17k and 42k
    assert re.findall(r"Best under (\w+)", two) == ["20k"]


def test_the_knee_in_words(tmp_path: Path) -> None:
    bent = [outcome(selection(n), accuracy=a) for n, a in ((1, 0.3), (4, 0.55), (14, 0.6))]
    assert "The knee, after which parameters buy less: sieve fraction=0.25" in words_of(tmp_path / "a", *bent)
    hollow = [outcome(selection(n), accuracy=a) for n, a in ((1, 0.3), (4, 0.31), (14, 0.6))]
    assert "has no knee" in words_of(tmp_path / "b", *hollow)
