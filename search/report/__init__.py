"""What a study found, from its records alone: words, tables, one HTML page. No Ray, no torch, no model, no network.

    python -m search.report studies/demo        # at any time, while the study runs too

Writes front.csv (the front), points.csv (every run), front.png and report.html (one file, works offline), and prints
the front. Numbers: `results.py`; what is said of them: `words.py`; tables: `sections.py` and `tables.py`; the picture:
`plot.py`; the page: `page/`.
"""

from __future__ import annotations

import sys
from functools import cached_property
from pathlib import Path

from rich.console import Console
from rich.text import Text

from search.records import read, write_atomically
from search.report import allocations, attribution, broken, gains, page, plot, tables, words
from search.report.page import Live
from search.report.results import Results
from search.report.sections import Section, sections_of

WIDE = 150  # columns of a terminal below which the front is lines instead of a table
FILES = ("front.csv", "points.csv", "front.png", "report.html")


class Report(Results):
    """A study's results with what is said of them."""

    @cached_property
    def words(self) -> list[str]:
        """The study in sentences, the most important first."""
        return words.sentences(self)

    @cached_property
    def sections(self) -> list[Section]:
        """Tables beyond the front."""
        return [
            *sections_of(self.records, self.points),
            *allocations.sections(self.tried, self.worths),
            *broken.sections(self.broken),
            *attribution.attributed(self.importance),
            *gains.recipes(self.records, self.points, self.front, noise=self.noise),
            *gains.saved(self.records),
            *gains.foretold(self.early),
        ]

    @property
    def description(self) -> str:
        """The headlines and the front in Markdown."""
        return words.markdown(self, words.headlines(self))

    @property
    def page(self) -> str:
        """report.html."""
        return page.html(self, headlines=words.headlines(self), words=self.words, sections=self.sections)

    @property
    def running_page(self) -> str:
        """report.html while the study runs: without what takes long to compute. It loads itself again."""
        headlines = words.headlines(self, quick=True)
        return page.html(self, headlines=headlines, words=(), sections=(), live=Live())

    def served_page(self, live: Live, *, script: str) -> str:
        """The page as `search.serve` shows it: with its script, which can ask the driver for something."""
        if live.runs:
            return page.html(
                self, headlines=words.headlines(self, quick=True), words=(), sections=(), live=live, script=script
            )
        headlines = words.headlines(self)
        return page.html(self, headlines=headlines, words=self.words, sections=self.sections, live=live, script=script)

    @property
    def files(self) -> list[Path]:
        """Paths of what `write` writes."""
        return [self.records.folder / name for name in FILES]


def write(folder: str | Path) -> Report:
    """Writes the four files into the study's folder.

    Raises StudyError where there is no study in the folder, OSError where it cannot be written.
    """
    report = Report(read(folder))
    contents: tuple[str | bytes, ...] = (
        tables.front_csv(report),
        tables.points_csv(report),
        plot.png(report),
        report.page,
    )
    for file, content in zip(report.files, contents, strict=True):
        write_atomically(file, content)
    return report


def show(study: Report | str | Path, *, console: Console | None = None) -> None:
    """Prints the front, what it means, how to load the best adapter and where the files are.

    study   its folder, or what `write` returned
    """
    console = console or Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)
    report = study if isinstance(study, Report) else Report(read(study))
    front, title = (report.front, report.records.finished.values()), f"{report.title}: Pareto front"
    if report.front and console.width >= WIDE:
        console.print(
            tables.front_table(*front, title=title, chances=report.chances, ids=report.ids, splits=report.splits)
        )
    elif report.front:
        lines = tables.front_lines(*front, chances=report.chances, ids=report.ids, splits=report.splits)
        for line in (title, *lines, ""):
            console.print(Text(line), soft_wrap=True)
    for sentence in report.words:
        console.print(Text(sentence), soft_wrap=True)
    for section in report.sections:
        console.print()
        console.print(tables.section_table(section))
        for note in section.notes:
            console.print(Text(note), soft_wrap=True)
    for line in words.how_to_load(report):
        console.print(Text(line), soft_wrap=True)
    console.print(Text(f"\nReport: {report.records.folder / 'report.html'}"), soft_wrap=True)
