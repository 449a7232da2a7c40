"""How heavy the tail of each weight matrix's spectrum is. Reads weights, needs no data, changes nothing.

    signal = measure("models/llama-7b", shape, provenance={…})      # a folder, a Hugging Face id, or a resident model
    signal.metric("model.layers.0.self_attn.q_proj", "hill")
    fit_tail(eigenvalues(weight), xmin_rule="window").hill           # one matrix

Or from a terminal: python -m allocators.show model=tiny-dense

Per module: `hill`, `alpha_hat`, `stable_rank` by the published rule of where the tail begins, and `hill_window`,
`hill_peak`, `hill_median` by the others, which cost nothing beside the eigenvalues. Allocators take the plain mean over
a layer's modules (`core/layers.py`).

How the eigenvalues of WᵀW are computed is said in `eigen.py`, how a tail is fitted in `tails.py`.

A study's measurement streams the weights from disk as they are stored, one matrix at a time, and keeps the rows
measured so far beside the signal's file: one that is cut off goes on.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allocators.core.errors import StudyError, ToolkitWarning, did_you_mean
from allocators.core.types import ModelShape, ModuleShape, Signal, digest_of
from allocators.signals import Measurement, Source
from allocators.signals.spectrum.eigen import eigenvalues
from allocators.signals.spectrum.stored import Weights, open_weights
from allocators.signals.spectrum.tails import XMIN_RULES, alpha_hat, fit_tail, stable_rank

VERSION = 1  # part of the provenance: raise it when the same weights would give other numbers


def measurement_of(source: Source) -> Measurement:
    """The spectrum of the base model's attention and MLP weights as they are stored, streamed from the source's folder,
    whatever the resident model was rounded to; of the resident model where there is no folder.
    """
    stored = source.folder
    provenance = provenance_of(source.name, source.identity) | ({} if stored else {"dtype": source.dtype})

    def run() -> Signal:
        source.scratch.mkdir(parents=True, exist_ok=True)
        return measure(
            stored() if stored else source.model,
            source.shape,
            provenance=provenance,
            device=str(source.device),
            progress=source.progress,
            resume=source.scratch / f"spectrum-{digest_of(provenance)}.part",
        )

    return Measurement(provenance, run)


def provenance_of(name: str, identity: str, *, modules: Collection[str] | None = None) -> dict[str, Any]:
    """What the numbers depend on when they are those of the stored weights."""
    chosen = {"modules": sorted(modules)} if modules is not None else {}
    return {"model": name, "weights": identity, "code": VERSION} | chosen


def measure(
    weights: Weights,
    shape: ModelShape,
    *,
    provenance: Mapping[str, Any],
    modules: Collection[str] | None = None,
    device: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    resume: Path | None = None,
) -> Signal:
    """Spectrum of every chosen module: rows by module path, metrics `hill`, `alpha_hat`, `stable_rank`, `hill_<rule>`.

    weights      folder with safetensors (sharded or not) or Hugging Face id, read one matrix at a time; or a resident
                 model
    provenance   everything the numbers depend on (`provenance_of`); becomes the signal's
    modules      names (`q_proj`) or paths; all attention and MLP projections unless given. On an MoE base that is
                 attention; routers and stacked experts are refused
    device       where to compute; unless given, CUDA where there is one, or where the resident model is
    progress     called with (done, total, path) after each module
    resume       file that keeps the rows measured so far, written whole or not at all, removed at the end

    A metric that a matrix does not have (a zero matrix has no tail, one with a NaN nothing) is empty in its row, with a
    warning.

    Raises StudyError for weights or modules that are not there or not what the shape says.
    """
    chosen = _choose(shape, modules)
    read = open_weights(weights)
    if device is None and not isinstance(weights, nn.Module):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    key = digest_of({"provenance": dict(provenance), "modules": [m.path for m in chosen]})
    rows: dict[str, Any] = _kept(resume, key) if resume else {}
    for done, module in enumerate(chosen, start=1):
        if module.path not in rows:
            rows[module.path] = _row(module, _checked(read(module.path), module), device)
            if resume:
                _keep(resume, key, rows)
        if progress:
            progress(done, len(chosen), module.path)
    signal = Signal("spectrum", rows, axis="module", unit="1", provenance=provenance)
    if resume:
        resume.unlink(missing_ok=True)
    return signal


def _row(module: ModuleShape, weight: Tensor, device: str | None) -> dict[str, list[float]]:
    names = {rule: "hill" if rule == "published" else f"hill_{rule}" for rule in XMIN_RULES}
    row: dict[str, list[float]] = {name: [] for name in ("stable_rank", *names.values(), "alpha_hat")}
    try:
        lam = eigenvalues(weight.to(device) if device else weight)
    except StudyError as error:
        warnings.warn(f"{module.path} has no spectrum: {error}", ToolkitWarning, stacklevel=3)
        return row
    row["stable_rank"] = [stable_rank(lam)]
    for rule, name in names.items():
        try:
            row[name] = [fit_tail(lam, xmin_rule=rule).hill]
        except StudyError as error:
            warnings.warn(f"{module.path} has no {name}: {error}", ToolkitWarning, stacklevel=3)
    if row["hill"]:
        row["alpha_hat"] = [alpha_hat(lam, hill=row["hill"][0])]
    return row


def _choose(shape: ModelShape, modules: Collection[str] | None) -> list[ModuleShape]:
    usual = shape.of_role("attention", "mlp")
    if modules is None:
        return list(usual)
    possible = shape.of_role("attention", "mlp", "shared_expert")
    for asked in modules:
        if not any(asked in (m.name, m.path) for m in possible):
            names = sorted({m.name for m in possible})
            reason = ""
            if any(asked in (m.name, m.path) for m in shape.of_role("router", "expert")):
                reason = "; routers and stacked experts have no spectrum here"
            raise StudyError(
                f"{shape.name} has no matrix '{asked}' to take the spectrum of: choose from {', '.join(names)}{reason}"
                f"{did_you_mean(asked, names)}"
            )
    return [m for m in possible if m.name in modules or m.path in modules]


def _checked(weight: Tensor, module: ModuleShape) -> Tensor:
    expected = (module.out_features, module.in_features)
    if tuple(weight.shape) != expected or not weight.is_floating_point() or weight.element_size() < 2:
        raise StudyError(
            f"{module.path} is {weight.dtype} {tuple(weight.shape)} where the config says {expected}: "
            "the spectrum needs plain weights of 16 bits or more, not quantised ones"
        )
    return weight


def _kept(file: Path, key: str) -> dict[str, dict[str, list[float]]]:
    """Rows of an interrupted measurement of the same weights."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["key"] == key:
            rows: dict[str, dict[str, list[float]]] = kept["rows"]
            return rows
        reason = "belongs to another measurement"
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        reason = "is damaged"
    warnings.warn(f"{file} {reason}: measuring the spectrum from the beginning", ToolkitWarning, stacklevel=3)
    return {}


def _keep(file: Path, key: str, rows: Mapping[str, Any]) -> None:
    beside = file.with_suffix(".tmp")
    beside.write_text(json.dumps({"key": key, "rows": rows}), encoding="utf-8")
    os.replace(beside, file)  # a kill leaves the old file or the new one
