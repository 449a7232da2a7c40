"""study.json: what was asked, and with which versions. Every field is checked when it is read: it may be anybody's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from allocators.core import checks
from allocators.core.errors import StudyError
from allocators.core.types import ModelShape, Role
from search.config import RunConfig
from search.records.files import HEADER, read_bytes
from search.records.redact import unmasked
from trainers import storage

_LONGEST = 1000  # characters of a name
_ID = re.compile(r"[0-9a-f]{32}")
_MODULE = {"path": "", "layer": 0, "in_features": 0, "out_features": 0, "num_experts": 0, "role": ""}
_PUBLISHED = {"model": "", "task": "", "row": {}, "accuracy": 0.0, "source": ""}
_COMPARISON = {"name": "", "first": {}, "second": {}, "claim": "", "source": "", "margin": 0.0}


def read_header(folder: Path) -> dict[str, Any]:
    """Contents of study.json, every field of its type.

    Raises StudyError where there is none, or it is damaged.
    """
    try:
        header: dict[str, Any] = json.loads(read_bytes(folder, HEADER))
        check(header)
    except OSError as error:
        raise StudyError(
            f"no study in {folder} ({HEADER}: {error.strerror}): give the folder that search.run named when it started"
        ) from None
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0][:200]
        raise StudyError(
            f"{folder / HEADER} is damaged ({reason}): put it back from a copy, or start another study with name=NEW"
        ) from None
    return header


def check(header: Mapping[str, Any]) -> None:
    """Raises KeyError, ValueError or TypeError for a field that is missing or not of its type."""
    checks.mapping(header, HEADER)
    if not _ID.fullmatch(checks.text(header["id"], "id")):
        raise ValueError("id must be 32 hex digits")
    _check_name(header["name"])
    checks.text(header["started"], "started")
    for time in checks.sequence(header["resumed"], "resumed"):
        checks.text(time, "resumed")
    if "inode" in header:
        checks.whole(header["inode"], "inode", high=2**64)
    checks.text(header["command"], "command")
    for name, version in checks.mapping(header["versions"], "versions").items():
        checks.text(version, f"version of {name}")
    for name, content in checks.mapping(header.get("contents", {}), "contents").items():
        if not checks.text(content, "contents").isprintable() or not name.isprintable() or len(name) > _LONGEST:
            raise ValueError(f"contents must be a hash by a name, got {ascii(name)[:60]}")
    check_settings(header["config"], "config")
    check_settings(header["identity"], "identity")
    check_shape(header["shape"])
    _check_table(header.get("table", {}))


def _check_name(name: Any) -> None:
    """A study's name becomes the last part of paths and URIs."""
    if not checks.is_folder_name(checks.text(name, "name")):
        raise ValueError(f"name must be that of a folder, got {ascii(name)[:60]}")


def check_settings(settings: Any, what: str) -> None:
    """Raises ValueError where values of the keys of the command line are not of their kind.

    A key of another version may have any plain value.
    """
    kinds = RunConfig().to_json()
    for key, value in checks.mapping(settings, what).items():
        example = kinds.get(key)
        if key == "pack" and isinstance(value, int):  # it was a number once
            continue
        if isinstance(value, Mapping) and (example is None or isinstance(example, Mapping)):
            checks.scalars(value, f"{what}.{key}")
        elif example is not None:
            checks.like(value, example, f"{what}.{key}")
        elif isinstance(value, list | tuple):
            checks.like(value, [], f"{what}.{key}")
        else:
            checks.scalar(value, f"{what}.{key}")


def check_shape(shape: Any) -> None:
    """Raises KeyError, ValueError or TypeError for what are no sizes of a model."""
    checks.text(checks.mapping(shape, "shape")["name"], "shape.name")
    layers = checks.whole(shape["num_layers"], "shape.num_layers", high=checks.MOST_LAYERS)
    for module in checks.sequence(shape["modules"], "shape.modules"):
        checks.like(module, _MODULE, "module")
        checks.whole(module["layer"], "layer of a module", high=layers - 1)
        checks.whole(module["in_features"], "in_features")
        checks.whole(module["out_features"], "out_features")
        checks.whole(module.get("num_experts", 0), "num_experts", high=checks.MOST_EXPERTS)
        if module.get("role", "mlp") not in get_args(Role):
            raise ValueError(f"role of a module must be one of {', '.join(get_args(Role))}")
    checks.whole(shape.get("active_experts", 0), "shape.active_experts", high=checks.MOST_EXPERTS)
    ModelShape.from_json(shape)


def _check_table(table: Any) -> None:
    """What a table space says about its paper (`allocators/core/tables.py`); nothing of any other space."""
    if not checks.mapping(table, "table"):
        return
    for name, example in {"published": _PUBLISHED, "comparisons": _COMPARISON}.items():
        for entry in checks.sequence(table[name], f"table.{name}"):
            if missing := example.keys() - checks.like(entry, example, f"table.{name}").keys():
                raise ValueError(f"table.{name} must have {min(missing)}")


def place_of(folder: Path, header: Mapping[str, Any]) -> str:
    """Where the workers of a study write: its folder, or its part of the storage that its header names.

    A login is not on record: credentials of a store come from the environment.
    """
    where = unmasked(str(header["config"].get("storage", "")))
    if not storage.is_uri(where):
        return str(folder.absolute())
    name = str(header["config"].get("name") or header["name"])
    safe = ".." not in [*where.split("/"), *name.split("/")]
    return storage.join(where, name) if safe else str(folder.absolute())
