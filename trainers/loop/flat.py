"""All parameters of a run in one buffer, all gradients in another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class FlatBuffers:
    """All parameters of a run in one fp32 buffer and all gradients in another: clearing them, summing over workers,
    clipping and AdamW are one operation each.

    parameters  become views of `values`, each from a multiple of 64 bytes on (as memory of their own would begin);
                gaps are zeros, and stay zeros
    gradients   as long, and two numbers behind them that travel along: the step's loss and whether a worker failed
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        (device,) = {p.device for p in parameters}
        self.parameters = list(parameters)
        self._sizes = [p.numel() + -p.numel() % (64 // torch.float32.itemsize) for p in parameters]
        self.values = nn.Parameter(torch.zeros(sum(self._sizes), device=device))
        for parameter, view in zip(parameters, self.views(self.values.detach()), strict=True):
            parameter.data = view.copy_(parameter.detach())
        self.gradients = torch.zeros(sum(self._sizes) + 2, device=device)
        self.values.grad, self.loss, self.failures = self.gradients[:-2], self.gradients[-2], self.gradients[-1]
        self.installed = False

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parts of a buffer that lies as `values` does, a parameter each, in its size."""
        parts = flat.split(self._sizes)
        return [part[: p.numel()].view_as(p) for part, p in zip(parts, self.parameters, strict=True)]

    def install(self) -> None:
        """Takes over the gradients of the first backward pass (which left None where there are none, as is checked)."""
        for parameter, view in zip(self.parameters, self.views(self.gradients[:-2]), strict=True):
            if parameter.grad is not None:
                view.copy_(parameter.grad)
            parameter.grad = view
        self.installed = True

    def clear(self) -> None:
        """Sets all gradients to zero, in place."""
        self.gradients.zero_()

    def clip(self, max_norm: float) -> None:
        """g ← g · min(1, max_norm/‖g‖); 0 turns it off. The norm stays on the device."""
        if max_norm > 0:
            norm = torch.linalg.vector_norm(self.gradients[:-2])
            self.gradients[:-2].mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
