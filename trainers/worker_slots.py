"""A worker whose trials train in one pass (trainers/packing/): it takes jobs while it has a free slot. Knows no Ray.

What cannot share the pass under way (another batch size, a signal to measure) waits until it is over. Where a pass of
all fails, or killed this process before, each of them is run alone from its last checkpoint, so that one alone is to
blame, and recorded.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol

from allocators.core.messages import Assignment, Failed, Finished, Question, Report, RungReached, TrainJob
from allocators.core.types import Outcome, Rung
from trainers.worker_state import WorkerState, in_words, is_out_of_memory

if TYPE_CHECKING:
    from trainers.packing import Member

EVERY = 0.1  # seconds between two looks at the queue while trainings are under way: a look costs a tiny model's step


class Jobs(Protocol):
    """Where a worker's jobs come from and its reports go to (Ray's queue: `trainers/worker.py`)."""

    def take(self, *, wait: bool = True) -> Assignment | Literal["empty", "closed"]:
        """The next job; "closed" where there will be none any more, "empty" where none waits now (without `wait`)."""

    def report(self, job_id: str, report: Report) -> bool:
        """Passes a report on; whether the job goes on."""

    def progress(self, job_id: str) -> Callable[[int, int, str], None]:
        """What takes (done, total, what) in the course of a long measurement."""


@dataclass(frozen=True)
class _Training:
    """A training that has been taken from the queue."""

    job_id: str
    job: TrainJob

    def again(self) -> Assignment:
        """To be begun anew, from its checkpoint and alone."""
        return Assignment(self.job_id, self.job, attempt=2)


class WorkerSlots:
    """One worker with several slots, each for one trial."""

    def __init__(self, state: WorkerState, slots: int, jobs: Jobs) -> None:
        from trainers import packing

        self._state, self._jobs = state, jobs
        self._slots = 1 if packing.refused(state.model) else min(slots, packing.most(state.shape, state.device))
        self._packed = packing.PackedRun(
            state.model,
            state.task,
            tokenizer=state.tokenizer,
            device=state.device,
            evaluations=state.setup.evaluations,
        )
        self._training: dict[Member, _Training] = {}
        self._waiting: list[Assignment] = []  # taken, and to be begun when nobody trains any more
        self._looked = 0.0

    def serve(self) -> None:
        """Until the queue is closed and everything that was taken has ended."""
        open_ = True
        while open_ or self._training or self._waiting:
            if not self._training and self._waiting:
                self._begin(self._waiting.pop(0))
            elif open_ and self._has_room() and (self._is_time() or not self._training):
                taken = self._jobs.take(wait=not self._training)
                open_ = taken != "closed"
                if isinstance(taken, Assignment):
                    self._begin(taken)
                    self._looked = 0.0
                    continue  # there may be more, which then begin with the same step
            if self._training:
                self._step()

    def _has_room(self) -> bool:
        return not self._waiting and len(self._training) < self._slots

    def _is_time(self) -> bool:
        now = time.monotonic()
        if now - self._looked < EVERY:
            return False
        self._looked = now
        return True

    def _begin(self, taken: Assignment) -> None:
        if self._training and not self._may_share(taken):
            self._waiting.append(taken)
            return
        self._packed.detach()
        match taken.job:
            case TrainJob() as job if self._may_share(taken):
                self._join(_Training(taken.job_id, job))
            case TrainJob() as job:
                self._train_alone(_Training(taken.job_id, job))
            case question:
                self._answer(taken.job_id, question)

    def _may_share(self, taken: Assignment) -> bool:
        """Whether it can join those that train now: a trial of the same shape, with which no worker has died."""
        if not isinstance(taken.job, TrainJob) or self._slots == 1 or taken.attempt > 1:
            return False
        return self._packed.fits(taken.job.trial.recipe)

    def _answer(self, job_id: str, question: Question) -> None:
        self._state.progress = self._jobs.progress(job_id)
        try:
            report: Report | None = self._state.answer(question)
        except Exception as error:  # the driver decides what a missing signal means
            report = Failed(in_words(error))
        assert report is not None  # this worker leads: it is alone
        self._jobs.report(job_id, report)

    def _join(self, training: _Training) -> None:
        trial, cost = training.job.trial, training.job.trainable_params
        try:
            adapter = self._state.attach(trial, cost)
            adapter.detach()
            member = self._packed.join(
                adapter,
                trial.recipe,
                seed=trial.seed,
                on_rung=partial(self._rung, training.job_id),
                checkpoint=self._state.checkpoint(trial),
            )
        except Exception as error:  # of this trial alone
            self._finish(training.job_id, self._state.failed(self._state.started(trial, cost), error))
            return
        self._training[member] = training
        if member.result is not None:
            self._end(member)

    def _step(self) -> None:
        try:
            ended = self._packed.step()
        except Exception as error:  # the one to blame fails again alone, and says so
            given_back, self._training = list(self._training.values()), {}
            print(f"a step of {len(given_back)} trials failed, each goes on alone: {error}", file=sys.stderr)
            self._state.clean_up()
            for training in given_back:
                self._train_alone(training)
            return
        for member in ended:
            self._end(member)

    def _end(self, member: Member) -> None:
        training = self._training.pop(member)
        if member.error is not None and is_out_of_memory(member.error):
            self._waiting.append(training.again())  # with the memory of a worker for itself
            return
        started = self._state.started(training.job.trial, training.job.trainable_params).updated(pack=member.most)
        if member.error is not None:
            outcome = self._state.failed(started, member.error).updated(seconds=member.past.elapsed())
        else:
            assert member.result is not None
            try:
                with self._packed.alone(member):
                    outcome = self._state.ended(started, member.adapter, member.result, tests=training.job.tests)
            except Exception as error:  # the adapter cannot be saved
                outcome = self._state.failed(started, error)
        self._finish(training.job_id, outcome)

    def _train_alone(self, training: _Training) -> None:
        job, report = training.job, partial(self._rung, training.job_id)
        self._finish(training.job_id, self._state.train(job, report=report))

    def _rung(self, job_id: str, rung: Rung) -> bool:
        return self._jobs.report(job_id, RungReached(rung))

    def _finish(self, job_id: str, outcome: Outcome) -> None:
        self._jobs.report(job_id, Finished(outcome))
        if self._state.device_broke:
            raise RuntimeError(f"ended after {job_id}, so that the worker starts anew: {outcome.message}")
        self._state.clean_up()
