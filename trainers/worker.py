"""What runs on every Ray Train worker for a whole study: one base model, then job after job. Edge file: ray.train.

What a job is and how it ends: `trainers/worker_state.py`; several trials in one pass: `trainers/worker_slots.py`. A
worker that dies is started again by the driver, takes its job again and goes on from the trial's last checkpoint.

Several workers of one trial agree on an error before they raise it. What strikes one of them alone, in the middle of
what they do together (a fault of the program; out of memory in a pass through a sharded model), leaves the others
waiting: that worker reports the end of the job and ends itself, and Ray Train starts the group anew.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from allocators.core.errors import ToolkitError
from allocators.core.messages import (
    Assignment,
    End,
    Failed,
    Finished,
    Job,
    Progressed,
    Question,
    Report,
    RungReached,
    TrainJob,
    is_end,
)
from allocators.core.types import Rung
from trainers.worker_slots import WorkerSlots
from trainers.worker_state import WorkerState, has_lost_others, in_words


def serve(config: dict[str, Any]) -> None:
    """The loop of one worker of a group.

    config   setup (WorkerSetup), queue and namespace (of the job queue's actor), group (this group's number), life
             (how often it died before), slots (trials of a worker)
    """
    from ray.train.torch import get_device

    ranks, queue = Ranks.of_this_worker(), _queue(config)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    queue.arrive(ranks.rank)
    try:
        state = WorkerState(config["setup"], get_device())
    except Exception as error:  # nothing can be trained: say why once instead of being restarted for ever
        if has_lost_others(error):
            raise
        queue.lost(in_words(error))
        return
    if ranks.leads:
        queue.start()
    if config["slots"] > 1 and not ranks.several:
        WorkerSlots(state, config["slots"], queue).serve()
    else:
        _GroupMember(state, queue, ranks).serve()


class QueueClient:
    """The job queue (`search/engine/queue.py`) as one worker group sees it. It may be killed: Ray sends calls again."""

    def __init__(self, name: str, namespace: str, group: int, life: int) -> None:
        import ray

        self._get, self._node = ray.get, ray.get_runtime_context().get_node_id()
        self._queue: Any = ray.get_actor(name, namespace=namespace)
        self._group, self._life = group, life
        self._jobs: dict[str, tuple[Job, Any]] = {}  # what this group works on, with the open call that says so

    def arrive(self, rank: int) -> None:
        """Tells the queue that this process of the group runs, and where."""
        self._get(self._queue.arrive.remote(self._group, self._life, self._node, rank))

    def start(self) -> None:
        """Tells the queue that this group begins, or begins anew."""
        self._get(self._queue.start.remote(self._group, self._life))

    def take(self, *, wait: bool = True) -> Assignment | Literal["empty", "closed"]:
        """The next job; waits for one unless `wait` is False."""
        taken: Assignment | Literal["empty", "closed"]
        taken = self._get(self._queue.take.remote(self._group, self._life, wait=wait))
        if isinstance(taken, Assignment):
            open_call = self._queue.hold.remote(self._group, self._life, taken.job_id, taken.job)
            self._jobs[taken.job_id] = taken.job, open_call
        return taken

    def note(self, taken: Assignment) -> None:
        """For a worker that does not lead: a job that the leading one took."""
        self._jobs.setdefault(taken.job_id, (taken.job, None))

    def report(self, job_id: str, report: Report) -> bool:
        """Whether the job goes on; waits for the answer where the conductor may pause."""
        goes_on: bool = self._get(self._send(job_id, report))
        if is_end(report):
            self._jobs.pop(job_id, None)
        return goes_on

    def progress(self, job_id: str) -> Callable[[int, int, str], None]:
        """Reports how far a measurement is, twice a second at most."""
        return _now_and_then(partial(self._pass_on, job_id))

    def lost(self, reason: str) -> None:
        """Tells the queue that this group ended for good."""
        self._get(self._queue.lost.remote(self._group, reason))

    def _pass_on(self, job_id: str, done: int, total: int, what: str) -> None:
        self._send(job_id, Progressed(done, total, what))  # nobody waits for the answer

    def _send(self, job_id: str, report: Report) -> Any:
        job, _ = self._jobs[job_id]
        return self._queue.report.remote(self._group, self._life, job_id, job, report)


def _queue(config: dict[str, Any]) -> QueueClient:
    return QueueClient(config["queue"], config["namespace"], config["group"], config["life"])


@dataclass(frozen=True)
class Ranks:
    """The workers of one group. Rank 0 leads: it takes jobs and reports, and shares what the queue said."""

    rank: int
    several: bool

    @classmethod
    def of_this_worker(cls) -> Ranks:
        """Asks Ray Train, inside a worker."""
        from ray.train import get_context

        context = get_context()
        return cls(context.get_world_rank(), context.get_world_size() > 1)

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def shared(self, value: Any) -> Any:  # Any: torch.distributed broadcasts whatever pickles
        """Rank 0's value, on every worker."""
        import torch.distributed as dist

        box = [value]
        if self.several:
            dist.broadcast_object_list(box, src=0)
        return box[0]


class _GroupMember:
    """One worker of a group that does one job at a time.

    Where another worker of the group is gone it reports nothing and ends: the group starts anew, and its job goes on.
    """

    def __init__(self, state: WorkerState, queue: QueueClient, ranks: Ranks) -> None:
        self._state, self._queue, self._ranks = state, queue, ranks

    def serve(self) -> None:
        """Until the queue is closed."""
        while isinstance(taken := self._ranks.shared(self._queue.take() if self._ranks.leads else None), Assignment):
            self._queue.note(taken)
            match taken.job:
                case TrainJob() as job:
                    self._train(taken.job_id, job)
                case question:
                    self._answer(taken.job_id, question)

    def _train(self, job_id: str, job: TrainJob) -> None:
        def on_rung(rung: Rung) -> bool:
            return self._report(job_id, RungReached(rung))

        outcome = self._state.train(job, report=on_rung, leads=self._ranks.leads)
        self._end(job_id, Finished(outcome), broken=self._state.broken)
        if self._state.device_broke:
            raise RuntimeError(f"ended after {job_id}, so that the group starts anew: {outcome.message}")

    def _answer(self, job_id: str, question: Question) -> None:
        together, leads, broken = self._state.needs_all(question), self._ranks.leads, False
        end: End | None = None
        if leads:
            self._state.progress = self._queue.progress(job_id)
        try:
            if together:
                end = self._state.answer(question, leads=leads, shared=self._ranks.shared)
            elif leads:
                end = self._state.answer(question)
        except Exception as error:  # the driver decides what a missing signal means
            if has_lost_others(error):
                raise
            end = Failed(in_words(error))
            broken = together and not isinstance(error, ToolkitError)
        self._end(job_id, end, broken=broken)

    def _end(self, job_id: str, end: End | None, *, broken: bool) -> None:
        """Reports the end of a job; None: this worker does not lead and has nothing to say."""
        if broken and self._ranks.several and end is not None:  # nobody there to agree with
            self._queue.report(job_id, end)
            raise RuntimeError(f"ended in the middle of {job_id}, so that the group starts anew: {end}")
        self._report(job_id, end)

    def _report(self, job_id: str, report: Report | None) -> bool:
        """Whether the job goes on, as the queue told rank 0."""
        go_on = self._queue.report(job_id, report) if self._ranks.leads and report is not None else None
        goes_on: bool = self._ranks.shared(go_on)
        return goes_on


def _now_and_then(
    progress: Callable[[int, int, str], None], *, seconds: float = 0.5
) -> Callable[[int, int, str], None]:
    """`progress`, called at most once in so many seconds."""
    last = 0.0

    def seldom(done: int, total: int, what: str) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= seconds:
            last = now
            progress(done, total, what)

    return seldom
