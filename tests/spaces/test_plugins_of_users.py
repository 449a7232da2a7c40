"""Spaces and allocators of users: whatever their code raises or returns is one line with its file and line."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from allocators.core import plugins
from allocators.core.errors import SpaceError, StudyError, ToolkitError
from search.config import parse
from search.run import main
from search.session.prepare import prepare

HEAD = """import random
from allocators.core.errors import *
from allocators.core.types import ExpertCounts, ExpertSelection, Point
from allocators.core.tables import Comparison
"""
SPACE = 'BASE = "moe"\nALLOCATORS = ("sieve", "none", "all")\n'
CHOICE = 'a = trial.suggest_categorical("allocator", ["none", "all"])'
RANK = f'{CHOICE}; r = trial.suggest_int("rank", 2, 32, step=2); return Point(a, {{}}, {{"rank": r}})'


@pytest.fixture(autouse=True)
def forget_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "_added", {"allocators": {}, "spaces": {}})


def space(folder: Path, suggest: str, *, rest: str = "", name: str = "branchy", parts: str = SPACE) -> str:
    """Writes a space whose `suggest` is the statements of one line; line 8 is the body."""
    file = folder / f"{name}.py"
    file.write_text(f"{HEAD}{parts}def suggest(trial, shape):\n    {suggest}\n{rest}")
    return str(file)


def allocator(folder: Path, body: str, *, knobs: str = "k=1", name: str = "mine") -> str:
    """Writes an allocator for MoE bases; line 9 is the body."""
    file = folder / f"{name}.py"
    parts = 'NEEDS = None\nBASE = "moe"\nFIXED_COST = True\n'
    file.write_text(f"{HEAD}{parts}def allocate(signal, shape, *, {knobs}):\n    {body}\n")
    return str(file)


def said(files: str, name: str = "branchy", *words: str) -> str:
    with pytest.raises(ToolkitError) as error:
        prepare(parse([f"plugins={files}", f"space={name}", *words]))
    assert "\n" not in str(error.value)
    return str(error.value)


OF_A_RANK = 'r = trial.suggest_categorical("rank", [4, 8]) if a == "none" else'


@pytest.mark.parametrize(
    ("suggest", "line"),
    [
        (
            f'{CHOICE}; {OF_A_RANK} trial.suggest_categorical("rank", [16, 32]); return Point(a, {{}}, {{"rank": r}})',
            "space branchy: rank has other choices in another branch, [4, 8] and [16, 32]: give each its own name (",
        ),
        (
            f'{CHOICE}; {OF_A_RANK} trial.suggest_categorical("rank", [8, 4]); return Point(a, {{}}, {{"rank": r}})',
            "space branchy: rank has other choices in another branch, [4, 8] and [8, 4]: give each its own name (",
        ),
        (
            f'{CHOICE}; {OF_A_RANK} trial.suggest_int("rank", 4, 8); return Point(a, {{}}, {{"rank": r}})',
            "space branchy: rank has another kind in another branch, [4, 8] and whole numbers: give each its own name",
        ),
        (f'{CHOICE}; {{}}["x"]', "space branchy failed: KeyError: 'x' (FILE, line 8)"),
        ('trial.suggest_categorical("allocator", [])', "branchy: knob allocator needs a list of choices, got [] (FILE"),
        ('trial.suggest_categorical("allocator", "none")', "knob allocator needs a list of choices, got 'none'"),
        ('trial.suggest_categorical("x", [(1, 2)])', "a choice of knob x must be a text, a finite number, true, false"),
        ('trial.suggest_categorical("x", [float("nan")])', "a choice of knob x must be a text, a finite number"),
        (CHOICE, "space branchy: suggest returned None and not a Point (FILE, line 7)"),
        ("return 3", "space branchy: suggest returned a value of type int and not a Point (FILE, line 7)"),
        ("yield 3", "space branchy: suggest returned a value of type generator and not a Point (FILE, line 7)"),
        ('return Point("esft")', "suggest returned what is no point of it: its ALLOCATORS lack 'esft' (FILE, line 7)"),
        ('return Point("sieve", {"fraction": float("nan")})', "knobs.fraction must be a number from -1e+15"),
        ('return Point("sieve", {"fraction": [1]})', "knobs.fraction must be a number from -1e+15 to 1e+15, got list"),
        ('return Point("sieve", {"fraction": "half"})', "fraction of sieve must be a number, got 'half' (FILE, line 7"),
        ('return Point("sieve", {"fractoin": 0.5})', "unknown knob of sieve 'fractoin': choose from experts_kept"),
        ('return Point("none", {}, {"rankk": 8})', "unknown recipe setting 'rankk': choose from"),
        (
            'return Point("none", {}, {"rank": trial.suggest_int("rank", 0, 8)})',
            "branchy: with {'rank': 0} recipe.rank must be at least 1, got 0 (FILE, line 7)",
        ),
        ("raise SystemExit(0)", "space branchy failed: SystemExit: 0 (FILE, line 8)"),
        ("raise type('Mine', (BaseException,), {})('x')", "space branchy failed: Mine: x (FILE, line 8)"),
        ("return suggest(trial, shape)", "space branchy failed: RecursionError: maximum recursion depth exceeded"),
        ("[0] * 10**13", "space branchy failed: MemoryError:  (FILE, line 8)"),
        ('raise InfeasibleError("no")', "space branchy: no (FILE, line 8)"),
        (r'raise ValueError("two\nlines\x1b[2J")', "space branchy failed: ValueError: two lines?[2J (FILE, line 8)"),
        ('trial.suggest_uniform("x", 0, 1)', "failed: AttributeError: 'PinnedTrial' object has no attribute 'suggest_"),
        ('trial.suggest_int("rank", 8, 4)', "branchy: knob rank cannot go from 8 to 4 in steps of 1 (FILE, line 8)"),
        ('trial.suggest_int("rank", 1.5, 4)', "the ends and the step of knob rank must be whole, got 1.5, 4 and 1"),
        (
            'trial.suggest_float("x", 0, float("inf"))',
            "the ends and the step of knob x must be finite numbers, got inf",
        ),
        ('trial.suggest_float("x", 0, 1, log=True)', "knob x of a logarithmic range cannot go from 0 to 1 (FILE, line"),
    ],
)
def test_whatever_a_space_raises_or_returns_is_one_line(tmp_path: Path, suggest: str, line: str) -> None:
    file = space(tmp_path, suggest)
    assert line.replace("FILE", file) in said(file)


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        (
            'BASE = "dence"\nALLOCATORS = ("none",)\n',
            "space branchy: BASE must be 'moe', 'dense' or 'any', got 'dence' (FILE",
        ),
        (
            'BASE = ["moe"]\nALLOCATORS = ("none",)\n',
            "space branchy: BASE must be 'moe', 'dense' or 'any', got ['moe']",
        ),
        ('BASE = "moe"\nALLOCATORS = "none"\n', "ALLOCATORS must be a list of names of allocators, got 'none' (FILE"),
        ('BASE = "moe"\nALLOCATORS = ()\n', "ALLOCATORS must be a list of names of allocators, got () (FILE"),
        ('BASE = "moe"\nALLOCATORS = ["seive"]\n', "unknown allocator 'seive': choose from"),
        (f"{SPACE}TABLE = 1\n", "TABLE must be True or False, got 1 (FILE"),
        (f"{SPACE}TABLE = True; SEEDS = 0\n", "SEEDS must be a number from 1 to 10,000, got 0 (FILE"),
        (
            f"{SPACE}TABLE = True; COMPARISONS = [3]\n",
            "COMPARISONS must be a list of Comparisons (allocators/core/tables.py)",
        ),
        (f"{SPACE}starting_points = 3\n", "starting_points must be a function, got 3 (FILE"),
    ],
)
def test_whatever_a_space_defines_is_checked(tmp_path: Path, parts: str, line: str) -> None:
    file = space(tmp_path, RANK, parts=parts)
    assert line.replace("FILE", file) in said(file)


@pytest.mark.parametrize(
    ("points", "line"),
    [
        (
            'return [{"allocator": "none"}, {"allocator": "none", "rankk": 8}]',
            "starting point 2 of space=branchy is none of its points: unknown knob 'rankk': choose from allocator, "
            "rank; did you mean 'rank'?",
        ),
        ('return [{"allocator": "none", "rank": 64}]', "starting point 1 of space=branchy is none of its points: "),
        ('return [{"allocator": "none", "rank": 64}]', "rank=64 must be in 2 .. 32 (FILE, line 8)"),
        ('return [{"allocator": "none", "rank": 3}]', "rank=3 must be on the grid 2 .. 32 in steps of 2, for example"),
        ('return [{"allocator": "none", "rank": 8.0}]', "rank must be a whole number, got 8.0"),
        ('return [{"allocator": "none", "rank": True}]', "rank must be a whole number, got True"),
        ('return [{"allocator": "nonne"}]', "unknown allocator 'nonne': choose from all, none; did you mean 'none'?"),
        ("return [3]", "it must be a dict of knobs and values (3; FILE, line 10)"),
        ("pass", "space branchy starts from None and not a list of at most 1000 (FILE, line 10)"),
        ('raise KeyError("x")', "space branchy failed: KeyError: 'x' (FILE, line 11)"),
        ('return [{"allocator": "none", "steps": 8}]', "unknown knob 'steps': choose from allocator, rank"),
    ],
)
def test_every_starting_point_is_looked_at_before_anything_starts(tmp_path: Path, points: str, line: str) -> None:
    file = space(tmp_path, RANK, rest=f"\ndef starting_points(shape):\n    {points}\n")
    assert line.replace("FILE", file) in said(file)


def test_a_knob_that_a_starting_point_may_leave_to_another_branch_is_named(tmp_path: Path) -> None:
    body = f'{CHOICE}; r = trial.suggest_int("rank", 1, 8) if a == "all" else 4; return Point(a, {{}}, {{"rank": r}})'
    points = '\ndef starting_points(shape):\n    return [{"allocator": "none", "rank": 4}]\n'
    assert "unknown knob 'rank': choose from allocator" in said(space(tmp_path, body, rest=points))
    pinned = prepare(parse([f"plugins={space(tmp_path, RANK, rest=points, name='other')}", "space=other"]))[1]
    assert pinned.space_name == "other"
    prepare(parse(["space=other", "space.allocator=all"]))  # pins lead elsewhere than a point's own values


@pytest.mark.parametrize("where", ["suggest", "allocate", "import"])
def test_what_a_plugin_does_to_its_process_is_taken_back(tmp_path: Path, where: str) -> None:
    line = "import os, sys, warnings; os.chdir('/'); sys.stdout = None; warnings.filterwarnings('error', 'of mine')"
    suggest = f"{line}; {CHOICE}; return Point(a)" if where == "suggest" else f"{CHOICE}; return Point(a)"
    file = space(tmp_path, suggest.replace('"all"', '"mine"'), parts='BASE = "moe"\nALLOCATORS = ("none", "mine")\n')
    mine = allocator(tmp_path, f"{line}; return ExpertSelection({{0: (1,)}})" if where == "allocate" else "pass")
    if where == "import":
        Path(file).write_text(f"{line}\n{Path(file).read_text()}")
    folder, stdout = Path.cwd(), sys.stdout
    prepare(parse([f"plugins={mine},{file}", "space=branchy"]))
    assert (Path.cwd(), sys.stdout) == (folder, stdout)
    assert "of mine" not in str(warnings.filters)


def test_what_fails_in_two_blocks_is_said_once(tmp_path: Path) -> None:
    plugins.add(space(tmp_path, "1 / 0"))
    module = plugins.load("spaces", "branchy")
    inner, outer = (plugins.failing(module, "space branchy", SpaceError) for _ in range(2))
    with pytest.raises(SpaceError) as error, outer, inner:
        module.suggest(None, None)
    assert str(error.value) == f"space branchy failed: ZeroDivisionError: division by zero ({module.__file__}, line 8)"


def test_a_coroutine_is_one_line(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    file = Path(space(tmp_path, "return Point('none')"))
    file.write_text(file.read_text().replace("def suggest", "async def suggest"))
    assert "suggest returned a value of type coroutine and not a Point" in said(str(file))
    assert not recwarn.list


def test_a_space_of_millions_of_branches_is_no_hang(tmp_path: Path) -> None:
    body = '[trial.suggest_categorical(f"k{i}", [1, 2, 3]) for i in range(30)]; return Point("none")'
    config, problem = prepare(parse([f"plugins={space(tmp_path, body)}", "space=branchy", "space.k3=2"]))
    assert (config.trials, problem.pins) == (16, {"k3": 2})
    rows = '[trial.suggest_categorical(f"k{i}", [1, 2, 3]) for i in range(10)]; return Point("none")'
    table = space(tmp_path, rows, name="table", parts=f"{SPACE}TABLE = True\n")
    assert "space=table is a table of more than 20,000 rows: pin some knobs" in said(table, "table")


def test_a_space_that_throws_dice_is_no_hang(tmp_path: Path) -> None:
    body = 'trial.suggest_categorical("x", [1, 2] if random.random() < 0.5 else [1, 2, 3]); return Point("none")'
    assert "x has other choices in another branch" in said(space(tmp_path, body))


ALLOCATIONS = [
    ("pass", "allocator mine returned None and not ExpertSelection, which MoE models need (FILE, line 8)"),
    ("yield 3", "allocator mine returned a value of type generator and not ExpertSelection"),
    ("return ExpertCounts({})", "allocator mine returned a value of type ExpertCounts and not ExpertSelection"),
    ("return type('Mine', (ExpertSelection,), {})({0: (1,)})", "returned a value of type Mine and not ExpertSelection"),
    ("1 / 0", "allocator mine failed: ZeroDivisionError: division by zero (FILE, line 9)"),
    ("raise StopIteration", "allocator mine failed: StopIteration:  (FILE, line 9)"),
    ("raise SystemExit(0)", "allocator mine failed: SystemExit: 0 (FILE, line 9)"),
    ("raise GeneratorExit", "allocator mine failed: GeneratorExit:  (FILE, line 9)"),
    ("raise type('Mine', (BaseException,), {})('x')", "allocator mine failed: Mine: x (FILE, line 9)"),
    ("return allocate(signal, shape)", "allocator mine failed: RecursionError"),
    ("[0] * 10**13", "allocator mine failed: MemoryError:  (FILE, line 9)"),
    ('raise StudyError("no")', "allocator mine: no (FILE, line 9)"),
    ('raise InfeasibleError("no")', "allocator mine: no (FILE, line 9)"),
    ("return ExpertSelection({0: (1.5,)})", "an expert id of layer 0 must be a whole number, got 1.5 (FILE, line 9)"),
    ("return ExpertSelection({0: (True, False)})", "an expert id of layer 0 must be a whole number, got True (FILE"),
    ('return ExpertSelection({0: "012"})', "an expert id of layer 0 must be a whole number, got '0' (FILE, line 9)"),
    ('return ExpertSelection({0: (float("nan"),)})', "an expert id of layer 0 must be a whole number, got nan"),
    ("return ExpertSelection({0: range(10**12)})", "expert ids of layer 0 must be distinct and not negative, got [0, "),
    ("return ExpertSelection({0.5: (1,)})", "a layer must be a whole number, got 0.5 (FILE, line 9)"),
    ("return ExpertSelection({99: (1,)})", "layer 99 of tiny-moe has no routed experts"),
    ("return ExpertSelection({0: (99,)})", "layer 0 of tiny-moe has experts 0..15, got 99"),
]


@pytest.mark.parametrize(("body", "line"), ALLOCATIONS)
def test_whatever_an_allocator_raises_or_returns_is_one_line(tmp_path: Path, body: str, line: str) -> None:
    file = allocator(tmp_path, body)
    parts = 'BASE = "moe"\nALLOCATORS = ("mine",)\n'
    suggest = 'return Point("mine")'
    both = f"{file},{space(tmp_path, suggest, parts=parts)}"
    assert line.replace("FILE", file) in said(both)


@pytest.mark.parametrize("body", [body for body, _ in ALLOCATIONS[::5]])
def test_one_rule_that_cannot_is_named_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], body: str
) -> None:
    parts = 'BASE = "moe"\nALLOCATORS = ("mine", "none", "all")\n'
    suggest = 'return Point(trial.suggest_categorical("allocator", ["mine", "none", "all"]))'
    both = f"{allocator(tmp_path, body)},{space(tmp_path, suggest, parts=parts)}"
    assert main([f"plugins={both}", "space=branchy", "dry_run=true", "trials=9", f"storage={tmp_path}"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("warning: no point of mine can be trained: allocator mine")
    assert err.count("\n") == 1
    assert "2 points" in out
    assert "infeasible" in out


def test_counts_of_a_dense_model_are_whole_and_bounded(tmp_path: Path) -> None:
    parts = 'BASE = "dense"\nALLOCATORS = ("mine",)\n'
    suggest = space(tmp_path, 'return Point("mine")', parts=parts)
    for number, reason in {
        "2.7": "must be a whole number, got 2.7",
        'float("nan")': "must be a whole number, got nan",
        "True": "must be a whole number, got True",
        "10**30": "a module has at most 65,536 experts",
        "-1": "expert counts must not be negative",
        "0": "mine adapts nothing at these knobs: there is nothing to train",
    }.items():
        plugins._added["allocators"].clear()
        file = Path(allocator(tmp_path, f"return ExpertCounts({{shape.modules[0].path: {number}}})"))
        file.write_text(file.read_text().replace('"moe"', '"dense"'))
        assert reason in said(f"{file},{suggest}", "branchy", "model=tiny-dense")


RAISED = [
    *("ValueError", "KeyError", "TypeError", "OSError", "RuntimeError", "AssertionError", "ArithmeticError", "Warning"),
    *("UnicodeDecodeError('utf-8', b'x', 0, 1, 'y')", "ExceptionGroup('g', [ValueError()])", "SystemExit"),
    *("GeneratorExit", "type('Mine', (BaseException,), {})('x')", "__import__('asyncio').CancelledError()"),
]
RETURNED = [
    *("None", "3", "'none'", "[]", "{}", "float('nan')", "lambda: 3", "Point", "iter([])", "Point(3)", "shape"),
    *("Point('none', 3)", "Point('none', {1: 2})", "Point('none', {'x': b'y'})", "Point('none', {}, {'rank': '8'})"),
    *("Point('none', {}, {'epochs': 1e400})", "Point(None)", "Point(['none'])", "Point('none', None, None)"),
]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.sampled_from([f"raise {what}" for what in RAISED]), st.sampled_from([f"return {v}" for v in RETURNED])
    ),
    st.sampled_from(["suggest", "starting_points", "allocate"]),
)
def test_no_plugin_makes_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, body: str, where: str
) -> None:
    monkeypatch.setattr(plugins, "_added", {"allocators": {}, "spaces": {}})
    folder = tmp_path_factory.mktemp("p")
    points = body if where == "starting_points" else "return []"
    suggest = body if where == "suggest" else 'return Point("mine")'
    parts = 'BASE = "moe"\nALLOCATORS = ("mine", "none")\n'
    files = allocator(folder, body if where == "allocate" else "return ExpertSelection({0: (1,)})")
    files += "," + space(folder, suggest, parts=parts, rest=f"\ndef starting_points(shape):\n    {points}\n")
    if (where, body) != ("starting_points", "return []"):
        assert str(folder) in said(files)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("import nope\n", "ModuleNotFoundError: No module named 'nope' (FILE, line 1)"),
        ("x = 1\n\n1 / 0\n", "ZeroDivisionError: division by zero (FILE, line 3)"),
        ("raise SystemExit(0)\n", "SystemExit: 0 (FILE, line 1)"),
        ("raise type('Mine', (BaseException,), {})('x')\n", "Mine: x (FILE, line 1)"),
        ("x = (\n", "SyntaxError: '(' was never closed (odd.py, line 1)"),
        ('raise ValueError("two\\nlines")\n', "ValueError: two lines (FILE, line 1)"),
    ],
)
def test_a_file_that_does_not_import_is_one_line(tmp_path: Path, text: str, line: str) -> None:
    file = tmp_path / "odd.py"
    file.write_text(text)
    assert said(str(file)) == f"plug-in {file} does not import: {line.replace('FILE', str(file))}"


@pytest.mark.parametrize(
    "given_", ["README.md", "/dev/zero", "os", "~nobody_at_all/x.py", "a" * 5000, "no.such.module", "."]
)
def test_what_is_no_plugin_is_one_line(given_: str) -> None:
    with pytest.raises(StudyError) as error:
        plugins.add(given_)
    assert "\n" not in str(error.value)
    assert "plug" in str(error.value)


def test_the_signature_of_an_allocator_is_checked(tmp_path: Path) -> None:
    checks: dict[str, Callable[[str], str]] = {
        "must set NEEDS to one of": lambda text: text.replace("NEEDS = None", "NEEDS = ['routing']"),
        "must define allocate as a function": lambda text: text.split("def ")[0] + "allocate = 3\n",
        "must define allocate(signal, shape, *, knobs": lambda text: text.replace("*, k=1", "k=1"),
    }
    for line, change in checks.items():
        file = Path(allocator(tmp_path, "pass"))
        file.write_text(change(file.read_text()))
        assert line in said(str(file))
