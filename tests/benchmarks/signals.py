"""What each signal costs, as a share of the backward pass of a training step on the same tokens, and what it holds.

    python -m tests.benchmarks.signals                                        # a minute or two
    python -m tests.benchmarks.signals layers=8 hidden=1024 device=cuda

On a random Llama and a random OLMoE, fp32, samples of mixed lengths up to `length`:

    training          forward and backward of a training step, with a gradient for every weight
    routing           `allocators.signals.routing`: counts, masses, REAP and EAN, one forward pass without the head
    counts alone      the same without the outputs of the experts (no REAP, no EAN)
    representation    `allocators.signals.representation`: covariances of all inputs, feature norms, similarities
    spectrum          `allocators.signals.spectrum` of all matrices of the Llama: no data, once a model
    snr, condition    what these two metrics add to it: singular values from eigenvalues that are there

Time is a median over interleaved repeats in one process: CPU seconds of the process, or wall clock on a GPU. Backward
is the training step less a forward pass without gradients. Memory is the largest sum of bytes that live at once in what
the pass allocates, on two batches of one size and on eight: a ratio of 1 is flat.

Names in the JSON line: `vs_training_backward` by model and signal (below 1 is cheaper), and
`memory_at_four_times_the_samples`.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from allocators.signals import representation, routing, sensitivity, spectrum
from allocators.signals.spectrum.eigen import eigenvalues
from allocators.signals.spectrum.values import condition, signal_to_noise, singular_values
from tests.benchmarks._shared import clock, parse
from tests.benchmarks.sensitivity import Memory, Sample, build, draw, forward, weights_of

BATCH = 8
Run = Callable[[], Any]


def build_moe(*, layers: int, hidden: int, device: str) -> Any:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=hidden // 2,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=16,
        num_experts_per_tok=4,
    )
    return OlmoeForCausalLM(config).eval().requires_grad_(False).to(device)


def training(model: Any, rows: list[Sample]) -> None:
    """Forward and backward, a batch after another, with a gradient for every weight."""
    model.requires_grad_(True)
    for batch in sensitivity.pad(rows, pad_token_id=0, batch_size=BATCH):
        sensitivity.losses(model, {k: v.to(model.device) for k, v in batch.items()}).sum().backward()
        model.zero_grad(set_to_none=True)
    model.requires_grad_(False)


def route(model: Any, rows: list[Sample], *, outputs: bool = True) -> None:
    watching = routing.on_grouped_mm
    if not outputs:
        routing.on_grouped_mm = lambda *_: []
    try:
        batches = routing.pad([row.input_ids for row in rows], pad_token_id=0, batch_size=BATCH)
        routing.measure(model, batches, provenance={})
    finally:
        routing.on_grouped_mm = watching


def represent(model: Any, rows: list[Sample]) -> None:
    representation.measure(model, [sensitivity.pad(rows, pad_token_id=0, batch_size=BATCH)], provenance={})


def two_metrics(found: list[tuple[torch.Tensor, torch.Size]]) -> None:
    for lam, size in found:
        sigma = singular_values(lam, size=min(size))
        condition(sigma), signal_to_noise(sigma, sides=size)


def runs_of(model: Any, rows: list[Sample], *, moe: bool) -> dict[str, Run]:
    """By name what is timed, `forward` and `training` first."""
    runs: dict[str, Run] = {"forward": lambda: forward(model, rows), "training": lambda: training(model, rows)}
    if moe:
        runs["routing"] = lambda: route(model, rows)
        runs["counts alone"] = lambda: route(model, rows, outputs=False)
    runs["representation"] = lambda: represent(model, rows)
    if not moe:
        from allocators.core.shapes import shape_from_config

        shape = shape_from_config(model.config, name="random Llama")
        found = [(eigenvalues(w), w.shape) for w in weights_of(model).values()]
        runs["spectrum"] = lambda: spectrum.measure(model, shape, provenance={})
        runs["snr, condition"] = lambda: two_metrics(found)
    return runs


def medians(runs: dict[str, Run], *, repeats: int, device: str) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(repeats + 1):
        for name, run in runs.items():
            start = clock(device)
            run()
            if round_:  # the first warms up
                seconds[name].append(clock(device) - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def peak(run: Run) -> int:
    with Memory(set()) as watch:
        run()
    return int(watch.peak[0])


@dataclass(frozen=True)
class Settings:
    layers: int = 2
    hidden: int = 256
    length: int = 128
    samples: int = 8
    repeats: int = 5
    device: str = "cpu"
    threads: int = 1


def main(argv: list[str]) -> None:
    settings = parse(argv, Settings)
    torch.set_num_threads(settings.threads)
    sizes: dict[str, Any] = {"layers": settings.layers, "hidden": settings.hidden, "device": settings.device}
    rows = draw(settings.samples, settings.length)
    ratios: dict[str, dict[str, float]] = {}
    growth: dict[str, dict[str, float]] = {}
    print(f"{'':36} {'/ training backward':>20} {'memory at 4 × samples':>22}")
    for name, model in (("Llama", build(**sizes)), ("OLMoE", build_moe(**sizes))):
        moe = name == "OLMoE"
        median = medians(runs_of(model, rows, moe=moe), repeats=settings.repeats, device=settings.device)
        backward = median["training"] - median["forward"]
        ratios[name] = {what: round(median[what] / backward, 3) for what in median if what != "training"}
        longest = [max(rows, key=lambda row: len(row.input_ids))] * settings.samples  # batches of one size
        once, more = (runs_of(model, longest * times, moe=True) for times in (2, 8))
        passes = ("routing", "representation") if moe else ("representation",)
        growth[name] = {what: round(peak(more[what]) / peak(once[what]), 3) for what in passes}
        for what, ratio in ratios[name].items():
            flat = f"{growth[name][what]:22.2f}" if what in growth[name] else ""
            print(f"{name:8} {what:27} {ratio:20.3f} {flat}")
    device = settings.device
    print(
        json.dumps(
            {
                "benchmark": "signals",
                "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine(),
                "versions": {"torch": torch.__version__, "python": platform.python_version()},
                "vs_training_backward": ratios,
                "memory_at_four_times_the_samples": growth,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
