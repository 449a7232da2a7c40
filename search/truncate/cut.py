"""Cuts adapters of a study and puts what comes of it on record, evaluated."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from allocators.core import words
from allocators.core.errors import StudyError, shown
from allocators.core.types import Outcome, Trial
from search import records
from search.config import RunConfig, before, keys
from search.export import find, locate
from search.records.folder import StudyFolder
from search.report import Report, write
from search.session.contents import contents_of, refuse_other_facts
from search.session.make_workers import Locations, worker_setup
from search.text import human, run_id
from trainers import storage

if TYPE_CHECKING:
    from trainers.worker_state import WorkerState

ALLOCATOR = "cut"  # what proposed a cut adapter, where tables and plots name the allocator


@dataclass(frozen=True)
class Request:
    """What the command line asks for besides the study's folder."""

    point: str = words.key(
        "front",
        "what to cut: front (its members, or what they were cut from), all (every training whose adapter is kept), "
        "best (the most accurate point), "
        "knee, or a run's id (its first digits, if unique)",
    )
    energy: str = words.key("0.9", "share of the squared singular values that is kept, several with commas")
    device: str = words.key("", "torch device (empty: cuda where there is one)")

    @property
    def energies(self) -> list[float]:
        """Ascending. Raises StudyError for what is no share."""
        try:
            shares = sorted({float(text) for text in self.energy.strip("[]").split(",")})
        except ValueError:
            raise StudyError(f"energy must be shares such as 0.9 or 0.5,0.9, got {shown(self.energy)}") from None
        if not all(0 < share <= 1 for share in shares):
            raise StudyError(f"energy must be above 0 and at most 1, got {shown(self.energy)}")
        return shares


def truncate(folder: str | Path, request: Request) -> Iterator[str]:
    """Cuts, evaluates and records; yields what to tell the user, line by line, and writes the report again.

    Raises StudyError where the study, the point or its adapter is missing or of a kind that cannot be cut, where the
    study is in use, and where its model or task is not what it was.
    """
    energies = request.energies
    report = Report(records.read(folder))
    if report.records.header["config"].get("replay"):
        raise StudyError(f"{folder} asked a recorded table, which has no adapters: cut those of a study that trained")
    parents = _parents(report, request.point)
    config = _config(report)
    path = words.path(str(folder), "study").absolute()
    with _open(path, report, config) as study:
        state = _worker(config, Locations(path, study.place), request.device)
        refuse_other_facts(path, (outcome.versions for outcome in study.trained.values()), state.versions)
        made: list[tuple[Outcome, float, Outcome]] = []
        for parent, where in parents:
            for energy in energies:
                cut = _cut(study, state, parent, where, energy)
                made.append((parent, energy, cut))
                yield _line(parent, energy, cut, one_split=config.select_on == "test")
    yield from _summary(made)
    written = write(path)
    members = sum(candidate.parent in {parent.digest for parent, _ in parents} for candidate in written.front)
    yield f"{members} of the {len(written.front)} points of the front are cut from these trainings"
    yield f"Report: {path / 'report.html'}"


def _parents(report: Report, name: str) -> list[tuple[Outcome, str]]:
    """The trainings to cut, and where their adapters lie; of a point that was cut itself that which it was cut from."""
    if name not in ("front", "all"):
        run = find(report, name)[1]
        if name in ("best", "knee"):
            run = _training_of(report, run)
        if run.trial.parent:
            raise StudyError(
                f"run {run_id(run)} was cut from {run.trial.parent[:8]}: cut that training, at another energy"
            )
        return [(run, locate(report, run))]
    chosen = report.front if name == "front" else report.points
    if not chosen:
        raise StudyError(f"{report.records.folder} has no finished trial: there is nothing to cut")
    runs = {run.digest: run for point in chosen for cut in point.complete for run in [_training_of(report, cut)]}
    trained = [run for run in runs.values() if not run.trial.parent]
    kept = [(run, where) for run in trained if (where := report.records.adapter_of(run)) and storage.exists(where)]
    if not kept:
        raise StudyError(
            f"point={name}: no training {'of the front ' if name == 'front' else ''}of {report.records.folder} has an "
            "adapter that is kept: train with keep=all, or keep=front for the front"
        )
    return kept


def _training_of(report: Report, run: Outcome) -> Outcome:
    """The run itself, or the one that it was cut from where the records have it."""
    return report.records.finished.get(run.trial.parent, run) if run.trial.parent else run


def _config(report: Report) -> RunConfig:
    """What the study was last asked for."""
    recorded = report.records.header["config"]
    return RunConfig(**(before() | {name: recorded[name] for name in keys() if name in recorded}))


def _open(folder: Path, report: Report, config: RunConfig) -> StudyFolder:
    """The study's folder, open for writing as it is: nothing that it was asked for changes."""
    header = report.records.header
    return StudyFolder.open(
        folder,
        config=header["config"],
        identity=header["identity"],
        shape=report.records.shape,
        command=header["command"],
        place=report.records.place if storage.is_uri(report.records.place) else "",
        table=header.get("table", {}),
        contents=contents_of(config, cache=folder.parent / ".contents.json"),
        lock=config.lock,
    )


def _worker(config: RunConfig, locations: Locations, device: str) -> WorkerState:
    """The study's model and task in this process."""
    import torch

    from trainers import models
    from trainers.worker_state import WorkerState

    return WorkerState(worker_setup(config, locations), torch.device(models.device_or_default(device)))


def _cut(study: StudyFolder, state: WorkerState, parent: Outcome, where: str, energy: float) -> Outcome:
    """The outcome of one cut, from the records where it was made before."""
    from trainers import adapter
    from trainers.adapter.module_ranks.truncate import truncated

    ranks, weights = truncated(adapter.read(where), energy=energy)
    knobs = {"energy": energy, "of": run_id(parent)}
    trial: Trial = replace(parent.trial, allocation=ranks, allocator=ALLOCATOR, knobs=knobs, parent=parent.digest)
    if (known := study.finished.get(trial.digest)) is not None and study.has_adapter(trial.digest):
        return known
    outcome = state.made(trial, weights, of=parent.rungs[-1])
    study.append_finished(outcome, {"cut_from": parent.digest, "energy": energy})
    return outcome


def _line(parent: Outcome, energy: float, cut: Outcome, *, one_split: bool) -> str:
    """`3f2a91bc at energy 0.9: 861.18k -> 108.03k parameters, validation .912 -> .905, test .901 -> .899`."""
    numbers = [] if one_split else [("validation", parent.accuracy, cut.accuracy)]
    scores = [None if of.test is None else of.test.accuracy for of in (parent, cut)]
    numbers += [("test", scores[0], scores[1])]
    said = ", ".join(f"{name} {_accuracy(old)} -> {_accuracy(new)}" for name, old, new in numbers)
    sizes = f"{human(parent.trainable_params)} -> {human(cut.trainable_params)}"
    return f"{run_id(parent)} at energy {energy:g}: {sizes} parameters, {said} (run {run_id(cut)})"


def _accuracy(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _summary(made: Sequence[tuple[Outcome, float, Outcome]]) -> Iterator[str]:
    """Of every point with several seeds a line an energy: means and standard deviations over its trainings."""
    by_point: dict[tuple[str, float], list[tuple[Outcome, Outcome]]] = {}
    for parent, energy, cut in made:
        by_point.setdefault((parent.trial.point, energy), []).append((parent, cut))
    for (_, energy), pairs in by_point.items():
        tests = [(p.test.accuracy, c.test.accuracy) for p, c in pairs if p.test and c.test]
        if len(tests) < 2:
            continue
        before_, after = (list(side) for side in zip(*tests, strict=True))
        changes = [new - old for old, new in tests]
        size = statistics.fmean(c.trainable_params for _, c in pairs)
        whole = statistics.fmean(p.trainable_params for p, _ in pairs)
        error = statistics.stdev(changes) / math.sqrt(len(changes))
        yield (
            f"{len(tests)} seeds at energy {energy:g}: {human(size)} of {human(whole)} parameters "
            f"({size / whole:.1%}), test {statistics.fmean(after):.3f} ± {statistics.stdev(after):.3f} (s.d.), uncut "
            f"{statistics.fmean(before_):.3f}: {statistics.fmean(changes):+.3f}, standard error {error:.3f}, paired"
        )
