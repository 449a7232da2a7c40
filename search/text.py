"""How numbers, names and clocks are written, in the terminal, on the page, in model cards and in MLflow's names.

    label(outcome, varying(outcomes))        # sieve fraction=0.25, rank 8

Words in, words out: nothing here counts, compares or reads a file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Literal

from allocators.core.types import Allocation, ModuleRanks, Outcome, Recipe
from search.front import Candidate

Split = Literal["accuracy", "validation", "test"]  # "accuracy": of a study that has one number, on the test split


def human(count: float) -> str:
    """A number of parameters (or tokens, or bytes) as people say it.

    >>> human(84_967_424), human(1_540), human(12)
    ('84.97M', '1.54k', '12')
    """
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:.2f}{letter}"
    return f"{count:g}"


def number(value: object) -> str:
    """Floats in three significant digits, everything else as it is.

    >>> number(0.00123456), number(8), number("cosine")
    ('0.00123', '8', 'cosine')
    """
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def probability(chance: float | None) -> str:
    """Two digits; never certainty where there is noise.

    >>> probability(0.93), probability(0.999), probability(0.001), probability(None)
    ('.93', '> .99', '< .01', '')
    """
    if chance is None:
        return ""
    return "> .99" if chance > 0.99 else "< .01" if chance < 0.01 else f"{chance:.2f}".removeprefix("0")


def accuracy_text(candidate: Candidate, split: Split = "accuracy") -> str:
    """`0.512 ± 0.035` (one standard error), `0.512` where the error is not known, `` without accuracy on the split."""
    accuracy, error = candidate.accuracy, candidate.stderr
    if split == "test":
        accuracy, error = candidate.test_accuracy, candidate.test_stderr
    if accuracy is None:
        return ""
    return f"{accuracy:.3f}" + (f" ± {error:.3f}" if error is not None else "")


def forgotten_text(candidate: Candidate) -> str:
    """`+0.031`: rise of the loss on general text, nats a token; nothing where it was not measured."""
    return "" if candidate.forgetting is None else f"{candidate.forgetting:+.3f}"


def both_text(candidate: Candidate, splits: Iterable[Split]) -> str:
    """`validation 0.512 ± 0.035, test 0.498 ± 0.035`; splits that the point was not evaluated on are left out."""
    texts = ((split, accuracy_text(candidate, split)) for split in splits)
    return ", ".join(f"{split} {text}" for split, text in texts if text)


def clock(seconds: float) -> str:
    """Seconds, minutes, hours.

    >>> clock(12.3), clock(185), clock(3_723)
    ('12 s', '3:05', '1:02:03')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def amount(allocation: Allocation) -> str:
    """`12 experts`, or `total rank 320` where modules have ranks."""
    if isinstance(allocation, ModuleRanks):
        return f"total rank {allocation.total_rank}"
    return f"{allocation.total_experts} experts"


def point(outcome: Outcome) -> str:
    """`sieve fraction=0.25`: the allocator that proposed the allocation, with its knobs."""
    knobs = (f"{name}={number(value)}" for name, value in outcome.trial.knobs.items())
    return " ".join([outcome.trial.allocator or "unnamed", *knobs])


def settings_of(recipe: Recipe) -> dict[str, object]:
    """Every setting of a recipe by its name, the scaled rate beside the learning rate."""
    settings: dict[str, object] = {}
    for f in fields(Recipe):
        settings[f.name] = getattr(recipe, f.name)
        if f.name == "learning_rate":
            settings["scaled_rate"] = recipe.scaled_rate
    return settings


def varying(outcomes: Iterable[Outcome]) -> list[str]:
    """Recipe settings that are not the same in all outcomes, in the recipe's order.

    The scaled rate is one of them where learning_rate and lora_alpha both vary: else it follows the one that does.
    """
    recipes = [settings_of(outcome.trial.recipe) for outcome in outcomes]
    names = [name for name in (recipes[0] if recipes else ()) if len({recipe[name] for recipe in recipes}) > 1]
    if {"learning_rate", "lora_alpha"} <= set(names):
        return names
    return [name for name in names if name != "scaled_rate"]


def recipe_words(outcome: Outcome, settings: Iterable[str]) -> list[str]:
    """`rank 8` for each of these settings of the recipe."""
    return [f"{name} {number(settings_of(outcome.trial.recipe)[name])}" for name in settings]


def label(outcome: Outcome, settings: Iterable[str]) -> str:
    """`sieve fraction=0.25, rank 8`: allocator, knobs, and these settings of the recipe."""
    return ", ".join([point(outcome), *recipe_words(outcome, settings)])


def run_id(run: Outcome) -> str:
    """As much of a run's digest as tables show; `search.export point=` takes it."""
    return run.digest[:8]
