"""An Optuna sampler for two objectives of which one is known before training: only accuracy is modelled.

    sampler = EHVISampler(resolver(problem), seed=0)              # `sampler=ehvi` on the command line
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)

Trainable parameters are an exact function of a point. So candidates are drawn from the space itself, whatever its
conditions are, resolved, counted and stripped of repeats and impossible points; a Gaussian process predicts their
accuracy; the one with the largest expected hypervolume improvement is proposed. Trials under way count as if they had
ended as predicted, so that workers who ask at the same time are sent to different places.

Legend  N trained or running points, M candidates, K steps of the front, D inputs of the model.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from scipy.special import ndtr

from allocators.core.errors import BudgetError, InfeasibleError
from allocators.core.types import ExpertSelection, ModelShape, Signal, Trial
from search.problem import Problem

Array = NDArray[np.float64]

START = 5  # results, starting points included, before a model is worth fitting
DRAWN = 100  # candidates drawn anew for a suggestion; those of earlier suggestions stay
NEAR = 100  # candidates drawn near members of the front
MOST = 4000  # candidates kept


@dataclass(frozen=True)
class Known:
    """What is known of a point before it is trained.

    key        equal keys are one training run
    cost       trainable parameters
    features   inputs of the accuracy model beside the point's own parameters
    params     the point's parameters where they are not what the trial drew (a table has only some values)
    """

    key: str
    cost: int
    features: Mapping[str, float] = field(default_factory=dict)
    params: Mapping[str, Any] | None = None


def resolver(problem: Problem) -> Callable[[Any], Known]:
    """What is known of the point that a study's space suggests on a trial (InfeasibleError, BudgetError: no point)."""

    def resolve(trial: Any) -> Known:
        point, params = problem.ask(trial)
        resolved, cost = problem.resolve(point)
        return Known(resolved.digest, cost, features(resolved, problem.shape, problem.signals), params)

    return resolve


def features(trial: Trial, shape: ModelShape, signals: Mapping[str, Signal]) -> dict[str, float]:
    """Numbers of an allocation that say more about accuracy than the knobs it came from. All lie in [0, 1].

    depth    mean layer of its experts, weighted by their number (.5 where it has none)
    routed   share of the picks on the task that go to the chosen experts (MoE models with a routing signal)
    """
    allocation, last = trial.allocation, max(shape.num_layers - 1, 1)
    if isinstance(allocation, ExpertSelection):
        found = {layer: float(len(ids)) for layer, ids in allocation.experts.items()}
    else:
        found = {}
        for module in shape.modules:
            found[module.layer] = found.get(module.layer, 0.0) + allocation.counts.get(module.path, 0)
    experts = sum(found.values())
    numbers = {"depth": sum(layer * n for layer, n in found.items()) / experts / last if experts else 0.5}
    if isinstance(allocation, ExpertSelection) and (routing := signals.get("routing")):
        picks = {layer: routing.metric(layer, "count") for layer in shape.moe_layers}
        chosen = sum(picks[layer][i] for layer, ids in allocation.experts.items() for i in ids)
        numbers["routed"] = chosen / max(sum(map(sum, picks.values())), 1.0)
    return numbers


def expected_improvement(mean: Array, std: Array, height: Array | float) -> Array:
    """E[max(Y - height, 0)] for Y ~ N(mean, std²): std · (z·Φ(z) + φ(z)) with z = (mean - height) / std; std > 0."""
    z = (mean - height) / std
    improvement: Array = std * np.maximum(z * ndtr(z) + np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi), 0.0)
    return improvement


def expected_hypervolume_improvement(
    mean_M: Array, std_M: Array, cost_M: Array, *, cost_N: Array, height_N: Array, reference: tuple[float, float]
) -> Array:
    """Area that a candidate is expected to add to what the points (cost_N, height_N) dominate. Shape [M].

    Cost is exact and goes down, accuracy Y ~ N(mean, std²) goes up, reference = (cost, accuracy) is worse than both.
    With h(x) = max(reference accuracy, max{height_i : cost_i ≤ x}), the staircase of the front, a point (c, Y) adds
    ∫_c^C max(Y - h(x), 0) dx up to the reference cost C. The staircase has K steps of height h_k, and the part of
    step k to the right of c is w_k(c) wide, so by linearity of the expectation

        EHVI(c) = Σ_k w_k(c) · E[max(Y - h_k, 0)]

    Emmerich et al. 2011 define it for two unknown objectives; with one known it needs no double integral.
    """
    most, least = reference
    order = np.argsort(cost_N, kind="stable")
    inside = order[(cost_N[order] < most) & (height_N[order] > least)]
    heights = np.concatenate(([least], np.maximum.accumulate(height_N[inside])))
    rises = np.concatenate(([True], np.diff(heights) > 0))
    left_K = np.concatenate(([-np.inf], cost_N[inside]))[rises]
    height_K, right_K = heights[rises], np.append(left_K[1:], most)
    width_MK = np.clip(right_K - np.maximum(left_K, cost_M[:, None]), 0.0, None)
    gain_M: Array = (width_MK * expected_improvement(mean_M[:, None], std_M[:, None], height_K)).sum(axis=1)
    return gain_M


class AccuracyModel:
    """Gaussian process of accuracy: Matérn 5/2 with a length scale for each input, and noise.

    Length scales have the prior LogNormal(√2 + ln(D)/2, √3) of Hvarfner et al. 2024, noise (relative to the variance
    of the accuracies) LogNormal(-4, 1): a dozen results cannot determine a dozen length scales. The hyperparameters are
    fitted again when there are REFIT times as many results; between that only the data are new.
    """

    REFIT = 1.15

    def __init__(self) -> None:
        self._kernel: Any = None
        self._fitted = (0, 0)  # N and D of the last fit of the hyperparameters

    def fit(self, x_ND: Array, y_N: Array) -> None:
        """Learns from results."""
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

        n, dims = x_ND.shape
        self._mean, self._scale = float(y_N.mean()), float(y_N.std()) or 1.0
        if dims != self._fitted[1]:
            scales = Matern(np.full(dims, math.sqrt(dims)), (0.02, 200.0), nu=2.5)
            self._kernel = ConstantKernel(1.0, (0.01, 100.0)) * scales + WhiteKernel(0.02, (1e-5, 2.0))
        if dims != self._fitted[1] or n >= self.REFIT * self._fitted[0]:
            self._fitted = (n, dims)
            self._condition(x_ND, y_N, self._most_probable)
            self._kernel = self._process.kernel_
        else:
            self._condition(x_ND, y_N, None)

    def suppose(self, x_ND: Array, y_N: Array) -> None:
        """Takes further results for granted, without learning from them what a result is like."""
        self._condition(x_ND, y_N, None)

    def _condition(self, x_ND: Array, y_N: Array, optimizer: Any) -> None:
        from sklearn.gaussian_process import GaussianProcessRegressor

        self._process = GaussianProcessRegressor(self._kernel, optimizer=optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a length scale at its bound: that input does not matter
            self._process.fit(x_ND, (y_N - self._mean) / self._scale)

    def predict(self, x_MD: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of the accuracy itself, without the noise of a single run."""
        mean, std = self._process.predict(x_MD, return_std=True)
        noise = self._kernel.k2.noise_level
        return self._mean + self._scale * mean, self._scale * np.sqrt(np.maximum(std**2 - noise, 1e-8))

    @staticmethod
    def _most_probable(objective: Callable[..., Any], start: Array, bounds: Array) -> tuple[Array, float]:
        """Maximum a posteriori of the logarithms of (variance, D length scales, noise)."""
        from scipy.optimize import minimize

        dims = len(start) - 2
        centre = np.concatenate(([0.0], np.full(dims, math.sqrt(2) + math.log(dims) / 2), [-4.0]))
        spread = np.concatenate(([1.0], np.full(dims, math.sqrt(3)), [1.0]))

        def penalised(theta: Array) -> tuple[float, Array]:
            value, gradient = objective(theta)
            z = (theta - centre) / spread
            return value + 0.5 * float(z @ z), gradient + z / spread

        found = minimize(penalised, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 60})
        return found.x, float(found.fun)


@dataclass(frozen=True)
class _Candidate:
    """A point of the space; `inputs` are its columns of the model's input, inactive parameters left out."""

    params: Mapping[str, Any]
    distributions: Mapping[str, BaseDistribution]
    known: Known
    inputs: Mapping[str, float]


class _Drawing:
    """A trial that draws every parameter uniformly, or near those of `parent`, and remembers what was asked."""

    def __init__(self, random: np.random.Generator, parent: Mapping[str, Any] | None = None) -> None:
        self._random = random
        self._parent = parent or {}
        self._moves = 1.5 / max(len(self._parent), 1)  # one or two parameters move
        self.params: dict[str, Any] = {}
        self.distributions: dict[str, BaseDistribution] = {}

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._take(name, CategoricalDistribution(choices))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        value: float = self._take(name, FloatDistribution(low, high, log, step))
        return value

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        value: int = self._take(name, IntDistribution(low, high, log, step))
        return value

    def _take(self, name: str, distribution: Any) -> Any:
        if name not in self.params:
            old = self._parent.get(name)
            keep = name in self._parent and distribution._contains(distribution.to_internal_repr(old))
            if not keep:
                self.params[name] = _draw(distribution, self._random)
            elif self._random.random() < self._moves:
                self.params[name] = _move(distribution, old, self._random)
            else:
                self.params[name] = old
            self.distributions[name] = distribution
        return self.params[name]


class _Repeating(_Drawing):
    """A trial that gives the parameters of an earlier one again."""

    def _take(self, name: str, distribution: Any) -> Any:
        self.params[name] = self._parent[name]
        self.distributions[name] = distribution
        return self.params[name]


class EHVISampler(BaseSampler):
    """Proposes the point with the largest expected hypervolume improvement in (log trainable parameters, accuracy).

    resolve   runs the space on a trial and says what is known of its point; raises InfeasibleError or BudgetError
              where there is none
    seed      of everything that is drawn

    The study's objectives are accuracy, maximised, and trainable parameters, minimised. Parameters count by their
    logarithm: a front spans decades, and on a linear axis nearly all of the area belongs to its largest points.
    """

    def __init__(self, resolve: Callable[[Any], Known], *, seed: int = 0) -> None:
        self._resolve = resolve
        self._random = np.random.default_rng(seed)
        self._independent = RandomSampler(seed=seed)
        self._model = AccuracyModel()
        self._pool: dict[str, _Candidate] = {}
        self._history: dict[int, _Candidate | None] = {}  # by number of the Optuna trial
        self._chosen: _Candidate | None = None

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Chooses the point; Optuna asks for its parameters first, then for their values."""
        if study.directions != [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE]:
            raise ValueError(f"EHVISampler maximises accuracy and minimises parameters, not {study.directions}")
        self._chosen = self._choose(study, trial.number)
        return dict(self._chosen.distributions) if self._chosen else {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Values of the chosen point; empty before there is a model, when values are drawn one by one."""
        return dict(self._chosen.params) if self._chosen else {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Parameters that the chosen point lacks: those of partly fixed trials, or of a space that is used up."""
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def _choose(self, study: Study, number: int) -> _Candidate | None:
        """The best new candidate; None where the space seems to have none."""
        done: list[tuple[_Candidate, float]] = []
        lost: list[_Candidate] = []
        running: list[_Candidate] = []  # or stopped early: no result will come, and its place needs no second look
        seen: set[str] = set()
        for past in study.get_trials(deepcopy=False):
            if past.number == number or past.state == TrialState.WAITING:
                continue
            point = self._recall(past)
            if point is None or point.known.key in seen:  # a repeat was not trained again: it says nothing about noise
                continue
            seen.add(point.known.key)
            match past.state:
                case TrialState.COMPLETE:
                    done.append((point, past.values[0]))
                case TrialState.FAIL:
                    lost.append(point)
                case _:
                    running.append(point)
        self._widen(_front(done), seen)
        fresh = [point for key, point in self._pool.items() if key not in seen]
        if not fresh:
            return None
        if len(done) < START:
            return fresh[int(self._random.integers(len(fresh)))]
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1):  # the other cores train
            gain = self._gain(fresh, done, lost, running)
        return fresh[int(gain.argmax())]

    def _gain(
        self,
        fresh: Sequence[_Candidate],
        done: Sequence[tuple[_Candidate, float]],
        lost: Sequence[_Candidate],
        running: Sequence[_Candidate],
    ) -> Array:
        """Expected hypervolume improvement of every candidate. Shape [M]."""
        accuracy = np.array([value for _, value in done])
        worst = _floor(accuracy)
        y_N = np.maximum(np.concatenate((accuracy, np.full(len(lost), worst))), worst)
        tried = [*(point for point, _ in done), *lost, *running]
        x = _matrix([*tried, *fresh])
        x_ND, x_MD = x[: len(tried)], x[len(tried) :]
        self._model.fit(x_ND[: len(y_N)], y_N)
        mean_N, _ = self._model.predict(x_ND)
        if running:  # as if they had ended as predicted: nothing new is learnt, but less is left to learn there
            self._model.suppose(x_ND, np.concatenate((y_N, mean_N[len(y_N) :])))
        mean_M, std_M = self._model.predict(x_MD)
        cost_N, cost_M = (np.log([max(p.known.cost, 1) for p in points]) for points in (tried, fresh))
        low, high = min(cost_N.min(), cost_M.min()), max(cost_N.max(), cost_M.max())
        return expected_hypervolume_improvement(
            mean_M, std_M, cost_M, cost_N=cost_N, height_N=mean_N, reference=(high + 0.1 * (high - low), worst)
        )

    def _recall(self, past: FrozenTrial) -> _Candidate | None:
        """An earlier trial's point; None where it is none (impossible, over the budget, not of this space)."""
        if past.number not in self._history:
            try:
                self._history[past.number] = self._candidate(_Repeating(self._random, past.params))
            except (InfeasibleError, BudgetError, KeyError):
                self._history[past.number] = None
        return self._history[past.number]

    def _widen(self, front: Sequence[_Candidate], seen: Iterable[str]) -> None:
        """Draws more candidates, anywhere and near the front; drops what was trained, and the oldest."""
        for _ in range(DRAWN):
            self._draw(None)
        for _ in range(NEAR if front else 0):
            self._draw(front[int(self._random.integers(len(front)))].params)
        for key in [*seen, *list(self._pool)[: max(len(self._pool) - MOST, 0)]]:
            self._pool.pop(key, None)

    def _draw(self, parent: Mapping[str, Any] | None) -> None:
        try:
            point = self._candidate(_Drawing(self._random, parent))
        except (InfeasibleError, BudgetError):
            return
        self._pool.setdefault(point.known.key, point)

    def _candidate(self, trial: _Drawing) -> _Candidate:
        known = self._resolve(trial)
        params = trial.params if known.params is None else {name: known.params[name] for name in trial.params}
        inputs = {f" {name}": value for name, value in known.features.items()}  # no parameter begins with a blank
        for name, value in params.items():
            distribution = trial.distributions[name]
            if isinstance(distribution, CategoricalDistribution):
                inputs[f"{name}={value}"] = 1.0
            else:
                inputs[name] = _unit(distribution, value)
        return _Candidate(params, trial.distributions, known, inputs)


def _front(done: Sequence[tuple[_Candidate, float]]) -> list[_Candidate]:
    """Points that are more accurate than all that cost no more."""
    front, best = [], -math.inf
    for point, accuracy in sorted(done, key=lambda pair: (pair[0].known.cost, -pair[1])):
        if accuracy > best:
            front.append(point)
            best = accuracy
    return front


def _floor(accuracy: Array) -> float:
    """The accuracy below which nothing counts: the worst, or Tukey's fence where the worst are outliers.

    A run that diverged to an absurd value would otherwise take the whole range of the model.
    """
    low, high = np.quantile(accuracy, [0.25, 0.75])
    return float(max(accuracy.min(), low - 1.5 * (high - low)))


def _matrix(points: Sequence[_Candidate]) -> Array:
    """Inputs of the model: log parameters, features, parameters in [0, 1], one column a category. Shape [N, D].

    Parameters that a branch of the space does not have stand in the middle; its category tells the branches apart.
    """
    names = sorted({name for point in points for name in point.inputs})
    column = {name: place for place, name in enumerate(names)}
    x = np.empty((len(points), len(names) + 1))
    x[:, :-1] = [0.0 if "=" in name else 0.5 for name in names]
    for row, point in enumerate(points):
        for name, value in point.inputs.items():
            x[row, column[name]] = value
    cost = np.log([max(point.known.cost, 1) for point in points])
    x[:, -1] = (cost - cost.min()) / ((cost.max() - cost.min()) or 1.0)
    return x


def _steps(distribution: BaseDistribution) -> int:
    """Number of values of an ordered parameter that has steps; 0 for a continuous one."""
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    if distribution.step is None or distribution.log:
        return 0
    return round((distribution.high - distribution.low) / distribution.step) + 1


def _unit(distribution: BaseDistribution, value: float) -> float:
    """Where a value of an ordered parameter lies between its bounds, in [0, 1]; logarithmic where the parameter is."""
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    low, high = float(distribution.low), float(distribution.high)
    if high == low:
        return 0.5
    if distribution.log:
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)


def _value(distribution: BaseDistribution, unit: float) -> Any:
    """The value at a place in [0, 1]: the inverse of `_unit`, on the parameter's steps."""
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    low, high = distribution.low, distribution.high
    value = low * (high / low) ** unit if distribution.log else low + unit * (high - low)
    if steps := _steps(distribution):
        assert distribution.step is not None
        value = low + round(unit * (steps - 1)) * distribution.step
    value = min(max(value, low), high)
    return round(value) if isinstance(distribution, IntDistribution) else float(value)


def _draw(distribution: BaseDistribution, random: np.random.Generator) -> Any:
    """A value drawn evenly, on the parameter's own scale."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(random.integers(len(distribution.choices)))]
    steps = _steps(distribution)
    return _value(distribution, random.integers(steps) / max(steps - 1, 1) if steps else random.random())


def _move(distribution: BaseDistribution, value: Any, random: np.random.Generator) -> Any:
    """A value near another one: another category, a step or more away, or a tenth of the range on average."""
    if isinstance(distribution, CategoricalDistribution):
        return _draw(distribution, random)
    by = random.normal(0.0, 0.1)
    if steps := _steps(distribution):
        by = math.copysign(max(abs(by), 1 / max(steps - 1, 1)), by)
    return _value(distribution, min(max(_unit(distribution, value) + by, 0.0), 1.0))
