"""The views in files: everything as one PNG, or as one HTML page without scripts.

draw_png(shown, Path("show.png")), to_html(shown)
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from search.records.files import refuse_other_kind
from search.show.panels import Panel, all_panels
from search.show.ranks import comparisons, triangle
from search.show.views import Shown, cells, headings

if TYPE_CHECKING:  # only a picture needs it
    from matplotlib.axes import Axes


STYLE = (
    "<style>body{font:14px sans-serif;margin:2em}table{border-collapse:collapse}h2{font-size:15px}"
    ".t td,.t th{border-bottom:1px solid #ccc;padding:3px 10px;text-align:left}"
    ".h td{min-width:11px;height:13px;border:1px solid #eee;font-size:10px;text-align:center}"
    ".h th{font:11px sans-serif;padding-right:6px}"
    ".p{display:inline-block;vertical-align:top;margin-right:2em}</style>"
)


def draw_png(shown: Shown, file: Path) -> None:
    """One heat map a signal's metric and one an allocator, narrow ones side by side."""
    from matplotlib.figure import Figure

    rows: list[list[Panel]] = []
    for _, group in itertools.groupby(all_panels(shown), key=lambda panel: (panel.group, panel.lines)):
        panels = list(group)
        size = max(1, min(6, 48 // len(panels[0].columns)))
        rows += [panels[i : i + size] for i in range(0, len(panels), size)]
    heights = [1 + 0.18 * len(row[0].lines) for row in rows]
    figure = Figure(figsize=(max(9, 2.2 * max(map(len, rows))), sum(heights) + 0.5), layout="constrained")
    figure.suptitle(shown.title)
    grid = figure.add_gridspec(len(rows), 1, height_ratios=heights)
    for number, row in enumerate(rows):
        columns = grid[number].subgridspec(1, len(row))
        for i, panel in enumerate(row):
            axes = figure.add_subplot(columns[0, i])
            title = panel.title if len(row) == 1 else f"{panel.group}\n{panel.name}"
            axes.set_title(title, fontsize=9 - len(row) // 2)
            _draw_panel(axes, panel)
            axes.set_yticks(range(len(panel.lines)), panel.lines if i == 0 else [], fontsize=6)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format=file.suffix.removeprefix(".") or "png")
    refuse_other_kind(file, picture.getvalue()[:4], kind="such a picture")
    file.write_bytes(picture.getvalue())  # by its name, matplotlib would write another file where that has no suffix


def _draw_panel(axes: Axes, panel: Panel) -> None:
    """One heat map with its colour bar; counts are written into the cells."""
    from matplotlib.colors import LogNorm, Normalize

    highest = max(panel.highest, panel.lowest + 1e-9)  # an empty choice is pale, not mid-scale
    norm = (LogNorm if panel.logarithmic else Normalize)(panel.lowest, highest)
    image = axes.imshow(panel.values, aspect="auto", cmap="YlOrRd", norm=norm)
    step = math.ceil(len(panel.columns) / 32)
    axes.set_xticks(range(0, len(panel.columns), step), panel.columns[::step], fontsize=6)
    if not panel.columns[0].isdecimal():
        axes.tick_params(axis="x", rotation=60)
    axes.figure.colorbar(image, ax=axes, fraction=0.05).ax.tick_params(labelsize=6)
    for y, line in enumerate(panel.values if panel.counts else ()):
        for x, value in enumerate(line):
            colour = "white" if panel.level(value) > 0.6 else "black"
            axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=5, color=colour)


_PAGE = "<!doctype html><meta charset='utf-8'>"


def write_html(shown: Shown, file: Path) -> None:
    """`to_html` in a file. Raises StudyError where that is another file than a page."""
    refuse_other_kind(file, _PAGE.encode(), kind="a page of this command")
    file.write_text(to_html(shown), encoding="utf-8")


def to_html(shown: Shown) -> str:
    """One self-contained page without scripts: the table, and every heat map with its values on hover."""
    title = escape(shown.title)
    lines = [
        _PAGE,
        f"<title>{title}</title>",
        STYLE,
        f"<h1>{title}</h1><table class='t'><tr>",
        *(f"<th>{escape(head)}</th>" for head in headings(shown)),
        "</tr>",
        *(_html_row(cells(answer, shown)) for answer in shown.answers),
        "</table>",
    ]
    lines += [f"<p>{escape(f'{answer.name}: {note}')}</p>" for answer in shown.answers for note in answer.notes]
    for panel in all_panels(shown):
        lines += _html_panel(panel)
    for heading, by_pair in comparisons(shown):
        lines += [f"<h2>{escape(heading)}</h2><table class='t'>", *map(_html_row, triangle(by_pair)), "</table>"]
    lines += [f"<p>{escape(origin)}</p>" for origin in shown.origins]
    return "\n".join(lines)


def _html_row(texts: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in texts) + "</tr>"


def _html_panel(panel: Panel) -> Iterator[str]:
    yield f"<div class='p'><h2>{escape(panel.title)}</h2><table class='h'>"
    for i, (name, values) in enumerate(zip(panel.lines, panel.values, strict=True)):
        yield f"<tr><th>{escape(name)}</th>"
        for column, value in zip(panel.columns, values, strict=False):  # layers may differ in their experts
            colour = f"rgba(178,24,43,{panel.level(value):.3f})"
            text = f"{value:.0f}" if panel.counts else ""
            yield f"<td style='background:{colour}' title='{escape(column)}: {value:.4g}'>{text}</td>"
        yield f"<td>{escape(panel.beside[i]) if panel.beside else ''}</td></tr>"
    yield "</table></div>"
