"""`config=FILE.yaml`: the keys of a study from a file, as the same texts that the command line has.

    trials: 40
    task: [arc_easy, piqa]
    recipe: {steps: 200}
    pins: {allocator: mola, pattern: "2468"}

YAML gives the structure only: what a value is, its key says (`search/config.py`), so that `name: 007` stays a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from allocators.core import words
from allocators.core.errors import StudyError, shown

LARGEST = 1 << 20  # bytes of a file of keys
GROUPS = {
    "recipe": "recipe.",
    "pins": "space.",
    "space": "space.",
}  # keys that hold names, and what stands before these


class Quoted(str):
    """A text that the file puts between quotes: no number, whatever it looks like."""


class _Loader(yaml.SafeLoader):
    """YAML whose plain scalars are texts, and whose mappings have every key once."""

    yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile("<<"))]}  # noqa: RUF012

    def __init__(self, stream: bytes) -> None:
        super().__init__(stream)
        self._merged: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merges `<<: *other` in; what is merged twice is kept once, so that merges of merges do not grow."""
        if id(node) in self._merged:
            return
        self._merged.add(id(node))
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise yaml.YAMLError(f"{twice[0]} is given twice")
        super().flatten_mapping(node)
        others = [pair for pair in node.value if not isinstance(pair[0], yaml.ScalarNode)]
        node.value = [*{pair[0].value: pair for pair in node.value if pair not in others}.values(), *others]


def _text(_: _Loader, node: yaml.ScalarNode) -> str:
    return node.value if node.style is None else Quoted(node.value)


def _untagged(_: _Loader, node: yaml.Node) -> str:
    raise yaml.YAMLError(f"{node.tag.rpartition(':')[2]} is no tag that is read: write the value as text")


_Loader.yaml_constructors = {
    tag: make for tag, make in _Loader.yaml_constructors.items() if tag and tag.endswith((":map", ":seq"))
}
_Loader.add_constructor("tag:yaml.org,2002:str", _text)
_Loader.add_constructor(None, _untagged)  # type: ignore[type-var, unused-ignore]


def load(file: str) -> list[tuple[str, str]]:
    """Pairs of key and text; settings of a recipe and pins as `recipe.NAME` and `space.NAME`.

    Raises StudyError for a file that does not exist, cannot be read, is no YAML, holds no `key: value` lines, or gives
    a key twice.
    """
    name = f"config={shown(file)}"
    try:
        with Path(file).open("rb") as stream:
            text = stream.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise StudyError(f"{name} is larger than {LARGEST >> 20} MiB: it is no file of keys")
        content = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except FileNotFoundError:
        raise StudyError(f"{name}: there is no such file") from None
    except (OSError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise StudyError(f"{name} cannot be read: {shown(str(error))}") from None
    if content is None or content == "":
        return []
    if not isinstance(content, Mapping):
        raise StudyError(f"{name} must hold key: value lines")
    pairs: dict[str, str] = {}
    for key, value in _flat(content, name):
        if key in pairs:
            raise StudyError(f"{name} gives {shown(key)} twice: leave one of them out")
        pairs[key] = value
    return list(pairs.items())


def _flat(content: Mapping[Any, Any], file: str, prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and not prefix and name in GROUPS:
            yield from _flat(value, file, GROUPS[name])
        elif isinstance(value, str):
            yield key, value
        elif isinstance(value, list) and all(isinstance(item, str) for item in value):
            yield key, words.write_list(value)
        else:
            raise StudyError(f"{file}: {shown(key)} must be a value or a list of values")
