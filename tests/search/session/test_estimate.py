"""What a study is said to take, against what it takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from allocators.core import plugins
from allocators.core.types import LoraSettings, Recipe
from search.run import main
from search.session.estimate import memory
from trainers import adapter as adapters
from trainers import models

ROWS, LENGTH = 4, 64


@pytest.mark.parametrize("name", ["tiny-moe", "tiny-dense"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_is_what_a_step_holds_or_not_much_more(name: str, checkpointing: bool) -> None:
    loaded = models.load(name, device="cpu", dtype="float32", gradient_checkpointing=checkpointing)
    shape = models.shape_of(name)
    rule, knobs = ("all", {}) if shape.is_moe else ("uniform", {"total_experts": len(shape.modules)})
    allocation = plugins.call(plugins.load("allocators", rule), None, shape, knobs)
    adapter = adapters.attach(loaded.model, allocation, shape=shape, lora=LoraSettings(rank=4, lora_alpha=8.0), seed=0)
    said = memory(
        shape,
        Recipe(rank=4, micro_batch_size=ROWS, max_length=LENGTH),
        adapter.num_trainable,
        config=models.config_of(name),
        dtype="float32",
        checkpointing=checkpointing,
    )
    weights = sum(p.numel() * 4 for p in loaded.model.parameters() if not p.requires_grad)
    assert said.base == pytest.approx(weights, rel=0.02)
    assert said.adapter == 16 * adapter.num_trainable
    saved: dict[int, int] = {}  # bytes by storage

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)  # else its place may be taken by another
        return tensor

    kept: list[torch.Tensor] = []
    loaded.model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = loaded.model(torch.randint(5, 60, (ROWS, LENGTH)), use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.zeros(ROWS * LENGTH, dtype=torch.long))
    assert loss.isfinite()
    parameters = {p.untyped_storage().data_ptr() for p in loaded.model.parameters()}
    held = sum(size for place, size in saved.items() if place not in parameters)
    assert held <= said.activations
    if not checkpointing:  # what the layer that runs again holds is not seen from outside
        assert said.activations < 3 * held


def test_a_timed_dry_run_says_what_a_study_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["dry_run=true", "estimate=true", "trials=3", "limit=8", "recipe.steps=40", f"storage={tmp_path}"]
    assert main([*words, "space=sieve"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert re.search(r"memory of a worker: about [\d.]+ MB = base 13\.\d+ MB \(float32\)", text)
    steps = [float(ms) for ms in re.findall(r"([\d.]+) ms a step", text)]
    questions = [float(ms) for ms in re.findall(r"([\d.]+) ms a question", text)]
    assert len(steps) == len(questions) == 2
    assert all(ms > 0 for ms in [*steps, *questions])
    assert re.search(r"the study: about [\d:]+( s)? of one worker on", text)
    assert not list(tmp_path.iterdir())  # nothing is kept


def test_an_estimate_alone_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["space=sieve", "estimate=true"]) == 2
    assert "give it with dry_run=true" in capsys.readouterr().err
    assert main(["replay=tiny-moe", "estimate=true", "dry_run=true"]) == 2
    assert "replay= trains nothing" in capsys.readouterr().err
