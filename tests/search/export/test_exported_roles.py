"""Points whose roles and expert ranks are not the default: trained by a study, taken out in every form, loaded equal.

python -m pytest tests/search/export/test_exported_roles.py
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from allocators.core.types import ModuleRanks
from search import run
from search.export import by_name
from search.records import read
from tests.search.export.test_export import CLOSE, exported, loaded_as_printed, logits
from tests.trainers import reference
from tests.trainers.models.test_families import saved_model
from trainers import adapter, models

WORDS = "space=sieve space.allocator=sieve workers=process untrained=false trials=1 limit=8 recipe.steps=4"
SETTINGS = "space.fraction=0.25 space.score=count recipe.rank=4 recipe.lora_alpha=64 recipe.learning_rate=0.01"
# base, roles, rank of an expert, how many modules of each role have a rank, and which
CASES = {
    "router frozen": ("tiny-moe", "attention+experts", "r/k", {"attention": 4, "expert": 2}),
    "experts alone": ("tiny-moe", "experts", "r/k", {"expert": 2}),
    "shared expert alone": ("qwen2_moe", "shared", "r", {"shared_expert": 4}),
    "gate and experts": ("qwen2_moe", "gate+experts", "r/E", {"shared_gate": 1, "expert": 1}),
}
QUICK = ("router frozen", "shared expert alone")


def qwen(folder: Path) -> str:
    """A random Qwen2-MoE, which has a shared expert and its gate, with the tokenizer of the embedded models."""
    saved_model("qwen2_moe", reference.FAMILIES["qwen2_moe"] | {"vocab_size": 128}, folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(models.folder_of("tiny-moe") / file, folder / file)
    return str(folder)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else [pytest.mark.slow]) for case in CASES]
)
def test_a_trained_point_of_other_roles_loads_back_equal_in_every_form(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, roles, expert_rank, ranks = CASES[case]
    base = family if family in models.EMBEDDED else qwen(tmp_path / "base")
    given = [*WORDS.split(), *SETTINGS.split(), f"space.roles={roles}", f"space.expert_rank={expert_rank}"]
    assert run.main([*given, f"model={base}", f"storage={tmp_path / 'studies'}", "name=roles"]) == 0
    records = read(tmp_path / "studies" / "roles")
    [outcome] = records.finished.values()
    allocation, shape = outcome.trial.allocation, models.shape_of(base)
    assert isinstance(allocation, ModuleRanks)
    adapted = {m.role: max(allocation.of(m)) for m in shape.modules if any(allocation.of(m))}
    assert adapted == ranks

    model = models.load(base, dtype="float32").model
    plain = logits(model)
    adapter.load(model, records.adapter_of(outcome) or "")
    expected = logits(model)
    scale = float(expected.abs().max())
    assert float((expected - plain).abs().max()) > 100 * CLOSE * scale, "the training changed something"
    for form in ("peft", "merged", "vllm"):
        target, lines = exported(tmp_path / "studies" / "roles", to=tmp_path / form, format=form)
        if form == "vllm":
            loaded = models.load(base, dtype="float32").model
            by_name.apply(loaded, target)
        else:
            loaded = loaded_as_printed(lines, tmp_path, monkeypatch)
        torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=CLOSE * scale)
