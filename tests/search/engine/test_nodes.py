"""A study on a cluster whose nodes join and are killed, and what is said where no cluster can be joined.

python -m pytest tests/search/engine/test_nodes.py
"""

from __future__ import annotations

import contextlib
import getpass
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from allocators.core.errors import StudyError
from search.engine import joining, surroundings
from search.engine.joining import Cluster
from search.records import read
from search.run import main
from tests import ROOT
from tests.benchmarks import nodes
from tests.benchmarks.kills import plain, start


def test_a_study_waits_for_its_first_node_and_goes_on_where_one_is_killed(tmp_path: Path) -> None:
    code, names = nodes.disturbed(tmp_path, trials=3)
    books = nodes.check(tmp_path, code, names, nodes.undisturbed(tmp_path, trials=3))
    said = (tmp_path / "nodes.log").read_text()
    assert books.right, f"{books}\n{nodes.table(tmp_path / nodes.NAME, names)}\n{said}"
    assert "1 of 1 worker groups wait for nodes: 1 worker(s) of 1 CPU and 0 GPU do not fit the cluster's 0 CPU" in said
    assert "a node joined" in said
    assert "worker group 0 has no room any more" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_groups_come_and_go_beside_one_that_stays(tmp_path: Path) -> None:
    code, names = nodes.disturbed(tmp_path, trials=20, head=1)
    books = nodes.check(tmp_path, code, names, nodes.undisturbed(tmp_path, trials=20))
    assert books.right, f"{books}\n{nodes.table(tmp_path / nodes.NAME, names)}"


@pytest.mark.slow
def test_a_training_of_two_workers_on_two_nodes_goes_on_where_one_of_them_is_killed(tmp_path: Path) -> None:
    code, names = nodes.disturbed(tmp_path, trials=3, head=1, workers=2)
    books = nodes.check(tmp_path, code, names, nodes.undisturbed(tmp_path, trials=3, workers=2))
    assert books.right, f"{books}\n{nodes.table(tmp_path / nodes.NAME, names)}"
    assert "failed" not in (tmp_path / "nodes.log").read_text()


@pytest.mark.slow
def test_a_head_that_is_lost_is_said_and_the_same_command_goes_on_in_a_new_cluster(tmp_path: Path) -> None:
    words, log, folder = f"{nodes.SMALL} trials=3", tmp_path / "log", tmp_path / "headless"
    with nodes.machines(1) as cluster:
        driver = start(tmp_path, "headless", f"{words} ray_address={cluster.address}", log)
        while not nodes.lines(folder, "finished"):
            assert driver.poll() is None, log.read_text()
            time.sleep(0.1)
        cluster.kill_memory()
        assert driver.wait(timeout=joining.SILENT + 60) == 2
        said = log.read_text()
        assert f"the head of the cluster, {cluster.address}, is lost" in said
        assert "Traceback" not in said
    before = plain(read(folder))
    assert before
    with nodes.machines(1) as cluster:
        assert start(tmp_path, "headless", f"{words} ray_address={cluster.address}", log).wait() == 0, log.read_text()
    after = plain(read(folder))
    assert len(after) == 3
    assert before.items() <= after.items()
    assert len(nodes.lines(folder, "finished")) == 3


# --- which cluster is joined


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[Cluster]:
    """Clusters that have a node on this machine."""
    found: list[Cluster] = []
    monkeypatch.setattr(joining, "_on_this_machine", lambda: iter(found))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return found


def test_auto_is_the_only_cluster_that_this_user_has_a_node_of(here: list[Cluster]) -> None:
    here += [Cluster("10.0.0.1:6379", getpass.getuser()), Cluster("10.0.0.2:6379", "somebody else")]
    assert joining.resolve("auto") == ("10.0.0.1:6379", "of which you started a node here")
    here.append(Cluster("10.0.0.3:6379", getpass.getuser()))
    with pytest.raises(StudyError, match=r"2 clusters have a node here; say ray_address=10.0.0.1:6379 or"):
        joining.resolve("auto")


def test_auto_joins_no_cluster_of_another_user_and_says_whose_it_is(here: list[Cluster]) -> None:
    with pytest.raises(StudyError, match="finds no cluster on this machine: start one with 'ray start --head'"):
        joining.resolve("auto")
    here.append(Cluster("10.0.0.2:6379", "ann"))
    with pytest.raises(StudyError, match=r"only clusters of other users here \(10.0.0.2:6379 of ann\)"):
        joining.resolve("auto")
    assert joining.resolve("10.0.0.2:6379")[0] == "10.0.0.2:6379", "asked by name"


def test_auto_follows_the_variable_of_ray(here: list[Cluster], monkeypatch: pytest.MonkeyPatch) -> None:
    here.append(Cluster("10.0.0.2:6379", getpass.getuser()))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.9:6379")
    assert joining.resolve("auto") == ("10.0.0.9:6379", "which RAY_ADDRESS names")


def test_a_session_of_a_program_that_runs_is_no_cluster() -> None:
    assert joining._is_of_a_program(f"session_2026-11-28_19-28-00_317158_{os.getpid()}")
    assert not joining._is_of_a_program("session_2026-11-28_19-28-00_317158_99999999")


@pytest.mark.parametrize("said", ["InvalidAuthToken: Authentication failed", "RPC error: Unauthenticated"])
def test_a_token_that_is_refused_is_named_as_the_cause(said: str) -> None:
    error = str(joining.why_not("h:6379", RuntimeError(f"{said}\nmore")))
    assert "refuses this machine's token" in error
    assert (
        "copy that file to all machines and set RAY_AUTH_MODE=token there, or set RAY_AUTH_MODE=disabled on all"
        in error
    )
    assert "\n" not in error


def test_where_nothing_listens_that_is_said_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        assert not surroundings.answers(address)
        assert main(["space=sieve", "trials=1", f"ray_address={address}", f"storage={tmp_path}"]) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(f"error: ray_address={address} does not answer (nothing listens there)")
        free.listen()
        assert surroundings.answers(address)


# --- the commands of the page, as printed


def commands(title: str) -> list[str]:
    """The first block of commands below this heading of the cluster page, without comments."""
    page = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    block = page.split(f"## {title}\n")[1].split("```\n")[1]
    return [line.partition(" #")[0].strip() for line in block.splitlines()]


class Machine:
    """A home and a temporary folder, in which Ray's programs run; all that they leave is ended by its number."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.home, self.temporary = folder / "home", Path(tempfile.mkdtemp(dir="/tmp"))  # short, for sockets
        self.home.mkdir(parents=True)
        own = {"HOME": str(self.home), "TMPDIR": str(self.temporary), "RAY_TMPDIR": str(self.temporary)}
        left_out = ("RAY_AUTH_MODE", "RAY_ADDRESS")
        inherited = {name: value for name, value in os.environ.items() if name not in left_out}
        paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(sys.path)}
        self.environment = inherited | paths | own | {"COLUMNS": "150"} | environment

    def run(self, command: str) -> tuple[int, str]:
        """Its exit code, and what it printed."""
        told: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=self.environment, timeout=1800, **told)
        return done.returncode, done.stdout

    def end(self) -> None:
        for process in psutil.process_iter(["cmdline"]):
            if any(str(self.temporary) in word for word in process.info["cmdline"] or []):
                with contextlib.suppress(psutil.Error):
                    process.kill()
        shutil.rmtree(self.temporary, ignore_errors=True)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    if surroundings.answers("127.0.0.1:6379"):
        pytest.skip("a cluster runs on this machine at Ray's own port")
    made = Machine(tmp_path)
    yield made
    made.end()


STUDY = "trials=1 recipe.steps=4 recipe.batch_size=2 limit=4 calibration_samples=4 evaluations=1 max_concurrent=1"


@pytest.mark.slow
def test_the_commands_of_the_page_run_as_printed_and_a_token_that_is_missing_is_named(
    machine: Machine, tmp_path: Path
) -> None:
    start, join, study = commands("A cluster")
    study = f"{study.replace('/shared', str(tmp_path))} space=sieve {STUDY}"
    (machine.home / ".ray").mkdir()
    (machine.home / ".ray" / "auth_token").write_text("0123456789abcdef0123456789abcdef")  # something ran here before
    _, said = machine.run(start)
    host = re.search(r"--address='([^']+):6379'", said)
    assert host is not None, said
    code, said = machine.run(f"{join.replace('HOST', host[1])} --num-cpus=1")  # a second raylet on the same machine
    assert code == 0, said
    code, said = machine.run(f"{study} name=printed")
    assert code == 0, said
    assert f"joined the Ray cluster at {host[1]}:6379, of which you started a node here: 2 nodes" in said
    (machine.home / ".ray" / "auth_token").unlink()
    code, said = machine.run(f"{study} name=refused")
    assert code == 2, said
    assert "refuses this machine's token" in said


@pytest.mark.slow
def test_a_study_runs_as_a_job_of_the_cluster(machine: Machine, tmp_path: Path) -> None:
    if any(importlib.util.find_spec(name) is None for name in ("aiohttp_cors", "colorful", "opencensus")):
        pytest.skip("Ray's job server is not installed: pip install -e '.[cluster]'")
    machine.environment["RAY_AUTH_MODE"] = "disabled"
    code, said = machine.run("ray start --head")
    assert code == 0, said
    (submit,) = commands("Job servers")
    submit = submit.replace("--working-dir . ", f"--working-dir {machine.home} ")  # the tree may hold data of tests
    code, said = machine.run(f"{submit.replace('/shared', str(tmp_path))} space=sieve name=job {STUDY}")
    assert code == 0, said
    assert "which RAY_ADDRESS names" in said
    folder = tmp_path / "studies" / "job"
    assert [outcome.status for outcome in read(folder).finished.values()] == ["complete"]
    assert list((folder / "logs").glob("*.err")), "what workers print reaches the study's folder"
