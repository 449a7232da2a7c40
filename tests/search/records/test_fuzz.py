"""Whatever stands in the files of a study or a table: read, or refused in one line; no traceback, and nothing outside
of it is touched.
"""

from __future__ import annotations

import copy
import io
import json
import math
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from allocators.core.errors import ToolkitError
from allocators.core.types import Score
from search import replay, report
from search.problem import Problem
from search.records import HEADER, LINES, read
from search.replay.problem import table_problem
from tests.search.studies import fill, open_study

# A failing mutation is small as it is: shrinking it takes minutes.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
FUZZED = settings(max_examples=25, deadline=None, phases=PHASES, suppress_health_check=list(HealthCheck))

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from(
        ["", "../../x", "/", "\ud800", "a\nb", "0" * 16, "NaN", "[bold]", "\u202e", "1e9", -1, 0.5, 10**400]
    ),
    st.text(max_size=8),
    st.just([]),
    st.just({}),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value in a value."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value[:3]))
    return [way, *(place for key, item in items for place in places(item, (*way, key)))]


def mutated(value: Any, draw: Callable[[Any], Any]) -> Any:
    """The value with one to three of its parts replaced, renamed or left out."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        way = draw(st.sampled_from(places(value)))
        if not way:
            return draw(ODD)
        inside = value
        for key in way[:-1]:
            inside = inside[key]
        match draw(st.sampled_from(["replace", "replace", "remove", "rename"])):
            case "remove":
                del inside[way[-1]]
            case "rename" if isinstance(inside, dict):
                inside[draw(st.text(max_size=6))] = inside.pop(way[-1])
            case _:
                inside[way[-1]] = draw(ODD)
    return value


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "s"
    with open_study(folder, contents={"weights": "0"}) as records:
        fill(records)
        records.append_tested(next(iter(records.finished)), Score(0.5, 0.1))
    return folder


def refusal(use: Callable[[], object]) -> str:
    """What it says where it refuses; anything else that is raised passes through."""
    try:
        use()
    except ToolkitError as error:
        return str(error)
    return ""


def one_line(text: str) -> None:
    assert "\n" not in text
    text.encode()


def used(folder: Path, *, lines: bool) -> None:
    """Reads, reports, resumes and exports a study; a refusal is one line."""
    uses: list[Callable[[], object]] = [
        lambda: report.show(report.write(folder)),
        lambda: replay.export([folder], folder.parent / "table.parquet"),
        lambda: open_study(folder, contents={"weights": "0"}).close(),
    ]
    for use in uses if lines else uses[-1:]:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            one_line(refusal(use))


@FUZZED
@given(data=st.data())
def test_any_lines_are_read_or_skipped_by_name(data: st.DataObject, study: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(study, tmp_path / "s", dirs_exist_ok=True))
    written = [json.loads(line) for line in (folder / LINES).read_text().splitlines()]
    numbers = data.draw(st.lists(st.integers(0, len(written) - 1), min_size=1, max_size=4))
    for number in numbers:
        written[number] = mutated(written[number], data.draw)
    (folder / LINES).write_text("".join(json.dumps(line) + "\n" for line in written))
    records = read(folder)
    assert len(records.problems) <= len(set(numbers))
    assert all("\n" not in problem for problem in records.problems)
    used(folder, lines=data.draw(st.integers(0, 11)) == 0)  # a report takes a second
    shutil.rmtree(folder)


@FUZZED
@given(data=st.data())
def test_any_header_is_read_or_refused_in_one_line(data: st.DataObject, study: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(study, tmp_path / "s", dirs_exist_ok=True))
    header = mutated(json.loads((folder / HEADER).read_text()), data.draw)
    (folder / HEADER).write_text(json.dumps(header))
    used(folder, lines=data.draw(st.integers(0, 11)) == 0)
    shutil.rmtree(folder)


@FUZZED
@given(text=st.binary(max_size=200), name=st.sampled_from([HEADER, LINES, "untrained.json", "signals/routing.json"]))
@example(text=b"[" * 100_000, name=HEADER)
@example(text=b"\xff\xfe", name=HEADER)
@example(text=b"null", name=HEADER)
@example(text='{"id": "é"}'.encode("latin1"), name=HEADER)
def test_any_bytes_are_read_or_refused_in_one_line(text: bytes, name: str, study: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(study, tmp_path / "s", dirs_exist_ok=True))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(text)
    used(folder, lines=False)
    one_line(refusal(lambda: read(folder).untrained))
    one_line(refusal(lambda: read(folder).signals))
    shutil.rmtree(folder)


# --- tables


@pytest.fixture(scope="module")
def table(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("table") / "good.parquet"
    replay.export([study], file)
    return file


def asked(file: Path) -> None:
    """Loads a table, and what a search of it needs."""
    loaded = replay.load(str(file))
    problem: Problem = table_problem(loaded, seed=0)
    assert loaded.values is not None
    assert loaded.settings
    assert loaded.mark
    assert problem.shape
    assert all(math.isfinite(o.accuracy) for o in loaded.outcomes.values() if o.accuracy is not None)


def written(content: dict[str, Any], metadata: dict[bytes, bytes], file: Path) -> bool:
    try:
        pq.write_table(pa.table(content).replace_schema_metadata(metadata), file)
    except (pa.ArrowException, OverflowError, UnicodeError, TypeError, ValueError):
        return False  # no table can hold it
    return True


@FUZZED
@given(data=st.data())
def test_any_table_is_read_or_refused_in_one_line(data: st.DataObject, table: Path, tmp_path: Path) -> None:
    good = pq.read_table(table)
    content, metadata = good.to_pydict(), dict(good.schema.metadata)
    match data.draw(st.sampled_from(["column", "cells", "cell", "about", "metadata", "rows"])):
        case "column":
            del content[data.draw(st.sampled_from(sorted(content)))]
        case "cells":
            name = data.draw(st.sampled_from(sorted(content)))
            content[name] = [data.draw(ODD)] * len(content[name])
        case "cell":
            name = data.draw(st.sampled_from(sorted(content)))
            content[name][0] = data.draw(ODD)
        case "about":
            about = mutated(json.loads(metadata[replay.METADATA]), data.draw)
            metadata[replay.METADATA] = json.dumps(about).encode()
        case "metadata":
            metadata = data.draw(st.sampled_from([{}, {replay.METADATA: b"\xff"}, {replay.METADATA: b"[" * 3_000}]))
        case "rows":
            content = {name: values[: data.draw(st.integers(0, 1))] for name, values in content.items()}
    if written(content, metadata, tmp_path / "t.parquet"):
        one_line(refusal(lambda: asked(tmp_path / "t.parquet")))
