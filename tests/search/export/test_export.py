"""An export computes what its adapter does, says what it is, and never leaves half a folder.

python -m pytest tests/search/export/test_export.py
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from allocators.core import shapes
from allocators.core.errors import StudyError
from allocators.core.types import (
    Allocation,
    ExpertCounts,
    ExpertSelection,
    Gating,
    ModelShape,
    ModuleRanks,
    Outcome,
    Recipe,
    Rung,
    Score,
    Trial,
)
from search.config import RunConfig, parse
from search.export import by_name, find, formats, write
from search.export.__main__ import main
from search.export.__main__ import parse as parse_words
from search.export.model_card import map_lines
from search.records import read
from search.records.folder import StudyFolder
from search.records.redact import portable, portable_command
from search.report import Report
from tests import ROOT
from tests.search.propose.proposals import next_proposal
from tests.trainers.conftest import char_tokenizer
from tests.trainers.models.test_broken_models import write_fp8
from tests.trainers.reference import fill
from trainers import adapter, models, storage
from trainers.versions import versions

Exports = dict[str, tuple[Path, dict[str, tuple[str, torch.Tensor]]]]
CLOSE = 1e-5
TOKENS = torch.randint(100, (2, 24), generator=torch.Generator().manual_seed(1))


@functools.cache
def base(name: str, quantization: str = "") -> PreTrainedModel:
    """Resident for the whole file; every test hands it back without an adapter."""
    return models.load(name, dtype="float32", quantization=quantization).model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
        return found


def run_of(name: str, allocation: Allocation, *, accuracy: float = 0.5, seed: int = 0, **changes: Any) -> Outcome:
    """A finished run of a point, without an adapter yet."""
    recipe = Recipe(rank=4, lora_alpha=8.0, steps=40)
    trial = Trial(allocation, recipe, name, "default", seed, "sieve" if accuracy < 0.6 else "all", {"fraction": 0.25})
    rung = Rung(40, 900, accuracy, stderr=0.03, loss=1.0)
    facts = versions(device="x86_64 CPU", model="sha256:0123", numbers="float32", data="feedbeef", chance="0.25")
    params = allocation.trainable_params(models.shape_of(name), rank=4)
    return Outcome(trial, "complete", params, accuracy, (rung,), 7.0, 900, versions=facts).updated(**changes)


def trained(run: Outcome, place: str, quantization: str = "") -> tuple[Outcome, torch.Tensor]:
    """The run with an adapter of random values at `place`, and its logits."""
    recipe = run.trial.recipe
    model, shape = base(run.trial.model, quantization), models.shape_of(run.trial.model)
    attached = adapter.attach(model, run.trial.allocation, shape=shape, lora=recipe.lora)
    fill(attached, std=0.05)
    with storage.replacing_folder(place) as folder:
        adapter.save(attached, folder, metadata={"trial": run.trial.to_json(), "base_model": run.trial.model})
    expected = logits(model)
    attached.detach()
    return run.updated(adapter=place), expected


def write_study(
    folder: Path,
    runs: list[Outcome],
    params: dict[str, dict[str, Any]] | None = None,
    *,
    select_on: str = "test",
    **config: Any,
) -> Path:
    settings = RunConfig(**config)
    identity = settings.identity() | {"select_on": select_on}
    shape = models.shape_of(settings.model)
    with StudyFolder.open(
        folder, config=settings.to_json(), identity=identity, shape=shape, command=settings.command()
    ) as study:
        for run in runs:
            study.append_finished(run, (params or {}).get(run.digest, {}))
    return folder


def some(shape: ModelShape) -> ExpertSelection:
    return ExpertSelection({layer: (1, 4, 5 + layer) for layer in shape.moe_layers[1:]})


def single(shape: ModelShape, gating: Gating = "routed") -> ExpertCounts:
    """One expert on every third module: layers differ in which."""
    return ExpertCounts({m.path: 1 for m in shape.modules[::3]}, gating)


MOE = models.shape_of("tiny-moe")
DENSE = models.shape_of("tiny-dense")
ALL = ExpertSelection({layer: tuple(range(MOE.experts_in(layer))) for layer in MOE.moe_layers})
POINTS: dict[str, Mapping[str, Allocation]] = {
    "tiny-moe": {"some": some(MOE), "every": ALL, "none": ExpertSelection({})},
    "tiny-dense": {
        "single": single(DENSE),
        "hydra": single(DENSE, "hydra"),
        "routed": ExpertCounts({m.path: 1 + m.layer % 2 for m in DENSE.modules}),
        "nothing": ExpertCounts({}),
    },
}
CASES = [(model, point) for model, points in POINTS.items() for point in points]


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Model → (its study, point → (id, logits)): studies of real adapters on the embedded models."""
    found = {}
    for name, points in POINTS.items():
        folder, runs, known = tmp_path_factory.mktemp(name), [], {}
        for number, (point, allocation) in enumerate(points.items()):
            run = run_of(name, allocation, accuracy=0.3 + number / 10)
            run, expected = trained(run, str(folder / "adapters" / run.digest))
            runs.append(run)
            known[point] = (run.digest, expected)
        found[name] = (write_study(folder, runs, model=name), known)
    return found


def exported(folder: Path, **words: Any) -> tuple[Path, list[str]]:
    lines = list(write(*parse_words([str(folder), *(f"{key}={value}" for key, value in words.items())])))
    return Path(words["to"]), lines


def loaded_as_printed(lines: list[str], cwd: Path, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """What the printed Python makes, run beside the export."""
    monkeypatch.chdir(cwd)
    code = lines[-1].partition("To load it:\n")[2]
    assert code.count("\n") == 2
    space: dict[str, Any] = {}
    exec(code, space)  # the card promises that these lines work
    loaded: PreTrainedModel = space["model"].eval()
    return loaded


# --- what an export computes


@pytest.mark.parametrize(("model", "point"), CASES)
@pytest.mark.parametrize("format", ["adapter", "merged", "peft"])
def test_the_printed_lines_load_what_the_adapter_computes(
    exports: Exports, model: str, point: str, format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, known = exports[model]
    digest, expected = known[point]
    several, nothing = point == "routed", point == "nothing"
    if (several and format != "adapter") or (nothing and format == "peft"):
        with pytest.raises(StudyError, match=r"several LoRA experts|adapts no module"):
            exported(study, to=tmp_path / "out", point=digest, format=format)
        assert not list(tmp_path.iterdir())
        return
    folder, lines = exported(study, to=tmp_path / "out", point=digest[:12], format=format)
    assert any(line.startswith("note: ") and "logits" in line for line in lines) == (format != "adapter")
    assert "note: the lines below name 'out' without its path: run them in the folder that holds it" in lines
    found = loaded_as_printed(lines, tmp_path, monkeypatch)
    torch.testing.assert_close(logits(found), expected, rtol=CLOSE, atol=CLOSE)
    card = (folder / "README.md").read_text()
    assert lines[-1].partition("To load it:\n")[2] in card
    assert not any(str(tmp_path) in f.read_text(errors="replace") for f in folder.rglob("*") if f.is_file())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    tensors = sorted(f.name for f in folder.glob("*.safetensors"))
    assert tensors == [{"adapter": "adapter", "merged": "model", "peft": "adapter_model"}[format] + ".safetensors"]


@pytest.mark.parametrize(("model", "point"), [("tiny-moe", "some"), ("tiny-moe", "every"), ("tiny-dense", "single")])
def test_a_server_finds_every_linear_map_by_its_own_name(
    exports: Exports, model: str, point: str, tmp_path: Path
) -> None:
    folder, known = exports[model]
    digest, expected = known[point]
    target, lines = exported(folder, to=tmp_path / "served", point=digest[:6], format="vllm")
    assert "vllm serve" in lines[-1]
    assert "--max-lora-rank 8" in lines[-1]
    config = json.loads((target / "adapter_config.json").read_text())
    tensors = load_file(target / "adapter_model.safetensors")
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert {tensor.size(0) for name, tensor in tensors.items() if ".lora_A." in name} == {4}
    assert {name.rsplit(".", 3)[1] for name in tensors} == set(config["target_modules"])
    by_layer: dict[str, set[str]] = {}
    for name in tensors:
        if match := re.match(r"base_model\.model\.model\.layers\.(\d+)\.mlp\.experts\.(.*)\.lora_[AB]\.weight", name):
            by_layer.setdefault(match[1], set()).add(match[2])
    allocation = POINTS[model][point]
    if isinstance(allocation, ExpertSelection):  # of a layer with one adapted expert all are there, gate, up and down
        every = {f"{expert}.{name}_proj" for expert in range(16) for name in ("gate", "up", "down")}
        assert by_layer == {str(layer): every for layer in allocation.experts}
    fresh = models.load(model, dtype="float32").model
    by_name.apply(fresh, target)
    torch.testing.assert_close(logits(fresh), expected, rtol=0, atol=CLOSE * float(expected.abs().max()))


def test_ranks_of_their_own_are_filled_up_to_the_widest_for_a_server(tmp_path: Path) -> None:
    ranks = {DENSE.modules[0].path: 3, DENSE.modules[9].path: 1}
    run = run_of("tiny-dense", ModuleRanks(ranks))
    run, expected = trained(run, str(tmp_path / "study" / "adapters" / run.digest))
    folder = write_study(tmp_path / "study", [run], model="tiny-dense")
    target, _ = exported(folder, to=tmp_path / "served", format="vllm")
    config = json.loads((target / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 6)
    fresh = models.load("tiny-dense", dtype="float32").model
    by_name.apply(fresh, target)
    torch.testing.assert_close(logits(fresh), expected, rtol=0, atol=CLOSE * float(expected.abs().max()))


def test_ranks_of_experts_are_taken_by_peft_which_says_that_they_are_not(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    stack = next(m for m in MOE.modules if m.num_experts)
    ranks = ModuleRanks({MOE.modules[0].path: 9}, {stack.path: (2, *[0] * (stack.num_experts - 2), 1)})
    run, _ = trained(run_of("tiny-moe", ranks), str(tmp_path / "study" / "adapters" / run_of("tiny-moe", ranks).digest))
    folder = write_study(tmp_path / "study", [run], model="tiny-moe")
    _, lines = exported(folder, to=tmp_path / "peft", format="peft")
    assert any("loaded by PEFT on a float32 base" in line for line in lines)
    assert any("'were ignored': they are not" in line for line in lines)
    assert not [w for w in recwarn if "did not match any targeted module" in str(w.message)]


def test_what_a_server_cannot_hold_is_refused_with_the_reason(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, known = exports["tiny-dense"]
    with pytest.raises(StudyError, match=r"^format=vllm cannot express this adapter: .* several LoRA experts"):
        exported(folder, to=tmp_path / "a", point=known["routed"][0], format="vllm")
    moe, known = exports["tiny-moe"]
    monkeypatch.setattr(shapes, "NAMED_EXPERTS", {"mixtral": {}})
    with pytest.raises(StudyError, match=r"the experts of 'olmoe' have no name of their own in its checkpoints"):
        exported(moe, to=tmp_path / "b", point=known["some"][0], format="vllm")
    assert not list(tmp_path.iterdir())


def test_a_model_for_the_converter_has_the_names_of_the_hub(exports: Exports, tmp_path: Path) -> None:
    folder, known = exports["tiny-moe"]
    target, lines = exported(folder, to=tmp_path / "gguf", point=known["some"][0], format="gguf-ready")
    assert "convert_hf_to_gguf.py gguf --outfile gguf.gguf" in lines[-1]
    assert "model.layers.0.mlp.experts.0.gate_proj.weight" in load_file(target / "model.safetensors")


def test_a_dense_point_is_configuration_for_three_programs(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    run = run_of("tiny-dense", single(DENSE))  # no adapter: none is needed
    recipe = replace(run.trial.recipe, lora_alpha=79.5, learning_rate=0.002, micro_batch_size=8)
    run = run.updated(trial=replace(run.trial, recipe=recipe))
    target, lines = exported(write_study(tmp_path / "s", [run], model="tiny-dense"), to=tmp_path / "c", format="config")
    config = LoraConfig.from_pretrained(str(target))
    model = models.load("tiny-dense", dtype="float32").model
    wrapped: Any = get_peft_model(model, config)
    adapted = {n.removeprefix("base_model.model.") for n, m in wrapped.named_modules() if hasattr(m, "lora_A")}
    assert adapted == {m.path for m in DENSE.modules[::3]}
    assert wrapped.peft_config["default"].lora_alpha / wrapped.peft_config["default"].r == 79.5 / 4
    axolotl, unsloth = (yaml.safe_load((target / f"{name}.yaml").read_text()) for name in ("axolotl", "unsloth"))
    assert set(axolotl["lora_target_modules"]) == set(unsloth["lora"]["target_modules"].split(",")) == adapted
    for rate, alpha in (
        (axolotl["learning_rate"], axolotl["lora_alpha"]),
        (unsloth["training"]["learning_rate"], unsloth["lora"]["lora_alpha"]),
    ):
        assert isinstance(alpha, int)
        assert rate * alpha == pytest.approx(0.002 * 79.5)
    assert (axolotl["micro_batch_size"], axolotl["gradient_accumulation_steps"]) == (8, 2)
    assert "keeps learning_rate·lora_alpha" in "\n".join(lines)


def test_configuration_of_chosen_experts_says_what_peft_cannot(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    run = run_of("tiny-moe", some(MOE))
    target, lines = exported(write_study(tmp_path / "s", [run], model="tiny-moe"), to=tmp_path / "c", format="config")
    wrapped: Any = get_peft_model(
        models.load("tiny-moe", dtype="float32").model, LoraConfig.from_pretrained(str(target))
    )
    stacks = {
        module.parameter_name: {int(re.findall(r"layers\.(\d+)", name)[0])}
        for name, module in wrapped.named_modules()
        if getattr(module, "parameter_name", "") in ("gate_up_proj", "down_proj")
    }
    assert set(stacks) == {"gate_up_proj", "down_proj"}
    text = (target / "axolotl.yaml").read_text()
    assert set(yaml.safe_load(text)["lora_target_parameters"]) >= {
        f"model.layers.{layer}.mlp.experts.{stack}" for layer in MOE.moe_layers[1:] for stack in stacks
    }
    assert "model.layers.0.mlp.experts" not in text
    assert "in them every expert is adapted" in "\n".join(lines)
    assert not (target / "unsloth.yaml").exists()


def test_configuration_is_refused_where_lora_alone_cannot_say_it(exports: Exports, tmp_path: Path) -> None:
    folder, known = exports["tiny-dense"]
    for point, reason in (("routed", "several LoRA experts with a router"), ("nothing", "adapts no module")):
        with pytest.raises(StudyError, match=f"format=config .*{reason}"):
            exported(folder, to=tmp_path / "no", point=known[point][0], format="config")


def test_a_merged_model_is_plain_and_rounded_only_where_asked(exports: Exports, tmp_path: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    study, known = exports["tiny-moe"]
    digest, expected = known["some"]
    weights = models.folder_of("tiny-moe") / "model.safetensors"
    before = hashlib.sha256(weights.read_bytes()).hexdigest()
    folder, lines = exported(study, to=tmp_path / "half", point=digest, format="merged", dtype="stored")
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == before  # mapped into memory, and summed into
    with safe_open(folder / "model.safetensors", framework="pt") as stored:
        assert {str(stored.get_slice(name).get_dtype()) for name in stored.keys()} == {"F16"}  # noqa: SIM118
    rounded = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    difference = (rounded - expected).abs().max() / expected.abs().max()
    assert 1e-5 < difference < 1e-2
    assert "which is the rounding of the weights; dtype=float32 has none" in " ".join(lines)
    assert AutoTokenizer.from_pretrained(folder)("a b").input_ids == models.load("tiny-moe").tokenizer("a b").input_ids
    assert "lora" not in (folder / "config.json").read_text()


def fp8_study(folder: Path) -> tuple[Path, str]:
    """A study on a base that lies on disk in fp8, and the base's name."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=128, **sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1)
    Qwen3ForCausalLM(config).save_pretrained(folder / "plain")
    char_tokenizer().save_pretrained(folder / "plain")
    write_fp8(folder / "plain", folder / "packed", folder / "exact", block=32)
    name = str(folder / "packed")
    run = run_of(name, single(models.shape_of(name)))
    run, _ = trained(run, str(folder / "study" / "adapters" / run.digest))
    return write_study(folder / "study", [run], model=name), name


@pytest.mark.parametrize("format", ["merged", "peft"])
def test_a_base_that_is_stored_as_fp8_is_dequantised_told_and_compared_as_it_is_written(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, name = fp8_study(tmp_path)
    attached = adapter.load(base(name), study / "adapters" / next((study / "adapters").iterdir()).name)
    expected = logits(base(name))
    attached.detach()
    folder, lines = exported(study, to=tmp_path / "out", format=format, model=name)
    assert "note: 'packed' is stored as fp8: dequantised to float32" in lines
    if format == "merged":
        stored = load_file(folder / "model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
        assert not any("scale" in tensor for tensor in stored)
        assert "quantization" not in (folder / "config.json").read_text()
        found = loaded_as_printed(lines, tmp_path, monkeypatch)
        assert (logits(found) - expected).abs().max() < 1e-4 * expected.abs().max()
        with pytest.raises(StudyError, match=r"is stored as F8_E4M3, .*: use dtype=float32"):
            exported(study, to=tmp_path / "half", format="merged", dtype="stored")


@pytest.mark.parametrize("damage", ["value", "missing", "half"])
def test_a_merged_model_is_refused_where_its_files_are_something_else(
    damage: str, exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = PreTrainedModel.save_pretrained

    def damaged(model: PreTrainedModel, folder: Path) -> None:
        save(model, folder)
        file = folder / "model.safetensors"
        tensors = load_file(file)
        name = next(name for name in tensors if "q_proj" in name)
        match damage:
            case "value":
                tensors[name] += 1
            case "missing":
                del tensors[name]
            case "half":
                config = json.loads((folder / "config.json").read_text()) | {"dtype": "float16"}
                (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", damaged)
    study, known = exports["tiny-moe"]
    said = {"value": "logits differ by", "missing": "loaded again it has missing keys", "half": "hold torch.float16"}
    with pytest.raises(StudyError, match=f"format=merged would not be .*{said[damage]}.*nothing was written") as error:
        exported(study, to=tmp_path / "out", point=known["some"][0], format="merged")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_our_own_form_is_refused_where_the_copy_is_another_adapter(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(source: Path, target: Path) -> None:
        tensors = load_file(source)
        tensors[min(tensors)] *= 2
        save_file(tensors, target)

    monkeypatch.setattr(shutil, "copyfile", damaged)
    study, known = exports["tiny-moe"]
    with pytest.raises(StudyError, match=r"format=adapter would not be .*cannot be read again .*checksum is another"):
        exported(study, to=tmp_path / "out", point=known["some"][0], format="adapter")
    assert not list(tmp_path.iterdir())


def test_the_best_and_the_knee_and_ids(exports: Exports) -> None:
    study, known = exports["tiny-moe"]
    report = Report(read(study))
    assert find(report, "best")[1].digest == report.front[-1].best.digest
    for digest, _ in known.values():
        assert find(report, digest)[1].digest == digest
        assert find(report, digest[:9])[1].digest == digest
    with pytest.raises(StudyError, match=r"no run of .* begins with 'bets'; did you mean 'best'.*the front has"):
        find(report, "bets")
    with pytest.raises(StudyError, match=r"^3 ids begin with ''|no run of"):
        find(report, "")


def test_several_seeds_are_one_point_whose_kept_adapter_is_taken(tmp_path: Path) -> None:
    runs = [run_of("tiny-moe", ExpertSelection({}), accuracy=a, seed=seed) for seed, a in enumerate((0.5, 0.52, 0.54))]
    kept, _ = trained(runs[1], str(tmp_path / "s" / "adapters" / runs[1].digest))
    gone = [run.updated(adapter=str(tmp_path / "gone" / run.digest)) for run in (runs[0], runs[2])]
    study = write_study(tmp_path / "s", [gone[0], kept, gone[1]])
    folder, _ = exported(study, to=tmp_path / "out")
    card = (folder / "README.md").read_text()
    assert "| seeds behind it | 3; these weights: seed 1, accuracy 0.520 |" in card
    assert re.search(r"\| accuracy \| 0\.520 ± 0\.0\d\d \(one standard error\) \|", card)
    with pytest.raises(StudyError, match=f"is gone: .*another seed of this point is kept: point={kept.digest[:8]};"):
        exported(study, to=tmp_path / "again", point=runs[2].digest)


# --- where things lie


def test_adapters_and_exports_at_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, bucket = run_of("tiny-moe", ExpertSelection({})), (tmp_path / "bucket").as_uri()
    run, expected = trained(run, f"{bucket}/s/adapters/{run.digest}")
    study = write_study(tmp_path / "s", [run], storage=bucket)
    place = (tmp_path / "bucket" / "out").as_uri()
    _, lines = exported(study, to=place)
    found = loaded_as_printed(lines, tmp_path / "bucket", monkeypatch)
    torch.testing.assert_close(logits(found), expected, rtol=CLOSE, atol=CLOSE)
    with pytest.raises(StudyError, match="is not empty: choose another folder, or overwrite=true"):
        exported(study, to=place)
    exported(study, to=place, overwrite="true")


def test_what_lies_there_is_replaced_only_if_it_is_an_export_and_only_when_asked(
    exports: Exports, tmp_path: Path
) -> None:
    study, known = exports["tiny-moe"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("# lora-expert-search is what I like\n")
    for overwrite, why in (("false", "overwrite=true to replace an earlier export"), ("true", "no export")):
        with pytest.raises(StudyError, match=why):
            exported(study, to=tmp_path / "mine", overwrite=overwrite)
    (tmp_path / "out").mkdir()  # empty: nothing to lose
    exported(study, to=tmp_path / "out", point=known["some"][0])
    before = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
    with pytest.raises(StudyError, match="is not empty"):
        exported(study, to=tmp_path / "out", format="peft")
    with pytest.raises(StudyError, match="the base model is needed for format=merged"):  # fails half way
        exported(study, to=tmp_path / "out", format="merged", model="no-such", overwrite="true")
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == before
    exported(study, to=tmp_path / "out", point=known["none"][0], format="peft", overwrite="true")
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]


def test_a_base_that_has_moved_and_one_that_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    shutil.copytree(models.folder_of("tiny-moe"), tmp_path / "base")
    name = str(tmp_path / "base")
    run = run_of(name, some(MOE))
    run, expected = trained(run, str(tmp_path / "s" / "adapters" / run.digest))
    study = write_study(tmp_path / "s", [run], model=name)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(StudyError, match="the base model is needed for format=merged: unknown model"):
        exported(study, to=tmp_path / "out", format="merged")
    with pytest.raises(StudyError, match=r"is for .*base \(olmoe\), got a llama model|another model"):
        exported(study, to=tmp_path / "out", format="merged", model="tiny-dense")
    for format in ("adapter", "peft"):
        folder, lines = exported(study, to=tmp_path / format, format=format, model=tmp_path / "moved")
        texts = [f.read_text(errors="replace") for f in folder.iterdir()]
        assert not any(str(tmp_path) in text for text in texts)  # the folder's name stays, where it lay does not
        assert 'models.load("moved"' in lines[-1]
        found = loaded_as_printed(lines, tmp_path, monkeypatch)
        torch.testing.assert_close(logits(found), expected, rtol=CLOSE, atol=CLOSE)


# --- what cannot be had


def test_an_adapter_that_was_deleted_can_be_trained_again_by_the_command_in_the_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command's own first proposal is the run whose adapter is gone, to the last digit of its learning rate."""
    from search.propose.sampler import Proposer
    from search.session.prepare import prepare_training

    config = RunConfig(recipe={"steps": 7}, trials=5, storage=str(tmp_path), seed=3)
    proposer = Proposer(prepare_training(config), sampler="random")
    proposals = [next_proposal(proposer) for _ in range(9)]
    proposal = next(p for p in proposals[4:] if p.trial.allocator in ("random", "all", "none"))
    gone = Outcome(proposal.trial, "complete", proposal.trainable_params, 0.4, adapter=str(tmp_path / "adapters" / "x"))
    study = write_study(tmp_path / "s", [gone], {gone.digest: dict(proposal.params)}, **vars(config))
    assert main([str(study), f"to={tmp_path / 'out'}", f"point={gone.digest}"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "keep=all keeps everything" in err
    assert str(tmp_path / "adapters") not in err
    command = err.partition("train this point again: python -m search.run ")[2].split()
    again = parse(command)
    assert (again.trials, again.keep, again.storage) == (1, "all", "studies")
    assert next_proposal(Proposer(prepare_training(again), sampler="tpe")).trial.digest == gone.digest


def test_a_run_that_never_had_an_adapter_says_why(tmp_path: Path) -> None:
    run = run_of("tiny-moe", ALL, status="diverged", message="loss became NaN at step 3").updated(accuracy=None)
    study = write_study(tmp_path / "s", [run])
    with pytest.raises(StudyError, match=r"has no adapter: it is diverged \(loss became NaN at step 3\)"):
        exported(study, to=tmp_path / "out", point=run.digest[:6])
    with pytest.raises(StudyError, match="has no point=best: it has no finished trial"):
        exported(study, to=tmp_path / "out")


def test_a_quantised_base_is_not_merged(tmp_path: Path) -> None:
    run = run_of("tiny-moe", ExpertSelection({}))
    run, _ = trained(run, str(tmp_path / "s" / "adapters" / run.digest))
    study = write_study(tmp_path / "s", [run], quantization="nf4")
    with pytest.raises(StudyError, match=r"quantization=nf4.*use format=adapter or format=peft"):
        exported(study, to=tmp_path / "out", format="merged")
    _, lines = exported(study, to=tmp_path / "out")
    assert "quantization='nf4'" in lines[-1]


def test_peft_takes_an_adapter_to_its_packed_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    run = run_of("tiny-dense", single(DENSE))
    run, expected = trained(run, str(tmp_path / "s" / "adapters" / run.digest), quantization="nf4")
    study = write_study(tmp_path / "s", [run], model="tiny-dense", quantization="nf4")
    _, lines = exported(study, to=tmp_path / "out", format="peft")
    assert "loaded by PEFT on a nf4 base" in " ".join(lines)
    found = loaded_as_printed(lines, tmp_path, monkeypatch)
    torch.testing.assert_close(logits(found), expected, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("damage", ["not finite", "another run's", "torn"])
def test_an_adapter_that_is_not_what_the_records_say_is_not_handed_out(damage: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    run = run_of("tiny-moe", some(MOE))
    place = tmp_path / "s" / "adapters" / run.digest
    run, _ = trained(run, str(place))
    match damage:
        case "not finite":
            tensors = load_file(place / "adapter.safetensors")
            next(iter(tensors.values()))[0, 0] = float("nan")
            save_file(tensors, place / "adapter.safetensors")
        case "another run's":
            trained(run_of("tiny-moe", ExpertSelection({})), str(place))
        case "torn":
            (place / "adapter.safetensors").write_bytes((place / "adapter.safetensors").read_bytes()[:99])
    study = write_study(tmp_path / "s", [run])
    for format in ("adapter", "merged", "peft"):
        with pytest.raises(StudyError, match=r"not finite|another allocation|damaged"):
            exported(study, to=tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["formt=peft"], "unknown key 'formt'; did you mean 'format'"),
        (
            ["format=pft"],
            "unknown format 'pft': choose from adapter, config, gguf-ready, merged, peft, vllm; did",
        ),
        (["dtype=float16"], "unknown dtype 'float16': choose from float32, stored"),
        (["dtype=stored"], "dtype is for format=merged and gguf-ready"),
        (["overwrite=yes"], "overwrite must be true or false, got 'yes'"),
        (["to="], "to=FOLDER is missing"),
        (["another"], "give the folder of one study, got 2"),
        (["point=best", "to=x"], "no study in"),
    ],
)
def test_a_request_that_cannot_work_gets_one_line_and_exit_code_2(
    words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = [] if any(word.startswith("to=") for word in words) else [f"to={tmp_path / 'out'}"]
    assert main([str(tmp_path / "nothing"), *to, *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert expected in captured.err
    assert captured.out == ""
    assert not list(tmp_path.iterdir())


def test_a_uri_without_records_is_no_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"file://{tmp_path}/x", "to=out"]) == 2
    assert f"no study at 'file://{tmp_path}/x': give URI/NAME" in capsys.readouterr().err


def test_help_and_errors_load_neither_torch_nor_transformers(tmp_path: Path) -> None:
    script = (
        "import sys; from search.export.__main__ import main; code = main(sys.argv[1:]); "
        "heavy = {'ray', 'torch', 'transformers', 'mlflow', 'peft'} & set(sys.modules); "
        "print('heavy:', sorted(heavy), code)"
    )
    for words, code in ((["help"], 0), ([str(tmp_path), "to=x", "format=merged"], 2)):
        done = subprocess.run(
            [sys.executable, "-c", script, *words], capture_output=True, text=True, check=True, cwd=ROOT
        )
        assert f"heavy: [] {code}" in done.stdout


# --- the card


def test_the_card_says_what_is_known_and_the_hub_can_read_it(exports: Exports, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    study, known = exports["tiny-moe"]
    folder, _ = exported(study, to=tmp_path / "out", point=known["some"][0], format="peft")
    text = (folder / "README.md").read_text()
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "tiny-moe"
    assert card.data.library_name == "peft"
    assert card.data.base_model_relation == "adapter"
    assert {"lora", "lora-expert-search", "mixture-of-experts", "sieve"} <= set(card.data.tags)
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("default", "accuracy", 0.3)
    params = some(MOE).trainable_params(MOE, rank=4)
    stored = sum(t["shape"][0] * t["shape"][1] for t in header_of(models.folder_of("tiny-moe"), dims=2))
    assert f"| trainable parameters | {params:,}, {params / stored:.2%} of the base's {stored:,} |" in text
    for expected in (
        "0.300 ± 0.030",
        "feedbeef",
        "x86_64 CPU",
        "| lora_alpha | 8 |",
        "licence of the base model",
        "4.1",
    ):
        assert expected in text
    assert "python -m search.run space=sieve" in text
    assert "layer   2    3 of 16  .#..#..#........" in text
    assert re.search(r"the file holds [\d,]+ values, \d+\.\d\d times the ", text)


def test_the_card_has_both_splits_and_the_hub_the_test_accuracy(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    run = run_of("tiny-moe", ExpertSelection({}), accuracy=0.52)
    kept, _ = trained(run, str(tmp_path / "s" / "adapters" / run.digest))
    facts = {**kept.versions, "test_data": "c0ffee"}
    study = write_study(tmp_path / "s", [kept.updated(test=Score(0.49, 0.04), versions=facts)], select_on="validation")
    folder, lines = exported(study, to=tmp_path / "out")
    assert "validation 0.520 ± 0.030, test 0.490 ± 0.040)" in lines[0]
    text, card = (folder / "README.md").read_text(), ModelCard.load(folder / "README.md")
    (result,) = card.data.eval_results
    assert (result.metric_value, result.metric_name, result.dataset_split) == (0.49, "test accuracy (1 seed)", "test")
    for line in (
        "| validation accuracy | 0.520 ± 0.030 (one standard error) |",
        "| test accuracy | 0.490 ± 0.040 (one standard error) |",
        "| seeds behind it | 1; these weights: seed 0, validation 0.520, test 0.490 |",
        "| chosen among | 1 points, by validation accuracy, which is therefore a little high; nothing was chosen by",
        "| hash of the test documents | c0ffee |",
    ):
        assert line in text
    untested = write_study(tmp_path / "u", [kept], select_on="validation")
    storage_of = tmp_path / "u" / "adapters"
    shutil.copytree(tmp_path / "s" / "adapters", storage_of)
    folder, _ = exported(untested, to=tmp_path / "again")
    (result,) = ModelCard.load(folder / "README.md").data.eval_results
    assert (result.metric_value, result.metric_name) == (0.52, "validation accuracy (1 seed)")


def header_of(folder: Path, *, dims: int) -> list[dict[str, Any]]:
    """Sizes of all tensors of a model folder, as lists of at least `dims` numbers."""
    raw = (folder / "model.safetensors").read_bytes()
    head = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    sizes = [value["shape"] for key, value in head.items() if key != "__metadata__"]
    return [{"shape": [*size, *[1] * (dims - len(size))]} for size in sizes]


def test_the_values_of_a_base_are_counted_by_type_without_loading_them(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {"a": torch.zeros(3, 5, dtype=torch.bfloat16), "b": torch.zeros(2), "c": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "model-1.safetensors", metadata={"format": "pt"})
    save_file({"d": torch.zeros(4, 4, dtype=torch.float8_e4m3fn)}, tmp_path / "model-2.safetensors")
    save_file(tensors, tmp_path / "consolidated.safetensors")  # no part of the model: the index does not name it
    weight_map = dict.fromkeys("abc", "model-1.safetensors") | {"d": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert formats._stored(tmp_path) == {"BF16": 15, "F32": 3, "F8_E4M3": 16}


def test_maps_of_allocations_by_hand() -> None:
    lines = map_lines(ExpertSelection({1: (0, 3)}), MOE)
    assert lines[0] == "2 of 64 experts have LoRA (#), by layer"
    assert lines[2] == "layer   1    2 of 16  #..#............"
    paths = {f"model.layers.{layer}.self_attn.q_proj": layer + 9 for layer in (0, 2)}
    dense = map_lines(ExpertCounts(paths), DENSE)
    assert dense[0].startswith("20 LoRA experts (with a router each)")
    assert dense[1].split() == ["layer", *(str(i) for i in range(DENSE.num_layers))]
    assert dense[2].split() == ["q_proj", "9", "0", "11", *["0"] * (DENSE.num_layers - 3)]
    assert len({len(line) for line in dense[1:]}) == 1


def test_maps_of_ranks_by_hand() -> None:
    lines = map_lines(ModuleRanks({"model.layers.2.self_attn.q_proj": 12}), DENSE)
    assert lines[0] == "the LoRA rank of each module, 12 in all"
    assert lines[2].split() == ["q_proj", "0", "0", "12", *["0"] * (DENSE.num_layers - 3)]
    stack = {"model.layers.1.mlp.experts.up_proj": (3, 0, 2, *[0] * 13)}
    moe = {line.split()[0]: line.split()[1:] for line in map_lines(ModuleRanks({}, stack), MOE)[1:]}
    assert moe["experts.up_proj"] == ["0", "1", *["0"] * (MOE.num_layers - 2)]  # 5/16, rounded up
    assert moe["gate"] == ["0"] * MOE.num_layers


def test_nothing_secret_and_no_folder_of_this_machine_gets_out(tmp_path: Path) -> None:
    run = run_of("tiny-moe", ExpertSelection({}))
    run, _ = trained(run, str(tmp_path / "s" / "adapters" / run.digest))
    study = write_study(
        tmp_path / "s",
        [run],
        storage="/home/me/studies",
        tracking_uri="https://me:hunter2@mlflow.example.org",
        plugins=["/home/me/own.py", "~/more.py"],
    )
    folder, _ = exported(study, to=tmp_path / "out")
    for file in folder.iterdir():
        text = file.read_text(errors="replace")
        for secret in ("hunter2", "/home/me", "~/more", "mlflow.example", str(tmp_path)):
            assert secret not in text, file.name
    assert "'plugins=[path/to/own.py,path/to/more.py]'" in (folder / "README.md").read_text()


NAMES = st.text("abcXYZ0189._-", min_size=1, max_size=8).filter(lambda s: s.strip("."))


@given(
    folders=st.lists(NAMES, min_size=1, max_size=4),
    home=st.sampled_from(["/", "~/", "file:///"]),
    around=st.sampled_from(["{}", "task={}", "'plugins=[{},b]'", "cannot read {}: gone", '{{"a": "{}"}}']),
)
def test_a_path_leaves_its_last_name_and_nothing_else(folders: list[str], home: str, around: str) -> None:
    said = portable(around.format(home + "/".join(["Secret", *folders])))
    assert "Secret" not in said
    assert folders[-1] in said


@pytest.mark.parametrize(
    "text",
    ["allenai/OLMoE-1B-7B-0924", "s3://bucket/dir/x", "https://a.org/b", "task=my/q.yaml", "1/2 and/or 3 / 4", "a b"],
)
def test_what_is_no_path_of_this_machine_stays(text: str) -> None:
    assert portable(text) == text


def test_a_command_keeps_what_the_result_depends_on() -> None:
    command = "python -m search.run space=sieve storage=/x/y tracking_uri='http://h /' seed=3 task=/d/q.yaml num_cpus=2"
    assert portable_command(command) == "python -m search.run space=sieve seed=3 task=path/to/q.yaml"


def test_a_printed_command_runs_in_a_shell_and_on_another_machine() -> None:
    config = RunConfig(model="/home/me/my models/olmoe", metric="a & b", storage="/home/me/it's", max_concurrent=2)
    config = replace(config, pins={"pattern": "2468", "name": 'say "hi" #1'}, plugins=["/home/me/own.py", "b,c.py"])
    words = shlex.split(portable_command(config.command()))
    assert "max_concurrent" not in " ".join(words)
    again = parse(words[3:])
    assert (again.metric, again.plugins, again.storage) == ("a & b", ["path/to/own.py", "b,c.py"], "studies")
    assert again.pins == {"pattern": 2468, "name": 'say "hi" #1'}
