"""A model and a task by name, as `allocators.signals` measures on them; each is loaded when it is first read.

signal, line = Source(config, shape).measured("routing")        # from the cache or measured now; which of the two
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocators.core.errors import StudyError, ToolkitWarning
from allocators.core.types import ModelShape, Signal
from search.config import load_arguments
from search.show.config import ShowConfig
from search.show.views import by_layer
from trainers.tasks.files import default_for

if TYPE_CHECKING:  # what is asked for may need neither a model nor a task
    from trainers.models import Loaded
    from trainers.tasks import Mixture, Task


class Source:
    """A model and a task by name for `allocators.signals`, each loaded when a measurement first reads it."""

    progress: Callable[[int, int, str], None]

    def __init__(self, config: ShowConfig, shape: ModelShape) -> None:
        self.name, self.shape = shape.name, shape
        self.task_name = default_for(self.name, config.task)
        self.samples, self.seed = config.samples, config.seed
        self.scratch = Path(config.cache)
        self.loading_seconds = 0.0
        self._config = config

    def measured(self, kind: str) -> tuple[Signal, str]:
        """A signal from the cache or measured now, and a line that says which, with the seconds that it took."""
        from allocators.signals import measured

        seconds: dict[str, float] = {}

        @contextmanager
        def watched() -> Iterator[None]:
            begun, loading = time.monotonic(), self.loading_seconds
            with _bar(kind) as self.progress, warnings.catch_warnings(record=True) as raised:
                warnings.simplefilter("always", ToolkitWarning)
                yield
            for warning in raised:
                _say(f"{kind}: {warning.message}")
            seconds["loading"] = self.loading_seconds - loading
            seconds["measuring"] = time.monotonic() - begun - seconds["loading"]

        signal = measured(kind, self, folder=self.scratch, warn=_say, during=watched)
        line = f"{kind}: {described(signal)}, "
        line += f"measured in {seconds['measuring']:.1f} s" if seconds else f"kept in {self.scratch}"
        return signal, line + (f" after {seconds['loading']:.1f} s to load the model" if seconds.get("loading") else "")

    @cached_property
    def folder(self) -> Callable[[], Path] | None:
        """Gives the folder of the weights, fetched first where need be; None where the model's are dequantised ones."""
        from trainers import models

        return None if self._stored else partial(models.folder_of, self.name)

    @cached_property
    def _stored(self) -> str:
        from trainers import models

        return models.stored_as(models.config_of(self.name), name=self.name)

    @cached_property
    def identity(self) -> str:
        """The model's revision, or the hash of its weights."""
        from trainers import models

        return models.identity_of(self.name)

    @cached_property
    def tokenizer_identity(self) -> str:
        """The hash of what turns text into tokens."""
        from trainers import models

        return models.identity_of_tokenizer(self.name)

    @cached_property
    def device(self) -> str:
        """`device=`, else a GPU where there is one. Raises StudyError for a device that does not exist."""
        from trainers import models

        device = models.device_or_default(self._config.device)
        models.dtype_on(device)  # refuses one that does not exist, also for what is computed without the model
        return device

    @cached_property
    def dtype(self) -> str:
        """The numbers that the model computes with, quantisation included."""
        from trainers import models

        asked = self._config
        return models.numbers_of(
            self.device, dtype=asked.dtype, attn=asked.attn, quantization=asked.quantization, stored=self._stored
        )

    @cached_property
    def _loaded(self) -> Loaded:
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
        for line in loaded.notes:
            _say(f"note: {line}")
        return loaded

    @property
    def model(self) -> Any:
        """The base model, loaded when it is first read."""
        return self._loaded.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded with the model."""
        return self._loaded.tokenizer

    @cached_property
    def task(self) -> Task | Mixture:
        """The task, loaded when it is first read: as a study loads it, so that both share what is measured.

        One that has nothing to select on can be measured all the same.
        """
        from trainers import tasks

        try:
            return tasks.load_task(self.task_name)
        except StudyError:
            return tasks.load_task(self.task_name, select_on="test")


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


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def described(signal: Signal) -> str:
    """What was measured: `256 samples of arc_easy`, `210 matrices`."""
    if "samples" in signal.provenance:
        return f"{signal.provenance['samples']} samples of {signal.provenance.get('task', 'a task')}"
    return f"{len(signal.rows)} {'layers' if by_layer(signal) else 'matrices'}"
