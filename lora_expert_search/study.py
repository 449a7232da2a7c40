"""A study's results as objects: DataFrames, a figure, the report page, winners to load and export.

    study = open_study("studies/sieve-tiny-moe-default")
    study.front; study.best(max_params=50_000).load()

Results are read from the study's records, also while it runs: `study.refresh()` reads them again.
"""

from __future__ import annotations

import html
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocators.core import words
from allocators.core.errors import StudyError, shown
from allocators.core.types import Allocation, Outcome, Recipe
from lora_expert_search.values import as_words, plain
from search import records
from search.export import Request, find, locate, write
from search.front import Candidate
from search.report import Report, plot, tables
from search.text import human, run_id

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from trainers.adapter import Adapter


def open_study(folder: str | Path) -> Study:
    """The results of a study, by its folder. Raises StudyError where there is none."""
    return Study(Path(folder))


class Study:
    """What a study found so far. In a notebook cell it shows the report page."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.refresh()

    def refresh(self) -> Study:
        """Reads the records again; returns the study. Raises StudyError where the folder holds none."""
        self.report = Report(records.read(self.folder))
        return self

    @property
    def points(self) -> DataFrame:
        """Every run, as points.csv has it: digest, allocator and knobs, parameters, accuracies, recipe."""
        return _frame(tables.points_csv(self.report))

    @property
    def front(self) -> DataFrame:
        """The points that no other point beats, ascending in parameters, as front.csv has them."""
        return _frame(tables.front_csv(self.report))

    @property
    def words(self) -> list[str]:
        """What the report says, in sentences."""
        return self.report.words

    def best(self, *, max_params: int | None = None) -> Point:
        """The most accurate point of the front, with at most so many trainable parameters.

        Raises StudyError where no finished point is as small, or for a number that is none.
        """
        max_params = plain(max_params)
        if max_params is not None and (not isinstance(max_params, int | float) or max_params != max_params):
            raise StudyError(f"max_params must be a number, got {shown(repr(max_params))}")
        fitting = [c for c in self.report.rising if max_params is None or c.trainable_params <= max_params]
        if not fitting:
            smallest = min((c.trainable_params for c in self.report.front), default=None)
            raise StudyError(
                f"{self.folder} has no point with at most {max_params:,} parameters: the smallest has {smallest:,}"
                if smallest is not None and max_params is not None
                else f"{self.folder} has no finished point yet"
            )
        loadable = self.report.loadable(fitting[-1])
        return Point(self, fitting[-1], loadable[0] if loadable else fitting[-1].best)

    def point(self, name: str) -> Point:
        """A point by "best", "knee" or the id of a run. Raises StudyError where there is none of that name."""
        if not isinstance(name, str):
            raise StudyError(f"a point is named by best, knee or the id of a run, got {shown(repr(name))}")
        return Point(self, *find(self.report, name))

    def plot(self) -> Figure:
        """The front as a matplotlib figure. Raises StudyError before a point is finished."""
        if not self.report.front:
            raise StudyError(f"{self.folder} has no finished point yet: there is nothing to draw")
        return plot.figure(self.report)

    def __repr__(self) -> str:
        front, rising = self.report.front, self.report.rising
        best = f", best {rising[-1].accuracy:.3f}" if rising and rising[-1].accuracy is not None else ""
        return f"Study({str(self.folder)!r}: {len(self.report.points)} points, {len(front)} on the front{best})"

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{html.escape(self.report.page)}" width="100%" height="900" frameborder="0"></iframe>'


@dataclass(frozen=True, repr=False)
class Point:
    """One point of a study: its allocation, recipe, size and accuracy, and its adapter to load or export."""

    study: Study
    candidate: Candidate
    run: Outcome

    @property
    def id(self) -> str:
        """As the report prints it."""
        return run_id(self.run)

    @property
    def allocation(self) -> Allocation:
        """Which experts get LoRA, or how many are added."""
        return self.run.trial.allocation

    @property
    def recipe(self) -> Recipe:
        """LoRA and optimiser settings."""
        return self.run.trial.recipe

    @property
    def trainable_params(self) -> int:
        """Trainable parameters."""
        return self.candidate.trainable_params

    @property
    def accuracy(self) -> float | None:
        """On the split that the search selected on, mean over seeds."""
        return self.candidate.accuracy

    @property
    def test_accuracy(self) -> float | None:
        """On the test split, mean over the seeds that were evaluated there; None where none was."""
        return self.candidate.test_accuracy

    @cached_property
    def adapter_folder(self) -> str:
        """Where the adapter lies. Raises StudyError where it was not kept, with the command that trains it again."""
        return locate(self.study.report, self.run)

    def load(self, *, device: str = "cpu") -> Adapter:
        """The base with this point's adapter on it: `point.load().model` is ready to run.

        Raises StudyError where the adapter or the base is missing.
        """
        from search.config import load_arguments
        from trainers import adapter, models

        where = self.adapter_folder
        settings = self.study.report.records.header["config"]
        loaded = models.load(self.run.trial.model, device=device, **load_arguments(settings))
        return adapter.load(loaded.model, where)

    def export(self, to: str | Path, *, say: Callable[[str], Any] = print, **request: Any) -> Path:
        """Writes this point in a form that other tools load; returns the folder.

        request   format, dtype, overwrite, model: the keys of `python -m search.export`

        Raises StudyError for a key or a value that the command refuses, where the format cannot express the point, and
        where the place is taken.
        """
        asked = {"to": to, "point": self.run.digest}
        if twice := sorted(asked.keys() & request.keys()):
            raise StudyError(f"export has its {twice[0]} already: leave {twice[0]}= out")
        for line in write(self.study.folder, words.parse(as_words(asked | request), Request)):
            say(line)
        return Path(to)

    def __repr__(self) -> str:
        report = self.study.report
        size, accuracy = human(self.trainable_params), report.accuracy_words(self.candidate)
        return f"Point({self.id}: {report.label(self.run)}, {size} parameters, {accuracy})"


def _frame(csv: str) -> DataFrame:
    """The rows of a CSV file, and a column `knobs.NAME` for every knob of an allocator."""
    import pandas as pd

    if not csv:
        return pd.DataFrame()
    texts = ("digest", "allocator", "knobs", "message", "reused_from", "adapter")
    frame = pd.read_csv(io.StringIO(csv), dtype=dict.fromkeys(texts, str), keep_default_na=False, na_values=[""])
    knobs = pd.DataFrame([json.loads(text) for text in frame["knobs"]], index=frame.index).add_prefix("knobs.")
    return pd.concat([frame.drop(columns="knobs"), knobs], axis=1)
