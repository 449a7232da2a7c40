"""How long a training's steps and questions take on this machine, and in how much memory: a few real ones are timed.

state = WorkerState(replace(setup, task_options={**setup.task_options, "limit": QUESTIONS}), "cpu")
timed(state, trial, trainable_params)    # Timing(step=.21, question=.004, peak_memory_bytes=…, questions=32)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from allocators.core.errors import OutOfMemoryError
from allocators.core.types import Trial
from trainers.worker_state import WorkerState

if TYPE_CHECKING:
    import torch

WARM_UP, STEPS = 2, 5
QUESTIONS = 32  # of an evaluation: enough for a few batches
_ENDLESS = 10**6  # steps: the learning rate stays where the schedule begins


@dataclass(frozen=True)
class Timing:
    """Wall clock of one worker that has the machine to itself, in seconds, and its memory.

    step       one optimiser step: median of `STEPS` after a warm-up
    question   one question of an evaluation: mean over `questions`
    peak_memory_bytes   of the GPU where there is one, else of the process, its libraries included
    """

    step: float
    question: float
    questions: int
    peak_memory_bytes: int


def timed(state: WorkerState, trial: Trial, trainable_params: int) -> Timing:
    """Trains a few steps of a trial and evaluates once; nothing is kept.

    Raises TrialError where the adapter is not as large as was counted, OutOfMemoryError where memory does not suffice.
    """
    import torch

    from trainers.loop import TrainingRun, is_out_of_memory
    from trainers.loop.device import own_random_state
    from trainers.waiting import one_sample_a_row

    device = torch.device(state.device)
    adapter = state.attach(trial, trainable_params)
    try:
        with own_random_state(device), one_sample_a_row():
            run = TrainingRun(
                state.model,
                adapter,
                state.task,
                replace(trial.recipe, steps=_ENDLESS),
                seed=trial.seed,
                tokenizer=state.tokenizer,
                device=device,
                evaluations=1,
                checkpoint=None,
            )
            run.begin(lambda _: True)
            state.model.train()
            steps = [_seconds(lambda: run.take_step(run.step), device) for _ in range(WARM_UP + STEPS)]
            evaluation = _seconds(lambda: state.task.evaluate(state.model), device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(f"out of memory on {device}: {str(error).splitlines()[0]}") from error
    finally:
        adapter.detach()
        state.clean_up()
    questions = state.task.num_evaluation
    return Timing(statistics.median(steps[WARM_UP:]), evaluation / questions, questions, run.peak_memory_bytes())


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    import torch

    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
