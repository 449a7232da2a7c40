"""The look at a study's task before anything is started: every row and its right answer, with the tokenizer alone."""

from __future__ import annotations

import sys

from search.config import RunConfig
from search.problem import Problem
from search.session.make_workers import Locations, worker_setup


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
    task = tasks.load_task(setup.task, **setup.task_options)
    tokenizer = models.tokenizer_of(config.model, trust_remote_code=config.trust_remote_code)
    for sentence in tasks.look(task, tokenizer, limits).notes:
        print(f"note: {sentence}", file=sys.stderr)
