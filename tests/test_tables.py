"""Tables of README and docs agree with the studies' files, and so do the numbers of the sentences beside them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from allocators.core import plugins
from search.report.uncertainty import paired
from tests import ROOT, tables

WITH_TABLES = [page for page in tables.PAGES if tables.blocks(page)]
STUDIES = sorted(file.stem for file in tables.FOLDER.glob("*.json"))
# `+.193`, `.057`: three decimals; what has two rounds to nearly anything
QUOTED = re.compile(r"(?<![\w.])([+−])?(\.\d{3})(?![\d])")
NAMED = re.compile(r"<!-- numbers: ([\w, -]+) -->")
OTHERS = "<!-- other studies -->"  # heads a paragraph whose numbers are of studies without a file


@pytest.mark.parametrize("page", WITH_TABLES, ids=lambda page: page.name)
def test_the_tables_are_those_of_the_studies(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert tables.filled(text) == text, "the tables are written by python -m tests.tables"


def test_every_table_stands_in_a_page_and_every_study_in_a_table() -> None:
    named = [name for page in WITH_TABLES for name in tables.blocks(page)]
    assert sorted(named) == sorted(tables.TABLES)
    assert {study for studies, _ in tables.TABLES.values() for study in studies} == set(STUDIES)


def test_an_edit_by_hand_is_noticed() -> None:
    text = (ROOT / "docs" / "comparisons.md").read_text(encoding="utf-8")
    number = tables.plain(tables.study("ranks_table-tiny-dense").row(allocator="uniform_ranks").mean)
    assert tables.filled(text.replace(f"| {number} ±", "| .999 ±", 1)) == text


@pytest.mark.parametrize("name", STUDIES)
def test_a_file_says_where_its_numbers_are_from(name: str) -> None:
    """And its comparisons follow from its rows."""
    study = tables.study(name)
    assert (tables.FOLDER / f"{name}.json").stat().st_size < 100_000
    command = shlex.split(study.data["command"])
    assert command[:3] == ["python", "-m", "search.run"]
    assert not any(word.startswith(("/", "storage=/")) for word in command)
    assert {"python", "torch", "transformers"} <= study.data["versions"].keys()
    assert all(row.accuracies.keys() <= set(study.data["seeds"]) for row in study.rows)
    by_id = {row.id: row for row in study.rows}
    for one in study.data["comparisons"]:
        sides = [by_id[side].accuracies for side in one["rows"]]
        if one.get("difference") is not None:
            pair = paired(*sides)
            assert pair is not None
            assert one["n"] == pair.n
            assert (one["difference"], one["low"], one["high"]) == pytest.approx(
                (pair.difference, pair.low, pair.high), abs=1e-5
            )


def sections(page: Path) -> Iterator[tuple[set[str], str, list[float]]]:
    """The studies that a section names, by its tables or a comment; its prose; and what its tables say."""
    for section in re.split(r"^(?=#+ )", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
        studies = {study for found in tables.BLOCK.finditer(section) for study in tables.TABLES[found[2]][0]}
        studies |= {name.strip() for found in NAMED.finditer(section) for name in found[1].split(",")}
        shown = "".join(found[3] for found in tables.BLOCK.finditer(section)).replace("−", "-")
        paragraphs = re.split(r"\n\s*\n", tables.BLOCK.sub("", section))
        prose = "\n\n".join(part for part in paragraphs if not part.startswith(OTHERS))
        yield studies, prose, [float(number) for number in re.findall(r"[+-]?\.\d{3}\b", shown)]


def foreign(prose: str, studies: set[str], known: Iterable[float] = ()) -> list[str]:
    """Numbers of three decimals that no study has; a sign in the prose is that of the study's number."""
    known = [*known, *(number for study in studies for number in tables.numbers(study))]
    unknown = []
    for sign, digits in QUOTED.findall(prose):
        value = float(digits)
        values = [-value] if sign == "−" else [value] if sign else [value, -value]
        if not any(abs(number - one) <= 0.0005 + 1e-9 for number in known for one in values):
            unknown.append(sign + digits)
    return unknown


@pytest.mark.parametrize("page", WITH_TABLES, ids=lambda page: page.name)
def test_numbers_of_sentences_beside_a_table_are_those_of_its_study(page: Path) -> None:
    unknown = [
        number for studies, prose, shown in sections(page) if studies for number in foreign(prose, studies, shown)
    ]
    assert unknown == []


@pytest.mark.parametrize(
    "name", [name for name in plugins.names("spaces") if any(s.startswith(f"{name}-") for s in STUDIES)]
)
def test_numbers_of_a_data_sheet_are_those_of_its_study(name: str) -> None:
    sheet = plugins.load("spaces", name, "space").__doc__ or ""
    measured = [part for part in sheet.split("\n\n") if part.startswith("Measured")]
    assert foreign(" ".join(measured), {study for study in STUDIES if study.startswith(f"{name}-")}) == []


def test_the_readme_says_what_the_grid_says() -> None:
    study, readme = tables.study("moe_grid-tiny-moe"), (ROOT / "README.md").read_text(encoding="utf-8")
    (hot,) = study.data["comparisons"]
    size, low, high = (tables.plain(hot[name]) for name in ("difference", "low", "high"))
    assert f"beats a random quarter by {size} ({low} to {high}, five seeds" in readme
    worth = re.search(r"([+-]0\.\d+ ± 0\.\d+) on average", " ".join(study.data["said"]))
    assert worth is not None
    assert f"the rule is worth {worth[1].replace('0.', '.')} with each side at its best recipe" in readme


def test_the_sentences_that_the_readme_quotes_are_those_of_the_demo() -> None:
    quoted = re.findall(
        r"^(?:Untrained|On the test split|What the choice|\d+ of \d+ trainings).*$",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
    assert len(quoted) > 2
    assert set(quoted) <= set(tables.study("sieve-tiny-moe").data["said"])
