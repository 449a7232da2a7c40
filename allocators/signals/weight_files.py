"""Which files of a model's folder are its weights, and what the heads of these files say. Standard library only.

    weight_files.names_in(folder)                     # ("model.safetensors",), or the shards that the index names
    weight_files.head(folder / "model.safetensors")   # tensor name -> (dtype, shape): nothing is loaded

As transformers does: `model.safetensors` where there is one, else the shards of `model.safetensors.index.json`. Other
*.safetensors beside them (consolidated.safetensors, an adapter) are no part of the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from allocators.core import checks
from allocators.core.errors import StudyError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

_MOST_HEAD = 100_000_000  # bytes; safetensors itself reads no longer head
_POINTER = b"version https://git-lfs.github.com/spec"


class Stored(NamedTuple):
    """A tensor as its file describes it: `F32`, `BF16`, `F8_E4M3` …, and its size."""

    dtype: str
    shape: tuple[int, ...]


def names_in(folder: Path) -> tuple[str, ...]:
    """Names of the weight files, whether or not they lie there: shards may be missing.

    Raises StudyError where the folder has neither model.safetensors nor its index, or an index that cannot be read.
    """
    if (folder / SINGLE).is_file():
        return (SINGLE,)
    if (folder / INDEX).is_file():
        return tuple(sorted(set(shards_of(folder / INDEX).values())))
    beside = sorted(file.name for file in folder.glob("*.safetensors"))
    other = f", and of {beside[0]} it is not known what it holds" if beside else ""
    raise StudyError(
        f"model folder '{folder}' has no *.safetensors called {SINGLE}, and no {INDEX}{other}: save it with "
        "save_pretrained(...)"
    )


def files_in(folder: Path) -> tuple[Path, ...]:
    """The weight files. Raises StudyError as `names_in` does, and where a shard is missing."""
    names = names_in(folder)
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise StudyError(
            f"model folder '{folder}' lacks {missing[0]}, which its index names ({len(missing)} of {len(names)} shards "
            "are missing): fetch it again"
        )
    return tuple(folder / name for name in names)


def shards_of(index: Path) -> Mapping[str, str]:
    """Tensor name -> name of the shard that holds it. Raises StudyError for what is no index."""
    weight_map = json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise StudyError(f"'{index}' has no weight_map: fetch it again")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not checks.is_folder_name(shard):
            raise StudyError(f"'{index}' names a shard {str(shard)[:80]!r}, which is no file beside it: fetch it again")
    return weight_map


def head(file: Path) -> dict[str, Stored]:
    """What a safetensors file holds, by tensor name.

    Raises StudyError for a Git LFS pointer, a file that is cut short, and what is no safetensors file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            begin = stream.read(8)
            _refuse_pointer(file, begin + stream.read(len(_POINTER)))
            length = int.from_bytes(begin, "little")
            if len(begin) < 8 or length > _MOST_HEAD:
                raise StudyError(f"'{file}' is no safetensors file: fetch it again")
            stream.seek(8)
            text = stream.read(length)
    except OSError as error:
        raise StudyError(f"'{file}' cannot be read: {error.strerror or error}") from error
    if len(text) < length:
        raise StudyError(
            f"'{file}' is cut short: its head has {length:,} bytes, {len(text):,} are there: fetch it again"
        )
    try:
        tensors, end = _tensors(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise StudyError(f"'{file}' is no safetensors file (its head cannot be read): fetch it again") from error
    if size != 8 + length + end:
        what = "cut short" if size < 8 + length + end else "longer than its head says"
        raise StudyError(f"'{file}' is {what}: {8 + length + end:,} bytes expected, {size:,} are there: fetch it again")
    return tensors


def _tensors(data: Any) -> tuple[dict[str, Stored], int]:
    """The tensors of a head, and where the last one ends. Raises ValueError for another form."""
    tensors, end, places = {}, 0, []
    for name, entry in checks.mapping(data, "the head").items():
        if name == "__metadata__":
            continue
        entry = checks.mapping(entry, name)
        shape = tuple(checks.whole(size, name) for size in checks.sequence(entry.get("shape"), name))
        begins, ends = (checks.whole(place, name) for place in checks.sequence(entry.get("data_offsets"), name))
        if ends < begins or (math.prod(shape) == 0) != (begins == ends):
            raise ValueError(f"{name} has a size that its place is not")
        tensors[name] = Stored(checks.text(entry.get("dtype"), name), shape)
        places.append((begins, ends))
    for begins, ends in sorted(places):
        if begins != end:
            raise ValueError("tensors overlap, or leave room between them")
        end = ends
    return tensors, end


def json_object(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object; a byte order mark is read over.

    Raises StudyError in one line, with the file and what is wrong with it, for anything else.
    """
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise StudyError(f"'{file}' cannot be read: {error.strerror or error}") from error
    _refuse_pointer(file, raw)
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in raw[:4]:
        raise StudyError(f"'{file}' is written in UTF-16 or UTF-32: save it as UTF-8")
    if not raw.strip():
        raise StudyError(f"'{file}' is empty: fetch it again")
    try:
        data = json.loads(raw.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise StudyError(f"'{file}' is no JSON: {error.msg} at {where}; is it cut short, or edited by hand?") from error
    except UnicodeDecodeError as error:
        raise StudyError(f"'{file}' is not written in UTF-8 (byte {error.start}): save it as UTF-8") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in brackets
        raise StudyError(f"'{file}' cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise StudyError(f"'{file}' holds {type(data).__name__}, not a JSON object: fetch it again")
    return data


def _refuse_pointer(file: Path, begin: bytes) -> None:
    if begin.startswith(_POINTER):
        raise StudyError(f"'{file}' is a Git LFS pointer, not the file itself: git lfs pull")
