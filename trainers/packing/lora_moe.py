"""LoRA experts of every member on a dense base, routed and hydra; members that have none on a module keep its output.

The arithmetic is that of trainers/adapter/lora_moe.py with members in front: its `Experts` are those of all members
here, and masks make up for members that differ in the number of experts, the rank and top_k.

Shapes: K members, P of them adapt a module, T tokens of a member, I input and O output features, N the most experts and
C the most columns N·r in rank space of a module's members, D = C + N.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers.adapter.linear import module_at, put_attribute
from trainers.adapter.lora_moe import Experts, LoraMoeAdapter, into_rank_space, mix, mix_backward
from trainers.packing.buffers import Buffers
from trainers.packing.passes import MemberRows, Part, Passes


def parts(model: nn.Module, adapters: Sequence[LoraMoeAdapter], buffers: Buffers, passes: Passes) -> list[Part]:
    """What the adapters have between them, module by module."""
    members: dict[str, dict[int, LoraMoeAdapter]] = defaultdict(dict)
    for k, adapter in enumerate(adapters):
        for path in adapter.allocation.counts:
            members[path][k] = adapter
    return [
        PackedLoraMoe(module_at(model, path, name=adapters[0].shape.name), path, of, buffers, passes)
        for path, of in members.items()
    ]


class PackedExperts(Experts):
    """The experts of a module's members: `mix` and `mix_backward` of them all are one call.

    spread_PNC   scale where column c belongs to expert n, else 0: gates [T, N] times it are the factors of rank space.
                 It lets members differ in N and r; hydra's one A is there once for each of its experts
    """

    def __init__(self, path: str, adapters: Sequence[LoraMoeAdapter], scales: Sequence[float], device: Any) -> None:
        counts = [adapter.allocation.counts[path] for adapter in adapters]
        picks = [adapter.picks(path) for adapter in adapters]
        ranks = [adapter.lora.rank for adapter in adapters]
        self.num_experts = max(counts)
        self.num_columns = max(n * rank for n, rank in zip(counts, ranks, strict=True))
        # Where every member weighs all its experts there is nothing to pick.
        self.top_k = self.num_experts if picks == counts else max(picks)
        spread = torch.zeros(len(adapters), self.num_experts, self.num_columns)
        for p, (n, rank, scale) in enumerate(zip(counts, ranks, scales, strict=True)):
            for expert in range(n):
                spread[p, expert, expert * rank : (expert + 1) * rank] = scale
        self.spread_PNC = spread.to(device)
        if min(counts) < self.num_experts:
            self.absent_N = _beyond(counts, self.num_experts).to(device)
        if picks != counts and min(picks) < self.top_k:
            self.dropped_K = _beyond(picks, self.top_k).to(device)

    def columns(self, part_TC: Tensor) -> Tensor:
        """The same tensor."""
        return part_TC

    def spread(self, gates_TN: Tensor) -> Tensor:
        """[P, T, C], by a product with a matrix of scales and zeros: members have different ranks."""
        return torch.bmm(gates_TN, self.spread_PNC.to(gates_TN.dtype))

    def sums(self, product: Tensor, dtype: torch.dtype) -> Tensor:
        """[P, T, N], by the transpose of the same matrix."""
        return torch.bmm(product.to(dtype), self.spread_PNC.to(dtype).mT)

    def flat(self, product: Tensor) -> Tensor:
        """The same tensor."""
        return product

    def logit_gradient(self, dgates_TN: Tensor, gates_TN: Tensor) -> Tensor:
        """The same formula, in the order of operations that keeps packed losses as they were, bit for bit."""
        weighted_TN = gates_TN * dgates_TN
        return weighted_TN - gates_TN * weighted_TN.sum(-1, keepdim=True)


def _beyond(numbers: Sequence[int], most: int) -> Tensor:
    """[P, 1, most]: 0 in so many first places of each member, −inf in the others."""
    return torch.where(torch.arange(most) < torch.tensor(numbers).view(-1, 1, 1), 0.0, -torch.inf)


class PackedLoraMoe(Part):
    """Experts of the members that have some on one linear layer.

    down_PDI   A of every expert, padded to C rows, then the router, padded to N
    up_POC     B of every expert side by side
    """

    def __init__(
        self, module: nn.Linear, path: str, adapters: dict[int, LoraMoeAdapter], buffers: Buffers, passes: Passes
    ) -> None:
        self.module, self.path, self.buffers, self.passes = module, path, buffers, passes
        self.members = list(adapters)
        scales = [passes.scale_of(k) for k in adapters]
        self.experts = PackedExperts(path, list(adapters.values()), scales, buffers.device)
        num_rows, num_columns = self.experts.num_columns + self.experts.num_experts, self.experts.num_columns
        self.down_PDI = buffers.tensor(len(adapters), num_rows, module.in_features, written=True)
        self.up_POC = buffers.tensor(len(adapters), module.out_features, num_columns, written=True)
        for p, adapter in enumerate(adapters.values()):
            self._place(p, adapter)
        self.balanced = [(p, adapter) for p, adapter in enumerate(adapters.values()) if adapter.balanced]
        self.rows = MemberRows(self.members, num_members=passes.num_members, device=buffers.device)

    def _place(self, p: int, adapter: LoraMoeAdapter) -> None:
        """Says where the tensors of one of the members lie."""
        (down_DI, up_OC), n = adapter.factors(self.path), adapter.allocation.counts[self.path]
        of_a, columns, first = slice(len(down_DI) - n), slice(up_OC.size(1)), self.experts.num_columns
        if adapter.hydra:
            self.buffers.place_repeated(self.down_PDI, (p, columns), down_DI, of_a, times=n)
        else:
            self.buffers.place(self.down_PDI, (p, columns), down_DI, of_a)
        self.buffers.place(self.down_PDI, (p, slice(first, first + n)), down_DI, slice(of_a.stop, None))
        self.buffers.place(self.up_POC, (p, slice(None), columns), up_OC)

    def put(self) -> Callable[[], None]:
        """Hooks the experts in; what it returns takes them out."""
        return put_attribute(self.module, "forward", self.forward)

    def forward(self, x: Tensor) -> Tensor:
        """Stands in for the layer's forward, and hands router logits to members with a balance loss."""
        self.seen = True
        keep = self.passes.kept(self.members, x.size(-1))
        weight, bias = self.module.weight, self.module.bias
        y: Tensor
        y, logits_PTN = _PackedLoraMoeLinear.apply(x, weight, bias, self.down_PDI, self.up_POC, keep, self)
        for p, adapter in self.balanced:
            adapter.collect(self.path, logits_PTN[p, :, : adapter.allocation.counts[self.path]])
        return y


class _PackedLoraMoeLinear(torch.autograd.Function):
    """Base layer and experts of all members together: returns the layer's output and the router logits [P, T, N].

    `lora_moe._LoraMoeLinear` with batched GEMMs, whose gradients are added to where they belong.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down_PDI: Tensor,
        up_POC: Tensor,
        keep: Tensor | None,
        part: PackedLoraMoe,
    ) -> tuple[Tensor, Tensor | None]:
        experts = part.experts
        y, x_PTI = F.linear(x, weight, bias), part.rows.pick(x)
        down, up = down_PDI.to(x.dtype), up_POC.to(x.dtype)
        z_PTD = into_rank_space(x_PTI, down, keep, num_experts=experts.num_experts)
        h_PTC, gates_PTN = mix(z_PTD, experts)
        part.rows.add_product_(y, h_PTC, up.mT)
        ctx.save_for_backward(x, weight, keep, z_PTD, gates_PTN)
        ctx.part = part
        ctx.set_materialize_grads(False)
        logits_PTN = z_PTD[..., experts.num_columns :]
        return y, logits_PTN.to(gates_PTN.dtype, copy=True) if part.balanced else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dlogits_PTN: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, keep, z_PTD, gates_PTN = ctx.saved_tensors
        part: PackedLoraMoe = ctx.part
        buffers, rows, c = part.buffers, part.rows, part.experts.num_columns
        down, up = part.down_PDI.to(x.dtype), part.up_POC.to(x.dtype)
        if dy is None:  # only a balance loss reached this module
            dy = x.new_zeros(*x.shape[:-1], up.size(1))
        x_PTI, dy_PTO = rows.pick(x), rows.pick(dy)

        dh_PTC = torch.bmm(dy_PTO, up)
        h_PTC, dz_PTD = mix_backward(dh_PTC, z_PTD, gates_PTN, part.experts, dlogits_TN=dlogits_PTN)
        buffers.add_gradient(part.up_POC, dy_PTO.mT, h_PTC)

        da, dl = dz_PTD[..., :c], dz_PTD[..., c:]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight
            if keep is None:
                rows.add_product_(dx, dz_PTD, down)
            else:
                rows.add_product_(dx, dl, down[:, c:])
                rows.add_(dx, torch.bmm(da, down[:, :c]).mul_(keep))
        if keep is None:
            buffers.add_gradient(part.down_PDI, dz_PTD.mT, x_PTI)
        else:
            buffers.add_gradient(part.down_PDI, da.mT, x_PTI * keep, rows=slice(c))
            buffers.add_gradient(part.down_PDI, dl.mT, x_PTI, rows=slice(c, None))
        return dx, None, None, None, None, None, None
