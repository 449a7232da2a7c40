"""Where an allocation puts LoRA experts, as a grid: every expert is in it once, and by hand."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from allocators.core.layers import blocks
from allocators.core.maps import AllocationMap
from allocators.core.types import ExpertCounts, ExpertSelection, ModelShape, ModuleShape
from tests.allocators.models import dense_shape, moe_shape


@given(st.integers(0, 2), st.integers(0, 999))
def test_a_selection_is_read_back_from_its_map(dense_first: int, seed: int) -> None:
    shape = moe_shape(layers=4, experts=8, dense_first=dense_first)
    draw = random.Random(seed)
    chosen = ExpertSelection({layer: tuple(draw.sample(range(8), draw.randint(0, 8))) for layer in shape.moe_layers})
    drawn = AllocationMap.of(chosen, shape)
    assert drawn.rows == tuple(f"layer {layer}" for layer in shape.moe_layers)
    read = {
        layer: tuple(e for e, n in enumerate(row) if n)
        for layer, row in zip(shape.moe_layers, drawn.cells, strict=True)
    }
    assert ExpertSelection(read) == chosen
    assert drawn.places == AllocationMap.empty(shape).places == [list(range(8))] * len(shape.moe_layers)


@given(st.integers(0, 999))
def test_counts_are_read_back_from_their_map(seed: int) -> None:
    shape = dense_shape(layers=3)
    draw = random.Random(seed)
    counts = ExpertCounts({m.path: draw.randint(0, 4) for m in shape.modules})
    drawn = AllocationMap.of(counts, shape)
    at = dict(zip(drawn.rows, drawn.cells, strict=True))
    assert {m.path: at[m.name][m.layer] for m in blocks(shape) if at[m.name][m.layer]} == dict(counts.counts)
    assert sum(n or 0 for row in drawn.cells for n in row) == counts.total_experts
    assert (drawn.across, AllocationMap.empty(shape).places) == ("layer", [[0, 1, 2]] * 7)


def test_by_hand() -> None:
    modules = (
        ModuleShape("layers.0.a", 0, 4, 4),
        ModuleShape("layers.1.a", 1, 4, 4),
        ModuleShape("layers.1.b", 1, 4, 4),
    )
    drawn = AllocationMap.of(ExpertCounts({"layers.1.b": 3}), ModelShape("m", modules, 2))
    assert drawn == AllocationMap(("a", "b"), "layer", ((0, 0), (None, 3)))
    assert drawn.places == [[0, 1], [1]]
    ragged = tuple(ModuleShape(f"layers.{n}.up", n, 4, 4, num_experts=n + 1, role="expert") for n in (0, 1))
    drawn = AllocationMap.of(ExpertSelection({1: (1,)}), ModelShape("m", ragged, 2))
    assert drawn == AllocationMap(("layer 0", "layer 1"), "expert", ((0,), (0, 1)))
