"""Which settings accuracy goes with, on accuracies whose cause is known."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from allocators.core.types import ExpertSelection, Outcome, Recipe, Trial
from search import report
from search.front import candidates
from search.records import read
from search.replay import load
from search.report.attribution import FEWEST, attributed, groups_of, importance, in_words
from tests.search.records.test_reuse import run
from tests.search.replay.test_replay import (
    Recorded,
    table,  # noqa: F401
)
from tests.search.report.written import data_of
from tests.search.studies import fill, open_study, outcome


def made(count: int, accuracy: Callable[[Trial, float], float], *, seed: int = 0) -> list[Outcome]:
    """Points of a space with conditional knobs, their settings drawn evenly; `accuracy` of (trial, noise)."""
    draw, found = random.Random(seed), []
    for number in range(count):
        allocator = draw.choice(("sieve", "esft", "all"))
        knobs: dict[str, dict[str, Any]] = {
            "sieve": {"fraction": draw.random(), "score": draw.choice(("count", "mass"))},
            "esft": {"p": draw.random()},
        }
        recipe = Recipe(rank=draw.choice((4, 8, 16, 32)), learning_rate=10 ** draw.uniform(-4, -2), steps=9)
        allocation = ExpertSelection({0: (number % 16,), 1: (number // 16,)})
        trial = Trial(allocation, recipe, "m", "t", 0, allocator, knobs.get(allocator, {}))
        found.append(Outcome(trial, "complete", 100 + number, accuracy=accuracy(trial, draw.gauss(0, 1))))
    return found


def shares(outcomes: list[Outcome]) -> dict[str, float]:
    found = importance(candidates(outcomes))
    assert found is not None
    return {share.group: share.value for share in found.shares}


def test_what_alone_decides_has_nearly_everything() -> None:
    outcomes = made(60, lambda trial, noise: trial.recipe.rank / 64)
    found = importance(candidates(outcomes))
    assert found is not None
    assert found.shares[0].group == "rank"
    assert found.shares[0].value > 0.8
    assert all(abs(share.value) < 0.05 for share in found.shares[1:])
    assert found.foreseen > 0.9
    assert {share.group for share in found.shares} == {"allocator and its knobs", "rank", "alpha and scaled rate"}
    assert in_words(found, candidates(outcomes))[0].startswith("Of the variance of accuracy over the 60 points tried, ")


def test_a_knob_that_only_one_allocator_has_counts_for_the_allocator() -> None:
    outcomes = made(80, lambda trial, noise: trial.knobs.get("fraction", 0.0))
    found = shares(outcomes)
    assert found["allocator and its knobs"] > 0.7
    assert max(found["rank"], found["alpha and scaled rate"]) < 0.1


def test_two_equal_causes_share() -> None:
    found = shares(made(80, lambda t, noise: t.recipe.rank / 64 + 0.3 * (t.allocator == "all") + 0.01 * noise))
    assert min(found["rank"], found["allocator and its knobs"]) > 0.2
    assert found["alpha and scaled rate"] < 0.05


def test_the_order_of_the_points_changes_nothing() -> None:
    outcomes = made(30, lambda trial, noise: trial.recipe.rank / 64 + 0.05 * noise)
    shuffled = random.Random(1).sample(outcomes, len(outcomes))
    assert importance(candidates(outcomes)) == importance(candidates(shuffled))


def test_too_few_points_one_accuracy_and_mere_noise_are_said_to_be_that() -> None:
    few = candidates(made(FEWEST - 1, lambda trial, noise: noise))
    same = candidates(made(FEWEST, lambda trial, noise: 0.5))
    for points, said in ((few, "19 points have one, 20 are needed"), (same, "there is nothing to attribute")):
        assert importance(points) is None
        assert said in in_words(None, points)[0]
        assert attributed(None) == []
    noise = candidates(made(24, lambda trial, noise: noise))
    found = importance(noise)
    assert found is not None
    assert found.foreseen < 0
    assert "cannot be foreseen" in in_words(found, noise)[0]
    assert attributed(found) == []


def test_every_setting_is_in_one_group() -> None:
    trial = outcome().trial
    told = groups_of(
        Trial(trial.allocation, trial.recipe, "m", "t", 0, "alphalora", {"total_experts": 40, "beta": 2.5})
    )
    assert told["T"] == {"total_experts": 40}
    assert told["allocator and its knobs"] == {"allocator": "alphalora", "beta": 2.5}
    assert sum(len(settings) for settings in told.values()) == 3 + len(trial.recipe.to_json())


# --- in the report


def test_a_small_study_says_that_it_is_too_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_study(tmp_path / "demo") as study:
        fill(study)
    report.show(report.write(tmp_path / "demo"))
    said = capsys.readouterr().out
    assert f"{FEWEST} are needed" in said
    titles = [section["title"] for section in data_of(tmp_path / "demo")["sections"]]
    assert titles == [
        "What the choice of the allocation is worth",
        "Broken trainings",
        "One-line recipes against the front",
        "Trainings saved",
        "Early signals",
    ]


@pytest.mark.slow
def test_a_replayed_study_from_its_trainings_to_its_report(table: Recorded, tmp_path: Path) -> None:  # noqa: F811
    """The table's accuracy is made of experts, rank and learning rate; its diverged rows have none."""
    _, folder = table
    said = run(tmp_path, f"replay={folder / 'small.parquet'}", "trials=30", "sampler=random")
    study = tmp_path / "sieve-small-t-replay-small"
    sections = {section["title"]: section for section in data_of(study)["sections"]}
    bars: dict[str, float] = {label: share for label, share, _ in sections["Variance of accuracy by setting"]["bars"]}
    assert max(bars, key=lambda label: bars[label]) == "allocator and its knobs"
    assert {"scaled_rate", "rank"} <= bars.keys()
    assert "Variance of accuracy by setting" in said
    assert "One-line recipes against the front" in said
    assert len(read(study).finished) == 30
    assert len(load(str(folder / "small.parquet")).rows) > 30
