"""The front of accuracy against trainable parameters: which points are on it, how much it covers, where it bends.

Forgetting can be a third objective (`objectives=accuracy,params,forgetting`): a point is then on the front of `Points`
that no other beats in all three. The functions `front`, `hypervolume` and `knee` are of accuracy and parameters.

    python -m search.report studies/demo        # prints what these functions find in a study

    points = Points(records.finished.values()); points.add(outcome); points.front        # the same, result by result

What these functions compare is anything with `trainable_params` and `accuracy`; what has no accuracy, or one that is
not finite, has no place on a front and is left out everywhere here.
"""

from __future__ import annotations

import bisect
import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

from allocators.core.types import Outcome, Rung, Score

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Scored(Protocol):
    """What a front can be made of: outcomes and candidates have both numbers."""

    @property
    def trainable_params(self) -> int:
        """Its cost; less is better."""

    @property
    def accuracy(self) -> float | None:
        """None where it was not evaluated: it is on no front."""


P = TypeVar("P", bound=Scored)
T = TypeVar("T")


def _valid(points: Iterable[P]) -> list[P]:
    return [p for p in points if p.accuracy is not None and math.isfinite(p.accuracy)]


def _rows(points: Sequence[Scored]) -> list[tuple[float, float]]:
    return [(float(p.trainable_params), float(p.accuracy or 0.0)) for p in points]


def front(points: Iterable[P]) -> list[P]:
    """Points that no other point beats: fewer parameters at no less accuracy, or more accuracy at no more parameters.

    Ascending in parameters. Points that tie in both are all kept: neither is better, and dropping one would depend
    on the order of arrival.
    """
    valid = _valid(points)
    keep = unbeaten([(accuracy, params) for params, accuracy in _rows(valid)])
    return sorted((p for p, on in zip(valid, keep, strict=True) if on), key=lambda p: p.trainable_params)


def unbeaten(rows: Sequence[Sequence[float]]) -> list[bool]:
    """Which rows no other row beats. The first number of each is better higher, all others are better lower."""
    if not rows:
        return []
    import moocore  # here: it brings numpy, which nobody who only imports this module needs

    up = [True] + [False] * (len(rows[0]) - 1)
    return [bool(keep) for keep in moocore.is_nondominated(rows, maximise=up, keep_weakly=True)]


def hypervolume(points: Iterable[Scored], *, reference: tuple[float, float]) -> float:
    """Area that the points dominate up to `reference` = (trainable parameters, accuracy), a point worse than all.

    In parameters × accuracy. Points beyond the reference add nothing; no points cover 0.
    """
    valid = _valid(points)
    if not valid:
        return 0.0
    import moocore

    return float(moocore.hypervolume(_rows(valid), list(reference), maximise=[False, True]))


def knee(points: Iterable[P]) -> P | None:
    """The point of the front after which parameters buy less: farthest above the chord between the front's ends.

    With x = log(parameters) and y = accuracy, both scaled so that the ends of the front are (0, 0) and (1, 1), it is
    the point with the largest y - x. None for fewer than three different points, or where the front never rises above
    its chord: then there is no bend to speak of. Ties go to the smaller point.
    """
    return bend(front(points))


def bend(ends: Sequence[P]) -> P | None:
    """The knee of points that are a front already, ascending in parameters."""
    if len({(p.trainable_params, p.accuracy) for p in ends}) < 3:
        return None
    rows = [(math.log(max(params, 1.0)), accuracy) for params, accuracy in _rows(ends)]
    (x0, y0), (x1, y1) = rows[0], rows[-1]
    rises = [(y - y0) / (y1 - y0) - (x - x0) / (x1 - x0) for x, y in rows]
    best = max(range(len(ends)), key=lambda i: (rises[i], -i))
    return ends[best] if rises[best] > 1e-9 else None


@dataclass(frozen=True)
class Candidate:
    """All runs of one point: same allocation, recipe, model and task, different seeds.

    accuracy         mean over the seeds that ran to the end; None where none did
    stderr           standard error of that accuracy, from the evaluation's own and from the spread over seeds where
                     there are several; None where neither is known
    spread           standard deviation over the seeds; None for fewer than two
    question_error   standard error of the evaluation alone (the largest `stderr` of a last rung): more seeds do not
                     lower it, as all answer the same questions. None where it is not known: 0 is that of one question,
                     or of questions that were all answered alike, and says nothing of other questions
    """

    runs: tuple[Outcome, ...]
    accuracy: float | None
    stderr: float | None
    spread: float | None = None
    question_error: float | None = None

    @cached_property
    def point(self) -> str:
        """The digest that its runs share."""
        return self.runs[0].trial.point

    @property
    def parent(self) -> str:
        """Digest of the training that the point was cut from (`search/truncate/`); empty where it was trained."""
        return self.runs[0].trial.parent

    @property
    def trainable_params(self) -> int:
        """Parameters of one run; all runs of a point have the same number."""
        return self.runs[0].trainable_params

    @property
    def forgetting(self) -> float | None:
        """Mean rise of the loss on general text over the complete runs; None where one was not measured."""
        rises = [run.forgetting.rise for run in self.complete if run.forgetting is not None]
        return statistics.fmean(rises) if rises and len(rises) == len(self.complete) else None

    @property
    def complete(self) -> tuple[Outcome, ...]:
        """The runs that trained to their end and have an accuracy."""
        return _complete(self.runs)

    @property
    def by_task(self) -> dict[str, tuple[float, float]]:
        """Of several tasks each one's accuracy, a mean over the seeds like theirs, and its standard error."""
        runs = [run.by_task for run in self.complete]
        labels = [label for label in runs[0] if all(label in run for run in runs)] if runs else []
        return {
            label: (
                statistics.fmean(accuracies := [run[label]["accuracy"] for run in runs]),
                math.hypot(max(run[label]["stderr"] for run in runs), *_error_of_mean(accuracies)),
            )
            for label in labels
        }

    @property
    def tested(self) -> tuple[Outcome, ...]:
        """The complete runs that were evaluated on the test split."""
        return tuple(run for run in self.complete if run.test is not None)

    @cached_property
    def on_test(self) -> Candidate | None:
        """`tested`, with the accuracies that they have on the test split; None where none was evaluated there.

        What compares points compares these by test accuracy; `best` is the run that is best there.
        """
        return _candidate(tuple(_on_test(run, run.test) for run in self.tested if run.test)) if self.tested else None

    @property
    def test_accuracy(self) -> float | None:
        """Mean over `tested`; None where none was."""
        return self.on_test.accuracy if self.on_test else None

    @property
    def test_stderr(self) -> float | None:
        """Standard error of `test_accuracy`: of the questions, and of the spread over seeds where there are several."""
        return self.on_test.stderr if self.on_test else None

    @property
    def optimism(self) -> float | None:
        """Accuracy on the split that selects less that on the test split, of the same runs; None where none was tested.

        What selecting on questions adds to the accuracy on them, and whatever else sets the two splits apart.
        """
        if not self.tested:
            return None
        return statistics.fmean((run.accuracy or 0.0) - (run.test.accuracy if run.test else 0.0) for run in self.tested)

    @property
    def best(self) -> Outcome:
        """The run whose adapter to load: the most accurate complete one."""
        return self.by_accuracy[0]

    @property
    def by_accuracy(self) -> list[Outcome]:
        """All runs, complete ones first, the most accurate first."""
        return sorted(self.runs, key=lambda run: (run.status != "complete", -(run.accuracy or 0.0)))


def candidates(outcomes: Iterable[Outcome]) -> list[Candidate]:
    """Groups outcomes that differ in the seed only, in order of appearance.

    Only complete runs give an accuracy: one that was stopped early was trained less than its rivals.
    """
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.trial.point, []).append(outcome)
    return [_candidate(tuple(runs)) for runs in groups.values()]


def _complete(runs: Iterable[Outcome]) -> tuple[Outcome, ...]:
    return tuple(_valid(run for run in runs if run.status == "complete"))


def _candidate(runs: tuple[Outcome, ...]) -> Candidate:
    complete = _complete(runs)
    if not complete:
        return Candidate(runs, None, None)
    accuracies = [run.accuracy or 0.0 for run in complete]
    errors = [error for run in complete if run.rungs and (error := run.rungs[-1].stderr)]
    question_error = max(errors, default=None)
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else None
    parts = [] if question_error is None else [question_error]
    parts += _error_of_mean(accuracies)
    return Candidate(runs, statistics.fmean(accuracies), math.hypot(*parts) if parts else None, spread, question_error)


def _on_test(run: Outcome, score: Score) -> Outcome:
    evaluation = Rung(0, run.tokens, score.accuracy, stderr=score.stderr, by_task=score.by_task)
    return run.updated(accuracy=score.accuracy, rungs=(evaluation,))


def _error_of_mean(accuracies: Sequence[float]) -> list[float]:
    """s/√n of the seeds; nothing for one."""
    return [statistics.stdev(accuracies) / math.sqrt(len(accuracies))] if len(accuracies) > 1 else []


class Unbeaten(Generic[T]):
    """Points that come and go, by name, and their front: those that no other point beats, ties included.

    To put a point costs the logarithm of their number, and the members that it beats. To drop one costs as much; where
    it is a member, also a look at the points between it and the next larger member.
    """

    def __init__(self) -> None:
        self._entries: dict[str, _Entry[T]] = {}
        self._by_size: list[_Entry[T]] = []
        self._front: list[_Entry[T]] = []
        self._left: list[T] = []

    def __contains__(self, name: str) -> bool:
        """Whether the point is a member of the front."""
        entry = self._entries.get(name)
        if entry is None:
            return False
        place = bisect.bisect_left(self._front, entry)
        return place < len(self._front) and self._front[place] is entry

    def __iter__(self) -> Iterator[T]:
        """Members of the front: ascending in cost, then as they are numbered."""
        return (entry.item for entry in self._front)

    def __len__(self) -> int:
        """Members of the front."""
        return len(self._front)

    def left(self) -> list[T]:
        """What has left the front since this was asked for the last time; it may be back."""
        left, self._left = self._left, []
        return left

    def height(self, cost: int) -> float:
        """Accuracy of the best point that costs no more; -inf where there is none."""
        place = bisect.bisect_right(self._front, cost, key=_cost)
        return self._front[place - 1].accuracy if place else -math.inf

    def put(
        self,
        name: str,
        item: T,
        *,
        cost: int,
        accuracy: float,
        number: int,
        forgetting: float = 0.0,  # noqa: ARG002  it counts in UnbeatenOfThree
    ) -> None:
        """A point, in the place of what had its name; no two points have the same number."""
        self.drop(name)
        entry = self._entries[name] = _Entry(cost, number, accuracy, item)
        bisect.insort(self._by_size, entry)
        self._enter(entry)

    def drop(self, name: str) -> None:
        """Takes a point away, where there is one of that name, and puts on the front what it alone kept off."""
        entry = self._entries.pop(name, None)
        if entry is None:
            return
        del self._by_size[bisect.bisect_left(self._by_size, entry)]
        on_front = bisect.bisect_left(self._front, entry)
        if on_front == len(self._front) or self._front[on_front] is not entry:
            return
        self._left.append(self._front.pop(on_front).item)
        larger = next((other.cost for other in self._front[on_front:] if other.cost > entry.cost), math.inf)
        start = bisect.bisect_left(self._by_size, entry.cost, key=_cost)
        stop = bisect.bisect_left(self._by_size, larger, key=_cost)
        best = self._front[on_front - 1].accuracy if on_front else -math.inf
        for place in range(start, stop):
            other = self._by_size[place]
            if other.accuracy < best or (other.cost == entry.cost and other.accuracy >= entry.accuracy):
                continue  # beaten by a smaller one; or its equal, which is on the front
            best = other.accuracy
            self._enter(other)

    def _enter(self, entry: _Entry[T]) -> None:
        """Puts a point on the front, and takes off what it beats, unless a member beats it."""
        place = bisect.bisect_right(self._front, entry.cost, key=_cost)
        if place and self._front[place - 1].beats(entry):  # of those that are no larger the most accurate
            return
        first = last = bisect.bisect_left(self._front, entry.cost, key=_cost)
        while last < len(self._front) and self._front[last].accuracy <= entry.accuracy:
            last += 1
        equal = [other for other in self._front[first:last] if not entry.beats(other)]
        self._left += [other.item for other in self._front[first:last] if entry.beats(other)]
        self._front[first:last] = sorted([*equal, entry])


class UnbeatenOfThree(Unbeaten[T]):
    """`Unbeaten` where forgetting counts too, the less the better.

    To put or to drop a point compares it with all others at once: some ten microseconds for each thousand of them.
    """

    def __init__(self) -> None:
        import numpy as np  # here: most fronts are of two, and whoever only reads records needs none of it

        super().__init__()
        self._place: dict[str, int] = {}  # row of a point in what follows
        self._points: list[tuple[str, int, T]] = []  # name, number, item
        self._values = np.empty((64, 3))  # cost, accuracy with its sign turned, forgetting: less of each is better
        self._beaten = np.zeros(64, dtype=np.int64)  # how many others beat a point

    def __contains__(self, name: str) -> bool:
        return name in self._place and not self._beaten[self._place[name]]

    def __iter__(self) -> Iterator[T]:
        members = sorted(self._members(), key=lambda row: (self._values[row, 0], self._points[row][1]))
        return (self._points[row][2] for row in members)

    def __len__(self) -> int:
        return len(self._members())

    def height(self, cost: int) -> float:
        """Accuracy of the best point that costs no more, whatever it forgets; -inf where there is none."""
        there = self._values[: len(self._points)]
        return -float(there[there[:, 0] <= cost, 1].min(initial=math.inf))

    def put(self, name: str, item: T, *, cost: int, accuracy: float, number: int, forgetting: float = 0.0) -> None:
        """A point, in the place of what had its name; no two points have the same number."""
        self.drop(name)
        row = len(self._points)
        if row == len(self._values):
            import numpy as np

            self._values = np.concatenate((self._values, np.empty_like(self._values)))
            self._beaten = np.concatenate((self._beaten, np.zeros_like(self._beaten)))
        self._values[row] = cost, -accuracy, forgetting
        better, worse = self._compared(row)
        self._left += [self._points[other][2] for other in worse if not self._beaten[other]]
        self._beaten[worse] += 1
        self._beaten[row] = len(better)
        self._place[name] = row
        self._points.append((name, number, item))

    def drop(self, name: str) -> None:
        """Takes a point away, where there is one of that name, and puts on the front what it alone kept off."""
        if name not in self._place:
            return
        row, last = self._place[name], len(self._points) - 1
        if name in self:
            self._left.append(self._points[row][2])
        _, worse = self._compared(row)
        self._beaten[worse] -= 1
        self._values[row], self._beaten[row] = self._values[last], self._beaten[last]
        self._points[row] = self._points[last]
        self._place[self._points[row][0]] = row
        del self._points[last], self._place[name]

    def _members(self) -> list[int]:
        return [int(row) for row in (self._beaten[: len(self._points)] == 0).nonzero()[0]]

    def _compared(self, row: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows of the points that beat this one (no worse in all three and better in one), and of those it beats."""
        there, this = self._values[: len(self._points)], self._values[row]
        no_worse, no_better = (there <= this).all(axis=1), (there >= this).all(axis=1)
        return (no_worse & ~no_better).nonzero()[0], (no_better & ~no_worse).nonzero()[0]


class _Entry(NamedTuple, Generic[T]):
    """A point among those of its size: ascending in cost, then as they are numbered. Numbers are unique."""

    cost: int
    number: int
    accuracy: float
    item: T

    def beats(self, other: _Entry[Any]) -> bool:
        """No worse in both and better in one."""
        no_worse = self.cost <= other.cost and self.accuracy >= other.accuracy
        return no_worse and (self.cost, self.accuracy) != (other.cost, other.accuracy)


def _cost(entry: _Entry[Any]) -> int:
    return entry.cost


class Points:
    """Finished trainings, grouped into points, and the front of the points: kept up to date training by training.

    After any number of `add` and `discard`, a list of it is `candidates(outcomes.values())` and `front` is the front of
    that. Adding costs what the point's own runs and the front cost (`Unbeaten`).

    outcomes         by digest, in the order in which they were added
    max_forgetting   points that forget more, or of which it is not known, are not on the front; 0: no limit
    of_three         forgetting is a third objective: points of which it is not known are not on the front
    """

    def __init__(
        self, outcomes: Iterable[Outcome] = (), *, max_forgetting: float = 0.0, of_three: bool = False
    ) -> None:
        self.max_forgetting = max_forgetting
        self.of_three = of_three
        self.outcomes: dict[str, Outcome] = {}
        self._numbers = itertools.count()
        self._added: dict[str, tuple[str, int]] = {}  # digest -> its point, and which addition it was
        self._runs: dict[str, dict[str, Outcome]] = {}  # point -> its runs by digest
        self._candidates: dict[str, tuple[int, Candidate]] = {}  # by point, with the addition of its first run
        self._unbeaten = UnbeatenOfThree[Candidate]() if of_three else Unbeaten[Candidate]()
        for outcome in outcomes:
            self.add(outcome)

    def __len__(self) -> int:
        return len(self._candidates)

    def __iter__(self) -> Iterator[Candidate]:
        """All points, in the order of their first training."""
        return iter(candidate for _, candidate in sorted(self._candidates.values(), key=lambda entry: entry[0]))

    @property
    def front(self) -> list[Candidate]:
        """The points that no other point beats, ascending in parameters."""
        return list(self._unbeaten)

    @property
    def rising(self) -> list[Candidate]:
        """The members of the front that no other beats in accuracy and parameters alone; all where these are all.

        With forgetting as a third objective other members are less accurate than smaller ones, and forget less.
        """
        return front(self._unbeaten) if self.of_three else self.front

    def fallen(self) -> set[str]:
        """Points, by their digests, that were on the front since this was asked for the last time, and are not now."""
        left = {candidate.point for candidate in self._unbeaten.left()}
        return {point for point in left if point in self._candidates and point not in self._unbeaten}

    def is_on_front(self, candidate: Candidate) -> bool:
        """Whether the point, as it is now, is a member of the front."""
        return candidate.point in self._unbeaten

    def allows(self, forgetting: float | None) -> bool:
        """Whether a point that forgets so much may be on the front; where it is not known, only if nothing asks it."""
        if not (self.max_forgetting or self.of_three):
            return True
        return forgetting is not None and (not self.max_forgetting or forgetting <= self.max_forgetting)

    def add(self, outcome: Outcome) -> Candidate:
        """Takes in a training, in the place of an earlier result of it; returns its point as it is now."""
        self.discard(outcome.digest)
        point = outcome.trial.point
        self.outcomes[outcome.digest] = outcome
        self._added[outcome.digest] = (point, next(self._numbers))
        self._runs.setdefault(point, {})[outcome.digest] = outcome
        return self._renew(point)

    def update(self, outcome: Outcome) -> None:
        """Takes in what more is known of a training, which keeps its place in the order (KeyError: there is none)."""
        point, _ = self._added[outcome.digest]
        self.outcomes[outcome.digest] = self._runs[point][outcome.digest] = outcome
        self._renew(point)

    def discard(self, digest: str) -> None:
        """Forgets a training, where there is one of that name."""
        if digest not in self.outcomes:
            return
        del self.outcomes[digest]
        point, _ = self._added.pop(digest)
        del self._runs[point][digest]
        if self._runs[point]:
            self._renew(point)
        else:
            del self._runs[point], self._candidates[point]
            self._unbeaten.drop(point)

    def at(self, point: str) -> Candidate:
        """A point by the digest that its trainings share (KeyError where it has none)."""
        return self._candidates[point][1]

    def candidate_of(self, digest: str) -> Candidate:
        """The point of a training (KeyError where there is none of that name)."""
        return self.at(self._added[digest][0])

    def _renew(self, point: str) -> Candidate:
        """The point with its runs as they are now, in its place on the front."""
        runs = self._runs[point]
        candidate = _candidate(tuple(runs.values()))
        _, number = self._added[next(iter(runs))]
        self._candidates[point] = (number, candidate)
        if (
            (accuracy := candidate.accuracy) is not None
            and math.isfinite(accuracy)
            and self.allows(candidate.forgetting)
        ):
            cost, forgetting = candidate.trainable_params, candidate.forgetting or 0.0
            self._unbeaten.put(point, candidate, cost=cost, accuracy=accuracy, number=number, forgetting=forgetting)
        else:
            self._unbeaten.drop(point)
        return candidate
