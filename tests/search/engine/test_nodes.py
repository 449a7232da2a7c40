"""A study on a cluster whose nodes join and are killed, and what is said where no cluster can be joined.

python -m pytest tests/search/engine/test_nodes.py
"""

from __future__ import annotations

import getpass
import os
import socket
from pathlib import Path

import pytest

from allocators.core.errors import StudyError
from search.engine import joining
from search.engine.joining import Cluster
from tests.benchmarks import nodes


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
    assert "copy that file to all machines, or set RAY_AUTH_MODE=disabled on all of them" in error
    assert "\n" not in error


def test_where_nothing_listens_that_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        assert not joining.answers(address)
        free.listen()
        assert joining.answers(address)
