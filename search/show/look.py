"""What would each allocator do to my model, and at what cost? A table and a heat map; nothing is trained.

    python -m allocators.show model=tiny-moe                              every allocator that fits, embedded task
    python -m allocators.show model=tiny-moe fraction=0.5 rank=16         a knob goes to every allocator that has it
    python -m allocators.show model=tiny-moe allocator=sieve,esft esft.p=0.3 html=show.html
    python -m allocators.show model=smollm2-135m total_experts=90         a dense model: all at the same T
    python -m allocators.show model=huggyllama/llama-7b allocator=alphalora,mola png=llama.png       needs no task
    python -m allocators.show signal=studies/signals/routing-0123456789abcdef.json                   no weights, no task

Signals are measured once and kept under `cache`; with `signal=FILE` (comma-separated) only those files are read and
allocators that need another signal are left out. Several files of sensitivity are several data sets that vote together.
`python -m allocators.show help` lists keys, allocators and knobs.
"""

from __future__ import annotations

import importlib
import sys
import time
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from allocators.core import plugins, words
from allocators.core.errors import InfeasibleError, StudyError, ToolkitError, ToolkitWarning, did_you_mean, unknown
from allocators.core.layers import total_or_default
from allocators.core.types import ModelShape, Signal
from search.config import load_arguments
from search.show import views
from search.show.views import Row, Shown


@dataclass(frozen=True)
class ShowConfig:
    """The keys of the command line; every other key is a knob of the allocators."""

    model: str = words.key(
        "", "embedded or packaged name, folder or Hugging Face id (empty: the signal's model, or tiny-moe)"
    )
    dtype: str = words.key("auto", "of the model that signals are measured on, and the next three: as in a study")
    attn: str = words.key("auto", "implementation of attention")
    quantization: str = words.key("", "nf4 or int8 for linear layers (empty: none)")
    trust_remote_code: bool = words.key(False, "run Python code from the model's repository: it gets all your rights")
    task: str = words.key("default", "whose training documents signals are measured on")
    allocator: tuple[str, ...] = words.key((), "which ones (empty: all that fit the model)")
    rank: int = words.key(8, "LoRA rank that parameters are counted at", least=1)
    samples: int = words.key(256, "training documents to measure on", least=1)
    seed: int = words.key(0, "seed of the sample, and of allocators that draw", least=0)
    signal: tuple[str, ...] = words.key((), "signal files to read instead of measuring")
    cache: str = words.key("studies/signals", "folder where measured signals are kept")
    device: str = words.key("", "torch device to measure on (empty: cuda where there is one)")
    png: str = words.key("", "also draw everything into this PNG file")
    html: str = words.key("", "also write everything into this HTML file")
    plugins: tuple[str, ...] = words.key((), "files, folders or modules with own allocators")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line on stderr where the request cannot be answered."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        if words.asks_for_help(given):
            print(help_text())
            return 0
        config, knobs = parse(given)
        shown = look(config, knobs)
        if config.png:
            _saving(config.png, lambda file: views.draw_png(shown, file))
        if config.html:
            _saving(config.html, lambda file: file.write_text(views.to_html(shown), encoding="utf-8"))
        views.print_shown(shown, single=len(shown.rows) == 1)
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(given: Sequence[str]) -> tuple[ShowConfig, dict[str, Any]]:
    """Words `key=value` to the keys of `ShowConfig` and all others, which must prove to be knobs.

    Raises StudyError for a word without `=`, a key that is given twice, or a value of the wrong type.
    """
    known = {f.name for f in fields(ShowConfig)}
    pairs = words.split(given, example="model=tiny-moe")[1]
    config = words.build(ShowConfig, [pair for pair in pairs if pair[0] in known])
    return config, {name: words.read_value(text) for name, text in pairs if name not in known}


def look(config: ShowConfig, knobs: Mapping[str, Any]) -> Shown:
    """Measures or reads what is needed and asks every allocator. Everything that can be refused is refused first."""
    from trainers import models

    for plugin in config.plugins:
        plugins.add(plugin)
    signals, origins = _read(config.signal)
    model = config.model or _model_of(signals) or "tiny-moe"
    models.check_options(dtype=config.dtype, attn=config.attn, quantization=config.quantization)
    shape = models.shape_of(model, trust_remote_code=config.trust_remote_code)

    names = config.allocator or [
        name
        for name in plugins.fitting(shape)
        if not signals or plugins.load("allocators", name).NEEDS in (None, *signals)
    ]
    modules = {name: plugins.load("allocators", name) for name in names}
    knobs_by_name = _deal(knobs, modules)
    for name, module in modules.items():
        plugins.check(module, shape, knobs_by_name[name])
        _check_types(name, module, knobs_by_name[name])

    source = _Source(config, shape)
    for kind in sorted({m.NEEDS for m in modules.values() if m.NEEDS is not None} - set(signals)):
        signals[kind], origin = _measured(kind, source)
        origins.append(origin)

    rows = [_ask(name, module, signals, shape, knobs_by_name[name], config.seed) for name, module in modules.items()]
    if all(row.allocation is None for row in rows):
        raise InfeasibleError(f"{rows[0].name}: {rows[0].reason}")
    rows.sort(key=lambda row: (views.params_of(row, shape, config.rank), row.name))
    total = None if shape.is_moe else total_or_default(shape, knobs.get("total_experts"))
    return Shown(shape, config.rank, tuple(rows), signals, tuple(origins), total)


def _read(files: Sequence[str]) -> tuple[dict[str, Signal], list[str]]:
    """Signals from files by kind, and what they are. Several files of one kind are combined where the kind can."""
    by_kind: dict[str, list[Signal]] = {}
    origins = []
    for file in files:
        from allocators.signals import cache

        signal = cache.load(Path(file))
        by_kind.setdefault(signal.kind, []).append(signal)
        origins.append(f"{signal.kind}: {_told(signal)}, from {file}")
    signals = {}
    for kind, several in by_kind.items():
        combine = None
        if len(several) > 1:
            combine = getattr(importlib.import_module(f"allocators.signals.{kind}"), "combine", None)
            if combine is None:
                raise StudyError(f"{len(several)} of the signal files hold {kind}, and one is all that can be read")
        signals[kind] = combine(several) if combine else several[0]
    return signals, origins


def _model_of(signals: Mapping[str, Signal]) -> str:
    """The model that signal files were measured on, "" where they do not say."""
    found = {s.provenance["model"] for s in signals.values() if "model" in s.provenance}
    if len(found) > 1:
        raise StudyError(f"the signal files are of different models, {', '.join(sorted(found))}: give files of one")
    return next(iter(found), "")


def _measured(kind: str, source: _Source) -> tuple[Signal, str]:
    """A signal from the cache or measured now, and a line that says which, with the seconds that it took."""
    from allocators.signals import plan
    from allocators.signals.cache import cached

    provenance, measure = plan(kind, source)
    took: list[float] = []

    def timed() -> Signal:
        begun, loading, source.seen = time.monotonic(), source.loading_seconds, 0
        with _bar(kind) as source.progress, warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always", ToolkitWarning)
            signal = measure()
        for warning in raised:
            _say(f"{kind}: {warning.message}")
        took[:] = [time.monotonic() - begun - (source.loading_seconds - loading), source.loading_seconds - loading]
        return signal

    signal = cached(kind, provenance, folder=source.scratch, measure=timed, warn=_say)
    origin = f"{kind}: {_told(signal)}, " + (f"measured in {took[0]:.1f} s" if took else f"kept in {source.scratch}")
    return signal, origin + (f" after {took[1]:.1f} s to load the model" if took and took[1] else "")


@contextmanager
def _bar(kind: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar while a signal is measured, on a terminal only."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(kind, total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=f"{kind} {what}")


class _Source:
    """A model and a task by name for `allocators.signals`, each loaded when a measurement first reads it."""

    progress: Callable[[int, int, str], None]

    def __init__(self, config: ShowConfig, shape: ModelShape) -> None:
        self.name, self.shape = shape.name, shape
        self.task_name = config.task
        self.samples, self.seed = config.samples, config.seed
        self.scratch = Path(config.cache)
        self.loading_seconds = 0.0
        self.seen = 0
        self._config = config

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

        from trainers import models

        device = self._config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        models.dtype_on(device)  # refuses one that does not exist, also for what is computed without the model
        return device

    @cached_property
    def dtype(self) -> str:
        from trainers import models

        asked = self._config
        return models.numbers_of(self.device, dtype=asked.dtype, attn=asked.attn, quantization=asked.quantization)

    @cached_property
    def _loaded(self) -> Any:
        from trainers import models

        asked = self._config
        for line in models.remarks(
            self.name, self.shape, quantization=asked.quantization, trust_remote_code=asked.trust_remote_code
        ):
            _say(f"note: {line}")
        _say(f"loading {self.name} …")
        begun = time.monotonic()
        loaded = models.load(self.name, device=self.device, **load_arguments(vars(asked)))
        self.loading_seconds = time.monotonic() - begun
        loaded.model.base_model.register_forward_pre_hook(self._count, with_kwargs=True)
        return loaded

    def _count(self, module: Any, args: Any, kwargs: Any) -> None:
        """Every document passes the base model once, whatever is measured: progress that no signal has to report."""
        self.seen += len(kwargs["input_ids"])
        self.progress(self.seen, min(self.samples, self.task.num_training), "documents")

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
        except StudyError as error:
            raise StudyError(f"{name}: {error} ({name}.KNOB=VALUE sets a knob of {name} alone)") from error
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


def _check_types(name: str, module: Any, knobs: Mapping[str, Any]) -> None:
    """Raises StudyError for a value that an allocator's annotations rule out: no number, or none of the words."""
    try:
        hints = typing.get_type_hints(module.allocate)
    except NameError:  # a user's annotations may be there for type checkers only
        return
    for knob, value in knobs.items():
        hint = hints.get(knob)
        if typing.get_origin(hint) is typing.Literal and value not in typing.get_args(hint):
            raise unknown(f"{knob} of {name}", str(value), typing.get_args(hint))
        wanted = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        numbers = {int, float}.intersection(wanted)
        if not numbers or {*wanted} - numbers - {types.NoneType} or type(value) in wanted:
            continue
        if float not in numbers or type(value) is not int:
            whole = "" if float in numbers else "whole "
            raise StudyError(f"{knob} of {name} must be a {whole}number, got '{value}'")


def help_text() -> str:
    """Keys with their defaults, then every allocator with its knobs."""
    lines = [(__doc__ or "").strip(), "", "keys:"]
    lines += words.help_of(ShowConfig)
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


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def _told(signal: Signal) -> str:
    """What was measured: `256 samples of arc_easy`, `210 matrices`."""
    if "samples" in signal.provenance:
        return f"{signal.provenance['samples']} samples of {signal.provenance.get('task', 'a task')}"
    return f"{len(signal.rows)} {'layers' if views.by_layer(signal) else 'matrices'}"


def _saving(name: str, save: Any) -> None:
    file = Path(name)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save(file)
    except OSError as error:
        raise StudyError(f"'{name}' cannot be written: {error.strerror or error}") from error
