"""The documents of a task's data set, by split, before lm-eval sees them.

    splits = read(config)                       # {"train": Documents, "test": Documents}
    splits["test"][3]                           # {"question": "…", "choices": […], "label": 0}
    splits["test"].place(3)                     # "test.jsonl, line 4"

Local JSON and CSV files are read here, character by character as they are (parse.py): `datasets` guesses types, and
makes another text of a date, of a number with leading zeros and of `NA`. All other data are `datasets`' own.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from allocators.core.errors import StudyError, shown
from trainers.tasks.data import FORMATS, flat, unescaped
from trainers.tasks.data.parse import Format, Raw, Written, decoded, rows_of
from trainers.tasks.task_file import one_line

_NO_SPLITS = "its data are no splits by name: leave split and streaming out of dataset_kwargs"
# Of a CSV file: what `csv.reader` is given, and what else is understood; everything else is refused.
_READER = {
    "sep": "delimiter",
    "quotechar": "quotechar",
    "quoting": "quoting",
    "escapechar": "escapechar",
    "doublequote": "doublequote",
    "skipinitialspace": "skipinitialspace",
}
_UNDERSTOOD = {*_READER, "delimiter", "names", "column_names", "header", "skiprows", "encoding", "encoding_errors"}
_UNDERSTOOD |= {"name", "version", "data_dir", "data_files", "description"}
# Says how to guess, how fast, or the guess itself: nothing is guessed here.
_UNDERSTOOD |= {"na_filter", "keep_default_na", "na_values", "chunksize", "engine", "memory_map", "float_precision"}


class Documents(Sequence[dict[str, Any]]):
    """Rows of files as documents; a field that a row lacks is None, as `datasets` has it.

    features   names of the fields of all rows, in the order they are first seen (what lm-eval asks of a data set)
    """

    def __init__(self, rows: Sequence[Raw], features: Mapping[str, None], files: Sequence[tuple[int, Path]]) -> None:
        self.features = features
        self._rows, self._files = rows, files

    @classmethod
    def of(cls, files: Iterable[tuple[Path, Path]], form: Format) -> Documents:
        """Each file is where it lies, and what messages call it: a packed one lies unpacked in a cache.

        Raises StudyError with file and line for what cannot be read, and for files without a row."""
        rows: list[Raw] = []
        begins = []
        for file, called in files:
            begins.append((len(rows), called))
            rows += rows_of(file, form, called=called)
        if not begins:
            raise StudyError("data_files names a file that is packed, and holds none")
        if not rows:
            raise StudyError(f"data file '{', '.join(str(file) for _, file in begins)}' holds no rows")
        features: dict[str, None] = {}
        for row in rows:
            features.update(dict.fromkeys(decoded(row.text)))
        return cls(rows, features, begins)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, place: slice) -> Documents: ...
    def __getitem__(self, place: int | slice) -> dict[str, Any] | Documents:
        if isinstance(place, slice):
            return self.select(range(len(self))[place])
        document = decoded(self._rows[place].text)
        return document if len(document) == len(self.features) else {**dict.fromkeys(self.features), **document}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[place] for place in range(len(self)))

    def select(self, places: Iterable[int]) -> Documents:
        """Those documents, in that order."""
        return Documents([self._rows[place] for place in places], self.features, self._files)

    def place(self, number: int) -> str:
        """`test.jsonl, line 4` of a document, of all rows as they were read."""
        at = bisect.bisect_right(self._files, number, key=lambda begin: begin[0]) - 1
        return f"{self._files[at][1].name}, line {self._rows[number].line}"

    @functools.cached_property
    def dataset(self) -> Any:
        """The same as a `datasets.Dataset`, for functions of a task file that make other documents of them."""
        import datasets

        documents = list(self)
        features, columns = {}, {}
        for name in self.features:
            values = [document[name] for document in documents]
            features[name] = kind = _feature(values)
            columns[name] = [json.dumps(value) for value in values] if type(kind) is datasets.Json else values
        return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _feature(values: Sequence[Any]) -> Any:
    """The type of a column, where its values have one; JSON where they differ, which keeps each as it is."""
    from datasets import Json, List, Value

    there = [value for value in values if value is not None]
    kinds = {type(value) for value in there}
    if not kinds:
        return Value("null")
    if kinds == {str}:
        return Value("string")
    if kinds == {bool}:
        return Value("bool")
    if kinds == {int} and all(-(2**63) <= value < 2**63 for value in there):
        return Value("int64")
    if kinds <= {float, Written}:
        return Value("float64")
    if kinds == {list}:
        inner = _feature([item for value in there for item in value])
        return Json() if _holds_json(inner) else List(inner)
    if kinds == {dict} and len({tuple(value) for value in there}) == 1:
        parts = {name: _feature([value[name] for value in there]) for name in there[0]}
        return Json() if not parts or any(map(_holds_json, parts.values())) else parts
    return Json()


def _holds_json(feature: Any) -> bool:
    return type(feature).__name__ == "Json"


def read(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The documents of every split of a config whose paths are absolute.

    Raises StudyError with file and line for a local file that cannot be read, and whatever `datasets` raises.
    """
    import datasets

    kwargs = {key: value for key, value in (config.get("dataset_kwargs") or {}).items() if key != "trust_remote_code"}
    path, name = config.get("dataset_path"), config.get("dataset_name")
    if not isinstance(path, str):
        raise StudyError("it names no data: set dataset_path to json, csv, a folder, or a data set of the hub")
    if path in ("json", "csv") or Path(path).is_dir():
        builder = datasets.load_dataset_builder(path, name, **kwargs)
        kind = type(builder).__module__.rpartition(".")[2]
        files = builder.config.data_files or {}
        if kind in ("json", "csv") and not any("://" in file for some in files.values() for file in some):
            form = _json_format(builder.config) if kind == "json" else _csv_format(builder.config)
            if empty := [split for split, some in files.items() if not some]:
                named = kwargs["data_files"]
                of_split = named[empty[0]] if isinstance(named, Mapping) else named
                raise StudyError(
                    f"data_files names no file for split '{empty[0]}': nothing is called {_said(of_split)}"
                )
            return _Splits({str(split): Documents.of(_unpacked(some), form) for split, some in files.items()})
    if path in ("parquet", "arrow") and isinstance(kwargs.get("data_files"), Mapping):
        return _Splits({split: _table(path, name, split, kwargs) for split in kwargs["data_files"]})
    loaded = datasets.load_dataset(path, name, **kwargs)
    if not isinstance(loaded, Mapping) or kwargs.get("streaming"):
        raise StudyError(_NO_SPLITS)
    return _Splits(loaded) if path in FORMATS else loaded


def _said(files: Any) -> str:
    """Data files as a message names them."""
    return ", ".join(map(unescaped, flat(files)))


def _table(path: str, name: str | None, split: str, kwargs: Mapping[str, Any]) -> Any:
    """One split of a table, with the types of its own files: read together, all splits would get those of the first."""
    import datasets

    files = kwargs["data_files"][split]
    try:
        loaded = datasets.load_dataset(path, name, **{**kwargs, "data_files": {split: files}})
    except Exception as error:  # a file that is cut, empty, or something else
        said = _said(files)
        if "BatchSize" in str(error.__cause__):  # what Arrow says of a table without a row
            raise StudyError(f"data file '{said}' holds no rows") from error
        raise StudyError(f"data file '{said}' cannot be read as {path}: {one_line(error)}") from error
    if not isinstance(loaded, Mapping) or kwargs.get("streaming"):
        raise StudyError(_NO_SPLITS)
    return loaded[split]


class _Splits(dict[str, Any]):
    """Documents by split, of files that a task file names."""


def is_local(splits: Mapping[str, Any]) -> bool:
    """Whether the documents are those of files that a task file names, which their owner can correct."""
    return isinstance(splits, _Splits)


def as_datasets(splits: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same as `datasets.Dataset`s."""
    return _Splits({split: some.dataset if isinstance(some, Documents) else some for split, some in splits.items()})


def _json_format(config: Any) -> Format:
    return Format("json", config.encoding, config.encoding_errors or "strict", config.field or "")


def _csv_format(config: Any) -> Format:
    """Raises StudyError for what only the guessing reader of pandas could do."""
    given = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default}
    if strange := sorted(given - _UNDERSTOOD):
        raise StudyError(
            f"dataset_kwargs asks for {', '.join(strange)}: of a CSV file sep, quotechar, quoting, escapechar, "
            "doublequote, skipinitialspace, column_names, header, skiprows and encoding can be said"
        )
    skipped = config.skiprows or 0
    names = tuple(config.names or ())
    if (
        not isinstance(skipped, int)
        or skipped < 0
        or config.header not in ("infer", 0, None)
        or (config.header is None and not names)
    ):
        raise StudyError("of a CSV file, skiprows is a number of lines, and header: null comes with column_names")
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise StudyError(f"column_names must be different texts, got {shown(str(list(names)))}")
    if names and config.header == 0:
        raise StudyError("column_names is for CSV files without a header: leave header or column_names out")
    reader = {ours: getattr(config, theirs) for theirs, ours in _READER.items()}
    return Format(
        "csv",
        config.encoding or "utf-8",
        config.encoding_errors or "strict",
        csv=reader,
        columns=names,
        skipped=skipped,
    )


def _unpacked(files: Iterable[str]) -> Iterator[tuple[Path, Path]]:
    """The files themselves, or what is in them where they are packed; each with the name that its owner knows.

    Raises StudyError for one that cannot be unpacked.
    """
    from datasets import DownloadConfig, DownloadManager

    manager = DownloadManager(download_config=DownloadConfig(extract_compressed_file=True, local_files_only=True))
    for file in files:
        try:
            place = Path(manager.extract(file))
            found = [Path(inside) for inside in manager.iter_files(str(place))]
        except Exception as error:  # zlib's, lzma's, zipfile's and zstandard's errors have no base but Exception
            do = "or unpack it" if isinstance(error, ImportError) else "pack it again"
            raise StudyError(f"data file '{file}' cannot be unpacked: {one_line(error)}: {do}") from error
        for inside in found:
            yield inside, Path(file) / inside.relative_to(place) if place.is_dir() else Path(file)
