"""Tiny random models of every supported family, for tests that compare with what transformers builds."""

from __future__ import annotations

from typing import Any

# Small, and no two sizes alike, so that a swapped axis shows.
COMMON = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "kv_lora_rank": 10,
    "q_lora_rank": 14,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 9,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
QWEN = {"num_experts": 8, "moe_intermediate_size": 16, "num_experts_per_tok": 2}

MOE: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": QWEN | {"shared_expert_intermediate_size": 28, "decoder_sparse_step": 2},
    "qwen3_moe": QWEN | {"mlp_only_layers": [1], "head_dim": 8, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v2": LATENT | {"num_experts_per_tok": 2, "q_lora_rank": None},
    "deepseek_v3": LATENT | {"num_experts_per_tok": 3, "n_group": 2, "topk_group": 1},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8},
    "granitemoe": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "granitemoeshared": {"num_local_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 28},
}
DENSE: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"head_dim": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
}


def config(family: str) -> Any:
    """The transformers config of a tiny model."""
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **(COMMON | (MOE | DENSE)[family]))


def model(family: str, *, seed: int = 0) -> Any:
    """A tiny random causal language model, fp32, eval mode, with routers that have preferences."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    built = AutoModelForCausalLM.from_config(config(family), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.endswith((".gate.weight", ".router.weight")):
                parameter.normal_(std=1.0)  # some families start them at zero: every expert would tie
            elif parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return built
