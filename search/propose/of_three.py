"""What a training is expected to add to the front of accuracy, cost and a second number that is not known before it.

The second number is how much a training spares of what the model knew: forgetting with its sign turned, so that both
unknown numbers are better higher. Cost is exact and better lower. All of it is closed form.

Legend  M candidates, N points with results, R points that may be tried again, L levels, J steps of a staircase.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from search.propose.criterion import expected_improvement
from search.propose.model import Array

Stairs = list[tuple[float, float]]  # (accuracy, spared) of points that do not beat each other, ascending in accuracy


@dataclass(frozen=True)
class Normal:
    """Independent normal variables, one a candidate; a standard deviation of 0 is a number that is known."""

    mean: Array
    std: Array

    def above(self, levels: Array) -> Array:
        """E[max(Y - level, 0)]. Shape [M, levels]."""
        mean, std = self.mean[:, None], self.std[:, None]
        improvement = expected_improvement(mean, np.where(std > 0, std, 1.0), levels)
        above: Array = np.where(std > 0, improvement, np.maximum(mean - levels, 0.0))
        return above


@dataclass(frozen=True)
class Terrain:
    """Points that are there, and the reference (cost, accuracy, spared) that is worse than all that counts."""

    cost_N: Array
    accuracy_N: Array
    spared_N: Array
    reference: tuple[float, float, float]

    def without(self, point: int) -> Terrain:
        """The others."""
        cost_N, accuracy_N, spared_N = (np.delete(v, point) for v in (self.cost_N, self.accuracy_N, self.spared_N))
        return Terrain(cost_N, accuracy_N, spared_N, self.reference)

    def slices(self) -> Iterator[tuple[float, float, Stairs]]:
        """From cost to cost the staircase that the points which cost no more make of accuracy and what is spared."""
        most, least, lowest = self.reference
        stairs: Stairs = []
        left = -np.inf
        for i in np.argsort(self.cost_N, kind="stable"):
            cost, accuracy, spared = float(self.cost_N[i]), float(self.accuracy_N[i]), float(self.spared_N[i])
            inside = cost < most and accuracy > least and spared > lowest
            if not inside or any(a >= accuracy and s >= spared for a, s in stairs):
                continue
            yield left, cost, stairs
            left = cost
            stairs = sorted([*((a, s) for a, s in stairs if a > accuracy or s > spared), (accuracy, spared)])
        yield left, most, stairs


def expected_gain(accuracy_M: Normal, spared_M: Normal, cost_M: Array, there: Terrain) -> Array:
    """Volume that candidates are expected to add to what the points that are there dominate. Shape [M].

    Cut by cost, the volume is a stack of areas: over the costs of a slice the points that cost no more leave, between
    the steps a_1 < a_2 < … of accuracy, what lies above s_1 > s_2 > … undominated. A candidate (c, Y, S) adds to one

        w(c) · Σ_j (min(Y, a_{j+1}) - a_j)⁺ · (S - s_j)⁺        with w(c) the width of the slice beyond c

    and the expectation of a product of independent variables is that of the products:

        EHVI(c) = Σ_slices w(c) · Σ_j (E(Y - a_j)⁺ - E(Y - a_{j+1})⁺) · E(S - s_j)⁺

    Emmerich et al. 2011 (doi:10.1109/CEC.2011.5949880) define it; Yang et al. 2019 (arXiv:1904.12672) give the exact
    three-dimensional form for three unknown objectives, of which this is the case with one known. Accuracy and what is
    spared have a model each, and are taken for independent given what is known, as there.
    """
    _, least, lowest = there.reference
    accuracies, spareds = np.unique([*there.accuracy_N, least]), np.unique([*there.spared_N, lowest])
    accuracy_ML, spared_ML = accuracy_M.above(accuracies), spared_M.above(spareds)  # once a level, not once a slice
    gain_M = np.zeros(len(cost_M))
    for left, right, stairs in there.slices():
        width_M = np.clip(right - np.maximum(left, cost_M), 0.0, None)
        if width_M.any():
            steps, lows = [least, *(a for a, _ in stairs)], [*(s for _, s in stairs), lowest]
            higher_MJ = accuracy_ML[:, np.searchsorted(accuracies, steps)]
            between_MJ = higher_MJ - np.append(higher_MJ[:, 1:], np.zeros((len(cost_M), 1)), axis=1)
            gain_M += width_M * (between_MJ * spared_ML[:, np.searchsorted(spareds, lows)]).sum(axis=1)
    return gain_M


def expected_gain_of_repeats(moves: tuple[Array, Array], which_R: NDArray[np.int64], there: Terrain) -> Array:
    """Volume that the front is expected to gain when both numbers of a point move by N(0, std²). Shape [R].

    moves   the standard deviations of accuracy and of what is spared, each of shape [R]

    As `criterion.expected_gain_of_repeats`: the expected volume with the moved point, less that with it as it is.
    """
    gains = np.zeros(len(which_R))
    for place, point in enumerate(which_R):
        others, cost = there.without(point), there.cost_N[point : point + 1]
        accuracy, spared = there.accuracy_N[point : point + 1], there.spared_N[point : point + 1]
        moved = [Normal(mean, std_R[place : place + 1]) for mean, std_R in zip((accuracy, spared), moves, strict=True)]
        known = [Normal(mean, np.zeros(1)) for mean in (accuracy, spared)]
        after, now = (expected_gain(first, second, cost, others) for first, second in (moved, known))
        gains[place] = float(after[0] - now[0])
    return gains
