"""Records of a study whose storage is a URI: found by another machine, gone on with there, exported there.

python -m pytest tests/search/records/test_mirror.py

Through an object store: moto's server, which speaks S3 on loopback (`pip install -e '.[s3]'`).
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from allocators.core.errors import StudyError
from search.records import mirror, read
from search.records.files import HEADER, LINES

WORDS = "space=sieve recipe.steps=8 recipe.batch_size=2 limit=8 calibration_samples=4 evaluations=2 workers=process"


def recorded(folder: Path, lines: str) -> Path:
    folder.mkdir(parents=True)
    (folder / HEADER).write_text('{"id": "a", "inode": 1}')
    (folder / LINES).write_text(lines)
    return folder


def test_what_another_machine_has_recorded_is_taken_over_where_it_is_more(tmp_path: Path) -> None:
    place = f"file://{tmp_path}/away"
    first = recorded(tmp_path / "first", "one\n")
    with mirror.kept(first, place):
        (first / LINES).write_text("one\ntwo\n")
    second = tmp_path / "second"
    assert mirror.collect(second, place)
    assert (second / LINES).read_text() == "one\ntwo\n"
    assert not mirror.collect(second, place), "both are the same"
    (second / LINES).write_text("one\ntwo\nthree\n")
    assert not mirror.collect(second, place), "what is here is more"
    (second / LINES).write_text("one\nanother\n")
    with pytest.raises(StudyError, match="have gone different ways"):
        mirror.collect(second, place)


def test_a_copy_that_fails_stops_no_study(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = recorded(tmp_path / "first", "one\n")
    (tmp_path / "away").write_text("a file where the folder would be")
    with mirror.kept(first, f"file://{tmp_path}/away"):
        pass
    assert "are not copied to" in caplog.text


# --- an object store


@pytest.fixture(scope="module")
def store() -> Iterator[dict[str, str]]:
    """The environment in which programs find the store, which has a bucket."""
    if importlib.util.find_spec("moto") is None:
        pytest.skip("moto, which speaks S3, is not installed: pip install -e '.[s3]'")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as server:
        assert server.stderr is not None
        url = next(line.split("Running on ")[1].split()[0] for line in server.stderr if "Running on " in line)
        with urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT")):
            yield {
                "AWS_ENDPOINT_URL": url,
                "AWS_ACCESS_KEY_ID": "a",
                "AWS_SECRET_ACCESS_KEY": "b",
                "AWS_REGION": "us-east-1",
            }
        server.terminate()


def run(module: str, words: str, folder: Path, store: dict[str, str]) -> subprocess.Popen[str]:
    """A program on a machine where nothing lies but what is in this folder."""
    folder.mkdir(exist_ok=True)
    places = {"HOME": str(folder), "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "150"}
    command = [sys.executable, "-m", module, *words.split()]
    pipe = subprocess.PIPE
    environment = os.environ | store | places
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def ended(program: subprocess.Popen[str]) -> str:
    said, _ = program.communicate(timeout=1800)
    assert program.returncode == 0, said
    return said


@pytest.mark.slow
def test_a_study_in_an_object_store_is_killed_goes_on_elsewhere_and_is_exported_there(
    store: dict[str, str], tmp_path: Path
) -> None:
    words = f"{WORDS} trials=3 storage=s3://bucket/studies name=cloud"
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    driver = run("search.run", words, first, store)
    folder = first / "studies" / "cloud"
    try:
        while not (folder / HEADER).exists() or len(read(folder).finished) < 1 or not read(folder).in_flight:
            assert driver.poll() is None, driver.communicate()[0]
            time.sleep(0.1)
        before = set(read(folder).finished)
        time.sleep(2 * mirror.SELDOM)  # a copy is made so often; what comes after it is trained again
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.communicate()

    said = ended(run("search.run", words, second, store))
    assert "the records come from s3://bucket/studies/cloud" in said
    records = read(second / "studies" / "cloud")
    assert before <= set(records.finished)
    assert [outcome.status for outcome in records.finished.values()] == ["complete"] * 3
    assert records.header["id"] == read(folder).header["id"]

    assert "Pareto front" in ended(run("search.report", "s3://bucket/studies/cloud", third, store))
    ended(run("search.export", "s3://bucket/studies/cloud to=winner", third, store))
    assert (third / "winner" / "adapter.safetensors").exists()
    assert "nothing to train" in ended(run("search.run", words, third, store))
