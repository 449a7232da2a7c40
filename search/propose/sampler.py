"""Who proposes points: Optuna's ask and tell, with repeats and impossible points answered on the spot.

Trainable parameters are exact and known before training, and many points resolve to one allocation. So a proposal is
resolved first; what is infeasible, over budget or already trained is told to the sampler at once and never reaches a
worker. Pure Python over Optuna: no Ray.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from allocators.core.errors import BudgetError, InfeasibleError, SpaceError, StudyError
from allocators.core.types import Outcome, Point, Trial
from search.front import unbeaten
from search.points.starting import RANK, UPDATES, starting_points
from search.problem import Problem, Proposal, corners
from search.propose import RUN, STDERR, TEXT_STDERR
from search.records import Answered, Reason

log = logging.getLogger(__name__)

# Successive repeats after which plain random points are drawn, and after which the space counts as used up.
PATIENCE = 25
EXHAUSTED = 400

MOST_TOLD = 1_000  # trials that Optuna keeps; up to twice as many before the oldest are forgotten


def expected(starting: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What a search expects of the settings that say how large updates are: the recipe of its first starting point.

    The rank is that at which it expects so.
    """
    names = (*UPDATES, RANK)
    return {name: float(value) for point in starting[:1] for name, value in point.items() if name in names}


def table_rows(problem: Problem, *, merge: bool = True) -> list[Proposal | Answered]:
    """Every point of a table space in the order of its knobs: to be trained, or answered because it cannot be.

    merge   a row with the allocation of an earlier one is answered as its duplicate

    Raises StudyError where a knob is a range of numbers: there is no "every point" of that.
    """
    points = list(corners(problem))
    if points != list(corners(problem, high=True)):
        raise StudyError(f"space {problem.space_name} is a TABLE, so all of its knobs must be categorical")
    rows: list[Proposal | Answered] = []
    seen: set[str] = set()
    for point, params in points:
        try:
            trial, cost = problem.resolve(point)
        except (InfeasibleError, BudgetError) as error:
            rows.append(_refused(params, error))
            continue
        if merge and trial.digest in seen:
            rows.append(_repeated(params, trial.digest))
        else:
            rows.append(Proposal(trial, cost, params))
        seen.add(trial.digest)
    return rows


def _refused(params: Mapping[str, Any], error: InfeasibleError | BudgetError) -> Answered:
    reason: Reason = "over_budget" if isinstance(error, BudgetError) else "infeasible"
    return Answered(params, reason, None, str(error))


def _repeated(params: Mapping[str, Any], digest: str) -> Answered:
    return Answered(params, "duplicate", digest, "same allocation, recipe and seed")


class Proposer:
    """Two objectives, accuracy up and trainable parameters down, over one space; forgetting down may be a third.

    What is proposed follows from what was proposed and answered before, in that order, and from the results. Whoever
    goes on with a study says all of it first: `recall` and `recall_answered` for what was asked, `tell` for a result.

    sampler    ehvi (models accuracy alone: `propose/ehvi.py`) | gp (Optuna's GPSampler, which models both objectives;
               knobs that not every branch of a space has are drawn at random) | tpe (multivariate, grouped:
               conditional spaces keep one joint model a branch) | nsga2 | random
    repeats    a point that is proposed again is trained again, with the next of its seeds (`seeds=auto`); else it is
               answered with the result that it has, as it is where no seed is left
    trust      sampler=ehvi keeps near the recipe of the starting points as long as few results say where to go
    draws      seed of what is drawn; None: the study's own
    allows     whether a result may be on the front by what was forgotten; else it counts as one that failed
    of_three   forgetting is an objective
    answered   called with every point that needed no training
    """

    def __init__(
        self,
        problem: Problem,
        *,
        sampler: str = "ehvi",
        repeats: bool = False,
        trust: bool = True,
        draws: int | None = None,
        allows: Callable[[Outcome], bool] = lambda _: True,
        of_three: bool = False,
        answered: Callable[[Answered], None] = lambda _: None,
    ) -> None:
        import optuna

        from search.propose.draws import Draws

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        self._problem = problem
        self._answered = answered
        self._allows = allows
        self._starting = starting_points(problem)
        self._draws = Draws(
            sampler,
            problem,
            seed=problem.seed if draws is None else draws,
            repeats=repeats,
            expected=expected(self._starting) if trust else {},
            of_three=of_three,
        )
        self._idle = self._draws.at_random(0)  # the sampler of a study that asks for nothing
        self._of_three = of_three
        self._study = self._new_study()
        self._asked = 0  # questions so far
        self._in_vain = 0  # of these, the last ones whose answer was no training
        self._finished: dict[str, Outcome] = {}
        self._told = 0  # Optuna trials of the study, about
        self._running: dict[str, list[Any]] = {}  # digest -> Optuna trials that wait for its result
        self._repeats = repeats
        self._seeds: dict[str, set[int]] = {}  # point -> the seeds that it was tried with

    def _new_study(self) -> Any:
        minimised: list[Literal["maximize", "minimize"]] = ["minimize"] * (2 if self._of_three else 1)
        return self._optuna.create_study(directions=["maximize", *minimised], sampler=self._idle)

    def recall(self, run: Trial, params: Mapping[str, Any]) -> None:
        """Takes in what was proposed in an earlier run, without asking the sampler."""
        self._begin(run, self._recalled(params))
        self._in_vain = 0

    def recall_answered(self, point: Answered) -> None:
        """Takes in what was answered without training in an earlier run."""
        for trial in self._recalled(point.params):
            if point.digest in self._finished or point.digest in self._running:
                self._repeat(trial, point.digest)
            else:
                self._refuse(trial)
        self._in_vain += 1

    def _recalled(self, params: Mapping[str, Any]) -> list[Any]:
        """Optuna's trial of recorded parameters; none where this space cannot have them: the sampler then misses it."""
        from search.propose.trials import Repeating

        _, own = self._next_question(params)
        self._study.sampler, given = self._idle, Repeating(params)
        try:
            self._problem.ask(given)
            frozen = self._optuna.trial.create_trial(
                state=self._optuna.trial.TrialState.RUNNING, params=given.params, distributions=given.distributions
            )
            if own:
                self._draws.before(self._study)
            self._study.add_trial(frozen)
        except (SpaceError, StudyError, ValueError, KeyError, TypeError) as error:
            log.warning("the sampler does not learn from recorded parameters that this space cannot have: %s", error)
            return []
        added = self._study.get_trials(deepcopy=False)[-1]
        self._draws.after(self._study, added.number)
        return [self._optuna.trial.Trial(self._study, added._trial_id)]

    def _next_question(self, given: Mapping[str, Any] | None = None) -> tuple[Mapping[str, Any] | None, bool]:
        """The starting point that is to be tried now, if any; and whether the study's own sampler is asked.

        given   parameters that the answer has: a point that somebody asked for takes no starting point's turn
        """
        if self._in_vain % EXHAUSTED == 0:
            self._forget()
        self._asked += 1
        self._told += 1
        turn = self._starting and (given is None or self._is(self._starting[0], given))
        starting = self._starting.pop(0) if turn else None
        return starting, starting is None and self._in_vain % EXHAUSTED < PATIENCE

    def _is(self, starting: Mapping[str, Any], params: Mapping[str, Any]) -> bool:
        """Whether parameters are those of a starting point, but for pins."""
        return all(name in self._problem.pins or params.get(name, value) == value for name, value in starting.items())

    def _forget(self) -> None:
        """A new study of Optuna's with the front, the latest trials and those under way.

        Optuna and its samplers look at every trial whenever they are asked, so that what a proposal costs would grow
        with the results. A model does not need them all; NSGA-II needs the latest.
        """
        if self._told < 2 * MOST_TOLD:
            return
        old = self._study.get_trials(deepcopy=False)
        complete = self._optuna.trial.TrialState.COMPLETE
        scored = [trial for trial in old if trial.state == complete]
        on_front = unbeaten([trial.values for trial in scored])
        kept = {trial.number for trial, on in zip(scored, on_front, strict=True) if on}
        kept |= {trial.number for trial in old[-MOST_TOLD:]}
        under_way = {trial.number for trials in self._running.values() for trial in trials}
        self._study = self._new_study()
        again: dict[int, Any] = {}
        for trial in old:
            if trial.number in kept or trial.number in under_way:
                self._study.add_trial(self._draws.moved(trial))
                if trial.number in under_way:
                    copied = self._study.get_trials(deepcopy=False)[-1]
                    again[trial.number] = self._optuna.trial.Trial(self._study, copied._trial_id)
        self._running = {digest: [again[t.number] for t in trials] for digest, trials in self._running.items()}
        self._told = len(self._study.get_trials(deepcopy=False))

    def propose(self) -> Proposal | None:
        """The next point that has to be trained; None when the space has nothing new."""
        began = time.monotonic()
        while True:
            starting, own = self._next_question()
            self._study.sampler = (self._draws.of if own else self._draws.at_random)(self._asked)
            trial, point, params = self._ask(starting)
            if not own:  # NSGA-II has placed its own
                self._draws.after(self._study, trial.number)
            try:
                resolved, cost = self._problem.resolve(point)
            except (InfeasibleError, BudgetError) as error:
                self._refuse(trial)
                self._answered(_refused(params, error))
            else:
                if self._repeats and not starting:
                    first, resolved = resolved, self._next_run(resolved)
                    if resolved.allocation != first.allocation:
                        cost = self._problem.cost(resolved)
                digest = resolved.digest
                if digest not in self._finished and digest not in self._running:
                    self._begin(resolved, [trial])
                    self._in_vain = 0
                    return Proposal(resolved, cost, params, time.monotonic() - began)
                self._repeat(trial, digest)
                self._answered(_repeated(params, digest))
            self._in_vain += 1
            if self._in_vain % EXHAUSTED == 0:
                return None

    def propose_this(self, params: Mapping[str, Any]) -> Proposal | None:
        """A point that was asked for, which the sampler learns like its own; None where it needs no training.

        params   all of the point's, pinned ones included
        """
        from search.propose.trials import Repeating

        trials = self._recalled(params)
        resolved, cost = self._problem.resolve(self._problem.ask(Repeating(params))[0])
        if resolved.digest in self._finished or resolved.digest in self._running:
            for trial in trials:
                self._repeat(trial, resolved.digest)
            self._answered(_repeated(params, resolved.digest))
            self._in_vain += 1
            return None
        self._begin(resolved, trials)
        self._in_vain = 0
        return Proposal(resolved, cost, params)

    def _refuse(self, trial: Any) -> None:
        """A violated constraint, not a failure: the sampler learns to stay away."""
        trial.set_constraint("feasible", 1.0)
        self._study.tell(trial, state=self._optuna.trial.TrialState.PRUNED)

    def _repeat(self, trial: Any, digest: str) -> None:
        """The trial has the result of a training that was proposed before, now or when it has one."""
        if digest in self._finished:
            self._tell(trial, self._finished[digest])
        else:
            self._running[digest].append(trial)

    def _next_run(self, trial: Trial) -> Trial:
        """The same point with the first seed that it was not tried with; as it is where there is none."""
        tried = self._seeds.get(trial.point, set())
        seed = next((seed for seed in self._problem.seeds_of(trial) if seed not in tried), trial.seed)
        return self._problem.repeat(trial, seed)

    def _begin(self, run: Trial, trials: list[Any]) -> None:
        """Optuna's trials wait for the result of a training."""
        self._running[run.digest] = trials
        self._seeds.setdefault(run.point, set()).add(run.seed)
        for trial in trials:
            trial.set_user_attr(RUN, run.digest)

    def tell(self, outcome: Outcome) -> None:
        """Takes the result of a proposed point, for it and for every repeat of it."""
        self._finished[outcome.digest] = outcome
        for trial in self._running.pop(outcome.digest, []):
            self._tell(trial, outcome)

    def _ask(self, params: Mapping[str, Any] | None) -> tuple[Any, Point, dict[str, Any]]:
        """Optuna's trial, the space's point and its parameters; given parameters are taken instead of drawn."""
        if params is not None:
            self._study.enqueue_trial(dict(params))
        trial = self._study.ask()
        return trial, *self._problem.ask(trial)

    def _tell(self, trial: Any, outcome: Outcome) -> None:
        for name, value in _attributes(outcome).items():
            trial.set_user_attr(name, value)
        state, values = self._ending(outcome)
        self._study.tell(trial, values, state=state)

    def _ending(self, outcome: Outcome) -> tuple[Any, tuple[float, ...] | None]:
        """How Optuna's trial ends, and with which values."""
        states = self._optuna.trial.TrialState
        if outcome.status == "stopped":
            # Worse than its rivals, but its accuracy is not that of a whole training: on no front, whatever it was.
            return states.PRUNED, None
        if outcome.accuracy is None or not self._allows(outcome):
            return states.FAIL, None
        values = (outcome.accuracy, float(outcome.trainable_params))
        if not self._of_three:
            return states.COMPLETE, values
        return (states.COMPLETE, (*values, lost.rise)) if (lost := outcome.forgetting) else (states.FAIL, None)


def _attributes(outcome: Outcome) -> dict[str, Any]:
    """What an Optuna trial says of its training."""
    error = outcome.rungs[-1].stderr if outcome.rungs else None
    text_error = outcome.forgetting.stderr if outcome.forgetting else None
    errors = {STDERR: error, TEXT_STDERR: text_error}
    return {RUN: outcome.digest} | {name: value for name, value in errors.items() if value is not None}
