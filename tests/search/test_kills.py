"""Real studies through Ray whose processes are killed, or that are ended by a signal. `tests/benchmarks/kills.py` draws
the moments at random.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from allocators.core.errors import StudyError
from search.records import read
from search.run import main
from tests.benchmarks.kills import events, of_role, processes_of, start
from tests.search.studies import open_study
from tests.search.test_lost import finished_lines


@pytest.fixture(autouse=True)
def _signals_are_heard() -> None:
    """What a shell starts in the background ignores SIGINT, and nohup SIGHUP; programs started from here would too."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


WORDS = "space=sieve trials=6 recipe.steps=40 recipe.batch_size=4 limit=24 calibration_samples=16 evaluations=4"
NAME = "killed"


def wait_for(driver: subprocess.Popen[bytes], log: Path, condition: Callable[[], Any]) -> Any:
    """What the condition gives, once it gives something."""
    deadline = time.monotonic() + 300
    while not (found := condition()):
        assert driver.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return found


def _has_lines(folder: Path, lines: int) -> bool:
    return events(folder) >= lines


def _role_of(driver: subprocess.Popen[bytes], role: str) -> list[psutil.Process]:
    return of_role(processes_of(driver), role)


def statuses(storage: Path) -> set[str]:
    """Of all of the study's runs in MLflow."""
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return {run.info.status for run in client.search_runs(experiments)}


@pytest.mark.slow
def test_whatever_is_killed_in_a_run_the_run_ends_well(tmp_path: Path) -> None:
    log, folder = tmp_path / "log", tmp_path / NAME
    driver = start(tmp_path, NAME, f"{WORDS} max_concurrent=1", log)
    try:
        for role, lines in (("controller", 3), ("queue", 8), ("tune", 13), ("worker", 18)):
            wait_for(driver, log, partial(_has_lines, folder, lines))
            (process, *_) = wait_for(driver, log, partial(_role_of, driver, role))
            process.kill()
        assert driver.wait(timeout=400) == 0, log.read_text()
    finally:
        driver.kill()
    records = read(folder)
    assert [outcome.status for outcome in records.finished.values()] == ["complete"] * 6
    assert set(finished_lines(folder).values()) == {1}
    assert statuses(tmp_path) == {"FINISHED"}
    said = log.read_text()
    assert "worker group 0 is started again" in said
    assert "the job queue died and is started again" in said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("phase", ["starting", "training"])
def test_a_signal_ends_a_study_in_order(phase: str, number: signal.Signals, tmp_path: Path) -> None:
    log, folder = tmp_path / "log", tmp_path / NAME
    driver = start(tmp_path, NAME, WORDS, log)
    try:
        if phase == "starting":
            wait_for(driver, log, lambda: of_role(processes_of(driver), "raylet"))
        else:
            wait_for(driver, log, lambda: len(read(folder).finished) > 0 if events(folder) else 0)
        seen = processes_of(driver)
        driver.send_signal(number)
        assert driver.wait(timeout=30) == 128 + number, log.read_text()
    finally:
        driver.kill()
    said = log.read_text()
    assert "the same command goes on where this one stopped" in said
    assert "SIGTERM received" not in said, "Ray's stack"
    assert statuses(tmp_path) <= {"KILLED", "FINISHED"}
    if phase == "training":
        assert "Pareto front" in said
        assert (folder / "report.html").exists()
    _, alive = psutil.wait_procs(seen, timeout=5)
    assert not alive


@pytest.mark.slow
def test_workers_that_die_while_they_load_end_the_study_with_the_memory(tmp_path: Path) -> None:
    log = tmp_path / "log"
    driver = start(tmp_path, NAME, f"{WORDS} max_concurrent=1", log)
    try:
        killed: set[int] = set()
        while driver.poll() is None:
            for process in of_role(processes_of(driver), "worker"):
                if process.pid not in killed:
                    killed.add(process.pid)
                    process.kill()
            time.sleep(0.1)
        assert driver.wait() == 2
    finally:
        driver.kill()
    (error,) = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert "it died 3 times without a report between" in error
    assert "GiB are free here" in error


@pytest.mark.slow
def test_nothing_of_a_driver_that_is_killed_at_its_start_outlives_it_by_five_seconds(tmp_path: Path) -> None:
    log = tmp_path / "log"
    driver = start(tmp_path, NAME, WORDS, log)
    try:
        wait_for(driver, log, lambda: of_role(processes_of(driver), "controller"))
        seen = processes_of(driver)
    finally:
        driver.kill()
    _, alive = psutil.wait_procs(seen, timeout=5)
    assert not alive


# --- without Ray


@pytest.mark.parametrize("name", ["checkpoints", "adapters"])
def test_a_file_where_workers_write_is_named_before_they_start(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / name).write_text("a file")
    assert main(["space=sieve", "trials=1", f"storage={tmp_path}", f"name={NAME}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: cannot write '{tmp_path}/{NAME}/{name}/")
    assert err.count("\n") == 1
    assert not read(tmp_path / NAME).outcomes


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_with_the_key_that_goes_on(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: Any, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StudyError, match=r"has no locks .*lock=false"):
        open_study(tmp_path)
    with open_study(tmp_path, lock=False) as study:
        assert not study.outcomes


SIGNALLED = """
import os, signal, sys, threading, time
from search import interrupts
with interrupts.watched():
    try:
        with interrupts.ending(lambda: print("reported", flush=True)):
            os.kill(os.getpid(), getattr(signal, sys.argv[1]))
            time.sleep(60)
    except KeyboardInterrupt:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # the end is in peace
            os.kill(os.getpid(), getattr(signal, name))
        print("ended", flush=True)
interrupts.leave(interrupts.exit_code())
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_the_first_signal_ends_in_order_and_later_ones_do_not_disturb(name: str, code: int) -> None:
    done = subprocess.run([sys.executable, "-c", SIGNALLED, name], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "reported\nended\n", "")


DEFERRED = """
import os, signal
from search import interrupts
with interrupts.watched():
    try:
        with interrupts.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            with interrupts.deferred():
                os.getpid()
            print("whole", flush=True)
        print("not here", flush=True)
    except KeyboardInterrupt:
        interrupts.leave(interrupts.exit_code())
"""


def test_what_must_not_be_cut_through_is_not() -> None:
    done = subprocess.run([sys.executable, "-c", DEFERRED], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (143, "whole\n")


STUCK = """
import signal
from search import interrupts
interrupts.PATIENCE, interrupts.LONGEST = 0.2, 5.0
with interrupts.watched(), interrupts.ending(lambda: print("reported", flush=True)):
    interrupts._now.note(signum=signal.SIGTERM)  # as if the main thread were in a library's code and heard of nothing
    signal.pause()
"""


def test_where_the_main_thread_does_not_come_back_another_one_ends_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (143, "reported\n")
