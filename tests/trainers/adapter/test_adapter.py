"""The door: plain LoRA, files, refusals, and that a base model comes back as it was.

python -m pytest tests/trainers/adapter/test_adapter.py
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from allocators.core.errors import InfeasibleError, StudyError, TrialError
from allocators.core.types import Allocation, ExpertCounts, ExpertSelection, LoraSettings, ModelShape
from tests.trainers.reference import (
    digest,
    every_expert,
    fill,
    logits,
    shape_of_model,
    some_experts,
    tiny_model,
    tokens,
)
from trainers.adapter import Adapters, attach, fingerprint, load, read, save
from trainers.adapter.linear import add_lora, uniform

NONE = ExpertSelection({})


LORA = LoraSettings(rank=4, lora_alpha=8.0)


def attached(model: Any, selection: ExpertSelection | None = None, **changes: Any) -> Any:
    shape = shape_of_model(model)
    lora = replace(LORA, **changes)
    return attach(model, some_experts(shape) if selection is None else selection, shape=shape, lora=lora, seed=3)


# --- plain LoRA ---


@settings(deadline=None)
@given(
    rows=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4)),
    scale=st.floats(-2, 2),
)
def test_add_lora_is_the_formula(rows: list[int], sizes: tuple[int, int, int], scale: float) -> None:
    inputs, outputs, rank = sizes
    generator = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(*s, generator=generator) for s in ((*rows, inputs), (rank, inputs), (outputs, rank)))
    out = torch.randn(*rows, outputs, generator=generator)
    torch.testing.assert_close(add_lora(out.clone(), x, a, b, scale=scale), out + scale * (x @ a.T @ b.T))


def test_add_lora_on_one_number() -> None:
    out = add_lora(
        torch.tensor([[10.0]]), torch.tensor([[2.0]]), torch.tensor([[3.0]]), torch.tensor([[5.0]]), scale=0.5
    )
    assert out.item() == 10 + 0.5 * 5 * 3 * 2


def test_start_values_depend_on_seed_and_name_alone() -> None:
    torch.manual_seed(1)
    one = uniform(4, 100, seed=0, name="q")
    torch.manual_seed(2)
    assert torch.equal(uniform(4, 100, seed=0, name="q"), one)
    assert not torch.equal(uniform(4, 100, seed=1, name="q"), one)
    assert not torch.equal(uniform(4, 100, seed=0, name="k"), one)
    assert 0.09 < one.abs().max() <= 0.1  # 1/√100


def test_an_expert_starts_the_same_whoever_else_is_chosen() -> None:
    model = tiny_model("olmoe")
    few = attached(model, ExpertSelection({0: (5,)})).state_dict()
    model.lora_adapter.detach()
    many = attached(model, ExpertSelection({0: (2, 5, 7), 1: (0,)})).state_dict()
    name = "model.layers.0.mlp.experts.up_proj.lora_A"
    assert torch.equal(few[name][0], many[name][1])
    assert torch.equal(few["model.layers.1.self_attn.k_proj.lora_A"], many["model.layers.1.self_attn.k_proj.lora_A"])


def test_attach_leaves_the_global_random_state_alone() -> None:
    model = tiny_model("olmoe")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    attached(model)
    assert torch.equal(torch.rand(3), expected)


# --- attaching and detaching ---


def test_the_base_is_frozen_and_only_the_adapter_learns() -> None:
    model = tiny_model("qwen2_moe")
    adapter = attached(model)
    assert not any(p.requires_grad for p in model.parameters())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in adapter.parameters())
    assert not any("lora" in name for name in model.state_dict())


def test_detach_restores_flags_and_is_harmless_twice() -> None:
    model = tiny_model("olmoe")
    model.lm_head.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    adapter = attached(model)
    adapter.detach()
    adapter.detach()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert not hasattr(model, "lora_adapter")


def test_two_adapters_on_one_model_are_refused() -> None:
    model = tiny_model("olmoe")
    first = attached(model)
    with pytest.raises(StudyError, match="carries an adapter already"):
        attached(model)
    first.detach()
    attached(model).detach()


def test_a_shape_that_does_not_fit_leaves_the_model_as_it_was() -> None:
    model, other = tiny_model("olmoe"), tiny_model("olmoe", hidden_size=48)
    before = digest(model)
    with pytest.raises(StudyError, match=r"q_proj is \[32, 32\] in this model, .* has \[48, 48\]"):
        attach(model, NONE, shape=shape_of_model(other), lora=LORA)
    with pytest.raises(StudyError, match=r"no module 'model\.layers\.0\.mlp\.router'"):
        attach(model, NONE, shape=shape_of_model(tiny_model("gpt_oss")), lora=LORA)
    assert digest(model) == before
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_experts_that_do_not_exist_are_refused() -> None:
    with pytest.raises(InfeasibleError, match=r"experts 0\.\.7, got 8"):
        attached(tiny_model("olmoe"), ExpertSelection({0: (8,)}))


def test_a_tensor_outside_of_the_loss_is_named() -> None:
    model = tiny_model("olmoe")
    adapter = attached(model, NONE)
    adapter.parameters()[3].grad = None
    with pytest.raises(TrialError, match=r"layers\.0\.self_attn\.q_proj\.lora_A got no gradient"):
        adapter.check_gradients()


# --- a router is no nn.Linear ---


def test_a_router_that_does_more_than_linear_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 32))

        def forward(self, hidden: Tensor) -> Tensor:
            return torch.matmul(hidden, self.weight)

    model = tiny_model("olmoe")
    model.model.layers[0].mlp.gate = Odd()
    attached(model, NONE)
    with pytest.raises(StudyError, match="this router calls matmul"):
        logits(model)


# --- files ---


def test_a_saved_adapter_gives_the_same_logits_on_another_instance(tmp_path: Path) -> None:
    adapter = attached(tiny_model("qwen2_moe"), lora_dropout=0.1)
    fill(adapter)
    save(adapter, tmp_path / "best", metadata={"accuracy": 0.5})
    again = tiny_model("qwen2_moe")
    loaded = load(again, tmp_path / "best")
    assert torch.equal(logits(again), logits(adapter.model))
    assert (loaded.allocation, loaded.lora) == (adapter.allocation, replace(LORA, lora_dropout=0.1))
    config = json.loads((tmp_path / "best" / "adapter.json").read_text())
    assert config["metadata"] == {"accuracy": 0.5}
    assert config["trainable_params"] == adapter.num_trainable
    assert config["base"]["name"] == adapter.shape.name
    assert {f.name for f in (tmp_path / "best").iterdir()} == {"adapter.json", "adapter.safetensors"}


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_settings_on_disk_are_those_that_concern_the_kind(tmp_path: Path, kind: str) -> None:
    """Older versions read them, and what they wrote is read: a setting that is younger than a file has its default."""
    model = MODELS[kind]()
    lora = LoraSettings(rank=2, lora_alpha=4.0, lora_dropout=0.1, top_k=1, balance_coef=0.5)
    adapter = attach(model, some_allocations(shape_of_model(model))[0], shape=shape_of_model(model), lora=lora, seed=3)
    save(adapter, tmp_path, metadata={})
    adapter.detach()
    config = json.loads((tmp_path / "adapter.json").read_text())
    both = {"rank": 2, "lora_alpha": 4.0, "lora_dropout": 0.1}
    assert config["settings"] == (both if kind == "moe" else {**both, "top_k": 1, "balance_coef": 0.5, "seed": 3})
    assert load(model, tmp_path).settings == adapter.settings
    model.lora_adapter.detach()
    del config["settings"]["lora_dropout"], config["checksum"]
    (tmp_path / "adapter.json").write_text(json.dumps(config))
    assert load(model, tmp_path).lora.lora_dropout == 0.0


def test_saving_works_after_merging(tmp_path: Path) -> None:
    adapter = attached(tiny_model("olmoe"))
    fill(adapter)
    expected = logits(adapter.model)
    adapter.merge()
    save(adapter, tmp_path, metadata={})
    again = tiny_model("olmoe")
    load(again, tmp_path)
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: tiny_model("mixtral"), r"is for tiny olmoe \(olmoe\), got a mixtral model"),
        (lambda: tiny_model("olmoe", intermediate_size=32), r"experts.gate_up_proj is \[8, 64, 32\] in this model"),
        (lambda: tiny_model("olmoe", num_experts=4), r"gate is \[4, 32\] in this model"),
        (lambda: tiny_model("olmoe", num_hidden_layers=1), "no module 'model.layers.1"),
        (lambda: tiny_model("olmoe", seed=1), "trained on other weights of tiny olmoe"),
    ],
    ids=["family", "width", "experts", "layers", "weights"],
)
def test_loading_onto_another_base_is_refused(tmp_path: Path, other: Callable[[], Any], message: str) -> None:
    save(attached(tiny_model("olmoe")), tmp_path, metadata={})
    model = other()
    before = digest(model)
    with pytest.raises(StudyError, match=message):
        load(model, tmp_path)
    assert digest(model) == before
    assert not hasattr(model, "lora_adapter")


def test_a_folder_without_an_adapter_or_with_a_damaged_one(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    with pytest.raises(StudyError, match="no adapter in"):
        load(model, tmp_path / "nothing")
    adapter = attached(model)
    save(adapter, tmp_path, metadata={})
    adapter.detach()
    whole = (tmp_path / "adapter.safetensors").read_bytes()
    (tmp_path / "adapter.safetensors").write_bytes(whole[:100])
    with pytest.raises(StudyError, match="is damaged"):
        load(model, tmp_path)


@pytest.mark.parametrize("name", ["adapter.json", "adapter.safetensors"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "list"])
def test_what_is_no_file_of_an_adapter_is_one_line(name: str, kind: str, tmp_path: Path) -> None:
    save(attached(tiny_model("olmoe")), tmp_path, metadata={})
    (tmp_path / name).unlink()
    make: dict[str, Callable[[Path], object]] = {"folder": Path.mkdir, "pipe": os.mkfifo}
    make.get(kind, lambda path: path.write_text("[]"))(tmp_path / name)
    with pytest.raises(StudyError, match="is damaged: ") as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["format", "allocation", "settings", "shape"])
@pytest.mark.parametrize("value", [None, 5, "x", [], {}])
def test_adapter_json_of_another_form_is_one_line(key: str, value: object, tmp_path: Path) -> None:
    """Without the checksum, as an earlier version wrote it."""
    save(attached(tiny_model("olmoe")), tmp_path, metadata={})
    file = tmp_path / "adapter.json"
    config = json.loads(file.read_text())
    del config["checksum"]
    file.write_text(json.dumps(config | {key: value}))
    with pytest.raises(StudyError, match="has format" if key == "format" else "is damaged: ") as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match=r"cannot save the adapter in .*file"):
        save(attached(tiny_model("olmoe")), tmp_path / "file", metadata={})


def test_a_bit_that_flipped_on_the_disk_is_noticed(tmp_path: Path) -> None:
    save(attached(tiny_model("olmoe")), tmp_path, metadata={})
    for name in ("adapter.safetensors", "adapter.json"):
        whole = (tmp_path / name).read_bytes()
        flipped = bytearray(whole)
        place = whole.index(b"olmoe") if name.endswith("json") else len(whole) - 10
        flipped[place] ^= 1
        (tmp_path / name).write_bytes(flipped)
        with pytest.raises(StudyError, match="is damaged: its checksum is another"):
            read(tmp_path)
        (tmp_path / name).write_bytes(whole)
    read(tmp_path)


def test_weights_of_another_rank_or_allocation_do_not_fit() -> None:
    adapter = attached(tiny_model("olmoe"))
    values = adapter.state_dict()
    other = attached(tiny_model("olmoe"), every_expert(adapter.shape))
    with pytest.raises(StudyError, match="exist on one side only"):
        other.load_state_dict(values)
    other = attached(tiny_model("olmoe"), rank=2)
    with pytest.raises(StudyError, match=r"is \[4, 32\], this allocation and rank need \[2, 32\]"):
        other.load_state_dict(values)


def test_the_fingerprint_is_of_the_checkpoint_not_of_its_dtype() -> None:
    model = tiny_model("olmoe")
    before = fingerprint(model)
    assert fingerprint(tiny_model("olmoe").to(torch.bfloat16)) == before
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.mul_(1.01)
    assert fingerprint(model) != before


def test_an_adapter_is_loaded_from_a_uri(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    adapter = attached(model)
    fill(adapter)
    save(adapter, tmp_path / "best", metadata={})
    expected = logits(model)
    adapter.detach()
    load(model, (tmp_path / "best").as_uri())
    assert torch.equal(logits(model), expected)
    with pytest.raises(StudyError, match="no adapter in file://"):
        read((tmp_path / "nothing").as_uri())


def test_weights_that_are_not_those_of_the_allocation_are_refused_without_a_model(tmp_path: Path) -> None:
    adapter = attached(tiny_model("olmoe"))
    save(adapter, tmp_path, metadata={})
    assert sum(tensor.numel() for tensor in read(tmp_path).weights.values()) == adapter.num_trainable
    config = json.loads((tmp_path / "adapter.json").read_text())
    config["settings"]["rank"] += 1
    (tmp_path / "adapter.json").write_text(json.dumps(config))
    with pytest.raises(StudyError, match=f"holds {adapter.num_trainable:,} values, its allocation"):
        read(tmp_path)


# --- several adapters on one base ---


def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, initializer_range=0.15, **sizes)).eval()


# a base, its digest, folders of adapters, and the logits by adapter
Several = tuple[Any, str, dict[str, Path], dict[str | None, Tensor]]

MODELS = {"moe": lambda: tiny_model("gpt_oss"), "dense": tiny_llama}


def some_allocations(shape: ModelShape) -> tuple[Allocation, Allocation, Allocation]:
    """Three that differ in what they adapt, the last as little as there can be."""
    if shape.is_moe:
        return some_experts(shape), every_expert(shape), NONE
    paths = [m.path for m in shape.modules]
    return ExpertCounts(dict.fromkeys(paths, 3), "hydra"), ExpertCounts(dict.fromkeys(paths[::2], 2)), ExpertCounts({})


@pytest.fixture(scope="module", params=MODELS)
def several(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Several:
    """A base, its digest, folders of three adapters, and the logits that each gives alone (None: the base)."""
    model = MODELS[request.param]()
    shape = shape_of_model(model)
    folders: dict[str, Path] = {}
    expected: dict[str | None, Tensor] = {None: logits(model)}
    for seed, allocation in enumerate(some_allocations(shape)):
        lora = LoraSettings(rank=2 + seed, lora_alpha=4.0, balance_coef=0.1)
        adapter = attach(model, allocation, shape=shape, lora=lora)
        fill(adapter, seed=seed)
        name = f"a{seed}"
        folders[name] = tmp_path_factory.mktemp(name)
        save(adapter, folders[name], metadata={})
        expected[name] = logits(model)
        adapter.detach()
    return model, digest(model), folders, expected


@settings(deadline=None, max_examples=20)
@given(turns=st.lists(st.sampled_from([None, "a0", "a1", "a2"]), max_size=6))
def test_any_switching_gives_each_adapter_alone_and_the_base_bit_for_bit(
    several: Several, turns: list[str | None]
) -> None:
    model, before, folders, expected = several
    flags = [p.requires_grad for p in model.parameters()]
    adapters = Adapters(model, folders)
    assert adapters.active_adapter == "a0"
    for name in turns:
        adapters.set_adapter(name)
        assert adapters.active_adapter == name
        assert torch.equal(logits(model), expected[name])
        with adapters.disable_adapter():
            assert torch.equal(logits(model), expected[None])
        assert torch.equal(logits(model), expected[name])
    adapters.set_adapter(None)
    assert digest(model) == before
    assert [p.requires_grad for p in model.parameters()] == flags


def test_switching_loads_and_copies_nothing(
    several: Several,
) -> None:
    model, _, folders, _ = several
    adapters = Adapters(model, folders)
    places = {name: [p.data_ptr() for p in adapters[name].parameters()] for name in adapters.names}
    base = [p.data_ptr() for p in model.parameters()]
    for name in ("a1", "a0", None, "a1", None):
        adapters.set_adapter(name)
    assert {name: [p.data_ptr() for p in adapters[name].parameters()] for name in adapters.names} == places
    assert [p.data_ptr() for p in model.parameters()] == base


def test_adapters_are_added_and_deleted_by_name(
    several: Several,
) -> None:
    model, before, folders, expected = several
    adapters = Adapters(model, {})
    assert adapters.active_adapter is None
    adapters.load_adapter(folders["a0"], "one")
    assert torch.equal(logits(model), expected[None])
    adapters.set_adapter("one")
    adapters.load_adapter(folders["a1"], "two")
    assert adapters.names == ("one", "two")
    assert torch.equal(logits(model), expected["a0"])
    with pytest.raises(StudyError, match="'one' is loaded already"):
        adapters.load_adapter(folders["a1"], "one")
    with pytest.raises(StudyError, match="unknown adapter 'on': choose from one, two; did you mean 'one'"):
        adapters.set_adapter("on")
    with pytest.raises(StudyError, match="no adapter in"):
        adapters.load_adapter(folders["a1"] / "nothing", "three")
    assert torch.equal(logits(model), expected["a0"])
    adapters.delete_adapter("two")
    assert torch.equal(logits(model), expected["a0"])
    adapters.delete_adapter("one")
    assert adapters.names == ()
    assert digest(model) == before


def test_a_reattached_adapter_learns_as_before() -> None:
    def gradients(model: Any) -> dict[str, Tensor]:
        model(tokens()).logits.square().sum().backward()
        return {name: p.grad.clone() for name, p in model.lora_adapter.named_parameters()}

    first = attached(tiny_model("olmoe"))
    fill(first)
    expected = gradients(first.model)
    second = attached(tiny_model("olmoe"))
    fill(second)
    second.detach()
    second.reattach()
    learned = gradients(second.model)
    assert all(torch.equal(learned[name], expected[name]) for name in expected)


def test_what_cannot_be_reattached() -> None:
    model = tiny_model("olmoe")
    adapter = attached(model)
    with pytest.raises(StudyError, match="carries an adapter already"):
        adapter.reattach()
    adapter.merge()
    with pytest.raises(StudyError, match="was merged into"):
        adapter.reattach()
