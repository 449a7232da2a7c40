"""Who proposes points: Optuna's ask and tell, with repeats and impossible points answered on the spot.

Trainable parameters are exact and known before training, and many points resolve to one allocation. So a proposal is
resolved first; what is infeasible, over budget or already trained is told to the sampler at once and never reaches a
worker. Pure Python over Optuna: no Ray.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from allocators.core.errors import BudgetError, InfeasibleError, SpaceError, StudyError
from allocators.core.types import Outcome, Point, Trial
from search.front import front
from search.points.starting import UPDATES, starting_points
from search.problem import Problem, Proposal, corners
from search.propose import RUN, STDERR
from search.records import Answered, Reason

log = logging.getLogger(__name__)

# Successive repeats after which plain random points are drawn, and after which the space counts as used up.
PATIENCE = 25
EXHAUSTED = 400

MOST_TOLD = 1_000  # trials that Optuna keeps; up to twice as many before the oldest are forgotten


def _ehvi(problem: Problem, seed: int, *, repeats: bool, expected: Mapping[str, float]) -> Any:
    from search.propose.candidates import resolver  # brings numpy and scipy, which no other sampler needs
    from search.propose.ehvi import EHVISampler

    return EHVISampler(resolver(problem, repeats=repeats), expected=expected, seed=seed)


def expected(starting: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What a search expects of the settings that say how large updates are: the recipe of its first starting point."""
    return {name: float(value) for point in starting[:1] for name, value in point.items() if name in UPDATES}


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
    """Two objectives, accuracy up and trainable parameters down, over one space.

    sampler    ehvi (models accuracy alone: `propose/ehvi.py`) | gp (Optuna's GPSampler, which models both objectives;
               knobs that not every branch of a space has are drawn at random) | tpe (multivariate, grouped:
               conditional spaces keep one joint model a branch) | nsga2 | random
    known      results of an earlier run with their parameters: the sampler learns them, none is trained again
    unfinished points that an earlier run started and did not finish: proposed first
    repeats    a point that is proposed again is trained again, with the next of its seeds (`seeds=auto`); else it is
               answered with the result that it has, as it is where no seed is left
    trust      sampler=ehvi keeps near the recipe of the starting points as long as few results say where to go
    draws      seed of what is drawn; None: the study's own
    answered   called with every point that needed no training
    """

    def __init__(
        self,
        problem: Problem,
        *,
        sampler: str = "ehvi",
        known: Sequence[tuple[Outcome, Mapping[str, Any]]] = (),
        unfinished: Iterable[Proposal] = (),
        repeats: bool = False,
        trust: bool = True,
        draws: int | None = None,
        answered: Callable[[Answered], None] = lambda _: None,
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        self._problem = problem
        self._answered = answered
        # A rerun must not walk through the points of the first run again: its draws start elsewhere.
        seed = (problem.seed if draws is None else draws) + 7919 * len(known)
        self._starting = starting_points(problem)
        trusted = expected(self._starting) if trust else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._random = optuna.samplers.RandomSampler(seed=seed)
            self._sampler = {
                "ehvi": lambda: _ehvi(problem, seed, repeats=repeats, expected=trusted),
                "gp": lambda: optuna.samplers.GPSampler(seed=seed, warn_independent_sampling=False),
                "tpe": lambda: optuna.samplers.TPESampler(multivariate=True, group=True, seed=seed),
                "nsga2": lambda: optuna.samplers.NSGAIISampler(seed=seed, population_size=10),
                "random": lambda: self._random,
            }[sampler]()
        self._study = optuna.create_study(directions=["maximize", "minimize"], sampler=self._sampler)
        self._finished: dict[str, Outcome] = {}
        self._told = 0  # Optuna trials of the study, about
        self._running: dict[str, list[Any]] = {}  # digest -> Optuna trials that wait for its result
        self._unfinished = list(unfinished)
        self._repeats = repeats
        self._seeds: dict[str, set[int]] = {}  # point -> the seeds that it was tried with
        for outcome, _ in known:
            self._finished[outcome.digest] = outcome
            self._seeds.setdefault(outcome.trial.point, set()).add(outcome.trial.seed)
        self._learn(known)

    def _learn(self, known: Sequence[tuple[Outcome, Mapping[str, Any]]]) -> None:
        """Optuna's trials of recorded results, as if they had been proposed and told; without asking its sampler."""
        from search.propose.trials import Repeating

        self._study.sampler = self._random  # until a point is asked for
        for outcome, params in known:
            state, values = self._ending(outcome)
            given = Repeating(params)
            try:
                self._problem.ask(given)
                self._study.add_trial(
                    self._optuna.trial.create_trial(
                        state=state,
                        values=values,
                        params=given.params,
                        distributions=given.distributions,
                        user_attrs=_attributes(outcome),
                    )
                )
                self._told += 1
            except (
                SpaceError,
                ValueError,
                KeyError,
                TypeError,
            ):  # not as this space has them
                for trial in self._asked_before(params):
                    self._tell(trial, outcome)
        if hasattr(self._sampler, "learn"):
            self._sampler.learn(self._study)  # all of them, before the oldest are forgotten

    def _forget(self) -> None:
        """A new study of Optuna's with the front, the latest trials and those under way.

        Optuna and its samplers look at every trial whenever they are asked, so that what a proposal costs would grow
        with the results. A model does not need them all; NSGA-II needs the latest.
        """
        if self._told < 2 * MOST_TOLD:
            return
        old = self._study.get_trials(deepcopy=False)
        complete = self._optuna.trial.TrialState.COMPLETE
        scored = [_Scored(t.number, int(t.values[1]), t.values[0]) for t in old if t.state == complete]
        kept = {scored.number for scored in front(scored)} | {trial.number for trial in old[-MOST_TOLD:]}
        under_way = {trial.number for trials in self._running.values() for trial in trials}
        self._study = self._optuna.create_study(directions=["maximize", "minimize"], sampler=self._random)
        again: dict[int, Any] = {}
        for trial in old:
            if trial.number in kept or trial.number in under_way:
                self._study.add_trial(trial)
                if trial.number in under_way:
                    copied = self._study.get_trials(deepcopy=False)[-1]
                    again[trial.number] = self._optuna.trial.Trial(self._study, copied._trial_id)
        self._running = {digest: [again[t.number] for t in trials] for digest, trials in self._running.items()}
        self._told = len(self._study.get_trials(deepcopy=False))

    def propose(self) -> Proposal | None:
        """The next point that has to be trained; None when the space has nothing new."""
        self._forget()
        if self._unfinished:
            proposal = self._unfinished.pop(0)
            self._begin(proposal.trial, self._asked_before(proposal.params))
            return proposal
        began = time.monotonic()
        for attempt in range(EXHAUSTED):
            self._study.sampler = self._sampler if attempt < PATIENCE else self._random
            given = self._starting.pop(0) if self._starting else None
            if (found := self._resolved(given, began)) is not None:
                return found
        return None

    def propose_this(self, params: Mapping[str, Any]) -> Proposal | None:
        """A point that was asked for, which the sampler learns like its own; None where it needs no training."""
        self._forget()
        return self._resolved(params, time.monotonic())

    def _resolved(self, given: Mapping[str, Any] | None, began: float) -> Proposal | None:
        """One point of the sampler, or the given one; None where it was answered without training."""
        trial, point, params = self._ask(given)
        try:
            resolved, cost = self._problem.resolve(point)
        except (InfeasibleError, BudgetError) as error:
            # A violated constraint, not a failure: the sampler learns to stay away.
            trial.set_constraint("feasible", 1.0)
            self._study.tell(trial, state=self._optuna.trial.TrialState.PRUNED)
            self._answered(_refused(params, error))
            return None
        if self._repeats and not given:
            resolved = self._next_run(resolved)
        digest = resolved.digest
        if digest in self._finished:
            self._tell(trial, self._finished[digest])
            if given:  # a rerun meets its own starting points again: not worth a record
                return None
        elif digest in self._running:
            self._running[digest].append(trial)
        else:
            self._begin(resolved, [trial])
            return Proposal(resolved, cost, params, time.monotonic() - began)
        self._answered(_repeated(params, digest))
        return None

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
        self._told += 1
        return trial, *self._problem.ask(trial)

    def _asked_before(self, params: Mapping[str, Any]) -> list[Any]:
        """Optuna's trial of recorded parameters; none where the space cannot have them: the sampler then misses one."""
        try:
            return [self._ask(params)[0]]
        except SpaceError as error:
            log.warning("the sampler does not learn from recorded parameters that this space cannot have: %s", error)
            self._study.tell(len(self._study.trials) - 1, state=self._optuna.trial.TrialState.FAIL)
            return []

    def _tell(self, trial: Any, outcome: Outcome) -> None:
        for name, value in _attributes(outcome).items():
            trial.set_user_attr(name, value)
        state, values = self._ending(outcome)
        self._study.tell(trial, values, state=state)

    def _ending(self, outcome: Outcome) -> tuple[Any, tuple[float, int] | None]:
        """How Optuna's trial ends, and with which values."""
        states = self._optuna.trial.TrialState
        if outcome.status == "stopped":
            # Worse than its rivals, but its accuracy is not that of a whole training: on no front, whatever it was.
            return states.PRUNED, None
        if outcome.accuracy is None:
            return states.FAIL, None
        return states.COMPLETE, (outcome.accuracy, outcome.trainable_params)


def _attributes(outcome: Outcome) -> dict[str, Any]:
    """What an Optuna trial says of its training."""
    error = outcome.rungs[-1].stderr if outcome.rungs else None
    return {RUN: outcome.digest} | ({} if error is None else {STDERR: error})


class _Scored(NamedTuple):
    """A trial of Optuna's, as fronts are made of."""

    number: int
    trainable_params: int
    accuracy: float | None
