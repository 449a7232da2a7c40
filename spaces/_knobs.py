"""Knobs that several spaces share. Not a space itself: files that begin with an underscore are left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from allocators import _roles
from allocators.core.ranking import SCORES
from allocators.core.types import ModelShape

# AlphaLoRA's and MoLA's: rank 8, lora_alpha 16, learning_rate 3e-4, top-2.
PAPERS = {"rank": 8, "lora_alpha": 16.0, "scaled_rate": 16 * 3e-4, "top_k": 2}

# What `space.roles=any` and `space.expert_rank=any` search, the default first.
ROLES = ("default", "all", "attention+experts", "experts", "attention+router", "attention")

PATTERNS = ("2468", "8642", "8228", "2882", "5555", "8888")
T_PER_LAYER = 5  # the papers' T = 160 on 32 layers


def lora_recipe(trial: Any) -> dict[str, Any]:
    """rank, lora_alpha and the scaled rate learning_rate·lora_alpha: three coordinates that can be tuned one by one.

    The best learning rate moves with rank and alpha, the best scaled rate hardly does (`Recipe.scaled_rate` says why),
    and it is the same for few experts and for many. Bounds: the papers' recipes lie between .0008 and .03, models of
    a few million parameters want up to .3.
    """
    return {
        "rank": trial.suggest_int("rank", 1, 32, log=True),
        "lora_alpha": trial.suggest_float("lora_alpha", 8.0, 256.0, log=True),
        "scaled_rate": trial.suggest_float("scaled_rate", 5e-4, 0.5, log=True),
    }


def score(trial: Any) -> str:
    """What makes an expert hot: count or mass, and where `space.score=` names it reap or ean, too."""
    optional = getattr(trial, "suggest_optional", lambda *_, **__: None)
    asked = optional("score", SCORES, searched=SCORES)
    return str(asked or trial.suggest_categorical("score", ["count", "mass"]))


def role_knobs(trial: Any, shape: ModelShape) -> dict[str, Any]:
    """`roles` and `expert_rank` (`allocators/_roles.py`) of an MoE model, where `space.NAME=` names them; else nothing.

    A space so has no knob more than it had, and no other sampling, until somebody asks for it.
    """
    optional = getattr(trial, "suggest_optional", None)
    if optional is None or not shape.is_moe:
        return {}
    knobs = {
        "roles": optional("roles", _roles.possible(shape), searched=ROLES),
        "expert_rank": optional("expert_rank", _roles.EXPERT_RANKS, searched=_roles.EXPERT_RANKS),
    }
    return {name: value for name, value in knobs.items() if value is not None}


def total_experts(trial: Any, shape: ModelShape) -> int:
    """T from one to eight experts a layer, in steps of half a layer: 80, 160 and 224 lie on it for 32 layers."""
    low, step = shape.num_layers, max(1, shape.num_layers // 2)
    total: int = trial.suggest_int("total_experts", low, low + 7 * low // step * step, step=step)
    return total


def dense_knobs(trial: Any, allocator: str, shape: ModelShape) -> dict[str, Any]:
    """The knobs of one allocator for dense bases, and of no other."""
    match allocator:
        case "uniform" | "random" | "layermoe":
            return {"total_experts": total_experts(trial, shape)}
        case "mola":
            return {"pattern": trial.suggest_categorical("pattern", list(PATTERNS))}
        case "alphalora":
            return {
                "total_experts": total_experts(trial, shape),
                "beta": trial.suggest_float("beta", 1.0, 4.0, step=0.5),
                "metric": trial.suggest_categorical("metric", ["hill", "alpha_hat", "stable_rank"]),
                "rounding": "largest_remainder",
            }
        case "sensitivity":
            return {
                "total_experts": total_experts(trial, shape),
                "beta": trial.suggest_float("sensitivity_beta", 0.25, 1.0, step=0.25),
            }
        case "lora_smoe":
            return {
                "retention": trial.suggest_float("retention", 0.2, 1.0, step=0.1),
                "strategy": trial.suggest_categorical("strategy", ["S", "U"]),
                "experts_per_block": trial.suggest_int("experts_per_block", 1, 8),
            }
    raise AssertionError(allocator)


def dense_recipe(trial: Any, allocator: str) -> dict[str, Any]:
    """LoRA-MoE settings; HydraLoRA's gates are soft over all experts, so lora_smoe has no top_k."""
    recipe = lora_recipe(trial)
    if allocator != "lora_smoe":
        recipe["top_k"] = trial.suggest_int("top_k", 1, 4)
    return recipe


def controls(shape: ModelShape) -> list[dict[str, Any]]:
    """Uniform and random at the papers' T: what every method has to beat at equal parameters."""
    low, step = shape.num_layers, max(1, shape.num_layers // 2)
    total = low + (T_PER_LAYER - 1) * low // step * step  # on the grid of `total_experts`, 5 a layer or just below
    return [{"allocator": name, "total_experts": total} for name in ("uniform", "random")]


def table_of_experts(trial: Any, allocator: str, fractions: Sequence[float]) -> dict[str, Any]:
    """The knobs of one allocator for MoE bases in a table, where all of them are choices; every seed draws anew."""
    match allocator:
        case "sieve":
            return {
                "fraction": trial.suggest_categorical("fraction", list(fractions)),
                "score": trial.suggest_categorical("score", ["count", "mass"]),
            }
        case "random":
            return {"fraction": trial.suggest_categorical("fraction", list(fractions)), "draw": "each"}
        case "greedy":
            return {"fraction": trial.suggest_categorical("fraction", list(fractions))}
        case "coverage":
            return {"share": trial.suggest_categorical("share", [0.25, 0.5, 0.75])}
        case "esft":
            return {"p": trial.suggest_categorical("p", [0.2, 0.5])}
        case "all" | "none":
            return {}
    raise AssertionError(allocator)
