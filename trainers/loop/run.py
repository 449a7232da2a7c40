"""The steps of one training run. `trainers.loop.train` is the door to it, and says what a run is.

Shapes: B sequences, S tokens.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from allocators.core.errors import ToolkitError, TrialError
from allocators.core.types import Recipe, Rung, digest_of
from trainers import storage
from trainers.loop import checkpoints
from trainers.loop.batches import Feed, MicroBatch, collate
from trainers.loop.device import is_out_of_memory, seed_dropout
from trainers.loop.flat import FlatBuffers
from trainers.loop.losses import completion_loss
from trainers.loop.past import Ending, Past, Result
from trainers.loop.plan import batch_at, learning_rate, rung_steps, share_of, total_steps
from trainers.models import sharding
from trainers.tasks import AnyTask, Row

CHECK_EVERY = 10  # steps between two looks at the loss: each waits for the device
OUT_OF_MEMORY, OTHER_FAILURE = 1.0, 1e6  # what a worker that failed adds to a number that all of them sum


class Trainable(Protocol):
    """What a run asks of an adapter: `trainers.adapter.Adapter`, or any other that holds trainable tensors."""

    def parameters(self) -> list[nn.Parameter]:
        """The trainable tensors, in a fixed order."""

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The same with the names that checkpoints have."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies tensors of a checkpoint into the trainable ones."""

    def extra_loss(self, real_BS: Tensor | None) -> Tensor | None:
        """Added to the training loss; `real_BS` is nonzero where there is a token and not padding."""

    def check_gradients(self) -> None:
        """Raises TrialError after the first backward pass where a tensor is no part of the loss."""


class TrainingRun:
    """The steps of one run: `begin`, then `open_step`, gradients, `close_step`, `reach`, until there is a result.

    trainers/packing/ makes the gradients of several runs in one pass; everything else of a run is here.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Trainable,
        task: AnyTask,
        recipe: Recipe,
        *,
        seed: int,
        tokenizer: Any,
        device: torch.device,
        evaluations: int,
        checkpoint: storage.Location | None,
    ) -> None:
        several = dist.is_available() and dist.is_initialized()
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        self.model, self.adapter, self.task, self.recipe = model, adapter, task, recipe
        self.seed, self.device, self.pad_token_id = seed, device, tokenizer.pad_token_id
        self.rows = task.training_rows(tokenizer, recipe.max_length)
        task.prepare(tokenizer, rank=self.rank, world_size=self.world_size)
        self.steps = total_steps(recipe, len(self.rows))
        self.rung_steps = rung_steps(self.steps, evaluations)
        self.flat = FlatBuffers(adapter.parameters())
        self.optimizer = torch.optim.AdamW(
            [self.flat.values], lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )
        self.checkpoint = storage.join(checkpoint, "checkpoint.safetensors") if checkpoint is not None else ""
        self.fingerprint = self._fingerprint()
        self.sharded = sharding.is_sharded(model)
        self.feed = Feed(self._micro_batches, device)
        self.failure: TrialError | torch.OutOfMemoryError | None = None
        self.past = Past()
        self.pending = torch.zeros(CHECK_EVERY, 2, device=device)  # loss and failures of the steps since the last look
        self.unseen = 0
        self.peak = 0  # bytes, of what was measured before the counter began anew

    def _fingerprint(self) -> str:
        """Of what a checkpoint must have been saved by to be gone on from."""
        return digest_of(
            {
                "recipe": self.recipe.to_json(),
                "seed": self.seed,
                "data": self.task.data_hash,
                "metric": self.task.metric,
                "rungs": self.rung_steps,
                "adapter": {name: list(p.shape) for name, p in self.adapter.named_parameters()},
            }
        )

    @property
    def step(self) -> int:
        """How many steps were taken, which is the number of the next one."""
        return len(self.past.losses) + self.unseen

    def go(self, on_rung: Callable[[Rung], bool]) -> Result:
        """Trains to the end, or until the run diverges or `on_rung` returns False."""
        result = self.begin(on_rung)
        self.model.train()
        while result is None:
            self.take_step(self.step)
            result = self.reach(on_rung)
        return result

    def begin(self, on_rung: Callable[[Rung], bool]) -> Result | None:
        """Goes back to the checkpoint, where there is one, and tells its rungs; the result of a run that is over."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._resume()
        for rung in self.past.rungs:
            if not on_rung(rung):
                return self._result("complete" if rung.step == self.steps else "stopped")
        return self._result("complete") if self.step == self.steps else None

    def take_step(self, step: int) -> None:
        """One optimiser step. Launches work on the device and waits for none of it."""
        completion_tokens = self.open_step(step)
        seed_dropout(self.device, self.seed, step, self.rank)
        if self.failure is None or self.sharded:
            try:
                self._accumulate(step, completion_tokens)
            except TrialError as error:
                self.failure = error
            except RuntimeError as error:
                if self.sharded or not is_out_of_memory(error):  # sharded: the others wait in this pass, not below
                    raise
                self.failure = torch.OutOfMemoryError(str(error).splitlines()[0])
        if self.failure is not None and self.world_size == 1:
            raise self.failure  # else the others wait in all_reduce: take part until they have heard of it
        if not self.flat.installed:  # this worker had no row in the first batch
            self.flat.install()
        if self.failure is not None:
            self.flat.clear()
            self.flat.failures.fill_(OTHER_FAILURE if isinstance(self.failure, TrialError) else OUT_OF_MEMORY)
        if self.world_size > 1:
            dist.all_reduce(self.flat.gradients)
        self.close_step(step)

    def open_step(self, step: int) -> int:
        """Counts the tokens and clears the gradients; how many completion tokens the loss is a mean over."""
        batch = self.batch(step)
        self.past.tokens += sum(len(row.input_ids) for row in batch)
        self.flat.clear()
        return max(1, sum(row.completion_tokens for row in batch))

    def close_step(self, step: int) -> None:
        """From gradients and loss, which are those of all workers, to new parameters."""
        self.pending[self.unseen] = self.flat.gradients[-2:]
        self.unseen += 1
        self.flat.clip(self.recipe.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, step, self.steps)
        self.optimizer.step()

    def reach(self, on_rung: Callable[[Rung], bool]) -> Result | None:
        """What follows from the steps taken so far: a look at the losses, an evaluation, perhaps the end."""
        step = self.step
        at_rung = step in self.rung_steps
        if self.unseen == CHECK_EVERY or at_rung or not self.past.losses:
            self._look()
            if self.past.diverged or (at_rung and not self._parameters_are_finite()):
                return self._result("diverged")
        if at_rung:
            rung = self.evaluate(step)
            self.past.rungs.append(rung)
            if self.checkpoint:
                self._together(self._save)
            if not on_rung(rung) and step < self.steps:
                return self._result("stopped")
        return self._result("complete") if step == self.steps else None

    def batch(self, step: int) -> list[Row]:
        """Of all workers together."""
        chosen = batch_at(step, num_rows=len(self.rows), batch_size=self.recipe.batch_size, seed=self.seed)
        return [self.rows[i] for i in chosen]

    def _micro_batches(self, step: int) -> list[MicroBatch]:
        """This worker's of a step."""
        batch = self.batch(step)
        share = partial(share_of, batch, world_size=self.world_size, micro_batch_size=self.recipe.micro_batch_size)
        send = partial(collate, pad_token_id=self.pad_token_id, device=self.device)
        made = [send(rows) for rows in share(rank=self.rank)]
        if self.sharded:  # as many passes as the first worker has, which has most rows
            idle = [Row(batch[0].input_ids[:2], 1)]
            made += [send(idle, counted=False) for _ in range(len(share(rank=0)) - len(made))]
        return made

    def _accumulate(self, step: int, completion_tokens: int) -> None:
        for batch in self.feed.take(step):
            loss = completion_loss(self.model, batch) / completion_tokens
            objective = loss
            if (extra := self.adapter.extra_loss(batch.real_BS)) is not None:
                # A mean over micro-batches, weighted as the loss is.
                objective = loss + extra * (batch.completion_tokens / completion_tokens)
            objective.backward()
            if not self.flat.installed:
                try:
                    self.adapter.check_gradients()
                except TrialError as error:  # no end of this step: others may need this worker's part in its passes
                    self.failure = error
                self.flat.install()
            self.flat.loss.add_(loss.detach())
        if step + 1 < self.steps:
            self.feed.fetch(step + 1)

    def _look(self) -> None:
        """Waits for the device, and judges the losses since the last look."""
        losses, failures = self.pending[: self.unseen].T.tolist()
        self.unseen = 0
        if worst := max(failures):
            if self.failure is not None:
                raise self.failure
            if worst < OTHER_FAILURE:
                raise torch.OutOfMemoryError("on another worker of this run")
            raise TrialError("another worker of this run failed, because an expert got no gradient there")
        self.past.add(losses)

    def _together(self, work: Callable[[], Any]) -> Any:
        """What rank 0 got from `work`, on every worker; its error is raised on all of them, so that none waits."""
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = work()
            except ToolkitError as error:
                if self.world_size == 1:
                    raise
                box[1] = error
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def _parameters_are_finite(self) -> bool:
        """The last update may have spoilt what no loss has seen yet; NaN would answer every question with choice 0."""
        return bool(torch.stack([p.detach().isfinite().all() for p in self.adapter.parameters()]).all())

    def evaluate(self, step: int) -> Rung:
        """The evaluation at a step; its loss is the mean since the last one."""
        evaluation = self.task.evaluate(self.model)
        since = self.past.rungs[-1].step if self.past.rungs else 0
        losses = self.past.losses[since:]
        return Rung(
            step=step,
            tokens=self.past.tokens,
            accuracy=evaluation.accuracy,
            stderr=evaluation.stderr,
            loss=sum(losses) / len(losses),
            eval_loss=evaluation.loss if evaluation.loss is not None and math.isfinite(evaluation.loss) else None,
            seconds=self.past.elapsed(),
            by_task=evaluation.by_task,
        )

    def peak_memory_bytes(self) -> int:
        """Of the GPU since the run began; on a CPU of the process in its whole life."""
        if self.device.type == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated(self.device))
            return self.peak
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB

    def _result(self, status: Ending) -> Result:
        past, peak = self.past, self.peak_memory_bytes()
        return Result(status, tuple(past.rungs), tuple(past.losses), past.tokens, past.elapsed(), peak)

    # --- checkpoints ---

    def _save(self) -> None:
        checkpoints.write(
            self.checkpoint,
            self.adapter.named_parameters(),
            self.flat,
            self.optimizer.state[self.flat.values],
            fingerprint=self.fingerprint,
            past=self.past.to_json(),
        )

    def _resume(self) -> None:
        """Rank 0 reads the checkpoint, and everyone starts from its adapter and optimiser state."""
        tensors: dict[str, Tensor] = {}  # of rank 0, whose values the others are sent
        past = self._together(lambda: self._read(tensors)) if self.checkpoint else None
        names = [name for name, _ in self.adapter.named_parameters()]
        if tensors:
            self.adapter.load_state_dict({name: tensors[f"adapter/{name}"] for name in names})
        shared = [self.flat.values.detach()]
        if past is not None:
            self.past = Past.from_json(past)
            state = checkpoints.restored(self.flat, names, tensors, steps=len(self.past.losses))
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": {0: state}, "param_groups": groups})
            loaded = self.optimizer.state[self.flat.values]
            shared += [loaded[kind] for kind in checkpoints.MOMENTS]
        if self.world_size > 1:
            for tensor in shared:
                dist.broadcast(tensor, src=0)

    def _read(self, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
        """Fills `tensors`, which stay on this worker, and returns the past; None where there is no checkpoint."""
        stored = checkpoints.read(self.checkpoint, fingerprint=self.fingerprint)
        if stored is None:
            return None
        tensors.update(stored[0])
        return stored[1]
