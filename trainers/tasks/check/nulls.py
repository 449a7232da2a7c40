"""Fields that have no text and would be spelled out: `None` is no answer, and neither `True` nor `{'a': 1}` is JSON.

    spelled_out(task, {"question": None, "answer": "yes"})          # "'question' is null or missing"

A template may ask whether a field is null (`{% if hint %}`); it may not write it. So templates are rendered once more,
for such documents alone, with values that can be asked and refuse to be text.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from trainers.tasks import harness
from trainers.tasks.harness import Document, HarnessTask

_WRITTEN = ("description", "gen_prefix", "doc_to_text", "doc_to_choice", "doc_to_target")


class _SpelledOutError(Exception):
    """A template writes a value that has no text."""


class _Null:
    """Stands for null: false, equal to null, and no text."""

    def __init__(self, field: str, why: str = "null or missing") -> None:
        self.field, self.why = field, why

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, _Null)

    def __hash__(self) -> int:
        return hash(None)

    def _refuse(self, *_: Any) -> NoReturn:
        raise _SpelledOutError(f"'{self.field}' is {self.why}")

    __str__ = __repr__ = __format__ = __iter__ = __len__ = __getitem__ = __html__ = _refuse


class _Object(dict[str, Any]):
    """Stands for an object: its parts can be asked for, and it is no text."""

    field = ""

    def _refuse(self, *_: Any) -> NoReturn:
        raise _SpelledOutError(
            f"'{self.field}' is an object, which would be written as Python writes it: name one of its fields "
            f"({', '.join(self)}), or use the filter tojson"
        )

    __str__ = __repr__ = __format__ = __html__ = _refuse


class _Switch(int):
    """Stands for true or false: counts as 1 or 0, and is no text."""

    field: str

    def _refuse(self, *_: Any) -> NoReturn:
        word = "true" if self else "false"
        raise _SpelledOutError(
            f"'{self.field}' is the value {word}, which would be written '{bool(self)}': make it text"
        )

    __str__ = __repr__ = __format__ = __html__ = _refuse


def spelled_out(task: HarnessTask, document: Document) -> str:
    """Which field of a document its prompt or answer would spell out though it has no text; "" where there is none."""
    if not any(_is_null(part) or isinstance(part, bool | bytes | Mapping) for part in _parts(document)):
        return ""
    marked = {name: _marked(name, value) for name, value in document.items()}
    for key in _WRITTEN:
        said = getattr(task.config, key, None)
        if not isinstance(said, str):  # a function of the task file, which makes of null what it likes
            continue
        try:
            if said in document:
                _check_field(task, marked[said])
            else:
                _templates().from_string(said).render(**marked)
        except _SpelledOutError as error:
            return str(error)
        except Exception:  # noqa: S112 - what else is wrong is said where the template makes the prompt itself
            continue
    return ""


def _check_field(task: HarnessTask, value: Any) -> None:
    """A field that is a prompt or an answer as it is. Of choices, true and false are the second and the first."""
    for leaf in _parts([value]):
        if isinstance(leaf, _Null) or (isinstance(leaf, _Switch) and task.OUTPUT_TYPE != "multiple_choice"):
            str(leaf)


def _parts(value: Any) -> Iterator[Any]:
    """Everything in a value that is not a list, objects within it before what is in them."""
    for part in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        if not isinstance(part, list):
            yield part
        yield from _parts(part)


def _is_null(value: Any) -> bool:
    """NaN is what a table of numbers has where there is none."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _marked(field: str, value: Any) -> Any:
    if _is_null(value):
        return _Null(field)
    if isinstance(value, bytes):
        return _Null(field, "bytes and no text")
    if isinstance(value, bool):
        switch = _Switch(value)
        switch.field = field
        return switch
    if isinstance(value, Mapping):
        marked = _Object({name: _marked(f"{field}.{name}", part) for name, part in value.items()})
        marked.field = field
        return marked
    if isinstance(value, list):
        return [_marked(f"{field}[{place}]", part) for place, part in enumerate(value)]
    return value


@functools.cache
def _templates() -> Any:
    """The environment that prompts are made in, which takes the stand-ins for what they stand for."""
    environment = harness.templates().overlay()
    like: Mapping[str, Callable[[Any], bool]] = {
        "none": lambda value: value is None or isinstance(value, _Null),
        "boolean": lambda value: isinstance(value, bool | _Switch),
        "true": lambda value: value is True or (isinstance(value, _Switch) and value == 1),
        "false": lambda value: value is False or (isinstance(value, _Switch) and value == 0),
        "sequence": lambda value: not isinstance(value, _Null) and hasattr(value, "__getitem__"),
        "iterable": lambda value: not isinstance(value, _Null) and hasattr(value, "__iter__"),
    }
    environment.tests = {**environment.tests, **like}
    return environment
