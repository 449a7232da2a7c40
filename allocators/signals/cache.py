"""Measured signals on disk: each is measured once, by whoever asks first, and read by everyone after.

    signal = cached("routing", provenance, folder=Path("runs/x/signals"), measure=lambda: routing.measure(…))
    known = peek("routing", provenance, folder=folder)          # None where it was not measured yet; never measures

A file is named by what its numbers depend on, `<kind>-<digest of the provenance>.json`, so nothing is ever out of date.
It carries a checksum, is written to the side and moved into place, and a lock file makes other processes wait for the
one that measures. A file that is damaged all the same (a full disk, a hand edit) is named in a warning and measured
again.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from allocators.core.errors import NotFiniteError, StudyError, ToolkitWarning
from allocators.core.types import Signal, digest_of


class _Damaged(Exception):
    """A cache file that does not hold what its name says; the text is the reason."""


def cached(
    kind: str,
    provenance: Mapping[str, Any],
    *,
    folder: Path,
    measure: Callable[[], Signal],
    warn: Callable[[str], None] | None = None,
) -> Signal:
    """The signal of this provenance, measured at most once for all processes that share `folder`.

    measure   called without arguments where no good file exists; its signal must carry `provenance`
    warn      receives one line about a damaged file; by default a ToolkitWarning

    Raises StudyError when the folder cannot be written, NotFiniteError where a value was measured that is not finite;
    whatever `measure` raises passes through.
    """
    file = _file(kind, provenance, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file.with_suffix(".lock"))
        lock.acquire()
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        try:
            known = _read(file, kind, provenance)
        except _Damaged as reason:
            message = f"{file} is damaged ({reason}): measuring the {kind} signal again"
            warn(message) if warn is not None else warnings.warn(message, ToolkitWarning, stacklevel=2)
            known = None
        if known is not None:
            return known
        signal = measure()
        _check_finite(signal)
        assert signal.kind == kind
        assert digest_of(signal.to_json()["provenance"]) == digest_of(dict(provenance))
        try:
            _write(file, signal)
        except OSError as error:
            raise _unwritable(folder, error) from error
        return signal
    finally:
        lock.release()


def peek(kind: str, provenance: Mapping[str, Any], *, folder: Path) -> Signal | None:
    """The cached signal, or None where there is no good file; measures nothing, waits for nobody."""
    try:
        return _read(_file(kind, provenance, folder), kind, provenance)
    except _Damaged:
        return None


def load(file: Path) -> Signal:
    """A signal file by its path, whatever was measured: one of a cache, or the copy that a study folder holds.

    Raises StudyError for one that is missing or damaged.
    """
    try:
        return _checked(file, copied=True)
    except OSError as error:
        raise StudyError(f"signal file '{file}' cannot be read: {error.strerror or error}") from error
    except _Damaged as reason:
        raise StudyError(f"signal file '{file}' is damaged ({reason}): measure it again") from reason


def _check_finite(signal: Signal) -> None:
    for key, metrics in signal.rows.items():
        for metric, values in metrics.items():
            if not all(map(math.isfinite, values)):
                where = f"layer {key}" if key.isdecimal() else key
                raise NotFiniteError(f"the {signal.kind} of {where} is not finite ({metric}): try dtype=float32")


def _file(kind: str, provenance: Mapping[str, Any], folder: Path) -> Path:
    return folder / f"{kind}-{digest_of(dict(provenance))}.json"


def _read(file: Path, kind: str, provenance: Mapping[str, Any]) -> Signal | None:
    try:
        signal = _checked(file)
    except FileNotFoundError:
        return None
    if signal.kind != kind or digest_of(dict(signal.provenance)) != digest_of(dict(provenance)):
        raise _Damaged("it holds another signal")
    return signal


def _checked(file: Path, *, copied: bool = False) -> Signal:
    try:
        data = json.loads(file.read_bytes())
        if copied and "checksum" not in data:
            return Signal.from_json(data)
        if data["checksum"] != digest_of(data["signal"]):
            raise _Damaged("its checksum is wrong")
        return Signal.from_json(data["signal"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # no JSON, or JSON of another form
        raise _Damaged("it is cut short or no signal file") from error


def _write(file: Path, signal: Signal) -> None:
    data = signal.to_json()
    beside = file.with_suffix(".tmp")  # one name is enough: only the holder of the lock writes
    with beside.open("w", encoding="utf-8") as stream:
        json.dump({"checksum": digest_of(data), "signal": data}, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(beside, file)  # all or nothing: a reader never sees half a file


def _unwritable(folder: Path, error: OSError) -> StudyError:
    return StudyError(f"signals cannot be kept in '{folder}': {error.strerror or error}: choose a folder you can write")
