"""A search with forgetting as a third objective, against a table that holds it: proposals, records, every view.

python -m pytest tests/search/test_objectives.py
"""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from search import replay, run
from search.export import find
from search.front import unbeaten
from search.records import read
from search.records.following import Following
from search.report import Report
from search.serve.beside import beside

THREE = "objectives=accuracy,params,forgetting"
NAME = "three"


def rise(params: int, scaled_rate: float) -> float:
    """Large and fast trainings forget more: a made-up law, for numbers that every row has."""
    return 1e-3 * math.sqrt(params) * (scaled_rate / 0.1)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-moe's recorded trainings with the forgetting of that law."""
    shipped = pq.read_table(replay.SHIPPED / "tiny-moe.parquet")
    rates = [json.loads(text)["recipe"] for text in shipped["trial"].to_pylist()]
    lost = [
        {"before": 1.0, "after": 1.0 + rise(params, recipe["learning_rate"] * recipe["lora_alpha"]), "stderr": 0.01}
        for params, recipe in zip(shipped["trainable_params"].to_pylist(), rates, strict=True)
    ]
    file = tmp_path_factory.mktemp("table") / "forgetful.parquet"
    pq.write_table(shipped.append_column("forgetting", pa.array(lost)), file)
    return file


@pytest.fixture(scope="module")
def study(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = tmp_path_factory.mktemp("studies")
    assert run.main([f"replay={table}", "trials=14", THREE, f"storage={storage}", f"name={NAME}"]) == 0
    return storage / NAME


def test_the_front_is_unbeaten_in_all_three_and_the_table_s_numbers_come_through(study: Path) -> None:
    records = read(study)
    runs = [outcome for outcome in records.finished.values() if outcome.accuracy is not None]
    for outcome in runs:
        assert outcome.forgetting is not None
        assert outcome.forgetting.rise == pytest.approx(
            rise(outcome.trainable_params, outcome.trial.recipe.scaled_rate), rel=1e-6
        )
    rows = [(o.accuracy or 0.0, o.trainable_params, o.forgetting.rise) for o in runs if o.forgetting]
    expected = {outcome.trial.point for outcome, on in zip(runs, unbeaten(rows), strict=True) if on}
    assert {candidate.point for candidate in records.points.front} == expected
    report = Report(records)
    assert {c.point for c in report.rising} < expected, "some are on it because they forget less"
    accuracies = [candidate.accuracy or 0.0 for candidate in report.rising]
    assert accuracies == sorted(accuracies)
    assert find(report, "best")[0] is report.rising[-1]


def test_every_view_says_it(study: Path) -> None:
    report = Report(read(study))
    sparing = {candidate.best.digest for candidate in report.front if report.spares(candidate)}
    said = next(sentence for sentence in report.words if sentence.startswith("Forgetting: "))
    assert f"{len(sparing)} of the {len(report.front)} points of the front" in said
    rows = list(csv.DictReader((study / "front.csv").open()))
    assert {row["digest"] for row in rows if row["for_forgetting_less"] == "True"} == sparing
    assert all(float(row["forgetting"]) > 0 for row in rows)
    page = re.search(r'<script id="study" type="application/json">(.*?)</script>', (study / "report.html").read_text())
    assert page is not None
    columns = json.loads(page[1])["points"]["columns"]
    assert {"forgotten", "spares"} <= columns.keys()
    assert "forgotten" in report.description
    members = beside([Following(study)])["studies"][0]["front"]
    assert [member["spares"] for member in members] == [report.spares(candidate) for candidate in report.front]
    client = MlflowClient(f"sqlite:///{study.parent / 'mlflow.db'}")
    experiments = [one.experiment_id for one in client.search_experiments()]
    marked = client.search_runs(experiments, "tags.front = 'true'")
    assert {one.data.tags["digest"] for one in marked} == report.winners
    assert len(client.search_runs(experiments, "tags.knee = 'true'")) == (report.knee is not None)
    [parent] = [one for one in client.search_runs(experiments) if "digest" not in one.data.tags]
    assert parent.data.metrics["least_forgetting"] == min(c.forgetting or 0.0 for c in report.front)


def test_the_same_study_goes_on_and_may_be_looked_at_with_two_objectives_again(
    study: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read(study).outcomes.keys()
    given = [f"replay={table}", "trials=15", f"storage={study.parent}", f"name={NAME}"]
    assert run.main([*given, THREE]) == 0
    assert read(study).outcomes.keys() > before
    assert run.main(given) == 0
    assert "It is the third objective" not in capsys.readouterr().out.rpartition("nothing to train")[2]
    report = Report(read(study))
    assert report.rising == report.front
    assert run.main([*given, THREE]) == 0


def test_a_table_without_forgetting_and_a_study_that_does_not_measure_it_are_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for given, says in (
        (["replay=tiny-moe", THREE], "tiny-moe has no training whose forgetting was measured"),
        (["replay=tiny-moe", "max_forgetting=0.1"], "tiny-moe has no training whose forgetting was measured"),
        (["space=sieve", THREE], "has an objective that is not measured: name a text"),
        (["space=sieve", "objectives=accuracy,forgetting"], "objectives"),
    ):
        assert run.main(given) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1
