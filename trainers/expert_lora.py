"""LoRA on chosen experts of an MoE model whose experts are stacked in 3-D tensors (transformers 5).

    adapter = trainers.adapter.attach(model, ExpertSelection({0: (3, 7)}), shape=shape, rank=8, lora_alpha=16)
    python -m tests.benchmarks.expert_lora          what it costs, against frozen experts and against PEFT

transformers lets a function stand in for the experts of every MoE class. Ours sorts the rows by expert once, as the
stock `grouped_mm` does, and adds the LoRA part with two small grouped GEMMs over the rows of chosen experts:

    y_e = W_e x + (lora_alpha/r) · B_e A_e drop(x)        for chosen experts e;  y_e = W_e x for the others

gate and up have an A each (the papers count LoRA per projection). Attention, router and shared experts carry plain LoRA
whatever is chosen (`ALWAYS_ADAPTED`); shared_expert_gate and the MLPs of dense layers stay as they are.

Shapes: T tokens, K experts per token, S = T·K rows sorted by expert, E experts, C chosen experts, Q rows of chosen
experts, I input features, O output features, R rank (from `factors` on: padded, all projections of a stack together).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from allocators.core.errors import StudyError, TrialError
from allocators.core.types import ALWAYS_ADAPTED, ExpertSelection, ModelShape, ModuleShape
from trainers.adapter import Adapter, add_to_weight, check_size, module_at, uniform

IMPLEMENTATION = "grouped_mm_lora"  # our name among transformers' ALL_EXPERTS_FUNCTIONS


def attach(
    model: nn.Module,
    selection: ExpertSelection,
    *,
    shape: ModelShape,
    rank: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    seed: int = 0,
) -> ExpertLoraAdapter:
    """LoRA on the chosen experts and on attention, router and shared experts; see `trainers.adapter.attach`."""
    adapter = ExpertLoraAdapter(
        model, selection, shape=shape, rank=rank, lora_alpha=lora_alpha, lora_dropout=lora_dropout
    )
    with adapter.detached_on_error():
        adapter.insert(selection, seed=seed)
    return adapter


class ExpertLoraAdapter(Adapter):
    """LoRA in place on an MoE model. Tensors: `<path>.lora_A` [R, I] and `.lora_B` [O, R], for experts [C, ·, ·].

    While attached, experts run on grouped_mm (transformers' default): a fresh adapter is bit for bit a base that does
    so too, and equal up to rounding where the base was set to another implementation.
    """

    def insert(self, selection: ExpertSelection, *, seed: int) -> None:
        for spec in self.shape.of_role(*ALWAYS_ADAPTED):
            module = module_at(self.model, spec.path, name=self.shape.name)
            check_size(module.weight, (spec.out_features, spec.in_features), path=spec.path, name=self.shape.name)
            self._add_linear_lora(module, spec, seed=seed)
        projections: dict[int, list[ModuleShape]] = defaultdict(list)
        for spec in self.shape.of_role("expert"):
            projections[spec.layer].append(spec)
        self.experts = {
            layer: self._add_expert_lora(projections[layer], ids, seed=seed) for layer, ids in selection.experts.items()
        }
        if self.experts:
            self._dispatch()

    def _add_expert_lora(self, specs: list[ModuleShape], ids: tuple[int, ...], *, seed: int) -> ExpertLora:
        path = specs[0].path.rpartition(".")[0]
        module = module_at(self.model, path, name=self.shape.name)
        by_name = {spec.name: spec for spec in specs}
        for stack, projections in weight_stacks(module, path=path).items():
            parts = [by_name[p] for p in projections]
            size = (sum(p.out_features for p in parts), parts[0].in_features)
            expected = (parts[0].num_experts, *(reversed(size) if module.is_transposed else size))
            check_size(getattr(module, stack), expected, path=f"{path}.{stack}", name=self.shape.name)
        device = module.down_proj.device
        pairs = {}
        for name, spec in by_name.items():
            values = [uniform(self.rank, spec.in_features, seed=seed, name=f"{spec.path}.{e}") for e in ids]
            a_CRI = self._add(f"{spec.path}.lora_A", torch.stack(values), device=device)
            # zero: training starts exactly at the base model
            b_COR = self._add(f"{spec.path}.lora_B", torch.zeros(len(ids), spec.out_features, self.rank), device=device)
            pairs[name] = (a_CRI, b_COR)
        lora = ExpertLora(module, ids, pairs, path=path, scale=self.scale, dropout=self.lora_dropout)
        vars(module)["lora"] = lora  # where experts_forward finds it; no submodule, so not in the state_dict
        self._on_detach(lambda: vars(module).pop("lora"))
        self._on_detach(lora.stop_watching)
        return lora

    def _dispatch(self) -> None:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
        before = self.model.get_experts_implementation()
        self._on_detach(lambda: self.model.set_experts_implementation(before))
        self.model.set_experts_implementation(IMPLEMENTATION)
        for lora in self.experts.values():
            if lora.module.config._experts_implementation != IMPLEMENTATION:  # set_… skips classes it does not know
                raise StudyError(
                    f"{type(self.model).__name__} cannot change how its experts run: no LoRA on {lora.path}"
                )

    def check_gradients(self) -> None:
        """Call after the first backward pass; stops counting tokens, so later calls see only missing gradients.

        Raises TrialError naming layer and expert where a chosen expert received tokens that count in the loss but its
        LoRA received no gradient. (The very first gradient of every A is zero, because B is; that of B is not.)
        """
        for layer, lora in self.experts.items():
            lost = lora.without_gradient()
            if lost:
                expert, tokens = lost[0]
                raise TrialError(
                    f"expert {expert} of layer {layer} received {tokens} tokens but its LoRA no gradient "
                    f"({len(lost)} such experts in the layer): is {IMPLEMENTATION!r} still the experts implementation?"
                )
            lora.stop_watching()
        super().check_gradients()

    def merge(self) -> None:
        """W_e += (lora_alpha/r)·B_e A_e for every chosen expert, likewise the plain LoRA; then it is a plain model."""
        self.detach()
        for spec in self.shape.of_role(*ALWAYS_ADAPTED):
            self._merge_linear_lora(module_at(self.model, spec.path, name=self.shape.name), spec)
        for lora in self.experts.values():
            lora.merge()


class ExpertLora:
    """LoRA of one layer's chosen experts: what `experts_forward` needs besides the experts module itself.

    pairs        projection name → (A [C, R, I], B [C, O, R])
    every_row    True: LoRA runs over all S rows and the experts that are not chosen have zero factors
                 False: rows of chosen experts are picked out, run, and added back
                 On a GPU the number of picked rows would have to be read back to the host in every layer, so there all
                 rows run; everywhere else the picked ones. Where every expert is chosen there is nothing to pick.
    """

    def __init__(
        self,
        module: Any,
        ids: tuple[int, ...],
        pairs: dict[str, tuple[nn.Parameter, nn.Parameter]],
        *,
        path: str,
        scale: float,
        dropout: float,
    ) -> None:
        self.module, self.path = module, path
        self.pairs, self.scale, self.dropout = pairs, scale, dropout
        device = module.down_proj.device
        self.ids = ids
        self.ids_C = torch.tensor(ids, device=device)
        self.is_chosen_E = torch.zeros(module.num_experts, dtype=torch.bool, device=device)
        self.is_chosen_E[self.ids_C] = True
        self.all_chosen = len(ids) == module.num_experts
        self.every_row = self.all_chosen or device.type != "cpu"
        self.stacks = weight_stacks(module, path=path)
        self._watch_gradients()

    def route(self, index_TK: Tensor) -> Route:
        """Sorts the rows by expert and finds those of chosen experts; no synchronisation where `every_row`."""
        ids_S, order_S = torch.sort(index_TK.reshape(-1))
        inverse_S = torch.empty_like(order_S)
        inverse_S[order_S] = torch.arange(order_S.size(0), device=order_S.device)
        experts_E = torch.arange(self.module.num_experts, device=ids_S.device)
        ends_E = torch.searchsorted(ids_S, experts_E, right=True, out_int32=True)
        token_S = order_S // index_TK.size(-1)
        if self.every_row:
            return Route(ids_S, order_S, inverse_S, token_S, ends_E, None, ends_E)
        rows_Q = self.is_chosen_E[ids_S].nonzero().squeeze(1)
        ends_C = torch.searchsorted(ids_S[rows_Q], self.ids_C, right=True, out_int32=True)
        return Route(ids_S, order_S, inverse_S, token_S, ends_E, rows_Q, ends_C)

    def factors(self, stack: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A [C, R, I] and B [C, O, R] of one weight stack, its projections' ranks side by side.

        gate and up: A is [A_gate; A_up], B is block-diagonal, its rows in the order of the stack's outputs. R is padded
        with zeros to 16 bytes, which grouped_mm asks for; the trainable tensors are not padded.
        """
        pairs = [self.pairs[projection] for projection in self.stacks[stack]]
        rank = pairs[0][0].size(1)
        used = rank * len(pairs)
        padded = used + -used % (16 // dtype.itemsize)
        a_CRI = torch.cat([a for a, _ in pairs], dim=1)
        if padded > used:
            a_CRI = F.pad(a_CRI, (0, 0, 0, padded - used))
        blocks = [F.pad(b, (i * rank, padded - (i + 1) * rank)) for i, (_, b) in enumerate(pairs)]
        b_COR = torch.cat(blocks, dim=1) if self.module.is_concatenated else torch.stack(blocks, dim=2).flatten(1, 2)
        if self.every_row and not self.all_chosen:
            a_CRI = a_CRI.new_zeros(self.module.num_experts, *a_CRI.shape[1:]).index_copy(0, self.ids_C, a_CRI)
            b_COR = b_COR.new_zeros(self.module.num_experts, *b_COR.shape[1:]).index_copy(0, self.ids_C, b_COR)
        return a_CRI.to(dtype), b_COR.to(dtype)

    def linear(self, x: Tensor, stack: str, route: Route, *, gather: bool) -> Tensor:
        """One weight stack of the experts with LoRA, [S, O]. With `gather`, x is [T, I], else [S, I] already."""
        module = self.module
        weight: Tensor = getattr(module, stack)
        weight_EIO = weight if module.is_transposed else weight.transpose(-2, -1)
        scale, keep = self.scale, None
        if self.dropout and module.training:
            num_rows = (route.token_S if route.rows_Q is None else route.rows_Q).size(0)
            keep = torch.rand(num_rows, x.size(-1), device=x.device) >= self.dropout
            scale /= 1 - self.dropout
        a_CRI, b_COR = self.factors(stack, weight.dtype)
        out_SO = _GroupedLora.apply(x, weight_EIO, a_CRI, b_COR, route, keep, scale, gather)
        if module.has_bias:
            out_SO.add_(getattr(module, f"{stack}_bias")[route.ids_S])
        return out_SO

    def merge(self) -> None:
        for stack, projections in self.stacks.items():
            for position, projection in enumerate(projections):
                a_CRI, b_COR = self.pairs[projection]
                for expert, a_RI, b_OR in zip(self.ids, a_CRI, b_COR, strict=True):
                    weight = getattr(self.module, stack)[expert]
                    weight_OI = weight.t() if self.module.is_transposed else weight
                    interleaved = weight_OI[position :: len(projections)]
                    part_OI = (
                        weight_OI.chunk(len(projections))[position] if self.module.is_concatenated else interleaved
                    )
                    add_to_weight(part_OI, self.scale * (b_OR @ a_RI))

    # --- did every chosen expert that could learn, learn? ---

    def _watch_gradients(self) -> None:
        """Counts for each expert the tokens whose output's gradient is not zero, outside of our own forward.

        Tokens alone would accuse experts of the last layer that saw only prompt or padding: those have no gradient.
        """
        self.live_E = torch.zeros(self.module.num_experts, dtype=torch.long, device=self.ids_C.device)

        def watch(_: nn.Module, args: tuple[Tensor, Tensor, Tensor], out_TI: Tensor) -> None:
            index_TK, weight_TK = args[1], args[2].detach()

            def count(grad_TI: Tensor) -> None:
                live_TK = grad_TI.ne(0).any(dim=-1, keepdim=True) & weight_TK.ne(0)
                self.live_E.index_add_(0, index_TK.flatten(), live_TK.flatten().long())

            if out_TI.requires_grad:
                out_TI.register_hook(count)

        self.stop_watching: Callable[[], None] = self.module.register_forward_hook(watch).remove

    def without_gradient(self) -> list[tuple[int, int]]:
        """(expert, tokens) for chosen experts that had tokens with a gradient, but whose own tensors have none."""
        reached_C = torch.zeros(len(self.ids), dtype=torch.bool, device=self.ids_C.device)
        for pair in self.pairs.values():
            for parameter in pair:
                if parameter.grad is not None:
                    reached_C |= parameter.grad.ne(0).flatten(1).any(dim=1)
        live_C = self.live_E[self.ids_C]
        lost = ((live_C > 0) & ~reached_C).nonzero().flatten().tolist()
        return [(self.ids[c], int(live_C[c])) for c in lost]


def weight_stacks(module: Any, *, path: str) -> dict[str, tuple[str, ...]]:
    """Parameter name → the projections whose outputs it holds, in their order.

    Raises StudyError where the module is not one of transformers' stacked experts, or one this file cannot run.
    """
    if not hasattr(module, "is_concatenated"):
        raise StudyError(
            f"{path} ({type(module).__name__}) does not use transformers' experts interface: no LoRA on it"
        )
    if module._is_expert_parallel or module.has_post_expert_norm:
        raise StudyError(f"{path}: LoRA on experts that are spread over devices or normed one by one is not supported")
    first = {"gate_up_proj": ("gate_proj", "up_proj")} if module.has_gate else {"up_proj": ("up_proj",)}
    return {**first, "down_proj": ("down_proj",)}


class Route(NamedTuple):
    """Where each row goes. `ends`: last row + 1 of each expert, int32, as grouped_mm takes it."""

    ids_S: Tensor
    order_S: Tensor  # sorted position → (token, pick) number
    inverse_S: Tensor
    token_S: Tensor
    ends_E: Tensor
    rows_Q: Tensor | None  # sorted positions of chosen experts' rows; None: all of them
    ends_C: Tensor


def experts_forward(module: Any, hidden_TI: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Stands in for the experts' forward; the base part computes what transformers' grouped_mm does, in its order."""
    lora: ExpertLora | None = vars(module).get("lora")
    if lora is None:  # a layer without chosen experts
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, hidden_TI, index_TK, weight_TK)
    first, last = lora.stacks
    route = lora.route(index_TK)
    rows_SO = lora.linear(hidden_TI.to(module.down_proj.dtype), first, route, gather=True)
    rows_SO = module._apply_gate(rows_SO) if module.has_gate else module.act_fn(rows_SO)
    rows_SI = lora.linear(rows_SO.to(module.down_proj.dtype), last, route, gather=False)
    weighted_SI = rows_SI * weight_TK.reshape(-1)[route.order_S].unsqueeze(-1)
    # gather and sum, not index_add_: that one is not deterministic on a GPU and sums bf16 in bf16
    out_TI = weighted_SI[route.inverse_S].view(*index_TK.shape, -1).sum(dim=1)
    return out_TI.to(hidden_TI.dtype)


class _GroupedLora(torch.autograd.Function):
    """y = W_e x + scale · B_e A_e (keep ∘ x), rows grouped by expert, LoRA on the route's chosen rows.

    Written out because autograd would keep a copy of x's rows for A's gradient: here [T, I] is kept and its K-fold rows
    are gathered again. Both gradients of x meet in one buffer. The frozen W has no gradient, so none is computed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_EIO: Tensor,
        a_CRI: Tensor,
        b_COR: Tensor,
        route: Route,
        keep: Tensor | None,
        scale: float,
        gather: bool,
    ) -> Tensor:
        x_SI = x[route.token_S] if gather else x
        out_SO = F.grouped_mm(x_SI, weight_EIO, offs=route.ends_E)
        x_QI = x_SI if route.rows_Q is None else x_SI[route.rows_Q]
        dropped_QI = x_QI if keep is None else x_QI * keep
        rank_QR = F.grouped_mm(dropped_QI, a_CRI.transpose(-2, -1), offs=route.ends_C).mul_(scale)
        _add_rows(out_SO, route.rows_Q, F.grouped_mm(rank_QR, b_COR.transpose(-2, -1), offs=route.ends_C))
        ctx.save_for_backward(x if gather else x_QI, weight_EIO, a_CRI, b_COR, rank_QR, keep, *route)
        ctx.scale, ctx.gather = scale, gather
        return out_SO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SO: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_EIO, a_CRI, b_COR, rank_QR, keep, *saved = ctx.saved_tensors
        route = Route(*saved)
        token_Q = route.token_S if route.rows_Q is None else route.token_S[route.rows_Q]
        x_QI = x[token_Q] if ctx.gather else x
        dropped_QI = x_QI if keep is None else x_QI * keep
        grad_QO = grad_SO if route.rows_Q is None else grad_SO[route.rows_Q]
        grad_rank_QR = F.grouped_mm(grad_QO, b_COR, offs=route.ends_C).mul_(ctx.scale)
        grad_b_COR = F.grouped_mm(grad_QO.t(), rank_QR, offs=route.ends_C)
        grad_a_CRI = F.grouped_mm(grad_rank_QR.t(), dropped_QI, offs=route.ends_C)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = F.grouped_mm(grad_SO, weight_EIO.transpose(-2, -1), offs=route.ends_E)
            grad_QI = F.grouped_mm(grad_rank_QR, a_CRI, offs=route.ends_C)
            _add_rows(grad_x, route.rows_Q, grad_QI if keep is None else grad_QI * keep)
            if ctx.gather:
                grad_x = grad_x[route.inverse_S].view(x.size(0), -1, x.size(1)).sum(dim=1)
        return grad_x, None, grad_a_CRI, grad_b_COR, None, None, None, None


def _add_rows(total: Tensor, rows: Tensor | None, part: Tensor) -> None:
    """`total[rows] += part` in place; rows occur once each, so the order of additions is not left to chance."""
    if rows is None:
        total.add_(part)
    else:
        total.index_add_(0, rows, part)
