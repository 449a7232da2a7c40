"""How many tokens each expert receives, with how much gate weight, and how large its outputs for them are, per layer.

    prompts = task.prompts(tokenizer, 256, seed)                        # token ids of training documents
    signal = measure(model, pad(prompts, pad_token_id=0), provenance={…})
    signal.metric(0, "count")                                           # layer 0: tokens dispatched to each expert

Or from a terminal: python -m allocators.show model=tiny-moe

Reads a model, changes nothing. One forward pass in eval mode without gradients; prompt tokens count, padding does not;
the head is never run. A transformers MoE layer calls its experts with (hidden states, ids, weights) whatever the
family, so one hook reads them all. The outputs of single experts are read where transformers' grouped_mm would norm
them, so that they are computed once, as the model computes them.

The pass is done in fp32 whatever the model's dtype. In bf16 the rounding of hidden states moves near-tied tokens to
another expert (11 % of the top choices on one model). Weights are cast a decoder layer at a time and given back, so a
large bf16 model needs the memory of one more layer, not of a second model.

Letters: B batch, S sequence, T = B·S tokens, k experts per token, E experts, P = T·k rows sorted by expert, H hidden.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from allocators.core.errors import StudyError
from allocators.core.types import Signal
from allocators.signals import Measurement, Source, with_progress

VERSION = 2  # part of the provenance: raise it when the same model and data would give other numbers

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def measurement_of(source: Source) -> Measurement:
    """The routing of training documents of the source's task: prompt and completion, `samples` of them.

    Computed in fp32, but from the resident weights, so their dtype is part of the provenance.
    """
    provenance = {
        "model": source.name,
        "weights": source.identity,
        "dtype": source.dtype,
        "tokenizer": source.tokenizer_identity,
        "task": source.task_name,
        "data": source.task.data_hash,
        "samples": source.samples,
        "seed": source.seed,
        "code": VERSION,
    }

    def run() -> Signal:
        prompts = source.task.prompts(source.tokenizer, source.samples, source.seed)
        padded = pad(prompts, pad_token_id=source.tokenizer.pad_token_id)
        batches = with_progress(padded, total=len(prompts), progress=source.progress, what="samples")
        return measure(source.model, batches, provenance=provenance)

    return Measurement(provenance, run)


def measure(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, provenance: Mapping[str, Any]) -> Signal:
    """Routing of a transformers causal language model: rows by layer, four metrics [E] each. For an expert e

        count   number of (token, choice) pairs sent to e
        mass    Σ of their gate weights g
        ean     mean of ‖f_e(x)‖ over them, the norm of e's output; 0 for an expert that receives none
        reap    mean of g·‖f_e(x)‖ over them: REAP's score (Lasby et al. 2025, arXiv:2510.13999), as is EAN

    ean and reap are empty where the experts cannot run on transformers' grouped_mm.

    batches      `input_ids` [B, S] and `attention_mask` [B, S], 1 where a token counts; on any device
    provenance   everything the numbers depend on; becomes the signal's

    Counts are exact; the rest are fp32 gate weights and norms summed in fp64. The model comes back as it was: mode,
    dtypes, hooks, implementation of its experts.

    Raises StudyError for a model without routed experts, or batches without tokens.
    """
    base: Any = model.base_model  # without the head: routing needs no logits
    experts = {int(match[1]): module for name, module in base.named_modules() if (match := _experts_layer(name))}
    if not experts:
        raise StudyError(f"{_name(model)} has no routed experts to count tokens for: routing is a signal of MoE models")
    device = next(base.parameters()).device
    keep_T: list[Tensor] = []  # the running batch's real tokens, for the hooks
    sums = {layer: _Sums(module, keep_T, device) for layer, module in experts.items()}
    was_training = {module: module.training for module in model.modules()}
    with ExitStack() as undo:
        for layer, module in experts.items():
            undo.callback(module.register_forward_pre_hook(sums[layer].picks).remove)
        for layer in on_grouped_mm(model, experts, undo):
            sums[layer].watch_outputs(undo)
        undo.enter_context(in_fp32(base))
        undo.callback(restore_mode, was_training)
        undo.enter_context(torch.no_grad())
        model.eval()
        for batch in batches:
            mask_BS = batch["attention_mask"].to(device)
            keep_T[:] = [mask_BS.reshape(-1).bool()]
            base(input_ids=batch["input_ids"].to(device), attention_mask=mask_BS, use_cache=False)
    if not any(int(of.count_E.sum()) for of in sums.values()):
        raise StudyError(f"the routing of {_name(model)} was asked for on no tokens: give at least one sample")
    rows = {str(layer): sums[layer].row() for layer in sorted(experts)}
    return Signal("routing", rows, axis="expert", unit="tokens", provenance=provenance)


class _Sums:
    """Sums over the tokens of one layer's experts."""

    def __init__(self, module: Any, keep_T: list[Tensor], device: torch.device) -> None:
        self.module, self.keep_T, self.sees_outputs = module, keep_T, False
        self.count_E = torch.zeros(module.num_experts, dtype=torch.int64, device=device)
        self.mass_E, self.norm_E, self.gated_E = (
            torch.zeros(module.num_experts, dtype=torch.float64, device=device) for _ in range(3)
        )

    def picks(self, _module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Before the experts run."""
        _, index_Tk, weight_Tk = arguments
        keep_Tk = self.keep_T[0][:, None].expand_as(index_Tk)
        ids = index_Tk.reshape(-1)
        # masked by zeros, not by selecting: no device sync, and where() keeps a padded row's NaN out of the sum
        self.count_E.index_add_(0, ids, keep_Tk.reshape(-1).long())
        kept_weight = torch.where(keep_Tk, weight_Tk.double(), 0.0).reshape(-1)
        self.mass_E.index_add_(0, ids, kept_weight)
        if self.sees_outputs:
            self._ids_P, order_P = torch.sort(ids)  # as grouped_mm sorts them
            self._keep_P, self._gate_P = keep_Tk.reshape(-1)[order_P], kept_weight[order_P]

    def outputs(self, y_PH: Tensor) -> Tensor:
        """Where grouped_mm would norm the experts' outputs, not yet weighed; gives them back."""
        norm_P = torch.where(self._keep_P, torch.linalg.vector_norm(y_PH, dim=-1).double(), 0.0)
        self.norm_E.index_add_(0, self._ids_P, norm_P)
        self.gated_E.index_add_(0, self._ids_P, norm_P * self._gate_P)
        return y_PH

    def watch_outputs(self, undo: ExitStack) -> None:
        own, normed = vars(self.module), self.module.has_post_expert_norm
        norm = self.module.post_expert_norm if normed else None
        before = {name: own[name] for name in ("has_post_expert_norm", "post_expert_norm") if name in own}

        def restore() -> None:
            own.pop("has_post_expert_norm"), own.pop("post_expert_norm")
            own.update(before)

        own["has_post_expert_norm"] = True
        own["post_expert_norm"] = lambda y_PH: self.outputs(y_PH if norm is None else norm(y_PH))
        undo.callback(restore)
        self.sees_outputs = True

    def row(self) -> dict[str, tuple[float, ...]]:
        row = {"count": tuple(self.count_E.tolist()), "mass": tuple(self.mass_E.tolist()), "reap": (), "ean": ()}
        if self.sees_outputs:
            row["reap"] = tuple((self.gated_E / self.count_E.clamp(min=1)).tolist())
            row["ean"] = tuple((self.norm_E / self.count_E.clamp(min=1)).tolist())
        return row


def on_grouped_mm(model: Any, experts: Mapping[int, Any], undo: ExitStack) -> list[int]:
    """Lets the experts run on transformers' grouped_mm, its default; the layers that do."""
    able = [layer for layer, module in experts.items() if hasattr(module, "has_post_expert_norm")]
    if able and model.get_experts_implementation() != "grouped_mm":
        undo.callback(model.set_experts_implementation, model.get_experts_implementation())
        model.set_experts_implementation("grouped_mm")
    return [layer for layer in able if experts[layer].config._experts_implementation == "grouped_mm"]


def pad(prompts: Sequence[Sequence[int]], *, pad_token_id: int, batch_size: int = 16) -> Iterator[dict[str, Tensor]]:
    """Batches for `measure`: the prompts, longest first so that little is padding, padded on the right."""
    longest_first = sorted(prompts, key=len, reverse=True)
    for start in range(0, len(longest_first), batch_size):
        rows = longest_first[start : start + batch_size]
        length = len(rows[0])
        yield {
            "input_ids": torch.tensor([[*row, *[pad_token_id] * (length - len(row))] for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
        }


def _experts_layer(name: str) -> re.Match[str] | None:
    return _LAYER.search(name) if name.endswith(".experts") else None


def _name(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    return getattr(config, "_name_or_path", "") or type(model).__name__


def restore_mode(was_training: Mapping[nn.Module, bool]) -> None:
    """Training or evaluation, module by module, as it was."""
    for module, training in was_training.items():
        module.training = training


@contextmanager
def in_fp32(base: Any) -> Iterator[None]:
    """Runs a half-precision model in fp32: embeddings are cast on their way out, each layer's weights while it runs."""
    half = (torch.bfloat16, torch.float16)
    if not any(p.dtype in half for p in base.parameters()):
        yield
        return
    lent: dict[nn.Parameter, Tensor] = {}

    def embed(_module: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
        return output.float()

    def borrow(module: nn.Module, _arguments: Any) -> None:
        for parameter in module.parameters():
            if parameter.dtype in half:
                lent[parameter] = parameter.data
                parameter.data = parameter.data.float()

    def give_back(*_: Any) -> None:
        for parameter, data in lent.items():
            parameter.data = data
        lent.clear()

    handles = [base.get_input_embeddings().register_forward_hook(embed)]
    for layer in base.layers:
        handles += [layer.register_forward_pre_hook(borrow), layer.register_forward_hook(give_back)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        give_back()
