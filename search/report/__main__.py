"""The command: writes a study's report into its folder and prints it.

    python -m search.report studies/demo
    python -m search.report studies/demo results=demo.json        # the numbers of all points as one small file, too

STUDY is the folder of a study, or URI/NAME where its storage is one. The study may be running.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from allocators.core import words
from allocators.core.errors import StudyError, ToolkitError
from search import door
from search.records import mirror, read, write_atomically
from search.records.redact import redacted
from search.report import Report, show, summary, write
from trainers import command


@dataclass(frozen=True)
class Request:
    """The keys of the command."""

    results: str = words.key("", "JSON file that the numbers of all points are written to as well (empty: none)")
    seeds: int = words.key(0, "first seeds of the study that go into that file (0: all)", least=1, unset=0)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 there is no study in the folder or it cannot be written."""
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or words.asks_for_help(given):
        told = door.help_text("search.report STUDY [key=value ...]", Request, __doc__)
        print(told, file=sys.stdout if given else sys.stderr)
        return 0 if given else 2
    to = "the study's folder"
    try:
        folder, request = door.one_study(given, Request, example="search.report STUDY")
        if request.seeds and not request.results:
            raise StudyError("seeds= says what goes into the file of results=FILE.json: give both, or neither")
        to = folder = mirror.here(folder)
        report = write(folder)
        show(report)
        if request.results:
            to = request.results
            print(f"Numbers: {write_results(report, request)}")
    except ToolkitError as error:
        print(f"error: {redacted(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: the report cannot be written to {to} ({error.strerror})", file=sys.stderr)
        return 2
    return 0


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
