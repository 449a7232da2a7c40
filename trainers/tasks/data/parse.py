"""JSON and CSV as written: every row as the text of a JSON object, its line, and no type that the file does not say.

    for row in rows_of(Path("train.jsonl"), Format("json")):
        row.text, row.line                                  # '{"answer": "2019-05-04"}', 1

A JSON file holds one object a line (or several lines), or one list of objects, or has that list under a key. Every
cell of a CSV file is text; a column whose cells are all numbers as Python writes them (`5`, `-0.5`, not `05` or `1e3`)
holds numbers, which are written as they were. An empty cell is null, as a CSV file has no other way to say it.

Raises StudyError with file and line for what is no JSON or CSV. Standard library only.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from allocators.core.errors import StudyError
from allocators.core.words import shown

_SPACE = re.compile(r"[ \t\n\r]*")
_SPACE_AND_QUOTE = re.compile(r' +".*"', re.DOTALL)  # of a CSV cell: the quotes are part of its text
_SKIPS = "say dataset_kwargs: {skipinitialspace: true}, or take the space out"
_HALF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # of two escapes that are one character together


@dataclass(frozen=True)
class Format:
    """How the files of a data set are written.

    kind      json or csv
    under     the key that holds the rows of a JSON file; "": the file is the rows
    csv       of CSV files, what `csv.reader` takes
    columns   of CSV files, names of the columns where the file has none in its first line
    skipped   of CSV files, lines before the header
    """

    kind: str
    encoding: str = "utf-8"
    errors: str = "strict"
    under: str = ""
    csv: Mapping[str, Any] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    skipped: int = 0


@dataclass(frozen=True)
class Raw:
    """One row: a JSON object as text, and the line of the file that it begins on."""

    text: str
    line: int


class Written(float):
    """A number whose characters in the file are not those that Python writes it with: `0.50`, `1e3`."""

    text: str

    def __new__(cls, text: str) -> Written:
        """The number that a text says."""
        made = super().__new__(cls, text)
        made.text = text
        return made

    def __reduce__(self) -> tuple[type[Written], tuple[str]]:
        return Written, (self.text,)

    def __repr__(self) -> str:
        return self.text

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return format(float(self), spec) if spec else self.text


def decoded(text: str) -> dict[str, Any]:
    """The object of a row: numbers print as they are written, NaN is null."""
    value: dict[str, Any] = json.loads(text, parse_float=_number, parse_int=_whole, parse_constant=_constant)
    return value


def exact(value: Any) -> Any:
    """The same with numbers as they are written, for a hash: 0.5 and 0.50 are two texts to learn."""
    if isinstance(value, Written):
        return {"written": value.text}
    if isinstance(value, dict):
        return {name: exact(part) for name, part in value.items()}
    return [exact(part) for part in value] if isinstance(value, list) else value


def _number(text: str) -> float:
    value = float(text)
    return value if repr(value) == text else Written(text)


def _whole(text: str) -> float | int:
    return Written(text) if text == "-0" else int(text)


def _constant(text: str) -> None:
    if text != "NaN":
        raise ValueError(f"{text} is no number of JSON")


def rows_of(place: Path, form: Format, *, called: Path | None = None) -> list[Raw]:
    """The rows of the file at a place, which messages call otherwise where it was packed.

    Raises StudyError with the file and its line.
    """
    path = called or place
    try:
        text = place.read_bytes().decode("utf-8-sig" if form.encoding == "utf-8" else form.encoding, form.errors)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        refuse(path, line, f"{error.encoding} cannot read byte 0x{error.object[error.start]:02x}: save it as UTF-8")
    except (OSError, LookupError, UnicodeError) as error:
        raise StudyError(f"data file '{path}' cannot be read: {error}") from error
    if "\0" in text:
        refuse(path, text[: text.index("\0")].count("\n") + 1, "there is a NUL byte: save it as UTF-8 text")
    return _csv_rows(path, text, form) if form.kind == "csv" else _json_rows(path, text, form)


def refuse(path: Path, line: int, why: str) -> NoReturn:
    """Raises the StudyError for one line of a file."""
    raise StudyError(f"data file '{path}', line {line}: {why}")


# --- JSON -------------------------------------------------------------------------------------------------------------


def _json_rows(path: Path, text: str, form: Format) -> list[Raw]:
    if form.under:
        return _rows_under(path, text, form.under)
    listed = text[_SPACE.match(text).end() :][:1] == "["  # type: ignore[union-attr]
    rows, line, counted = [], 1, 0
    for start, end, value in _values(path, text, listed=listed):
        line, counted = line + text.count("\n", counted, start), start
        if not isinstance(value, dict):
            refuse(path, line, f"a row is an object with the fields of a question, and this is {_named(value)}")
        if _HALF_A_PAIR.search(text, start, end):
            _check_characters(path, line, value)
        rows.append(Raw(text[start:end], line))
    if len(rows) == 1:
        _check_list_inside(path, decoded(rows[0].text))
    return rows


def _values(path: Path, text: str, *, listed: bool) -> Iterator[tuple[int, int, Any]]:
    """Every value with its place: one after another, or the items of one list."""
    decoder = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_constant)
    skip = _SPACE.match
    place = skip(text).end() + listed  # type: ignore[union-attr]
    while (place := skip(text, place).end()) < len(text):  # type: ignore[union-attr]
        if listed and text[place] == "]":
            _check_end(path, text, place + 1)
            return
        try:
            value, end = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            at = error.pos
            refuse(path, text.count("\n", 0, at) + 1, f"{error.msg}: '{_line_at(text, min(at, len(text) - 1))}'")
        except (ValueError, RecursionError) as error:
            why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            refuse(path, text.count("\n", 0, place) + 1, why)
        yield place, end, value
        place = skip(text, end).end()  # type: ignore[union-attr]
        if text[place : place + 1] == ",":
            if not listed:
                line = text.count("\n", 0, place) + 1
                refuse(path, line, "a comma follows the object: write one object a line, or a list in brackets")
            place += 1
        elif listed and text[place : place + 1] != "]":
            refuse(path, text.count("\n", 0, place) + 1, "the list is cut: a comma or ] is missing here")
    if listed:
        refuse(path, text.count("\n") + 1, "the list is cut: its ] is missing")


def _rows_under(path: Path, text: str, key: str) -> list[Raw]:
    """The rows of a file that holds one object with a list of rows, or with a list for each column, under a key."""
    values = list(_values(path, text, listed=False))
    whole = values[0][2] if len(values) == 1 else None
    rows = whole.get(key) if isinstance(whole, dict) else None
    if isinstance(rows, dict) and rows and all(isinstance(cells, list) for cells in rows.values()):
        if len({len(cells) for cells in rows.values()}) > 1:
            refuse(path, 1, f"the columns under '{key}' have different lengths")
        rows = [dict(zip(rows, cells, strict=True)) for cells in zip(*rows.values(), strict=True)]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        refuse(path, 1, f"field: {key} asks for one object with a list of rows under '{key}'")
    for row in rows:
        _check_characters(path, 1, row)
    return [Raw(json.dumps(row, ensure_ascii=False), 1) for row in rows]


def _check_end(path: Path, text: str, place: int) -> None:
    rest = _SPACE.match(text, place).end()  # type: ignore[union-attr]
    if rest < len(text):
        line = text.count("\n", 0, rest) + 1
        refuse(path, line, f"a row is an object; a list ends before this: '{_line_at(text, rest)}'")


def _check_list_inside(path: Path, row: Mapping[str, Any]) -> None:
    """A single row that is nothing but a list of rows is a file that has its rows under a key."""
    (name, rows), *others = row.items() or [("", None)]
    if not others and isinstance(rows, list) and rows and all(isinstance(one, dict) for one in rows):
        refuse(path, 1, f"the rows are under '{name}': say dataset_kwargs: {{field: {name}}} in the task file")
    columns = {(type(one), str(list(one)) if isinstance(one, dict) else len(one)) for one in row.values() if _many(one)}
    if others and len(columns) == 1 and all(map(_many, row.values())):
        write = "one object a line (pandas: to_json(orient='records', lines=True))"
        refuse(path, 1, f"the file holds columns and not rows: write {write}")


def _many(value: Any) -> bool:
    """Whether a value could be a column of two rows or more."""
    return isinstance(value, list | dict) and len(value) > 1


def _check_characters(path: Path, line: int, value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        refuse(path, line, f"{error.object[error.start]!r} is half a character (an unpaired surrogate)")


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field '{next(name for name in names if names.count(name) > 1)}' is there twice")
    return value


def _line_at(text: str, place: int) -> str:
    start = text.rfind("\n", 0, place) + 1
    return shown(text[start : text.find("\n", start) if "\n" in text[start:] else len(text)])


def _named(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds = {list: "a list", str: "a text", int: "a number", float: "a number"}
    return f"{kinds[type(value)]}: {shown(json.dumps(value, ensure_ascii=False))}"


# --- CSV --------------------------------------------------------------------------------------------------------------


def _csv_rows(path: Path, text: str, form: Format) -> list[Raw]:
    columns, rows, lines = list(form.columns), [], []
    for line, cells in _lines(path, text, form):
        if not columns:
            columns = _header(path, line, cells)
        elif len(cells) != len(columns):
            refuse(path, line, f"there are {len(cells)} cells for {len(columns)} columns ({', '.join(columns)})")
        elif cells == columns and len(columns) > 1:  # one column may hold any word
            refuse(path, line, f"the names of the columns ({', '.join(columns)}) stand here as a row: remove the line")
        else:
            rows.append(cells)
            lines.append(line)
    values = [_column(cells) for cells in zip(*rows, strict=True)]
    return [
        Raw(json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False), line)
        for row, line in zip(zip(*values, strict=True), lines, strict=True)
    ]


def _lines(path: Path, text: str, form: Format) -> Iterator[tuple[int, list[str]]]:
    """The cells of every line that is not blank, with the number of the line that they begin on."""
    csv.field_size_limit(sys.maxsize)
    skips = form.csv.get("skipinitialspace")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, **form.csv)
    begins = 1
    try:
        for cells in reader:
            if quoted := "" if skips else next((cell for cell in cells if _SPACE_AND_QUOTE.fullmatch(cell)), ""):
                refuse(path, begins, f"quotes follow a space in '{shown(quoted)}': {_SKIPS}")
            if begins > form.skipped and cells:
                yield begins, cells
            begins = reader.line_num + 1
    except csv.Error as error:
        refuse(path, begins, str(error))


def _header(path: Path, line: int, cells: Sequence[str]) -> list[str]:
    if twice := sorted({cell for cell in cells if cells.count(cell) > 1}):
        refuse(path, line, f"two columns are called '{twice[0]}'")
    if len(cells) == 1 and (mark := next((mark for mark in ";\t|" if mark in cells[0]), "")):
        refuse(path, line, f"there is one column, '{shown(cells[0])}': say dataset_kwargs: {{sep: {json.dumps(mark)}}}")
    return [cell or f"Unnamed: {place}" for place, cell in enumerate(cells)]  # pandas writes its index without a name


def _column(cells: Sequence[str]) -> list[Any]:
    """Numbers and booleans where all cells are such in Python's own spelling, else the texts; null where empty."""
    values = [_cell(cell) for cell in cells]
    if any(isinstance(value, str) for value in values):
        return [cell or None for cell in cells]
    kinds = {type(value) for value in values} - {type(None)}
    return values if kinds in ({bool}, {int}, {float}, {int, float}) else [cell or None for cell in cells]


def _cell(text: str) -> Any:
    if not text or text in ("True", "False"):
        return {"": None, "True": True, "False": False}[text]
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        if repr(value) == text and text not in ("nan", "inf", "-inf"):
            return value
    return text
