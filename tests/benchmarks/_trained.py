"""What benchmarks that train share: one training by the project's own adapter and loop, and results that are kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from allocators.core.shapes import shape_from_config
from allocators.core.types import Allocation, Recipe, canonical_json, digest_of
from trainers import loop, models, tasks
from trainers.adapter import attach
from trainers.adapter.base import Adapter

FOLDER = Path("build/benchmarks")


class Kept:
    """Accuracies that an earlier run trained, in a file named after what all of them depend on."""

    def __init__(self, name: str, *, depends_on: Mapping[str, Any]) -> None:
        self._file = FOLDER / f"{name}-{digest_of({**depends_on, 'torch': torch.__version__})}.jsonl"
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        self._known: dict[str, float] = {entry["digest"]: entry["accuracy"] for entry in map(json.loads, lines)}

    def get(self, digest: str, train: Callable[[], float]) -> float:
        """That of the file, else trained now and written there."""
        if digest not in self._known:
            self._known[digest] = train()
            FOLDER.mkdir(parents=True, exist_ok=True)
            with self._file.open("a") as stream:
                stream.write(canonical_json({"digest": digest, "accuracy": self._known[digest]}) + "\n")
        return self._known[digest]


def trained(
    loaded: models.Loaded,
    task: tasks.Task,
    allocation: Allocation,
    recipe: Recipe,
    *,
    seed: int,
    during: Callable[[Adapter], AbstractContextManager[None]] = lambda adapter: nullcontext(),
) -> float | None:
    """Accuracy after one training; None where it diverged. `during` is entered with the attached adapter."""
    shape = shape_from_config(loaded.model.config, name=loaded.name)
    adapter = attach(loaded.model, allocation, shape=shape, lora=recipe.lora, seed=seed)
    try:
        with during(adapter):
            return loop.train(
                loaded.model,
                adapter,
                task,
                recipe,
                seed=seed,
                tokenizer=loaded.tokenizer,
                device="cpu",
                on_rung=lambda rung: True,
                evaluations=1,
            ).accuracy
    finally:
        adapter.detach()
