"""What a local Ray needs is looked at before it starts. Each in a process of its own: limits cannot be raised again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource
from allocators.core.errors import StudyError
from search.engine import surroundings
{before}
try:
    surroundings.check()
    print("ok", resource.getrlimit(resource.RLIMIT_NOFILE)[0])
except StudyError as error:
    print(error)
"""


def said(before: str = "", **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TMPDIR"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(before=before)],
        capture_output=True,
        text=True,
        check=True,
        env=kept | environment,
    )
    assert done.stdout.count("\n") == 1
    return done.stdout.strip()


@pytest.mark.parametrize("files", [16, 40, 64])
def test_too_few_open_files_are_named_with_the_limit(files: int) -> None:
    text = said(f"resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files}))", RAY_AUTH_MODE="disabled")
    assert text.startswith(f"a process may have {files} files open here (ulimit -n)")
    assert "workers=process" in text


def test_a_soft_limit_is_raised() -> None:
    before = "resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))"
    assert said(before, RAY_AUTH_MODE="disabled") == "ok 256"


def test_a_long_temporary_folder_is_named_with_the_setting(tmp_path: Path) -> None:
    long = tmp_path / ("t" * 100)
    long.mkdir()
    text = said(TMPDIR=str(long), RAY_AUTH_MODE="disabled")
    assert text.startswith(f"TMPDIR={long} is too long for the paths of Ray's sockets")
    assert "set RAY_TMPDIR=/tmp" in text
    assert said(TMPDIR=str(long), RAY_TMPDIR="/tmp", RAY_AUTH_MODE="disabled").startswith("ok")


def test_a_temporary_folder_that_is_none_is_named() -> None:
    text = said(RAY_TMPDIR="/no/such/folder", RAY_AUTH_MODE="disabled")
    assert text.startswith("/no/such/folder is no folder that can be written")


@pytest.mark.parametrize("kind", ["missing", "a file", "read-only"])
def test_a_home_that_cannot_be_written_is_named_where_ray_needs_it(kind: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    if kind == "a file":
        home.write_text("")
    if kind == "read-only":
        if os.geteuid() == 0:
            pytest.skip("root writes everywhere")
        home.mkdir(mode=0o555)
    text = said(HOME=str(home))
    assert text.startswith(f"{home / '.ray'} cannot be written, and Ray keeps its token there: set HOME")
    assert said(HOME=str(home), RAY_AUTH_MODE="disabled").startswith("ok")
