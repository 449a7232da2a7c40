"""Warm workers: Ray Train worker groups that start once a study and train trial after trial. Edge file: Ray.

Starting a TorchTrainer for every trial costs tens of CPU-seconds and reloads the base model each time. Here each group
is one `TorchTrainer(serve).fit()` that lives as long as the study (`steward.py`). A zero-CPU actor, the job queue,
holds jobs and reports; workers take jobs from it, Tune's trial handles wait on it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from search.engine import ENVIRONMENT

# Read when Ray is imported or started; a user's own settings stay.
for _name, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # `search/interrupts.py` is told of signals, and nobody else
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # else it writes three files a trial, of which nobody reads one
    "TUNE_GLOBAL_CHECKPOINT_S": "inf",  # nor its notes, which hold every trial: they are written at the end alone
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's summary would tear the live table, and verbose=0 does not silence it
    "RAY_worker_maximum_startup_concurrency": "16",  # below it the raylet warns of a dozen idle helpers on a laptop
    **ENVIRONMENT,  # Ray's processes inherit it
}.items():
    os.environ.setdefault(_name, _value)

import ray
from ray.exceptions import ActorUnavailableError, RayError
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
from search.engine import Facts, OnProgress, OnTested, StudyConductor, joining, tune
from search.engine.connect import GOES_ON, NAMESPACE, connect, disconnect, watch_ray
from search.engine.groups import Resources
from search.engine.queue import JobQueue
from search.engine.steward import Steward, in_a_line, queue_name
from trainers.worker_state import WorkerSetup

PATIENCE = 10.0  # seconds that `close` waits for a group to end
MOST_RESTARTS = 20  # of the job queue
log = logging.getLogger(__name__)


class RayWorkers:
    """The worker groups of one study, and the job queue that they share.

    study     its id: names its queue, and groups beside those of other studies of the cluster
    notes     where Ray Train keeps its own notes, of which a resume needs none
    here      a folder of this machine for those of Ray Tune
    logs      a folder of this machine for what workers print, and which of them took what
    """

    results = "trainings"
    processes = "driver, Ray and workers"

    def __init__(
        self, resources: Resources, setup: WorkerSetup, *, study: str, notes: str, here: Path, logs: Path
    ) -> None:
        self._resources = resources
        self._study = study
        self._here = here
        self._logs = logs
        self._asked = 0
        self._connected = False
        self._watching: threading.Thread | None = None
        self._closing = threading.Event()
        self._grows = resources.ray_address != "local"
        self._steward = Steward(resources, setup, study=study, notes=notes, logs=logs, grows=self._grows)

    def start(self) -> None:
        """Starts the groups in threads of this process; returns at once."""
        self._connected = not ray.is_initialized()
        self._joined = connect(self._resources.ray_address, num_cpus=self._resources.num_cpus, logs=self._logs)
        try:
            self._groups = self._steward.plan()
        except StudyError:
            self._disconnect()
            raise
        # On this node: where another one dies, the queue goes on. Calls that nobody answered are sent again.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = ray.remote(num_cpus=0, max_restarts=MOST_RESTARTS, max_task_retries=-1)(_Queue)
        named = actor.options(name=queue_name(self._study), namespace=NAMESPACE, scheduling_strategy=here)
        self._queue: Any = named.remote(self._groups.groups, self._groups.pack)
        self._steward.start(self._queue)
        self._watching = threading.Thread(target=self._watch_queue, daemon=True)
        self._watching.start()
        if self._connected:
            watch = partial(joining.watch_head, goes_on=GOES_ON) if self._grows else watch_ray
            threading.Thread(target=watch, args=(self._closing,), daemon=True).start()

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
                    for group in self._steward.numbers:
                        ray.get(self._queue.expect.remote(group))
                    for group, reason in self._steward.lost.items():
                        ray.get(self._queue.lost.remote(group, reason))
            except Exception as error:
                if not self._closing.is_set():
                    interrupts.fail(StudyError(f"the job queue died ({in_a_line(error)}): {GOES_ON}"))
                return

    def describe(self) -> str:
        """The number and size of the worker groups, and of the trials that each packs."""
        waits = self._steward.waits_for
        parts = [self._joined, f"starting workers: {self._groups.describe()}", waits]
        return "; ".join(part for part in parts if part)

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

        def slots() -> int:
            return max(self._steward.present, 1) * self._groups.pack

        queue = queue_name(self._study)
        with _named_deaths():
            tune.search(conductor, study=self._study, queue=queue, slots=slots, pausing=pausing, notes=self._here)

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
        self._steward.close()
        if interrupts.came():
            return
        if self._watching is None:  # nothing was started, because a cluster could not be joined
            self._disconnect()
            return
        ended = True
        if ray.is_initialized():
            with contextlib.suppress(RayError):
                ray.get(self._queue.close.remote())
            until = time.monotonic() + PATIENCE
            ended = self._steward.join(until)
            self._watching.join(max(until - time.monotonic(), 0.0))
        if not ended or self._watching.is_alive():
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
        raise StudyError(f"Ray does not answer ({in_a_line(error)}): {GOES_ON}") from None
