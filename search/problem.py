"""From a point of the space to a trial that can be trained: allocate, count, check the budget. No Ray, no torch.

`Problem` is what a study searches: the model's shape, its space, the measured signals and everything the points share.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, TypeVar

from allocators.core import plugins, words
from allocators.core.errors import BudgetError, InfeasibleError, StudyError, unknown
from allocators.core.types import Allocation, ModelShape, Point, Signal, SignalKind, Trial
from allocators.core.words import Value
from search.config import MOST_SEED, SETTINGS, make_recipe

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """Everything that the points of a study share.

    signals        measured signals by kind; empty in a dry run
    task_recipe    recipe settings that the task file suggests; a point's settings win over them
    fixed_recipe   `recipe.NAME=VALUE`; wins over a point's settings
    pins           `space.NAME=VALUE`
    """

    space: ModuleType
    shape: ModelShape
    model: str
    task: str
    seed: int = 0
    max_trainable_params: int = 0
    signals: Mapping[str, Signal] = field(default_factory=dict)
    task_recipe: Mapping[str, Any] = field(default_factory=dict)
    fixed_recipe: Mapping[str, Any] = field(default_factory=dict)
    pins: Mapping[str, Value] = field(default_factory=dict)

    @property
    def suggest(self) -> Callable[[Any, ModelShape], Point]:
        """The space's own function from a trial to a point."""
        suggest: Callable[[Any, ModelShape], Point] = self.space.suggest
        return suggest

    def ask(self, trial: Any) -> tuple[Point, dict[str, Any]]:
        """The point that the space suggests on a trial, pinned knobs given, and its parameters."""
        pinned = PinnedTrial(trial, self.pins, learning_rate=self.fixed_recipe.get("learning_rate"))
        return self.suggest(pinned, self.shape), pinned.params

    @property
    def is_table(self) -> bool:
        """Whether the space is a fixed grid: every point of it is trained, and there is nothing to search."""
        return getattr(self.space, "TABLE", False)

    @property
    def needs(self) -> list[SignalKind]:
        """Kinds of signal that have to be measured: what the space's allocators read, or the pinned one of them."""
        return kinds_read([str(self.pins["allocator"])] if "allocator" in self.pins else self.space.ALLOCATORS)

    def measured(self, signals: Mapping[str, Signal]) -> Problem:
        """The same with these signals in the place of all that stood for them."""
        return replace(self, signals=signals)

    def allocate(self, point: Point, *, seed: int | None = None) -> Allocation:
        """Raises InfeasibleError where the knobs give no allocation on this model.

        An allocator that draws (it has a `seed`) draws with the study's seed, so that all seeds of a point train one
        allocation; where the point's knob `draw` is "each", with the trial's own `seed`.
        """
        module = plugins.load("allocators", point.allocator)
        knobs = dict(point.knobs)
        if "seed" in inspect.signature(module.allocate).parameters:
            each = knobs.pop("draw", "once") == "each"
            knobs.setdefault("seed", seed if each and seed is not None else self.seed)
        signal = self.signals.get(module.NEEDS) if module.NEEDS else None
        return plugins.call(module, signal, self.shape, knobs)

    def resolve(self, point: Point) -> tuple[Trial, int]:
        """The trial that a point asks for and its exact number of trainable parameters.

        Raises InfeasibleError where the allocation does not exist, BudgetError where it is over
        `max_trainable_params`, StudyError for settings that no point could have.
        """
        recipe = make_recipe(self.task_recipe, point.recipe, self.fixed_recipe)
        allocation = self.allocate(point)
        params = allocation.trainable_params(self.shape, rank=recipe.rank)
        trial = Trial(allocation, recipe, self.model, self.task, self.seed, point.allocator, dict(point.knobs))
        if self.max_trainable_params and params > self.max_trainable_params:
            raise BudgetError(f"{params:,} trainable parameters are more than {self.max_trainable_params:,}")
        return trial, params

    def seeds_of(self, trial: Trial) -> Sequence[int]:
        """Seeds that the point of a trial can be trained with, in the order in which they are taken; its own first."""
        return range(self.seed, MOST_SEED + 1)

    def repeat(self, trial: Trial, seed: int) -> Trial:
        """The same point with another seed: of adapter, data order, and of the draw where `draw` is each."""
        if trial.knobs.get("draw") != "each":
            return replace(trial, seed=seed)
        return replace(trial, seed=seed, allocation=self.allocate(Point(trial.allocator, trial.knobs), seed=seed))


@dataclass(frozen=True)
class Proposal:
    """A point that has to be trained: the trial, its exact cost, and the sampler parameters it came from.

    sampler_seconds   what it took to think of it, the points answered on the way included
    tests             it is evaluated on the test split at its end: nothing is selected among such trainings
    """

    trial: Trial
    trainable_params: int
    params: Mapping[str, Any]
    sampler_seconds: float = 0.0
    tests: bool = False


class PinnedTrial:
    """An Optuna trial whose pinned knobs are not suggested but given; everything else goes to the real trial.

    learning_rate   that all points have: the knob scaled_rate then follows from the point's lora_alpha
    """

    def __init__(self, trial: Any, pins: Mapping[str, Value], *, learning_rate: Value | None = None) -> None:
        self._trial = trial
        self._pins = pins
        self._learning_rate = None if learning_rate is None else _number(learning_rate)
        self.params: dict[str, Any] = {}

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        """Raises StudyError where the pin is none of the choices, or may mean several."""
        if name not in self._pins:
            return self._keep(name, self._trial.suggest_categorical(name, choices))
        meant = words.matching(self._pins[name], choices)
        if not meant:
            raise unknown(f"value of space.{name}", str(self._pins[name]), [str(c) for c in choices])
        if len(meant) > 1:
            several = ", ".join(map(repr, meant))
            raise StudyError(f"space.{name}={self._pins[name]} is one of {several}: quote it, in a file (config=FILE)")
        return self._keep(name, meant[0])

    def suggest_float(self, name: str, low: float, high: float, **options: Any) -> float:
        """Raises StudyError where the pin is no finite number; it may lie outside the bounds."""
        if name not in self._pins:
            if name == "scaled_rate" and self._learning_rate is not None and "lora_alpha" in self.params:
                return self._keep(name, float(self._learning_rate * self.params["lora_alpha"]))
            suggested: float = self._trial.suggest_float(name, low, high, **options)
            return self._keep(name, suggested)
        value = _number(self._pins[name])
        if value is None or not math.isfinite(value):
            raise StudyError(
                f"space.{name}={self._pins[name]} is not possible: it must be a number, the space uses {low} .. {high}"
            )
        return self._keep(name, float(value))

    def suggest_int(self, name: str, low: int, high: int, **options: Any) -> int:
        """Raises StudyError where the pin is no whole number; it may lie outside the bounds."""
        if name not in self._pins:
            suggested: int = self._trial.suggest_int(name, low, high, **options)
            return self._keep(name, suggested)
        value = _number(self._pins[name])
        if not isinstance(value, int):
            raise StudyError(
                f"space.{name}={self._pins[name]} is not possible: it must be whole, the space uses {low} .. {high}"
            )
        return self._keep(name, value)

    def _keep(self, name: str, value: T) -> T:
        self.params[name] = value
        return value


def kinds_read(allocators: Iterable[str]) -> list[SignalKind]:
    """Kinds of signal that these allocators read."""
    return sorted({kind for name in allocators if (kind := plugins.load("allocators", name).NEEDS)})


def _number(pin: Value) -> int | float | None:
    """A pin as the number that it is, or that a file has between quotes; None where it is none."""
    value = words.read_value(pin) if isinstance(pin, str) else pin
    return None if isinstance(value, bool | str) else value


def load_space(name: str, shape: ModelShape) -> ModuleType:
    """The space of that name, checked against the model.

    Raises StudyError for an unknown name, for a file that lacks what a space has, or for a model without (or with)
    experts where the space needs the other.
    """
    space = plugins.load("spaces", name, "space")
    if lacking := [part for part in ("BASE", "ALLOCATORS") if not hasattr(space, part)]:
        raise StudyError(f"space={name} has no {', no '.join(lacking)}: spaces/__init__.py says what a space defines")
    if space.BASE == "moe" and not shape.is_moe:
        raise StudyError(
            f"space={name} chooses among the experts of an MoE model, but {shape.name} is dense: "
            f"use model=tiny-moe or another MoE model{_alternatives('dense')}"
        )
    if space.BASE == "dense" and shape.is_moe:
        raise StudyError(
            f"space={name} adds experts to a dense model, but {shape.name} already has experts: "
            f"use a dense model{_alternatives('moe')}"
        )
    return space


def _alternatives(base: str) -> str:
    spaces = {name: plugins.load("spaces", name, "space") for name in plugins.names("spaces")}
    fitting = [name for name, space in spaces.items() if getattr(space, "BASE", "") == base]
    return f", or space={' | '.join(fitting)}" if fitting else ""


class _Corner:
    """A trial that takes one end of every numeric knob and a scripted choice of every categorical one."""

    def __init__(self, script: list[int], *, high: bool) -> None:
        self._script = script
        self._high = high
        self.taken: list[tuple[int, int]] = []  # (choice, number of choices), in the order asked

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        turn = len(self.taken)
        choice = self._script[turn] if turn < len(self._script) else 0
        self.taken.append((choice, len(choices)))
        return choices[choice]

    def suggest_float(self, name: str, low: float, high: float, **options: Any) -> float:
        return high if self._high else low

    def suggest_int(self, name: str, low: int, high: int, **options: Any) -> int:
        return high if self._high else low


def corners(problem: Problem, *, high: bool = False) -> Iterator[tuple[Point, dict[str, Any]]]:
    """Every branch of the space, its numeric knobs at their low (or high) end, with the parameters that led there.

    Walks all combinations of categorical choices, so the first and the last parameter count of a space and the names
    of all its knobs are known without luck.
    """
    script: list[int] = []
    while True:
        corner = _Corner(script, high=high)
        yield problem.ask(corner)
        taken = corner.taken
        while taken and taken[-1][0] + 1 == taken[-1][1]:
            taken.pop()
        if not taken:
            return
        script = [choice for choice, _ in taken[:-1]] + [taken[-1][0] + 1]


def check_pins(problem: Problem) -> dict[str, Value]:
    """The pins as values of their knobs: `2468` is text where the choices are texts.

    Raises StudyError for a pinned knob that the space does not have, or a value it cannot take.
    """
    seen = {name: value for _, params in corners(problem) for name, value in params.items()}
    for name in problem.pins:
        if name not in seen:
            space = problem.space.__name__.rsplit(".", 1)[-1]
            if name in SETTINGS:
                raise StudyError(f"space={space} does not propose {name}: recipe.{name}={problem.pins[name]} fixes it")
            raise unknown(f"knob of space={space}", name, seen)
    return {name: seen[name] for name in problem.pins}


def cheapest(problem: Problem) -> int | None:
    """Trainable parameters of the space's smallest allocation; None where none is feasible."""
    unlimited = replace(problem, max_trainable_params=0)
    costs = []
    for point, _ in corners(problem):
        try:
            costs.append(unlimited.resolve(point)[1])
        except InfeasibleError:
            continue
    return min(costs, default=None)


def check_budget(problem: Problem) -> None:
    """Raises StudyError when no point of the space fits `max_trainable_params`, or none is feasible at all."""
    smallest = cheapest(problem)
    if smallest is None:
        point, _ = next(corners(problem))
        problem.resolve(point)  # raises with the reason
    elif problem.max_trainable_params and smallest > problem.max_trainable_params:
        raise StudyError(
            f"max_trainable_params={problem.max_trainable_params:,} is below the smallest allocation of "
            f"{problem.shape.name} in this space, {smallest:,}: raise it, or lower the rank"
        )


def placeholder(kind: SignalKind, shape: ModelShape, *, datasets: int = 1) -> Signal:
    """Stands in for a signal that was not measured yet, so that parameters can be counted without weights.

    Allocators with FIXED_COST have their exact count under it. Routing is flat: every other routing needs at most as
    many experts for the same share, so coverage and ESFT have an upper bound. Sensitivity ranks the largest matrices
    first, so LoRA-SMoE's count is about the largest there can be.
    """
    rows: dict[str, dict[str, tuple[float, ...]]]
    if kind == "routing":
        metrics = ("count", "mass")
        rows = {str(layer): dict.fromkeys(metrics, (1.0,) * shape.experts_in(layer)) for layer in shape.moe_layers}
    elif kind == "spectrum":
        # not flat: then AlphaLoRA would be uniform, and be answered as its repeat
        rows = {m.path: dict.fromkeys(("hill", "alpha_hat", "stable_rank"), (2.0 + m.layer,)) for m in shape.modules}
    else:
        by_size = sorted(shape.modules, key=lambda m: (m.lora_params(8) + m.in_features, m.path))
        rows = {m.path: {"sum_sq_grad": (float(place),) * datasets} for place, m in enumerate(by_size, start=1)}
    return Signal(
        kind, rows, axis="expert" if kind == "routing" else "dataset", unit="1", provenance={"measured": False}
    )
