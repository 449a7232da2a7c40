"""Heat maps as numbers: one line a layer, a signal's metric or an allocator's experts by module or by expert.

signal_panels(signal, shape), allocation_panel(answer, shape)
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from allocators.core.maps import AllocationMap
from allocators.core.types import ModelShape, Signal
from search.show.views import Answer, Shown, by_layer


@dataclass(frozen=True)
class Panel:
    """A heat map: one line a layer.

    group, name   what all panels of its kind show, and whose this one is
    beside        a remark on every line
    lowest        where the colours start
    ceiling       where they end, or higher where a value is
    counts        whole numbers that are written into the cells
    """

    group: str
    name: str
    lines: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    beside: tuple[str, ...] = ()
    lowest: float = 0.0
    ceiling: float = 0.0
    counts: bool = False

    @property
    def title(self) -> str:
        """Name, group, and whether the colours are logarithmic."""
        return f"{self.name}: {self.group}{', logarithmic colours' if self.logarithmic else ''}"

    @cached_property
    def highest(self) -> float:
        """The upper end of the colours: `ceiling`, or the largest value where that is larger."""
        return max(self.ceiling, *map(max, self.values))

    @property
    def logarithmic(self) -> bool:
        """Squared gradients span orders of magnitude: linear colours would show the largest alone."""
        return 0 < 100 * self.lowest < self.highest

    def level(self, value: float) -> float:
        """0 for the lowest value, 1 for the panel's highest."""
        if self.highest <= self.lowest or value <= self.lowest:
            return 0.0
        if self.logarithmic:
            return math.log(value / self.lowest) / math.log(self.highest / self.lowest)
        return (value - self.lowest) / (self.highest - self.lowest)


def allocation_panel(answer: Answer, shape: ModelShape) -> Panel:
    """Chosen experts by layer (1 or 0), or experts added or ranks by layer and module."""
    assert answer.allocation is not None, answer
    drawn = AllocationMap.of(answer.allocation, shape)
    if drawn.across == "expert":
        width = max(map(len, drawn.cells))
        values = [(*(float(adapted or 0) for adapted in row), *[0.0] * (width - len(row))) for row in drawn.cells]
        columns = tuple(str(expert) for expert in range(width))
        return Panel("experts that are adapted", answer.name, drawn.rows, columns, tuple(values))
    by_module = tuple(tuple(float(added or 0) for added in layer) for layer in zip(*drawn.cells, strict=True))
    lines = tuple(f"layer {layer}" for layer in range(shape.num_layers))
    group = "ranks" if drawn.unit == "ranks" else "experts that are added"
    return Panel(group, answer.name, lines, drawn.rows, by_module, counts=True)


def signal_panels(signal: Signal, shape: ModelShape) -> list[Panel]:
    """One panel a metric. Rows that are layers are shown as shares of the layer, rows that are modules as they are."""
    metrics = dict.fromkeys(metric for row in signal.rows.values() for metric, values in row.items() if values)
    panel = _panel_by_expert if by_layer(signal) else _panel_by_module
    return [panel(signal, metric, shape) for metric in metrics]


def _panel_by_expert(signal: Signal, metric: str, _: ModelShape) -> Panel:
    keys = sorted(signal.rows, key=int)
    values = tuple(tuple(_shares(signal.metric(key, metric))) for key in keys)
    columns = tuple(str(i) for i in range(max(map(len, values))))
    beside = tuple(f"top quarter {_top_quarter(row):.0%}" for row in values)
    group = f"{signal.kind}, share of the layer by {signal.axis}"
    return Panel(group, metric, tuple(f"layer {key}" for key in keys), columns, values, beside)


def _panel_by_module(signal: Signal, metric: str, shape: ModelShape) -> Panel:
    values_at: dict[tuple[int, str], list[float]] = {}
    modules = {m.path: m for m in shape.modules}
    for key, metrics in signal.rows.items():
        path, _, expert = key.rpartition(".")
        module = modules.get(path if expert.isdecimal() else key)
        values = metrics.get(metric, ())[: 1 if signal.axis == "component" else None]  # of components the largest
        if module is not None and values:
            values_at.setdefault((module.layer, module.name), []).extend(values)
        elif key.isdecimal() and values:
            values_at.setdefault((int(key), "layer"), []).extend(values)
    measured = {name for _, name in values_at}
    columns = tuple(name for name in dict.fromkeys([*(m.name for m in shape.modules), "layer"]) if name in measured)
    layers = sorted({layer for layer, _ in values_at})
    lowest = min(map(statistics.fmean, values_at.values()))  # also where a matrix lacks the metric
    heat = tuple(
        tuple(statistics.fmean(values_at.get((layer, name), [lowest])) for name in columns) for layer in layers
    )
    lines = tuple(f"layer {layer}" for layer in layers)
    return Panel(f"{signal.kind} by module", metric, lines, columns, heat, lowest=lowest)


def answer_panels(shown: Shown) -> list[Panel]:
    """A panel an allocation, in the same colours: equal numbers look equal."""
    panels = [allocation_panel(answer, shown.shape) for answer in shown.answers if answer.allocation is not None]
    highest = max(panel.highest for panel in panels)
    return [replace(panel, ceiling=highest) for panel in panels]


def all_panels(shown: Shown) -> list[Panel]:
    """The panels of the signals, then those of the allocators' answers."""
    measured = [panel for signal in shown.signals.values() for panel in signal_panels(signal, shown.shape)]
    return measured + answer_panels(shown)


def _shares(values: Sequence[float]) -> list[float]:
    whole = math.fsum(values)
    return [v / whole if whole else 0.0 for v in values]


def _top_quarter(shares: Sequence[float]) -> float:
    return math.fsum(sorted(shares, reverse=True)[: max(1, len(shares) // 4)])
