"""Which experts of an MoE model should get LoRA, and which rule should choose them?

    python -m search.run space=sieve                                    embedded model and task, offline, minutes
    python -m search.run space=sieve model=allenai/OLMoE-1B-7B-0924 task=arc_easy recipe.epochs=3

MoE-Sieve adapts the most routed quarter of each layer's experts. This space makes that rule one candidate beside
ESFT's, coverage, greedy, random, all and none, each with its own knobs, and searches accuracy against exact trainable
parameters. Attention, router and shared experts get LoRA, too, unless `roles` says otherwise.

Knobs
    allocator       sieve | coverage | greedy | esft | random | all | none
    fraction        share of each layer's experts (sieve, random) or of all experts (greedy), in steps of 1/16
                    (coarser where a layer has fewer than 16 experts)
    share           share of the routed tokens or gate mass that the kept experts cover (coverage)
    p               the same for ESFT; the expert that crosses it is included
    score           count | mass: what "most routed" means (sieve, coverage, greedy); reap | ean only where they are
                    asked for: space.score=reap (gate times the norm of an expert's output, mean over its tokens), ean
                    (the norm alone), any (all four)
    esft_score      token | gate (esft)
    roles           only where it is asked for, else as published: space.roles=experts (the chosen experts alone),
                    attention+experts (router frozen), any other combination of attention, router, shared, gate (Qwen's,
                    of the shared expert) and experts, all, or any: default, all, attention+experts, experts,
                    attention+router and attention are searched
    expert_rank     only where it is asked for: r (as published) | r/k | r/E | any; an expert's rank, where k of E are
                    active
    rank            1 .. 32, logarithmic
    lora_alpha      8 .. 256, logarithmic, independent of the rank
    scaled_rate     learning_rate·lora_alpha, 5e-4 .. 0.5, logarithmic: ΔW moves by it a step whatever the rank, so
                    that its best value hardly depends on rank, lora_alpha and allocation; learning_rate follows

Starting points: none, all, random 25 % and hot 25 % with the study's recipe, which is rank 4, lora_alpha 64 and scaled
rate 0.1 where neither the task nor the command line suggests one; hot 25 % with the paper's recipe (rank 32,
lora_alpha 64, learning_rate 4e-4).

Measured on the embedded model and task: docs/measurements.md says what choosing the experts is worth, how many
trainings a search needs, and what its front is worth; docs/speed.md says how long 16 trials take.
"""

from __future__ import annotations

import math
from typing import Any

from allocators.core.types import ModelShape, Point

from ._knobs import lora_recipe, role_knobs, score

BASE = "moe"
ALLOCATORS = ("sieve", "coverage", "greedy", "esft", "random", "all", "none")
PAPER = {"rank": 32, "lora_alpha": 64.0, "scaled_rate": 64 * 4e-4}


def suggest(trial: Any, shape: ModelShape) -> Point:
    """Allocator, its knobs and a LoRA recipe; fractions lie on the grid that `_step` gives."""
    step = _step(shape)
    allocator = trial.suggest_categorical("allocator", list(ALLOCATORS))
    knobs: dict[str, Any] = {}
    match allocator:
        case "sieve" | "greedy":
            knobs["fraction"] = trial.suggest_float("fraction", step, 1 - step, step=step)
            knobs["score"] = score(trial)
        case "random":
            knobs["fraction"] = trial.suggest_float("fraction", step, 1 - step, step=step)
        case "coverage":
            knobs["share"] = trial.suggest_float("share", 0.1, 0.9, step=0.05)
            knobs["score"] = score(trial)
        case "esft":
            knobs["p"] = trial.suggest_float("p", 0.05, 0.75, step=0.05)
            knobs["score"] = trial.suggest_categorical("esft_score", ["token", "gate"])
    return Point(allocator, knobs | role_knobs(trial, shape), lora_recipe(trial))


def starting_points(shape: ModelShape) -> list[dict[str, Any]]:
    """No expert, every expert, and a quarter (one step, if that is more) at random and by MoE-Sieve."""
    quarter = max(_step(shape), 0.25)
    return [
        {"allocator": "none"},
        {"allocator": "all"},
        {"allocator": "random", "fraction": quarter},
        {"allocator": "sieve", "fraction": quarter, "score": "count"},
        {"allocator": "sieve", "fraction": quarter, "score": "count"} | PAPER,
    ]


def _step(shape: ModelShape) -> float:
    """1/16, or coarser where a layer has fewer than 16 experts: a power of two, so that the grid is exact."""
    fewest = min(16, *(shape.experts_in(layer) for layer in shape.moe_layers))
    return math.ldexp(1.0, 1 - fewest.bit_length())
