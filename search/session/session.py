"""One run of a study: opens its records, starts workers, measures signals, trains what is left, writes the report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from allocators.core import tables, words
from allocators.core.errors import StudyError
from allocators.core.messages import Failed, PackJob, Tested, TestJob
from allocators.core.types import Signal, canonical_json
from search import interrupts, report
from search.config import AUTO, RunConfig, before
from search.engine import Workers
from search.engine.memory import PeakMemory
from search.problem import Problem, cheapest, check_budget, hopeless
from search.propose.halving import NO_HALVING, Halving, NoHalving
from search.records import mirror
from search.records.files import SIGNALS, UNTRAINED, write_atomically
from search.records.folder import StudyFolder
from search.records.redact import redacted
from search.records.reuse import NO_OTHER_STUDIES, NoOtherStudies, OtherStudies
from search.records.tracking import Tracker
from search.report.live import Progress
from search.session.contents import contents_of, refuse_other_facts
from search.session.dry_run import drawn
from search.session.make_workers import Locations, make_workers
from search.session.page import RunningPage
from search.study import MOST_LOST, Conductor, trainings_left, untested
from trainers import storage


def run_study(config: RunConfig, problem: Problem) -> int:
    """Exit code: 0 done, 1 no trial reached an accuracy, or one was lost too often.

    Raises KeyboardInterrupt where a signal ended it, StudyError where it cannot go on; what was finished is reported.
    """
    locations = Locations.of(config)
    if storage.is_uri(locations.shared) and mirror.collect(locations.folder, locations.shared):
        print(f"the records come from {redacted(locations.shared)}: another machine has run this study")
    with _records(config, problem, locations) as records:
        locations.check()
        tracker = _tracker(config, locations)

        def cut_short() -> None:
            tracker.close(status="KILLED")  # first: what comes after takes seconds
            if records.finished:
                report.show(report.write(locations.folder))

        given_up: Mapping[str, str] = {}
        with interrupts.ending(cut_short):
            tracker.sync(records)
            known = replace(problem, signals={**problem.signals, **records.signals})
            left, repeats = trainings_left(known, records, trials=config.trials, seeds=config.seeds)
            tests = len(untested(known, records, adapters=not config.replay))
            if left or repeats or tests:
                session = Session(config, problem, locations, records, tracker)
                given_up = session.train(left + repeats or tests)
            else:
                finished = len(records.finished)
                seeds = words.written(config, "seeds")
                print(f"trials={config.trials}, seeds={seeds} and {finished} are finished: nothing to train")
                _drop_notes(records, locations)  # of a driver that was killed after its last trial
            summary = report.write(locations.folder)
            tracker.sync(records)
        tracker.close(summary)
    report.show(summary)
    print(f"Runs: {tracker.browse}")
    for digest, reason in given_up.items():
        print(f"{digest} was lost {MOST_LOST} times, the last time because {reason}: the same command tries it again")
    found = any(outcome.accuracy is not None for outcome in records.finished.values())
    return 0 if found and not given_up else 1


def _drop_notes(records: StudyFolder, locations: Locations) -> None:
    """Removes the notes of Ray Train and Ray Tune; what a store does not let go costs no study its end."""
    with suppress(StudyError):
        records.drop_ray_notes()
    shutil.rmtree(locations.tune, ignore_errors=True)


def _records(config: RunConfig, problem: Problem, locations: Locations) -> StudyFolder:
    return StudyFolder.open(
        locations.folder,
        config=config.to_json(),
        identity=config.identity(),
        defaults=before(),
        shape=problem.shape,
        command=config.command(),
        place=locations.shared if storage.is_uri(locations.shared) else "",
        table=tables.facts(problem.space) if problem.is_table else {},
        contents=contents_of(config, cache=locations.folder.parent / ".contents.json"),
        lock=config.lock,
    )


def _tracker(config: RunConfig, locations: Locations) -> Tracker:
    return Tracker.open(
        config.tracking_uri or None,
        locations.folder.parent,
        experiment=config.experiment,
        study_name=config.study_name,
        tags={"model": config.model, "task": config.task},
        params=config.to_json(),
    )


def _write(file: Path, text: str) -> None:
    """A file beside the records. Raises StudyError where it cannot be written."""
    try:
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, text)
    except OSError as error:
        raise StudyError(
            f"{file} cannot be written ({error.strerror}): mend that, and the same command goes on"
        ) from None


@dataclass(frozen=True)
class Session:
    """The part of a run in which workers are up."""

    config: RunConfig
    problem: Problem
    locations: Locations
    records: StudyFolder
    tracker: Tracker

    def train(self, trainings: int) -> Mapping[str, str]:
        """Trains what is left of the trials and of the repeats with other seeds, `trainings` as far as is known now.

        Gives the trainings that were lost too often, with the last reason.
        """
        config, records, began = self.config, self.records, time.monotonic()
        study = records.header["id"]
        workers = make_workers(config, self.problem, self.locations, study=study, trainings=trainings)
        print(f"{config.space} on {config.model}, task {config.task}; records in {self.locations.folder}", flush=True)
        print(f"MLflow: {self.tracker.browse}", flush=True)
        with self._summary(workers, began), self._closing(workers), self._progress() as progress:
            progress.stage("starting workers")
            workers.start()
            progress.message(workers.describe())
            if not config.replay:
                progress.stage("loading the model and the task")
            others, problem = self._prepare(workers, progress)
            conductor = Conductor(
                problem,
                records,
                self.tracker,
                progress,
                sampler=config.sampler,
                deadline=began + config.time_budget_seconds if config.time_budget else None,
                keep=config.keep,
                trials=config.trials,
                seeds=config.seeds,
                halving=self._halving,
                rank_by=config.rank_by,
                others=others,
                evaluations=config.evaluations,
                changed=RunningPage(records),
            )
            workers.search(conductor, pausing=self._pausing)
            if conductor.cut_off:
                raise StudyError("the workers ended before their trainings: the same command goes on")
            self._test(problem, workers, conductor, progress)
            conductor.settle()
        return conductor.given_up

    def _test(self, problem: Problem, workers: Workers, conductor: Conductor, progress: Progress) -> None:
        """Evaluates the front and what it is compared with on the test split, which nothing was selected on."""
        jobs = untested(problem, self.records, adapters=not self.config.replay)
        done, failed = 0, []

        def on_tested(job: TestJob, result: Tested | Failed) -> None:
            nonlocal done
            done += 1
            progress.measuring("the test split", done, len(jobs), "adapters")
            match result:
                case Tested(score):
                    conductor.tested(job, score)
                case Failed(reason):
                    failed.append(reason)

        if jobs:
            trainings = f"{len(jobs)} training{'s' if len(jobs) > 1 else ''}"
            progress.message(f"evaluating {trainings} on the test split: of the front and of one-line recipes")
            workers.test(jobs, on_tested)
            progress.measured()
        if failed:
            progress.message(f"{len(failed)} of them were not evaluated on the test split: {failed[0]}")

    @property
    def _pausing(self) -> bool:
        return self.config.scheduler != "none"

    @property
    def _halving(self) -> Halving | NoHalving:
        """A new one, which has learnt nothing yet."""
        if not self._pausing:
            return NO_HALVING
        config = self.config
        return Halving(evaluations=config.evaluations, eta=config.eta, first_rung=config.first_rung)

    def _progress(self) -> Progress:
        return Progress(
            self.config.trials,
            self.config.time_budget_seconds or None,
            done=self.records.points,
            reused=self.records.reused,
            seed=None if self.config.seeds == AUTO else self.config.seed,  # else repeats are among the trials
            evaluations=self.config.evaluations,
        )

    def _prepare(self, workers: Workers, progress: Progress) -> tuple[OtherStudies | NoOtherStudies, Problem]:
        """What workers are asked before the first training. Gives other studies to reuse, and the measured problem."""
        facts = workers.facts()
        trained = (outcome.versions for outcome in self.records.trained.values())
        refuse_other_facts(self.records.folder, trained, facts.versions)
        if facts.task:
            progress.message(facts.task)
        for note in facts.notes:
            progress.message(f"note: {note}")
        if self.config.untrained:
            if not self.config.replay:
                progress.stage("evaluating the base before training")
            self._evaluate_untrained(workers, progress)
        problem = self.problem.measured(self._signals(workers, progress))
        if problem.needs:  # before this run these rules had stand-ins for their signals
            for allocator, reason in hopeless(problem).items():
                progress.message(f"no point of {allocator} can be trained: {reason}")
            if cheapest(problem) is None:
                check_budget(problem)  # raises with the reason
        progress.stage("choosing what to train first")
        if self.config.pack == "auto":
            self._choose_pack(problem, workers, progress)
        return self._other_studies(facts.versions, progress), problem

    def _evaluate_untrained(self, workers: Workers, progress: Progress) -> None:
        """Accuracy of the base alone, once a study, beside its records."""
        file = self.locations.folder / UNTRAINED
        if file.exists() or (base := workers.untrained()) is None:
            return
        on_both = {**base.selection.to_json(), "test": base.test.to_json()}
        _write(file, canonical_json(on_both))
        said = " and ".join(
            f"{score.accuracy:.3f} ± {score.stderr:.3f} on the {split} split"
            for split, score in (("validation", base.selection), ("test", base.test))
            if split == "test" or score != base.test
        )
        progress.message(f"untrained, the base has accuracy {said}")

    def _signals(self, workers: Workers, progress: Progress) -> Mapping[str, Signal]:
        """Every kind of signal that the problem needs, measured once by a worker or taken from the cache."""
        signals: dict[str, Signal] = {}
        for kind in self.problem.needs:
            progress.message(f"measuring {kind}, or reading what was measured before")
            signals[kind] = workers.measure(kind, partial(progress.measuring, kind))
            progress.measured()
            _write(self.locations.folder / SIGNALS / f"{kind}.json", canonical_json(signals[kind].to_json()))
        return signals

    def _choose_pack(self, problem: Problem, workers: Workers, progress: Progress) -> None:
        """Lets a worker time a few steps of the largest of some points, and packs as many as it says."""
        proposals, _ = drawn(problem, trials=8, merge=True)
        if proposals:
            largest = max(proposals, key=lambda proposal: proposal.trainable_params)
            if chosen := workers.choose_pack(PackJob(largest.trial, largest.trainable_params)):
                progress.message(chosen)

    def _other_studies(self, facts: Mapping[str, str], progress: Progress) -> OtherStudies | NoOtherStudies:
        """Studies of the same storage whose results are reused."""
        if not self.config.reuse:
            return NO_OTHER_STUDIES
        folder = self.locations.folder
        others = OtherStudies(
            folder,
            identity=self.config.identity(),
            defaults=before(),
            facts=facts,
            place=self.locations.shared,
            contents=self.records.header.get("contents", {}),
        )
        count = len(others)
        progress.message(f"other studies in {folder.parent} have {count} trainings with the same settings")
        return others

    @contextmanager
    def _closing(self, workers: Workers) -> Iterator[None]:
        try:
            yield
        except BaseException:
            interrupts.end()  # before: a busy machine may take its time to end the workers
            workers.close()
            _drop_notes(self.records, self.locations)
            raise
        workers.close()
        _drop_notes(self.records, self.locations)

    @contextmanager
    def _summary(self, workers: Workers, began: float) -> Iterator[None]:
        """Prints what the block has trained, and what that took."""
        earlier = set(self.records.finished)
        with PeakMemory() as memory:
            yield
        seconds, gibibytes = time.monotonic() - began, memory.peak_bytes / 2**30
        new = [outcome for digest, outcome in self.records.trained.items() if digest not in earlier]
        own = sum(outcome.trial.seed == self.config.seed for outcome in new)
        others = len(new) - own
        print(
            f"{own} {workers.results}{f' and {others} repeats with other seeds' if others else ''} in "
            f"{seconds / 60:.1f} minutes with start-up; peak memory of {workers.processes} on this machine "
            f"{gibibytes:.1f} GiB"
        )
        if self.records.sampler_seconds:
            mean = sum(self.records.sampler_seconds) / len(self.records.sampler_seconds)
            print(f"sampler {self.config.sampler}: {mean:.2g} s a suggestion")
