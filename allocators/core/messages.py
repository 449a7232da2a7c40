"""What travels between a study and its workers: jobs go out, reports come back. Objects, which Ray pickles as they are.

    job      TrainJob, or a question that is asked before the first training or after the last one:
             TaskJob, UntrainedJob, SignalJob, PackJob, TestJob
    report   of a training: RungReached at every evaluation, Finished at its end
             of a question: Progressed on the way, its answer at its end
             of both: Failed, where the worker cannot do the job

Standard library only, like all of the core.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeGuard

from allocators.core.types import Outcome, Rung, Score, Signal, SignalKind, Trial

# --- jobs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainJob:
    """Train this trial, whose adapter has to have so many parameters.

    asks    the worker waits at every rung until the study says whether the training goes on
    tests   evaluate it on the test split at its end: nothing is selected, as in a table
    """

    trial: Trial
    trainable_params: int
    asks: bool = False
    tests: bool = False


@dataclass(frozen=True)
class TaskJob:
    """Describe what is trained and counted on."""


@dataclass(frozen=True)
class UntrainedJob:
    """Evaluate the base alone."""


@dataclass(frozen=True)
class SignalJob:
    """Measure a signal, or read it from the cache."""

    kind: SignalKind


@dataclass(frozen=True)
class PackJob:
    """Measure how many trainings such as this one should share a pass over the base."""

    trial: Trial
    trainable_params: int


@dataclass(frozen=True)
class TestJob:
    """Evaluate a trained adapter on the test split.

    trainable_params   that the adapter has to have
    adapter            where it lies: a folder or a URI that workers can read
    """

    trial: Trial
    trainable_params: int
    adapter: str


Question = TaskJob | UntrainedJob | SignalJob | PackJob | TestJob
Job = TrainJob | Question


@dataclass(frozen=True)
class Assignment:
    """A job that a worker has taken, under the name that its reports carry.

    attempt   counts from 1; more than 1 where a worker died with the job
    """

    job_id: str
    job: Job
    attempt: int = 1


# --- reports ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RungReached:
    """A training has been evaluated."""

    rung: Rung


@dataclass(frozen=True)
class Progressed:
    """A long measurement has done so many of so many `what` (samples, modules)."""

    done: int
    total: int
    what: str


@dataclass(frozen=True)
class Finished:
    """A training has ended, in whatever way: the outcome's status says how."""

    outcome: Outcome


@dataclass(frozen=True)
class Failed:
    """The worker could not do the job, or died too often with it."""

    reason: str


@dataclass(frozen=True)
class TaskDescribed:
    """The task in one line of text, what the versions of every outcome will say, and notes on the base's files."""

    text: str
    versions: Mapping[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class UntrainedEvaluated:
    """The base alone: on the split that selects, and on the test split."""

    selection: Score
    test: Score


@dataclass(frozen=True)
class Tested:
    """What a trained adapter has on the test split."""

    score: Score


@dataclass(frozen=True)
class SignalMeasured:
    """The signal that a `SignalJob` asks for."""

    signal: Signal


@dataclass(frozen=True)
class PackChosen:
    """How many trainings should share a pass, and why so many."""

    pack: int
    why: str


Answer = TaskDescribed | UntrainedEvaluated | SignalMeasured | PackChosen | Tested
End = Finished | Failed | Answer
Report = RungReached | Progressed | End


def is_end(report: Report) -> TypeGuard[End]:
    """Whether this is the last report of its job."""
    return not isinstance(report, RungReached | Progressed)
