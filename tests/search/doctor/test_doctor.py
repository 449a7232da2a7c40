"""What is wrong with a machine, a model or a task is one line of the doctor's, and the exit code says so."""

from __future__ import annotations

import shutil
import socket
import sys
from pathlib import Path

import pytest

from search.doctor import Asked, Finding, examine
from search.doctor.__main__ import main
from tests import ROOT

looks = sys.modules["search.doctor.examine"]


def found(**asked: str) -> dict[str, Finding]:
    return {finding.what: finding for finding in examine(Asked(**asked))}  # type: ignore[arg-type]  # text keys only


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_a_machine_that_runs_the_tests_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"storage={tmp_path}", "model=tiny-moe", "task=tiny_pairs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.split()[0] in ("ok", "note") for line in lines)
    text = "\n".join(lines)
    for part in ("CPU cores", "torch 2.", "tiny-moe: 4 layers, 64 routed experts", "2,400 rows to train on", "GB free"):
        assert part in text


def test_what_would_end_a_study_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(ROOT / "trainers" / "embedded" / "tiny_moe" / "config.json", tmp_path)
    with socket.socket() as taken:  # bound and not listening: nobody answers there
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        words = [f"model={tmp_path}", "task=tiny_pears", "storage=/proc/none", f"ray_address={address}"]
        assert main(words) == 1
    out, err = capsys.readouterr()
    wrong = [line for line in out.splitlines() if line.startswith("WRONG")]
    assert err == "4 things would end a study here\n"
    assert [line.split()[1] for line in wrong] == ["Ray", "storage", "weights", "task"]
    for part in ("does not answer", "cannot be written", "a config.json and no weights", "did you mean 'tiny_pairs'"):
        assert any(part in line for line in wrong)


def test_a_cluster_that_answers_and_a_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(looks, "_PORTS", {"mlflow": port})
        findings = found(ray_address=f"127.0.0.1:{port}")
    assert findings["Ray"].state == "ok"
    assert findings["ports"] == Finding("ports", "note", f"in use: {port} (mlflow); give the command another --port")


def test_a_package_that_is_missing_or_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["no-such-package>=1", "torch>=99", "pytest>=8; extra == 'test'"]
    monkeypatch.setattr(looks.metadata, "requires", lambda name: needs)
    finding = found()["packages"]
    assert finding.state == "wrong"
    assert "no-such-package is missing" in finding.says
    assert "is not >=99" in finding.says
    assert "pytest" not in finding.says


def test_an_examination_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looks, "_CGROUP", None)
    finding = found()["machine"] if "memory" not in found() else None
    assert finding is not None
    assert finding.state == "wrong"
    assert finding.says.startswith("could not be looked at: AttributeError")


def test_words_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["modle=x"]) == 2
    assert "did you mean 'model'" in capsys.readouterr().err
    assert main(["help"]) == 0
    assert "ray_address" in capsys.readouterr().out
