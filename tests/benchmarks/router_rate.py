"""Do the routers of LoRA-MoE layers want a learning rate of their own?

    python -m tests.benchmarks.router_rate                                  tiny-dense, 2.5 experts a layer, 3 seeds
    python -m tests.benchmarks.router_rate factors=0.1,1,10 scaled_rates=0.1 seeds=5

A LoRA-MoE module has A and B of every expert and a router that starts at small random weights. The product gives all of
them one rate. Here the steps of the routers alone are multiplied by a factor: 0 freezes them, 10 is ten times the rate.
Nothing else differs between trainings of one seed, so they compare in pairs, on the test split, which nothing was
selected on.

Finished trainings are kept in `build/benchmarks/`, by everything they depend on: an interrupted run goes on.

The JSON line's `ratios` are, for every scaled rate and factor but 1,
    RATE/xFACTOR          mean accuracy less that of factor 1
    RATE/xFACTOR/95       half width of its 95 % interval (t, paired over the seeds)
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from allocators import uniform
from allocators.core import words
from allocators.core.errors import StudyError
from allocators.core.shapes import shape_from_config
from allocators.core.types import ExpertCounts, Recipe, digest_of
from search.report.uncertainty import paired
from tests.benchmarks._shared import parse
from tests.benchmarks._trained import Kept, trained
from trainers import models, tasks
from trainers.adapter.base import Adapter
from trainers.adapter.lora_moe import LoraMoeAdapter
from trainers.recipes import make_recipe
from trainers.tasks.files import default_for
from trainers.versions import versions


@dataclass(frozen=True)
class Settings:
    """The keys of the command line."""

    model: str = words.key("tiny-dense", "a dense model")
    task: str = words.key("default", "embedded task or task file")
    experts_per_layer: float = words.key(2.5, "of the uniform allocation", least=1)
    rank: int = words.key(4, "LoRA rank", least=1)
    lora_alpha: float = words.key(64.0, "of every expert")
    scaled_rates: tuple[float, ...] = words.key((0.05, 0.1), "learning_rate·lora_alpha, several separated by commas")
    factors: tuple[float, ...] = words.key((0.0, 0.1, 0.3, 1.0, 3.0, 10.0), "of the routers' steps; 1 is always there")
    seeds: int = words.key(3, "trainings of each", least=2)


def factor_of_every_number(adapter: LoraMoeAdapter, factor: float) -> Tensor:
    """As long as the loop's flat buffer (trainers/loop/flat.py): the factor where a router lies, else 1."""
    parts = []
    for name, parameter in adapter.named_parameters():
        one = torch.ones(parameter.shape)
        path, _, tensor = name.rpartition(".")
        if tensor == "down":  # A first, the router last
            one[-adapter.allocation.counts[path] :] = factor
        parts.append(torch.nn.functional.pad(one.flatten(), (0, -one.numel() % 16), value=1.0))
    return torch.cat(parts)


@contextmanager
def steps_times(factors: Tensor) -> Iterator[None]:
    """In this block AdamW moves each number of its one buffer so many times as far as it would."""

    class Scaled(torch.optim.AdamW):
        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]  # no closure here
            (values,) = self.param_groups[0]["params"]
            before = values.detach().clone()
            super().step()
            values.copy_(torch.lerp(before, values, factors))

    own, torch.optim.AdamW = torch.optim.AdamW, Scaled  # type: ignore[misc]
    try:
        yield
    finally:
        torch.optim.AdamW = own  # type: ignore[misc]


@contextmanager
def router_steps_times(factor: float, adapter: Adapter) -> Iterator[None]:
    """In this block the routers of an adapter move so many times as far as they would."""
    assert isinstance(adapter, LoraMoeAdapter)
    with steps_times(factor_of_every_number(adapter, factor)):
        yield


@dataclass(frozen=True)
class Bench:
    """What all trainings share."""

    loaded: models.Loaded
    task: tasks.Task
    allocation: ExpertCounts

    @cached_property
    def kept(self) -> Kept:
        """What was trained before."""
        known = {"weights": self.loaded.identity, "data": self.task.data_hash, "allocation": self.allocation.to_json()}
        return Kept("router_rate", depends_on=known)

    def accuracy(self, recipe: Recipe, *, factor: float, seed: int) -> float:
        """On the test split, after one training; 0 where it diverged."""
        during = partial(router_steps_times, factor)

        def train() -> float:
            return trained(self.loaded, self.task, self.allocation, recipe, seed=seed, during=during) or 0.0

        return self.kept.get(digest_of({"recipe": recipe.to_json(), "factor": factor, "seed": seed}), train)


def bench(settings: Settings) -> tuple[Bench, Recipe]:
    """Model, task and allocation, and the recipe at the first scaled rate."""
    loaded = models.load(settings.model)
    task = tasks.load_task(default_for(settings.model, settings.task), select_on="test")
    assert isinstance(task, tasks.Task), "one task at a time"
    shape = shape_from_config(loaded.model.config, name=loaded.name)
    if shape.moe_layers:
        raise StudyError(f"{settings.model} has experts and routers of its own: LoRA-MoE needs a dense model")
    total = int(settings.experts_per_layer * shape.num_layers + 0.5)
    allocation = uniform.allocate(None, shape, total_experts=total)
    own = {"rank": settings.rank, "lora_alpha": settings.lora_alpha}
    return Bench(loaded, task, allocation), make_recipe(task.file.recipe, own)


def main(arguments: Sequence[str]) -> None:
    """Prints a line a scaled rate and factor, and the JSON line."""
    settings = parse(arguments, Settings)
    if min(settings.scaled_rates, default=0) <= 0 or min(settings.factors, default=0) < 0:
        raise StudyError("scaled_rates must be above 0 and factors not below")
    torch.set_num_threads(1)
    made, recipe = bench(settings)
    factors = sorted({1.0, *settings.factors})
    ratios: dict[str, float] = {}
    for rate in settings.scaled_rates:
        asked = make_recipe(recipe.to_json() | {"learning_rate": rate / recipe.lora_alpha})
        found: dict[float, dict[int, float]] = {factor: {} for factor in factors}
        for seed in range(settings.seeds):  # seeds outside: an interrupted run holds whole pairs
            for factor in factors:
                found[factor][seed] = made.accuracy(asked, factor=factor, seed=seed)
        print(f"\nscaled rate {rate:g}, {asked.steps} steps, {settings.seeds} seeds; accuracy on the test split")
        for factor in factors:
            each = " ".join(f"{value:.3f}" for value in found[factor].values())
            line = f"  router × {factor:<6g}{statistics.fmean(found[factor].values()):8.3f}   {each}"
            if factor != 1 and (pair := paired(found[factor], found[1.0])) and pair.high is not None:
                width = pair.high - pair.difference
                line += f"   − router × 1: {pair.difference:+.3f} ± {width:.3f}"
                ratios[f"{rate:g}/x{factor:g}"] = round(pair.difference, 4)
                ratios[f"{rate:g}/x{factor:g}/95"] = round(width, 4)
            print(line, flush=True)
    print(json.dumps({"benchmark": "router_rate", "device": "cpu", "versions": versions(), "ratios": ratios}))


if __name__ == "__main__":
    words.run(main)
