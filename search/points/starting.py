"""The points that a search tries first: those of the space, completed by the study's own recipe, and checked.

starting_points(problem)      # whatever is wrong with one is said before anything starts
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from allocators.core import plugins
from allocators.core.errors import SpaceError, StudyError, shown, unknown
from allocators.core.types import TRANSFERABLE
from search.points.asked import FixedTrial
from search.problem import Problem
from search.text import settings_of
from trainers.recipes import make_recipe

# Recipe settings that say how large updates are: wrong by an order of magnitude they break a training.
RANK, SCALED_RATE = "rank", "scaled_rate"
UPDATES = ("lora_alpha", "learning_rate", SCALED_RATE)
MOST = 1000


def starting_points(problem: Problem) -> list[dict[str, Any]]:
    """The space's starting points; recipe settings that a point leaves out take the study's own values.

    Where neither task nor command line says how large updates are, they are those of `TRANSFERABLE`. A grid, which
    is searched once it was recorded (`replay=`), may have none; of a table those are left out that it has no row for.

    Raises StudyError where the space's code fails, or a point is none of its points: it has a knob that the space does
    not have or does not ask for there, or a value that the space could not suggest.
    """
    suggested = (problem.task_recipe, problem.fixed_recipe)
    says = set(UPDATES) & {name for layer in suggested for name in layer}
    own = settings_of(make_recipe(*(() if says else (TRANSFERABLE,)), *suggested))
    fixed = {**problem.pins, **problem.free}
    return [own | point | fixed for point in _points(problem)]


def _points(problem: Problem) -> list[dict[str, Any]]:
    space, what = problem.space, f"space {problem.space_name}"
    if not hasattr(space, "starting_points"):
        return []
    place = plugins.place_of(space, space.starting_points)
    with plugins.failing(space, what, SpaceError):
        given = space.starting_points(problem.shape)
    if not isinstance(given, list | tuple) or len(given) > MOST:
        raise SpaceError(f"{what} starts from {plugins.returned(given)} and not a list of at most {MOST} ({place})")
    free = replace(problem, pins={})  # pins may lead elsewhere than a point's own values
    known = []
    for number, point in enumerate(given, start=1):
        try:
            _check(free, point)
            known.append(dict(point))
        except StudyError as error:
            if problem.is_recorded:
                continue
            values = shown(str(dict(point)) if isinstance(point, Mapping) else repr(point))
            raise StudyError(
                f"starting point {number} of space={problem.space_name} is none of its points: {error} ({values}; "
                f"{place})"
            ) from error
    return known


def _check(problem: Problem, point: Any) -> None:
    if not isinstance(point, Mapping) or not all(isinstance(name, str) for name in point):
        raise StudyError("it must be a dict of knobs and values")
    trial = FixedTrial(point)
    answer, params = problem.ask(trial)
    for name in point:
        if name not in trial.asked and name not in params:
            raise unknown("knob", name, trial.asked)
    make_recipe(answer.recipe)
