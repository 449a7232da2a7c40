"""How heavy the tail of a spectrum is: numbers from the eigenvalues λ of WᵀW.

    fit_tail(eigenvalues(weight), xmin_rule="window").hill

Letters: N eigenvalues ascending, a tail of n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from allocators.core.errors import StudyError, unknown

XminRule = Literal["published", "window", "peak", "median"]
XMIN_RULES: tuple[XminRule, ...] = get_args(XminRule)

BINS = 100

Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Tail:
    """A power law fitted to the eigenvalues from `index` up.

    hill       the exponent α of the density λ^−α
    index      of the first eigenvalue of the tail, ascending order, zeros not counted
    xmin       that eigenvalue
    distance   Kolmogorov–Smirnov distance between the tail and the power law
    """

    hill: float
    index: int
    xmin: float
    distance: float


def fit_tail(eigenvalues: ArrayLike, *, xmin_rule: XminRule = "published") -> Tail:
    """Hill estimate of the tail that starts at eigenvalue i: n = N − i values, λ_i itself among them.

        hill = 1 + n / (Σ_{j≥i} ln λ_j − n ln λ_i)             D = max_j |1 − (λ_j/λ_i)^(1−hill) − j/n|,  j = 0..n−1

    This is what the published scripts compute; equation 5 of AlphaLoRA has k where this has k+1. x2 is the left edge of
    the first fullest of 100 equal bins of log10 λ.

    xmin_rule   published: the i < N−1 of smallest D, first on ties, with log10(0.95·x2) ≤ λ_i ≤ 1.5·x2. The lower
                bound compares a logarithm with an eigenvalue; all published scripts share this slip, so the rule
                depends on the scale of W
                window: the same with 0.95·x2, as it was meant
                peak: the first eigenvalue of that bin
                median: i = N // 2

    Zeros are dropped, the order does not matter. Raises StudyError for an unknown rule, fewer than two different
    eigenvalues, or a rule that leaves none to begin the tail with.
    """
    if xmin_rule not in XMIN_RULES:
        raise unknown("xmin_rule", str(xmin_rule), XMIN_RULES)
    lam = np.sort(np.asarray(eigenvalues, dtype=np.float64))
    if lam.size and not (math.isfinite(lam[-1]) and lam[0] >= 0):
        raise StudyError(f"eigenvalues of WᵀW are finite and not negative, got {lam[0]:.4g} to {lam[-1]:.4g}")
    lam = lam[lam > 0]
    if lam.size < 2 or lam[0] == lam[-1]:
        raise StudyError(f"a tail needs two different eigenvalues above zero, got {np.unique(lam).size}")
    ln = np.log(lam / lam[-1])  # relative to the largest: a tail of equal values then sums to exactly zero
    n = np.arange(lam.size, 0, -1.0)
    excess = np.cumsum(ln[::-1])[::-1] - n * ln
    with np.errstate(divide="ignore"):
        hill = np.where(excess > 0, 1 + n / excess, np.inf)
    index = _start(lam, ln, hill, xmin_rule)
    if index is None or not math.isfinite(hill[index]):
        raise StudyError(
            f"xmin_rule '{xmin_rule}' finds no tail in {lam.size} eigenvalues: try "
            f"{', '.join(rule for rule in XMIN_RULES if rule != xmin_rule)}"
        )
    return Tail(float(hill[index]), index, float(lam[index]), float(_distances(ln, hill, np.array([index]))[0]))


def alpha_hat(eigenvalues: ArrayLike, *, hill: float) -> float:
    """hill · log10 λ_max. Negative where λ_max < 1."""
    return hill * math.log10(np.max(eigenvalues))


def stable_rank(eigenvalues: ArrayLike) -> float:
    """Σλ / λ_max, the squared Frobenius norm over the squared spectral norm: 1 … N. 0 for a zero matrix."""
    lam = np.asarray(eigenvalues, dtype=np.float64)
    return float(lam.sum() / lam.max()) if lam.any() else 0.0


def _start(lam: Vector, ln: Vector, hill: Vector, rule: XminRule) -> int | None:
    """Index where the tail begins; None where the rule allows none."""
    if rule == "median":
        return lam.size // 2
    first, x2 = fullest_bin(lam)
    if rule == "peak":
        return first
    lowest = math.log10(0.95 * x2) if rule == "published" else 0.95 * x2
    allowed = (lam >= lowest) & (lam <= 1.5 * x2) & np.isfinite(hill)
    allowed[-1] = False
    return _best(ln, hill, np.flatnonzero(allowed))


def fullest_bin(lam: Vector) -> tuple[int, float]:
    """Index of its first eigenvalue, and its left edge; the first bin of equally full ones."""
    counts, edges = np.histogram(np.log10(lam), bins=BINS)
    fullest = int(counts.argmax())
    return int(counts[:fullest].sum()), 10 ** edges[fullest]


def _best(ln: Vector, hill: Vector, candidates: NDArray[np.intp]) -> int | None:
    """The candidate of smallest distance, the first of equals.

    Distances at 32 places bound all candidates from below; whole ones are computed in the order of the bounds, until
    the next bound is above the best: exact, and a few dozen rows of N instead of N.
    """
    if not candidates.size:
        return None
    places = np.union1d(np.arange(0, ln.size, max(1, ln.size // 32)), [ln.size - 1])
    bounds = _distances(ln, hill, candidates, places)
    order = np.argsort(bounds, kind="stable")
    distances = np.full(candidates.size, np.inf)
    for block in np.array_split(order, math.ceil(order.size / 16)):
        if bounds[block[0]] > distances.min():
            break
        distances[block] = _distances(ln, hill, candidates[block])
    return int(candidates[distances.argmin()])


def _distances(ln: Vector, hill: Vector, starts: NDArray[np.intp], places: NDArray[np.intp] | None = None) -> Vector:
    """Kolmogorov–Smirnov distance of the tails from each start; over some places only, a lower bound of it."""
    start = starts[:, None]
    place = np.arange(starts.min(), ln.size) if places is None else places
    size = ln.size - start
    with np.errstate(over="ignore"):  # left of the start, where the value is not used
        beyond = np.exp((ln[place] - ln[start]) * (1 - hill[start]))
    gap = np.abs(1 - beyond - (place - start) / size)
    distance: Vector = np.where(place >= start, gap, 0.0).max(axis=1)
    return distance
