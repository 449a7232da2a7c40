"""What a study against a table searches: the rows of the table.

Nothing is made up: a point that the table does not hold is answered as infeasible. So that points are in the table,
numeric knobs are drawn as the space draws them and then take the nearest of the table's values, and categorical ones
are drawn from those that occur. A table of a full grid therefore holds nearly every point that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from types import MappingProxyType
from typing import Any

from allocators.core.errors import InfeasibleError, StudyError
from allocators.core.types import Allocation, ModelShape, Point, Recipe, Signal, SignalKind, Trial
from search.points.asked import PinnedTrial
from search.problem import Problem, load_space
from search.replay import Table


@dataclass(frozen=True)
class TableProblem(Problem):
    """A problem whose points are rows of a table. Signals, shape and recipe are those it was recorded with."""

    table: Table = field(kw_only=True)
    study_seed: int = 0

    @property
    def is_recorded(self) -> bool:
        """True."""
        return True

    @property
    def is_table(self) -> bool:
        """False, also where the space is a table."""
        return False  # recorded as a grid of which every row was trained; now it is searched

    @property
    def needs(self) -> list[SignalKind]:
        """No kind of signal."""
        return []  # it has the signals that the recording study measured

    def measured(self, signals: Mapping[str, Signal]) -> Problem:
        """The same problem: there is nothing to add."""
        assert not signals
        return self

    def ask(self, trial: Any) -> tuple[Point, dict[str, Any]]:
        """The point with every suggested value moved to the nearest one of the table, and its parameters."""
        pinned = PinnedTrial(_Nearest(trial, self.table.values), self.pins)
        return self.suggest(pinned), pinned.params

    def recorded(self, name: str, distribution: Any, value: Any) -> Any:
        """The nearest value of the table, where the knob can have it."""
        numbers = [each for each in self.table.values.get(name, ()) if _is_number(each)]
        if not hasattr(distribution, "low") or not numbers:
            return value
        nearest = type(value)(_nearest(numbers, value, log=distribution.log))
        return nearest if distribution.low <= nearest <= distribution.high else value

    def allocate(self, point: Point, *, seed: int | None = None) -> Allocation:
        """As the recording study allocated: a draw that all seeds share was made with that study's own seed."""
        return self._with_its_seed.allocate(point, seed=self.seed if seed is None else seed)

    @cached_property
    def _with_its_seed(self) -> Problem:
        own = {f.name: getattr(self, f.name) for f in fields(Problem)}
        return Problem(**own | {"seed": self.study_seed})

    def seeds_of(self, trial: Trial) -> Sequence[int]:
        """Seeds that the table has a row of the point for: the study's own, those after it, then those before it."""
        return sorted(self.table.seeds_of.get(trial.point, ()), key=lambda seed: (seed < self.seed, seed))

    def resolve(self, point: Point) -> tuple[Trial, int]:
        """Raises InfeasibleError, too, where the table has no row for the point."""
        trial, cost = super().resolve(point)
        if trial.digest not in self.table.rows:
            raise InfeasibleError(f"the table {self.table.name} has no row for this point at seed {trial.seed}")
        return trial, cost


def table_problem(
    table: Table, *, seed: int, max_trainable_params: int = 0, pins: Mapping[str, Any] = MappingProxyType({})
) -> TableProblem:
    """What a study against the table searches; needs neither the model nor the task.

    Raises StudyError for a seed that was not recorded, or a budget below the table's smallest row.
    """
    if seed not in table.seeds:
        listed = ", ".join(map(str, table.seeds))
        raise StudyError(f"seed={seed} is not in the table {table.name}: choose from {listed}")
    rows = [row for row in table.rows.values() if row.outcome.trial.seed == seed]
    smallest = min(row.outcome.trainable_params for row in rows)
    if 0 < max_trainable_params < smallest:
        raise StudyError(
            f"max_trainable_params={max_trainable_params:,} is below the smallest row of the table {table.name}, "
            f"{smallest:,}: raise it"
        )
    shape = ModelShape.from_json(table.about["shape"])
    recipes = [row.outcome.trial.recipe for row in rows]
    same = {f.name: getattr(recipes[0], f.name) for f in fields(Recipe)}
    same = {name: value for name, value in same.items() if all(getattr(r, name) == value for r in recipes)}
    return TableProblem(
        space=load_space(table.about["identity"]["space"], shape),
        shape=shape,
        model=rows[0].outcome.trial.model,
        task=rows[0].outcome.trial.task,
        seed=seed,
        max_trainable_params=max_trainable_params,
        signals={kind: Signal.from_json(signal) for kind, signal in table.about["signals"].items()},
        task_recipe=same,
        pins=dict(pins),
        table=table,
        study_seed=rows[0].study_seed,
    )


class _Nearest:
    """A trial whose values are those that a table has: the nearest to what the real trial suggests.

    Choices among three or more numbers are drawn as the ordered parameter that they are, from half a gap below the
    first to half a gap above the last, so that every choice is equally likely where they are equally far apart.
    """

    def __init__(self, trial: Any, values: Mapping[str, Sequence[Any]]) -> None:
        self._trial = trial
        self._values = values

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        known = [choice for choice in choices if choice in self._values.get(name, choices)] or list(choices)
        if len(known) == 1:  # nothing to draw; another branch of the space may have more
            return known[0]
        if len(known) < 3 or not all(_is_number(choice) for choice in known):
            return self._trial.suggest_categorical(name, known)
        ordered = sorted(known)
        log = ordered[0] > 0 and ordered[-1] / ordered[0] >= 10
        scale: Callable[[float], float] = math.log if log else float
        back: Callable[[float], float] = math.exp if log else float
        places = [scale(value) for value in ordered]
        low = back(places[0] - (places[1] - places[0]) / 2)
        high = back(places[-1] + (places[-1] - places[-2]) / 2)
        return _nearest(ordered, self._trial.suggest_float(name, low, high, log=log), log=log)

    def suggest_float(self, name: str, low: float, high: float, **options: Any) -> float:
        value = self._trial.suggest_float(name, low, high, **options)
        return float(_nearest(self._numbers(name), value, log=options.get("log", False)))

    def suggest_int(self, name: str, low: int, high: int, **options: Any) -> int:
        value = self._trial.suggest_int(name, low, high, **options)
        return int(_nearest(self._numbers(name), value, log=options.get("log", False)))

    def _numbers(self, name: str) -> list[Any]:
        return [value for value in self._values.get(name, ()) if _is_number(value)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _nearest(values: Sequence[Any], value: float, *, log: bool) -> Any:
    """Of the values the nearest, the smaller of two; the value itself where there are none."""
    if not values:
        return value
    if log:
        return min(values, key=lambda v: (abs(math.log(v / value)), v) if v > 0 else (math.inf, v))
    return min(values, key=lambda v: (abs(v - value), v))
