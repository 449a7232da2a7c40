"""Tensors of a pack: the parameters of its members side by side, padded with zeros, and their gradients.

Before a step the members' parameters are copied in, after it the gradients are copied back, so that padding is never
trained, counted or saved. K members: every tensor has them, or those that adapt a module, in front.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Buffers:
    """Makes tensors, and says which part of them is which member's parameter.

    Parameters that are placed have gradients to write to (`FlatBuffers.install`).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.written: list[Tensor] = []  # tensors whose gradients `add_gradient` writes
        self._summed: list[Tensor] = []  # gradients that autograd adds to
        self._begun: set[tuple[int, int | None]] = set()  # which of `written` have a gradient of this step: id, row
        self._sources: list[Tensor] = []  # parts of the members' parameters, and where they lie in these tensors
        self._places: list[Tensor] = []
        self._gradients: list[Tensor] = []  # the same of gradients, towards the members
        self._made: list[Tensor] = []
        self._shared: list[tuple[Tensor, Tensor]] = []  # a gradient, and what has to be summed over dim 0 for it

    def tensor(self, *size: int, written: bool = False) -> Tensor:
        """Zeros with a gradient of zeros, which autograd adds to.

        written   `add_gradient` writes it, and the backward pass returns None: one pass over memory less to clear it,
                  and one less to add to it. It stays an argument of what uses it: without, nothing would be asked
                  for a gradient where the input needs none
        """
        made = torch.zeros(size, device=self.device, requires_grad=True)
        made.grad = torch.zeros_like(made, requires_grad=False)
        if written:
            self.written.append(made)
        else:
            self._summed.append(made.grad)
        return made

    def place(self, tensor: Tensor, where: Any, parameter: nn.Parameter, part: Any = ...) -> None:
        """`tensor[where]` is `parameter[part]`: values are copied to it at `load`, gradients from it at `unload`."""
        assert tensor.grad is not None
        assert parameter.grad is not None
        self._places.append(tensor.detach()[where])
        self._sources.append(parameter.detach()[part])
        self._made.append(tensor.grad[where])
        self._gradients.append(parameter.grad[part])

    def place_repeated(self, tensor: Tensor, where: Any, parameter: nn.Parameter, part: Any, *, times: int) -> None:
        """`tensor[where]` is `parameter[part]` so many times, one below the other."""
        assert tensor.grad is not None
        assert parameter.grad is not None
        for place in tensor.detach()[where].chunk(times):
            self._places.append(place)
            self._sources.append(parameter.detach()[part])
        self._shared.append((parameter.grad[part], tensor.grad[where].unflatten(0, (times, -1))))

    def load(self) -> None:
        """The members' parameters into these tensors, whose gradients begin anew."""
        self._begun.clear()
        with torch.no_grad():
            torch._foreach_copy_(self._places, self._sources)
            if self._summed:
                torch._foreach_zero_(self._summed)

    def add_gradient(self, tensor: Tensor, left: Tensor, right: Tensor, *, rows: slice = slice(None)) -> None:
        """Adds the batched product of two factors to rows of the tensor's gradient; a step's first takes its place."""
        assert tensor.grad is not None
        gradient, part = tensor.grad[:, rows], (id(tensor), rows.start)
        first = part not in self._begun
        self._begun.add(part)
        if left.dtype == gradient.dtype:
            gradient.baddbmm_(left, right, beta=0 if first else 1)  # 0: what lies there is not read
        elif first:
            gradient.copy_(torch.bmm(left, right))
        else:
            gradient.add_(torch.bmm(left, right))

    def unload(self) -> None:
        """The gradients to the members."""
        with torch.no_grad():
            for tensor in self.written:
                if (id(tensor), None) not in self._begun and tensor.grad is not None:
                    tensor.grad.zero_()  # no backward pass came by
            torch._foreach_copy_(self._gradients, self._made)
            for gradient, made in self._shared:
                gradient.copy_(made.sum(0))
