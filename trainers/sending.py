"""Numbers of the host on their way to a device that computes meanwhile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def send(numbers: Any, device: torch.device | str, *, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of nested lists of numbers, as `torch.tensor` makes it, on the device, which is not waited for.

    A GPU reads it from pinned memory: a copy from pageable memory waits until all that was launched before is done.
    """
    host = torch.tensor(numbers, dtype=dtype)
    if torch.device(device).type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
