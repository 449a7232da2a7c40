"""Coverage: in every layer the fewest experts that take a given share of the task's tokens.

A layer with even routing keeps many experts, a skewed one few; the share is the knob, the cost follows from the data.

    python -m allocators.show model=tiny-moe allocator=coverage
"""

from __future__ import annotations

from allocators.core.ranking import Score, covering, routing_scores
from allocators.core.types import ExpertSelection, ModelShape, Signal

NEEDS = "routing"
BASE = "moe"
FIXED_COST = False


def allocate(signal: Signal, shape: ModelShape, *, share: float = 0.5, score: Score = "count") -> ExpertSelection:
    """The best experts of every layer by (−score, id) until they hold `share` of the layer's score.

    share   of a layer's tokens (score=count), of its gate weight (score=mass), or of the sum over its experts of the
            mean norm of their outputs, with the gate (score=reap) or without (score=ean), in (0, 1]

    Raises InfeasibleError for a share outside (0, 1].
    """
    scores = routing_scores(signal, shape, score=score)
    return ExpertSelection({layer: covering(values, share) for layer, values in scores.items()})
