"""Warm workers: Ray Train worker groups that start once a study and train trial after trial. Edge file: Ray.

Starting a TorchTrainer for every trial costs tens of CPU-seconds and reloads the base model each time. Here each group
is one `TorchTrainer(serve).fit()` that lives as long as the study. A zero-CPU actor, the job queue, holds jobs and
reports; workers take jobs from it, Tune's trial handles wait on it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from search.engine import ENVIRONMENT

# Read when Ray is imported or started; a user's own settings stay.
for _name, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's summary would tear the live table, and verbose=0 does not silence it
    "RAY_worker_maximum_startup_concurrency": "16",  # below it the raylet warns of a dozen idle helpers on a laptop
    **ENVIRONMENT,  # Ray's processes inherit it
}.items():
    os.environ.setdefault(_name, _value)

import ray

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
from search.engine import Facts, OnProgress, OnTested, StudyConductor, tune
from search.engine.groups import Resources
from search.engine.queue import JobQueue
from trainers.worker_state import WorkerSetup

# Seconds that the workers of one trial wait for the first of them, which waits for a trial or measures a signal:
# torch's half an hour would end groups that have nothing to do while others train.
LONGEST_WAIT = 7 * 24 * 3600
PATIENCE = 10.0  # seconds that `close` waits for a group to end


def connect(address: str, *, num_cpus: int = 0) -> dict[str, float]:
    """Starts a local Ray or joins a cluster, unless this process did so before; returns its total resources.

    Raises StudyError when the address does not answer, or no Ray can be started here.
    """
    if ray.is_initialized():
        return dict(ray.cluster_resources())
    options: dict[str, Any] = {"namespace": tune.NAMESPACE, "log_to_driver": False, "configure_logging": True}
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


class RayWorkers:
    """The worker groups of one study, and the job queue that they share.

    study     its id: names its queue, and groups beside those of other studies of the cluster
    notes     where Ray Train keeps its own notes, of which a resume needs none
    """

    results = "trainings"
    processes = "driver, Ray and workers"

    def __init__(self, resources: Resources, setup: WorkerSetup, *, study: str, notes: str) -> None:
        self._resources = resources
        self._setup = setup
        self._study = study
        self._notes = notes
        self._queue_name = f"queue-{study}"
        self._threads: list[threading.Thread] = []
        self._asked = 0

    def start(self) -> None:
        """Starts the groups in threads of this process; returns at once."""
        self._connected = not ray.is_initialized()
        cluster = connect(self._resources.ray_address, num_cpus=self._resources.num_cpus)
        try:
            self._groups = self._resources.groups_in(cluster)
        except StudyError:
            self._disconnect()
            raise
        actor: Any = ray.remote(num_cpus=0)(JobQueue)
        named = actor.options(name=self._queue_name, namespace=tune.NAMESPACE)
        self._queue: Any = named.remote(self._groups.groups, self._groups.pack)
        for group in range(self._groups.groups):
            thread = threading.Thread(target=self._run_group, args=(group,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _run_group(self, group: int) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        from trainers.worker import serve

        resources = {"CPU": float(self._groups.cpus_per_worker)}
        if self._groups.gpus_per_worker:
            resources["GPU"] = self._groups.gpus_per_worker
        reason = "the worker group ended"
        try:
            TorchTrainer(
                serve,
                train_loop_config={
                    "setup": self._setup,
                    "queue": self._queue_name,
                    "namespace": tune.NAMESPACE,
                    "group": group,
                    "slots": self._groups.pack,
                },
                torch_config=TorchConfig(timeout_s=LONGEST_WAIT),
                scaling_config=ScalingConfig(
                    num_workers=self._groups.workers,
                    use_gpu=self._groups.gpus_per_worker > 0,
                    resources_per_worker=resources,
                ),
                run_config=RunConfig(
                    name=f"{self._study}-{group}",
                    storage_path=self._notes,
                    # generous: the queue gives up a job that kills its worker again and again
                    failure_config=FailureConfig(max_failures=1000),
                ),
            ).fit()
        except Exception as error:  # whatever ended it, the queue has to know, or trials would wait for ever
            reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        if ray.is_initialized():
            self._queue.lost.remote(group, reason)

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
        job_id = self._submit(question)
        while True:
            report: Progressed | Failed | Answer = ray.get(self._queue.next_report.remote(job_id))
            match report:
                case Progressed(done, total, what):
                    on_progress(done, total, what)
                case Failed(reason):
                    raise StudyError(reason)
                case answer:
                    return answer

    def _submit(self, question: Question) -> str:
        """The name under which its reports come."""
        self._asked += 1
        job_id = f"ask-{self._asked}"
        ray.get(self._queue.submit.remote(job_id, question))
        return job_id

    def search(self, conductor: StudyConductor, *, pausing: bool) -> None:
        """Ray Tune runs the trials; raises StudyError where it cannot."""
        slots = self._groups.slots
        tune.search(conductor, study=self._study, queue=self._queue_name, slots=slots, pausing=pausing)

    def test(self, jobs: Sequence[TestJob], on_tested: OnTested) -> None:
        """All groups at once, an adapter each."""
        asked = {self._submit(job): job for job in jobs}
        waiting = {self._queue.next_report.remote(job_id): job_id for job_id in asked}
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            on_tested(asked[waiting.pop(ready)], ray.get(ready))

    def close(self) -> None:
        """Lets the groups end after their current job, and ends the local Ray or leaves the cluster."""
        if ray.is_initialized():
            ray.get(self._queue.close.remote())
            for thread in self._threads:
                thread.join(PATIENCE)
        self._disconnect()

    def _disconnect(self) -> None:
        """Leaves a Ray alone that this process had started or joined before."""
        if self._connected:
            ray.shutdown()
