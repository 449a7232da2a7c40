"""Pareto halving: trainings pause at rungs, and a free worker goes on with those that are best in two objectives.

    python -m search.run space=sieve scheduler=pareto_halving evaluations=4 trials=40

Successive halving in its asynchronous form (Li et al. 2020, ASHA: promotion, nobody waits for a rung to fill), with the
ranking of Schmucker et al. 2021 (MO-ASHA: non-dominated sorting) and two differences. Trainable parameters are exact
and known, so the other objective alone changes from rung to rung: the *merit* there, a value that the caller gives, of
which more is better (`early.merit`: accuracy, or minus a loss). And inside a front, where all are equally good, the one
whose loss would cost most hypervolume comes first, which keeps a rung from protecting every cheap point that is only
cheap. Ranking within strata of like size instead was slower on recorded trainings, however the strata were cut. State
only: no Ray (`engine/tune.py` obeys it), no clock, no random numbers. What it decided can be told from the evaluations
on record: a study that was cut off says again, in their order, what was reached, gone on with and ended.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from allocators.core.types import Outcome
from search.early import rank_correlation

Members = Mapping[str, tuple[int, float | None]]  # by digest: trainable parameters, merit at the rung

BEYOND = 0.1  # of a front's extent: how far behind its worst corner the hypervolume is measured from
SHOWN_BY = 8  # trainings that have to end before their first rung is known to rank as the end does
AGREES = 0.5  # rank correlation of the first rung with the end from which on trainings pause there
MOST_RIVALS = 1_000  # trainings of a rung, the latest, that are ranked there: ranking costs more than their number
WATCHED = 0  # as `first_rung`: the first rung pauses nothing before it is known to agree


def rungs(evaluations: int, eta: int, first_rung: int = 1) -> tuple[int, ...]:
    """After which evaluations a training may pause: a share 1/η, 1/η², ... of them, rounded up, the first is the last.

    None of them is before `first_rung`; where none is left, it is one itself.

    >>> rungs(4, 2), rungs(3, 2), rungs(9, 3), rungs(3, 3), rungs(1, 3)
    ((1, 2), (1, 2), (1, 3), (1,), ())
    >>> rungs(4, 2, 2), rungs(9, 3, 2), rungs(3, 3, 2), rungs(3, 3, 3)
    ((2,), (3,), (2,), ())
    """
    found, share = set(), evaluations
    while share > 1:
        share = math.ceil(share / eta)
        found.add(share)
    later = {rung for rung in found if rung >= first_rung}
    if not later and first_rung < evaluations:
        later = {first_rung}
    return tuple(sorted(later))


def second_rung(evaluations: int, eta: int) -> int:
    """The rung after the first, or what lies half-way to the end where there is one rung only."""
    first, *later = rungs(evaluations, eta)
    return later[0] if later else (first + evaluations + 1) // 2


def ordered(members: Members) -> list[str]:
    """Best first: by non-dominated front, in a front by hypervolume contribution, then by name. Any order may be given.

    The contribution of a point is the area that only it dominates, of log parameters and merit as shares of the
    front's extent, measured from a corner that lies BEYOND its worst. Of points that are equal in both objectives the
    first by name has it and the others none. A training without a finite merit comes after all that have one.
    """
    valid = {key: (cost, merit) for key, (cost, merit) in members.items() if merit is not None and math.isfinite(merit)}
    names: dict[tuple[int, float], list[str]] = {}
    for key in sorted(valid):
        names.setdefault(valid[key], []).append(key)
    places = sorted(names)
    fronts = _fronts(places)
    best: list[str] = []
    for number in range(max(fronts, default=-1) + 1):
        front = [place for place, on in zip(places, fronts, strict=True) if on == number]
        share = dict(zip(front, _contributions(front), strict=True))
        best += [names[place][0] for place in sorted(front, key=lambda place: (-share[place], names[place][0]))]
        best += sorted(name for place in front for name in names[place][1:])
    return best + sorted(members.keys() - valid.keys())


def _fronts(places: list[tuple[int, float]]) -> list[int]:
    """Number of each point's non-dominated front, 0 for the outermost (numbers, not an order of the points)."""
    if not places:
        return []
    import moocore  # here: it brings numpy, which `help` and `dry_run` do without

    return [int(rank) for rank in moocore.pareto_rank([list(place) for place in places], maximise=[False, True])]


def _contributions(front: list[tuple[int, float]]) -> list[float]:
    """Hypervolume that each point of a front adds to the others."""
    import moocore

    costs, merits = [math.log(max(cost, 1)) for cost, _ in front], [merit for _, merit in front]
    rows = [
        [(max(costs) - cost) / (_extent(costs) or 1.0), (merit - min(merits)) / (_extent(merits) or 1.0)]
        for cost, merit in zip(costs, merits, strict=True)
    ]
    return [float(part) for part in moocore.hv_contributions(rows, [-BEYOND, -BEYOND], maximise=True)]


def _extent(values: list[float]) -> float:
    return max(values) - min(values)


def tokens_saved(outcomes: Iterable[Outcome], *, evaluations: int) -> tuple[int, int]:
    """Tokens that stopped trainings would have been trained for yet, and those of all trainings had none been stopped.

    A training that was stopped after n of its equally spaced evaluations would have had evaluations/n times its tokens.
    """
    saved = total = 0
    for outcome in outcomes:
        left = 0
        if outcome.status == "stopped" and outcome.rungs:
            left = round(outcome.tokens * (evaluations / len(outcome.rungs) - 1))
        saved, total = saved + left, total + outcome.tokens + left
    return saved, total


class NoHalving:
    """Every training runs to its end."""

    paused: Mapping[str, int] = MappingProxyType({})

    def restore(self, key: str, merits: list[float | None], *, cost: int, accuracy: float | None = None) -> None:
        """Does nothing."""

    def go_on(self, key: str) -> None:
        """Does nothing."""

    def reached(self, key: str, number: int, *, merit: float | None, cost: int) -> bool:
        """True: every training goes on."""
        return True

    def next(self) -> str | None:
        """None: nothing is paused."""
        return None

    def close(self) -> None:
        """Does nothing."""

    def ended(self, key: str, *, accuracy: float | None) -> None:
        """Does nothing."""


NO_HALVING = NoHalving()


class Halving:
    """Who goes on at a rung: the best 1/η of all that have reached it, as of now (of the latest, where they are many).

    evaluations   of a whole training, equally spaced in its tokens; after which of them one may pause: `rungs`
    eta           η: the part that goes on is 1/η, rounded down while trainings may still arrive
    first_rung    the evaluation from which on trainings may pause; WATCHED: the first rung pauses none while fewer than
                  eight trainings are complete, or while its merits rank them unlike their accuracies at the end do
                  (Spearman's correlation below AGREES); until then trainings pause at the second rung alone
    paused        training -> the rung it waits at
    """

    def __init__(self, *, evaluations: int, eta: int, first_rung: int = 1) -> None:
        at = rungs(evaluations, eta, max(first_rung, 1))
        self._watched: int | None = None
        if first_rung == WATCHED and at and second_rung(evaluations, eta) < evaluations:
            self._watched = at[0]
            at = tuple(sorted({*at, second_rung(evaluations, eta)}))
        self._eta = eta
        self._at: dict[int, dict[str, tuple[int, float | None]]] = {rung: {} for rung in at}
        self._promoted: dict[int, set[str]] = {rung: set() for rung in self._at}
        self._ends: dict[str, float] = {}
        self._closed = False
        self.paused: dict[str, int] = {}

    def restore(self, key: str, merits: list[float | None], *, cost: int, accuracy: float | None = None) -> None:
        """Takes in a training that has ended, by its merits: a rival and nothing else, wherever it ended.

        accuracy   of one that is complete
        """
        for rung in self._at:
            if len(merits) >= rung:
                self._arrives(key, rung, cost, merits[rung - 1])
            if len(merits) > rung:
                self._promoted[rung].add(key)
        self.ended(key, accuracy=accuracy)

    def _arrives(self, key: str, rung: int, cost: int, merit: float | None) -> None:
        """At a rung, where the oldest rival goes when there are too many; if it is paused, it stays so."""
        members = self._at[rung]
        members[key] = (cost, merit)
        if len(members) > MOST_RIVALS:
            oldest = next(iter(members))
            del members[oldest]
            self._promoted[rung].discard(oldest)
            self._ends.pop(oldest, None)

    def go_on(self, key: str) -> None:
        """Takes in that a paused training was gone on with."""
        self._promoted[self.paused.pop(key)].add(key)

    def reached(self, key: str, number: int, *, merit: float | None, cost: int) -> bool:
        """A training has its evaluation `number` (from 1): whether it goes on at once, else it is paused."""
        if number not in self._at or key in self._promoted[number]:  # what goes on reports its old rungs again
            return True
        self._arrives(key, number, cost, merit)
        if key in self._promotable(number):
            self._promoted[number].add(key)
            return True
        self.paused[key] = number
        return False

    def next(self) -> str | None:
        """The paused training to go on with: of the last rung that has one, the best. It counts as going on."""
        for rung in reversed(self._at):
            for key in self._promotable(rung):
                if self.paused.get(key) == rung:
                    self._promoted[rung].add(key)
                    del self.paused[key]
                    return key
        return None

    def close(self) -> None:
        """No training will be started any more: 1/η is rounded up, so that a small search ends with some whole ones."""
        self._closed = True

    def ended(self, key: str, *, accuracy: float | None) -> None:
        """A training has ended; it stays a rival at the rungs it reached. `accuracy` is None unless it is complete."""
        self.paused.pop(key, None)
        if accuracy is not None:
            self._ends[key] = accuracy

    def _promotable(self, rung: int) -> list[str]:
        """Those that are to go on or went on, best first."""
        members = self._at[rung]
        count = float(len(members))
        if rung != self._watched or self._agrees(rung):
            count /= self._eta
        best = ordered(members)[: math.ceil(count) if self._closed else math.floor(count)]
        return [key for key in best if _is_finite(members[key][1])]

    def _agrees(self, rung: int) -> bool:
        """Whether trainings that are complete were ranked at this rung as they are at the end."""
        merits = {key: merit for key, (_, merit) in self._at[rung].items() if merit is not None}
        pairs = [(merits[key], accuracy) for key, accuracy in self._ends.items() if key in merits]
        correlation = rank_correlation(pairs, fewest=SHOWN_BY)
        return correlation is not None and correlation >= AGREES


def _is_finite(merit: float | None) -> bool:
    return merit is not None and math.isfinite(merit)
