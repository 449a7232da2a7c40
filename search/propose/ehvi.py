"""An Optuna sampler for objectives of which parameters are known before training: only the others are modelled.

    sampler = EHVISampler(resolver(problem), seed=0)              # `sampler=ehvi` on the command line
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)

Trainable parameters are an exact function of a point. So candidates are drawn from the space itself, whatever its
conditions are, resolved, counted and stripped of impossible points (`candidates.py`); a Gaussian process that knows the
noise of its results predicts their accuracy (`model.py`); the one with the largest expected hypervolume improvement is
proposed (`criterion.py`). Where forgetting is a third objective, a second such process predicts it (`of_three.py`).
Where points may have more than one run, to try one again with another seed is a candidate like any other. Trials under
way count as if they had ended as predicted, so that workers who ask at the same time are sent to different places.

What is proposed follows from the trials of the study, in their order. A sampler that takes over from one that was
killed is told of every question that was asked (`recall`), and proposes what the other one would have: random numbers
come from the seed and the number of the question, candidates from the latest questions, and hyperparameters from the
points as they were when their fit was due.

Legend  N trained or running points, M candidates, R points that may be tried again, D inputs of the model.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from allocators.core.errors import BudgetError, InfeasibleError
from search.front import Unbeaten, UnbeatenOfThree
from search.points.starting import RANK, SCALED_RATE
from search.propose import RUN, STDERR, TEXT_STDERR, of_three, seed_of
from search.propose.candidates import Candidate, Drawing, Inputs, Known, candidate
from search.propose.criterion import Landscape, expected_gain_of_repeats, expected_hypervolume_improvement, learnt
from search.propose.model import AccuracyModel, Array, Results
from search.propose.trials import Repeating

DRAWN = 100  # candidates drawn anew for a suggestion
NEAR = 100  # candidates drawn near members of the front
KEPT = 20  # suggestions whose candidates are looked at, the present one among them
PROBE = 200  # candidates drawn at the start, which show what inputs a point has
REFIT = 1.15  # times as many results, and the hyperparameters are fitted again
MOST_FITTED = 400  # points that the model is fitted to: fitting costs the cube of their number
LATEST = 0.25  # of these, the share that is kept as the latest: runs under way are among them
BELIEF = 8.0  # results that weigh as much as what is expected of the recipe
FACTOR = 2.0  # by which an expected value may be wrong, as a standard deviation
WITH_RANK = 0.25  # power of the rank with which the best scaled rate is expected to rise


RUNNING, LOST = "running", "lost"  # a run without an accuracy: not yet, or stopped early; failed


@dataclass(eq=False)
class Tried:
    """A point and its runs.

    number     how many points were tried before it
    runs       by name: the accuracy of one that ended with one, else RUNNING or LOST
    question   largest variance of an accuracy over the questions
    spared     by name of a run that ended: what it forgot with its sign turned, where that is an objective
    text       largest variance of what was forgotten over the rows of the text
    """

    point: Candidate
    number: int
    runs: dict[str, float | str] = field(default_factory=dict)
    question: float = 0.0
    spared: dict[str, float] = field(default_factory=dict)
    text: float = 0.0

    def take(self, run: str, trial: FrozenTrial) -> None:
        """What is known of a run now."""
        match trial.state:
            case TrialState.COMPLETE:
                self.runs[run] = trial.values[0]
                self.question = max(self.question, trial.user_attrs.get(STDERR, 0.0) ** 2)
                if len(trial.values) > 2:
                    self.spared[run] = -trial.values[2]
                    self.text = max(self.text, trial.user_attrs.get(TEXT_STDERR, 0.0) ** 2)
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

    @property
    def forgetting(self) -> float:
        """Mean over the runs that ended; 0 where it is no objective."""
        return -math.fsum(self.spared.values()) / max(len(self.spared), 1)


class Memory:
    """All points that were tried, kept up to date: what is new costs what it is, whatever is known already.

    fitted   by key the points that the model is fitted to, in the order in which they were tried: all of them as long
             as they are no more than `most`. Then one has to go for every new one: of two at random the one that
             is farther below the front. Members of the front stay, and the latest. So the model sees most of the points
             where a gain is to be made, and some of all others
    done     points that have an accuracy; `heard` those that have a result, an accuracy or none
    """

    def __init__(
        self, recall: Callable[[FrozenTrial], Candidate | None], *, seed: int, most: int, of_three: bool = False
    ) -> None:
        self._recall = recall
        self._most = most
        self._random = random.Random(seed)
        self._study: Study | None = None
        self._read = 0
        self._open: dict[int, tuple[Tried, str]] = {}  # by number of the Optuna trial the runs under way
        self._of_three = of_three
        self._front = UnbeatenOfThree[Tried]() if of_three else Unbeaten[Tried]()
        self._worst = math.inf
        self.tried: dict[str, Tried] = {}
        self.fitted: dict[str, Tried] = {}
        self.done = self.heard = 0

    def update(self, study: Study, number: int) -> list[Candidate]:
        """Takes in what became of the study's trials since the last time, `number` aside; gives the new points."""
        if study is not self._study:  # the same trials, numbered anew
            self._study, self._read, self._open = study, 0, {}
        trials, known = study.get_trials(deepcopy=False), len(self.tried)
        new: list[Candidate] = []
        for place in [place for place in self._open if trials[place].state != TrialState.RUNNING]:
            self._take(*self._open.pop(place), trials[place])
        while self._read < len(trials) and trials[self._read].state != TrialState.WAITING:
            past, self._read = trials[self._read], self._read + 1
            if past.number == number:
                self._read -= 1
                break
            if (point := self._recall(past)) is not None:
                self._read_one(point, past)
                if len(self.tried) > known:
                    new.append(point)
                    known = len(self.tried)
        return new

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
            cost, forgetting = tried.point.known.cost, tried.forgetting
            self._front.put(key, tried, cost=cost, accuracy=tried.mean, number=tried.number, forgetting=forgetting)
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
        """Points that are more accurate, by the mean of their runs, than all that cost no more, or forget less."""
        return list(self._front) if self._of_three else _front(self._front)


@dataclass(frozen=True)
class _Basis:
    """What the hyperparameters are fitted to: inputs and results as they were when `heard` points had a result.

    results   of each objective that is modelled
    """

    x_ND: Array
    results: Sequence[Results]
    heard: int

    def is_past(self, heard: int, dims: int) -> bool:
        """Whether they are to be fitted again."""
        return heard >= REFIT * self.heard or dims != self.x_ND.shape[1]


@dataclass(frozen=True)
class _Goal:
    """An objective that is not known before training; more of it is better.

    values   of a point's runs that ended; `question` is the variance that further runs share
    """

    values: Callable[[Tried], list[float]]
    question: Callable[[Tried], float]

    def worst(self, tried: Iterable[Tried]) -> float:
        """What nothing below counts: the worst of the points' means, or the fence where the worst are outliers."""
        means = [math.fsum(values) / len(values) for each in tried if (values := self.values(each))]
        return _floor(np.array(means))

    def results(self, tried: Sequence[Tried]) -> Results:
        """What is known of points; one that failed counts as the worst."""
        worst = self.worst(tried)
        return Results.of(
            [[max(each, worst) for each in self.values(one)] or [worst] * bool(one.lost) for one in tried],
            [self.question(one) for one in tried],
        )


_ACCURACY = _Goal(lambda one: one.accuracies, lambda one: one.question)
_SPARED = _Goal(lambda one: list(one.spared.values()), lambda one: one.text)


@dataclass(frozen=True)
class _Learnt:
    """What a model says of one objective: heights of the N points, and of candidates what a training may show.

    move_R   by how much a further training is expected to move the mean of points that may be tried again
    """

    height_N: Array
    mean_M: Array
    std_M: Array
    move_R: Array


@dataclass(eq=False)
class _Question:
    """A point was asked for, when the front had these members; its candidates are drawn when they are looked at."""

    number: int
    front: Sequence[Candidate]
    drawn: dict[str, Candidate] | None = None


class EHVISampler(BaseSampler):
    """Proposes the point with the largest expected hypervolume improvement in (log trainable parameters, accuracy).

    of_three  forgetting is a third objective, and the improvement is one of volume

    resolve   runs the space on a trial and says what is known of its point; raises InfeasibleError or BudgetError
              where there is none
    expected  by name of a parameter, the value above 0 that is expected to be about right: points far from it have to
              promise more, the less the more results there are. With a `rank` among them, the scaled rate is that at
              this rank, and rises with WITH_RANK
    seed      of everything that is drawn
    fitted    points that the model is fitted to at most; 0: MOST_FITTED

    The study's objectives are accuracy, maximised, and trainable parameters, minimised, and where there is a third
    forgetting, minimised. Parameters count by their
    logarithm: a front spans decades, and on a linear axis nearly all of the area belongs to its largest points.
    """

    def __init__(
        self,
        resolve: Callable[[Any], Known],
        *,
        expected: Mapping[str, float] = MappingProxyType({}),
        seed: int = 0,
        fitted: int = 0,
        of_three: bool = False,
    ) -> None:
        self._resolve = resolve
        self._expected = expected
        self._seed = seed
        self._independent = RandomSampler(seed=seed)
        self._goals = (_ACCURACY, _SPARED) if of_three else (_ACCURACY,)
        self._models = [AccuracyModel() for _ in self._goals]
        self._memory = Memory(self._recall, seed=seed, most=fitted or MOST_FITTED, of_three=of_three)
        self._asked = 0  # questions so far
        self._latest: deque[_Question] = deque(maxlen=KEPT)
        self._inputs: Inputs | None = None
        self._due: _Basis | None = None
        self._fitted: _Basis | None = None
        self._recalled: dict[tuple[tuple[str, Any], ...], Candidate | None] = {}  # by parameters
        self._chosen: Candidate | None = None

    def recall(self, study: Study) -> None:
        """Takes in that it was asked now by an earlier process, when the study had the trials that it has."""
        self._note(study, -1)

    def _note(self, study: Study, number: int) -> _Question:
        """A question, and what has to be kept of the points as they are now."""
        memory, new = self._memory, self._memory.update(study, number)
        if self._inputs is None:
            random = np.random.default_rng(seed_of(self._seed, -1))
            self._inputs = Inputs.of(point for _ in range(PROBE) if (point := self._draw(random, None)))
        self._inputs = self._inputs.including(new)
        if memory.done and (self._due is None or self._due.is_past(memory.heard, self._inputs.dims)):
            tried, heard = _ordered(memory.fitted.values())
            x_ND = self._inputs.matrix([each.point for each in tried[:heard]])
            self._due = _Basis(x_ND, [goal.results(tried).first(heard) for goal in self._goals], memory.heard)
        self._asked += 1
        self._latest.append(_Question(self._asked, [each.point for each in memory.front]))
        return self._latest[-1]

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Chooses the point; Optuna asks for its parameters first, then for their values."""
        if study.directions != [StudyDirection.MAXIMIZE, *[StudyDirection.MINIMIZE] * len(self._goals)]:
            raise ValueError(
                f"EHVISampler maximises accuracy and minimises parameters (and forgetting), not {study.directions}"
            )
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
        memory, question = self._memory, self._note(study, number)
        self._independent = RandomSampler(seed=seed_of(self._seed, question.number))
        random = self._widen(question)
        fresh = self._untried()
        again = [each for each in memory.fitted.values() if each.accuracies and len(each.runs) < each.point.known.seeds]
        if not memory.done or not (fresh or again):  # one result is enough: to wait costs trainings
            return self._drawn(fresh, random) if fresh else None
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1):  # the other cores train
            gain = self._gain(fresh, again, list(memory.fitted.values()))
        points = [*fresh, *(each.point for each in again)]
        return points[int((gain * self._trust(points, memory.done)).argmax())]

    def _untried(self) -> list[Candidate]:
        """What was drawn for the latest questions and was not tried since."""
        pool: dict[str, Candidate] = {}
        for question in self._latest:
            if question.drawn is None:  # asked by an earlier process
                self._widen(question)
            assert question.drawn is not None
            for key, point in question.drawn.items():
                pool.setdefault(key, point)
        return [point for key, point in pool.items() if key not in self._memory.tried]

    def _drawn(self, fresh: Sequence[Candidate], random: np.random.Generator) -> Candidate:
        """A point at random, sooner one that lies near what is expected."""
        if not self._expected:
            return fresh[int(random.integers(len(fresh)))]
        trust_M = self._trust(fresh, 1)
        return fresh[int(random.choice(len(fresh), p=trust_M / trust_M.sum()))]

    def _trust(self, points: Sequence[Candidate], results: int) -> Array:
        """What the gain of each point counts, relative to the others, for lying near what is expected. Shape [M].

        π(x)^(β / results) with π(x) = Π N(ln x; ln expected, (ln FACTOR)²) and β = BELIEF: πBO (Hvarfner et al. 2022,
        arXiv:2204.11051). A model of a dozen results is full of doubt wherever nothing was tried, and would look for
        improvement there: at rates at which nothing is learnt.

        The best scaled rate is the same at all ranks where a step's ΔW is a sum of r equal terms (Schulman et al. 2025,
        "LoRA Without Regret"), and rises with √r where it is one of r independent terms (rsLoRA, Kalajdzievski 2023,
        arXiv:2312.03732, scales by α/√r for that reason). Half-way between both lies the fourth root.
        """
        distance_M = np.zeros(len(points))
        for name in sorted(self._expected.keys() - {RANK}):
            ratio_M = np.array([self._times_expected(name, point.params) for point in points])
            distance_M += (np.log(np.maximum(ratio_M, 1e-300)) / math.log(FACTOR)) ** 2
        trust_M: Array = np.exp(-0.5 * BELIEF / results * (distance_M - distance_M.min()))
        return trust_M

    def _times_expected(self, name: str, params: Mapping[str, Any]) -> float:
        """A point's value relative to what is expected of its rank; 1 where it has none."""
        if name not in params:
            return 1.0
        expected = self._expected[name]
        if name == SCALED_RATE and RANK in params and RANK in self._expected:
            expected *= (params[RANK] / self._expected[RANK]) ** WITH_RANK
        return float(params[name]) / expected

    def _gain(self, fresh: Sequence[Candidate], again: Sequence[Tried], tried: Sequence[Tried]) -> Array:
        """Expected gain of hypervolume by every new candidate, and by every point tried again. Shape [M + R].

        Where points may be tried again, both are gains of the front of posterior means by one training, which moves the
        mean of a new point by less than its doubt. Where they may not, the result of a training is all that will ever
        be known of its point, and a new point counts with all of its doubt.
        """
        assert self._inputs is not None
        tried, heard = _ordered(tried)
        x_ND, x_MD = self._inputs.matrix([each.point for each in tried]), self._inputs.matrix(fresh)
        place = {each.point.known.key: number for number, each in enumerate(tried)}
        which_R = np.array([place[each.point.known.key] for each in again], dtype=np.int64)
        repeats = bool(fresh) and fresh[0].known.seeds > 1
        self._fit()
        learnt_of = [
            self._learn(number, x_ND, x_MD, tried, heard=heard, which_R=which_R, repeats=repeats)
            for number in range(len(self._goals))
        ]
        cost_N, cost_M = _costs([each.point for each in tried]), _costs(fresh)
        beyond = _beyond(np.concatenate((cost_N, cost_M)))
        if len(learnt_of) > 1:
            return _gain_of_three(learnt_of, cost_N, cost_M, which_R, (beyond, _worst(tried), _below(tried)))
        (known,) = learnt_of
        there = Landscape(cost_N, known.height_N, (beyond, _worst(tried)))
        gain_M, gain_R = np.empty(0), np.empty(0)
        if fresh:
            gain_M = expected_hypervolume_improvement(known.mean_M, known.std_M, cost_M, there)
        if again:
            gain_R = expected_gain_of_repeats(known.move_R, which_R, there)
        return np.concatenate((gain_M, gain_R))

    def _fit(self) -> None:
        """Fits the models to the points as they were when that was due."""
        if self._due is self._fitted:
            return
        assert self._due is not None
        for model, results in zip(self._models, self._due.results, strict=True):
            model.fit(self._due.x_ND, results)
        self._fitted = self._due

    def _learn(
        self,
        number: int,
        x_ND: Array,
        x_MD: Array,
        tried: Sequence[Tried],
        *,
        heard: int,
        which_R: NDArray[np.int64],
        repeats: bool,
    ) -> _Learnt:
        """What the first `heard` points say of an objective; then runs under way are held for ended as predicted.

        Nothing new is learnt by that, but less is left to learn there.

        repeats   candidates may be tried again: a training moves the mean of a new one by less than its doubt
        """
        model, results = self._models[number], self._goals[number].results(tried)
        model.take(x_ND[:heard], results.first(heard))
        height_N, _ = model.predict(x_ND)
        running_N = np.array([float(one.running) for one in tried])
        if running_N.any():
            results = results.supposing(running_N, height_N)
            model.condition(x_ND, results)
        mean_M = std_M = move_R = np.empty(0)
        if len(x_MD):
            mean_M, std_M = model.predict(x_MD)
            if repeats:
                std_M = learnt(std_M, np.inf, model.noise_of_a_run(results))
        if len(which_R):
            std_N = model.predict(x_ND)[1]
            std_N = learnt(std_N, model.noise(results), model.noise(results.with_runs(1)))
            move_R = std_N[which_R]
        return _Learnt(height_N, mean_M, std_M, move_R)

    def _recall(self, past: FrozenTrial) -> Candidate | None:
        """An earlier trial's point; None where it is none (impossible, over the budget, not of this space)."""
        params = tuple(past.params.items())
        if params not in self._recalled:
            try:
                self._recalled[params] = candidate(Repeating(past.params), self._resolve)
            except (InfeasibleError, BudgetError, KeyError):
                self._recalled[params] = None
        return self._recalled[params]

    def _widen(self, question: _Question) -> np.random.Generator:
        """Draws a question's candidates, anywhere and near the front; gives what draws behind them."""
        random, front = np.random.default_rng(seed_of(self._seed, question.number)), question.front
        points = [self._draw(random, None) for _ in range(DRAWN)]
        for _ in range(NEAR if front else 0):
            points.append(self._draw(random, front[int(random.integers(len(front)))].params))
        question.drawn = {}
        for point in points:
            if point is not None:
                question.drawn.setdefault(point.known.key, point)
        return random

    def _draw(self, random: np.random.Generator, parent: Mapping[str, Any] | None) -> Candidate | None:
        """A candidate; None where the space has none at what was drawn."""
        try:
            return candidate(Drawing(random, parent), self._resolve)
        except (InfeasibleError, BudgetError):
            return None


def _ordered(tried: Iterable[Tried]) -> tuple[list[Tried], int]:
    """Points with an accuracy, those that failed, those under way or stopped early; and how many have a result."""
    tried = list(tried)
    done = [each for each in tried if each.accuracies]
    lost = [each for each in tried if not each.accuracies and each.lost]
    return [*done, *lost, *(each for each in tried if not each.accuracies and not each.lost)], len(done) + len(lost)


def _worst(tried: Sequence[Tried]) -> float:
    """The accuracy below which nothing counts."""
    return _ACCURACY.worst(tried)


def _below(tried: Sequence[Tried]) -> float:
    """The reference of what is spared: a tenth of its range below the worst.

    The most accurate points often forget most: at the worst itself nothing beyond them would count.
    """
    worst = _SPARED.worst(tried)
    return worst - 0.1 * max(max(-each.forgetting for each in tried if each.spared) - worst, 1e-9)


def _gain_of_three(
    known: Sequence[_Learnt],
    cost_N: Array,
    cost_M: Array,
    which_R: NDArray[np.int64],
    reference: tuple[float, float, float],
) -> Array:
    """Expected gain of volume by every new candidate, and by every point tried again. Shape [M + R]."""
    accuracy, spared = known
    there = of_three.Terrain(cost_N, accuracy.height_N, spared.height_N, reference)
    first, second = (of_three.Normal(one.mean_M, one.std_M) for one in known)
    gain_M = of_three.expected_gain(first, second, cost_M, there)
    gain_R = of_three.expected_gain_of_repeats((accuracy.move_R, spared.move_R), which_R, there)
    return np.concatenate((gain_M, gain_R))


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
