"""The job queue between Tune's trial handles and warm workers. A plain asyncio class, which runs as a zero-CPU actor.

It holds the jobs that wait, the reports of each job, what each worker group is working on, and what was cancelled.
"""

from __future__ import annotations

import asyncio
import collections
import math
from typing import Literal

from allocators.core.messages import Assignment, Failed, Job, Report, TrainJob, is_end

ATTEMPTS = 3  # a job whose worker died this often is given up: it is the likely cause


class JobQueue:
    """Jobs of one study for so many worker groups.

    slots   trials that a group trains at once
    """

    def __init__(self, groups: int, slots: int = 1) -> None:
        self.slots = slots
        self.waiting: asyncio.Queue[tuple[str, Job] | None] = asyncio.Queue()  # None: a group may end
        self.reports: dict[str, asyncio.Queue[Report]] = collections.defaultdict(asyncio.Queue)
        self.held: dict[int, dict[str, Job]] = {}  # group -> the jobs in its slots
        self.again: dict[int, list[tuple[str, Job]]] = {}  # group -> the jobs that it held when it died
        self.starts: collections.Counter[int] = collections.Counter()
        self.attempts: collections.Counter[str] = collections.Counter()
        self.cancelled: set[str] = set()
        self.asking: dict[str, tuple[int, asyncio.Future[bool]]] = {}  # job -> the group that waits for an answer
        self.alive = set(range(groups))
        self.reason = ""

    async def submit(self, job_id: str, job: Job) -> None:
        """A job waits for a worker; where none is left, it fails at once."""
        if not self.alive:
            await self._give_up(job_id, f"no worker is left: {self.reason}")
        else:
            await self.waiting.put((job_id, job))

    async def start(self, group: int) -> None:
        """A worker begins, or begins anew after it died: it then takes what it held again, before anything else."""
        self.starts[group] += 1
        self.again[group] = list(self.held.pop(group, {}).items())

    async def take(self, group: int, *, wait: bool = True) -> Assignment | Literal["empty", "closed"]:
        """The next job for a free slot of a worker; "closed" where there will be none any more.

        After a restart the jobs that the worker held come first, but for a job that keeps killing its worker.

        wait   False: "empty" where no job is waiting now, every slot is taken, or another worker has fewer: two that
               train at once are faster than one that packs
        """
        start = self.starts[group]
        job = await self._held_before(group)
        if job is None:
            if not wait and (self.waiting.empty() or not self._is_next(group)):
                return "empty"
            job = await self.waiting.get()
            if start != self.starts[group]:  # the worker died while it waited: nobody would get this job
                await self.waiting.put(job)
                return "closed"
        if job is None:
            return "closed"
        job_id, work = job
        self.held.setdefault(group, {})[job_id] = work
        self.attempts[job_id] += 1
        return Assignment(job_id, work, self.attempts[job_id])

    async def _held_before(self, group: int) -> tuple[str, Job] | None:
        """The next of the jobs that the worker held when it died."""
        again = self.again.get(group, [])
        while again:
            job_id, work = again.pop(0)
            if self.attempts[job_id] < ATTEMPTS:
                return job_id, work
            await self._give_up(job_id, f"its worker died {ATTEMPTS} times (out of memory?)")
        return None

    def _is_next(self, group: int) -> bool:
        """Whether a worker has a free slot, and no other one that has started holds fewer jobs."""
        others = [len(self.held.get(other, {})) for other in self.alive - {group} if self.starts[other]]
        own = len(self.held.get(group, {}))
        return own < self.slots and own <= min(others, default=math.inf)

    async def limit(self, slots: int) -> None:
        """From now on a group has so many slots."""
        self.slots = slots

    async def report(self, group: int, job_id: str, report: Report) -> bool:
        """Passes a report on; False tells the worker to stop this job.

        If several workers of a group report the end of one job, the first report counts. A job that `asks` is answered
        when its next report is wanted (go on) or it is cancelled; then it holds no slot any more, and may be submitted
        again.
        """
        job, end = self.held.get(group, {}).get(job_id), is_end(report)
        if job is None:
            return False
        if end:
            del self.held[group][job_id]
        await self.reports[job_id].put(report)
        if isinstance(job, TrainJob) and job.asks and not end and job_id not in self.cancelled:
            answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            self.asking[job_id] = (group, answer)
            return await answer
        return job_id not in self.cancelled

    async def next_report(self, job_id: str) -> Report:
        """Waits for a job's next report; whoever asks for it after an evaluation lets the training go on."""
        if self.reports[job_id].empty():
            self._answer(job_id, True)
        report = await self.reports[job_id].get()
        if is_end(report):
            self.reports.pop(job_id, None)
        return report

    async def cancel(self, job_id: str) -> None:
        """The training ends at its next evaluation, or now if it waits at one for an answer."""
        if not self._answer(job_id, False):
            self.cancelled.add(job_id)

    def _answer(self, job_id: str, go_on: bool) -> bool:
        """Answers the group that asks; False where none does."""
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
        await self.reports[job_id].put(Failed(reason))
