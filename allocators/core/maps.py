"""Where on a model an allocation puts LoRA: the grid that texts, pages and pictures draw.

AllocationMap.of(allocation, shape).cells[row][column]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from allocators.core.layers import blocks
from allocators.core.types import Allocation, ExpertCounts, ExpertSelection, ModelShape, ModuleRanks, ModuleShape


@dataclass(frozen=True)
class AllocationMap:
    """A row a layer with experts (a selection of them), or a row a kind of module (counts and ranks).

    rows     names: `layer 3`, or `q_proj`; with ranks `experts.gate_proj` for a stack
    across   what the columns are: the layer's experts, or the model's layers
    cells    a selection: 1 where the expert is adapted, 0 where it is not; a row ends with its layer's last expert.
             counts: LoRA experts that the module gets; None where a layer has no such module
             ranks: the module's rank, of a stack the mean over its experts, rounded up; None as above
    unit     what cells count
    """

    rows: tuple[str, ...]
    across: Literal["expert", "layer"]
    cells: tuple[tuple[int | None, ...], ...]
    unit: Literal["experts", "ranks"] = "experts"

    @classmethod
    def of(cls, allocation: Allocation, shape: ModelShape) -> AllocationMap:
        """The map of one allocation on a model that it was made for."""
        match allocation:
            case ExpertSelection():
                chosen = {layer: frozenset(allocation.in_layer(layer)) for layer in shape.moe_layers}
                adapted = (
                    tuple(int(expert in ids) for expert in range(shape.experts_in(layer)))
                    for layer, ids in chosen.items()
                )
                return cls(tuple(f"layer {layer}" for layer in chosen), "expert", tuple(adapted))
            case ExpertCounts():
                at = {(module.name, module.layer): allocation.counts.get(module.path, 0) for module in blocks(shape)}
                return cls(*_by_module(at, shape))
            case ModuleRanks():
                at = {(_name(m), m.layer): math.ceil(sum(rs := allocation.of(m)) / len(rs)) for m in shape.modules}
                return cls(*_by_module(at, shape), unit="ranks")

    @classmethod
    def empty(cls, shape: ModelShape, *, ranks: bool = False) -> AllocationMap:
        """The places of a model without LoRA in any of them: of experts, or of ranks."""
        if ranks:
            return cls.of(ModuleRanks({}), shape)
        return cls.of(ExpertSelection({}) if shape.is_moe else ExpertCounts({}), shape)

    @property
    def places(self) -> list[list[int]]:
        """By row the columns that exist in the model."""
        return [[column for column, experts in enumerate(row) if experts is not None] for row in self.cells]


def _by_module(
    at: Mapping[tuple[str, int], int], shape: ModelShape
) -> tuple[tuple[str, ...], Literal["layer"], tuple[tuple[int | None, ...], ...]]:
    """Rows, their columns, and cells of what is at (kind of module, layer)."""
    rows = tuple(dict.fromkeys(name for name, _ in at))
    return rows, "layer", tuple(tuple(at.get((row, layer)) for layer in range(shape.num_layers)) for row in rows)


def _name(module: ModuleShape) -> str:
    """`q_proj`; of experts, shared ones and MLPs with what they are a part of, as all have a `gate_proj`."""
    return ".".join(module.path.split(".")[-2:]) if module.role in ("expert", "shared_expert") else module.name
