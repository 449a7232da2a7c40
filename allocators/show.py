"""What would each allocator do to my model, and at what cost? A table and a heat map; nothing is trained.

    python -m allocators.show model=tiny-moe                              every allocator that fits, embedded task
    python -m allocators.show model=tiny-moe fraction=0.5 rank=16         a knob goes to every allocator that has it
    python -m allocators.show model=tiny-moe allocator=sieve,esft esft.p=0.3 html=show.html
    python -m allocators.show model=allenai/OLMoE-1B-7B-0924 task=arc_easy png=olmoe.png
    python -m allocators.show signal=studies/signals/routing-0123456789abcdef.json      no weights, no task

Signals are measured once and kept under `cache`; with `signal=FILE` (comma-separated) only those files are read and
allocators that need another signal are left out. `python -m allocators.show help` lists keys, allocators and knobs.
"""

from __future__ import annotations

import html
import itertools
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from allocators.core import plugins
from allocators.core.errors import InfeasibleError, StudyError, ToolkitError, ToolkitWarning, did_you_mean
from allocators.core.ranking import covered_shares
from allocators.core.shapes import shape_of
from allocators.core.types import Allocation, ExpertCounts, ExpertSelection, ModelShape, Signal


def _key(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class ShowConfig:
    """The keys of the command line; every other key is a knob of the allocators."""

    model: str = _key("", "embedded name, local folder or Hugging Face id (empty: the signal's model, or tiny-moe)")
    task: str = _key("tiny_cipher", "whose training documents signals are measured on")
    allocator: str = _key("", "which ones, comma-separated (empty: all that fit the model)")
    rank: int = _key(8, "LoRA rank that parameters are counted at")
    samples: int = _key(256, "training documents to measure on")
    seed: int = _key(0, "seed of the sample, and of allocators that draw")
    signal: str = _key("", "signal files to read instead of measuring, comma-separated")
    cache: str = _key("studies/signals", "folder where measured signals are kept")
    device: str = _key("", "torch device to measure on (empty: cuda where there is one)")
    png: str = _key("", "also draw everything into this PNG file")
    html: str = _key("", "also write everything into this HTML file")
    plugins: str = _key("", "files, folders or modules with own allocators, comma-separated")


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
    """A heat map: one line a layer. `lowest` is where the colours start."""

    title: str
    lines: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    beside: tuple[str, ...] = ()
    lowest: float = 0.0

    def level(self, value: float) -> float:
        """0 for the lowest value, 1 for the panel's highest."""
        highest = max(map(max, self.values))
        return max(0.0, value - self.lowest) / (highest - self.lowest) if highest > self.lowest else 0.0


@dataclass(frozen=True)
class Shown:
    """Everything that is displayed; the terminal, PNG and HTML are three views of it."""

    shape: ModelShape
    rank: int
    rows: tuple[Row, ...]
    signals: Mapping[str, Signal]
    origins: tuple[str, ...]  # where each signal came from


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line on stderr where the request cannot be answered."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if any(word in ("help", "-h", "--help") for word in words):
            print(help_text())
            return 0
        config, knobs = parse(words)
        shown = look(config, knobs)
        if config.png:
            _saving(config.png, lambda file: draw_png(shown, file))
        if config.html:
            _saving(config.html, lambda file: file.write_text(to_html(shown), encoding="utf-8"))
        print_shown(shown, single=len(shown.rows) == 1)
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(words: Sequence[str]) -> tuple[ShowConfig, dict[str, Any]]:
    """Words `key=value` to the keys of `ShowConfig` and all others, which must prove to be knobs.

    Raises StudyError for a word without `=` or a value of the wrong type.
    """
    types = {f.name: type(f.default) for f in fields(ShowConfig)}
    given: dict[str, Any] = {}
    knobs: dict[str, Any] = {}
    for word in words:
        key, separator, value = word.partition("=")
        if not separator:
            raise StudyError(f"'{word}' is not key=value, for example model=tiny-moe (help lists the keys)")
        if key not in types:
            knobs[key] = _scalar(value)
        elif types[key] is int:
            if not value.isdecimal() or (key != "seed" and int(value) < 1):
                raise StudyError(f"{key} must be a whole number of at least {int(key != 'seed')}, got '{value}'")
            given[key] = int(value)
        else:
            given[key] = value
    return ShowConfig(**given), knobs


def look(config: ShowConfig, knobs: Mapping[str, Any]) -> Shown:
    """Measures or reads what is needed and asks every allocator. Everything that can be refused is refused first."""
    from trainers import models

    for plugin in _list(config.plugins):
        plugins.add(plugin)
    signals: dict[str, Signal] = {}
    origins: list[str] = []
    for file in _list(config.signal):
        from allocators.signals import cache

        signal = cache.load(Path(file))
        signals[signal.kind] = signal
        origins.append(f"{signal.kind}: {file}, {_told(signal.provenance)}")
    model = config.model or next(
        (s.provenance["model"] for s in signals.values() if "model" in s.provenance), "tiny-moe"
    )
    shape = shape_of(models.config_of(model), name=model)

    names = _list(config.allocator) or [
        name
        for name in plugins.fitting(shape)
        if not signals or plugins.load("allocators", name).NEEDS in (None, *signals)
    ]
    modules = {name: plugins.load("allocators", name) for name in names}
    knobs_by_name = _deal(knobs, modules)
    for name, module in modules.items():
        plugins.check(module, shape, knobs_by_name[name])

    source = _Source(config, shape, lambda done, total, what: None)
    for kind in sorted({m.NEEDS for m in modules.values() if m.NEEDS is not None} - set(signals)):
        from allocators.signals import measured

        begun = time.monotonic()
        signals[kind] = measured(kind, source, folder=Path(config.cache), warn=_say)
        origins.append(f"{kind}: {_told(signals[kind].provenance)}, {time.monotonic() - begun:.1f} s")

    rows = [_ask(name, module, signals, shape, knobs_by_name[name], config.seed) for name, module in modules.items()]
    if all(row.allocation is None for row in rows):
        raise InfeasibleError(f"{rows[0].name}: {rows[0].reason}")
    rows.sort(key=lambda row: (_params(row, shape, config.rank), row.name))
    return Shown(shape, config.rank, tuple(rows), signals, tuple(origins))


class _Source:
    """A model and a task by name for `allocators.signals`, each loaded when a measurement first reads it."""

    def __init__(self, config: ShowConfig, shape: ModelShape, progress: Callable[[int, int, str], None]) -> None:
        self.name, self.shape = shape.name, shape
        self.task_name = config.task
        self.samples, self.seed = config.samples, config.seed
        self.scratch = Path(config.cache)
        self.progress = progress
        self._device = config.device

    def folder(self) -> Path:
        from trainers import models

        return models.folder_of(self.name)

    @cached_property
    def identity(self) -> str:
        from trainers import models

        return models.identity_of(self.name)

    @cached_property
    def device(self) -> str:
        import torch

        return self._device or ("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def dtype(self) -> str:
        from trainers import models

        return models.dtype_on(self.device)

    @cached_property
    def _loaded(self) -> Any:
        from trainers import models

        _say(f"loading {self.name} …")
        return models.load(self.name, device=self.device, dtype=self.dtype)

    @property
    def model(self) -> Any:
        return self._loaded.model

    @property
    def tokenizer(self) -> Any:
        return self._loaded.tokenizer

    @cached_property
    def task(self) -> Any:
        from trainers import tasks

        return tasks.load_task(self.task_name)


def _ask(
    name: str, module: Any, signals: Mapping[str, Signal], shape: ModelShape, knobs: Mapping[str, Any], seed: int
) -> Row:
    seeded = {"seed": seed} if "seed" in plugins.knobs_of(module) else {}
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always", ToolkitWarning)
        try:
            allocation = plugins.call(module, signals.get(module.NEEDS), shape, seeded | dict(knobs))
        except InfeasibleError as error:
            return Row(name, knobs, None, reason=str(error))
    return Row(name, knobs, allocation, notes=tuple(str(w.message) for w in raised))


def _deal(knobs: Mapping[str, Any], modules: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`NAME.KNOB` to that allocator, `KNOB` to every one that has it."""
    dealt: dict[str, dict[str, Any]] = {name: {} for name in modules}
    by_precision = sorted(knobs.items(), key=lambda item: "." in item[0])  # the named one last: it wins
    for key, value in by_precision:
        name, dot, knob = key.rpartition(".")
        if dot:
            if name not in modules:
                raise StudyError(
                    f"'{key}' is for '{name}', shown are {', '.join(modules)}{did_you_mean(name, modules)}"
                )
            dealt[name][knob] = value
            continue
        takers = [n for n, module in modules.items() if key in plugins.knobs_of(module)]
        if not takers:
            known = {f.name for f in fields(ShowConfig)} | {k for m in modules.values() for k in plugins.knobs_of(m)}
            raise StudyError(
                f"unknown key '{key}': neither a key nor a knob of {', '.join(modules)}"
                f"{did_you_mean(key, known)} (help lists both)"
            )
        for taker in takers:
            dealt[taker][key] = value
    return dealt


# --- what is displayed ------------------------------------------------------------------------------------------------


def per_layer(allocation: Allocation, shape: ModelShape) -> list[float]:
    """Experts of every layer; for a dense base the mean over the layer's modules, the papers' N of a layer."""
    match allocation:
        case ExpertSelection():
            return [len(allocation.in_layer(layer)) for layer in shape.moe_layers]
        case ExpertCounts():
            by_layer: dict[int, list[int]] = {layer: [] for layer in range(shape.num_layers)}
            for m in shape.of_role("attention", "mlp"):
                by_layer[m.layer].append(allocation.counts.get(m.path, 0))
            return [statistics.fmean(counts) for counts in by_layer.values()]


def in_runs(numbers: Iterable[float]) -> str:
    """`[4, 4, 4, 6.5]` as `4×3 6.5`."""
    runs = [(f"{number:.3g}", len(list(same))) for number, same in itertools.groupby(numbers)]
    return " ".join(f"{text}×{times}" if times > 1 else text for text, times in runs)


def allocation_panel(row: Row, shape: ModelShape) -> Panel:
    """Chosen experts by layer (1 or 0), or experts added by layer and module."""
    match row.allocation:
        case ExpertSelection() as chosen:
            width = max(shape.experts_in(layer) for layer in shape.moe_layers)
            values = [[float(e in chosen.in_layer(layer)) for e in range(width)] for layer in shape.moe_layers]
            columns = [str(e) for e in range(width)]
            lines = [f"layer {layer}" for layer in shape.moe_layers]
        case ExpertCounts(counts=counts):
            modules = shape.of_role("attention", "mlp")
            columns = list(dict.fromkeys(m.name for m in modules))
            found = {(m.layer, m.name): float(counts.get(m.path, 0)) for m in modules}
            values = [[found.get((layer, name), 0.0) for name in columns] for layer in range(shape.num_layers)]
            lines = [f"layer {layer}" for layer in range(shape.num_layers)]
        case _:
            raise AssertionError(row)
    return Panel(f"{row.name}: experts", tuple(lines), tuple(columns), tuple(map(tuple, values)))


def signal_panels(signal: Signal, shape: ModelShape) -> list[Panel]:
    """One panel a metric. Rows that are layers are shown as shares of the layer, rows that are modules as they are."""
    panels = []
    for metric in next(iter(signal.rows.values())):
        if all(key.isdecimal() for key in signal.rows):
            keys = sorted(signal.rows, key=int)
            values = [_shares(signal.metric(key, metric)) for key in keys]
            columns = [str(i) for i in range(max(map(len, values)))]
            lines = [f"layer {key}" for key in keys]
            beside = [f"top quarter {_top_quarter(row):.0%}" for row in values]
            title = f"{signal.kind}: {metric}, share of the layer by {signal.axis}"
        else:
            modules = {m.path: m for m in shape.modules}
            known = [path for path in signal.rows if path in modules]
            columns = list(dict.fromkeys(modules[path].name for path in known))
            found = {(modules[p].layer, modules[p].name): statistics.fmean(signal.metric(p, metric)) for p in known}
            layers = sorted({modules[path].layer for path in known})
            values = [[found.get((layer, name), 0.0) for name in columns] for layer in layers]
            lines = [f"layer {layer}" for layer in layers]
            beside = []
            title = f"{signal.kind}: {metric} by module"
        lowest = min(map(min, values)) if not beside else 0.0
        panels.append(Panel(title, tuple(lines), tuple(columns), tuple(map(tuple, values)), tuple(beside), lowest))
    return panels


def correlations(signals: Mapping[str, Signal]) -> list[tuple[str, str, float]]:
    """Spearman's rank correlation of every two metrics that are about the same things (equal rows, equal lengths)."""
    columns: dict[str, dict[tuple[str, int], float]] = {}
    for signal in signals.values():
        for key, metrics in signal.rows.items():
            for metric, values in metrics.items():
                column = columns.setdefault(f"{signal.kind}.{metric}", {})
                column.update({(key, i): value for i, value in enumerate(values)})
    found = []
    for (a, left), (b, right) in itertools.combinations(sorted(columns.items()), 2):
        if left.keys() == right.keys() and len({*left.values()}) > 1 and len({*right.values()}) > 1:
            keys = sorted(left)
            ranks = [_ranks([column[key] for key in keys]) for column in (left, right)]
            found.append((a, b, statistics.correlation(*ranks)))
    return found


def cells(row: Row, shown: Shown) -> tuple[str, ...]:
    """Allocator, knobs, experts, experts by layer, parameters, share of tokens covered."""
    knobs = " ".join(f"{k}={v}" for k, v in row.knobs.items())
    if row.allocation is None:
        return row.name, knobs, "", row.reason, "", ""
    counts = per_layer(row.allocation, shown.shape)
    covers = ""
    if isinstance(row.allocation, ExpertSelection) and "routing" in shown.signals:
        shares = covered_shares(row.allocation, shown.signals["routing"], shown.shape).values()
        covers = f"{statistics.fmean(shares):.0%} ({min(shares):.0%}–{max(shares):.0%})"
    params = f"{_params(row, shown.shape, shown.rank):,}"
    return row.name, knobs, f"{math.fsum(counts):.4g}", in_runs(counts), params, covers


def headings(shown: Shown) -> tuple[str, ...]:
    covers = "tokens covered (by layer)" if "routing" in shown.signals else ""
    return "allocator", "knobs", "experts", "by layer", f"parameters, rank {shown.rank}", covers


def title(shown: Shown) -> str:
    shape = shown.shape
    experts = f", {shape.total_experts:,} routed experts" if shape.is_moe else ""
    return f"{shape.name}: {shape.num_layers} layers{experts}"


def print_shown(shown: Shown, *, single: bool) -> None:
    """The table, each signal's first metric as a heat map, and a single allocator's answer as another."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    table = Table(title=title(shown), title_justify="left")
    heads = headings(shown)
    show = [i for i, head in enumerate(heads) if head and (head != "knobs" or any(r.knobs for r in shown.rows))]
    for i in show:
        table.add_column(heads[i], justify="right" if i in (2, 4) else "left", overflow="fold")
    for row in shown.rows:
        line = cells(row, shown)
        table.add_row(*(Text(line[i]) for i in show))
    console.print(table)
    for note in (f"{row.name}: {note}" for row in shown.rows for note in row.notes):
        console.print(Text(f"note: {note}"))
    panels = [signal_panels(signal, shown.shape)[0] for signal in shown.signals.values()]
    panels += [allocation_panel(row, shown.shape) for row in shown.rows if single]
    for panel in panels:
        console.print()
        console.print(Text(panel.title, style="bold"))
        for line in _terminal_lines(panel, console.width):
            console.print(line)
    console.print()
    for a, b, value in correlations(shown.signals):
        console.print(Text(f"rank correlation of {a} and {b}: {value:.2f}"))
    for origin in shown.origins:
        console.print(Text(origin), soft_wrap=True)


_SHADES = " ░▒▓█"  # read without colours too: in a file, in a pipe, in a colour-blind eye
_COLOURS = ("grey37", "dark_red", "red3", "orange1", "bright_yellow")


def _terminal_lines(panel: Panel, width: int) -> Iterable[Any]:
    from rich.text import Text

    label = max(map(len, panel.lines))
    room = width - label - 1 - max(map(len, panel.beside or ("",))) - 2
    merge = math.ceil(len(panel.columns) / room)  # neighbours that share a cell where the line is too long
    cell = 1 if 2 * math.ceil(len(panel.columns) / merge) > room else 2
    for i, (name, row) in enumerate(zip(panel.lines, panel.values, strict=True)):
        line = Text(f"{name:<{label}} ")
        for start in range(0, len(row), merge):
            level = min(4, int(5 * panel.level(statistics.fmean(row[start : start + merge]))))
            line.append(_SHADES[level] * cell, style=_COLOURS[level])
        line.append(f"  {panel.beside[i]}" if panel.beside else "")
        yield line


def _all_panels(shown: Shown) -> list[Panel]:
    panels = [panel for signal in shown.signals.values() for panel in signal_panels(signal, shown.shape)]
    return panels + [allocation_panel(row, shown.shape) for row in shown.rows if row.allocation is not None]


def draw_png(shown: Shown, file: Path) -> None:
    """One heat map a signal's metric and one an allocator."""
    from matplotlib.figure import Figure

    panels = _all_panels(shown)
    heights = [1 + 0.18 * len(panel.lines) for panel in panels]
    figure = Figure(figsize=(9, sum(heights) + 0.5), layout="constrained")
    figure.suptitle(title(shown))
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        highest = max(max(map(max, panel.values)), panel.lowest + 1e-9)  # an empty choice is pale, not mid-scale
        image = axis.imshow(panel.values, aspect="auto", cmap="YlOrRd", vmin=panel.lowest, vmax=highest)
        axis.set_title(panel.title, fontsize=9)
        axis.set_yticks(range(len(panel.lines)), panel.lines, fontsize=6)
        step = math.ceil(len(panel.columns) / 32)
        axis.set_xticks(range(0, len(panel.columns), step), panel.columns[::step], fontsize=6)
        figure.colorbar(image, ax=axis, fraction=0.03)
    figure.savefig(file, dpi=120)


def to_html(shown: Shown) -> str:
    """One self-contained page without scripts: the table, and every heat map with its values on hover."""
    heads = headings(shown)
    out = [
        "<!doctype html><meta charset='utf-8'>",
        f"<title>{html.escape(title(shown))}</title>",
        "<style>body{font:14px sans-serif;margin:2em}table{border-collapse:collapse}h2{font-size:15px}"
        ".t td,.t th{border-bottom:1px solid #ccc;padding:3px 10px;text-align:left}"
        ".h td{min-width:9px;height:13px;border:1px solid #eee}.h th{font:11px sans-serif;padding-right:6px}</style>",
        f"<h1>{html.escape(title(shown))}</h1><table class='t'><tr>",
        *(f"<th>{html.escape(head)}</th>" for head in heads),
        "</tr>",
    ]
    for row in shown.rows:
        out.append("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in cells(row, shown)) + "</tr>")
    out.append("</table>")
    out += [f"<p>{html.escape(f'{row.name}: {note}')}</p>" for row in shown.rows for note in row.notes]
    for panel in _all_panels(shown):
        out.append(f"<h2>{html.escape(panel.title)}</h2><table class='h'>")
        for i, (name, values) in enumerate(zip(panel.lines, panel.values, strict=True)):
            out.append(f"<tr><th>{html.escape(name)}</th>")
            for column, value in zip(panel.columns, values, strict=False):
                colour = f"rgba(178,24,43,{panel.level(value):.3f})"
                out.append(f"<td style='background:{colour}' title='{html.escape(column)}: {value:.4g}'></td>")
            out.append(f"<td>{html.escape(panel.beside[i]) if panel.beside else ''}</td></tr>")
        out.append("</table>")
    for a, b, value in correlations(shown.signals):
        out.append(f"<p>rank correlation of {html.escape(a)} and {html.escape(b)}: {value:.2f}</p>")
    out += [f"<p>{html.escape(origin)}</p>" for origin in shown.origins]
    return "\n".join(out)


def help_text() -> str:
    """Keys with their defaults, then every allocator with its knobs."""
    lines = [(__doc__ or "").strip(), "", "keys:"]
    for f in fields(ShowConfig):
        default = f" ({f.default})" if f.default != "" else ""
        lines.append(f"  {f.name + default:<26} {f.metadata['help']}")
    lines += ["", "allocators and knobs:"]
    for name in plugins.names("allocators"):
        module = plugins.load("allocators", name)
        base = {"moe": "MoE", "dense": "dense", "any": "any base"}[module.BASE]
        first = (module.__doc__ or "").strip().splitlines()[0]
        lines.append(
            f"  {name:<12} [{base}{', ' + module.NEEDS if module.NEEDS else ''}] {first.partition(': ')[2] or first}"
        )
        knobs = plugins.knobs_of(module)
        if knobs:
            lines.append(f"  {'':<12} {' '.join(f'{knob}={default}' for knob, default in knobs.items())}")
    return "\n".join(lines)


# --- small things -----------------------------------------------------------------------------------------------------


def _list(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _scalar(text: str) -> Any:
    """A number, true, false or null as JSON writes it, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def _told(provenance: Mapping[str, Any]) -> str:
    told = [
        f"{provenance[key]} {key}" if key == "samples" else str(provenance[key])
        for key in ("samples", "task")
        if key in provenance
    ]
    return " of ".join(told) or "no task"


def _params(row: Row, shape: ModelShape, rank: int) -> int:
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


def _saving(name: str, save: Any) -> None:
    file = Path(name)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save(file)
    except OSError as error:
        raise StudyError(f"'{name}' cannot be written: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main())
