"""The tables of a report: the front and the sections in a terminal, front.csv and points.csv.

Console().print(front_table(results.front, outcomes, title="Pareto front"))
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from rich.table import Table
from rich.text import Text

from allocators.core.types import ModuleRanks, Outcome
from search.front import Candidate, knee
from search.report.results import Results
from search.report.sections import Section
from search.text import (
    Split,
    accuracy_text,
    forgotten_text,
    human,
    label,
    number,
    point,
    probability,
    settings_of,
    varying,
)

# --- in a terminal


def front_table(
    shown: Sequence[Candidate],
    everything: Iterable[Outcome],
    *,
    title: str,
    rows: int | None = None,
    chances: Mapping[str, float] = MappingProxyType({}),
    ids: Mapping[str, str] = MappingProxyType({}),
    splits: Sequence[Split] = ("accuracy",),
) -> Table:
    """Points of a front as a terminal table, the `rows` largest of them; recipe settings only where they vary.

    chances   by digest of a point's best run: the probability that it is more accurate than the point above it
    ids       by the same: what `search.export point=` calls it
    splits    accuracies that are shown, a column each
    """
    settings, bend = varying(everything), knee(shown)
    if "scaled_rate" in settings:  # with lora_alpha it says the rate, and a terminal is only so wide
        settings.remove("learning_rate")
    repeated = any(candidate.spread is not None for candidate in shown)
    cut = max(len(shown) - rows, 0) if rows else 0
    more = f", {cut} smaller {'one' if cut == 1 else 'ones'} not shown" if cut else ""
    table = Table(title=Text(title + more), title_justify="left")
    if ids:
        table.add_column("id", no_wrap=True)
    table.add_column("trainable\nparameters", justify="right", no_wrap=True)
    for split in splits:
        table.add_column(split, justify="right", no_wrap=True)
    table.add_column("allocator and knobs", overflow="fold")
    for name in settings:
        table.add_column(name, justify="right")
    table.add_column("seeds", justify="right")
    forgets = any(candidate.forgetting is not None for candidate in shown)
    if repeated:
        table.add_column("s.d. of seeds", justify="right")
    if forgets:
        table.add_column("forgotten", justify="right")
    if chances:  # with a third objective some rows are no more accurate than the one above
        above = all(candidate.best.digest in chances for candidate in shown[1:])
        table.add_column(f"P(beats the {'row above' if above else 'next smaller'})", justify="right")
    table.add_column("")
    for candidate in shown[cut:]:
        best = candidate.best
        table.add_row(
            *([ids.get(best.digest, "")] if ids else []),
            human(candidate.trainable_params),
            *(accuracy_text(candidate, split) for split in splits),
            Text(point(best)),  # not markup: plug-ins name themselves
            *(number(settings_of(best.trial.recipe)[name]) for name in settings),
            str(len(candidate.complete)),
            *([f"{candidate.spread:.3f}" if candidate.spread is not None else ""] if repeated else []),
            *([forgotten_text(candidate)] if forgets else []),
            *([probability(chances.get(best.digest))] if chances else []),
            "knee" if candidate is bend else "",
        )
    return table


def front_lines(
    shown: Sequence[Candidate],
    everything: Iterable[Outcome],
    *,
    chances: Mapping[str, float] = MappingProxyType({}),
    ids: Mapping[str, str] = MappingProxyType({}),
    splits: Sequence[Split] = ("accuracy",),
) -> list[str]:
    """What `front_table` shows, in two lines a point, for a terminal that is too narrow for the table."""
    settings, bend = varying(everything), knee(shown)
    lines = []
    for member in shown:
        best, seeds = member.best, len(member.complete)
        facts = [
            ids.get(best.digest, ""),
            human(member.trainable_params),
            *(f"{split} {text}" for split in splits if (text := accuracy_text(member, split))),
            f"{seeds} seeds" if seeds > 1 else "",
            f"s.d. {member.spread:.3f}" if member.spread is not None else "",
            f"forgotten {text}" if (text := forgotten_text(member)) else "",
            f"P(beats the one above) {probability(chances[best.digest])}" if best.digest in chances else "",
            "knee" if member is bend else "",
        ]
        lines += ["  ".join(fact for fact in facts if fact), f"    {label(best, settings)}"]
    return lines


def section_table(section: Section) -> Table:
    """A section as a terminal table: numbers on the right."""
    table = Table(title=Text(section.title), title_justify="left")
    for i, head in enumerate(section.head):
        numbers = all(re.match(r"[+−<.\d-]|$|TOST", row[i]) for row in section.rows)
        table.add_column(head, justify="right" if i and numbers else "left")
    for row in section.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


# --- in files


def front_csv(results: Results) -> str:
    """A line a point of the front."""
    return _csv(_front_row(results, candidate) for candidate in results.front)


def points_csv(results: Results) -> str:
    """A line a run, point after point."""
    return _csv(_run_row(results, run) for candidate in results.points for run in candidate.runs)


def _front_row(results: Results, candidate: Candidate) -> dict[str, object]:
    best, loadable, judged = candidate.best, results.loadable(candidate), results.tested.get(candidate.point)
    return {
        "digest": best.digest,
        **_allocation(best),
        "trainable_params": candidate.trainable_params,
        "accuracy": candidate.accuracy,
        "stderr": candidate.stderr,
        "test_accuracy": candidate.test_accuracy,
        "test_stderr": candidate.test_stderr,
        "optimism": candidate.optimism if results.tested else None,
        **_columns(results, candidate.by_task),
        **_columns(results, judged.by_task if judged else {}, prefix="test_"),
        "seeds": len(candidate.complete),
        **_parent(results, best),
        "seed_standard_deviation": candidate.spread,
        **({"forgetting": candidate.forgetting} if results.forgets else {}),
        **({"for_forgetting_less": results.spares(candidate)} if results.records.points.of_three else {}),
        "better_than_next_smaller": results.chances.get(best.digest),
        "knee": candidate is results.knee,
        "seconds": best.seconds,
        "tokens": best.tokens,
        "adapter": loadable[1] if loadable else "",
        **_recipe(best),
    }


def _run_row(results: Results, run: Outcome) -> dict[str, object]:
    return {
        "digest": run.digest,
        **_allocation(run),
        "trainable_params": run.trainable_params,
        "status": run.status,
        "accuracy": run.accuracy,
        "test_accuracy": run.test.accuracy if run.test else None,
        "test_stderr": run.test.stderr if run.test else None,
        "optimism": (run.accuracy or 0.0) - run.test.accuracy if run.test and results.tested else None,
        **_columns(results, _numbers(run.by_task)),
        **_columns(results, _numbers(run.test.by_task if run.test else {}), prefix="test_"),
        **(_forgetting(run) if results.forgets else {}),
        "on_front": run.digest in results.winners,
        "seed": run.trial.seed,
        "seconds": run.seconds,
        "tokens": run.tokens,
        "peak_memory_bytes": run.peak_memory_bytes,
        "message": run.message,
        **_parent(results, run),
        "reused_from": results.records.reused.get(run.digest, ""),
        "adapter": results.adapter_folder(run) or "",
        **_recipe(run),
    }


def _numbers(by_task: Mapping[str, Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """Accuracy and standard error of each task."""
    return {label: (one["accuracy"], one["stderr"]) for label, one in by_task.items()}


def _columns(
    results: Results, by_task: Mapping[str, tuple[float, float]], *, prefix: str = ""
) -> dict[str, float | None]:
    """`accuracy.TASK` and `stderr.TASK` of every task of the study; the same columns in every row."""
    columns: dict[str, float | None] = {}
    for task in results.tasks:
        accuracy, stderr = by_task.get(task, (None, None))
        columns |= {f"{prefix}accuracy.{task}": accuracy, f"{prefix}stderr.{task}": stderr}
    return columns


def _allocation(run: Outcome) -> dict[str, object]:
    knobs = json.dumps(dict(run.trial.knobs), sort_keys=True)
    allocation = run.trial.allocation
    columns: dict[str, object] = {"allocator": run.trial.allocator, "knobs": knobs, "experts": allocation.total_experts}
    return columns | ({"total_rank": allocation.total_rank} if isinstance(allocation, ModuleRanks) else {})


def _forgetting(run: Outcome) -> dict[str, object]:
    """Loss on general text; the same columns in every row of a study that measures it."""
    lost = run.forgetting
    columns: dict[str, object] = {"forgetting": None if lost is None else lost.rise}
    columns["forgetting_stderr"] = None if lost is None else lost.stderr
    return columns | {"general_loss": None if lost is None else lost.after}


def _parent(results: Results, run: Outcome) -> dict[str, object]:
    """A column in a study that has points which were cut from trainings."""
    return {"cut_from": run.trial.parent} if len(results.trained) < len(results.points) else {}


def _recipe(run: Outcome) -> dict[str, object]:
    return {f"recipe.{name}": value for name, value in settings_of(run.trial.recipe).items()}


def _csv(rows: Iterable[Mapping[str, object]]) -> str:
    """One line a row under a header; an empty study has an empty table."""
    rows, text = list(rows), io.StringIO()
    if rows:
        columns = dict.fromkeys(name for row in rows for name in row)  # total_rank where an allocation has one
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()
