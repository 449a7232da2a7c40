"""Routing read as a ranking of experts: what sieve, coverage, esft and greedy have in common.

scores = routing_scores(signal, shape, score="count")      # {layer: (value of each expert)}, checked
ranked(scores[0])                                          # ids, most used first, lower id first on ties
covering(scores[0], 0.9)                                   # the fewest experts that take nine of ten tokens
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

from allocators.core.errors import InfeasibleError, StudyError, did_you_mean
from allocators.core.types import ExpertSelection, ModelShape, Signal

Score = Literal["count", "mass", "reap", "ean"]
SCORES: tuple[Score, ...] = get_args(Score)


def routing_scores(signal: Signal, shape: ModelShape, *, score: Score) -> dict[int, tuple[float, ...]]:
    """For every MoE layer what each expert has, [E]: the tokens (`count`) or the gate weight (`mass`) that it received,
    or the mean norm of its outputs for them, with the gate (`reap`) or without (`ean`).

    Raises InfeasibleError for another score, StudyError where the signal is not a routing of this model.
    """
    if score not in SCORES:
        raise InfeasibleError(f"score must be one of {', '.join(SCORES)}, got '{score}'{did_you_mean(score, SCORES)}")
    scores = {}
    for layer in shape.moe_layers:
        values = signal.metric(layer, score)
        if len(values) != shape.experts_in(layer):
            raise StudyError(
                f"the routing signal has {len(values)} experts in layer {layer}, {shape.name} has "
                f"{shape.experts_in(layer)}: it was measured on another model"
            )
        if not all(math.isfinite(v) and v >= 0 for v in values) or not any(values):
            raise StudyError(f"the routing signal of layer {layer} holds no usable {score}: measure it again")
        scores[layer] = values
    return scores


def ranked(values: Sequence[float]) -> list[int]:
    """Positions by (−value, position)."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def covering(values: Sequence[float], share: float) -> tuple[int, ...]:
    """The best positions until their sum reaches `share` of the whole, the one that crosses it included.

    Raises InfeasibleError for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise InfeasibleError(f"the share of tokens to cover must be above 0 and at most 1, got {share}")
    # over experts: the whole is one layer's, so that a layer's shares sum to one; 1e-9 is rounding's due, not a choice
    target = (share - 1e-9) * math.fsum(values)
    chosen: list[int] = []
    held = 0.0
    for i in ranked(values):
        chosen.append(i)
        held += values[i]
        if held >= target:
            break
    return tuple(chosen)


def covered_shares(selection: ExpertSelection, signal: Signal, shape: ModelShape) -> dict[int, float]:
    """For every MoE layer the share of its dispatched tokens that the selected experts take, 0 to 1."""
    scores = routing_scores(signal, shape, score="count")
    return {
        layer: math.fsum(values[i] for i in selection.in_layer(layer)) / math.fsum(values)
        for layer, values in scores.items()
    }
