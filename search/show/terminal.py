"""The view in a terminal: the table, heat maps as far as there is room, and what resembles what.

show_in_terminal(shown, single=False)
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from search.show.panels import Panel, answer_panels, signal_panels
from search.show.ranks import Correlations, comparisons, triangle
from search.show.views import Shown, cells, headings

if TYPE_CHECKING:  # a request that cannot work is refused without it
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text


def show_in_terminal(shown: Shown, *, single: bool) -> None:
    """Prints the table, the heat maps and the comparisons.

    Of each signal the metrics that fit side by side are drawn; of several allocators all, where two do.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(_table(shown))
    for note in (f"{answer.name}: {note}" for answer in shown.answers for note in answer.notes):
        console.print(Text(f"note: {note}"))
    rows = [side_by_side(signal_panels(signal, shown.shape), console.width)[0] for signal in shown.signals.values()]
    answers = side_by_side([_narrowed(panel) for panel in answer_panels(shown)], console.width)
    rows += answers if single or len(answers[0]) > 1 else []
    for group, drawn in itertools.groupby(rows, key=lambda panels: panels[0].group):
        console.print()
        several = list(drawn)
        widest = max(itertools.chain(*several), key=lambda panel: len(panel.columns))
        console.print(Text(group, style="bold").append(_columns(widest), style="not bold"), soft_wrap=True)
        for panels in several:
            for line in terminal_lines(panels, console.width):
                console.print(line, soft_wrap=True)
    for heading, by_pair in comparisons(shown):
        _print_triangle(console, heading, by_pair)
    console.print()
    for origin in shown.origins:
        console.print(Text(origin), soft_wrap=True)


def _table(shown: Shown) -> Table:
    """A row an allocator; columns that say nothing are left out."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=shown.title, title_justify="left")
    heads = headings(shown)
    show = [i for i, head in enumerate(heads) if head and (head != "knobs" or any(a.knobs for a in shown.answers))]
    for i in show:
        table.add_column(heads[i], justify="right" if i in (2, 4, 5) else "left", overflow="fold")
    for answer in shown.answers:
        line = cells(answer, shown)
        table.add_row(*(Text(line[i]) for i in show))
    return table


def _print_triangle(console: Console, heading: str, by_pair: Correlations) -> None:
    from rich.text import Text

    console.print()
    console.print(Text(heading, style="bold"))
    lines = triangle(by_pair)
    width = max(len(line[0]) for line in lines)
    for first, *values in lines:
        text = f"{first:<{width}}" + "".join(f"{value:>7}" for value in values)
        console.print(Text(text.rstrip()), soft_wrap=True)


# --- heat maps in characters ------------------------------------------------------------------------------------------

_SHADES = " ░▒▓█"  # read without colours too: in a file, in a pipe, in a colour-blind eye
_COLOURS = ("grey37", "dark_red", "red3", "orange1", "bright_yellow")
_GAP = "  "


def side_by_side(panels: Sequence[Panel], width: int) -> list[list[Panel]]:
    """Panels in rows: as many beside each other as the terminal is wide, where they have the same layers."""
    rows: list[list[Panel]] = []
    for panel in panels:
        together = [*rows[-1], panel] if rows else [panel]
        fits = _label(together) + sum(_Layout.of(p, width).width + len(_GAP) for p in together) <= width
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
class _Layout:
    """How a panel is drawn in a terminal: characters a cell, neighbouring columns that share one, width of all.

    written   the numbers themselves are in the cells, as far as they fit
    """

    size: int
    merge: int
    width: int
    written: bool

    @classmethod
    def of(cls, panel: Panel, width: int) -> _Layout:
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


def _columns(panel: Panel) -> str:
    """What the columns of a panel are, from the left; nothing where the picture says it."""
    if len(panel.columns) == 1:
        return ""
    if panel.columns[0].isdecimal():
        return f"; a column for each of {len(panel.columns)} experts"
    return f"; columns: {', '.join(panel.columns)}"


def _initials(panel: Panel) -> list[str]:
    """First letters of modules; experts are numbered from the left."""
    if panel.columns[0].isdecimal():
        return []
    return [*panel.columns] if len(panel.columns) == 1 else [name[:1] for name in panel.columns]


def terminal_lines(panels: Sequence[Panel], width: int) -> Iterable[Text]:
    """The heat maps side by side: heads, initials of the columns, then one line a layer."""
    from rich.text import Text

    label = _label(panels)
    drawn = [(panel, _Layout.of(panel, width)) for panel in panels]
    heads = [_heads(panel) for panel in panels]
    initials = ["".join(letter.rjust(layout.size) for letter in _initials(panel)) for panel, layout in drawn]
    for texts in ([head[0] for head in heads], [head[1] for head in heads], initials):
        if any(texts):
            line = "".join(f"{_GAP}{text:<{layout.width}}" for text, (_, layout) in zip(texts, drawn, strict=True))
            yield Text((" " * label + line).rstrip())
    for i, name in enumerate(panels[0].lines):
        drawn_line = Text(f"{name:<{label}}")
        for panel, layout in drawn:
            drawn_line.append(_GAP)
            end = len(drawn_line) + layout.width
            for start in range(0, len(panel.columns), layout.merge):
                value = statistics.fmean(panel.values[i][start : start + layout.merge])
                level = min(4, int(5 * panel.level(value)))
                number = f"{value:.0f}" if value else "·"
                text = number.rjust(layout.size) if layout.written else _SHADES[level] * layout.size
                drawn_line.append(text, style=_COLOURS[level])
            drawn_line.append(f"{_GAP}{panel.beside[i]}" if panel.beside else "")
            drawn_line.append(" " * (end - len(drawn_line)))
        drawn_line.rstrip()
        yield drawn_line
