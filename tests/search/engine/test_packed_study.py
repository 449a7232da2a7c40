"""One real study whose trainings share a worker's passes and pause at rungs: each is what it is alone.

python -m pytest tests/search/engine/test_packed_study.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from allocators.core.errors import ToolkitError
from allocators.core.messages import TrainJob
from allocators.core.types import Outcome, Rung
from search.records import Records, read
from tests.trainers.conftest import worker_setup
from trainers.worker_state import WorkerState

TRIALS, QUESTIONS, STEPS = 6, 24, 9
WORDS = [
    "space=sieve",
    "sampler=random",
    "max_concurrent=1",
    "pack=4",
    f"limit={QUESTIONS}",
    "calibration_samples=16",
    "evaluations=3",
    "recipe.batch_size=4",
    "keep=all",
    "forgetting=held_out",
]


pytestmark = pytest.mark.slow  # Ray studies: what a pack computes is tested without Ray (tests/trainers/)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Records:
    storage = tmp_path_factory.mktemp("studies")
    words = [*WORDS, "scheduler=pareto_halving", f"trials={TRIALS}", f"recipe.steps={STEPS}", f"storage={storage}"]
    command = [sys.executable, "-m", "search.run", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=os.environ | {"COLUMNS": "150"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 worker(s) that train up to 4 trials in one pass, 1 CPU each" in done.stdout
    assert f"{TRIALS} of {TRIALS} finished" in done.stdout
    return read(storage / "sieve-tiny-moe-default")


def test_trainings_shared_passes_and_paused_and_ended_by_themselves(study: Records) -> None:
    outcomes = list(study.finished.values())
    assert {outcome.status for outcome in outcomes} == {"complete", "stopped"}
    # how many meet in a pass depends on when they are proposed
    assert 1 < max(outcome.pack for outcome in outcomes) <= 4
    assert all(outcome.rungs[-1].step == STEPS for outcome in outcomes if outcome.status == "complete")


def test_each_is_what_it_is_alone(study: Records, tmp_path: Path) -> None:
    """Losses but for rounding, accuracies but for the questions that rounding can flip."""
    setup = worker_setup(
        tmp_path,
        task="default",
        task_options={"limit": QUESTIONS},
        evaluations=3,
        calibration_samples=16,
        forgetting="held_out",
    )
    state = WorkerState(setup, "cpu")
    for outcome in study.finished.values():
        job = TrainJob(outcome.trial, outcome.trainable_params)
        alone = state.train(job, report=goes_on_until(outcome.rungs[-1].step))
        assert (alone.status, alone.tokens) == (outcome.status, outcome.tokens)
        losses = [[rung.loss for rung in one.rungs] for one in (outcome, alone)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # a token on the border of two experts may flip
        assert outcome.accuracy == pytest.approx(alone.accuracy, abs=1.01 / QUESTIONS)
        assert (outcome.forgetting is None) == (outcome.status == "stopped")
        if outcome.forgetting is not None:
            assert alone.forgetting is not None
            assert outcome.forgetting.after == pytest.approx(alone.forgetting.after, rel=1e-4)


def test_a_worker_killed_in_mid_pack_costs_nobody_a_training(tmp_path: Path) -> None:
    """`kill -9` of the process when two of its four trainings have passed a rung: all go on alone, and to their end."""
    command = [sys.executable, "-m", "search.run", *WORDS, "trials=4", "recipe.steps=30", f"storage={tmp_path}"]
    folder = tmp_path / "sieve-tiny-moe-default"
    killed: list[psutil.Process] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as driver:
        while driver.poll() is None and not killed:
            time.sleep(0.1)
            if sum(bool(outcome.rungs) for outcome in in_flight(folder)) > 1:
                killed = [p for p in psutil.Process(driver.pid).children(recursive=True) if "TrainWorker" in name_of(p)]
                for process in killed:
                    process.kill()
        printed, _ = driver.communicate(timeout=600)
    assert len(killed) == 1, printed
    assert driver.returncode == 0, printed
    outcomes = list(read(folder).finished.values())
    assert [outcome.status for outcome in outcomes] == ["complete"] * 4
    for outcome in outcomes:
        assert [rung.step for rung in outcome.rungs] == [10, 20, 30]
        assert outcome.tokens == outcome.rungs[-1].tokens  # nothing counted twice


def goes_on_until(last: int) -> Callable[[Rung], bool]:
    return lambda rung: rung.step < last


def in_flight(folder: Path) -> list[Outcome]:
    try:
        return [outcome for outcome, _ in read(folder).in_flight]
    except ToolkitError:  # not there yet
        return []


def name_of(process: psutil.Process) -> str:
    try:
        return str(process.name()) + " ".join(process.cmdline())
    except psutil.Error:  # it ended
        return ""
