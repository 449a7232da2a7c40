"""Workers behind one protocol: what runs a study knows neither Ray nor tables.

workers.py      groups of Ray Train's workers (`steward.py`, `groups.py`, `queue.py`), run by Ray Tune (`tune.py`)
simulated.py    workers that read recorded trainings, under a virtual clock
inprocess.py    one worker inside this process: for a debugger, a notebook, tests

workers.start()
workers.facts(), workers.untrained(), workers.measure("routing", on_progress)       before the first training
workers.search(conductor, pausing=False)                                            until the conductor has no more
workers.test(jobs, on_tested)                                                       after the last training
workers.close()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from allocators.core.messages import Failed, PackJob, TaskDescribed, Tested, TestJob, UntrainedEvaluated
from allocators.core.types import Outcome, Rung, Signal, SignalKind
from search.problem import Proposal
from search.records.reuse import FACTS, TEST_DATA

# Read by libraries when they are imported; a user's own settings stay.
ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

OnTested = Callable[[TestJob, Tested | Failed], None]  # the job, and what came of it
OnProgress = Callable[[int, int, str], None]  # done, total, what


class StudyConductor(Protocol):
    """What workers ask of the study (`search/study.py`)."""

    def propose(self) -> Proposal | Literal["wait"] | None:
        """The next training for a free worker, a new one or one that was paused; None: there is nothing left to do."""

    def rung(self, digest: str, rung: Rung) -> bool:
        """An evaluation; False pauses the training until it is proposed again."""

    def finished(self, outcome: Outcome) -> None:
        """A training has ended, in whatever way; the outcome's status says how."""

    def lost(self, digest: str, reason: str, *, again: bool = True) -> None:
        """The platform took a training away, for this reason: it is no result, and is proposed again.

        again   at once, else after all others: it may be what kills its workers
        """


@dataclass(frozen=True)
class Facts:
    """What is trained on.

    task       in one line; empty where nothing is trained
    versions   the part of an outcome's versions that has to agree where another study's training is reused; that of the
               test data only where its score on the test split is
    notes      what the user should know of the base's files, a line each
    """

    task: str
    versions: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, described: TaskDescribed) -> Facts:
        """Of what a worker answers to a `TaskJob`."""
        names = [*FACTS, *({TEST_DATA} & described.versions.keys())]
        return cls(described.text, {name: described.versions[name] for name in names}, described.notes)


class Workers(Protocol):
    """The workers of one study. Every method but `close` raises StudyError for what these workers cannot do.

    results     what one result is, in the plural: `trainings`
    processes   what runs on this machine: `driver, Ray and workers`
    """

    results: str
    processes: str

    def start(self) -> None:
        """Returns before the workers are ready."""

    def describe(self) -> str:
        """How many there are and of what size, in one line."""

    def facts(self) -> Facts:
        """What is trained on, as the first worker that is ready says."""

    def untrained(self) -> UntrainedEvaluated | None:
        """Accuracy of the base alone; None where it is not known."""

    def measure(self, kind: SignalKind, on_progress: OnProgress) -> Signal:
        """Waits for the signal, measured or read from the cache."""

    def choose_pack(self, job: PackJob) -> str:
        """Packs as many trainings as a few timed steps of this one advise; says how many and why, empty if none is."""

    def search(self, conductor: StudyConductor, *, pausing: bool) -> None:
        """Runs what the conductor proposes until it proposes nothing more.

        pausing   whether the conductor may pause a training: workers then wait at every evaluation for its answer
        """

    def test(self, jobs: Sequence[TestJob], on_tested: OnTested) -> None:
        """Evaluates trained adapters on the test split; one that cannot be is told as failed, with the reason."""

    def close(self) -> None:
        """Ends the workers, whatever state they are in."""
