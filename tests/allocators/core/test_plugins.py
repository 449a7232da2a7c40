"""Finding, loading, adding and calling plug-ins; the messages of what goes wrong."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import cast

import pytest

from allocators.core import plugins
from allocators.core.errors import StudyError, ToolkitWarning
from allocators.core.types import ExpertSelection
from spaces import sieve_ablation
from tests import ROOT
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


def test_code_that_takes_long_is_said_with_its_line_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins, "PATIENCE", 0.05)
    wait = "    for _ in range(10**6):\n        if warned:\n            break\n        sum(range(1000))\n"
    (tmp_path / "sleepy.py").write_text(f"warned = []\n{ALLOCATOR}".replace("    return", f"{wait}    return", 1))
    plugins.add(str(tmp_path / "sleepy.py"))
    sleepy = plugins.load("allocators", "sleepy")
    said = pytest.warns(ToolkitWarning, match=r"allocator sleepy has run for .*sleepy\.py, line \d+\)$")
    vars(sleepy)["warned"] = said  # it goes on until it was said
    with said:
        plugins.call(sleepy, None, moe_shape(), {})
    assert len(said) == 1


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


def test_no_alarm_outlives_what_it_would_end() -> None:
    """Python's last steps hear no signal any more: an alarm then would be the exit code."""

    def left() -> float:
        return signal.getitimer(signal.ITIMER_VIRTUAL)[0]

    with plugins.watched(None, "outer", ends=True):
        with plugins.watched(None, "inner", ends=True):
            assert left() > 0
        assert left() > 0
        with plugins.watched(None, "goes on"), plugins.watched(None, "innermost", ends=True):
            assert left() > 0
        assert left() > 0
    assert left() == 0
    with plugins.watched(None, "goes on"), plugins.watched(None, "inner", ends=True):
        assert left() > 0
    assert left() == 0


FOREIGN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
if sys.argv[2] == "imported":
    import spaces
    assert not hasattr(spaces, "sieve")
from allocators.core import plugins
print(plugins.names("spaces"))
space = plugins.load("spaces", "sieve_ablation", "space")
print(space.__name__, len(space.COMPARISONS), Path(space.__file__).parent.name)
"""


@pytest.mark.parametrize("state", ["imported", "broken"])
def test_another_distribution_may_own_the_name_of_a_folder(tmp_path: Path, state: str) -> None:
    """Hugging Face's `spaces` does; where it cannot be imported here, nothing of it is."""
    foreign = tmp_path / "spaces"
    foreign.mkdir()
    (foreign / "__init__.py").write_text("" if state == "imported" else "import a_module_that_is_not_here\n")
    (foreign / "gradio.py").write_text("def gradio_auto_wrap(task): ...\n")
    done = subprocess.run(
        [sys.executable, "-c", FOREIGN, str(tmp_path), state], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    names, space = done.stdout.splitlines()
    assert names == str(plugins.names("spaces"))
    assert space == f"lora_expert_spaces.sieve_ablation {len(sieve_ablation.COMPARISONS)} spaces"


def test_files_of_another_distribution_beside_ours_are_no_plugins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one site-packages an installer puts both into one folder, and the door of the last one stays."""
    shutil.copytree(ROOT / "spaces", tmp_path / "spaces", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "spaces" / "__init__.py").write_text("import a_module_that_is_not_here\n")
    (tmp_path / "spaces" / "gradio.py").write_text("def gradio_auto_wrap(task): ...\n")
    known = plugins.names("spaces")
    monkeypatch.setattr(plugins, "_PLACE", tmp_path)
    for cached in (plugins._files, plugins._package):
        cached.cache_clear()
    try:
        assert plugins.names("spaces") == known
    finally:
        for cached in (plugins._files, plugins._package):
            cached.cache_clear()
