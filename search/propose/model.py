"""A Gaussian process of accuracy that knows how noisy each of its results is.

    model.fit(x_ND, Results(mean_N, runs_N, question_N, spread, degrees))
    mean_M, std_M = model.predict(x_MD)                    # of the latent accuracy: without noise

A result is the mean accuracy of a point over its runs, which differ in their seed. It has two errors: that of the
questions, which is known and which further runs share, and that of the seed, which further runs average out.

Legend  N points with results, M points to predict, D inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize

Array = NDArray[np.float64]

LOWEST = 1e-10  # of a noise variance, relative to the variance of the accuracies: keeps matrices positive definite


@dataclass(frozen=True)
class Results:
    """What is known of N points.

    mean_N      mean accuracy over a point's runs
    runs_N      number of runs
    question_N  variance of a run's accuracy over the questions; the runs of a point have the same questions
    spread      Σ (accuracy of a run - mean accuracy of its point)², over all runs
    degrees     Σ (runs - 1) over all points: degrees of freedom of the spread
    """

    mean_N: Array
    runs_N: Array
    question_N: Array
    spread: float = 0.0
    degrees: int = 0

    @classmethod
    def of(cls, accuracies: list[list[float]], question: list[float]) -> Self:
        """From the accuracies of every point's runs (none: not known yet), and its variance over the questions."""
        means = [math.fsum(runs) / max(len(runs), 1) for runs in accuracies]
        spread = sum((one - mean) ** 2 for runs, mean in zip(accuracies, means, strict=True) for one in runs)
        runs_N = np.array([len(runs) for runs in accuracies], dtype=float)
        return cls(
            np.array(means), runs_N, np.array(question), spread, sum(max(len(runs) - 1, 0) for runs in accuracies)
        )

    def first(self, number: int) -> Results:
        """Those of the first points; the spread is that of all."""
        return replace(
            self, mean_N=self.mean_N[:number], runs_N=self.runs_N[:number], question_N=self.question_N[:number]
        )

    def supposing(self, more_N: Array, height_N: Array) -> Results:
        """As if each point had so many more runs, all with the accuracy of its height."""
        runs_N = self.runs_N + more_N
        return replace(self, mean_N=(self.runs_N * self.mean_N + more_N * height_N) / runs_N, runs_N=runs_N)

    def with_runs(self, more: int) -> Results:
        """The same with more runs of every point."""
        return replace(self, runs_N=self.runs_N + more)


@dataclass(frozen=True)
class _Prior:
    """Normal priors and bounds of the logarithms of (variance, D length scales, seed variance)."""

    centre: Array
    spread: Array
    bounds: Array

    @classmethod
    def of(cls, dims: int) -> Self:
        """Length scales: LogNormal(√2 + ln(D)/2, √3) of Hvarfner et al. 2024. A seed's variance: LogNormal(-4, 1)."""
        return cls(
            np.array([0.0, *[math.sqrt(2) + math.log(dims) / 2] * dims, -4.0]),
            np.array([1.0, *[math.sqrt(3)] * dims, 1.0]),
            np.log([(0.01, 100.0), *[(0.02, 200.0)] * dims, (1e-5, 2.0)]),
        )


class AccuracyModel:
    """Gaussian process of accuracy: Matérn 5/2 with a length scale for each input, noise known and unknown.

    The result of a point with n runs has the noise variance q + s/n. q, of the questions, is given. s, of a seed, is
    fitted like the other hyperparameters: by the most probable value under the priors of `_Prior`, where results of
    single runs and the spread between the runs of a point both speak. All variances are relative to that of the
    accuracies. A dozen results cannot determine a dozen length scales without priors.
    """

    def __init__(self) -> None:
        self._theta = np.empty(0)  # logarithms of (variance, D length scales, seed variance)

    @property
    def seed_variance(self) -> float:
        """Of the accuracy of a run, between seeds."""
        return float(self._scale**2 * math.exp(self._theta[-1]))

    def fit(self, x_ND: Array, results: Results) -> None:
        """Learns from results, what a result is like included: from nothing, whatever it was fitted to before."""
        self._scale_by(results)
        dims = x_ND.shape[1]
        self._theta = np.array([0.0, *[math.log(dims) / 2] * dims, math.log(0.02)])
        self._theta = self._most_probable(x_ND, self._scaled(results))
        self.condition(x_ND, results)

    def take(self, x_ND: Array, results: Results) -> None:
        """Learns from other results of the same kind, with the hyperparameters that it has."""
        self._scale_by(results)
        self.condition(x_ND, results)

    def _scale_by(self, results: Results) -> None:
        self._mean, self._scale = float(results.mean_N.mean()), float(results.mean_N.std())
        if self._scale < 1e-9:  # all equal up to rounding
            self._scale = 1.0

    def condition(self, x_ND: Array, results: Results) -> None:
        """Takes results for granted, without learning from them what a result is like."""
        scaled = self._scaled(results)
        self._x_ND = x_ND
        k_NN, _ = _covariance(x_ND, x_ND, self._theta)
        self._factor = cho_factor(k_NN + np.diag(_noise(scaled, self._theta)), lower=True)
        self._weight_N = cho_solve(self._factor, scaled.mean_N)

    def predict(self, x_MD: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of the latent accuracy: without the noise of a run."""
        k_NM, _ = _covariance(self._x_ND, x_MD, self._theta)
        explained_NM = solve_triangular(self._factor[0], k_NM, lower=True)
        variance_M = math.exp(self._theta[0]) - (explained_NM**2).sum(axis=0)
        mean_M: Array = self._mean + self._scale * (self._weight_N @ k_NM)
        return mean_M, self._scale * np.sqrt(np.maximum(variance_M, 1e-8))

    def noise(self, results: Results) -> Array:
        """Variance of each result about the latent accuracy. Shape [N]."""
        return self._scale**2 * _noise(self._scaled(results), self._theta)

    def noise_of_a_run(self, results: Results) -> float:
        """Variance of a single run of a point that has none yet; it has as many questions as the others."""
        return self.seed_variance + float(np.median(results.question_N)) + LOWEST * self._scale**2

    def _scaled(self, results: Results) -> Results:
        return replace(
            results,
            mean_N=(results.mean_N - self._mean) / self._scale,
            question_N=results.question_N / self._scale**2,
            spread=results.spread / self._scale**2,
        )

    def _most_probable(self, x_ND: Array, scaled: Results) -> Array:
        """Maximum a posteriori of the logarithms of the hyperparameters."""
        prior = _Prior.of(x_ND.shape[1])

        def objective(theta: Array) -> tuple[float, Array]:
            value, gradient = negative_log_likelihood(theta, x_ND, scaled)
            z = (theta - prior.centre) / prior.spread
            return value + 0.5 * float(z @ z), gradient + z / prior.spread

        start = np.clip(self._theta, *prior.bounds.T)
        found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=prior.bounds, options={"maxiter": 60})
        best: Array = found.x
        return best


def negative_log_likelihood(theta: Array, x_ND: Array, results: Results) -> tuple[float, Array]:
    """Of the means of the points and of the spread between their runs, with its gradient by theta (constants left out).

    Means and spread are sufficient and independent: ȳ ~ N(0, K + diag(q + s/n)), spread/s ~ χ²(degrees).
    """
    k_NN, slope_NN = _covariance(x_ND, x_ND, theta)
    noise_N = _noise(results, theta)
    seed = math.exp(theta[-1])
    try:
        factor = cho_factor(k_NN + np.diag(noise_N), lower=True)
    except np.linalg.LinAlgError:
        return 1e25, np.zeros_like(theta)
    weight_N = cho_solve(factor, results.mean_N)
    value = 0.5 * float(results.mean_N @ weight_N) + float(np.log(np.diag(factor[0])).sum())
    value += 0.5 * results.spread / seed + 0.5 * results.degrees * float(theta[-1])
    half_NN = 0.5 * (cho_solve(factor, np.eye(len(x_ND))) - np.outer(weight_N, weight_N))  # d value / d covariance
    part_NN = half_NN * slope_NN
    # Σ_ij part_ij (x_i - x_j)² for each input, without a tensor of N·N·D numbers
    scaled_ND = x_ND * np.exp(-theta[1:-1])
    lengths = 2.0 * (part_NN.sum(axis=1) @ scaled_ND**2 - (scaled_ND * (part_NN @ scaled_ND)).sum(axis=0))
    runs = float(np.diag(half_NN) @ (seed / results.runs_N)) + 0.5 * (results.degrees - results.spread / seed)
    return value, np.array([float((half_NN * k_NN).sum()), *lengths, runs])


def _noise(results: Results, theta: Array) -> Array:
    """Variance of each point's result about its latent accuracy. Shape [N]."""
    noise_N: Array = results.question_N + math.exp(theta[-1]) / results.runs_N + LOWEST
    return noise_N


def _covariance(x_AD: Array, x_BD: Array, theta: Array) -> tuple[Array, Array]:
    """Matérn 5/2, v·(1 + √5·r + 5r²/3)·exp(-√5·r), and the factor of (x_a - x_b)²/ℓ² in its slope by ln ℓ."""
    variance, inverse = math.exp(theta[0]), np.exp(-theta[1:-1])
    a, b = x_AD * inverse, x_BD * inverse
    square = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2.0 * a @ b.T
    r = np.sqrt(5.0 * np.maximum(square, 0.0))
    fall = variance * np.exp(-r)
    return fall * (1.0 + r + r**2 / 3.0), fall * (1.0 + r) * (5.0 / 3.0)
