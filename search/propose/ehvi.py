"""An Optuna sampler for two objectives of which one is known before training: only accuracy is modelled.

    sampler = EHVISampler(resolver(problem), seed=0)              # `sampler=ehvi` on the command line
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)

Trainable parameters are an exact function of a point. So candidates are drawn from the space itself, whatever its
conditions are, resolved, counted and stripped of impossible points (`candidates.py`); a Gaussian process that knows the
noise of its results predicts their accuracy (`model.py`); the one with the largest expected hypervolume improvement is
proposed (`criterion.py`). Where points may have more than one run, to try one again with another seed is a candidate
like any other. Trials under way count as if they had ended as predicted, so that workers who ask at the same time are
sent to different places.

Legend  N trained or running points, M candidates, R points that may be tried again, D inputs of the model.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from allocators.core.errors import BudgetError, InfeasibleError
from search.front import Unbeaten
from search.propose import RUN, STDERR
from search.propose.candidates import Candidate, Drawing, Known, candidate, matrix
from search.propose.criterion import Landscape, expected_gain_of_repeats, expected_hypervolume_improvement, learnt
from search.propose.model import AccuracyModel, Array, Results
from search.propose.trials import Repeating

START = 5  # results, starting points included, before a model is worth fitting
DRAWN = 100  # candidates drawn anew for a suggestion; those of earlier suggestions stay
NEAR = 100  # candidates drawn near members of the front
MOST = 4000  # candidates kept
MOST_FITTED = 400  # points that the model is fitted to: fitting costs the cube of their number
LATEST = 0.25  # of these, the share that is kept as the latest: runs under way are among them
BELIEF = 8.0  # results that weigh as much as what is expected of the recipe
FACTOR = 2.0  # by which an expected value may be wrong, as a standard deviation


RUNNING, LOST = "running", "lost"  # a run without an accuracy: not yet, or stopped early; failed


@dataclass(eq=False)
class Tried:
    """A point and its runs.

    number     how many points were tried before it
    runs       by name: the accuracy of one that ended with one, else RUNNING or LOST
    question   largest variance of an accuracy over the questions
    """

    point: Candidate
    number: int
    runs: dict[str, float | str] = field(default_factory=dict)
    question: float = 0.0

    def take(self, run: str, trial: FrozenTrial) -> None:
        """What is known of a run now."""
        match trial.state:
            case TrialState.COMPLETE:
                self.runs[run] = trial.values[0]
                self.question = max(self.question, trial.user_attrs.get(STDERR, 0.0) ** 2)
            case TrialState.FAIL:
                self.runs[run] = LOST
            case _:
                self.runs[run] = RUNNING

    @property
    def accuracies(self) -> list[float]:
        """Of the runs that ended with one."""
        return [run for run in self.runs.values() if isinstance(run, float)]

    @property
    def running(self) -> int:
        """Runs that have no result yet, or will have none (stopped early): the place needs no second look."""
        return sum(run == RUNNING for run in self.runs.values())

    @property
    def lost(self) -> int:
        """Runs that failed."""
        return sum(run == LOST for run in self.runs.values())

    @property
    def mean(self) -> float:
        """Mean accuracy of the runs that have one."""
        accuracies = self.accuracies
        return math.fsum(accuracies) / len(accuracies)


class Memory:
    """All points that were tried, kept up to date: what is new costs what it is, whatever is known already.

    fitted   by key the points that the model is fitted to, in the order in which they were tried: all of them as long
             as they are no more than `most`. Then one has to go for every new one: of two at random the one that
             is farther below the front. Members of the front stay, and the latest. So the model sees most of the points
             where a gain is to be made, and some of all others
    done     points that have an accuracy; `heard` those that have a result, an accuracy or none
    """

    def __init__(self, recall: Callable[[FrozenTrial], Candidate | None], *, seed: int, most: int) -> None:
        self._recall = recall
        self._most = most
        self._random = random.Random(seed)
        self._study: Study | None = None
        self._read = 0
        self._open: dict[int, tuple[Tried, str]] = {}  # by number of the Optuna trial the runs under way
        self._front = Unbeaten[Tried]()
        self._worst = math.inf
        self.tried: dict[str, Tried] = {}
        self.fitted: dict[str, Tried] = {}
        self.done = self.heard = 0

    def update(self, study: Study, number: int) -> list[str]:
        """Takes in what became of the study's trials since the last time, `number` aside; keys of the new points."""
        if study is not self._study:  # the same trials, numbered anew
            self._study, self._read, self._open = study, 0, {}
        trials, known = study.get_trials(deepcopy=False), len(self.tried)
        for place in [place for place in self._open if trials[place].state != TrialState.RUNNING]:
            self._take(*self._open.pop(place), trials[place])
        while self._read < len(trials) and trials[self._read].state != TrialState.WAITING:
            past, self._read = trials[self._read], self._read + 1
            if past.number == number:
                self._read -= 1
                break
            if (point := self._recall(past)) is not None:
                self._read_one(point, past)
        return list(itertools.islice(reversed(self.tried), len(self.tried) - known))

    def _read_one(self, point: Candidate, past: FrozenTrial) -> None:
        """A trial that is read for the first time."""
        key = point.known.key
        run = past.user_attrs.get(RUN, key)
        tried = self.tried.setdefault(key, Tried(point, len(self.tried)))
        if tried.runs.get(run, RUNNING) != RUNNING or any((tried, run) == one for one in self._open.values()):
            return  # taken in before: it was not trained again, and says nothing of noise
        if past.state == TrialState.RUNNING:
            self._open[past.number] = (tried, run)
        self._take(tried, run, past)

    def _take(self, tried: Tried, run: str, past: FrozenTrial) -> None:
        key = tried.point.known.key
        before = bool(tried.accuracies), bool(tried.accuracies or tried.lost)
        tried.take(run, past)
        self.done += bool(tried.accuracies) - before[0]
        self.heard += bool(tried.accuracies or tried.lost) - before[1]
        if tried.accuracies:
            self._worst = min(self._worst, tried.mean)
            self._front.put(key, tried, cost=tried.point.known.cost, accuracy=tried.mean, number=tried.number)
        self.fitted[key] = tried
        if len(self.fitted) > self._most:
            self._leave_one_out()

    def _leave_one_out(self) -> None:
        older = list(self.fitted)[: -math.ceil(LATEST * self._most)]
        older = self._random.sample(older, len(older))
        others = [key for key in older if key not in self._front]
        del self.fitted[max((others or older)[:2], key=self._shortfall)]

    def _shortfall(self, key: str) -> float:
        """How far a point lies below the front; one without an accuracy as far as the worst would."""
        one = self.fitted[key]
        return self._front.height(one.point.known.cost) - (one.mean if one.accuracies else self._worst)

    @property
    def front(self) -> list[Tried]:
        """Points that are more accurate, by the mean of their runs, than all that cost no more."""
        return _front(self._front)


class EHVISampler(BaseSampler):
    """Proposes the point with the largest expected hypervolume improvement in (log trainable parameters, accuracy).

    resolve   runs the space on a trial and says what is known of its point; raises InfeasibleError or BudgetError
              where there is none
    expected  by name of a parameter, the value above 0 that is expected to be about right: points far from it have to
              promise more, the less the more results there are
    seed      of everything that is drawn
    fitted    points that the model is fitted to at most; 0: MOST_FITTED

    The study's objectives are accuracy, maximised, and trainable parameters, minimised. Parameters count by their
    logarithm: a front spans decades, and on a linear axis nearly all of the area belongs to its largest points.
    """

    def __init__(
        self,
        resolve: Callable[[Any], Known],
        *,
        expected: Mapping[str, float] = MappingProxyType({}),
        seed: int = 0,
        fitted: int = 0,
    ) -> None:
        self._resolve = resolve
        self._expected = expected
        self._random = np.random.default_rng(seed)
        self._independent = RandomSampler(seed=seed)
        self._model = AccuracyModel()
        self._memory = Memory(self._recall, seed=seed, most=fitted or MOST_FITTED)
        self._pool: dict[str, Candidate] = {}
        self._recalled: dict[tuple[tuple[str, Any], ...], Candidate | None] = {}  # by parameters
        self._chosen: Candidate | None = None

    def learn(self, study: Study) -> None:
        """Takes in all trials that the study has; else that is done when a point is asked for."""
        for key in self._memory.update(study, -1):
            self._pool.pop(key, None)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Chooses the point; Optuna asks for its parameters first, then for their values."""
        if study.directions != [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE]:
            raise ValueError(f"EHVISampler maximises accuracy and minimises parameters, not {study.directions}")
        self._chosen = self._choose(study, trial.number)
        return dict(self._chosen.distributions) if self._chosen else {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Values of the chosen point; empty before there is a model, when values are drawn one by one."""
        return dict(self._chosen.params) if self._chosen else {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Parameters that the chosen point lacks: those of partly fixed trials, or of a space that is used up."""
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def _choose(self, study: Study, number: int) -> Candidate | None:
        """The best candidate; None where the space seems to have none."""
        memory = self._memory
        new = memory.update(study, number)
        self._widen([each.point for each in memory.front], new)
        fresh = list(self._pool.values())
        again = [each for each in memory.fitted.values() if each.accuracies and len(each.runs) < each.point.known.seeds]
        if memory.done < START or not (fresh or again):
            return self._drawn(fresh, memory.done) if fresh else None
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1):  # the other cores train
            gain = self._gain(fresh, again, list(memory.fitted.values()))
        points = [*fresh, *(each.point for each in again)]
        return points[int((gain * self._trust(points, memory.done)).argmax())]

    def _drawn(self, fresh: Sequence[Candidate], results: int) -> Candidate:
        """A point at random, sooner one that lies near what is expected."""
        if not self._expected:
            return fresh[int(self._random.integers(len(fresh)))]
        trust_M = self._trust(fresh, max(results, 1))
        return fresh[int(self._random.choice(len(fresh), p=trust_M / trust_M.sum()))]

    def _trust(self, points: Sequence[Candidate], results: int) -> Array:
        """What the gain of each point counts, relative to the others, for lying near what is expected. Shape [M].

        π(x)^(β / results) with π(x) = Π N(ln x; ln expected, (ln FACTOR)²) and β = BELIEF: πBO (Hvarfner et al. 2022,
        arXiv:2204.11051). A model of a dozen results is full of doubt wherever nothing was tried, and would look for
        improvement there: at rates at which nothing is learnt.
        """
        distance_M = np.zeros(len(points))
        for name, expected in self._expected.items():
            values_M = np.array([float(point.params.get(name, expected)) for point in points])
            distance_M += (np.log(np.maximum(values_M, 1e-300) / expected) / math.log(FACTOR)) ** 2
        trust_M: Array = np.exp(-0.5 * BELIEF / results * (distance_M - distance_M.min()))
        return trust_M

    def _gain(self, fresh: Sequence[Candidate], again: Sequence[Tried], tried: Sequence[Tried]) -> Array:
        """Expected gain of hypervolume by every new candidate, and by every point tried again. Shape [M + R].

        Where points may be tried again, both are gains of the front of posterior means by one training, which moves the
        mean of a new point by less than its doubt. Where they may not, the result of a training is all that will ever
        be known of its point, and a new point counts with all of its doubt.
        """
        done = [each for each in tried if each.accuracies]
        lost = [each for each in tried if not each.accuracies and each.lost]
        tried = [*done, *lost, *(each for each in tried if not each.accuracies and not each.lost)]
        worst = _floor(np.array([each.mean for each in done]))
        x = matrix([*(each.point for each in tried), *fresh])
        x_ND, x_MD = x[: len(tried)], x[len(tried) :]
        results, height_N = self._learn(x_ND, tried, worst, heard=len(done) + len(lost))
        cost_N, cost_M = _costs([each.point for each in tried]), _costs(fresh)
        there = Landscape(cost_N, height_N, (_beyond(np.concatenate((cost_N, cost_M))), worst))
        gain_M, gain_R = np.empty(0), np.empty(0)
        if fresh:
            mean_M, std_M = self._model.predict(x_MD)
            if fresh[0].known.seeds > 1:
                std_M = learnt(std_M, np.inf, self._model.noise_of_a_run(results))
            gain_M = expected_hypervolume_improvement(mean_M, std_M, cost_M, there)
        if again:
            place = {each.point.known.key: number for number, each in enumerate(tried)}
            which_R = np.array([place[each.point.known.key] for each in again])
            std_N = self._model.predict(x_ND)[1]
            std_N = learnt(std_N, self._model.noise(results), self._model.noise(results.with_runs(1)))
            gain_R = expected_gain_of_repeats(std_N[which_R], which_R, there)
        return np.concatenate((gain_M, gain_R))

    def _learn(self, x_ND: Array, tried: Sequence[Tried], worst: float, *, heard: int) -> tuple[Results, Array]:
        """Fits the model to the first `heard` points; then it holds runs under way for ended as predicted.

        Nothing new is learnt by that, but less is left to learn there. Gives what the model then holds for results,
        and the heights of the front.
        """
        results = Results.of(
            [[max(each, worst) for each in one.accuracies] or [worst] * bool(one.lost) for one in tried],
            [one.question for one in tried],
        )
        self._model.fit(x_ND[:heard], results.first(heard), of=max(self._memory.heard, heard))
        height_N, _ = self._model.predict(x_ND)
        running_N = np.array([float(one.running) for one in tried])
        if running_N.any():
            results = results.supposing(running_N, height_N)
            self._model.condition(x_ND, results)
        return results, height_N

    def _recall(self, past: FrozenTrial) -> Candidate | None:
        """An earlier trial's point; None where it is none (impossible, over the budget, not of this space)."""
        params = tuple(past.params.items())
        if params not in self._recalled:
            try:
                self._recalled[params] = candidate(Repeating(past.params), self._resolve)
            except (InfeasibleError, BudgetError, KeyError):
                self._recalled[params] = None
        return self._recalled[params]

    def _widen(self, front: Sequence[Candidate], new: Iterable[str]) -> None:
        """Draws more candidates, anywhere and near the front; drops what was tried (`new`: since) and the oldest."""
        drawn = [self._draw(None) for _ in range(DRAWN)]
        for _ in range(NEAR if front else 0):
            drawn.append(self._draw(front[int(self._random.integers(len(front)))].params))
        tried = [key for key in drawn if key in self._memory.tried]
        for key in [*new, *tried, *itertools.islice(self._pool, max(len(self._pool) - MOST, 0))]:
            self._pool.pop(key, None)

    def _draw(self, parent: Mapping[str, Any] | None) -> str | None:
        """Adds a candidate; gives its key."""
        try:
            point = candidate(Drawing(self._random, parent), self._resolve)
        except (InfeasibleError, BudgetError):
            return None
        return self._pool.setdefault(point.known.key, point).known.key


def _front(done: Iterable[Tried]) -> list[Tried]:
    """Points that are more accurate, by the mean of their runs, than all that cost no more."""
    front, best = [], -math.inf
    for each in sorted(done, key=lambda each: (each.point.known.cost, -each.mean)):
        if each.mean > best:
            front.append(each)
            best = each.mean
    return front


def _costs(points: Sequence[Candidate]) -> Array:
    """Logarithms of their trainable parameters."""
    logarithms: Array = np.log([max(point.known.cost, 1) for point in points])
    return logarithms


def _beyond(cost: Array) -> float:
    """The reference cost, a tenth of the range beyond the largest, in logarithms; a tenth where the range is small.

    Where all cost the same the improvement is that of accuracy alone.
    """
    return float(cost.max() + 0.1 * max(np.ptp(cost), 1.0))


def _floor(accuracy: Array) -> float:
    """The accuracy below which nothing counts: the worst, or Tukey's fence where the worst are outliers.

    A run that diverged to an absurd value would otherwise take the whole range of the model.
    """
    low, high = np.quantile(accuracy, [0.25, 0.75])
    return float(max(accuracy.min(), low - 1.5 * (high - low)))
