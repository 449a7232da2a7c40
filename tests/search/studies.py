"""Studies for the tests of records and views: outcomes of a tiny model with realistic numbers, no training behind them.

python -m tests.search.studies FOLDER        # writes one study into FOLDER, to look at its report
"""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path
from typing import Any

from allocators.core.types import (
    Allocation,
    ExpertCounts,
    ExpertSelection,
    ModelShape,
    ModuleShape,
    Outcome,
    Recipe,
    Role,
    Rung,
    Score,
    Status,
    Trial,
)
from search.problem import Problem
from search.records.folder import StudyFolder
from trainers.versions import versions

LAYERS, EXPERTS, HIDDEN, WIDTH, QUESTIONS = 4, 16, 32, 16, 200
CONFIG = {"space": "sieve", "model": "tiny-moe", "task": "shift", "seed": 0, "trials": 24, "storage": "studies"}
IDENTITY = {"space": "sieve", "model": "tiny-moe", "task": "shift", "seed": 0, "recipe": {"rank": 4}}
BOTH = {"select_on": "validation", "held_out": 0.1}  # of a study that keeps its test split apart
APART = {"config": CONFIG | BOTH, "identity": IDENTITY | BOTH}  # `open_study(folder, **APART)`
COMMAND = "python -m search.run space=sieve"


def moe_shape() -> ModelShape:
    """4 layers of attention (4 maps), a router and 16 experts (3 maps)."""
    modules: list[ModuleShape] = []
    for layer in range(LAYERS):
        path = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            modules.append(ModuleShape(f"{path}.self_attn.{name}", layer, HIDDEN, HIDDEN, role="attention"))
        modules.append(ModuleShape(f"{path}.mlp.gate", layer, HIDDEN, EXPERTS, role="router"))
        for name, sizes in (
            ("gate_proj", (HIDDEN, WIDTH)),
            ("up_proj", (HIDDEN, WIDTH)),
            ("down_proj", (WIDTH, HIDDEN)),
        ):
            modules.append(ModuleShape(f"{path}.mlp.experts.{name}", layer, *sizes, EXPERTS, "expert"))
    return ModelShape("tiny-moe", tuple(modules), LAYERS)


def dense_shape() -> ModelShape:
    roles: dict[str, Role] = {"self_attn.q_proj": "attention", "mlp.up_proj": "mlp", "mlp.down_proj": "mlp"}
    modules = [
        ModuleShape(f"model.layers.{layer}.{name}", layer, HIDDEN, HIDDEN, role=role)
        for layer in range(LAYERS)
        for name, role in roles.items()
    ]
    return ModelShape("tiny-dense", tuple(modules), LAYERS)


def selection(count: int, *, seed: int = 0) -> ExpertSelection:
    """`count` experts in every layer."""
    draw = random.Random(seed)
    return ExpertSelection({layer: tuple(draw.sample(range(EXPERTS), count)) for layer in range(LAYERS)})


def counts(experts: int) -> ExpertCounts:
    """More experts in higher layers."""
    return ExpertCounts({m.path: experts * (m.layer + 1) // 2 for m in dense_shape().modules})


def outcome(
    allocation: Allocation | None = None,
    *,
    accuracy: float | None = 0.5,
    status: Status = "complete",
    allocator: str = "sieve",
    rank: int = 4,
    seed: int = 0,
    **more: object,
) -> Outcome:
    """One outcome with three rungs that rise to `accuracy`."""
    allocation = allocation or selection(4)
    shape = moe_shape() if isinstance(allocation, ExpertSelection) else dense_shape()
    knobs = {"fraction": allocation.total_experts / (LAYERS * EXPERTS)}
    trial = Trial(allocation, Recipe(rank=rank, steps=90), shape.name, "shift", seed, allocator, knobs)
    rungs: tuple[Rung, ...] = ()
    if accuracy is not None and status != "started":
        rungs = tuple(rung(step, accuracy * (1 - math.exp(-step / 30)) / (1 - math.exp(-3))) for step in (30, 60, 90))
        rungs = rungs[:2] if status == "stopped" else rungs
        accuracy = rungs[-1].accuracy
    result = Outcome(
        trial,
        status,
        allocation.trainable_params(shape, rank=rank),
        accuracy if status in ("complete", "stopped") else None,
        rungs,
        seconds=12.5,
        tokens=90 * 1_000,
        peak_memory_bytes=300 << 20,
        adapter=f"adapters/{trial.digest}" if status == "complete" else "",
        versions=versions(),
    )
    return result.updated(**more)


def rung(step: int, accuracy: float) -> Rung:
    error = math.sqrt(max(accuracy * (1 - accuracy), 0.0) / QUESTIONS)
    return Rung(step, step * 1_000, accuracy, stderr=error, loss=2.5 - 1.5 * accuracy)


def score(accuracy: float) -> Score:
    """On a test split of as many questions."""
    return Score(accuracy, math.sqrt(max(accuracy * (1 - accuracy), 0.0) / QUESTIONS))


def started(done: Outcome) -> Outcome:
    """The same trial as it was before it ran."""
    return Outcome(done.trial, "started", done.trainable_params, versions=done.versions)


def fill(study: StudyFolder, *, seed: int = 0) -> None:
    """Some two dozen points: baselines, a sieve front, a stopped, a diverged, a failed one and what was not trained."""
    draw = random.Random(seed)
    points = [("none", ExpertSelection({})), ("all", selection(EXPERTS))]
    points += [(name, selection(4, seed=i)) for i, name in enumerate(("random", "sieve"))]
    points += [("sieve", selection(draw.randint(1, 14), seed=10 + i)) for i in range(14)]
    unusual: dict[int, Status] = {6: "stopped", 9: "diverged", 11: "failed", 13: "out_of_memory"}
    for number, (allocator, allocation) in enumerate(points):
        share = allocation.total_experts / (LAYERS * EXPERTS)
        accuracy = 0.3 + 0.3 * (1 - math.exp(-3 * share)) + draw.gauss(0, 0.02) - 0.06 * (allocator == "random")
        status = unusual.get(number, "complete")
        done = outcome(
            allocation,
            accuracy=round(accuracy * QUESTIONS) / QUESTIONS,
            status=status,
            allocator=allocator,
            rank=draw.choice((4, 8)) if number > 3 else 4,
            message={"diverged": "loss became NaN at step 40", "failed": "worker lost"}.get(status, ""),
        )
        params = {"allocator": allocator, "fraction": share, "rank": done.trial.recipe.rank}
        study.append_started(started(done), params)
        for entry in done.rungs:
            study.append_rung(done.digest, entry)
        if number < len(points) - 1:
            study.append_finished(done, params)
    first = next(iter(study.finished))
    for _ in range(3):
        study.append_answered({"allocator": "sieve", "fraction": 0.25}, reason="duplicate", digest=first)
    study.append_answered(
        {"allocator": "esft", "coverage": 0.0}, reason="infeasible", message="coverage chooses no expert"
    )
    study.append_answered({"allocator": "all"}, reason="over_budget", message="311.46M is more than 200M")


def identity_of(of: Problem | Trial) -> dict[str, Any]:
    """The identity of a study of the same model and task."""
    return IDENTITY | {"model": of.model, "task": of.task}


def open_study(folder: Path, **changes: Any) -> StudyFolder:
    arguments: dict[str, Any] = {
        "config": CONFIG,
        "identity": IDENTITY,
        "shape": moe_shape(),
        "command": COMMAND,
    } | changes
    return StudyFolder.open(folder, **arguments)


if __name__ == "__main__":
    with open_study(Path(sys.argv[1])) as written:
        fill(written)
