"""Words `key=value` of a command line: one reading, one help and one way to refuse for every command.

    @dataclass(frozen=True)
    class Settings:
        rank: int = key(8, "LoRA rank", least=1)
        device: str = key("", "torch device (empty: cuda where there is one)")

    settings = parse(["rank=16"], Settings)

A value is read by the type of its key and by nothing else: text stays exactly as it was typed, whole numbers are `16`,
`1_000`, `1e8` or `1.5M` (k, M, B or G: thousands, millions, billions), numbers also `.25` or `3e-4` and finite,
booleans are `true` or `false` in any case, lists are `a,b` or `[a,b]`, with double quotes around an item that holds a
comma. Every mistake is a StudyError of one line.
"""

from __future__ import annotations

import csv
import math
import re
import shlex
import sys
import textwrap
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

from allocators.core import checks
from allocators.core.errors import StudyError, ToolkitError, did_you_mean, shown, unknown

HELP = ("help", "-h", "--help")
READING = (
    "numbers: 16, 1_000, .25, 3e-4, 100M; switches: true or false; lists: a,b or [a,b]; text is taken as it is typed",
    "in a shell, put quotes around a word with spaces or special characters: 'name=my study'",
)
Value = str | int | float | bool | None

_WHOLE = re.compile(r"[+-]?\d+(_\d+)*", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+(_\d+)*\.?(\d+(_\d+)*)?|\.\d+(_\d+)*)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_SUFFIXES = {"": 0, "k": 3, "K": 3, "M": 6, "B": 9, "G": 9}  # powers of ten
_PADDED = re.compile(r"[+-]?0[\d_]+", re.ASCII)  # 007 is a name
_WORDS: dict[str, bool | None] = {"true": True, "false": False, "null": None}

_LONGEST = 400  # digits of a number

S = TypeVar("S")


@dataclass(frozen=True)
class Limits:
    """What a key allows.

    least     smallest number
    most      largest number
    unset     a number below `least` that stands for "as the program decides"
    choices   the possible values; none: any
    names     words that stand for a number, whatever the bounds: `{"auto": -2}`
    """

    least: float | None = None
    most: float = math.inf
    unset: float | None = None
    choices: tuple[str, ...] = ()
    names: Mapping[str, float] = field(default_factory=dict)


def key(
    default: Any,
    meaning: str,
    *,
    least: float | None = None,
    most: float = math.inf,
    unset: float | None = None,
    choices: Sequence[str] = (),
    names: Mapping[str, float] = MappingProxyType({}),
    **facts: Any,
) -> Any:
    """A field of a command's dataclass: its default, its line in the help, what it allows, and further `facts`."""
    metadata = {"help": meaning, "limits": Limits(least, most, unset, tuple(choices), names), **facts}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def run(main: Callable[[list[str]], object]) -> NoReturn:
    """Runs a command with the words that were typed; a mistake of the user's is one line, and exit code 2.

    A number that `main` returns is the exit code.
    """
    try:
        code = main(sys.argv[1:])
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def asks_for_help(words: Sequence[str]) -> bool:
    """Whether one of the words is `help`, `-h` or `--help`."""
    return any(word in HELP for word in words)


def split(
    words: Sequence[str], *, example: str = "", repeatable: Collection[str] = ()
) -> tuple[list[str], list[tuple[str, str]]]:
    """Words without `=` (or with a slash before it: a path), and the pairs of key and text.

    Raises StudyError for a key that is given twice, and, where there is an `example` of a pair, for a word without `=`.
    """
    bare: list[str] = []
    pairs: list[tuple[str, str]] = []
    seen: set[str] = set()
    for word in words:
        name, separator, text = word.partition("=")
        if not separator or ("/" in name and not example):
            if example:
                raise StudyError(f"'{shown(word)}' is not key=value, for example {example} (help lists the keys)")
            bare.append(word)
            continue
        if name in seen and name not in repeatable:
            raise StudyError(f"{shown(name)} is given twice: leave one of them out")
        seen.add(name)
        pairs.append((name, text))
    return bare, pairs


def parse(words: Sequence[str], settings: type[S], *, example: str = "") -> S:
    """Words `key=value` to a dataclass, whose fields may be made by `key`.

    Raises StudyError for a word without `=`, an unknown key or one given twice, and a value that the key does not take.
    """
    return build(settings, split(words, example=example or _example(settings))[1])


def build(settings: type[S], pairs: Iterable[tuple[str, str]]) -> S:
    """Pairs of key and text to a checked dataclass. Raises StudyError as `parse` does."""
    kinds = typing.get_type_hints(settings)
    given: dict[str, Any] = {}
    for name, text in pairs:
        if name not in kinds:
            raise StudyError(f"unknown key '{shown(name)}'{did_you_mean(name, kinds)} (help lists the keys)")
        given[name] = read(name, text, kinds[name], names=names_of(settings, name))
    built = settings(**given)
    check(built)
    return built


def read(name: str, text: str, kind: Any, *, names: Mapping[str, float] = MappingProxyType({})) -> Any:
    """A text as a value of that type, or what it stands for (`names_of`). Raises StudyError that names the key."""
    if text in names:
        return names[text]
    if kind is str:
        return _text(name, text)
    if kind is bool:
        if text.strip().lower() not in ("true", "false"):
            raise StudyError(f"{name} must be true or false, got '{shown(text)}'")
        return text.strip().lower() == "true"
    if kind is int:
        return _whole(name, text)
    if kind is float:
        return _number(name, text)
    item = next(arg for arg in typing.get_args(kind) if arg is not ...)
    return (typing.get_origin(kind) or kind)(read(name, part, item) for part in read_list(text))


def names_of(settings: Any, key: str) -> Mapping[str, float]:
    """Words that stand for a number of this key."""
    return next(_limits(f).names for f in fields(settings) if f.name == key)


def written(settings: Any, key: str) -> str:
    """The value of a key as it is typed."""
    value = getattr(settings, key)
    named = (name for name, number in names_of(settings, key).items() if number == value)
    return next(named, write_list(value) if isinstance(value, list) else str(value))


def _text(name: str, text: str) -> str:
    """As it was typed. No file, record or server takes a null character, or bytes that are no characters."""
    try:
        checks.text(text, name)
    except ValueError:
        raise StudyError(f"{name} must be text in UTF-8, got '{shown(text)}'") from None
    if "\0" in text:
        raise StudyError(f"{name} must not hold a null character, got '{shown(text)}'")
    return text


def _whole(name: str, text: str) -> int:
    value, bare = _decimal(text), text.strip()
    scaled = bare[-1:] in "kKMBG" or "e" in bare.lower()  # 8.0 is no whole number, 8.0k is one
    if value is not None and value == value.to_integral_value() and (scaled or _WHOLE.fullmatch(bare)):
        return int(value)
    units = "; units are k, M and G" if re.fullmatch(r"[\d.]+ ?[A-Za-z]+", bare) else ""
    raise StudyError(f"{name} must be a whole number, got '{shown(text)}'{units}")


def _number(name: str, text: str) -> float:
    value = _decimal(text)
    if value is None or not math.isfinite(float(value)):
        raise StudyError(f"{name} must be a finite number, got '{shown(text)}'")
    return float(value)


def _decimal(text: str) -> Decimal | None:
    """The exact number, None for what is none or is far beyond any that a key takes."""
    bare = text.strip()
    digits = bare[:-1] if bare[-1:] in _SUFFIXES else bare
    if not _NUMBER.fullmatch(digits) or len(digits) > _LONGEST:
        return None
    try:
        value = Decimal(digits)
        if value and abs(value.adjusted()) > _LONGEST:
            return None
        return value * Decimal(10) ** _SUFFIXES[bare[len(digits) :]]
    except ArithmeticError:  # an exponent of twenty digits
        return None


def read_value(text: str) -> Value:
    """A value whose type no key says: a finite number, true, false or null, else the text.

    >>> [read_value(text) for text in ("8", ".25", "True", "null", "007", "inf", "mass")]
    [8, 0.25, True, None, '007', 'inf', 'mass']
    """
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    bare = text.strip()  # it takes off more than `float` and `int` do
    if not _NUMBER.fullmatch(bare) or _PADDED.fullmatch(bare) or not math.isfinite(float(bare)):
        return text
    return int(bare) if _WHOLE.fullmatch(bare) else float(bare)


def path(text: str, what: str) -> Path:
    """The file or folder that a typed text names, whether or not it is there; `~` is the home folder.

    what   the key or kind that it was typed for

    Raises StudyError where no file can have the name: it is too long, or begins with a home that is not there.
    """
    try:
        named = Path(text).expanduser()
        named.exists()
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise StudyError(f"{what} '{shown(text)}' is no name of a file or folder here: {reason}") from None
    return named


def read_list(text: str) -> list[str]:
    """The items of `a,b` or `[a, b]`; empty ones are left out."""
    inner = text.strip()
    if inner.startswith("[") and inner.endswith("]"):
        inner = inner[1:-1]
    try:
        rows = list(csv.reader([inner], skipinitialspace=True))
    except csv.Error:  # a line break outside quotes
        return [inner]
    return [item for row in rows for item in map(str.strip, row) if item]


def write_list(items: Sequence[str]) -> str:
    """The text that `read_list` reads back.

    >>> write_list(["a.py", "b.py"]), write_list(["a,b.py"])
    ('[a.py,b.py]', '["a,b.py"]')
    """
    plain = f"[{','.join(items)}]"
    if read_list(plain) == list(items):
        return plain
    return "[" + ",".join('"' + item.replace('"', '""') + '"' for item in items) + "]"


def shell_words(command: str) -> list[str]:
    """The words of a printed command; of one that an earlier version did not quote, what spaces separate."""
    try:
        return shlex.split(command)
    except ValueError:
        return command.split()


def check(settings: Any) -> None:
    """Raises StudyError for a field whose value is out of its limits or not finite."""
    for f in fields(settings):
        value, limits = getattr(settings, f.name), _limits(f)
        if limits.choices and value not in limits.choices:
            raise unknown(f.name, str(value), [choice for choice in limits.choices if choice])
        if (limits.unset is not None and value == limits.unset) or value in limits.names.values():
            continue
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if limits.least is not None and not limits.least <= value:
            auto = "" if limits.unset is None else f" (or {limits.unset:g}, the default)"
            raise StudyError(f"{f.name} must be at least {limits.least:g}, got {value}{auto}")
        most = min(limits.most, checks.MOST)  # no record holds more
        if not -checks.MOST <= value <= most:
            raise StudyError(f"{f.name} must be at most {most}, got {shown(str(value))}")


def help_of(settings: Any, *, only: Collection[str] | None = None, width: int = 110) -> list[str]:
    """A line, or several, for every key: its name, its default, what it means, what it can be."""
    known = [f for f in fields(settings) if only is None or f.name in only]
    heads = [_head(f) for f in known]
    left = min(34, max(map(len, heads), default=0) + 2)
    lines: list[str] = []
    for f, head in zip(known, heads, strict=True):
        choices = [choice for choice in _limits(f).choices if choice]
        meaning = f.metadata.get("help", "") + (f" [{' | '.join(choices)}]" if choices else "")
        line = f"{head + '  ':<{left}}{meaning}"
        lines += textwrap.wrap(line, width=width, subsequent_indent=" " * left, break_on_hyphens=False)
    return lines


def _limits(f: Field[Any]) -> Limits:
    """Of a field that is not made by `key`: none."""
    limits: Limits = f.metadata.get("limits", Limits())
    return limits


def _head(f: Field[Any]) -> str:
    default = "" if f.default is MISSING else f.default
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    told = default not in ("", None) and default != _limits(f).unset
    return f"  {f.name}" + (f" ({str(default).lower() if isinstance(default, bool) else default})" if told else "")


def _example(settings: Any) -> str:
    first = next((f for f in fields(settings) if isinstance(f.default, str | int | float) and f.default), None)
    return f"{first.name}={first.default}" if first else f"{fields(settings)[0].name}=VALUE"


def matching(pin: Value, choices: Sequence[Any]) -> list[Any]:
    """The choices that a pinned value means: equal ones, else those that are read or written like it.

    >>> matching(2468, ["2468", "8642"]), matching(0.25, [0.25, "x"]), matching("None", [None, 1])
    (['2468'], [0.25], [None])
    """
    same = [choice for choice in choices if choice == pin]
    return same or [
        choice
        for choice in choices
        if str(choice) == str(pin) or (isinstance(choice, str) and _same(read_value(choice), pin))
    ]


def _same(one: Value, other: Value) -> bool:
    return type(one) is type(other) and one == other
