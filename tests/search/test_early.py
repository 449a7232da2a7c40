"""Early signals: which value ranks trainings, and how far it ranks them as the end does."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
from scipy import stats

from allocators.core.types import Outcome, Rung
from search.early import merit, rank_correlation, signals
from search.report import Report, write
from tests.benchmarks import early_signals
from tests.search.replay.test_replay import (
    Recorded,
    table,  # noqa: F401
)
from tests.search.report.written import data_of
from tests.search.studies import open_study, outcome, selection

STEPS = (30, 60, 90)


def curve(number: int, final: float, *, accuracies: tuple[float, float], losses: tuple[float | None, ...]) -> Outcome:
    """A training whose accuracy and loss of the right answers on the way are given."""
    rungs = tuple(
        Rung(step, step, accuracy, loss=3.0 - accuracy, eval_loss=loss)
        for step, accuracy, loss in zip(STEPS, (*accuracies, final), (*losses, 1.0), strict=True)
    )
    return outcome(selection(1 + number % 16, seed=number), accuracy=final).updated(rungs=rungs, accuracy=final)


def test_more_is_better_whatever_ranks() -> None:
    rung = Rung(1, 1, 0.6, loss=2.0, eval_loss=1.5)
    assert [merit(rung, by) for by in ("accuracy", "loss", "eval_loss")] == [0.6, -2.0, -1.5]
    assert merit(Rung(1, 1, 0.6), "loss") is None
    assert merit(Rung(1, 1, 0.6), "eval_loss") == 0.6, "a model that writes its answers has no such loss"
    assert merit(Rung(1, 1, None), "eval_loss") is None


def test_correlations_are_spearmans_at_the_nearest_evaluations() -> None:
    draw = random.Random(0)
    ends = [draw.random() for _ in range(20)]
    first = [draw.random() for _ in range(20)]  # says nothing
    losses = [-end for end in ends]  # says everything
    outcomes = [
        curve(n, end, accuracies=(first[n], end / 2), losses=(losses[n], draw.random())) for n, end in enumerate(ends)
    ]
    found = {(at.signal, at.part): at for at in signals(outcomes)}
    assert found["accuracy", "third"].correlation == pytest.approx(stats.spearmanr(first, ends).statistic)
    assert found["accuracy", "two_thirds"].correlation == pytest.approx(1)
    assert found["eval_loss", "third"].correlation == pytest.approx(1)
    assert found["loss", "two_thirds"].correlation == pytest.approx(1), "a training loss counts negative"
    assert {at.n for at in found.values()} == {20}
    assert found["accuracy", "third"].share == pytest.approx(1 / 3)


def test_only_complete_trainings_count_and_what_was_not_recorded_is_left_out() -> None:
    whole = [curve(n, n / 10, accuracies=(0.1 * n, 0.1 * n), losses=(None, None)) for n in range(6)]
    stopped = whole[0].updated(status="stopped")
    single = whole[1].updated(rungs=whole[1].rungs[-1:])
    found = signals([*whole, stopped, single])
    assert {(at.signal, at.n) for at in found} == {("accuracy", 6), ("loss", 6)}
    assert signals([single]) == signals([]) == []


def test_rank_correlation() -> None:
    rising = [(0.1, 0.3), (0.2, 0.4), (0.3, 0.5), (0.4, 0.8), (0.5, 0.9)]
    assert rank_correlation(rising) == pytest.approx(1)
    assert rank_correlation([(a, -b) for a, b in rising]) == pytest.approx(-1)
    assert rank_correlation(rising[:4]) is None
    assert rank_correlation(rising, fewest=6) is None
    assert rank_correlation([(0.1, b) for _, b in rising]) is None


def test_the_report_and_mlflow_have_them(tmp_path: Path) -> None:
    with open_study(tmp_path / "demo") as study:
        for n in range(8):
            study.append_finished(curve(n, n / 10, accuracies=(0.5 - n / 20, n / 20), losses=(-n, -n)), {})
        metrics = Report(study).metrics
    assert metrics["rank_correlation_accuracy_third"] == pytest.approx(-1)
    assert metrics["rank_correlation_accuracy_two_thirds"] == pytest.approx(1)
    assert metrics["rank_correlation_eval_loss_third"] == pytest.approx(1)
    assert all(math.isfinite(value) for value in metrics.values())
    write(tmp_path / "demo")
    (section,) = [s for s in data_of(tmp_path / "demo")["sections"] if s["title"] == "Early signals"]
    assert section["head"] == ["part of the training", "accuracy", "− training loss", "− loss of right answers", "n"]
    assert section["rows"] == [["33%", "-1.00", "-1.00", "1.00", "8"], ["67%", "1.00", "1.00", "1.00", "8"]]


def test_the_benchmark_prints_them_for_a_table(table: Recorded, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """The table's accuracies rise by the same factors, and its loss of the right answers falls with them."""
    _, folder = table
    assert early_signals.main([f"tables={folder / 'small.parquet'}"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 3, "a header, accuracy, loss of the right answers; the training loss is the same everywhere"
    ratios = json.loads(last)["ratios"]
    assert ratios == {
        f"small/{signal}/{part}": 1.0 for signal in ("accuracy", "eval_loss") for part in ("third", "two_thirds")
    }
