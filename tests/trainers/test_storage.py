"""Storage: what is put comes back, at a path and at a URI alike.

python -m pytest tests/trainers/test_storage.py
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from allocators.core.errors import StudyError
from trainers import storage


@pytest.fixture(params=["path", "uri"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    folder = tmp_path / "place"
    return str(folder) if request.param == "path" else folder.as_uri()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    (source / "a.txt").write_text("alpha")
    (source / "inner" / "b.bin").write_bytes(bytes(range(256)))
    return source


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_folder_comes_back_as_it_was(place: str, folder: Path, tmp_path: Path) -> None:
    target = storage.join(place, "study", "best")
    assert not storage.exists(target)
    assert not storage.get_folder(target, tmp_path / "back")
    storage.put_folder(folder, target)
    assert storage.exists(target)
    assert storage.get_folder(target, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(folder)


def test_a_second_folder_replaces_the_first_whole(place: str, folder: Path, tmp_path: Path) -> None:
    storage.put_folder(folder, place)
    (folder / "a.txt").unlink()
    (folder / "c.txt").write_text("gamma")
    storage.put_folder(folder, place)
    storage.get_folder(place, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(folder)


def test_a_file_comes_back_and_is_replaced(place: str) -> None:
    target = storage.join(place, "x", "checkpoint")
    assert not storage.exists(target)
    for text in ("one", "two"):
        with storage.replacing(target) as temporary:
            Path(temporary).write_text(text)
        with storage.reading(target) as file:
            assert Path(file).read_text() == text


def test_nothing_temporary_stays(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    for _ in range(2):
        storage.put_folder(folder, place / "f")
        with storage.replacing(place / "a.txt") as temporary:
            Path(temporary).write_text("alpha")
    assert sorted(os.listdir(place)) == ["a.txt", "f"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(StudyError, match="cannot write"), storage.replacing(target) as temporary:
        shutil.copyfile(tmp_path / "missing", temporary)
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_under_a_file_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match="possible are a folder you may write"):
        storage.put_folder(folder, tmp_path / "file" / "x")


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(StudyError, match=r"'foo://bucket/x'.*possible are"):
        storage.exists("foo://bucket/x")


def test_join_keeps_schemes() -> None:
    assert storage.join("s3://bucket/", "a", "b") == "s3://bucket/a/b"
    assert storage.join("/tmp/x", "a") == "/tmp/x/a"


def test_a_folder_is_written_whole_or_not_at_all(place: str, folder: Path, tmp_path: Path) -> None:
    storage.put_folder(folder, place)

    def fails_half_way() -> None:
        with storage.replacing_folder(place) as local:
            local.mkdir()
            (local / "half").write_text("")
            raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        fails_half_way()
    with storage.reading_folder(place) as local:
        assert contents(local) == contents(folder)
    with storage.replacing_folder(place) as local:
        local.mkdir()
        (local / "new").write_text("all of it")
    with storage.reading_folder(place) as local:
        assert contents(local) == {"new": b"all of it"}
    assert sorted(os.listdir(tmp_path)) == ["place", "source"]


def test_reading_a_folder_that_is_not_there(place: str) -> None:
    with storage.reading_folder(place) as local:
        assert not local.exists()
