"""Routing against an obvious recount from the routers' own logits, on tiny random models of every family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from allocators.core.errors import InfeasibleError, StudyError
from allocators.core.shapes import shape_from_config
from allocators.core.types import Signal
from allocators.signals.routing import measure, pad
from tests.allocators import tiny

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15, 16, 17, 18, 19], [20, 21], [22, 23, 24, 25, 26, 27]]


def signal_of(model: Any, *, prompts: Sequence[Sequence[int]] = PROMPTS, batch_size: int = 16) -> Signal:
    return measure(model, pad(prompts, pad_token_id=0, batch_size=batch_size), provenance={"test": True})


def recount(model: Any, prompts: Sequence[Sequence[int]]) -> dict[int, tuple[list[int], list[float]]]:
    """One prompt at a time, no padding, one token and one choice at a time, from what each router returns."""
    config, seen = model.config, {}
    for name, module in model.named_modules():
        if type(module).__name__.lower().endswith("topkrouter"):
            layer = int(name.split(".")[2])
            seen[layer] = ([0] * module.num_experts, [0.0] * module.num_experts)

            def look(router: Any, arguments: Any, output: Any, layer: int = layer) -> None:
                logits = output[0].double()
                count, mass = seen[layer]
                if config.model_type.startswith("deepseek"):  # groups and sigmoids: take its own word for the choice
                    chosen, weights = output[2], output[1]
                else:
                    normalised = config.model_type not in ("olmoe", "qwen2_moe")
                    chosen = logits.argsort(dim=1, descending=True)[:, : config.num_experts_per_tok]
                    weights = logits.softmax(dim=1).gather(1, chosen)
                    weights = weights / weights.sum(dim=1, keepdim=True) if normalised else weights
                for ids, gates in zip(chosen.tolist(), weights.tolist(), strict=True):
                    for expert, gate in zip(ids, gates, strict=True):
                        count[expert] += 1
                        mass[expert] += gate

            module.register_forward_hook(look)
    with torch.no_grad():
        for prompt in prompts:
            model(input_ids=torch.tensor([prompt]))
    return seen


@pytest.mark.parametrize("family", sorted(tiny.MOE))
def test_equals_an_obvious_recount(family: str) -> None:
    signal = signal_of(tiny.model(family))
    expected = recount(tiny.model(family), PROMPTS)
    assert set(signal.rows) == {str(n) for n in expected}
    for layer, (count, mass) in expected.items():
        assert signal.metric(layer, "count") == tuple(count)
        assert signal.metric(layer, "mass") == pytest.approx(mass, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("family", sorted(tiny.MOE))
def test_rows_fit_the_shape_and_every_pick_is_counted(family: str) -> None:
    model = tiny.model(family)
    shape, signal = shape_from_config(model.config, name=family), signal_of(model)
    assert set(signal.rows) == {str(n) for n in shape.moe_layers}
    picks = model.config.num_experts_per_tok * sum(len(p) for p in PROMPTS)
    for layer in shape.moe_layers:
        assert len(signal.metric(layer, "count")) == shape.experts_in(layer)
        assert sum(signal.metric(layer, "count")) == picks
    assert (signal.kind, signal.axis, signal.unit, dict(signal.provenance)) == (
        "routing",
        "expert",
        "tokens",
        {"test": True},
    )


def close(a: Signal, b: Signal) -> bool:
    same_counts = all(a.metric(n, "count") == b.metric(n, "count") for n in a.rows)
    return same_counts and all(a.metric(n, "mass") == pytest.approx(b.metric(n, "mass"), rel=1e-4) for n in a.rows)


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "gpt_oss"])
def test_padding_and_batch_size_change_nothing(family: str) -> None:
    model = tiny.model(family)
    whole = signal_of(model)
    assert close(whole, signal_of(model, batch_size=1))
    assert close(whole, signal_of(model, batch_size=2))
    assert close(whole, signal_of(model, prompts=PROMPTS[::-1], batch_size=3))
    left = [
        {
            "input_ids": torch.tensor([[0] * (9 - len(p)) + p for p in PROMPTS]),
            "attention_mask": torch.tensor([[0] * (9 - len(p)) + [1] * len(p) for p in PROMPTS]),
        }
    ]
    assert close(whole, measure(model, left, provenance={"test": True}))


def test_twice_the_data_is_twice_the_tokens() -> None:
    model = tiny.model("olmoe")
    once, twice = signal_of(model), signal_of(model, prompts=PROMPTS * 2)
    for layer in once.rows:
        assert [2 * c for c in once.metric(layer, "count")] == list(twice.metric(layer, "count"))


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, torch.bfloat16) for family in sorted(tiny.MOE)), ("olmoe", torch.float16)]
)
def test_half_precision_models_are_measured_in_fp32(family: str, dtype: torch.dtype) -> None:
    """Equal, to the last bit, to the routing of the fp32 model that holds the same rounded weights."""
    half = tiny.model(family).to(dtype)
    before = {name: p.data_ptr() for name, p in half.named_parameters()}
    measured = signal_of(half)
    assert {name: p.data_ptr() for name, p in half.named_parameters()} == before
    assert {p.dtype for p in half.parameters()} == {dtype}
    assert measured == signal_of(half.float())


def test_bf16_alone_would_route_elsewhere() -> None:
    """Why: the same recount on the bf16 model's own routers moves tokens."""
    half = tiny.model("olmoe").bfloat16()
    prompts = [[(7 * i + j) % 38 + 2 for j in range(24)] for i in range(16)]
    moved = recount(tiny.model("olmoe").bfloat16(), prompts)
    exact = signal_of(half, prompts=prompts)
    assert any(tuple(moved[n][0]) != exact.metric(n, "count") for n in moved)


def test_the_model_comes_back_as_it_was() -> None:
    model = tiny.model("olmoe")
    model.train()
    model.model.layers[1].eval()
    modes = {name: m.training for name, m in model.named_modules()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    signal_of(model)
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_failing_batch_leaves_no_hook_and_no_cast_weight_behind() -> None:
    model = tiny.model("olmoe").bfloat16()
    mask = torch.ones(1, 3, dtype=torch.long)
    too_large = [{"input_ids": torch.tensor([[1, 2, 10**6]]), "attention_mask": mask}]
    with pytest.raises(IndexError):
        measure(model, too_large, provenance={})
    model.model.layers[1].mlp.gate.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # in the middle of a layer whose weights are cast
        measure(model, [{"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": mask}], provenance={})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()) == 1


def test_a_dense_model_has_no_routing() -> None:
    with pytest.raises(StudyError, match="LlamaForCausalLM has no routed experts"):
        signal_of(tiny.model("llama"))


def test_no_tokens_is_an_error() -> None:
    with pytest.raises(StudyError, match="at least one sample"):
        signal_of(tiny.model("olmoe"), prompts=[])


def test_pad_keeps_every_prompt_and_little_padding() -> None:
    batches = list(pad(PROMPTS, pad_token_id=99, batch_size=2))
    assert [tuple(b["input_ids"].shape) for b in batches] == [(2, 7), (2, 5), (1, 2)]
    rows = [row[mask.bool()].tolist() for b in batches for row, mask in zip(*b.values(), strict=True)]
    assert sorted(rows) == sorted(PROMPTS)
    assert all(b["input_ids"][b["attention_mask"] == 0].eq(99).all() for b in batches)


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_reap_and_ean_equal_a_loop_over_tokens_and_choices(family: str) -> None:
    """Every choice alone through the experts' own forward with gate 1; then the means, by hand."""
    model = tiny.model(family)
    picks: dict[int, list[Any]] = {}
    model.set_experts_implementation("eager")
    experts = {int(n.split(".")[2]): m for n, m in model.named_modules() if n.endswith(".experts")}
    for layer, module in experts.items():
        module.register_forward_pre_hook(lambda _m, args, layer=layer: picks.setdefault(layer, []).append(args))
    with torch.no_grad():
        for prompt in PROMPTS:
            model(input_ids=torch.tensor([prompt]))
    seen = {layer: list(calls) for layer, calls in picks.items()}
    signal = signal_of(tiny.model(family))
    for layer, module in experts.items():
        norms: dict[int, list[tuple[float, float]]] = {e: [] for e in range(module.num_experts)}
        for hidden, index, weight in seen[layer]:
            for token, (ids, gates) in enumerate(zip(index.tolist(), weight.tolist(), strict=True)):
                for expert, gate in zip(ids, gates, strict=True):
                    with torch.no_grad():
                        alone = module(hidden[token : token + 1], torch.tensor([[expert]]), torch.ones(1, 1))
                    norms[expert].append((float(alone.norm()), gate))
        reap = [sum(n * g for n, g in of) / max(len(of), 1) for of in norms.values()]
        ean = [sum(n for n, _ in of) / max(len(of), 1) for of in norms.values()]
        assert signal.metric(layer, "reap") == pytest.approx(reap, rel=1e-4, abs=1e-9)
        assert signal.metric(layer, "ean") == pytest.approx(ean, rel=1e-4, abs=1e-9)


def test_experts_that_cannot_show_their_outputs_have_counts_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = signal_of(tiny.model("olmoe"))
    monkeypatch.setattr("allocators.signals.routing.on_grouped_mm", lambda *_: [])
    without = signal_of(tiny.model("olmoe"))
    assert close(expected, without)
    with pytest.raises(InfeasibleError, match="has no reap"):
        without.metric(0, "reap")
