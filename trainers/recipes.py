"""Recipe settings by name, as task files suggest them, spaces propose them and command lines fix them.

make_recipe({"steps": 200}, {"rank": 4, "scaled_rate": 0.1})        # a Recipe; later layers win
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from allocators.core.errors import StudyError, did_you_mean, shown
from allocators.core.types import Recipe

ALIASES = {  # names that other programs have for settings
    "lr": "learning_rate",
    "alpha": "lora_alpha",
    "r": "rank",
    "dropout": "lora_dropout",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
}


def make_recipe(*layers: Mapping[str, Any]) -> Recipe:
    """`Recipe` from layers of settings, later ones win.

    `scaled_rate` stands for the learning_rate that it gives with the lora_alpha of the recipe (`Recipe.scaled_rate`).

    Raises StudyError for an unknown name, a value that is not a finite number where one is needed, one below what the
    setting can be, or a layer that gives learning_rate and scaled_rate.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        if "epochs" in layer and "steps" not in layer:
            merged.pop("steps", None)  # steps win over epochs inside one layer, not over a later layer's epochs
        given = _RATES & layer.keys()
        if len(given) > 1:
            raise StudyError("learning_rate and scaled_rate (learning_rate·lora_alpha) say the same: give one of them")
        for name in _RATES if given else ():
            merged.pop(name, None)
        merged |= layer
    for name in merged:
        if (known := ALIASES.get(str(name))) is not None:
            raise StudyError(f"unknown recipe setting '{name}'; did you mean 'recipe.{known}'?")
        if name not in SETTINGS:
            raise StudyError(
                f"unknown recipe setting '{shown(str(name))}': choose from {', '.join(sorted(SETTINGS))}"
                f"{did_you_mean(str(name), SETTINGS)}"
            )
    settings = {name: _setting(name, value, SETTINGS[name]) for name, value in merged.items()}
    if (scaled := settings.pop("scaled_rate", None)) is not None:
        settings["learning_rate"] = scaled / (settings.get("lora_alpha", Recipe().lora_alpha) or 1.0)
    try:
        return Recipe(**settings)
    except StudyError as error:
        raise StudyError(f"recipe.{error}") from None


# What a recipe is made of, by name: the fields of `Recipe`, and the scaled rate in the place of the learning rate.
SETTINGS: dict[str, type] = {f.name: type(f.default) for f in fields(Recipe)} | {"scaled_rate": float}
_RATES = {"learning_rate", "scaled_rate"}


def _setting(name: str, value: Any, wanted: type) -> Any:
    if wanted is str:
        return str(value)
    try:
        number = wanted(value)
        fits = not isinstance(value, str | bool) and math.isfinite(number) and (wanted is float or number == value)
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        kind = "a whole number" if wanted is int else "a finite number"
        raise StudyError(f"recipe.{name} must be {kind}, got {shown(repr(value))}")
    if name == "scaled_rate" and number <= 0:
        raise StudyError(f"recipe.{name} must be positive, got {value}")
    return number
