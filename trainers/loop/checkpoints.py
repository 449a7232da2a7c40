"""A run's checkpoint: one safetensors file, replaced as a whole. The plan and the random state follow from the step."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from allocators.core.errors import TrialError
from trainers import storage
from trainers.loop.flat import FlatBuffers

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, in the order that it keeps them


def write(
    file: storage.Location,
    named: Iterable[tuple[str, Tensor]],
    flat: FlatBuffers,
    state: Mapping[str, Tensor],
    *,
    fingerprint: str,
    past: Mapping[str, Any],
) -> None:
    """Stores parameters by name, AdamW's state of them, what is past, and whose run it is."""
    from safetensors.torch import save_file

    tensors = {}
    moments = [flat.views(state[kind]) for kind in MOMENTS]
    for (name, parameter), *views in zip(named, *moments, strict=True):
        tensors[f"adapter/{name}"] = parameter.detach()
        tensors |= {f"{kind}/{name}": view for kind, view in zip(MOMENTS, views, strict=True)}
    with storage.replacing(file) as local:
        save_file(
            {name: tensor.contiguous().cpu() for name, tensor in tensors.items()},
            local,
            metadata={"run": fingerprint, "past": json.dumps(past)},
        )


def read(file: storage.Location, *, fingerprint: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and the past; None where there is no checkpoint.

    Raises TrialError where the file is damaged, or another run's.
    """
    if not storage.exists(file):
        return None
    from safetensors import SafetensorError, safe_open

    with storage.reading(file) as local:
        try:
            with safe_open(local, framework="pt") as stored:
                metadata = stored.metadata() or {}
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise TrialError(f"the checkpoint {file} is damaged ({error}): delete it") from error
    if metadata.get("run") != fingerprint:
        raise TrialError(
            f"the checkpoint {file} belongs to another run (recipe, seed, data or adapter differ): "
            "delete it or choose another folder"
        )
    return tensors, json.loads(metadata["past"])


def restored(
    flat: FlatBuffers, names: Iterable[str], tensors: Mapping[str, Tensor], *, steps: int
) -> dict[str, Tensor]:
    """AdamW's state of the flat buffer after so many steps; zeros where there are no tensors."""
    moments = {kind: torch.zeros_like(flat.values, requires_grad=False) for kind in MOMENTS}
    if tensors:
        for kind, moment in moments.items():
            for name, view in zip(names, flat.views(moment), strict=True):
                view.copy_(tensors[f"{kind}/{name}"])
    return {"step": torch.tensor(float(steps)), **moments}
