"""The embedded models as committed (small, loadable by anybody, no dead expert) and the script that made them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allocators.core.errors import StudyError
from tests import ROOT
from trainers.embedded import domains, pretrain

COMMITTED = [folder for folder in sorted(pretrain.EMBEDDED.iterdir()) if (folder / "config.json").exists()]


def named(folder: Path) -> str:
    return folder.name.replace("_", "-")


@pytest.fixture(scope="module", params=COMMITTED, ids=named)
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def test_plain_transformers_loads_it_as_float32(model: Any, folder: Path) -> None:
    assert model.dtype == torch.float32
    assert 3e6 <= sum(p.numel() for p in model.parameters()) <= 6e6
    assert (folder / "model.safetensors").stat().st_size < 10e6
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_record_tells_how_it_was_made(model: Any, folder: Path) -> None:
    record = json.loads((folder / "pretraining.json").read_text())
    recipe = pretrain.MODELS[named(folder)]
    assert record["recipe"] == json.loads(json.dumps(pretrain.asdict(recipe)))
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert record["data"]["domains"] == list(domains.MIXTURE)
    assert record["curve"][-1]["step"] == recipe.steps
    assert record["curve"][-1]["loss"] < 0.5 * record["curve"][0]["loss"]


def test_it_has_learnt_every_domain(model: Any, folder: Path) -> None:
    record = json.loads((folder / "pretraining.json").read_text())
    loss = pretrain.examine(model, pretrain.MODELS[named(folder)], batches=1)["loss"]
    # another Python has another standard library, so real text is left out of the comparison
    for name in sorted(set(domains.MIXTURE) - set(domains.REAL_TEXT)):
        assert loss[name] == pytest.approx(record["loss"][name], abs=0.15)


def test_no_expert_is_dead_and_experts_specialise() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(pretrain.EMBEDDED / "tiny_moe")
    routing = pretrain.examine(model, pretrain.MODELS["tiny-moe"], batches=2)["routing"]
    mixture = torch.tensor(routing.pop("mixture"))
    assert mixture.shape == (4, 16)
    assert torch.allclose(mixture.sum(1), torch.ones(4), atol=1e-3)
    assert (mixture * 16).min() > 0.25  # the least used expert, × its equal share
    for shares in routing.values():
        assert (torch.tensor(shares) - mixture).abs().sum(1).div(2).max() > 0.15  # total variation, busiest layer


def test_the_tokenizer_on_disk_is_the_one_the_script_builds(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == pretrain.build_tokenizer().get_vocab()
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token) == pretrain.SPECIAL
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert len(tokenizer) <= 128
    assert tokenizer("é").input_ids == [2]


@given(st.text(alphabet=domains.ALPHABET, max_size=40))
def test_text_survives_the_tokenizer(text: str) -> None:
    ids = TOKENIZER(text).input_ids
    assert len(ids) == len(text)
    assert TOKENIZER.decode(ids) == text


TOKENIZER = pretrain.build_tokenizer()


def test_training_rows_read_as_the_tokenizer_reads_them() -> None:
    names, ids = pretrain.batch(pretrain.MODELS["tiny-moe"], 0)
    rows = domains.rows(0, 0, len(names), 96, end="\0")
    for (name, text), row, given_name in zip(rows, ids.tolist(), names, strict=True):
        assert name == given_name
        assert TOKENIZER.decode(row) == text.replace("\0", "<eos>")


def test_balance_loss_by_hand() -> None:
    """Two experts, one pick: everybody at expert 0 with probability p costs 2·1·p; halves cost 1."""
    lopsided = torch.tensor([[2.0, 0.0]]).repeat(4, 1)
    p = torch.tensor([2.0, 0.0]).softmax(0)[0]
    assert pretrain.balance_loss((lopsided,), top_k=1).item() == pytest.approx(2 * p.item())
    even = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    assert pretrain.balance_loss((even,), top_k=1).item() == pytest.approx(1.0)
    # a layer's imbalance is not hidden by another layer's opposite one
    assert pretrain.balance_loss((lopsided, lopsided.flip(1)), top_k=1).item() == pytest.approx(2 * p.item())


SMALL = replace(
    pretrain.MODELS["tiny-moe"],
    sizes={
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    steps=6,
    rows_per_step=13,
    row_length=24,
)


def test_an_interrupted_pretraining_ends_with_the_same_weights(tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def stop(line: str) -> None:
        if line.startswith("step 5/"):
            raise Interrupted

    often: dict[str, Any] = {"report_every": 1, "checkpoint_every": 2}
    whole = pretrain.pretrain(SMALL, tmp_path / "whole", **often)
    with pytest.raises(Interrupted):
        pretrain.pretrain(SMALL, tmp_path / "halves", **often, show=stop)
    again = pretrain.pretrain(SMALL, tmp_path / "halves", **often)
    assert again == whole
    weights = [(tmp_path / half / "model.safetensors").read_bytes() for half in ("whole", "halves")]
    assert weights[0] == weights[1]


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    pretrain.pretrain(replace(SMALL, steps=2), tmp_path)
    with pytest.raises(StudyError, match="another recipe"):
        pretrain.pretrain(replace(SMALL, steps=2, seed=1), tmp_path)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model=tiny-mow", "did you mean 'tiny-moe'"),
        ("step=3", "did you mean 'steps'"),
        ("steps=many", "steps must be a whole number, got 'many'"),
        ("steps=0", "steps must be at least 1, got 0"),
        ("model", "not key=value"),
    ],
)
def test_a_wrong_word_gets_one_line(word: str, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        pretrain.main([word])


@pytest.mark.parametrize("door", ["trainers.pretrain", "trainers.embedded.domains"])
def test_a_wrong_word_is_one_line_and_exit_code_2(door: str) -> None:
    done = subprocess.run([sys.executable, "-m", door, "nope=1"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown key 'nope'")
    assert done.stderr.count("\n") == 1
