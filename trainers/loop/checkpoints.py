"""A run's checkpoint: one safetensors file, replaced as a whole. The plan and the random state follow from the step.

A file that cannot be what was written (cut, another run's, one bit flipped on a disk) is set aside, with a warning, and
the run starts at step 0: what a disk did is no fault of the run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from trainers import storage
from trainers.loop.flat import FlatBuffers

log = logging.getLogger(__name__)

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
    tensors = {}
    moments = [flat.views(state[kind]) for kind in MOMENTS]
    for (name, parameter), *views in zip(named, *moments, strict=True):
        tensors[f"adapter/{name}"] = parameter.detach()
        tensors |= {f"{kind}/{name}": view for kind, view in zip(MOMENTS, views, strict=True)}
    storage.save_tensors(file, tensors, {"run": fingerprint, "past": json.dumps(past)})


def read(file: storage.Location, *, fingerprint: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and the past; None where there is no checkpoint, or none of this run that is whole.

    Raises StudyError where the place cannot be reached.
    """
    if not storage.exists(file):
        return None
    try:
        tensors, metadata = storage.load_tensors(file)
        if metadata.get("run") != fingerprint:
            raise storage.Damaged("it belongs to another run: recipe, seed, data or adapter differ")
        return tensors, json.loads(metadata["past"])
    except (storage.Damaged, json.JSONDecodeError, KeyError) as error:
        kept = storage.set_aside(file)
        log.warning("a checkpoint was set aside as %s (%s): its training starts at step 0", kept, error)
        return None


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
