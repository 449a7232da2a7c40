"""A study in sentences, and the lines to type that take its points elsewhere.

    for sentence in sentences(results): ...        # the most important first

What is said is said carefully: a difference counts only above two standard errors, and how many seeds stand behind a
point is always named.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from allocators.core.types import Outcome, Recipe, best_under
from search.config import AUTO, load_arguments
from search.front import Candidate
from search.report import allocations, attribution, broken
from search.report.allocations import CONTROLS, EQUAL, SAID
from search.report.results import Results
from search.report.sections import is_table
from search.report.splits import Optimism, optimism, selects_on_test
from search.report.uncertainty import TOO_CLOSE, Bias, Difference
from search.text import Split, accuracy_text, forgotten_text, human, point, recipe_words, run_id

MOST_TOLD = 12  # comparisons outside the noise that are told one by one
MANY = 5  # comparisons inside the noise that are told one by one
FAITHFUL = 0.8  # rank correlation between a third of the training and its end below which early results mislead
ALIKE = "one question, or questions that were all answered alike, say nothing of others"


def sentences(results: Results) -> list[str]:
    """The study in sentences, the most important first."""
    if not results.front:
        if any(candidate.accuracy is not None for candidate in results.points):
            limit = results.records.points.max_forgetting
            known = f"to forget at most max_forgetting={limit:g} nats a token" if limit else "by what it forgets"
            return [f"No point is known {known}: there is no front to show.", *_state(results)]
        return ["No finished trial yet: there is no front to show.", *_state(results)]
    return [
        *_best(results),
        *_gained(results),
        *_forgotten(results),
        *_honesty(results),
        *_against_baselines(results),
        *allocations.in_words(results.tried, results.worths, allocations.spread(results.trained)),
        *broken.in_words(results.broken),
        *attribution.in_words(results.importance, results.trained),
        *_early(results),
        *_state(results),
    ]


def headlines(results: Results, *, quick: bool = False) -> list[str]:
    """At most four of the sentences: the best point, the knee, the gain, and what the choice of allocation is worth.

    quick   without the last, which takes long to compute
    """
    if not results.front:
        return sentences(results)[:1]
    best, *others = _best(results)
    knee = [said for said in others if said.startswith("The knee")]
    said = [best, *knee, *_gained(results)[:1]]
    return (
        said if quick or not results.worths else [*said, *allocations.in_words(results.tried, results.worths, None)[:1]]
    )


def markdown(results: Results, said: Sequence[str]) -> str:
    """Sentences as a list and the front as a table, in Markdown; names are text there, whatever they hold."""

    def text(value: object) -> str:
        return re.sub(r"([\\`*_{}\[\]<>|#!~&$])", r"\\\1", " ".join(str(value).split()))

    lines = [f"- {text(sentence)}" for sentence in said]
    if results.front:
        forgets = ["forgotten"] if results.records.points.of_three else []
        head = ["id", "trainable parameters", *results.splits, *forgets, "allocation and recipe", ""]
        lines += ["", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for member in results.front:
        accuracies = [accuracy_text(member, split) for split in results.splits]
        forgotten = [forgotten_text(member)] if results.records.points.of_three else []
        size = human(member.trainable_params)
        cells = [run_id(member.best), size, *accuracies, *forgotten, results.label(member.best)]
        cells.append("knee" if member is results.knee else "")
        lines.append(f"| {' | '.join(map(text, cells))} |")
    return "\n".join(lines)


def _best(results: Results) -> list[str]:
    """The most accurate point, the best under some budgets, and the knee."""

    def name(candidate: Candidate) -> str:
        size = human(candidate.trainable_params)
        accuracy = results.accuracy_words(candidate)
        return f"{results.label(candidate.best)} ({size} trainable parameters, {accuracy})"

    where = "" if results.splits[0] == "accuracy" else " on validation"
    where += ", which selects" if where and not is_table(results.records) else ""
    said = [f"Most accurate{where}: {name(results.rising[-1])}."]
    by_digest = {c.best.digest: c for c in results.points}
    means = [c.best.updated(accuracy=c.accuracy) for c in results.points]
    fitting = {best.digest: budget for budget in _budgets(results) if (best := best_under(means, budget))}
    for digest, budget in fitting.items():  # the widest budget that a point wins
        said.append(f"Best under {human(budget).replace('.00', '')} parameters: {name(by_digest[digest])}.")
    if results.knee is not None:
        said.append(f"The knee, after which parameters buy less: {name(results.knee)}.")
    elif len(results.rising) > 2:
        said.append("The front has no knee: nowhere does it rise above the straight line between its ends.")
    return said


def _gained(results: Results) -> list[str]:
    """What the most accurate point has over the base, by test accuracy where both have one."""
    base, best = results.records.untrained, results.rising[-1]
    if base is None or best.accuracy is None:
        return []
    split = results.split_of(best) if base.get("test") else results.splits[0]
    here, judged = (base["test"], results.judged(best)) if split == "test" else (base, best)
    error = math.hypot(judged.stderr or 0.0, here["stderr"]) or None
    gain = Difference((judged.accuracy or 0.0) - here["accuracy"], error, None)
    known = f"standard error {error:.3f}: {gain.reading}" if error else f"standard error unknown: {ALIKE}"
    other = f" (validation {base['accuracy']:.3f} ± {base['stderr']:.3f})" if split == "test" else ""
    return [
        f"Untrained, the base has {here['accuracy']:.3f} ± {here['stderr']:.3f}{_on(split)}{other}: training is worth "
        f"{gain.rise:+.3f} at the most accurate point ({known})."
    ]


def _forgotten(results: Results) -> list[str]:
    """What trainings cost on general text, and which points a limit keeps off the front."""
    if not results.forgets:
        return []
    config, best = results.records.header["config"], results.rising[-1]
    text = Path(str(config.get("forgetting", ""))).name
    before = next(run.forgetting.before for run in results.records.finished.values() if run.forgetting is not None)
    measured = [c for c in results.points if c.forgetting is not None]
    rises = sorted(c.forgetting or 0.0 for c in measured)
    own = "was not measured" if best.forgetting is None else f"{best.forgetting:+.3f}"
    error = best.best.forgetting.stderr if best.best.forgetting is not None else None
    own += f" ± {error:.3f} over rows of the text" if error else ""
    said = (
        f"Forgetting: the base's loss on general text ({text}) is {before:.3f} nats a token; the most accurate point's "
        f"rise is {own}, and over {len(measured)} points rises go from {rises[0]:+.3f} to {rises[-1]:+.3f}."
    )
    if results.records.points.of_three:
        said = f"{said} {_third(results)}"
    if not (limit := results.records.points.max_forgetting):
        return [said]
    above = sum(not results.records.points.allows(c.forgetting) for c in measured)
    unknown = sum(c.forgetting is None and c.accuracy is not None for c in results.points)
    unmeasured = f", and so {'is' if unknown == 1 else 'are'} {unknown} of which it is not known" if unknown else ""
    return [
        f"{said} {above} of them are above max_forgetting={limit:g} and not on the front, however accurate"
        f"{unmeasured}. Halving does not know the limit: what a training forgets is known at its end."
    ]


def _third(results: Results) -> str:
    """What forgetting as an objective puts on the front."""
    least = min(results.front, key=lambda candidate: candidate.forgetting or 0.0)
    spares = len(results.front) - len(results.rising)
    unknown = sum(c.forgetting is None and c.accuracy is not None for c in results.points)
    missing = f"; {unknown} of which it is not known {'is' if unknown == 1 else 'are'} not on it" if unknown else ""
    there = "is there because it forgets" if spares == 1 else "are there because they forget"
    size, accuracy = human(least.trainable_params), results.accuracy_words(least)
    return (
        f"It is the third objective: {spares} of the {len(results.front)} points of the front {there} less (diamonds "
        f"in pictures){missing}. Least forgets {results.label(least.best)} ({size} trainable parameters, {accuracy}, "
        f"{least.forgetting or 0.0:+.3f} nats a token). Knee, halving and the step go by accuracy and parameters alone."
    )


def _on(split: Split) -> str:
    """` on the test split`; nothing where a study has one number."""
    return "" if split == "accuracy" else f" on the {split} split"


def _budgets(results: Results) -> list[int]:
    """The study's own limit, or up to three round numbers inside the front."""
    if limit := results.records.header["config"].get("max_trainable_params"):
        return [int(limit)]
    low, high = results.front[0].trainable_params, results.front[-1].trainable_params
    decades = range(len(str(low)) - 1, len(str(high)))
    inside = [step * 10**decade for decade in decades for step in (1, 2, 5) if low < step * 10**decade < high]
    return inside[:: max(math.ceil(len(inside) / 3), 1)]


def _honesty(results: Results) -> list[str]:
    """Seeds, noise and selection: how far the front can be believed."""
    said = [_seeds(results), *_selection(results.bias, what=results.splits[0])]
    shown = [c for c in results.rising if c.point in results.tested]
    shown = shown if len(shown) > 1 else results.rising
    steps = [results.difference(lower, higher) for lower, higher in pairwise(shown)]
    if steps and all(step.stderr is None for step in steps):
        said.append("The standard error of the evaluation is not known: small differences may be chance.")
    elif steps:
        said.append(_rise(results, shown, steps))
    return [*said, *_cut(results), *_both_splits(results), *_picked(results)]


def _cut(results: Results) -> list[str]:
    """Which points of the front are no trainings."""
    cut = [candidate for candidate in results.front if candidate.parent]
    if not cut:
        return []
    one = len(cut) == 1
    origins = ", ".join(dict.fromkeys(f"{candidate.parent[:8]}" for candidate in cut))
    return [
        f"{len(cut)} of the {len(results.front)} points of the front {'is' if one else 'are'} no training but cut from "
        f"one ({origins}): {'it shares' if one else 'they share'} its seed and its luck, and "
        f"{'counts' if one else 'count'} neither as a seed nor in what is said of settings."
    ]


def _both_splits(results: Results) -> list[str]:
    """What the test split says of what the validation split selected: the measured optimism."""
    if results.splits[0] == "accuracy":
        return []
    table = is_table(results.records)
    chosen = results.points if table else results.front
    measured = optimism(chosen)
    if measured is None:
        return [
            f"No {'row' if table else 'point of the front'} has been evaluated on the test split: the same command "
            "does it at its end, from the adapters that are kept."
        ]
    if table:
        return [_of_rows(measured)]
    said = [_of_front(results, measured)]
    if left := len(chosen) - measured.points:
        said.append(
            f"{left} of {len(chosen)} points of the front {'has' if left == 1 else 'have'} no test accuracy: the same "
            "command evaluates those whose adapters are kept."
        )
    return said


def _known(error: float) -> str:
    return f"{error:.3f}" if error else "an unknown error"


def _of_rows(measured: Optimism) -> str:
    """In a table: nothing was selected, so that the difference is that of the splits."""
    rows = "row has" if measured.points == 1 else f"{measured.points} rows have"
    over = "the questions" if measured.points == 1 else "rows"
    return (
        f"Nothing was selected: on the test split the {rows} {measured.test:.3f} on average and on validation "
        f"{measured.validation:.3f}, a difference of {measured.value:+.3f} ± {_known(measured.stderr)} (standard error "
        f"over {over}). Rows are compared by test accuracy."
    )


def _of_front(results: Results, measured: Optimism) -> str:
    n, total = measured.points, len(results.front)
    of = f" of {total}" if n < total else ""
    if n == 1:
        who = f"{'one' if of else 'the one'} point{of} of the front has {measured.test:.3f}"
        error = "standard error of the questions of both splits; of one point it may be chance"
    else:
        who = f"{'' if of else 'the '}{n}{of} points of the front have {measured.test:.3f} on average"
        error = "standard error over points, which all answer the same questions"
    on_step = {candidate.point for candidate in results.step}
    beaten = sum(c.point in results.tested and c.point not in on_step for c in results.rising)
    fallen = f"; {beaten} of them {'is' if beaten == 1 else 'are'} beaten there by another of them" if beaten else ""
    base = results.records.untrained
    apart = (
        f"; the untrained base, which was not selected, has {_apart(base):+.3f}" if base and base.get("test") else ""
    )
    return (
        f"On the test split, which nothing was selected on, {who} where validation said {measured.validation:.3f}: "
        f"optimism {measured.value:.3f} ± {_known(measured.stderr)} ({error}{apart}){fallen}."
    )


def _apart(base: Mapping[str, Any]) -> float:
    """Validation less test accuracy of the base."""
    return float(base["accuracy"] - base["test"]["accuracy"])


def _picked(results: Results) -> list[str]:
    """A front that is shown by what it was picked by is flattered."""
    rivals = sum(1 for candidate in results.points if candidate.accuracy is not None)
    if rivals < 2 or is_table(results.records):
        return []
    if selects_on_test(results.records):
        where = "on the questions it is measured on, those of the test split, as the papers do"
    elif results.optimism is None:
        where = "on the questions it is measured on"
    else:
        return []
    return [f"The front was picked from {rivals} points {where}: expect its accuracies to be a little too high."]


def _seeds(results: Results) -> str:
    """How many seeds stand behind the front, and how much accuracy moves between them."""
    counts = sorted({len(candidate.complete) for candidate in results.front if not candidate.parent}) or [1]
    if counts == [1]:
        said = "One seed stands behind each point: how much accuracy moves with the seed was not measured."
    else:
        span = " to ".join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))
        said = f"{span} seeds stand behind each point of the front."
    if results.noise is None:
        return said
    return (
        f"{said[:-1]}; between seeds of one point accuracy has a standard deviation of "
        f"{math.sqrt(results.noise.variance):.3f}, estimated with {results.noise.freedom} degrees of freedom."
    )


def _rise(results: Results, shown: Sequence[Candidate], steps: Sequence[Difference]) -> str:
    """How much the front rises, as a whole and from point to point, beside the noise; `shown` of it is compared."""
    whole, where = results.difference(shown[0], shown[-1]), _on(results.split_of(*shown))
    if whole.inside_noise:
        return (
            f"The whole front rises{where} by {whole.rise:.3f}, within two standard errors of a difference "
            f"({TOO_CLOSE * (whole.stderr or 0.0):.3f}): these accuracies cannot be told apart, do not read an "
            "order into them."
        )
    small = sum(step.inside_noise for step in steps)
    largest = max(step.stderr for step in steps if step.stderr is not None)
    return (
        f"From one point of the front to the next{where}, {small} of {len(steps)} differences are within two standard "
        f"errors (about {TOO_CLOSE * largest:.3f}) and may be chance; the whole front rises by {whole.rise:.3f}."
    )


def _selection(bias: Bias | None, *, what: Split) -> list[str]:
    """The winner's curse, where fresh seeds measured it."""
    if bias is None:
        return []
    drop, error = bias.picked - bias.mean, "" if bias.stderr is None else f", standard error {bias.stderr:.3f}"
    runs = f"{bias.fresh} fresh training{'' if bias.fresh == 1 else 's'} of {bias.points} picked point"
    sizes = f"{bias.picked:.3f} at the seed they were picked at, {bias.mean:.3f} on average over {runs}"
    many = "" if bias.points == 1 else "s"
    verdict = (
        f"picking flattered them by {drop:.3f}{error}, so the front goes by the means"
        if drop > 0
        else f"picking did not flatter them (difference {drop:+.3f}{error})"
    )
    accuracy = "accuracy" if what == "accuracy" else f"{what} accuracy"
    return [f"Winner's curse: {accuracy} {sizes}{many}; {verdict}."]


def _early(results: Results) -> list[str]:
    """A warning where early accuracy does not rank as the end does: what stops trials early would stop good ones."""
    at_third = (at for at in results.early if (at.signal, at.part) == ("accuracy", "third"))
    return [
        f"Warning: accuracy at a third of the training ranks the points unlike the end does (rank correlation "
        f"{at.correlation:.2f}, n = {at.n}, below {FAITHFUL}): stopping trials by it would stop good ones."
        for at in at_third
        if at.correlation is not None and at.correlation < FAITHFUL
    ]


def _against_baselines(results: Results) -> list[str]:
    """Every baseline point against the best other allocator at equal parameters and with the same recipe.

    Of many that are inside the noise only their number is told.
    """
    said: list[tuple[float, str]] = []
    inside: list[str] = []
    measured = [candidate for candidate in results.trained if candidate.accuracy is not None]
    rivals = _Rivals(measured)
    for baseline in sorted(measured, key=lambda candidate: candidate.trainable_params):
        best = rivals.of(baseline) if baseline.best.trial.allocator in CONTROLS else None
        if best is not None:
            difference = results.difference(baseline, best)
            sentence = _comparison(results, baseline, best, difference)
            if difference.inside_noise:
                inside.append(sentence)
            else:
                said.append((abs(difference.rise), sentence))
    least = sorted((rise for rise, _ in said), reverse=True)[:MOST_TOLD][-1:]
    told = [sentence for rise, sentence in said if rise >= least[0]][:MOST_TOLD]
    if left := len(said) - len(told):
        told.append(f"{left} more such comparisons, with smaller differences, are more than noise, too.")
    if len(inside) <= MANY:
        return told + inside
    return [
        *told,
        f"In {len(inside)}{' more' if said else ''} comparisons of {' or '.join(SAID)} with the best other "
        f"rule at equal parameters and recipe the difference is inside the noise.",
    ]


class _Rivals:
    """Points that are no baseline, by recipe and parameters: of each the first that is the most accurate."""

    def __init__(self, measured: Sequence[Candidate]) -> None:
        self._best: dict[Recipe, dict[int, tuple[float, int, Candidate]]] = {}
        for place, candidate in enumerate(measured):
            if candidate.best.trial.allocator not in CONTROLS:
                sizes = self._best.setdefault(candidate.best.trial.recipe, {})
                here = (candidate.accuracy or 0.0, -place, candidate)
                sizes[candidate.trainable_params] = max(sizes.get(candidate.trainable_params, here), here)
        self._sizes = {recipe: sorted(sizes) for recipe, sizes in self._best.items()}

    def of(self, baseline: Candidate) -> Candidate | None:
        """The most accurate with the baseline's recipe and parameters; None where there is none."""
        recipe, size = baseline.best.trial.recipe, baseline.trainable_params
        sizes, reach = self._sizes.get(recipe, []), EQUAL * size
        near = itertools.takewhile(
            lambda other: other - size <= reach, sizes[bisect.bisect_left(sizes, math.ceil(size - reach)) :]
        )
        return max((self._best[recipe][other] for other in near), default=(0.0, 0, None))[2]


def _comparison(results: Results, baseline: Candidate, best: Candidate, difference: Difference) -> str:
    verdict = difference.reading
    if difference.stderr is not None:
        verdict = f"standard error {difference.stderr:.3f}: {verdict}"
    same = ", ".join(recipe_words(best.best, results.settings))
    split = results.split_of(baseline, best)
    ours, theirs = (results.judged(c).accuracy if split == "test" else c.accuracy for c in (best, baseline))
    return (
        f"At {human(baseline.trainable_params)} parameters{f' ({same})' if same else ''} {point(best.best)} has "
        f"{ours:.3f} and {baseline.best.trial.allocator} {theirs:.3f}{_on(split)} (difference "
        f"{difference.rise:+.3f}, {verdict})."
    )


def _state(results: Results) -> list[str]:
    """How much is done, what was not trained and why, what is damaged."""
    records = results.records
    said = [*_done(results), *_stopped(results)]
    for study, count in Counter(records.reused.values()).items():
        what = "training, which was" if count == 1 else "trainings, which were"
        said.append(f"Reused from {study}: {count} {what} not run again.")
    if flying := len(records.in_flight):
        what, them = ("run is", "it") if flying == 1 else ("runs are", "them")
        said.append(f"{flying} {what} in flight, or cut off with the driver: the same command takes {them} up again.")
    if records.answered:
        reasons = Counter(answer.reason.replace("_", " ") for answer in records.answered)
        kinds = ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items()))
        said.append(f"{len(records.answered)} more points were answered without training: {kinds}.")
    return [*said, *records.problems]


def _done(results: Results) -> list[str]:
    """Runs that are finished, of how many, and how they ended."""
    records, config = results.records, results.records.header["config"]
    finished = list(records.trained.values())
    if not finished:
        return []
    asked = config.get("trials")
    if asked and is_table(records):  # there a row that is known is done; in a search `trials` are trained
        asked -= sum(records.finished[digest].trial.seed == records.seed for digest in records.reused)
    statuses = Counter(outcome.status.replace("_", " ") for outcome in finished)
    kinds = ", ".join(f"{n} {status}" for status, n in sorted(statuses.items()))
    # a study of an earlier version has no repeats, whatever its runs' seeds; with seeds=auto they are among the trials
    apart = config.get("seeds", AUTO) != AUTO
    repeats = sum(outcome.trial.seed != records.seed for outcome in finished) if apart else 0
    own = f"{len(finished) - repeats}{f' of {asked}' if asked else ''} runs are finished"
    return [f"{own}{f', and {repeats} repeats with other seeds' if repeats else ''}: {kinds}."]


def _stopped(results: Results) -> list[str]:
    """What stopping early saved."""
    saved, whole = results.tokens_saved
    if not saved:
        return []
    stopped = sum(outcome.status == "stopped" for outcome in results.records.trained.values())
    return [
        f"Stopped early at an evaluation: {stopped} {'training' if stopped == 1 else 'trainings'}, which left "
        f"{human(saved)} of {human(whole)} tokens ({saved / whole:.0%}) untrained; none of them is on the front."
    ]


# --- lines to type


def how_to_load(results: Results) -> list[str]:
    """How to load and to export the most accurate point; nothing where its adapter is not kept."""
    loadable = results.loadable(results.rising[-1]) if results.front else None
    if loadable is None:
        return []
    run, where = loadable
    code = load_code(run.trial.model, where, settings=results.records.header["config"])
    what = "point=knee or an id of the table; format=adapter, merged (a plain transformers model), peft, vllm, … (help)"
    return [
        f"\nTo load the most accurate one:\n{code}",
        f"\nTo take it elsewhere, with a model card:\n{export_command(results.records.folder)}\n{what}",
    ]


def load_code(model: str, adapter: str, *, settings: Mapping[str, object]) -> str:
    """The lines of Python that put a trained adapter on its model, loaded with the study's `settings`."""
    return (
        f"from trainers import adapter, models\n"
        f"model = {base_code(model, settings)}\n"
        f"adapter.load(model, {json.dumps(adapter)})"
    )


def base_code(model: str, settings: Mapping[str, object]) -> str:
    """Python that loads the base as a study with these settings did."""
    arguments = "".join(f", {key}={value!r}" for key, value in load_arguments(settings).items())
    return f"models.load({json.dumps(model)}{arguments}).model"


def export_command(folder: Path, run: Outcome | None = None) -> str:
    """What takes a run, or the most accurate one, out of a study."""
    point = f" point={run_id(run)}" if run else ""
    return f"python -m search.export {shlex.quote(str(folder))}{point} to=winner"
