"""The Gaussian process of accuracy: against scikit-learn's, its gradient, and what it makes of noise and repeats."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import check_grad
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from search.propose.model import AccuracyModel, Results, negative_log_likelihood


def once(y_N: np.ndarray, question: float = 0.0) -> Results:
    return Results.of([[float(y)] for y in y_N], [question] * len(y_N))


def wave(x_ND: np.ndarray) -> np.ndarray:
    values: np.ndarray = 0.5 + 0.3 * np.sin(5 * x_ND[:, 2])
    return values


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 12), st.integers(1, 4))
def test_it_computes_what_scikit_learn_computes(seed: int, n: int, dims: int) -> None:
    random = np.random.default_rng(seed)
    x_ND, y_N = random.random((n, dims)), random.normal(size=n)
    theta = random.normal(size=dims + 2)
    kernel = ConstantKernel(math.exp(theta[0])) * Matern(np.exp(theta[1:-1]), nu=2.5) + WhiteKernel(math.exp(theta[-1]))
    theirs = GaussianProcessRegressor(kernel, optimizer=None).fit(x_ND, y_N)
    value, _ = negative_log_likelihood(theta, x_ND, once(y_N))
    likelihood = -theirs.log_marginal_likelihood(theta) - 0.5 * n * math.log(2 * math.pi)
    assert value == pytest.approx(likelihood, rel=1e-5, abs=1e-6)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 8))
def test_the_gradient_is_that_of_the_value_with_repeats_and_question_noise(seed: int, n: int) -> None:
    random = np.random.default_rng(seed)
    x_ND = random.random((n, 3))
    results = Results.of([list(random.normal(size=1 + i % 3)) for i in range(n)], list(random.random(n) * 0.1))
    theta = random.normal(size=5) * 0.5
    error = check_grad(
        lambda t: negative_log_likelihood(t, x_ND, results)[0],
        lambda t: negative_log_likelihood(t, x_ND, results)[1],
        theta,
    )
    assert error < 1e-3


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(1, 3), min_size=2, max_size=5))
def test_means_and_spread_say_all_that_the_single_runs_say(seed: int, runs: list[int]) -> None:
    """Against every run as a point of its own: equal up to a constant, whatever the hyperparameters."""
    random = np.random.default_rng(seed)
    x_ND = random.random((len(runs), 2))
    accuracies = [list(random.normal(size=n)) for n in runs]
    single = Results.of([[y] for one in accuracies for y in one], [0.0] * sum(runs))
    x_single = np.repeat(x_ND, runs, axis=0)
    grouped = Results.of(accuracies, [0.0] * len(runs))
    differences = []
    for _ in range(3):
        theta = random.normal(size=4) * 0.5
        value = negative_log_likelihood(theta, x_ND, grouped)[0]
        differences.append(value - negative_log_likelihood(theta, x_single, single)[0])
    assert np.ptp(differences) < 1e-5 * max(1.0, abs(differences[0]))


def test_the_model_finds_the_input_that_matters_and_how_noisy_a_run_is() -> None:
    random = np.random.default_rng(0)
    x = random.random((60, 4))
    model = AccuracyModel()
    model.fit(x, once(wave(x) + random.normal(0, 0.05, 60)))
    grid = np.full((50, 4), 0.5)
    grid[:, 2] = np.linspace(0, 1, 50)
    mean, std = model.predict(grid)
    assert np.abs(mean - wave(grid)).mean() < 0.04
    assert std.max() < 0.1
    assert 0.03 < math.sqrt(model.seed_variance) < 0.08
    grid[:, 2] = 0.5
    grid[:, 0] = np.linspace(0, 1, 50)
    assert np.ptp(model.predict(grid)[0]) < 0.05


def test_repeats_reveal_the_noise_of_a_seed_where_single_runs_cannot() -> None:
    random = np.random.default_rng(1)
    x, found = random.random((12, 4)), []
    for noise in (0.005, 0.1):
        accuracies = [[float(y + e) for e in random.normal(0, noise, 4)] for y in wave(x)]
        model = AccuracyModel()
        model.fit(x, Results.of(accuracies, [0.0] * len(x)))
        found.append(math.sqrt(model.seed_variance))
    assert found[0] < 0.015
    assert 0.06 < found[1] < 0.15


def test_repeats_sharpen_a_point_and_the_noise_of_the_questions_stays() -> None:
    random = np.random.default_rng(2)
    x, model = random.random((20, 3)), AccuracyModel()
    results = once(wave(x) + random.normal(0, 0.1, 20), question=0.03**2)
    model.fit(x, results)
    doubt = []
    for more in (0, 1, 1000):
        model.condition(x, results.with_runs(more))
        doubt.append(model.predict(x)[1].mean())
        noise = model.noise(results.with_runs(more))
        assert noise == pytest.approx(0.03**2 + model.seed_variance / (1 + more), rel=1e-3)
    assert doubt[0] > doubt[1] > doubt[2]


def test_equal_results_and_a_single_one_are_no_error() -> None:
    for n in (1, 6):
        model = AccuracyModel()
        model.fit(np.random.default_rng(0).random((n, 2)), once(np.full(n, 0.3)))
        mean, std = model.predict(np.full((1, 2), 0.5))
        assert mean[0] == pytest.approx(0.3)
        assert 0 < std[0] < 10
