"""What a training is expected to add to the front of accuracy against cost. All of it is closed form.

`of_three.py` has the same where forgetting is a third objective.

Legend  M candidates, N points with results, K steps of the front.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import erfcx, ndtr

from search.propose.model import Array


def expected_improvement(mean: Array, std: Array, height: Array | float) -> Array:
    """E[max(Y - height, 0)] for Y ~ N(mean, std²): std · (z·Φ(z) + φ(z)) with z = (mean - height) / std; std > 0.

    Below, for z < 0, z·Φ(z) + φ(z) is φ(z) · (1 + z·Φ(z)/φ(z)): the sum would cancel to nothing, and candidates far
    below the front could not be told apart (Ament et al. 2023, arXiv:2310.20708).
    """
    z = (mean - height) / std
    density = np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    below = np.minimum(z, 0.0)
    mills = math.sqrt(math.pi / 2) * erfcx(-below / math.sqrt(2))  # Φ(z) / φ(z)
    improvement: Array = std * np.where(z < 0, density * np.maximum(1 + below * mills, 0.0), z * ndtr(z) + density)
    return improvement


@dataclass(frozen=True)
class Landscape:
    """Costs and heights of points, and (cost, accuracy), the reference that is worse than all that counts."""

    cost_N: Array
    height_N: Array
    reference: tuple[float, float]

    def without(self, point: int) -> Landscape:
        """The others."""
        return Landscape(np.delete(self.cost_N, point), np.delete(self.height_N, point), self.reference)

    def steps(self) -> tuple[Array, Array, Array]:
        """The staircase h(x) = max(reference accuracy, max{height_i : cost_i ≤ x}): left ends, right ends, heights."""
        most, least = self.reference
        order = np.argsort(self.cost_N, kind="stable")
        inside = order[(self.cost_N[order] < most) & (self.height_N[order] > least)]
        heights = np.concatenate(([least], np.maximum.accumulate(self.height_N[inside])))
        rises = np.concatenate(([True], np.diff(heights) > 0))
        left_K = np.concatenate(([-np.inf], self.cost_N[inside]))[rises]
        return left_K, np.append(left_K[1:], most), heights[rises]


def expected_hypervolume_improvement(mean_M: Array, std_M: Array, cost_M: Array, there: Landscape) -> Array:
    """Area that a candidate is expected to add to what the points that are there dominate. Shape [M].

    Cost is exact and goes down, accuracy Y ~ N(mean, std²) goes up, the reference is worse than both.
    With h(x), the staircase of the front, a point (c, Y) adds ∫_c^C max(Y - h(x), 0) dx up to the reference cost C.
    The staircase has K steps of height h_k, and the part of step k to the right of c is w_k(c) wide, so by linearity
    of the expectation

        EHVI(c) = Σ_k w_k(c) · E[max(Y - h_k, 0)]

    Emmerich et al. 2011 define it for two unknown objectives; with one known it needs no double integral.
    """
    left_K, right_K, height_K = there.steps()
    width_MK = np.clip(right_K - np.maximum(left_K, cost_M[:, None]), 0.0, None)
    gain_M: Array = (width_MK * expected_improvement(mean_M[:, None], std_M[:, None], height_K)).sum(axis=1)
    return gain_M


def learnt(std: Array, noise: Array | float, noise_after: Array | float) -> Array:
    """Standard deviation of the change of a point's posterior mean when the noise variance of its result falls.

    With precision p = 1/std² and results of the point itself of noise variance v, which becomes v' < v (∞ is a point
    without a result), the posterior variance becomes 1/(p - 1/v + 1/v'); by the law of total variance its mean moves
    by N(0, std² - that). A new point therefore has std²·√(1/(std² + v')).
    """
    after = 1.0 / (1.0 / std**2 - 1.0 / noise + 1.0 / noise_after)
    moved: Array = np.sqrt(np.maximum(std**2 - after, 0.0))
    return moved


def expected_gain_of_repeats(std_R: Array, which_R: NDArray[np.int64], there: Landscape) -> Array:
    """Area that the front of heights is expected to gain when the height of a point moves by N(0, std²). Shape [R].

    For point i = which_R[r], E[area after] - area now. A point of the front can lose the area that it alone has, and
    win more; what the expectation counts is that the better of two neighbours is kept:

        Σ_k w_k · (E[max(Y - h_k, 0)] - max(height - h_k, 0))        over the staircase of the other points

    The knowledge gradient of Frazier et al. 2009, of a hypervolume (Daulton et al. 2023, HVKG), without correlations.
    """
    gains = np.zeros(len(which_R))
    for place, (point, std) in enumerate(zip(which_R, std_R, strict=True)):
        if std > 0:
            left_K, right_K, height_K = there.without(point).steps()
            width_K = np.clip(right_K - np.maximum(left_K, there.cost_N[point]), 0.0, None)
            height = there.height_N[point]
            won_K = expected_improvement(height, std, height_K) - np.maximum(height - height_K, 0.0)
            gains[place] = float(width_K @ won_K)
    return gains
