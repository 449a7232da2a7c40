"""Plain LoRA of the members: on linear layers, routers and shared experts, and on experts that a member has chosen.

`parts` is for selections of experts, `parts_of_ranks` for ranks, where a member adapts modules of its own.

Shapes: K members, T tokens of a member, I input and O output features, R the largest rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from allocators.core.types import ALWAYS_ADAPTED
from trainers.adapter.expert_lora import (
    ExpertLora,
    ExpertLoraAdapter,
    ExpertStacks,
    Route,
    kept_rows,
    padded_rank,
    waits,
)
from trainers.adapter.linear import module_at, put_attribute, put_on_linear
from trainers.adapter.module_ranks import ModuleRanksAdapter
from trainers.adapter.module_ranks.experts import RaggedExpertLora
from trainers.packing.buffers import Buffers
from trainers.packing.passes import MemberRows, Part, Passes


def parts(model: nn.Module, adapters: Sequence[ExpertLoraAdapter], buffers: Buffers, passes: Passes) -> list[Part]:
    """What the adapters have between them, module by module."""
    shape = adapters[0].shape
    made: list[Part] = []
    for spec in shape.of_role(*ALWAYS_ADAPTED):
        module = module_at(model, spec.path, name=shape.name)
        pairs = {k: adapter.linear_lora(spec.path) for k, adapter in enumerate(adapters)}
        made.append(PackedLinear(module, spec.path, pairs, buffers, passes))
    for layer in sorted({layer for adapter in adapters for layer in adapter.experts}):
        loras = {k: adapter.experts[layer] for k, adapter in enumerate(adapters) if layer in adapter.experts}
        made.append(PackedExperts(loras, buffers, passes))
    return made


def parts_of_ranks(
    model: nn.Module, adapters: Sequence[ModuleRanksAdapter], buffers: Buffers, passes: Passes
) -> list[Part]:
    """What the adapters have between them, module by module; a module that one of them leaves alone is the others'."""
    shape = adapters[0].shape
    made: list[Part] = []
    for spec in shape.modules:
        ranked = {k: a.linear_lora(spec.path) for k, a in enumerate(adapters) if spec.path in a.allocation.ranks}
        if ranked:
            module = module_at(model, spec.path, name=shape.name)
            made.append(PackedLinear(module, spec.path, ranked, buffers, passes))
    for layer in sorted({layer for adapter in adapters for layer in adapter.experts}):
        loras = {k: adapter.experts[layer] for k, adapter in enumerate(adapters) if layer in adapter.experts}
        made.append(PackedExperts(loras, buffers, passes))
    return made


class PackedLinear(Part):
    """LoRA of the members that adapt it on one linear layer or router.

    pairs   member → A and B
    """

    def __init__(
        self,
        module: Any,
        path: str,
        pairs: dict[int, tuple[nn.Parameter, nn.Parameter]],
        buffers: Buffers,
        passes: Passes,
    ) -> None:
        self.module, self.path, self.buffers, self.passes = module, path, buffers, passes
        self.members = list(pairs)
        self.rows = MemberRows(self.members, num_members=passes.num_members, device=buffers.device)
        (a_RI, b_OR), most = next(iter(pairs.values())), max(len(a_RI) for a_RI, _ in pairs.values())
        self.a_KRI = buffers.tensor(len(pairs), most, a_RI.size(1), written=True)
        self.b_KOR = buffers.tensor(len(pairs), b_OR.size(0), most, written=True)
        for place, (a_RI, b_OR) in enumerate(pairs.values()):
            buffers.place(self.a_KRI, (place, slice(len(a_RI))), a_RI)
            buffers.place(self.b_KOR, (place, slice(None), slice(len(a_RI))), b_OR)
        scales = [passes.scale_of(k) for k in self.members]
        self.scale_K11 = torch.tensor(scales, device=buffers.device).view(-1, 1, 1)

    def put(self) -> Callable[[], None]:
        """Hooks the adapters in; what it returns takes them out."""
        return put_on_linear(self.module, self.add)

    def add(self, out: Tensor, x: Tensor) -> Tensor:
        """Adds every member's LoRA to the layer's output for its rows."""
        self.seen = True
        x_KTI = self.rows.pick(x).to(out.dtype)
        keep = self.passes.kept(self.members, x.size(-1))
        y: Tensor = _AddLora.apply(out, x_KTI, self.a_KRI, self.b_KOR, keep, self)
        return y


class _AddLora(torch.autograd.Function):
    """`out + scale · x Aᵀ Bᵀ` of every member, in place: two batched GEMMs forward, four backward.

    `add_lora` with its gradients written out, because these are added to where they belong, and with the scale in rank
    space, because members differ in it.
    """

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, x_KTI: Tensor, a_KRI: Tensor, b_KOR: Tensor, keep: Tensor | None, lora: PackedLinear
    ) -> Tensor:
        a, b = a_KRI.to(out.dtype), b_KOR.to(out.dtype)
        rank_KTR = torch.bmm(x_KTI if keep is None else x_KTI * keep, a.mT).mul_(lora.scale_K11.to(out.dtype))
        lora.rows.add_product_(out, rank_KTR, b.mT)
        ctx.save_for_backward(x_KTI, keep, rank_KTR)
        ctx.lora = lora
        ctx.mark_dirty(out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_KTI, keep, rank_KTR = ctx.saved_tensors
        lora: PackedLinear = ctx.lora
        a, b = lora.a_KRI.to(dy.dtype), lora.b_KOR.to(dy.dtype)
        dy_KTO = lora.rows.pick(dy)
        drank_KTR = torch.bmm(dy_KTO, b).mul_(lora.scale_K11.to(dy.dtype))
        lora.buffers.add_gradient(lora.b_KOR, dy_KTO.mT, rank_KTR)
        lora.buffers.add_gradient(lora.a_KRI, drank_KTR.mT, x_KTI if keep is None else x_KTI * keep)
        dx = None
        if ctx.needs_input_grad[1]:
            dx = torch.bmm(drank_KTR, a)
            if keep is not None:
                dx.mul_(keep)
        return dy, dx, None, None, None, None


class PackedExperts(ExpertStacks, Part):
    """LoRA of every member on its own chosen experts of one layer; what `expert_lora.experts_forward` asks for.

    A pair is a member and one of its experts; C pairs, member by member. On a CPU only rows of pairs run through LoRA.
    Where reading their number back `waits`, all rows do, and those of no pair have one of their own at the end, whose
    factors are zeros (`every_row`).

    Shapes as in trainers/adapter/expert_lora.py, where K are the experts a token: here K is members, J that.
    """

    def __init__(self, loras: Mapping[int, ExpertLora], buffers: Buffers, passes: Passes) -> None:
        one = next(iter(loras.values()))
        super().__init__(one.module, path=one.path)
        self.passes = passes
        self.num_experts: int = one.module.num_experts
        ends = [0]
        for lora in loras.values():
            ends.append(ends[-1] + len(lora.ids))
        self.every_row = waits(one.module.down_proj)
        self.num_pairs = ends[-1] + self.every_row
        self.pairs_of = {k: (ends[i], ends[i + 1]) for i, k in enumerate(loras)}
        pair_of = torch.full((passes.num_members, self.num_experts), ends[-1])
        scales = torch.ones(self.num_pairs)
        for k, lora in loras.items():
            first, last = self.pairs_of[k]
            pair_of[k, list(lora.ids)] = torch.arange(first, last)
            scales[first:last] = passes.scale_of(k)
        self.pair_of = pair_of.flatten().to(self.device)
        self.scale_C = scales.to(self.device)
        self.places_C = torch.arange(self.num_pairs, device=self.device)
        self.drops = passes.drops(list(loras))
        most = max(lora.most for lora in loras.values())
        self.tensors = {stack: self._side_by_side(stack, loras, most, buffers) for stack in self.stacks}

    def put(self) -> Callable[[], None]:
        """Hooks the adapters in; what it returns takes them out."""
        return put_attribute(self.module, "lora", self)

    def _side_by_side(
        self, stack: str, loras: Mapping[int, ExpertLora], most: int, buffers: Buffers
    ) -> tuple[Tensor, Tensor]:
        """As `expert_lora.side_by_side` has it, each projection with the largest rank of all members."""
        projections, one = self.stacks[stack], next(iter(loras.values()))
        outputs = [one.size(name)[0] for name in projections]
        ranks = padded_rank(most * len(projections), self.module.down_proj.dtype)
        a = buffers.tensor(self.num_pairs, ranks, one.size(projections[0])[1])
        b = buffers.tensor(self.num_pairs, sum(outputs), ranks)
        for position, name in enumerate(projections):
            rows = self.rows_of(stack, position, outputs[position])
            for k, lora in loras.items():
                _place(lora, name, (a, b), rows, pairs=self.pairs_of[k], first=position * most, buffers=buffers)
        return a, b

    def route(self, index_TJ: Tensor) -> Route:
        """Sorts rows by expert; those that a member adapts also by (member, expert)."""
        self.seen = True
        ids_S, order_S, inverse_S, token_S, ends_E = self.sort(index_TJ, stable=self.drops)
        member_S = token_S // (index_TJ.size(0) // self.passes.num_members)
        pair_S = self.pair_of.index_select(0, member_S * self.num_experts + ids_S)
        pair_S, rows_S = torch.sort(pair_S, stable=True)
        ends_C = torch.searchsorted(pair_S, self.places_C, right=True, out_int32=True)
        num_rows = len(rows_S) if self.every_row else int(ends_C[-1])
        scale_Q1 = self.scale_C.index_select(0, pair_S[:num_rows]).unsqueeze(1)
        scale_Q1 = scale_Q1.to(self.module.down_proj.dtype)
        return Route(ids_S, order_S, inverse_S, token_S, ends_E, rows_S[:num_rows], ends_C, scale_Q1)

    def factors(self, stack: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A [C, R, I] and B [C, O, R] of all members, in `dtype`; ranks are filled up with zeros."""
        a_CRI, b_COR = self.tensors[stack]
        return a_CRI.to(dtype), b_COR.to(dtype)

    def scale_of(self, route: Route, keep_QI: Tensor | None) -> Tensor:
        """Of every adapted row, [Q, 1]: each member has its own scale."""
        assert route.scale_Q1 is not None
        return route.scale_Q1

    def kept(self, route: Route, num_features: int) -> Tensor | None:
        """As a member alone draws them: for its rows, by expert and token, without the others' padding."""
        if not self.drops:
            return None
        assert route.rows_Q is not None
        if self.every_row:
            return self._kept_of_every_row(route, route.rows_Q, num_features)
        now, ends = self.passes.now, [0, *route.ends_C.tolist()]
        keep_QI = torch.ones(ends[-1], num_features, dtype=torch.bool, device=self.device)
        place_Q = route.token_S.index_select(0, route.rows_Q) % now.width
        for k, (first, last) in self.pairs_of.items():
            if p := self.passes.loras[k].lora_dropout:
                rows = slice(ends[first], ends[last])
                own = (place_Q[rows] < now.widths[k]).nonzero().squeeze(1) + rows.start
                keep_QI[own] = kept_rows(
                    len(own), num_features, dropout=p, device=self.device, generator=now.generators[k]
                )
        return keep_QI

    def _kept_of_every_row(self, route: Route, rows_Q: Tensor, num_features: int) -> Tensor:
        """The same where no number may be read back. What no member draws is padding: anything may stay there."""
        now, num_rows = self.passes.now, len(rows_Q)
        picks = num_rows // (self.passes.num_members * now.rows * now.width)
        place_S = route.token_S % now.width
        member_S = route.token_S // (now.rows * now.width)
        keep_SI = torch.ones(num_rows, num_features, dtype=torch.bool, device=self.device)
        for k in self.pairs_of:
            if p := self.passes.loras[k].lora_dropout:
                own_S = (member_S == k) & (place_S < now.widths[k])
                count = now.rows * now.widths[k] * picks
                drawn = kept_rows(count, num_features, dropout=p, device=self.device, generator=now.generators[k])
                number_S = (own_S.cumsum(0) - 1).clamp_(min=0)  # of a row among the member's own
                keep_SI = torch.where(own_S.unsqueeze(1), drawn.index_select(0, number_S), keep_SI)
        return keep_SI.index_select(0, rows_Q)


def _place(
    lora: ExpertLora,
    name: str,
    tensors: tuple[Tensor, Tensor],
    rows: slice,
    *,
    pairs: tuple[int, int],
    first: int,
    buffers: Buffers,
) -> None:
    """A member's factors of one projection, from rank `first` on: of all its experts, or expert by expert."""
    if name not in lora.pairs:  # none of its experts has a rank in this projection
        return
    (a, b), (a_of, b_of) = tensors, lora.pairs[name]
    if not isinstance(lora, RaggedExpertLora):
        in_rank = slice(first, first + a_of.size(1))
        buffers.place(a, (slice(*pairs), in_rank), a_of)
        buffers.place(b, (slice(*pairs), rows, in_rank), b_of)
        return
    for c, part in lora.parts(name):
        in_rank = slice(first, first + part.stop - part.start)
        buffers.place(a, (pairs[0] + c, in_rank), a_of, part)
        buffers.place(b, (pairs[0] + c, rows, in_rank), b_of, (slice(None), part))
