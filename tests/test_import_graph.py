"""The house as a graph: who imports whom, how full a folder is, how long a function is. Read from the source alone.

What counts:

- An arrow goes from a module to the module that it imports, by dotted path: `from trainers import storage` is an arrow
  to `trainers.storage`, `from trainers.tasks import Row` one to the door `trainers.tasks`. That an import also runs the
  doors of the folders above is no arrow: a door stands for its folder and may import all of it.
- Imports inside functions and below TYPE_CHECKING are arrows like others, for directions, edges and circles alike. A
  lazy import hides a circle from Python, not from the reader.
- A module that is named by a string (plug-ins by their place, `runpy` in doors of commands) is no arrow.
- Files of a folder are its *.py but the doors `__init__.py` and `__main__.py`. The plug-in folders allocators/ and
  spaces/ may grow: their own files are counted neither for the limit nor for the median.
- Lines of a function are counted from `def` to its last line, docstring and nested functions included.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median

import pytest

from tests import ROOT

RANK = {
    "allocators": 0,
    "trainers": 1,
    "spaces": 2,
    "search": 3,
    "lora_expert_search": 4,
}  # a package imports none of a higher rank
PLUGINS = ("allocators", "spaces")
MOST_FILES, MEDIAN_FILES, MOST_LINES = 12, 6, 60

# The files that may import a package. `runpy`: the doors of commands that live in a higher package.
EDGES = {
    "ray": {
        *(f"search/engine/{name}.py" for name in ("connect", "joining", "steward", "tune", "workers")),
        "trainers/worker.py",
    },
    "mlflow": {"search/records/tracking.py"},
    "lm_eval": {"trainers/tasks/harness.py"},
    "runpy": {"allocators/show.py", "allocators/signals/sensitivity.py"},
}


SOURCES = [file for package in RANK for file in sorted((ROOT / package).rglob("*.py"))]


def module_of(file: Path) -> str:
    """`trainers/tasks/__init__.py` is `trainers.tasks`."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in SOURCES}


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imported(file: Path) -> Iterator[str]:
    """Dotted names that a file imports: modules, and names of modules as `module.name`."""
    folder = module_of(file).split(".") if file.name == "__init__.py" else module_of(file).split(".")[:-1]
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def packages_of(file: Path) -> set[str]:
    """Top-level packages that a file imports, wherever in the file it does."""
    return {name.partition(".")[0] for name in imported(file)}


@cache
def arrows() -> dict[str, set[str]]:
    """Modules of this project by the modules of this project that they import."""
    graph: dict[str, set[str]] = {}
    for module, file in MODULES.items():
        graph[module] = set()
        for name in imported(file):
            target = name if name in MODULES else name.rpartition(".")[0]
            if target in MODULES and target != module:
                graph[module].add(target)
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other, by Tarjan's algorithm."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = lowest[module] = len(order)
        stack.append(module)
        for target in sorted(graph[module]):
            if target not in order:
                visit(target)
                lowest[module] = min(lowest[module], lowest[target])
            elif target in stack:
                lowest[module] = min(lowest[module], order[target])
        if lowest[module] == order[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for module in sorted(graph):
        if module not in order:
            visit(module)
    return groups


def circle_offences() -> set[str]:
    return {f"circle: {' '.join(group)}" for group in circles(arrows())}


def upward_offences() -> set[str]:
    return {
        f"upward: {module} to {target}"
        for module, targets in arrows().items()
        for target in targets
        if RANK[target.partition(".")[0]] > RANK[module.partition(".")[0]]
    }


def edge_offences() -> set[str]:
    return {
        f"edge: {file.relative_to(ROOT).as_posix()} imports {package}"
        for package, allowed in EDGES.items()
        for file in SOURCES
        if package in packages_of(file) and file.relative_to(ROOT).as_posix() not in allowed
    }


def files_by_folder() -> dict[str, int]:
    """Number of files of every folder that has one and is no plug-in folder."""
    number: dict[str, int] = {}
    for file in SOURCES:
        folder = file.parent.relative_to(ROOT).as_posix()
        if folder not in PLUGINS and file.name not in ("__init__.py", "__main__.py"):
            number[folder] = number.get(folder, 0) + 1
    return number


def folder_offences() -> set[str]:
    number = files_by_folder()
    full = {f"folder: {folder} has more than {MOST_FILES} files" for folder, n in number.items() if n > MOST_FILES}
    return full | ({"folder: the median is above its limit"} if median(number.values()) > MEDIAN_FILES else set())


def function_offences() -> set[str]:
    return {
        f"function: {file.relative_to(ROOT).as_posix()} {node.name}"
        for file in SOURCES
        for node in ast.walk(tree_of(file))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (node.end_lineno or node.lineno) - node.lineno + 1 > MOST_LINES
    }


RULES = {
    "circle": circle_offences,
    "upward": upward_offences,
    "edge": edge_offences,
    "folder": folder_offences,
    "function": function_offences,
}


@pytest.mark.parametrize("rule", RULES)
def test_the_house_keeps_its_rules(rule: str) -> None:
    assert sorted(RULES[rule]()) == []


def test_the_graph_sees_lazy_imports_modules_and_names() -> None:
    graph = arrows()
    assert "trainers.tasks.scoring" in graph["trainers.tasks.task"]  # inside a function
    assert "trainers.models.quantized" in graph["trainers.models.discover"]  # a name of a module
    assert "trainers.tasks.index" in graph["trainers.tasks.files"]  # `from folder import module`
    assert "trainers.tasks" not in graph["trainers.tasks.files"]


def test_circles_are_groups_of_modules_that_reach_each_other() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"f"}, "f": {"e", "a"}}
    assert sorted(circles(graph)) == [["a", "b", "c"], ["e", "f"]]


def test_the_core_is_standard_library_only() -> None:
    for file in sorted((ROOT / "allocators" / "core").glob("*.py")):
        assert packages_of(file) <= sys.stdlib_module_names | {"allocators"}, file.name


def test_a_door_of_a_command_in_a_higher_package_imports_nothing_else() -> None:
    assert packages_of(ROOT / "allocators" / "show.py") == {"runpy"}
