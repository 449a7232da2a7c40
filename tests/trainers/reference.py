"""Slow and obvious references for the adapters, and tiny random models of every family they support.

Nothing here uses the code under test: a reference is a loop over tokens, or the base model run with weights to which
the LoRA products were added one by one.

Shapes: T tokens, K experts per token, E experts, H hidden, I expert width, R rank.
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from allocators.core.shapes import shape_from_config
from allocators.core.types import ExpertSelection, ModelShape

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,  # large enough that no term vanishes in the comparison
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# model_type -> what its config needs besides _COMMON
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 8},
    "qwen2_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "decoder_sparse_step": 1,
    },
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 16, "head_dim": 8, "decoder_sparse_step": 1},
    "mixtral": {"num_local_experts": 8},
    "deepseek_v2": {
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "deepseek_v3": {
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "gpt_oss": {"num_local_experts": 8, "head_dim": 8, "sliding_window": 8},
    "granitemoe": {"num_local_experts": 8},
    "granitemoeshared": {"num_local_experts": 8, "shared_intermediate_size": 24},
}


def tiny_model(family: str, *, seed: int = 0, **changes: Any) -> Any:
    """A random causal language model of a family in eval mode, fp32, on the CPU."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(_COMMON | FAMILIES[family] | changes))
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers starts them at zero, where a forgotten bias would not show
            nn.init.normal_(parameter, std=0.1)
    return model


def shape_of_model(model: Any) -> ModelShape:
    return shape_from_config(model.config, name=f"tiny {model.config.model_type}")


@cache
def tokens(batch: int = 2, length: int = 24) -> Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(tokens()).logits
    return out


def gradient(parameter: Tensor) -> Tensor:
    """The gradient of a parameter that must have one."""
    assert parameter.grad is not None
    return parameter.grad


def digest(model: Any) -> str:
    """Of all weights, byte for byte, and of what the model computes."""
    sha = hashlib.sha256()
    for name, tensor in [*model.state_dict().items(), ("logits", logits(model))]:
        sha.update(name.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def every_expert(shape: ModelShape) -> ExpertSelection:
    return ExpertSelection({layer: tuple(range(shape.experts_in(layer))) for layer in shape.moe_layers})


def some_experts(shape: ModelShape) -> ExpertSelection:
    """A different handful in every layer, and none at all in the last where there is more than one."""
    layers = shape.moe_layers[:-1] or shape.moe_layers
    return ExpertSelection({layer: (1 + layer % 2, 4, 7) for layer in layers})


def fill(adapter: Any, *, seed: int = 0, std: float = 0.1) -> None:
    """Random values everywhere: a fresh adapter has B = 0, under which most mistakes are invisible."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def adapted_weights(
    model: Any, shape: ModelShape, selection: ExpertSelection, factors: dict[str, Tensor], *, scale: float
) -> dict[str, Tensor]:
    """Parameter name → W + scale·B·A, differentiable in the factors, module by module and expert by expert."""
    base = {name: p.detach() for name, p in model.named_parameters()}
    adapted: dict[str, Tensor] = {}
    for spec in shape.modules:
        a, b = factors.get(f"{spec.path}.lora_A"), factors.get(f"{spec.path}.lora_B")
        if a is None or b is None:
            continue
        if spec.role != "expert":
            name = f"{spec.path}.weight"
            adapted[name] = base[name] + scale * (b @ a)
            continue
        experts = spec.path.rpartition(".")[0]
        stack = f"{experts}.down_proj" if spec.name == "down_proj" else f"{experts}.gate_up_proj"
        gpt_oss = model.config.model_type == "gpt_oss"  # stored transposed, gate and up in alternating columns
        width = spec.out_features
        outputs = {
            "down_proj": torch.arange(width),
            "gate_proj": torch.arange(0, 2 * width, 2) if gpt_oss else torch.arange(width),
            "up_proj": torch.arange(1, 2 * width, 2) if gpt_oss else torch.arange(width, 2 * width),
        }[spec.name]
        whole = torch.zeros_like(base[stack])
        for position, expert in enumerate(selection.in_layer(spec.layer)):
            delta = scale * (b[position] @ a[position])
            if gpt_oss:
                whole[expert, :, outputs] = delta.t()
            else:
                whole[expert, outputs, :] = delta
        adapted[stack] = adapted.get(stack, base[stack]) + whole
    return adapted


def experts_loop(
    hidden_TH: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    gate_up_E2IH: Tensor,
    down_EHI: Tensor,
    lora: dict[str, dict[int, tuple[Tensor, Tensor]]],
    *,
    scale: float,
) -> Tensor:
    """One MoE layer (SiLU, gate above up) token by token; `lora[projection][expert]` is (A [R, in], B [out, R])."""

    def linear(x: Tensor, weight: Tensor, projection: str, expert: int) -> Tensor:
        y = weight @ x
        if expert in lora.get(projection, {}):
            a, b = lora[projection][expert]
            y = y + scale * (b @ (a @ x))
        return y

    rows = []
    for t, x in enumerate(hidden_TH):
        total = torch.zeros_like(x)
        for weight, expert in zip(weight_TK[t], index_TK[t].tolist(), strict=True):
            gate_w, up_w = gate_up_E2IH[expert].chunk(2)
            gate, up = linear(x, gate_w, "gate_proj", expert), linear(x, up_w, "up_proj", expert)
            total = total + weight * linear(nn.functional.silu(gate) * up, down_EHI[expert], "down_proj", expert)
        rows.append(total)
    return torch.stack(rows)


PEFT_STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def peft_factors(wrapped: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Path of each expert stack that PEFT's `target_parameters` adapts → its (A [E·R, in], B [out, E·R])."""
    found = {}
    for name, module in wrapped.named_modules():
        if hasattr(module, "parameter_name"):
            path = name.removeprefix("base_model.model.").replace(".base_layer", "")
            pair = module.lora_A["default"].weight, module.lora_B["default"].weight
            found[f"{path}.{module.parameter_name}"] = pair
    return found


def from_peft(stack: str, a: Tensor, b: Tensor, *, rank: int) -> dict[str, Tensor]:
    """PEFT's factors of one stack (or their gradients) under our names, all experts chosen.

    Its A rows are expert-major, its B columns rank-major; gate and up share one A, of which ours get a copy each.
    """
    path = stack.rpartition(".")[0]
    num_experts = a.size(0) // rank
    a_ERI, b_EOR = a.reshape(num_experts, rank, -1), b.reshape(-1, rank, num_experts).permute(2, 0, 1)
    if stack.endswith("down_proj"):
        return {f"{path}.down_proj.lora_A": a_ERI, f"{path}.down_proj.lora_B": b_EOR}
    gate_EOR, up_EOR = b_EOR.chunk(2, dim=1)
    return {
        f"{path}.gate_proj.lora_A": a_ERI,
        f"{path}.up_proj.lora_A": a_ERI,
        f"{path}.gate_proj.lora_B": gate_EOR,
        f"{path}.up_proj.lora_B": up_EOR,
    }


def share_first_factor(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our gradients as PEFT has them: one A for gate and up receives the sum of both."""
    shared = dict(gradients)
    for name in gradients:
        if name.endswith("gate_proj.lora_A"):
            other = name.replace("gate_proj", "up_proj")
            shared[name] = shared[other] = gradients[name] + gradients[other]
    return shared
