"""Every family of models through everything that is done to a base: load, measure, allocate, train, detach, merge.

python -m pytest tests/trainers/models/test_families.py            # the families that the papers and most users have
python -m pytest tests/trainers/models/test_families.py -m slow    # all others, whose sizes are read from their classes

Tiny random models, saved as their makers save them and loaded by `trainers.models`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from allocators import sieve
from allocators.core import shapes
from allocators.core.errors import StudyError
from allocators.core.types import ExpertCounts, ExpertSelection, LoraSettings
from allocators.signals import routing
from tests.trainers import reference
from tests.trainers.conftest import char_tokenizer
from trainers import adapter as adapters
from trainers import models

_MOE = {"num_local_experts": 8, "moe_intermediate_size": 16, "intermediate_size": 32}
_DEEP = {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
_LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_DELTA = {
    "num_experts": 8,
    "shared_expert_intermediate_size": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

# MoE families that allocators/core/shapes.py does not list: model_type -> what its config needs
OTHER_MOE: dict[str, dict[str, Any]] = {
    "afmoe": {"num_experts": 8, "num_dense_layers": 1, "num_shared_experts": 1, "head_dim": 8},
    "cohere2_moe": {"num_experts": 8, "num_shared_experts": 1, "head_dim": 8},
    "deepseek_v32": _DEEP | _LATENT | {"index_topk": 8, "index_n_heads": 2, "index_head_dim": 8},
    "dots1": _DEEP | {"head_dim": 8},
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "exaone_moe": {
        "num_experts": 8,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
    },
    "flex_olmo": {"num_experts": 8},
    "glm4_moe": _DEEP | {"head_dim": 8},
    "glm4_moe_lite": _DEEP | _LATENT,
    "granitemoe_swa": {"num_local_experts": 8, "shared_intermediate_size": 24},
    "granitemoehybrid": {
        "num_local_experts": 8,
        "shared_intermediate_size": 24,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
    },
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2, "head_dim": 8},
    "hy_v3": {"num_experts": 8, "num_shared_experts": 1, "head_dim": 8, "first_k_dense_replace": 1},
    "lfm2_moe": {"num_experts": 8, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "mellum": {"num_experts": 8, "head_dim": 8},
    "mimo_v2_flash": {"n_routed_experts": 8, "head_dim": 8, "v_head_dim": 8, "n_group": 2, "topk_group": 1},
    "minimax": {"num_local_experts": 8, "head_dim": 8, "layer_types": ["full_attention", "full_attention"]},
    "minimax_m2": {"num_local_experts": 8, "head_dim": 8},
    "phimoe": {"num_local_experts": 8},
    "qwen3_5_moe_text": _DELTA | {"head_dim": 8},
    "qwen3_next": _DELTA | {"head_dim": 8, "decoder_sparse_step": 1},
    "solar_open": {"n_routed_experts": 8, "n_shared_experts": 1, "head_dim": 8, "n_group": 2, "topk_group": 1},
}

DENSE: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8},
}
OTHER_DENSE: dict[str, dict[str, Any]] = {
    "arcee": {},
    "cohere2": {},
    "glm4": {"head_dim": 8},
    "granite": {},
    "olmo2": {},
    "phi3": {},  # q, k and v are one matrix, gate and up another
    "phi": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
}


def cases(*named: tuple[dict[str, Any], bool]) -> list[Any]:
    return [
        pytest.param(family, changes, id=family, marks=[pytest.mark.slow] if slow else [])
        for families, slow in named
        for family, changes in families.items()
    ]


def saved_model(family: str, changes: dict[str, Any], folder: Path) -> str:
    """A tiny random model of a family with a tokenizer, in a folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    known = vars(type(AutoConfig.for_model(family))())  # a family takes those of the common sizes that it has
    sizes = {key: value for key, value in (reference._COMMON | _MOE).items() if key in known}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(sizes | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers starts them at zero, where a forgotten bias would not show
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    char_tokenizer().save_pretrained(folder)
    return str(folder)


def loss_of(model: Any) -> torch.Tensor:
    ids = reference.tokens()
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def step(model: Any, adapter: adapters.Adapter) -> tuple[float, float]:
    """Loss before and after one optimiser step."""
    model.train()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=3e-3)
    before = loss_of(model)
    before.backward()
    adapter.check_gradients()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        return before.item(), loss_of(model).item()


def walk(name: str, allocation: Any, folder: Path, *, merged_within: float = 1e-5) -> None:
    """From an allocation to a merged model that plain transformers loads."""
    from transformers import AutoModelForCausalLM

    model = models.load(name).model
    shape, untouched = models.shape_of_model(model, name=name), reference.digest(model)
    adapter = adapters.attach(model, allocation, shape=shape, lora=LoraSettings(rank=4, lora_alpha=8))
    assert adapter.num_trainable == allocation.trainable_params(shape, rank=4)
    before, after = step(model, adapter)
    assert after < before
    trained = reference.logits(model)
    adapters.save(adapter, folder / "adapter", metadata={})
    adapter.detach()
    assert reference.digest(model) == untouched

    fresh = models.load(name).model
    again = adapters.load(fresh, folder / "adapter")
    assert torch.equal(reference.logits(fresh), trained)
    again.merge()
    merged = reference.logits(fresh)
    torch.testing.assert_close(merged, trained, rtol=0, atol=merged_within)
    fresh.save_pretrained(folder / "merged")
    plain = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(reference.logits(plain), merged, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("family", "changes"), cases((reference.FAMILIES, False), (OTHER_MOE, True)))
def test_experts_of_a_family_are_measured_chosen_trained_and_merged(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    name = saved_model(family, changes, tmp_path / "model")
    shape, model = models.shape_of(name), models.load(name).model
    assert shape.is_moe
    assert models.shape_of_model(model, name=name) == shape
    ids = reference.tokens()
    signal = routing.measure(
        model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], provenance={"model": family}
    )
    assert {int(layer) for layer in signal.rows} == set(shape.moe_layers)
    for layer in shape.moe_layers:
        assert sum(signal.metric(layer, "count")) == 2 * ids.numel()  # two experts a token
    allocation = sieve.allocate(signal, shape, fraction=0.25)
    assert allocation == ExpertSelection({layer: allocation.in_layer(layer) for layer in shape.moe_layers})
    assert all(len(ids) == 2 for ids in allocation.experts.values())
    # a change of one unit in the last place of the weights moves logits behind linear attention by 3e-5
    delta = "linear_attention" in changes.get("layer_types", ())
    walk(name, allocation, tmp_path, merged_within=1e-4 if delta else 1e-5)


@pytest.mark.parametrize(("family", "changes"), cases((DENSE, False), (OTHER_DENSE, True)))
def test_linear_layers_of_a_family_take_an_expert_and_merge(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    name = saved_model(family, changes, tmp_path / "model")
    shape = models.shape_of(name)
    assert not shape.is_moe
    assert {module.role for module in shape.modules} == {"attention", "mlp"}
    walk(name, ExpertCounts({module.path: 1 for module in shape.modules}), tmp_path)


@pytest.mark.parametrize(("family", "changes"), cases((reference.FAMILIES, False), (DENSE, False)))
def test_sizes_from_the_config_are_those_of_the_classes(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    from trainers.models import discover

    name = saved_model(family, changes, tmp_path)
    listed = models.shape_of(name)
    walked = discover.shape_from_modules(discover.without_weights(tmp_path, name, False), name=name)
    assert family in shapes.FAMILIES
    assert set(walked.modules) == set(listed.modules)
    assert walked.num_layers == listed.num_layers


@pytest.mark.parametrize(
    ("family", "said"),
    [("jetmoe", r"experts \(JetMoe.*outside of transformers' experts"), ("gpt2", "no stack of decoder")],
)
def test_a_family_that_cannot_be_adapted_is_refused_in_one_line(family: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(StudyError, match=said) as error:
        models.shape_of(str(tmp_path))
    assert "\n" not in str(error.value)
