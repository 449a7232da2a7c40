"""From the words of the command line to what the study searches. Loads no weights and starts nothing."""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from types import ModuleType

from allocators.core import plugins, words
from allocators.core.errors import StudyError, unknown
from allocators.core.shapes import unnamed_experts
from allocators.core.types import ModelShape
from search.config import AUTO, THREE, RunConfig
from search.points.starting import starting_points
from search.problem import (
    Problem,
    check_budget,
    check_pins,
    check_recipes,
    corners,
    hopeless,
    kinds_read,
    load_space,
    placeholder,
)
from search.session.look import look


def prepare(config: RunConfig) -> tuple[RunConfig, Problem]:
    """What the study searches, and its configuration with `trials` and `seeds` as numbers.

    Raises StudyError for anything that cannot work: unknown plug-in, space, model, task or knob, a model of the wrong
    kind, a task without a training split, a budget below the smallest allocation, a row that cannot be trained on or
    scored.
    """
    for plugin in config.plugins:
        plugins.add(plugin)
    config, problem = prepare_replay(config) if config.replay else (config, prepare_training(config))
    if problem.is_table and config.scheduler != "none":
        raise StudyError(
            f"scheduler={config.scheduler} stops trainings early, and every row of a table (space={config.space}) is "
            "trained to its end: leave it out"
        )
    if not config.replay:
        problem = replace(problem, longest_row=look(config, problem))
    return amounts(config, problem), problem


def prepare_training(config: RunConfig) -> Problem:
    """What a study searches that trains."""
    from trainers import models, tasks

    check_twice(config)
    shape = models.shape_of(config.model, trust_remote_code=config.trust_remote_code)
    space = load_space(config.space, shape)
    task = tasks.check_task(config.task, select_on=config.select_on)
    _check_deployable(config, shape)
    kinds = kinds_read(space.ALLOCATORS)
    problem = Problem(
        space=space,
        shape=shape,
        model=config.model,
        task=config.task,
        seed=config.seed,
        max_trainable_params=config.max_trainable_params,
        deployable=config.deployable,
        signals={kind: placeholder(kind, shape, datasets=task.num_datasets) for kind in kinds},
        task_recipe=task.recipe,
        fixed_recipe=config.recipe,
        # a recipe setting that the space would propose is fixed for the sampler as well
        pins={**{k: v for k, v in config.recipe.items() if k in _knobs_of(space, shape)}, **config.pins},
    )
    problem = replace(problem, pins=check_pins(problem))
    check_recipes(problem)
    check_budget(problem)
    starting_points(problem)  # says what is wrong with them
    for allocator, reason in hopeless(problem).items():
        print(f"warning: no point of {allocator} can be trained: {reason}", file=sys.stderr)
    return problem


def _check_deployable(config: RunConfig, shape: ModelShape) -> None:
    """Raises StudyError where no point of this model could have the form that `deployable` asks for."""
    if config.deployable == "merged" and config.quantization:
        raise StudyError(
            f"deployable=merged and quantization={config.quantization} do not go together: no sum fits into packed "
            "weights; leave one of them out"
        )
    if config.deployable == "vllm" and shape.is_moe:
        from trainers import models

        if reason := unnamed_experts(str(models.config_of(config.model).get("model_type"))):
            raise StudyError(f"deployable=vllm: {reason}: leave it out, or deployable=merged")


def prepare_replay(config: RunConfig) -> tuple[RunConfig, Problem]:
    """What a study searches that asks a table: the settings that it was recorded with, and its rows.

    Raises StudyError for a table that does not exist, a seed or budget that it has no row for, a setting that it was
    not recorded with.
    """
    from search import replay
    from search.replay.problem import table_problem

    table, defaults = replay.load(config.replay), RunConfig()
    known = {f.name for f in fields(RunConfig)}  # a table may be younger than a key
    settings = {key: value for key, value in table.settings.items() if key in known and key != "replay"}
    for key, recorded in {**settings, "recipe": {}}.items():
        if getattr(config, key) not in (recorded, getattr(defaults, key)):
            asked = f"{key}={getattr(config, key)}" if key != "recipe" else f"recipe.{min(config.recipe)}"
            raise StudyError(f"{asked} is not what {config.replay} was recorded with ({recorded}): leave it out")
    problem = table_problem(table, seed=config.seed, max_trainable_params=config.max_trainable_params, pins=config.pins)
    problem = replace(problem, pins=check_pins(problem))
    for name, pin in problem.pins.items():
        if not words.matching(pin, occurring := table.values.get(name, [pin])):
            raise unknown(f"value of space.{name} in the table", str(pin), map(str, occurring))
    starting_points(problem)  # says what is wrong with them
    if (config.max_forgetting or config.objectives == THREE) and not any(
        row.outcome.forgetting for row in table.rows.values()
    ):
        raise StudyError(
            f"{config.replay} has no training whose forgetting was measured: leave max_forgetting= and objectives= "
            "out, or export a study with forgetting="
        )
    return replace(config, **settings), problem


def amounts(config: RunConfig, problem: Problem) -> RunConfig:
    """The same with `trials` and `seeds` as numbers where they were left to their defaults, and pins of their knobs."""
    trials, seeds = config.trials, config.seeds
    if trials == -1:
        trials = len(list(corners(problem))) if problem.is_table else 16
    if seeds == -1 or (seeds == AUTO and problem.is_table):  # a table is not searched: every row has its seeds
        seeds = getattr(problem.space, "SEEDS", 1) if problem.is_table else 1
    pins = {name: problem.pins[name] for name in config.pins}
    return replace(config, trials=trials, seeds=seeds, pins=pins)


def check_twice(config: RunConfig) -> None:
    """Raises StudyError for a setting that `recipe.NAME=` and `space.NAME=` both fix."""
    rates = {"learning_rate": "scaled_rate"}  # one follows from the other
    for name in config.recipe:
        if pin := next((pin for pin in (name, rates.get(name)) if pin in config.pins), None):
            raise StudyError(f"recipe.{name} and space.{pin} both fix {name}: leave one of them out")


def _knobs_of(space: ModuleType, shape: ModelShape) -> set[str]:
    bare = Problem(space=space, shape=shape, model="", task="")  # resolves nothing: names need no signal
    return {name for _, params in corners(bare) for name in params}
