"""What the platform takes away is no result: it is trained again, and nothing is lost or trained twice by a kill."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.strategies import integers
from rich.console import Console

from allocators.core.errors import StudyError
from allocators.core.messages import Assignment, Failed, Finished, Report, RungReached, TrainJob
from allocators.core.types import Outcome, Rung, Trial
from search.engine.queue import JobQueue
from search.problem import Proposal
from search.records import LINES, read
from search.records.folder import StudyFolder
from search.records.tracking import Tracker
from search.report.live import Progress
from search.study import MOST_LOST, Conductor, trainings_left
from tests.search.propose.test_sampler import problem as search_problem
from tests.search.studies import CONFIG, identity_of, open_study, outcome, started

PROBLEM = search_problem()
RUNGS, SLOTS = 3, 2


class NoTracker:
    """No runs: what MLflow is told is tested elsewhere."""

    def started(self, outcome: Outcome) -> None: ...

    def rung(self, digest: str, rung: Rung) -> None: ...

    def finished(self, outcome: Outcome) -> None: ...


def opened(folder: Path) -> StudyFolder:
    return StudyFolder.open(folder, config=CONFIG, identity=identity_of(PROBLEM), shape=PROBLEM.shape)


def conductor_of(records: StudyFolder, trials: int, **more: Any) -> Conductor:
    progress = Progress(trials, console=Console(quiet=True), done=records.points)
    names: dict[str, Any] = {"sampler": "random", "deadline": None, "keep": "all", "trials": trials}
    return Conductor(PROBLEM, records, cast(Tracker, NoTracker()), progress, **names | more)


def proposed(conductor: Conductor) -> Proposal:
    proposal = conductor.propose()
    assert isinstance(proposal, Proposal)
    return proposal


def ended(proposal: Proposal) -> Outcome:
    accuracy = random.Random(proposal.trial.digest).random()
    rungs = tuple(rung_of(proposal.trial, step) for step in range(1, RUNGS + 1))
    return Outcome(proposal.trial, "complete", proposal.trainable_params, accuracy, rungs)


def rung_of(trial: Trial, step: int) -> Rung:
    return Rung(step, 10 * step, random.Random(f"{trial.digest} {step}").random())


def finished_lines(folder: Path) -> Counter[str]:
    lines = [json.loads(line) for line in (folder / LINES).read_text().splitlines()]
    trials = [line["outcome"]["trial"] for line in lines if line["event"] == "finished"]
    return Counter(Trial.from_json(trial).digest for trial in trials)


# --- the conductor


def test_a_lost_training_is_proposed_again_at_once_and_does_not_count_as_a_trial(tmp_path: Path) -> None:
    with opened(tmp_path) as records:
        conductor = conductor_of(records, 3)
        first = proposed(conductor)
        conductor.lost(first.trial.digest, "its controller was killed")
        assert records.outcomes[first.trial.digest].status == "lost"
        assert trainings_left(PROBLEM, records, trials=3, seeds=1) == (3, 0)
        assert proposed(conductor).trial == first.trial
        conductor.finished(ended(first))
        for _ in range(2):
            conductor.finished(ended(proposed(conductor)))
        assert conductor.propose() is None
        assert [o.status for o in records.finished.values()] == ["complete"] * 3
        assert records.lost == {first.trial.digest: 1}


def test_three_in_a_row_end_the_study_and_an_evaluation_between_them_does_not(tmp_path: Path) -> None:
    with opened(tmp_path) as records:
        conductor = conductor_of(records, 8)
        for step in range(1, 2 * MOST_LOST):  # it comes a step further each time
            proposal = proposed(conductor)
            conductor.rung(proposal.trial.digest, rung_of(proposal.trial, step))
            conductor.lost(proposal.trial.digest, "its worker was killed")
        for number in range(1, MOST_LOST):
            proposal = proposed(conductor)
            if number + 1 < MOST_LOST:
                conductor.lost(proposal.trial.digest, "the disk is full")
        with pytest.raises(StudyError, match=r"3 trainings in a row were lost.*the disk is full.*same command goes on"):
            conductor.lost(proposal.trial.digest, "the disk is full")
        assert not records.finished


def test_a_training_that_kills_its_workers_comes_last_and_another_point_takes_its_place(tmp_path: Path) -> None:
    with opened(tmp_path) as records:
        conductor = conductor_of(records, 3)
        killer = proposed(conductor)
        conductor.lost(killer.trial.digest, "its worker died 2 times", again=False)
        order = []
        while isinstance(proposal := conductor.propose(), Proposal):
            order.append(proposal.trial.digest)
            if proposal.trial == killer.trial:
                conductor.lost(proposal.trial.digest, "its worker died 2 times", again=False)
            else:
                conductor.finished(ended(proposal))
        assert order[-2:] == [killer.trial.digest] * 2
        assert len(order) == 4
        assert conductor.given_up == {killer.trial.digest: "its worker died 2 times"}
    with opened(tmp_path) as records:  # the next run tries it again
        conductor = conductor_of(records, 3)
        assert proposed(conductor).trial == killer.trial
        conductor.finished(ended(killer))
        assert conductor.propose() is None


def test_a_run_that_goes_on_begins_with_what_was_lost(tmp_path: Path) -> None:
    with opened(tmp_path) as records:
        conductor = conductor_of(records, 2)
        lost = proposed(conductor)
        conductor.rung(lost.trial.digest, rung_of(lost.trial, 1))
        conductor.lost(lost.trial.digest, "its worker was killed")
    assert [(o.status, len(o.rungs)) for o, _ in read(tmp_path).in_flight] == [("lost", 1)]
    with opened(tmp_path) as records:
        conductor = conductor_of(records, 2)
        assert proposed(conductor).trial == lost.trial


@pytest.mark.parametrize(
    ("message", "status"),
    [
        ("no worker is left: WorkerGroupError: Training failed due to worker errors:", "lost"),
        ("its Tune trial ended without a result", "lost"),
        ("its worker died 3 times (out of memory?)", "lost"),
        ("the checkpoint /s/checkpoints/0123/checkpoint.safetensors is damaged (x): delete it", "lost"),
        ("cannot write '/s/adapters/0123': [Errno 28] No space left on device; possible are …", "lost"),
        ("OSError: [Errno 5] Input/output error", "lost"),
        ("no gradient reached expert 3", "failed"),
        ("ValueError: a fault of the program", "failed"),
    ],
)
def test_what_an_earlier_version_recorded_as_failed_and_was_lost_is_trained_again(
    message: str, status: str, tmp_path: Path
) -> None:
    done = outcome(status="failed", accuracy=None, message=message)
    with open_study(tmp_path) as records:
        records.append_started(started(done), {})
        records.append_finished(done, {})
    records_now = read(tmp_path)
    assert not records_now.problems
    assert records_now.outcomes[done.digest].status == status
    assert (done.digest in records_now.finished) == (status == "failed")


# --- the queue and the conductor, with kills


class Killed(RuleBasedStateMachine):
    """A study whose processes are killed at any moment: workers, the queue, Tune's handles, the driver.

    Calls that are open when the queue is killed are sent again, as Ray does. Workers go on from their checkpoints.
    """

    trials = 5

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="killed-"))
        self.loop = asyncio.new_event_loop()
        self.known: dict[str, Any] = {}  # results that were on record once
        self.checkpoints: Counter[str] = Counter()  # digest -> rungs that were reached

    @initialize()
    def begin(self) -> None:
        self.records = opened(self.folder)
        self._start()

    def _start(self) -> None:
        self.conductor = conductor_of(self.records, self.trials)
        self.queue = JobQueue(groups=2)
        self.over = False
        self.readers: dict[str, tuple[TrainJob, asyncio.Task[Report]]] = {}
        self.lives = [0, 0]
        self.jobs: list[Assignment | None] = [None, None]
        self.takes: list[asyncio.Task[Any] | None] = [None, None]
        self._propose()

    def _task(self, call: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self.loop.create_task(call)
        self._settle()
        return task

    def _settle(self) -> None:
        async def turns() -> None:
            for _ in range(10):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    def _propose(self) -> None:
        while not self.over and len(self.readers) < SLOTS:
            proposal = self.conductor.propose()
            if not isinstance(proposal, Proposal):
                self.over = proposal is None
                return
            job = TrainJob(proposal.trial, proposal.trainable_params)
            self.readers[proposal.trial.digest] = job, self._task(self.queue.next_report(proposal.trial.digest, job))

    def _hear(self) -> None:
        """The driver takes in what its handles have heard."""
        self._settle()
        for digest, (job, task) in list(self.readers.items()):
            if not task.done():
                continue
            match task.result():
                case RungReached(rung):
                    assert self.conductor.rung(digest, rung)
                    self.readers[digest] = job, self._task(self.queue.next_report(digest, job))
                    continue
                case Finished(done):
                    self.conductor.finished(done)
                    self.known[digest] = done.rungs
                case Failed(reason):
                    self._lose(digest, reason, again=False)
            self.readers.pop(digest, None)
        self._propose()

    def _lose(self, digest: str, reason: str, *, again: bool = True) -> None:
        try:
            self.conductor.lost(digest, reason, again=again)
        except StudyError:  # three in a row: the user runs the same command again
            self.kill_driver()

    @rule(group=integers(0, 1))
    def work(self, group: int) -> None:
        """A worker takes a job, or comes to its next evaluation or its end."""
        taken = self.jobs[group]
        if taken is None:
            take = self.takes[group] or self._task(self.queue.take(group, self.lives[group]))
            self.takes[group] = take
            self._settle()
            if take.done():
                self.takes[group] = None
                if isinstance(assignment := take.result(), Assignment):
                    self.jobs[group] = assignment
                    self._task(self.queue.hold(group, self.lives[group], assignment.job_id, assignment.job))
            return
        job, digest = taken.job, taken.job_id
        assert isinstance(job, TrainJob)
        step = self.checkpoints[digest] = self.checkpoints[digest] + 1
        if step <= RUNGS:
            report: Report = RungReached(rung_of(job.trial, step))
        else:
            report, self.jobs[group] = Finished(ended(Proposal(job.trial, job.trainable_params, {}))), None
        told = self._task(self.queue.report(group, self.lives[group], digest, job, report))
        if not told.result() and step <= RUNGS:
            self.jobs[group] = None
        self._hear()

    @rule(group=integers(0, 1))
    def kill_worker(self, group: int) -> None:
        self.lives[group] += 1
        self.jobs[group], self.takes[group] = None, None
        self._task(self.queue.start(group, self.lives[group]))

    @rule()
    def kill_queue(self) -> None:
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self._settle()
        self.queue = JobQueue(groups=2, restarted=True, grace=0.0)
        for digest, (job, task) in list(self.readers.items()):
            if task.cancelled():
                self.readers[digest] = job, self._task(self.queue.next_report(digest, job))
        for group, taken in enumerate(self.jobs):
            self.takes[group] = None
            if taken is not None:
                self._task(self.queue.hold(group, self.lives[group], taken.job_id, taken.job))

    @precondition(lambda self: self.readers)
    @rule(number=integers(0, SLOTS - 1))
    def kill_handle(self, number: int) -> None:
        """What it had heard and had not passed on dies with it; its open call stays in the queue."""
        digest = list(self.readers)[number % len(self.readers)]
        del self.readers[digest]
        self._lose(digest, "the process of its Tune trial died")
        self._propose()

    @rule()
    def kill_driver(self) -> None:
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self._settle()
        self.records.close()
        self.records = opened(self.folder)
        self._start()

    @invariant()
    def nothing_finished_is_lost(self) -> None:
        if hasattr(self, "records"):
            for digest, rungs in self.known.items():
                assert self.records.finished[digest].rungs == rungs

    def teardown(self) -> None:
        """Without further kills the study comes to its end."""
        for turn in range(400):
            if self.over and not self.readers:
                break
            self._hear()
            self.work(turn % 2)
        assert self.over, "the study does not end"
        assert [o.status for o in self.records.finished.values()] == ["complete"] * self.trials
        assert set(finished_lines(self.folder).values()) == {1}
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self._settle()
        self.loop.close()
        self.records.close()
        shutil.rmtree(self.folder)


Killed.TestCase.settings = settings(max_examples=15, stateful_step_count=30, deadline=None)
TestKilled = Killed.TestCase
