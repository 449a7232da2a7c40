"""The front of accuracy against trainable parameters: which points are on it, how much it covers, where it bends.

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
from typing import NamedTuple, Protocol, TypeVar

from allocators.core.types import Outcome, Rung, Score


class Scored(Protocol):
    """What a front can be made of: outcomes and candidates have both numbers."""

    @property
    def trainable_params(self) -> int:
        """Its cost; less is better."""

    @property
    def accuracy(self) -> float | None:
        """None where it was not evaluated: it is on no front."""


P = TypeVar("P", bound=Scored)


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
    if not valid:
        return []
    import moocore  # here: it brings numpy, which nobody who only imports this module needs

    keep = moocore.is_nondominated(_rows(valid), maximise=[False, True], keep_weakly=True)
    return sorted((p for p, on in zip(valid, keep, strict=True) if on), key=lambda p: p.trainable_params)


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
    ends = front(points)
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
    def trainable_params(self) -> int:
        """Parameters of one run; all runs of a point have the same number."""
        return self.runs[0].trainable_params

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


class Points:
    """Finished trainings, grouped into points, and the front of the points: kept up to date training by training.

    After any number of `add` and `discard`, a list of it is `candidates(outcomes.values())` and `front` is the front of
    that. Adding costs what the point's own runs and the front cost; where a member of the front falls, also the points
    between it and the next larger member.

    outcomes   by digest, in the order in which they were added
    """

    def __init__(self, outcomes: Iterable[Outcome] = ()) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self._numbers = itertools.count()
        self._added: dict[str, tuple[str, int]] = {}  # digest -> its point, and which addition it was
        self._runs: dict[str, dict[str, Outcome]] = {}  # point -> its runs by digest
        self._entries: dict[str, _Entry] = {}  # by point
        self._by_size: list[_Entry] = []  # those with an accuracy
        self._front: list[_Entry] = []
        for outcome in outcomes:
            self.add(outcome)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Candidate]:
        """All points, in the order of their first training."""
        return iter(entry.candidate for entry in sorted(self._entries.values(), key=lambda entry: entry.number))

    @property
    def front(self) -> list[Candidate]:
        """The points that no other point beats, ascending in parameters."""
        return [entry.candidate for entry in self._front]

    def is_on_front(self, candidate: Candidate) -> bool:
        """Raises KeyError for a point that was not added."""
        entry = self._entries[candidate.point]
        place = bisect.bisect_left(self._front, entry)
        return place < len(self._front) and self._front[place] is entry

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
            del self._runs[point]
            self._leave(self._entries.pop(point))

    def at(self, point: str) -> Candidate:
        """A point by the digest that its trainings share (KeyError where it has none)."""
        return self._entries[point].candidate

    def candidate_of(self, digest: str) -> Candidate:
        """The point of a training (KeyError where there is none of that name)."""
        return self.at(self._added[digest][0])

    def _renew(self, point: str) -> Candidate:
        """The point with its runs as they are now, in its place on the front."""
        runs = self._runs[point]
        candidate = _candidate(tuple(runs.values()))
        _, number = self._added[next(iter(runs))]
        if point in self._entries:
            self._leave(self._entries[point])
        entry = self._entries[point] = _Entry(candidate.trainable_params, number, candidate)
        if _valid([candidate]):
            bisect.insort(self._by_size, entry)
            self._enter(entry)
        return candidate

    def _enter(self, entry: _Entry) -> None:
        """Puts a point on the front, and takes off what it beats, unless a member beats it."""
        place = bisect.bisect_right(self._front, entry.params, key=_params)
        if place and self._front[place - 1].beats(entry):  # of those that are no larger the most accurate
            return
        first = last = bisect.bisect_left(self._front, entry.params, key=_params)
        while last < len(self._front) and self._front[last].accuracy <= entry.accuracy:
            last += 1
        equal = [other for other in self._front[first:last] if not entry.beats(other)]
        self._front[first:last] = sorted([*equal, entry])

    def _leave(self, entry: _Entry) -> None:
        """Takes a point away, and puts on the front what it alone kept off."""
        place = bisect.bisect_left(self._by_size, entry)
        if place == len(self._by_size) or self._by_size[place] is not entry:
            return  # it has no accuracy
        del self._by_size[place]
        on_front = bisect.bisect_left(self._front, entry)
        if on_front == len(self._front) or self._front[on_front] is not entry:
            return
        del self._front[on_front]
        larger = next((other.params for other in self._front[on_front:] if other.params > entry.params), math.inf)
        start = bisect.bisect_left(self._by_size, entry.params, key=_params)
        stop = bisect.bisect_left(self._by_size, larger, key=_params)
        for other in self._by_size[start:stop]:
            if other.params > entry.params or other.accuracy < entry.accuracy:  # its equals are on the front
                self._enter(other)


class _Entry(NamedTuple):
    """A point among those of its size: ascending in parameters, then as they came. Numbers are unique."""

    params: int
    number: int
    candidate: Candidate

    @property
    def accuracy(self) -> float:
        assert self.candidate.accuracy is not None
        return self.candidate.accuracy

    def beats(self, other: _Entry) -> bool:
        """No worse in both and better in one."""
        no_worse = self.params <= other.params and self.accuracy >= other.accuracy
        return no_worse and (self.params, self.accuracy) != (other.params, other.accuracy)


def _params(entry: _Entry) -> int:
    return entry.params
