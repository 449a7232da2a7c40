"""Sizes of models whose family allocators/core/shapes.py does not list, read from the classes themselves.

    shape = trainers.models.shape_of("LiquidAI/LFM2-8B-A1B")     # asks here where the family is not listed

The model is built without weights (torch's meta device) and its decoder layers are walked. A module's role follows from
what it is and where it hangs, so a family that transformers adds tomorrow needs no line here:

    expert          a module of transformers' experts interface (3-D weights): gate_proj, up_proj, down_proj of each
    router          in the block around it: what has a weight [experts, hidden]
    shared_expert   other linear maps of that block, or of a block called `shared…`; with one output: a gate, left out
    attention       linear maps below a module called `…attn` or `…attention`
    mlp             linear maps of feed-forward blocks in layers without experts

Anything else is left as it is: state-space and convolution blocks, norms, embeddings, the head, linear layers with a
forward of their own, and the indexers of sparse attention, which choose positions and so have no gradient.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from allocators.core.errors import StudyError
from allocators.core.types import ModelShape, ModuleShape, Role
from trainers.models.quantized import is_quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION = re.compile(r"(^|[._])(attn|attention)([._]|$)")
_NO_GRADIENT = re.compile(r"(^|[._])indexer([._]|$)")
_FEED_FORWARD = re.compile(r"(^|[._])(mlp|ffn|ff|feed_forward|feedforward)([._]|$)")


def without_weights(folder: Path, name: str, trust_remote_code: bool) -> PreTrainedModel:
    """The model of a folder with config.json, its tensors on the meta device.

    Raises StudyError where transformers knows no causal language model of that type.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    trust = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=not trust_remote_code, **trust)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **trust)
            return model
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        hint = "; trust_remote_code=true runs it" if "custom code" in reason else ""
        raise StudyError(f"the sizes of '{name}' cannot be read: {reason}{hint}") from error


def shape_from_modules(model: Any, *, name: str) -> ModelShape:
    """Sizes of every map LoRA can go on, layer by layer.

    Raises StudyError for a model that is no stack of decoder layers, has experts outside of the experts interface, or
    holds nothing that can be adapted.
    """
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    path = next((path for path, module in model.named_modules() if module is decoder), None)
    if not isinstance(layers, nn.ModuleList) or path is None:
        raise StudyError(
            f"{type(model).__name__} is no stack of decoder layers: LoRA experts cannot be placed in '{name}'"
        )
    for inside, module in decoder.named_modules():
        if inside.rpartition(".")[2] == "experts" and not hasattr(module, "is_concatenated"):
            raise StudyError(
                f"{path}.{inside} ({type(module).__name__}) is outside of transformers' experts interface: the experts "
                f"of '{name}' can neither be chosen nor adapted"
            )
    modules = [m for n, layer in enumerate(layers) for m in _layer(layer, n, f"{path}.layers.{n}".lstrip("."))]
    if not modules:
        raise StudyError(f"the layers of {type(model).__name__} hold no attention, experts or MLP that LoRA can go on")
    return ModelShape(name, tuple(modules), len(layers))


def _layer(layer: nn.Module, number: int, at: str) -> Iterator[ModuleShape]:
    inside = dict(layer.named_modules())
    stacks = {path: module for path, module in inside.items() if hasattr(module, "is_concatenated")}
    blocks = {
        path.rpartition(".")[0]: module for path, module in stacks.items()
    }  # "" where they hang in the layer itself

    def linear(path: str, module: Any, role: Role) -> ModuleShape:
        return ModuleShape(f"{at}.{path}", number, module.in_features, module.out_features, role=role)

    for path, module in inside.items():
        if path in stacks:
            yield from _experts(f"{at}.{path}", number, module)
            continue
        if any(path.startswith(f"{stack}.") for stack in stacks):
            continue
        around = next((experts for block, experts in blocks.items() if not block or path.startswith(f"{block}.")), None)
        if _ATTENTION.search(path):
            if _is_linear(module) and not _NO_GRADIENT.search(path):
                yield linear(path, module, "attention")
        elif around is not None and _is_router(module, around):
            experts, hidden = module.weight.shape
            yield ModuleShape(f"{at}.{path}", number, int(hidden), int(experts), role="router")
        elif _is_linear(module) and module.out_features > 1:
            if around is not None or (blocks and "shared" in path):
                yield linear(path, module, "shared_expert")
            elif not blocks and _FEED_FORWARD.search(path):
                yield linear(path, module, "mlp")


def _is_linear(module: nn.Module) -> bool:
    return type(module).forward is nn.Linear.forward or is_quantized(module)


def _is_router(module: nn.Module, experts: Any) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 2 and weight.shape[0] == experts.num_experts


def _experts(path: str, number: int, module: Any) -> Iterator[ModuleShape]:
    """The projections of one stacked expert tensor: [E, O, I], or [E, I, O] where it is stored transposed."""
    outputs, inputs = module.down_proj.shape[1:]
    if module.is_transposed:
        outputs, inputs = inputs, outputs
    names = ("gate_proj", "up_proj") if module.has_gate else ("up_proj",)
    for name in names:
        yield ModuleShape(f"{path}.{name}", number, outputs, inputs, module.num_experts, "expert")
    yield ModuleShape(f"{path}.down_proj", number, inputs, outputs, module.num_experts, "expert")
