"""Which settings accuracy goes with: shares of its variance over the points of a study.

    importance(points)        # `report.html` draws the shares

The shares measure where accuracy varied among the points tried, broken trainings (`broken.py`) included. What an
allocation is worth once its recipe is good is another question: `allocations.py`.

Trainable parameters are counted before training, so only accuracy has to be explained. Settings are taken in groups:
the allocator with its knobs (knobs exist for one allocator only, so they move together), T, top-k, rank, lora_alpha
with the scaled rate (`Recipe.scaled_rate`, which stands for the learning rate), and the rest of the optimiser's.

The share of a group is its total effect on what a random forest predicts (Sobol's index; a knob that a point lacks is a
missing value): MSE(group shuffled) − MSE, halved, over the variance of accuracy, on points that the forest was not
fitted on, by scikit-learn's `permutation_importance` in bootstrap resamples of the points. Optuna's fANOVA was not
taken because it sees only parameters that all points have, and spreads them evenly over the space; its PED-ANOVA knows
conditional parameters, but says what sets the best points apart and not how much of the variance that is.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from allocators.core.types import Recipe, Trial
from search.front import Candidate
from search.report.sections import Section

FEWEST = 20  # points below which a forest tells chance
MOST = 1_000  # points that forests are fitted to: more do not move the shares by what their errors are
RESAMPLES, TREES, SHUFFLES = 20, 30, 2


@dataclass(frozen=True)
class Share:
    """Of the variance of accuracy over the points: what goes with a group of settings, ± one standard deviation.

    settings   of the group, those that vary
    """

    group: str
    settings: tuple[str, ...]
    value: float
    error: float


@dataclass(frozen=True)
class Importance:
    """Shares, the largest first, over so many points; `foreseen`: R² of the forests on points that were left out."""

    shares: tuple[Share, ...]
    points: int
    foreseen: float


def settings_of(trial: Trial) -> dict[str, object]:
    """Allocator, knobs and recipe; beside the learning rate, which follows from it, the scaled rate."""
    recipe = {f.name: getattr(trial.recipe, f.name) for f in fields(Recipe)}
    return {"allocator": trial.allocator, **trial.knobs, **recipe, "scaled_rate": trial.recipe.scaled_rate}


def groups_of(trial: Trial) -> dict[str, dict[str, object]]:
    """A trial's settings by group."""
    settings = settings_of(trial)
    del settings["learning_rate"]

    def take(*names: str) -> dict[str, object]:
        return {name: settings.pop(name) for name in names if name in settings}

    return {
        "allocator and its knobs": take("allocator", *(name for name in trial.knobs if name != "total_experts")),
        "T": take("total_experts"),
        "top-k": take("top_k"),
        "rank": take("rank"),
        "alpha and scaled rate": take("lora_alpha", "scaled_rate"),
        "optimiser": settings,
    }


def importance(points: Sequence[Candidate]) -> Importance | None:
    """How accuracy (mean over the seeds) goes with each group; the order of the points does not matter.

    Of more than a thousand points as many are taken.

    None for fewer than 20 points with an accuracy, or where accuracy or the settings are all the same.
    """
    # by digest, so that the first of many are as good as drawn
    measured = sorted((c for c in points if c.accuracy is not None), key=lambda c: c.point)[:MOST]
    accuracies = [c.accuracy or 0.0 for c in measured]
    if len(measured) < FEWEST or len(set(accuracies)) == 1:
        return None
    by_group = [groups_of(c.runs[0].trial) for c in measured]
    groups = {group: _varying([of[group] for of in by_group]) for group in by_group[0]}
    groups = {group: settings for group, settings in groups.items() if settings}
    if not groups:
        return None
    columns = {g: _columns([of[g] for of in by_group], settings) for g, settings in groups.items()}
    by_resample, foreseen = _shares(list(columns.values()), accuracies)
    shares = [
        Share(group, tuple(settings), statistics.fmean(values), statistics.stdev(values))
        for (group, settings), values in zip(groups.items(), by_resample, strict=True)
    ]
    return Importance(tuple(sorted(shares, key=lambda share: -share.value)), len(measured), foreseen)


def _varying(points: Sequence[Mapping[str, object]]) -> list[str]:
    """Settings that are not the same at all points, those that some points lack included."""
    names = list(dict.fromkeys(name for of in points for name in of))
    return [name for name in names if len({(name in of, of.get(name)) for of in points}) > 1]


def _columns(points: Sequence[Mapping[str, object]], settings: Sequence[str]) -> list[list[float]]:
    """Rows of numbers for a forest: a number as it is, NaN where a point has none; of choices one column each."""
    columns: list[list[float]] = []
    for name in settings:
        values = [of.get(name) for of in points]
        numbers = [number for value in values if (number := _number(value)) is not None]
        if len(numbers) == len(values):
            columns.append(numbers)
        else:
            choices = sorted({str(value) for value in values})
            columns += [[float(str(value) == choice) for value in values] for choice in choices]
    return [list(row) for row in zip(*columns, strict=True)]


def _number(value: object) -> float | None:
    """NaN for a setting that a point lacks, None for one that is no number."""
    if value is None:
        return math.nan
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _shares(columns: Sequence[list[list[float]]], accuracies: Sequence[float]) -> tuple[list[list[float]], float]:
    """By group its share in every resample, and R² of the predictions for points that were left out, their mean."""
    import numpy as np  # these here: seconds that a small study does not need
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer

    blocks, y, n = [np.asarray(block) for block in columns], np.asarray(accuracies), len(accuracies)
    # One column a group, which holds the number of the point whose settings are meant: a group is shuffled as a whole.
    numbers = np.tile(np.arange(n)[:, None], (1, len(blocks)))
    unfold = FunctionTransformer(lambda of: np.hstack([block[of[:, g]] for g, block in enumerate(blocks)]))
    draw = np.random.default_rng(0)
    shares, total, times = [], np.zeros(n), np.zeros(n)
    for resample in range(RESAMPLES):
        fitted = draw.integers(0, n, n)
        left = np.setdiff1d(np.arange(n), fitted)
        model = make_pipeline(unfold, RandomForestRegressor(TREES, random_state=resample))
        model.fit(numbers[fitted], y[fitted])
        scores = permutation_importance(
            model,
            numbers[left],
            y[left],
            scoring="neg_mean_squared_error",
            n_repeats=SHUFFLES,
            random_state=resample,
        )
        shares.append(scores.importances_mean / 2 / y.var())
        total[left] += model.predict(numbers[left])
        times[left] += 1
    seen = times > 0
    error = y[seen] - total[seen] / times[seen]
    return np.transpose(shares).tolist(), float(1 - (error**2).mean() / y[seen].var())


def in_words(explained: Importance | None, points: Sequence[Candidate]) -> list[str]:
    """What the shares say, or why there are none."""
    n = sum(1 for c in points if c.accuracy is not None)
    if n < FEWEST:
        return [f"Which settings accuracy goes with is not said: {n} points have one, {FEWEST} are needed."]
    if explained is None:
        return [f"Accuracy, or every setting, is the same at all {n} points: there is nothing to attribute."]
    if explained.foreseen <= 0:
        return [
            f"From the settings of the {n} points tried accuracy cannot be foreseen: nothing is attributed to them."
        ]
    which = f"the {n} points tried" if n == explained.points else f"{explained.points:,} of the {n:,} points tried"
    parts = [f"{_percent(s)} with {'the ' if len(s.settings) > 1 else ''}{_name(s)}" for s in explained.shares[:3]]
    listed = " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]
    return [
        f"Of the variance of accuracy over {which}, broken trainings included, "
        f"{listed.replace(' with', ' goes with', 1)}."
    ]


def _percent(share: Share) -> str:
    return f"{100 * max(share.value, 0):.0f} % ± {100 * share.error:.0f} %"


def _name(share: Share) -> str:
    """The group, or the one setting of it that varies."""
    return share.settings[0] if len(share.settings) == 1 else share.group


def attributed(explained: Importance | None) -> list[Section]:
    """The shares as a table, and as bars on the page."""
    if explained is None or explained.foreseen <= 0:
        return []
    rows = tuple((_name(s), _percent(s), ", ".join(s.settings)) for s in explained.shares)
    notes = (
        f"Share of the variance of accuracy over {explained.points} points; ± one standard deviation over "
        f"{RESAMPLES} bootstrap resamples of the points. What settings do only together counts for each of them, so "
        "shares may add up to more than 100 %; what is below zero is noise and shown as 0 %.",
        f"Forests foresee {100 * explained.foreseen:.0f} % of the variance of points they were not fitted on. The rest "
        "is seeds, questions, and what so few points do not show.",
        "It measures which trainings came out low, broken ones included, and not what an allocation is worth at a good "
        "recipe: that stands above.",
        "It is about the points tried, not about the space: a sampler crowds where accuracy is high, and a setting "
        "that it hardly varied has a small share here. Trainable parameters are counted: nothing to explain.",
    )
    bars = tuple((_name(s), max(s.value, 0.0), s.error) for s in explained.shares)
    return [Section("Variance of accuracy by setting", ("settings", "share", "what varies"), rows, notes, bars)]
