"""The recipe of a run, and the part of it that adapters are built from."""

from __future__ import annotations

import math
from dataclasses import MISSING, fields
from typing import Any

import pytest

from allocators.core.errors import StudyError
from allocators.core.types import LoraSettings, Recipe, canonical_json


def test_every_lora_setting_is_one_of_the_recipe_with_the_same_default() -> None:
    recipe = {f.name: f for f in fields(Recipe)}
    for setting in fields(LoraSettings):
        assert recipe[setting.name].type == setting.type
        assert setting.default in (MISSING, recipe[setting.name].default)


def test_the_lora_part_of_a_recipe_has_its_values() -> None:
    recipe = Recipe(rank=4, lora_alpha=6.0, lora_dropout=0.1, top_k=3, balance_coef=0.01, steps=5)
    assert recipe.lora == LoraSettings(rank=4, lora_alpha=6.0, lora_dropout=0.1, top_k=3, balance_coef=0.01)
    assert recipe.lora.scale == 1.5


def test_the_json_of_a_recipe_is_flat() -> None:
    """Trials are named by it: studies that were begun with other versions would not be gone on with."""
    assert canonical_json(Recipe().to_json()) == (
        '{"balance_coef":0.0,"batch_size":16,"epochs":1.0,"learning_rate":0.0003,"lora_alpha":16.0,"lora_dropout":0.0,'
        '"max_grad_norm":1.0,"max_length":512,"micro_batch_size":16,"rank":8,"schedule":"cosine","steps":0,"top_k":2,'
        '"warmup_ratio":0.1,"weight_decay":0.0}'
    )
    assert Recipe.from_json(Recipe(rank=3, top_k=1).to_json()) == Recipe(rank=3, top_k=1)


FLOATS = [f.name for f in fields(Recipe) if isinstance(f.default, float)]
WHOLE = [f.name for f in fields(Recipe) if isinstance(f.default, int)]


make: Any = Recipe  # also of what no type checker lets through


@pytest.mark.parametrize("name", [*FLOATS, *WHOLE])
def test_every_number_of_a_recipe_is_finite_and_in_its_range(name: str) -> None:
    for value in (math.nan, math.inf, -math.inf, 1e300, -1, "8", True, None, [1]):
        with pytest.raises(StudyError) as error:
            make(**{name: value})
        assert str(error.value).startswith(f"{name} must be ")
        assert "\n" not in str(error.value)
    for value in (2.5, 10**30) if name in WHOLE else ():
        with pytest.raises(StudyError, match=f"^{name} must be "):
            make(**{name: value})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"weight_decay": -1}, "weight_decay must be not negative, got -1"),
        ({"lora_alpha": 0}, "lora_alpha must be positive, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"warmup_ratio": 1.5}, r"warmup_ratio must be in \[0, 1\], got 1.5"),
        ({"epochs": 0}, "steps or epochs must be positive"),
        ({"max_length": 1}, "max_length must be at least 2, got 1"),
        ({"rank": 1 << 17}, "rank must be at most 65536, got 131072"),
        ({"schedule": "cosin"}, "schedule must be cosine, linear or constant, got 'cosin'"),
    ],
)
def test_what_no_recipe_has_is_named_with_its_range(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        Recipe(**setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"rank": 0}, "rank must be at least 1"), ({"lora_dropout": 1.0}, "lora_dropout"), ({"top_k": 0}, "top_k")],
)
def test_impossible_lora_settings_are_refused_in_both(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        Recipe(**setting)
    with pytest.raises(StudyError, match=message):
        LoraSettings(**({"rank": 4, "lora_alpha": 8.0} | setting))
