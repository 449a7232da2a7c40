"""Folders of models that are not whole, or that hold more than a model: one line that says so, or the right base.

python -m pytest tests/trainers/models/test_broken_models.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from allocators.core.errors import NotFiniteError, StudyError, TrialError
from allocators.core.types import ExpertCounts, LoraSettings
from tests.trainers import reference
from tests.trainers.conftest import char_tokenizer, tiny_olmoe
from trainers import adapter as adapters
from trainers import models, tasks
from trainers.tasks import harness
from trainers.tasks.check.tokens import POSITIONS

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers; the embedding has as many rows as the tokenizer has tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("tiny-llama"), char_tokenizer()
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(llama, tmp_path / "model")


def change_weights(folder: Path, change: Callable[[Weights], Weights]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def change_json(folder: Path, name: str, **changes: Any) -> None:
    file = folder / name
    kept = {key: value for key, value in (json.loads(file.read_text()) | changes).items() if value is not ...}
    file.write_text(json.dumps(kept))


def refused(folder: Path, said: str, error: type[StudyError] = StudyError, **options: Any) -> None:
    with pytest.raises(error, match=said) as raised:
        models.load(str(folder), **options)
    assert "\n" not in str(raised.value)


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.arange(20).unsqueeze(0)).logits
    return logits


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_attention_heads": 8}, "q_proj.weight of .* is .32, 32. in its files, and config.json makes it .64, 32."),
        (
            {"intermediate_size": 40},
            "gate_proj.weight of .* is .48, 32. in its files, and config.json makes it .40, 32.",
        ),
    ],
)
def test_a_config_that_is_not_the_weights_is_said_before_anything_starts(
    folder: Path, changes: dict[str, int], said: str
) -> None:
    models.check_files(str(folder), models.shape_of(str(folder)))
    change_json(folder, "config.json", **changes)
    with pytest.raises(StudyError, match=said):
        models.check_files(str(folder), models.shape_of(str(folder)))


def test_experts_that_config_counts_otherwise_are_said_before_anything_starts(tmp_path: Path) -> None:
    folder = shutil.copytree(models.EMBEDDED["tiny-moe"], tmp_path / "moe")
    models.check_files(str(folder), models.shape_of(str(folder)))
    change_json(folder, "config.json", num_experts=8)
    with pytest.raises(StudyError, match=r"in its files, and config.json makes it .*8.*: is config.json another"):
        models.check_files(str(folder), models.shape_of(str(folder)))


def test_a_folder_without_a_tokenizer_is_said(tmp_path: Path) -> None:
    folder = shutil.copytree(models.EMBEDDED["tiny-moe"], tmp_path / "moe")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert models.tokenizer_of("tiny-moe").get_vocab()
    with pytest.raises(StudyError, match=r"the tokenizer of .* makes no token of a text: are its files there"):
        models.tokenizer_of(str(folder))


# --- config.json ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "nope"}, "cannot be read from its config.json: KeyError: 'nope'"),
        ({"rms_norm_eps": "x"}, "field 'rms_norm_eps'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "Missing required keys in `rope_parameters`"),
        ({"max_position_embeddings": None}, "field 'max_position_embeddings'"),
        ({"text_config": 5}, "'int' object has no attribute"),
    ],
)
def test_values_that_no_model_takes_are_said_before_it_is_loaded(
    folder: Path, change: dict[str, Any], said: str
) -> None:
    models.check_config(str(folder))
    change_json(folder, "config.json", **change)
    with pytest.raises(StudyError, match=said) as error:
        models.check_config(str(folder))
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("value", [2.0, -1.0])
def test_values_that_fail_in_training_alone_are_said_at_load(folder: Path, value: float) -> None:
    change_json(folder, "config.json", attention_dropout=value)
    refused(folder, "does not train: .*: correct config.json")


@pytest.mark.parametrize("value", [0, -1])
def test_values_that_fail_where_answers_are_written_are_said_at_load(tmp_path: Path, value: int) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    tokenizer = char_tokenizer()
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    config = MistralConfig(vocab_size=len(tokenizer), **sizes, num_attention_heads=2, num_key_value_heads=1)
    MistralForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    change_json(tmp_path, "config.json", sliding_window=value)
    refused(tmp_path, "does not write answers: .*: correct config.json")


@pytest.mark.parametrize("value", [0, -3])
def test_values_that_fail_where_several_tokens_follow_a_context_are_said_at_load(folder: Path, value: int) -> None:
    change_json(folder, "config.json", sliding_window=value)
    refused(folder, "does not read on from a context: .*: correct config.json")


@pytest.mark.parametrize("value", [1, "512"])
def test_a_model_has_positions(value: object) -> None:
    with pytest.raises(StudyError, match="at least 2 are needed"):
        tasks.Limits.of({"max_position_embeddings": value}, recipe={})


def test_a_look_at_a_model_draws_nothing_from_a_training(folder: Path) -> None:
    change_json(folder, "config.json", attention_dropout=0.5)
    before = torch.get_rng_state()
    loaded = models.load(str(folder))
    assert torch.equal(before, torch.get_rng_state())
    assert not loaded.model.training


# --- tensors ----------------------------------------------------------------------------------------------------------


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: tensor for name, tensor in weights.items() if part not in name}


def renamed(old: str, new: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name.replace(old, new, 1): tensor for name, tensor in weights.items()}


def resized(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {n: t[:-1].clone() if part in n else t for n, t in weights.items()}


def with_value(name: str, value: float) -> Callable[[Weights], Weights]:
    def change(weights: Weights) -> Weights:
        weights[name].view(-1)[5] = value
        return weights

    return change


LACKING = {
    "layer": (without(".layers.1."), r"lack model\.layers\.1\.input_layernorm\.weight and 8 more, .* at random"),
    "head": (without("lm_head"), r"lack lm_head\.weight, which would be drawn at random"),
    "one": (without("layers.0.mlp.up"), r"lack model\.layers\.0\.mlp\.up_proj\.weight, which"),
    "module.": (renamed("", "module."), r"lack lm_head\.weight and 20 more, .* they hold module\.lm_head\.weight"),
    "transformer.": (renamed("model.", "transformer."), r"lack model\.embed_tokens.* they hold transformer\.embed_tok"),
}


@pytest.mark.parametrize(("change", "said"), LACKING.values(), ids=LACKING)
def test_a_tensor_that_the_files_lack_is_named(change: Any, said: str, folder: Path) -> None:
    change_weights(folder, change)
    refused(folder, said)


def test_names_without_the_first_part_load(llama: Path, folder: Path) -> None:
    change_weights(folder, renamed("model.", ""))
    assert torch.equal(logits_of(models.load(str(folder)).model), logits_of(models.load(str(llama)).model))


def test_a_tensor_of_another_size_is_named(folder: Path) -> None:
    change_weights(folder, resized("embed_tokens"))
    refused(
        folder, r"embed_tokens\.weight .* is \[43, 32\] in its files, and config\.json makes it \[44, 32\]: is config"
    )


def test_sizes_of_another_config_are_named(folder: Path) -> None:
    change_json(folder, "config.json", num_attention_heads=8)
    refused(folder, r"self_attn\.\w_proj\.weight .* is \[\d+, \d+\] in its files, .* and 3 more")


def test_tensors_that_are_not_used_are_a_note(folder: Path) -> None:
    change_json(folder, "config.json", num_hidden_layers=1)
    (note,) = models.load(str(folder)).notes
    assert "9 tensors of the files" in note
    assert "e.g. model.layers.1.input_layernorm.weight" in note


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_values_that_are_not_finite_are_named(name: str, value: float, folder: Path) -> None:
    change_weights(folder, with_value(name, value))
    refused(folder, rf"base's logits are not finite: {name} of .* not finite in float32", NotFiniteError)


def test_a_base_that_overflows_is_told_to_take_another_type(folder: Path) -> None:
    change_weights(folder, lambda weights: {n: t * 1000 if "norm" in n else t * 30 for n, t in weights.items()})
    models.load(str(folder))
    refused(
        folder, "logits are not finite: .* overflows in float16; try dtype=float32", NotFiniteError, dtype="float16"
    )


EXPERT = "model.layers.1.mlp.experts.2.gate_proj.weight"
EXPERTS = {
    "missing": (without(EXPERT), rf"lack {EXPERT}, which other experts of the layer have"),
    "another size": (resized(EXPERT), rf"{EXPERT} of .* is \[15, 32\], and those of other experts \[16, 32\]"),
    "router": (with_value("model.layers.0.mlp.gate.weight", float("nan")), r"not finite: model\.layers\.0\.mlp\.gate"),
}


@pytest.mark.parametrize(("change", "said"), EXPERTS.values(), ids=EXPERTS)
def test_an_expert_that_differs_from_the_others_is_named(change: Any, said: str, tmp_path: Path) -> None:
    tiny_olmoe().save_pretrained(tmp_path)
    char_tokenizer().save_pretrained(tmp_path)
    change_weights(tmp_path, change)
    refused(tmp_path, said)


@pytest.mark.parametrize("number", [7, 9])
def test_another_number_of_experts_is_told(number: int, model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path, dirs_exist_ok=True)
    change_json(tmp_path, "config.json", num_experts=number)
    refused(tmp_path, rf"experts\.down_proj .* is \[8, .* and config\.json makes it \[{number}, ")


# --- files ------------------------------------------------------------------------------------------------------------


def test_weight_files_that_are_pointers_or_cut_are_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for size in (len(content) - 2000, 100, 4, 0):
        file.write_bytes(content[:size])
        refused(folder, r"model\.safetensors' is (cut short|no safetensors file)")
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused(folder, r"model\.safetensors' is a Git LFS pointer, not the file itself: git lfs pull")


@pytest.mark.parametrize("positions", [0, -1])
def test_a_config_that_says_no_number_of_positions_loads(folder: Path, llama: Path, positions: int) -> None:
    change_json(folder, "config.json", max_position_embeddings=positions)
    loaded = models.load(str(folder))
    assert torch.equal(logits_of(loaded.model), logits_of(models.load(str(llama)).model))
    assert tasks.Limits.of(models.config_of(str(folder)), recipe={}).positions is None
    assert harness.language_model(loaded.model, loaded.tokenizer, 1).max_length == POSITIONS


def test_a_shard_that_is_missing_is_named(folder: Path, llama: Path) -> None:
    models.load(str(llama)).model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    assert torch.equal(logits_of(models.load(str(folder)).model), logits_of(models.load(str(llama)).model))
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(folder, rf"lacks {shard.name}, which its index names \(1 of \d shards are missing\)")


def test_a_tensor_in_two_shards_is_named(folder: Path, llama: Path) -> None:
    models.load(str(llama)).model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    first, *_, last = sorted(folder.glob("model-*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(last), name: tensor + 1}, last, metadata={"format": "pt"})
    refused(folder, rf"{name} of .* is in {first.name} and in {last.name}: which of them counts")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool])
def test_weights_that_are_whole_numbers_are_named(folder: Path, dtype: torch.dtype) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change_weights(folder, lambda weights: {**weights, name: weights[name].to(dtype)})
    refused(folder, rf"{name} of .* is stored as (I32|I64|BOOL), whole numbers, which no weight is")


@pytest.mark.parametrize("change", ["overlap", "hole"])
def test_tensors_that_do_not_fill_their_file_are_told(folder: Path, change: str) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + length])
    one, other = [name for name in head if "up_proj" in name]
    if change == "hole":
        del head[one]
    else:
        head[one]["data_offsets"] = head[other]["data_offsets"]
    text = json.dumps(head).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(StudyError, match="is no safetensors file"):
        models.check_files(str(folder), models.shape_of(str(folder)))


@pytest.mark.parametrize(
    ("file", "change"),
    [("tokenizer_config.json", {"model_max_length": "x"}), ("tokenizer.json", {"model": {"type": "WordLevel",
      "vocab": {}, "unk_token": "<unk>"}})],
)  # fmt: skip
def test_a_tokenizer_that_reads_no_text_is_told(folder: Path, file: str, change: dict[str, Any]) -> None:
    change_json(folder, file, **change)
    refused(folder, "(tokenizer of .* reads no text|has no eos token|cannot be loaded)")
    with pytest.raises(StudyError, match="the tokenizer of"):
        models.tokenizer_of(str(folder))


def test_other_safetensors_are_no_part_of_the_base(folder: Path, llama: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert models.identity_of(str(folder)) == models.identity_of(str(llama))
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    refused(folder, r"no \*\.safetensors called model\.safetensors, .* of consolidated\.safetensors it is not known")


def test_an_adapter_beside_the_base_is_not_used(folder: Path, llama: Path) -> None:
    from peft import LoraConfig, get_peft_model

    wrapped: Any = get_peft_model(models.load(str(llama)).model, LoraConfig(target_modules=["q_proj"], r=2))
    for name, parameter in wrapped.named_parameters():
        if "lora" in name:
            torch.nn.init.ones_(parameter)
    wrapped.save_pretrained(folder)
    loaded = models.load(str(folder))
    assert torch.equal(logits_of(loaded.model), logits_of(models.load(str(llama)).model))
    assert loaded.notes == ("adapter_config.json beside the weights of 'model' is not used: the base is taken alone",)
    (folder / "config.json").unlink()
    refused(folder, r"is a PEFT adapter of '.*', not a model: merge it first")


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_eos_is_told(folder: Path) -> None:
    change_json(folder, "tokenizer_config.json", eos_token=...)
    refused(folder, "has no eos token: name one of its tokens")


def test_a_token_outside_of_the_embedding_is_named(folder: Path) -> None:
    tokenizer = char_tokenizer()
    tokenizer.add_tokens(["<|user|>", "<|assistant|>"])
    tokenizer.save_pretrained(folder)
    refused(folder, r"token <\|user\|> and 1 more of .* is 44, the embedding has 44 rows")


def test_an_eos_token_outside_of_the_embedding_is_named(folder: Path) -> None:
    tokenizer = char_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(folder)
    refused(folder, "token <end> of .* is 44, the embedding has 44 rows")


def test_any_token_pads_where_the_pad_token_is_outside_of_the_embedding(folder: Path) -> None:
    tokenizer = char_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    tokenizer.save_pretrained(folder)
    loaded = models.load(str(folder))
    assert loaded.tokenizer.pad_token == "<eos>"
    assert loaded.tokenizer(["a b", "a"], padding=True).input_ids[1][-1] < 44


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "5"])
def test_other_files_that_are_damaged_are_one_line_or_not_needed(file: str, text: str, folder: Path) -> None:
    (folder / file).write_text(text)
    if file == "tokenizer.json":
        refused(folder, "cannot be loaded")
        return
    try:
        models.load(str(folder))
    except StudyError as error:
        assert "\n" not in str(error)  # noqa: PT017 - whether it is read depends on the version of transformers


# --- weights that are packed on disk ----------------------------------------------------------------------------------


def write_fp8(plain: Path, packed: Path, exact: Path, *, block: int) -> None:
    """The model with its projections in fp8, blocks with a scale each; and the model that these values mean."""
    for folder in (packed, exact):
        shutil.copytree(plain, folder)
    stored, meant = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        stored[name] = meant[name] = tensor
        if "_proj" in name:
            rows, columns = (-(-size // block) for size in tensor.shape)
            scale = torch.linspace(0.5, 2, rows * columns).view(rows, columns)
            stored[name] = tensor.to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale
            spread = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)[: tensor.shape[0], : tensor.shape[1]]
            meant[name] = stored[name].float() * spread
    save_file(stored, packed / "model.safetensors", metadata={"format": "pt"})
    save_file(meant, exact / "model.safetensors", metadata={"format": "pt"})
    config = {"quant_method": "fp8", "weight_block_size": [block, block], "modules_to_not_convert": ["lm_head"]}
    change_json(packed, "config.json", quantization_config=config)


@pytest.mark.parametrize("family", ["llama", "olmoe"])
def test_fp8_is_dequantised_told_and_saved_as_plain_weights(
    family: str, llama: Path, model_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    packed, exact, saved = (tmp_path / name for name in ("packed", "exact", "saved"))
    write_fp8({"llama": llama, "olmoe": model_folder}[family], packed, exact, block=16)
    loaded, plain = models.load(str(packed)), models.load(str(exact))
    assert loaded.notes == ("'packed' is stored as fp8: dequantised to float32",)
    assert (loaded.numbers, plain.numbers) == ("float32, of fp8", "float32")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    assert torch.equal(logits_of(loaded.model), logits_of(plain.model))
    loaded.model.save_pretrained(saved)
    assert {tensor.dtype for tensor in load_file(saved / "model.safetensors").values()} == {torch.float32}
    again = AutoModelForCausalLM.from_pretrained(saved)
    torch.testing.assert_close(logits_of(again), logits_of(plain.model), rtol=0, atol=1e-6)
    assert models.shape_of(str(packed)).modules == models.shape_of(str(exact)).modules
    refused(
        packed, "quantization=nf4 packs plain weights, and .* is stored as fp8|needs the package", quantization="nf4"
    )
    change_json(packed, "config.json", quantization_config=...)
    refused(packed, r"hold F8_E4M3, and config\.json has no quantization_config")


def test_blocks_that_would_be_spread_wrongly_are_refused(llama: Path, tmp_path: Path) -> None:
    write_fp8(llama, tmp_path / "packed", tmp_path / "exact", block=32)
    refused(
        tmp_path / "packed",
        r"proj\.weight_scale_inv .* scales for \[.*48.*\] values, which blocks of \[32, 32\] do not",
    )


PACKED: list[Any] = [
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "awq"},
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "compressed-tensors"},
    {"quant_method": "no-such-method"},
    {"quant_method": ["fp8"]},
    {"load_in_4bit": True},
    {},
    [],
    "fp8",
    5,
]


@pytest.mark.parametrize("config", PACKED, ids=str)
def test_other_packed_forms_are_refused(config: Any, folder: Path) -> None:
    change_json(folder, "config.json", quantization_config=config)
    refused(folder, "are stored (as|in a form) .*: plain weights are needed, or fp8 or mxfp4")


def test_a_form_that_the_files_do_not_have_is_told(folder: Path) -> None:
    change_json(folder, "config.json", quantization_config=None)
    models.load(str(folder))
    change_json(folder, "config.json", quantization_config={"quant_method": "fp8"})
    refused(folder, r"hold F32, and config\.json says that the weights are stored as fp8: are both of one model")


# --- roles ------------------------------------------------------------------------------------------------------------


def saved_config(family: str, folder: Path, **changes: Any) -> str:
    from transformers import AutoConfig

    known = vars(type(AutoConfig.for_model(family))())
    sizes = {key: value for key, value in reference._COMMON.items() if key in known}
    AutoConfig.for_model(family, **(sizes | changes)).save_pretrained(folder)
    return str(folder)


def roles_of(name: str) -> dict[str, list[str]]:
    roles: dict[str, list[str]] = {}
    for module in models.shape_of(name).modules:
        roles.setdefault(module.role, []).append(module.path.partition("layers.")[2])
    return roles


def test_feed_forward_maps_of_a_layer_itself_have_a_role(tmp_path: Path) -> None:
    name = saved_config("opt", tmp_path, ffn_dim=48, word_embed_proj_dim=32)
    roles = roles_of(name)
    assert (len(roles["attention"]), roles["mlp"]) == (8, ["0.fc1", "0.fc2", "1.fc1", "1.fc2"])
    assert models.left_out(name) == []


NEMOTRON_H: dict[str, Any] = {
    "layers_block_type": ["mamba", "moe", "attention", "moe"],
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "head_dim": 8,
}


def test_blocks_with_one_name_have_the_role_of_what_is_in_them(tmp_path: Path) -> None:
    name = saved_config("nemotron_h", tmp_path, **NEMOTRON_H)
    roles = roles_of(name)
    assert roles["attention"] == [f"2.mixer.{part}_proj" for part in "qkvo"]
    assert roles["router"] == ["1.mixer.gate", "3.mixer.gate"]
    assert len(roles["shared_expert"]) == 4
    assert "mlp" not in roles
    (note,) = models.left_out(name)
    assert "mixer.in_proj (1 of 4 layers), mixer.out_proj (1 of 4 layers)" in note


def test_routers_are_known_by_their_name_where_their_size_is_another(tmp_path: Path) -> None:
    sizes = {"moe_intermediate_size": 16, "head_dim": 8}
    inkling = {"n_routed_experts": 8, "n_shared_experts": 2, "layer_types": ["full_attention"] * 2}
    roles = roles_of(saved_config("inkling_text", tmp_path / "inkling", **sizes, **inkling))
    assert roles["router"] == ["0.mlp.gate", "1.mlp.gate"]
    zaya = {
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "router_hidden_size": 16,
        **sizes,
        "layer_types": ["hybrid"] * 2,
    }
    roles = roles_of(saved_config("zaya", tmp_path / "zaya", **zaya))
    parts = ("down_proj", "router_mlp.fc1", "router_mlp.fc2", "router_mlp.out_proj")
    assert roles["router"] == [f"{layer}.mlp.gate.{part}" for layer in (0, 1) for part in parts]
    assert "shared_expert" not in roles


def test_a_shared_expert_as_wide_as_there_are_experts_is_no_router(tmp_path: Path) -> None:
    from tests.trainers.models.test_families import OTHER_MOE

    changes = OTHER_MOE["qwen3_next"] | {"shared_expert_intermediate_size": 8, "moe_intermediate_size": 16}
    name = saved_config("qwen3_next", tmp_path, **changes)
    roles = roles_of(name)
    assert roles["router"] == ["0.mlp.gate", "1.mlp.gate"]
    assert len(roles["shared_expert"]) == 6
    assert roles["shared_gate"] == ["0.mlp.shared_expert_gate", "1.mlp.shared_expert_gate"]
    assert not any("shared_expert_gate" in note for note in models.left_out(name))


# --- weights of several layers ----------------------------------------------------------------------------------------


def test_a_weight_of_several_layers_is_trained_and_not_merged(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = reference._COMMON | {"num_hidden_layers": 4, "num_key_value_heads": 4}
    mamba = {"mamba_ngroups": 1, "mamba_d_state": 8, "n_mamba_heads": 4, "mamba_headdim": 16, "adapter_rank": 4}
    layers = ["hybrid", "hybrid", "mamba", "hybrid"]
    config = AutoConfig.for_model("zamba2", **sizes, **mamba, layers_block_type=layers, num_mem_blocks=1)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "model")
    char_tokenizer().save_pretrained(tmp_path / "model")
    name = str(tmp_path / "model")
    model: Any = models.load(name).model
    shape = models.shape_of_model(model, name=name)
    assert not any("adapter_list" in module.path for module in shape.modules)
    assert "adapter_list" in models.left_out(name)[0]
    lora = LoraSettings(rank=2, lora_alpha=4)
    adapter = adapters.attach(model, ExpertCounts({m.path: 1 for m in shape.modules}), shape=shape, lora=lora)
    reference.fill(adapter)
    model(reference.tokens(), use_cache=False).logits.sum().backward()
    adapter.check_gradients()
    trained = reference.logits(model)
    with pytest.raises(
        TrialError, match=r"layers\.\d.* and .*layers\.\d.* are one weight: .* use the adapter attached"
    ):
        adapter.merge()
    assert torch.equal(reference.logits(model), trained)
