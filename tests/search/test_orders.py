"""What is asked of a running study's driver: it obeys, says why not, and has it on record."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest

from search import study as conducting
from search.engine.simulated import SimulatedWorkers
from search.records import orders, read
from search.records.folder import StudyFolder
from search.records.orders import Order
from search.records.tracking import Tracker
from search.replay import load
from search.replay.problem import table_problem
from search.report.live import Progress
from search.session.page import RunningPage
from tests import ROOT
from tests.search.report.written import data_of
from tests.search.studies import identity_of, open_study
from tests.search.test_growth import Silent

TABLE = load("tiny-moe")


def drive(folder: Path, said: dict[int, Order], *, trials: int = 6, pins: dict[str, Any] | None = None) -> StudyFolder:
    """A search of the recorded table by two workers; `said[n]` is ordered when n evaluations were reported."""
    problem = table_problem(TABLE, seed=0, pins=pins or {})
    reports = 0

    class Ordering(conducting.Conductor):
        def rung(self, digest: str, rung: Any) -> bool:
            nonlocal reports
            reports += 1
            if (order := said.get(reports)) is not None:
                orders.give(folder, replace(order, digest=digest) if order.digest == "here" else order)
            return super().rung(digest, rung)

    with open_study(folder, shape=problem.shape, identity=identity_of(problem)) as records:
        if (order := said.get(0)) is not None:
            orders.give(folder, order)
        progress = Progress(trials, done=records.points, quiet=True)
        conductor = Ordering(
            problem,
            records,
            cast(Tracker, Silent()),
            progress,
            sampler="random",
            deadline=None,
            keep="front",
            trials=trials,
            evaluations=3,
            changed=RunningPage(records),
        )
        workers = SimulatedWorkers(TABLE.outcomes, workers=2, source="tiny-moe", mark="m")
        workers.search(conductor, pausing=False)
        assert not conductor.cut_off
        conductor.settle()
    return records


def test_a_training_is_stopped_at_its_next_evaluation_and_the_search_goes_on(tmp_path: Path) -> None:
    records = drive(tmp_path / "s", {1: Order("stop", digest="here")})
    stopped = [run for run in records.finished.values() if run.status == "stopped"]
    assert [len(run.rungs) for run in stopped] == [1]
    assert stopped[0].accuracy == stopped[0].rungs[0].accuracy
    assert len(records.finished) == 6
    [obeyed] = read(tmp_path / "s").orders
    assert (obeyed.order.do, obeyed.answer) == ("stop", "it stops at its next evaluation")
    assert not any(run.status == "started" for run in records.outcomes.values())


def test_a_study_ends_after_what_runs_and_goes_on_later(tmp_path: Path) -> None:
    records = drive(tmp_path / "s", {2: Order("end")})
    assert 0 < len(records.finished) < 6
    assert not records.in_flight
    later = drive(tmp_path / "s", {})
    assert len(later.finished) == 6
    assert all(later.finished[digest] == run for digest, run in records.finished.items())


def test_a_point_that_is_asked_for_is_trained_next_beside_the_trials(tmp_path: Path) -> None:
    rows = [row for row in TABLE.rows.values() if row.outcome.trial.seed == 0]
    row = rows[len(rows) // 2]
    records = drive(tmp_path / "s", {1: Order("try", point=row.params)})
    assert row.outcome.digest in records.finished
    assert len(records.finished) == 7
    assert records.params_of(row.outcome.digest) == row.params
    again = drive(tmp_path / "s", {}, trials=7)
    assert len(again.finished) == 7, "a rerun counts it"


@pytest.mark.parametrize(
    ("point", "reason"),
    [
        ({"allocator": "seive"}, "did you mean 'sieve'"),
        ({"allocator": "sieve", "nonsense": 1}, "unknown knob of sieve"),
        ({"allocator": "sieve", "rank": 10**6}, "choose from 16, 2, 4"),
        ({"allocator": "sieve", "lora_alpha": 32.0}, "is fixed for the whole study"),
    ],
)
def test_a_point_that_cannot_be_is_refused_with_the_reason(tmp_path: Path, point: Any, reason: str) -> None:
    records = drive(tmp_path / "s", {1: Order("try", point=point)}, trials=3, pins={"lora_alpha": 64.0})
    [refused] = records.orders
    assert refused.answer.startswith("refused: ")
    assert reason in refused.answer
    assert len(records.finished) == 3


def test_what_comes_too_early_too_late_or_for_nothing_is_refused(tmp_path: Path) -> None:
    unknown = Order("stop", digest="0123456789abcdef")
    records = drive(tmp_path / "s", {0: Order("end"), 1: unknown}, trials=3)
    assert [one.answer for one in records.orders] == [
        "refused: the study was not running",
        "refused: it is not running",
    ]
    assert len(records.finished) == 3


def test_the_page_is_written_while_the_study_runs_and_not_more_often_than_is_cheap(tmp_path: Path) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0  # a page takes a second
        return now[0]

    with open_study(tmp_path / "s") as study:
        page = RunningPage(study, clock=clock)
        times = []
        for _ in range(200):
            (study.folder / "report.html").unlink(missing_ok=True)
            page()
            if (study.folder / "report.html").exists():
                times.append(now[0])
                assert data_of(study.folder)["live"]["runs"]
        assert all(late - soon >= 20 for soon, late in pairwise(times))
        assert len(times) > 3


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["process", "ray"])
def test_a_real_study_obeys(tmp_path: Path, workers: str) -> None:
    command = [sys.executable, "-m", "search.run", "space=sieve", "trials=5", f"workers={workers}", "recipe.steps=15"]
    command += [
        f"storage={tmp_path}",
        "name=s",
        "limit=20",
        "evaluations=5",
        "untrained=false",
        "calibration_samples=16",
    ]
    command += ["num_cpus=2"] if workers == "ray" else []
    driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    folder = tmp_path / "s"

    def until(condition: Any) -> Any:
        for _ in range(3_000):
            if (folder / "study.json").exists() and (found := condition(read(folder))):
                return found
            assert driver.poll() is None, driver.communicate()[0]
            time.sleep(0.1)
        raise AssertionError("it never came")

    try:
        started = until(lambda records: records.in_flight)
        orders.give(folder, Order("stop", digest=started[0][0].digest))
        orders.give(folder, Order("try", point={"allocator": "greedy", "fraction": 0.5}))
        until(lambda records: len(records.orders) == 2)
        until(lambda records: len(records.finished) >= 2)
        orders.give(folder, Order("end"))
        printed, _ = driver.communicate(timeout=600)
    finally:
        driver.terminate()
        driver.wait()
    assert driver.returncode == 0, printed
    records = read(folder)
    assert [one.order.do for one in records.orders] == ["stop", "try", "end"]
    assert records.finished[started[0][0].digest].status in ("stopped", "complete")
    assert any(run.trial.allocator == "greedy" and run.status == "complete" for run in records.finished.values())
    assert len(records.finished) < 6
    assert not records.in_flight


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "an order is one of stop, try, end, got None"),
        ({"do": ["stop"]}, "an order is one of"),
        ({"do": "stop"}, "digest must be 16 hex digits, got None"),
        ({"do": "stop", "digest": "../../x"}, "digest must be 16 hex digits"),
        ({"do": "try"}, "has no knobs"),
        ({"do": "try", "point": {"rank": {"a": 1}}}, "point.rank must be"),
        ([], "order must be a mapping"),
    ],
)
def test_what_is_no_order_is_said_in_words(given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        Order.from_json(given)
