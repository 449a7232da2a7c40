"""Where on a model an allocation puts LoRA experts: the grid that texts, pages and pictures draw.

AllocationMap.of(allocation, shape).cells[row][column]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from allocators.core.layers import blocks
from allocators.core.types import Allocation, ExpertCounts, ExpertSelection, ModelShape


@dataclass(frozen=True)
class AllocationMap:
    """A row a layer with experts (MoE), or a row a kind of module (dense).

    rows     names: `layer 3`, or `q_proj`
    across   what the columns are: the layer's experts, or the model's layers
    cells    MoE: 1 where the expert is adapted, 0 where it is not; a row ends with its layer's last expert.
             dense: LoRA experts that the module gets; None where a layer has no such module
    """

    rows: tuple[str, ...]
    across: Literal["expert", "layer"]
    cells: tuple[tuple[int | None, ...], ...]

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
                rows = tuple(dict.fromkeys(name for name, _ in at))
                added = (tuple(at.get((row, layer)) for layer in range(shape.num_layers)) for row in rows)
                return cls(rows, "layer", tuple(added))

    @classmethod
    def empty(cls, shape: ModelShape) -> AllocationMap:
        """The places of a model without a LoRA expert in any of them."""
        return cls.of(ExpertSelection({}) if shape.is_moe else ExpertCounts({}), shape)

    @property
    def places(self) -> list[list[int]]:
        """By row the columns that exist in the model."""
        return [[column for column, experts in enumerate(row) if experts is not None] for row in self.cells]
