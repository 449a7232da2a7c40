"""Warm workers: Ray Train worker groups that start once a study and train trial after trial. Edge file: Ray.

Starting a TorchTrainer for every trial costs tens of CPU-seconds and reloads the base model each time. Here each group
is one `TorchTrainer(serve).fit()` that lives as long as the study. A zero-CPU actor, the job queue, holds jobs and
reports; workers take jobs from it, Tune's trial handles wait on it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from search.engine import ENVIRONMENT

# Read when Ray is imported or started; a user's own settings stay.
for _name, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # `search/interrupts.py` is told of signals, and nobody else
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's summary would tear the live table, and verbose=0 does not silence it
    "RAY_worker_maximum_startup_concurrency": "16",  # below it the raylet warns of a dozen idle helpers on a laptop
    **ENVIRONMENT,  # Ray's processes inherit it
}.items():
    os.environ.setdefault(_name, _value)

import psutil
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from allocators.core.errors import StudyError
from allocators.core.messages import (
    Answer,
    Failed,
    PackChosen,
    PackJob,
    Progressed,
    Question,
    SignalJob,
    SignalMeasured,
    TaskDescribed,
    TaskJob,
    TestJob,
    UntrainedEvaluated,
    UntrainedJob,
)
from allocators.core.types import Signal, SignalKind
from search import interrupts
from search.engine import Facts, OnProgress, OnTested, StudyConductor, tune
from search.engine.connect import GOES_ON, NAMESPACE, connect, disconnect, watch_ray
from search.engine.groups import Resources
from search.engine.queue import JobQueue
from trainers import models
from trainers.worker_state import WorkerSetup

# Seconds that the workers of one trial wait for the first of them, which waits for a trial or measures a signal:
# torch's half an hour would end groups that have nothing to do while others train.
LONGEST_WAIT = 7 * 24 * 3600
PATIENCE = 10.0  # seconds that `close` waits for a group to end
MOST_DEATHS = 3  # of a worker group without a report between: then it is not started again
NO_RETRIES: dict[str, Any] = {"max_preemption_failures": 0, "controller_failure_limit": 0}
TOO_LATE = "WorkerGroupStartupTimeoutError"  # Ray Train's, which waits half a minute for a group's resources
MOST_RESTARTS = 20  # of the job queue
log = logging.getLogger(__name__)


class RayWorkers:
    """The worker groups of one study, and the job queue that they share.

    study     its id: names its queue, and groups beside those of other studies of the cluster
    notes     where Ray Train keeps its own notes, of which a resume needs none
    here      a folder of this machine for those of Ray Tune
    """

    results = "trainings"
    processes = "driver, Ray and workers"

    def __init__(self, resources: Resources, setup: WorkerSetup, *, study: str, notes: str, here: Path) -> None:
        self._resources = resources
        self._setup = setup
        self._study = study
        self._notes = notes
        self._here = here
        self._queue_name = f"queue-{study}"
        self._threads: list[threading.Thread] = []
        self._asked = 0
        self._closing = threading.Event()
        self._lost: dict[int, str] = {}  # groups that ended for good, and why

    def start(self) -> None:
        """Starts the groups in threads of this process; returns at once."""
        self._connected = not ray.is_initialized()
        cluster = connect(self._resources.ray_address, num_cpus=self._resources.num_cpus)
        try:
            self._groups = self._resources.groups_in(cluster)
        except StudyError:
            self._disconnect()
            raise
        # On this node: where another one dies, the queue goes on. Calls that nobody answered are sent again.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = ray.remote(num_cpus=0, max_restarts=MOST_RESTARTS, max_task_retries=-1)(_Queue)
        named = actor.options(name=self._queue_name, namespace=NAMESPACE, scheduling_strategy=here)
        self._queue: Any = named.remote(self._groups.groups, self._groups.pack)
        for group in range(self._groups.groups):
            thread = threading.Thread(target=self._run_group, args=(group,), daemon=True)
            thread.start()
            self._threads.append(thread)
        watching = threading.Thread(target=self._watch_queue, daemon=True)
        watching.start()
        self._threads.append(watching)
        if self._connected and self._resources.ray_address == "local":
            threading.Thread(target=watch_ray, args=(self._closing,), daemon=True).start()

    def _run_group(self, group: int) -> None:
        """Starts a worker group, and again when it died, until it dies too often without a report between."""
        deaths, heard = 0, 0
        for life in itertools.count():
            reason = self._live(group, life)
            if self._closing.is_set():
                return
            if reason is None:
                self._give_up(group, "the worker group ended")
                return
            if TOO_LATE in reason:  # others have the resources, or the machine is busy: nobody died
                continue
            try:
                now = ray.get(self._queue.reports_of.remote(group))
            except RayError:  # the queue is gone for good, and whoever watches it says so
                return
            deaths, heard = 1 if now > heard else deaths + 1, now
            if deaths >= MOST_DEATHS:
                often = f"it died {deaths} times without a report between, the last time because {reason}"
                self._give_up(group, f"{often} ({self._memory()})")
                return
            log.warning("worker group %d is started again: %s", group, reason)

    def _live(self, group: int, life: int) -> str | None:
        """One life of a worker group; why it died, None where it ended by itself."""
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        from trainers.worker import serve

        resources = {"CPU": float(self._groups.cpus_per_worker)}
        if self._groups.gpus_per_worker:
            resources["GPU"] = self._groups.gpus_per_worker
        try:
            TorchTrainer(
                serve,
                train_loop_config={
                    "setup": self._setup,
                    "queue": self._queue_name,
                    "namespace": NAMESPACE,
                    "group": group,
                    "life": life,
                    "slots": self._groups.pack,
                },
                torch_config=TorchConfig(timeout_s=LONGEST_WAIT),
                scaling_config=ScalingConfig(
                    num_workers=self._groups.workers,
                    use_gpu=self._groups.gpus_per_worker > 0,
                    resources_per_worker=resources,
                ),
                run_config=RunConfig(
                    name=f"{self._study}-{group}-{life}",
                    storage_path=self._notes,
                    # none: whatever dies, controller or worker, `_run_group` starts anew and counts
                    failure_config=FailureConfig(max_failures=0, **NO_RETRIES),
                ),
            ).fit()
        except Exception as error:  # whatever ended it, the queue has to know, or trials would wait for ever
            return _in_a_line(error)
        return None

    def _give_up(self, group: int, reason: str) -> None:
        self._lost[group] = reason
        with contextlib.suppress(RayError):
            ray.get(self._queue.lost.remote(group, reason))

    def _memory(self) -> str:
        """What there is of memory on this machine, and what a worker asks for at least."""
        memory = psutil.virtual_memory()
        there = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB are free here"
        count = self._groups.groups * self._groups.workers
        try:
            files = models.folder_of(self._setup.model).glob("*.safetensors")
            weights = sum(file.stat().st_size for file in files)
        except (OSError, StudyError):
            return f"{there}, for {count} worker(s)"
        return f"{there}; each of {count} worker(s) loads weights of {weights / 2**30:.2g} GiB"

    def _watch_queue(self) -> None:
        """Says that the queue died, and tells the new one what only this process knows."""
        while not self._closing.is_set():
            try:
                ray.get(self._queue.until_closed.options(max_task_retries=0).remote())
            except ActorUnavailableError:
                if self._closing.is_set():
                    return
                log.warning("the job queue died and is started again; trainings go on")
                with contextlib.suppress(RayError):
                    ray.get(self._queue.limit.remote(self._groups.pack))
                    for group, reason in self._lost.items():
                        ray.get(self._queue.lost.remote(group, reason))
            except Exception as error:
                if not self._closing.is_set():
                    interrupts.fail(StudyError(f"the job queue died ({_in_a_line(error)}): {GOES_ON}"))
                return

    def describe(self) -> str:
        """The number and size of the worker groups, and of the trials that each packs."""
        return f"starting workers: {self._groups.describe()}"

    def facts(self) -> Facts:
        """The task in one line, and the versions that decide whether a training can be reused."""
        answer = self._ask(TaskJob())
        assert isinstance(answer, TaskDescribed)
        return Facts.of(answer)

    def untrained(self) -> UntrainedEvaluated:
        """Accuracy of the base alone."""
        answer = self._ask(UntrainedJob())
        assert isinstance(answer, UntrainedEvaluated)
        return answer

    def measure(self, kind: SignalKind, on_progress: OnProgress) -> Signal:
        """The signal, measured by the group that is free first or read from the cache."""
        answer = self._ask(SignalJob(kind), on_progress)
        assert isinstance(answer, SignalMeasured)
        return answer.signal

    def choose_pack(self, job: PackJob) -> str:
        """As many as the timed steps of a free group advise, and no more than were planned."""
        answer = self._ask(job)
        assert isinstance(answer, PackChosen)
        self._groups = replace(self._groups, pack=min(answer.pack, self._groups.pack))
        ray.get(self._queue.limit.remote(self._groups.pack))
        return f"packs of {self._groups.pack}: {answer.why}"

    def _ask(self, question: Question, on_progress: OnProgress = lambda *_: None) -> Answer:
        """Gives a question to whichever group is free first and waits for its answer.

        Raises StudyError when the workers cannot answer it.
        """
        job_id = self._new_job()
        while True:
            report: Progressed | Failed | Answer = ray.get(self._queue.next_report.remote(job_id, question))
            match report:
                case Progressed(done, total, what):
                    on_progress(done, total, what)
                case Failed(reason):
                    raise StudyError(reason)
                case answer:
                    return answer

    def _new_job(self) -> str:
        """The name under which reports come."""
        self._asked += 1
        return f"ask-{self._asked}"

    def search(self, conductor: StudyConductor, *, pausing: bool) -> None:
        """Ray Tune runs the trials; raises StudyError where it cannot."""
        slots = self._groups.slots
        with _named_deaths():
            tune.search(
                conductor, study=self._study, queue=self._queue_name, slots=slots, pausing=pausing, notes=self._here
            )

    def test(self, jobs: Sequence[TestJob], on_tested: OnTested) -> None:
        """All groups at once, an adapter each."""
        with _named_deaths():
            asked = {self._new_job(): job for job in jobs}
            waiting = {self._queue.next_report.remote(job_id, job): job_id for job_id, job in asked.items()}
            while waiting:
                (ready,), _ = ray.wait(list(waiting), num_returns=1)
                on_tested(asked[waiting.pop(ready)], ray.get(ready))

    def close(self) -> None:
        """Lets the groups end after their current job, and ends the local Ray or leaves the cluster.

        Where the process is being ended, or a group does not end, it does neither: what is its own of Ray ends with the
        process, and Ray's code would end the process at once where a thread asks for something that was shut down.
        """
        self._closing.set()
        if interrupts.came():
            return
        if ray.is_initialized():
            with contextlib.suppress(RayError):
                ray.get(self._queue.close.remote())
            until = time.monotonic() + PATIENCE
            for thread in self._threads:
                thread.join(max(until - time.monotonic(), 0.0))
        if any(thread.is_alive() for thread in self._threads):
            interrupts.abandon()
        else:
            self._disconnect()

    def _disconnect(self) -> None:
        """Leaves a Ray alone that this process had started or joined before."""
        if self._connected:
            disconnect()


class _Queue(JobQueue):
    """The job queue as an actor, which knows whether Ray started it again."""

    def __init__(self, groups: int, slots: int) -> None:
        super().__init__(groups, slots, restarted=ray.get_runtime_context().was_current_actor_reconstructed)


@contextlib.contextmanager
def _named_deaths() -> Iterator[None]:
    """What dies with Ray, in one line."""
    try:
        yield
    except RayError as error:
        raise StudyError(f"Ray does not answer ({_in_a_line(error)}): {GOES_ON}") from None


def _in_a_line(error: BaseException) -> str:
    """Why a worker group ended, without the stacks that Ray's messages carry."""
    from ray.train import ControllerError, WorkerGroupError

    match error:
        case WorkerGroupError(worker_failures=failures) if failures:
            return f"a worker: {_in_a_line(next(iter(failures.values())))}"
        case ControllerError(controller_failure=failure):
            return _in_a_line(failure)
        case ActorDiedError():
            return "its process was killed or ended by itself"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1][:200] if lines else 'no message'}"
