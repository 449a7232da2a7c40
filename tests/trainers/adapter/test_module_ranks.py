"""Plain LoRA with a rank for every module: counts, the formula, what must not change, files, PEFT's form.

python -m pytest tests/trainers/adapter/test_module_ranks.py
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from allocators.core.errors import InfeasibleError, StudyError, TrialError
from allocators.core.types import ExpertSelection, LoraSettings, ModelShape, ModuleRanks, allocation_from_json
from tests.trainers.adapter.test_adapter import tiny_llama
from tests.trainers.reference import FAMILIES, digest, fill, gradient, logits, shape_of_model, tiny_model, tokens
from trainers.adapter import attach, load, read, save
from trainers.adapter.peft_format import refusal, write

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
LORA = LoraSettings(rank=3, lora_alpha=6.0)
MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    **{family: partial(tiny_model, family) for family in FAMILIES},
}
models = pytest.mark.parametrize("name", MODELS)


def some_ranks(shape: ModelShape, *, seed: int = 0, most: int = 5) -> ModuleRanks:
    """Zero for about a third; some expert has no rank in any projection, some projection none in any expert."""
    draw = random.Random(seed)
    ranks = {m.path: draw.choice([0, draw.randint(1, most), most]) for m in shape.modules if not m.num_experts}
    experts = {
        m.path: tuple(draw.choice([0, draw.randint(1, most), most]) if e != 3 else 0 for e in range(m.num_experts))
        for m in shape.modules
        if m.num_experts and not (m.layer == 0 and m.name == "up_proj")
    }
    return ModuleRanks(ranks, experts)


def only_experts(shape: ModelShape) -> ModuleRanks:
    """In one layer, down alone, and of one expert."""
    m = next(m for m in reversed(shape.modules) if m.name == "down_proj" and m.num_experts)
    return ModuleRanks({}, {m.path: (0, 0, 7, *[0] * (m.num_experts - 3))})


def attached(model: Any, allocation: ModuleRanks | None = None, **changes: Any) -> Any:
    shape = shape_of_model(model)
    lora = LoraSettings(**({"rank": 3, "lora_alpha": 6.0} | changes))
    return attach(model, allocation or some_ranks(shape), shape=shape, lora=lora, seed=3)


def run_every_row(adapter: Any) -> None:
    """As on a GPU: no rows are picked."""
    for lora in adapter.experts.values():
        lora.every_row = True


def summed_weights(
    model: Any, allocation: ModuleRanks, factors: dict[str, Tensor], *, scale: float
) -> dict[str, Tensor]:
    """Parameter name → W + scale·B·A, module by module and expert by expert, differentiable in the factors."""
    base = {name: p.detach() for name, p in model.named_parameters()}
    adapted: dict[str, Tensor] = {}
    transposed = model.config.model_type == "gpt_oss"  # and gate and up in alternating columns
    for spec in shape_of_model(model).modules:
        if f"{spec.path}.lora_A" not in factors:
            continue
        a, b = factors[f"{spec.path}.lora_A"], factors[f"{spec.path}.lora_B"]
        if not spec.num_experts:
            name = f"{spec.path}.weight"
            adapted[name] = base[name] + scale * (b @ a)
            continue
        stack = spec.path.rpartition(".")[0] + (".down_proj" if spec.name == "down_proj" else ".gate_up_proj")
        width, first = spec.out_features, 0
        outputs = torch.arange(width)
        if spec.name != "down_proj":
            place = int(spec.name == "up_proj")
            outputs = torch.arange(place, 2 * width, 2) if transposed else outputs + place * width
        whole = torch.zeros_like(base[stack])
        for expert, rank in enumerate(allocation.of(spec)):
            delta = scale * (b[:, first : first + rank] @ a[first : first + rank])
            first += rank
            if transposed:
                whole[expert, :, outputs] = delta.t()
            else:
                whole[expert, outputs, :] = delta
        adapted[stack] = adapted.get(stack, base[stack]) + whole
    return adapted


# --- counts and exactness


@models
@pytest.mark.parametrize("seed", [0, 1])
def test_trainable_parameters_are_as_counted(name: str, seed: int) -> None:
    model = MODELS[name]()
    shape = shape_of_model(model)
    chosen = some_ranks(shape, seed=seed)
    adapter = attached(model, chosen)
    assert adapter.num_trainable == chosen.trainable_params(shape) == chosen.trainable_params(shape, rank=99) > 0
    by_hand = sum((m.in_features + m.out_features) * sum(chosen.of(m)) for m in shape.modules)
    assert adapter.num_trainable == by_hand
    assert not any(p.requires_grad for p in model.parameters())


@models
@pytest.mark.parametrize(("every_row", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_a_fresh_adapter_changes_nothing_bit_for_bit(name: str, every_row: bool, dtype: torch.dtype) -> None:
    model = MODELS[name]().to(dtype)
    before, expected = digest(model), logits(model)
    adapter = attached(model)
    if every_row:
        run_every_row(adapter)
    assert torch.equal(logits(model), expected)
    fill(adapter)
    assert not torch.equal(logits(model), expected)
    adapter.detach()
    assert digest(model) == before


# --- the formula


@models
@pytest.mark.parametrize(("every_row", "allocate"), [(False, some_ranks), (True, some_ranks), (False, only_experts)])
def test_forward_and_gradients_are_those_of_the_summed_weights(name: str, every_row: bool, allocate: Any) -> None:
    if allocate is only_experts and name == "llama":
        pytest.skip("a dense model")
    model = MODELS[name]()
    chosen = allocate(shape_of_model(model))
    adapter = attached(model, chosen)
    fill(adapter)
    if every_row:
        run_every_row(adapter)
    out = model(tokens()).logits
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    out.backward(weight)
    adapter.check_gradients()

    reference = MODELS[name]()
    if name != "llama":
        reference.set_experts_implementation("eager")
    factors = {n: p.detach().clone().requires_grad_() for n, p in adapter.named_parameters()}
    weights = summed_weights(reference, chosen, factors, scale=2.0)  # 6/3 whatever a module's rank
    expected = torch.func.functional_call(reference, weights, (tokens(),)).logits
    expected.backward(weight)
    torch.testing.assert_close(out, expected, **CLOSE)
    for n, parameter in adapter.named_parameters():
        wanted = gradient(factors[n])
        size = wanted.abs().max()
        torch.testing.assert_close(gradient(parameter) / size, wanted / size, **CLOSE, msg=partial("{}{}".format, n))


def test_one_rank_everywhere_is_the_other_adapter_bit_for_bit() -> None:
    """The same start values and the same arithmetic as a selection of every expert, router included."""
    model = tiny_model("olmoe")
    shape = shape_of_model(model)
    every = {layer: tuple(range(shape.experts_in(layer))) for layer in shape.moe_layers}
    other = attach(model, ExpertSelection(every), shape=shape, lora=LORA, seed=3)
    starts = other.state_dict()
    other.detach()
    plain = {m.path: 3 for m in shape.modules if not m.num_experts}
    adapter = attached(model, ModuleRanks(plain, {m.path: (3,) * 8 for m in shape.of_role("expert")}))
    for name, value in adapter.state_dict().items():
        assert torch.equal(value.flatten(), starts[name].flatten()), name
    results = []
    for k, tensors in enumerate((adapter, other)):
        generator = torch.Generator().manual_seed(0)
        if k:
            adapter.detach()
            other.reattach()
        with torch.no_grad():
            for name, parameter in tensors.named_parameters():
                drawn = torch.randn(parameter.numel(), generator=generator)
                stacked = "experts" in name and name.endswith("lora_B")
                if stacked and not k:  # [O, E·r] and [E, O, r]
                    drawn = drawn.view(8, -1, 3).transpose(0, 1)
                parameter.copy_(drawn.reshape(parameter.shape) * 0.1)
        results.append(logits(model))
    assert torch.equal(results[0], results[1])


def test_an_expert_without_a_gradient_is_named() -> None:
    adapter = attached(tiny_model("olmoe"))
    adapter.model(tokens()).logits.sum().backward()
    for pair in adapter.experts[1].pairs.values():
        for parameter in pair:
            parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(TrialError, match=r"expert \d+ of layer 1 received \d+ tokens but its LoRA no gradient"):
        adapter.check_gradients()


@pytest.mark.parametrize("name", ["llama", "olmoe"])
def test_dropout_leaves_evaluation_alone_and_keeps_the_mean(name: str) -> None:
    model = MODELS[name]()
    adapter = attached(model, lora_dropout=0.5)
    fill(adapter, std=0.01)
    expected = logits(model)
    adapter.detach()
    base = logits(model)
    adapter.reattach()
    model.train()
    drawn = torch.stack([logits(model) for _ in range(60)])
    model.eval()
    assert torch.equal(logits(model), expected)
    assert drawn[0].ne(drawn[1]).any()
    assert (drawn.mean(0) - expected).norm() < 0.5 * (expected - base).norm()


# --- files, merging, PEFT


@models
def test_saved_loaded_merged_and_taken_off(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    adapter = attached(model, lora_dropout=0.1)
    fill(adapter)
    expected = logits(model)
    save(adapter, tmp_path, metadata={})
    config = json.loads((tmp_path / "adapter.json").read_text())
    assert allocation_from_json(config["allocation"]) == adapter.allocation
    assert config["settings"] == {"rank": 3, "lora_alpha": 6.0, "lora_dropout": 0.1}
    again = MODELS[name]()
    before = digest(again)
    loaded = load(again, tmp_path)
    assert torch.equal(logits(again), expected)
    loaded.detach()
    assert digest(again) == before
    loaded.reattach()
    loaded.merge()
    torch.testing.assert_close(logits(again), expected, **CLOSE)


@models
def test_loaded_back_by_peft(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model = MODELS[name]()
    shape, before = shape_of_model(model), digest(model)
    adapter = attached(model)
    fill(adapter)
    save(adapter, tmp_path / "ours", metadata={})
    expected = logits(model)
    adapter.detach()
    saved = read(tmp_path / "ours")
    written = write(model, saved, tmp_path / "peft", base="a/base")
    assert digest(model) == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        if shape.is_moe:  # of keys that name parameters, which are not ignored
            warnings.filterwarnings("ignore", message=".*keys did not match any targeted module")
        wrapped = PeftModel.from_pretrained(model, tmp_path / "peft")
    torch.testing.assert_close(logits(wrapped), expected, **CLOSE)
    assert sum(p.numel() for n, p in wrapped.named_parameters() if "lora_" in n) == written.stored >= written.trained
    assert written.trained == adapter.num_trainable
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    ranks = {path: config["rank_pattern"].get(path, config["r"]) for path in config["target_modules"]}
    chosen = adapter.allocation
    assert isinstance(chosen, ModuleRanks)
    if name == "llama":
        assert ranks == dict(chosen.ranks)
        assert written.stored == written.trained
    assert config["rank_pattern"].keys() == config["alpha_pattern"].keys()
    assert {config["alpha_pattern"][p] / r for p, r in config["rank_pattern"].items()} == {2.0}
    assert config["lora_alpha"] / config["r"] == 2.0
    wrapped.unload()


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 10**6))
def test_any_ranks_on_a_dense_model_survive_peft(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    from peft import PeftModel

    model, folder = tiny_llama(), tmp_path_factory.mktemp("ranks")
    chosen = some_ranks(shape_of_model(model), seed=seed, most=9)
    adapter = attached(model, chosen, lora_alpha=5.0)
    fill(adapter)
    save(adapter, folder / "ours", metadata={})
    expected = logits(model)
    adapter.detach()
    write(model, read(folder / "ours"), folder / "peft", base="a/base")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(model, folder / "peft")), expected, **CLOSE)


def test_nothing_at_all_has_no_peft_form(tmp_path: Path) -> None:
    model = tiny_llama()
    empty = attach(model, ModuleRanks({}), shape=shape_of_model(model), lora=LORA)
    assert empty.num_trainable == 0
    save(empty, tmp_path, metadata={})
    empty.detach()
    assert refusal(read(tmp_path)) == "it adapts no module, and a PEFT adapter has at least one target"
    with pytest.raises(StudyError, match="has no PEFT form"):
        write(model, read(tmp_path), tmp_path / "peft", base="a/base")


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        (ModuleRanks({"model.layers.0.self_attn.x_proj": 1}), "has no module 'model.layers.0.self_attn.x_proj'"),
        (ModuleRanks({"model.layers.0.mlp.experts.up_proj": 1}), "is a stack of 8 experts: give `experts` 8 ranks"),
        (ModuleRanks({}, {"model.layers.0.mlp.experts.up_proj": (1, 2)}), "has 8 experts, got 2 ranks"),
        (ModuleRanks({}, {"model.layers.0.self_attn.q_proj": (1,)}), "is no stack of experts"),
    ],
)
def test_ranks_that_do_not_fit_the_model_are_refused(ranks: ModuleRanks, said: str) -> None:
    model = tiny_model("olmoe")
    with pytest.raises(InfeasibleError, match=said):
        attach(model, ranks, shape=shape_of_model(model), lora=LORA)
    assert not hasattr(model, "lora_adapter")
