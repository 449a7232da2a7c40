"""The job queue between Tune's trial handles and warm workers. A plain asyncio class, which runs as a zero-CPU actor.

It holds the jobs that wait, the reports of each job, what each worker group is working on, and what was cancelled. It
may be killed at any moment: Ray starts it again and sends the calls again that nobody has answered. So every call says
all that is needed to answer it, and may come twice: who asks for the reports of a job brings the job, and a worker
group keeps a call of `hold` open for every job that it works on.
"""

from __future__ import annotations

import asyncio
import collections
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from allocators.core.messages import Assignment, Failed, Finished, Job, Report, TrainJob, is_end

ATTEMPTS = 2  # a job whose worker died so often without an evaluation between is given up: it is the likely cause
GRACE = 3.0  # seconds after a restart of the queue in which groups say what they hold, before jobs are handed out
KEPT = 64  # ends of jobs that are kept for a reader that died with one


Happened = Literal["arrived", "took", "ended", "away"]


@dataclass(frozen=True)
class News:
    """Something that happened to a worker group.

    time    seconds since the epoch
    event   arrived (its processes run, the model is not loaded yet), took, ended (a job), away (its resources are gone)
    job     the job that it took or that ended
    node    where the worker that arrived runs
    worker  which of the group's workers that is, by rank
    """

    time: float
    event: Happened
    group: int
    life: int
    job: str = ""
    node: str = ""
    worker: int = 0


class JobQueue:
    """Jobs of one study for worker groups, of which there are so many at its beginning.

    Groups come and go: one that was never heard of is a group from its first call on, and one whose resources are gone
    keeps its place, but not its jobs.

    slots       trials that a group trains at once
    restarted   it was killed: groups may be at work, and have so many seconds (`grace`) to say what they hold
    """

    def __init__(self, groups: int, slots: int = 1, *, restarted: bool = False, grace: float = GRACE) -> None:
        self.slots = slots
        self.waiting: dict[str, Job] = {}
        self.reports: dict[str, collections.deque[Report]] = collections.defaultdict(collections.deque)
        self.readers: dict[str, object] = {}  # job -> the last that asked for its reports
        self.ended: dict[str, Report] = {}  # the last jobs that ended -> their last report
        self.held: dict[int, dict[str, Job]] = {}  # group -> the jobs in its slots
        self.again: dict[int, dict[str, Job]] = {}  # group -> the jobs that it held when it died
        self.lives: dict[int, int] = {}  # group -> number of its present life
        self.attempts: collections.Counter[str] = collections.Counter()
        self.deaths: collections.Counter[str] = collections.Counter()  # of workers with a job, since its last report
        self.heard: collections.Counter[int] = collections.Counter()  # reports of a group: they show that it works
        self.cancelled: set[str] = set()
        self.asking: dict[str, tuple[int, asyncio.Future[bool]]] = {}  # job -> the group that waits for an answer
        self.alive = set(range(groups))
        self.gone: set[int] = set()  # groups that ended for good
        self.away: set[int] = set()  # groups that wait for resources
        self.news: list[News] = []
        self.closed = False
        self.reason = ""
        self._changed = asyncio.Event()  # set, and replaced by a new one, whenever something changes
        self._restarted, self._grace, self._opens = restarted, grace, 0.0

    # --- who waits for results

    async def submit(self, job_id: str, job: Job) -> None:
        """A job waits for a worker, unless it is known already; where no worker is left, it fails at once."""
        if not self._is_known(job_id):
            self.cancelled.discard(job_id)
            self.ended.pop(job_id, None)
            self._offer(job_id, job)

    async def next_report(self, job_id: str, job: Job) -> Report:
        """Waits for a job's next report; submits the job where it is not known.

        Whoever asks for it after an evaluation lets the training go on. Of several readers the last is answered: the
        others died.
        """
        if not self._is_known(job_id):
            if job_id in self.ended:  # its reader died with the answer
                return self.ended[job_id]
            await self.submit(job_id, job)
        self.cancelled.discard(job_id)
        if not self.reports[job_id]:
            self._answer(job_id, True)
        reader = self.readers[job_id] = object()
        await self._until(lambda: self.readers.get(job_id) is not reader or bool(self.reports[job_id]))
        if self.readers.get(job_id) is not reader:
            return Failed("another reader has taken over")
        report = self.reports[job_id].popleft()
        if is_end(report):
            self._forget(job_id)
            if isinstance(report, Finished):
                self.ended[job_id] = report
                while len(self.ended) > KEPT:
                    self.ended.pop(next(iter(self.ended)))
        return report

    async def cancel(self, job_id: str) -> None:
        """The training ends at its next evaluation, or now if it waits at one for an answer."""
        if self.waiting.pop(job_id, None) is not None:
            self._forget(job_id)
        elif not self._answer(job_id, False):
            self.cancelled.add(job_id)
            self._forget(job_id)

    def _is_known(self, job_id: str) -> bool:
        return (
            job_id in self.waiting
            or bool(self.reports.get(job_id))
            or any(job_id in jobs for of in (self.held, self.again) for jobs in of.values())
        )

    def _offer(self, job_id: str, job: Job) -> None:
        if self.alive:
            self.waiting[job_id] = job
            self._tell()
        else:
            self._give_up(job_id, f"no worker is left: {self.reason}")

    def _forget(self, job_id: str) -> None:
        self.reports.pop(job_id, None)
        self.readers.pop(job_id, None)

    # --- worker groups

    async def arrive(self, group: int, life: int, node: str, worker: int = 0) -> None:
        """A process of a group runs; it loads the model next."""
        self._note("arrived", group, life, node=node, worker=worker)

    async def start(self, group: int, life: int) -> None:
        """A worker begins, or begins anew after it died: it then takes what it held again, before anything else."""
        self._is_current(group, life)

    async def take(self, group: int, life: int, *, wait: bool = True) -> Assignment | Literal["empty", "closed"]:
        """The next job for a free slot of a worker; "closed" where there will be none any more.

        After a restart the jobs that the worker held come first, but for a job that keeps killing its worker.

        wait   False: "empty" where no job is waiting now, every slot is taken, or another worker has fewer: two that
               train at once are faster than one that packs
        """
        if not self._is_current(group, life):
            return "closed"
        if (job := self._held_before(group)) is None:
            await self._open()
            if not wait and (not self.waiting or not self._is_next(group)):
                return "closed" if self.closed else "empty"
            await self._until(lambda: bool(self.waiting) or self.closed or self.lives[group] != life)
            if self.lives[group] != life or not self.waiting:
                return "closed"
            job_id = next(iter(self.waiting))
            job = job_id, self.waiting.pop(job_id)
        job_id, work = job
        self.held.setdefault(group, {})[job_id] = work
        self.attempts[job_id] += 1
        self._note("took", group, life, job_id)
        return Assignment(job_id, work, self.attempts[job_id])

    async def hold(self, group: int, life: int, job_id: str, job: Job) -> None:
        """Is answered when the group does not work on this job any more."""
        if self._adopt(group, life, job_id, job):
            await self._until(lambda: job_id not in self.held.get(group, {}) or self.lives[group] != life)

    async def report(self, group: int, life: int, job_id: str, job: Job, report: Report) -> bool:
        """Passes a report on; False tells the worker to stop this job.

        If several workers of a group report the end of one job, the first report counts. A job that `asks` is answered
        when its next report is wanted (go on) or it is cancelled; then it holds no slot any more, and may be submitted
        again. That a training was stopped is no news: it was cancelled, or the queue that went on with it was killed.
        """
        stopped, end = isinstance(report, Finished) and report.outcome.status == "stopped", is_end(report)
        if not self._adopt(group, life, job_id, job, is_new=not stopped):
            return False
        self.heard[group] += 1
        self.deaths.pop(job_id, None)
        if end:
            del self.held[group][job_id]
            self._note("ended", group, life, job_id)
        if stopped or job_id in self.cancelled:  # nobody wants to hear of it, or not of this
            if end:
                self.cancelled.discard(job_id)
                if job_id in self.readers:
                    self._offer(job_id, job)
                self._tell()
            return False
        self.reports[job_id].append(report)
        self._tell()
        if isinstance(job, TrainJob) and job.asks and not end:
            answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            self.asking[job_id] = (group, answer)
            return await answer
        return True

    async def reports_of(self, group: int) -> int:
        """How many reports a group has passed on, in all its lives."""
        return self.heard[group]

    async def limit(self, slots: int) -> None:
        """From now on a group has so many slots."""
        self.slots = slots

    async def expect(self, group: int) -> None:
        """A group was added, and comes unless it is said to be lost: jobs wait for it where the last other one is."""
        if group not in self.gone:
            self.alive.add(group)

    async def lost(self, group: int, reason: str) -> None:
        """A group ended for good. Others take over its jobs; when it was the last one, everything is given up."""
        if group in self.gone:
            return
        self.gone.add(group)
        self.alive.discard(group)
        self.reason = reason
        jobs = self.again.pop(group, {}) | self.held.pop(group, {})
        if not self.alive:
            jobs, self.waiting = jobs | self.waiting, {}
        for job_id, job in jobs.items():
            self.asking.pop(job_id, None)
            self._offer(job_id, job)
        self._tell()

    async def leave(self, group: int) -> None:
        """The resources of a group are gone, with its node perhaps: others take its jobs, before all that wait.

        That is no sign against a job. The group may begin anew.
        """
        self.away.add(group)
        self._note("away", group, self.lives.get(group, -1))
        jobs = self.again.pop(group, {}) | self.held.pop(group, {})
        for job_id in jobs:
            self.asking.pop(job_id, None)
            self.attempts.pop(job_id, None)
        self.waiting = jobs | self.waiting
        self._tell()

    async def heard_of(self) -> list[News]:
        """What happened to the groups since the last call."""
        news, self.news = self.news, []
        return news

    async def close(self) -> None:
        """Every group ends after its jobs; one still under way (the driver was interrupted) ends at its next rung."""
        self.cancelled |= {job_id for held in self.held.values() for job_id in held}
        for job_id in list(self.asking):
            self._answer(job_id, False)
        self.closed = True
        self._tell()

    async def until_closed(self) -> None:
        """Is answered when the queue is closed: who calls it hears before if the queue dies."""
        await self._until(lambda: self.closed)

    def _is_current(self, group: int, life: int) -> bool:
        """Whether this is a group's present life; a new one has died before, with what it held."""
        if group not in self.gone:
            self.alive.add(group)
        if life > self.lives.get(group, -1):
            self.lives[group] = life
            self.away.discard(group)
            before = self.held.pop(group, {})
            for job_id in before:
                self.asking.pop(job_id, None)
                self.deaths[job_id] += 1
            self.again[group] = self.again.get(group, {}) | before
            self._tell()
        return life == self.lives[group] and group in self.alive

    def _adopt(self, group: int, life: int, job_id: str, job: Job, *, is_new: bool = True) -> bool:
        """Whether the group works on this job, and no other does; a queue that was killed learns of it so."""
        if not self._is_current(group, life):
            return False
        if job_id in self.held.get(group, {}):
            return True
        others = any(job_id in jobs for other, jobs in self.held.items() if other != group)
        over = job_id in self.ended or any(map(is_end, self.reports.get(job_id, ())))
        if others or over or not (self._restarted and is_new):
            return False
        self.waiting.pop(job_id, None)
        self.held.setdefault(group, {})[job_id] = job
        self.attempts[job_id] += 1
        return True

    def _held_before(self, group: int) -> tuple[str, Job] | None:
        """The next of the jobs that the worker held when it died."""
        again = self.again.get(group, {})
        while again:
            job_id = next(iter(again))
            work = again.pop(job_id)
            if self.deaths[job_id] < ATTEMPTS:
                return job_id, work
            self._give_up(job_id, f"its worker died {ATTEMPTS} times (out of memory?)")
        return None

    def _is_next(self, group: int) -> bool:
        """Whether a worker has a free slot, and no other one that has started holds fewer jobs."""
        others = [len(self.held.get(other, {})) for other in self.alive - self.away - {group} if other in self.lives]
        own = len(self.held.get(group, {}))
        return own < self.slots and own <= min(others, default=math.inf)

    def _answer(self, job_id: str, go_on: bool) -> bool:
        """Answers the group that asks; False where none does."""
        if job_id not in self.asking:
            return False
        group, answer = self.asking.pop(job_id)
        if not go_on:
            self.held.get(group, {}).pop(job_id, None)
            self.attempts.pop(job_id, None)  # what it did so far is no sign that it kills its workers
            self._forget(job_id)
            self._tell()
        answer.set_result(go_on)
        return True

    def _give_up(self, job_id: str, reason: str) -> None:
        self.deaths.pop(job_id, None)
        self.reports[job_id].append(Failed(reason))
        self._tell()

    def _note(self, event: Happened, group: int, life: int, job: str = "", node: str = "", worker: int = 0) -> None:
        self.news.append(News(time.time(), event, group, life, job, node, worker))

    # --- waiting

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    async def _open(self) -> None:
        """After a restart: waits until groups have had the time to say what they hold."""
        if self._restarted:
            now = asyncio.get_running_loop().time
            self._opens = self._opens or now() + self._grace
            await asyncio.sleep(max(0.0, self._opens - now()))
