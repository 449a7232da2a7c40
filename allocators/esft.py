"""ESFT: in every layer the most relevant experts until their relevance sums to p.

"Let the Expert Stick to His Last" (arXiv:2407.01906). Relevance is a share over the experts of one layer. The published
script divides by the sum over layers instead; we follow the paper.

    python -m allocators.show model=tiny-moe allocator=esft
"""

from __future__ import annotations

import math
from typing import Literal

from allocators.core.errors import InfeasibleError, did_you_mean
from allocators.core.ranking import Score, covering, routing_scores
from allocators.core.types import ExpertSelection, ModelShape, Signal

NEEDS = "routing"
BASE = "moe"
FIXED_COST = False

_READS: dict[str, tuple[Score, float]] = {"token": ("count", 0.2), "gate": ("mass", 0.1)}  # metric and the paper's p


def allocate(
    signal: Signal, shape: ModelShape, *, p: float | None = None, score: Literal["token", "gate"] = "token"
) -> ExpertSelection:
    """The best experts of every layer until Σ relevance ≥ p, the one that crosses it included.

    score   token: the expert's share of picks, ESFT-Token
            gate: its share of gate weight, ESFT-Gate. Where a router's weights sum to one per token this is the paper's
            mean gate weight; where they do not (OLMoE) it is that divided by its sum, so that p stays a share.
    p       0.2 for token, 0.1 for gate (the paper's) unless given

    Raises InfeasibleError for another score or a p outside (0, 1].
    """
    if score not in _READS:
        raise InfeasibleError(f"score must be one of {', '.join(_READS)}, got '{score}'{did_you_mean(score, _READS)}")
    metric, published = _READS[score]
    chosen = {}
    for layer, values in routing_scores(signal, shape, score=metric).items():
        whole = math.fsum(values)
        shares = [v / whole for v in values]  # over experts
        assert math.isclose(math.fsum(shares), 1)
        chosen[layer] = covering(shares, published if p is None else p)
    return ExpertSelection(chosen)
