"""What allocators read: one file a kind of signal, measured on a model and kept on disk by content.

    signal = measured("routing", source, folder=Path("studies/signals"))

A signal's file defines `measurement_of(source)`: everything the numbers depend on, and the function that measures them.
What a source does not need to answer it does not load: a cached signal costs no model.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from allocators.core.errors import unknown
from allocators.core.types import ModelShape, Signal


class Measurement(NamedTuple):
    """A signal that has not been measured yet.

    provenance   everything the numbers depend on, which names the signal's file
    measure      reads the model and the documents, and returns the signal with this provenance
    """

    provenance: Mapping[str, Any]
    measure: Callable[[], Signal]


class Source(Protocol):
    """What a signal may be measured on. Attributes may be slow to read: a measurement reads only those it needs.

    name, identity       the base model's name, and its revision or the hash of its weights as stored
    shape                its sizes
    folder               gives the folder where the weights lie as safetensors, fetching them first where need be;
                         None where there is no such folder, as for a model that was made in memory
    device, dtype        where the resident model is, and its dtype as torch names it (`bfloat16`): numbers that come
                         from rounded weights must not pass for those of the stored ones
    model, tokenizer     the resident base model, in eval mode
    tokenizer_identity   the hash of what turns text into tokens: other tokens of the same documents are other numbers
    task_name, task      labelled documents, see trainers/tasks/
    samples, seed        how many of them, drawn how
    scratch              folder for what a long measurement has so far, so that one that was cut off goes on
    progress             called with (done, total, what) in the course of a long measurement
    """

    @property
    def name(self) -> str:
        """The base model's name."""

    @property
    def identity(self) -> str:
        """The model's revision, or the hash of its weights as stored."""

    @property
    def shape(self) -> ModelShape:
        """The model's sizes."""

    @property
    def folder(self) -> Callable[[], Path] | None:
        """Gives the folder of the weights, fetched first where need be; None where there is no such folder."""

    @property
    def device(self) -> Any:
        """The device of the resident model."""

    @property
    def dtype(self) -> str:
        """The resident model's dtype as torch names it (`bfloat16`)."""

    @property
    def model(self) -> Any:
        """The resident base model, in eval mode."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the base model."""

    @property
    def tokenizer_identity(self) -> str:
        """The hash of what turns text into tokens."""

    @property
    def task_name(self) -> str:
        """The name of the task that the documents come from."""

    @property
    def task(self) -> Any:
        """The labelled documents, see trainers/tasks/."""

    @property
    def samples(self) -> int:
        """The number of documents to measure on, at most."""

    @property
    def seed(self) -> int:
        """The seed that draws the documents."""

    @property
    def scratch(self) -> Path:
        """The folder for what a long measurement has so far."""

    @property
    def progress(self) -> Callable[[int, int, str], None]:
        """Is called with (done, total, what) in the course of a long measurement."""


def kinds() -> list[str]:
    """The kinds of signal that can be measured: the modules of this folder, but for the cache."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "cache")


def measurement_of(kind: str, source: Source) -> Measurement:
    """What a signal's numbers depend on, and how to measure them. Raises StudyError for an unknown kind."""
    if kind not in kinds():
        raise unknown("signal", kind, kinds())
    measurement: Measurement = importlib.import_module(f"allocators.signals.{kind}").measurement_of(source)
    return measurement


def measured(
    kind: str,
    source: Source,
    *,
    folder: Path,
    warn: Callable[[str], None] | None = None,
    during: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Signal:
    """A signal from the cache in `folder`, measured first where it is not there.

    warn     receives one line about a damaged file in the cache; by default a ToolkitWarning
    during   surrounds the measurement, and is not entered where the cache has the signal: a progress bar, a clock

    Raises StudyError for an unknown kind, a model or task that does not have this signal, or an unwritable folder.
    """
    provenance, measure = measurement_of(kind, source)
    from allocators.signals.cache import cached

    def watched() -> Signal:
        with during():
            return measure()

    return cached(kind, provenance, folder=folder, measure=watched, warn=warn)


def with_progress(
    batches: Iterable[Mapping[str, Any]], *, total: int, progress: Callable[[int, int, str], None], what: str
) -> Iterator[Mapping[str, Any]]:
    """The same batches; after each, `progress` is called with how many of the `total` samples are done."""
    done = 0
    for batch in batches:
        yield batch
        done += len(batch["input_ids"])
        progress(done, total, what)
