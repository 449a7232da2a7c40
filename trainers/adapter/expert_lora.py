"""LoRA on chosen experts of an MoE model whose experts are stacked in 3-D tensors (transformers 5).

    lora = LoraSettings(rank=8, lora_alpha=16)
    adapter = trainers.adapter.attach(model, ExpertSelection({0: (3, 7)}), shape=shape, lora=lora)
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

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from allocators.core.errors import StudyError, TrialError
from allocators.core.types import ALWAYS_ADAPTED, ExpertSelection, ModuleShape
from trainers.adapter.base import Adapter
from trainers.adapter.linear import add_to_weight, check_size, module_at, scale_of_kept, uniform, weight_size
from trainers.models.sharding import local_rows

IMPLEMENTATION = "grouped_mm_lora"  # our name among transformers' ALL_EXPERTS_FUNCTIONS


class ExpertLoraAdapter(Adapter):
    """LoRA in place on an MoE model. Tensors: `<path>.lora_A` [R, I] and `.lora_B` [O, R], for experts [C, ·, ·].

    While attached, experts run on grouped_mm (transformers' default): a fresh adapter is bit for bit a base that does
    so too, and equal up to rounding where the base was set to another implementation.

    experts   of every layer that has chosen ones
    """

    UNUSED = ("top_k", "balance_coef")  # an MoE base keeps its own router

    allocation: ExpertSelection
    experts: dict[int, ExpertLora]

    def _insert(self) -> None:
        for spec in self.shape.of_role(*ALWAYS_ADAPTED):
            module = module_at(self.model, spec.path, name=self.shape.name)
            check_size(weight_size(module), (spec.out_features, spec.in_features), path=spec.path, name=self.shape.name)
            self._add_linear_lora(module, spec)
        projections: dict[int, list[ModuleShape]] = defaultdict(list)
        for spec in self.shape.of_role("expert"):
            projections[spec.layer].append(spec)
        self.experts = {
            layer: self._add_expert_lora(projections[layer], ids) for layer, ids in self.allocation.experts.items()
        }
        dispatched(self, self.experts)

    def _add_expert_lora(self, specs: list[ModuleShape], ids: tuple[int, ...]) -> ExpertLora:
        path = specs[0].path.rpartition(".")[0]
        module = module_at(self.model, path, name=self.shape.name)
        by_name = {spec.name: spec for spec in specs}
        check_stacks(module, by_name, path=path, name=self.shape.name)
        device, rank = module.down_proj.device, self.lora.rank
        pairs = {}
        for name, spec in by_name.items():
            values = [uniform(rank, spec.in_features, seed=self.seed, name=f"{spec.path}.{e}") for e in ids]
            a_CRI = self._add(f"{spec.path}.lora_A", torch.stack(values), device=device)
            # zero: training starts exactly at the base model
            b_COR = self._add(f"{spec.path}.lora_B", torch.zeros(len(ids), spec.out_features, rank), device=device)
            pairs[name] = (a_CRI, b_COR)
        lora = ExpertLora(module, ids, pairs, path=path, scale=self.lora.scale, dropout=self.lora.lora_dropout)
        self._put_attribute(module, "lora", lora)  # where experts_forward finds it
        self._on_detach(lora.stop_watching)
        return lora

    def check_gradients(self) -> None:
        """Call after the first backward pass; stops counting tokens, so later calls see only missing gradients.

        Raises TrialError naming layer and expert where a chosen expert received tokens that count in the loss but its
        LoRA received no gradient. (The very first gradient of every A is zero, because B is; that of B is not.)
        """
        for layer, lora in self.experts.items():
            lora.check_gradients(layer)
        super().check_gradients()

    def _merge(self) -> None:
        """W_e += (lora_alpha/r)·B_e A_e for every chosen expert, likewise the plain LoRA."""
        for spec in self.shape.of_role(*ALWAYS_ADAPTED):
            self._merge_linear_lora(module_at(self.model, spec.path, name=self.shape.name), spec)
        for lora in self.experts.values():
            lora.merge()


def check_stacks(module: Any, by_name: Mapping[str, ModuleShape], *, path: str, name: str) -> None:
    """Raises StudyError where the stacks of an experts module are not as large as the shape says."""
    for stack, projections in weight_stacks(module, path=path).items():
        parts = [by_name[p] for p in projections]
        size = (sum(p.out_features for p in parts), parts[0].in_features)
        expected = (parts[0].num_experts, *(reversed(size) if module.is_transposed else size))
        check_size(getattr(module, stack).shape, expected, path=f"{path}.{stack}", name=name)


def dispatched(adapter: Adapter, experts: Mapping[int, ExpertLora]) -> None:
    """Lets the experts of the adapter's model run on `experts_forward` where any of them has LoRA.

    Raises StudyError where the model cannot change how its experts run.
    """
    if experts:
        adapter._put(lambda: dispatch(adapter.model))
    for lora in experts.values():
        if lora.module.config._experts_implementation != IMPLEMENTATION:  # set_… skips classes it does not know
            raise StudyError(
                f"{type(adapter.model).__name__} cannot change how its experts run: no LoRA on {lora.path}"
            )


def dispatch(model: Any) -> Callable[[], None]:
    """Lets the experts of a model run on `experts_forward`; returns what undoes it."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    before = model.get_experts_implementation()
    model.set_experts_implementation(IMPLEMENTATION)
    return lambda: model.set_experts_implementation(before)


class ExpertStacks(ABC):
    """The frozen weights of one layer's experts, and what `experts_forward` asks of the LoRA on them.

    One adapter's is `ExpertLora`; that of a packed run's members is in trainers/packing/expert_lora.py.
    """

    def __init__(self, module: Any, *, path: str) -> None:
        self.module, self.path = module, path
        self.device = module.down_proj.device
        self.stacks = weight_stacks(module, path=path)

    @abstractmethod
    def route(self, index_TK: Tensor) -> Route:
        """Sorts the rows by expert and says which of them run through LoRA."""

    @abstractmethod
    def factors(self, stack: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A [C, R, I] and B [C, O, R] of one weight stack, the ranks of its projections side by side."""

    @abstractmethod
    def scale_of(self, route: Route, keep_QI: Tensor | None) -> float | Tensor:
        """lora_alpha/r, and 1/(1 − p) where inputs were dropped: one multiplication, in rank space."""

    @abstractmethod
    def kept(self, route: Route, num_features: int) -> Tensor | None:
        """Which inputs of LoRA stay, [Q, I]; None: all."""

    def sort(self, index_TK: Tensor, *, stable: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The first fields of a `Route`. `stable`: rows of one expert stay in the order of their tokens."""
        ids_S, order_S = torch.sort(index_TK.reshape(-1), stable=stable)
        inverse_S = torch.empty_like(order_S)
        inverse_S[order_S] = torch.arange(order_S.size(0), device=order_S.device)
        experts_E = torch.arange(self.module.num_experts, device=ids_S.device)
        ends_E = torch.searchsorted(ids_S, experts_E, right=True, out_int32=True)
        return ids_S, order_S, inverse_S, order_S // index_TK.size(-1), ends_E

    def rows_of(self, stack: str, position: int, num_rows: int) -> slice:
        """Where the outputs of a stack's projection number `position`, so many, lie among those of the stack."""
        if self.module.is_concatenated:
            return slice(position * num_rows, (position + 1) * num_rows)
        return slice(position, None, len(self.stacks[stack]))

    def weight(self, stack: str) -> Tensor:
        """The frozen weights [E, I, O], as grouped_mm multiplies them from the right."""
        weight: Tensor = getattr(self.module, stack)
        return weight if self.module.is_transposed else weight.transpose(-2, -1)

    def gate(self, inner_SO: Tensor) -> Tensor:
        """What the last projection takes, [S, I]: the activation, times the gate where the experts have one."""
        gate = self.module._apply_gate if self.module.has_gate else self.module.act_fn
        hidden_SI: Tensor = gate(inner_SO)
        return hidden_SI

    def bias(self, stack: str, route: Route) -> Tensor:
        """Of every row's expert, [S, O]."""
        bias_EO: Tensor = getattr(self.module, f"{stack}_bias")
        return bias_EO.index_select(0, route.ids_S)


class ExpertLora(ExpertStacks):
    """LoRA of one layer's chosen experts: what `experts_forward` needs besides the experts module itself.

    pairs        projection name → (A [C, R, I], B [C, O, R])
    every_row    True: LoRA runs over all S rows and the experts that are not chosen have zero factors
                 False: rows of chosen experts are picked out, run, and added back
                 On a GPU the number of picked rows would have to be read back to the host in every layer: where that
                 `waits`, all rows run, everywhere else the picked ones. Where every expert is chosen there is nothing
                 to pick.
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
        super().__init__(module, path=path)
        self.pairs, self.scale, self.dropout = pairs, scale, dropout
        self.ids = ids
        self.ids_C = torch.tensor(ids, device=self.device)
        self.is_chosen_E = torch.zeros(module.num_experts, dtype=torch.bool, device=self.device)
        self.is_chosen_E[self.ids_C] = True
        self.all_chosen = len(ids) == module.num_experts
        self.every_row = self.all_chosen or waits(module.down_proj)
        self._watch_gradients()

    def route(self, index_TK: Tensor) -> Route:
        """Sorts the rows by expert and finds those of chosen experts; no synchronisation where `every_row`."""
        # inputs that are dropped are drawn row by row: in an order that says which row is which
        ids_S, order_S, inverse_S, token_S, ends_E = self.sort(index_TK, stable=self.dropout > 0)
        if self.every_row:
            return Route(ids_S, order_S, inverse_S, token_S, ends_E, None, ends_E, None)
        rows_Q = self.is_chosen_E[ids_S].nonzero().squeeze(1)
        ends_C = torch.searchsorted(ids_S[rows_Q], self.ids_C, right=True, out_int32=True)
        return Route(ids_S, order_S, inverse_S, token_S, ends_E, rows_Q, ends_C, None)

    @property
    def most(self) -> int:
        """The largest rank of an expert in any projection."""
        return max(a_CRI.size(1) for a_CRI, _ in self.pairs.values())

    def size(self, projection: str) -> tuple[int, int]:
        """O and I of a projection."""
        a_CRI, b_COR = self.pairs[projection]
        return b_COR.size(1), a_CRI.size(2)

    def pair(self, projection: str) -> tuple[Tensor, Tensor]:
        """A [C, R, I] and B [C, O, R] of one projection."""
        return self.pairs[projection]

    def factors(self, stack: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A [C, R, I] and B [C, O, R] of one weight stack, as `side_by_side` puts its projections.

        R is padded with zeros to 16 bytes, which grouped_mm asks for; the trainable tensors are not padded.
        """
        pairs = [self.pair(projection) for projection in self.stacks[stack]]
        a_CRI, b_COR = side_by_side(pairs, concatenated=self.module.is_concatenated, dtype=dtype)
        if self.every_row and not self.all_chosen:
            a_CRI = a_CRI.new_zeros(self.module.num_experts, *a_CRI.shape[1:]).index_copy(0, self.ids_C, a_CRI)
            b_COR = b_COR.new_zeros(self.module.num_experts, *b_COR.shape[1:]).index_copy(0, self.ids_C, b_COR)
        return a_CRI.to(dtype), b_COR.to(dtype)

    def scale_of(self, route: Route, keep_QI: Tensor | None) -> float:
        """The factor of B·A·x; larger where inputs are dropped, so that the mean stays."""
        return self.scale if keep_QI is None else scale_of_kept(self.scale, self.dropout)

    def kept(self, route: Route, num_features: int) -> Tensor | None:
        """Which inputs stay, [Q, I]; None: all of them."""
        if not (self.dropout and self.module.training):
            return None
        num_rows = (route.token_S if route.rows_Q is None else route.rows_Q).size(0)
        return kept_rows(num_rows, num_features, dropout=self.dropout, device=self.device)

    def merge(self) -> None:
        """Adds B·A to the chosen experts that this worker holds."""
        for stack, projections in self.stacks.items():
            for position, projection in enumerate(projections):
                a_CRI, b_COR = self.pair(projection)
                held, first = local_rows(getattr(self.module, stack))
                for expert, a_RI, b_OR in zip(self.ids, a_CRI, b_COR, strict=True):
                    if not first <= expert < first + len(held):  # on another worker
                        continue
                    weight = held[expert - first]
                    weight_OI = weight.t() if self.module.is_transposed else weight
                    rows = self.rows_of(stack, position, len(b_OR))
                    add_to_weight(weight_OI[rows], self.scale * (b_OR @ a_RI))

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

    def check_gradients(self, layer: int) -> None:
        """Stops counting tokens. Raises TrialError where a chosen expert had some with a gradient, but has none."""
        if lost := self.without_gradient():
            expert, tokens = lost[0]
            raise TrialError(
                f"expert {expert} of layer {layer} received {tokens} tokens but its LoRA no gradient "
                f"({len(lost)} such experts in the layer): is {IMPLEMENTATION!r} still the experts implementation?"
            )
        self.stop_watching()

    def reached(self) -> Tensor:
        """Which of the C chosen experts have a gradient that is not zero."""
        reached_C = torch.zeros(len(self.ids), dtype=torch.bool, device=self.ids_C.device)
        for pair in self.pairs.values():
            for parameter in pair:
                if parameter.grad is not None:
                    reached_C |= parameter.grad.ne(0).flatten(1).any(dim=1)
        return reached_C

    def without_gradient(self) -> list[tuple[int, int]]:
        """(expert, tokens) for chosen experts that had tokens with a gradient, but whose own tensors have none."""
        live_C = self.live_E[self.ids_C]
        lost = ((live_C > 0) & ~self.reached()).nonzero().flatten().tolist()
        return [(self.ids[c], int(live_C[c])) for c in lost]


def waits(weight: Tensor) -> bool:
    """Whether it takes a wait for the device, that is not there otherwise, to read back how many rows an expert has.

    grouped_mm reads that itself on a CPU, and on a GPU in all but bf16 on Hopper and Blackwell, the only kernels of
    torch that leave it on the device (aten/src/ATen/native/cuda/GroupedBlas.cpp, torch 2.10).
    """
    if weight.device.type != "cuda":
        return weight.device.type != "cpu"
    return weight.dtype == torch.bfloat16 and torch.cuda.get_device_capability(weight.device)[0] in (9, 10)


def kept_rows(
    num_rows: int, num_features: int, *, dropout: float, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """Which inputs of LoRA stay, one row of experts after another. None: drawn from the global random state."""
    return torch.rand(num_rows, num_features, device=device, generator=generator) >= dropout


def padded_rank(rank: int, dtype: torch.dtype) -> int:
    """Rows of 16 bytes, which grouped_mm asks for."""
    return rank + -rank % (16 // dtype.itemsize)


def side_by_side(
    pairs: Sequence[tuple[Tensor, Tensor]], *, concatenated: bool, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """A [C, R, I] and B [C, O, R] of one weight stack from those of its projections, their ranks side by side.

    gate and up: A is [A_gate; A_up], B is block-diagonal, its rows in the order of the stack's outputs: all of gate
    before all of up where they are `concatenated`, else by turns (`ExpertStacks.rows_of`). R is padded with zeros to
    what grouped_mm asks for in `dtype`; None: it is not padded.
    """
    rank = pairs[0][0].size(1)
    used = rank * len(pairs)
    padded = used if dtype is None else padded_rank(used, dtype)
    a_CRI = torch.cat([a for a, _ in pairs], dim=1)
    if padded > used:
        a_CRI = F.pad(a_CRI, (0, 0, 0, padded - used))
    blocks = [F.pad(b, (i * rank, padded - (i + 1) * rank)) for i, (_, b) in enumerate(pairs)]
    return a_CRI, torch.cat(blocks, dim=1) if concatenated else torch.stack(blocks, dim=2).flatten(1, 2)


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
    scale_Q1: Tensor | None  # where rows differ in it (trainers/packing/)

    def pick(self, rows: Tensor) -> Tensor:
        """Of S rows those of chosen experts."""
        return rows if self.rows_Q is None else rows.index_select(0, self.rows_Q)

    def add_(self, total: Tensor, part: Tensor) -> None:
        """`total[chosen rows] += part`, in place; a row occurs once, so no order of additions is left to chance."""
        if self.rows_Q is None:
            total.add_(part)
        else:
            total.index_add_(0, self.rows_Q, part)


def experts_forward(module: Any, hidden_TI: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Stands in for the experts' forward; the base part computes what transformers' grouped_mm does, in its order."""
    lora: ExpertStacks | None = vars(module).get("lora")
    if lora is None:  # a layer without chosen experts
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        base_TI: Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, hidden_TI, index_TK, weight_TK)
        return base_TI
    dtype = module.down_proj.dtype
    route = lora.route(index_TK)
    first, last = lora.stacks
    keep_first = lora.kept(route, hidden_TI.size(-1))
    keep_last = lora.kept(route, lora.weight(last).size(1))
    out_TI: Tensor = _Experts.apply(
        hidden_TI.to(dtype),
        weight_TK,
        *lora.factors(first, dtype),
        *lora.factors(last, dtype),
        lora,
        route,
        keep_first,
        keep_last,
    )
    return out_TI.to(hidden_TI.dtype)


class _Experts(torch.autograd.Function):
    """All experts of a layer, y_t = Σ_k w_tk · expert_k(x_t), with LoRA on the chosen ones.

    Written out because autograd would keep five arrays of S rows and scatter gradients back row by row. Kept here are x
    [T, I] and the activations before the gate [S, O]; what follows from them is computed again. w's gradient comes from
    the small side of the last projection, ⟨g, W h⟩ = ⟨Wᵀg, h⟩. The frozen weights have no gradient: none is computed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TI: Tensor,
        weight_TK: Tensor,
        a_first: Tensor,
        b_first: Tensor,
        a_last: Tensor,
        b_last: Tensor,
        lora: ExpertStacks,
        route: Route,
        keep_first: Tensor | None,
        keep_last: Tensor | None,
    ) -> Tensor:
        first, last = lora.stacks
        x_SI = hidden_TI.index_select(0, route.token_S)
        inner_SO, rank_first = _forward(lora, first, x_SI, a_first, b_first, route, keep_first)
        rows_SI, rank_last = _forward(lora, last, lora.gate(inner_SO), a_last, b_last, route, keep_last)
        weight_S = weight_TK.reshape(-1).index_select(0, route.order_S)
        # gather and sum, not index_add_: that one is not deterministic on a GPU and sums bf16 in bf16
        weighted = (rows_SI * weight_S.unsqueeze(-1)).index_select(0, route.inverse_S)
        out_TI = weighted.view(*weight_TK.shape, -1).sum(dim=1)
        kept = (hidden_TI, inner_SO, weight_S, a_first, b_first, a_last, b_last, rank_first, rank_last)
        ctx.save_for_backward(*kept, keep_first, keep_last, *route)
        ctx.lora, ctx.weight_size = lora, weight_TK.shape
        return out_TI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TI: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TI, inner_SO, weight_S, a_first, b_first, a_last, b_last, *rest = ctx.saved_tensors
        rank_first, rank_last, keep_first, keep_last, *route_tensors = rest
        lora, route = ctx.lora, Route(*route_tensors)
        first, last = lora.stacks
        with torch.enable_grad():
            inner_SO = inner_SO.detach().requires_grad_(True)
            act_SI = lora.gate(inner_SO)
        # of the experts' outputs before they are weighed, so that w's own gradient falls out on the way
        grad_SI = grad_TI.to(act_SI.dtype).index_select(0, route.token_S)
        grad_act, grad_a_last, grad_b_last = _backward(
            lora, last, grad_SI, route.pick(act_SI.detach()), a_last, b_last, rank_last, route, keep_last, weight_S
        )
        grad_weight_S = (grad_act * act_SI.detach()).sum(dim=-1, dtype=torch.float32)
        if lora.module.has_bias:
            grad_weight_S += (grad_SI * lora.bias(last, route)).sum(dim=-1, dtype=torch.float32)
        (grad_inner,) = torch.autograd.grad(act_SI, inner_SO, grad_act.mul_(weight_S.unsqueeze(-1)))
        x_QI = hidden_TI.index_select(0, route.pick(route.token_S))
        grad_x, grad_a_first, grad_b_first = _backward(
            lora, first, grad_inner, x_QI, a_first, b_first, rank_first, route, keep_first, None
        )
        grad_hidden = grad_x.index_select(0, route.inverse_S).view(*ctx.weight_size, -1).sum(dim=1)
        grad_weight = grad_weight_S.index_select(0, route.inverse_S).view(ctx.weight_size).to(weight_S.dtype)
        return grad_hidden, grad_weight, grad_a_first, grad_b_first, grad_a_last, grad_b_last, None, None, None, None


def _forward(
    lora: ExpertStacks, stack: str, x_SI: Tensor, a_CRI: Tensor, b_COR: Tensor, route: Route, keep_QI: Tensor | None
) -> tuple[Tensor, Tensor]:
    """W_e x + bias + scale · B_e A_e (keep ∘ x) [S, O], and the rank space scale · A_e (keep ∘ x) [Q, R]."""
    out_SO = F.grouped_mm(x_SI, lora.weight(stack), offs=route.ends_E)
    if lora.module.has_bias:
        out_SO.add_(lora.bias(stack, route))
    x_QI = route.pick(x_SI)
    if keep_QI is not None:
        x_QI = x_QI * keep_QI
    rank_QR = F.grouped_mm(x_QI, a_CRI.transpose(-2, -1), offs=route.ends_C).mul_(lora.scale_of(route, keep_QI))
    route.add_(out_SO, F.grouped_mm(rank_QR, b_COR.transpose(-2, -1), offs=route.ends_C))
    return out_SO, rank_QR


def _backward(
    lora: ExpertStacks,
    stack: str,
    grad_SO: Tensor,
    x_QI: Tensor,
    a_CRI: Tensor,
    b_COR: Tensor,
    rank_QR: Tensor,
    route: Route,
    keep_QI: Tensor | None,
    weight_S: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [S, I], A and B. Where rows are weighed afterwards, A's and B's are; x's is left unweighed."""
    grad_QO = route.pick(grad_SO)
    grad_rank_QR = F.grouped_mm(grad_QO, b_COR, offs=route.ends_C).mul_(lora.scale_of(route, keep_QI))
    grad_x = F.grouped_mm(grad_SO, lora.weight(stack).transpose(-2, -1), offs=route.ends_E)
    grad_QI = F.grouped_mm(grad_rank_QR, a_CRI, offs=route.ends_C)
    if keep_QI is not None:
        grad_QI, x_QI = grad_QI * keep_QI, x_QI * keep_QI
    route.add_(grad_x, grad_QI)
    if weight_S is not None:
        weight_Q = route.pick(weight_S).unsqueeze(-1).to(grad_SO.dtype)
        grad_rank_QR, rank_QR = grad_rank_QR * weight_Q, rank_QR * weight_Q
    grad_b_COR = F.grouped_mm(grad_QO.t(), rank_QR, offs=route.ends_C)
    grad_a_CRI = F.grouped_mm(grad_rank_QR.t(), x_QI, offs=route.ends_C)
    return grad_x, grad_a_CRI, grad_b_COR
