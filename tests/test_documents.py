"""Every command that a document or a data sheet prints is one that its program takes."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from allocators.core import plugins, words
from allocators.core.errors import StudyError
from search import config, doctor, door, evaluate, truncate
from search.export import __main__ as export
from search.problem import load_space
from search.replay.__main__ import Target
from search.report import __main__ as report
from search.serve import __main__ as serve
from search.session.prepare import prepare
from search.show import __main__ as show
from search.show import stability
from tests import ROOT, journeys, pictures, tables
from trainers import models
from trainers.embedded import domains, pretrain
from trainers.tasks import __main__ as task_shown
from trainers.tasks import files as task_files

TEXTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [f for p in ("allocators", "search", "spaces", "trainers", "tests") for f in sorted((ROOT / p).rglob("*.py"))]
COMMAND = re.compile(r"python -m ([\w.]+)((?: +(?:'[^'\n]*'|\"[^\"\n]*\"|[^\s'\"`#|()]+))*)")
PLACEHOLDER = re.compile(r"^[A-Z_]{3,}$|…|\.\.\.|^NAME|\bkey=value\b|[{}\[<]|=$")


def commands(file: Path) -> Iterator[tuple[str, list[str]]]:
    """Module and words of every command that a file prints, up to two spaces (where a comment stands beside it)."""
    for match in COMMAND.finditer(file.read_text(encoding="utf-8").replace("\\\n", " ")):
        line = "" if match[2].startswith("  ") else re.split(r" {2,}|[.,:;)]+(?= |$)", match[2].strip())[0]
        try:
            yield match[1], shlex.split(line)
        except ValueError:  # a quotation mark of the sentence around it
            continue


def run(given: Sequence[str]) -> None:
    """Parses, and prepares where model and task are embedded: pins, spaces and budgets are then checked too."""
    if words.asks_for_help(given):
        return
    asked = config.parse([word for word in given if not word.startswith("config=")])  # a file that the reader has
    embedded = asked.model in models.EMBEDDED and asked.task in task_files.EMBEDDED
    if asked.replay in ("", "tiny-moe", "tiny-dense") and embedded:
        prepare(asked)
    elif asked.model in models.EMBEDDED and not asked.replay:
        space = load_space(asked.space, models.shape_of(asked.model))
        assert space.suggest


def reported(given: Sequence[str]) -> None:
    if not words.asks_for_help(given):
        door.one_study(given, report.Request, example="search.report STUDY")


def served(given: Sequence[str]) -> None:
    if not words.asks_for_help(given):
        serve.parse(given)


def table(given: Sequence[str]) -> None:
    bare, pairs = words.split(given)
    words.build(Target, pairs)
    assert bare[0] == "export"


def exported(given: Sequence[str]) -> None:
    if given and not words.asks_for_help(given):
        export.parse(given)


def evaluated(given: Sequence[str]) -> None:
    if not words.asks_for_help(given):
        evaluate.parse(given)


def cut(given: Sequence[str]) -> None:
    if given and not words.asks_for_help(given):
        folders, pairs = words.split(given)
        assert len(folders) == 1
        assert words.build(truncate.Request, pairs).energies


def shown(given: Sequence[str]) -> None:
    if not words.asks_for_help(given):
        show.parse(given)


def fields_of(settings: type) -> Callable[[Sequence[str]], None]:
    def parse(given: Sequence[str]) -> None:
        if not words.asks_for_help(given):
            words.parse(given, settings)

    return parse


def one_task(given: Sequence[str]) -> None:
    if not words.asks_for_help(given):
        task_shown.parse(given)


def pytest_words(given: Sequence[str]) -> None:
    for word in given:
        if word.startswith("tests/"):
            assert (ROOT / word.partition("::")[0]).exists(), word


PARSERS: dict[str, Callable[[Sequence[str]], None]] = {
    "search.run": run,
    "search.doctor": fields_of(doctor.Asked),
    "search.report": reported,
    "search.evaluate": evaluated,
    "search.export": exported,
    "search.replay": table,
    "search.truncate": cut,
    "search.serve": served,
    "allocators.show": shown,
    "allocators.signals.sensitivity": fields_of(stability.Request),
    "search.show.stability": fields_of(stability.Request),
    "trainers.tasks": one_task,
    "trainers.pretrain": fields_of(pretrain.Request),
    "trainers.embedded.domains": fields_of(domains.Request),
    "tests.journeys": fields_of(journeys.Settings),
    "tests.pictures": fields_of(pictures.Settings),
    "tests.tables": fields_of(tables.Settings),
    "pytest": pytest_words,
}
FOREIGN = ("pip", "venv", "mypy", "ruff")


def parser_of(module: str) -> Callable[[Sequence[str]], None]:
    if module.startswith("tests.benchmarks."):
        return fields_of(importlib.import_module(module).Settings)
    return PARSERS[module]


def cases() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    seen = set()
    for file in (*TEXTS, *SOURCES):
        if file == Path(__file__):
            continue
        for module, given in commands(file):
            if "." not in module and module not in PARSERS and module not in FOREIGN:
                continue  # `search.NAME` and other words of a sentence
            case = (module, tuple(given))
            if module not in FOREIGN and case not in seen:
                seen.add(case)
                yield file.relative_to(ROOT).as_posix(), *case


CASES = list(cases())


@pytest.mark.parametrize(("file", "module", "given"), CASES, ids=lambda value: str(value)[:80])
def test_a_printed_command_is_one_that_its_program_takes(file: str, module: str, given: tuple[str, ...]) -> None:
    if any(PLACEHOLDER.search(word) for word in given):
        known = PARSERS.get(module) or importlib.util.find_spec(module)
        assert known, f"{file}: there is no {module}"
        return
    try:
        parser_of(module)(given)
    except StudyError as error:
        pytest.fail(f"{file}: python -m {module} {shlex.join(given)}\n{error}")


def test_searches_of_the_readme_and_the_docs_can_be_run_one_after_the_other() -> None:
    """A folder refuses other settings; so a search that is printed with some needs a name."""
    studies: dict[tuple[str, str], tuple[str, dict[str, object]]] = {}
    for _, command in journeys.printed():
        if (asked := journeys.search_of(command)) is not None:
            first, identity = studies.setdefault((asked.storage, asked.study_name), (command, asked.identity()))
            assert asked.identity() == identity, f"{command} would be refused after {first}: give it a name="
    assert len(studies) > 20


def test_the_commands_were_read() -> None:
    """The two of the README's head, and one of every program: the pattern reads what it is meant to read."""
    assert ("search.run", ("space=sieve",)) in {case[1:] for case in CASES}
    assert {"search.run", "search.report", "search.export", "search.replay", "allocators.show"} <= {c[1] for c in CASES}
    assert len(CASES) > 80


LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: file.name)
def test_links_lead_to_files_and_headings_that_are_there(file: Path) -> None:
    for target in LINK.findall(file.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        place, _, heading = target.partition("#")
        linked = (file.parent / place).resolve() if place else file
        assert linked.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: file.name)
def test_every_table_begins_with_its_head(file: Path) -> None:
    """An empty line inside a table would turn the rest of it into text."""
    blocks = re.findall(r"(?:^\|.*\n)+", file.read_text(encoding="utf-8") + "\n", flags=re.MULTILINE)
    assert [
        block.splitlines()[0] for block in blocks if not re.fullmatch(r"\|[-:| ]+\|", [*block.splitlines(), ""][1])
    ] == []


def test_the_readme_is_short_and_every_page_of_the_docs_opens_with_a_command() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180
    for page in (ROOT / "docs").glob("*.md"):
        opening = page.read_text(encoding="utf-8").split("\n\n")[1]
        assert opening.startswith(("```\npython -m ", "```python\nimport lora_expert_search")), page.name


@pytest.mark.parametrize("name", plugins.names("spaces"))
def test_a_data_sheet_names_its_own_command(name: str) -> None:
    assert re.search(rf"space={name}\b", plugins.load("spaces", name, "space").__doc__ or "")


def test_a_release_has_one_version_and_one_date() -> None:
    """CHANGELOG's latest heading, the package and the citation name the same release."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    latest = re.search(r"^## \[([\d.]+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert latest is not None
    assert latest.groups() == (cited["version"], str(cited["date-released"]))
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == cited["version"]


def test_targets_of_make_are_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {name for file in TEXTS for name in re.findall(r"(?:`|^)make ([a-z-]+)", file.read_text(), re.MULTILINE)}
    assert {"demo", "test", "check"} <= named <= targets
