"""Broken trainings, on settings that were made to break them: counted, and the setting named."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from allocators.core.types import Outcome, Recipe, Rung, Status, Trial
from search import report
from search.records import UNTRAINED
from search.report.broken import Base, Broken, _chance, base_of, broken, chance_of, in_words, sections
from tests.search.report.written import data_of
from tests.search.studies import identity_of, moe_shape, open_study, outcome, selection

CHANCE = Base(0.25, 0.0, "chance")
ERROR = 0.02


def trained(
    number: int,
    accuracy: float | None,
    *,
    rate: float = 0.1,
    alpha: float = 64.0,
    status: Status = "complete",
    **of: Any,
) -> Outcome:
    recipe = Recipe(lora_alpha=alpha, learning_rate=rate / alpha, steps=9, **of)
    chosen = selection(1 + number % 4, seed=number)
    trial = Trial(chosen, recipe, "m", "t", 0, "sieve", {})
    rungs = () if accuracy is None else (Rung(9, 9, accuracy, stderr=ERROR),)
    params = chosen.trainable_params(moe_shape(), rank=recipe.rank)
    return Outcome(trial, status, params, accuracy=accuracy, rungs=rungs)


def made(count: int, *, limit: float) -> list[Outcome]:
    """Rank, alpha and scaled rate drawn independently; what is above the limit breaks, whatever gave it."""
    draw, found = random.Random(1), []
    for number in range(count):
        rate, alpha = 10 ** draw.uniform(-2, 0), 2 ** draw.uniform(3, 8)
        accuracy = 0.25 if rate > limit else 0.7
        rank = draw.choice((1, 2, 4, 8, 16, 32))
        found.append(trained(number, accuracy + draw.gauss(0, ERROR / 2), rate=rate, alpha=alpha, rank=rank))
    return found


def test_the_setting_that_breaks_trainings_is_named() -> None:
    outcomes = made(60, limit=0.3)
    above = [o for o in outcomes if o.trial.recipe.scaled_rate > 0.3]
    found = broken(outcomes, CHANCE)
    assert (found.count, found.trainings) == (len(above), 60)
    worst = found.sure[0]
    assert worst.setting == "scaled_rate"
    assert worst.where.startswith("above 0.")
    assert (worst.inside + worst.outside, worst.trainings + worst.others) == (found.count, 60)
    assert worst.inside / worst.trainings > 0.9
    (said,) = in_words(found)
    assert said.startswith(f"{found.count} of 60 trainings were broken (within noise of chance, 0.250, or below); ")
    assert f"{worst.inside} of the {worst.trainings} with scaled_rate above 0." in said
    (section,) = sections(found)
    assert section.rows[0][0] == "scaled_rate"
    assert {row[0] for row in section.rows} >= {"rank", "lora_alpha", "learning_rate"}


def test_where_no_setting_is_to_blame_none_is_blamed() -> None:
    blamed = 0
    for seed in range(20):
        draw = random.Random(seed)
        outcomes = [
            trained(n, 0.25 if draw.random() < 0.3 else 0.7, rate=10 ** draw.uniform(-2, 0), rank=draw.choice((1, 8)))
            for n in range(40)
        ]
        blamed += bool(broken(outcomes, CHANCE).sure)
    assert blamed <= 2


def test_within_noise_of_the_base_is_broken_by_hand() -> None:
    outcomes = [
        trained(1, 0.20),  # worse than untrained
        trained(2, 0.289),  # 0.25 + 2·0.02 = 0.29
        trained(3, 0.30),
        trained(4, None, status="diverged"),
        trained(5, 0.2, status="stopped"),  # not trained to its end
        trained(6, None, status="failed"),
        trained(7, None, status="out_of_memory"),
    ]
    found = broken(outcomes, CHANCE)
    assert (found.count, found.diverged, found.trainings) == (3, 1, 4)
    # the base's own error widens it: 0.25 + 2·√(0.02² + 0.02²) = 0.307
    assert broken(outcomes, Base(0.25, 0.02, "the untrained model")).count == 4
    unknown = broken(outcomes, None)
    assert unknown.count == 1
    assert "what an untrained model has is unknown" in in_words(unknown)[0]


def test_a_value_of_a_choice_is_named_as_it_is() -> None:
    outcomes = [
        trained(n, 0.25 if n % 3 == 0 else 0.7, schedule=("constant", "cosine", "linear")[n % 3]) for n in range(30)
    ]
    worst = broken(outcomes, CHANCE).sure[0]
    assert (worst.setting, worst.where, worst.inside, worst.trainings) == ("schedule", "constant", 10, 10)


@given(st.integers(1, 30), st.data())
def test_chance_is_the_tail_of_scipys_hypergeometric(total: int, data: st.DataObject) -> None:
    bad, trainings = data.draw(st.integers(0, total)), data.draw(st.integers(0, total))
    inside = data.draw(st.integers(0, min(bad, trainings)))
    assert _chance(inside, trainings, bad, total) == pytest.approx(
        stats.hypergeom.sf(inside - 1, total, bad, trainings)
    )


@given(st.lists(st.tuples(st.floats(0.001, 1), st.booleans()), max_size=25))
def test_whatever_the_values_the_counts_add_up(drawn: Sequence[tuple[float, bool]]) -> None:
    found = broken([trained(n, 0.2 if bad else 0.8, rate=rate) for n, (rate, bad) in enumerate(drawn)], CHANCE)
    assert found.count == sum(bad for _, bad in drawn)
    for culprit in found.culprits:
        assert culprit.inside + culprit.outside == found.count
        assert culprit.trainings + culprit.others == len(drawn)


@pytest.mark.parametrize(("text", "base"), [("0.25", CHANCE), ("nan", None), ("half", None), ("7", None)])
def test_chance_is_read_from_the_versions(text: str, base: Base | None) -> None:
    assert chance_of([outcome(), outcome().updated(versions={"chance": text})]) == base
    assert chance_of([]) is None


def test_the_untrained_model_comes_before_chance_and_the_report_has_it(tmp_path: Path) -> None:
    trainings = made(60, limit=0.3)
    with open_study(tmp_path / "demo", identity=identity_of(trainings[0].trial)) as study:
        for done in trainings:
            study.append_finished(done.updated(versions={"chance": "0.5"}), {})
        assert base_of(study) == Base(0.5, 0.0, "chance")
    (tmp_path / "demo" / UNTRAINED).write_text(json.dumps({"accuracy": 0.25, "stderr": 0.02, "by_task": {}}))
    written = report.write(tmp_path / "demo")
    assert base_of(written.records) == Base(0.25, 0.02, "the untrained model")
    assert any("trainings were broken (within noise of the untrained model" in said for said in written.words)
    (section,) = [s for s in data_of(tmp_path / "demo")["sections"] if s["title"] == "Broken trainings"]
    assert section["rows"][0][0] == "scaled_rate"
    assert written.metrics["trainings_broken"] == written.broken.count > 0


def test_none_broken_is_nothing_to_say() -> None:
    found = broken([trained(1, 0.7)], CHANCE)
    assert found == Broken(0, 0, 1, CHANCE, (), 0)
    assert in_words(found) == sections(found) == []
