"""What the benchmarks that train share: a kept training of the project's own adapter, and a paired comparison."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy import stats

from allocators.core.errors import StudyError, unknown
from allocators.core.shapes import shape_of
from allocators.core.types import Allocation, Recipe, Trial, canonical_json, digest_of
from trainers import loop, models, tasks
from trainers.adapter import attach

FOLDER = Path("build/benchmarks")


def settings(arguments: Sequence[str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`key=value` words over defaults, as the types of the defaults. Raises StudyError for an unknown key."""
    values = dict(defaults)
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in values:
            raise unknown("key", key, values)
        values[key] = type(defaults[key])(value)
    if values["seeds"] < 2:
        raise StudyError(f"seeds must be at least 2 for a spread, got {values['seeds']}")
    return values


def trained(loaded: models.Loaded, task: tasks.Task, allocation: Allocation, recipe: Recipe, *, seed: int) -> float:
    """Accuracy after one training of the project's own adapter by its own loop."""
    adapter = attach(
        loaded.model,
        allocation,
        shape=shape_of(loaded.model.config, name=loaded.name),
        rank=recipe.rank,
        lora_alpha=recipe.lora_alpha,
        top_k=recipe.top_k,
        seed=seed,
    )
    try:
        result = loop.train(
            loaded.model,
            adapter,
            task,
            recipe,
            seed=seed,
            tokenizer=loaded.tokenizer,
            device="cpu",
            on_rung=lambda rung: True,
            evaluations=1,
        )
    finally:
        adapter.detach()
    if result.accuracy is None:
        raise StudyError(f"the training with seed {seed} diverged: lower recipe.learning_rate in the task file")
    return result.accuracy


def accuracies(
    name: str,
    loaded: models.Loaded,
    task: tasks.Task,
    recipe: Recipe,
    selections: Mapping[str, Sequence[Allocation]],
) -> dict[str, list[float]]:
    """Accuracy by variant and seed; what an earlier run of the benchmark `name` has trained is read from its file."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    provenance = {"weights": loaded.identity, "data": task.data_hash, "torch": torch.__version__}
    file = FOLDER / f"{name}-{digest_of(provenance)}.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    known = {entry["digest"]: entry["accuracy"] for entry in map(json.loads, lines)}
    found: dict[str, list[float]] = {variant: [] for variant in selections}
    for seed in range(len(next(iter(selections.values())))):  # seeds outside: an interrupted run holds whole pairs
        for variant, by_seed in selections.items():
            trial = Trial(by_seed[seed], recipe, loaded.name, task.name, seed)
            if trial.digest not in known:
                known[trial.digest] = trained(loaded, task, by_seed[seed], recipe, seed=seed)
                with file.open("a") as stream:
                    stream.write(canonical_json({"digest": trial.digest, "accuracy": known[trial.digest]}) + "\n")
            found[variant].append(known[trial.digest])
    return found


def paired(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Mean of the differences seed by seed, and half the width of its 95 % t-interval."""
    differences = [a - b for a, b in zip(one, other, strict=True)]
    n = len(differences)
    return statistics.mean(differences), stats.t.ppf(0.975, n - 1) * statistics.stdev(differences) / math.sqrt(n)
