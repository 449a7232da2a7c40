"""K training runs in one pass over the frozen base: their rows lie in one batch, run after run.

    crew = Crew(model, task, tokenizer=tokenizer, device="cpu", evaluations=3)
    member = crew.join(adapter, recipe, seed=0, on_rung=lambda rung: True, checkpoint=None)     # adapter is detached
    while crew.members:
        for ended in crew.step():                       # one optimiser step of every member
            ended.result or ended.error
    python -m tests.benchmarks.packing                  what it gains

The base's linear layers are one GEMM for all rows; adapters are batched GEMMs over members. Each run keeps its own
tensors, optimiser, schedule, clipping, alpha, rank, experts, top_k, seed and dropout (`loop.Run`): before a step its
tensors are copied into the pack's, padded with zeros to the largest of them, and after it the gradients are copied
back, so that padding is never trained, counted or saved. Routers that lack an expert have the logit −inf for it: its
gate and gradients are exactly zero. Runs join and leave between steps. A run gives what it gives alone, up to rounding.

What diverges in one run reaches no other: every sum over rows (gradients, losses, norms, balance) is taken member by
member, and the base works row by row.

Runs that began together with one seed train on the same rows: below the first layer that any of them adapts these run
once for all of them.

Shapes: K members, P of them adapt a module, B rows and S places a member, T = B·S tokens of a member, I input and O
output features, R the largest rank, N the most experts and C the most columns N·r in rank space of a module's members.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from allocators.core.errors import OutOfMemoryError, StudyError, TrialError
from allocators.core.types import ALWAYS_ADAPTED, Recipe, Rung
from trainers import loop, storage
from trainers.adapter import Adapter, freeze, module_at, put_attribute, put_on_linear, quantization_of
from trainers.adapter.expert_lora import ExpertLoraAdapter, ExpertStacks, Route, dispatch
from trainers.adapter.lora_moe import LoraMoeAdapter
from trainers.models import sharding

WORTH = 1.1  # what a pack of twice as many has to gain: a sampler has seen fewer results when it proposes for it


def shape_of_steps(recipe: Recipe) -> tuple[int, int, int]:
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


def gain(one: float, two: float, members: int) -> float:
    """How much faster so many trainings are packed than one after another: K·(c0 + c1·M)/(c0 + K·c1·M).

    one, two   seconds of a step of one training, c0 + c1·M, and of two in a pack, c0 + 2·c1·M
    """
    per_member = min(max(two - one, 0.0), one)
    return members * one / (one - per_member + members * per_member)


def choose(one: float, two: float, *, most: int) -> int:
    """How many trainings to pack: twice as many as long as that is worth `WORTH` times the speed, at most `most`."""
    members = 1
    while 2 * members <= most and gain(one, two, 2 * members) >= WORTH * gain(one, two, members):
        members *= 2
    return members


# ---------------------------------------------------------------------------------------------------------------------
# Adapters side by side


@dataclass
class _Pass:
    """The forward pass under way: rows a member, places a row; each member's own longest row and random state.

    same_as   for each member the first that trains on the same rows, itself where none before it does
    """

    rows: int
    width: int
    widths: Sequence[int]
    generators: Sequence[torch.Generator]
    same_as: Sequence[int]


class Pack:
    """Adapters of one model, hooked in together.

    adapters   detached, and of one kind. Their parameters have gradients to write to (`loop.Run` installs them)
    """

    def __init__(self, model: nn.Module, adapters: Sequence[Adapter]) -> None:
        self.model: Any = model
        self.adapters = list(adapters)
        self.device = next(model.parameters()).device
        self.current = _Pass(1, 1, [], [], [])
        self.seen: set[str] = set()  # modules that took part in a pass
        self.expected: set[str] = set()
        self._sources: list[Tensor] = []  # parts of the members' parameters, and where they lie in the pack's tensors
        self._places: list[Tensor] = []
        self._gradients: list[Tensor] = []  # the same of gradients, towards the members
        self._made: list[Tensor] = []
        self._shared: list[tuple[Tensor, Tensor]] = []  # a gradient, and what has to be summed over dim 0 for it
        self._summed: list[Tensor] = []  # gradients that autograd adds to
        self._written: list[Tensor] = []  # tensors whose gradients `add_gradient` writes
        self._begun: set[tuple[int, int | None]] = set()  # which of these have a gradient of this step: id, first row
        self._puts: list[Callable[[], Callable[[], Any]]] = [lambda: freeze(self.model, self)]
        self._undo: list[Callable[[], Any]] = []
        if all(isinstance(adapter, ExpertLoraAdapter) for adapter in self.adapters):
            self._add_expert_lora()
        elif all(isinstance(adapter, LoraMoeAdapter) for adapter in self.adapters):
            self._add_lora_moe()
        else:
            raise StudyError("adapters of an MoE base and of a dense base cannot share a pass")
        self._add_shared_layers()

    # --- in and out of the model ---

    def attach(self) -> None:
        """Hooks in; nothing where it is already."""
        if not self._undo:
            for put in self._puts:
                self._undo.append(put())

    def detach(self) -> None:
        while self._undo:
            self._undo.pop()()

    def load(self) -> None:
        """The members' parameters into the pack's tensors, whose gradients begin anew."""
        self._begun.clear()
        with torch.no_grad():
            torch._foreach_copy_(self._places, self._sources)
            if self._summed:
                torch._foreach_zero_(self._summed)

    def unload(self) -> None:
        """The pack's gradients to the members."""
        with torch.no_grad():
            for tensor in self._written:
                if (id(tensor), None) not in self._begun and tensor.grad is not None:
                    tensor.grad.zero_()  # no backward pass came by
            torch._foreach_copy_(self._gradients, self._made)
            for gradient, made in self._shared:
                gradient.copy_(made.sum(0))

    def begin_pass(
        self, *, rows: int, width: int, widths: Sequence[int], generators: Sequence[Any], same_as: Sequence[int]
    ) -> None:
        self.current = _Pass(rows, width, widths, generators, same_as)

    def check(self) -> None:
        """Call after the first pass. Raises TrialError naming a module that took no part in it."""
        if missing := sorted(self.expected - self.seen):
            raise TrialError(f"{missing[0]} and {len(missing) - 1} more modules took no part in the pass of a pack")

    # --- tensors ---

    def tensor(self, *size: int, written: bool = False) -> Tensor:
        """Zeros with a gradient of zeros, which autograd adds to.

        written   `add_gradient` writes it, and the backward pass returns None: one pass over memory less to clear it,
                  and one less to add to it. It stays an argument of what uses it: without, nothing would be asked
                  for a gradient where the input needs none
        """
        made = torch.zeros(size, device=self.device, requires_grad=True)
        made.grad = torch.zeros_like(made, requires_grad=False)
        if written:
            self._written.append(made)
        else:
            self._summed.append(made.grad)
        return made

    def add_gradient(self, tensor: Tensor, left: Tensor, right: Tensor, *, rows: slice = slice(None)) -> None:
        """Adds the batched product of two factors to rows of the tensor's gradient; a step's first takes its place."""
        assert tensor.grad is not None
        gradient, part = tensor.grad[:, rows], (id(tensor), rows.start)
        first = part not in self._begun
        self._begun.add(part)
        if left.dtype == gradient.dtype:
            gradient.baddbmm_(left, right, beta=0 if first else 1)  # 0: what lies there is not read
        elif first:
            gradient.copy_(torch.bmm(left, right))
        else:
            gradient.add_(torch.bmm(left, right))

    def place(self, tensor: Tensor, where: Any, parameter: nn.Parameter, part: Any = ...) -> None:
        """`tensor[where]` is `parameter[part]`: values are copied to it at `load`, gradients from it at `unload`."""
        assert tensor.grad is not None
        assert parameter.grad is not None
        self._places.append(tensor.detach()[where])
        self._sources.append(parameter.detach()[part])
        self._made.append(tensor.grad[where])
        self._gradients.append(parameter.grad[part])

    def place_repeated(self, tensor: Tensor, where: Any, parameter: nn.Parameter, part: Any, *, times: int) -> None:
        """`tensor[where]` is `parameter[part]` so many times, one below the other."""
        assert tensor.grad is not None
        assert parameter.grad is not None
        for place in tensor.detach()[where].chunk(times):
            self._places.append(place)
            self._sources.append(parameter.detach()[part])
        self._shared.append((parameter.grad[part], tensor.grad[where].unflatten(0, (times, -1))))

    def kept(self, members: Sequence[int], num_features: int) -> Tensor | None:
        """Which inputs stay, [P, T, I]; None: all. Drawn as each member would draw them alone, with its own padding."""
        if not any(self.adapters[k].lora_dropout for k in members):
            return None
        now = self.current
        keep = torch.ones(len(members), now.rows, now.width, num_features, dtype=torch.bool, device=self.device)
        for place, k in enumerate(members):
            if p := self.adapters[k].lora_dropout:
                own = torch.empty(now.rows, now.widths[k], num_features, dtype=torch.bool, device=self.device)
                keep[place, :, : now.widths[k]] = own.bernoulli_(1 - p, generator=now.generators[k])
        return keep.flatten(1, 2)

    def scale_of(self, member: int) -> float:
        """lora_alpha/r, and 1/(1 − p) where inputs are dropped."""
        adapter = self.adapters[member]
        return adapter.scale / (1 - adapter.lora_dropout)

    # --- what is adapted ---

    def _add_lora_moe(self) -> None:
        members: dict[str, list[int]] = defaultdict(list)
        for k, adapter in enumerate(self.adapters):
            for path in adapter.allocation.counts:  # type: ignore[union-attr]
                members[path].append(k)
        for path, which in members.items():
            module = module_at(self.model, path, name=self.adapters[0].shape.name)
            self._puts.append(partial(put_attribute, module, "forward", _LoraMoe(self, module, path, which).forward))
        self.expected = set(members)

    def _add_expert_lora(self) -> None:
        shape = self.adapters[0].shape
        for spec in shape.of_role(*ALWAYS_ADAPTED):
            module = module_at(self.model, spec.path, name=shape.name)
            self._puts.append(partial(put_on_linear, module, _PlainLora(self, spec.path).add))
            self.expected.add(spec.path)
        layers = sorted({layer for adapter in self.adapters for layer in adapter.experts})  # type: ignore[attr-defined]
        for layer in layers:
            experts = _PackedExperts(self, layer)
            self._puts.append(partial(put_attribute, experts.module, "lora", experts))
            self.expected.add(experts.path)
        if layers:
            self._puts.append(lambda: dispatch(self.model))

    def _add_shared_layers(self) -> None:
        shape, layers = self.adapters[0].shape, self.model.get_decoder().layers
        first = min((m.layer for m in shape.modules if m.path in self.expected), default=0)
        if first:
            shared = _SharedLayers(self, first)
            for number, layer in enumerate(layers[: first + 1]):
                hook = partial(shared.before, number)
                self._puts.append(partial(_put_before, layer, hook))


def _put_before(module: nn.Module, hook: Callable[..., Any]) -> Callable[[], None]:
    return module.register_forward_pre_hook(hook, with_kwargs=True).remove


class _SharedLayers:
    """Layers below the first that a member adapts: rows that several members train on run through them once.

    Whatever the model hands to these layers loses the rows that are there already; at the input of the first adapted
    layer they are filled in again. The model itself and the layers from there on see every member's rows.
    """

    def __init__(self, pack: Pack, first: int) -> None:
        self.pack, self.first = pack, first
        self.rows_U: Tensor | None = None  # which rows run; None: all of them
        self.copies_T = torch.empty(0)  # for every row of the pack, where it lies among those

    def before(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if number == 0:
            self._begin((args, kwargs))
        if self.rows_U is None:
            return None
        if number == self.first:
            (hidden, *rest), copies_T = args, self.copies_T
            return (hidden.index_select(0, copies_T), *rest), kwargs
        rows_U, num_rows = self.rows_U, len(self.copies_T)
        return tree_map(lambda x: x.index_select(0, rows_U) if _has_rows(x, num_rows) else x, (args, kwargs))

    def _begin(self, inputs: Any) -> None:
        now = self.pack.current
        run = sorted(set(now.same_as))
        num_rows = len(now.same_as) * now.rows
        # A tensor that is neither one for all rows nor one row each (a bias for every head, say) cannot be divided.
        known = all(x.size(0) in (1, num_rows) for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.dim() > 1)
        self.rows_U = None
        if known and inputs[0] and len(run) < len(now.same_as):
            rows_KB = torch.arange(num_rows, device=self.pack.device).view(-1, now.rows)
            self.rows_U = rows_KB[run].flatten()
            self.copies_T = rows_KB[[run.index(k) for k in now.same_as]].flatten()


def _has_rows(x: Any, num_rows: int) -> bool:
    return isinstance(x, Tensor) and x.dim() > 1 and x.size(0) == num_rows


class _PlainLora:
    """LoRA of every member on one linear layer or router of an MoE base."""

    def __init__(self, pack: Pack, path: str) -> None:
        self.pack, self.path = pack, path
        pairs = [(a._tensors[f"{path}.lora_A"], a._tensors[f"{path}.lora_B"]) for a in pack.adapters]
        ranks = [a_RI.size(0) for a_RI, _ in pairs]
        (a_RI, b_OR), most = pairs[0], max(ranks)
        self.a_KRI = pack.tensor(len(pairs), most, a_RI.size(1), written=True)
        self.b_KOR = pack.tensor(len(pairs), b_OR.size(0), most, written=True)
        for k, ((a_RI, b_OR), rank) in enumerate(zip(pairs, ranks, strict=True)):
            pack.place(self.a_KRI, (k, slice(rank)), a_RI)
            pack.place(self.b_KOR, (k, slice(None), slice(rank)), b_OR)
        self.members = range(len(pairs))
        self.scale_K11 = torch.tensor([pack.scale_of(k) for k in self.members], device=pack.device).view(-1, 1, 1)

    def add(self, out: Tensor, x: Tensor) -> Tensor:
        self.pack.seen.add(self.path)
        x_KTI = x.reshape(len(self.members), -1, x.size(-1)).to(out.dtype)
        keep = self.pack.kept(self.members, x.size(-1))
        return _AddPlainLora.apply(out, x_KTI, self.a_KRI, self.b_KOR, keep, self)


class _AddPlainLora(torch.autograd.Function):
    """`out + scale · x Aᵀ Bᵀ` of every member, in place: two batched GEMMs forward, four backward."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, x_KTI: Tensor, a_KRI: Tensor, b_KOR: Tensor, keep: Tensor | None, lora: _PlainLora
    ) -> Tensor:
        a, b = a_KRI.to(out.dtype), b_KOR.to(out.dtype)
        rank_KTR = torch.bmm(x_KTI if keep is None else x_KTI * keep, a.mT).mul_(lora.scale_K11.to(out.dtype))
        out.view(len(a), -1, out.size(-1)).baddbmm_(rank_KTR, b.mT)
        ctx.save_for_backward(x_KTI, keep, rank_KTR)
        ctx.lora = lora
        ctx.mark_dirty(out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_KTI, keep, rank_KTR = ctx.saved_tensors
        lora: _PlainLora = ctx.lora
        a, b = lora.a_KRI.to(dy.dtype), lora.b_KOR.to(dy.dtype)
        dy_KTO = dy.reshape(len(a), -1, dy.size(-1))
        drank_KTR = torch.bmm(dy_KTO, b).mul_(lora.scale_K11.to(dy.dtype))
        lora.pack.add_gradient(lora.b_KOR, dy_KTO.mT, rank_KTR)
        lora.pack.add_gradient(lora.a_KRI, drank_KTR.mT, x_KTI if keep is None else x_KTI * keep)
        dx = None
        if ctx.needs_input_grad[1]:
            dx = torch.bmm(drank_KTR, a)
            if keep is not None:
                dx.mul_(keep)
        return dy, dx, None, None, None, None


# ---------------------------------------------------------------------------------------------------------------------
# LoRA experts on a dense base


class _LoraMoe:
    """Experts of the members that have some on one linear layer, routed and hydra; the others' rows are left alone.

    down_PDI      A of every expert, padded to C rows, then the router, padded to N
    up_POC        B of every expert side by side
    spread_PNC    scale where column c belongs to expert n, else 0: gates [T, N] times it are the factors of rank space.
                  It lets members differ in N and r; hydra's one A is there once for each of its experts
    absent_P1N    −inf for experts that a member lacks; None: it lacks none
    """

    def __init__(self, pack: Pack, module: nn.Linear, path: str, members: list[int]) -> None:
        self.pack, self.module, self.path, self.members = pack, module, path, members
        adapters: list[Any] = [pack.adapters[k] for k in members]
        counts = [adapter.allocation.counts[path] for adapter in adapters]
        hydra = [adapter.allocation.gating == "hydra" for adapter in adapters]
        columns = [n * adapter.rank for n, adapter in zip(counts, adapters, strict=True)]
        num_columns, num_experts = max(columns), max(counts)
        device = pack.device
        self.num_columns = num_columns
        self.down_PDI = pack.tensor(len(members), num_columns + num_experts, module.in_features, written=True)
        self.up_POC = pack.tensor(len(members), module.out_features, num_columns, written=True)
        self.spread_PNC = torch.zeros(len(members), num_experts, num_columns)
        absent = torch.zeros(len(members), 1, num_experts)
        for p, (adapter, n, c) in enumerate(zip(adapters, counts, columns, strict=True)):
            down, up, rank = adapter._tensors[f"{path}.down"], adapter._tensors[f"{path}.up"], adapter.rank
            first = rank if hydra[p] else c  # rows of A
            if hydra[p]:
                pack.place_repeated(self.down_PDI, (p, slice(c)), down, slice(first), times=n)
            else:
                pack.place(self.down_PDI, (p, slice(c)), down, slice(first))
            pack.place(self.down_PDI, (p, slice(num_columns, num_columns + n)), down, slice(first, None))
            pack.place(self.up_POC, (p, slice(None), slice(c)), up)
            for expert in range(n):
                self.spread_PNC[p, expert, expert * rank : (expert + 1) * rank] = pack.scale_of(members[p])
            absent[p, :, n:] = -torch.inf
        self.spread_PNC = self.spread_PNC.to(device)
        self.absent_P1N = absent.to(device) if min(counts) < num_experts else None
        picks = [n if h else min(a.top_k, n) for a, n, h in zip(adapters, counts, hydra, strict=True)]
        # Where every member weighs all its experts there is nothing to pick.
        self.top_k = None if picks == counts else max(picks)
        self.dropped_P1K: Tensor | None = None  # −inf for picks that a member does not take
        if self.top_k is not None and min(picks) < self.top_k:
            places = torch.arange(self.top_k)
            dropped = torch.where(places < torch.tensor(picks).view(-1, 1, 1), 0.0, -torch.inf)
            self.dropped_P1K = dropped.to(device)
        self.balanced = [(p, k) for p, k in enumerate(members) if pack.adapters[k].balanced]  # type: ignore[attr-defined]
        self.counts = counts
        everyone = len(members) == len(pack.adapters)
        run = members == list(range(members[0], members[0] + len(members)))  # neighbours: a view instead of a copy
        self.slice = slice(members[0], members[0] + len(members)) if run and not everyone else None
        self.ids = None if everyone or run else torch.tensor(members, device=device)

    def forward(self, x: Tensor) -> Tensor:
        self.pack.seen.add(self.path)
        keep = self.pack.kept(self.members, x.size(-1))
        weight, bias = self.module.weight, self.module.bias
        y, logits_PTN = _PackedLoraMoe.apply(x, weight, bias, self.down_PDI, self.up_POC, keep, self)
        for p, k in self.balanced:
            self.pack.adapters[k].collect(self.path, logits_PTN[p, :, : self.counts[p]])  # type: ignore[attr-defined]
        return y

    def pick(self, rows: Tensor) -> Tensor:
        """Of all members' rows [K·B, S, ·] those of the module's members, [P, T, ·]."""
        rows_KT = rows.reshape(len(self.pack.adapters), -1, rows.size(-1))
        if self.ids is not None:
            return rows_KT.index_select(0, self.ids)
        return rows_KT if self.slice is None else rows_KT[self.slice]

    def add_(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """`total[rows of the members] += left @ right`, in place."""
        if self.ids is not None:
            self.add_rows_(total, torch.bmm(left, right))
        else:
            self._own(total).baddbmm_(left, right)

    def add_rows_(self, total: Tensor, part_PTO: Tensor) -> None:
        if self.ids is not None:
            total.view(len(self.pack.adapters), -1, total.size(-1)).index_add_(0, self.ids, part_PTO)
        else:
            self._own(total).add_(part_PTO)

    def _own(self, total: Tensor) -> Tensor:
        total_KTO = total.view(len(self.pack.adapters), -1, total.size(-1))
        return total_KTO if self.slice is None else total_KTO[self.slice]

    def gates(self, logits_PTN: Tensor) -> Tensor:
        """As `lora_moe.route`, with experts and picks that a member lacks at −inf: their gates are exactly zero."""
        precise = torch.promote_types(logits_PTN.dtype, torch.float32)
        if self.absent_P1N is not None:
            logits_PTN = logits_PTN + self.absent_P1N.to(logits_PTN.dtype)
        if self.top_k is None:
            return logits_PTN.softmax(-1, dtype=precise)
        chosen_PTK, ids_PTK = logits_PTN.topk(self.top_k, dim=-1)
        if self.dropped_P1K is not None:
            chosen_PTK = chosen_PTK + self.dropped_P1K.to(chosen_PTK.dtype)
        zeros_PTN = logits_PTN.new_zeros(logits_PTN.shape, dtype=precise)
        return zeros_PTN.scatter_(-1, ids_PTK, chosen_PTK.softmax(-1, dtype=precise))


class _PackedLoraMoe(torch.autograd.Function):
    """`lora_moe._LoraMoeLinear` with members in front: returns the layer's output and the router logits [P, T, N]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down_PDI: Tensor,
        up_POC: Tensor,
        keep: Tensor | None,
        experts: _LoraMoe,
    ) -> tuple[Tensor, Tensor | None]:
        c = experts.num_columns
        y, x_PTI = F.linear(x, weight, bias), experts.pick(x)
        down, up = down_PDI.to(x.dtype), up_POC.to(x.dtype)
        if keep is None:
            z_PTD = torch.bmm(x_PTI, down.mT)
        else:  # the router sees the input before dropout
            z_PTD = torch.cat([torch.bmm(x_PTI * keep, down[:, :c].mT), torch.bmm(x_PTI, down[:, c:].mT)], dim=-1)
        gates_PTN = experts.gates(z_PTD[..., c:])
        h_PTC = (z_PTD[..., :c] * torch.bmm(gates_PTN, experts.spread_PNC.to(gates_PTN.dtype))).to(x.dtype)
        experts.add_(y, h_PTC, up.mT)
        ctx.save_for_backward(x, weight, keep, z_PTD, gates_PTN)
        ctx.experts = experts
        ctx.set_materialize_grads(False)
        return y, z_PTD[..., c:].to(gates_PTN.dtype, copy=True) if experts.balanced else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dlogits_PTN: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, keep, z_PTD, gates_PTN = ctx.saved_tensors
        experts: _LoraMoe = ctx.experts
        pack, c = experts.pack, experts.num_columns
        down, up = experts.down_PDI.to(x.dtype), experts.up_POC.to(x.dtype)
        if dy is None:  # only a balance loss reached this module
            dy = x.new_zeros(*x.shape[:-1], up.size(1))
        x_PTI, dy_PTO = experts.pick(x), experts.pick(dy)
        spread_PNC = experts.spread_PNC.to(gates_PTN.dtype)

        factor_PTC = torch.bmm(gates_PTN, spread_PNC)
        dh_PTC = torch.bmm(dy_PTO, up)
        pack.add_gradient(experts.up_POC, dy_PTO.mT, (z_PTD[..., :c] * factor_PTC).to(x.dtype))
        dg_PTN = torch.bmm((dh_PTC * z_PTD[..., :c]).to(gates_PTN.dtype), spread_PNC.mT)
        weighted_PTN = gates_PTN * dg_PTN
        dl_PTN = weighted_PTN - gates_PTN * weighted_PTN.sum(-1, keepdim=True)
        if dlogits_PTN is not None:
            dl_PTN = dl_PTN + dlogits_PTN
        da, dl = (dh_PTC * factor_PTC).to(x.dtype), dl_PTN.to(x.dtype)
        dz_PTD = torch.cat([da, dl], dim=-1)

        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight
            if keep is None:
                experts.add_(dx, dz_PTD, down)
            else:
                experts.add_(dx, dl, down[:, c:])
                experts.add_rows_(dx, torch.bmm(da, down[:, :c]).mul_(keep))
        if keep is None:
            pack.add_gradient(experts.down_PDI, dz_PTD.mT, x_PTI)
        else:
            pack.add_gradient(experts.down_PDI, da.mT, x_PTI * keep, rows=slice(c))
            pack.add_gradient(experts.down_PDI, dl.mT, x_PTI, rows=slice(c, None))
        return dx, None, None, None, None, None, None


# ---------------------------------------------------------------------------------------------------------------------
# LoRA on chosen experts of an MoE base


class _PackedExperts(ExpertStacks):
    """LoRA of every member on its own chosen experts of one layer; what `expert_lora.experts_forward` asks for.

    A pair is a member and one of its experts; C pairs, member by member. Only rows of pairs run through LoRA.
    The number of these rows is read back from the device, once a layer and pass.

    Shapes as in trainers/adapter/expert_lora.py, where K are the experts a token: here K is members, J that.
    """

    def __init__(self, pack: Pack, layer: int) -> None:
        loras = {k: a.experts[layer] for k, a in enumerate(pack.adapters) if layer in a.experts}  # type: ignore[attr-defined]
        one = next(iter(loras.values()))
        super().__init__(one.module, path=one.path)
        self.pack = pack
        self.num_members, self.num_experts = len(pack.adapters), one.module.num_experts
        ends = [0]
        for lora in loras.values():
            ends.append(ends[-1] + len(lora.ids))
        self.num_pairs = ends[-1]
        self.pairs_of = {k: (ends[i], ends[i + 1]) for i, k in enumerate(loras)}
        pair_of = torch.full((self.num_members, self.num_experts), self.num_pairs)
        scales = torch.empty(self.num_pairs)
        for k, lora in loras.items():
            first, last = self.pairs_of[k]
            pair_of[k, list(lora.ids)] = torch.arange(first, last)
            scales[first:last] = pack.scale_of(k)
        self.pair_of = pair_of.flatten().to(self.device)
        self.scale_C = scales.to(self.device)
        self.places_C = torch.arange(self.num_pairs, device=self.device)
        self.drops = any(pack.adapters[k].lora_dropout for k in loras)

        # As `expert_lora.side_by_side` lays them out, each projection with the largest rank of all members.
        most = max(a_CRI.size(1) for lora in loras.values() for a_CRI, _ in lora.pairs.values())
        self.tensors: dict[str, tuple[Tensor, Tensor]] = {}
        for stack, projections in self.stacks.items():
            sizes = [one.pairs[name] for name in projections]
            ranks = most * len(projections)
            ranks += -ranks % (16 // one.module.down_proj.dtype.itemsize)  # grouped_mm wants rows of 16 bytes
            outputs = sum(b.size(1) for _, b in sizes)
            a = pack.tensor(self.num_pairs, ranks, sizes[0][0].size(2))
            b = pack.tensor(self.num_pairs, outputs, ranks)
            for number, name in enumerate(projections):
                for k, lora in loras.items():
                    a_CRI, b_COR = lora.pairs[name]
                    pairs = slice(*self.pairs_of[k])
                    in_rank = slice(number * most, number * most + a_CRI.size(1))
                    o = b_COR.size(1)
                    rows = slice(number * o, (number + 1) * o)
                    if not one.module.is_concatenated:
                        rows = slice(number, None, len(projections))
                    pack.place(a, (pairs, in_rank), a_CRI)
                    pack.place(b, (pairs, rows, in_rank), b_COR)
            self.tensors[stack] = a, b

    def route(self, index_TJ: Tensor) -> Route:
        self.pack.seen.add(self.path)
        ids_S, order_S, inverse_S, token_S, ends_E = self.sort(index_TJ, stable=self.drops)
        member_S = token_S // (index_TJ.size(0) // self.num_members)
        pair_S = self.pair_of.index_select(0, member_S * self.num_experts + ids_S)
        pair_S, rows_S = torch.sort(pair_S, stable=True)
        ends_C = torch.searchsorted(pair_S, self.places_C, right=True, out_int32=True)
        num_rows = int(ends_C[-1])
        scale_Q1 = self.scale_C.index_select(0, pair_S[:num_rows]).unsqueeze(1)
        scale_Q1 = scale_Q1.to(self.module.down_proj.dtype)
        return Route(ids_S, order_S, inverse_S, token_S, ends_E, rows_S[:num_rows], ends_C, scale_Q1)

    def factors(self, stack: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        a_CRI, b_COR = self.tensors[stack]
        return a_CRI.to(dtype), b_COR.to(dtype)

    def scale_of(self, route: Route, keep_QI: Tensor | None) -> Tensor:
        assert route.scale_Q1 is not None
        return route.scale_Q1

    def kept(self, route: Route, num_features: int) -> Tensor | None:
        """As a member alone draws them on a CPU: for its rows, by expert and token, without the others' padding."""
        if not self.drops:
            return None
        assert route.rows_Q is not None
        now, ends = self.pack.current, [0, *route.ends_C.tolist()]
        keep_QI = torch.ones(ends[-1], num_features, dtype=torch.bool, device=self.device)
        place_Q = route.token_S.index_select(0, route.rows_Q) % now.width
        for k, (first, last) in self.pairs_of.items():
            if p := self.pack.adapters[k].lora_dropout:
                rows = slice(ends[first], ends[last])
                own = (place_Q[rows] < now.widths[k]).nonzero().squeeze(1) + rows.start
                drawn = torch.rand(len(own), num_features, device=self.device, generator=now.generators[k])
                keep_QI[own] = drawn >= p
        return keep_QI


# ---------------------------------------------------------------------------------------------------------------------
# Runs side by side


class Member(loop.Run):
    """One run of a crew. `result` or `error` once it has ended; `most` is how many shared its passes at most."""

    def __init__(self, crew: Crew, adapter: Adapter, recipe: Recipe, seed: int, on_rung: Any, checkpoint: Any) -> None:
        super().__init__(
            crew.model, adapter, crew.task, recipe, seed, crew.tokenizer, crew.device, crew.evaluations, checkpoint
        )
        self.crew, self.on_rung = crew, on_rung
        self.generator = torch.Generator(device=self.device)
        self.result: loop.Result | None = None
        self.error: Exception | None = None
        self.most = 1  # members in a step of its, itself included
        self.past.began = None

    def begin(self, on_rung: Callable[[Rung], bool]) -> loop.Result | None:
        result = super().begin(on_rung)
        self.past.began = None  # seconds are shares, see `Crew.step`
        self.flat.install()
        return result

    def micro_batches(self) -> list[list[loop.Row]]:
        size = self.recipe.micro_batch_size
        return loop.share_of(self.batch(self.step), rank=0, world_size=1, micro_batch_size=size)

    def evaluate(self, step: int) -> Rung:
        """With this member's adapter alone on the model; the others wait."""
        began = time.monotonic()
        with self.crew.only(self):
            rung = super().evaluate(step)
        self.past.seconds += time.monotonic() - began
        return rung


class Crew:
    """Runs on one model and task that train step by step together; they join and leave between steps."""

    def __init__(self, model: nn.Module, task: Any, *, tokenizer: Any, device: Any, evaluations: int) -> None:
        self.model, self.task, self.tokenizer = model, task, tokenizer
        self.device, self.evaluations = torch.device(device), evaluations
        self.members: list[Member] = []
        self._pack: Pack | None = None

    def fits(self, recipe: Recipe) -> bool:
        """Whether a run of this recipe may join those that train now."""
        return not self.members or shape_of_steps(recipe) == shape_of_steps(self.members[0].recipe)

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
                f"batch_size, micro_batch_size and max_length are {shape_of_steps(recipe)}, of the trainings under way "
                f"{shape_of_steps(self.members[0].recipe)}: trainings in a pack have them in common"
            )
        member = Member(self, adapter, recipe, seed, on_rung, checkpoint)
        member.result = member.begin(on_rung)
        if member.result is None:
            self._change([*self.members, member])
        else:
            _forget_gradients(member)
        return member

    def step(self) -> list[Member]:
        """One optimiser step of every member; those that have ended by it, which are no members any more.

        A member's seconds are its equal share of the steps that it took part in, and its own evaluations.

        Raises what the joint pass raises (OutOfMemoryError where memory does not suffice), after giving memory back:
        nobody is a member then, and all of them may go on alone from their checkpoints.
        """
        members, began, reason = self.members, time.monotonic(), ""
        try:
            with loop.own_random_state(self.device), loop.one_sample_a_row():
                self._take_step()
        except RuntimeError as error:
            self.disband()
            if not loop.is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
        except BaseException:
            self.disband()
            raise
        if reason:
            loop.give_memory_back(self.device)
            raise OutOfMemoryError(
                f"out of memory on {self.device} with {len(members)} training(s) in a pack ({reason})"
            )
        for member in members:
            member.past.seconds += (time.monotonic() - began) / len(members)
            member.most = max(member.most, len(members))
        for member in members:
            try:
                with loop.own_random_state(self.device), loop.one_sample_a_row():
                    member.result = member.reach(member.on_rung)
            except Exception as error:  # of this member alone: its evaluation, its checkpoint, its report
                member.error = error
        ended = [member for member in members if member.result is not None or member.error is not None]
        if ended:
            self._change([member for member in members if member not in ended])
        for member in ended:
            _forget_gradients(member)
        return ended

    def disband(self) -> list[Member]:
        """Nobody trains any more and the base is as it was; who they were."""
        before = self.members
        self._change([])
        self.model.eval()
        for member in before:
            _forget_gradients(member)
        return before

    def step_aside(self) -> None:
        """Takes the hooks out until the next step: the model is the base alone."""
        if self._pack is not None:
            self._pack.detach()

    @contextmanager
    def only(self, member: Member) -> Iterator[None]:
        """Inside the block the model has this member's adapter and no other."""
        self.step_aside()
        member.adapter.reattach()
        try:
            yield
        finally:
            member.adapter.detach()

    def _change(self, members: list[Member]) -> None:
        self.step_aside()
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
            member.generator.manual_seed(loop.dropout_seed(member.seed, member.step))
        per_token_K = 1 / torch.tensor(tokens, dtype=torch.float32, device=self.device)
        pack.load()
        for parts in zip(*micro_batches, strict=True):  # one micro-batch of every member
            rows = [row for part in parts for row in part]
            batch = loop.collate(rows, pad_token_id=members[0].pad_token_id, device=self.device)
            pack.begin_pass(
                rows=len(parts[0]),
                width=batch.tokens_3BS.shape[2],
                widths=[max(len(row.input_ids) for row in part) for part in parts],
                generators=[member.generator for member in members],
                same_as=[parts.index(part) for part in parts],
            )
            losses_K = loop.completion_losses(self.model, batch, parts=len(members)) * per_token_K
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
        pack.unload()
        for member in members:
            member.close_step(member.step)


def seconds_of_a_step(crew: Crew, *, steps: int = 5) -> float:
    """Median over so many steps of the crew as it is, after two that warm up.

    On a CPU those of the process: what else the machine does, other workers above all, counts less.
    """
    clock = time.process_time if crew.device.type == "cpu" else time.perf_counter
    seconds = []
    for number in range(steps + 2):
        began = clock()
        if crew.step():
            raise TrialError("a training ended while its steps were timed")
        if crew.device.type == "cuda":
            torch.cuda.synchronize(crew.device)
        if number > 1:
            seconds.append(clock() - began)
    return statistics.median(seconds)


def _forget_gradients(member: Member) -> None:
    for parameter in member.adapter.parameters():
        parameter.grad = None
