"""The page's script in a real browser: 0, 1, 2 and many points, hostile names, a phone, what a click does."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from allocators.core.types import Outcome
from search.records import write_atomically
from search.report import Report, write
from tests.browser import Browser, needs_browser
from tests.search.studies import APART, fill, open_study, outcome, selection, started

pytestmark = needs_browser
EVIL = "</script><img src=x onerror=alert(1)>{{data}}&amp;"
DOTS = "document.querySelectorAll('.dot').length"


@pytest.fixture(scope="module")
def page() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


def study_of(folder: Path, *outcomes: Outcome) -> Path:
    with open_study(folder) as study:
        for done in outcomes:
            study.append_finished(done, {})
    write(folder)
    return folder / "report.html"


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_page_of_few_points_is_drawn(page: Browser, tmp_path: Path, count: int) -> None:
    done = [outcome(selection(2 + n), accuracy=0.4 + n / 10) for n in range(count)]
    page.open(study_of(tmp_path / "s", *done).as_uri())
    assert page.ask(DOTS) == count
    assert page.ask("document.querySelectorAll('path.history').length") == (count > 1)
    assert page.ask("document.querySelectorAll('#table tbody tr').length") == count
    assert "Run it again" in page.ask("document.body.innerText")
    assert page.errors == []


def test_only_failures_and_hostile_names_are_text(page: Browser, tmp_path: Path) -> None:
    bad = started(outcome(allocator=EVIL)).updated(status="failed", message=EVIL)
    page.open(study_of(tmp_path / "s", bad, outcome(selection(7), allocator=f"{EVIL}2")).as_uri())
    assert page.ask("document.querySelectorAll('img').length") == 0
    assert EVIL in page.ask("document.getElementById('table').innerText")
    assert page.errors == []


def test_clicks_filter_choose_and_compare(page: Browser, tmp_path: Path) -> None:
    with open_study(tmp_path / "s", **APART) as study:
        fill(study)
    write(tmp_path / "s")
    page.open((tmp_path / "s" / "report.html").as_uri())
    every, rows = page.ask(DOTS), page.ask("document.querySelectorAll('#table tbody tr').length")
    sieves = page.ask("S.points.filter(p => p.allocator === 'sieve').length")
    page.ask("[...document.querySelectorAll('.rule')].find(b => b.textContent === 'sieve').click()")
    assert 0 < page.ask(DOTS) < every
    assert page.ask("document.querySelectorAll('#table tbody tr').length") == rows - sieves
    page.ask("[...document.querySelectorAll('.rule')].find(b => b.textContent === 'sieve').click()")
    assert page.ask(DOTS) == every
    assert page.ask("document.querySelectorAll('path.line').length") == every
    page.ask("document.querySelector('#table tbody tr').click()")
    page.ask("document.getElementById('hold').click()")
    page.ask("document.querySelector('#table tbody tr:last-child').click()")
    assert "places in both" in page.ask("document.getElementById('shared').innerText")
    assert page.ask("document.querySelectorAll('svg[aria-label=allocation]').length") == 2
    assert page.ask("location.hash.length") == 17
    grown = page.ask("volumes()")
    assert all(later >= sooner - 1e-12 for sooner, later in pairwise(grown))
    assert page.ask("document.querySelectorAll('details.folded[open]').length") == 0
    assert page.errors == []


def test_the_area_below_the_front_is_that_of_its_definition(page: Browser, tmp_path: Path) -> None:
    done = [outcome(selection(2 + n), accuracy=a) for n, a in enumerate((0.3, 0.5, 0.4, 0.6, 0.55))]
    page.open(study_of(tmp_path / "s", *done).as_uri())
    area = page.ask(
        "(() => { const ps = S.points, right = Math.max(...ps.map(p => Math.log10(p.params))), cuts = [...ps.map("
        "p => Math.log10(p.params)), right].sort((a, b) => a - b); let sum = 0; for (let i = 1; i < cuts.length; i++) {"
        "const best = Math.max(0.3, ...ps.filter(p => Math.log10(p.params) <= cuts[i - 1]).map(p => p.accuracy));"
        "sum += (cuts[i] - cuts[i - 1]) * (best - 0.3); } return sum; })()"
    )
    assert page.ask("volumes().at(-1)") == pytest.approx(area)
    assert area > 0


@pytest.mark.slow
def test_a_running_page_says_so_and_loads_itself_again(page: Browser, tmp_path: Path) -> None:
    with open_study(tmp_path / "s") as study:
        study.append_finished(outcome(selection(2)), {})
        study.append_started(started(outcome(selection(5))), {})
        write_atomically(tmp_path / "s" / "report.html", Report(study).running_page)
        page.open((tmp_path / "s" / "report.html").as_uri())
        text = page.ask("document.body.innerText")
        assert "This study is running" in text
        assert outcome(selection(5)).digest[:8] in text
        assert page.ask("[...document.querySelectorAll('button')].filter(b => b.textContent === 'Stop').length") == 0
        study.append_finished(outcome(selection(5)), {})
        write_atomically(tmp_path / "s" / "report.html", Report(study).page)
        page.wait(f"{DOTS} === 2 && !document.getElementById('live')")


@pytest.mark.parametrize("width", [390, 1240])
def test_ids_parameters_and_accuracies_are_in_sight_however_far_the_table_is_scrolled(
    tmp_path: Path, width: int
) -> None:
    with open_study(tmp_path / "s", **APART) as study:
        fill(study)
    write(tmp_path / "s")
    with Browser(width=width, height=844, dark=True) as phone:
        phone.open((tmp_path / "s" / "report.html").as_uri())
        assert phone.ask("document.documentElement.scrollWidth") <= width
        phone.ask("document.querySelector('#table').closest('.scroll').scrollLeft = 9999")
        cells = phone.ask(
            "[...document.querySelectorAll('#table tbody tr:first-child td:nth-child(-n+3)')].map(c => {"
            "const box = c.getBoundingClientRect(); return [box.left, box.right, c.scrollWidth <= c.clientWidth]; })"
        )
        assert len(cells) == 3
        assert all(left >= 0 and right <= width and fits for left, right, fits in cells)
        assert phone.ask("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 29)"
        assert phone.errors == []
