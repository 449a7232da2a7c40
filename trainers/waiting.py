"""What would have the host wait for the device in every pass, done so that it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def send(numbers: Any, device: torch.device | str, *, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of nested lists of numbers, as `torch.tensor` makes it, on its way to the device.

    A GPU reads it from pinned memory: a copy from pageable memory waits until all that was launched before is done.
    """
    host = torch.tensor(numbers, dtype=dtype)
    if torch.device(device).type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


@contextmanager
def one_sample_a_row() -> Iterator[None]:
    """Spares a look at the device in every pass: whether positions start anew within a row, several samples in one.

    transformers looks where it is given no mask, and has no argument that tells it what our rows are.
    """
    from transformers import masking_utils

    before = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None  # noqa: ARG005 (transformers' name)
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before
