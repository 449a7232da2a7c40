"""Kills processes of studies at random, runs the same command again, and checks the books.

    python -m tests.benchmarks.kills kinds=plain,packed,halving,seeds,workers,replay kills=200 seed=0

A study is killed up to four times, in one run of its command for as long as it goes on, else in the next: the driver, a
worker, a worker group's controller, the job queue, the process of a Tune trial, or the raylet, which stands for the
node; the driver may be sent a signal that it can hear instead. The moment is drawn over the whole run, its start
included. Then the command runs to its end, and the books are checked:

    lost       results that were on record before a kill, and are not there or are others in the end
    twice      trainings with more than one result on record
    failed     trainings that are on record as failed
    unequal    trainings whose result differs from that of an equal training of another study (to the last digit: two
               workers round otherwise than one and are compared with their like; in a pack rounding is that of the
               company, so that packs are not compared)
    mlflow     runs in MLflow that are not as the records are, or are not ended
    left       processes five seconds after a run, and folders after the last one, that should be gone
    otherwise  proposals, in their order, that are not those of a study that nobody killed (kinds with one worker, where
               results come in one order)
    unended    studies whose command did not end with exit code 0 after the kills

Every study is one line of the file `results`, written when it is over; a second call goes on behind them.
"""

from __future__ import annotations

import collections
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from allocators.core import words
from search.records import LINES, Records, read

KINDS = {
    "plain": "space=sieve trials=6 max_concurrent=2",
    "packed": "space=sieve trials=6 pack=3 max_concurrent=1",
    "halving": "space=sieve trials=8 scheduler=pareto_halving eta=2 max_concurrent=2",
    "seeds": "space=sieve trials=4 seeds=2 max_concurrent=1",
    "workers": "space=sieve trials=4 workers_per_trial=2 num_cpus=2",
    "replay": "space=sieve replay=tiny-moe trials=60 max_concurrent=1",
}
ALIKE = ("plain", "halving", "seeds")  # kinds whose equal trainings have equal results, to the last digit
ALONE = ("seeds", "replay")  # kinds with one worker that trains one at a time
SMALL = "recipe.steps=20 recipe.batch_size=4 limit=40 calibration_samples=16 evaluations=4 keep=all"
ROLES = {  # how a process of each role calls itself
    "worker": "TrainWorker",
    "controller": "TrainController",
    "queue": "_Queue",
    "tune": "TrialHandle",
    "raylet": "raylet",
}
SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT, "SIGHUP": signal.SIGHUP}
A_STUDY = 4  # kills
FAULTS = ("lost", "twice", "failed", "unequal", "mlflow", "left", "otherwise", "unended")
LONGEST = 900.0  # seconds of a run


@dataclass(frozen=True)
class Settings:
    """What is killed, how often."""

    kinds: str = words.key(",".join(KINDS), "of studies, with commas between")
    kills: int = words.key(20, "of all kinds together", least=1)
    seed: int = words.key(0, "of what is drawn", least=0)
    storage: str = words.key("kills", "folder of the studies")
    results: str = words.key("kills.jsonl", "file that results are added to")


@dataclass
class Books:
    """What is wrong in the end, by kind of fault; all zero is right."""

    kind: str
    number: int
    kills: list[str] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    lost: int = 0
    twice: int = 0
    failed: int = 0
    unequal: int = 0
    mlflow: int = 0
    left: int = 0
    otherwise: int = 0
    unended: int = 0
    results: dict[str, Any] = field(default_factory=dict)


def start(storage: Path, name: str, kind_words: str, log: Path) -> subprocess.Popen[bytes]:
    """A run of the study's command, its output added to a log."""
    command = [sys.executable, "-m", "search.run", *kind_words.split(), f"storage={storage}", f"name={name}"]
    with log.open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"COLUMNS": "150"})


def processes_of(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """All that the driver has started, and that these have."""
    try:
        return [*psutil.Process(driver.pid).children(recursive=True)]
    except psutil.Error:
        return []


def of_role(processes: list[psutil.Process], role: str) -> list[psutil.Process]:
    """Those that play this role."""
    return [process for process in processes if _plays(process, role)]


def _plays(process: psutil.Process, role: str) -> bool:
    try:
        if role == "raylet":
            return bool(process.name() == "raylet")
        title = " ".join(process.cmdline())
        return title.startswith("ray::") and ROLES[role] in title
    except psutil.Error:  # it ended
        return False


def events(folder: Path) -> int:
    """Whole lines that the study has on record."""
    file = folder / LINES
    return file.read_bytes().count(b"\n") if file.exists() else 0


def plain(records: Records) -> dict[str, Any]:
    """What a result must have again, whoever was killed: accuracy and loss of every evaluation."""
    return {
        digest: [[rung.step, rung.accuracy, rung.loss] for rung in outcome.rungs]
        for digest, outcome in records.finished.items()
        if outcome.status == "complete"
    }


def kill_in_a_run(
    storage: Path, name: str, kind: str, draw: random.Random, log: Path, most: int
) -> tuple[list[str], int, list[int]]:
    """One run with up to so many kills: what was killed when, the exit code, and what outlived the run by 5 s."""
    folder = storage / name
    driver = start(storage, name, f"{KINDS[kind]} {SMALL if kind != 'replay' else ''}", log)
    began, seen, killed = time.monotonic(), dict[int, psutil.Process](), list[str]()
    due = _Due.drawn(kind, draw, folder, first=True)
    while driver.poll() is None and time.monotonic() - began < LONGEST:
        now = processes_of(driver)
        seen |= {process.pid: process for process in now}
        if len(killed) < most and due.has_come(folder, time.monotonic() - began):
            chosen = of_role(now, due.role) if due.role in ROLES else []
            if chosen or due.role not in ROLES:  # else it is not there yet, or not any more
                killed.append(f"{due.role} after {time.monotonic() - began:.0f} s, {events(folder)} lines")
                _kill(driver, due.role, draw.choice(chosen) if chosen else None)
                due = _Due.drawn(kind, draw, folder, first=False)
                if killed[-1].startswith(("driver", "SIG", "raylet")):
                    most = 0
        time.sleep(0.05)
    driver.kill()
    return killed, driver.wait(), _outlived(seen)


@dataclass(frozen=True)
class _Due:
    """Who is killed next: after so many lines on record, or after so many seconds of the run."""

    role: str
    lines: int
    seconds: float

    @classmethod
    def drawn(cls, kind: str, draw: random.Random, folder: Path, *, first: bool) -> _Due:
        roles = ["driver", *SIGNALS] if kind == "replay" else ["driver", *ROLES, draw.choice([*SIGNALS])]
        at_start = first and draw.random() < 0.25
        lines = 10**9 if at_start else events(folder) + draw.randint(1, 8)
        return cls(draw.choice(roles), lines, draw.uniform(0, 3 if kind == "replay" else 20) if at_start else 10**9)

    def has_come(self, folder: Path, seconds: float) -> bool:
        return seconds > self.seconds or events(folder) >= self.lines


def _kill(driver: subprocess.Popen[bytes], role: str, process: psutil.Process | None) -> None:
    if role in SIGNALS:
        driver.send_signal(SIGNALS[role])
    elif process is None:
        driver.kill()
    else:
        process.kill()


def _outlived(seen: dict[int, psutil.Process]) -> list[int]:
    _, alive = psutil.wait_procs(list(seen.values()), timeout=5)
    for process in alive:
        process.kill()
    return [process.pid for process in alive]


def of_tune() -> set[Path]:
    """The folders for Tune's state that there are, of every study of the machine."""
    return set(Path(tempfile.gettempdir()).glob("tune-*"))


def check(
    books: Books, storage: Path, name: str, before: list[dict[str, Any]], equal: dict[str, Any], others: set[Path]
) -> None:
    """Fills in what is wrong with a study that is over; `others` are Tune's folders that were there before it."""
    folder = storage / name
    records = read(folder)
    books.results = plain(records)
    books.lost = sum(books.results.get(digest) != rungs for results in before for digest, rungs in results.items())
    ends = collections.Counter(digest for digest in _finished(folder))
    books.twice = sum(count > 1 for count in ends.values())
    books.failed = sum(outcome.status in ("failed", "lost") for outcome in records.outcomes.values())
    if books.kind != "packed":
        books.unequal = sum(equal.get(digest, rungs) != rungs for digest, rungs in books.results.items())
    if books.kind in ALONE:
        pairs = itertools.zip_longest(proposed(records), uninterrupted(storage, books.kind))
        books.otherwise = sum(one != other for one, other in pairs)
    books.mlflow = _unlike(records, storage)
    rests = [*(folder / "checkpoints").glob("*"), *folder.glob(".ray"), *(of_tune() - others)]
    books.left += len(rests)


def proposed(records: Records) -> list[str]:
    """What was trained, in the order in which it was proposed first."""
    return list(dict.fromkeys(digest for what, digest, _ in records.events if what == "started"))


def uninterrupted(storage: Path, kind: str) -> list[str]:
    """The same of a study that nobody kills, which runs once."""
    name = f"{kind}-whole"
    if not (storage / name / "front.csv").exists():
        start(storage, name, f"{KINDS[kind]} {SMALL if kind != 'replay' else ''}", storage / f"{name}.log").wait()
    return proposed(read(storage / name))


def _finished(folder: Path) -> Iterator[str]:
    for line in (folder / LINES).read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "finished":
            yield json.dumps(event["outcome"]["trial"], sort_keys=True)


def _unlike(records: Records, storage: Path) -> int:
    """Runs of MLflow that are not what the records say."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{storage.absolute()}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, f"tags.study_id = '{records.header['id']}'", max_results=5000)
    children = {run.data.tags["digest"]: run for run in runs if "digest" in run.data.tags}
    wrong = sum(run.info.status in ("RUNNING", "KILLED") for run in runs)
    wrong += len(runs) - len(children) - 1  # one parent, and one child for each
    for digest, outcome in records.finished.items():
        run = children.pop(digest, None)
        wrong += run is None or run.data.metrics.get("accuracy") != outcome.accuracy
    return wrong + len(children)


def study(settings: Settings, kind: str, number: int, equal: dict[str, Any]) -> Books:
    """One study: killed, run to its end, checked."""
    draw = random.Random(f"{settings.seed} {kind} {number}")
    storage, name = Path(settings.storage), f"{kind}-{number}"
    storage.mkdir(parents=True, exist_ok=True)
    log, books, before, others = storage / f"{name}.log", Books(kind, number), list[dict[str, Any]](), of_tune()
    while len(books.kills) < A_STUDY:
        killed, code, outlived = kill_in_a_run(storage, name, kind, draw, log, A_STUDY - len(books.kills))
        books.kills += killed
        books.codes.append(code)
        books.left += len(outlived)
        if (storage / name / "study.json").exists():
            before.append(plain(read(storage / name)))
        if code == 0:
            break
    last = start(storage, name, f"{KINDS[kind]} {SMALL if kind != 'replay' else ''}", log)
    books.codes.append(last.wait())
    books.unended = int(books.codes[-1] != 0)
    check(books, storage, name, before, equal, others)
    return books


def table(done: list[dict[str, Any]]) -> str:
    """A row a kind."""
    lines = [f"{'kind':<10}{'studies':>8}{'kills':>7}{'results':>9}" + "".join(f"{name:>10}" for name in FAULTS)]
    for kind in dict.fromkeys(line["kind"] for line in done):
        of = [line for line in done if line["kind"] == kind]
        kills = sum(len(line["kills"]) for line in of)
        results = sum(len(line["results"]) for line in of)
        sums = "".join(f"{sum(line.get(name, 0) for line in of):>10}" for name in FAULTS)
        lines.append(f"{kind:<10}{len(of):>8}{kills:>7}{results:>9}{sums}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Exit code 1 where something is wrong in the books."""
    settings = words.parse(argv, Settings)
    for ended_by in (signal.SIGHUP, signal.SIGINT):  # which nohup ignores, and its children inherit
        signal.signal(ended_by, signal.SIG_DFL)
    file = Path(settings.results)
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    kinds = settings.kinds.split(",")
    for turn in range(10**6):
        if sum(len(line["kills"]) for line in done) >= settings.kills:
            break
        kind, number = kinds[turn % len(kinds)], turn // len(kinds)
        if any((line["kind"], line["number"]) == (kind, number) for line in done):
            continue
        like = [line for line in done if (line["kind"] in ALIKE) == (kind in ALIKE) and kind in (*ALIKE, line["kind"])]
        equal = {digest: rungs for line in like for digest, rungs in line["results"].items()}
        books = study(settings, kind, number, equal)
        done.append(asdict(books))
        with file.open("a") as results:
            results.write(json.dumps(done[-1]) + "\n")
        print(f"{kind}-{number}: {'; '.join(books.kills)}; exit codes {books.codes}", flush=True)
        print(table(done), flush=True)
    return int(any(line.get(name, 0) for line in done for name in FAULTS))


if __name__ == "__main__":
    words.run(main)
