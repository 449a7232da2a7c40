"""MLflow says what the records say: after a study, after kill -9, with two studies at once, after an outage."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from allocators.core.errors import StudyError
from allocators.core.types import FINISHED, Score, digest_of
from search import report
from search.records import saved_view, tracking
from search.records.folder import StudyFolder
from search.records.tracking import Tracker
from tests import ROOT
from tests.browser import Browser, needs_browser
from tests.search.studies import CONFIG, open_study, outcome, rung, selection, started


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: making its tables takes seconds, copying it none."""
    folder = tmp_path_factory.mktemp("mlflow")
    tracking._make_database(f"sqlite:///{folder}/mlflow.db", own=True)
    return folder / "mlflow.db"


@pytest.fixture
def store(schema: Path, tmp_path: Path) -> Path:
    shutil.copy(schema, tmp_path / "mlflow.db")
    return tmp_path


def open_tracker(folder: Path, uri: str | None = None, *, experiment: str = "sieve", name: str = "demo") -> Tracker:
    return Tracker.open(uri, folder, experiment=experiment, study_name=name, tags={"model": "tiny-moe"}, params=CONFIG)


def write(study: StudyFolder, tracker: Tracker, points: int, *, first: int = 0) -> None:
    """A study's driver in small: records first, then MLflow."""
    for number in range(first, first + points):
        done = outcome(selection(1 + number % 16, seed=number), accuracy=0.4 + number / 100, seed=number)
        study.append_started(started(done), {"number": number})
        tracker.started(started(done))
        for entry in done.rungs:
            study.append_rung(done.digest, entry)
            tracker.rung(done.digest, entry)
        study.append_finished(done, {"number": number})
        tracker.finished(done)


def runs(folder: Path, uri: str | None = None) -> tuple[MlflowClient, list[Run], list[Run]]:
    """All runs: parents, and children by digest."""
    client = MlflowClient(tracking_uri=uri or f"sqlite:///{folder}/mlflow.db")
    everything = client.search_runs([e.experiment_id for e in client.search_experiments()], max_results=1000)
    parents = [run for run in everything if "digest" not in run.data.tags]
    children = [run for run in everything if "digest" in run.data.tags]
    return client, parents, children


def loud(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Who warned, apart from urllib3's line about its one retry."""
    return [r.name for r in caplog.records if r.levelno >= logging.WARNING and not r.name.startswith("urllib3")]


def check(folder: Path, study: StudyFolder, uri: str | None = None) -> None:
    """One parent, one child a digest, each with the accuracies of its rungs once, its allocation and its end."""
    client, parents, children = runs(folder, uri)
    [parent] = [run for run in parents if run.data.tags["study_id"] == study.header["id"]]
    mine = [run for run in children if run.data.tags["mlflow.parentRunId"] == parent.info.run_id]
    assert Counter(run.data.tags["digest"] for run in mine) == Counter(list(study.outcomes))
    for run in mine:
        done = study.outcomes[run.data.tags["digest"]]
        assert run.data.tags["status"] == done.status
        assert run.info.status == ("FINISHED" if done.status in ("complete", "stopped") else "FAILED")
        history = client.get_metric_history(run.info.run_id, "accuracy") if done.rungs else []
        assert [(m.step, m.value) for m in history] == [(r.step, r.accuracy) for r in done.rungs]
        assert run.data.metrics["trainable_params"] == done.trainable_params
        scores = client.get_metric_history(run.info.run_id, "test_accuracy") if done.test else []
        assert [m.value for m in scores] == ([done.test.accuracy] if done.test else [])
        assert ("test_accuracy" in run.data.metrics) == (done.test is not None)
        assert run.data.params["recipe.rank"] == str(done.trial.recipe.rank)
        saved = json.loads(Path(client.download_artifacts(run.info.run_id, "allocation.json")).read_text())
        assert saved == done.trial.allocation.to_json()


def test_the_saved_view_shows_the_runs_of_the_study_and_the_link_opens_it(store: Path) -> None:
    with open_study(store / "demo") as study:
        tracker = open_tracker(store)
        assert tracker.browse == f"mlflow ui --backend-store-uri sqlite:///{store}/mlflow.db"
        tracker.sync(study)
        write(study, tracker, 3)
        tracker.close()
    client, [parent], _ = runs(store)
    key, experiment = study.header["id"], client.get_experiment(parent.info.experiment_id)
    tag = experiment.tags[f"mlflow.sharedViewState.{key}"]
    assert json.loads(tag)["name"] == "demo"
    view = saved_view.unpacked(tag)
    assert view["searchFilter"] == f"tags.mlflow.parentRunId = '{parent.info.run_id}'"
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`accuracy`", False)
    shown = {"metrics.`accuracy`", "metrics.`trainable_params`", "params.`knobs.fraction`", "params.`recipe.rank`"}
    assert shown <= set(view["selectedColumns"])
    [chart] = view["compareRunCharts"]
    assert (chart["type"], chart["xaxis"]["key"], chart["yaxis"]["key"]) == (
        "SCATTER",
        "log10_trainable_params",
        "accuracy",
    )
    assert chart["metricSectionId"] in {section["uuid"] for section in view["compareRunSections"]}
    assert tracker.browse.endswith(
        f"http://127.0.0.1:5000/#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning"
        f"&compareRunsMode=CHART&viewStateShareKey={key}"
    )


def test_a_view_with_many_knobs_fits_mlflows_tag() -> None:
    names = [f"params.`knobs.{digest_of({'n': n})}`" for n in range(400)]
    tag = saved_view.saved_view(parent="p" * 32, name="n", created=0, columns=names)
    assert len(tag) < 5_000
    assert saved_view.unpacked(tag)["selectedColumns"][:5] == [*saved_view.COLUMNS, names[0]]


def test_the_front_and_the_knee_are_tagged_until_they_are_beaten(store: Path) -> None:
    def tagged(name: str) -> set[str]:
        return {run.data.tags["digest"] for run in runs(store)[2] if run.data.tags.get(name) == "true"}

    with open_study(store / "demo") as study:
        tracker = open_tracker(store)
        tracker.sync(study)
        for count, accuracy in ((2, 0.3), (6, 0.55), (12, 0.56), (9, 0.2)):
            done = outcome(selection(count), accuracy=accuracy)
            study.append_finished(done, {})
            tracker.finished(done)
        assert tagged("front") == {member.best.digest for member in study.points.front}
        assert len(tagged("front")) == 3
        assert tagged("knee") == {outcome(selection(6)).digest}
        again = open_tracker(store)
        again.sync(study)
        better = outcome(selection(5), accuracy=0.6)
        study.append_finished(better, {})
        again.finished(better)
        assert tagged("front") == {outcome(selection(2)).digest, better.digest}
        assert tagged("knee") == set()


def test_data_sets_are_inputs_and_the_words_are_the_description(store: Path) -> None:
    evil = "<img src=x onerror=alert(1)> | [a](javascript:b) `c` **d**"
    with open_study(store / "demo") as study:
        tracker = open_tracker(store)
        tracker.sync(study)
        for number, allocator in enumerate(("sieve", evil)):
            done = outcome(selection(2 + number), accuracy=0.4 + number / 10, allocator=allocator)
            done = done.updated(versions={"data": "a1", "test_data": "b2"})
            study.append_finished(done, {})
            tracker.finished(done)
        tracker.close(report.write(study.folder))
    [parent] = runs(store)[1]
    assert parent.inputs is not None
    inputs = {one.dataset.digest: one for one in parent.inputs.dataset_inputs}
    assert {digest: one.dataset.name for digest, one in inputs.items()} == {
        "a1": "shift, training",
        "b2": "shift, evaluation",
    }
    assert inputs["b2"].tags[0].value == "evaluation"
    note = parent.data.tags["mlflow.note.content"]
    assert "Most accurate" in note
    assert "| id | trainable parameters |" in note
    assert r"\<img" in note, "names are text in Markdown"
    assert not re.search(r"(?<!\\)(<img|\[a\]|`c)", note)


@needs_browser  # eight CPU seconds: MLflow's own app in one process, without its command and its job runners
def test_mlflows_own_page_draws_as_many_points_as_the_study_has(store: Path) -> None:
    with open_study(store / "demo") as study:
        tracker = open_tracker(store)
        tracker.sync(study)
        write(study, tracker, 16)
        tracker.close()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # as `mlflow server` starts it
    names = {"_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{store}/mlflow.db", "_MLFLOW_SGI_NAME": "uvicorn"}
    environment = os.environ | names | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [sys.executable, "-m", "uvicorn", "--port", str(port), "mlflow.server.fastapi_app:app"]
    quiet = subprocess.DEVNULL
    server = subprocess.Popen(command, stdout=quiet, stderr=quiet, start_new_session=True, env=environment)
    try:
        wait_for(f"http://127.0.0.1:{port}")
        address = tracker.browse.rpartition(" ")[2].replace(":5000/", f":{port}/")
        with Browser(width=1400, height=1000) as page:
            page.open(address)
            assert page.wait("document.querySelectorAll('.scatterlayer .point').length") == 16
            page.open(address.replace("&compareRunsMode=CHART", ""))
            shown = page.wait("document.querySelector('[role=grid], .ag-root') && document.body.innerText")
            page.wait("document.body.innerText.includes('knobs.fraction')")
            assert "accuracy" in shown
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def test_a_study_and_its_rerun(store: Path) -> None:
    with open_study(store / "demo") as study:
        tracker = open_tracker(store)
        tracker.sync(study)
        write(study, tracker, 3)
        lost = outcome(selection(7)).updated(
            status="failed", accuracy=None, rungs=(), message="worker lost", adapter=""
        )
        study.append_finished(lost, {})
        tracker.finished(lost)
        (store / "front.csv").write_text("a,b\n")
        tracker.close(SimpleNamespace(metrics={"hypervolume": 0.5}, files=[store / "front.csv"], description="- words"))
        check(store, study)
    client, [parent], _ = runs(store)
    assert (parent.info.status, parent.info.run_name) == ("FINISHED", "demo")
    assert parent.data.metrics == {"hypervolume": 0.5}
    assert parent.data.params["space"] == "sieve"
    assert [f.path for f in client.list_artifacts(parent.info.run_id, "report")] == ["report/front.csv"]

    with open_study(store / "demo") as study:  # the same command again, with more trials
        tracker = open_tracker(store)
        tracker.sync(study)
        write(study, tracker, 2, first=10)
        tracker.sync(study)
        tracker.close()
        check(store, study)


def test_sync_writes_a_whole_study_from_its_records(store: Path) -> None:
    with open_study(store / "demo") as study:
        for number, status in enumerate(FINISHED):
            done = outcome(selection(number + 1), status=status, message="because" if status == "failed" else "")
            study.append_finished(done, {})
        cut = outcome(selection(9))
        study.append_started(started(cut), {})
        tracker = open_tracker(store)
        tracker.sync(study)
        study.append_finished(cut, {})
        tracker.sync(study)
        check(store, study)


def test_scores_on_the_test_split_are_logged_once_whenever_they_came(store: Path) -> None:
    first, second, third = (outcome(selection(number)) for number in (1, 2, 3))
    score = Score(0.75, 0.02, {"mine+yours": {"accuracy": 0.5, "stderr": 0.01}})
    with open_study(store / "demo") as study:
        tracker = open_tracker(store)
        tracker.sync(study)
        for done in (first, second, third):
            study.append_finished(done, {})
            tracker.finished(study.outcomes[done.digest])
        study.append_tested(first.digest, score)
        tracker.tested(study.outcomes[first.digest])
        tracker.tested(study.outcomes[first.digest])
        study.append_tested(second.digest, score)  # and the driver is killed before it says so
    with open_study(store / "demo") as study:
        tracker = open_tracker(store)
        tracker.sync(study)
        tracker.sync(study)
        tracker.close()
        check(store, study)
    _, _, children = runs(store)
    assert sorted(run.data.metrics.get("test_stderr.mine-yours", 0.0) for run in children) == [0.0, 0.01, 0.01]


def test_the_accuracy_of_every_task_is_a_metric(store: Path) -> None:
    done = outcome()
    by_task = {"arc_easy": {"accuracy": 0.25, "stderr": 0.01}, "mine+yours": {"accuracy": 0.75, "stderr": 0.02}}
    with open_study(store / "demo") as study:
        study.append_finished(done.updated(rungs=tuple(replace(entry, by_task=by_task) for entry in done.rungs)), {})
        tracker = open_tracker(store)
        tracker.sync(study)
        check(store, study)
    client, _, [child] = runs(store)
    history = client.get_metric_history(child.info.run_id, "accuracy.arc_easy")
    assert [(m.step, m.value) for m in history] == [(rung.step, 0.25) for rung in done.rungs]
    assert child.data.metrics["accuracy.mine-yours"] == 0.75  # MLflow takes no plus
    assert child.data.metrics["stderr.mine-yours"] == 0.02


def test_what_still_runs_when_a_study_is_interrupted_is_killed(store: Path) -> None:
    with open_study(store / "demo") as study:
        tracker = open_tracker(store)
        tracker.sync(study)
        begun = started(outcome())
        study.append_started(begun, {})
        tracker.started(begun)
        study.append_rung(begun.digest, rung(30, 0.2))
        tracker.rung(begun.digest, rung(30, 0.2))
        tracker.close(status="KILLED")
        _, [parent], [child] = runs(store)
        assert (parent.info.status, child.info.status) == ("KILLED", "KILLED")
        # resumed: from its checkpoint it passes the rung again
        study.append_finished(outcome(), {})
        again = open_tracker(store)
        again.sync(study)
        assert runs(store)[1][0].info.status == "RUNNING"
        client, _, [child] = runs(store)
        values = [(m.step, m.value) for m in client.get_metric_history(child.info.run_id, "accuracy")]
        assert values[0] == (30, 0.2)
        assert len(values) == 3
        assert child.info.status == "FINISHED"


class CutOff(BaseException):
    """As a kill it passes by every `except Exception`."""


class Client:
    """MLflow's own, until it is asked for more than so many things."""

    def __init__(self, client: MlflowClient, calls: int) -> None:
        self._client, self._calls = client, calls

    def __getattr__(self, name: str) -> Any:
        if self._calls == 0:
            raise CutOff
        self._calls -= 1
        return getattr(self._client, name)


def limited(tracker: Tracker, calls: int) -> Callable[[], None]:
    """As the tracker's own `_connect`, and then so many calls."""

    def connect() -> None:
        tracker._client = cast(MlflowClient, Client(tracker._client, calls))

    return connect


def test_cut_off_before_any_call_to_mlflow_the_next_run_makes_up_for_it(store: Path) -> None:
    for calls in itertools.count():
        with open_study(store / f"study{calls}") as study:
            cut, done = open_tracker(store, name=f"study{calls}"), outcome()
            cut._connect()
            cut._connect = limited(cut, calls)  # type: ignore[method-assign]
            study.append_finished(done, {})
            try:
                cut.sync(study)
            except CutOff:
                whole = False
            else:
                whole = True
            open_tracker(store, name=f"study{calls}").sync(study)
            check(store, study)
        if whole:
            break
    assert calls > 8


WRITER = """
import sys
from pathlib import Path
from tests.search.records.test_tracking import open_study, open_tracker, write
folder = Path(sys.argv[1])
study, tracker = open_study(folder / "other"), open_tracker(folder, name="other")
tracker.sync(study)
for number in range(1000):
    write(study, tracker, 1, first=number)
    print(number, flush=True)
"""


def test_two_studies_write_at_once_and_one_is_killed(store: Path) -> None:
    """Two processes, one sqlite file; then kill -9 of one, and its resume: nothing twice, nothing missing."""
    errors = (store / "errors").open("w+")
    other = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(store)], cwd=ROOT, stdout=subprocess.PIPE, stderr=errors
    )
    try:
        assert other.stdout is not None
        other.stdout.readline()  # it writes
        with open_study(store / "demo") as study:
            tracker = open_tracker(store)
            tracker.sync(study)
            write(study, tracker, 4)
            tracker.close()
            check(store, study)
            assert not tracker._down
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    errors.seek(0)
    assert "fails" not in errors.read()
    with open_study(store / "other") as study:
        tracker = open_tracker(store, name="other")
        tracker.sync(study)
        for unfinished, _ in study.in_flight:
            study.append_finished(unfinished.updated(status="failed", rungs=()), {})
        tracker.sync(study)
        _, parents, _ = runs(store)
        assert len(parents) == 2
        check(store, study)
        assert "complete" in {o.status for o in study.finished.values()}


def test_an_outage_is_warned_about_once_and_made_up_for(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_study(store / "demo") as study:
        tracker = open_tracker(store)
        tracker.sync(study)
        write(study, tracker, 1)
        (store / "mlflow.db").rename(store / "away")
        (store / "mlflow.db").mkdir()  # no database can be opened here
        write(study, tracker, 2, first=5)
        assert loud(caplog) == ["search.records.tracking"]
        assert "goes on without it" in caplog.text
        assert len(study.finished) == 3
        (store / "mlflow.db").rmdir()
        (store / "away").rename(store / "mlflow.db")
        tracker.sync(study)
        tracker.close()
        check(store, study)


def test_a_server_that_is_down_is_one_line_and_no_password(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open_study(tmp_path / "demo") as study:
        tracker = open_tracker(tmp_path, f"http://me:hunter2@127.0.0.1:{port}")
        tracker.sync(study)
        write(study, tracker, 2)
        tracker.sync(study)
        tracker.close()
        assert len(study.finished) == 2
    [line] = [record.getMessage() for record in caplog.records if record.name == "search.records.tracking"]
    assert re.search(r"fails \(.*refused.*the study goes on without it", line)
    assert "hunter2" not in line
    assert "\n" not in line


# --- databases that are missing, half made, damaged, old or replaced

STARTER = """
import sys
from pathlib import Path
from tests.search.records.test_tracking import open_study, open_tracker, write
folder, name = Path(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
with open_study(folder / name) as study:
    tracker = open_tracker(folder, name=name)
    tracker.sync(study)
    write(study, tracker, 1)
    tracker.close()
    print("down" if tracker._down else "wrote", flush=True)
"""


@pytest.mark.slow
def test_studies_that_start_at_once_on_a_new_folder_all_have_their_runs(tmp_path: Path) -> None:
    names = ("one", "two")
    starters = [
        subprocess.Popen(
            [sys.executable, "-c", STARTER, str(tmp_path), name],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in names
    ]
    for starter in starters:
        assert starter.stdout is not None
        assert starter.stdout.readline() == "ready\n"
    assert [starter.communicate("go\n")[0] for starter in starters] == ["wrote\n"] * len(names)
    for name in names:
        with open_study(tmp_path / name) as study:
            check(tmp_path, study)
    left = {file.name for file in tmp_path.iterdir()} - {*names, "mlflow-artifacts", ".mlflow.db.lock"}
    assert left == {"mlflow.db"}


def half_made(file: Path) -> None:
    """As MLflow leaves it where the disk is full: tables, and no word of the version that they are of."""
    with closing(sqlite3.connect(file)) as database:
        database.execute("DELETE FROM alembic_version")
        database.execute("DROP TABLE params")
        database.commit()


def garbage(file: Path) -> None:
    file.write_bytes(b"no database" * 1_000)


def tables_of_its_own(file: Path) -> None:
    file.unlink()
    with closing(sqlite3.connect(file)) as database:
        database.execute("CREATE TABLE runs (id INTEGER)")
        database.commit()


@pytest.mark.parametrize("harm", [half_made, garbage])
def test_a_database_that_is_no_good_is_made_anew(
    harm: Callable[[Path], object], store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    harm(store / "mlflow.db")
    with open_study(store / "demo") as study:
        tracker = open_tracker(store)
        tracker.sync(study)
        write(study, tracker, 2)
        tracker.close()
        check(store, study)
    damaged = [file.name for file in store.glob("mlflow.db.damaged-*")]
    assert len(damaged) == len(loud(caplog)) == (harm is garbage)


@pytest.mark.parametrize("harm", [garbage, tables_of_its_own])
def test_a_file_of_somebody_elses_is_left_as_it_is(
    harm: Callable[[Path], object], store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    harm(store / "mlflow.db")
    theirs = (store / "mlflow.db").rename(store / "theirs.db")
    before = theirs.read_bytes()
    with open_study(store / "demo") as study:
        open_tracker(store, f"sqlite:///{theirs}").sync(study)
    if harm is garbage:
        assert theirs.read_bytes() == before
    else:
        with closing(sqlite3.connect(theirs)) as database:
            assert database.execute("SELECT COUNT(*) FROM runs").fetchone() == (0,)
            assert [column[1] for column in database.execute("PRAGMA table_info(runs)")] == ["id"]
    assert loud(caplog) == ["search.records.tracking"]


def test_a_database_that_cannot_be_opened_is_said_at_once_and_no_study_waits_for_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"it waits {seconds} s"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for number, place in enumerate(("folder", "file/below.db")):
        with open_study(tmp_path / f"demo{number}") as study:
            tracker = open_tracker(tmp_path, f"sqlite:///{tmp_path / place}")
            tracker.sync(study)
            write(study, tracker, 1)
            tracker.sync(study)
            tracker.close()
            assert len(study.finished) == 1
        lines = [record.getMessage() for record in caplog.records if record.name == "search.records.tracking"]
        assert len(lines) == number + 1
        assert "\n" not in lines[-1]
        assert "the study goes on without it" in lines[-1]


def empty_again(store: Path, schema: Path) -> None:
    """As a server that was started again with another database: the file is written over."""
    shutil.copyfile(schema, store / "mlflow.db")


def deleted(store: Path, schema: Path) -> None:
    del schema
    (store / "mlflow.db").unlink()


def replaced(store: Path, schema: Path) -> None:
    (store / "mlflow.db").unlink()
    shutil.copyfile(schema, store / "mlflow.db")


def old_copy(store: Path, schema: Path) -> None:
    del schema
    shutil.copyfile(store / "old.db", store / "mlflow.db")


@pytest.mark.parametrize(
    ("how", "when"),
    [
        (deleted, "in the run"),
        (old_copy, "in the run"),
        (replaced, "in the run"),
        (empty_again, "between runs"),
        (old_copy, "between runs"),
        (empty_again, "in the run, and then it is killed"),
        (old_copy, "in the run, and then it is killed"),
    ],
)
def test_whatever_becomes_of_the_database_the_mirror_is_made_whole(
    how: Callable[[Path, Path], None], when: str, store: Path, schema: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_RETRY_SECONDS", 0.0)
    with open_study(store / "demo") as study:
        tracker = open_tracker(store)
        tracker.sync(study)
        write(study, tracker, 1)
        shutil.copyfile(store / "mlflow.db", store / "old.db")
        write(study, tracker, 1, first=3)
        cut, late = outcome(selection(8)), outcome(selection(9))
        for begun in (cut, late):
            study.append_started(started(begun), {})
            tracker.started(study.outcomes[begun.digest])
        if when != "between runs":
            how(store, schema)
        for entry in late.rungs:
            study.append_rung(late.digest, entry)
            tracker.rung(late.digest, entry)
        study.append_finished(late, {})
        tracker.finished(study.outcomes[late.digest])
        if when == "in the run":
            study.append_finished(cut, {})
            tracker.finished(study.outcomes[cut.digest])
            tracker.sync(study)
            tracker.close()
            check(store, study)
            [parent] = runs(store)[1]
            assert parent.info.status == "FINISHED"
            return
        tracker.close(status="KILLED")
        if when != "between runs":
            assert {run.info.status for run in runs(store)[1]} == {"KILLED"}
    if when == "between runs":
        how(store, schema)
    with open_study(store / "demo") as study:
        study.append_finished(cut, {})
        tracker = open_tracker(store)
        tracker.sync(study)
        tracker.close()
        check(store, study)
        assert [run.info.status for run in runs(store)[1]] == ["FINISHED"]


@pytest.mark.parametrize("uri", ["nonsense://x", "./mlruns"])
def test_a_uri_that_cannot_work_is_one_line(tmp_path: Path, uri: str) -> None:
    with pytest.raises(StudyError, match="does not work") as raised:
        open_tracker(tmp_path, uri)
    assert "\n" not in str(raised.value)


def test_a_deleted_experiment_is_one_line(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    open_tracker(store)._connect()
    client = MlflowClient(tracking_uri=f"sqlite:///{store}/mlflow.db")
    experiment = client.get_experiment_by_name("sieve")
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    with open_study(store / "demo") as study:
        open_tracker(store).sync(study)
    assert "was deleted: restore it with" in caplog.text


def test_a_folder_with_spaces_and_accents(schema: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my studies é"
    folder.mkdir()
    shutil.copy(schema, folder / "mlflow.db")
    with open_study(folder / "demo") as study:
        tracker = open_tracker(folder)
        tracker.sync(study)
        write(study, tracker, 1)
        check(folder, study)


def test_passwords_stay_out(store: Path) -> None:
    params = CONFIG | {"tracking_uri": "http://me:hunter2@host", "recipe": {"rank": 8}}
    with open_study(store / "demo") as study:
        tracker = Tracker.open(None, store, experiment="e", study_name="s", tags={}, params=params)
        tracker.sync(study)
    _, [parent], _ = runs(store)
    assert parent.data.params["tracking_uri"] == "http://***@host"
    assert parent.data.params["recipe.rank"] == "8"


def wait_for(server: str) -> None:
    """Until a server of MLflow answers."""
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{server}/health", timeout=1).close()
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise AssertionError(f"{server} does not answer")


@pytest.mark.slow
def test_a_server_that_goes_away_and_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    (tmp_path / "server").mkdir()

    def serve() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)]
        command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server/mlflow.db"]
        command += ["--artifacts-destination", str(tmp_path / "server" / "artifacts")]
        quiet = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (tmp_path / "server.log").open("a") as output:
            server = subprocess.Popen(command, env=quiet, stdout=output, stderr=output, start_new_session=True)
        wait_for(uri)
        return server

    def end(server: subprocess.Popen[bytes]) -> None:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()

    server = serve()
    try:
        with open_study(tmp_path / "demo") as study:
            tracker = open_tracker(tmp_path, uri)
            tracker.sync(study)
            write(study, tracker, 2)
            end(server)
            write(study, tracker, 2, first=5)
            assert loud(caplog) == ["search.records.tracking"]
            server = serve()
            tracker.sync(study)
            tracker.close()
            check(tmp_path, study, uri)
            assert capfd.readouterr().out == ""
    finally:
        end(server)


def test_the_command_to_browse_the_runs_is_one_word_for_a_shell(store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "it's #1"
    shutil.copytree(store, folder)
    *_, place = shlex.split(open_tracker(folder).browse)
    assert place == f"sqlite:///{folder / 'mlflow.db'}"
