"""What a study found, from its records alone: words, tables, one HTML page. No Ray, no torch, no model, no network.

    python -m search.report studies/demo        # at any time, while the study runs too

Writes front.csv (the front), points.csv (every run), front.png and report.html (one file, works offline, template in
`page.html`), and prints the front. What is said in words is said carefully: a difference counts only above two
standard errors, and how many seeds stand behind a point is always named. Further tables: `tables.py`.
"""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
import shlex
import statistics
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from allocators.core import words
from allocators.core.errors import ToolkitError
from allocators.core.types import ExpertCounts, ExpertSelection, Outcome, Recipe, best_under
from search.config import load_arguments
from search.front import Candidate, candidates, front, human, knee
from search.records import Records, flattened, read, write_atomically
from search.report import attribution
from search.report.live import accuracy_text, front_table, label, number, point, probability, recipe_words, varying
from search.report.tables import Section, is_table, sections
from search.report.uncertainty import (
    TOO_CLOSE,
    Bias,
    Difference,
    Noise,
    compare,
    pooled,
    rank_correlation,
    selection_bias,
)

BASELINES = ("random", "uniform")  # what an allocation has to beat at equal parameters
GREYS = {"none": "#b8b8b8", "all": "#555555", "random": "#888888", "uniform": "#9a8f80"}
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7f5fbf",
    "#a0522d",
)  # Okabe & Ito and two
FILES = ("front.csv", "points.csv", "front.png", "report.html")
MANY = 5  # comparisons inside the noise that are told one by one
EQUAL = 0.02  # share by which "equal parameters" may differ
SHORT = 8  # digits of a run's digest that are shown
FAITHFUL = 0.8  # rank correlation between first rung and end below which early results mislead


@dataclass(frozen=True)
class Report:
    """What the records come to. `points` has one entry a point (all its seeds), `front` those nothing beats."""

    records: Records

    @cached_property
    def points(self) -> list[Candidate]:
        return candidates(self.records.finished.values())

    @cached_property
    def front(self) -> list[Candidate]:
        return front(self.points)

    @cached_property
    def winners(self) -> set[str]:
        """Digests of all runs behind the front."""
        return {run.digest for candidate in self.front for run in candidate.runs}

    @cached_property
    def knee(self) -> Candidate | None:
        return knee(self.points)

    @cached_property
    def tasks(self) -> list[str]:
        """Labels of the tasks, where there are several."""
        return list(dict.fromkeys(label for run in self.records.finished.values() for label in run.by_task))

    @cached_property
    def tokens_saved(self) -> tuple[int, int]:
        """Left untrained by stopping early, and what all trainings would have taken (`attribution.tokens_cut`)."""
        return attribution.tokens_cut(self.records)

    @cached_property
    def sections(self) -> list[Section]:
        """Tables beyond the front."""
        return [
            *sections(self.records, self.points),
            *attribution.attributed(self.importance),
            *attribution.recipes(self.records, self.points, self.front, noise=self.noise),
            *attribution.saved(self.records),
        ]

    @cached_property
    def importance(self) -> attribution.Importance | None:
        """Which settings accuracy goes with."""
        return attribution.importance(self.points)

    @property
    def seed(self) -> int:
        """The study's own seed; a run with another one repeats a point."""
        return self.records.header["config"].get("seed", 0)

    @cached_property
    def noise(self) -> Noise | None:
        """How much accuracy moves between the seeds of one point, over all points that have several."""
        return pooled(self.points)

    @cached_property
    def chances(self) -> dict[str, float]:
        """By digest of a front point's best run: the probability that it is better than the next smaller point."""
        found = {high.best.digest: self.difference(low, high).chance for low, high in pairwise(self.front)}
        return {digest: chance for digest, chance in found.items() if chance is not None}

    @cached_property
    def bias(self) -> Bias | None:
        """What was picked at one seed against fresh seeds of the same points; None in a table, where nothing is."""
        return None if is_table(self.records) else selection_bias(self.points, seed=self.seed)

    @cached_property
    def early_ranks(self) -> tuple[float | None, int]:
        """Spearman's rank correlation of accuracy at the first rung and at the end, and over how many points."""
        runs = [run for c in self.points for run in c.complete[:1] if len(run.rungs) > 1]
        pairs = [(float(run.rungs[0]["accuracy"]), run.accuracy or 0.0) for run in runs]
        return rank_correlation(pairs), len(pairs)

    def difference(self, lower: Candidate, higher: Candidate) -> Difference:
        return compare(lower, higher, noise=self.noise)

    @cached_property
    def words(self) -> list[str]:
        """The study in sentences, the most important first."""
        return _words(self)

    @property
    def metrics(self) -> dict[str, float]:
        """Numbers of the whole study, for the parent run in MLflow."""
        found: dict[str, float] = {"runs_finished": len(self.records.finished), "points_on_front": len(self.front)}
        found |= {f"answered_{reason}": n for reason, n in Counter(a.reason for a in self.records.answered).items()}
        if seconds := self.records.sampler_seconds:
            found["sampler_seconds_per_suggestion"] = statistics.fmean(seconds)
        for name, candidate in (("best", self.front[-1] if self.front else None), ("knee", self.knee)):
            if candidate is not None and candidate.accuracy is not None:
                found[f"{name}_accuracy"] = candidate.accuracy
                found[f"{name}_trainable_params"] = candidate.trainable_params
        if self.records.untrained is not None:
            found["untrained_accuracy"] = self.records.untrained["accuracy"]
        if (correlation := self.early_ranks[0]) is not None:
            found["rank_correlation_first_rung"] = correlation
        if self.records.reused:
            found["runs_reused"] = len(self.records.reused)
        if self.tokens_saved[0]:
            found["tokens_saved"], found["tokens_without_stopping"] = self.tokens_saved
        if self.noise is not None:
            found["seed_standard_deviation"] = math.sqrt(self.noise.variance)
        if self.bias is not None:
            found["selection_bias"] = self.bias.picked - self.bias.mean
        return found

    @property
    def files(self) -> list[Path]:
        return [self.records.folder / name for name in FILES]

    @cached_property
    def settings(self) -> list[str]:
        """Recipe settings that vary within the study."""
        return varying(self.records.finished.values())

    def label(self, run: Outcome) -> str:
        """`sieve fraction=0.25, rank 8`: allocator, knobs, and the settings that vary."""
        return label(run, self.settings)

    def loadable(self, candidate: Candidate) -> tuple[Outcome, str] | None:
        """The most accurate run of a point whose adapter is still there, and where."""
        found = ((run, self.adapter_folder(run)) for run in candidate.by_accuracy)
        return next(((run, where) for run, where in found if where), None)

    @cached_property
    def ids(self) -> dict[str, str]:
        """By digest of a front point's best run: the run to export, by as much of its digest as is shown."""
        found = {c.best.digest: self.loadable(c) for c in self.front}
        return {digest: (run[0].digest if run else digest)[:SHORT] for digest, run in found.items()}

    def message(self, run: Outcome) -> str:
        """What a run has to say of itself, and where it was trained if that was not here."""
        study = self.records.reused.get(run.digest)
        return "; ".join(text for text in (f"reused from {study}" if study else "", run.message) if text)

    def adapter_folder(self, outcome: Outcome) -> str | None:
        """Where the trained adapter lies, None where it is not kept."""
        return self.records.adapter_of(outcome)


def write(folder: str | Path) -> Report:
    """Writes the four files into the study's folder.

    Raises StudyError where there is no study in the folder, OSError where it cannot be written.
    """
    report = Report(read(folder))
    everything = [run for candidate in report.points for run in candidate.runs]
    pages: tuple[str | bytes, ...] = (
        _csv(_front_row(report, candidate) for candidate in report.front),
        _csv(_run_row(report, run) for run in everything),
        _png(report),
        _page(report),
    )
    for file, content in zip(report.files, pages, strict=True):
        write_atomically(file, content)
    return report


def show(study: Report | str | Path, *, console: Console | None = None) -> None:
    """Prints the front, what it means, how to load the best adapter and where the files are.

    study   its folder, or what `write` returned
    """
    console = console or Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    report = study if isinstance(study, Report) else Report(read(study))
    records_folder = report.records.folder
    if report.front:
        console.print(
            front_table(
                report.front,
                report.records.finished.values(),
                title=f"{_title(report)}: Pareto front",
                chances=report.chances,
                ids=report.ids,
            )
        )
    for sentence in report.words:
        console.print(Text(sentence), soft_wrap=True)
    for section in report.sections:
        console.print()
        console.print(_terminal_table(section))
        for note in section.notes:
            console.print(Text(note), soft_wrap=True)
    for candidate in report.front[-1:]:
        if found := report.loadable(candidate):
            run, where = found
            code = load_code(run.trial.model, where, settings=report.records.header["config"])
            console.print(Text(f"\nTo load the most accurate one:\n{code}"))
            command = export_command(records_folder)
            what = "point=knee or an id of the table; format=adapter, merged (a plain transformers model) or peft"
            console.print(Text(f"\nTo take it elsewhere, with a model card:\n{command}\n{what}"), soft_wrap=True)
    console.print(Text(f"\nReport: {records_folder / 'report.html'}"), soft_wrap=True)


def _terminal_table(section: Section) -> Table:
    table = Table(title=Text(section.title), title_justify="left")
    for i, head in enumerate(section.head):
        numbers = all(re.match(r"[+−<.\d-]|$|TOST", row[i]) for row in section.rows)
        table.add_column(head, justify="right" if i and numbers else "left")
    for row in section.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def load_code(model: str, adapter: str, *, settings: Mapping[str, Any]) -> str:
    """The lines of Python that put a trained adapter on its model, loaded with the study's `settings`."""
    arguments = "".join(f", {key}={value!r}" for key, value in load_arguments(settings).items())
    return (
        f"from trainers import adapter, models\n"
        f"model = models.load({json.dumps(model)}{arguments}).model\n"
        f"adapter.load(model, {json.dumps(adapter)})"
    )


def export_command(folder: Path, run: Outcome | None = None) -> str:
    """What takes a run, or the most accurate one, out of a study."""
    point = f" point={run.digest[:SHORT]}" if run else ""
    return f"python -m search.export {shlex.quote(str(folder))}{point} to=winner"


# --- words


def _words(report: Report) -> list[str]:
    on_front = report.front
    if not on_front:
        return ["No finished trial yet: there is no front to show.", *_state(report)]

    def name(candidate: Candidate) -> str:
        size = human(candidate.trainable_params)
        return f"{report.label(candidate.best)} ({size} trainable parameters, accuracy {accuracy_text(candidate)})"

    sentences = [f"Most accurate: {name(on_front[-1])}."]
    by_digest = {c.best.digest: c for c in report.points}
    means = [c.best.updated(accuracy=c.accuracy) for c in report.points]
    fitting = {best.digest: budget for budget in _budgets(report) if (best := best_under(means, budget))}
    for digest, budget in fitting.items():  # the widest budget that a point wins
        sentences.append(f"Best under {human(budget).replace('.00', '')} parameters: {name(by_digest[digest])}.")
    if report.knee is not None:
        sentences.append(f"The knee, after which parameters buy less: {name(report.knee)}.")
    elif len(on_front) > 2:
        sentences.append("The front has no knee: nowhere does it rise above the straight line between its ends.")
    told = attribution.in_words(report.importance, report.points)
    return [
        *sentences,
        *_gained(report),
        *_honesty(report),
        *_against_baselines(report),
        *told,
        *_early(report),
        *_state(report),
    ]


def _gained(report: Report) -> list[str]:
    """What the most accurate point has over the base."""
    base, best = report.records.untrained, report.front[-1]
    if base is None or best.accuracy is None:
        return []
    error = math.hypot(best.stderr or 0.0, base["stderr"])
    gain = Difference(best.accuracy - base["accuracy"], error, None)
    return [
        f"Untrained, the base has {base['accuracy']:.3f} ± {base['stderr']:.3f}: training is worth {gain.rise:+.3f} at "
        f"the most accurate point (standard error {error:.3f}: {gain.reading})."
    ]


def _budgets(report: Report) -> list[int]:
    """The study's own limit, or up to three round numbers inside the front."""
    if limit := report.records.header["config"].get("max_trainable_params"):
        return [int(limit)]
    low, high = report.front[0].trainable_params, report.front[-1].trainable_params
    decades = range(len(str(low)) - 1, len(str(high)))
    inside = [step * 10**decade for decade in decades for step in (1, 2, 5) if low < step * 10**decade < high]
    return inside[:: max(math.ceil(len(inside) / 3), 1)]


def _honesty(report: Report) -> list[str]:
    """Seeds, noise and selection: how far the front can be believed."""
    on_front = report.front
    seeds = sorted({len(candidate.complete) for candidate in on_front})
    if seeds == [1]:
        said = ["One seed stands behind each point: how much accuracy moves with the seed was not measured."]
    else:
        said = [
            f"{' to '.join(str(n) for n in {seeds[0]: 0, seeds[-1]: 0})} seeds stand behind each point of the front."
        ]
    if report.noise is not None:
        said[0] = (
            f"{said[0][:-1]}; between seeds of one point accuracy has a standard deviation of "
            f"{math.sqrt(report.noise.variance):.3f}, estimated with {report.noise.freedom} degrees of freedom."
        )
    said += _selection(report.bias)
    steps = [report.difference(lower, higher) for lower, higher in pairwise(on_front)]
    errors = [step.stderr for step in steps if step.stderr is not None]
    if steps and not errors:
        return [*said, "The standard error of the evaluation was not recorded: small differences may be chance."]
    if errors:
        whole = report.difference(on_front[0], on_front[-1])
        if whole.inside_noise:
            said.append(
                f"The whole front rises by {whole.rise:.3f}, within two standard errors of a difference "
                f"({TOO_CLOSE * (whole.stderr or 0.0):.3f}): these accuracies cannot be told apart, do not read an "
                "order into them."
            )
        else:
            small = sum(step.inside_noise for step in steps)
            said.append(
                f"From one point of the front to the next, {small} of {len(steps)} differences are within two standard "
                f"errors (about {TOO_CLOSE * max(errors):.3f}) and may be chance; the whole front rises by "
                f"{whole.rise:.3f}."
            )
    rivals = sum(1 for candidate in report.points if candidate.accuracy is not None)
    if rivals > 1 and not is_table(report.records):
        said.append(
            f"The front was picked from {rivals} points on the questions it is measured on: expect its accuracies to "
            f"be a little too high."
        )
    return said


def _selection(bias: Bias | None) -> list[str]:
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
    return [f"Winner's curse: accuracy {sizes}{many}; {verdict}."]


def _early(report: Report) -> list[str]:
    """A warning where early accuracy does not rank as the end does: what stops trials early would stop good ones."""
    correlation, n = report.early_ranks
    if correlation is None or correlation >= FAITHFUL:
        return []
    return [
        f"Warning: accuracy at the first evaluation ranks the points unlike the end does (rank correlation "
        f"{correlation:.2f}, n = {n}, below {FAITHFUL}): stopping trials by it would stop good ones."
    ]


def _against_baselines(report: Report) -> list[str]:
    """Every baseline point against the best other allocator at equal parameters and with the same recipe.

    Of many that are inside the noise only their number is told.
    """
    said: list[str] = []
    inside: list[str] = []
    measured = [candidate for candidate in report.points if candidate.accuracy is not None]
    for baseline in sorted(measured, key=lambda candidate: candidate.trainable_params):
        kind = baseline.best.trial.allocator
        rivals = [
            c
            for c in measured
            if c.best.trial.allocator not in BASELINES
            and c.best.trial.recipe == baseline.best.trial.recipe
            and abs(c.trainable_params - baseline.trainable_params) <= EQUAL * baseline.trainable_params
        ]
        if kind not in BASELINES or not rivals:
            continue
        best = max(rivals, key=lambda c: c.accuracy or 0.0)
        difference = report.difference(baseline, best)
        verdict = difference.reading
        if difference.stderr is not None:
            verdict = f"standard error {difference.stderr:.3f}: {verdict}"
        same = ", ".join(recipe_words(best.best, report.settings))
        (inside if difference.inside_noise else said).append(
            f"At {human(baseline.trainable_params)} parameters{f' ({same})' if same else ''} {point(best.best)} has "
            f"{best.accuracy:.3f} and {kind} {baseline.accuracy:.3f} (difference {difference.rise:+.3f}, {verdict})."
        )
    if len(inside) <= MANY:
        return said + inside
    return [
        *said,
        f"In {len(inside)}{' more' if said else ''} comparisons of {' or '.join(BASELINES)} with the best other "
        f"rule at equal parameters and recipe the difference is inside the noise.",
    ]


def _state(report: Report) -> list[str]:
    """How much is done, what was not trained and why, what is damaged."""
    records = report.records
    config = records.header["config"]
    finished = list(records.trained.values())
    asked = config.get("trials")
    if asked and is_table(records):  # there a row that is known is done; in a search `trials` are trained
        asked -= sum(records.finished[digest].trial.seed == report.seed for digest in records.reused)
    statuses = Counter(outcome.status.replace("_", " ") for outcome in finished)
    said = []
    if statuses:
        kinds = ", ".join(f"{n} {status}" for status, n in sorted(statuses.items()))
        # a study of an earlier version has no repeats, whatever its runs' seeds
        repeats = sum(outcome.trial.seed != report.seed for outcome in finished) if "seeds" in config else 0
        own = f"{len(finished) - repeats}{f' of {asked}' if asked else ''} runs are finished"
        said.append(f"{own}{f', and {repeats} repeats with other seeds' if repeats else ''}: {kinds}.")
    saved, whole = report.tokens_saved
    if saved:
        stopped = statuses["stopped"]
        said.append(
            f"Stopped early at an evaluation: {stopped} {'training' if stopped == 1 else 'trainings'}, which left "
            f"{human(saved)} of {human(whole)} tokens ({saved / whole:.0%}) untrained; none of them is on the front."
        )
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


def _title(report: Report) -> str:
    config = report.records.header["config"]
    # tasks and model may be files or folders: their names are enough here, the settings have all of it
    facts = [
        f"{what} {', '.join(Path(word).name.removesuffix('.yaml') for word in config[what].split(','))}"
        for what in ("task", "model")
        if config.get(what)
    ]
    return ", ".join([report.records.name, *facts])


# --- tables


def _front_row(report: Report, candidate: Candidate) -> dict[str, Any]:
    best = candidate.best
    return {
        "digest": best.digest,
        **_who(best),
        "trainable_params": candidate.trainable_params,
        "accuracy": candidate.accuracy,
        "stderr": candidate.stderr,
        **_columns(report, candidate.by_task),
        "seeds": len(candidate.complete),
        "seed_standard_deviation": candidate.spread,
        "better_than_next_smaller": report.chances.get(best.digest),
        "knee": candidate is report.knee,
        "seconds": best.seconds,
        "tokens": best.tokens,
        "adapter": found[1] if (found := report.loadable(candidate)) else "",
        **_recipe(best),
    }


def _run_row(report: Report, run: Outcome) -> dict[str, Any]:
    return {
        "digest": run.digest,
        **_who(run),
        "trainable_params": run.trainable_params,
        "status": run.status,
        "accuracy": run.accuracy,
        **_columns(report, {label: (one["accuracy"], one["stderr"]) for label, one in run.by_task.items()}),
        "on_front": run.digest in report.winners,
        "seed": run.trial.seed,
        "seconds": run.seconds,
        "tokens": run.tokens,
        "peak_memory_bytes": run.peak_memory_bytes,
        "message": run.message,
        "reused_from": report.records.reused.get(run.digest, ""),
        "adapter": report.adapter_folder(run) or "",
        **_recipe(run),
    }


def _columns(report: Report, by_task: Mapping[str, tuple[float, float]]) -> dict[str, float | None]:
    """`accuracy.TASK` and `stderr.TASK` of every task of the study; the same columns in every row."""
    found: dict[str, float | None] = {}
    for task in report.tasks:
        accuracy, stderr = by_task.get(task, (None, None))
        found |= {f"accuracy.{task}": accuracy, f"stderr.{task}": stderr}
    return found


def _who(run: Outcome) -> dict[str, Any]:
    knobs = json.dumps(dict(run.trial.knobs), sort_keys=True)
    return {"allocator": run.trial.allocator, "knobs": knobs, "experts": run.trial.allocation.total_experts}


def _recipe(run: Outcome) -> dict[str, Any]:
    return {f"recipe.{f.name}": getattr(run.trial.recipe, f.name) for f in fields(Recipe)}


def _csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """One line a row under a header; an empty study has an empty table."""
    rows, text = list(rows), io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


# --- pictures


def colours(allocators: Iterable[str]) -> dict[str, str]:
    """One colour an allocator, the same in the picture and on the page; baselines are grey."""
    coloured = [name for name in dict.fromkeys(allocators) if name not in GREYS]
    return GREYS | {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(coloured)}


def _png(report: Report) -> bytes:
    """Accuracy against trainable parameters (log scale), the front drawn as a step and its points named."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(xscale="log", xlabel="trainable parameters", ylabel="accuracy")
    axes.set_title(_title(report), fontsize=10)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: human(x).replace(".00", "")))
    axes.xaxis.set_minor_formatter(NullFormatter())
    measured = [(c, c.accuracy) for c in report.points if c.accuracy is not None]
    palette = colours(c.best.trial.allocator for c in report.points)
    if measured:
        sizes = [_x(c) for c, _ in measured]
        axes.set_xlim(min(sizes) / 1.4, max(sizes) * 1.4)
    for name in dict.fromkeys(c.best.trial.allocator for c, _ in measured):
        mine = [(c, accuracy) for c, accuracy in measured if c.best.trial.allocator == name]
        axes.scatter(
            [_x(c) for c, _ in mine],
            [accuracy for _, accuracy in mine],
            s=[46 if c.best.digest in report.winners else 24 for c, _ in mine],
            color=palette[name],
            edgecolors=["black" if c.best.digest in report.winners else "none" for c, _ in mine],
            linewidths=0.8,
            zorder=3,
            label=name or "unnamed",
        )
    if report.front:
        xs, ys = [_x(c) for c in report.front], [c.accuracy or 0.0 for c in report.front]
        axes.step([*xs, max(_x(c) for c, _ in measured)], [*ys, ys[-1]], where="post", color="0.35", lw=1)
        errors = [c.stderr or 0.0 for c in report.front]
        axes.errorbar(xs, ys, yerr=errors, fmt="none", ecolor="0.6", elinewidth=0.8, zorder=2)
        edge, ends = [*xs, max(_x(c) for c, _ in measured)], list(zip(ys, errors, strict=True))
        low, high = [y - e for y, e in ends], [y + e for y, e in ends]
        axes.fill_between(
            edge, [*low, low[-1]], [*high, high[-1]], step="post", color="0.5", alpha=0.12, lw=0, zorder=1
        )
        axes.margins(y=0.12)
        if (base := report.records.untrained) is not None:
            axes.axhline(base["accuracy"], color="0.35", lw=0.9, ls=(0, (4, 3)), zorder=1, label="untrained")
        title = "band: ± one standard error" if any(errors) else None
        figure.legend(fontsize=8, frameon=False, loc="outside right upper", title=title, title_fontsize=7)
        _name_points(axes, canvas, report)  # last: what comes later would move the axes under the names
    else:
        axes.text(0.5, 0.5, "no finished trial yet", transform=axes.transAxes, ha="center", color="0.5")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _x(candidate: Candidate) -> int:
    """Its place on a log axis, which has none for a point without trainable parameters."""
    return max(candidate.trainable_params, 1)


def _name_points(axes: Any, canvas: Any, report: Report) -> None:
    """Names at the front's points where there is room: the ends and the knee first, never one over another."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    order = {c.best.digest: c for c in (report.front[-1], report.front[0], report.knee, *report.front) if c is not None}
    canvas.draw()
    dots = axes.transData.transform([(_x(c), c.accuracy) for c in report.front])
    taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in dots]
    for candidate in order.values():
        # with many settings a name would be longer than the picture has room for
        name = report.label(candidate.best) if len(report.settings) < 2 else point(candidate.best)
        for across, up, side in ((-6, 6, "right"), (6, 8, "left"), (6, -12, "left"), (-6, -12, "right")):
            label = axes.annotate(
                textwrap.shorten(name, 40, placeholder=" …") + (" (knee)" if candidate is report.knee else ""),
                (_x(candidate), candidate.accuracy),
                xytext=(across, up),
                textcoords="offset points",
                ha=side,
                fontsize=7,
                path_effects=[withStroke(linewidth=2, foreground="white")],
            )
            box = label.get_window_extent(canvas.get_renderer())
            corners = (box.x0, box.y0), (box.x1, box.y1)
            if all(axes.bbox.contains(*corner) for corner in corners) and not any(box.overlaps(b) for b in taken):
                taken.append(box)
                break
            label.remove()


# --- the page


def _page(report: Report) -> str:
    """The template with the study's data inside. The data is text for the browser, never markup."""
    template = (Path(__file__).parent / "page.html").read_text()
    data = json.dumps(_data(report), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return template.replace("{{title}}", html.escape(report.records.name)).replace("{{data}}", data)


def _data(report: Report) -> dict[str, Any]:
    header = report.records.header
    reasons: dict[str, list[str]] = {}
    for answer in report.records.answered:
        reasons.setdefault(answer.reason, []).append(answer.message)
    return {
        "name": _title(report),
        "started": header["started"],
        "resumed": header["resumed"],
        "command": header["command"],
        "config": flattened(header["config"]),
        "versions": header["versions"] | _worker_versions(report),
        "words": report.words,
        "sections": [asdict(section) for section in report.sections],
        "colours": colours(c.best.trial.allocator for c in report.points),
        "settings": report.settings,
        "knobs": list(dict.fromkeys(knob for c in report.points for knob in c.best.trial.knobs)),
        "untrained": report.records.untrained,
        "points": [_point(report, candidate) for candidate in report.points],
        "answered": [
            {"reason": reason.replace("_", " "), "count": len(texts), "messages": _counted(texts)}
            for reason, texts in sorted(reasons.items())
        ],
        "map": _map(report),
    }


def _worker_versions(report: Report) -> dict[str, str]:
    """What the runs say about themselves (device, model revision, data hash); several values are all named."""
    found: dict[str, dict[str, None]] = {}
    for run in report.records.finished.values():
        for name, version in run.versions.items():
            found.setdefault(name, {})[version] = None
    return {name: ", ".join(values) for name, values in found.items()}


def _counted(texts: Sequence[str]) -> list[str]:
    """The five most frequent messages with their counts."""
    return [f"{n}x {text}" for text, n in Counter(text for text in texts if text).most_common(5)]


def _point(report: Report, candidate: Candidate) -> dict[str, Any]:
    best, found = candidate.best, report.loadable(candidate)
    settings = report.records.header["config"]
    return {
        "digest": best.digest,
        "allocator": best.trial.allocator or "unnamed",
        "label": report.label(best),
        "knobs": {name: number(value) for name, value in best.trial.knobs.items()},
        "recipe": {f.name: number(getattr(best.trial.recipe, f.name)) for f in fields(Recipe)},
        "params": candidate.trainable_params,
        "size": human(candidate.trainable_params),
        "accuracy": candidate.accuracy,
        "stderr": candidate.stderr,
        "spread": candidate.spread,
        "seeds": len(candidate.complete),
        "chance": probability(report.chances.get(best.digest)),
        "status": best.status.replace("_", " "),
        "front": best.digest in report.winners,
        "knee": candidate is report.knee,
        "experts": best.trial.allocation.total_experts,
        "cells": _cells(report, best),
        "load": load_code(best.trial.model, found[1], settings=settings) if found else "",
        "export": export_command(report.records.folder, found[0]) if found else "",
        "runs": [
            {
                "seed": run.trial.seed,
                "status": run.status.replace("_", " "),
                "accuracy": run.accuracy,
                "seconds": run.seconds,
                "tokens": run.tokens,
                "memory": run.peak_memory_bytes,
                "message": report.message(run),
                "rungs": [{key: rung.get(key) for key in ("tokens", "step", "accuracy", "loss")} for rung in run.rungs],
            }
            for run in candidate.runs
        ],
    }


def _map(report: Report) -> dict[str, Any]:
    """Axes of the allocation map and which cells exist: layers × experts, or modules × layers of a dense model."""
    shape = report.records.shape
    if shape.is_moe:
        rows = [f"layer {layer}" for layer in shape.moe_layers]
        exists = [list(range(shape.experts_in(layer))) for layer in shape.moe_layers]
        return {"rows": rows, "exists": exists, "across": "expert"}
    modules = shape.of_role("attention", "mlp")
    rows = list(dict.fromkeys(module.name for module in modules))
    exists = [sorted({module.layer for module in modules if module.name == name}) for name in rows]
    return {"rows": rows, "exists": exists, "across": "layer"}


def _cells(report: Report, run: Outcome) -> list[str]:
    """The map of one allocation: a text a row, one character a column, "0" plus the number of experts there.

    Texts, because a study of a large model has millions of cells.
    """
    shape = report.records.shape
    match run.trial.allocation:
        case ExpertSelection() as chosen:
            ids = [set(chosen.in_layer(layer)) for layer in shape.moe_layers]
            numbers = [
                [int(e in here) for e in range(shape.experts_in(layer))]
                for layer, here in zip(shape.moe_layers, ids, strict=True)
            ]
        case ExpertCounts() as counted:
            modules = shape.of_role("attention", "mlp")
            at = {(module.name, module.layer): counted.counts.get(module.path, 0) for module in modules}
            rows = dict.fromkeys(module.name for module in modules)
            numbers = [[at.get((row, layer), 0) for layer in range(shape.num_layers)] for row in rows]
    return ["".join(chr(ord("0") + n) for n in row) for row in numbers]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 there is no study in the folder or it cannot be written."""
    given = list(sys.argv[1:] if argv is None else argv)
    usage = "usage: python -m search.report STUDY     the folder of a study: writes and prints its report"
    if words.asks_for_help(given) or len(given) != 1:
        asked = words.asks_for_help(given)
        print(usage, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    folder = given[0]
    try:
        show(write(folder))
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: the report cannot be written to {folder} ({error.strerror})", file=sys.stderr)
        return 2
    return 0
