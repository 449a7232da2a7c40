"""LoRA experts added to the linear layers of a dense model: MoLA's routed experts and HydraLoRA, as one GEMM each way.

    adapter = attach(model, ExpertCounts({"model.layers.0.self_attn.q_proj": 4, ...}), shape=shape, lora=lora)
    loss = model(**batch).loss
    if (extra := adapter.extra_loss()) is not None:       # balance loss of the routers
        loss = loss + extra

Use it through `trainers.adapter`, which also saves and loads. A module with N experts (MoLA, arXiv:2402.08562;
HydraLoRA, arXiv:2404.19245) computes:

    routed   y = W x + lora_alpha/r · Σ_j w_j B_j A_j drop(x),  w = softmax(router x), the top_k largest, summing to 1
    hydra    y = W x + lora_alpha/r · Σ_j w_j B_j A drop(x),    w = softmax(router x), all of them

All A_j and the router lie in one matrix, all B_j in another. A token's N·r numbers in rank space are multiplied by its
gates (zero for experts not chosen) and one `addmm_` puts the sum of all experts into the base layer's output. Nothing
of size [T, O] is made besides that output, no loop runs over experts, nothing waits for the device.

N differs between modules. N = 0: the module is left alone. N = 1: the gate is exactly 1, so this is plain LoRA; the
papers count a router there too, and it exists here, with a gradient that is exactly zero. top_k above N means N.

Shapes: T tokens, I input features, O output features, N experts, R rank, C = N·R, K top_k, M modules pooled,
        D = C + N columns of the routed input matrix, R + N of the hydra one: A first, the router last.
        The functions take any leading dimensions where T stands: the members of a packed run share their calls
        (trainers/packing/lora_moe.py), and one training alone is the special case without masks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allocators.core.errors import StudyError, TrialError
from allocators.core.types import ExpertCounts, ModuleShape
from trainers.adapter.base import Adapter
from trainers.adapter.linear import (
    add_product_,
    add_to_weight,
    check_size,
    kept_inputs,
    module_at,
    scale_of_kept,
    uniform,
    weight_size,
)
from trainers.models.quantized import is_quantized

Balance = Literal["layer", "module"]


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic: functions of tensors


def route(logits_TN: Tensor, *, top_k: int, absent_N: Tensor | None = None, dropped_K: Tensor | None = None) -> Tensor:
    """Gates [T, N]: softmax, the top_k largest renormalised to sum 1, exact zeros elsewhere; in fp32 or better.

    Computed as the softmax over the top_k logits, which is the same number: the common denominator cancels.

    absent_N    −inf for experts that a member of a packed run lacks: their gates are exactly zero; None: none lacks one
    dropped_K   −inf for picks that a member does not take, of the top_k that the others do; None: each takes them all
    """
    precise = torch.promote_types(logits_TN.dtype, torch.float32)
    if absent_N is not None:
        logits_TN = logits_TN + absent_N.to(logits_TN.dtype)
    if top_k >= logits_TN.shape[-1] and dropped_K is None:
        return logits_TN.softmax(-1, dtype=precise)
    chosen_TK, ids_TK = logits_TN.topk(top_k, dim=-1)
    if dropped_K is not None:
        chosen_TK = chosen_TK + dropped_K.to(chosen_TK.dtype)
    zeros_TN = logits_TN.new_zeros(logits_TN.shape, dtype=precise)
    return zeros_TN.scatter_(-1, ids_TK, chosen_TK.softmax(-1, dtype=precise))


class Experts(ABC):
    """The experts of one module as `mix` sees them: how tokens are routed, and which columns of rank space are whose.

    absent_N, dropped_K   as in `route`
    """

    num_experts: int
    top_k: int
    absent_N: Tensor | None = None
    dropped_K: Tensor | None = None

    @abstractmethod
    def columns(self, part_TC: Tensor) -> Tensor:
        """Rank space in a form that `spread` can be multiplied with."""

    @abstractmethod
    def spread(self, gates_TN: Tensor) -> Tensor:
        """The gate of every column's expert."""

    @abstractmethod
    def sums(self, product: Tensor, dtype: torch.dtype) -> Tensor:
        """The transpose of `spread`: sums over every expert's columns, [T, N]."""

    @abstractmethod
    def flat(self, product: Tensor) -> Tensor:
        """The transpose of `columns`, [T, C]."""

    def logit_gradient(self, dgates_TN: Tensor, gates_TN: Tensor) -> Tensor:
        """Gradient of the softmax, g·(dg − Σ g·dg)."""
        return torch._softmax_backward_data(dgates_TN, gates_TN, -1, gates_TN.dtype)


@dataclass(frozen=True, slots=True)
class Blocks(Experts):
    """One training's: every expert has `rank` columns, side by side. In hydra z has one block for all of them."""

    num_experts: int
    rank: int
    top_k: int

    def columns(self, part_TC: Tensor) -> Tensor:
        """A view [T, N, R]; in hydra [T, 1, R]."""
        part_TNR: Tensor = part_TC.unflatten(-1, (-1, self.rank))
        return part_TNR

    def spread(self, gates_TN: Tensor) -> Tensor:
        """A view [T, N, 1]."""
        return gates_TN.unsqueeze(-1)

    def sums(self, product: Tensor, dtype: torch.dtype) -> Tensor:
        """Sums over the last axis, accumulated in `dtype`."""
        return product.sum(-1, dtype=dtype)

    def flat(self, product: Tensor) -> Tensor:
        """A view [T, C]."""
        return product.flatten(-2)


def into_rank_space(x_TI: Tensor, down_DI: Tensor, keep_TI: Tensor | None, *, num_experts: int) -> Tensor:
    """z [T, D]: x times A, without the inputs that are dropped, and x times the router, which sees all of them."""
    if keep_TI is None:
        return x_TI @ down_DI.mT
    z_TD = x_TI.new_empty(*x_TI.shape[:-1], down_DI.shape[-2])
    torch.matmul(x_TI * keep_TI, down_DI[..., :-num_experts, :].mT, out=z_TD[..., :-num_experts])
    torch.matmul(x_TI, down_DI[..., -num_experts:, :].mT, out=z_TD[..., -num_experts:])
    return z_TD


def mix(z_TD: Tensor, experts: Experts) -> tuple[Tensor, Tensor]:
    """From the input GEMM's result to what the output GEMM takes: (gated rank space [T, C], gates [T, N])."""
    a_T, logits_TN = _split(z_TD, experts)
    gates_TN = route(logits_TN, top_k=experts.top_k, absent_N=experts.absent_N, dropped_K=experts.dropped_K)
    return experts.flat(a_T * experts.spread(gates_TN)).to(z_TD.dtype), gates_TN


def mix_backward(
    dh_TC: Tensor, z_TD: Tensor, gates_TN: Tensor, experts: Experts, *, dlogits_TN: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradient of `mix`: (h_TC computed again, dz_TD).

    The gates of experts not chosen are zero, and the softmax's gradient g·(dg − Σ g·dg) is zero with them: neither the
    ids of the chosen nor the logits need to be kept. dlogits_TN is what the balance loss adds.
    """
    a_T, _ = _split(z_TD, experts)
    g_T, dh_T = experts.spread(gates_TN), experts.columns(dh_TC)
    dz_TD = torch.empty_like(z_TD)
    da_T, dl_TN = _split(dz_TD, experts)

    if a_T.shape == dh_T.shape:
        torch.mul(dh_T, g_T, out=da_T)
    else:  # hydra: every B hangs on the one A
        da_T.copy_((dh_T * g_T).sum_to_size(a_T.shape))
    dg_TN = experts.sums(dh_T * a_T, gates_TN.dtype)
    dsoftmax_TN = experts.logit_gradient(dg_TN, gates_TN)
    dl_TN.copy_(dsoftmax_TN if dlogits_TN is None else dsoftmax_TN.add_(dlogits_TN))
    return experts.flat(a_T * g_T).to(z_TD.dtype), dz_TD


def _split(z_TD: Tensor, experts: Experts) -> tuple[Tensor, Tensor]:
    """Views: rank space (`Experts.columns`) and router logits [T, N]."""
    return experts.columns(z_TD[..., : -experts.num_experts]), z_TD[..., -experts.num_experts :]


def _scaled_mm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`scale · a b`; the factor rides in the GEMM (beta = 0: the first operand is never read)."""
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)


class _LoraMoeLinear(torch.autograd.Function):
    """Base layer and experts together, so that both directions accumulate into one buffer.

    base   what the layer itself made of x, where its weight cannot be multiplied here (quantised): its gradient is dy,
           and `weight` is None

    Against autograd on the same operations this keeps half the bytes (z and the gates, not h, ids and probabilities),
    launches about half the backward operations, adds no second [T, I] gradient to the base layer's, and with dropout
    keeps one byte an input element instead of the dropped copy.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        down_DI: Tensor,
        up_OC: Tensor,
        keep: Tensor | None,
        experts: Blocks,
        scale: float,
        want_logits: bool,
    ) -> tuple[Tensor, Tensor | None]:
        if base is None:
            assert weight is not None
            y = F.linear(x, weight, bias)
        else:
            y = base.clone()
        x_TI = x.flatten(0, -2)
        down, up = down_DI.to(x.dtype), up_OC.to(x.dtype)
        z_TD = into_rank_space(x_TI, down, keep, num_experts=experts.num_experts)
        h_TC, gates_TN = mix(z_TD, experts)
        add_product_(y.flatten(0, -2), h_TC, up.t(), scale=scale)
        ctx.save_for_backward(x, weight, down_DI, up_OC, keep, z_TD, gates_TN)
        ctx.experts, ctx.scale = experts, scale
        ctx.set_materialize_grads(False)
        # A copy: a view would keep all of z alive where checkpointing wants it gone.
        return y, z_TD[:, -experts.num_experts :].to(gates_TN.dtype, copy=True) if want_logits else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dlogits_TN: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, down_DI, up_OC, keep, z_TD, gates_TN = ctx.saved_tensors
        if dy is None:  # only the balance loss reached this module
            dy = x.new_zeros(*x.shape[:-1], up_OC.shape[0])
        num_experts = gates_TN.shape[-1]
        x_TI, dy_TO = x.flatten(0, -2), dy.flatten(0, -2)
        down, up = down_DI.to(x.dtype), up_OC.to(x.dtype)

        dh_TC = _scaled_mm(dy_TO, up, ctx.scale)
        h_TC, dz_TD = mix_backward(dh_TC, z_TD, gates_TN, ctx.experts, dlogits_TN=dlogits_TN)
        dup_OC = _scaled_mm(dy_TO.t(), h_TC, ctx.scale)

        dx = dx_TI = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight if weight is not None else torch.zeros_like(x)
            dx_TI = dx.flatten(0, -2)
        if keep is None:
            ddown_DI = dz_TD.t() @ x_TI
            if dx_TI is not None:
                add_product_(dx_TI, dz_TD, down)
        else:
            da, dl = dz_TD[:, :-num_experts], dz_TD[:, -num_experts:]
            ddown_DI = torch.cat([da.t() @ (x_TI * keep), dl.t() @ x_TI])
            if dx_TI is not None:
                add_product_(dx_TI, dl, down[-num_experts:]).addcmul_(da @ down[:-num_experts], keep)
        dbase = dy if ctx.needs_input_grad[1] else None
        factors = ddown_DI.to(down_DI.dtype), dup_OC.to(up_OC.dtype)
        return dx, dbase, None, None, *factors, None, None, None, None


def lora_moe_linear(
    x: Tensor,
    weight_OI: Tensor | None,
    bias_O: Tensor | None,
    down_DI: Tensor,
    up_OC: Tensor,
    *,
    base: Tensor | None = None,
    rank: int,
    top_k: int,
    scale: float,
    dropout: float = 0.0,
    want_logits: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """A frozen linear layer with experts: (y [..., O], router logits [T, N] or None). No gradient for weight and bias.

    routed   down_DI [N·R + N, I]     hydra   down_DI [R + N, I] and top_k = N        both   up_OC [O, N·R]

    base     the output of a layer whose weight is packed, [..., O], instead of weight and bias
    dropout  share of the inputs of A set to zero, the rest divided by 1 − dropout; drawn from the global random state,
             which gradient checkpointing restores
    """
    keep = None
    if dropout:
        keep = kept_inputs(*x.shape, dropout=dropout, device=x.device).flatten(0, -2)
        scale = scale_of_kept(scale, dropout)
    experts = Blocks(up_OC.shape[1] // rank, rank, top_k)
    answer: tuple[Tensor, Tensor | None] = _LoraMoeLinear.apply(
        x, base, weight_OI, bias_O, down_DI, up_OC, keep, experts, scale, want_logits
    )
    return answer


def balance_loss(logits_TN: Tensor, *, top_k: int, real_T: Tensor | None = None) -> Tensor:
    """`N · Σ_e f_e P_e` over the tokens, 1 where experts share them equally; one value per leading index.

    f_e is the share of picks that went to expert e and sums to 1 (MoLA; Hugging Face's Mixtral lets it sum to top_k,
    which is top_k times this). P_e is the mean softmax probability. real_T [T] is false at padding.
    Only P has a gradient. With top_k ≥ N every expert is always picked: the value is 1 and its gradient zero.
    """
    num_experts = logits_TN.shape[-1]
    top_k = min(top_k, num_experts)
    p_TN = logits_TN.softmax(-1, dtype=torch.promote_types(logits_TN.dtype, torch.float32))
    ids_TK = logits_TN.topk(top_k, dim=-1).indices
    picks_TN = torch.zeros_like(p_TN).scatter_(-1, ids_TK, 1 / top_k)
    if real_T is None:
        f_N, p_N = picks_TN.mean(-2), p_TN.mean(-2)
    else:
        weight_T = real_T.to(p_TN.dtype) / real_T.sum()
        f_N, p_N = weight_T @ picks_TN, weight_T @ p_TN
    return num_experts * (f_N * p_N).sum(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Adapter


class LoraMoeAdapter(Adapter):
    """Trainable tensors per module: `<path>.down` [D, I] (A and router) and `<path>.up` [O, C] (B).

    lora.top_k          experts per token, routed experts only (hydra weighs all)
    lora.balance_coef   0 turns the balance loss off; hydra has none, because nothing is picked there
    balance             `layer`: pool the logits of a layer's modules that have equally many experts (MoLA);
                        `module`: every module for itself. A training choice, not saved with the adapter

    Raises StudyError where a module is no plain nn.Linear.
    """

    allocation: ExpertCounts
    balance: Balance = "layer"

    def _insert(self) -> None:
        self._specs = {m.path: m for m in self.shape.modules if m.path in self.allocation.counts}
        self._logits: dict[str, Tensor] = {}  # [T, N] per module, of the last forward pass
        self._mask: Tensor | None = None  # [B, S] of the last forward pass
        self._collecting = False
        for spec in self._specs.values():
            self._add_experts(spec)
        if self.balanced:
            # On the body, not the head: a loop may call the body alone to spare logits of prompt tokens.
            body = getattr(self.model, "base_model", self.model)
            self._put(lambda: body.register_forward_pre_hook(self._begin_forward, with_kwargs=True).remove)

    @property
    def settings(self) -> dict[str, Any]:
        """Those of every adapter, and the seed that drew the fresh tensors."""
        return {**super().settings, "seed": self.seed}

    @property
    def balanced(self) -> bool:
        """Whether there is a balance loss."""
        return self.lora.balance_coef != 0 and not self.hydra

    @property
    def hydra(self) -> bool:
        """Whether a module has one A for all its experts, which are all weighed."""
        return self.allocation.gating == "hydra"

    def picks(self, path: str) -> int:
        """How many experts of a module a token goes to."""
        num_experts = self.allocation.counts[path]
        return num_experts if self.hydra else min(self.lora.top_k, num_experts)

    def factors(self, path: str) -> tuple[nn.Parameter, nn.Parameter]:
        """The input matrix (A and router, [D, I]) and the output matrix (B, [O, C]) of a module."""
        return self._tensors[f"{path}.down"], self._tensors[f"{path}.up"]

    def _add_experts(self, spec: ModuleShape) -> None:
        path, num_experts, rank = spec.path, self.allocation.counts[spec.path], self.lora.rank
        module = module_at(self.model, path, name=self.shape.name)
        _check_linear(module, spec, self.shape.name)
        # Row R of each block is the expert's row of the router; in hydra the one A is named for itself.
        rows = [uniform(rank + 1, spec.in_features, seed=self.seed, name=f"{path}.{j}") for j in range(num_experts)]
        a = [r[:rank] for r in rows]
        if self.hydra:
            a = [uniform(rank, spec.in_features, seed=self.seed, name=path)]
        start = torch.cat([*a, *(r[rank:] for r in rows)])
        down_DI = self._add(f"{path}.down", start, device=module.weight.device)
        up_OC = self._add(f"{path}.up", torch.zeros(spec.out_features, num_experts * rank), device=module.weight.device)
        top_k = self.picks(path)
        packed = is_quantized(module)

        def forward(x: Tensor) -> Tensor:
            y, logits_TN = lora_moe_linear(
                x,
                None if packed else module.weight,
                None if packed else module.bias,
                down_DI,
                up_OC,
                base=type(module).forward(module, x) if packed else None,
                rank=rank,
                top_k=top_k,
                scale=self.lora.scale,
                dropout=self.lora.lora_dropout if module.training else 0.0,
                want_logits=self.balanced and torch.is_grad_enabled(),
            )
            if self._collecting and logits_TN is not None:
                self.collect(path, logits_TN)
            return y

        self._put_attribute(module, "forward", forward)

    def _begin_forward(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._logits.clear()
        self._mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        self._collecting = True

    def collect(self, path: str, logits_TN: Tensor) -> None:
        """Router logits of one module, for `extra_loss`."""
        self._logits[path] = logits_TN

    def extra_loss(self, real_BS: Tensor | None = None) -> Tensor | None:
        """`balance_coef` × the balance losses of the last forward pass, summed over layers; padding left out.

        real_BS   nonzero where there is a token and not padding; None: as the attention mask of the last pass says

        Call it once between forward and backward. Modules of one layer with different N cannot share a mean: they are
        pooled by N, each pool one term. None with balance_coef = 0, for hydra, and where gradients are off.

        Raises TrialError where no module saw a token with gradients on: under reentrant checkpointing the loss would
        be missing silently.
        """
        if not self.balanced or not torch.is_grad_enabled():
            return None
        self._collecting = False  # checkpointing runs the modules again in the backward pass: not to be counted twice
        if len(self._logits) < len(self._specs):
            raise TrialError(
                f"the balance loss needs the routers of {len(self._specs)} modules, the last forward pass "
                f"with gradients ran {len(self._logits)}: call the model first, and checkpoint with use_reentrant=False"
            )
        pools: dict[tuple[str | int, int], list[Tensor]] = defaultdict(list)
        for path, logits_TN in self._logits.items():
            key = self._specs[path].layer if self.balance == "layer" else path
            pools[key, logits_TN.shape[-1]].append(logits_TN)
        # Pools of one size go through one call: a handful of operations whatever the number of layers.
        stacks: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for (_, num_experts), members in pools.items():
            stacks[num_experts, len(members)].append(torch.cat(members))
        mask_BS = self._mask if real_BS is None else real_BS
        real_T = None if mask_BS is None else mask_BS.flatten().bool()
        # Where every expert is picked the gradient is zero but for rounding, which AdamW would turn into whole updates.
        terms = [
            balance_loss(
                torch.stack(stack).detach() if self.lora.top_k >= num_experts else torch.stack(stack),
                top_k=min(self.lora.top_k, num_experts),
                real_T=None if real_T is None else real_T.repeat(num_modules),
            ).sum()
            for (num_experts, num_modules), stack in stacks.items()
        ]
        self._logits.clear()
        return self.lora.balance_coef * torch.stack(terms).sum()

    def merge(self) -> None:
        """W += lora_alpha/r · B·A where every module has one expert, whose gate is always 1.

        Raises TrialError where a module has more: the gates depend on the token, no weight equals them.
        """
        if several := self.allocation.several:
            raise TrialError(
                f"{several[0]} and {len(several) - 1} more modules have several experts: their mix changes with every "
                "token, so no merged weight equals it; use the adapter attached, or train with one expert a module"
            )
        super().merge()

    def _merge(self) -> None:
        for path in self._specs:
            module = module_at(self.model, path, name=self.shape.name)
            down_DI, up_OR = self.factors(path)
            assert isinstance(module, nn.Linear)
            add_to_weight(module.weight, self.lora.scale * (up_OR @ down_DI[: self.lora.rank]))


def _check_linear(module: nn.Module, spec: ModuleShape, name: str) -> None:
    if type(module) is not nn.Linear and not is_quantized(module):
        raise StudyError(f"{spec.path} is a {type(module).__name__}; experts can be added to a plain nn.Linear only")
    check_size(weight_size(module), (spec.out_features, spec.in_features), path=spec.path, name=name)
