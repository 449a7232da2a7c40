"""Asks every allocator about one model, and measures or reads the signals that they need.

    shown = look(ShowConfig(model="tiny-moe"), {"fraction": 0.5})

The command is `__main__.py`; `terminal.py` and `files.py` draw what comes of it.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

from allocators import _roles
from allocators.core import plugins
from allocators.core.errors import InfeasibleError, NotFiniteError, StudyError, ToolkitWarning, did_you_mean, unknown
from allocators.core.layers import total_or_default
from allocators.core.types import ModelShape, Signal
from search.show.config import ShowConfig
from search.show.source import Source, described
from search.show.views import Answer, Shown


def look(config: ShowConfig, knobs: Mapping[str, Any]) -> Shown:
    """Measures or reads what is needed and asks every allocator. Everything that can be refused is refused first."""
    from trainers import models

    for plugin in config.plugins:
        plugins.add(plugin)
    signals, origins = _read(config.signal)
    model = config.model or _model_of(signals) or "tiny-moe"
    models.check_options(dtype=config.dtype, attn=config.attn, quantization=config.quantization)
    shape = models.shape_of(model, trust_remote_code=config.trust_remote_code)

    names = config.allocator or _names(config.gives, shape, signals)
    modules = {name: plugins.load("allocators", name) for name in names}
    knobs_by_name = _deal(knobs, modules)
    for name, module in modules.items():
        own, _ = _roles.split(knobs_by_name[name])
        plugins.check(module, shape, own)
        plugins.check_values(module, own)

    lacking = _measure({m.NEEDS for m in modules.values() if m.NEEDS is not None}, signals, origins, config, shape)
    origins += models.left_out(model, trust_remote_code=config.trust_remote_code)

    answers = [
        Answer(name, knobs_by_name[name], None, reason=lacking[module.NEEDS])
        if module.NEEDS in lacking
        else _ask(name, module, signals, shape, knobs_by_name[name], config)
        for name, module in modules.items()
    ]
    if all(answer.allocation is None for answer in answers):
        raise InfeasibleError(f"{answers[0].name}: {answers[0].reason}")
    answers.sort(key=lambda answer: (answer.trainable_params(shape, rank=config.rank), answer.name))
    total = None if shape.is_moe else total_or_default(shape, knobs.get("total_experts"))
    return Shown(shape, config.rank, tuple(answers), signals, tuple(origins), total)


def _measure(
    kinds: Iterable[str], signals: dict[str, Signal], origins: list[str], config: ShowConfig, shape: ModelShape
) -> dict[str, str]:
    """Adds the signals that are not there yet, and what they are to `origins`. Gives the reason for each that it cannot
    measure: rules that need none of these have an answer all the same.
    """
    from trainers import models

    lacking: dict[str, str] = {}
    source, wanted = Source(config, shape), sorted(set(kinds) - set(signals))
    if wanted and not models.has_weights(shape.name):
        origins.append(f"no weights in '{shape.name}': rules that read {' or '.join(wanted)} have no answer")
        return {
            kind: f"reads {kind}, and '{shape.name}' has no weights: fetch them, or give signal=" for kind in wanted
        }
    for kind in wanted:
        try:
            signals[kind], origin = source.measured(kind)
        except NotFiniteError as error:
            lacking[kind], origin = str(error), f"{kind} cannot be measured: {error}"
        origins.append(origin)
    return lacking


def _read(files: Sequence[str]) -> tuple[dict[str, Signal], list[str]]:
    """Signals from files by kind, and what they are. Several files of one kind are combined where the kind can."""
    by_kind: dict[str, list[Signal]] = {}
    origins = []
    for file in files:
        from allocators.signals import cache

        signal = cache.load(Path(file))
        by_kind.setdefault(signal.kind, []).append(signal)
        origins.append(f"{signal.kind}: {described(signal)}, from {file}")
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
    names = {s.provenance["model"] for s in signals.values() if "model" in s.provenance}
    if len(names) > 1:
        raise StudyError(f"the signal files are of different models, {', '.join(sorted(names))}: give files of one")
    return next(iter(names), "")


def _names(gives: str, shape: ModelShape, signals: Mapping[str, Signal]) -> list[str]:
    """The allocators of one kind that fit the model, of those that read a signal the ones that have it where any is.

    Raises StudyError for another kind.
    """
    kinds = (*plugins.GIVES, "all")
    if gives not in kinds:
        raise unknown("value of gives", gives, kinds)
    return [
        name
        for name in plugins.fitting(shape)
        if gives in (plugins.gives(module := plugins.load("allocators", name)), "all")
        and (not signals or module.NEEDS in (None, *signals))
    ]


def _ask(
    name: str,
    module: ModuleType,
    signals: Mapping[str, Signal],
    shape: ModelShape,
    knobs: Mapping[str, Any],
    config: ShowConfig,
) -> Answer:
    own = {"seed": config.seed, "rank": config.rank}
    seeded = {knob: value for knob, value in own.items() if knob in plugins.knobs_of(module)}
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always", ToolkitWarning)
        try:
            signal = signals.get(module.NEEDS)
            allocation = _roles.call(module, signal, shape, seeded | dict(knobs), rank=config.rank)
        except InfeasibleError as error:
            return Answer(name, knobs, None, reason=str(error))
        except StudyError as error:
            raise StudyError(f"{name}: {error} ({name}.KNOB=VALUE sets a knob of {name} alone)") from error
    return Answer(name, knobs, allocation, notes=tuple(str(w.message) for w in raised))


def _deal(knobs: Mapping[str, Any], modules: Mapping[str, ModuleType]) -> dict[str, dict[str, Any]]:
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
        takers = [n for n, module in modules.items() if key in plugins.knobs_of(module) or key in _roles.KNOBS]
        if not takers:
            known = {f.name for f in fields(ShowConfig)} | {k for m in modules.values() for k in plugins.knobs_of(m)}
            known |= {*_roles.KNOBS}
            raise StudyError(
                f"unknown key '{key}': neither a key nor a knob of {', '.join(modules)}"
                f"{did_you_mean(key, known)} (help lists both)"
            )
        for taker in takers:
            dealt[taker][key] = value
    return dealt
