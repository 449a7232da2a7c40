"""How many trials a second the job queue and the driver carry, and whether memory stays flat.

    python -m tests.benchmarks.scale                            # both tables, then a soak of 300 trainings
    python -m tests.benchmarks.scale queue= tune= soak=2000     # the soak alone

Simulated workers train nothing: each takes a job of the real job queue, an actor, and reports one evaluation and the
end at once. All of them are threads of one process, which is not counted. On the other side

    queue   as many readers ask for reports, in a process of their own: what the queue alone carries
    tune    Ray Tune runs the trials, with one process for each that runs, and a conductor that only counts

What the conductor of a study adds a trial (records, MLflow, sampler) is measured by tests/benchmarks/growth.py.

    trials/s   by the wall clock, which other programs on the machine slow down
    CPU ms     a trial: of the queue's actor, of the driver, and of one Tune process where each trial has a 1/N of them
    limit/s    trials a second at which the busiest of them, which is named, has a whole CPU for itself
    driver KiB a trial, by which the driver grows that only counts: what Tune keeps (trials=1600: less is noise)

The soak is a real study of so many trainings of two steps on four logical workers: MiB of resident memory of the
driver, the queue and the workers (the mean), read ten times on the way.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from allocators.core import words
from allocators.core.messages import Assignment, Finished, RungReached, TrainJob
from allocators.core.types import Outcome, Rung
from search.problem import Proposal
from tests.benchmarks.kills import events, of_role, processes_of, start
from tests.search.studies import outcome

QUEUE, STUDY = "queue-scale", "scale"
SOAK = "space=sieve sampler=random max_concurrent=4 num_cpus=4 gpus_per_worker=0 recipe.steps=2 recipe.batch_size=2 "
SOAK += "limit=4 calibration_samples=4 evaluations=1 untrained=false"
LONGEST = 4 * 3600.0  # seconds


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    queue: str = words.key("1,4,16,64", "simulated workers on the queue alone, with commas between (empty: none)")
    tune: str = words.key("1,4,16", "the same below Ray Tune, which has a process for each")
    trials: int = words.key(400, "trials of a row", least=1)
    soak: int = words.key(300, "trainings of the soak (0: none)", least=0)
    storage: str = words.key("scale", "folder of the soak's study")


def jobs_of(count: int) -> list[TrainJob]:
    """Trainings of different seeds."""
    like = outcome()
    return [TrainJob(replace(like.trial, seed=seed), like.trainable_params) for seed in range(count)]


class Simulated:
    """Workers that take a job and report at once; and readers who ask for the reports. An actor, or two."""

    def __init__(self) -> None:
        import ray

        self._get, self._queue = ray.get, ray.get_actor(QUEUE)

    def work(self, group: int) -> None:
        """One worker, until the queue is closed."""
        while True:
            taken: object = self._get(self._queue.take.remote(group, 0))
            if not isinstance(taken, Assignment):
                return
            job = taken.job
            assert isinstance(job, TrainJob)
            rung = RungReached(Rung(1, 10, 0.5))
            done = Outcome(job.trial, "complete", job.trainable_params, accuracy=0.5, rungs=(rung.rung,))
            for report in (rung, Finished(done)):
                self._get(self._queue.report.remote(group, 0, taken.job_id, job, report))

    def read(self, jobs: Sequence[TrainJob]) -> int:
        """One reader, who waits for one training after another."""
        for job in jobs:
            while not isinstance(self._get(self._queue.next_report.remote(job.trial.digest, job)), Finished):
                pass
        return len(jobs)

    def pid(self) -> int:
        """Of its process."""
        import os

        return os.getpid()


@contextlib.contextmanager
def started(workers: int) -> Iterator[tuple[Any, Any]]:
    """A local Ray with the queue and so many workers: the queue, and the class of readers."""
    import ray

    from search.engine.connect import NAMESPACE
    from search.engine.workers import _Queue

    ray.init(address="local", num_cpus=2, namespace=NAMESPACE, include_dashboard=False, log_to_driver=False)
    try:
        free: Any = ray.remote(num_cpus=0)
        queue = free(_Queue).options(name=QUEUE).remote(workers, 1)
        simulated = free(Simulated).options(max_concurrency=workers + 1)
        crew = simulated.remote()
        ray.get(crew.pid.remote())
        for group in range(workers):
            crew.work.remote(group)
        yield queue, simulated
        ray.get(queue.close.remote())
    finally:
        ray.shutdown()


_seen: dict[tuple[str, int], float] = {}  # role and process -> its CPU seconds; Tune ends some before they are read


def cpu_of(role: str) -> float:
    """CPU seconds of Ray's processes of this role, so far."""
    for process in of_role(psutil.Process().children(recursive=True), role):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            _seen[role, process.pid] = times.user + times.system
    return sum(seconds for (of, _), seconds in _seen.items() if of == role)


def queue_alone(workers: int, trials: int) -> dict[str, Any]:
    """A row of the first table."""
    import ray

    with started(workers) as (_, simulated):
        readers = simulated.remote()
        ray.get(readers.pid.remote())
        jobs, before, began = jobs_of(trials), cpu_of("queue"), time.monotonic()
        ray.get([readers.read.remote(jobs[number::workers]) for number in range(workers)])
        seconds, queue = time.monotonic() - began, cpu_of("queue") - before
    return row("queue", workers, trials, seconds, {"queue": queue})


class Counting:
    """A conductor that proposes these trainings and keeps nothing; tells when each ended."""

    def __init__(self, jobs: Sequence[TrainJob]) -> None:
        self._left = [Proposal(job.trial, job.trainable_params, {}) for job in jobs]
        self.ended: list[tuple[float, ...]] = []

    def propose(self) -> Proposal | None:
        return self._left.pop(0) if self._left else None

    def rung(self, digest: str, rung: Rung) -> bool:
        return True

    def finished(self, outcome: Outcome) -> None:
        if len(self.ended) % 10 == 0 or not self._left:  # reading them costs the driver something too
            self._seen = (time.process_time(), cpu_of("queue"), cpu_of("tune"), psutil.Process().memory_info().rss)
        self.ended.append((time.monotonic(), *self._seen))

    def lost(self, digest: str, reason: str, *, again: bool = True) -> None:
        raise RuntimeError(reason)


def below_tune(workers: int, trials: int) -> dict[str, Any]:
    """A row of the second table: of all trials but the first ones, in which Tune starts its processes."""
    from search.engine import tune

    conductor, first = Counting(jobs_of(trials + 2 * workers)), 2 * workers
    with started(workers), tempfile.TemporaryDirectory() as notes:
        tune.search(conductor, study=STUDY, queue=QUEUE, slots=lambda: workers, pausing=False, notes=Path(notes))
    began, ended = conductor.ended[first - 1], conductor.ended[-1]
    seconds, driver, queue, handles, grown = (after - before for before, after in zip(began, ended, strict=True))
    cpu = {"queue": queue, "driver": driver, "tune": handles / workers}
    return row("tune", workers, trials, seconds, cpu, driver_KiB=round(grown / trials / 1024, 1))


def row(claim: str, workers: int, trials: int, seconds: float, cpu: dict[str, float], **more: float) -> dict[str, Any]:
    """What is printed of one measurement."""
    a_trial = {name: spent / trials for name, spent in cpu.items()}
    busiest = max(a_trial, key=lambda name: a_trial[name])
    made = {"claim": claim, "workers": workers, "trials_a_second": round(trials / seconds, 1)}
    made |= {f"{name}_ms": round(1e3 * spent, 2) for name, spent in a_trial.items()}
    made |= {"saturates": busiest, "limit": round(1 / max(a_trial[busiest], 1e-9))} | more
    print(json.dumps(made), flush=True)
    return made


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In columns."""
    columns = ["claim", "workers", "trials_a_second", "queue_ms", "driver_ms", "tune_ms"]
    columns += ["saturates", "limit", "driver_KiB"]
    lines = ["".join(f"{name:>17}" for name in columns)]
    lines += ["".join(f"{made.get(name, '')!s:>17}" for name in columns) for made in rows]
    return "\n".join(lines)


def resident(driver: subprocess.Popen[bytes]) -> dict[str, float]:
    """MiB of driver, queue and workers (the mean)."""
    family = processes_of(driver)
    sizes = {
        "driver": [psutil.Process(driver.pid)],
        "queue": of_role(family, "queue"),
        "workers": of_role(family, "worker"),
    }
    held = {}
    for name, processes in sizes.items():
        mebibytes = []
        for process in processes:
            with contextlib.suppress(psutil.Error):
                mebibytes.append(process.memory_info().rss / 2**20)
        held[name] = round(sum(mebibytes) / max(len(mebibytes), 1))
    return held


def soak(trainings: int, storage: Path) -> list[dict[str, Any]]:
    """Memory at ten moments of a study: after the first tenth of its trainings, the second, and so on."""
    storage.mkdir(parents=True, exist_ok=True)
    name, log, seen = f"soak-{trainings}", storage / "soak.log", list[dict[str, Any]]()
    driver = start(storage, name, f"{SOAK} trials={trainings}", log)
    until = time.monotonic() + LONGEST
    try:
        while driver.poll() is None and time.monotonic() < until:
            done = events(storage / name) // 3  # started, one evaluation, finished
            if done >= (len(seen) + 1) * trainings // 10 and len(seen) < 10:
                seen.append({"trainings": done, **resident(driver)})
                print(json.dumps(seen[-1]), flush=True)
            time.sleep(0.2)
    finally:
        driver.kill()
    if driver.wait():
        raise RuntimeError(log.read_text())
    return seen


def main(argv: list[str]) -> int:
    """Prints a JSON line for each row as it comes, and the tables at the end."""
    settings = words.parse(argv, Settings)
    rows = [queue_alone(int(count), settings.trials) for count in settings.queue.split(",") if count]
    rows += [below_tune(int(count), settings.trials) for count in settings.tune.split(",") if count]
    print(table(rows))
    if settings.soak:
        seen = soak(settings.soak, Path(settings.storage).absolute())
        print(f"{'trainings':>10}{'driver MiB':>12}{'queue MiB':>12}{'a worker MiB':>14}")
        for held in seen:
            print(f"{held['trainings']:>10}{held['driver']:>12}{held['queue']:>12}{held['workers']:>14}")
    return 0


if __name__ == "__main__":
    words.run(main)
