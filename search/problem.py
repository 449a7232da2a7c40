"""From a point of the space to a trial that can be trained: allocate, count, check the budget. No Ray, no torch.

`Problem` is what a study searches: the model's shape, its space, the measured signals and everything the points share.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from random import Random
from types import ModuleType
from typing import Any

from allocators import _roles
from allocators.core import checks, plugins, tables
from allocators.core.errors import BudgetError, InfeasibleError, SpaceError, StudyError, shown, unknown
from allocators.core.types import Allocation, ModelShape, ModuleShape, Point, Signal, SignalKind, Trial, canonical_json
from allocators.core.words import Value
from search.config import MOST_SEED, MOST_SEEDS
from search.points.asked import ANY, Corner, Kind, PinnedTrial, differs
from trainers.recipes import SETTINGS, make_recipe

MOST_CORNERS = 500  # combinations of choices that are walked one by one
DRAWN_CORNERS = 100  # where there are more
MOST_ROWS = 20_000  # of a table

MOST_ALLOCATED = 256  # allocations that are remembered


@dataclass(frozen=True)
class Problem:
    """Everything that the points of a study share.

    signals        measured signals by kind; empty in a dry run
    task_recipe    recipe settings that the task file suggests; a point's settings win over them
    fixed_recipe   `recipe.NAME=VALUE`; wins over a point's settings
    pins           `space.NAME=VALUE`
    longest_row    tokens of the longest training row; 0 where nobody looked
    """

    space: ModuleType
    shape: ModelShape
    model: str
    task: str
    seed: int = 0
    max_trainable_params: int = 0
    deployable: str = ""
    signals: Mapping[str, Signal] = field(default_factory=dict)
    task_recipe: Mapping[str, Any] = field(default_factory=dict)
    fixed_recipe: Mapping[str, Any] = field(default_factory=dict)
    pins: Mapping[str, Value] = field(default_factory=dict)
    longest_row: int = 0

    @property
    def space_name(self) -> str:
        """The space by the name that `space=` takes."""
        return plugins.plugin_name(self.space)

    def suggest(self, trial: Any) -> Point:
        """The point that the space suggests on a trial.

        Raises SpaceError for whatever its code raises, and for what is no point of it.
        """
        with plugins.failing(self.space, f"space {self.space_name}", SpaceError):
            point = self.space.suggest(trial, self.shape)
        if not isinstance(point, Point):
            raise self.refused(f"suggest returned {plugins.returned(point)} and not a Point")
        try:
            checks.scalars(point.knobs, "knobs")
            checks.scalars(point.recipe, "recipe")
            if point.allocator not in self.space.ALLOCATORS:
                raise ValueError(f"its ALLOCATORS lack {shown(repr(point.allocator))}")
        except ValueError as error:
            raise self.refused(f"suggest returned what is no point of it: {error}") from None
        return point

    def refused(self, reason: str) -> SpaceError:
        """The error for a point that no allocator or recipe takes."""
        return SpaceError(f"space {self.space_name}: {reason} ({plugins.place_of(self.space, self.space.suggest)})")

    def ask(self, trial: Any) -> tuple[Point, dict[str, Any]]:
        """The point that the space suggests on a trial, pinned knobs given, and its parameters."""
        rate = self.fixed_recipe.get("learning_rate")
        pinned = PinnedTrial(trial, self.pins, anything=self.fixed_recipe, learning_rate=rate)
        return self.suggest(pinned), pinned.params

    def recorded(self, name: str, distribution: Any, value: Any) -> Any:
        """The value that a point has in the records where a sampler drew this one."""
        return value

    @property
    def free(self) -> dict[str, Any]:
        """Knobs that the space has because they are pinned to `any`, with the value that its starting points have."""
        if ANY not in self.pins.values():
            return {}
        _, first = next(corners(self))
        return {name: first[name] for name, pin in self.pins.items() if pin == ANY and first.get(name, ANY) != ANY}

    @property
    def is_recorded(self) -> bool:
        """Whether its points are trainings on record: of the space's points it may lack some."""
        return False

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

    @cached_property
    def _allocated(self) -> dict[tuple[Any, ...], Allocation]:
        """The latest allocations, by allocator and knobs."""
        return {}

    def allocate(self, point: Point, *, seed: int | None = None) -> Allocation:
        """Raises InfeasibleError where the knobs give no allocation on this model.

        An allocator that draws (it has a `seed`) draws with the study's seed, so that all seeds of a point train one
        allocation; where the point's knob `draw` is "each", with the trial's own `seed`. One that gives ranks (it has a
        `rank`) gives as many parameters as LoRA of the recipe's rank on every matrix has. On an MoE model a point may
        have the knobs of `allocators/_roles.py`.
        """
        module = plugins.load("allocators", point.allocator)
        knobs, of_roles = _roles.split(point.knobs)
        parameters = inspect.signature(module.allocate).parameters
        rank = 0  # of the recipe, where anything depends on it
        if of_roles or ("rank" in parameters and "rank" not in knobs):
            rank = make_recipe(self.task_recipe, point.recipe, self.fixed_recipe).rank
        if "rank" in parameters:
            knobs.setdefault("rank", rank)
        if "seed" in parameters:
            each = knobs.pop("draw", "once") == "each"
            knobs.setdefault("seed", seed if each and seed is not None else self.seed)
        # an allocator is a pure function, and candidates of a search differ in their recipe more than in their knobs
        asked = {**knobs, **of_roles}
        key = (point.allocator, rank, *((name, type(value), value) for name, value in sorted(asked.items())))
        try:
            if (known := self._allocated.get(key)) is not None:
                return known
        except TypeError:  # a knob without a hash
            key = ()
        try:
            plugins.check(module, self.shape, knobs)
            plugins.check_values(module, knobs)
        except StudyError as error:
            raise self.refused(str(error)) from error
        signal = self.signals.get(module.NEEDS) if module.NEEDS else None
        allocation = _roles.call(module, signal, self.shape, asked, rank=rank)
        if key:
            if len(self._allocated) >= MOST_ALLOCATED:
                del self._allocated[next(iter(self._allocated))]
            self._allocated[key] = allocation
        return allocation

    def resolve(self, point: Point) -> tuple[Trial, int]:
        """The trial that a point asks for and its exact number of trainable parameters.

        Raises InfeasibleError where the allocation does not exist or has not the form `deployable`, BudgetError where
        it is over `max_trainable_params`, StudyError for settings that no point could have.
        """
        recipe = make_recipe(self.task_recipe, point.recipe, self.fixed_recipe)
        allocation = self.allocate(point)
        trial = Trial(allocation, recipe, self.model, self.task, self.seed, point.allocator, dict(point.knobs))
        params = self.cost(trial)
        if params == 0:
            raise InfeasibleError(f"{point.allocator} adapts nothing at these knobs: there is nothing to train")
        if self.deployable and (several := getattr(allocation, "several", [])):
            raise InfeasibleError(
                f"{several[0]} has several LoRA experts, which deployable={self.deployable} cannot express"
            )
        if self.max_trainable_params and params > self.max_trainable_params:
            raise BudgetError(f"{params:,} trainable parameters are more than {self.max_trainable_params:,}")
        return trial, params

    def seeds_of(self, trial: Trial) -> Sequence[int]:
        """Seeds that the point of a trial can be trained with, in the order in which they are taken; its own first."""
        return range(self.seed, MOST_SEED + 1)

    def cost(self, trial: Trial) -> int:
        """Trainable parameters of a trial: where each seed draws its own ranks, these differ a little in size."""
        return trial.allocation.trainable_params(self.shape, rank=trial.recipe.rank)

    def repeat(self, trial: Trial, seed: int) -> Trial:
        """The same point with another seed: of adapter, data order, and of the draw where `draw` is each."""
        if trial.knobs.get("draw") != "each":
            return replace(trial, seed=seed)
        point = Point(trial.allocator, trial.knobs, {"rank": trial.recipe.rank})
        return replace(trial, seed=seed, allocation=self.allocate(point, seed=seed))


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


def kinds_read(allocators: Iterable[str]) -> list[SignalKind]:
    """Kinds of signal that these allocators read."""
    return sorted({kind for name in allocators if (kind := plugins.load("allocators", name).NEEDS)})


def load_space(name: str, shape: ModelShape) -> ModuleType:
    """The space of that name, checked against the model.

    Raises StudyError for an unknown name, for a file that lacks what a space has, or for a model without (or with)
    experts where the space needs the other.
    """
    space = plugins.load("spaces", name, "space")
    if lacking := [part for part in ("BASE", "ALLOCATORS") if not hasattr(space, part)]:
        raise StudyError(f"space={name} has no {', no '.join(lacking)}: spaces/__init__.py says what a space defines")
    with plugins.failing(space, f"space {name}", SpaceError):
        _check_parts(space)
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
    fitting = [name for name, space in spaces.items() if getattr(space, "BASE", "") in (base, "any")]
    return f", or space={' | '.join(fitting)}" if fitting else ""


def _check_parts(space: ModuleType) -> None:
    """Raises StudyError where what a space defines is not what spaces/__init__.py says."""

    def must(part: str, be: str) -> StudyError:
        return StudyError(f"{part} must be {be}, got {shown(repr(getattr(space, part)))}")

    if space.BASE not in ("moe", "dense", "any"):
        raise must("BASE", "'moe', 'dense' or 'any'")
    names = space.ALLOCATORS
    if not isinstance(names, tuple | list) or not names or not all(isinstance(one, str) for one in names):
        raise must("ALLOCATORS", "a list of names of allocators")
    if not isinstance(getattr(space, "TABLE", False), bool):
        raise must("TABLE", "True or False")
    seeds = getattr(space, "SEEDS", 1)
    if isinstance(seeds, bool) or not isinstance(seeds, int) or not 1 <= seeds <= MOST_SEEDS:
        raise must("SEEDS", f"a number from 1 to {MOST_SEEDS:,}")
    for part in ("suggest", "starting_points"):
        if not callable(getattr(space, part, print)):
            raise must(part, "a function")
    for one in names:
        plugins.load("allocators", one)
    for part, kind in (("PUBLISHED", tables.Published), ("COMPARISONS", tables.Comparison)):
        entries = getattr(space, part, ())
        if not isinstance(entries, tuple | list) or not all(isinstance(entry, kind) for entry in entries):
            raise must(part, f"a list of {kind.__name__}s (allocators/core/tables.py)")
    canonical_json(tables.facts(space))  # it goes into the study's records


def corners(problem: Problem, *, high: bool = False) -> Iterator[tuple[Point, dict[str, Any]]]:
    """Every branch of the space, its numeric knobs at their low (or high) end, with the parameters that led there.

    Walks all combinations of categorical choices, so the first and the last parameter count of a space and the names
    of all its knobs are known without luck. Of more than `MOST_CORNERS` combinations the others are sampled.

    Raises StudyError for a knob that is asked for in two ways, of which samplers could learn one, and for a table of
    more rows.
    """
    script: list[int] = []
    asked: dict[str, Kind] = {}
    for _ in range(MOST_ROWS if problem.is_table else MOST_CORNERS):
        corner = Corner(script, high=high)
        yield _corner(problem, corner, asked)
        taken = corner.taken
        while taken and taken[-1][0] + 1 == taken[-1][1]:
            taken.pop()
        if not taken:
            return
        script = [choice for choice, _ in taken[:-1]] + [taken[-1][0] + 1]
    if problem.is_table:
        raise StudyError(f"space={problem.space_name} is a table of more than {MOST_ROWS:,} rows: pin some knobs")
    draw = Random(0)
    for _ in range(DRAWN_CORNERS):
        yield _corner(problem, Corner([], high=high, draw=draw), asked)


def _corner(problem: Problem, corner: Corner, asked: dict[str, Kind]) -> tuple[Point, dict[str, Any]]:
    answer = problem.ask(corner)
    for name, kind in corner.asked.items():
        if not problem.is_table and asked.setdefault(name, kind) != kind:
            raise problem.refused(str(differs(name, asked[name], kind)))
    return answer


def check_pins(problem: Problem) -> dict[str, Value]:
    """The pins as values of their knobs: `2468` is text where the choices are texts.

    Raises StudyError for a pinned knob that the space does not have, or a value it cannot take.
    """
    seen = {name: value for _, params in corners(problem) for name, value in params.items()}
    for name in problem.pins:
        if name not in seen:
            space = problem.space_name
            if name in SETTINGS:
                raise StudyError(f"space={space} does not propose {name}: recipe.{name}={problem.pins[name]} fixes it")
            raise unknown(f"knob of space={space}", name, seen)
    free = problem.free
    return {name: ANY if name in free else seen[name] for name in problem.pins}


def check_recipes(problem: Problem) -> None:
    """Raises StudyError where the space proposes a recipe that cannot be, at one end of its ranges."""
    for high in (False, True):
        for point, _ in corners(problem, high=high):
            try:
                make_recipe(problem.task_recipe, point.recipe, problem.fixed_recipe)
            except StudyError as error:
                raise problem.refused(f"with {shown(str(dict(point.recipe)))} {error}") from error


def _resolved(problem: Problem, *, high: bool = False) -> Iterator[tuple[str, int | InfeasibleError]]:
    """Of every corner the allocator, and its trainable parameters or why it has no allocation."""
    unlimited = replace(problem, max_trainable_params=0)
    for point, _ in corners(problem, high=high):
        try:
            yield point.allocator, unlimited.resolve(point)[1]
        except InfeasibleError as error:
            yield point.allocator, error


def cheapest(problem: Problem) -> int | None:
    """Trainable parameters of the space's smallest allocation; None where none is feasible."""
    return min((cost for _, cost in _resolved(problem) if isinstance(cost, int)), default=None)


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


def hopeless(problem: Problem) -> dict[str, str]:
    """Allocators that have an allocation at no corner of the space, and why; the search goes on without them."""
    reasons: dict[str, str] = {}
    for high in (False, True):
        able = set()
        for allocator, cost in _resolved(problem, high=high):
            if isinstance(cost, int):
                able.add(allocator)
            elif high is False:
                reasons.setdefault(allocator, str(cost))
        reasons = {allocator: reason for allocator, reason in reasons.items() if allocator not in able}
        if not reasons:
            break
    return reasons


def placeholder(kind: SignalKind, shape: ModelShape, *, datasets: int = 1) -> Signal:
    """Stands in for a signal that was not measured yet, so that parameters can be counted without weights.

    Allocators with FIXED_COST have their exact count under it. Routing is flat: every other routing needs at most as
    many experts for the same share, so coverage and ESFT have an upper bound. Sensitivity ranks the largest matrices
    first, so LoRA-SMoE's count is about the largest there can be, and so does representation the largest types.
    """
    rows: dict[str, dict[str, tuple[float, ...]]]
    if kind == "routing":
        rows = {
            str(layer): dict.fromkeys(("count", "mass", "reap", "ean"), (1.0,) * shape.experts_in(layer))
            for layer in shape.moe_layers
        }
    elif kind == "spectrum":
        # not flat: then AlphaLoRA would be uniform, and be answered as its repeat
        metrics = ("hill", "alpha_hat", "stable_rank")
        rows = {key: dict.fromkeys(metrics, (2.0 + m.layer,)) for m in shape.modules for key in _rows_of(m)}
        for place, row in enumerate(rows.values()):  # not by layer: rules that choose matrices would choose layers
            row |= {"snr": (1.0 + 7 * place % 13,), "condition": (2.0 + 11 * place % 17,)}
    elif kind == "representation":  # neither flat nor by layer, as above; PLoP takes the types with the most parameters
        shares = [tuple(0.5 / (1 + c + place) for c in range(64)) for place in range(5)]
        rows = {}
        for m in shape.modules:
            norm = (1 / m.lora_params(max(1, m.num_experts)),)
            rows |= {key: {"explained": shares[len(rows) % 5], "feature_norm": norm} for key in _rows_of(m)}
        rows |= {str(layer): {"similarity": (1.0 / (1 + layer % 3),)} for layer in range(shape.num_layers)}
    else:
        by_size = sorted(shape.modules, key=lambda m: (m.lora_params(8) + m.in_features, m.path))
        rows = {
            key: {"sum_sq_grad": (float(place),) * datasets}
            for place, m in enumerate(by_size, start=1)
            for key in _rows_of(m)
        }
    return Signal(
        kind, rows, axis="expert" if kind == "routing" else "dataset", unit="1", provenance={"measured": False}
    )


def _rows_of(module: ModuleShape) -> list[str]:
    """Keys of a module's rows in a signal: of a stack one an expert."""
    return [f"{module.path}.{i}" for i in range(module.num_experts)] if module.num_experts else [module.path]
