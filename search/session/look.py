"""The look at a study's task before anything is started: every row and its right answer, with the tokenizer alone."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from search.config import RunConfig
from search.problem import Problem
from search.session.make_workers import Locations, worker_setup
from trainers import forgetting
from trainers.tasks import Limits


def look(config: RunConfig, problem: Problem) -> int:
    """Prints what the user should know of the task, and says first whose code its file runs.

    Gives the tokens of the longest training row. A study that has results is not looked at again, because its first run
    was: then 0.

    Raises StudyError with one line for what cannot be trained or scored, and for a text of `forgetting=` that is none.
    """
    from trainers import models, tasks

    locations = Locations.of(config)
    if not config.dry_run and (locations.folder / "outcomes.jsonl").is_file():
        return 0
    if config.dry_run:  # a study that trains looks at them when it makes its workers
        models.check_files(config.model, problem.shape)
    for sentence in tasks.check_task(config.task).code:
        print(f"note: {sentence}", file=sys.stderr)
    setup = worker_setup(config, locations)
    limits = tasks.Limits.of(models.config_of(config.model), recipe={**problem.task_recipe, **problem.fixed_recipe})
    shipped = config.model in models.EMBEDDED and set(config.task.split(",")) <= tasks.EMBEDDED.keys()
    seen = _seen_of_shipped if shipped else _seen
    options = tuple(sorted(setup.task_options.items()))
    notes, longest = seen(config.model, setup.task, options, limits, trusted=config.trust_remote_code)
    for sentence in notes:
        print(f"note: {sentence}", file=sys.stderr)
    if config.forgetting:
        tokenizer = models.tokenizer_of(config.model, trust_remote_code=config.trust_remote_code)
        forgetting.load(setup.forgetting, model=config.model, tokenizer=tokenizer)
    return longest


def _seen(
    model: str, task: str, options: tuple[tuple[str, Any], ...], limits: Limits, *, trusted: bool
) -> tuple[tuple[str, ...], int]:
    """What `tasks.look` says of a task with the tokenizer of a model, and the longest training row."""
    from trainers import models, tasks

    models.check_config(model, trust_remote_code=trusted)
    tokenizer = models.tokenizer_of(model, trust_remote_code=trusted)
    looked = tasks.look(tasks.load_task(task, **dict(options)), tokenizer, limits)
    return tuple(looked.notes), max((max(lengths, default=0) for lengths in looked.training.values()), default=0)


# What comes with the package stays as it is while a process runs: a notebook or a test looks once.
_seen_of_shipped = cache(_seen)
