"""Hashes of losses and trained tensors at fixed seeds, of each training alone and of three in one pass.

    python tests/benchmarks/fingerprints.py       in the folder of any checkout: prints `NAME = HASH` lines

`tests/benchmarks/same_results.py` runs this file in two checkouts and compares. It is run by its path, so that the
packages are those of the working folder; a checkout from before `LoraSettings` and `PackedRun` names them otherwise.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

sys.path.insert(0, os.getcwd())

import torch

from allocators.core import types
from allocators.core.types import Allocation, ExpertCounts, ExpertSelection, ModelShape, Recipe
from trainers import adapter as adapters
from trainers import loop, models, packing, tasks


class Training(NamedTuple):
    allocation: Allocation
    recipe: Recipe
    seed: int


def recipe(**changes: Any) -> Recipe:
    common = {"rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.05, "top_k": 2, "balance_coef": 0.01, "steps": 12}
    return Recipe(
        **{**common, "batch_size": 8, "micro_batch_size": 4, "max_length": 64, "learning_rate": 3e-3, **changes}
    )


def of_experts(shape: ModelShape, chosen: Callable[[int, int], tuple[int, ...]]) -> ExpertSelection:
    return ExpertSelection({layer: chosen(layer, shape.experts_in(layer)) for layer in shape.moe_layers})


def of_counts(shape: ModelShape, count: Callable[[int], int], gating: Any) -> ExpertCounts:
    paths = [module.path for module in shape.of_role("attention", "mlp")]
    return ExpertCounts({path: n for place, path in enumerate(paths) if (n := count(place))}, gating)


def cases(shape: ModelShape) -> Iterator[tuple[str, list[Training]]]:
    """Three trainings a case that differ in allocation, rank, alpha, dropout, top_k and seed."""
    first, second, third = recipe(), recipe(rank=2, lora_alpha=2.0, lora_dropout=0.1), recipe(rank=6, lora_alpha=3.0)
    if shape.is_moe:
        selections = [
            of_experts(shape, lambda layer, experts: tuple(range(layer % 3, experts, 3))),
            of_experts(shape, lambda layer, experts: (0, 1, experts - 1) if layer % 2 else ()),
            of_experts(shape, lambda layer, experts: tuple(range(experts)) if layer == 0 else (2,)),
        ]
        yield "chosen experts", [Training(*t) for t in zip(selections, (first, second, third), (0, 1, 0), strict=True)]
        return
    for gating in ("routed", "hydra"):
        counts = [
            of_counts(shape, lambda place: 4, gating),
            of_counts(shape, lambda place: place % 4, gating),
            of_counts(shape, lambda place: 3 if place > 8 else 0, gating),
        ]
        yield gating, [Training(*t) for t in zip(counts, (first, second, third), (0, 1, 0), strict=True)]


def attach(model: Any, training: Training, shape: ModelShape) -> Any:
    settings: dict[str, Any] = {"shape": shape, "seed": training.seed}
    if hasattr(types, "LoraSettings"):
        settings["lora"] = training.recipe.lora
    else:
        names = ("rank", "lora_alpha", "lora_dropout", "top_k", "balance_coef")
        settings |= {name: getattr(training.recipe, name) for name in names}
    attach: Any = adapters.attach
    return attach(model, training.allocation, **settings)


def hash_of(result: Any, adapter: Any) -> str:
    digest = hashlib.sha256(repr(result.losses).encode())
    for name, tensor in sorted(adapter.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def main() -> None:
    torch.set_num_threads(1)
    packed_run: Any = getattr(packing, "PackedRun", None) or vars(packing)["Crew"]
    for name in ("tiny-moe", "tiny-dense"):
        loaded, task = models.load(name), tasks.load_task("tiny_cipher", limit=16)
        shape = models.shape_of_model(loaded.model, name=name)
        common: dict[str, Any] = {"tokenizer": loaded.tokenizer, "device": "cpu", "evaluations": 1}
        for case, trainings in cases(shape):
            for number, training in enumerate(trainings):
                adapter = attach(loaded.model, training, shape)
                result = loop.train(
                    loaded.model, adapter, task, training.recipe, seed=training.seed, on_rung=lambda _: True, **common
                )
                adapter.detach()
                print(f"{name}, {case}, {number} alone = {hash_of(result, adapter)}", flush=True)
            packed = packed_run(loaded.model, task, **common)
            members = []
            for training in trainings:
                adapter = attach(loaded.model, training, shape)
                adapter.detach()
                members.append(packed.join(adapter, training.recipe, seed=training.seed, on_rung=lambda _: True))
            while packed.members:
                packed.step()
            for number, member in enumerate(members):
                assert member.error is None, member.error
                print(f"{name}, {case}, {number} of three in a pass = {hash_of(member.result, member.adapter)}")


if __name__ == "__main__":
    main()
