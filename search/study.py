"""One study from its first point to its report: the only writer of records, MLflow runs and the live view.

Tune asks `propose`, workers' reports arrive at `rung` and `finished`. Pure glue: no Ray, no MLflow, no torch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from allocators.core.types import Outcome
from search import pareto
from search.progress import Progress
from search.records import Study
from search.sampler import Answered, Proposal, Proposer
from search.tracking import Tracker
from search.trial import Problem
from trainers import storage


class Run:
    """The conductor that Tune talks to.

    checkpoints   where workers keep the state of their trials; a finished trial needs none
    deadline      monotonic time after which nothing new is proposed; None: no limit
    keep          "front": adapters of points that left the front are deleted; "all": none is
    """

    def __init__(
        self,
        problem: Problem,
        records: Study,
        tracker: Tracker,
        progress: Progress,
        *,
        checkpoints: str,
        sampler: str,
        deadline: float | None,
        keep: str,
    ) -> None:
        self._records = records
        self._tracker = tracker
        self._progress = progress
        self._checkpoints = checkpoints
        self._deadline = deadline
        self._keep = keep
        self._proposals: dict[str, Proposal] = {}
        for digest in records.finished:  # a driver that was killed may have recorded an end and not cleaned up
            self._drop_checkpoint(digest)
        known = [(outcome, records.params_of(digest)) for digest, outcome in records.finished.items()]
        unfinished = [Proposal(o.trial, o.trainable_params, params) for o, params in records.in_flight]
        self._proposer = Proposer(
            problem, sampler=sampler, known=known, unfinished=unfinished, answered=self._on_answered
        )

    @property
    def cut_off(self) -> bool:
        """Whether trials were started that have no result."""
        return bool(self._proposals)

    def propose(self) -> Proposal | None:
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._progress.message("time budget used up: no new trials")
            return None
        proposal = self._proposer.propose()
        if proposal is None:
            self._progress.message("every point of the space has been answered")
            return None
        started = Outcome(proposal.trial, "started", proposal.trainable_params)
        self._proposals[proposal.trial.digest] = proposal
        self._records.append_started(started, proposal.params)
        self._tracker.started(started)
        self._progress.started(started)
        return proposal

    def rung(self, digest: str, rung: Mapping[str, Any]) -> None:
        self._records.append_rung(digest, rung)
        self._tracker.rung(digest, rung)
        self._progress.rung(digest, rung)

    def finished(self, outcome: Outcome) -> None:
        proposal = self._proposals.pop(outcome.digest)
        self._records.append_finished(outcome, proposal.params)
        self._drop_checkpoint(outcome.digest)
        self._proposer.tell(outcome)
        self._tracker.finished(outcome)
        self._progress.finished(outcome)
        if self._keep == "front":
            self._drop_adapters()

    def lost(self, digest: str, reason: str) -> None:
        proposal = self._proposals[digest]
        self.finished(Outcome(proposal.trial, "failed", proposal.trainable_params, message=reason))

    def _on_answered(self, point: Answered) -> None:
        self._records.append_answered(point.params, reason=point.reason, digest=point.digest, message=point.message)
        self._progress.answered(point.reason, point.message)

    def _drop_checkpoint(self, digest: str) -> None:
        storage.delete_folder(storage.join(self._checkpoints, digest))

    def _drop_adapters(self) -> None:
        """Deletes adapters of points that are no longer on the front: on a real model each is hundreds of megabytes."""
        outcomes = self._records.finished.values()
        on_front = pareto.front(pareto.candidates(outcomes))
        winners = {run.digest for candidate in on_front for run in candidate.runs}
        for outcome in outcomes:
            if outcome.adapter and outcome.digest not in winners:
                storage.delete_folder(outcome.adapter)
