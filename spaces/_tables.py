"""The two recipes of the papers' tables. Not a space itself: the name has an underscore.

The papers' tables train every row with both, so that a conclusion can be told from the recipe it was drawn with:
`tuned`, a starting point that suits most models, and `paper`, with lora_alpha = 2·rank as all of the papers have it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from allocators.core.tables import Comparison
from allocators.core.types import TRANSFERABLE

# The papers' rank and lora_alpha. At their learning rates (scaled .0008 to .026) a hundred steps of a small model learn
# nothing, so the rate is the best of .03, .05 and .1 for tiny-dense at this lora_alpha.
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "tuned": TRANSFERABLE,
    "paper": {"rank": 8, "lora_alpha": 16.0, "scaled_rate": 0.05},
}


def recipe_of_row(trial: Any) -> dict[str, Any]:
    """The recipe of a row, by the knob `recipe`; `recipe.NAME=` on the command line wins over it."""
    return dict(RECIPES[trial.suggest_categorical("recipe", list(RECIPES))])


def with_each_recipe(comparisons: Iterable[Comparison]) -> tuple[Comparison, ...]:
    """Every comparison once a recipe, both sides with the same one."""
    return tuple(
        replace(c, name=f"{c.name}, {name}", first={**c.first, "recipe": name}, second={**c.second, "recipe": name})
        for c in comparisons
        for name in RECIPES
    )


def tuned_against_paper(rows: Mapping[str, Mapping[str, Any]]) -> tuple[Comparison, ...]:
    """What the tuned recipe is worth at rows with a name; the two sides differ in rank, and so in parameters."""
    return tuple(
        Comparison(f"{name}, tuned − paper", {**row, "recipe": "tuned"}, {**row, "recipe": "paper"}, "", "here")
        for name, row in rows.items()
    )
