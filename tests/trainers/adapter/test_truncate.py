"""Cutting an adapter keeps the largest singular values of all modules together, and nothing else changes.

python -m pytest tests/trainers/adapter/test_truncate.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from allocators.core.errors import StudyError
from allocators.core.types import ExpertCounts, ExpertSelection, LoraSettings, ModuleRanks
from tests.trainers.adapter.test_adapter import tiny_llama
from tests.trainers.adapter.test_module_ranks import some_ranks, summed_weights
from tests.trainers.reference import fill, logits, shape_of_model, tiny_model
from trainers.adapter import Saved, attach, read, save
from trainers.adapter.module_ranks.truncate import truncated

LORA = LoraSettings(rank=3, lora_alpha=6.0)


def saved_adapter(model: Any, allocation: Any, folder: Path) -> tuple[Saved, torch.Tensor]:
    """A filled adapter as it is saved, and what the model says with it; the model is as it was then."""
    adapter = attach(model, allocation, shape=shape_of_model(model), lora=LORA)
    fill(adapter)
    said = logits(model)
    save(adapter, folder, metadata={})
    adapter.detach()
    return read(folder), said


def with_cut(model: Any, ranks: ModuleRanks, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    adapter = attach(model, ranks, shape=shape_of_model(model), lora=LORA)
    adapter.load_state_dict(weights)
    said = logits(model)
    adapter.detach()
    return said


def deltas(model: Any, ranks: ModuleRanks, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """All of scale·B·A, one after the other."""
    base = dict(model.named_parameters())
    summed = summed_weights(model, ranks, weights, scale=LORA.scale)
    return torch.cat([(summed.get(name, w) - w).flatten() for name, w in base.items()]).detach()


def test_all_of_the_energy_is_the_same_model_whatever_the_kind(tmp_path: Path) -> None:
    moe, dense = tiny_model("olmoe"), tiny_llama()
    for model, allocation in (
        (moe, ExpertSelection({0: (1, 3)})),
        (moe, some_ranks(shape_of_model(moe))),
        (dense, some_ranks(shape_of_model(dense))),
    ):
        saved, said = saved_adapter(model, allocation, tmp_path / str(id(allocation)))
        ranks, weights = truncated(saved, energy=1.0)
        torch.testing.assert_close(with_cut(model, ranks, weights), said, rtol=1e-4, atol=1e-4)
        assert sum(w.numel() for w in weights.values()) == ranks.trainable_params(saved.shape)


def test_one_threshold_holds_for_all_modules_and_the_energy_is_what_was_asked_for(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    allocation = some_ranks(shape_of_model(model))
    saved, _ = saved_adapter(model, allocation, tmp_path)
    whole = deltas(model, allocation, dict(saved.weights))
    sizes, lost = [], []
    for energy in (0.3, 0.7, 0.95):
        ranks, weights = truncated(saved, energy=energy)
        kept = deltas(model, ranks, weights)
        share = float((kept**2).sum() / (whole**2).sum())
        assert share >= energy - 1e-5
        # what is cut away is orthogonal to what stays
        assert float(((whole - kept) ** 2).sum() / (whole**2).sum()) == pytest.approx(1 - share, abs=1e-4)
        sizes.append(ranks.total_rank)
        lost.append(1 - share)
    assert sizes == sorted(sizes)
    assert lost == sorted(lost, reverse=True)


def test_a_vector_by_hand(tmp_path: Path) -> None:
    """Σσ² = 9 + 4 in one module and 1 in another: .6 keeps the 9, .9 the 9 and the 4, .95 all three."""
    model = tiny_llama()
    shape = shape_of_model(model)
    first, second = shape.modules[0].path, shape.modules[1].path
    allocation = ModuleRanks({first: 2, second: 1})
    adapter = attach(model, allocation, shape=shape, lora=LORA)
    state = {name: torch.zeros_like(tensor) for name, tensor in adapter.state_dict().items()}
    for place, sigma in ((0, 3.0), (1, 2.0)):
        state[f"{first}.lora_A"][place, place], state[f"{first}.lora_B"][place, place] = sigma, 1.0
    state[f"{second}.lora_A"][0, 0], state[f"{second}.lora_B"][0, 0] = 1.0, 1.0
    adapter.load_state_dict(state)
    save(adapter, tmp_path, metadata={})
    cut = {energy: dict(truncated(read(tmp_path), energy=energy)[0].ranks) for energy in (0.6, 0.9, 0.95)}
    assert cut == {0.6: {first: 1}, 0.9: {first: 2}, 0.95: {first: 2, second: 1}}


def test_what_cannot_be_cut_says_so(tmp_path: Path) -> None:
    model = tiny_llama()
    shape = shape_of_model(model)
    saved, _ = saved_adapter(model, ExpertCounts({shape.modules[0].path: 2}), tmp_path / "moe")
    with pytest.raises(StudyError, match="LoRA-MoE on a dense model"):
        truncated(saved, energy=0.9)
    fresh = attach(model, some_ranks(shape), shape=shape, lora=LORA)
    save(fresh, tmp_path / "fresh", metadata={})
    with pytest.raises(StudyError, match="is zero"):
        truncated(read(tmp_path / "fresh"), energy=0.9)
    with pytest.raises(StudyError, match="energy must be above 0"):
        truncated(saved, energy=1.5)
