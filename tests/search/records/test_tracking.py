"""MLflow says what the records say: after a study, after kill -9, with two studies at once, after an outage."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from allocators.core.errors import StudyError
from allocators.core.types import FINISHED, Score
from search.records.folder import StudyFolder
from search.records.tracking import Tracker
from tests import ROOT
from tests.search.studies import CONFIG, open_study, outcome, rung, selection, started


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: making its tables takes seconds, copying it none."""
    folder = tmp_path_factory.mktemp("mlflow")
    open_tracker(folder, experiment="Default").close()
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
        tracker.close(SimpleNamespace(metrics={"hypervolume": 0.5}, files=[store / "front.csv"]))
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
        tracker.started(begun)
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


def test_cut_off_before_any_call_to_mlflow_the_next_run_makes_up_for_it(store: Path) -> None:
    for calls in itertools.count():
        with open_study(store / f"study{calls}") as study:
            cut, done = open_tracker(store, name=f"study{calls}"), outcome()
            cut._client = cast(MlflowClient, Client(cut._client, calls))
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


def test_a_server_that_is_down_is_one_line_and_no_password(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(StudyError, match=r"does not work \(.*refused.*tracking_uri") as raised:
        open_tracker(tmp_path, f"http://me:hunter2@127.0.0.1:{port}")
    assert "hunter2" not in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("uri", ["nonsense://x", "./mlruns"])
def test_a_uri_that_cannot_work_is_one_line(tmp_path: Path, uri: str) -> None:
    with pytest.raises(StudyError, match="does not work") as raised:
        open_tracker(tmp_path, uri)
    assert "\n" not in str(raised.value)


def test_a_deleted_experiment_is_one_line(store: Path) -> None:
    open_tracker(store)
    client = MlflowClient(tracking_uri=f"sqlite:///{store}/mlflow.db")
    experiment = client.get_experiment_by_name("sieve")
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    with pytest.raises(StudyError, match="was deleted: restore it with"):
        open_tracker(store)


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
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=1).close()
            except OSError:
                time.sleep(0.5)
            else:
                return server
        raise AssertionError((tmp_path / "server.log").read_text()[-2000:])

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
