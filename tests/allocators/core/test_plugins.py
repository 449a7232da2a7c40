"""Finding, loading, adding and calling plug-ins; the messages of what goes wrong."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import cast

import pytest

from allocators.core import plugins
from allocators.core.errors import StudyError
from allocators.core.types import ExpertSelection
from tests.allocators.models import dense_shape, moe_shape, routing

ALLOCATOR = '''"""Adapts the last expert of each layer."""
from allocators.core.types import ExpertSelection
NEEDS = None
BASE = "moe"
FIXED_COST = True
def allocate(signal, shape, *, times=1):
    return ExpertSelection({layer: (shape.experts_in(layer) - 1,) for layer in shape.moe_layers})
'''


@pytest.fixture(autouse=True)
def forget_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "_added", {"allocators": {}, "spaces": {}})


def test_names_are_the_files_of_the_folder() -> None:
    names = plugins.names("allocators")
    assert {"sieve", "esft", "coverage", "greedy", "random", "all", "none"} <= set(names)
    assert not {"show", "core", "signals", "__init__", "random_"} & set(names)
    assert plugins.load("allocators", "random").__name__ == "allocators.random_"


def test_a_near_miss_is_told() -> None:
    with pytest.raises(StudyError, match=r"unknown allocator 'seive'.*did you mean 'sieve'"):
        plugins.load("allocators", "seive")
    with pytest.raises(StudyError, match=r"^unknown space 'nothing-like-it'"):
        plugins.load("spaces", "nothing-like-it", "space")


def test_names_from_a_command_line_select_listed_plugins_only() -> None:
    for name in ("core.types", "os", "../allocators/sieve", "random_", "show", ""):
        with pytest.raises(StudyError, match="unknown allocator"):
            plugins.load("allocators", name)


def test_a_user_file_becomes_an_allocator(tmp_path: Path) -> None:
    file = tmp_path / "last_one.py"
    file.write_text(ALLOCATOR)
    assert plugins.add(str(file)) == ["last_one"]
    assert plugins.add(str(file)) == ["last_one"]  # twice is once
    module = plugins.load("allocators", "last_one")
    assert plugins.call(module, None, moe_shape(experts=4, layers=2), {}) == ExpertSelection({0: (3,), 1: (3,)})
    assert "last_one" in plugins.names("allocators")
    assert "last_one" in plugins.fitting(moe_shape())


def test_a_folder_may_hold_both_kinds(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(ALLOCATOR)
    (tmp_path / "my_space.py").write_text("def suggest(trial, shape):\n    return None\n")
    (tmp_path / "_helper.py").write_text("raise RuntimeError('never imported')\n")
    assert plugins.add(str(tmp_path)) == ["mine", "my_space"]
    assert "my_space" in plugins.names("spaces")
    assert "my_space" not in plugins.names("allocators")


def test_a_module_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "importable_allocator.py").write_text(ALLOCATOR)
    monkeypatch.syspath_prepend(tmp_path)
    assert plugins.add("importable_allocator") == ["importable_allocator"]


@pytest.mark.parametrize(
    ("stem", "text", "message"),
    [
        ("neither", "x = 1\n", "defines neither allocate"),
        ("broken", "x = (\n", "does not import: SyntaxError"),
        ("raises", "1 / 0\n", "does not import: ZeroDivisionError: division by zero"),
        ("sieve", ALLOCATOR, "the name 'sieve' is taken"),
        ("partial", ALLOCATOR.replace('BASE = "moe"\n', ""), "must set BASE to one of"),
        ("positional", ALLOCATOR.replace("*, ", ""), r"must define allocate\(signal, shape, \*, knobs"),
    ],
)
def test_a_bad_plugin_is_refused_by_name(tmp_path: Path, stem: str, text: str, message: str) -> None:
    (tmp_path / f"{stem}.py").write_text(text)
    with pytest.raises(StudyError, match=message) as error:
        plugins.add(str(tmp_path / f"{stem}.py"))
    assert stem in str(error.value)
    assert stem == "sieve" or stem not in plugins.names("allocators")


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no such file"):
        plugins.add(str(tmp_path / "absent.py"))
    with pytest.raises(StudyError, match="holds no Python file"):
        plugins.add(str(tmp_path))
    with pytest.raises(StudyError, match="No module named"):
        plugins.add("no_such_module_anywhere")


def test_call_checks_model_signal_and_knobs() -> None:
    sieve = plugins.load("allocators", "sieve")
    shape = moe_shape(experts=8)
    with pytest.raises(StudyError, match=r"sieve answers for an MoE model, and dense has no routed experts: choose fr"):
        plugins.call(sieve, None, dense_shape(), {})
    with pytest.raises(StudyError, match="needs the routing signal"):
        plugins.call(sieve, None, shape, {})
    with pytest.raises(StudyError, match=r"unknown knob of sieve 'fractoin'.*did you mean 'fraction'"):
        plugins.call(sieve, routing(shape), shape, {"fractoin": 0.5})
    with pytest.raises(StudyError, match="none takes no knobs, got 'fraction'"):
        plugins.call(plugins.load("allocators", "none"), None, shape, {"fraction": 0.5})
    must = SimpleNamespace(__name__="x.must", NEEDS=None, BASE="any", allocate=lambda signal, shape, *, beta: None)
    with pytest.raises(StudyError, match="must needs a value for beta"):
        plugins.call(cast(ModuleType, must), None, shape, {})
