"""Spectral exponents: ours against `svdvals` and a Python loop over candidates for xmin, on the same matrices.

    python -m tests.benchmarks.spectrum [device=cpu] [repeats=7] [sizes=576x576,576x1536] [model=FOLDER]
    OMP_NUM_THREADS=4 python -m tests.benchmarks.spectrum                          one thread unless you say so

The loop is what the published scripts do, an iteration and a few tensor operations for each candidate eigenvalue. Both
ways go from the weights to `hill` by the published rule. They take turns; times are medians.

Matrices: Gaussian ones of the sizes below, whose columns have heavy-tailed scales as trained weights do; with `model`
the matrices of the middle layer of a folder with safetensors. |Δα| is against eigenvalues of the Gram matrix in fp64:
of ours, of the baseline, and of fp32 Gram eigenvalues as they come, which are as fast but not right.

ratios        ROWSxCOLUMNS, or the module's name   time of svdvals + loop / ours
              total                                the same of the summed times
delta_alpha   ours, svdvals, plain_fp32            largest |Δα| over the matrices
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, os.environ.get("OMP_NUM_THREADS", "1"))  # read when numpy and torch are imported

import numpy as np  # noqa: E402
import scipy  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from allocators.signals.spectrum.eigen import eigenvalues  # noqa: E402
from allocators.signals.spectrum.tails import fit_tail  # noqa: E402
from tests.benchmarks._shared import parse  # noqa: E402

SIZES = {
    "cpu": [(576, 576), (576, 1536), (1024, 1024), (2048, 2048)],
    "cuda": [(4096, 4096), (4096, 11008)],
}


def ours(W: Tensor) -> float:
    return fit_tail(eigenvalues(W)).hill


def baseline(W: Tensor) -> float:
    return loop(torch.linalg.svdvals(W).square().sort().values)


def loop(lam: Tensor) -> float:
    """`hill` by AlphaLoRA's rule as published: one candidate after the other."""
    x = lam.log10()
    low, high = float(x[0]), float(x[-1])
    fullest = int(torch.histc(x, 100, min=low, max=high).argmax())
    x2 = 10 ** float(torch.linspace(low, high, 101)[fullest])
    ln = lam.log()
    hills = torch.zeros(len(lam) - 1)
    distances = torch.ones(len(lam) - 1)
    for i, xmin in enumerate(lam[:-1]):
        if not math.log10(0.95 * x2) <= float(xmin) <= 1.5 * x2:
            continue
        n = len(lam) - i
        hill = 1 + n / (ln[i:].sum() - n * ln[i])
        hills[i] = hill
        if hill > 1:
            place = torch.arange(n, device=lam.device)
            distances[i] = (1 - (lam[i:] / xmin) ** (1 - hill) - place / n).abs().max()
    return float(hills[distances.argmin()])


def gram_eigenvalues(W: Tensor) -> Tensor:
    lam: Tensor = torch.linalg.eigvalsh(W.T @ W if W.shape[0] >= W.shape[1] else W @ W.T)
    return lam[lam > 0]


def heavy(rows: int, columns: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    W = torch.randn(rows, columns, generator=generator) / columns**0.5
    heavy_tailed: Tensor = W * torch.rand(columns, generator=generator) ** -0.4
    return heavy_tailed.to(device)


def middle_layer(folder: Path, device: str) -> dict[str, Tensor]:
    from allocators.core.shapes import shape_from_config
    from allocators.signals.spectrum.stored import open_weights

    shape = shape_from_config(json.loads((folder / "config.json").read_text(encoding="utf-8")), name=folder.name)
    read = open_weights(folder)
    layer = [m for m in shape.of_role("attention", "mlp") if m.layer == shape.num_layers // 2]
    return {m.name: read(m.path).to(device, torch.float32) for m in layer}


def seconds(run: Callable[[], Any], device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - began


@dataclass(frozen=True)
class Settings:
    device: str = "cpu"
    repeats: int = 7
    sizes: tuple[str, ...] = ()
    model: str = ""


def main(arguments: list[str]) -> None:
    settings = parse(arguments, Settings)
    device, repeats = settings.device, settings.repeats
    if settings.model:
        matrices = middle_layer(Path(settings.model), device)
    else:
        sizes = [tuple(map(int, size.split("x"))) for size in settings.sizes] or SIZES[device]
        matrices = {f"{m}x{n}": heavy(m, n, device) for m, n in sizes}
    print(f"{'matrix':>12} {'svdvals+loop':>13} {'ours':>9} {'ratio':>6}   |Δα| ours  svdvals  plain fp32")
    spent: dict[str, list[float]] = {"baseline": [], "ours": []}
    ratios: dict[str, float] = {}
    deltas: dict[str, list[float]] = {"ours": [], "svdvals": [], "plain_fp32": []}
    for name, W in matrices.items():
        truth = fit_tail(gram_eigenvalues(W.double()).cpu()).hill
        deltas["ours"].append(abs(ours(W) - truth))
        deltas["svdvals"].append(abs(baseline(W) - truth))
        deltas["plain_fp32"].append(abs(fit_tail(gram_eigenvalues(W).cpu()).hill - truth))
        turns = [(seconds(partial(baseline, W), device), seconds(partial(ours, W), device)) for _ in range(repeats)]
        old, new = (statistics.median(times) for times in zip(*turns, strict=True))
        spent["baseline"].append(old)
        spent["ours"].append(new)
        ratios[name] = old / new
        a, b, c = (deltas[key][-1] for key in deltas)
        print(
            f"{name:>12} {1e3 * old:10.1f} ms {1e3 * new:6.1f} ms {old / new:6.2f}      {a:8.1e} {b:8.1e}    {c:8.1e}"
        )
    old, new = sum(spent["baseline"]), sum(spent["ours"])
    ratios["total"] = old / new
    print(f"{'total':>12} {1e3 * old:10.1f} ms {1e3 * new:6.1f} ms {old / new:6.2f}")
    report = {
        "benchmark": "spectrum",
        "device": torch.cuda.get_device_name()
        if device.startswith("cuda")
        else f"cpu, {torch.get_num_threads()} thread(s)",
        "versions": {"torch": torch.__version__, "numpy": np.__version__, "scipy": scipy.__version__},
        "ratios": {name: round(ratio, 2) for name, ratio in ratios.items()},
        "delta_alpha": {key: float(f"{max(values):.2g}") for key, values in deltas.items()},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
