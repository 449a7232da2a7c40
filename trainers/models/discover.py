"""Sizes of models whose family allocators/core/shapes.py does not list, read from the classes themselves.

    shape = trainers.models.shape_of("LiquidAI/LFM2-8B-A1B")     # asks here where the family is not listed

The model is built without weights (torch's meta device) and its decoder layers are walked. A module's role follows from
what it is and where it hangs, so a family that transformers adds tomorrow needs no line here:

    expert          a module of transformers' experts interface (3-D weights): gate_proj, up_proj, down_proj of each
    router          in the block around it: what hangs below a name like `gate` or `router`, or has a weight
                    [experts, hidden]
    shared_expert   other linear maps of that block, or of a block called `shared…`
    shared_gate     of these one with one output, called `shared…`
    attention       linear maps below a module called `…attn` or `…attention`, or beside one called q_proj
    mlp             in layers without experts: linear maps of feed-forward blocks, or beside one called down_proj or fc2

Anything else is left as it is and named by `left_out`: state-space and convolution blocks, what lies inside of norms,
linear layers with a forward of their own, and what a language model has no gradient for: the indexers of sparse
attention, which choose positions, attention to an encoder that is not there, and a layer's list of the adapters of all
layers. Embeddings and the head lie outside of the layers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from allocators.core import checks
from allocators.core.errors import StudyError
from allocators.core.shapes import active_experts
from allocators.core.types import ModelShape, ModuleShape, Role
from trainers.models import files
from trainers.models.quantized import is_quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION = re.compile(r"(^|[._])(attn|attention)([._]|$)")
_LEFT_OUT = re.compile(r"(^|[._])(indexer|encoder_attn|cross_attn|cross_attention|adapter_list)([._]|$)|norm(\.|$)")
_FEED_FORWARD = re.compile(r"(^|[._])(mlp|ffn|ff|feed_forward|feedforward)([._]|$)")
_ROUTER = re.compile(r"(^|[._])(gate|router)([._]|$)")
_MOST_SAID = 8
# names that a linear map has in attention, and in a feed-forward block, whatever the block is called
_OF_ATTENTION, _OF_MLP = {"q_proj", "qkv_proj", "query_key_value"}, {"down_proj", "fc2"}


def without_weights(folder: Path, name: str, trust_remote_code: bool) -> PreTrainedModel:
    """The model of a folder with config.json, its tensors on the meta device.

    Raises StudyError where transformers knows no causal language model of that type.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    trust = {"trust_remote_code": trust_remote_code}
    try:
        with files.clean(folder) as clean, files.quiet():
            config = AutoConfig.from_pretrained(clean, local_files_only=not trust_remote_code, **trust)
            checks.whole(_num_layers(config), "num_hidden_layers", low=1, high=checks.MOST_LAYERS)
            with torch.device("meta"):
                model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **trust)
                return model
    except Exception as error:
        reason = files.reason_of(error)
        hint = "; trust_remote_code=true runs it" if "custom code" in reason else ""
        raise StudyError(f"the sizes of '{name}' cannot be read from its config.json: {reason}{hint}") from error


def _num_layers(config: Any) -> Any:
    """1 where the config calls it by another name."""
    return getattr(config.get_text_config(decoder=True), "num_hidden_layers", 1)


def shape_from_modules(model: Any, *, name: str) -> ModelShape:
    """Sizes of every map LoRA can go on, layer by layer.

    Raises StudyError for a model that is no stack of decoder layers, has experts outside of the experts interface, or
    holds nothing that can be adapted.
    """
    path, layers = _decoder_layers(model, name)
    modules = [m for m in _in_layers(layers, path) if isinstance(m, ModuleShape)]
    if not modules:
        raise StudyError(f"the layers of {type(model).__name__} hold no attention, experts or MLP that LoRA can go on")
    config = model.config.get_text_config(decoder=True).to_dict()
    return ModelShape(name, tuple(modules), len(layers), active_experts(config, modules))


def left_out(model: Any, *, name: str) -> str:
    """The linear maps of decoder layers that have no role, in one line; "" where there are none."""
    path, layers = _decoder_layers(model, name)
    maps = Counter(m for m in _in_layers(layers, path) if isinstance(m, str))
    said = [f"{inside} ({count} of {len(layers)} layers)" for inside, count in maps.most_common()]
    return ", ".join([*said[:_MOST_SAID], *([f"and {len(said) - _MOST_SAID} more"] if len(said) > _MOST_SAID else [])])


def _decoder_layers(model: Any, name: str) -> tuple[str, nn.ModuleList]:
    """The path of the layers and the layers. Raises StudyError as `shape_from_modules` does."""
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
    return f"{path}.layers".lstrip("."), layers


def _in_layers(layers: nn.ModuleList, at: str) -> Iterator[ModuleShape | str]:
    """What each layer adds to the shape, and the paths in it of linear maps that have no role.

    A module that hangs in several layers is one place for LoRA, in the first of them.
    """
    seen: set[nn.Module] = set()
    for number, layer in enumerate(layers):
        inside = dict(layer.named_modules())
        stacks = {path: module for path, module in inside.items() if hasattr(module, "is_concatenated")}
        for path, module in inside.items():
            if path in stacks:
                yield from _experts(f"{at}.{number}.{path}", number, module)
            elif not any(path.startswith(f"{stack}.") for stack in stacks) and (size := _size_of(module)):
                role = None if module in seen else _role(path, module, inside, stacks)
                seen.add(module)
                yield path if role is None else ModuleShape(f"{at}.{number}.{path}", number, *size, role=role)


def _size_of(module: nn.Module) -> tuple[int, int] | None:
    """Input and output features of a module with one matrix; None for others, and for embeddings."""
    if is_quantized(module) or isinstance(module, nn.Linear):
        return module.in_features, module.out_features  # type: ignore[return-value]
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Embedding) or not isinstance(weight, nn.Parameter) or weight.ndim != 2:
        return None
    return int(weight.shape[1]), int(weight.shape[0])


def _role(path: str, module: nn.Module, inside: dict[str, nn.Module], stacks: dict[str, Any]) -> Role | None:
    """The role of a module with a matrix, by its path in the layer; None: it is left as it is."""
    if _LEFT_OUT.search(path):
        return None
    above, _, _ = path.rpartition(".")
    beside = {name for name, other in inside[above].named_children() if _is_linear(other)}
    if _ATTENTION.search(path) or beside & _OF_ATTENTION:
        return "attention" if _is_linear(module) else None
    blocks = {stack.rpartition(".")[0]: experts for stack, experts in stacks.items()}  # "": in the layer itself
    block = next((block for block in blocks if not block or path.startswith(f"{block}.")), None)
    routed = block is not None and "shared" not in path
    if routed and (_ROUTER.search(path[len(block or "") :]) or _is_router(module, blocks[block or ""])):
        return "router"
    if not _is_linear(module):
        return None
    if stacks:
        if module.out_features == 1:
            return "shared_gate" if "shared" in path else None
        return "shared_expert" if block is not None or "shared" in path else None
    return "mlp" if _FEED_FORWARD.search(path) or beside & _OF_MLP else None


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
