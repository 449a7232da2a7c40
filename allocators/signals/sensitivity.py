"""How strongly the loss of labelled documents depends on each weight matrix. Reads a model, changes nothing.

    signal = measure(model, pad(rows, pad_token_id=0), score="sum_sq_grad", provenance={…})
    signal.metric("model.layers.0.self_attn.q_proj", "sum_sq_grad")          # one value a data set

    python -m allocators.signals.sensitivity model=tiny-moe task=tiny_cipher      is the ranking stable at 36, 108, 288
                                                                                  samples? A table and a plot

A block is one weight matrix: the projections of attention and MLP, of shared experts, and every single expert of an MoE
layer (row `<path>.<expert>`). Embeddings, norms, routers and the head are none. Scores, summed over n samples, each
sample's loss being the mean over its completion tokens:

    sum_sq_grad   Σ_n ‖∂loss_n/∂W‖²           LoRA-SMoE; the gradient of that sample alone, raw, in fp32
    weight_grad   Σ_n Σ_ij |W_ij ∂loss_n/∂W_ij|
    fisher        sum_sq_grad with completion tokens drawn from the model itself: its Fisher information's trace
    hutchinson    Σ_n z·∂²loss_n/∂W² z averaged over random signs z: the trace of the Hessian's diagonal block,
                  negative where the loss is not convex. Holds all weight gradients and their graph: small models

LoRA-SMoE's published script trains one layer a step, so that each layer sees n/L samples, through clipped fp16
gradients. Here every block sees all samples, in one backward pass a batch: for a linear map with input A [S, I] and
output gradient G [S, O] of one sample

    ‖∂loss/∂W‖² = ‖Gᵀ A‖² = Σ (A Aᵀ) ∘ (G Gᵀ)

and the right-hand side costs S·S·(I+O) instead of S·I·O and never makes a weight-sized tensor. Weights stay frozen, no
weight gradient is stored; activations are kept by autograd, so `recompute=True` (checkpointing) works as in training.

Letters: B samples of a batch, S positions, T = B·S tokens, I input features, O output features, E experts,
P = T·k rows sorted by expert and sample, N segments: the rows of one sample in one expert, or one sample's rows.
"""

from __future__ import annotations

import random
import runpy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from allocators.core.errors import StudyError, unknown
from allocators.core.shapes import shape_from_config
from allocators.core.types import ModelShape, ModuleShape, Signal
from allocators.signals import Measurement, Source, with_progress

VERSION = 1  # part of the provenance: raise it when the same model and data would give other numbers
MAX_LENGTH = 512  # tokens of a sample; longer ones lose their beginning

Score = Literal["sum_sq_grad", "weight_grad", "fisher", "hutchinson"]
SCORES: tuple[Score, ...] = get_args(Score)

_IMPLEMENTATION = "sensitivity"  # our name among transformers' ALL_EXPERTS_FUNCTIONS
_CHUNK = 1 << 24  # elements of a temporary [N, O, I] or [N, S, ·]


class Sample(Protocol):
    """One labelled document; tokens from `labels_start` on are the completion (trainers/tasks/)."""

    @property
    def input_ids(self) -> list[int]:
        """The tokens of the prompt and of the completion."""

    @property
    def labels_start(self) -> int:
        """The number of tokens of the prompt."""


def measurement_of(source: Source, *, score: Score = "sum_sq_grad") -> Measurement:
    """The sensitivity on `samples` training documents of every data set that the source trains on.

    Of all of them the same number, the size of the smallest where that is less: scores are sums over samples.
    """
    datasets = source.task.datasets
    samples = min([source.samples, *(dataset.num_training for dataset in datasets)])
    provenances = []
    for dataset in datasets:
        name = source.task_name if len(datasets) == 1 else dataset.label
        provenances.append(
            {
                "model": source.name,
                "weights": source.identity,
                "dtype": source.dtype,
                "tokenizer": source.tokenizer_identity,
                "task": name,
                "datasets": [{"task": name, "data": dataset.data_hash}],
                "score": score,
                "samples": samples,
                "max_length": MAX_LENGTH,
                "seed": source.seed,
                "code": VERSION,
            }
        )

    def run() -> Signal:
        signals = []
        for dataset, provenance in zip(datasets, provenances, strict=True):
            rows = drawn(dataset.training_rows(source.tokenizer, MAX_LENGTH), samples, source.seed)
            what = "samples" if len(datasets) == 1 else f"samples of {dataset.label}"
            padded = pad(rows, pad_token_id=source.tokenizer.pad_token_id)
            batches = with_progress(padded, total=len(rows), progress=source.progress, what=what)
            signals.append(
                measure(source.model, batches, score=score, provenance=provenance, shape=source.shape, seed=source.seed)
            )
        return combine(signals)

    return Measurement(_joined(provenances), run)


def measure(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    provenance: Mapping[str, Any],
    score: Score = "sum_sq_grad",
    shape: ModelShape | None = None,
    seed: int = 0,
    probes: int = 1,
    recompute: bool = False,
) -> Signal:
    """Sensitivity of a transformers causal language model: a row a block, the score's name as metric, axis `dataset`.

    batches      `input_ids`, `attention_mask` (1 where a token counts) and `labels` (−100: no loss), each [B, S]
    provenance   everything the numbers depend on; becomes the signal's. Its "datasets" lists the one data set
    shape        of the model; by default read from its config
    seed         of the labels that fisher and of the signs that hutchinson draws
    probes       sign vectors a sample for hutchinson
    recompute    keep a layer's activations only while they are needed: slower, for long samples

    The model comes back as it was. Raises StudyError for an unknown score, batches without samples, a sample without a
    completion token, and a loss that is not finite.
    """
    values = per_sample(model, batches, score=score, shape=shape, seed=seed, probes=probes, recompute=recompute)
    rows = {block: {str(score): (float(column.sum()),)} for block, column in values.items()}
    return Signal("sensitivity", rows, axis="dataset", unit="1", provenance=provenance)


def combine(signals: Sequence[Signal]) -> Signal:
    """Several data sets as one signal: every row holds their values in the order given.

    Raises StudyError where they differ in anything but the data: model, score, number of samples, blocks.
    """
    common = [{k: v for k, v in s.provenance.items() if k not in ("task", "datasets")} for s in signals]
    for part, signal in zip(common, signals, strict=True):
        differing = sorted(key for key in {*part, *common[0]} if part.get(key) != common[0].get(key))
        if differing or set(signal.rows) != set(signals[0].rows):
            key = differing[0] if differing else "blocks"
            raise StudyError(f"sensitivity signals can be combined when only the data differs, these differ in '{key}'")
    rows: dict[str, dict[str, tuple[float, ...]]] = defaultdict(lambda: defaultdict(tuple))
    for signal in signals:
        for block, metrics in signal.rows.items():
            for name, row in metrics.items():
                rows[block][name] += row
    provenance = _joined([signal.provenance for signal in signals])
    return Signal("sensitivity", rows, signals[0].axis, signals[0].unit, provenance)


def _joined(provenances: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of signals that differ in the data alone."""
    datasets = [dataset for provenance in provenances for dataset in provenance["datasets"]]
    return {**provenances[0], "task": ", ".join(dataset["task"] for dataset in datasets), "datasets": datasets}


def pad(rows: Sequence[Sample], *, pad_token_id: int, batch_size: int = 8) -> Iterator[dict[str, Tensor]]:
    """Batches for `measure`: padded on the right, longest rows first so that little is padding.

    `order` [B] says which of `rows` each one is.
    """
    longest_first = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))
    for start in range(0, len(rows), batch_size):
        order = longest_first[start : start + batch_size]
        ids_BS = [rows[i].input_ids for i in order]
        rest_B = [len(ids_BS[0]) - len(ids) for ids in ids_BS]
        starts_B = [rows[i].labels_start for i in order]
        yield {
            "input_ids": torch.tensor([[*x, *[pad_token_id] * r] for x, r in zip(ids_BS, rest_B, strict=True)]),
            "attention_mask": torch.tensor([[1] * len(x) + [0] * r for x, r in zip(ids_BS, rest_B, strict=True)]),
            "labels": torch.tensor(
                [[-100] * begin + x[begin:] + [-100] * r for x, r, begin in zip(ids_BS, rest_B, starts_B, strict=True)]
            ),
            "order": torch.tensor(order),
        }


def per_sample(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    score: Score = "sum_sq_grad",
    shape: ModelShape | None = None,
    seed: int = 0,
    probes: int = 1,
    recompute: bool = False,
) -> dict[str, Tensor]:
    """Every sample's score by block, fp64 [n]; in the order of `order` where the batches carry it. See `measure`."""
    if score not in SCORES:
        raise unknown("sensitivity score", score, SCORES)
    config = getattr(model, "config", None)
    blocks = _Blocks(
        model, shape or shape_from_config(config, name=getattr(config, "_name_or_path", "") or "the model")
    )
    packed = next((path for path, m in blocks.linears.items() if not m.weight.is_floating_point()), None)
    if packed and score in ("weight_grad", "hutchinson"):
        raise StudyError(
            f"{score} needs the values of {packed}, which is quantised: measure it without, or choose fisher"
        )
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    collected: list[dict[str, Tensor]] = []
    orders: list[Tensor] = []
    with _frozen_in_eval_mode(model), ExitStack() as undo:
        if recompute and score != "hutchinson":
            undo.enter_context(_recomputed(model))
        if score == "hutchinson":
            passes: Callable[..., dict[str, Tensor]] = partial(_curvature, blocks, probes=probes)
            undo.enter_context(blocks.differentiated())
        else:
            passes = partial(_squares, blocks, fisher=score == "fisher")
            undo.enter_context(blocks.tapped(abs_products if score == "weight_grad" else squared_norms))
        for batch in batches:
            on_device = {key: batch[key].to(device) for key in ("input_ids", "attention_mask", "labels")}
            collected.append(passes(model, on_device, generator=generator))
            first = sum(map(len, orders))
            orders.append(batch.get("order", torch.arange(first, first + len(batch["labels"]))))
    if not collected:
        raise StudyError("the sensitivity was asked for on no samples: give at least one")
    where = torch.argsort(torch.cat(orders))
    values = {block: torch.cat([part[block] for part in collected])[where] for block in collected[0]}
    if not all(column.isfinite().all() for column in values.values()):
        raise StudyError(f"the {score} sensitivity is not finite: the loss overflowed; try float32 weights")
    return values


# --- losses -----------------------------------------------------------------------------------------------------------


def losses(model: nn.Module, batch: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
    """Mean cross entropy over the completion tokens of each sample, fp32 [B]; as the model's own loss on it alone.

    generator   draws the completion tokens from the model's prediction instead (the Fisher information's expectation)

    The head runs on the positions that predict a completion token only.
    """
    labels_BS = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)  # position s predicts token s + 1
    where_BS = labels_BS != -100
    counts_B = where_BS.sum(1)
    if not bool(counts_B.all()):
        raise StudyError("a sample has no completion token to take a loss on: leave it out or raise max_length")
    picked_C = where_BS.flatten().nonzero().squeeze(1)

    def pick(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].flatten(0, -2)[picked_C].unsqueeze(0), *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(pick)  # type: ignore[operator]
    try:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits_CV = _precise(model(input_ids=ids, attention_mask=mask, use_cache=False).logits.squeeze(0))
    finally:
        hook.remove()
    targets_C = labels_BS.flatten()[picked_C]
    if generator is not None:
        targets_C = torch.multinomial(logits_CV.detach().softmax(-1), 1, generator=generator).squeeze(1)
    loss_C = F.cross_entropy(logits_CV, targets_C, reduction="none")
    sample_C = picked_C // labels_BS.shape[1]
    return loss_C.new_zeros(len(labels_BS)).index_add(0, sample_C, loss_C / counts_B[sample_C])


def _squares(
    blocks: _Blocks, model: nn.Module, batch: Mapping[str, Tensor], *, generator: torch.Generator, fisher: bool
) -> dict[str, Tensor]:
    """One forward, one backward: what the taps saw."""
    blocks.start_batch(len(batch["labels"]))
    losses(model, batch, generator=generator if fisher else None).sum().backward()
    return blocks.finish_batch()


def _curvature(
    blocks: _Blocks, model: nn.Module, batch: Mapping[str, Tensor], *, generator: torch.Generator, probes: int
) -> dict[str, Tensor]:
    """z·Hz by block, sample after sample; blocks do not mix in expectation, so one z serves all of them."""
    samples: list[dict[str, Tensor]] = []
    for i in range(len(batch["labels"])):
        length = int(batch["attention_mask"][i].nonzero().max()) + 1
        loss = losses(model, {key: value[i : i + 1, :length] for key, value in batch.items()})
        grads = torch.autograd.grad(loss.sum(), blocks.weights, create_graph=True, materialize_grads=True)
        totals: list[Tensor] = []
        for probe in range(probes):
            signs = [torch.randint(0, 2, g.shape, generator=generator, device=g.device) * 2 - 1 for g in grads]
            signs = [z.to(g.dtype) for z, g in zip(signs, grads, strict=True)]
            products = torch.autograd.grad(
                grads, blocks.weights, signs, retain_graph=probe + 1 < probes, materialize_grads=True
            )
            terms = [(z * h).double() for z, h in zip(signs, products, strict=True)]
            totals = [a + b for a, b in zip(totals, terms, strict=True)] if totals else terms
        samples.append(blocks.by_name([total / probes for total in totals]))
    return {block: torch.stack([sample[block] for sample in samples]) for block in samples[0]}


# --- per-sample scores from inputs and output gradients ---------------------------------------------------------------


def squared_norms(a_NSI: Tensor, g_NSO: Tensor, *_weights: Tensor) -> Tensor:
    """‖G_nᵀ A_n‖² of every segment, [N]; fp32 or better.

    Of the two forms the one with fewer multiplications, S·(I+O) or I·O a position: their times have just that ratio.
    """
    a_NSI, g_NSO = _precise(a_NSI), _precise(g_NSO)
    (_, positions, inputs), outputs = a_NSI.shape, g_NSO.shape[-1]
    if positions * (inputs + outputs) < inputs * outputs:
        return _chunked(_by_gram, a_NSI, g_NSO, size=positions**2)
    return _chunked(_by_gradient, a_NSI, g_NSO, size=inputs * outputs)


def _by_gram(a_NSI: Tensor, g_NSO: Tensor) -> Tensor:
    return torch.bmm(a_NSI, a_NSI.mT).mul_(torch.bmm(g_NSO, g_NSO.mT)).sum((1, 2))


def _by_gradient(a_NSI: Tensor, g_NSO: Tensor) -> Tensor:
    return torch.bmm(g_NSO.mT, a_NSI).square_().sum((1, 2))


def abs_products(a_NSI: Tensor, g_NSO: Tensor, weight_EOI: Tensor, ids_N: Tensor) -> Tensor:
    """Σ_ij |W_ij (G_nᵀ A_n)_ij| of every segment, [N]; W is number ids_N[n] of the stack."""

    def one(a: Tensor, g: Tensor, ids: Tensor) -> Tensor:
        return torch.bmm(g.mT, a).mul_(weight_EOI[ids]).abs_().sum((1, 2))

    return _chunked(one, _precise(a_NSI), _precise(g_NSO), ids_N, size=weight_EOI[0].numel())


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _chunked(function: Callable[..., Tensor], *tensors: Tensor, size: int) -> Tensor:
    """Segments in groups, so that a temporary of `size` elements a segment stays bounded."""
    step = max(1, _CHUNK // size)
    count = len(tensors[0])
    return torch.cat([function(*(t[i : i + step] for t in tensors)) for i in range(0, count, step)])


Measure = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class _TappedLinear(torch.autograd.Function):
    """F.linear with a frozen weight that shows its input and output gradient to `tap` in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tap: Callable[..., Any]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tap = tap
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ctx.tap(x, dy)
        return dy @ weight if ctx.needs_input_grad[0] else None, None, None, None


class _TappedOutput(torch.autograd.Function):
    """The same for a layer whose weight is packed: its own forward and backward run, this passes y and dy on."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, tap: Callable[..., Any]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.tap = tap
        return y.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.tap(x, dy)
        return dy, None, None


class _TappedExperts(torch.autograd.Function):
    """The same for rows grouped by expert: x [P, I], weight [E, I, O], ends_E the last row + 1 of each expert."""

    @staticmethod
    def forward(ctx: Any, x_PI: Tensor, weight_EIO: Tensor, ends_E: Tensor, tap: Callable[..., Any]) -> Tensor:
        ctx.save_for_backward(x_PI, weight_EIO, ends_E)
        ctx.tap = tap
        return F.grouped_mm(x_PI, weight_EIO, offs=ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_PO: Tensor) -> tuple[Tensor | None, ...]:
        x_PI, weight_EIO, ends_E = ctx.saved_tensors
        ctx.tap(x_PI, dy_PO)
        return F.grouped_mm(dy_PO.contiguous(), weight_EIO.mT, offs=ends_E), None, None, None


def _tapped_experts_forward(module: Any, hidden_TI: Tensor, index_Tk: Tensor, weight_Tk: Tensor) -> Tensor:
    """Stands in for the experts' forward: what transformers' grouped_mm does, rows sorted by expert, then by sample."""
    out_TI: Tensor = vars(module)["sensitivity"].forward(hidden_TI, index_Tk, weight_Tk)
    return out_TI


class _ExpertsTap:
    """Measures every (sample, expert) of one layer's stacked experts."""

    def __init__(self, module: Any, specs: Sequence[ModuleShape], blocks: _Blocks, measure: Measure) -> None:
        self.module, self.blocks, self.measure = module, blocks, measure
        self.specs = {spec.name: spec for spec in specs}

    def forward(self, hidden_TI: Tensor, index_Tk: Tensor, weight_Tk: Tensor) -> Tensor:
        module, samples = self.module, self.blocks.batch_size
        num_tokens, k = index_Tk.shape
        tokens_T = torch.arange(num_tokens, device=index_Tk.device)
        sample_T = tokens_T // (num_tokens // samples)
        segment_P, order_P = torch.sort((index_Tk * samples + sample_T[:, None]).flatten())
        experts_E = torch.arange(1, module.num_experts + 1, device=order_P.device)
        ends_E = torch.searchsorted(segment_P, experts_E * samples, out_int32=True)

        def linear(x_PI: Tensor, stack: str) -> Tensor:
            weight = getattr(module, stack)
            weight_EIO = weight if module.is_transposed else weight.mT
            y_PO: Tensor = _TappedExperts.apply(
                x_PI, weight_EIO, ends_E, partial(self._tap, stack, segment_P, weight_EIO)
            )
            if module.has_bias:
                y_PO = y_PO + getattr(module, f"{stack}_bias")[segment_P // samples]
            return y_PO

        x_PI = hidden_TI[order_P // k]
        if module.has_gate:
            x_PI = module._apply_gate(linear(x_PI, "gate_up_proj"))
        else:
            x_PI = module.act_fn(linear(x_PI, "up_proj"))
        y_PO = linear(x_PI, "down_proj") * weight_Tk.flatten()[order_P].unsqueeze(-1)
        back_P = torch.empty_like(order_P)
        back_P[order_P] = torch.arange(len(order_P), device=order_P.device)
        return y_PO[back_P].view(num_tokens, k, -1).sum(1).to(hidden_TI.dtype)

    def _tap(self, stack: str, segment_P: Tensor, weight_EIO: Tensor, x_PI: Tensor, dy_PO: Tensor) -> None:
        samples, experts = self.blocks.batch_size, self.module.num_experts
        counts = torch.bincount(segment_P, minlength=experts * samples)
        starts = counts.cumsum(0) - counts
        weight_EOI = weight_EIO.mT
        for name in ("gate_proj", "up_proj") if stack == "gate_up_proj" else (stack,):
            part = self._columns(name, stack, dy_PO.shape[1])
            values = torch.zeros(experts * samples, dtype=torch.float64, device=x_PI.device)
            for ids_N, rows_NS, valid_NS in _segments(starts, counts):
                # zeros in A alone: what stands in G beside them does not count
                a_NSI = x_PI[rows_NS] * valid_NS.unsqueeze(-1)
                scores_N = self.measure(a_NSI, dy_PO[:, part][rows_NS], weight_EOI[:, part], ids_N // samples)
                values[ids_N] = scores_N.double()
            for expert, column in enumerate(values.view(experts, samples)):
                self.blocks.scores[f"{self.specs[name].path}.{expert}"] = column

    def _columns(self, name: str, stack: str, width: int) -> slice:
        """Which outputs of the stack belong to the projection: halves, or every second where they are interleaved."""
        if stack != "gate_up_proj":
            return slice(None)
        second = name == "up_proj"
        if self.module.is_concatenated:
            return slice(width // 2, None) if second else slice(width // 2)
        return slice(int(second), None, 2)


def _segments(starts: Tensor, counts: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Segments of about one length together: (their numbers [N], their rows [N, S], which of those are real [N, S]).

    Lengths are rounded up to powers of two, so that there are few groups and at most half of a group is padding.
    """
    lengths = torch.where(counts > 0, 2 ** torch.ceil(torch.log2(counts.clamp(min=1).double())), 0).long()
    for length in torch.unique(lengths).tolist():
        if length:
            ids_N = (lengths == length).nonzero().squeeze(1)
            steps_S = torch.arange(length, device=counts.device)
            valid_NS = steps_S < counts[ids_N, None]
            yield ids_N, torch.where(valid_NS, starts[ids_N, None] + steps_S, 0), valid_NS


# --- the model --------------------------------------------------------------------------------------------------------


class _Blocks:
    """The weight matrices of a model that are scored, and their scores in the running batch."""

    def __init__(self, model: nn.Module, shape: ModelShape) -> None:
        self.model: Any = model
        self.linears: dict[str, Any] = {
            m.path: model.get_submodule(m.path) for m in shape.of_role("attention", "mlp", "shared_expert")
        }
        self.experts: dict[str, list[ModuleShape]] = defaultdict(list)
        for spec in shape.of_role("expert"):
            self.experts[spec.path.rpartition(".")[0]].append(spec)
        self.batch_size = 0
        self.scores: dict[str, Tensor] = {}

    def start_batch(self, size: int) -> None:
        self.batch_size, self.scores = size, {}

    def finish_batch(self) -> dict[str, Tensor]:
        """Scores [B] by block, in the order of the layers."""
        specs = [spec for layer in self.experts.values() for spec in layer]
        order = [*self.linears, *(f"{spec.path}.{e}" for spec in specs for e in range(spec.num_experts))]
        table = torch.stack([self.scores[name].double() for name in order]).cpu()  # one transfer for all
        return dict(zip(order, table, strict=True))

    @contextmanager
    def tapped(self, measure: Measure) -> Iterator[None]:
        """Every block shows its inputs and output gradients to `measure`."""
        with ExitStack() as undo:
            for path, module in self.linears.items():
                vars(module)["forward"] = partial(self._linear, path, module, measure)
                undo.callback(vars(module).pop, "forward")
            if self.experts:
                from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

                ALL_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, _tapped_experts_forward)
                self._run_experts_by(_IMPLEMENTATION, undo)
            for path, specs in self.experts.items():
                module = self.model.get_submodule(path)
                vars(module)["sensitivity"] = _ExpertsTap(module, specs, self, measure)
                undo.callback(vars(module).pop, "sensitivity")
            # Nothing below the first block is trainable: without this no backward pass would reach it.
            embeddings = self.model.get_input_embeddings()
            undo.callback(embeddings.register_forward_hook(lambda _m, _args, out: out.requires_grad_()).remove)
            yield

    def _linear(self, path: str, module: Any, measure: Measure, x: Tensor) -> Tensor:
        tap = partial(self._tap, path, module, measure)
        if module.weight.is_floating_point():
            y: Tensor = _TappedLinear.apply(x, module.weight, module.bias, tap)
        else:
            y = _TappedOutput.apply(type(module).forward(module, x), x, tap)
        return y

    def _tap(self, path: str, module: Any, measure: Measure, x: Tensor, dy: Tensor) -> None:
        assert path not in self.scores, f"{path} ran twice in one forward pass: its gradients would have to be added"
        a_BSI, g_BSO = (t.reshape(self.batch_size, -1, t.shape[-1]) for t in (x, dy))
        first_B = torch.zeros(self.batch_size, dtype=torch.long, device=x.device)
        self.scores[path] = measure(a_BSI, g_BSO, module.weight.unsqueeze(0), first_B)

    @contextmanager
    def differentiated(self) -> Iterator[None]:
        """Every block's weight asks for a gradient, and the model runs on operations that differentiate twice."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with ExitStack() as undo:
            undo.enter_context(sdpa_kernel(SDPBackend.MATH))
            if self.experts:
                self._run_experts_by("eager", undo)
            for weight in self.weights:
                weight.requires_grad_(True)
            yield

    def _run_experts_by(self, name: str, undo: ExitStack) -> None:
        undo.callback(self.model.set_experts_implementation, self.model.get_experts_implementation())
        self.model.set_experts_implementation(name)
        for path in self.experts:
            module = self.model.get_submodule(path)
            if not hasattr(module, "is_concatenated") or module.config._experts_implementation != name:
                raise StudyError(f"{path} ({type(module).__name__}) cannot change how its experts run: not measurable")

    @property
    def weights(self) -> list[nn.Parameter]:
        stacks = [self.model.get_submodule(path) for path in self.experts]
        first = ["gate_up_proj" if module.has_gate else "up_proj" for module in stacks]
        return [
            *(module.weight for module in self.linears.values()),
            *(getattr(m, name) for m, stack in zip(stacks, first, strict=True) for name in (stack, "down_proj")),
        ]

    def by_name(self, values: Sequence[Tensor]) -> dict[str, Tensor]:
        """Sums over each block, from tensors in the order and shapes of `weights`."""
        tensors = iter(values)
        sums = {path: next(tensors).sum() for path in self.linears}
        for path, specs in self.experts.items():
            module = self.model.get_submodule(path)
            tap = _ExpertsTap(module, specs, self, squared_norms)
            for stack in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
                value = next(tensors)
                outputs_last = value if module.is_transposed else value.mT
                for name in ("gate_proj", "up_proj") if stack == "gate_up_proj" else (stack,):
                    part = outputs_last[:, :, tap._columns(name, stack, outputs_last.shape[-1])]
                    for expert, total in enumerate(part.sum((1, 2))):
                        sums[f"{tap.specs[name].path}.{expert}"] = total
        return {name: value.detach().cpu() for name, value in sums.items()}


@contextmanager
def _frozen_in_eval_mode(model: nn.Module) -> Iterator[None]:
    """No dropout, no parameter that asks for a gradient; everything back afterwards."""
    training = {module: module.training for module in model.modules()}
    asking = [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        model.requires_grad_(False)
        for parameter in asking:
            parameter.requires_grad_(True)
        for module, was_training in training.items():
            module.training = was_training


@contextmanager
def _recomputed(model: Any) -> Iterator[None]:
    """Decoder layers under non-reentrant checkpointing, whatever the model's own switch (it is off in eval mode)."""
    layers = list(model.base_model.layers)
    for layer in layers:
        vars(layer)["forward"] = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward")


def drawn(rows: Sequence[Sample], samples: int, seed: int) -> list[Sample]:
    """So many of the rows, or all where there are fewer, in an order that `seed` draws."""
    return [rows[i] for i in random.Random(seed).sample(range(len(rows)), min(samples, len(rows)))]


if __name__ == "__main__":  # the command loads models and tasks, which this folder must not: it lies above
    runpy.run_module("search.show.stability", run_name="__main__")
