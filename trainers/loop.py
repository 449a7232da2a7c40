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
- Rows are padded on the right and no mask is given to the model: under causal attention no real token sees padding, so
  attention runs its fastest kernels and nobody looks at the values of a mask, which would wait for the device.
- A base that is sharded over the workers (models/sharding.py) is run by all of them pass by pass: a worker without
  rows runs on two tokens that no loss is taken on.

Shapes: B sequences, S tokens, K positions that may predict a completion token, V vocabulary.
"""

from __future__ import annotations

import gc
import json
import math
import random
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from hashlib import sha256
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from allocators.core.errors import OutOfMemoryError, ToolkitError, TrialError
from allocators.core.types import Recipe, Rung, digest_of
from trainers import storage
from trainers.models import sharding
from trainers.tasks import AnyTask, Row

CHECK_EVERY = 10  # steps between two looks at the loss: each waits for the device
EXPLODED = (10.0, 10.0)  # a loss above 10 × the first one + 10 ...
PATIENCE = 3  # ... for this many steps in a row ends the run, as a loss that is not finite does at once
OUT_OF_MEMORY, OTHER_FAILURE = 1.0, 1e6  # what a worker that failed adds to a number that all of them sum
IGNORED = -100  # label of tokens without loss


@dataclass(frozen=True)
class Result:
    """What became of a run.

    status              complete | stopped (by `on_rung`) | diverged
    losses              training loss of every step, those before a resume included
    tokens              trained tokens, prompts included, padding excluded
    seconds             wall clock of training and evaluation, that before a resume included
    peak_memory_bytes   CUDA: most memory allocated during this run; CPU: the process's largest resident size so far
    """

    status: Literal["complete", "stopped", "diverged"]
    rungs: tuple[Rung, ...]
    losses: tuple[float, ...]
    tokens: int
    seconds: float
    peak_memory_bytes: int

    @property
    def accuracy(self) -> float | None:
        """Of the last rung; None for a diverged run, whatever it reached before."""
        return self.rungs[-1].accuracy if self.rungs and self.status != "diverged" else None


def train(
    model: nn.Module,
    adapter: Any,
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
            return Run(model, adapter, task, recipe, seed, tokenizer, device, evaluations, checkpoint).go(on_rung)
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


# --- the plan of a run: pure functions of recipe and seed -------------------------------------------------------------


def total_steps(recipe: Recipe, num_rows: int) -> int:
    """Optimiser steps of a run. Batches are always full: the last one of an epoch is filled from the next epoch."""
    return recipe.steps or max(1, math.ceil(recipe.epochs * num_rows / recipe.batch_size))


def rung_steps(steps: int, evaluations: int) -> tuple[int, ...]:
    """After how many steps to evaluate: `rung_steps(10, 3) == (3, 7, 10)`."""
    return tuple(sorted({max(1, round(steps * i / evaluations)) for i in range(1, evaluations + 1)}))


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Rate of step 0, 1, ...: linear warm-up over `warmup_ratio` of the steps, then the schedule, ending near zero."""
    warmup = round(recipe.warmup_ratio * steps)
    if step < warmup:
        return recipe.learning_rate * ((step + 1) / warmup)  # in this order: never above the rate by a rounding
    progress = (step - warmup) / max(1, steps - warmup)
    match recipe.schedule:
        case "cosine":
            return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return recipe.learning_rate * (1 - progress)
        case "constant":
            return recipe.learning_rate


def batch_at(step: int, *, num_rows: int, batch_size: int, seed: int) -> list[int]:
    """Which rows a step trains on: shuffled epochs, one after another, cut into batches. No adapter changes it."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return [_epoch(num_rows, seed, place // num_rows)[place % num_rows] for place in places]


@lru_cache(maxsize=4)
def _epoch(num_rows: int, seed: int, epoch: int) -> list[int]:
    order = list(range(num_rows))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def share_of(rows: Sequence[Row], *, rank: int, world_size: int, micro_batch_size: int) -> list[list[Row]]:
    """One worker's micro-batches of a batch: rows of like length together, so that little is padded."""
    by_length = sorted(rows, key=lambda row: -len(row.input_ids))[rank::world_size]
    return [by_length[i : i + micro_batch_size] for i in range(0, len(by_length), micro_batch_size)]


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass trains on: rows of tokens on the device, padded on the right.

    tokens_3BS          token ids, labels (−100 where no loss is taken), 1 where there is a token and 0 at padding
    first               place of the first completion token of any row: nothing before it is predicted
    completion_tokens   how many tokens the loss is summed over
    padded              whether there is padding at all
    """

    tokens_3BS: Tensor
    first: int
    completion_tokens: int
    padded: bool

    @property
    def real_BS(self) -> Tensor | None:
        """1 where there is a token; None: everywhere."""
        return self.tokens_3BS[2] if self.padded else None


def collate(rows: Sequence[Row], *, pad_token_id: int, device: torch.device, counted: bool = True) -> MicroBatch:
    """Rows on their way to the device, which is not waited for. Not `counted`: none of their tokens has a loss."""
    length, first = max(len(row.input_ids) for row in rows), min(row.labels_start for row in rows)
    ids_BS, labels_BS, real_BS = [], [], []
    for row in rows:
        padding = length - len(row.input_ids)
        completion = row.input_ids[row.labels_start :] if counted else [IGNORED] * row.completion_tokens
        ids_BS.append(row.input_ids + [pad_token_id] * padding)
        labels_BS.append([IGNORED] * row.labels_start + completion + [IGNORED] * padding)
        real_BS.append([1] * len(row.input_ids) + [0] * padding)
    host = torch.tensor([ids_BS, labels_BS, real_BS])
    if device.type == "cuda":
        host = host.pin_memory()  # a copy from pageable memory would wait for the device
    return MicroBatch(
        host.to(device, non_blocking=True),
        first,
        sum(row.completion_tokens for row in rows) if counted else 0,
        padded=any(len(row.input_ids) < length for row in rows),
    )


def completion_loss(model: nn.Module, batch: MicroBatch) -> Tensor:
    """Sum of −log p over the completion tokens of a micro-batch, a scalar in fp32."""
    return _log_losses(model, batch, reduction="sum")


def completion_losses(model: nn.Module, batch: MicroBatch, *, parts: int) -> Tensor:
    """The same sum for each of so many equal parts of the micro-batch's rows, [parts]."""
    return _log_losses(model, batch, reduction="none").view(parts, -1).sum(dim=1)


def _log_losses(model: nn.Module, batch: MicroBatch, *, reduction: str) -> Tensor:
    ids_BS, labels_BS, _ = batch.tokens_3BS
    # Logits only where a completion token follows in some row: prompts are most of the tokens, V is large.
    keep_K = torch.arange(batch.first - 1, ids_BS.shape[1] - 1, device=ids_BS.device)
    logits_BKV = model(input_ids=ids_BS, logits_to_keep=keep_K, use_cache=False).logits
    labels = labels_BS[:, batch.first :].flatten()
    return F.cross_entropy(logits_BKV.float().flatten(0, 1), labels, ignore_index=IGNORED, reduction=reduction)


# --- the run ----------------------------------------------------------------------------------------------------------


class Run:
    """The steps of one run: `begin`, then `open_step`, gradients, `close_step`, `reach`, until there is a result.

    trainers/packing/ makes the gradients of several runs in one pass; everything else of a run is here.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Any,
        task: AnyTask,
        recipe: Recipe,
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
        self.flat = _Flat(adapter.parameters())
        self.optimizer = torch.optim.AdamW(
            [self.flat.values], lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )
        self.checkpoint = storage.join(checkpoint, "checkpoint.safetensors") if checkpoint is not None else ""
        self.fingerprint = digest_of(
            {
                "recipe": recipe.to_json(),
                "seed": seed,
                "data": task.data_hash,
                "metric": task.metric,
                "rungs": self.rung_steps,
                "adapter": {name: list(p.shape) for name, p in adapter.named_parameters()},
            }
        )
        self.sharded = sharding.is_sharded(model)
        self.feed = _Feed(self._micro_batches, device)
        self.failure: TrialError | torch.OutOfMemoryError | None = None
        self.past = _Past()
        self.pending = torch.zeros(CHECK_EVERY, 2, device=device)  # loss and failures of the steps since the last look
        self.unseen = 0

    @property
    def step(self) -> int:
        """How many steps were taken, which is the number of the next one."""
        return len(self.past.losses) + self.unseen

    def go(self, on_rung: Callable[[Rung], bool]) -> Result:
        result = self.begin(on_rung)
        self.model.train()
        while result is None:
            self._step(self.step)
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

    def _step(self, step: int) -> None:
        """One optimiser step. Launches work on the device and waits for none of it."""
        completion_tokens = self.open_step(step)
        _seed_dropout(self.device, self.seed, step, self.rank)
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
        if self.sharded:  # as many passes as the first worker has, who has most rows
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
        evaluation = self.task.evaluate(self.model)
        since = self.past.rungs[-1].step if self.past.rungs else 0
        losses = self.past.losses[since:]
        return Rung(
            step=step,
            tokens=self.past.tokens,
            accuracy=evaluation.accuracy,
            stderr=evaluation.stderr,
            loss=sum(losses) / len(losses),
            seconds=self.past.elapsed(),
            by_task=evaluation.by_task,
        )

    def _result(self, status: Literal["complete", "stopped", "diverged"]) -> Result:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
        past = self.past
        return Result(status, tuple(past.rungs), tuple(past.losses), past.tokens, past.elapsed(), peak)

    # --- checkpoints: one safetensors file, replaced as a whole; the plan and the random state follow from the step ---

    def _save(self) -> None:
        from safetensors.torch import save_file

        state = self.optimizer.state[self.flat.values]
        first, second = self.flat.views(state["exp_avg"]), self.flat.views(state["exp_avg_sq"])
        tensors = {}
        for (name, parameter), exp_avg, exp_avg_sq in zip(self.adapter.named_parameters(), first, second, strict=True):
            tensors[f"adapter/{name}"] = parameter.detach()
            tensors[f"exp_avg/{name}"], tensors[f"exp_avg_sq/{name}"] = exp_avg, exp_avg_sq
        with storage.replacing(self.checkpoint) as file:
            save_file(
                {name: tensor.contiguous().cpu() for name, tensor in tensors.items()},
                file,
                metadata={"run": self.fingerprint, "past": json.dumps(self.past.to_json())},
            )

    def _resume(self) -> None:
        """Rank 0 reads the checkpoint, and everyone starts from its adapter and optimiser state."""
        tensors: dict[str, Tensor] = {}
        past = self._together(lambda: self._read(tensors)) if self.checkpoint else None
        named = self.adapter.named_parameters()
        if tensors:
            self.adapter.load_state_dict({name: tensors[f"adapter/{name}"] for name, _ in named})
        shared = [self.flat.values.detach()]
        if past is not None:
            self.past = _Past.from_json(past)
            moments = [torch.zeros_like(self.flat.values, requires_grad=False) for _ in range(2)]
            for kind, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
                for (name, _), view in zip(named, self.flat.views(moment), strict=True):
                    if tensors:  # of rank 0, whose values the others are sent
                        view.copy_(tensors[f"{kind}/{name}"])
            step = torch.tensor(float(len(self.past.losses)))
            state = {"step": step, "exp_avg": moments[0], "exp_avg_sq": moments[1]}
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": {0: state}, "param_groups": groups})
            state = self.optimizer.state[self.flat.values]
            shared += [state["exp_avg"], state["exp_avg_sq"]]
        if self.world_size > 1:
            for tensor in shared:
                dist.broadcast(tensor, src=0)

    def _read(self, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
        """Fills `tensors` and returns the past, None where there is no checkpoint."""
        if not storage.exists(self.checkpoint):
            return None
        from safetensors import SafetensorError, safe_open

        with storage.reading(self.checkpoint) as file:
            try:
                with safe_open(file, framework="pt") as stored:
                    metadata = stored.metadata() or {}
                    tensors.update((name, stored.get_tensor(name)) for name in stored.keys())  # noqa: SIM118
            except SafetensorError as error:
                raise TrialError(f"the checkpoint {self.checkpoint} is damaged ({error}): delete it") from error
        if metadata.get("run") != self.fingerprint:
            raise TrialError(
                f"the checkpoint {self.checkpoint} belongs to another run (recipe, seed, data or adapter differ): "
                "delete it or choose another folder"
            )
        return json.loads(metadata["past"])


@dataclass
class _Past:
    """What a run remembers of its finished steps."""

    losses: list[float] = field(default_factory=list)
    rungs: list[Rung] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0  # before this process
    began: float | None = field(default_factory=time.monotonic)  # None: who runs it counts its seconds
    exploded: int = 0  # steps in a row
    diverged: bool = False

    def elapsed(self) -> float:
        return self.seconds + (0.0 if self.began is None else time.monotonic() - self.began)

    def add(self, losses: Sequence[float]) -> None:
        factor, offset = EXPLODED
        for loss in losses:
            self.losses.append(loss)
            self.exploded = self.exploded + 1 if loss > factor * self.losses[0] + offset else 0
            self.diverged |= not math.isfinite(loss) or self.exploded >= PATIENCE

    def to_json(self) -> dict[str, Any]:
        return {
            "losses": self.losses,
            "rungs": [rung.to_json() for rung in self.rungs],
            "tokens": self.tokens,
            "seconds": self.elapsed(),
            "exploded": self.exploded,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> _Past:
        return cls(**{**data, "rungs": [Rung.from_json(rung) for rung in data["rungs"]]})


class _Flat:
    """All parameters of a run in one fp32 buffer and all gradients in another: clearing them, summing over workers,
    clipping and AdamW are one operation each.

    parameters  become views of `values`, each from a multiple of 64 bytes on (as memory of their own would begin);
                gaps are zeros, and stay zeros
    gradients   as long, and two numbers behind them that travel along: the step's loss and whether a worker failed
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        (device,) = {p.device for p in parameters}
        self.parameters = list(parameters)
        self._sizes = [p.numel() + -p.numel() % (64 // torch.float32.itemsize) for p in parameters]
        self.values = nn.Parameter(torch.zeros(sum(self._sizes), device=device))
        for parameter, view in zip(parameters, self.views(self.values.detach()), strict=True):
            parameter.data = view.copy_(parameter.detach())
        self.gradients = torch.zeros(sum(self._sizes) + 2, device=device)
        self.values.grad, self.loss, self.failures = self.gradients[:-2], self.gradients[-2], self.gradients[-1]
        self.installed = False

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parts of a buffer that lies as `values` does, a parameter each, in its size."""
        parts = flat.split(self._sizes)
        return [part[: p.numel()].view_as(p) for part, p in zip(parts, self.parameters, strict=True)]

    def install(self) -> None:
        """Takes over the gradients of the first backward pass (which left None where there are none, as is checked)."""
        for parameter, view in zip(self.parameters, self.views(self.gradients[:-2]), strict=True):
            if parameter.grad is not None:
                view.copy_(parameter.grad)
            parameter.grad = view
        self.installed = True

    def clear(self) -> None:
        self.gradients.zero_()

    def clip(self, max_norm: float) -> None:
        """g ← g · min(1, max_norm/‖g‖); 0 turns it off. The norm stays on the device."""
        if max_norm > 0:
            norm = torch.linalg.vector_norm(self.gradients[:-2])
            self.gradients[:-2].mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))


class _Feed:
    """Micro-batches of a step on the device; those of the next one travel there in a stream of their own."""

    def __init__(self, make: Callable[[int], list[MicroBatch]], device: torch.device) -> None:
        self.make, self.device = make, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.step = -1
        self.batches: list[MicroBatch] = []

    def fetch(self, step: int) -> None:
        """Puts a step's micro-batches on their way."""
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            self.step, self.batches = step, self.make(step)

    def take(self, step: int) -> list[MicroBatch]:
        """Those of a step, for the current stream."""
        if self.step != step:
            self.fetch(step)
        if self.stream is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_stream(self.stream)  # the device waits, not the host
            for batch in self.batches:
                batch.tokens_3BS.record_stream(now)  # else their memory could be given away before it was read
        return self.batches


def give_memory_back(device: torch.device) -> None:
    """Call it where no traceback holds the tensors of a step that failed."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: " in str(error)


@contextmanager
def own_random_state(device: torch.device) -> Iterator[None]:
    """The process's random state afterwards is the one from before."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def one_sample_a_row() -> Iterator[None]:
    """Spares a look at the device in every pass: whether positions start anew within a row, several samples in one.

    transformers looks where it is given no mask, and has no argument that tells it what our rows are.
    """
    from transformers import masking_utils

    before = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before


def _seed_dropout(device: torch.device, seed: int, step: int, rank: int) -> None:
    """Anew at every step: a resumed run then needs no stored random state, and an evaluation cannot shift it."""
    number = dropout_seed(seed, step, rank)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(number)
    else:
        torch.default_generator.manual_seed(number)


def dropout_seed(seed: int, step: int, rank: int = 0) -> int:
    return int.from_bytes(sha256(f"{seed}/{step}/{rank}".encode()).digest()[:8], "big") >> 1
