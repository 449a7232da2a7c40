"""PEFT's form of an adapter, where PEFT can express it: a folder that `PeftModel.from_pretrained(base, folder)` loads.

    from trainers import adapter, models
    from trainers.adapter import peft_format

    model = models.load("tiny-moe", dtype="float32").model
    written = peft_format.write(model, adapter.read("best"), "for-peft", base="tiny-moe")
    written.stored, written.trained                    # values in the file, and those of them that were trained

PEFT 0.21 has three means, and a routed mixture of LoRA experts is none of them:

- `target_modules`: LoRA on a linear layer. Attention, and modules of a dense model with one expert (whose gate is
  always 1, so that its router is left out).
- `target_parameters` on a matrix: routers are no linear layers in transformers 5. Shared experts too: a target module
  that is called gate_proj would be taken for a routed expert's when PEFT loads the adapter of an older transformers.
- `target_parameters` on a stack [E, ·, ·]: LoRA on all its experts. Experts that were not chosen get A = B = 0, which
  is the same function and stays so in further training; the file holds the zeros. gate and up lie in one stack and have
  an A each: rank 2r, A = [A_gate; A_up], B = diag(B_gate, B_up), lora_alpha doubled as the rank is. (In further
  training PEFT would fill B's zeros outside of the diagonal: from there on it is another parametrisation.)

Where modules have ranks of their own (`ModuleRanks`) these are in `rank_pattern` and their alphas in `alpha_pattern`,
by the full name; the ranks of a stack's experts are filled up with zeros to the largest. PEFT warns that keys which
name a parameter were ignored, and applies them.

PEFT keeps a stack's A as [E·R, I], expert by expert, and its B as [O, R·E], rank by rank.

Shapes: E experts, C chosen experts, I input features, O output features, R rank.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allocators.core.errors import StudyError
from allocators.core.types import ExpertCounts, ExpertSelection, ModuleRanks, ModuleShape
from trainers import storage
from trainers.adapter.expert_lora import side_by_side, weight_stacks
from trainers.adapter.files import Saved
from trainers.adapter.linear import module_at
from trainers.adapter.module_ranks.experts import filled_up


@dataclass(frozen=True)
class Target:
    """LoRA on one thing that PEFT can name.

    name        path of a linear layer, or of a parameter
    parameter   whether it is a parameter
    a, b        as PEFT keeps them: [R, I] and [O, R], of a stack [E·R, I] and [O, R·E]
    rank        of one expert; the scale is lora_alpha/r whatever it is
    """

    name: str
    parameter: bool
    a: Tensor
    b: Tensor
    rank: int


@dataclass(frozen=True)
class Written:
    """stored: values in the file. trained: those that were trained; the others are zeros that PEFT's form asks for.

    misheard   whoever loads it reads PEFT's warning that ranks of parameters are ignored, and they are not (`unheard`)
    """

    stored: int
    trained: int
    misheard: bool = False


@contextmanager
def unheard() -> Iterator[None]:
    """Without PEFT's warning of patterns that fit parameters and no module: it says that they are ignored."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*keys did not match any targeted module")
        yield


def refusal(saved: Saved) -> str:
    """Why PEFT cannot express this adapter; "" where it can."""
    allocation = saved.allocation
    if isinstance(allocation, ExpertCounts) and (several := allocation.several):
        return (
            f"{several[0]} and {len(several) - 1} more modules have several LoRA experts with a router, and PEFT "
            "has no such layer"
        )
    nothing = isinstance(allocation, ExpertCounts) and not allocation.counts
    if nothing or (isinstance(allocation, ModuleRanks) and not allocation.total_rank):
        return "it adapts no module, and a PEFT adapter has at least one target"
    return ""


def write(
    model: nn.Module, saved: Saved, folder: storage.Location, *, base: str, revision: str | None = None
) -> Written:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, by PEFT itself; `model` is left as it was.

    model      the base, in float32
    base       what adapter_config.json calls it, with the commit of a hub model as `revision`

    Raises StudyError where PEFT cannot express the adapter, or the model is not its base.
    """
    from peft import LoraConfig, get_peft_model

    if reason := refusal(saved):
        raise StudyError(f"the adapter in {saved.folder} has no PEFT form: {reason}")
    found = {target.name: target for target in targets(model, saved)}
    lora = saved.lora
    parameters = [name for name, target in found.items() if target.parameter]
    widest = max(target.rank for target in found.values())
    narrow = _exceptions(found, saved, widest)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=widest,
        lora_alpha=_whole(lora.scale * widest),
        # PEFT has no dropout where it adapts parameters; it is for training only
        lora_dropout=0.0 if parameters else lora.lora_dropout,
        target_modules=[name for name, target in found.items() if not target.parameter],
        target_parameters=parameters or None,
        rank_pattern=narrow,
        alpha_pattern={names: _whole(lora.scale * rank) for names, rank in narrow.items()},
    )
    with unheard():
        wrapped = get_peft_model(model, config)
    try:
        _fill(wrapped, found)
        config.base_model_name_or_path, config.revision = base, revision
        wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    finally:
        wrapped.unload()
    _sort_targets(Path(folder) / "adapter_config.json")
    return Written(
        stored=sum(t.a.numel() + t.b.numel() for t in found.values()),
        trained=sum(t.numel() for name, t in saved.weights.items()) - _routers(saved),
        misheard=any(name in found and found[name].parameter for name in narrow),
    )


def _exceptions(targets: Mapping[str, Target], saved: Saved, widest: int) -> dict[str, int]:
    """Pattern → rank of what has less than the widest rank, which is PEFT's default.

    Where there is one such rank it is one pattern: PEFT warns of a pattern that fits parameters only, as one for
    gate_up_proj would, that it is ignored (it is not).
    """
    if isinstance(saved.allocation, ModuleRanks):
        return {name: target.rank for name, target in targets.items() if target.rank < widest}
    ranks = {name.rpartition(".")[2]: target.rank for name, target in targets.items()}
    narrow = {"|".join(sorted(name for name, rank in ranks.items() if rank < widest)): saved.lora.rank}
    narrow.pop("", None)
    return narrow


def _whole(value: float) -> Any:
    """16 and not 16.0, which some readers of adapter_config.json do not take."""
    return int(value) if value == int(value) else value


def _sort_targets(file: Path) -> None:
    """PEFT writes a set in any order; equal adapters have equal files."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config["target_modules"].sort()
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _routers(saved: Saved) -> int:
    """Values of the routers of single experts, which are left out."""
    if not isinstance(saved.allocation, ExpertCounts):
        return 0
    return sum(m.in_features * saved.allocation.counts.get(m.path, 0) for m in saved.shape.modules)


def _fill(wrapped: Any, targets: Mapping[str, Target]) -> None:
    """Copies the factors into PEFT's modules. Raises StudyError where PEFT adapted something else than was asked."""
    left = dict(targets)
    with torch.no_grad():
        for path, module in wrapped.named_modules():
            if not hasattr(module, "lora_A"):
                continue
            name = path.removeprefix("base_model.model.").replace(".base_layer", "")
            if parameter := getattr(module, "parameter_name", ""):
                name = f"{name}.{parameter}"
            if (target := left.pop(name, None)) is None:
                raise StudyError(f"PEFT adapted {name}, which this adapter leaves alone: please report this")
            module.lora_A["default"].weight.copy_(target.a)
            module.lora_B["default"].weight.copy_(target.b)
    if left:
        raise StudyError(f"PEFT did not adapt {min(left)}: please report this")


def targets(model: nn.Module, saved: Saved) -> Iterator[Target]:
    """What PEFT adapts and with which factors; `model` is the base, whose stacks are read for their layout only."""
    shape, rank, weights = saved.shape, saved.lora.rank, saved.weights
    match saved.allocation:
        case ExpertCounts() as counted:
            for path in counted.counts:  # one expert each: rows of A, then the router's row
                yield Target(path, False, weights[f"{path}.down"][:rank], weights[f"{path}.up"], rank)
        case ExpertSelection() as chosen:
            for spec in shape.of_role("attention"):
                yield Target(spec.path, False, weights[f"{spec.path}.lora_A"], weights[f"{spec.path}.lora_B"], rank)
            for spec in shape.of_role("router", "shared_expert"):
                name, a_RI, b_OR = f"{spec.path}.weight", weights[f"{spec.path}.lora_A"], weights[f"{spec.path}.lora_B"]
                yield Target(name, True, a_RI, b_OR, rank)
            for layer, ids in chosen.experts.items():
                specs = [spec for spec in shape.of_role("expert") if spec.layer == layer]
                pairs = {s.name: (weights[f"{s.path}.lora_A"], weights[f"{s.path}.lora_B"]) for s in specs}
                yield from _stacks(model, specs, ids, pairs, saved)
        case ModuleRanks() as ranked:
            yield from _ranked(model, ranked, saved)


def _ranked(model: nn.Module, ranked: ModuleRanks, saved: Saved) -> Iterator[Target]:
    """Modules with ranks of their own, then the stacks of every layer."""
    shape, weights = saved.shape, saved.weights
    for spec in shape.modules:
        if rank := ranked.ranks.get(spec.path):
            parameter = shape.is_moe and spec.role != "attention"
            name = f"{spec.path}.weight" if parameter else spec.path
            yield Target(name, parameter, weights[f"{spec.path}.lora_A"], weights[f"{spec.path}.lora_B"], rank)
    for layer in shape.moe_layers:
        specs = [spec for spec in shape.of_role("expert") if spec.layer == layer]
        ids, pairs = filled_up(specs, ranked, weights)
        if ids:
            yield from _stacks(model, specs, ids, pairs, saved)


def _stacks(
    model: nn.Module,
    specs: list[ModuleShape],
    ids: tuple[int, ...],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    saved: Saved,
) -> Iterator[Target]:
    """The expert stacks of one layer; a stack without LoRA in any of its projections is left out.

    factors   projection → A [C, R, I] and B [C, O, R]
    """
    path, num_experts = specs[0].path.rpartition(".")[0], specs[0].num_experts
    module = module_at(model, path, name=saved.shape.name)
    for stack, projections in weight_stacks(module, path=path).items():
        if not any(name in factors for name in projections):
            continue
        pairs = [factors[name] for name in projections]
        a_CRI, b_COR = side_by_side(pairs, concatenated=module.is_concatenated)
        chosen = torch.tensor(ids)
        a_ERI = a_CRI.new_zeros(num_experts, *a_CRI.shape[1:]).index_copy(0, chosen, a_CRI)
        b_EOR = b_COR.new_zeros(num_experts, *b_COR.shape[1:]).index_copy(0, chosen, b_COR)
        yield Target(f"{path}.{stack}", True, a_ERI.flatten(0, 1), b_EOR.permute(1, 2, 0).flatten(1), a_CRI.size(1))
