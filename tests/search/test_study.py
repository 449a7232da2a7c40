"""One real study through Ray Tune, Ray Train and MLflow: killed in the middle, resumed, checked to the last line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from allocators.core.types import ExpertSelection
from search.baselines import one_line
from search.records import LINES, Records, read

TRIALS, SEEDS = 6, 2
Story = tuple[Path, Records, str]  # the folder, what was in it when the driver was killed, the log of the second run

WORDS = [
    "space=sieve",
    "task=trainers/embedded/tasks/default.yaml",  # a relative path: workers run in another folder
    f"trials={TRIALS}",
    f"seeds={SEEDS}",
    "limit=24",
    "calibration_samples=16",
    "evaluations=3",
    "recipe.steps=9",
    "recipe.batch_size=4",
    "keep=all",
]


def lines(folder: Path) -> list[dict[str, Any]]:
    file = folder / LINES
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]


def run(storage: Path, log: Path, *more: str) -> subprocess.Popen[bytes]:
    own = [word for word in WORDS if not any(word.partition("=")[0] == other.partition("=")[0] for other in more)]
    with log.open("w") as output:
        command = [sys.executable, "-m", "search.run", *own, f"storage={storage}", *more]
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"COLUMNS": "150"})


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Starts a study, kills its driver with trials under way, runs the same command again."""
    storage = tmp_path_factory.mktemp("studies")
    folder = storage / "sieve-tiny-moe-default"
    driver = run(storage, storage / "first.log")
    try:
        deadline = time.monotonic() + 240
        while True:
            assert driver.poll() is None, (storage / "first.log").read_text()
            assert time.monotonic() < deadline, (storage / "first.log").read_text()
            events = Counter(line["event"] for line in lines(folder))
            done = {line["outcome"]["trial"]["digest"] for line in lines(folder) if line["event"] == "finished"}
            half = {line["digest"] for line in lines(folder) if line["event"] == "rung"} - done
            if events["finished"] >= 2 and half:
                break
            time.sleep(0.02)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    killed = read(folder)
    # the driver may die between the record of an end and the cleaning up after it: here it always has
    left_over = folder / "checkpoints" / next(iter(killed.finished))
    left_over.mkdir(parents=True, exist_ok=True)
    (left_over / "checkpoint.safetensors").write_bytes(b"left over")
    again = run(storage, storage / "second.log")
    assert again.wait(timeout=300) == 0, (storage / "second.log").read_text()
    return folder, killed, (storage / "second.log").read_text()


def test_nothing_is_trained_twice_and_nothing_is_lost(story: Story) -> None:
    folder, killed, _ = story
    finished = Counter(line["outcome"]["trial"]["digest"] for line in lines(folder) if line["event"] == "finished")
    assert set(finished.values()) == {1}
    assert set(killed.finished) <= set(finished)
    assert {outcome.digest for outcome, _ in killed.in_flight} <= set(finished)
    started = Counter(line["outcome"]["trial"]["digest"] for line in lines(folder) if line["event"] == "started")
    assert all(started[digest] == 1 for digest in killed.finished)


def test_the_front_is_repeated_with_another_seed_and_trials_count_alone(story: Story) -> None:
    from search.front import candidates, front

    folder, _, log = story
    finished = read(folder).finished
    seeds = Counter(outcome.trial.seed for outcome in finished.values())
    assert seeds[0] == TRIALS
    assert set(seeds) == {0, 1}
    members = front(candidates(finished.values()))
    assert all([run.trial.seed for run in member.runs] == [0, 1] for member in members)
    for first, again in (member.runs for member in members):
        assert first.trial.allocation == again.trial.allocation
        assert first.rungs[0].loss != again.rungs[0].loss, "another seed is another training"
    assert f"{TRIALS} of {TRIALS} finished · {seeds[1]} of {seeds[1]} repeats with other seeds" in log


def test_a_trial_that_was_cut_off_goes_on_from_its_checkpoint(story: Story) -> None:
    folder, killed, _ = story
    after = read(folder).finished
    cut_off = [outcome for outcome, _ in killed.in_flight if outcome.rungs]
    assert cut_off
    for outcome in cut_off:
        # wall clock is never the same twice: equal seconds mean that these steps were not trained again
        assert after[outcome.digest].rungs[0].seconds == outcome.rungs[0].seconds
        assert after[outcome.digest].rungs[-1].step == 9


def test_starting_points_come_first_and_every_count_is_exact(story: Story) -> None:
    folder, _, _ = story
    records = read(folder)
    outcomes = list(records.finished.values())
    assert {o.trial.allocator for o in outcomes} >= {"none", "all", "random", "sieve"}
    for outcome in outcomes:
        assert outcome.status == "complete"
        assert isinstance(outcome.trial.allocation, ExpertSelection)
        counted = outcome.trial.allocation.trainable_params(records.shape, rank=outcome.trial.recipe.rank)
        assert counted == outcome.trainable_params


def test_mlflow_has_one_parent_and_one_finished_child_a_trial(story: Story) -> None:
    from mlflow import MlflowClient

    folder, _, _ = story
    client = MlflowClient(f"sqlite:///{folder.parent}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "sieve-tiny-moe-default"]
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert len(parents) == 1
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parents[0].info.run_id}
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len({run.data.tags["point"] for run in children}) == TRIALS, "repeats have the tag of their point"
    accuracies = sorted(o.accuracy for o in read(folder).finished.values() if o.accuracy is not None)
    assert sorted(run.data.metrics["accuracy"] for run in children) == pytest.approx(accuracies)


def test_the_winner_loads_and_has_the_accuracy_that_was_reported(story: Story) -> None:
    from search.front import front
    from trainers import adapter, models, tasks

    folder, _, log = story
    records = read(folder)
    best = front(records.finished.values())[-1]
    assert "adapter.load(model" in log
    base = records.untrained
    assert base is not None
    on_test = base["test"]
    assert f"Untrained, the base has {on_test['accuracy']:.3f} ± {on_test['stderr']:.3f} on the test split" in log
    loaded = models.load("tiny-moe")
    place = records.adapter_of(best)
    assert place is not None
    attached = adapter.load(loaded.model, place)
    task = tasks.load_task("default", limit=24)
    task.prepare(loaded.tokenizer)
    assert task.evaluate(loaded.model).accuracy == best.accuracy
    assert attached.num_trainable == best.trainable_params
    task.test.prepare(loaded.tokenizer)
    assert best.test is not None
    assert task.test.evaluate(loaded.model).accuracy == best.test.accuracy


def test_the_front_and_the_one_line_recipes_have_a_score_on_the_test_split_and_others_none(story: Story) -> None:
    from mlflow import MlflowClient

    folder, killed, _ = story
    records = read(folder)
    assert not any(outcome.test for outcome in killed.outcomes.values()), "nothing is tested before the search is over"
    points = records.points
    judged = {*(c.point for c in points.front), *(c.point for c in one_line(points).values())}
    for candidate in points:
        assert {run.test is not None for run in candidate.complete} == {candidate.point in judged}
    client = MlflowClient(f"sqlite:///{folder.parent}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "sieve-tiny-moe-default"]
    logged = [run.data.metrics.get("test_accuracy") for run in client.search_runs([experiment.experiment_id])]
    tested = sorted(outcome.test.accuracy for outcome in records.finished.values() if outcome.test)
    assert sorted(accuracy for accuracy in logged if accuracy is not None) == pytest.approx(tested)
    assert len(tested) == sum(line["event"] == "tested" for line in lines(folder)), "each once"


def test_the_report_and_its_files_are_there(story: Story) -> None:
    folder, _, log = story
    for name in ("report.html", "front.csv", "front.png", "points.csv"):
        assert (folder / name).stat().st_size > 0
    assert f"{TRIALS} of {TRIALS} finished" in log
    assert "Traceback" not in log
    assert not list((folder / "checkpoints").glob("*")), "checkpoints of finished trials are deleted"


def test_the_same_command_once_more_trains_nothing(story: Story) -> None:
    folder, _, _ = story
    before = (folder / LINES).read_bytes()
    again = run(folder.parent, folder.parent / "third.log")
    assert again.wait(timeout=120) == 0
    assert (folder / LINES).read_bytes() == before
    assert "nothing to train" in (folder.parent / "third.log").read_text()


@pytest.mark.slow
def test_two_workers_a_trial_and_two_trials_at_once_end_on_four_logical_cpus(tmp_path: Path) -> None:
    """Where Tune's handles or Train's controllers took a CPU each, the second trial would wait for ever."""
    driver = run(tmp_path, tmp_path / "log", "workers_per_trial=2", "max_concurrent=2", "num_cpus=4", "seeds=1")
    try:
        assert driver.wait(timeout=500) == 0, (tmp_path / "log").read_text()
    finally:
        driver.kill()
    log = (tmp_path / "log").read_text()
    assert "2 trial(s) at once, 2 worker(s) each, 1 CPU a worker" in log
    assert f"{TRIALS} of {TRIALS} finished" in log
    assert {outcome.status for outcome in read(tmp_path / "sieve-tiny-moe-default").finished.values()} == {"complete"}
