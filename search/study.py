"""One study from its first point to its report: the conductor of records, MLflow runs and the live view.

Tune asks `propose`, workers' reports arrive at `rung` and `finished`. Pure glue: no Ray, no MLflow, no torch.

A study has `trials` trainings at its own seed, and then repeats with the seeds after it, until the points that matter
have `seeds` in all: the members of the front in a search, every row of a table. What was asked for earlier and is
recorded is never trained again, so more seeds (or trials) in a rerun add only what is missing. What another study of
the same storage has trained is recorded with its result and where it is from, and counts as a repeat or a row of a
table, but not as one of `trials`: those are trained. With `seeds=auto` the sampler proposes the repeats of a search,
and they are among the `trials`.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

from allocators.core import words
from allocators.core.errors import StudyError, ToolkitError, one_line, unknown
from allocators.core.messages import TestJob
from allocators.core.types import FINISHED, Outcome, Rung, Score, Trial
from search import baselines, early
from search import front as pareto
from search.config import AUTO
from search.points.asked import FixedTrial
from search.problem import Problem, Proposal
from search.propose.halving import NO_HALVING, Halving, NoHalving
from search.propose.sampler import Answered, Proposer, table_rows
from search.records import Records, orders
from search.records.folder import StudyFolder
from search.records.reuse import NO_OTHER_STUDIES, NoOtherStudies, OtherStudies
from search.records.tracking import Tracker
from search.report.live import Progress


def missing_repeats(problem: Problem, records: Records, *, seeds: int) -> list[Proposal]:
    """Trainings that members of the front (by mean accuracy, as of now) lack to have been tried with `seeds` seeds.

    Seed by seed and small points first, so that all members have two before one has three. A repeat that failed was
    tried; one that is under way is not missing.
    """
    missing: list[Proposal] = []
    members = records.points.front
    for seed in range(problem.seed + 1, problem.seed + seeds):
        for member in members:
            if member.parent or (member.point, seed) in records.tried:  # what was cut from a training is none
                continue
            first = member.runs[0]
            trial = problem.repeat(first.trial, seed)
            if trial.digest not in records.outcomes:  # else its own draw is what another point trained
                same = trial.allocation == first.trial.allocation
                cost = member.trainable_params if same else problem.cost(trial)
                missing.append(Proposal(trial, cost, records.params_of(first.digest)))
    return missing


def table_trainings(problem: Problem, *, trials: int, seeds: int) -> tuple[list[Proposal], list[Answered]]:
    """Every training of a table, and the rows answered without one; all rows at one seed before the next seed.

    A study that is cut short then still has pairs to compare.
    """
    rows = table_rows(problem)
    first = [row for row in rows if isinstance(row, Proposal)][:trials]
    more = range(problem.seed + 1, problem.seed + seeds)
    trials_again = ((p, problem.repeat(p.trial, seed)) for seed in more for p in first)
    repeats = (replace(p, trial=trial, trainable_params=problem.cost(trial)) for p, trial in trials_again)
    once = {p.trial.digest: replace(p, tests=True) for p in (*first, *repeats)}
    return list(once.values()), [row for row in rows if isinstance(row, Answered)]


def trainings_left(problem: Problem, records: Records, *, trials: int, seeds: int) -> tuple[int, int]:
    """Trainings still to run: of the `trials`, and repeats with other seeds (in a search: as the front is now).

    A table whose signals were not measured yet counts as if nothing of it that needs them were done.
    """
    if problem.is_table:
        proposals, _ = table_trainings(problem, trials=trials, seeds=seeds)
        left = [proposal for proposal in proposals if proposal.trial.digest not in records.finished]
        own = sum(proposal.trial.seed == problem.seed for proposal in left)
        return own, len(left) - own
    if seeds == AUTO:
        return max(trials - len(records.trained), 0), 0
    own = trials - sum(outcome.trial.seed == problem.seed for outcome in records.trained.values())
    half_done = sum(outcome.trial.seed != problem.seed for outcome, _ in records.in_flight)
    return max(own, 0), len(missing_repeats(problem, records, seeds=seeds)) + half_done


def untested(problem: Problem, records: Records, *, adapters: bool = True) -> list[TestJob]:
    """Trainings that are still to be evaluated on the test split: all seeds of the front and of the one-line recipes.

    In a table, where nothing is selected, all trainings.

    adapters   only those whose adapter is kept; False: none is needed, as where a recorded table is asked
    """
    points = records.points
    chosen = points if problem.is_table else [*points.front, *baselines.one_line(points).values()]
    runs = {run.digest: run for candidate in chosen for run in candidate.complete if run.test is None}
    places = ((run, records.adapter_of(run) if adapters else "") for run in runs.values())
    return [TestJob(run.trial, run.trainable_params, place) for run, place in places if place is not None]


MOST_LOST = 3  # trainings in a row that the platform took away: then something is wrong that no retry mends


class Conductor:
    """Proposes trainings to free workers, and takes their results into records, MLflow and the live view.

    trials        trainings at the study's own seed that it is to have in the end, those of earlier runs included
    seeds         seeds that a member of the front, or a row of a table, is to have been trained with. AUTO: the
                  sampler proposes repeats, which are among the trials
    deadline      monotonic time after which nothing new is proposed; None: no limit
    keep          "front": adapters of points that left the front are deleted; "all": none is
    halving       pauses trainings at rungs; those that were not gone on with in the end are `stopped`. Repeats with
                  other seeds run to their end
    rank_by       what halving ranks trainings by at a rung, beside their parameters
    others        trainings of other studies, whose results are taken instead of training again
    evaluations   of a whole training: what is to be stopped at the last of them has ended anyway (None: not known)
    changed       is called whenever the records have changed, for whoever shows them

    While it runs it obeys the orders in the study folder (`search/records/orders.py`), and records what it said to
    each.
    """

    def __init__(
        self,
        problem: Problem,
        records: StudyFolder,
        tracker: Tracker,
        progress: Progress,
        *,
        sampler: str,
        deadline: float | None,
        keep: str,
        trials: int,
        seeds: int = 1,
        halving: Halving | NoHalving = NO_HALVING,
        rank_by: str = "accuracy",
        others: OtherStudies | NoOtherStudies = NO_OTHER_STUDIES,
        evaluations: int | None = None,
        changed: Callable[[], object] = lambda: None,
    ) -> None:
        self._problem = problem
        self._records = records
        self._tracker = tracker
        self._progress = progress
        self._deadline = deadline
        self._keep = keep
        self._trials = trials
        self._seeds = seeds
        self._halving = halving
        self._rank_by = rank_by
        self._others = others
        self._evaluations = evaluations
        self._changed = changed
        self._stopping: set[str] = set()  # trainings that are to end at their next evaluation
        self._wanted: list[Mapping[str, Any]] = []  # points that were asked for, as the sampler's parameters
        self._extra = 0  # of them, those that were proposed: they are trained beside the trials
        self._ending = False  # nothing new is started any more
        self._refuse_orders("the study was not running")
        self._proposals: dict[str, Proposal] = {}
        self._again: list[Proposal] = []  # lost, to be trained again at once
        self._later: list[Proposal] = []  # lost, to be trained again when nothing else is left
        self._losses: Counter[str] = Counter()  # of each training in this run, without an evaluation between
        self._in_a_row = 0
        self.given_up: dict[str, str] = {}  # lost too often in this run -> the last reason
        cut = {digest for digest, outcome in records.finished.items() if outcome.trial.parent}
        here = records.outcomes.keys() - records.reused.keys() - cut
        self._repeats = {digest for digest in here if not self._counts(records.outcomes[digest].trial)}
        self._unseen: set[str] = {candidate.point for candidate in records.points}  # whose adapters may be left over
        self._baselines = baselines.one_line(records.points)
        for digest in records.finished:  # a driver that was killed may have recorded an end and not cleaned up
            records.drop_checkpoint(digest)
        if problem.is_table:
            self._queue: Iterator[Proposal | Literal["wait"]] = self._rows()
        else:
            self._queue = self._go_on(sampler)

    def _go_on(self, sampler: str) -> Iterator[Proposal | Literal["wait"]]:
        """What a search proposes from here on; its sampler and its halving have learnt what is on record."""
        records = self._records
        self._proposer = Proposer(
            self._problem,
            sampler=sampler,
            repeats=self._seeds == AUTO,
            allows=lambda outcome: records.points.allows(outcome.forgetting.rise if outcome.forgetting else None),
            of_three=records.points.of_three,
            answered=self._on_answered,
        )
        self._recall()
        half_done = [Proposal(o.trial, o.trainable_params, params) for o, params in records.in_flight]
        paused = [p for p in half_done if p.trial.digest in self._halving.paused]
        for proposal in paused:
            self._proposals[proposal.trial.digest] = proposal
            self._progress.paused(proposal.trial.digest)
        self._expect()
        trained = sum(self._counts(outcome.trial) for outcome in records.trained.values())
        return self._search(self._trials - trained - len(paused), [p for p in half_done if p not in paused])

    def _recall(self) -> None:
        """Tells sampler and halving what is on record, in its order: what they decide then is what they would have."""
        records, asked = self._records, set[str]()
        for what, digest, number in records.events:
            if what == "answered":
                self._proposer.recall_answered(records.answered[number])
                continue
            outcome = records.outcomes.get(digest)
            if outcome is None or outcome.trial.parent:  # its start is on a damaged line; it was cut from another
                continue
            if what != "rung" and digest not in asked and self._counts(outcome.trial):
                self._proposer.recall(outcome.trial, records.params_of(digest))
                asked.add(digest)
            if self._is_own(outcome):
                self._recall_halving(what, outcome, number, all_asked=len(asked) >= self._trials)
            if what == "finished" and outcome.status in FINISHED:
                self._proposer.tell(outcome)

    def _recall_halving(self, what: str, outcome: Outcome, step: int, *, all_asked: bool) -> None:
        """One event of a training: where it paused, went on and ended."""
        halving, digest = self._halving, outcome.digest
        if what == "finished" and digest in self._records.reused:
            self._restored(outcome)
        elif what == "finished":
            halving.ended(digest, accuracy=_at_the_end(outcome))
        else:
            if digest in halving.paused:
                if all_asked and what == "started":
                    halving.close()
                halving.go_on(digest)
            reached = [rung for rung in outcome.rungs if rung.step <= step]
            if what == "rung" and reached:
                merit = early.merit(reached[-1], self._rank_by)
                halving.reached(digest, len(reached), merit=merit, cost=outcome.trainable_params)

    @property
    def cut_off(self) -> bool:
        """Whether trials were started that have no result, and are not paused."""
        return bool(self._running)

    @property
    def _running(self) -> list[Proposal]:
        return [proposal for digest, proposal in self._proposals.items() if digest not in self._halving.paused]

    @property
    def _searching(self) -> bool:
        """Whether one of the trials is under way."""
        return any(self._counts(proposal.trial) for proposal in self._running)

    def propose(self) -> Proposal | Literal["wait"] | None:
        """The next training; "wait" where a result has to come in first; None when there is nothing left to do."""
        self._obey()
        proposal = None if self._ending else self._next()
        self._ending = proposal is None
        return proposal

    def _next(self) -> Proposal | Literal["wait"] | None:
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._progress.message("time budget used up: no new trials")
            return None
        proposal = self._again.pop(0) if self._again else self._next_wanted() or next(self._queue, None)
        if proposal is None or proposal == "wait":
            if self._running:  # one of them may be lost yet
                return "wait"
            if not self._later:
                return proposal
            proposal = self._later.pop(0)
        started = Outcome(proposal.trial, "started", proposal.trainable_params)
        self._proposals[proposal.trial.digest] = proposal
        self._records.append_started(started, proposal.params, sampler_seconds=proposal.sampler_seconds)
        if not self._counts(started.trial):
            self._repeats.add(started.digest)
        self._tracker.started(started)
        self._progress.started(started)
        self._changed()
        return proposal

    # --- orders

    def _obey(self) -> None:
        """Looks at the orders that came since the last look."""
        for order in orders.take(self._records.folder):
            answer = one_line(self._answer(order))
            self._records.append_ordered(order, answer)
            self._progress.message(f"asked to {order.words}: {answer}")

    def _refuse_orders(self, reason: str) -> None:
        """Of orders that wait while nothing can be done for them: they must not surprise a later run."""
        for order in orders.take(self._records.folder):
            self._records.append_ordered(order, f"refused: {reason}")

    def _answer(self, order: orders.Order) -> str:
        """Does what is asked; says what is done, or why it is refused."""
        if self._ending:
            return "refused: the study is ending, and starts nothing new"
        if order.do == "end":
            self._ending = True
            return "nothing new is started; the same command goes on with the study later"
        if order.do == "try":
            return self._want(order.point)
        if order.digest in self._halving.paused:
            self._stop(order.digest)
            return "stopped, at its last evaluation"
        if order.digest not in self._proposals:
            return "refused: it is not running"
        self._stopping.add(order.digest)
        return "it stops at its next evaluation"

    def _want(self, given: Mapping[str, words.Value]) -> str:
        """Checks a point as pins are checked, and puts it before what the sampler proposes."""
        problem = self._problem
        if problem.is_table:
            return "refused: every row of a table is trained anyway"
        try:
            for name in given.keys() & problem.pins.keys():
                if not words.matching(given[name], [problem.pins[name]]):
                    raise StudyError(f"{name}={problem.pins[name]} is fixed for the whole study")
            point, params = replace(problem, pins={**given, **problem.pins}).ask(FixedTrial({}))
            if strangers := given.keys() - params.keys():
                raise unknown(f"knob of {point.allocator} in space={problem.space_name}", min(strangers), params)
            trial, _ = problem.resolve(point)
        except ToolkitError as error:
            return f"refused: {error}"
        if trial.digest in self._records.finished or trial.digest in self._proposals:
            return f"refused: {trial.digest[:8]} is that point"
        self._wanted.append(params)
        return "it is trained next, beside the trials"

    def _next_wanted(self) -> Proposal | None:
        """The next point that was asked for and has to be trained."""
        while self._wanted:
            proposal = self._proposer.propose_this(self._wanted.pop(0))
            if proposal is not None and not self._taken(proposal):
                self._extra += 1
                self._expect()
                return proposal
        return None

    def _stop(self, digest: str) -> None:
        """Ends a training that has been evaluated, with what it had then."""
        outcome = self._records.outcomes[digest]
        last = outcome.rungs[-1]
        self._stopping.discard(digest)
        self.finished(
            outcome.updated(status="stopped", accuracy=last.accuracy, tokens=last.tokens, seconds=last.seconds)
        )

    # --- what comes next

    def _search(self, own: int, under_way: list[Proposal]) -> Iterator[Proposal | Literal["wait"]]:
        """What was cut off, what the sampler proposes, and repeats of the front, which is looked at after every result.

        own   trainings to be proposed yet, those that were cut off included
        """
        repeats = [proposal for proposal in under_way if not self._counts(proposal.trial)]
        for proposal in under_way:
            if proposal not in repeats and not self._taken(proposal):
                own -= 1
                yield proposal
        for _ in itertools.chain(range(own), self._instead()):
            yield from self._promoted()
            while (new := self._proposer.propose()) is not None and self._taken(new):
                pass
            if new is None:
                self._progress.message("every point of the space has been answered")
                break
            yield new
        yield from self._last_rungs()
        yield from (proposal for proposal in repeats if not self._taken(proposal))
        while self._seeds > 1:
            missing = missing_repeats(self._problem, self._records, seeds=self._seeds)
            if missing and not self._searching:  # before the search's last result the front is not known
                if not self._taken(missing[0]):
                    yield missing[0]
            elif self._proposals or self._again or self._later:
                yield "wait"
            else:
                return

    def _instead(self) -> Iterator[str]:
        """One for every trial that was given up: the trials are those with a result."""
        seen = 0
        while True:
            given_up = [digest for digest in self.given_up if self._counts(self._records.outcomes[digest].trial)]
            if seen == len(given_up):
                return
            yield given_up[seen]
            seen += 1

    def _promoted(self) -> Iterator[Proposal]:
        """Paused trainings that may go on."""
        while (digest := self._halving.next()) is not None:
            yield replace(self._proposals[digest], sampler_seconds=0.0)  # nobody had to think of it again

    def _last_rungs(self) -> Iterator[Proposal | Literal["wait"]]:
        """Every point was started: the best of the paused ones go on, and what is left in the end is stopped."""
        self._halving.close()
        while self._halving.paused:
            yield from self._promoted()
            if not self._halving.paused:
                return
            if self._searching:
                yield "wait"
                continue
            for digest in list(self._halving.paused):
                self._stop(digest)

    def _restored(self, outcome: Outcome) -> None:
        """Takes in a training of another study: a rival at every rung that it passed."""
        if self._is_own(outcome):
            self._halving.restore(
                outcome.digest,
                [early.merit(rung, self._rank_by) for rung in outcome.rungs],
                cost=outcome.trainable_params,
                accuracy=_at_the_end(outcome),
            )

    def _rows(self) -> Iterator[Proposal]:
        """What is missing of a table."""
        proposals, answered = table_trainings(self._problem, trials=self._trials, seeds=self._seeds)
        for point in answered:
            if point not in self._records.answered:  # every run of a study meets the same rows
                self._on_answered(point)
        missing = []
        for proposal in proposals:  # all that was trained elsewhere at once: then it is known how much is left
            if proposal.trial.digest not in self._records.finished and not self._taken(proposal):
                missing.append(proposal)
        trained = [proposal for proposal in proposals if proposal.trial.digest not in self._records.reused]
        own = sum(proposal.trial.seed == self._problem.seed for proposal in trained)
        self._progress.expect(own, len(trained) - own)
        yield from missing

    def _counts(self, trial: Trial) -> bool:
        """Whether it is one of the search's trials, and not a repeat beside them."""
        return self._seeds == AUTO or trial.seed == self._problem.seed

    def _is_own(self, outcome: Outcome) -> bool:
        """Whether it has the study's own seed, and does not repeat a point."""
        return outcome.trial.seed == self._problem.seed

    def _expect(self) -> None:
        """Tells the live view how many repeats there will be, by the front as it is now."""
        missing = missing_repeats(self._problem, self._records, seeds=self._seeds)
        self._progress.expect(self._trials + self._extra, len(self._repeats) + len(missing))

    def rung(self, digest: str, rung: Rung) -> bool:
        """An evaluation of a training; whether it goes on now, else it is paused until it is proposed again."""
        if not any(known.step >= rung.step for known in self._records.outcomes[digest].rungs):
            self._in_a_row = self._losses[digest] = 0
        self._records.append_rung(digest, rung)
        self._tracker.rung(digest, rung)
        self._progress.rung(digest, rung)
        outcome = self._records.outcomes[digest]
        number = sum(known.step <= rung.step for known in outcome.rungs)
        self._obey()
        self._changed()
        if digest in self._stopping and number != self._evaluations:
            self._stop(digest)
            return False
        merit, cost = early.merit(rung, self._rank_by), outcome.trainable_params
        if not self._is_own(outcome) or self._halving.reached(digest, number, merit=merit, cost=cost):
            return True
        self._progress.paused(digest)
        return False

    def finished(self, outcome: Outcome) -> None:
        """Records the outcome of a proposed training and tells proposer, halving, MLflow and live view."""
        self._in_a_row = 0
        self._finished(outcome, self._proposals.pop(outcome.digest).params)

    def _taken(self, proposal: Proposal) -> bool:
        """Whether another study has trained it; its result is then this study's."""
        taken = self._others.take(proposal.trial, proposal.trainable_params)
        if taken is None:
            return False
        outcome, study = taken
        self._restored(outcome)
        self._finished(outcome, proposal.params, reused=study)
        return True

    def _finished(self, outcome: Outcome, params: Mapping[str, Any], *, reused: str = "") -> None:
        self._records.append_finished(outcome, params, reused=reused)
        outcome = self._records.outcomes[outcome.digest]
        if reused:
            self._repeats.discard(outcome.digest)
        self._records.drop_checkpoint(outcome.digest)
        self._halving.ended(outcome.digest, accuracy=_at_the_end(outcome) if self._is_own(outcome) else None)
        if not self._problem.is_table:
            self._proposer.tell(outcome)
            self._expect()
        self._tracker.finished(outcome)
        self._progress.finished(outcome, reused=reused)
        if self._keep == "front":
            self._drop_adapters_of(outcome.digest)
        self._changed()

    def lost(self, digest: str, reason: str, *, again: bool = True) -> None:
        """Notes that the platform took the training away, and proposes it again, at once or after all others.

        Raises StudyError where it is the third in a row without an evaluation or a result between.
        """
        proposal = replace(self._proposals.pop(digest), sampler_seconds=0.0)
        self._records.append_lost(digest, reason)
        self._progress.lost(digest, reason)
        self._losses[digest] += 1
        self._in_a_row += 1
        if self._in_a_row >= MOST_LOST:
            raise StudyError(
                f"{self._in_a_row} trainings in a row were lost, the last because {reason}: what was finished is "
                "kept; mend that, and the same command goes on"
            )
        if self._losses[digest] >= MOST_LOST:
            self.given_up[digest] = reason
        elif again and self._losses[digest] == 1:
            self._again.append(proposal)
        else:
            self._later.append(proposal)

    def tested(self, job: TestJob, score: Score) -> None:
        """Records what a training has on the test split, and tells MLflow."""
        self._records.append_tested(job.trial.digest, score)
        self._tracker.tested(self._records.outcomes[job.trial.digest])

    def settle(self) -> None:
        """The search is over: what is not on the front now will not come back to it, and no order can be obeyed."""
        self._refuse_orders("the search is over")
        if self._keep == "front":
            self._drop_adapters(self._records.points, searching=False)

    def _on_answered(self, point: Answered) -> None:
        self._records.append_answered(point.params, reason=point.reason, digest=point.digest, message=point.message)
        self._progress.answered(point.reason)

    def _drop_adapters_of(self, digest: str) -> None:
        """After a result: looks at its point and at those that were on the front before it came."""
        points = self._records.points
        changed = points.candidate_of(digest)
        unseen = {point for point in self._unseen if not points.is_on_front(points.at(point))}
        fallen = {*points.fallen(), *unseen, *self._beaten(changed)} - {changed.point}
        self._unseen = set()
        self._drop_adapters([changed, *map(points.at, sorted(fallen))], searching=True)

    def _beaten(self, changed: pareto.Candidate) -> list[str]:
        """Points that were the best of a one-line recipe until now."""
        beaten = []
        for name in baselines.recipes_of(changed) if changed.accuracy is not None else ():
            before = self._baselines.get(name)
            if before is None or before.point == changed.point or baselines.better(changed, before):
                self._baselines[name] = changed
                beaten += [before.point] if before else []
        return beaten

    def _drop_adapters(self, points: Iterable[pareto.Candidate], *, searching: bool) -> None:
        """Keeps one adapter for each point of the front: on a real model each is hundreds of megabytes.

        searching   while it goes on, all seeds of a point are kept that is on the front, the best of a one-line recipe,
                    or has repeats (its mean moves, and it may be back): the test split is to be evaluated with them
        """
        to_be_tested = {candidate.point for candidate in self._baselines.values()}
        for point in points:
            runs = [run for run in point.by_accuracy if run.adapter]
            on_front = self._records.points.is_on_front(point)
            kept = []
            if searching and not self._problem.is_table:
                kept = runs if on_front or len(point.runs) > 1 or point.point in to_be_tested else []
            elif searching or on_front:
                kept = [run for run in runs if self._records.has_adapter(run.digest)][:1]
            for run in runs:
                if run not in kept:
                    self._records.drop_adapter(run.digest)


def _at_the_end(outcome: Outcome) -> float | None:
    """Accuracy of a training that is complete: one that was stopped has no end to compare with."""
    return outcome.accuracy if outcome.status == "complete" else None
