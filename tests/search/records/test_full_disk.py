"""A disk that is really full: a small file system of its own, mounted where this user may mount."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from allocators.core.errors import StudyError
from search.records import HEADER, LINES, read
from tests.search.studies import fill, open_study

MORE = 4096  # bytes of a page, by which the file system gives room


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder], capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if mounted.returncode:
        pytest.skip("this user may not mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def take_the_rest(file: Path, *, but: int) -> None:
    """Fills the disk, and leaves so many bytes."""
    with file.open("wb", buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(MORE))
        except OSError:
            ballast.truncate(max(ballast.tell() - but, 0))


def test_a_study_on_a_full_disk_keeps_every_whole_line_and_goes_on_once_there_is_room(disk: Path) -> None:
    folder, ballast = disk / "study", disk / "ballast"
    with open_study(folder) as study:
        take_the_rest(ballast, but=4 * MORE)
        with pytest.raises(StudyError, match=r"cannot be written \(No space left on device\): make room") as error:
            fill(study)
        assert "\n" not in str(error.value)
        kept = dict(study.outcomes)
    assert kept
    records = read(folder)
    assert not records.problems
    assert records.outcomes == kept, "what was on record is there, and half a line is not"
    assert (folder / LINES).read_bytes().endswith(b"\n")

    take_the_rest(disk / "more", but=0)
    header = (folder / HEADER).read_bytes()
    with pytest.raises(StudyError, match="No space left on device") as error:
        open_study(folder).close()
    assert "\n" not in str(error.value)
    assert (folder / HEADER).read_bytes() == header

    ballast.unlink()
    with open_study(folder) as study:
        assert study.outcomes == kept
        fill(study)
    assert not read(folder).problems
    assert len(read(folder).finished) > len(records.finished)
