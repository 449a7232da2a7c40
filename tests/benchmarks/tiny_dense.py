"""Which allocator is best at equal parameters? All of them on the embedded dense model, seed by seed.

    python -m tests.benchmarks.tiny_dense                         default task, 5 seeds, 5 experts a layer, rank 2
    python -m tests.benchmarks.tiny_dense seeds=3 rank=8 task=tiny_cipher model=tiny-dense

First what the allocators look at and what they do: by layer, the mean over its seven projections of two metrics of the
spectrum and one of the sensitivity, and the experts that each allocator gives.

Then accuracy on the task's test split after the task's own recipe at the given rank: mean and standard deviation over
seeds, exact trainable parameters, and the difference to uniform seed by seed with the 95 % t-interval of its mean. A
seed fixes adapter initialisation, data order and the allocation of `random`; other allocations are the same for all
seeds. Settings are the papers': T = 5 experts a layer, beta 2.5 for spectra (sensitivity 0.5: gradient norms spread far
wider), retention 0.6. LoRA-SMoE's experts share their A and thus have fewer parameters each: it gets the most experts a
block that stay within uniform's parameters.

Finished trainings are kept in `build/benchmarks/`, by everything they depend on: an interrupted run goes on.

Last comes one JSON line; its `ratios` are
    accuracy_<variant>        mean over seeds (untrained: one number)
    <variant>_minus_uniform   mean difference, and <variant>_minus_uniform_95 half the width of its interval
    spread_hill               largest over smallest hill of a layer: how much there is for alphalora to see
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from allocators import alphalora, lora_smoe, mola, random_, sensitivity, uniform
from allocators import signals as signals_
from allocators.core.errors import InfeasibleError, StudyError
from allocators.core.layers import blocks, layer_values
from allocators.core.shapes import shape_of
from allocators.core.types import ExpertCounts, ModelShape, Recipe, Signal
from tests.benchmarks._trainings import FOLDER, accuracies, paired, settings
from trainers import models, tasks

PER_LAYER = 5


class Source:
    """What the signals are measured on: the whole of the model and the task's training documents."""

    def __init__(self, loaded: models.Loaded, task: tasks.Task, samples: int) -> None:
        self.name, self.identity = loaded.name, loaded.identity
        self.model, self.tokenizer, self.task = loaded.model, loaded.tokenizer, task
        self.task_name, self.samples, self.seed = task.name, samples, 0
        self.device, self.dtype = torch.device("cpu"), "float32"
        self.shape = shape_of(loaded.model.config, name=loaded.name)
        self.scratch = FOLDER / "signals"

    def folder(self) -> Path:
        return models.folder_of(self.name)

    def progress(self, done: int, total: int, what: str) -> None:
        pass


def smoe_within(signal: Signal, shape: ModelShape, *, strategy: str, rank: int, params: int) -> ExpertCounts:
    """LoRA-SMoE at the paper's retention with the most experts a block that cost at most `params`."""
    fitting = [
        allocation
        for n in range(1, 33)
        if (allocation := lora_smoe.allocate(signal, shape, strategy=strategy, experts_per_block=n)).trainable_params(
            shape, rank=rank
        )
        <= params
    ]
    return fitting[-1]


def by_layer(allocation: ExpertCounts, shape: ModelShape) -> list[float]:
    """Experts of a layer: mean over its blocks."""
    rows: list[list[int]] = [[] for _ in range(shape.num_layers)]
    for block in blocks(shape):
        rows[block.layer].append(allocation.counts.get(block.path, 0))
    return [statistics.mean(row) for row in rows]


def row(name: str, values: Sequence[float], form: str = "8.2f") -> str:
    return f"  {name:<20}" + "".join(f"{value:{form}}" for value in values)


def main(arguments: Sequence[str]) -> None:
    defaults = {"model": "tiny-dense", "task": "default", "seeds": 5, "samples": 256, "rank": 2}
    given = settings(arguments, defaults)
    torch.set_num_threads(1)
    loaded, task = models.load(given["model"]), tasks.load_task(given["task"])
    source = Source(loaded, task, given["samples"])
    shape, rank = source.shape, given["rank"]
    recipe = Recipe(**task.file.recipe | {"rank": rank, "lora_alpha": 2.0 * rank})
    spectrum, gradients = (
        signals_.measured(kind, source, folder=source.scratch) for kind in ("spectrum", "sensitivity")
    )
    hill = layer_values(spectrum, shape, metric="hill")

    total, seeds = PER_LAYER * shape.num_layers, range(given["seeds"])
    params = uniform.allocate(None, shape, total_experts=total).trainable_params(shape, rank=rank)
    fixed = {
        "uniform": uniform.allocate(None, shape, total_experts=total),
        "mola 2468": mola.allocate(None, shape, pattern="2468"),
        "mola 8642": mola.allocate(None, shape, pattern="8642"),
    }
    for metric in ("hill", "alpha_hat", "stable_rank"):
        try:
            fixed[f"alphalora {metric}"] = alphalora.allocate(
                spectrum, shape, total_experts=total, beta=2.5, metric=metric, rounding="largest_remainder"
            )
        except InfeasibleError as error:
            print(f"alphalora {metric} is left out: {error}")
    fixed["sensitivity"] = sensitivity.allocate(gradients, shape, total_experts=total, beta=0.5)
    for strategy in ("S", "U"):
        fixed[f"lora_smoe {strategy}"] = smoe_within(gradients, shape, strategy=strategy, rank=rank, params=params)
    selections = {name: [allocation for _ in seeds] for name, allocation in fixed.items()}
    selections["random"] = [random_.allocate(None, shape, total_experts=total, seed=seed) for seed in seeds]

    print(f"{given['model']} on {task.name} ({task.num_training} training, {task.num_evaluation} test documents)")
    print(row("by layer", range(shape.num_layers), "8d"))
    for signal, metric in ((spectrum, "hill"), (spectrum, "stable_rank"), (gradients, "sum_sq_grad")):
        print(row(metric, layer_values(signal, shape, metric=metric)))
    for name, by_seed in selections.items():
        print(row(name + (" (seed 0)" if name == "random" else ""), by_layer(by_seed[0], shape)))

    task.prepare(loaded.tokenizer)
    untrained = task.evaluate(loaded.model)
    found = accuracies("tiny_dense", loaded, task, recipe, selections)
    print(f"accuracy after {recipe.steps} steps of {recipe.batch_size}, rank {rank}, T = {total}, {len(seeds)} seeds")
    print(f"  {'untrained':<22}{untrained.accuracy:6.3f}   (standard error of the test split {untrained.stderr:.3f})")
    ratios = {"accuracy_untrained": untrained.accuracy, "spread_hill": max(hill) / min(hill)}
    order = sorted(found, key=lambda name: -statistics.mean(found[name]))
    for name in order:
        values = found[name]
        mean, key = statistics.mean(values), name.replace(" ", "_")
        exact = sorted({allocation.trainable_params(shape, rank=rank) for allocation in selections[name]})
        ratios[f"accuracy_{key}"] = mean
        against = ""
        if name != "uniform":
            gain, width = paired(values, found["uniform"])
            ratios |= {f"{key}_minus_uniform": gain, f"{key}_minus_uniform_95": width}
            against = f"−uniform {gain:+.3f} ± {width:.3f}" + ("" if abs(gain) > width else "  inside the noise")
        each = " ".join(f"{value:.3f}" for value in values)
        print(
            f"  {name:<22}{mean:6.3f} ± {statistics.stdev(values):.3f}   {exact[0]:>9,} parameters   {each}   {against}"
        )
    record = {
        "benchmark": "tiny_dense",
        "device": "cpu",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "model": loaded.identity,
        "task": task.name,
        "data": task.data_hash,
        "recipe": recipe.to_json(),
        "accuracies": found,
        "ratios": {name: round(value, 4) for name, value in ratios.items()},
    }
    print(json.dumps(record))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except StudyError as error:
        sys.exit(str(error))
