"""One worker inside this process, without Ray: for a debugger, a notebook and tests.

    python -m search.run space=sieve workers=process
    python -m pdb -m search.run space=sieve workers=process trials=1

It trains one trial after another with the same `WorkerState` that Ray's workers have. Nothing is pickled, a breakpoint
in the training loop holds, and an error that belongs to the program and not to a trial has its whole traceback. A crash
of the process ends the study; the same command goes on from the trial's last checkpoint, as ever.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from allocators.core.errors import ToolkitError
from allocators.core.messages import (
    Failed,
    PackJob,
    TaskDescribed,
    TaskJob,
    Tested,
    TestJob,
    TrainJob,
    UntrainedEvaluated,
)
from allocators.core.types import Rung, Signal, SignalKind
from search.engine import ENVIRONMENT, Facts, OnProgress, OnTested, StudyConductor
from search.problem import Proposal
from trainers.worker_state import WorkerSetup, WorkerState


class InProcessWorkers:
    """One worker; the conductor is called from the thread that trains.

    device   as torch names it; empty: the first GPU, or the CPU where there is none
    """

    results = "trainings"
    processes = "this process"

    def __init__(self, setup: WorkerSetup, *, device: str = "") -> None:
        self._setup = setup
        self._device = device

    def start(self) -> None:
        """Loads the model and the task, and returns when both are there."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import torch

        from trainers import models

        self._state = WorkerState(self._setup, torch.device(models.device_or_default(self._device)))

    def describe(self) -> str:
        """Names the device."""
        return f"one trial at a time in this process, on {self._state.device}"

    def facts(self) -> Facts:
        """The task in one line, and the versions that decide whether a training can be reused."""
        answer = self._state.answer(TaskJob())
        assert isinstance(answer, TaskDescribed)
        return Facts.of(answer)

    def untrained(self) -> UntrainedEvaluated:
        """Accuracy of the base alone, evaluated in this call."""
        return self._state.untrained()

    def measure(self, kind: SignalKind, on_progress: OnProgress) -> Signal:
        """The signal, measured in this call or read from the cache."""
        self._state.progress = on_progress
        signal = self._state.measure(kind)
        assert signal is not None  # this worker leads: it is alone
        return signal

    def choose_pack(self, job: PackJob) -> str:
        """Empty: this worker never packs."""
        return ""

    def search(self, conductor: StudyConductor, *, pausing: bool) -> None:
        """Trains one proposal after the other; a pause ends a training until it is proposed again."""
        while (proposal := conductor.propose()) is not None:
            assert proposal != "wait", "nothing is under way that could be waited for"
            self._train(proposal, conductor)

    def test(self, jobs: Sequence[TestJob], on_tested: OnTested) -> None:
        """One adapter after the other."""
        for job in jobs:
            try:
                result: Tested | Failed = self._state.test(job.adapter)
            except ToolkitError as error:
                result = Failed(str(error))
            on_tested(job, result)

    def close(self) -> None:
        """Does nothing: the model goes with this object."""

    def _train(self, proposal: Proposal, conductor: StudyConductor) -> None:
        digest, paused = proposal.trial.digest, False
        fault: Exception | None = None

        def on_rung(rung: Rung) -> bool:
            nonlocal paused, fault
            try:
                paused = not conductor.rung(digest, rung)
            except Exception as error:  # of the study, not of this trial: it must not become the trial's outcome
                fault = error
            return not (paused or fault)

        job = TrainJob(proposal.trial, proposal.trainable_params, tests=proposal.tests)
        outcome = self._state.train(job, report=on_rung)
        if fault is not None:
            raise fault
        if paused:  # it has a checkpoint, and the conductor may propose it again
            return
        if outcome.status == "lost":
            conductor.lost(digest, outcome.message)
        else:
            conductor.finished(outcome)
