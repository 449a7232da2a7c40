"""A model's shape from its Hugging Face config alone: sizes of every module LoRA can go on, no weights, no torch.

    shape_from_config(json.loads(Path("config.json").read_text()), name="allenai/OLMoE-1B-7B-0924")
    shape_from_config(model.config, name="tiny-moe").total_experts

Module paths are those of transformers 5, where a layer's experts are stacked in one tensor. Left out: embeddings,
norms and the head. Qwen's `shared_expert_gate` is a role of its own, which nothing adapts unless it is asked to
(MoE-Sieve's published parameter counts leave it out).

A family is one entry of `FAMILIES`; its defaults are those of the transformers config class: config.json may omit them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from allocators.core import checks
from allocators.core.errors import StudyError, did_you_mean
from allocators.core.types import ModelShape, ModuleShape, Role

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """How one `model_type` is built.

    defaults      sizes that config.json may omit
    num_experts   routed experts of a layer, 0 where the layer is dense
    expert_width  key of an expert's intermediate size
    moe_block     where router and experts hang in the layer
    router        name of the router in that block
    shared        name (in the layer), input size and output size of each linear map of the shared experts
    shared_gate   name (in the layer) of the gate of the shared expert, [hidden] to one number; "": there is none
    latent        DeepSeek's multi-head latent attention instead of q, k, v, o
    """

    defaults: Config
    num_experts: Callable[[Config, int], int] = lambda *_: 0
    expert_width: str = "intermediate_size"
    moe_block: str = "mlp"
    router: str = "gate"
    shared: Callable[[Config], list[tuple[str, int, int]]] = lambda _: []
    shared_gate: str = ""
    latent: bool = False


def shape_from_config(config: Mapping[str, Any] | Any, *, name: str) -> ModelShape:
    """Sizes of the adaptable modules of a causal language model, layer by layer.

    config   config.json as a dict, or a transformers config object
    name     what messages and reports call the model

    Raises StudyError for a model type that is not listed in `FAMILIES`, or sizes that no model can have.
    """
    given = config if isinstance(config, Mapping) else config.to_dict()
    model_type = given.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise StudyError(
            f"{name} has model_type '{model_type}', whose modules are not known: possible are "
            f"{', '.join(sorted(FAMILIES))}{did_you_mean(str(model_type), FAMILIES)}"
        )
    sizes = {**family.defaults, **given}
    key = next((k for k in _EXPERT_KEYS if k in family.defaults), None)
    if key is not None and key not in given:  # transformers reads any of the three names
        sizes[key] = next((given[k] for k in _EXPERT_KEYS if k in given), sizes[key])
    try:
        _check(family, sizes)
    except ValueError as error:
        raise StudyError(f"the config of {name} cannot be right: {error}") from None
    modules = [m for layer in range(sizes["num_hidden_layers"]) for m in _layer(family, sizes, layer)]
    return ModelShape(name, tuple(modules), sizes["num_hidden_layers"], active_experts(given, modules))


def active_experts(config: Config, modules: Iterable[ModuleShape]) -> int:
    """Experts that a token goes to, k; 0 for a dense model, and where the config does not say it."""
    most = max((m.num_experts for m in modules), default=0)
    for key in _ACTIVE_KEYS:
        value = config.get(key)
        if isinstance(value, int) and 1 <= value <= most:
            return int(value)
    default = _ACTIVE.get(str(config.get("model_type")), 0)
    return default if default <= most and not any(key in config for key in _ACTIVE_KEYS) else 0


def _check(family: Family, c: Config) -> None:
    """Raises ValueError for a size that no model can have."""
    for key in (*family.defaults, *(() if family.latent else ("head_dim",))):
        value = c.get(key)
        if value is None and key in _OPTIONAL:
            continue
        if key == "mlp_only_layers":
            for layer in checks.sequence(value, key):
                checks.whole(layer, f"a layer of {key}")
            continue
        may_be_zero = key in _MAY_BE_ZERO or (key in _EXPERT_KEYS and "decoder_sparse_step" in family.defaults)
        high = _MOST.get(key, _LARGEST)
        checks.whole(value, key, low=0 if may_be_zero else 1, high=high)
    experts = next((c[key] for key in _EXPERT_KEYS if key in family.defaults), 0)
    for key in _ACTIVE_KEYS:
        if experts and c.get(key) is not None:  # 0 would leave all experts out, and nothing would say so
            checks.whole(c[key], key, low=1, high=experts)
    if not family.latent and c.get("head_dim") is None and c["num_attention_heads"] > c["hidden_size"]:
        raise ValueError(f"hidden_size {c['hidden_size']} leaves nothing for {c['num_attention_heads']} heads")


def _layer(family: Family, c: Config, layer: int) -> Iterator[ModuleShape]:
    at = f"model.layers.{layer}"

    def module(path: str, fan_in: int, fan_out: int, role: Role, experts: int = 0) -> ModuleShape:
        return ModuleShape(f"{at}.{path}", layer, fan_in, fan_out, experts, role)

    for name, fan_in, fan_out in (_latent_attention if family.latent else _attention)(c):
        yield module(f"self_attn.{name}", fan_in, fan_out, "attention")
    hidden, experts = c["hidden_size"], family.num_experts(c, layer)
    if not experts:
        for name, fan_in, fan_out in _gated(hidden, c["intermediate_size"]):
            yield module(f"mlp.{name}", fan_in, fan_out, "mlp")
        return
    yield module(f"{family.moe_block}.{family.router}", hidden, experts, "router")
    for name, fan_in, fan_out in _gated(hidden, c[family.expert_width]):
        yield module(f"{family.moe_block}.experts.{name}", fan_in, fan_out, "expert", experts)
    for path, fan_in, fan_out in family.shared(c):
        yield module(path, fan_in, fan_out, "shared_expert")
    if family.shared_gate:
        yield module(family.shared_gate, hidden, 1, "shared_gate")


def _gated(hidden: int, width: int) -> tuple[tuple[str, int, int], ...]:
    return ("gate_proj", hidden, width), ("up_proj", hidden, width), ("down_proj", width, hidden)


def _attention(c: Config) -> tuple[tuple[str, int, int], ...]:
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    size = c.get("head_dim") or hidden // heads
    queries, keys = heads * size, (c["num_key_value_heads"] or heads) * size
    return ("q_proj", hidden, queries), ("k_proj", hidden, keys), ("v_proj", hidden, keys), ("o_proj", queries, hidden)


def _latent_attention(c: Config) -> tuple[tuple[str, int, int], ...]:
    hidden, heads, latent = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    queries = heads * (c["qk_nope_head_dim"] + c["qk_rope_head_dim"])
    compressed = c["q_lora_rank"]
    return (
        *(
            (("q_a_proj", hidden, compressed), ("q_b_proj", compressed, queries))
            if compressed
            else (("q_proj", hidden, queries),)
        ),
        ("kv_a_proj_with_mqa", hidden, latent + c["qk_rope_head_dim"]),
        ("kv_b_proj", latent, heads * (c["qk_nope_head_dim"] + c["v_head_dim"])),
        ("o_proj", heads * c["v_head_dim"], hidden),
    )


def _in_mlp(name: str, hidden: int, width: int) -> list[tuple[str, int, int]]:
    return [(f"mlp.{name}.{part}", fan_in, fan_out) for part, fan_in, fan_out in _gated(hidden, width)]


def _qwen_experts(c: Config, layer: int) -> int:
    """Every `decoder_sparse_step`-th layer has experts, unless it is listed as dense."""
    dense = layer in (c["mlp_only_layers"] or ()) or (layer + 1) % c["decoder_sparse_step"]
    return 0 if dense else c["num_experts"]


def _deepseek_experts(c: Config, layer: int) -> int:
    """The first layers are dense."""
    return c["n_routed_experts"] if layer >= c["first_k_dense_replace"] else 0


def _local_experts(c: Config, _: int) -> int:
    num_experts: int = c["num_local_experts"]
    return num_experts


def _deepseek_shared(c: Config) -> list[tuple[str, int, int]]:
    """The shared experts of a layer are one MLP of their widths' sum."""
    return _in_mlp("shared_experts", c["hidden_size"], c["moe_intermediate_size"] * c["n_shared_experts"])


def _granite_shared(c: Config) -> list[tuple[str, int, int]]:
    hidden, width = c["hidden_size"], c["shared_intermediate_size"]
    fused = [("shared_mlp.input_linear", hidden, 2 * width), ("shared_mlp.output_linear", width, hidden)]
    return fused if width else []


def _sizes(hidden: int, width: int, layers: int, heads: int, key_heads: int | None, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        **more,
    }


_LATENT = {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_QWEN_LAYERS = {"decoder_sparse_step": 1, "mlp_only_layers": None}
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
_ACTIVE_KEYS = (
    *("num_experts_per_tok", "experts_per_token", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k"),
    *("num_selected_experts", "top_k_experts", "experts_top_k"),
)
_ACTIVE = {  # where config.json omits it, as with the other defaults
    **{"olmoe": 8, "qwen2_moe": 4, "qwen3_moe": 8, "mixtral": 2, "deepseek_v3": 8, "gpt_oss": 4},
    **{"granitemoe": 2, "granitemoeshared": 2},
}
_MAY_BE_ZERO = ("first_k_dense_replace", "shared_intermediate_size")
_LARGEST = 1 << 24  # of a width: no model is near it
_MOST = {"num_hidden_layers": checks.MOST_LAYERS, **dict.fromkeys(_EXPERT_KEYS, checks.MOST_EXPERTS)}
_OPTIONAL = ("num_key_value_heads", "head_dim", "q_lora_rank", "mlp_only_layers")  # None is a value

FAMILIES: dict[str, Family] = {
    "olmoe": Family(_sizes(2048, 2048, 16, 16, None, num_experts=64), lambda c, _: c["num_experts"]),
    "qwen2_moe": Family(
        _sizes(
            2048,
            5632,
            24,
            16,
            16,
            num_experts=60,
            moe_intermediate_size=1408,
            shared_expert_intermediate_size=5632,
            **_QWEN_LAYERS,
        ),
        _qwen_experts,
        expert_width="moe_intermediate_size",
        shared=lambda c: _in_mlp("shared_expert", c["hidden_size"], c["shared_expert_intermediate_size"]),
        shared_gate="mlp.shared_expert_gate",
    ),
    "qwen3_moe": Family(
        _sizes(2048, 6144, 24, 32, 4, num_experts=128, moe_intermediate_size=768, **_QWEN_LAYERS),
        _qwen_experts,
        expert_width="moe_intermediate_size",
    ),
    "mixtral": Family(_sizes(4096, 14336, 32, 32, 8, num_local_experts=8), _local_experts),
    "deepseek_v2": Family(
        _sizes(
            4096,
            11008,
            32,
            32,
            None,
            n_routed_experts=64,
            n_shared_experts=2,
            moe_intermediate_size=1407,
            first_k_dense_replace=0,
            **_LATENT,
        ),
        _deepseek_experts,
        expert_width="moe_intermediate_size",
        shared=_deepseek_shared,
        latent=True,
    ),
    "deepseek_v3": Family(
        _sizes(
            7168,
            18432,
            61,
            128,
            128,
            n_routed_experts=256,
            n_shared_experts=1,
            moe_intermediate_size=2048,
            first_k_dense_replace=3,
            **_LATENT,
        ),
        _deepseek_experts,
        expert_width="moe_intermediate_size",
        shared=_deepseek_shared,
        latent=True,
    ),
    "gpt_oss": Family(
        _sizes(2880, 2880, 36, 64, 8, num_local_experts=128, head_dim=64), _local_experts, router="router"
    ),
    "granitemoe": Family(
        _sizes(4096, 11008, 32, 32, None, num_local_experts=8),
        _local_experts,
        moe_block="block_sparse_moe",
        router="router",
    ),
    "granitemoeshared": Family(
        _sizes(4096, 11008, 32, 32, None, num_local_experts=8, shared_intermediate_size=0),
        _local_experts,
        moe_block="block_sparse_moe",
        router="router",
        shared=_granite_shared,
    ),
    "llama": Family(_sizes(4096, 11008, 32, 32, None)),
    "mistral": Family(_sizes(4096, 14336, 32, 32, 8)),
    "qwen2": Family(_sizes(4096, 22016, 32, 32, 32)),
    "qwen3": Family(_sizes(4096, 22016, 32, 32, 32, head_dim=128)),
    "gemma": Family(_sizes(3072, 24576, 28, 16, 16, head_dim=256)),
    "gemma2": Family(_sizes(2304, 9216, 26, 8, 4, head_dim=256)),
    "gemma3_text": Family(_sizes(2304, 9216, 26, 8, 4, head_dim=256)),
}

# Families whose checkpoints on the hub have a name for each expert, and what is called otherwise there than in
# transformers 5, which stacks experts. Dense models are called the same in both.
NAMED_EXPERTS: Mapping[str, Mapping[str, str]] = {
    **{family: {} for family in ("olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3")},
    "mixtral": {"mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
}


def unnamed_experts(model_type: str) -> str:
    """Why no server finds each expert of that family by a name of its own; "" where it does."""
    if model_type in NAMED_EXPERTS:
        return ""
    return (
        f"the experts of '{model_type}' have no name of their own in its checkpoints (those of "
        f"{', '.join(sorted(NAMED_EXPERTS))} do)"
    )
