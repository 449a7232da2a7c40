"""What `show.py` displays, in three views: terminal, PNG, HTML. Reads answers and signals, measures and asks nothing.

Panels are heat maps, one line a layer: a signal's metric by module or expert, an allocator's experts by the same.
"""

from __future__ import annotations

import html
import itertools
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from allocators.core.layers import blocks, layer_values, on_layers
from allocators.core.ranking import covered_shares
from allocators.core.types import Allocation, ExpertCounts, ExpertSelection, ModelShape, Signal


@dataclass(frozen=True)
class Row:
    """One allocator's answer, or why it has none."""

    name: str
    knobs: Mapping[str, Any]
    allocation: Allocation | None
    reason: str = ""
    notes: tuple[str, ...] = ()


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
        return f"{self.name}: {self.group}{', logarithmic colours' if self.logarithmic else ''}"

    @cached_property
    def highest(self) -> float:
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


@dataclass(frozen=True)
class Shown:
    """Everything that is displayed; the terminal, PNG and HTML are three views of it.

    origins         where each signal came from
    total_experts   T that allocators for dense bases are compared at; None on an MoE base
    """

    shape: ModelShape
    rank: int
    rows: tuple[Row, ...]
    signals: Mapping[str, Signal]
    origins: tuple[str, ...]
    total_experts: int | None = None

    @property
    def budget(self) -> int | None:
        """Parameters of T layers' worth of experts: what an allocator costs that spends T on layers of one size."""
        if self.total_experts is None:
            return None
        one_a_layer = on_layers([1] * self.shape.num_layers, self.shape).trainable_params(self.shape, rank=self.rank)
        return round(self.total_experts * one_a_layer / self.shape.num_layers)


def per_layer(allocation: Allocation, shape: ModelShape) -> list[float]:
    """Experts of every layer; for a dense base the mean over the layer's modules, the papers' N of a layer."""
    match allocation:
        case ExpertSelection():
            return [len(allocation.in_layer(layer)) for layer in shape.moe_layers]
        case ExpertCounts():
            layers: list[list[int]] = [[] for _ in range(shape.num_layers)]
            for m in blocks(shape):
                layers[m.layer].append(allocation.counts.get(m.path, 0))
            return [statistics.fmean(counts) for counts in layers]


def in_runs(numbers: Iterable[float]) -> str:
    """`[4, 4, 4, 6.5]` as `4×3 6.5`."""
    texts = (f"{number:.2f}".rstrip("0").rstrip(".") for number in numbers)
    runs = [(text, len(list(same))) for text, same in itertools.groupby(texts)]
    return " ".join(f"{text}×{times}" if times > 1 else text for text, times in runs)


def allocation_panel(row: Row, shape: ModelShape) -> Panel:
    """Chosen experts by layer (1 or 0), or experts added by layer and module."""
    match row.allocation:
        case ExpertSelection() as chosen:
            width = max(shape.experts_in(layer) for layer in shape.moe_layers)
            values = [[float(e in chosen.in_layer(layer)) for e in range(width)] for layer in shape.moe_layers]
            columns = [str(e) for e in range(width)]
            lines = [f"layer {layer}" for layer in shape.moe_layers]
            group = "experts that are adapted"
        case ExpertCounts(counts=counts):
            modules = blocks(shape)
            columns = list(dict.fromkeys(m.name for m in modules))
            found = {(m.layer, m.name): float(counts.get(m.path, 0)) for m in modules}
            values = [[found.get((layer, name), 0.0) for name in columns] for layer in range(shape.num_layers)]
            lines = [f"layer {layer}" for layer in range(shape.num_layers)]
            group = "experts that are added"
        case _:
            raise AssertionError(row)
    counted = isinstance(row.allocation, ExpertCounts)
    return Panel(group, row.name, tuple(lines), tuple(columns), tuple(map(tuple, values)), counts=counted)


def signal_panels(signal: Signal, shape: ModelShape) -> list[Panel]:
    """One panel a metric. Rows that are layers are shown as shares of the layer, rows that are modules as they are."""
    panels = []
    for metric in dict.fromkeys(metric for metrics in signal.rows.values() for metric in metrics):
        if by_layer(signal):
            lowest = 0.0
            keys = sorted(signal.rows, key=int)
            values = [_shares(signal.metric(key, metric)) for key in keys]
            columns = [str(i) for i in range(max(map(len, values)))]
            lines = [f"layer {key}" for key in keys]
            beside = [f"top quarter {_top_quarter(row):.0%}" for row in values]
            group = f"{signal.kind}, share of the layer by {signal.axis}"
        else:
            found: dict[tuple[int, str], list[float]] = {}
            modules = {m.path: m for m in shape.modules}
            for key, metrics in signal.rows.items():
                path, _, expert = key.rpartition(".")
                module = modules.get(path if expert.isdecimal() else key)
                if module is not None and metric in metrics:
                    found.setdefault((module.layer, module.name), []).extend(metrics[metric])
            columns = list(dict.fromkeys(name for _, name in found))
            layers = sorted({layer for layer, _ in found})
            lowest = min(map(statistics.fmean, found.values()))  # also where a matrix lacks the metric
            values = [[statistics.fmean(found.get((layer, name), [lowest])) for name in columns] for layer in layers]
            lines = [f"layer {layer}" for layer in layers]
            beside = []
            group = f"{signal.kind} by module"
        heat = tuple(map(tuple, values))
        panels.append(Panel(group, metric, tuple(lines), tuple(columns), heat, tuple(beside), lowest))
    return panels


Column = Mapping[Any, float]


def signal_columns(signals: Mapping[str, Signal], shape: ModelShape) -> dict[str, Column]:
    """What signals are compared by: an expert's value by (layer, expert), a layer's mean over its modules by layer."""
    columns: dict[str, Column] = {}
    for kind, signal in sorted(signals.items()):
        for metric in sorted({metric for metrics in signal.rows.values() for metric in metrics}):
            if by_layer(signal):
                rows = {key: metrics.get(metric, ()) for key, metrics in signal.rows.items()}
                columns[f"{kind}.{metric}"] = {(key, i): v for key, row in rows.items() for i, v in enumerate(row)}
            elif all(metric in signal.rows.get(m.path, ()) for m in blocks(shape)):
                columns[f"{kind}.{metric}"] = dict(enumerate(layer_values(signal, shape, metric=metric)))
    return columns


def correlations(columns: Mapping[str, Column]) -> dict[tuple[str, str], float]:
    """Spearman's rank correlation of every two columns about the same things; a constant one has no ranks."""
    found = {}
    for (a, left), (b, right) in itertools.combinations(columns.items(), 2):
        if left.keys() == right.keys() and len({*left.values()}) > 1 and len({*right.values()}) > 1:
            ranks = [_ranks([column[key] for key in left]) for column in (left, right)]
            found[a, b] = statistics.correlation(*ranks)
    return found


def comparisons(shown: Shown) -> list[tuple[str, dict[tuple[str, str], float]]]:
    """Rank correlations between signals and between allocators, those that there are, with their headings."""
    counts: dict[str, Column] = {
        row.name: dict(enumerate(per_layer(row.allocation, shown.shape)))
        for row in shown.rows
        if row.allocation is not None
    }
    experts = any(map(by_layer, shown.signals.values()))
    both = [
        (f"signals, by {'expert' if experts else 'layer'}", correlations(signal_columns(shown.signals, shown.shape))),
        ("allocators' experts by layer", correlations(counts)),
    ]
    return [(f"rank correlation (Spearman) of {what}", found) for what, found in both if found]


def matrix(found: Mapping[tuple[str, str], float]) -> list[list[str]]:
    """Lines of a lower triangle: number and name, then the correlation with 1, 2, …; the head first."""
    names = list(dict.fromkeys(name for pair in found for name in pair))
    lines = [["", *(str(i) for i in range(1, len(names)))]]
    for i, name in enumerate(names):
        values = [found.get((other, name), found.get((name, other))) for other in names[:i]]
        lines.append([f"{i + 1} {name}", *("" if value is None else f"{value:.2f}" for value in values)])
    return lines


def cells(row: Row, shown: Shown) -> tuple[str, ...]:
    """Allocator, knobs, experts, experts by layer, parameters, share of the budget, share of tokens covered."""
    knobs = " ".join(f"{k}={v}" for k, v in row.knobs.items())
    if row.allocation is None:
        return row.name, knobs, "", row.reason, "", "", ""
    counts = per_layer(row.allocation, shown.shape)
    covers = ""
    if isinstance(row.allocation, ExpertSelection) and "routing" in shown.signals:
        shares = covered_shares(row.allocation, shown.signals["routing"], shown.shape).values()
        covers = f"{statistics.fmean(shares):.0%} ({min(shares):.0%}–{max(shares):.0%})"
    params = params_of(row, shown.shape, shown.rank)
    share = f"{params / shown.budget:.1%}" if shown.budget else ""
    return row.name, knobs, f"{math.fsum(counts):.4g}", in_runs(counts), f"{params:,}", share, covers


def headings(shown: Shown) -> tuple[str, ...]:
    covers = "tokens covered (by layer)" if "routing" in shown.signals else ""
    share = f"of T = {shown.total_experts}" if shown.budget else ""
    return "allocator", "knobs", "experts", "by layer", f"parameters, rank {shown.rank}", share, covers


def title(shown: Shown) -> str:
    shape = shown.shape
    experts = f", {shape.total_experts:,} routed experts" if shape.is_moe else ""
    return f"{shape.name}: {shape.num_layers} layers{experts}"


# --- in a terminal ----------------------------------------------------------------------------------------------------


def print_shown(shown: Shown, *, single: bool) -> None:
    """The table, heat maps of signals and of what was answered as far as there is room, and what resembles what.

    Of each signal the metrics that fit side by side are drawn; of several allocators all, where two do.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    table = Table(title=title(shown), title_justify="left")
    heads = headings(shown)
    show = [i for i, head in enumerate(heads) if head and (head != "knobs" or any(r.knobs for r in shown.rows))]
    for i in show:
        table.add_column(heads[i], justify="right" if i in (2, 4, 5) else "left", overflow="fold")
    for row in shown.rows:
        line = cells(row, shown)
        table.add_row(*(Text(line[i]) for i in show))
    console.print(table)
    for note in (f"{row.name}: {note}" for row in shown.rows for note in row.notes):
        console.print(Text(f"note: {note}"))
    rows = [_side_by_side(signal_panels(signal, shown.shape), console.width)[0] for signal in shown.signals.values()]
    answers = _side_by_side([_narrowed(panel) for panel in _answers(shown)], console.width)
    rows += answers if single or len(answers[0]) > 1 else []
    for group, drawn in itertools.groupby(rows, key=lambda panels: panels[0].group):
        console.print()
        console.print(Text(group, style="bold"))
        for panels in drawn:
            for line in _terminal_lines(panels, console.width):
                console.print(line, soft_wrap=True)
    for heading, found in comparisons(shown):
        console.print()
        console.print(Text(heading, style="bold"))
        lines = matrix(found)
        width = max(len(line[0]) for line in lines)
        for first, *values in lines:
            text = f"{first:<{width}}" + "".join(f"{value:>7}" for value in values)
            console.print(Text(text.rstrip()), soft_wrap=True)
    console.print()
    for origin in shown.origins:
        console.print(Text(origin), soft_wrap=True)


_SHADES = " ░▒▓█"  # read without colours too: in a file, in a pipe, in a colour-blind eye
_COLOURS = ("grey37", "dark_red", "red3", "orange1", "bright_yellow")
_GAP = "  "


def _side_by_side(panels: Sequence[Panel], width: int) -> list[list[Panel]]:
    """Panels in rows: as many beside each other as the terminal is wide, where they have the same layers."""
    rows: list[list[Panel]] = []
    for panel in panels:
        together = [*rows[-1], panel] if rows else [panel]
        fits = _label(together) + sum(_Cells.of(p, width).width + len(_GAP) for p in together) <= width
        if rows and fits and panel.lines == rows[-1][0].lines:
            rows[-1].append(panel)
        else:
            rows.append([panel])
    return rows


def _narrowed(panel: Panel) -> Panel:
    """One column for all modules where every layer's have the same number, as most allocators' do."""
    if not panel.counts or any(len(set(line)) > 1 for line in panel.values):
        return panel
    return replace(panel, columns=("all",), values=tuple(line[:1] for line in panel.values))


def _label(panels: Sequence[Panel]) -> int:
    return max(map(len, panels[0].lines))


@dataclass(frozen=True)
class _Cells:
    """How a panel is drawn in a terminal: characters a cell, neighbouring columns that share one, width of all.

    written   the numbers themselves are in the cells, as far as they fit
    """

    size: int
    merge: int
    width: int
    written: bool

    @classmethod
    def of(cls, panel: Panel, width: int) -> _Cells:
        beside = max(map(len, panel.beside)) + len(_GAP) if panel.beside else 0
        room = width - _label([panel]) - len(_GAP) - beside
        merge = math.ceil(len(panel.columns) / room)
        number = math.ceil(len(panel.columns) / merge)
        size = 1 if 2 * number > room else 2
        digits = 1 + len(str(int(max(map(max, panel.values)))))
        written = panel.counts and digits * len(panel.columns) <= room
        size = max([digits, *map(len, _initials(panel))]) if written else size
        return cls(size, merge, max(size * number + beside, *map(len, _heads(panel))), written)


def _heads(panel: Panel) -> tuple[str, str]:
    """What stands over a panel: its name, and the range of its colours."""
    if panel.counts or not _initials(panel):
        return panel.name, ""
    return panel.name, f"{panel.lowest:.3g}…{panel.highest:.3g}{' log' if panel.logarithmic else ''}"


def _initials(panel: Panel) -> list[str]:
    """First letters of modules; experts are numbered from the left."""
    if panel.columns[0].isdecimal():
        return []
    return [*panel.columns] if len(panel.columns) == 1 else [name[:1] for name in panel.columns]


def _terminal_lines(panels: Sequence[Panel], width: int) -> Iterable[Any]:
    from rich.text import Text

    label = _label(panels)
    drawn = [(panel, _Cells.of(panel, width)) for panel in panels]
    heads = [_heads(panel) for panel in panels]
    initials = ["".join(letter.rjust(cells.size) for letter in _initials(panel)) for panel, cells in drawn]
    for texts in ([head[0] for head in heads], [head[1] for head in heads], initials):
        if any(texts):
            line = "".join(f"{_GAP}{text:<{cells.width}}" for text, (_, cells) in zip(texts, drawn, strict=True))
            yield Text((" " * label + line).rstrip())
    for i, name in enumerate(panels[0].lines):
        drawn_line = Text(f"{name:<{label}}")
        for panel, cells in drawn:
            drawn_line.append(_GAP)
            end = len(drawn_line) + cells.width
            for start in range(0, len(panel.columns), cells.merge):
                value = statistics.fmean(panel.values[i][start : start + cells.merge])
                level = min(4, int(5 * panel.level(value)))
                number = f"{value:.0f}" if value else "·"
                text = number.rjust(cells.size) if cells.written else _SHADES[level] * cells.size
                drawn_line.append(text, style=_COLOURS[level])
            drawn_line.append(f"{_GAP}{panel.beside[i]}" if panel.beside else "")
            drawn_line.append(" " * (end - len(drawn_line)))
        drawn_line.rstrip()
        yield drawn_line


def _answers(shown: Shown) -> list[Panel]:
    """A panel an allocation, in the same colours: equal numbers look equal."""
    panels = [allocation_panel(row, shown.shape) for row in shown.rows if row.allocation is not None]
    highest = max(panel.highest for panel in panels)
    return [replace(panel, ceiling=highest) for panel in panels]


def _all_panels(shown: Shown) -> list[Panel]:
    measured = [panel for signal in shown.signals.values() for panel in signal_panels(signal, shown.shape)]
    return measured + _answers(shown)


# --- in files ---------------------------------------------------------------------------------------------------------


def draw_png(shown: Shown, file: Path) -> None:
    """One heat map a signal's metric and one an allocator, narrow ones side by side."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure

    rows: list[list[Panel]] = []
    for _, group in itertools.groupby(_all_panels(shown), key=lambda panel: (panel.group, panel.lines)):
        panels = list(group)
        size = max(1, min(6, 48 // len(panels[0].columns)))
        rows += [panels[i : i + size] for i in range(0, len(panels), size)]
    heights = [1 + 0.18 * len(row[0].lines) for row in rows]
    figure = Figure(figsize=(max(9, 2.2 * max(map(len, rows))), sum(heights) + 0.5), layout="constrained")
    figure.suptitle(title(shown))
    grid = figure.add_gridspec(len(rows), 1, height_ratios=heights)
    for number, row in enumerate(rows):
        columns = grid[number].subgridspec(1, len(row))
        for i, panel in enumerate(row):
            axis = figure.add_subplot(columns[0, i])
            highest = max(panel.highest, panel.lowest + 1e-9)  # an empty choice is pale, not mid-scale
            norm = (LogNorm if panel.logarithmic else Normalize)(panel.lowest, highest)
            image = axis.imshow(panel.values, aspect="auto", cmap="YlOrRd", norm=norm)
            axis.set_title(panel.title if len(row) == 1 else f"{panel.group}\n{panel.name}", fontsize=9 - len(row) // 2)
            axis.set_yticks(range(len(panel.lines)), panel.lines if i == 0 else [], fontsize=6)
            step = math.ceil(len(panel.columns) / 32)
            axis.set_xticks(range(0, len(panel.columns), step), panel.columns[::step], fontsize=6)
            if not panel.columns[0].isdecimal():
                axis.tick_params(axis="x", rotation=60)
            figure.colorbar(image, ax=axis, fraction=0.05).ax.tick_params(labelsize=6)
            for y, line in enumerate(panel.values if panel.counts else ()):
                for x, value in enumerate(line):
                    colour = "white" if panel.level(value) > 0.6 else "black"
                    axis.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=5, color=colour)
    figure.savefig(file, dpi=120)


def to_html(shown: Shown) -> str:
    """One self-contained page without scripts: the table, and every heat map with its values on hover."""
    heads = headings(shown)
    out = [
        "<!doctype html><meta charset='utf-8'>",
        f"<title>{html.escape(title(shown))}</title>",
        "<style>body{font:14px sans-serif;margin:2em}table{border-collapse:collapse}h2{font-size:15px}"
        ".t td,.t th{border-bottom:1px solid #ccc;padding:3px 10px;text-align:left}"
        ".h td{min-width:11px;height:13px;border:1px solid #eee;font-size:10px;text-align:center}"
        ".h th{font:11px sans-serif;padding-right:6px}"
        ".p{display:inline-block;vertical-align:top;margin-right:2em}</style>",
        f"<h1>{html.escape(title(shown))}</h1><table class='t'><tr>",
        *(f"<th>{html.escape(head)}</th>" for head in heads),
        "</tr>",
    ]
    for row in shown.rows:
        out.append("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in cells(row, shown)) + "</tr>")
    out.append("</table>")
    out += [f"<p>{html.escape(f'{row.name}: {note}')}</p>" for row in shown.rows for note in row.notes]
    for panel in _all_panels(shown):
        out.append(f"<div class='p'><h2>{html.escape(panel.title)}</h2><table class='h'>")
        for i, (name, values) in enumerate(zip(panel.lines, panel.values, strict=True)):
            out.append(f"<tr><th>{html.escape(name)}</th>")
            for column, value in zip(panel.columns, values, strict=False):
                colour = f"rgba(178,24,43,{panel.level(value):.3f})"
                text = f"{value:.0f}" if panel.counts else ""
                out.append(f"<td style='background:{colour}' title='{html.escape(column)}: {value:.4g}'>{text}</td>")
            out.append(f"<td>{html.escape(panel.beside[i]) if panel.beside else ''}</td></tr>")
        out.append("</table></div>")
    for heading, found in comparisons(shown):
        out.append(f"<h2>{html.escape(heading)}</h2><table class='t'>")
        out += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in matrix(found)]
        out.append("</table>")
    out += [f"<p>{html.escape(origin)}</p>" for origin in shown.origins]
    return "\n".join(out)


# --- small things -----------------------------------------------------------------------------------------------------


def by_layer(signal: Signal) -> bool:
    """Whether rows are layers with a value an expert, rather than weight matrices."""
    return all(key.isdecimal() for key in signal.rows)


def params_of(row: Row, shape: ModelShape, rank: int) -> int:
    """Trainable parameters; where there is no allocation more than any has, so that the row comes last."""
    return row.allocation.trainable_params(shape, rank=rank) if row.allocation is not None else sys.maxsize


def _shares(values: Sequence[float]) -> list[float]:
    whole = math.fsum(values)
    return [v / whole if whole else 0.0 for v in values]


def _top_quarter(shares: Sequence[float]) -> float:
    return math.fsum(sorted(shares, reverse=True)[: max(1, len(shares) // 4)])


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1, ties sharing their mean rank."""
    ordered = sorted(values)
    first: dict[float, int] = {}
    last: dict[float, int] = {}
    for i, v in enumerate(ordered, start=1):
        first.setdefault(v, i)
        last[v] = i
    return [(first[v] + last[v]) / 2 for v in values]
