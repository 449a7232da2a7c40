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

import math
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
from search.propose import RUN, STDERR
from search.propose.candidates import Candidate, Drawing, Known, Repeating, candidate, matrix
from search.propose.criterion import Landscape, expected_gain_of_repeats, expected_hypervolume_improvement, learnt
from search.propose.model import AccuracyModel, Array, Results

START = 5  # results, starting points included, before a model is worth fitting
DRAWN = 100  # candidates drawn anew for a suggestion; those of earlier suggestions stay
NEAR = 100  # candidates drawn near members of the front
MOST = 4000  # candidates kept
BELIEF = 8.0  # results that weigh as much as what is expected of the recipe
FACTOR = 2.0  # by which an expected value may be wrong, as a standard deviation


@dataclass
class Tried:
    """A point and its runs.

    accuracies   of the runs that ended with one
    question     largest variance of an accuracy over the questions
    running      runs that have no result yet, or will have none (stopped early): the place needs no second look
    lost         runs that failed
    """

    point: Candidate
    accuracies: list[float] = field(default_factory=list)
    question: float = 0.0
    running: int = 0
    lost: int = 0
    runs: set[str] = field(default_factory=set)

    def add(self, run: str, trial: FrozenTrial) -> None:
        """Takes in a trial, unless its run was taken in before: it was not trained again, and says nothing of noise."""
        if run in self.runs:
            return
        self.runs.add(run)
        match trial.state:
            case TrialState.COMPLETE:
                self.accuracies.append(trial.values[0])
                self.question = max(self.question, trial.user_attrs.get(STDERR, 0.0) ** 2)
            case TrialState.FAIL:
                self.lost += 1
            case _:
                self.running += 1

    @property
    def mean(self) -> float:
        """Mean accuracy of the runs that have one."""
        return math.fsum(self.accuracies) / len(self.accuracies)


class EHVISampler(BaseSampler):
    """Proposes the point with the largest expected hypervolume improvement in (log trainable parameters, accuracy).

    resolve   runs the space on a trial and says what is known of its point; raises InfeasibleError or BudgetError
              where there is none
    expected  by name of a parameter, the value above 0 that is expected to be about right: points far from it have to
              promise more, the less the more results there are
    seed      of everything that is drawn

    The study's objectives are accuracy, maximised, and trainable parameters, minimised. Parameters count by their
    logarithm: a front spans decades, and on a linear axis nearly all of the area belongs to its largest points.
    """

    def __init__(
        self, resolve: Callable[[Any], Known], *, expected: Mapping[str, float] = MappingProxyType({}), seed: int = 0
    ) -> None:
        self._resolve = resolve
        self._expected = expected
        self._random = np.random.default_rng(seed)
        self._independent = RandomSampler(seed=seed)
        self._model = AccuracyModel()
        self._pool: dict[str, Candidate] = {}
        self._history: dict[int, Candidate | None] = {}  # by number of the Optuna trial
        self._chosen: Candidate | None = None

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
        tried = self._tried(study, number)
        done = [each for each in tried.values() if each.accuracies]
        self._widen([each.point for each in _front(done)], tried)
        fresh = [point for key, point in self._pool.items() if key not in tried]
        again = [each for each in done if len(each.runs) < each.point.known.seeds]
        if len(done) < START or not (fresh or again):
            return self._drawn(fresh, len(done)) if fresh else None
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1):  # the other cores train
            gain = self._gain(fresh, again, list(tried.values()))
        points = [*fresh, *(each.point for each in again)]
        return points[int((gain * self._trust(points, len(done))).argmax())]

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

    def _tried(self, study: Study, number: int) -> dict[str, Tried]:
        """Points that were tried or are under way, by their keys."""
        tried: dict[str, Tried] = {}
        for past in study.get_trials(deepcopy=False):
            if past.number == number or past.state == TrialState.WAITING:
                continue
            if (point := self._recall(past)) is not None:
                each = tried.setdefault(point.known.key, Tried(point))
                each.add(past.user_attrs.get(RUN, point.known.key), past)
        return tried

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
        self._model.fit(x_ND[:heard], results.first(heard))
        height_N, _ = self._model.predict(x_ND)
        running_N = np.array([float(one.running) for one in tried])
        if running_N.any():
            results = results.supposing(running_N, height_N)
            self._model.condition(x_ND, results)
        return results, height_N

    def _recall(self, past: FrozenTrial) -> Candidate | None:
        """An earlier trial's point; None where it is none (impossible, over the budget, not of this space)."""
        if past.number not in self._history:
            try:
                self._history[past.number] = candidate(Repeating(self._random, past.params), self._resolve)
            except (InfeasibleError, BudgetError, KeyError):
                self._history[past.number] = None
        return self._history[past.number]

    def _widen(self, front: Sequence[Candidate], seen: Iterable[str]) -> None:
        """Draws more candidates, anywhere and near the front; drops what was trained, and the oldest."""
        for _ in range(DRAWN):
            self._draw(None)
        for _ in range(NEAR if front else 0):
            self._draw(front[int(self._random.integers(len(front)))].params)
        for key in [*seen, *list(self._pool)[: max(len(self._pool) - MOST, 0)]]:
            self._pool.pop(key, None)

    def _draw(self, parent: Mapping[str, Any] | None) -> None:
        try:
            point = candidate(Drawing(self._random, parent), self._resolve)
        except (InfeasibleError, BudgetError):
            return
        self._pool.setdefault(point.known.key, point)


def _front(done: Sequence[Tried]) -> list[Tried]:
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
