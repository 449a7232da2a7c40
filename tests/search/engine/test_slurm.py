"""The batch script of docs/clusters.md in a Slurm of two nodes on this machine: it is cut off, queued again, and ends.

python -m pytest -m slow tests/search/engine/test_slurm.py        as root, with Debian's package slurm-wlm
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from search.records import read
from tests import ROOT
from tests.benchmarks.nodes import lines

SMALL = "space=sieve sampler=random recipe.steps=4 recipe.batch_size=2 limit=4 calibration_samples=4 evaluations=1"
TRIALS = 12
LONGEST = 1200.0  # seconds
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus}
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus}
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in taken:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in taken]


class Slurm:
    """A controller and two nodes, both on this machine and named by names that lead to it."""

    def __init__(self, folder: Path) -> None:
        (folder / "state").mkdir(parents=True)
        file = folder / "slurm.conf"
        facts = {"host": socket.gethostname(), "ports": free_ports(3), "folder": folder, "cpus": os.cpu_count()}
        file.write_text(CONFIGURATION.format(**facts))
        self.environment = os.environ | {"SLURM_CONF": str(file), "RAY_worker_niceness": "0", "TERM": "dumb"}
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._daemons = [
            subprocess.Popen([*program, "-D"], env=self.environment, stderr=subprocess.DEVNULL)
            for program in (["slurmctld"], ["slurmd", "-N", socket.gethostname()], ["slurmd", "-N", "localhost"])
        ]
        wait_for(lambda: "idle" in self.say("sinfo", "--noheader", "--format=%T"))

    def say(self, *words: str) -> str:
        """What a command of Slurm prints."""
        return subprocess.run(words, cwd=ROOT, env=self.environment, capture_output=True, text=True).stdout

    def end(self) -> None:
        self.say("scancel", "--user=root")
        for daemon in reversed(self._daemons):
            daemon.terminate()
            daemon.wait()


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    if os.geteuid() != 0 or any(shutil.which(program) is None for program in ("slurmctld", "slurmd", "sbatch")):
        pytest.skip("Slurm's daemons are not installed, or would not run as root")
    made = Slurm(tmp_path / "slurm")
    yield made
    made.end()


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + LONGEST
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.5)


def script(storage: Path) -> str:
    """As printed, but for its size, which is that of this machine, and the study."""
    page = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    printed: str
    (printed,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", page, flags=re.DOTALL)
    size = "--nodes=4 --ntasks-per-node=1 --cpus-per-task=16 --gpus-per-node=4 --time=08:00:00"
    changed = {size: "--nodes=2 --ntasks-per-node=1 --cpus-per-task=1 --time=00:20:00", "/shared/studies": str(storage)}
    changed["python -m search.run"] = f"python -m search.run {SMALL} trials={TRIALS} name=batch"
    for before, after in changed.items():
        assert printed.count(before) == 1
        printed = printed.replace(before, after)
    return printed


@pytest.mark.slow
def test_the_batch_script_is_cut_off_queued_again_and_goes_on(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text(script(tmp_path))
    folder, log = tmp_path / "batch", tmp_path / "job.log"
    number = slurm.say("sbatch", "--parsable", f"--output={log}", str(tmp_path / "job.sh")).strip()
    state = ["squeue", "--noheader", "--format=%T", f"--job={number}"]
    wait_for(lambda: lines(folder, "finished") or not slurm.say(*state))
    slurm.say("scancel", "--signal=TERM", "--batch", number)  # as Slurm does before the time is over
    wait_for(lambda: slurm.say(*state).strip() == "PENDING")
    before = {line["outcome"]["trial"]["digest"]: line for line in lines(folder, "finished")}
    assert 0 < len(before) < TRIALS, log.read_text()
    assert "the same command goes on" in log.read_text()
    slurm.say("scontrol", "update", f"JobId={number}", "StartTime=now")
    wait_for(lambda: not slurm.say(*state))
    said = log.read_text()
    assert f"{TRIALS} of {TRIALS} finished" in said, said
    assert "joined the Ray cluster" in said
    assert "Traceback" not in said
    after = lines(folder, "finished")
    assert len(after) == TRIALS == len({line["outcome"]["trial"]["digest"] for line in after})
    assert all(before[line["outcome"]["trial"]["digest"]] == line for line in after[: len(before)])
    assert {outcome.status for outcome in read(folder).finished.values()} == {"complete"}
