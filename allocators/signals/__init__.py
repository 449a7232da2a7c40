"""What allocators read: one file a kind of signal, measured on a model and kept on disk by content.

    signal = measured("routing", source, folder=Path("studies/signals"))

A signal's file defines `plan(source) -> (provenance, measure)`: everything the numbers depend on, and the function that
measures them. What a source does not need to answer it does not load: a cached signal costs no model.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from allocators.core.errors import unknown
from allocators.core.types import Signal

Plan = tuple[Mapping[str, Any], Callable[[], Signal]]


class Source(Protocol):
    """What a signal may be measured on. Attributes may be slow to read: a plan reads those it needs, when it does.

    name, identity       the base model's name, and its revision or weight hash
    model, tokenizer     the resident base model, in eval mode
    task_name, task      labelled documents, see trainers/tasks.py
    samples, seed        how many of them, drawn how
    """

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> str: ...
    @property
    def model(self) -> Any: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def task_name(self) -> str: ...
    @property
    def task(self) -> Any: ...
    @property
    def samples(self) -> int: ...
    @property
    def seed(self) -> int: ...


def kinds() -> list[str]:
    """The kinds of signal that can be measured: the files of this folder."""
    return sorted(f.stem for f in Path(__file__).parent.glob("*.py") if f.stem not in ("__init__", "cache"))


def measured(kind: str, source: Source, *, folder: Path, warn: Callable[[str], None] | None = None) -> Signal:
    """A signal from the cache in `folder`, measured first where it is not there.

    Raises StudyError for an unknown kind, a model or task that does not have this signal, or an unwritable folder.
    """
    if kind not in kinds():
        raise unknown("signal", kind, kinds())
    from allocators.signals.cache import cached

    provenance, measure = importlib.import_module(f"allocators.signals.{kind}").plan(source)
    return cached(kind, provenance, folder=folder, measure=measure, warn=warn)
