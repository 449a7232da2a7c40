"""`dry_run=true`: the points that a study would start with, with their parameter counts, and what they will take.

No workers are started, and no weights are read unless `estimate=true` asks for time.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from rich.console import Console
from rich.table import Table

from allocators.core import plugins
from allocators.core.types import Allocation, ModuleRanks
from search.config import RunConfig
from search.points.starting import starting_points
from search.problem import Problem, Proposal
from search.propose.sampler import Proposer, table_rows
from search.records import measured_signals
from search.session import estimate
from search.session.make_workers import Locations
from search.text import human, settings_of
from trainers import models


def dry_run(config: RunConfig, problem: Problem, locations: Locations) -> None:
    """Prints what the study would start with, or what the sampler would draw, and what a worker will take.

    locations   of the study: where an earlier run of it measured signals, counts are exact
    """
    for note in [] if config.replay else models.left_out(config.model, trust_remote_code=config.trust_remote_code):
        print(f"note: {note}", file=sys.stderr)
    known = {kind: signal for kind, signal in problem.signals.items() if signal.provenance.get("measured", True)}
    recorded, damaged = measured_signals(locations.folder)
    for sentence in damaged:
        print(f"warning: {sentence}", file=sys.stderr)
    known |= recorded
    problem = replace(problem, signals={**problem.signals, **known})
    proposals, reasons = drawn(problem, trials=config.trials, merge=set(problem.needs) <= known.keys())
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(_table(proposals, f"{config.space} on {config.model}: {len(proposals)} points", known))
    if not all(_mark(proposal, known) == "" for proposal in proposals):
        console.print("≤ at most, ≈ about: depends on a signal that the first run measures")
    if reasons:
        console.print(f"{len(reasons)} further points needed no training: {', '.join(sorted(set(reasons)))}")
    if not problem.is_table and len(proposals) > len(starting_points(problem)):
        console.print("the space's starting points come first, then random ones: a study's sampler proposes its own")
    if problem.is_table:
        total = len(proposals) * config.seeds
        console.print(f"{len(proposals)} rows with {config.seeds} seeds each: {total} trainings")
    elif config.seeds > 1:
        console.print(f"then the members of the front again, until {config.seeds} seeds stand behind each")
    if proposals and not config.replay:
        for line in _estimates(config, problem, proposals, locations):
            console.print(line, highlight=False)


def _estimates(
    config: RunConfig, problem: Problem, proposals: Sequence[Proposal], locations: Locations
) -> Iterator[str]:
    yield estimate.memory_line(config, problem, max(proposals, key=lambda proposal: proposal.trainable_params))
    if config.estimate:
        yield from estimate.time_lines(config, problem, proposals, locations)
    else:
        yield "estimate=true loads the model here, times a few steps and says how long the study will take"


def drawn(problem: Problem, *, trials: int, merge: bool) -> tuple[list[Proposal], list[str]]:
    """Points to show, and the reasons why others need no training.

    merge   False: rows of a table that have one allocation stay apart, because a signal is not known yet
    """
    if problem.is_table:
        rows = table_rows(problem, merge=merge)
        reasons: list[str] = [row.reason for row in rows if not isinstance(row, Proposal)]
        return [row for row in rows if isinstance(row, Proposal)][:trials], reasons
    reasons = []
    proposer = Proposer(problem, sampler="random", answered=lambda point: reasons.append(point.reason))
    return list(islice(iter(proposer.propose, None), trials)), reasons


def _table(proposals: list[Proposal], title: str, known: Collection[str]) -> Table:
    table = Table(title=f"{title}, nothing is trained")
    for column in ("", "allocator", "knobs", "recipe", "experts", "trainable parameters"):
        table.add_column(column, justify="right" if column in ("", "experts", "trainable parameters") else "left")
    for number, proposal in enumerate(proposals, start=1):
        trial, mark = proposal.trial, _mark(proposal, known)
        settings = settings_of(trial.recipe)
        table.add_row(
            str(number),
            trial.allocator,
            _words(trial.knobs),
            _words({name: settings[name] for name in ("rank", "lora_alpha", "learning_rate")}),
            f"{mark}{_amount(trial.allocation)}",
            f"{mark}{proposal.trainable_params:,} ({human(proposal.trainable_params)})",
        )
    return table


def _amount(allocation: Allocation) -> str:
    """How many experts, or `Σr 320` where modules have ranks."""
    return f"Σr {allocation.total_rank}" if isinstance(allocation, ModuleRanks) else f"{allocation.total_experts}"


def _words(knobs: Mapping[str, Any]) -> str:
    return " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in knobs.items())


def _mark(proposal: Proposal, known: Collection[str]) -> str:
    """What stands before a count that depends on a signal that is not known; empty where the count is exact."""
    module = plugins.load("allocators", proposal.trial.allocator)
    if module.FIXED_COST or module.NEEDS is None or module.NEEDS in known:
        return ""
    return "≤ " if module.NEEDS == "routing" else "≈ "
