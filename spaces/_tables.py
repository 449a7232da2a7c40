"""What a table space says about its paper: published numbers, and the comparisons that the paper makes.

    PUBLISHED = (Published(model="Llama-2-7b-hf", task="arc_easy", row={"allocator": "uniform"}, accuracy=0.84, ...),)
    COMPARISONS = (Comparison("AlphaLoRA against uniform", {"allocator": "alphalora"}, {"allocator": "uniform"}, ...),)

A row is named by the knobs that single it out among the table's rows. Not a space itself: the name has an underscore.

The papers' tables train every row with two recipes, so that a conclusion can be told from the recipe it was drawn with:
`tuned`, a starting point that suits most models, and `paper`, with lora_alpha = 2·rank as all of the papers have it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from spaces._knobs import TRANSFERABLE

# The papers' rank and lora_alpha. At their learning rates (scaled .0008 to .026) a hundred steps of a small model learn
# nothing, so the rate is the best of .03, .05 and .1 for tiny-dense at this lora_alpha.
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "tuned": TRANSFERABLE,
    "paper": {"rank": 8, "lora_alpha": 16.0, "scaled_rate": 0.05},
}


@dataclass(frozen=True)
class Published:
    """One published accuracy.

    model, task   what it was measured on: the last part of the Hugging Face id; the task's name here, or words that
                  say why it is no single task
    row           the row it belongs to
    accuracy      between 0 and 1
    source        where it stands
    """

    model: str
    task: str
    row: Mapping[str, Any]
    accuracy: float
    source: str


@dataclass(frozen=True)
class Comparison:
    """Two rows that the paper sets against each other, tested pairwise over the seeds.

    claim    what the paper found, in its own size where it gives one
    margin   above 0: the claim is that they are equal to within it, and equivalence is tested
    """

    name: str
    first: Mapping[str, Any]
    second: Mapping[str, Any]
    claim: str
    source: str
    margin: float = 0.0


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


def facts(space: Any) -> dict[str, Any]:
    """What a table says about its paper, as JSON, for the study's records: the report then needs no space.

    Empty for a space that is no table.
    """
    if not getattr(space, "TABLE", False):
        return {}
    return {
        "published": [asdict(entry) for entry in getattr(space, "PUBLISHED", ())],
        "comparisons": [asdict(entry) for entry in getattr(space, "COMPARISONS", ())],
    }
