"""LoRA experts on a frozen linear layer: our one-GEMM form against the loops that the papers describe.

    python -m tests.benchmarks.lora_moe                      # d 576, 1024, 2048, N 2..16: about four minutes
    python -m tests.benchmarks.lora_moe sizes=1024 experts=8 repeats=15 device=cuda

Variants, 2048 tokens, rank 8, top-2 for routed experts, forward + backward with a gradient for the input; in fp32
unless dtype=bfloat16 is given, in which our factors stay fp32 all the same:

    frozen   the linear layer alone, weight frozen: the unit
    MoLA     a LoRA pair per expert; for each expert list its tokens, run them, weigh, add up: the loop that Mixtral
             came to transformers with and that the LoRA-MoE papers took over
    Hydra    one A, a B per expert; each B runs on all tokens and is weighed by the softmax
    ours     `trainers.adapter.lora_moe.lora_moe_linear`

Time is a median over interleaved repeats in one process, as a multiple of `frozen` in the same run: CPU seconds of the
process (what else the machine does counts less), or wall clock on a GPU.

`at best` is the loop over what our form's own multiplications cost if nothing else cost anything. Per token it is
3·d·(D + U) multiply-adds beside the frozen layer's 2·d² (forward, input gradient; the LoRA weights' gradient too), with
D columns down (routed N·r + N, Hydra r + N) and U = N·r up: a time of 1 + 1.5·(D + U)/d. No form with dense GEMMs beats
a loop by more.

Launching operations are ATen calls that compute or fill: views, allocations and shape queries are left out. Saved bytes
are the storages autograd keeps, without the input and the weights. Syncs are calls that make the host wait for a
device: `nonzero` (a size that depends on data) and `item`; `tolist`, two an expert in MoLA's loop, is no ATen call.

Names in the JSON line:
    routed_vs_mola_d{d}_N{N}, hydra_vs_loop_d{d}_N{N}    time of the loop over ours
    routed_…, hydra_…, mola_…, hydra_loop_d{d}_N{N}      time over `frozen`
    routed_at_best_…, hydra_at_best_d{d}_N{N}            the bound above
    saved_mola_vs_routed, saved_loop_vs_hydra            saved bytes of the loop over ours, N = 8
    ops                                                  by N and variant: [forward, backward, syncs]
    loss_gap                                             largest relative difference of the losses of 30 steps
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.benchmarks._shared import clock, parse
from trainers.adapter.lora_moe import lora_moe_linear

TOKENS, RANK, TOP_K, SCALE = 2048, 8, 2, 2.0

# --- the loops, written from the papers' description -----------------------------------------------------------------


class MolaLoop(nn.Module):
    """MoLA: a LoRA pair per expert, tokens sent to their top-k experts one expert after the other."""

    def __init__(self, weight: Tensor, num_experts: int) -> None:
        super().__init__()
        self.weight = weight
        out_features, in_features = weight.shape
        self.router = nn.Linear(in_features, num_experts, bias=False)
        self.lora_a = nn.ModuleList(nn.Linear(in_features, RANK, bias=False) for _ in range(num_experts))
        self.lora_b = nn.ModuleList(nn.Linear(RANK, out_features, bias=False) for _ in range(num_experts))

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight)
        probs = F.softmax(self.router(x), dim=-1, dtype=torch.float32)
        gates, chosen = probs.topk(min(TOP_K, probs.shape[-1]), dim=-1)
        gates = (gates / gates.sum(-1, keepdim=True)).to(x.dtype)
        mask = F.one_hot(chosen, len(self.lora_b)).permute(2, 1, 0)
        experts_out = torch.zeros_like(out)
        for j, (a, b) in enumerate(zip(self.lora_a, self.lora_b, strict=True)):
            slot, tokens = torch.where(mask[j])
            if len(tokens) == 0:
                continue
            slots, ids = slot.tolist(), tokens.tolist()
            y = b(a(x[ids])) * SCALE * gates[ids, slots, None]
            experts_out.index_add_(0, tokens, y)
        return out + experts_out


class HydraLoop(nn.Module):
    """HydraLoRA: one A, a B per expert, every B on every token, weighed by the router's softmax."""

    def __init__(self, weight: Tensor, num_experts: int) -> None:
        super().__init__()
        self.weight = weight
        out_features, in_features = weight.shape
        self.router = nn.Linear(in_features, num_experts, bias=False)
        self.lora_a = nn.Linear(in_features, RANK, bias=False)
        self.lora_b = nn.ModuleList(nn.Linear(RANK, out_features, bias=False) for _ in range(num_experts))

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight)
        gates = F.softmax(self.router(x), dim=-1, dtype=torch.float32).to(x.dtype)
        h = self.lora_a(x)
        for j, b in enumerate(self.lora_b):
            out = out + gates[:, j, None] * b(h) * SCALE
        return out


class Ours(nn.Module):
    """Our layer with the values of one of the loops."""

    def __init__(self, loop: MolaLoop | HydraLoop) -> None:
        super().__init__()
        self.weight = loop.weight
        a = [loop.lora_a] if isinstance(loop, HydraLoop) else loop.lora_a
        self.top_k = len(loop.lora_b) if isinstance(loop, HydraLoop) else TOP_K
        self.down = nn.Parameter(torch.cat([m.get_parameter("weight") for m in (*a, loop.router)]).detach().float())
        self.up = nn.Parameter(torch.cat([m.get_parameter("weight") for m in loop.lora_b], dim=1).detach().float())

    def forward(self, x: Tensor) -> Tensor:
        return lora_moe_linear(x, self.weight, None, self.down, self.up, rank=RANK, top_k=self.top_k, scale=SCALE)[0]


Layer = MolaLoop | HydraLoop | Ours


# --- counting --------------------------------------------------------------------------------------------------------

_NO_LAUNCH = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "detach",
    "alias",
}
_SYNC = {"nonzero", "_local_scalar_dense", "masked_select", "unique_dim", "equal"}


@dataclass
class Launches(TorchDispatchMode):
    """Counts ATen calls below autograd while it is entered."""

    def __post_init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.syncs = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        self.syncs += name in _SYNC
        if not func.is_view and name not in _NO_LAUNCH and name not in _SYNC - {"nonzero"}:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Counts:
    forward: int
    backward: int
    syncs: int
    saved_bytes: int


def count(function: Callable[[Tensor], Tensor], x: Tensor, *, parameters: list[Tensor]) -> Counts:
    """Launching operations, syncs and bytes saved for backward of one forward + backward on input `x`."""
    x = x.detach().requires_grad_()
    for p in parameters:
        p.grad = None
    known = {t.untyped_storage().data_ptr() for t in (x, *parameters)}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), Launches() as forward:
        y = function(x)
    grad = torch.ones_like(y)
    with Launches() as backward:
        y.backward(grad)
    return Counts(len(forward.names), len(backward.names), forward.syncs + backward.syncs, sum(saved.values()))


# --- measuring -------------------------------------------------------------------------------------------------------


def variants(d: int, num_experts: int, *, device: str, dtype: torch.dtype = torch.float32) -> dict[str, Layer]:
    torch.manual_seed(0)
    weight = (torch.randn(d, d) / d**0.5).to(device, dtype)
    mola, hydra = (loop(weight, num_experts).to(device, dtype) for loop in (MolaLoop, HydraLoop))
    for loop in (mola, hydra):  # a B that is not zero, as in the middle of a training
        for b in loop.lora_b:
            nn.init.normal_(b.get_parameter("weight"), std=0.02)
    return {"mola": mola, "hydra_loop": hydra, "routed": Ours(mola), "hydra": Ours(hydra)}


def times(functions: dict[str, Callable[[Tensor], Tensor]], x0: Tensor, *, repeats: int) -> dict[str, float]:
    """Median seconds of forward + backward; one call of each per round, so that a busy moment hits all of them."""
    grad = torch.randn_like(x0)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(repeats + 1):
        for name, function in functions.items():
            x = x0.detach().requires_grad_()
            start = clock(x0.device)
            function(x).backward(grad)
            if round_:  # the first warms up
                seconds[name].append(clock(x0.device) - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def train(layer: Layer, *, device: str, steps: int = 30) -> list[float]:
    """Losses of AdamW on a fixed target; the same data in the same order for every layer."""
    generator = torch.Generator().manual_seed(1)
    d = layer.weight.shape[0]
    target = (torch.randn(d, d, generator=generator) / d**0.5).to(device)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        x = torch.randn(256, d, generator=generator).to(device)
        loss = F.mse_loss(layer(x), x @ target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def floor(d: int, num_experts: int, *, shared_a: bool) -> float:
    """Multiplications of our form, forward and backward, over those of the frozen layer."""
    down = RANK * (1 if shared_a else num_experts) + num_experts
    return 1 + 1.5 * (down + RANK * num_experts) / d


@dataclass(frozen=True)
class Settings:
    sizes: tuple[int, ...] = (576, 1024, 2048)
    experts: tuple[int, ...] = (2, 4, 8, 16)
    repeats: int = 9
    device: str = "cpu"
    threads: int = 1
    dtype: str = "float32"


def main(argv: list[str]) -> None:
    settings = parse(argv, Settings)
    device, repeats, dtype = settings.device, settings.repeats, getattr(torch, settings.dtype)
    torch.set_num_threads(settings.threads)
    sizes, experts = settings.sizes, settings.experts
    ratios: dict[str, Any] = {}

    print(
        f"forward + backward × frozen linear, {TOKENS} tokens, rank {RANK}, {settings.dtype}, {device}, "
        f"median of {repeats}"
    )
    columns = f"{'ours':>6} {'faster':>7} {'at best':>8}"
    print(f"{'d':>5} {'N':>3}  {'MoLA loop':>9} {columns}   {'Hydra loop':>10} {columns}")
    for d in sizes:
        for n in experts:
            layers = variants(d, n, device=device, dtype=dtype)
            x = torch.randn(TOKENS, d).to(device, dtype)
            weight = layers["routed"].weight
            t = times({"frozen": partial(F.linear, weight=weight), **layers}, x, repeats=repeats)
            rel = {name: t[name] / t["frozen"] for name in layers}
            ratios |= {f"{name}_d{d}_N{n}": round(value, 3) for name, value in rel.items()}
            ratios[f"routed_vs_mola_d{d}_N{n}"] = round(t["mola"] / t["routed"], 3)
            ratios[f"hydra_vs_loop_d{d}_N{n}"] = round(t["hydra_loop"] / t["hydra"], 3)
            best = {
                "routed": rel["mola"] / floor(d, n, shared_a=False),
                "hydra": rel["hydra_loop"] / floor(d, n, shared_a=True),
            }
            ratios |= {f"{name}_at_best_d{d}_N{n}": round(value, 3) for name, value in best.items()}
            print(
                f"{d:5} {n:3}  "
                f"{rel['mola']:9.2f} {rel['routed']:6.2f} {t['mola'] / t['routed']:6.2f}× {best['routed']:7.2f}×   "
                f"{rel['hydra_loop']:10.2f} {rel['hydra']:6.2f} {t['hydra_loop'] / t['hydra']:6.2f}× "
                f"{best['hydra']:7.2f}×",
                flush=True,
            )

    d = 1024
    print(f"\nlaunching operations forward/backward, syncs, MiB saved for backward (d {d}, {TOKENS} tokens)")
    ratios["ops"] = {}
    for n in experts:
        layers = variants(d, n, device=device)
        x = torch.randn(TOKENS, d).to(device)
        counts = {k: count(f, x, parameters=[f.weight, *f.parameters()]) for k, f in layers.items()}
        row = "   ".join(
            f"{k} {c.forward}/{c.backward}, {c.syncs}, {c.saved_bytes / 2**20:.2f}" for k, c in counts.items()
        )
        print(f"N {n:2}  {row}")
        ratios["ops"][n] = {k: [c.forward, c.backward, c.syncs] for k, c in counts.items()}
        if n == 8:
            ratios["saved_mola_vs_routed"] = round(counts["mola"].saved_bytes / counts["routed"].saved_bytes, 1)
            ratios["saved_loop_vs_hydra"] = round(counts["hydra_loop"].saved_bytes / counts["hydra"].saved_bytes, 1)

    layers = variants(256, 8, device=device)
    losses = {name: train(layer, device=device) for name, layer in layers.items()}
    gaps = [
        max(abs(a - b) / a for a, b in zip(losses[loop], losses[ours], strict=True))
        for loop, ours in (("mola", "routed"), ("hydra_loop", "hydra"))
    ]
    ratios["loss_gap"] = max(gaps)
    print("\ntraining 30 steps, first and last loss: ", end="")
    print(", ".join(f"{k} {v[0]:.6f} → {v[-1]:.6f}" for k, v in losses.items()), f"(largest gap {max(gaps):.1e})")

    print(
        json.dumps(
            {
                "benchmark": "lora_moe",
                "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine(),
                "versions": {"torch": torch.__version__, "python": platform.python_version()},
                "ratios": ratios,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
