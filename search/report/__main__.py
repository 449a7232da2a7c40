"""The command: writes a study's report into its folder and prints it.

    python -m search.report studies/demo
    python -m search.report studies/demo results=demo.json        # the numbers of all points as one small file, too

STUDY is the folder of a study, or URI/NAME where its storage is one. The study may be running.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from allocators.core import words
from allocators.core.errors import StudyError
from search import door
from search.records import mirror, read, write_atomically
from search.records.files import refuse_other_kind
from search.report import Report, show, summary, write
from trainers import command


@dataclass(frozen=True)
class Request:
    """The keys of the command."""

    results: str = words.key("", "JSON file that the numbers of all points are written to as well (empty: none)")
    seeds: int = words.key(0, "how many seeds go into that file, from the study's first on (0: all)", least=1, unset=0)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 there is no study in the folder or it cannot be written."""
    return door.answer(argv, told=help_text, act=_report)


def help_text() -> str:
    """Usage, keys with their defaults, and the rest of this file's docstring."""
    return door.help_text("search.report STUDY [key=value ...]", Request, __doc__)


def _report(given: Sequence[str]) -> Iterator[str]:
    folder, request = door.one_study(given, Request, example="search.report STUDY")
    if request.seeds and not request.results:
        raise StudyError("seeds= says what goes into the file of results=FILE.json: give both, or neither")
    try:
        if to := request.results:
            refuse_other_kind(Path(to), summary.BEGINS.encode(), kind="a file of results")
        to = "the study's folder"
        to = folder = mirror.here(folder)
        report = write(folder)
        show(report)
        if request.results:
            to = request.results
            yield f"Numbers: {write_results(report, request)}"
    except OSError as error:
        raise StudyError(f"the report cannot be written to {to} ({error.strerror})") from None


def write_results(report: Report, request: Request) -> Path:
    """Writes the file `results=` and returns its path."""
    to = Path(request.results)
    if request.seeds:
        records = read(report.records.folder)
        summary.keep_seeds(records, request.seeds)
        report = Report(records)
    to.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(to, summary.text(summary.summary(report, said=report.words)))
    return to


if __name__ == "__main__":
    sys.exit(command.run(main))
