"""LoRA experts added to the linear layers of a dense model: MoLA's routed experts and HydraLoRA, as one GEMM each way.

    adapter = attach(model, ExpertCounts({"model.layers.0.self_attn.q_proj": 4, ...}), shape=shape, rank=8, ...)
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
        The functions below take any leading dimensions where T stands, so that several trials can share a call.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allocators.core.errors import StudyError, TrialError
from allocators.core.types import ExpertCounts, ModelShape, ModuleShape
from trainers.adapter import Adapter, add_to_weight, check_size, is_quantized, module_at, uniform, weight_size

Balance = Literal["layer", "module"]


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic: functions of tensors


def route(logits_TN: Tensor, *, top_k: int) -> Tensor:
    """Gates [T, N]: softmax, the top_k largest renormalised to sum 1, exact zeros elsewhere; in fp32 or better.

    Computed as the softmax over the top_k logits, which is the same number: the common denominator cancels.
    """
    precise = torch.promote_types(logits_TN.dtype, torch.float32)
    if top_k >= logits_TN.shape[-1]:
        return logits_TN.softmax(-1, dtype=precise)
    chosen_TK, ids_TK = logits_TN.topk(top_k, dim=-1)
    zeros_TN = logits_TN.new_zeros(logits_TN.shape, dtype=precise)
    return zeros_TN.scatter_(-1, ids_TK, chosen_TK.softmax(-1, dtype=precise))


def mix(z_TD: Tensor, *, num_experts: int, rank: int, top_k: int) -> tuple[Tensor, Tensor]:
    """From the input GEMM's result to what the output GEMM takes: (gated rank space [T, C], gates [T, N])."""
    a_TNR, logits_TN = _split(z_TD, num_experts, rank)
    gates_TN = route(logits_TN, top_k=top_k)
    h_TC = (a_TNR * gates_TN.unsqueeze(-1)).flatten(-2)
    return h_TC.to(z_TD.dtype), gates_TN


def mix_backward(
    dh_TC: Tensor, z_TD: Tensor, gates_TN: Tensor, *, rank: int, dlogits_TN: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradient of `mix`: (h_TC computed again, dz_TD).

    The gates of experts not chosen are zero, and the softmax's gradient g·(dg − Σ g·dg) is zero with them: neither the
    ids of the chosen nor the logits need to be kept. dlogits_TN is what the balance loss adds.
    """
    a_TNR, _ = _split(z_TD, gates_TN.shape[-1], rank)
    g_TN1 = gates_TN.unsqueeze(-1)
    dh_TNR = dh_TC.unflatten(-1, (-1, rank))
    dz_TD = torch.empty_like(z_TD)
    da_TNR, dl_TN = _split(dz_TD, gates_TN.shape[-1], rank)

    da_TNR.copy_((dh_TNR * g_TN1).sum_to_size(a_TNR.shape))  # hydra: every B hangs on the one A
    dg_TN = (dh_TNR * a_TNR).sum(-1, dtype=gates_TN.dtype)
    dsoftmax_TN = torch._softmax_backward_data(dg_TN, gates_TN, -1, gates_TN.dtype)
    dl_TN.copy_(dsoftmax_TN if dlogits_TN is None else dsoftmax_TN.add_(dlogits_TN))
    return (a_TNR * g_TN1).flatten(-2).to(z_TD.dtype), dz_TD


def _split(z_TD: Tensor, num_experts: int, rank: int) -> tuple[Tensor, Tensor]:
    """Views: rank space [T, N, R] (hydra: [T, 1, R]) and router logits [T, N]."""
    return z_TD[..., :-num_experts].unflatten(-1, (-1, rank)), z_TD[..., -num_experts:]


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
    def forward(ctx, x, base, weight, bias, down_DI, up_OC, keep, rank, top_k, scale, want_logits):
        num_experts = up_OC.shape[1] // rank
        x_TI, y = x.flatten(0, -2), F.linear(x, weight, bias) if base is None else base.clone()
        down, up = down_DI.to(x.dtype), up_OC.to(x.dtype)
        if keep is None:
            z_TD = x_TI @ down.t()
        else:  # the router sees the input before dropout: two GEMMs
            z_TD = x_TI.new_empty(x_TI.shape[0], down.shape[0])
            torch.mm(x_TI * keep, down[:-num_experts].t(), out=z_TD[:, :-num_experts])
            torch.mm(x_TI, down[-num_experts:].t(), out=z_TD[:, -num_experts:])
        h_TC, gates_TN = mix(z_TD, num_experts=num_experts, rank=rank, top_k=top_k)
        y.flatten(0, -2).addmm_(h_TC, up.t(), alpha=scale)
        ctx.save_for_backward(x, weight, down_DI, up_OC, keep, z_TD, gates_TN)
        ctx.rank, ctx.scale = rank, scale
        ctx.set_materialize_grads(False)
        # A copy: a view would keep all of z alive where checkpointing wants it gone.
        return y, z_TD[:, -num_experts:].to(gates_TN.dtype, copy=True) if want_logits else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dlogits_TN):
        x, weight, down_DI, up_OC, keep, z_TD, gates_TN = ctx.saved_tensors
        if dy is None:  # only the balance loss reached this module
            dy = x.new_zeros(*x.shape[:-1], up_OC.shape[0])
        num_experts = gates_TN.shape[-1]
        x_TI, dy_TO = x.flatten(0, -2), dy.flatten(0, -2)
        down, up = down_DI.to(x.dtype), up_OC.to(x.dtype)

        dh_TC = _scaled_mm(dy_TO, up, ctx.scale)
        h_TC, dz_TD = mix_backward(dh_TC, z_TD, gates_TN, rank=ctx.rank, dlogits_TN=dlogits_TN)
        dup_OC = _scaled_mm(dy_TO.t(), h_TC, ctx.scale)

        dx = dx_TI = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight if weight is not None else torch.zeros_like(x)
            dx_TI = dx.flatten(0, -2)
        if keep is None:
            ddown_DI = dz_TD.t() @ x_TI
            if dx_TI is not None:
                dx_TI.addmm_(dz_TD, down)
        else:
            da, dl = dz_TD[:, :-num_experts], dz_TD[:, -num_experts:]
            ddown_DI = torch.cat([da.t() @ (x_TI * keep), dl.t() @ x_TI])
            if dx_TI is not None:
                dx_TI.addmm_(dl, down[-num_experts:]).addcmul_(da @ down[:-num_experts], keep)
        dbase = dy if ctx.needs_input_grad[1] else None
        factors = ddown_DI.to(down_DI.dtype), dup_OC.to(up_OC.dtype)
        return dx, dbase, None, None, *factors, None, None, None, None, None


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
        keep = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - dropout).flatten(0, -2)
        scale = scale / (1 - dropout)  # linear in A's input: dividing there or here is the same
    return _LoraMoeLinear.apply(x, base, weight_OI, bias_O, down_DI, up_OC, keep, rank, top_k, scale, want_logits)


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


def attach(
    model: nn.Module,
    allocation: ExpertCounts,
    *,
    shape: ModelShape,
    rank: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    top_k: int = 2,
    balance_coef: float = 0.0,
    seed: int = 0,
    balance: Balance = "layer",
) -> LoraMoeAdapter:
    """Freezes `model` and adds LoRA experts to its linear layers, as `allocation` says.

    top_k         experts per token, routed experts only (hydra weighs all)
    balance_coef  0 turns the balance loss off; hydra has none, because nothing is picked there
    balance       `layer`: pool the logits of a layer's modules that have equally many experts (MoLA);
                  `module`: every module for itself. A training choice, not saved with the adapter

    Raises InfeasibleError where the allocation does not fit `shape`, StudyError where `shape` does not fit `model`, a
    module is no plain nn.Linear, or the model carries an adapter already.
    """
    return LoraMoeAdapter(
        model,
        allocation,
        shape=shape,
        rank=rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        top_k=top_k,
        balance_coef=balance_coef,
        seed=seed,
        balance=balance,
    )


class LoraMoeAdapter(Adapter):
    """Trainable tensors per module: `<path>.down` [D, I] (A and router) and `<path>.up` [O, C] (B)."""

    allocation: ExpertCounts

    def __init__(
        self,
        model: nn.Module,
        allocation: ExpertCounts,
        *,
        shape: ModelShape,
        rank: int,
        lora_alpha: float,
        lora_dropout: float,
        top_k: int,
        balance_coef: float,
        seed: int,
        balance: Balance,
    ) -> None:
        specs = [m for m in shape.modules if m.path in allocation.counts]
        for spec in specs:
            _check_linear(module_at(model, spec.path, name=shape.name), spec, shape.name)
        super().__init__(
            model,
            allocation,
            shape=shape,
            rank=rank,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            top_k=top_k,
            balance_coef=balance_coef,
            seed=seed,
        )
        self.top_k, self.balance_coef, self.balance = top_k, balance_coef, balance
        self._specs = {spec.path: spec for spec in specs}
        self._balanced = balance_coef != 0 and allocation.gating == "routed"
        self._logits: dict[str, Tensor] = {}  # [T, N] per module, of the last forward pass
        self._mask: Tensor | None = None  # [B, S] of the last forward pass
        self._collecting = False
        with self.detached_on_error():
            for spec in specs:
                self._insert(spec, seed=seed)
        if self._balanced:
            # On the body, not the head: a loop may call the body alone to spare logits of prompt tokens.
            body = getattr(model, "base_model", model)
            self._put(lambda: body.register_forward_pre_hook(self._begin_forward, with_kwargs=True).remove)

    def _insert(self, spec: ModuleShape, *, seed: int) -> None:
        path, num_experts, rank = spec.path, self.allocation.counts[spec.path], self.rank
        module = module_at(self.model, path, name=self.shape.name)
        assert isinstance(module, nn.Linear)
        hydra = self.allocation.gating == "hydra"
        # Row R of each block is the expert's row of the router; in hydra the one A is named for itself.
        rows = [uniform(rank + 1, spec.in_features, seed=seed, name=f"{path}.{j}") for j in range(num_experts)]
        a = [uniform(rank, spec.in_features, seed=seed, name=path)] if hydra else [r[:rank] for r in rows]
        start = torch.cat([*a, *(r[rank:] for r in rows)])
        down_DI = self._add(f"{path}.down", start, device=module.weight.device)
        up_OC = self._add(f"{path}.up", torch.zeros(spec.out_features, num_experts * rank), device=module.weight.device)
        top_k = num_experts if hydra else min(self.top_k, num_experts)
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
                scale=self.scale,
                dropout=self.lora_dropout if module.training else 0.0,
                want_logits=self._balanced and torch.is_grad_enabled(),
            )
            if self._collecting and logits_TN is not None:
                self.collect(path, logits_TN)
            return y

        self._put_attribute(module, "forward", forward)

    def _begin_forward(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._logits.clear()
        self._mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        self._collecting = True

    @property
    def balanced(self) -> bool:
        """Whether there is a balance loss."""
        return self._balanced

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
        if not self._balanced or not torch.is_grad_enabled():
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
                torch.stack(stack).detach() if self.top_k >= num_experts else torch.stack(stack),
                top_k=min(self.top_k, num_experts),
                real_T=None if real_T is None else real_T.repeat(num_modules),
            ).sum()
            for (num_experts, num_modules), stack in stacks.items()
        ]
        self._logits.clear()
        return self.balance_coef * torch.stack(terms).sum()

    def merge(self) -> None:
        """W += lora_alpha/r · B·A where every module has one expert, whose gate is always 1.

        Raises TrialError where a module has more: the gates depend on the token, no weight equals them.
        """
        several = [path for path, n in self.allocation.counts.items() if n > 1]
        if several:
            raise TrialError(
                f"{several[0]} and {len(several) - 1} more modules have several experts: their mix changes with every "
                "token, so no merged weight equals it; use the adapter attached, or train with one expert a module"
            )
        super().merge()

    def _merge(self) -> None:
        for path in self._specs:
            module = module_at(self.model, path, name=self.shape.name)
            a_RI, b_OR = self._tensors[f"{path}.down"][: self.rank], self._tensors[f"{path}.up"]
            assert isinstance(module, nn.Linear)
            add_to_weight(module.weight, self.scale * (b_OR @ a_RI))


def _check_linear(module: nn.Module, spec: ModuleShape, name: str) -> None:
    if type(module) is not nn.Linear and not is_quantized(module):
        raise StudyError(f"{spec.path} is a {type(module).__name__}; experts can be added to a plain nn.Linear only")
    check_size(weight_size(module), (spec.out_features, spec.in_features), path=spec.path, name=name)
