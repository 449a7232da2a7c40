"""Rows that several members train on run once through the layers that none of them adapts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from trainers.packing.passes import Passes


class SharedLayers:
    """Layers below number `first`, the first that a member adapts: rows that several members train on run once.

    Whatever the model hands to these layers loses the rows that are there already; at the input of the first adapted
    layer they are filled in again. The model itself and the layers from there on see every member's rows.
    """

    def __init__(self, layers: Sequence[nn.Module], first: int, passes: Passes) -> None:
        self.layers, self.first, self.passes = layers, first, passes
        self.rows_U: Tensor | None = None  # which rows run; None: all of them
        self.copies_T = torch.empty(0)  # for every row of the pack, where it lies among those

    def puts(self) -> list[Callable[[], Callable[[], None]]]:
        """What puts the hooks in, each of which returns what takes it out."""
        return [
            partial(_put_before, layer, partial(self.before, number))
            for number, layer in enumerate(self.layers[: self.first + 1])
        ]

    def before(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Inputs of layer `number`: equal rows once, from layer `first` on every row; None: unchanged."""
        if number == 0:
            self._begin((args, kwargs))
        if self.rows_U is None:
            return None
        if number == self.first:
            (hidden, *rest), copies_T = args, self.copies_T
            return (hidden.index_select(0, copies_T), *rest), kwargs
        rows_U, num_rows = self.rows_U, len(self.copies_T)
        return tree_map(lambda x: x.index_select(0, rows_U) if _has_rows(x, num_rows) else x, (args, kwargs))

    def _begin(self, inputs: Any) -> None:
        now = self.passes.now
        run = sorted(set(now.same_as))
        num_rows = len(now.same_as) * now.rows
        # A tensor that is neither one for all rows nor one row each (a bias for every head, say) cannot be divided.
        known = all(x.size(0) in (1, num_rows) for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.dim() > 1)
        self.rows_U = None
        if known and inputs[0] and len(run) < len(now.same_as):
            rows_KB = torch.arange(num_rows, device=self.passes.device).view(-1, now.rows)
            # a list as an index would travel to the device, which would be waited for
            self.rows_U = torch.cat([rows_KB[k] for k in run])
            self.copies_T = torch.cat([rows_KB[run.index(k)] for k in now.same_as])


def _has_rows(x: Any, num_rows: int) -> bool:
    return isinstance(x, Tensor) and x.dim() > 1 and x.size(0) == num_rows


def _put_before(module: nn.Module, hook: Callable[..., Any]) -> Callable[[], None]:
    return module.register_forward_pre_hook(hook, with_kwargs=True).remove
