"""The allocation and the recipe of a point as configuration files, to be trained elsewhere; no weights.

    commands = write_config(conversion)        # adapter_config.json, axolotl.yaml, unsloth.yaml in conversion.target

adapter_config.json is PEFT's and is built by PEFT; axolotl.yaml and unsloth.yaml hold the keys that the two programs'
own schemas list (axolotl/utils/schemas/peft.py, unsloth_cli/config.py), and neither program ran here. What a file
cannot say is a note, and a file that would say something else is not written:

- PEFT adapts all experts of a layer or none, and gate and up together.
- Axolotl and Unsloth have one rank for all modules, Unsloth no LoRA on stacked experts, and both a whole lora_alpha.
  Where alpha has to be rounded the learning rate keeps learning_rate·lora_alpha, which is what a recipe is tuned in.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import yaml

from allocators.core.errors import StudyError
from allocators.core.types import ExpertCounts, ExpertSelection, ModelShape, ModuleRanks, Recipe
from search.export.formats import Conversion
from search.records.redact import portable
from trainers import models

YOUR_DATA = "your/dataset"  # to be filled in: a task of lm-evaluation-harness is no data set of theirs


def write_config(conversion: Conversion) -> str:
    """Raises StudyError where LoRA alone cannot express the allocation."""
    trial = conversion.run.trial
    shape = models.shape_of(conversion.base)
    ranks = ranks_of(conversion, shape)
    if not ranks:
        raise StudyError("format=config has nothing to say: this point adapts no module")
    _write_peft(conversion, ranks)
    lines = [
        "from peft import LoraConfig, get_peft_model",
        f"model = get_peft_model(base, LoraConfig.from_pretrained({conversion.quoted}))",
    ]
    if len(set(ranks.values())) > 1:
        conversion.notes.append("axolotl.yaml and unsloth.yaml are not written: both have one rank for all modules")
        return "\n".join(lines)
    for name, config in _others(conversion, shape, ranks, trial.recipe):
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=10_000)
        (conversion.target / name).write_text(f"# Fill in the data set: {YOUR_DATA}\n{text}", encoding="utf-8")
        command = "axolotl train" if name.startswith("axolotl") else "unsloth train --config"
        lines.append(f"# {command} {conversion.name}/{name}")
    return "\n".join(lines)


def ranks_of(conversion: Conversion, shape: ModelShape) -> dict[str, int]:
    """Name → LoRA rank of what PEFT can name: linear layers, and parameters where the map is none in transformers 5."""
    trial = conversion.run.trial
    rank, stacks = trial.recipe.rank, {True: "gate_up_proj", False: "down_proj"}
    ranks: dict[str, int] = {}
    whole: Counter[str] = Counter()
    match trial.allocation:
        case ExpertCounts() as counted:
            if several := counted.several:
                raise StudyError(
                    f"format=config cannot express this point: {several[0]} and {len(several) - 1} more modules have "
                    "several LoRA experts with a router, which neither PEFT nor Axolotl nor Unsloth has"
                )
            ranks = {path: rank for path, n in counted.counts.items() if n}
        case ExpertSelection() as chosen:
            for spec in shape.modules:
                ids = chosen.in_layer(spec.layer)
                if spec.role == "attention":
                    ranks[spec.path] = rank
                elif spec.role != "expert":
                    ranks[f"{spec.path}.weight"] = rank
                elif ids:
                    ranks[f"{spec.path.rpartition('.')[0]}.{stacks[spec.name != 'down_proj']}"] = rank
                    whole["left out"] += (spec.num_experts - len(ids)) * (spec.name == "down_proj")
        case ModuleRanks() as ranked:
            for spec in shape.modules:
                if spec.role == "expert":
                    if most := max(ranked.of(spec)):
                        name = f"{spec.path.rpartition('.')[0]}.{stacks[spec.name != 'down_proj']}"
                        ranks[name] = max(ranks.get(name, 0), most)
                        whole["left out"] += sum(of < most for of in ranked.of(spec))
                elif own := ranked.ranks.get(spec.path):
                    linear = not shape.is_moe or spec.role == "attention"
                    ranks[spec.path if linear else f"{spec.path}.weight"] = own
    if whole["left out"]:
        conversion.notes.append(
            "PEFT adapts all experts of a layer or none: the layers are those of this point, and in them every expert "
            "is adapted; format=peft takes the trained experts alone"
        )
    return ranks


def _write_peft(conversion: Conversion, ranks: dict[str, int]) -> None:
    from peft import LoraConfig

    recipe = conversion.run.trial.recipe
    widest, scale = max(ranks.values()), recipe.lora_alpha / recipe.rank
    parameters = _parameters(ranks)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=widest,
        lora_alpha=scale * widest,  # type: ignore[arg-type]  # PEFT only divides it by the rank
        lora_dropout=0.0 if parameters else recipe.lora_dropout,
        target_modules=sorted(set(ranks) - set(parameters)),
        target_parameters=parameters or None,
        rank_pattern={name: rank for name, rank in ranks.items() if rank < widest},
        alpha_pattern={name: scale * rank for name, rank in ranks.items() if rank < widest},
        base_model_name_or_path=portable(conversion.base),
    )
    config.save_pretrained(str(conversion.target))
    file = conversion.target / "adapter_config.json"
    text = json.loads(file.read_text(encoding="utf-8"))
    text["target_modules"].sort()
    file.write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")


def _parameters(ranks: dict[str, int]) -> list[str]:
    """Names of parameters: transformers 5 keeps routers and stacked experts as such."""
    return sorted(name for name in ranks if name.endswith(".weight") or ".experts." in name)


def _others(
    conversion: Conversion, shape: ModelShape, ranks: dict[str, int], recipe: Recipe
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names of files for programs with one rank for all modules, and what they hold."""
    rank = next(iter(ranks.values()))
    exact = recipe.lora_alpha * rank / recipe.rank
    alpha = max(1, round(exact))
    rate = recipe.learning_rate * exact / alpha
    if alpha != exact:
        conversion.notes.append(
            f"Axolotl and Unsloth take a whole lora_alpha: {exact:g} is {alpha} there, and the learning rate "
            f"{rate:.3g} keeps learning_rate·lora_alpha"
        )
    yield "axolotl.yaml", _axolotl(conversion, ranks, recipe, rank=rank, alpha=alpha, rate=rate)
    if shape.is_moe:
        conversion.notes.append("unsloth.yaml is not written: its LoRA section has no word for stacked experts")
    else:
        yield "unsloth.yaml", _unsloth(conversion, ranks, recipe, rank=rank, alpha=alpha, rate=rate)


def _axolotl(
    conversion: Conversion, ranks: dict[str, int], recipe: Recipe, *, rank: int, alpha: int, rate: float
) -> dict[str, Any]:
    parameters = _parameters(ranks)
    return {
        "base_model": portable(conversion.base),
        "datasets": [{"path": YOUR_DATA, "type": "chat_template"}],
        "sequence_len": recipe.max_length,
        "adapter": "lora",
        "lora_r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if parameters else recipe.lora_dropout,
        "lora_target_modules": sorted(set(ranks) - set(parameters)),
        **({"lora_target_parameters": parameters} if parameters else {}),
        "learning_rate": rate,
        "lr_scheduler": recipe.schedule,
        "warmup_ratio": recipe.warmup_ratio,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "optimizer": "adamw_torch",
        "micro_batch_size": recipe.micro_batch_size,
        "gradient_accumulation_steps": recipe.batch_size // recipe.micro_batch_size,
        **({"max_steps": recipe.steps} if recipe.steps else {"num_epochs": recipe.epochs}),
        "seed": conversion.run.trial.seed,
        "output_dir": "./outputs",
    }


def _unsloth(
    conversion: Conversion, ranks: dict[str, int], recipe: Recipe, *, rank: int, alpha: int, rate: float
) -> dict[str, Any]:
    training = {
        "training_type": "lora",
        "load_in_4bit": conversion.settings.get("quantization") == "nf4",
        "max_seq_length": recipe.max_length,
        "learning_rate": rate,
        "batch_size": recipe.micro_batch_size,
        "gradient_accumulation_steps": recipe.batch_size // recipe.micro_batch_size,
        "warmup_steps": round(recipe.warmup_ratio * recipe.steps),
        "weight_decay": recipe.weight_decay,
        "random_seed": conversion.run.trial.seed,
        **({"max_steps": recipe.steps} if recipe.steps else {"num_epochs": max(1, round(recipe.epochs))}),
    }
    lora = {
        "lora_r": rank,
        "lora_alpha": alpha,
        "lora_dropout": recipe.lora_dropout,
        "target_modules": ",".join(sorted(ranks)),
    }
    return {
        "model": portable(conversion.base),
        "data": {"dataset": YOUR_DATA},
        "training": training,
        "lora": lora,
    }
