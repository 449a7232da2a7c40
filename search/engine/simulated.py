"""Simulated workers: they read recorded trainings instead of training, under a virtual clock. A search takes a second.

Time counts trained tokens. A free worker takes what the conductor proposes before the clock goes on; then the report
that comes first by the clock is passed on, that of the training that began first where two come at once. So
asynchronous workers, and schedulers that decide by order of arrival, meet what they would meet. Pure Python: no Ray.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from allocators.core.errors import StudyError
from allocators.core.messages import Failed, Finished, PackJob, Report, RungReached, Tested, TestJob, UntrainedEvaluated
from allocators.core.types import Outcome, Signal, SignalKind, Trial
from search.engine import Facts, OnProgress, OnTested, StudyConductor
from search.problem import Proposal

WORKERS = 4


class SimulatedWorkers:
    """So many workers that know these outcomes.

    outcomes   by the digest of their trial
    source     what the outcomes were read from, in one word
    mark       `replayed` in the versions of every outcome: names the source and its rows
    """

    results = "rows of the table read"
    processes = "this process"

    def __init__(self, outcomes: Mapping[str, Outcome], *, workers: int, source: str, mark: str) -> None:
        self._outcomes = outcomes
        self._workers = workers
        self._source = source
        self._mark = mark
        self._now = 0.0  # tokens
        self._numbers = itertools.count()
        self._running: dict[str, list[tuple[float, int, Report]]] = {}  # training -> its reports to come, by the clock
        self._began: dict[str, float] = {}  # training -> when it would have begun, had it never been paused
        self._reached: dict[str, float] = {}  # training -> tokens that it was trained for when it was paused

    def start(self) -> None:
        """Does nothing: the outcomes are there."""

    def describe(self) -> str:
        """Names the table."""
        return f"nothing is trained: {self._workers} simulated workers read {self._source}"

    def facts(self) -> Facts:
        """No task is described; `replayed` names the table and its rows."""
        return Facts("", {"replayed": self._mark})

    def untrained(self) -> UntrainedEvaluated | None:
        """None: a table has only trainings."""
        return None

    def measure(self, kind: SignalKind, on_progress: OnProgress) -> Signal:
        """Raises StudyError: signals come with the table."""
        raise StudyError(f"simulated workers measure nothing: {self._source} is asked with the signals in it")

    def choose_pack(self, job: PackJob) -> str:
        """Empty: no training shares a pass."""
        return ""

    def search(self, conductor: StudyConductor, *, pausing: bool) -> None:
        """Runs the trainings on a virtual clock that counts tokens: every worker trains as many in the same time."""
        over = False
        while not over or self._running:
            while not over and len(self._running) < self._workers:
                proposal = conductor.propose()
                if proposal == "wait":
                    break
                if proposal is None:
                    over = True
                else:
                    self._begin(proposal)
            if self._running:
                self._pass_on(conductor)

    def test(self, jobs: Sequence[TestJob], on_tested: OnTested) -> None:
        """What was recorded; a table that was recorded without a test split has nothing to tell."""
        for job in jobs:
            outcome = self._outcomes.get(job.trial.digest)
            score = outcome.test if outcome is not None else None
            on_tested(job, Tested(score) if score else Failed(f"{self._source} has no score on a test split"))

    def close(self) -> None:
        """Forgets the trainings under way."""
        self._running.clear()

    def _begin(self, proposal: Proposal) -> None:
        """A free worker begins a training, or goes on with it behind what it had reached.

        It then reports the rungs that it had reached again at once, as a worker does that goes on from a checkpoint.
        """
        digest = proposal.trial.digest
        began = self._began[digest] = self._now - self._reached.get(digest, 0.0)
        reports = self._reports(proposal.trial)
        self._running[digest] = [
            (max(began + tokens, self._now), next(self._numbers), report) for tokens, report in reports
        ]

    def _reports(self, trial: Trial) -> list[tuple[int, Report]]:
        """What a training reports, and after how many trained tokens."""
        outcome = self._outcomes.get(trial.digest)
        if outcome is None:
            return [(0, Finished(Outcome(trial, "failed", 0, message="the table has no row for this training")))]
        reports: list[tuple[int, Report]] = [(rung.tokens, RungReached(rung)) for rung in outcome.rungs]
        # another allocator may have proposed the recorded trial: the outcome names the one that was asked for
        versions = {**outcome.versions, "replayed": self._mark}
        told = outcome.updated(trial=trial, adapter="", versions=versions, test=None)  # for `test` to tell
        return [*reports, (outcome.tokens, Finished(told))]

    def _first(self) -> str:
        """The training whose report comes next."""
        return min(self._running, key=lambda training: self._running[training][0][:2])

    def _pass_on(self, conductor: StudyConductor) -> None:
        """Puts the clock forward to the next report and passes it on."""
        digest = self._first()
        self._now, _, report = self._running[digest].pop(0)
        match report:
            case RungReached(rung):
                if not conductor.rung(digest, rung):
                    del self._running[digest]
                    self._reached[digest] = self._now - self._began[digest]
            case Finished(outcome):
                del self._running[digest]
                conductor.finished(outcome)
