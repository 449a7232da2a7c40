"""The form that servers of many adapters load: one linear map a name, every expert by its own, one rank and one scale.

    from trainers import adapter, models
    from search.export import by_name

    model = models.load("tiny-moe", dtype="float32").model
    by_name.write(model, adapter.read("best"), "served", base="tiny-moe")   # the rank that a server has to allow
    by_name.apply(model, "served")                                     # W + (lora_alpha/r)·B·A, from the files

It is PEFT's folder (adapter_config.json, adapter_model.safetensors) with the names of the base's checkpoint on the hub,
`base_model.model.model.layers.0.mlp.experts.7.gate_proj.lora_A.weight`. What the loaders of vLLM (in vllm/lora/:
lora_model.py, lora_weights.py, peft_helper.py) and SGLang (python/sglang/srt/lora/) ask for, as their sources say;
neither ran here:

- One r and one lora_alpha for everything: `rank_pattern` and `alpha_pattern` are not read. Lower ranks are filled up
  with zeros, so that all have the widest, and lora_alpha/r is the scale of all.
- In a layer where one expert has LoRA, all experts have it, and each on gate, up and down, because they are stacked.
  The others get zeros, which is the same function.
- A layer without LoRA on its experts, and a module without LoRA, are not in the file.
- Nothing is trained further in this form.

Shapes: E experts, I input features, O output features, R rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allocators.core.errors import StudyError
from allocators.core.shapes import NAMED_EXPERTS, unnamed_experts
from trainers import storage
from trainers.adapter import peft_format
from trainers.adapter.expert_lora import weight_stacks
from trainers.adapter.files import Saved
from trainers.adapter.linear import module_at

_PREFIX = "base_model.model."
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's --max-lora-rank takes


@dataclass(frozen=True)
class Pair:
    """LoRA on one linear map: A [R, I] and B [O, R]; `expert` where the map is one of a stack."""

    path: str
    a: Tensor
    b: Tensor
    expert: int | None = None


def refusal(saved: Saved, model_type: str) -> str:
    """Why no server would load this adapter; "" where the loaders' sources say that they do."""
    if reason := peft_format.refusal(saved):
        return reason
    return unnamed_experts(model_type) if saved.shape.is_moe else ""


def write(model: nn.Module, saved: Saved, folder: storage.Location, *, base: str, revision: str | None = None) -> int:
    """Writes the folder; gives the rank that a server has to allow.

    model      the base, in float32
    base       what adapter_config.json calls it, with the commit of a hub model as `revision`

    Raises StudyError where the adapter has no such form, or the model is not its base.
    """
    from safetensors.torch import save_file

    model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
    if reason := refusal(saved, model_type):
        raise StudyError(f"the adapter in {saved.folder} cannot be served by name: {reason}")
    pairs = list(_pairs(model, saved))
    rank = max(pair.a.size(0) for pair in pairs)
    names = [_renamed(pair, model_type if saved.shape.is_moe else "") for pair in pairs]
    tensors = {}
    for name, pair in zip(names, pairs, strict=True):
        a_RI, b_OR = pair.a.new_zeros(rank, pair.a.size(1)), pair.b.new_zeros(pair.b.size(0), rank)
        a_RI[: pair.a.size(0)], b_OR[:, : pair.b.size(1)] = pair.a, pair.b
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = a_RI
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = b_OR
    alpha = saved.lora.scale * rank
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "revision": revision,
        "target_modules": sorted({name.rpartition(".")[2] for name in names}),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    save_file(tensors, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
    (Path(folder) / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return next((allowed for allowed in _RANKS if allowed >= rank), rank)


def apply(model: nn.Module, folder: storage.Location) -> None:
    """Adds B·A·lora_alpha/r to the weights of a base in float32, by the names in the files alone.

    Raises StudyError where the base has no such map, or one of another size.
    """
    from safetensors.torch import load_file

    config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    back = {new: old for old, new in NAMED_EXPERTS.get(str(getattr(model.config, "model_type", "")), {}).items()}
    with torch.no_grad():
        for name in sorted(tensors):
            if not name.endswith(".lora_A.weight"):
                continue
            a_RI, b_OR = tensors[name], tensors[name.replace(".lora_A.", ".lora_B.")]
            path = name.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
            weight = _weight(model, [back.get(part, part) for part in path.split(".")])
            if weight.shape != (b_OR.size(0), a_RI.size(1)):
                raise StudyError(f"{path} is {list(weight.shape)} in the base, and not what the adapter was made for")
            weight += scale * (b_OR @ a_RI)


def _weight(model: Any, parts: list[str]) -> Tensor:
    """The weight [O, I] of one linear map, a view where it is part of a stack."""
    if len(parts) > 2 and parts[-3] == "experts" and parts[-2].isdigit():
        path, expert, projection = ".".join(parts[:-2]), int(parts[-2]), parts[-1]
        module = module_at(model, path, name="the base")
        for stack, projections in weight_stacks(module, path=path).items():
            if projection in projections:
                rows: Tensor = (
                    getattr(module, stack).data[expert].chunk(len(projections))[projections.index(projection)]
                )
                return rows
    found: Tensor = module_at(model, ".".join(parts), name="the base").weight.data
    return found


def _renamed(pair: Pair, model_type: str) -> str:
    """The name of a map in the checkpoints of that family."""
    names, path = NAMED_EXPERTS.get(model_type, {}), pair.path.split(".")
    if pair.expert is not None:
        path.insert(-1, str(pair.expert))
    return ".".join(names.get(part, part) for part in path)


def _pairs(model: nn.Module, saved: Saved) -> Iterator[Pair]:
    """Every linear map with LoRA, and of a layer with LoRA on an expert all maps of all experts."""
    experts: dict[str, dict[str, list[Pair]]] = {}
    for target in peft_format.targets(model, saved):
        layer, _, stack = target.name.rpartition(".")
        if not target.parameter or stack == "weight":
            yield Pair(target.name.removesuffix(".weight"), target.a, target.b)
            continue
        projections = weight_stacks(module_at(model, layer, name=saved.shape.name), path=layer)[stack]
        experts.setdefault(layer, {}).update(_split(target, layer, projections))
    for layer, found in experts.items():
        for spec in saved.shape.of_role("expert"):
            if spec.path.rpartition(".")[0] != layer:
                continue
            zeros = torch.zeros(1, spec.in_features), torch.zeros(spec.out_features, 1)
            yield from found.get(spec.name) or (Pair(spec.path, *zeros, expert) for expert in range(spec.num_experts))


def _split(target: peft_format.Target, layer: str, projections: tuple[str, ...]) -> dict[str, list[Pair]]:
    """PEFT's A [E·R, I] and B [O, R·E] of one stack as pairs, projection by projection.

    Of gate and up, which have R/2 each there, B is block-diagonal.
    """
    each = target.rank // len(projections)
    a_ERI = target.a.unflatten(0, (-1, target.rank))
    b_EOR = target.b.unflatten(1, (target.rank, -1)).permute(2, 0, 1)
    rows = target.b.size(0) // len(projections)
    return {
        name: [
            Pair(
                f"{layer}.{name}",
                a_ERI[e, n * each : (n + 1) * each],
                b_EOR[e, n * rows : (n + 1) * rows, n * each : (n + 1) * each],
                e,
            )
            for e in range(a_ERI.size(0))
        ]
        for n, name in enumerate(projections)
    }
