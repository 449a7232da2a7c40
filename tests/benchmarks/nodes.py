"""A study on a cluster whose nodes come and go, and the table of what ran where.

    python -m tests.benchmarks.nodes trials=3
    python -m tests.benchmarks.nodes trials=12 head=1
    python -m tests.benchmarks.nodes trials=3 head=1 workers=2      two workers a trial, one on the head

Raylets on this machine are nodes: the head, on which the driver runs, and others of one logical CPU each. The driver
starts while the head has no CPU, and waits for a node; the second joins. When it has passed an evaluation of a training
it is killed (SIGKILL for its raylet and all that runs below it), and the driver waits for the third, which joins then.
With head=1 the head trains too: nobody waits, and the third node joins when one more training has ended. With workers=2
a training needs both nodes, so that everything waits again. The same study runs undisturbed in one process, or on one
node. Checked:

    lost       results of the undisturbed study that are missing
    twice      trainings with more than one result on record
    unequal    trainings whose evaluations differ from those of the undisturbed study, to the last digit
    front      whether both have the same front
    worked     whether the node that joined had work
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from allocators.core import words
from search.records import Records, read
from search.records.files import LINES
from tests.benchmarks.kills import plain, start

# sampler=random: what is proposed does not depend on who ends first
SMALL = "space=sieve sampler=random recipe.steps=40 recipe.batch_size=4 limit=24 calibration_samples=16 evaluations=4"
NAME, ALONE = "nodes", "alone"
SECOND, THIRD = "127.0.0.2", "127.0.0.3"  # addresses of this machine, so that nodes are told apart
LONGEST = 1800.0  # seconds


@dataclass(frozen=True)
class Settings:
    """How large the study is, and where."""

    trials: int = words.key(3, "of the study", least=3)
    head: int = words.key(0, "logical CPUs of the head node", least=0)
    workers: int = words.key(1, "of a trial, of one logical CPU each", least=1, most=2)
    storage: str = words.key("nodes", "folder of the studies")


@dataclass
class Books:
    """What is wrong in the end; all zero, and both true, is right."""

    code: int
    lost: int
    twice: int
    unequal: int
    front: bool
    worked: bool

    @property
    def right(self) -> bool:
        return not (self.code or self.lost or self.twice or self.unequal) and self.front and self.worked


class Machines:
    """A Ray cluster of raylets on this machine, without the environment of its caller being changed."""

    def __init__(self, cpus: int) -> None:
        from ray.cluster_utils import Cluster

        os.environ |= {"RAY_worker_maximum_startup_concurrency": "16"}  # else raylets warn in the driver's terminal
        head = {"num_cpus": cpus, "include_dashboard": False}
        self._cluster: Any = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
        self.address: str = self._cluster.address
        head_node: Any = self._cluster.head_node
        self.head: str = head_node.node_id
        self._pids: dict[str, set[int]] = {}

    def add(self, address: str, cpus: int = 1) -> str:
        """A node with this address joins; its id."""
        node = self._cluster.add_node(num_cpus=cpus, node_ip_address=address)
        return str(node.node_id)

    def kill(self, address: str) -> None:
        """SIGKILL for the raylet of this address and all that it started."""
        node = next(node for node in self._cluster.worker_nodes if node.node_ip_address == address)
        raylets = [info.process.pid for info in node.all_processes["raylet"]]
        family = [p for pid in raylets for p in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))]
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._cluster.remove_node(node, allow_graceful=False)

    def kill_memory(self) -> None:
        """SIGKILL for the head's GCS, without which no cluster goes on."""
        for info in self._cluster.head_node.all_processes["gcs_server"]:
            psutil.Process(info.process.pid).kill()

    def end(self) -> None:
        """Ends all of them."""
        self._cluster.shutdown()


@contextlib.contextmanager
def machines(cpus: int) -> Iterator[Machines]:
    """A cluster, ended with the block."""
    made = Machines(cpus)
    try:
        yield made
    finally:
        made.end()


def happened(folder: Path) -> list[dict[str, Any]]:
    """What workers took, and where they were, as the driver noted it."""
    file = folder / "logs" / "workers.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def nodes_of(folder: Path) -> dict[tuple[int, int], dict[int, str]]:
    """Group and life -> the node of each of its workers."""
    nodes: dict[tuple[int, int], dict[int, str]] = collections.defaultdict(dict)
    for event in happened(folder):
        if event["event"] == "arrived":
            nodes[event["group"], event["life"]][event["worker"]] = event["node"]
    return nodes


def lines(folder: Path, event: str) -> list[dict[str, Any]]:
    """What is on record of this event."""
    file = folder / LINES
    if not file.exists():
        return []
    whole = [line for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    return [line for line in map(json.loads, whole) if line["event"] == event]


def at_work_on(folder: Path, node: str) -> bool:
    """Whether a training that this node took has passed an evaluation, and not ended."""
    where, busy = nodes_of(folder), dict[str, bool]()
    for event in happened(folder):
        if event["event"] in ("took", "ended"):
            there = where.get((event["group"], event["life"]), {}).values()
            busy[event["job"]] = event["event"] == "took" and node in there
    reached = {line["digest"] for line in lines(folder, "rung")}
    return any(at_work and job in reached for job, at_work in busy.items())


def wait(driver: subprocess.Popen[bytes], log: Path, condition: Callable[[], Any]) -> None:
    """Until it holds. Raises RuntimeError with the log where the driver has ended, or it takes too long."""
    until = time.monotonic() + LONGEST
    while not condition():
        if driver.poll() is not None or time.monotonic() > until:
            raise RuntimeError(log.read_text())
        time.sleep(0.1)


def disturbed(storage: Path, trials: int, head: int = 0, workers: int = 1) -> tuple[int, dict[str, str]]:
    """The study on nodes that come and go: its exit code, and names of the nodes."""
    folder, log, waiting = storage / NAME, storage / "nodes.log", head < workers
    with machines(head) as cluster:
        several = f"workers_per_trial={workers} ray_address={cluster.address}"
        driver = start(storage, NAME, f"{SMALL} trials={trials} {several}", log)
        try:
            wait(driver, log, lambda: not waiting or "worker groups wait for nodes" in log.read_text())
            second = cluster.add(SECOND)
            wait(driver, log, lambda: at_work_on(folder, second))
            ended = len(lines(folder, "finished"))
            cluster.kill(SECOND)
            waits = "has no room any more" if waiting else ""
            wait(driver, log, lambda: waits in log.read_text() and (waiting or len(lines(folder, "finished")) > ended))
            third = cluster.add(THIRD)
            code = driver.wait(timeout=LONGEST)
        finally:
            driver.kill()
    return code, {cluster.head: "head", second: "second", third: "third"}


def undisturbed(storage: Path, trials: int, workers: int = 1) -> Records:
    """The same study in one process, or on one node."""
    log = storage / "alone.log"
    where = "workers=process" if workers == 1 else f"workers_per_trial={workers} num_cpus={workers}"
    driver = start(storage, ALONE, f"{SMALL} trials={trials} {where}", log)
    if driver.wait(timeout=LONGEST):
        raise RuntimeError(log.read_text())
    return read(storage / ALONE)


def check(storage: Path, code: int, names: dict[str, str], alone: Records) -> Books:
    """What is wrong with the disturbed study."""
    folder = storage / NAME
    records = read(folder)
    results, equal = plain(records), plain(alone)
    ends = collections.Counter(json.dumps(line["outcome"]["trial"]) for line in lines(folder, "finished"))
    fronts = [{candidate.point for candidate in study.points.front} for study in (records, alone)]
    return Books(
        code,
        lost=len(equal.keys() - results.keys()),
        twice=sum(count > 1 for count in ends.values()),
        unequal=sum(equal.get(digest) != rungs for digest, rungs in results.items()),
        front=fronts[0] == fronts[1],
        worked="third" in {names.get(node) for of_group in nodes_of(folder).values() for node in of_group.values()},
    )


def table(folder: Path, names: dict[str, str]) -> str:
    """A row for every time that a group took a training."""
    where, events = nodes_of(folder), happened(folder)
    began = events[0]["time"] if events else 0.0
    digests = {line["digest"] for line in lines(folder, "rung")}
    rows = [f"{'training':<18}{'group':>6}{'life':>6}  {'nodes':<12}{'took (s)':>9}{'ended (s)':>10}"]
    open_: dict[tuple[str, int, int], float] = {}
    for event in [*events, None]:
        if event is None:
            left = [(key, took, None) for key, took in open_.items()]
        elif event["job"] not in digests:
            continue
        else:
            key = (event["job"], event["group"], event["life"])
            if event["event"] == "took":
                open_[key] = event["time"]
                continue
            left = [(key, open_.pop(key, began), event["time"])]
        for (job, group, life), took, ended in left:
            on = " ".join(names.get(node, "?") for _, node in sorted(where.get((group, life), {}).items())) or "?"
            end = f"{ended - began:>10.1f}" if ended is not None else f"{'lost':>10}"
            rows.append(f"{job:<18}{group:>6}{life:>6}  {on:<12}{took - began:>9.1f}{end}")
    return "\n".join(rows)


def main(argv: list[str]) -> int:
    """Exit code 1 where something is wrong in the books."""
    settings = words.parse(argv, Settings)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    storage = Path(settings.storage).absolute()
    storage.mkdir(parents=True, exist_ok=True)
    code, names = disturbed(storage, settings.trials, settings.head, settings.workers)
    books = check(storage, code, names, undisturbed(storage, settings.trials, settings.workers))
    print(table(storage / NAME, names))
    print(json.dumps({"claim": "nodes", "trials": settings.trials, "workers": settings.workers, **asdict(books)}))
    return int(not books.right)


if __name__ == "__main__":
    words.run(main)
