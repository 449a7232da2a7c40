"""What each allocation has at its own best recipe, and what choosing an allocation is worth then.

    tried = allocations(points); worths(points, noise=tried.noise)        # a study, or a table of recorded trainings

An *allocation* is which experts are adapted or added where, whatever the recipe (its rank included). Its *best recipe*
is that of its most accurate point by the mean over the seeds of the selection split. The best of several is flattered:
how many recipes were tried stands beside it, and where all points share two seeds or more, the best are picked at the
other seeds (`uncertainty.picked_elsewhere`).

What a fixed recipe loses is the best accuracy less that at one recipe for all: of the recipes that every allocation
was tried with, the one of the highest mean accuracy. A search tries no recipe everywhere; there it is what the median
recipe of the allocation has less than the best.

What an allocation is worth is asked at equal trainable parameters, each side at its best recipe there: the best point
of all other rules less the best of the controls, which choose without looking (`CONTROLS`). Equal is within 2 %; where
no rule has a point there, those stand in that have up to a fifth fewer parameters, which can only understate it.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from allocators.core.types import ModuleRanks, Recipe, Trial, digest_of
from search.front import Candidate
from search.report.sections import Section
from search.report.uncertainty import Noise, compare, half_width, interval, picked_elsewhere, pooled
from search.text import human, number, point, settings_of, varying

# what an allocation has to beat at equal parameters, and what all of them are called
CONTROLS = ("random", "uniform", "uniform_ranks", "random_ranks", "stratified_ranks")
SAID = ("random", "uniform")
EQUAL = 0.02  # share by which "equal parameters" may differ
NEAR = 0.8  # of a control's parameters: what a rule has at least that stands in where none has as many
MOST_ROWS = 40


@dataclass(frozen=True)
class Allocated:
    """An allocation: its points that have an accuracy, one a recipe, the best first.

    names         rules and knobs that gave these experts, in the order in which they came
    recipe        of the best point
    fixed_loss    what a fixed recipe loses; None where that is unknown, as where one recipe was tried
    """

    names: tuple[str, ...]
    points: tuple[Candidate, ...]
    fixed_loss: float | None = None

    @property
    def best(self) -> Candidate:
        """Its point at the best recipe."""
        return self.points[0]

    @property
    def recipe(self) -> Recipe:
        """Settings of the best point."""
        return self.best.runs[0].trial.recipe


@dataclass(frozen=True)
class Tried:
    """All allocations, by the parameters of their best points. `fixed`: one recipe that all were tried with, if any."""

    allocations: tuple[Allocated, ...]
    fixed: Recipe | None

    @property
    def noise(self) -> Noise | None:
        """How much accuracy moves between seeds at the best recipes; near a broken one it moves more."""
        return pooled(a.best for a in self.allocations)

    @cached_property
    def settings(self) -> list[str]:
        """Settings that recipes differ in; where how large updates are is one, the scaled rate too."""
        settings = varying(run for a in self.allocations for c in a.points for run in c.runs)
        if {"learning_rate", "lora_alpha"} & set(settings) and "scaled_rate" not in settings:
            settings.append("scaled_rate")
        return settings

    @property
    def losses(self) -> list[float]:
        """What a fixed recipe loses, of the allocations where that is known."""
        return [a.fixed_loss for a in self.allocations if a.fixed_loss is not None]

    @property
    def optimism(self) -> float | None:
        """How much the best of several recipes is flattered by its seeds, on average; None where no seeds tell."""
        several = [a for a in self.allocations if len(a.points) > 1]
        drops = [
            _mean_at(a.best, elsewhere) - statistics.fmean(elsewhere.values())
            for a in several
            if (elsewhere := picked_elsewhere(a.points)) is not None
        ]
        return statistics.fmean(drops) if drops else None


def _mean_at(candidate: Candidate, seeds: Iterable[int]) -> float:
    """Mean accuracy at these seeds."""
    wanted = set(seeds)
    return statistics.fmean(run.accuracy or 0.0 for run in candidate.complete if run.trial.seed in wanted)


def allocations(points: Sequence[Candidate]) -> Tried:
    """Points grouped by allocation; the order of the points matters to ties only."""
    groups: dict[str, list[Candidate]] = {}
    for candidate in points:
        if candidate.accuracy is not None:
            groups.setdefault(_allocation(candidate.runs[0].trial), []).append(candidate)
    fixed = _fixed(list(groups.values()))
    tried = []
    for group in groups.values():
        names = tuple(dict.fromkeys(point(run) for candidate in group for run in candidate.runs))
        best_first = sorted(group, key=lambda c: (-(c.accuracy or 0.0), c.trainable_params, c.point))
        tried.append(Allocated(names, tuple(best_first), _loss(best_first, fixed)))
    return Tried(tuple(sorted(tried, key=lambda a: (a.best.trainable_params, -(a.best.accuracy or 0.0)))), fixed)


def _allocation(trial: Trial) -> str:
    """What its trials share whatever the recipe.

    Where every seed draws its own experts it is the rule that draws; of ranks, which grow with the recipe's, the rule.
    """
    if trial.knobs.get("draw") == "each" or (isinstance(trial.allocation, ModuleRanks) and trial.allocator):
        return digest_of({"allocator": trial.allocator, "knobs": dict(trial.knobs)})
    return trial.allocation.digest


def _fixed(groups: Sequence[Sequence[Candidate]]) -> Recipe | None:
    """Of the recipes that every allocation has an accuracy at, the best on average; None where there is none."""
    if len(groups) < 2:
        return None
    by_recipe: dict[Recipe, list[float]] = {}
    for group in groups:
        for candidate in group:
            by_recipe.setdefault(candidate.runs[0].trial.recipe, []).append(candidate.accuracy or 0.0)
    everywhere = {recipe: accuracies for recipe, accuracies in by_recipe.items() if len(accuracies) == len(groups)}
    if not everywhere:
        return None
    return max(everywhere, key=lambda recipe: (math.fsum(everywhere[recipe]), repr(recipe)))


def _loss(best_first: Sequence[Candidate], fixed: Recipe | None) -> float | None:
    if len(best_first) < 2:
        return None
    accuracies = [c.accuracy or 0.0 for c in best_first]
    at_fixed = [c.accuracy or 0.0 for c in best_first if c.runs[0].trial.recipe == fixed]
    return accuracies[0] - (at_fixed[0] if at_fixed else statistics.median(accuracies))


# --- what the choice is worth


@dataclass(frozen=True)
class Worth:
    """At one size: the best point of the rules, the best of the controls, and the difference.

    rivals, controls   points tried on either side, of which these are the best
    recipes            tried on either side
    accuracies         of rule and control: of what is picked at the other seeds where `fresh`, else of the two points
    reach              half the width of the 95 % interval of their difference; None where no error is known. Not fresh,
                       it is wide enough for all rivals at once (Bonferroni), as the best of them was picked by what is
                       compared here
    """

    rule: Candidate
    control: Candidate
    rivals: int
    controls: int
    recipes: tuple[int, int]
    accuracies: tuple[float, float]
    reach: float | None
    fresh: bool

    @property
    def rise(self) -> float:
        """Accuracy of the rule less that of the control."""
        return self.accuracies[0] - self.accuracies[1]

    @property
    def is_fair(self) -> bool:
        """Whether the controls had at least half as many recipes: else their best is not that of a good recipe."""
        return 2 * self.recipes[1] >= self.recipes[0]

    @property
    def reading(self) -> str:
        """The verdict in words."""
        if not self.is_fair:
            return "too few recipes with controls"
        if self.reach is None:
            return "error unknown"
        return "inside the noise" if abs(self.rise) <= self.reach else "more than noise"


def worths(points: Sequence[Candidate], *, noise: Noise | None) -> list[Worth]:
    """One for every size that a control was tried at and a rule has a point for, ascending in parameters."""
    measured = [c for c in points if c.accuracy is not None]
    rules = sorted((c.trainable_params, place) for place, c in enumerate(measured) if not _is_control(c))
    sizes = [size for size, _ in rules]

    def between(low: float, high: float) -> list[Candidate]:
        """Rules with parameters from low to high, in the order of the points."""
        here = rules[bisect.bisect_left(sizes, low) : bisect.bisect_right(sizes, high)]
        return [measured[place] for place in sorted(place for _, place in here)]

    found = []
    for controls in by_size(c for c in measured if _is_control(c)):
        size = controls[0].trainable_params
        rivals = between(size - EQUAL * size, size + EQUAL * size) or between(NEAR * size, size - 1)
        if rivals:
            found.append(_worth(rivals, controls, noise))
    return found


def _is_control(candidate: Candidate) -> bool:
    return candidate.best.trial.allocator in CONTROLS


def by_size(points: Iterable[Candidate]) -> list[list[Candidate]]:
    """Points of equal parameters: from each smallest one on those that have up to 2 % more."""
    sizes: list[list[Candidate]] = []
    for candidate in sorted(points, key=lambda c: (c.trainable_params, c.point)):
        if sizes and candidate.trainable_params <= (1 + EQUAL) * sizes[-1][0].trainable_params:
            sizes[-1].append(candidate)
        else:
            sizes.append([candidate])
    return sizes


def _worth(rivals: Sequence[Candidate], controls: Sequence[Candidate], noise: Noise | None) -> Worth:
    rule, control = (max(side, key=lambda c: (c.accuracy or 0.0, c.point)) for side in (rivals, controls))
    difference = compare(control, rule, noise=noise, pool=True)
    ours, theirs = picked_elsewhere(rivals), picked_elsewhere(controls)
    shared = ours.keys() & theirs.keys() if ours and theirs else set()
    accuracies, reach = (rule.accuracy or 0.0, control.accuracy or 0.0), difference.reach(comparisons=len(rivals))
    if ours and theirs and shared:
        reach = difference.reach()
        accuracies = (statistics.fmean(ours[s] for s in shared), statistics.fmean(theirs[s] for s in shared))
    recipes = (_recipes(rivals), _recipes(controls))
    return Worth(rule, control, len(rivals), len(controls), recipes, accuracies, reach, fresh=bool(shared))


def _recipes(points: Iterable[Candidate]) -> int:
    return len({c.runs[0].trial.recipe for c in points})


@dataclass(frozen=True)
class Spread:
    """Standard deviations of the accuracy that allocations have at their best recipes.

    n, over_all      allocations with each of the ranks that they were tried with; of all of them
    sizes, in_size   sizes that several of them have; pooled within these
    seeds            trainings behind an accuracy, their mean
    """

    n: int
    over_all: float
    sizes: int
    in_size: float
    seeds: float


def spread(points: Sequence[Candidate]) -> Spread | None:
    """How far best-recipe accuracies differ, over all sizes and at equal ones; None where no size has several.

    At equal parameters an allocation is one with its rank, and the best recipe is that of the other settings.
    """
    best: dict[tuple[str, int], Candidate] = {}
    for candidate in points:
        if candidate.accuracy is not None:
            key = _allocation(candidate.runs[0].trial), candidate.trainable_params
            best[key] = max(best.get(key, candidate), candidate, key=lambda c: c.accuracy or 0.0)
    several = [[c.accuracy or 0.0 for c in size] for size in by_size(best.values()) if len(size) > 1]
    freedom = sum(len(size) - 1 for size in several)
    if not freedom:
        return None
    within = math.fsum((len(size) - 1) * statistics.variance(size) for size in several) / freedom
    over_all = statistics.stdev(c.accuracy or 0.0 for c in best.values())
    seeds = statistics.fmean(len(c.complete) for c in best.values())
    return Spread(len(best), over_all, len(several), math.sqrt(within), seeds)


# --- in words and tables


def in_words(tried: Tried, worth: Sequence[Worth], spread: Spread | None) -> list[str]:
    """The answer, the most important first; nothing where nothing can be compared."""
    said = [_choice(worth, tried.noise)] if worth else []
    if spread is not None:
        noise = tried.noise
        seeds = "" if noise is None else f" (their seeds alone would by {math.sqrt(noise.variance / spread.seeds):.3f})"
        said.append(
            f"At their best recipes allocations of one size differ in accuracy by a standard deviation of "
            f"{spread.in_size:.3f}{seeds}; all sizes together by {spread.over_all:.3f}."
        )
    if tried.losses:
        what = "the median recipe that an allocation was tried with"
        if tried.fixed is not None:
            what = f"one recipe for all ({_recipe(tried, tried.fixed)})"
        said.append(
            f"Against each allocation's best recipe {what} loses {statistics.fmean(tried.losses):.3f} on average and "
            f"{max(tried.losses):.3f} at most."
        )
    return said


def _choice(worth: Sequence[Worth], noise: Noise | None) -> str:
    """The difference at the size where it is largest, and how often it is more than noise."""
    fair = [w for w in worth if w.is_fair]
    if not fair:
        return (
            f"What the choice of the allocation is worth is not said: {' and '.join(SAID)} were tried with less "
            "than half of the recipes that the other rules had at their parameters."
        )
    most = max(fair, key=lambda w: w.rise)
    sure = sum(w.reading == "more than noise" and w.rise > 0 for w in fair)
    said = (
        f"What the choice of the allocation is worth, each side at its best recipe: at "
        f"{human(most.control.trainable_params)} parameters {point(most.rule.best)} "
        f"{most.accuracies[0]:.3f}, {point(most.control.best)} {most.accuracies[1]:.3f}, {_difference(most)}"
    )
    if len(fair) == 1:
        return f"{said} ({most.reading})."
    return (
        f"{said} (the largest of {len(fair)} sizes; {_mean(fair, noise)} on average; better than "
        f"{' and '.join(SAID)} by more than noise at {sure})."
    )


def _mean(worth: Sequence[Worth], noise: Noise | None) -> str:
    """The mean difference over sizes, with its 95 % interval where no luck of picking is in it.

    Seeds of different sizes are different trainings; that all answer the same questions counts in full.
    """
    mean = f"{statistics.fmean(w.rise for w in worth):+.3f}"
    if noise is None or not all(w.fresh for w in worth):
        return mean
    sides = [(w.rule, w.control) for w in worth]
    seeds = math.fsum(noise.variance / len(c.complete) for side in sides for c in side) / len(worth) ** 2
    questions = statistics.fmean(math.fsum((c.question_error or 0.0) ** 2 for c in side) for side in sides)
    variance = seeds + questions
    freedom = variance**2 / (seeds**2 / noise.freedom) if seeds else math.inf
    return f"{mean} ± {half_width(math.sqrt(variance), freedom):.3f}"


def _difference(worth: Worth) -> str:
    return f"{worth.rise:+.3f}" + ("" if worth.reach is None else f" ± {worth.reach:.3f}")


def _recipe(tried: Tried, recipe: Recipe) -> str:
    """`rank 4, learning_rate 0.003, scaled_rate 0.05`."""
    values = settings_of(recipe)
    return ", ".join(f"{name} {number(values[name])}" for name in tried.settings)


def sections(tried: Tried, worth: Sequence[Worth]) -> list[Section]:
    """The allocations at their best recipes, where any was tried with several; the differences, where there are any."""
    found = [_worth_section(worth, tried.noise)] if worth else []
    if any(len(a.points) > 1 for a in tried.allocations):
        found.append(_allocations_section(tried))
    return found


def _worth_section(worth: Sequence[Worth], noise: Noise | None) -> Section:
    head = (
        "trainable parameters",
        "best rule",
        "accuracy",
        "best control",
        "accuracy of control",
        "rule − control",
        "reading",
        "points tried",
        "recipes tried",
    )
    rows = tuple(
        (
            human(w.control.trainable_params),
            point(w.rule.best),
            f"{w.accuracies[0]:.3f}",
            point(w.control.best),
            f"{w.accuracies[1]:.3f}",
            _difference(w),
            w.reading,
            f"{w.rivals} / {w.controls}",
            f"{w.recipes[0]} / {w.recipes[1]}",
        )
        for w in worth
    )
    fresh = sum(w.fresh for w in worth)
    picked = "; it is wide enough for the best of all rivals tried there (Bonferroni)"
    if fresh:
        picked = (
            f". At {fresh} of {len(worth)} sizes all points share seeds: there the accuracies are those of what is "
            "picked at the other seeds, seed by seed, and no luck of the picking is in them"
        )
    notes = (
        "At equal trainable parameters (within 2 %, else a rule with up to a fifth fewer) the most accurate point of "
        f"all rules against that of the controls ({', '.join(SAID)}), whatever the recipe on either side. ± half "
        f"of the 95 % interval, {_errors(noise)}{picked}.",
        "points and recipes tried: of rules / of controls; the side with more has the better chance of a lucky best.",
    )
    return Section("What the choice of the allocation is worth", head, rows, notes)


def _allocations_section(tried: Tried) -> Section:
    shown = sorted(tried.allocations, key=lambda a: -(a.best.accuracy or 0.0))[:MOST_ROWS]
    rows = []
    for allocated in sorted(shown, key=lambda a: (a.best.trainable_params, -(a.best.accuracy or 0.0))):
        ends = interval(allocated.best, noise=tried.noise, pool=True)
        rows.append(
            (
                " = ".join(allocated.names),
                human(allocated.best.trainable_params),
                f"{allocated.best.accuracy:.3f}",
                "" if ends is None else f"{ends[0]:.3f} … {ends[1]:.3f}",
                _recipe(tried, allocated.recipe),
                str(len(allocated.points)),
                "" if allocated.fixed_loss is None else f"{allocated.fixed_loss:.3f}",
            )
        )
    head = ("allocation", "trainable parameters", "accuracy", "95 % interval", "best recipe", "recipes tried", "loss")
    title = "Allocations, each at its best recipe"
    return Section(title, head, tuple(rows), tuple(_about_allocations(tried, len(shown))))


def _about_allocations(tried: Tried, shown: int) -> list[str]:
    loss = "its median recipe has, as no recipe was tried with all"
    if tried.fixed is not None:
        loss = f"one recipe for all has ({_recipe(tried, tried.fixed)}: the best on average)"
    notes = [f"loss: accuracy at the best recipe less what {loss}. 95 % interval: {_errors(tried.noise)}."]
    flattered = "The best of several recipes is a little too good."
    if (optimism := tried.optimism) is not None:
        flattered = f"The best of several recipes is flattered by its seeds: by {optimism:.3f} on average."
    notes.append(flattered)
    if left := len(tried.allocations) - shown:
        notes.append(f"{left} less accurate allocations are not shown.")
    return notes


def _errors(noise: Noise | None) -> str:
    """What an interval covers."""
    return "questions alone, as no point has two seeds" if noise is None else "questions and seeds"
