"""Sees what makes the host wait for a device, on tensors without values or on a CPU in a device's place.

with watched(waits := [], torch.device("meta")):
    step()
assert waits == []
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = (
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
)
LOOKS = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__format__", "__index__")
COPIES = ("_to_copy", "copy_", "_copy_from", "lift_fresh")


class Operations(TorchDispatchMode):
    """Notes operations for which the host waits: sizes that depend on values, copies from the host that block."""

    def __init__(self, waits: list[str], device: torch.device) -> None:
        super().__init__()
        self.waits, self.device = waits, device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        here = any(isinstance(x, Tensor) and x.device == self.device for x in tree_leaves(args))
        found = here and name in WAITING
        found |= here and name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in ("index", "index_put", "index_put_", "_unsafe_index"):
            found |= any(
                i is not None and (i.dtype in (torch.bool, torch.uint8) or i.device != self.device) for i in args[1]
            )
        out = func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, out)) if isinstance(x, Tensor)]
        if name in COPIES and len({x.device for x in tensors}) > 1:
            found |= True not in (kwargs.get("non_blocking"), *args[2:3])
        if found:
            self.waits.append(name)
        return out


class Methods(TorchFunctionMode):
    """Notes what becomes no operation of its own: a tensor of Python's numbers made on a device, a list as an index."""

    def __init__(self, waits: list[str], device: torch.device) -> None:
        super().__init__()
        self.waits, self.device = waits, device

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in LOOKS and isinstance(args[0], Tensor) and args[0].device == self.device:
            self.waits.append(name)
        if (
            name in ("tensor", "as_tensor")
            and self.device.type != "cpu"
            and torch.device(kwargs.get("device") or "cpu") == self.device
        ):
            self.waits.append(name)
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(i, list | range) for i in index):
                self.waits.append(f"{name} with a list")
        return func(*args, **kwargs)


@contextmanager
def watched(waits: list[str], device: torch.device) -> Iterator[None]:
    """Adds to `waits` what would wait for the device in this block."""
    with Operations(waits, device), Methods(waits, device):
        yield
