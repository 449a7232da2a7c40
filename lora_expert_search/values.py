"""From Python's values to the words of the command line: one reading, and so the same checks and messages.

as_words({"trials": 16, "keep": "all"}, recipe={"steps": 200})          # ["trials=16", "keep=all", "recipe.steps=200"]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from allocators.core import words
from allocators.core.errors import StudyError, shown


def as_words(keys: Mapping[str, Any], **groups: Mapping[str, Any]) -> list[str]:
    """Keys as the words of the command line; a group's names get its prefix. None: the key is left out.

    Raises StudyError for a value that no word stands for.
    """
    pairs = list(keys.items())
    pairs += [(f"{prefix}.{name}", value) for prefix, group in groups.items() for name, value in group.items()]
    return [f"{name}={_text(name, value)}" for name, value in pairs if value is not None]


def named(group: Mapping[str, Any] | None, what: str) -> Mapping[str, Any]:
    """A group of names and values, empty for None. Raises StudyError for anything else."""
    if group is None or isinstance(group, Mapping):
        return group or {}
    raise StudyError(f"{what} must be a mapping such as {{'rank': 8}}, got {shown(repr(group))}")


def plain(value: Any) -> Any:
    """A number of numpy or torch as Python's, anything else as it is."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def _text(name: str, value: Any) -> str:
    value = plain(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        items = [_text(name, item) for item in value]
        return ",".join(items) if words.read_list(",".join(items)) == items else words.write_list(items)
    if isinstance(value, Mapping | set | frozenset) or hasattr(value, "shape"):
        raise StudyError(f"{name} takes a text, a number, true, false or a list of these, got {shown(repr(value))}")
    return str(value)
