"""What singular values say beside their tail: how much of a matrix is signal, and how well-conditioned it is.

sigma = singular_values(eigenvalues(weight), size=min(weight.shape))          # zeros are among them again
signal_to_noise(sigma, sides=weight.shape), condition(sigma)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from allocators.core.errors import StudyError
from allocators.signals.spectrum.tails import Vector

EPSILON = 1e-8  # KappaTune's, beside the smallest singular value
NORMAL_IQR = 1.349  # interquartile range of a normal distribution of standard deviation 1, as Spectrum rounds it


def singular_values(eigenvalues: ArrayLike, *, size: int) -> Vector:
    """Roots of the eigenvalues of WᵀW, ascending, of which zeros may have been left out: min(rows, columns) of them."""
    lam = np.sort(np.asarray(eigenvalues, dtype=np.float64))
    sigma: Vector = np.concatenate([np.zeros(size - lam.size), np.sqrt(np.maximum(lam, 0.0))])
    return sigma


def condition(sigma: ArrayLike) -> float:
    """κ = σ_max/(σ_min + 10⁻⁸) (KappaTune): near 0 for a matrix of almost zero weights, never infinite."""
    values = np.asarray(sigma, dtype=np.float64)
    return float(values.max() / (values.min() + EPSILON)) if values.size else 0.0


def signal_to_noise(sigma: ArrayLike, *, sides: Sequence[int]) -> float:
    """Spectrum's ratio (Σ σ above t / Σ σ up to t) / σ_max with t = IQR(σ)/1.349 · (1 + √β).

    β is the shorter side of the matrix over the longer one. cW has 1/c times the ratio of W.

    Raises StudyError where no singular value is noise, or all are zero: the ratio is infinite.
    """
    values = np.asarray(sigma, dtype=np.float64)
    if not values.any():
        raise StudyError("all singular values are zero")
    low, high = np.quantile(values, [0.25, 0.75])
    threshold = (high - low) / NORMAL_IQR * (1 + math.sqrt(min(sides) / max(sides)))
    noise = float(values[values <= threshold].sum())
    if not noise:
        raise StudyError(f"no singular value lies below {threshold:.4g}, where noise ends: the ratio is infinite")
    return float(values[values > threshold].sum()) / noise / float(values.max())
