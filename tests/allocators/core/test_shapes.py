"""Shapes from configs: equal to the modules that transformers builds, and to the published parameter counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from allocators import all as all_experts
from allocators import sieve
from allocators.core.errors import StudyError
from allocators.core.shapes import FAMILIES, shape_from_config
from allocators.core.types import ExpertCounts, ModelShape, ModuleShape
from tests import GOLDEN
from tests.allocators import tiny
from tests.allocators.models import routing

PUBLISHED = json.loads((GOLDEN / "parameters.json").read_text())

# Typed by hand from config.json of each model.
OLMOE_1B_7B = {  # huggingface.co/allenai/OLMoE-1B-7B-0924
    "model_type": "olmoe",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
}
QWEN15_MOE_A27B = {  # huggingface.co/Qwen/Qwen1.5-MoE-A2.7B
    "model_type": "qwen2_moe",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 60,
    "decoder_sparse_step": 1,
}
LLAMA_7B = {  # huggingface.co/huggyllama/llama-7b; no num_key_value_heads: as many as heads
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


def built(family: str) -> dict[str, tuple[int, int, int, str]]:
    """(in, out, experts, role) of every module that LoRA can go on, read from the model transformers builds."""
    import torch

    model, sizes_of = tiny.model(family), {}
    for path, module in model.named_modules():
        layer_path = path.split(".", 3)[-1]  # without model.layers.N
        if path.endswith(".experts"):
            up, down = module.gate_up_proj, module.down_proj
            if getattr(module, "is_transposed", False):
                up, down = up.transpose(1, 2), down.transpose(1, 2)
            experts, twice_width, hidden = up.shape
            assert down.shape == (experts, hidden, twice_width // 2)
            for name, sizes in (("gate", (hidden, twice_width // 2)), ("up", (hidden, twice_width // 2))):
                sizes_of[f"{path}.{name}_proj"] = (*sizes, experts, "expert")
            sizes_of[f"{path}.down_proj"] = (twice_width // 2, hidden, experts, "expert")
        elif type(module).__name__.endswith(("TopKRouter", "TopkRouter")):
            experts, hidden = module.weight.shape
            sizes_of[path] = (hidden, experts, 0, "router")
        elif path.endswith("shared_expert_gate"):
            sizes_of[path] = (module.in_features, 1, 0, "shared_gate")
        elif isinstance(module, torch.nn.Linear) and path != "lm_head":
            shared = "shared" in layer_path
            role = "attention" if "self_attn" in layer_path else "shared_expert" if shared else "mlp"
            sizes_of[path] = (module.in_features, module.out_features, 0, role)
    return sizes_of


@pytest.mark.parametrize("family", sorted(tiny.MOE | tiny.DENSE))
def test_equals_what_transformers_builds(family: str) -> None:
    shape = shape_from_config(tiny.config(family), name=family)
    mine = {m.path: (m.in_features, m.out_features, m.num_experts, m.role) for m in shape.modules}
    assert mine == built(family)
    assert all(m.path.startswith(f"model.layers.{m.layer}.") for m in shape.modules)
    assert [m.layer for m in shape.modules] == sorted(m.layer for m in shape.modules)
    assert shape.is_moe == (family in tiny.MOE)


def test_every_family_is_compared() -> None:
    assert set(FAMILIES) == set(tiny.MOE | tiny.DENSE)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_defaults_are_those_of_transformers(family: str) -> None:
    """What config.json leaves out means what transformers takes it to mean; no weights are built."""
    from transformers import AutoConfig

    assert shape_from_config({"model_type": family}, name="x") == shape_from_config(
        AutoConfig.for_model(family), name="x"
    )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_saved_config_says_the_same_as_the_object(family: str, tmp_path: Path) -> None:
    config = tiny.config(family)
    config.save_pretrained(tmp_path)
    on_disk = json.loads((tmp_path / "config.json").read_text())
    assert shape_from_config(on_disk, name="x") == shape_from_config(config, name="x")


def test_dense_layers_of_moe_models() -> None:
    assert shape_from_config(tiny.config("qwen2_moe"), name="x").moe_layers == (1,)  # every second layer
    assert shape_from_config(tiny.config("qwen3_moe"), name="x").moe_layers == (0, 2)  # layer 1 is listed as dense
    deepseek = shape_from_config(tiny.config("deepseek_v3"), name="x")
    assert deepseek.moe_layers == (1, 2)
    assert {m.layer for m in deepseek.of_role("mlp")} == {0}


def test_published_counts_of_olmoe() -> None:
    shape = shape_from_config(OLMOE_1B_7B, name="OLMoE-1B-7B")
    golden = PUBLISHED["olmoe_1b_7b_r32"]
    assert all_experts.allocate(None, shape).trainable_params(shape, rank=32) == golden["all 64 experts"] == 311_459_840
    for knobs in ({"experts_kept": 16}, {"fraction": 0.25}):
        hot = sieve.allocate(routing(shape), shape, **knobs)
        assert hot.trainable_params(shape, rank=32) == golden["hot 16"] == 84_967_424


def test_published_reduction_of_qwen15_moe() -> None:
    """MoE-Sieve: 70.3 % fewer parameters at the hot quarter."""
    shape = shape_from_config(QWEN15_MOE_A27B, name="Qwen1.5-MoE-A2.7B")
    full = all_experts.allocate(None, shape).trainable_params(shape, rank=32)
    hot = sieve.allocate(routing(shape), shape).trainable_params(shape, rank=32)
    assert round(100 * (hot / full - 1), 1) == -70.3


@pytest.mark.parametrize("total", [160, 128])
def test_published_counts_of_llama_7b(total: int) -> None:
    shape = shape_from_config(LLAMA_7B, name="llama-7b")
    counts = ExpertCounts({m.path: total // 32 for m in shape.of_role("attention", "mlp")})
    assert counts.trainable_params(shape, rank=8) == PUBLISHED["llama_7b_r8"][f"T={total}"]


def test_published_count_of_one_hydra_module() -> None:
    shape = ModelShape("one", (ModuleShape("m", 0, 4, 6),), 1)
    assert ExpertCounts({"m": 3}, gating="hydra").trainable_params(shape, rank=2) == 56
    assert PUBLISHED["hydralora in=4 out=6 r=2 E=3"] == 56


def test_unknown_family_says_what_is_possible() -> None:
    with pytest.raises(StudyError, match=r"m has model_type 'gemma3', .*granitemoe, .*did you mean 'gemma"):
        shape_from_config({"model_type": "gemma3"}, name="m")
    with pytest.raises(StudyError, match="model_type 'None'"):
        shape_from_config({}, name="m")


@pytest.mark.parametrize("bad", ["4096", None, -1, 1.5, True])
def test_sizes_are_whole_numbers(bad: Any) -> None:
    with pytest.raises(StudyError, match="config of m cannot be right: hidden_size must be a whole number from 1"):
        shape_from_config({"model_type": "llama", "hidden_size": bad}, name="m")
