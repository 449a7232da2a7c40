"""`config=FILE.yaml`: the keys of a study from a file, as the same texts that the command line has.

    trials: 40
    task: [arc_easy, piqa]
    recipe: {steps: 200}
    pins: {allocator: mola, pattern: "2468"}

YAML gives the structure only: what a value is, its key says (`search/config.py`), so that `name: 007` stays a name.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from allocators.core import words
from allocators.core.errors import StudyError


class Quoted(str):
    """A text that the file puts between quotes: no number, whatever it looks like."""


class _Loader(yaml.SafeLoader):
    """YAML whose plain scalars are texts, and whose mappings have every key once."""

    yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile("<<"))]}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise yaml.YAMLError(f"{twice[0]} is given twice")
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping


def _text(_: _Loader, node: yaml.ScalarNode) -> str:
    return node.value if node.style is None else Quoted(node.value)


_Loader.add_constructor("tag:yaml.org,2002:str", _text)


def load(file: str) -> list[tuple[str, str]]:
    """Pairs of key and text; settings of a recipe and pins as `recipe.NAME` and `space.NAME`.

    Raises StudyError for a file that does not exist, cannot be read, is no YAML, or holds no `key: value` lines.
    """
    try:
        content = yaml.load(Path(file).read_bytes(), Loader=_Loader)  # noqa: S506 - a SafeLoader
    except FileNotFoundError:
        raise StudyError(f"config={file}: there is no such file") from None
    except (OSError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise StudyError(f"config={file} cannot be read: {words.shown(str(error))}") from None
    if content is None or content == "":
        return []
    if not isinstance(content, Mapping):
        raise StudyError(f"config={file} must hold key: value lines")
    return list(_flat(content))


def _flat(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _flat(value, "space." if key == "pins" else f"{key}.")
        elif isinstance(value, list):
            yield key, words.write_list([str(item) for item in value])
        else:
            yield key, value if isinstance(value, str) else str(value)
