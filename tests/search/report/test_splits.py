"""Validation and test side by side: what selects is not what is drawn, compared and exported. Numbers by hand."""

from __future__ import annotations

import io
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from allocators.core.types import Outcome
from search.front import candidates
from search.records import UNTRAINED
from search.report import Report, show, write
from search.report.splits import optimism
from tests.search.report.written import data_of, rows_of
from tests.search.studies import APART, CONFIG, IDENTITY, QUESTIONS, open_study, outcome, score, selection

# experts a layer, accuracy on the validation split, on the test split; the third is beaten by the second there
FRONT = ((2, 0.40, 0.38), (4, 0.60, 0.56), (9, 0.70, 0.55), (12, 0.80, 0.75))
TESTED = tuple(row[2] for row in FRONT)


def both(count: int, validation: float, test: float | None, **more: Any) -> Outcome:
    done = outcome(selection(count), accuracy=validation, **more)
    return done if test is None else done.updated(test=score(test))


def study_of(folder: Path, *outcomes: Outcome, base: dict[str, Any] | None = None, **changes: Any) -> Report:
    with open_study(folder, **{**APART, **changes}) as study:
        for done in outcomes:
            study.append_finished(done, {})
        if base:
            (folder / UNTRAINED).write_text(json.dumps(base))
        return Report(study)


def front_of(folder: Path, tests: tuple[float | None, ...] = TESTED, **more: Any) -> Report:
    return study_of(folder, *(both(n, a, t) for (n, a, _), t in zip(FRONT, tests, strict=True)), **more)


def words_of(report: Report) -> str:
    return "\n".join(report.words)


def test_a_point_on_the_test_split_has_the_accuracies_that_it_has_there() -> None:
    runs = [both(4, a, t, seed=seed) for seed, (a, t) in enumerate([(0.6, 0.5), (0.64, 0.58), (0.7, None)])]
    (point,) = candidates(runs)
    judged = point.on_test
    assert judged is not None
    assert (judged.point, len(judged.runs)) == (point.point, 2)
    assert (judged.accuracy, judged.stderr) == (pytest.approx(0.54), point.test_stderr)
    assert judged.spread == pytest.approx(statistics.stdev((0.5, 0.58)))
    assert judged.best.trial.seed == 1


def test_optimism_is_over_points_and_of_one_point_over_its_questions() -> None:
    points = candidates(both(n, a, t) for n, a, t in FRONT)
    found = optimism(points)
    drops = (0.02, 0.04, 0.15, 0.05)
    assert found is not None
    assert (found.points, found.validation, found.test) == (4, pytest.approx(0.625), pytest.approx(0.56))
    assert (found.value, found.stderr) == (pytest.approx(0.065), pytest.approx(statistics.stdev(drops) / 2))
    one = optimism(points[:1])
    assert one is not None
    assert one.stderr == pytest.approx(math.sqrt((0.4 * 0.6 + 0.38 * 0.62) / QUESTIONS))
    assert optimism(candidates([both(4, 0.5, None)])) is None


def test_the_measured_optimism_is_said_with_its_error(tmp_path: Path) -> None:
    base = {"accuracy": 0.3, "stderr": 0.03, "test": {"accuracy": 0.29, "stderr": 0.04}}
    said = words_of(front_of(tmp_path, base=base))
    assert (
        "On the test split, which nothing was selected on, the 4 points of the front have 0.560 on average where "
        "validation said 0.625: optimism 0.065 ± 0.029 (standard error over points, which all answer the same "
        "questions; the untrained base, which was not selected, has +0.010); 1 of them is beaten there by another"
        in said
    )
    assert "a little too high" not in said, "what is shown is not what selected"
    # √(.75 · .25 / 200 + .04²) = .050
    assert "the base has 0.290 ± 0.040 on the test split (validation 0.300 ± 0.030): training is worth +0.460" in said
    assert "standard error 0.050" in said
    assert "Most accurate on validation, which selects: sieve fraction=0.75 (32.51k trainable parameters, " in said
    assert "validation 0.800 ± 0.028, test 0.750 ± 0.031)" in said


def test_one_point_some_points_and_none_are_said_to_be_that(tmp_path: Path) -> None:
    one = words_of(study_of(tmp_path / "a", both(4, 0.6, 0.55)))
    assert "the one point of the front has 0.550 where validation said 0.600: optimism 0.050 ± 0.049 (standard" in one
    assert "of one point it may be chance" in one
    some = words_of(front_of(tmp_path / "b", (None, 0.56, 0.6, None)))
    assert "2 of 4 points of the front have 0.580 on average where validation said 0.650: optimism 0.070" in some
    assert "2 of 4 points of the front have no test accuracy: the same command evaluates those whose adapters" in some
    none = words_of(front_of(tmp_path / "c", (None,) * 4))
    assert "No point of the front has been evaluated on the test split: the same command does it at its end" in none
    assert "picked from 4 points on the questions it is measured on: expect" in none
    assert "(32.51k trainable parameters, validation 0.800 ± 0.028)" in none


@pytest.mark.parametrize("select_on", [{"select_on": "test"}, {}])
def test_what_was_selected_on_the_test_split_has_one_number_and_says_so(
    select_on: dict[str, str], tmp_path: Path
) -> None:
    """A study of an earlier version does not say what it selected on: that was the test split."""
    report = front_of(tmp_path, config=CONFIG | select_on, identity=IDENTITY | select_on)
    said = words_of(report)
    assert "picked from 4 points on the questions it is measured on, those of the test split, as the papers do" in said
    assert "optimism" not in said
    assert "validation" not in said
    assert report.step == report.front
    assert "optimism" not in report.metrics
    write(tmp_path)
    assert data_of(tmp_path)["splits"] == ["accuracy"]
    assert {row["optimism"] for row in rows_of(tmp_path / "front.csv")} == {""}


def test_the_front_is_selected_by_validation_and_drawn_by_test(tmp_path: Path) -> None:
    report = front_of(tmp_path)
    assert [c.accuracy for c in report.front] == pytest.approx([0.4, 0.6, 0.7, 0.8])
    assert [c.accuracy for c in report.step] == pytest.approx([0.38, 0.56, 0.75])
    write(tmp_path)
    points = data_of(tmp_path)["points"]
    assert [p["front"] for p in points] == [True] * 4
    assert [p["step"] for p in points] == [True, True, False, True]
    assert [p["test"] for p in points] == pytest.approx([0.38, 0.56, 0.55, 0.75])
    assert [p["runs"][0]["test"] for p in points] == pytest.approx([0.38, 0.56, 0.55, 0.75])
    assert (tmp_path / "front.png").read_bytes()[:4] == b"\x89PNG"


def test_points_that_were_not_tested_are_drawn_by_validation_and_the_step_leaves_them_out(tmp_path: Path) -> None:
    report = front_of(tmp_path, (0.38, None, 0.55, None))
    assert [c.accuracy for c in report.step] == pytest.approx([0.38, 0.55])
    assert [report.judged(c).accuracy for c in report.front] == pytest.approx([0.38, 0.6, 0.55, 0.8])
    assert [report.is_judged(c) for c in report.front] == [True, False, True, False]
    write(tmp_path)
    assert [p["test"] for p in data_of(tmp_path)["points"]] == [pytest.approx(0.38), None, pytest.approx(0.55), None]


def test_tables_and_metrics_have_both_numbers(tmp_path: Path) -> None:
    base = {"accuracy": 0.3, "stderr": 0.03, "test": {"accuracy": 0.29, "stderr": 0.04}}
    report = front_of(tmp_path, (0.38, 0.56, 0.55, None), base=base)
    metrics = report.metrics
    assert (metrics["best_accuracy"], "best_test_accuracy" in metrics) == (pytest.approx(0.8), False)
    assert report.knee is not None
    assert metrics["knee_test_accuracy"] == report.knee.test_accuracy
    assert (metrics["untrained_accuracy"], metrics["untrained_test_accuracy"]) == (0.3, 0.29)
    assert (metrics["optimism"], metrics["optimism_points"]) == (pytest.approx(0.07), 3)
    assert metrics["optimism_stderr"] == pytest.approx(statistics.stdev((0.02, 0.04, 0.15)) / math.sqrt(3))
    write(tmp_path)
    front, points = rows_of(tmp_path / "front.csv"), rows_of(tmp_path / "points.csv")
    for rows in (front, points):
        assert [row["test_accuracy"] for row in rows] == ["0.38", "0.56", "0.55", ""]
        assert [float(row["optimism"]) for row in rows[:3]] == pytest.approx([0.02, 0.04, 0.15])
        assert rows[3]["optimism"] == ""
    assert [row["test_stderr"][:6] for row in front] == ["0.0343", "0.0350", "0.0351", ""]
    printed = io.StringIO()
    show(tmp_path, console=Console(file=printed, width=160))
    assert "validation ┃" in printed.getvalue()
    assert "test ┃" in printed.getvalue()


def test_differences_are_by_test_accuracy_where_both_have_one(tmp_path: Path) -> None:
    hot, random = both(4, 0.6, 0.5), outcome(selection(4, seed=2), accuracy=0.4, allocator="random")
    tested = words_of(study_of(tmp_path / "a", hot, random.updated(test=score(0.45))))
    # √(.5 · .5 / 200 + .45 · .55 / 200) = .050
    assert (
        "sieve fraction=0.25 has 0.500 and random 0.450 on the test split (difference +0.050, standard error" in tested
    )
    assert "standard error 0.050: inside the noise)" in tested
    untested = words_of(study_of(tmp_path / "b", hot, random))
    assert "sieve fraction=0.25 has 0.600 and random 0.400 on the validation split (difference +0.200" in untested


def test_the_probability_of_a_step_is_by_test_accuracy(tmp_path: Path) -> None:
    report = front_of(tmp_path)
    steps = [report.chances[c.best.digest] for c in report.front[1:]]
    assert steps[0] > 0.99
    assert 0.3 < steps[1] < 0.5, "it is beaten on the test split"
    assert "on the test split, 1 of 3 differences are within two standard errors" in words_of(report)
    assert "the whole front rises by 0.370" in words_of(report)


def test_the_noise_between_seeds_is_that_of_the_split(tmp_path: Path) -> None:
    runs = [both(4, a, t, seed=seed) for seed, (a, t) in enumerate([(0.6, 0.5), (0.64, 0.58)])]
    report = study_of(tmp_path, *runs, both(9, 0.7, 0.65))
    assert report.noise is not None
    assert report.test_noise is not None
    assert report.noise.variance == pytest.approx(statistics.variance((0.6, 0.64)))
    assert report.test_noise.variance == pytest.approx(statistics.variance((0.5, 0.58)))
    assert "Winner's curse: validation accuracy 0.600 at the seed" in words_of(report)
