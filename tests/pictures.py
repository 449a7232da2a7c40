"""The pictures of README and docs, made from a real study, so that they stay true.

    python -m search.run space=sieve
    python -m tests.pictures study=studies/sieve-tiny-moe-default

Writes docs/pictures/: report.png, the head of report.html in headless Chromium; beside.png, two studies side by
side; and live.svg, the live view as it was after two thirds of the trainings. Needs Chromium on the path (Debian:
apt-get install chromium).
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from rich.console import Console

from allocators.core import words
from search import records, report
from search.report.live import Progress
from search.serve import Serving
from tests import ROOT
from tests.browser import Browser

FOLDER = ROOT / "docs" / "pictures"


@dataclass(frozen=True)
class Settings:
    """What is drawn."""

    study: str = words.key("studies/sieve-tiny-moe-default", "folder of a finished study")
    other: str = words.key("", "folder of a study that is drawn beside it (empty: the same)")
    to: str = words.key(str(FOLDER.relative_to(ROOT)), "folder that the pictures are written to")
    width: int = words.key(1240, "of the browser's window, pixels", least=320)
    height: int = words.key(812, "of the browser's window, pixels", least=240)


def main(argv: list[str]) -> None:
    """Raises StudyError where there is no study or no browser."""
    if words.asks_for_help(argv):
        print((__doc__ or "").strip(), "", "keys:", *words.help_of(Settings), sep="\n")
        return
    settings = words.parse(argv, Settings)
    folder = Path(settings.to)
    folder.mkdir(parents=True, exist_ok=True)
    page = report.write(settings.study).records.folder / "report.html"
    screenshot(page, folder / "report.png", width=settings.width, height=settings.height)
    overview = Serving([Path(settings.study), Path(settings.other or settings.study)]).overview()
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "beside.html").write_text(overview, encoding="utf-8")
        screenshot(Path(place) / "beside.html", folder / "beside.png", width=1000, height=740)
    (folder / "live.svg").write_text(live_view(settings.study), encoding="utf-8")
    print(*(folder / name for name in ("report.png", "beside.png", "live.svg")), sep="\n")


def screenshot(page: Path, to: Path, *, width: int, height: int) -> None:
    """A page as a browser draws it, as PNG. Raises StudyError where there is no browser."""
    with Browser(width=width, height=height) as browser:
        browser.open(page.absolute().as_uri())
        browser.picture(to)


def live_view(study: str | Path) -> str:
    """The live view after two thirds of a study's trainings, with the next two running, as SVG."""
    outcomes = [outcome for outcome in records.read(study).finished.values() if outcome.rungs]
    done = outcomes[: len(outcomes) * 2 // 3]
    console = Console(record=True, force_terminal=True, width=112, file=StringIO())
    progress = Progress(len(outcomes), done=done, console=console)
    for outcome in outcomes[len(done) : len(done) + 2]:
        progress.started(outcome)
        progress.rung(outcome.digest, outcome.rungs[0])
    console.print(progress.view())
    return console.export_svg(title="python -m search.run space=sieve")


if __name__ == "__main__":
    words.run(main)
