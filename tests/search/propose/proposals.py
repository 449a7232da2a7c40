"""What the tests of more than one folder ask a proposer for."""

from __future__ import annotations

from search.problem import Proposal
from search.propose.sampler import Proposer


def next_proposal(proposer: Proposer) -> Proposal:
    """The next point, where the space is not used up."""
    proposal = proposer.propose()
    assert proposal is not None
    return proposal
