"""lm-evaluation-harness's tasks and groups by name: where their YAML files lie. lm-eval itself is not imported.

    file_of("arc_easy")            # …/lm_eval/tasks/arc/arc_easy.yaml, None where it has no such task
    task_names()                   # all of them, for messages: reads 14,000 files, which takes seconds

Names are read line by line: lm-eval's own index parses the files, for 5 s and more.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections import Counter
from pathlib import Path

from allocators.core.errors import StudyError

_TASK_LINE = re.compile(rb"""^["']?task["']?:[ \t]*["']?([^\s"'#]+)["']?[ \t]*\r?$""", re.MULTILINE)
_GROUP_LINE = re.compile(rb"""^["']?group["']?:[ \t]*["']?([^\s"'#]+)["']?[ \t]*\r?$""", re.MULTILINE)

_FEW, _ALL = 8, 1_000_000  # files in a folder


def file_of(name: str) -> Path | None:
    """The file of one of lm-eval's tasks or groups; None where it has none of that name.

    Reading all 14,000 takes seconds, so likely ones are tried first: most tasks lie in a file of their name, and most
    others in folders of a few files. Raises StudyError where lm-eval is not installed.
    """
    for path in _files():
        if path.stem == name:
            match = _TASK_LINE.search(path.read_bytes())
            if match and match.group(1).decode() == name:
                return path
    for largest in (_FEW, _ALL):
        tasks, groups = _by_name(largest)
        if path_of_name := tasks.get(name) or groups.get(name):
            return path_of_name
    return None


def task_names() -> list[str]:
    """Names of all of lm-eval's tasks, in the order of their files."""
    return list(_by_name(_ALL)[0])


@functools.cache
def _files() -> list[Path]:
    return sorted(_folder().rglob("*.yaml"), key=Path.as_posix)


@functools.cache
def _by_name(largest: int) -> tuple[dict[str, Path], dict[str, Path]]:
    """lm-eval's tasks and groups by name, of folders with at most `largest` files."""
    tasks: dict[str, Path] = {}
    groups: dict[str, Path] = {}
    in_folder = Counter(path.parent for path in _files())
    for path in _files():
        if in_folder[path.parent] > largest:
            continue
        text = path.read_bytes()
        for pattern, paths in ((_TASK_LINE, tasks), (_GROUP_LINE, groups)):
            if match := pattern.search(text):
                paths.setdefault(match.group(1).decode(), path)
    return tasks, groups


def is_shipped(path: Path, *folders: Path) -> bool:
    """Whether a file lies in one of those folders, or came with lm-eval."""
    return any(path.is_relative_to(folder) for folder in (_folder(), *folders))


def _folder() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise StudyError("the package lm-eval is not installed: pip install lm-eval")
    return Path(spec.submodule_search_locations[0]) / "tasks"
