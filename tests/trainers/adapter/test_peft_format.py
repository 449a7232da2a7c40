"""PEFT's form of an adapter computes what the adapter does, and says why where there is none.

python -m pytest tests/trainers/adapter/test_peft_format.py
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from allocators.core.errors import StudyError
from allocators.core.types import Allocation, ExpertCounts, ExpertSelection, Gating, LoraSettings
from tests.trainers.adapter.test_adapter import tiny_llama
from tests.trainers.reference import (
    FAMILIES,
    digest,
    every_expert,
    fill,
    logits,
    shape_of_model,
    some_experts,
    tiny_model,
)
from trainers.adapter import attach, read, save
from trainers.adapter.files import Saved
from trainers.adapter.peft_format import refusal, write

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
SELECTIONS = {"some": some_experts, "every": every_expert, "none": lambda shape: ExpertSelection({})}


def saved_adapter(model: Any, allocation: Allocation, folder: Path, **changes: Any) -> tuple[Saved, Tensor]:
    """A trained adapter on disk, and the logits it gives; the model comes back bare."""
    lora = LoraSettings(**({"rank": 3, "lora_alpha": 5.0} | changes))
    adapter = attach(model, allocation, shape=shape_of_model(model), lora=lora)
    fill(adapter)
    save(adapter, folder, metadata={})
    expected = logits(model)
    adapter.detach()
    return read(folder), expected


def loaded_by_peft(model: Any, folder: Path) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of keys that it could not place
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        return PeftModel.from_pretrained(model, folder)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_peft_loads_what_every_family_computes(family: str, selection: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    chosen = SELECTIONS[selection](shape_of_model(model))
    before = digest(model)
    saved, expected = saved_adapter(model, chosen, tmp_path / "ours")
    written = write(model, saved, tmp_path / "peft", base="a/base")
    assert digest(model) == before
    assert not hasattr(model, "peft_config")
    wrapped = loaded_by_peft(model, tmp_path / "peft")
    torch.testing.assert_close(logits(wrapped), expected, **CLOSE)
    held = sum(p.numel() for name, p in wrapped.named_parameters() if "lora_" in name)
    assert held == written.stored
    assert written.trained == chosen.trainable_params(shape_of_model(model), rank=3)


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_llama()


@settings(deadline=None, max_examples=8)
@given(data=st.data())
def test_any_modules_with_one_expert_each(
    llama: Any, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    paths = [m.path for m in shape_of_model(llama).modules]
    chosen = data.draw(st.lists(st.sampled_from(paths), min_size=1, unique=True))
    gating: Gating = data.draw(st.sampled_from(["routed", "hydra"]))
    folder = tmp_path_factory.mktemp("dense")
    counts = ExpertCounts(dict.fromkeys(chosen, 1), gating)
    saved, expected = saved_adapter(llama, counts, folder / "ours", lora_dropout=0.25)
    written = write(llama, saved, folder / "peft", base="a/base")
    wrapped = loaded_by_peft(llama, folder / "peft")
    torch.testing.assert_close(logits(wrapped), expected, **CLOSE)
    wrapped.unload()
    config = json.loads((folder / "peft" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == config["target_modules"]
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 5, 0.25)
    assert written.stored == written.trained  # nothing is stored but what was trained; the routers stay behind


def test_values_in_the_file_by_hand(tmp_path: Path) -> None:
    """Two of eight experts in one of two layers, hidden 32, width 16, rank 3."""
    model = tiny_model("olmoe")
    saved, _ = saved_adapter(model, ExpertSelection({0: (1, 4)}), tmp_path / "ours")
    written = write(model, saved, tmp_path / "peft", base="a/base")
    around = 2 * (2 * 3 * (32 + 32) + 2 * 3 * (32 + 16) + 3 * (32 + 8))  # q, o; k, v; router, of two layers
    assert written.trained == around + 2 * 3 * 3 * (32 + 16)
    # all eight experts; gate and up at rank 6: A is 6 by 32, B 32 by 6, of which half are zeros
    assert written.stored == around + 8 * (6 * 32 + 32 * 6 + 3 * (16 + 32))


def test_equal_adapters_have_equal_files(tmp_path: Path) -> None:
    model = tiny_model("qwen2_moe")
    saved, _ = saved_adapter(model, some_experts(shape_of_model(model)), tmp_path / "ours")
    for name in ("one", "two"):
        write(model, saved, tmp_path / name, base="a/base", revision="abc")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("a/base", "abc")


@pytest.mark.parametrize(
    ("counts", "reason"),
    [({"model.layers.0.self_attn.q_proj": 2}, "have several LoRA experts with a router"), ({}, "adapts no module")],
)
@pytest.mark.parametrize("gating", ["routed", "hydra"])
def test_what_peft_cannot_express_is_refused_with_the_reason(
    counts: dict[str, int], reason: str, gating: Gating, llama: Any, tmp_path: Path
) -> None:
    saved, _ = saved_adapter(llama, ExpertCounts(counts, gating), tmp_path / "ours")
    assert reason in refusal(saved)
    with pytest.raises(StudyError, match=f"has no PEFT form.*{reason}"):
        write(llama, saved, tmp_path / "peft", base="a/base")
    assert not (tmp_path / "peft").exists()
