"""Strategies and laws that the tests of the MoE allocators share."""

from __future__ import annotations

from hypothesis import strategies as st

from allocators.core.types import ExpertSelection, ModelShape, Signal
from tests.allocators.models import moe_shape, routing

Case = tuple[Signal, ModelShape]


@st.composite
def measured(draw: st.DrawFn, *, distinct: bool = False) -> Case:
    """A shape of 1–3 MoE layers of 2–9 experts (perhaps behind a dense layer) and a routing of it.

    distinct   no two experts of a layer have the same count (and none has zero tokens), so that no tie rule is needed
    """
    experts, layers = draw(st.integers(2, 9)), draw(st.integers(1, 3))
    dense = draw(st.integers(0, 1))
    shape = moe_shape(layers=layers + dense, experts=experts, dense_first=dense)
    tokens = st.integers(1, 50) if distinct else st.integers(0, 9)
    counts = {
        layer: draw(st.lists(tokens, min_size=experts, max_size=experts, unique=distinct).filter(any))
        for layer in shape.moe_layers
    }
    # gate weight in another order than the tokens, so that score=mass is not score=count
    mass = {layer: [((7 * c) % 53 + 1) / 8 if c else 0.0 for c in values] for layer, values in counts.items()}
    return routing(shape, counts, mass), shape


def permuted(signal: Signal, orders: dict[int, list[int]]) -> Signal:
    """The routing of the model whose expert `orders[layer][i]` is this model's expert i."""

    def moved(layer: int, values: tuple[float, ...]) -> tuple[float, ...]:
        out = [0.0] * len(values)
        for i, v in enumerate(values):
            out[orders[layer][i]] = v
        return tuple(out)

    rows = {key: {m: moved(int(key), v) for m, v in metrics.items()} for key, metrics in signal.rows.items()}
    return Signal("routing", rows, signal.axis, signal.unit, {"permuted": True})


def inside(small: ExpertSelection, large: ExpertSelection) -> bool:
    return all(set(ids) <= set(large.in_layer(layer)) for layer, ids in small.experts.items())


def covered(signal: Signal, selection: ExpertSelection, layer: int, metric: str = "count") -> float:
    """Share of a layer's tokens that the selection's experts take."""
    values = signal.metric(layer, metric)
    return sum(values[i] for i in selection.in_layer(layer)) / sum(values)
