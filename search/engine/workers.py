"""Warm workers: Ray Train worker groups that start once a study and train trial after trial. Edge file: Ray.

Starting a TorchTrainer for every trial costs tens of CPU-seconds and reloads the base model each time. Here each group
is one `TorchTrainer(serve).fit()` that lives as long as the study. A zero-CPU actor, the board, holds the queue of
jobs, the reports of each job and what was cancelled; workers take jobs from it, trial handles wait on it.

    pool = Pool(...); pool.start()
    pool.ask({"kind": "signal", ...})     one job, wait for its answer
    pool.close()
"""

from __future__ import annotations

import asyncio
import collections
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

# Read when Ray is imported or started; a user's own settings stay.
for _name, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's summary would tear the live table, and verbose=0 does not silence it
    "RAY_worker_maximum_startup_concurrency": "16",  # below it the raylet warns of a dozen idle helpers on a laptop
}.items():
    os.environ.setdefault(_name, _value)

import ray

from allocators.core.errors import StudyError

NAMESPACE = "lora-expert-search"
ATTEMPTS = 3  # a job whose worker died this often is given up: it is the likely cause
# Seconds that the workers of one trial wait for the first of them, who waits for a trial or measures a signal: torch's
# half an hour would end groups that have nothing to do while others train.
LONGEST_WAIT = 7 * 24 * 3600
NOTHING: tuple[str, dict] = ("", {})  # no job is waiting now
MOST_PACKED = 8  # trials of a worker where it measures how many to pack
MOST_CPU_GROUPS = 8  # default on machines without a GPU: every group holds one copy of the base model


class Board:
    """Jobs waiting, reports per job, what each group is working on, what was cancelled. Runs as a zero-CPU actor."""

    def __init__(self, groups: int, pack: int = 1) -> None:
        self.pack = pack  # places of a group
        self.waiting: asyncio.Queue = asyncio.Queue()
        self.reports: dict[str, asyncio.Queue] = collections.defaultdict(asyncio.Queue)
        self.held: dict[int, dict[str, dict]] = {}  # group -> the jobs in its places
        self.again: dict[int, list[tuple[str, dict]]] = {}  # those it held when it died
        self.starts: collections.Counter[int] = collections.Counter()
        self.attempts: collections.Counter[str] = collections.Counter()
        self.cancelled: set[str] = set()
        self.asking: dict[str, tuple[int, asyncio.Future]] = {}  # job -> who waits to hear whether it goes on
        self.alive = set(range(groups))
        self.reason = ""

    async def submit(self, job_id: str, job: dict) -> None:
        if not self.alive:
            await self._give_up(job_id, f"no worker is left: {self.reason}")
        else:
            await self.waiting.put((job_id, job))

    async def start(self, group: int) -> None:
        """A worker begins, or begins anew after it died: it then takes what it held again, before anything else."""
        self.starts[group] += 1
        self.again[group] = list(self.held.pop(group, {}).items())

    async def take(self, group: int, *, wait: bool = True) -> tuple[str, dict] | None:
        """The next job for a free place of a worker; None: there is none any more. A job's `attempt` counts from 1.

        After a restart those that the worker held come first, but for a job that keeps killing its worker.

        wait   False: `NOTHING` where no job is waiting now, every place is taken, or another worker has fewer: two
               that train at once are faster than one that packs
        """
        start, again = self.starts[group], self.again.get(group, [])
        job: tuple[str, dict] | None = None
        while again and job is None:
            job = again.pop(0)
            if self.attempts[job[0]] >= ATTEMPTS:
                await self._give_up(job[0], f"its worker died {ATTEMPTS} times (out of memory?)")
                job = None
        if job is None:
            others = [len(self.held.get(other, {})) for other in self.alive - {group} if self.starts[other]]
            mine = len(self.held.get(group, {}))
            if not wait and (self.waiting.empty() or mine >= self.pack or min(others, default=math.inf) < mine):
                return NOTHING
            job = await self.waiting.get()
            if start != self.starts[group]:  # who asked died while waiting: nobody would hear of this job
                await self.waiting.put(job)
                return None
        if job is None:
            return None
        job_id, work = job
        self.held.setdefault(group, {})[job_id] = work
        self.attempts[job_id] += 1
        return job_id, work | {"attempt": self.attempts[job_id]}

    async def limit(self, pack: int) -> None:
        """From now on a group has so many places."""
        self.pack = pack

    async def report(self, group: int, job_id: str, message: dict) -> bool:
        """Passes a report on; False tells the worker to stop this job.

        Of several workers of a group that report one job's end, each in its own trouble, the first is heard. A job that
        `asks` is answered when its next report is wanted (go on) or it is cancelled; then it holds no place any more,
        and may be submitted again.
        """
        work = self.held.get(group, {}).get(job_id)
        if work is None:
            return False
        if message["done"]:
            del self.held[group][job_id]
        await self.reports[job_id].put(message)
        if work.get("asks") and not message["done"] and job_id not in self.cancelled:
            answer = asyncio.get_running_loop().create_future()
            self.asking[job_id] = (group, answer)
            return await answer
        return job_id not in self.cancelled

    async def next_report(self, job_id: str) -> dict:
        if self.reports[job_id].empty():
            self._answer(job_id, True)
        message = await self.reports[job_id].get()
        if message["done"]:
            self.reports.pop(job_id, None)
        return message

    async def cancel(self, job_id: str) -> None:
        if not self._answer(job_id, False):
            self.cancelled.add(job_id)

    def _answer(self, job_id: str, go_on: bool) -> bool:
        """Tells the group that asks; False where none does."""
        if job_id not in self.asking:
            return False
        group, answer = self.asking.pop(job_id)
        if not go_on:
            self.held.get(group, {}).pop(job_id, None)
            self.attempts.pop(job_id, None)  # what it did so far is no sign that it kills its workers
            self.reports.pop(job_id, None)
        answer.set_result(go_on)
        return True

    async def lost(self, group: int, reason: str) -> None:
        """A group ended for good. When it was the last one, everything that waits is given up."""
        if group not in self.alive:
            return
        self.alive.discard(group)
        self.reason = reason
        for job_id in [*self.held.pop(group, {}), *(job_id for job_id, _ in self.again.pop(group, []))]:
            await self._give_up(job_id, reason)
        while not self.alive and not self.waiting.empty():
            job = self.waiting.get_nowait()
            if job is not None:
                await self._give_up(job[0], f"no worker is left: {reason}")

    async def close(self) -> None:
        """Every group ends after its jobs; one still under way (the driver was interrupted) ends at its next rung."""
        self.cancelled |= {job_id for held in self.held.values() for job_id in held}
        for job_id in list(self.asking):
            self._answer(job_id, False)
        for _ in range(len(self.alive)):
            await self.waiting.put(None)

    async def _give_up(self, job_id: str, reason: str) -> None:
        await self.reports[job_id].put({"done": True, "error": reason})


@dataclass(frozen=True)
class Plan:
    """How many worker groups of what size run at once, and how many trials each of them packs."""

    groups: int
    workers: int
    cpus_per_worker: int
    gpus_per_worker: float
    pack: int = 1

    @property
    def places(self) -> int:
        """Trials that train at once."""
        return self.groups * self.pack

    def describe(self) -> str:
        devices = f"{self.gpus_per_worker:g} GPU" if self.gpus_per_worker else f"{self.cpus_per_worker} CPU"
        if self.pack > 1:
            return f"{self.groups} worker(s) that train up to {self.pack} trials in one pass, {devices} each"
        return f"{self.groups} trial(s) at once, {self.workers} worker(s) each, {devices} a worker"


def plan(
    cluster: Mapping[str, float],
    *,
    workers_per_trial: int,
    cpus_per_worker: int,
    gpus_per_worker: float,
    max_concurrent: int,
    trials: int,
    pack: int = 1,
) -> Plan:
    """Fits worker groups to what the cluster holds. Rather another worker than another trial in a pack.

    Raises StudyError when not even one group fits, or fewer than `max_concurrent` asks for: a group that waits for
    resources that do not exist would wait for ever. Also for several workers of a trial with a part of a GPU each:
    Ray would put them on one, and NCCL refuses two ranks on one device.
    """
    cpus, gpus = cluster.get("CPU", 0.0), cluster.get("GPU", 0.0)
    wanted = (1.0 if gpus else 0.0) if gpus_per_worker < 0 else gpus_per_worker
    if workers_per_trial > 1 and 0 < wanted < 1:
        raise StudyError(
            f"{workers_per_trial} workers of one trial cannot share a GPU (gpus_per_worker={wanted:g}): use "
            "gpus_per_worker=1, or workers_per_trial=1 to have several trials share one"
        )
    fitting = int(cpus // (workers_per_trial * cpus_per_worker))
    if wanted:
        fitting = min(fitting, int(gpus / (workers_per_trial * wanted) + 1e-9))
    asked = f"{workers_per_trial} worker(s) of {cpus_per_worker} CPU and {wanted:g} GPU"
    if fitting < max(1, max_concurrent):
        count = f"{max_concurrent} times " if max_concurrent > 1 else ""
        raise StudyError(
            f"{count}{asked} do not fit the cluster's {cpus:g} CPU and {gpus:g} GPU: lower max_concurrent, "
            "workers_per_trial, cpus_per_worker or gpus_per_worker (num_cpus raises a local cluster's logical CPUs)"
        )
    groups = max_concurrent or (fitting if wanted else min(fitting, MOST_CPU_GROUPS))
    groups = min(groups, trials)
    return Plan(groups, workers_per_trial, cpus_per_worker, wanted, min(pack, -(-trials // groups)))


def connect(address: str, *, num_cpus: int = 0) -> dict[str, float]:
    """Starts a local Ray or joins a cluster; returns its total resources.

    Raises StudyError when the address does not answer, or no Ray can be started here.
    """
    options: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "configure_logging": True}
    if address == "local":
        options |= {"include_dashboard": False, "num_cpus": num_cpus or None}
    try:
        ray.init(address=address, logging_level=logging.ERROR, **options)
    except Exception as error:  # a node that takes too long to start raises no narrower class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if address == "local":
            raise StudyError(f"Ray cannot be started here ({reason}): is the machine out of memory or busy?") from None
        raise StudyError(
            f"ray_address={address} does not answer ({reason}): start a cluster with 'ray start --head', "
            "or use ray_address=local"
        ) from None
    return dict(ray.cluster_resources())


class Pool:
    """The worker groups of one study, and the board that they share."""

    def __init__(self, plan: Plan, *, study: str, setup: dict[str, Any], storage: str) -> None:
        self.plan = plan
        self.board_name = f"board-{study}"
        self._setup = setup
        self._storage = storage
        self._study = study
        self._threads: list[threading.Thread] = []
        self._asked = 0

    def start(self) -> None:
        """Starts the groups in threads of this process; returns at once."""
        self.board: Any = ray.remote(num_cpus=0)(Board).options(name=self.board_name)
        self.board = self.board.remote(self.plan.groups, self.plan.pack)
        for group in range(self.plan.groups):
            thread = threading.Thread(target=self._run_group, args=(group,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _run_group(self, group: int) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        from trainers.worker import serve

        resources = {"CPU": float(self.plan.cpus_per_worker)}
        if self.plan.gpus_per_worker:
            resources["GPU"] = self.plan.gpus_per_worker
        reason = "the worker group ended"
        try:
            TorchTrainer(
                serve,
                train_loop_config=self._setup | {"group": group, "board": self.board_name, "pack": self.plan.pack},
                torch_config=TorchConfig(timeout_s=LONGEST_WAIT),
                scaling_config=ScalingConfig(
                    num_workers=self.plan.workers,
                    use_gpu=self.plan.gpus_per_worker > 0,
                    resources_per_worker=resources,
                ),
                run_config=RunConfig(
                    name=f"{self._study}-{group}",
                    storage_path=self._storage,
                    # generous: the board gives up a job that kills its worker again and again
                    failure_config=FailureConfig(max_failures=1000),
                ),
            ).fit()
        except Exception as error:  # whatever ended it, the board has to hear, or trials would wait for ever
            reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        if ray.is_initialized():
            self.board.lost.remote(group, reason)

    def ask(self, job: dict[str, Any], *, told: Callable[[int, int, str], None]) -> dict[str, Any]:
        """Gives one job to whichever group is free first and waits for its answer; `told` hears (done, total, what).

        Raises StudyError when the workers cannot do it.
        """
        self._asked += 1
        job_id = f"ask-{self._asked}"
        ray.get(self.board.submit.remote(job_id, job))
        while not (answer := ray.get(self.board.next_report.remote(job_id)))["done"]:
            told(*answer["progress"])
        if "error" in answer:
            raise StudyError(answer["error"])
        return answer

    def limit(self, pack: int) -> None:
        """Packs no more than so many trials from now on."""
        self.plan = replace(self.plan, pack=min(pack, self.plan.pack))
        ray.get(self.board.limit.remote(self.plan.pack))

    def close(self, *, patience: float = 10.0) -> None:
        """Lets the groups end after their current job."""
        if ray.is_initialized():
            ray.get(self.board.close.remote())
            for thread in self._threads:
                thread.join(patience)


class TablePool:
    """Simulated workers for a study that asks a table: a board that reads it, and nobody who trains."""

    def __init__(self, answers: Mapping[str, Any], *, workers: int, study: str) -> None:
        self.plan = Plan(workers, 1, 0, 0.0)
        self.board_name = f"board-{study}"
        self._answers = answers

    def start(self) -> None:
        from search.replay import TableBoard

        board: Any = ray.remote(num_cpus=0)(TableBoard).options(name=self.board_name)
        self.board: Any = board.remote(self._answers, self.plan.groups)

    def idle(self, over: bool) -> None:
        """A free worker is given nothing until the next report, or ever again where the study is `over`."""
        ray.get(self.board.idle.remote(over=over))

    def cancel(self, job_id: str) -> None:
        """A job has left its worker."""
        ray.get(self.board.cancel.remote(job_id))

    def close(self) -> None:
        if ray.is_initialized():
            ray.get(self.board.close.remote())


def disconnect() -> None:
    """Ends the local Ray, or leaves the cluster."""
    ray.shutdown()


def driver_node() -> str:
    """The resource name that only this node has; trial handles stay here, so that Tune needs no shared folder."""
    return f"node:{ray.util.get_node_ip_address()}"
