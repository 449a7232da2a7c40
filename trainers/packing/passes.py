"""The forward pass that members share: whose rows are where, what each member drops, and what takes part in it.

Shapes: K members, P of them adapt a module, T tokens of a member, I input and O output features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from allocators.core.types import LoraSettings
from trainers.adapter.linear import add_product_, kept_inputs, scale_of_kept


@dataclass(frozen=True)
class Pass:
    """The forward pass under way: rows a member, places a row; each member's own longest row and random state.

    same_as   for each member the first that trains on the same rows, itself where none before it does
    """

    rows: int
    width: int
    widths: Sequence[int]
    generators: Sequence[torch.Generator]
    same_as: Sequence[int]


class Passes:
    """The LoRA settings of the members, and the pass under way: `now`."""

    def __init__(self, loras: Sequence[LoraSettings], device: torch.device) -> None:
        self.loras, self.device = loras, device
        self.now = Pass(1, 1, [], [], [])

    @property
    def num_members(self) -> int:
        """The number of runs that share a pass."""
        return len(self.loras)

    def scale_of(self, member: int) -> float:
        """lora_alpha/r, and 1/(1 − p) where inputs are dropped."""
        return scale_of_kept(self.loras[member].scale, self.loras[member].lora_dropout)

    def drops(self, members: Sequence[int]) -> bool:
        """Whether any of these members drops inputs."""
        return any(self.loras[k].lora_dropout for k in members)

    def kept(self, members: Sequence[int], num_features: int) -> Tensor | None:
        """Which inputs stay, [P, T, I]; None: all. Drawn as each member would draw them alone, with its own padding."""
        if not self.drops(members):
            return None
        now, device = self.now, self.device
        keep = torch.ones(len(members), now.rows, now.width, num_features, dtype=torch.bool, device=device)
        for place, k in enumerate(members):
            if p := self.loras[k].lora_dropout:
                own = now.rows, now.widths[k], num_features
                keep[place, :, : now.widths[k]] = kept_inputs(
                    *own, dropout=p, device=device, generator=now.generators[k]
                )
        return keep.flatten(1, 2)


class Part(ABC):
    """LoRA of all members on one module of the base.

    seen   whether a pass came by
    """

    path: str
    seen = False

    @abstractmethod
    def put(self) -> Callable[[], None]:
        """Puts it into the model; returns what takes it out again."""


class MemberRows:
    """Rows of the members that adapt a module, among all rows of a pass [K·T, ·]."""

    def __init__(self, members: Sequence[int], *, num_members: int, device: torch.device) -> None:
        self.num_members = num_members
        everyone = len(members) == num_members
        first, last = members[0], members[0] + len(members)
        neighbours = list(members) == list(range(first, last))  # a view instead of a copy
        self._slice = slice(first, last) if neighbours and not everyone else None
        self._ids_P = None if everyone or neighbours else torch.tensor(members, device=device)

    def pick(self, rows: Tensor) -> Tensor:
        """Of all members' rows [..., ·] those of these members, [P, T, ·]."""
        rows_KT = rows.reshape(self.num_members, -1, rows.size(-1))
        if self._ids_P is not None:
            return rows_KT.index_select(0, self._ids_P)
        return rows_KT if self._slice is None else rows_KT[self._slice]

    def add_product_(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """`total[these rows] += left @ right`, in place."""
        if self._ids_P is not None:
            self.add_(total, torch.bmm(left, right))
        else:
            add_product_(self._own(total), left, right)

    def add_(self, total: Tensor, part_PTO: Tensor) -> None:
        """`total[these rows] += part`, in place."""
        if self._ids_P is not None:
            total.view(self.num_members, -1, total.size(-1)).index_add_(0, self._ids_P, part_PTO)
        else:
            self._own(total).add_(part_PTO)

    def _own(self, total: Tensor) -> Tensor:
        total_KTO = total.view(self.num_members, -1, total.size(-1))
        return total_KTO if self._slice is None else total_KTO[self._slice]
