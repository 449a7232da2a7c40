"""The sensitivity signal: against the one-sample loop on every family, then its laws.

python -m pytest tests/allocators/signals/test_sensitivity.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from allocators.core.errors import StudyError
from allocators.core.shapes import shape_from_config
from allocators.core.types import ModelShape
from allocators.signals import sensitivity
from tests.allocators import tiny

FAMILIES = [*tiny.DENSE, *tiny.MOE]


@dataclass(frozen=True)
class Row:
    input_ids: list[int]
    labels_start: int


def rows_of_many_lengths(seed: int = 0, count: int = 7) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    lengths = [int(torch.randint(4, 20, (), generator=generator)) for _ in range(count)]
    return [
        Row(torch.randint(3, 40, (n,), generator=generator).tolist(), max(1, n - 1 - int(torch.randint(0, n, ())) // 2))
        for n in lengths
    ]


ROWS = rows_of_many_lengths()


def batches(rows: Sequence[Row] = ROWS, batch_size: int = 3) -> Iterator[dict[str, Tensor]]:
    return sensitivity.pad(rows, pad_token_id=0, batch_size=batch_size)


def shape_for(model: Any) -> ModelShape:
    return shape_from_config(model.config, name="tiny")


def block_views(model: Any, tensor_of: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """Every block's slice of `tensor_of(parameter)`, by the name of its row."""
    values: dict[str, Tensor] = {}
    for spec in shape_for(model).modules:
        if spec.role == "expert":
            parent, _, name = spec.path.rpartition(".")
            module = model.get_submodule(parent)
            stack = tensor_of(module.down_proj if name == "down_proj" else module.gate_up_proj)
            stack = stack.mT if module.is_transposed else stack  # [E, outputs, inputs]
            if name != "down_proj":
                outputs = torch.arange(stack.shape[1])
                half = len(outputs) // 2
                is_up = outputs >= half if module.is_concatenated else outputs % 2 == 1
                stack = stack[:, is_up if name == "up_proj" else ~is_up]
            values |= {f"{spec.path}.{e}": stack[e] for e in range(spec.num_experts)}
        elif spec.role not in ("router", "shared_gate"):
            values[spec.path] = tensor_of(model.get_submodule(spec.path).weight)
    return values


def one_sample_loop(model: Any, row: Row, *, labels: Tensor | None = None) -> dict[str, Tensor]:
    """The obvious way: this sample alone, the model's own loss, a gradient for every weight."""
    for p in model.parameters():
        p.requires_grad_(True).grad = None
    ids = torch.tensor([row.input_ids])
    labels = torch.tensor([[-100] * row.labels_start + row.input_ids[row.labels_start :]]) if labels is None else labels
    model(input_ids=ids, labels=labels).loss.backward()
    grads = block_views(model, lambda p: torch.zeros_like(p) if p.grad is None else p.grad.float().clone())
    for p in model.parameters():
        p.requires_grad_(False).grad = None
    return grads


def check_equal(got: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float = 1e-4) -> None:
    """Relative to each block; blocks whose gradient is all but zero, relative to the largest."""
    assert got.keys() == want.keys()
    largest = max(float(v.abs().max()) for v in want.values())
    for name in want:
        difference = (got[name] - want[name].double()).abs()
        assert (difference <= tolerance * want[name].double().abs() + 1e-9 * largest).all(), (
            name,
            got[name],
            want[name],
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_one_sample_loop(family: str) -> None:
    model = tiny.model(family)
    got = sensitivity.per_sample(model, batches(), shape=shape_for(model))
    loops = [one_sample_loop(model, row) for row in ROWS]
    check_equal(got, {name: torch.stack([g[name].square().sum() for g in loops]) for name in loops[0]})


@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "gpt_oss"])
def test_weight_grad_equals_the_one_sample_loop(family: str) -> None:
    model = tiny.model(family)
    got = sensitivity.per_sample(model, batches(), score="weight_grad", shape=shape_for(model))
    weights = block_views(model, lambda p: p.detach())
    loops = [one_sample_loop(model, row) for row in ROWS]
    check_equal(got, {n: torch.stack([(g[n] * weights[n]).abs().sum() for g in loops]) for n in weights})


def test_fisher_is_the_squared_gradient_of_labels_drawn_from_the_model() -> None:
    model = tiny.model("llama")
    rows = [Row([5, 9, 4], 2)]  # one completion token: what it is drawn as is easily listed
    values = [sensitivity.per_sample(model, batches(rows), score="fisher", seed=seed) for seed in range(150)]
    name = "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        probs = model(input_ids=torch.tensor([[5, 9, 4]])).logits[0, 1].softmax(-1)
    by_token = torch.stack(
        [
            one_sample_loop(model, rows[0], labels=torch.tensor([[-100, -100, token]]))[name].square().sum()
            for token in range(40)
        ]
    )
    drawn = torch.stack([value[name][0] for value in values])
    assert torch.isclose(drawn[:, None], by_token.double()[None], rtol=1e-4).any(1).all()
    expected, spread = (probs * by_token).sum(), drawn.std() / len(drawn) ** 0.5
    assert abs(drawn.mean() - expected) < 4 * spread


@pytest.mark.parametrize("family", ["llama", "olmoe", "gpt_oss"])
def test_hutchinson_is_the_curvature_along_the_signs(family: str) -> None:
    """z·Hz of a block is the slope of z·gradient along all signs: central differences, in fp64 but for the norms."""
    model = tiny.model(family).double()
    got = sensitivity.per_sample(model, batches(ROWS[:1]), score="hutchinson", seed=4)
    blocks = sensitivity._Blocks(model, shape_for(model))
    generator = torch.Generator().manual_seed(4)
    signs = {w: torch.randint(0, 2, w.shape, generator=generator).double() * 2 - 1 for w in blocks.weights}
    slopes = []
    with blocks.differentiated():
        for step in (3e-5, -3e-5):
            with torch.no_grad():
                [w.add_(z, alpha=step) for w, z in signs.items()]
            loss = sensitivity.losses(model, next(iter(batches(ROWS[:1])))).sum()
            slopes.append(dict(zip(signs, torch.autograd.grad(loss, blocks.weights), strict=True)))
            with torch.no_grad():
                [w.sub_(z, alpha=step) for w, z in signs.items()]
    want = block_views(model, lambda p: signs[p] * (slopes[0][p] - slopes[1][p]) / 6e-5)
    assert got.keys() == want.keys()
    for name in want:
        assert abs(got[name].item() - want[name].sum()) < 1e-3 * want[name].abs().sum() + 1e-9, name


def test_hutchinson_averages_to_the_trace_of_the_hessian() -> None:
    model = tiny.model("llama").double()
    module = model.model.layers[2].self_attn.v_proj
    row, probes = Row([5, 9, 4, 7], 2), 200
    values = [
        sensitivity.per_sample(model, batches([row]), score="hutchinson", seed=seed, probes=10)
        for seed in range(probes // 10)
    ]
    draws = torch.stack([v["model.layers.2.self_attn.v_proj"][0] for v in values])

    def loss_of(weight: Tensor) -> Any:
        args = {"input_ids": torch.tensor([row.input_ids]), "labels": torch.tensor([[-100, -100, 4, 7]])}
        return torch.func.functional_call(model, {"model.layers.2.self_attn.v_proj.weight": weight}, (), args).loss

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        hessian = torch.autograd.functional.hessian(loss_of, module.weight.detach())
    trace = hessian.flatten(2).flatten(0, 1).diagonal().sum()
    assert abs(draws.mean() - trace) < 4 * draws.std() / len(draws) ** 0.5


@given(
    segments=st.integers(1, 4),
    positions=st.integers(1, 30),
    inputs=st.integers(1, 20),
    outputs=st.integers(1, 20),
    seed=st.integers(0, 100),
)
@settings(max_examples=40, deadline=None)
def test_both_forms_are_the_squared_norm(segments: int, positions: int, inputs: int, outputs: int, seed: int) -> None:
    torch.manual_seed(seed)
    a, g = torch.randn(segments, positions, inputs), torch.randn(segments, positions, outputs)
    want = torch.stack([(g[n].T @ a[n]).square().sum() for n in range(segments)])
    # A sum of positions that cancel keeps the rounding of its parts.
    atol = 1e-5 * float(a.square().sum() * g.square().sum())
    for form in (sensitivity._by_gram, sensitivity._by_gradient):
        assert torch.allclose(form(a, g), want, rtol=1e-4, atol=atol)
    weight = torch.randn(1, outputs, inputs)
    ids = torch.zeros(segments, dtype=torch.long)
    assert torch.allclose(sensitivity.squared_norms(a, g, weight, ids), want, rtol=1e-4, atol=atol)
    products = torch.stack([(g[n].T @ a[n] * weight[0]).abs().sum() for n in range(segments)])
    assert torch.allclose(sensitivity.abs_products(a, g, weight, ids), products, rtol=1e-4, atol=1e-5)


@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=20))
@settings(max_examples=40, deadline=None)
def test_segments_hold_every_row_once(counts: list[int]) -> None:
    counts_N = torch.tensor(counts)
    starts = counts_N.cumsum(0) - counts_N
    seen = []
    for ids, rows, valid in sensitivity._segments(starts, counts_N):
        for n, number in enumerate(ids.tolist()):
            mine = rows[n][valid[n]].tolist()
            assert mine == list(range(starts[number], starts[number] + counts_N[number]))
            assert 2 * len(mine) > rows.shape[1]
            seen += mine
    assert sorted(seen) == list(range(int(counts_N.sum())))


@pytest.mark.parametrize("family", ["llama", "olmoe"])
def test_batching_padding_and_recomputation_change_nothing(family: str) -> None:
    model = tiny.model(family)
    alone = sensitivity.per_sample(model, batches(batch_size=1))
    for batch_size, recompute in ((7, False), (2, True)):
        again = sensitivity.per_sample(model, batches(batch_size=batch_size), recompute=recompute)
        check_equal(again, alone, tolerance=1e-5)


def test_checkpointing_switched_on_by_the_user_changes_nothing() -> None:
    model = tiny.model("llama")
    want = sensitivity.per_sample(model, batches())
    model.train()
    model.config.use_cache = False
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
    check_equal(sensitivity.per_sample(model, batches()), want, tolerance=1e-6)
    assert model.training


@pytest.mark.parametrize("score", sensitivity.SCORES)
@pytest.mark.parametrize("family", ["llama", "olmoe"])
def test_leaves_the_model_as_it_was(family: str, score: sensitivity.Score) -> None:
    model = tiny.model(family).train()
    asking = [p for i, p in enumerate(model.parameters()) if i % 2]
    for p in model.parameters():
        p.requires_grad_(False)
    for p in asking:
        p.requires_grad_(True).grad = torch.ones_like(p)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = model.get_experts_implementation()
    sensitivity.measure(model, batches(ROWS[:2]), score=score, provenance={})
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [p for p in model.parameters() if p.requires_grad] == asking
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in asking)
    assert all(module.training for module in model.modules())
    assert model.get_experts_implementation() == before
    assert not any(
        {"forward", "sensitivity"} & set(vars(m)) or m._forward_hooks or m._forward_pre_hooks for m in model.modules()
    )


def test_no_weight_gradient_is_made_where_samples_are_short() -> None:
    model = tiny.model("llama")
    sizes = {tuple(p.shape) for n, p in model.named_parameters() if "layers" in n and p.dim() == 2}
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and not func.is_view and tuple(out.shape[-2:]) in sizes:
                made.append(tuple(out.shape))
            return out

    with Watch():
        sensitivity.per_sample(model, batches([Row([3, 4, 5, 6, 7], 3)]))
    assert not made
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("family", ["llama", "olmoe"])
def test_bf16_weights_are_measured_with_fp32_sums(family: str) -> None:
    model = tiny.model(family).bfloat16()
    got = sensitivity.per_sample(model, batches(batch_size=1))
    loops = [one_sample_loop(model, row) for row in ROWS]
    assert got["model.layers.0.self_attn.q_proj"].dtype == torch.float64
    for name in (n for n in got if "experts" not in n):  # a near tie may send a token to another expert
        want = torch.stack([g[name].square().sum() for g in loops])
        # the loop's weight gradients are rounded to bf16 and sums of the forward pass may run in another order
        assert torch.allclose(got[name].float(), want, rtol=0.1), name
    a, g = torch.randn(1, 600, 8).bfloat16(), torch.randn(1, 600, 8).bfloat16()
    exact = (g[0].double().T @ a[0].double()).square().sum()
    measured = sensitivity.squared_norms(a, g, torch.zeros(1, 8, 8), torch.zeros(1, dtype=torch.long))
    assert torch.allclose(measured.double(), exact, rtol=1e-5)


def test_an_expert_that_saw_nothing_scores_zero_and_its_row_exists() -> None:
    model = tiny.model("olmoe")
    signal = sensitivity.measure(model, batches([Row([3, 4], 1)]), provenance={"a": 1})
    rows = [signal.metric(f"model.layers.0.mlp.experts.up_proj.{e}", "sum_sq_grad")[0] for e in range(8)]
    assert 0 < sum(value == 0 for value in rows) < 8
    assert len(signal.rows) == 3 * (4 + 3 * 8)


def test_signal_sums_over_samples() -> None:
    model = tiny.model("llama")
    signal = sensitivity.measure(model, batches(), provenance={"model": "x"})
    values = sensitivity.per_sample(model, batches())
    assert (signal.kind, signal.axis, dict(signal.provenance)) == ("sensitivity", "dataset", {"model": "x"})
    assert list(signal.rows) == [m.path for m in shape_for(model).modules]
    for name, row in values.items():
        assert signal.metric(name, "sum_sq_grad") == (pytest.approx(float(row.sum())),)


def test_samples_come_back_in_the_order_they_were_given() -> None:
    model = tiny.model("llama")
    name = "model.layers.0.mlp.down_proj"
    together = sensitivity.per_sample(model, batches())[name]
    for i, row in enumerate(ROWS):
        assert sensitivity.per_sample(model, batches([row]))[name][0] == pytest.approx(float(together[i]), rel=1e-4)


def test_combining_data_sets() -> None:
    model = tiny.model("llama")
    common = {"model": "x", "score": "sum_sq_grad", "samples": 3}
    parts = [
        sensitivity.measure(model, batches(rows), provenance=common | {"task": task, "datasets": [{"task": task}]})
        for task, rows in (("a", ROWS[:3]), ("b", ROWS[3:6]))
    ]
    both = sensitivity.combine(parts)
    assert [d["task"] for d in both.provenance["datasets"]] == ["a", "b"]
    assert both.provenance["task"] == "a, b"
    for name in both.rows:
        assert both.metric(name, "sum_sq_grad") == tuple(p.metric(name, "sum_sq_grad")[0] for p in parts)
    assert (
        sensitivity.combine([both, parts[0]]).metric(name, "sum_sq_grad")[2] == parts[0].metric(name, "sum_sq_grad")[0]
    )
    other = sensitivity.measure(
        model, batches(ROWS[:2]), provenance=common | {"samples": 2, "task": "c", "datasets": [{"task": "c"}]}
    )
    with pytest.raises(StudyError, match="differ in 'samples'"):
        sensitivity.combine([parts[0], other])


def test_refusals() -> None:
    model = tiny.model("llama")
    with pytest.raises(StudyError, match="did you mean 'fisher'"):
        sensitivity.measure(model, batches(), score="fischer", provenance={})  # type: ignore[arg-type]  # refused
    with pytest.raises(StudyError, match="at least one"):
        sensitivity.measure(model, [], provenance={})
    with pytest.raises(StudyError, match="no completion token"):
        sensitivity.measure(model, batches([Row([3, 4], 2)]), provenance={})
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(StudyError, match="not finite"):
        sensitivity.measure(model, batches(), provenance={})


def test_losses_are_the_models_own() -> None:
    for family in ("gemma2", "olmoe"):  # gemma2 caps its logits after the head
        model = tiny.model(family)
        for batch in batches():
            with torch.no_grad():
                got = sensitivity.losses(model, batch)
                for i in range(len(got)):
                    real = batch["attention_mask"][i].bool()
                    ids, labels = batch["input_ids"][i][real][None], batch["labels"][i][real][None]
                    assert got[i].item() == pytest.approx(model(input_ids=ids, labels=labels).loss.item(), rel=1e-5)


def test_plan_names_everything_the_numbers_depend_on() -> None:
    model = tiny.model("llama")
    task = SimpleNamespace(data_hash="abc", num_training=len(ROWS), training_rows=lambda tokenizer, max_length: ROWS)
    task.datasets = (task,)
    source = SimpleNamespace(
        name="tiny",
        shape=None,
        dtype="float32",
        identity="sha",
        tokenizer_identity="words",
        model=model,
        tokenizer=SimpleNamespace(pad_token_id=0),
        task_name="t",
        task=task,
        samples=4,
        seed=1,
        progress=lambda done, total, what: None,
    )
    provenance, run = sensitivity.measurement_of(source)
    signal = run()
    assert dict(signal.provenance) == provenance
    assert (provenance["task"], provenance["datasets"]) == ("t", [{"task": "t", "data": "abc"}])
    assert (provenance["samples"], provenance["score"], provenance["weights"]) == (4, "sum_sq_grad", "sha")
    assert sensitivity.measurement_of(SimpleNamespace(**vars(source) | {"samples": 99}))[0]["samples"] == len(ROWS)


def test_several_data_sets_have_a_value_each_on_as_many_samples() -> None:
    few, many = ROWS[:2], ROWS
    one, two = (
        SimpleNamespace(
            label=label, data_hash=label * 2, num_training=len(rows), training_rows=lambda *_, rows=rows: rows
        )
        for label, rows in (("a", many), ("b", few))
    )
    told = []
    source = SimpleNamespace(
        name="tiny",
        shape=None,
        dtype="float32",
        identity="sha",
        tokenizer_identity="words",
        model=tiny.model("llama"),
        tokenizer=SimpleNamespace(pad_token_id=0),
        task_name="a,b",
        task=SimpleNamespace(datasets=(one, two)),
        samples=4,
        seed=1,
        progress=lambda done, total, what: told.append((total, what)),
    )
    provenance, run = sensitivity.measurement_of(source)
    signal = run()
    assert dict(signal.provenance) == provenance
    assert provenance["datasets"] == [{"task": "a", "data": "aa"}, {"task": "b", "data": "bb"}]
    assert (provenance["task"], provenance["samples"]) == ("a, b", len(few))
    assert set(told) == {(2, "samples of a"), (2, "samples of b")}
    alone = []
    for dataset in (one, two):
        single = SimpleNamespace(**vars(source) | {"task": SimpleNamespace(datasets=(dataset,)), "samples": 2})
        alone.append(sensitivity.measurement_of(single).measure())
    for block, row in signal.rows.items():
        values = [s.metric(block, "sum_sq_grad")[0] for s in alone]
        assert row["sum_sq_grad"] == pytest.approx(values)
