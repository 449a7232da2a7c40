"""What a task's tokens look like inside a model: how widely the inputs of every matrix spread, how the matrix answers
to them, and how alike tasks are in every layer. Reads a model, changes nothing; forward passes only.

    signal = measure(model, [pad(rows, pad_token_id=0)], provenance={…})
    signal.metric("model.layers.0.self_attn.q_proj", "explained")         # 64 shares of its inputs' variance
    signal.metric("model.layers.0.self_attn.q_proj", "feature_norm")
    signal.metric(0, "similarity")                                        # one value a layer

For a matrix W [O, I] with inputs z, of an expert (row `<path>.<expert>`) the tokens that it receives:

    explained      λ_i/Σλ, largest first, with λ the eigenvalues of the inputs' covariance on the tokens of completions
                   (those that the loss counts): what EVA (Paischer et al. 2024, arXiv:2410.07170) ranks modules by
    feature_norm   mean over tokens of ‖Wz‖ / (‖z‖·‖W‖_F/√I), PLoP's score (arXiv:2506.20629). The denominator is the
                   root mean square of ‖Wz̃‖ over Gaussian z̃ of z's norm, of which PLoP draws one
    similarity     s_l of LayerMoE (arXiv:2505.22582): mean cosine between documents of two tasks, over all pairs of
                   tasks and of their documents. A document is the mean of its tokens after attention, the outputs of
                   the attention's last projection. Where there is one task it is between the documents of that task

Nothing grows with the number of samples. The covariance of up to 512 features is summed as it is, so that shares are
exact. With more features it is an incremental SVD (Ross et al. 2008, with their correction of the mean) that keeps 128
components: exact while the inputs have no larger rank, and total variance is exact in any case.

The pass runs in fp32, as that of `routing.py`. Modules with one input tensor (q, k and v; gate and up) share its sums.
A quantised matrix has no feature_norm, an expert without tokens nothing.

Letters: B batch, S sequence, T tokens, I input and O output features, E experts, P rows sorted by expert, K components.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from allocators.core.errors import StudyError
from allocators.core.shapes import shape_from_config
from allocators.core.types import ModelShape, ModuleShape, Signal
from allocators.signals import Measurement, Source, with_progress
from allocators.signals.routing import in_fp32, on_grouped_mm, restore_mode
from allocators.signals.sensitivity import MAX_LENGTH, drawn, pad

VERSION = 1  # part of the provenance: raise it when the same model and data would give other numbers
COMPONENTS = 64  # shares of the variance that are kept: EVA asks for twice a rank
KEPT = 128  # components of the incremental SVD
EXACT = 512  # features up to which the covariance is summed as it is


def measurement_of(source: Source) -> Measurement:
    """On `samples` training documents of every data set that the source trains on; the same number of all of them."""
    datasets = source.task.datasets
    samples = min([source.samples, *(dataset.num_training for dataset in datasets)])
    labels = [source.task_name if len(datasets) == 1 else dataset.label for dataset in datasets]
    provenance = {
        "model": source.name,
        "weights": source.identity,
        "dtype": source.dtype,
        "tokenizer": source.tokenizer_identity,
        "task": ", ".join(labels),
        "datasets": [{"task": label, "data": d.data_hash} for label, d in zip(labels, datasets, strict=True)],
        "samples": samples,
        "max_length": MAX_LENGTH,
        "seed": source.seed,
        "code": VERSION,
    }

    def run() -> Signal:
        batches = []
        for label, dataset in zip(labels, datasets, strict=True):
            rows = drawn(dataset.training_rows(source.tokenizer, MAX_LENGTH), samples, source.seed)
            padded = pad(rows, pad_token_id=source.tokenizer.pad_token_id, batch_size=16)
            what = f"samples of {label}"
            batches.append(with_progress(padded, total=len(rows), progress=source.progress, what=what))
        return measure(source.model, batches, provenance=provenance, shape=source.shape)

    return Measurement(provenance, run)


def measure(
    model: nn.Module,
    datasets: Sequence[Iterable[Mapping[str, Tensor]]],
    *,
    provenance: Mapping[str, Any],
    shape: ModelShape | None = None,
) -> Signal:
    """Representations of a transformers causal language model: a row a matrix, and a row a layer with its number.

    datasets     of every data set the batches: `input_ids`, `attention_mask` (1 where a token counts) and `labels`
                 (−100: the loss does not count it), each [B, S]
    provenance   everything the numbers depend on; becomes the signal's
    shape        of the model; by default read from its config

    The model comes back as it was. Raises StudyError for no token that the loss counts, and for experts that cannot run
    on transformers' grouped_mm.
    """
    config: Any = model.config
    taps = _Taps(model, shape or shape_from_config(config, name=type(model).__name__), len(datasets))
    base: Any = model.base_model
    was_training = {module: module.training for module in model.modules()}
    with ExitStack() as undo:
        taps.put(undo)
        undo.enter_context(in_fp32(base))
        undo.callback(restore_mode, was_training)
        undo.enter_context(torch.no_grad())
        model.eval()
        for number, batches in enumerate(datasets):
            for batch in batches:
                mask_BS = batch["attention_mask"].to(taps.device)
                taps.start(number, mask_BS.bool(), batch["labels"].to(taps.device).ne(-100))
                base(input_ids=batch["input_ids"].to(taps.device), attention_mask=mask_BS, use_cache=False)
    return Signal("representation", taps.rows(), axis="component", unit="1", provenance=provenance)


class Spread:
    """The covariance of inputs that come in batches, [T, I] each: its largest eigenvalues over their sum.

    size    number of features I
    kept    components of the incremental SVD
    exact   features up to which the covariance is summed as it is
    """

    def __init__(self, size: int, device: torch.device, *, kept: int = KEPT, exact: int = EXACT) -> None:
        self.count, self.kept = 0, kept
        self.sum_I = torch.zeros(size, dtype=torch.float64, device=device)
        self.square = torch.zeros((), dtype=torch.float64, device=device)  # Σ‖x‖²
        self.second_II = torch.zeros(size, size, dtype=torch.float64, device=device) if size <= exact else None
        self.axes_KI = torch.zeros(0, size, device=device)  # singular value times direction, of the tokens merged
        self.merged = 0
        self.mean_I = torch.zeros(size, dtype=torch.float64, device=device)  # of the tokens merged
        self.waiting: list[Tensor] = []

    def add(self, x_TI: Tensor) -> None:
        """Takes a batch in. In fp32 products, summed in fp64."""
        if not len(x_TI):
            return
        x_TI = x_TI.float()
        self.count += len(x_TI)
        self.sum_I += x_TI.sum(0, dtype=torch.float64)
        self.square += x_TI.square().sum(dtype=torch.float64)
        if self.second_II is not None:
            self.second_II += (x_TI.mT @ x_TI).double()
            return
        for part in x_TI.split(self.kept):  # an SVD costs the cube of its rows
            self.waiting.append(part)
            if sum(map(len, self.waiting)) >= self.kept:
                self._merge()

    def _merge(self) -> None:
        rows_TI = torch.cat(self.waiting)
        self.waiting = []
        new, old = len(rows_TI), self.merged
        mean_I = rows_TI.mean(0, dtype=torch.float64)
        # the two means differ, and so do the two sums of squares around them
        shift_I = math.sqrt(old * new / (old + new)) * (self.mean_I - mean_I)
        parts = [self.axes_KI, rows_TI - mean_I.float(), shift_I.float().unsqueeze(0)]
        stack_NI = torch.cat(parts).double()
        values_N, left_NN = torch.linalg.eigh(stack_NI @ stack_NI.mT)
        top_NK = left_NN[:, max(0, len(values_N) - self.kept) :]
        self.axes_KI = (top_NK.mT @ stack_NI).float()
        self.mean_I = (old * self.mean_I + new * mean_I) / (old + new)
        self.merged += new

    def shares(self, number: int) -> tuple[float, ...]:
        """The largest shares of the variance, at most so many; zeros where there is no variance, () without tokens."""
        if not self.count:
            return ()
        total = float(self.square - self.sum_I.square().sum() / self.count)
        if self.second_II is not None:
            around_II = self.second_II - torch.outer(self.sum_I, self.sum_I) / self.count
            values = torch.linalg.eigvalsh(around_II)
        else:
            if self.waiting:
                self._merge()
            values = self.axes_KI.double().square().sum(1)
        largest = sorted(values.clamp(min=0).tolist(), reverse=True)[:number]
        small = 1e-7 * float(self.square)  # rounding: equal tokens have no variance
        return tuple(value / total if total > small else 0.0 for value in largest)


class _Taps:
    """What hooks see, summed up."""

    def __init__(self, model: nn.Module, shape: ModelShape, num_datasets: int) -> None:
        self.model: Any = model
        self.device = next(model.parameters()).device
        self.shape = shape
        self.linears = shape.of_role("attention", "mlp", "shared_expert")
        self.stacks: dict[str, list[ModuleShape]] = defaultdict(list)
        for spec in shape.of_role("expert"):
            self.stacks[spec.path.rpartition(".")[0]].append(spec)
        self.spreads: dict[str, Spread] = {}
        self.same: dict[str, str] = {}  # module → the one whose input it shares
        self.answers: dict[str, Tensor] = {}  # Σ of ratios and their number, [2]
        self.units: dict[int, Tensor] = {}  # layer → Σ of documents' directions, [datasets, H]
        self.documents = [0] * num_datasets
        self._last: tuple[Any, str] = (None, "")

    def put(self, undo: ExitStack) -> None:
        """Hooks in. Raises StudyError for experts that cannot run on grouped_mm."""
        modules = {spec.path: self.model.get_submodule(spec.path) for spec in self.linears}
        for spec in self.linears:
            undo.callback(modules[spec.path].register_forward_hook(partial(self._linear, spec)).remove)
        last = {spec.layer: spec.path for spec in self.linears if spec.role == "attention"}
        for layer, path in last.items():
            undo.callback(modules[path].register_forward_hook(partial(self._documents, layer)).remove)
        experts = {n: self.model.get_submodule(path) for n, path in enumerate(self.stacks)}
        able = on_grouped_mm(self.model, experts, undo)
        for n, (path, specs) in enumerate(self.stacks.items()):
            if n not in able:
                raise StudyError(f"{path} cannot run on transformers' grouped_mm: its inputs are not measurable")
            _ExpertsTap(experts[n], specs, self).put(undo)

    def start(self, dataset: int, real_BS: Tensor, counted_BS: Tensor) -> None:
        """Before a batch. counted_BS: the tokens that the loss counts."""
        self.dataset, self.real_BS = dataset, real_BS
        self.real_T, self.counted_T = real_BS.flatten(), (counted_BS & real_BS).flatten()
        self.documents[dataset] += len(real_BS)
        self._last = (None, "")

    def spread(self, key: str, size: int) -> Spread:
        """The sums of a matrix's inputs."""
        if key not in self.spreads:
            self.spreads[key] = Spread(size, self.device)
        return self.spreads[key]

    def answer(self, key: str, y_TO: Tensor, z_TI: Tensor, norm: Tensor) -> None:
        """Adds PLoP's ratio of these tokens. norm: ‖W‖_F."""
        length_T = torch.linalg.vector_norm(z_TI.double(), dim=-1)
        ratio_T = (
            torch.linalg.vector_norm(y_TO.double(), dim=-1) * math.sqrt(z_TI.size(-1)) / (length_T * norm.double())
        )
        good_T = torch.isfinite(ratio_T)
        sums = torch.stack([torch.where(good_T, ratio_T, 0.0).sum(), good_T.sum()])
        self.answers[key] = self.answers.get(key, 0.0) + sums

    def _linear(self, spec: ModuleShape, module: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
        x_TI, y_TO = args[0].reshape(-1, spec.in_features), out.reshape(-1, spec.out_features)
        if args[0] is self._last[0]:
            self.same[spec.path] = self._last[1]
        else:
            self._last = (args[0], spec.path)
            self.spread(spec.path, spec.in_features).add(x_TI[self.counted_T])
        if module.weight.is_floating_point():
            y_TO = y_TO if module.bias is None else y_TO - module.bias
            self.answer(spec.path, y_TO[self.real_T], x_TI[self.real_T], _frobenius(module.weight))

    def _documents(self, layer: int, _module: Any, _args: Any, out: Tensor) -> None:
        weight_BS1 = (self.real_BS / self.real_BS.sum(1, keepdim=True)).unsqueeze(-1)
        mean_BH = (out.view(*self.real_BS.shape, -1) * weight_BS1).sum(1, dtype=torch.float64)
        unit_BH = nn.functional.normalize(mean_BH, dim=-1)
        if layer not in self.units:
            self.units[layer] = unit_BH.new_zeros(len(self.documents), unit_BH.size(1))
        self.units[layer][self.dataset] += unit_BH.sum(0)

    def rows(self) -> dict[str, dict[str, tuple[float, ...]]]:
        """Of the signal. Raises StudyError where nothing was seen."""
        if not any(spread.count for spread in self.spreads.values()):
            raise StudyError("representations were asked for on no token that the loss counts: give a sample")
        rows: dict[str, dict[str, tuple[float, ...]]] = {}
        shares = {key: spread.shares(COMPONENTS) for key, spread in self.spreads.items()}
        specs = [spec for stack in self.stacks.values() for spec in stack]
        keys = [spec.path for spec in self.linears]
        keys += [f"{spec.path}.{expert}" for spec in specs for expert in range(spec.num_experts)]
        for key in keys:
            total, number = self.answers[key].tolist() if key in self.answers else (0.0, 0.0)
            explained = shares.get(self.same.get(key, key), ())
            rows[key] = {"explained": explained, "feature_norm": (total / number,) if number else ()}
        for layer in sorted(self.units):
            rows[str(layer)] = {"similarity": similarity(self.units[layer], self.documents)}
        return rows


def similarity(units_DH: Tensor, documents: Sequence[int]) -> tuple[float, ...]:
    """Mean cosine between documents of two data sets, from the sums of their directions; of one between its own."""
    if len(documents) == 1:
        n = documents[0]
        return (float((units_DH[0].square().sum() - n) / (n * (n - 1))),) if n > 1 else ()
    means_DH = units_DH / torch.tensor(documents, device=units_DH.device).unsqueeze(-1)
    pairs = [float(one @ other) for one, other in itertools.combinations(means_DH, 2)]
    return (math.fsum(pairs) / len(pairs),)


class _ExpertsTap:
    """One layer's experts as transformers' grouped_mm runs them: its rows are sorted by expert at every step."""

    def __init__(self, module: Any, specs: Sequence[ModuleShape], taps: _Taps) -> None:
        self.module, self.taps = module, taps
        self.specs = {spec.name: spec for spec in specs}

    def put(self, undo: ExitStack) -> None:
        module, own = self.module, vars(self.module)
        undo.callback(module.register_forward_pre_hook(self._start).remove)
        gate = "_apply_gate" if module.has_gate else "act_fn"
        norm = module.post_expert_norm if module.has_post_expert_norm else None
        before = {name: own[name] for name in (gate, "has_post_expert_norm", "post_expert_norm") if name in own}
        own[gate] = partial(self._inner, getattr(module, gate))
        own["has_post_expert_norm"], own["post_expert_norm"] = True, partial(self._last, norm)

        def restore() -> None:
            for name in (gate, "has_post_expert_norm", "post_expert_norm"):
                own.pop(name)
            own.update(before)

        undo.callback(restore)

    def _start(self, _module: Any, args: tuple[Tensor, ...]) -> None:
        hidden_TI, index_Tk = args[0], args[1]
        ids_P, order_P = torch.sort(index_Tk.reshape(-1))  # as grouped_mm sorts them
        token_P = order_P // index_Tk.size(-1)
        self.ids_P, self.x_PI = ids_P, hidden_TI[token_P]
        self.real_P, self.counted_P = self.taps.real_T[token_P], self.taps.counted_T[token_P]
        counts = torch.bincount(ids_P, minlength=self.module.num_experts).tolist()
        ends = [0, *itertools.accumulate(counts)]
        self.rows = {e: slice(*ends[e : e + 2]) for e, count in enumerate(counts) if count}

    def _inner(self, gate: Callable[[Tensor], Tensor], inner_PO: Tensor) -> Tensor:
        first = "gate_up_proj" if self.module.has_gate else "up_proj"
        names = ("gate_proj", "up_proj") if self.module.has_gate else ("up_proj",)
        weight_EOI, plain_PO = self._weight(first), self._without_bias(first, inner_PO)
        for place, name in enumerate(names):
            outputs = self._outputs(place, len(names), plain_PO.size(-1))
            self._seen(name, self.x_PI, plain_PO[:, outputs], weight_EOI[:, outputs], shared=names[0])
        self.h_PI = gate(inner_PO)
        return self.h_PI

    def _last(self, norm: Callable[[Tensor], Tensor] | None, y_PO: Tensor) -> Tensor:
        plain_PO = self._without_bias("down_proj", y_PO)
        self._seen("down_proj", self.h_PI, plain_PO, self._weight("down_proj"), shared="down_proj")
        return y_PO if norm is None else norm(y_PO)

    def _seen(self, name: str, z_PI: Tensor, y_PO: Tensor, weight_EOI: Tensor, *, shared: str) -> None:
        spec, taps = self.specs[name], self.taps
        for expert, rows in self.rows.items():
            key, first = f"{spec.path}.{expert}", f"{self.specs[shared].path}.{expert}"
            if name == shared:
                taps.spread(key, spec.in_features).add(z_PI[rows][self.counted_P[rows]])
            else:
                taps.same[key] = first
            real = self.real_P[rows]
            taps.answer(key, y_PO[rows][real], z_PI[rows][real], _frobenius(weight_EOI[expert]))

    def _weight(self, stack: str) -> Tensor:
        weight: Tensor = getattr(self.module, stack)
        weight_EOI: Tensor = weight.mT if self.module.is_transposed else weight
        return weight_EOI

    def _without_bias(self, stack: str, y_PO: Tensor) -> Tensor:
        if not self.module.has_bias:
            return y_PO
        bias_EO: Tensor = getattr(self.module, f"{stack}_bias")
        return y_PO - bias_EO[self.ids_P]

    def _outputs(self, place: int, of: int, width: int) -> slice:
        """Which outputs of a stack belong to its projection number `place`: halves, or every second one."""
        if self.module.is_concatenated:
            return slice(place * width // of, (place + 1) * width // of)
        return slice(place, None, of)


def _frobenius(weight: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(weight.detach().float())
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole
