"""One training run: a frozen base model, an adapter, a task, a recipe. Plain PyTorch, one worker or several.

    result = train(model, adapter, task, recipe, seed=0, tokenizer=tokenizer, device="cpu", on_rung=lambda rung: True)
    result.status, result.accuracy, result.losses

- The loss of an optimiser step is the mean over the completion tokens of its whole batch, over all micro-batches and
  workers, so that neither `micro_batch_size` nor the number of workers changes the gradient.
- `torch.distributed`, where the caller has initialised it, makes the workers of one run: each takes its share of every
  batch and of every evaluation. Gradients lie in one flat buffer that one all_reduce sums, with the loss at its end.
  (DistributedDataParallel would want to own the model, whose adapter comes and goes, and to know which experts get no
  tokens.)
- Data order and dropout follow from `seed` and the step, from nothing else, and leave the process's own random state
  as it was: equal seeds give equal losses, and a resumed run gives those of an uninterrupted one, bit for bit.
- bf16 comes with the base model (`models.load` picks it where the device has it); adapter, gradients and optimiser
  stay fp32, and training and evaluation do the same arithmetic.
- The device is waited for every CHECK_EVERY steps and at rungs, not at every step; the tokens of the next step are on
  their way to it (from pinned memory, in a stream of their own) while it computes this one.
- A base that is sharded over the workers (models/sharding.py) is run by all of them pass by pass: a worker without
  rows runs on two tokens that no loss is taken on.

`plan.py` says what a run does, `run.py` does it; a packed run (trainers/packing/) makes the gradients of several in one
pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from allocators.core.errors import OutOfMemoryError
from allocators.core.types import Recipe, Rung
from trainers import storage
from trainers.loop.device import give_memory_back, is_out_of_memory, own_random_state
from trainers.loop.past import Result
from trainers.loop.run import CHECK_EVERY, Trainable, TrainingRun
from trainers.tasks import AnyTask
from trainers.waiting import one_sample_a_row

__all__ = ["CHECK_EVERY", "Result", "Trainable", "TrainingRun", "is_out_of_memory", "train"]


def train(
    model: nn.Module,
    adapter: Trainable,
    task: AnyTask,
    recipe: Recipe,
    *,
    seed: int,
    tokenizer: Any,
    device: str | torch.device,
    on_rung: Callable[[Rung], bool],
    evaluations: int = 3,
    checkpoint: storage.Location | None = None,
) -> Result:
    """Trains `adapter` in place on `task` and evaluates it at `evaluations` equally spaced steps, the last at the end.

    on_rung      called on every worker with the same rung; all must answer alike: False stops the run there
    checkpoint   folder (path or URI) for the state at the last rung. A run that finds its own state there goes on from
                 it, and calls `on_rung` again for the rungs it had reached.

    The run is `diverged`, without an accuracy, when a loss or the adapter is not finite, or when the loss is above ten
    times the first one plus ten for three steps in a row.

    Raises OutOfMemoryError when the device's memory does not suffice, after giving it back; TrialError for an adapter
    that gets no gradient and for a checkpoint of another run.
    """
    device = torch.device(device)
    try:
        with own_random_state(device), one_sample_a_row():
            return TrainingRun(  # without a name, which would hold the run's tensors where memory is given back
                model,
                adapter,
                task,
                recipe,
                seed=seed,
                tokenizer=tokenizer,
                device=device,
                evaluations=evaluations,
                checkpoint=checkpoint,
            ).go(on_rung)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
    finally:
        model.eval()
        for parameter in adapter.parameters():
            parameter.grad = None
    # Only here, past the handler, does the error's traceback no longer hold the tensors of the step that failed.
    give_memory_back(device)
    raise OutOfMemoryError(
        f"out of memory on {device} with micro_batch_size {recipe.micro_batch_size} and max_length "
        f"{recipe.max_length}: try less of either ({reason})"
    )
