"""Every sample's gradient norm for every weight matrix: one pass a batch against the obvious ways.

    python -m tests.benchmarks.sensitivity                                    # about two minutes
    python -m tests.benchmarks.sensitivity layers=4 hidden=256 samples=4 device=cuda

On a random Llama, fp32, samples of mixed lengths up to `length`:

    training    forward and backward of a training step on the same batch, with a gradient for every weight matrix
    ours        `allocators.signals.sensitivity.per_sample`: one batch, weights frozen
    one sample  a step a sample with gradients for all weight matrices; the norms of those (the definition)
    one layer   the same, but a step per sample and layer with gradients for that layer only: what the published script
                would do if every layer were to see every sample

Time is a median over interleaved repeats in one process: CPU seconds of the process, or wall clock on a GPU. Backward
is the pass less a forward pass without gradients, measured in the same rounds. Gradient memory is the largest sum of
bytes that live at once in the pass in tensors shaped like a weight matrix: stored gradients and temporaries alike. All
is everything that the pass allocates, at its peak.

Names in the JSON line: `ours_vs_training_backward`, `ours_vs_training_pass` (below 1 is cheaper), `one_sample_vs_ours`,
`one_layer_vs_ours` (how many times dearer), `gradient_bytes`, `peak_bytes` by variant, `largest_relative_difference`
of ours from one sample.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from allocators.core.shapes import shape_from_config
from allocators.signals import sensitivity
from tests.benchmarks._shared import clock, parse


@dataclass(frozen=True)
class Sample:
    input_ids: list[int]
    labels_start: int


def build(*, layers: int, hidden: int, device: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False).to(device)


def draw(samples: int, length: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(length // 2, length + 1, (samples,), generator=generator).tolist()
    return [Sample(torch.randint(0, 1024, (n,), generator=generator).tolist(), n // 2) for n in lengths]


def weights_of(model: Any) -> dict[str, Tensor]:
    shape = shape_from_config(model.config, name="random Llama")
    return {m.path: model.get_submodule(m.path).weight for m in shape.modules}


def step(model: Any, rows: list[Sample], weights: list[Tensor]) -> None:
    """Forward and backward with gradients for `weights` in .grad."""
    for w in weights:
        w.requires_grad_(True).grad = None
    (batch,) = sensitivity.pad(rows, pad_token_id=0, batch_size=len(rows))
    sensitivity.losses(model, {k: v.to(model.device) for k, v in batch.items()}).sum().backward()
    for w in weights:
        w.requires_grad_(False)


def one_sample(model: Any, rows: list[Sample]) -> dict[str, Tensor]:
    weights = weights_of(model)
    found: dict[str, list[Tensor]] = {path: [] for path in weights}
    for row in rows:
        step(model, [row], list(weights.values()))
        for path, w in weights.items():
            assert w.grad is not None
            found[path].append(w.grad.square().sum())
    return _finish(found, weights)


def one_layer(model: Any, rows: list[Sample]) -> dict[str, Tensor]:
    weights = weights_of(model)
    found: dict[str, list[Tensor]] = {path: [] for path in weights}
    for layer in range(model.config.num_hidden_layers):
        mine = {path: w for path, w in weights.items() if f".layers.{layer}." in path}
        for row in rows:
            step(model, [row], list(mine.values()))
            for path, w in mine.items():
                assert w.grad is not None
                found[path].append(w.grad.square().sum())
        for w in mine.values():
            w.grad = None
    return _finish(found, weights)


def _finish(found: dict[str, list[Tensor]], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    for w in weights.values():
        w.grad = None
    return {path: torch.stack(values).double().cpu() for path, values in found.items()}


def training(model: Any, rows: list[Sample]) -> None:
    weights = weights_of(model)
    step(model, rows, list(weights.values()))
    for w in weights.values():
        w.grad = None


def forward(model: Any, rows: list[Sample]) -> None:
    (batch,) = sensitivity.pad(rows, pad_token_id=0, batch_size=len(rows))
    with torch.no_grad():
        sensitivity.losses(model, {k: v.to(model.device) for k, v in batch.items()})


def ours(model: Any, rows: list[Sample]) -> dict[str, Tensor]:
    return sensitivity.per_sample(model, sensitivity.pad(rows, pad_token_id=0, batch_size=len(rows)))


class Memory(TorchDispatchMode):
    """Peak bytes of what is allocated while it is entered: of all tensors, and of those shaped like a weight."""

    def __init__(self, shapes: set[tuple[int, int]]) -> None:
        super().__init__()
        self.shapes = shapes | {(i, o) for o, i in shapes}
        self.live, self.peak, self.known = [0, 0], [0, 0], set[int]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self.known and t.dim():
                    self._born(t)
        return out

    def _born(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        sizes = (storage.nbytes(), storage.nbytes() if tuple(t.shape[-2:]) in self.shapes else 0)
        key = storage._cdata
        self.known.add(key)
        self._count(sizes, 1)
        weakref.finalize(storage, self._died, key, sizes)

    def _died(self, key: int, sizes: tuple[int, int]) -> None:
        self.known.discard(key)
        self._count(sizes, -1)

    def _count(self, sizes: tuple[int, int], sign: int) -> None:
        self.live = [live + sign * size for live, size in zip(self.live, sizes, strict=True)]
        self.peak = [max(pair) for pair in zip(self.peak, self.live, strict=True)]


Way = Callable[[Any, list[Sample]], Any]


@dataclass(frozen=True)
class Settings:
    layers: int = 12
    hidden: int = 512
    length: int = 128
    samples: int = 8
    repeats: int = 5
    device: str = "cpu"
    threads: int = 1


def main(argv: list[str]) -> None:
    settings = parse(argv, Settings)
    device, repeats = settings.device, settings.repeats
    torch.set_num_threads(settings.threads)
    model = build(layers=settings.layers, hidden=settings.hidden, device=device)
    rows = draw(settings.samples, settings.length)

    quick: dict[str, Way] = {"forward": forward, "training": training, "ours": ours}
    slow: dict[str, Way] = {"one sample": one_sample, "one layer": one_layer}
    seconds: dict[str, list[float]] = {name: [] for name in (*quick, *slow)}
    values: dict[str, Any] = {}
    for round_ in range(repeats + 1):
        for name, function in quick.items() if round_ not in (1, 2) else (quick | slow).items():
            start = clock(device)
            values[name] = function(model, rows)
            if round_:  # the first warms up
                seconds[name].append(clock(device) - start)
    median = {name: statistics.median(s) for name, s in seconds.items()}

    shapes = {(w.size(0), w.size(1)) for w in weights_of(model).values()}
    memory: dict[str, list[int]] = {}
    for name, function in (quick | slow).items():
        if name != "forward":
            with Memory(shapes) as watch:
                function(model, rows)
            memory[name] = watch.peak

    difference = max(
        float(((values["ours"][path] - want).abs() / want).max()) for path, want in values["one sample"].items()
    )
    backward = {name: median[name] - median["forward"] for name in ("training", "ours")}
    lengths = [len(row.input_ids) for row in rows]
    print(
        f"Llama of {model.config.num_hidden_layers} layers, width {model.config.hidden_size}, {len(rows)} samples of "
        f"{min(lengths)}–{max(lengths)} tokens, {device}\n"
    )
    print(f"{'':12} {'pass / training':>16} {'backward / training':>20} {'gradient MiB':>13} {'all MiB':>9}")
    for name in ("training", "ours", *slow):
        gradient, everything = (peak / 2**20 for peak in (memory[name][1], memory[name][0]))
        share = f"{backward[name] / backward['training']:20.2f}" if name in backward else " " * 20
        print(f"{name:12} {median[name] / median['training']:16.2f} {share} {gradient:13.1f} {everything:9.1f}")
    print(f"\nlargest relative difference of ours from one sample at a time: {difference:.1e}")
    print(
        json.dumps(
            {
                "benchmark": "sensitivity",
                "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine(),
                "versions": {"torch": torch.__version__, "python": platform.python_version()},
                "ratios": {
                    "ours_vs_training_backward": round(backward["ours"] / backward["training"], 3),
                    "ours_vs_training_pass": round(median["ours"] / median["training"], 3),
                    "one_sample_vs_ours": round(median["one sample"] / median["ours"], 3),
                    "one_layer_vs_ours": round(median["one layer"] / median["ours"], 3),
                    "gradient_bytes": {name: peak[1] for name, peak in memory.items()},
                    "peak_bytes": {name: peak[0] for name, peak in memory.items()},
                    "largest_relative_difference": difference,
                },
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
