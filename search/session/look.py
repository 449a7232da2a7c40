"""The look at a study's task before anything is started: every row and its right answer, with the tokenizer alone."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from search.config import RunConfig
from search.problem import Problem
from search.session.make_workers import Locations, worker_setup
from trainers.tasks import Limits


def look(config: RunConfig, problem: Problem) -> None:
    """Prints what the user should know of the task, and says first whose code its file runs.

    A study that has results is not looked at again: its first run was.

    Raises StudyError with one line for what cannot be trained or scored.
    """
    from trainers import models, tasks

    locations = Locations.of(config)
    if not config.dry_run and (locations.folder / "outcomes.jsonl").is_file():
        return
    for sentence in tasks.check_task(config.task).code:
        print(f"note: {sentence}", file=sys.stderr)
    setup = worker_setup(config, locations)
    limits = tasks.Limits.of(models.config_of(config.model), recipe={**problem.task_recipe, **problem.fixed_recipe})
    shipped = config.model in models.EMBEDDED and set(config.task.split(",")) <= tasks.EMBEDDED.keys()
    notes = _notes_on_shipped if shipped else _notes
    options = tuple(sorted(setup.task_options.items()))
    for sentence in notes(config.model, setup.task, options, limits, trusted=config.trust_remote_code):
        print(f"note: {sentence}", file=sys.stderr)


def _notes(
    model: str, task: str, options: tuple[tuple[str, Any], ...], limits: Limits, *, trusted: bool
) -> tuple[str, ...]:
    """What `tasks.look` says of a task with the tokenizer of a model."""
    from trainers import models, tasks

    tokenizer = models.tokenizer_of(model, trust_remote_code=trusted)
    return tuple(tasks.look(tasks.load_task(task, **dict(options)), tokenizer, limits).notes)


# What comes with the package stays as it is while a process runs: a notebook or a test looks once.
_notes_on_shipped = cache(_notes)
