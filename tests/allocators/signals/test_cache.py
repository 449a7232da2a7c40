"""Signals on disk: measured once by all, never read damaged."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal as signals
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from allocators.core.errors import StudyError, ToolkitWarning
from allocators.core.types import Signal
from allocators.signals.cache import cached, load, peek

PROVENANCE = {"model": "m", "weights": "abc", "samples": 4, "seed": 0}


def made(provenance: Mapping[str, Any] = PROVENANCE) -> Signal:
    rows: dict[str, dict[str, tuple[float, ...]]] = {
        "0": {"count": (3, 1), "mass": (2.25, 1e-05)},
        "1": {"count": (0, 4), "mass": (0, 1 / 3)},
    }
    return Signal("routing", rows, "expert", "tokens", provenance)


def never() -> Signal:
    raise AssertionError("measured again")


def test_the_copy_of_a_study_is_read_by_its_path_and_no_cache(tmp_path: Path) -> None:
    cached("routing", PROVENANCE, folder=tmp_path, measure=made)
    file = only_file(tmp_path)
    assert load(file) == made()
    file.write_text(json.dumps(made().to_json()))
    assert load(file) == made()
    assert peek("routing", PROVENANCE, folder=tmp_path) is None
    file.write_text(json.dumps({"signal": made().to_json(), "checksum": "0"}))
    with pytest.raises(StudyError, match="its checksum is wrong"):
        load(file)


def only_file(folder: Path) -> Path:
    (file,) = folder.glob("*.json")
    return file


def test_measured_once_then_read(tmp_path: Path) -> None:
    assert peek("routing", PROVENANCE, folder=tmp_path) is None
    first = cached("routing", PROVENANCE, folder=tmp_path / "new" / "folder", measure=made)
    again = cached("routing", PROVENANCE, folder=tmp_path / "new" / "folder", measure=never)
    assert first == again == made() == peek("routing", PROVENANCE, folder=tmp_path / "new" / "folder")
    assert only_file(tmp_path / "new" / "folder").name.startswith("routing-")


@pytest.mark.parametrize("change", [{"seed": 1}, {"weights": "abd"}, {"samples": 5}, {"more": None}])
def test_other_provenance_is_another_file(tmp_path: Path, change: dict[str, Any]) -> None:
    cached("routing", PROVENANCE, folder=tmp_path, measure=made)
    other = PROVENANCE | change
    assert peek("routing", other, folder=tmp_path) is None
    assert cached("routing", other, folder=tmp_path, measure=lambda: made(other)).provenance == other
    assert len(list(tmp_path.glob("*.json"))) == 2


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_damaged_byte_or_a_cut_is_never_believed(tmp_path: Path, data: st.DataObject) -> None:
    cached("routing", PROVENANCE, folder=tmp_path, measure=made, warn=lambda message: None)
    file = only_file(tmp_path)
    good = file.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    flip = data.draw(st.integers(0, 255))  # 0 cuts the file there
    file.write_bytes(good[:at] + bytes([good[at] ^ flip]) + good[at + 1 :] if flip else good[:at])
    read = peek("routing", PROVENANCE, folder=tmp_path)
    assert read is None or read == made()  # 1e-05 and 1E-05 are one number
    said: list[str] = []
    assert cached("routing", PROVENANCE, folder=tmp_path, measure=made, warn=said.append) == made()
    assert (read is None) == (len(said) == 1)
    assert all(str(file) in line and "\n" not in line for line in said)
    assert peek("routing", PROVENANCE, folder=tmp_path) == made()


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"checksum": 1, "signal": null}', "\xff\xfe"])
def test_other_content_is_damage(tmp_path: Path, text: str) -> None:
    cached("routing", PROVENANCE, folder=tmp_path, measure=made)
    only_file(tmp_path).write_bytes(text.encode("latin-1"))
    with pytest.warns(ToolkitWarning, match="is damaged .* measuring the routing signal again"):
        assert cached("routing", PROVENANCE, folder=tmp_path, measure=made) == made()


def test_a_renamed_file_is_damage(tmp_path: Path) -> None:
    other = PROVENANCE | {"seed": 7}
    cached("routing", PROVENANCE, folder=tmp_path, measure=made)
    mine = only_file(tmp_path)
    content = mine.read_bytes()
    cached("routing", other, folder=tmp_path, measure=lambda: made(other))
    (theirs,) = set(tmp_path.glob("*.json")) - {mine}
    theirs.write_bytes(content)
    with pytest.warns(ToolkitWarning, match="holds another signal"):
        assert cached("routing", other, folder=tmp_path, measure=lambda: made(other)).provenance == other


def _ask(folder: Path, results: Path) -> None:
    def measure() -> Signal:
        with (folder / "measurements").open("a") as stream:
            stream.write("x")
        time.sleep(0.3)  # long enough for the others to arrive
        return made()

    warnings.simplefilter("error")
    (results / str(os.getpid())).write_text(cached("routing", PROVENANCE, folder=folder, measure=measure).digest)


def test_many_processes_measure_once(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    spawn = multiprocessing.get_context("spawn")
    crowd = [spawn.Process(target=_ask, args=(tmp_path, results)) for _ in range(4)]
    for process in crowd:
        process.start()
    for process in crowd:
        process.join(60)
    assert [p.exitcode for p in crowd] == [0] * 4
    assert (tmp_path / "measurements").read_text() == "x"
    assert {f.read_text() for f in results.iterdir()} == {made().digest}


def _die_in_mid_write(folder: Path) -> None:
    def die(fd: object) -> None:  # all written, nothing moved into place
        os.kill(os.getpid(), signals.SIGKILL)

    os.fsync = die
    cached("routing", PROVENANCE, folder=folder, measure=made)


def test_killed_in_mid_write_leaves_no_damaged_file(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_die_in_mid_write, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signals.SIGKILL
    assert not list(tmp_path.glob("*.json"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cached("routing", PROVENANCE, folder=tmp_path, measure=made) == made()  # and the lock is free
    assert not list(tmp_path.glob("*.tmp"))


def test_a_failed_measurement_leaves_nothing_and_frees_the_lock(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="measured again"):
        cached("routing", PROVENANCE, folder=tmp_path, measure=never)
    assert cached("routing", PROVENANCE, folder=tmp_path, measure=made) == made()


def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match="signals cannot be kept in"):
        cached("routing", PROVENANCE, folder=tmp_path / "file", measure=never)


def test_the_file_is_json_anyone_can_read(tmp_path: Path) -> None:
    cached("routing", PROVENANCE, folder=tmp_path, measure=made)
    assert json.loads(only_file(tmp_path).read_text())["signal"]["rows"]["1"]["mass"] == [0.0, 1 / 3]
