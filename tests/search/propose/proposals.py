"""What the tests of more than one folder ask a proposer for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from allocators.core.types import Outcome
from search.problem import Proposal
from search.propose.sampler import Proposer


def next_proposal(proposer: Proposer) -> Proposal:
    """The next point, where the space is not used up."""
    proposal = proposer.propose()
    assert proposal is not None
    return proposal


def recalled(proposer: Proposer, known: Iterable[tuple[Outcome, Mapping[str, Any]]]) -> None:
    """Says what an earlier run proposed, one after the other, and what came of it."""
    for outcome, params in known:
        proposer.recall(outcome.trial, params)
        proposer.tell(outcome)
