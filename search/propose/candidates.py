"""Points of a space that could be tried: drawn from the space itself, counted, and turned into inputs of a model.

Trainable parameters are an exact function of a point, so that a candidate's cost is known before anything is trained.

Legend  N points, D inputs of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from allocators.core.types import ExpertCounts, ExpertSelection, ModelShape, ModuleRanks, Signal, Trial
from search.problem import Problem
from search.propose.model import Array
from search.propose.trials import Asked


@dataclass(frozen=True)
class Known:
    """What is known of a point before it is trained.

    key        equal keys are one training run
    cost       trainable parameters
    features   inputs of the accuracy model beside the point's own parameters
    params     the point's parameters where they are not what the trial drew (a table has only some values)
    seeds      trainings that the point may have, each with a seed of its own
    """

    key: str
    cost: int
    features: Mapping[str, float] = field(default_factory=dict)
    params: Mapping[str, Any] | None = None
    seeds: int = 1


def resolver(problem: Problem, *, repeats: bool = False) -> Callable[[Any], Known]:
    """What is known of the point that a study's space suggests on a trial (InfeasibleError, BudgetError: no point).

    repeats   points may be trained with every seed that the problem has for them, else with its own alone
    """

    by_allocation: dict[str, dict[str, float]] = {}

    def resolve(trial: Any) -> Known:
        point, params = problem.ask(trial)
        resolved, cost = problem.resolve(point)
        allocation = resolved.allocation.digest
        if allocation not in by_allocation:
            by_allocation[allocation] = features(resolved, problem.shape, problem.signals)
        numbers = by_allocation[allocation]
        return Known(resolved.digest, cost, numbers, params, len(problem.seeds_of(resolved)) if repeats else 1)

    return resolve


def features(trial: Trial, shape: ModelShape, signals: Mapping[str, Signal]) -> dict[str, float]:
    """Numbers of an allocation that say more about accuracy than the knobs it came from. All lie in [0, 1].

    depth    mean layer of its experts or ranks, weighted by their number (.5 where it has none)
    routed   share of the picks on the task that go to the chosen experts (MoE models with a routing signal)
    """
    allocation, last = trial.allocation, max(shape.num_layers - 1, 1)
    found: dict[int, float] = {}
    match allocation:
        case ExpertSelection():
            found = {layer: float(len(ids)) for layer, ids in allocation.experts.items()}
        case ExpertCounts():
            for module in shape.modules:
                found[module.layer] = found.get(module.layer, 0.0) + allocation.counts.get(module.path, 0)
        case ModuleRanks():
            for module in shape.modules:
                found[module.layer] = found.get(module.layer, 0.0) + sum(allocation.of(module))
    experts = sum(found.values())
    numbers = {"depth": sum(layer * n for layer, n in found.items()) / experts / last if experts else 0.5}
    selection = allocation.selection(shape) if isinstance(allocation, ModuleRanks) and shape.is_moe else allocation
    if isinstance(selection, ExpertSelection) and (routing := signals.get("routing")):
        picks = {layer: routing.metric(layer, "count") for layer in shape.moe_layers}
        chosen = sum(picks[layer][i] for layer, ids in selection.experts.items() for i in ids)
        numbers["routed"] = chosen / max(sum(map(sum, picks.values())), 1.0)
    return numbers


@dataclass(frozen=True)
class Candidate:
    """A point of the space; `inputs` are its columns of the model's input, inactive parameters left out."""

    params: Mapping[str, Any]
    distributions: Mapping[str, BaseDistribution]
    known: Known
    inputs: Mapping[str, float]


class Drawing(Asked):
    """A trial that draws every parameter uniformly, or near those of `parent`, and remembers what was asked."""

    def __init__(self, random: np.random.Generator, parent: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self._random = random
        self._parent = parent or {}
        self._moves = 1.5 / max(len(self._parent), 1)  # one or two parameters move

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


def candidate(trial: Asked, resolve: Callable[[Any], Known]) -> Candidate:
    """The point that the space makes of a trial; raises what `resolve` raises where it is none."""
    known = resolve(trial)
    params = trial.params if known.params is None else {name: known.params[name] for name in trial.params}
    inputs = {f" {name}": value for name, value in known.features.items()}  # no parameter begins with a blank
    for name, value in params.items():
        distribution = trial.distributions[name]
        if isinstance(distribution, CategoricalDistribution):
            inputs[f"{name}={value}"] = 1.0
        else:
            inputs[name] = _unit(distribution, value)
    return Candidate(params, trial.distributions, known, inputs)


@dataclass(frozen=True)
class Inputs:
    """What the columns of the model's input are.

    names      of the columns but the last, which is log parameters
    low, high  range of the parameters, which lie in [0, 1] there
    """

    names: tuple[str, ...] = ()
    low: int = 0
    high: int = 0

    @classmethod
    def of(cls, points: Iterable[Candidate]) -> Inputs:
        """Those that these points have."""
        return cls().including(points)

    @property
    def dims(self) -> int:
        """Number of columns."""
        return len(self.names) + 1

    def including(self, points: Iterable[Candidate]) -> Inputs:
        """The same with what these points have besides."""
        points = list(points)
        if not points:
            return self
        costs = [max(point.known.cost, 1) for point in points] + [cost for cost in (self.low, self.high) if cost]
        names = tuple(sorted({name for point in points for name in point.inputs}.union(self.names)))
        return Inputs(names, min(costs), max(costs))

    def matrix(self, points: Sequence[Candidate]) -> Array:
        """Inputs of the model: features, parameters in [0, 1], one column a category, log parameters. Shape [N, D].

        Parameters that a branch of the space does not have stand in the middle; its category tells the branches apart.
        A column that is none of `names` is left out.
        """
        column = {name: place for place, name in enumerate(self.names)}
        x = np.empty((len(points), self.dims))
        x[:, :-1] = [0.0 if "=" in name else 0.5 for name in self.names]
        for row, point in enumerate(points):
            for name, value in point.inputs.items():
                if name in column:
                    x[row, column[name]] = value
        cost = np.log([max(point.known.cost, 1) for point in points])
        low, high = math.log(max(self.low, 1)), math.log(max(self.high, 1))
        x[:, -1] = (cost - low) / ((high - low) or 1.0)
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
