"""Checks of values that were read from JSON: a file may come from anybody, so types and ranges are tested at the door.

    rank = checks.whole(data["rank"], "rank", low=1)

Each check returns the value (of lists and mappings a copy), or raises ValueError that names it and says what was
expected; `is_folder_name` only answers. Standard library only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

MOST = 2**53  # whole numbers up to here are the same in JSON, in a float and in a 64-bit column
LARGEST = 1e15  # of a float: sums of squares of such stay finite
MOST_EXPERTS = 1 << 16  # of a layer or a module
MOST_LAYERS = 10_000
MOST_RANK = 1 << 16  # of a module
_LONGEST_NAME = 255  # bytes of a file's name on Linux and macOS
_DIGEST = re.compile(r"[0-9a-f]{16}")


def _expected(what: str, expected: str, value: object) -> ValueError:
    text = ascii(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    return ValueError(f"{what} must be {expected}, got {text[:60]}")


def whole(value: Any, what: str, *, low: int = 0, high: int = MOST) -> int:
    """A whole number from `low` to `high`; true and false are none. Raises ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _expected(what, f"a whole number from {low} to {high}", value)
    return value


def number(value: Any, what: str, *, low: float = -LARGEST, high: float = LARGEST) -> float:
    """A finite int or float; an int stays one."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        finite = isinstance(value, int) or math.isfinite(value)
        if finite and low <= value <= high:
            return value
    raise _expected(what, f"a number from {low:g} to {high:g}", value)


def optional_number(value: Any, what: str, *, low: float = -LARGEST, high: float = LARGEST) -> float | None:
    """As `number`; None stays None."""
    return None if value is None else number(value, what, low=low, high=high)


def text(value: Any, what: str) -> str:
    """Text that can be written to a file: half a surrogate pair cannot."""
    if not isinstance(value, str):
        raise _expected(what, "text", value)
    if not value.isascii():
        value.encode()  # UnicodeEncodeError is a ValueError
    return value


def digest(value: Any) -> str:
    """A name that `digest_of` gives: it becomes a part of paths."""
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise _expected("digest", "16 hex digits", value)
    return value


def mapping(value: Any, what: str) -> dict[str, Any]:
    """A dict with the same items. Raises ValueError for what is no mapping or has a key that is no text."""
    if not isinstance(value, Mapping):
        raise _expected(what, "a mapping", value)
    return {text(key, f"a key of {what}"): item for key, item in value.items()}


def sequence(value: Any, what: str) -> list[Any]:
    """A list with the same items. Raises ValueError for what is neither a list nor a tuple."""
    if not isinstance(value, list | tuple):
        raise _expected(what, "a list", value)
    return list(value)


def scalar(value: Any, what: str) -> Any:
    """Text, a number, true, false or null."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return text(value, what)
    if isinstance(value, int):
        return whole(value, what, low=-MOST)
    return number(value, what)


def scalars(value: Any, what: str) -> dict[str, Any]:
    """A mapping of names to scalars: knobs, or parameters of a sampler."""
    return {name: scalar(item, f"{what}.{name}") for name, item in mapping(value, what).items()}


def like(value: Any, example: Any, what: str) -> Any:
    """A value of the same kind as the example: of a mapping whose keys the example has, each of its kind."""
    if isinstance(example, bool):
        if not isinstance(value, bool):
            raise _expected(what, "true or false", value)
        return value
    if isinstance(example, int):
        return whole(value, what, low=-MOST)
    if isinstance(example, float):
        return number(value, what)
    if isinstance(example, str):
        return text(value, what)
    if isinstance(example, list | tuple):
        return [scalar(item, what) for item in sequence(value, what)]
    if not example:
        return scalars(value, what)
    known = mapping(value, what)
    for name, item in known.items():
        if name in example:
            like(item, example[name], f"{what}.{name}")
    return known


def is_folder_name(name: str) -> bool:
    """Whether it is the name of one folder in another that file systems take, and nothing that leads elsewhere."""
    short = len(name.encode(errors="replace")) <= _LONGEST_NAME
    return name not in ("", ".", "..") and "/" not in name and name.isprintable() and short
