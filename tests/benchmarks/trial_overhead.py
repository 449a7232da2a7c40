"""What a trial costs besides its training: warm workers against one TorchTrainer per Tune trial.

    python -m tests.benchmarks.trial_overhead [trials=10]

Both ways run the same ten tiny trials (embedded model and task, two optimiser steps, one evaluation on eight
documents) one after another in one local Ray. Overhead of a trial = time between its result and the result before it,
minus the seconds its worker spent training and evaluating; in CPU-seconds: everything that this process and its
children used, divided by the trials, minus the same seconds (one thread). The first trial of each way pays for the
start (`start_seconds`) and is left out of the medians.

ratios   overhead_seconds   median overhead, one TorchTrainer per trial / warm
         overhead_cpu       the same in CPU-seconds
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from allocators.core.types import Outcome, Rung
from trainers.worker_state import WorkerSetup

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@dataclass
class Clock:
    """Results of one way: when each trial's result arrived, what its training took, CPU-seconds by then."""

    began: float
    arrived: list[float]
    trained: list[float]
    cpu: list[float]

    def start_seconds(self) -> float:
        return self.arrived[0] - self.began - self.trained[0]

    def overhead_seconds(self) -> list[float]:
        gaps = [later - earlier for earlier, later in itertools.pairwise(self.arrived)]
        return [gap - trained for gap, trained in zip(gaps, self.trained[1:], strict=True)]

    def overhead_cpu(self) -> list[float]:
        gaps = [later - earlier for earlier, later in itertools.pairwise(self.cpu)]
        return [gap - trained for gap, trained in zip(gaps, self.trained[1:], strict=True)]


class CpuWatch(threading.Thread):
    """CPU-seconds of this process and all its descendants, those that have ended included.

    Ray does not wait for its workers' exit codes, so their usage never reaches a parent: it is read while they live,
    several times a second, and the last reading of each process counts. What the reading itself takes does not.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._last: dict[tuple[int, float], float] = {}
        self._own = 0.0
        self._lock = threading.Lock()
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.2):
            self.seconds()

    def seconds(self) -> float:
        with self._lock:
            began = time.thread_time()
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    times = process.cpu_times()
                    self._last[process.pid, process.create_time()] = times.user + times.system
                except psutil.Error:
                    continue
            self._own += time.thread_time() - began
            return sum(self._last.values()) - self._own

    def __reduce__(self) -> tuple[Any, ...]:  # Tune pickles its callbacks; the copy is never asked
        return (CpuWatch, ())

    def stop(self) -> None:
        self._over.set()
        self.join()


def make_trials(count: int) -> list[tuple[Any, int]]:
    from allocators.core.shapes import shape_from_config
    from allocators.core.types import ExpertSelection, Recipe, Trial
    from trainers import models

    shape = shape_from_config(models.config_of("tiny-moe"), name="tiny-moe")
    selection = ExpertSelection(dict.fromkeys(shape.moe_layers, (0, 1)))
    recipe = Recipe(rank=4, steps=2, batch_size=4, micro_batch_size=4)
    trials = [Trial(selection, recipe, "tiny-moe", "default", seed) for seed in range(count)]
    return [(trial, selection.trainable_params(shape, rank=recipe.rank)) for trial in trials]


def setup(folder: Path) -> WorkerSetup:
    return WorkerSetup(
        model="tiny-moe",
        options={},
        task="default",
        task_options={"limit": 8},
        seed=0,
        evaluations=1,
        calibration_samples=8,
        cpus_per_worker=1,
        signals=str(folder / "signals"),
        adapters=str(folder / "adapters"),
        checkpoints=str(folder / "checkpoints"),
    )


def warm(trials: list[tuple[Any, int]], folder: Path, watch: CpuWatch) -> Clock:
    """Through the toolkit's own workers and Tune side."""
    from search.engine.groups import Resources
    from search.engine.workers import RayWorkers
    from search.problem import Proposal

    clock = Clock(time.monotonic(), [], [], [])
    waiting = [Proposal(trial, cost, {}) for trial, cost in trials]

    class Conductor:
        def propose(self) -> Proposal | None:
            return waiting.pop(0) if waiting else None

        def rung(self, digest: str, rung: Rung) -> bool:
            return True

        def finished(self, outcome: Outcome) -> None:
            assert outcome.status == "complete", outcome.message
            clock.arrived.append(time.monotonic())
            clock.trained.append(outcome.seconds)
            clock.cpu.append(watch.seconds())

        def lost(self, digest: str, reason: str, *, again: bool = True) -> None:
            raise RuntimeError(reason)

    workers = RayWorkers(
        Resources(len(trials), max_concurrent=1, gpus_per_worker=0.0),
        setup(folder),
        study="warm",
        notes=str(folder / "ray"),
        here=folder,
        logs=folder,
    )
    workers.start()
    workers.search(Conductor(), pausing=False)
    workers.close()
    return clock


def cold_loop(config: dict[str, Any]) -> None:
    """The Ray guide's pattern: every trial is a TorchTrainer of its own that loads model and task."""
    import ray.train
    from ray.train.torch import get_device

    from allocators.core.messages import TrainJob
    from allocators.core.types import Trial
    from trainers.worker_state import WorkerState

    trial = Trial.from_json(json.loads(config["trial"]))
    outcome = WorkerState(config["setup"], get_device()).train(
        TrainJob(trial, config["cost"]), report=lambda rung: True
    )
    Path(config["answer"]).write_text(json.dumps({"status": outcome.status, "seconds": outcome.seconds}))
    ray.train.report({"accuracy": outcome.accuracy})


def cold_trial(config: dict[str, Any]) -> None:
    config = config["case"]
    from ray import tune
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        cold_loop,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(storage_path=config["ray"]),
    ).fit()
    tune.report({"answer": config["answer"]})


def cold(trials: list[tuple[Any, int]], folder: Path, watch: CpuWatch) -> Clock:
    from ray import tune

    clock = Clock(time.monotonic(), [], [], [])

    class Watch(tune.Callback):
        def on_trial_complete(  # Tune's own signature
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            answer = json.loads(Path(trial.config["case"]["answer"]).read_text())
            assert answer["status"] == "complete"
            clock.arrived.append(time.monotonic())
            clock.trained.append(answer["seconds"])
            clock.cpu.append(watch.seconds())

    configs = [
        {
            "trial": json.dumps(trial.to_json()),
            "cost": cost,
            "setup": setup(folder),
            "ray": str(folder / "ray"),
            "answer": str(folder / f"answer-{number}.json"),
        }
        for number, (trial, cost) in enumerate(trials)
    ]
    tune.Tuner(
        tune.with_resources(cold_trial, {"CPU": 0.01}),
        param_space={"case": tune.grid_search(configs)},
        tune_config=tune.TuneConfig(max_concurrent_trials=1),
        run_config=tune.RunConfig(verbose=0, storage_path=str(folder / "tune"), callbacks=[Watch()]),
    ).fit()
    return clock


@dataclass(frozen=True)
class Settings:
    trials: int = 10


def main(argv: list[str]) -> None:
    from tests.benchmarks._shared import parse

    count = parse(argv, Settings).trials
    import ray

    from search.engine.workers import connect
    from trainers.versions import versions

    # One CPU more than the workers use: the nested pattern's outer Tune function takes a slot of its own.
    connect("local", num_cpus=3)
    trials = make_trials(count)
    watch = CpuWatch()
    watch.start()
    with tempfile.TemporaryDirectory() as name:
        clocks = {
            "warm workers": warm(trials, Path(name) / "warm", watch),
            "one TorchTrainer each": cold(trials, Path(name), watch),
        }
    watch.stop()
    ray.shutdown()

    medians: dict[str, dict[str, float]] = {}
    print(f"{count} trials, one after another; overhead per trial, median of {count - 1} (the first pays the start)")
    print(f"{'':<24}{'start s':>10}{'overhead s':>12}{'overhead CPU-s':>16}{'training s':>12}")
    for way, clock in clocks.items():
        row = {
            "start_seconds": clock.start_seconds(),
            "overhead_seconds": statistics.median(clock.overhead_seconds()),
            "overhead_cpu": statistics.median(clock.overhead_cpu()),
            "training_seconds": statistics.median(clock.trained),
        }
        medians[way] = row
        start, wall, cpu, training = row.values()
        print(f"{way:<24}{start:>10.1f}{wall:>12.2f}{cpu:>16.2f}{training:>12.2f}")
    slow, fast = medians["one TorchTrainer each"], medians["warm workers"]
    ratios = {key: slow[key] / fast[key] for key in ("overhead_seconds", "overhead_cpu")}
    record = {"benchmark": "trial_overhead", "trials": count, "device": "cpu", "versions": versions()}
    print(json.dumps(record | {"medians": medians, "ratios": {key: round(value, 1) for key, value in ratios.items()}}))


if __name__ == "__main__":
    main(sys.argv[1:])
