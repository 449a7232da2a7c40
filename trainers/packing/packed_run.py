"""Runs side by side: one pass over the frozen base for all of them, everything else of a run for itself.

Shapes: K members, B rows and S places a member.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from allocators.core.errors import OutOfMemoryError, StudyError
from allocators.core.types import ModelShape, Recipe, Rung
from trainers import storage
from trainers.adapter.base import Adapter
from trainers.loop.batches import collate
from trainers.loop.device import dropout_seed, give_memory_back, is_out_of_memory, own_random_state
from trainers.loop.losses import completion_losses
from trainers.loop.past import Result
from trainers.loop.plan import share_of
from trainers.loop.run import TrainingRun
from trainers.models import sharding
from trainers.models.quantized import quantization_of
from trainers.packing.pack import Pack
from trainers.packing.passes import Pass
from trainers.tasks import AnyTask, Row
from trainers.waiting import one_sample_a_row, send


class Member(TrainingRun):
    """One run of a packed run. `result` or `error` once it has ended; `most` is how many shared its passes at most."""

    adapter: Adapter

    def __init__(
        self,
        packed: PackedRun,
        adapter: Adapter,
        recipe: Recipe,
        *,
        seed: int,
        on_rung: Callable[[Rung], bool],
        checkpoint: storage.Location | None,
    ) -> None:
        super().__init__(
            packed.model,
            adapter,
            packed.task,
            recipe,
            seed=seed,
            tokenizer=packed.tokenizer,
            device=packed.device,
            evaluations=packed.evaluations,
            checkpoint=checkpoint,
        )
        self.packed, self.on_rung = packed, on_rung
        self.generator = torch.Generator(device=self.device)
        self.result: Result | None = None
        self.error: Exception | None = None
        self.most = 1  # members in a step of its, itself included

    def begin(self, on_rung: Callable[[Rung], bool]) -> Result | None:
        """Begins as a run alone does; from here on the packed run counts the seconds."""
        result = super().begin(on_rung)
        self.past.began = None  # seconds are shares, see `PackedRun.step`
        self.flat.install()
        return result

    def micro_batches(self) -> list[list[Row]]:
        """The rows of the next step, split as those of a run alone."""
        size = self.recipe.micro_batch_size
        return share_of(self.batch(self.step), rank=0, world_size=1, micro_batch_size=size)

    def forget_gradients(self) -> None:
        """Drops the gradients of this member's tensors."""
        for parameter in self.adapter.parameters():
            parameter.grad = None

    def evaluate(self, step: int) -> Rung:
        """With this member's adapter alone on the model; the others wait."""
        began = time.monotonic()
        with self.packed.alone(self):
            rung = super().evaluate(step)
        self.past.seconds += time.monotonic() - began
        return rung


class PackedRun:
    """Runs on one model and task that train step by step together; they join and leave between steps."""

    def __init__(
        self, model: nn.Module, task: AnyTask, *, tokenizer: Any, device: str | torch.device, evaluations: int
    ) -> None:
        self.model, self.task, self.tokenizer = model, task, tokenizer
        self.device, self.evaluations = torch.device(device), evaluations
        self.members: list[Member] = []
        self._pack: Pack | None = None

    def fits(self, recipe: Recipe) -> bool:
        """Whether a run of this recipe may join those that train now."""
        return not self.members or sizes_in_common(recipe) == sizes_in_common(self.members[0].recipe)

    def join(
        self,
        adapter: Adapter,
        recipe: Recipe,
        *,
        seed: int,
        on_rung: Callable[[Rung], bool],
        checkpoint: storage.Location | None = None,
    ) -> Member:
        """A run from its start or its checkpoint, as in `loop.train`; it has a result at once where it was over.

        adapter   of this model, detached. It is detached again when the run has ended

        Raises StudyError where the run cannot share passes with those that train now, TrialError for a checkpoint of
        another run.
        """
        if reason := refused(self.model):
            raise StudyError(f"trainings cannot share passes here: {reason}")
        if not self.fits(recipe):
            raise StudyError(
                f"batch_size, micro_batch_size and max_length are {sizes_in_common(recipe)}, of the trainings under "
                f"way {sizes_in_common(self.members[0].recipe)}: trainings in a pack have them in common"
            )
        member = Member(self, adapter, recipe, seed=seed, on_rung=on_rung, checkpoint=checkpoint)
        member.result = member.begin(on_rung)
        if member.result is None:
            self._change([*self.members, member])
        else:
            member.forget_gradients()
        return member

    def step(self) -> list[Member]:
        """One optimiser step of every member; those that have ended by it, which are no members any more.

        A member's seconds are its equal share of the steps that it took part in, and its own evaluations.

        Raises what the joint pass raises (OutOfMemoryError where memory does not suffice), after giving memory back:
        there is no member then, and all of them may go on alone from their checkpoints.
        """
        members, began, reason = self.members, time.monotonic(), ""
        try:
            with own_random_state(self.device), one_sample_a_row():
                self._take_step()
        except RuntimeError as error:
            self.end_all()
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
        except BaseException:
            self.end_all()
            raise
        if reason:
            give_memory_back(self.device)
            raise OutOfMemoryError(
                f"out of memory on {self.device} with {len(members)} training(s) in a pack ({reason})"
            )
        for member in members:
            member.past.seconds += (time.monotonic() - began) / len(members)
            member.most = max(member.most, len(members))
            member.peak_memory_bytes()  # before a member that ends or joins has the device count anew
        for member in members:
            try:
                with own_random_state(self.device), one_sample_a_row():
                    member.result = member.reach(member.on_rung)
            except Exception as error:  # of this member alone: its evaluation, its checkpoint, its report
                member.error = error
        ended = [member for member in members if member.result is not None or member.error is not None]
        if ended:
            self._change([member for member in members if member not in ended])
        for member in ended:
            member.forget_gradients()
        return ended

    def end_all(self) -> None:
        """Ends every member's training, as far as it is; the base is as it was."""
        before = self.members
        self._change([])
        for member in before:
            member.forget_gradients()

    def detach(self) -> None:
        """Takes the hooks out until the next step: the model is the base alone."""
        if self._pack is not None:
            self._pack.detach()

    @contextmanager
    def alone(self, member: Member) -> Iterator[None]:
        """Inside the block the model has this member's adapter and no other."""
        self.detach()
        member.adapter.reattach()
        try:
            yield
        finally:
            member.adapter.detach()

    def _change(self, members: list[Member]) -> None:
        self.detach()
        self._pack, self.members = None, members
        if not members:
            self.model.eval()

    def _take_step(self) -> None:
        members, fresh = self.members, self._pack is None
        if self._pack is None:
            self._pack = Pack(self.model, [member.adapter for member in members])
        pack = self._pack
        pack.attach()
        self.model.train()
        micro_batches = [member.micro_batches() for member in members]
        tokens = [member.open_step(member.step) for member in members]
        for member in members:
            member.generator.manual_seed(dropout_seed(member.seed, member.step))
        per_token_K = 1 / send(tokens, self.device, dtype=torch.float32)
        pack.buffers.load()
        for parts in zip(*micro_batches, strict=True):  # one micro-batch of every member
            rows = [row for part in parts for row in part]
            batch = collate(rows, pad_token_id=members[0].pad_token_id, device=self.device)
            pack.passes.now = Pass(
                rows=len(parts[0]),
                width=batch.tokens_3BS.shape[2],
                widths=[max(len(row.input_ids) for row in part) for part in parts],
                generators=[member.generator for member in members],
                same_as=[parts.index(part) for part in parts],
            )
            losses_K = completion_losses(self.model, batch, parts=len(members)) * per_token_K
            objective = losses_K.sum()  # its gradient is that of each member's loss in each member's tensors
            for k, (member, part) in enumerate(zip(members, parts, strict=True)):
                real_BS = batch.tokens_3BS[2].view(len(members), len(part), -1)[k]
                if (extra := member.adapter.extra_loss(real_BS)) is not None:
                    objective = objective + extra * (sum(row.completion_tokens for row in part) / tokens[k])
            objective.backward()
            if fresh:
                pack.check()
                fresh = False
            for member, loss in zip(members, losses_K.detach(), strict=True):
                member.flat.loss.add_(loss)
        pack.buffers.unload()
        for member in members:
            member.close_step(member.step)


GROUPS = 1023  # of grouped_mm on a GPU, at most


def most(shape: ModelShape, device: torch.device | str) -> int:
    """How many runs can share a pass: on a GPU the pairs of a run and an expert are groups of one multiplication."""
    experts = max((module.num_experts or 0 for module in shape.modules), default=0)
    if torch.device(device).type == "cpu" or not experts:
        return sys.maxsize
    return max(1, (GROUPS - 1) // experts)  # one group is for the rows of no pair


def sizes_in_common(recipe: Recipe) -> tuple[int, int, int]:
    """What runs must have in common to be packed: rows of a step, rows of a pass, and the longest row."""
    return recipe.batch_size, recipe.micro_batch_size, recipe.max_length


def refused(model: nn.Module) -> str:
    """Why runs on this model train alone, "" where they may be packed."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return "several workers share each training"
    if sharding.is_sharded(model):
        return "the base is sharded"
    if kind := quantization_of(model):
        return f"the base is quantised ({kind})"
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return "gradient checkpointing runs layers twice, and what was dropped out would be drawn anew"
    return ""
