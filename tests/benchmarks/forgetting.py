"""What measuring forgetting adds to a training: CPU seconds with `forgetting=held_out` and without.

    python -m tests.benchmarks.forgetting                       # tiny-moe, some minutes
    python -m tests.benchmarks.forgetting model=tiny-dense task=tiny_turncipher repeats=3

One worker in this process trains the same training (a hundred steps of the recipe rank 4, lora_alpha 64, scaled rate
0.1; the rank on every matrix; evaluated three times on the validation split) with the measure and without, interleaved,
in turns that begin with either. The first pair warms up: it holds the one pass over the base alone too, which a worker
makes once a study. Seconds are those that this process had a CPU, medians over `repeats` pairs.

ratios   with_forgetting    a training with the measure / without it, over all medians
         of_a_training      the measure alone (one pass over the text) / a training without it
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from allocators import uniform_ranks
from allocators.core import words
from allocators.core.messages import TrainJob
from allocators.core.types import TRANSFERABLE, Recipe, Trial
from tests.benchmarks._shared import clock, parse
from trainers import tasks
from trainers.recipes import make_recipe
from trainers.worker_state import WorkerSetup, WorkerState


@dataclass(frozen=True)
class Settings:
    """What is trained, and how often."""

    model: str = words.key("tiny-moe", "an embedded model")
    task: str = words.key("default", "an embedded task")
    text: str = words.key("held_out", "what forgetting is measured on")
    steps: int = words.key(0, "steps of a training (0: as the task says)", least=0)
    repeats: int = words.key(5, "pairs of trainings behind each median", least=1)


def setup(settings: Settings, folder: Path, *, forgetting: str) -> WorkerSetup:
    return WorkerSetup(
        model=settings.model,
        options={},
        task=settings.task,
        task_options={"select_on": "validation"},
        seed=0,
        evaluations=3,
        calibration_samples=8,
        cpus_per_worker=1,
        signals=str(folder / "signals"),
        adapters=str(folder / "adapters"),
        checkpoints=str(folder / "checkpoints"),
        forgetting=forgetting,
    )


def seconds_of(state: WorkerState, recipe: Recipe, number: int) -> float:
    """One training with a seed of its own, which no checkpoint knows."""
    allocation = uniform_ranks.allocate(None, state.shape, rank=recipe.rank)
    trial = Trial(allocation, recipe, state.setup.model, state.setup.task, number)
    cost = allocation.trainable_params(state.shape, rank=recipe.rank)
    began = clock("cpu")
    outcome = state.train(TrainJob(trial, cost), report=lambda rung: True)
    seconds = clock("cpu") - began
    assert outcome.status == "complete", outcome.message
    assert (outcome.forgetting is not None) == bool(state.setup.forgetting)
    return seconds


def main(argv: list[str]) -> None:
    settings = parse(argv, Settings)
    suggested = tasks.check_task(settings.task, select_on="validation").recipe
    recipe = make_recipe(suggested, TRANSFERABLE)
    recipe = replace(recipe, steps=settings.steps) if settings.steps else recipe
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    measured: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        states = {
            name: WorkerState(setup(settings, Path(folder) / name, forgetting=text), "cpu")
            for name, text in (("with", settings.text), ("without", ""))
        }
        for number in range(settings.repeats + 1):
            for name in list(states)[:: 1 if number % 2 else -1]:
                taken = seconds_of(states[name], recipe, number)
                if number:
                    seconds[name].append(taken)
            began = clock("cpu")
            measure = states["with"]._general
            assert measure is not None
            measure(states["with"].model)
            measured.append(clock("cpu") - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {
        "with_forgetting": medians["with"] / medians["without"],
        "of_a_training": statistics.median(measured[1:]) / medians["without"],
    }
    print(f"CPU seconds of a training, medians of {settings.repeats}: {medians}")
    print(f"one pass over the text: {statistics.median(measured[1:]):.3f}")
    host = {"device": "cpu", "machine": platform.machine(), "python": platform.python_version()}
    print(json.dumps({"benchmark": "forgetting", **host, "model": settings.model, "ratios": ratios}))


if __name__ == "__main__":
    main(sys.argv[1:])
