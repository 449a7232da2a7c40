"""How heavy the tail of each weight matrix's spectrum is. Reads weights, needs no data, changes nothing.

    signal = measure("models/llama-7b", shape, provenance={…})      # a folder, a Hugging Face id, or a resident model
    signal.metric("model.layers.0.self_attn.q_proj", "hill")
    fit_tail(eigenvalues(weight), xmin_rule="window").hill           # one matrix

Or from a terminal: python -m allocators.show model=tiny-dense

Per module: `hill`, `alpha_hat`, `stable_rank` by the published rule of where the tail begins, and `hill_window`,
`hill_peak`, `hill_median` by the others, which cost nothing beside the eigenvalues; `snr` (Spectrum's signal-to-noise
ratio), `condition` (KappaTune's condition number) and `spectral_norm` (σ_max, by which dead matrices are known). Rules
for experts take the plain mean over a layer's modules (`core/layers.py`).

How the eigenvalues of WᵀW are computed is said in `eigen.py`, how a tail is fitted in `tails.py`, the rest in
`values.py`.

A study's measurement streams the weights from disk as they are stored, one matrix at a time, and keeps the rows
measured so far beside the signal's file: one that is cut off goes on.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
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
from allocators.signals.spectrum.values import condition, signal_to_noise, singular_values

VERSION = 2  # part of the provenance: raise it when the same weights would give other numbers, or more of them


def measurement_of(source: Source) -> Measurement:
    """The spectrum of the base model's projections as they are stored, streamed from the source's folder, whatever the
    resident model was rounded to; of the resident model where there is no folder.

    Experts are read from the resident model, where those of a layer lie in one tensor; a row is `<path>.<expert>`.
    """
    stored, chosen = source.folder, None
    rounded = stored is None or source.shape.is_moe
    if source.shape.is_moe:
        chosen = [m.path for m in source.shape.of_role("attention", "mlp", "shared_expert", "expert")]
    kinds = sorted({m.name for m in source.shape.modules if m.path in set(chosen)}) if chosen else None
    provenance = provenance_of(source.name, source.identity, modules=kinds)
    provenance |= {"dtype": source.dtype} if rounded else {}

    def run() -> Signal:
        source.scratch.mkdir(parents=True, exist_ok=True)
        return measure(
            stored() if stored else source.model,
            source.shape,
            provenance=provenance,
            modules=chosen,
            resident=source.model if source.shape.is_moe else None,
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
    resident: nn.Module | None = None,
    device: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    resume: Path | None = None,
) -> Signal:
    """Spectrum of every chosen module: rows by module path, of a stack by `<path>.<expert>`; metrics as above.

    weights      folder with safetensors (sharded or not) or Hugging Face id, read one matrix at a time; or a resident
                 model
    provenance   everything the numbers depend on (`provenance_of`); becomes the signal's
    modules      names (`q_proj`) or paths; all attention and MLP projections unless given. On an MoE base that is
                 attention; routers are refused
    resident     the model that stacked experts are read from, where some are chosen; `weights` itself where it is one
    device       where to compute; unless given, CUDA where there is one, or where the resident model is
    progress     called with (done, total, path) after each module
    resume       file that keeps the rows measured so far, written whole or not at all, removed at the end

    A metric that a matrix does not have (a zero matrix has no tail, one with a NaN nothing) is empty in its row, with a
    warning.

    Raises StudyError for weights or modules that are not there or not what the shape says.
    """
    chosen = _choose(shape, modules)
    read = open_weights(weights)
    resident = weights if isinstance(weights, nn.Module) else resident
    if device is None and not isinstance(weights, nn.Module):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    key = digest_of({"provenance": dict(provenance), "modules": [m.path for m in chosen]})
    rows: dict[str, Any] = _kept(resume, key) if resume else {}
    for done, module in enumerate(chosen, start=1):
        last = f"{module.path}.{module.num_experts - 1}" if module.num_experts else module.path
        if last not in rows:
            for name, weight in _matrices(module, read, resident):
                rows[name] = _row(name, _checked(weight, module), device)
            if resume:
                _keep(resume, key, rows)
        if progress:
            progress(done, len(chosen), module.path)
    signal = Signal("spectrum", rows, axis="module", unit="1", provenance=provenance)
    if resume:
        resume.unlink(missing_ok=True)
    return signal


def _matrices(
    module: ModuleShape, read: Callable[[str], Tensor], resident: nn.Module | None
) -> Iterator[tuple[str, Tensor]]:
    """Row and weight [out, in] of a module, or of every expert of a stack."""
    if not module.num_experts:
        yield module.path, read(module.path)
        return
    if resident is None:
        raise StudyError(f"{module.path} is a stack of experts: give the resident model to read it from")
    for expert in range(module.num_experts):
        yield f"{module.path}.{expert}", expert_weight(resident, module, expert)


def expert_weight(model: nn.Module, module: ModuleShape, expert: int) -> Tensor:
    """Weight [out, in] of one expert's projection, from the stack [E, ·, ·] that transformers keeps it in.

    Raises StudyError for experts that lie in no such stack, or are spread over devices.
    """
    experts: Any = model.get_submodule(module.path.rpartition(".")[0])
    if not hasattr(experts, "is_concatenated"):
        raise StudyError(f"{module.path} ({type(experts).__name__}) does not use transformers' experts interface")
    gated = experts.has_gate and module.name != "down_proj"
    stack = getattr(experts, "gate_up_proj" if gated else module.name)
    if hasattr(stack, "full_tensor"):
        raise StudyError(
            f"{module.path} is spread over devices: the spectrum of experts needs a base that is not sharded"
        )
    weight: Tensor = stack.detach()[expert]
    weight = weight.t() if experts.is_transposed else weight
    if not gated:
        return weight
    second = module.name == "up_proj"
    if experts.is_concatenated:
        return weight.chunk(2)[int(second)]
    return weight[int(second) :: 2]


def _row(name: str, weight: Tensor, device: str | None) -> dict[str, list[float]]:
    tails = {rule: "hill" if rule == "published" else f"hill_{rule}" for rule in XMIN_RULES}
    metrics = ("stable_rank", *tails.values(), "alpha_hat", "snr", "condition", "spectral_norm")
    row: dict[str, list[float]] = {metric: [] for metric in metrics}
    try:
        lam = eigenvalues(weight.to(device) if device else weight)
    except StudyError as error:
        warnings.warn(f"{name} has no spectrum: {error}", ToolkitWarning, stacklevel=3)
        return row
    row["stable_rank"] = [stable_rank(lam)]
    for rule, metric in tails.items():
        try:
            row[metric] = [fit_tail(lam, xmin_rule=rule).hill]
        except StudyError as error:
            warnings.warn(f"{name} has no {metric}: {error}", ToolkitWarning, stacklevel=3)
    if row["hill"]:
        row["alpha_hat"] = [alpha_hat(lam, hill=row["hill"][0])]
    sigma = singular_values(lam, size=min(weight.shape))
    row |= {"condition": [condition(sigma)], "spectral_norm": [float(sigma[-1])]}
    try:
        row["snr"] = [signal_to_noise(sigma, sides=weight.shape)]
    except StudyError as error:
        warnings.warn(f"{name} has no snr: {error}", ToolkitWarning, stacklevel=3)
    return row


def _choose(shape: ModelShape, modules: Collection[str] | None) -> list[ModuleShape]:
    usual = shape.of_role("attention", "mlp")
    if modules is None:
        return list(usual)
    possible = shape.of_role("attention", "mlp", "shared_expert", "expert")
    for asked in modules:
        if not any(asked in (m.name, m.path) for m in possible):
            names = sorted({m.name for m in possible})
            reason = ""
            if any(asked in (m.name, m.path) for m in shape.of_role("router")):
                reason = "; routers have no spectrum here"
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
