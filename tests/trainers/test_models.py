"""Base models by name: what is found, what it is called, what is refused.

python -m pytest tests/trainers/test_models.py
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch

from allocators.core.errors import StudyError
from trainers import models


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """As on a machine without a network: nothing is asked for, nothing is cached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def cached(offline, model_folder):
    """A model in the hub's cache, as a download leaves it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = offline / "models--somebody--tiny"
    shutil.copytree(model_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return "somebody/tiny", commit


def test_a_folder_is_read_without_torch(model_folder):
    code = (
        "import sys; from trainers import models; print(models.config_of(sys.argv[1])['num_experts'], "
        "models.identity_of(sys.argv[1])[:7], [m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code, str(model_folder)], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "8 sha256: []"


def test_a_loaded_model_is_frozen_and_knows_how_to_pad(model_folder, model):
    loaded = models.load(str(model_folder))
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model.dtype == torch.float32
    assert loaded.tokenizer.pad_token == "<pad>"
    assert loaded.identity == models.identity_of(str(model_folder))
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)
    assert models.load(str(model_folder), dtype="bfloat16").model.dtype == torch.bfloat16


def test_a_missing_pad_token_is_the_eos_token(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = models.load(str(folder))
    assert loaded.tokenizer.pad_token == "<eos>"
    assert len(loaded.tokenizer) <= loaded.model.config.vocab_size


def test_the_identity_follows_weights_and_config_alone(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    identity = models.identity_of(str(folder))
    assert identity == models.identity_of(str(model_folder))  # the place is not part of it
    (folder / "README.md").write_text("new")
    assert models.identity_of(str(folder)) == identity
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert models.identity_of(str(folder)) != identity


def test_pickled_weights_are_refused(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(StudyError, match=r"has no \*\.safetensors"):
        models.load(str(folder))


def test_code_beside_a_model_is_not_run(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "stranger"
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(StudyError, match=r"cannot be loaded .*no remote code") as error:
        models.load(str(folder))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_a_cached_model_is_used_without_asking_the_hub(cached):
    name, commit = cached
    assert models.config_of(name)["num_experts"] == 8
    assert models.identity_of(name) == commit
    loaded = models.load(name)
    assert (loaded.name, loaded.identity) == (name, commit)


@pytest.mark.parametrize("name", ["nobody/nothing", "gpt2", "a b", "/no/such/folder", ""])
def test_an_unknown_model_is_answered_in_one_line(offline, name):
    with pytest.raises(StudyError, match="embedded") as error:
        models.config_of(name)
    assert "\n" not in str(error.value)
    assert f"'{name}'" in str(error.value)
    assert "hf download" in str(error.value)


def test_a_folder_without_config_is_named(tmp_path):
    with pytest.raises(StudyError, match=r"folder without config\.json"):
        models.config_of(str(tmp_path))


def test_a_near_miss_of_an_embedded_name_is_suggested(offline, monkeypatch, model_folder):
    monkeypatch.setitem(models.EMBEDDED, "tiny-moe", model_folder)
    with pytest.raises(StudyError, match=r"unknown model 'tiny_mo'.*did you mean 'tiny-moe'\?"):
        models.config_of("tiny_mo")


@pytest.mark.parametrize("name", sorted(models.EMBEDDED))
def test_embedded_models_load(name):
    loaded = models.load(name)
    ids = loaded.tokenizer("abc", return_tensors="pt").input_ids
    assert loaded.model(ids).logits.shape[:2] == ids.shape
    assert loaded.tokenizer.pad_token_id is not None
    assert loaded.identity.startswith("sha256:")
