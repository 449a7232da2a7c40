"""The plan of a run: how many steps, when to evaluate, which rate, which rows. Pure functions of recipe and seed."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import lru_cache

from allocators.core.types import Recipe
from trainers.tasks import Row


def total_steps(recipe: Recipe, num_rows: int) -> int:
    """Optimiser steps of a run. Batches are always full: the last one of an epoch is filled from the next epoch."""
    return recipe.steps or max(1, math.ceil(recipe.epochs * num_rows / recipe.batch_size))


def rung_steps(steps: int, evaluations: int) -> tuple[int, ...]:
    """After how many steps to evaluate: `rung_steps(10, 3) == (3, 7, 10)`."""
    return tuple(sorted({max(1, round(steps * i / evaluations)) for i in range(1, evaluations + 1)}))


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Rate of step 0, 1, ...: linear warm-up over `warmup_ratio` of the steps, then the schedule, ending near zero."""
    warmup = round(recipe.warmup_ratio * steps)
    if step < warmup:
        return recipe.learning_rate * ((step + 1) / warmup)  # in this order: never above the rate by a rounding
    progress = (step - warmup) / max(1, steps - warmup)
    match recipe.schedule:
        case "cosine":
            return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return recipe.learning_rate * (1 - progress)
        case "constant":
            return recipe.learning_rate


def batch_at(step: int, *, num_rows: int, batch_size: int, seed: int) -> list[int]:
    """Which rows a step trains on: shuffled epochs, one after another, cut into batches. No adapter changes it."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return [_epoch(num_rows, seed, place // num_rows)[place % num_rows] for place in places]


@lru_cache(maxsize=4)
def _epoch(num_rows: int, seed: int, epoch: int) -> list[int]:
    order = list(range(num_rows))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def share_of(rows: Sequence[Row], *, rank: int, world_size: int, micro_batch_size: int) -> list[list[Row]]:
    """One worker's micro-batches of a batch: rows of like length together, so that little is padded."""
    by_length = sorted(rows, key=lambda row: -len(row.input_ids))[rank::world_size]
    return [by_length[i : i + micro_batch_size] for i in range(0, len(by_length), micro_batch_size)]
