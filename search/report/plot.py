"""front.png: accuracy against trainable parameters, one colour an allocator; by test accuracy where that is known.

Path("front.png").write_bytes(png(results))
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING

from search.front import Candidate
from search.report.results import Results
from search.text import human, point

if TYPE_CHECKING:  # seconds that nothing else here needs
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

FAINT = 0.35  # opacity of points that were not evaluated on the test split, where others were
GREYS = {"none": "#b8b8b8", "all": "#555555", "random": "#888888", "uniform": "#9a8f80"}
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7f5fbf",
    "#a0522d",
)  # Okabe & Ito and two


def colours(allocators: Iterable[str]) -> dict[str, str]:
    """One colour an allocator, the same in the picture and on the page; baselines are grey."""
    coloured = [name for name in dict.fromkeys(allocators) if name not in GREYS]
    return GREYS | {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(coloured)}


def png(results: Results) -> bytes:
    """`figure` as a PNG file."""
    picture = io.BytesIO()
    figure(results).savefig(picture, format="png")
    return picture.getvalue()


def figure(results: Results) -> Figure:
    """Accuracy against trainable parameters (log scale), the front drawn as a step and its points named."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(drawn)
    axes = drawn.add_subplot()
    _set_up(axes, results)
    if results.front:
        _draw_points(axes, results)
        with_errors = _draw_front(axes, results)
        title = "band: ± one standard error" if with_errors else None
        drawn.legend(fontsize=8, frameon=False, loc="outside right upper", title=title, title_fontsize=7)
        _name_points(axes, canvas, results)  # last: what comes later would move the axes under the names
    else:
        axes.text(0.5, 0.5, "no finished trial yet", transform=axes.transAxes, ha="center", color="0.5")
    return drawn


def _set_up(axes: Axes, results: Results) -> None:
    """Title, grid and the ticks of a log axis that counts parameters."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(xscale="log", xlabel="trainable parameters", ylabel=_y(results))
    axes.set_title(results.title, fontsize=10)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: human(x).replace(".00", "")))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _y(results: Results) -> str:
    """What the height is; points without a test accuracy are drawn by validation accuracy, and fainter."""
    split = results.splits[-1]
    return split if split == "accuracy" else f"accuracy on the {split} split"


def _measured(results: Results) -> list[tuple[Candidate, float]]:
    judged = ((c, results.judged(c).accuracy) for c in results.points)
    return [(c, accuracy) for c, accuracy in judged if accuracy is not None]


def _draw_points(axes: Axes, results: Results) -> None:
    """A dot a point in its allocator's colour, those of the front larger and with a rim, those not tested fainter."""
    from matplotlib.colors import to_rgba

    measured = _measured(results)
    sizes = [_x(c) for c, _ in measured]
    axes.set_xlim(min(sizes) / 1.4, max(sizes) * 1.4)
    palette = colours(c.best.trial.allocator for c in results.points)
    for name in dict.fromkeys(c.best.trial.allocator for c, _ in measured):
        mine = [(c, accuracy) for c, accuracy in measured if c.best.trial.allocator == name]
        for marker, spares in (("o", False), ("D", True)):
            these = [(c, accuracy) for c, accuracy in mine if results.spares(c) == spares]
            axes.scatter(
                [_x(c) for c, _ in these],
                [accuracy for _, accuracy in these],
                s=[46 if c.best.digest in results.winners else 24 for c, _ in these],
                color=[to_rgba(palette[name], 1.0 if results.is_judged(c) else FAINT) for c, _ in these],
                edgecolors=["black" if c.best.digest in results.winners else "none" for c, _ in these],
                linewidths=0.8,
                marker=marker,
                zorder=3,
            )
        axes.scatter([], [], s=24, color=palette[name], label=name or "unnamed")
    if any(results.spares(c) for c, _ in measured):
        axes.scatter([], [], s=36, color="0.3", marker="D", label="diamond: forgets less")
    if not all(results.is_judged(c) for c, _ in measured):
        axes.scatter([], [], s=24, color="0.3", alpha=FAINT, edgecolors="none", label="fainter: by validation accuracy")


def _draw_front(axes: Axes, results: Results) -> bool:
    """The step, its band of one standard error and the base's accuracy; returns whether an error is known.

    Of points that were tested the step goes over those that no other of the front beats on the test split.
    """
    for candidate in map(results.judged, results.front):
        height, error = candidate.accuracy or 0.0, candidate.stderr or 0.0
        axes.errorbar(_x(candidate), height, yerr=error, fmt="none", ecolor="0.6", elinewidth=0.8, zorder=2)
    xs, ys = [_x(c) for c in results.step], [c.accuracy or 0.0 for c in results.step]
    errors = [c.stderr or 0.0 for c in results.step]
    edge = [*xs, max(_x(c) for c, _ in _measured(results))]
    axes.step(edge, [*ys, ys[-1]], where="post", color="0.35", lw=1)
    low, high = ([y + sign * e for y, e in zip(ys, errors, strict=True)] for sign in (-1, 1))
    axes.fill_between(edge, [*low, low[-1]], [*high, high[-1]], step="post", color="0.5", alpha=0.12, lw=0, zorder=1)
    axes.margins(y=0.12)
    if (base := results.records.untrained) is not None:
        height = base["test"]["accuracy"] if results.tested and base.get("test") else base["accuracy"]
        axes.axhline(height, color="0.35", lw=0.9, ls=(0, (4, 3)), zorder=1, label="untrained")
    return any(errors)


def _x(candidate: Candidate) -> int:
    """Its place on a log axis, which has none for a point without trainable parameters."""
    return max(candidate.trainable_params, 1)


def _name_points(axes: Axes, canvas: FigureCanvasAgg, results: Results) -> None:
    """Names at the front's points where there is room: the ends and the knee first, never one over another."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    front = results.front
    order = {c.best.digest: c for c in (results.rising[-1], front[0], results.knee, *front) if c is not None}
    canvas.draw()
    dots = axes.transData.transform([(_x(c), results.judged(c).accuracy or 0.0) for c in front])
    taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in dots]
    for candidate in order.values():
        # with many settings a name would be longer than the picture has room for
        name = results.label(candidate.best) if len(results.settings) < 2 else point(candidate.best)
        for across, up, side in ((-6, 6, "right"), (6, 8, "left"), (6, -12, "left"), (-6, -12, "right")):
            label = axes.annotate(
                textwrap.shorten(name, 40, placeholder=" …") + (" (knee)" if candidate is results.knee else ""),
                (_x(candidate), results.judged(candidate).accuracy),
                xytext=(across, up),
                textcoords="offset points",
                ha=side,
                fontsize=7,
                path_effects=[withStroke(linewidth=2, foreground="white")],
            )
            box = label.get_window_extent(canvas.get_renderer())
            corners = (box.x0, box.y0), (box.x1, box.y1)
            if all(axes.bbox.contains(*corner) for corner in corners) and not any(box.overlaps(b) for b in taken):
                taken.append(box)
                break
            label.remove()
