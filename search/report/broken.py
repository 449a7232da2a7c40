"""Trainings that came to nothing: how many, and with which settings.

    found = broken(outcomes, base_of(records)); in_words(found)

A training is *broken* if it diverged, or ended within two standard errors of the untrained model or below: of the
base's accuracy where the study evaluated it, else of the task's chance. One that was stopped, failed or ran out of
memory says nothing of its settings and is not counted. Much of what seems to be the influence of a setting on accuracy
is which trainings it broke (`attribution.py`).
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from allocators.core.types import Outcome
from search.records import Records
from search.report.attribution import settings_of
from search.report.sections import Section
from search.report.uncertainty import TOO_CLOSE
from search.text import number

FEW_VALUES = 4  # numbers of a setting that are taken one by one; more are cut into parts of equally many trainings
PARTS, PER_PART = 8, 5  # so many parts at most; trainings in each
FEWEST = 3  # trainings with a value or range, and without it, of which a share is said
LEVEL = 0.05


@dataclass(frozen=True)
class Base:
    """What no training has to reach. `error`: standard error, 0 for chance; `name`: what it is, in words."""

    accuracy: float
    error: float
    name: str


def base_of(records: Records) -> Base | None:
    """The untrained model's accuracy, else the chance that the trainings recorded; None where neither is known."""
    if (untrained := records.untrained) is not None:
        return Base(untrained["accuracy"], untrained["stderr"], "the untrained model")
    return chance_of(records.finished.values())


def chance_of(outcomes: Iterable[Outcome]) -> Base | None:
    """The chance in the versions of the first outcome that has one; None where none has, or it is no number."""
    text = next((o.versions["chance"] for o in outcomes if "chance" in o.versions), "")
    try:
        chance = float(text)
    except ValueError:
        return None
    return Base(chance, 0.0, "chance") if 0 <= chance <= 1 else None


@dataclass(frozen=True)
class Culprit:
    """Of a setting the value or range of values whose broken trainings chance explains least.

    where                       `above 0.3`, `cosine`
    inside, trainings           broken ones with it, and all with it
    outside, others             broken ones without it, and all without it
    p                           that chance puts as many broken ones there (hypergeometric)
    """

    setting: str
    where: str
    inside: int
    trainings: int
    outside: int
    others: int
    p: float


@dataclass(frozen=True)
class Broken:
    """How many of the trainings are broken, and by which setting, the least likely to be chance first.

    ranges   values and ranges that were looked at: so often a small p had a chance to turn up
    """

    count: int
    diverged: int
    trainings: int
    base: Base | None
    culprits: tuple[Culprit, ...]
    ranges: int

    @property
    def sure(self) -> list[Culprit]:
        """Those that many looks do not explain (Bonferroni)."""
        return [culprit for culprit in self.culprits if culprit.p * self.ranges < LEVEL]


def broken(outcomes: Iterable[Outcome], base: Base | None) -> Broken:
    """Counts broken trainings; without a base only those that diverged are known to be."""
    judged = [o for o in outcomes if o.status == "diverged" or (o.status == "complete" and o.accuracy is not None)]
    bad = [_is_broken(outcome, base) for outcome in judged]
    culprits, ranges = [], 0
    settings = [settings_of(outcome.trial) for outcome in judged]
    for name in dict.fromkeys(name for of in settings for name in of):
        known = [(of[name], is_bad) for of, is_bad in zip(settings, bad, strict=True) if of.get(name) is not None]
        found = _culprits(name, [value for value, _ in known], [is_bad for _, is_bad in known])
        ranges += len(found)
        worst = min(found, key=lambda c: (c.p, -c.inside / c.trainings), default=None)
        if worst is not None and worst.inside:
            culprits.append(worst)
    diverged = sum(outcome.status == "diverged" for outcome in judged)
    by_chance = tuple(sorted(culprits, key=lambda culprit: (culprit.p, culprit.setting)))
    return Broken(sum(bad), diverged, len(judged), base, by_chance, ranges)


def _is_broken(outcome: Outcome, base: Base | None) -> bool:
    if outcome.status == "diverged" or outcome.accuracy is None:
        return True
    if base is None:
        return False
    error = (outcome.rungs[-1].stderr if outcome.rungs else None) or 0.0
    return outcome.accuracy <= base.accuracy + TOO_CLOSE * math.hypot(error, base.error)


def _culprits(name: str, values: Sequence[object], bad: Sequence[bool]) -> list[Culprit]:
    """Every value or range of a setting that enough trainings have, and enough lack."""
    found = []
    for where, inside, trainings in _counted(values, bad):
        others = len(values) - trainings
        if min(trainings, others) >= FEWEST:
            p = _chance(inside, trainings, sum(bad), len(values))
            found.append(Culprit(name, where, inside, trainings, sum(bad) - inside, others, p))
    return found


def _counted(values: Sequence[object], bad: Sequence[bool]) -> list[tuple[str, int, int]]:
    """Broken trainings and all, of values one by one; of numbers that have more than four, of runs of parts."""
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) < len(values) or len(set(numbers)) <= FEW_VALUES:
        each = _tally(values, bad)
        return [(number(value), *each[value]) for value in sorted(each, key=lambda v: (str(type(v)), str(v)))]
    parts = min(max(len(numbers) // PER_PART, 2), PARTS)
    cuts = sorted(set(statistics.quantiles(numbers, n=parts, method="inclusive")) - {max(numbers)})
    last = len(cuts)
    of_part = _tally([bisect.bisect_left(cuts, value) for value in numbers], bad)  # part k ends with cuts[k]
    counted = []
    for low in range(last + 1):
        inside = trainings = 0
        for high in range(low, last + 1):
            inside, trainings = inside + of_part[high][0], trainings + of_part[high][1]
            if (low, high) != (0, last):
                counted.append((_range_text(cuts, low, high), inside, trainings))
    return counted


def _tally(values: Iterable[object], bad: Sequence[bool]) -> dict[Any, tuple[int, int]]:
    """By value the broken trainings and all."""
    tally: dict[Any, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for value, is_bad in zip(values, bad, strict=True):
        broken_ones, trainings = tally[value]
        tally[value] = (broken_ones + is_bad, trainings + 1)
    return tally


def _range_text(cuts: Sequence[float], low: int, high: int) -> str:
    if low == 0:
        return f"up to {number(cuts[high])}"
    if high == len(cuts):
        return f"above {number(cuts[low - 1])}"
    return f"above {number(cuts[low - 1])} up to {number(cuts[high])}"


def _chance(inside: int, trainings: int, bad: int, total: int) -> float:
    """P(at least so many broken ones in so many trainings drawn from all): the tail of the hypergeometric."""
    least = max(inside, trainings - (total - bad))  # fewer there cannot be
    most = min(bad, trainings)
    if least > most:
        return 0.0
    ways = _log_comb(bad, least) + _log_comb(total - bad, trainings - least) - _log_comb(total, trainings)
    logarithms = [ways]
    for k in range(least, most):  # each from the one before: whole numbers of thousands of digits would be slow
        ratio = (bad - k) * (trainings - k) / ((k + 1) * (total - bad - trainings + k + 1))
        logarithms.append(logarithms[-1] + math.log(ratio))
    peak = max(logarithms)
    return min(math.exp(peak) * math.fsum(math.exp(each - peak) for each in logarithms), 1.0)


def _log_comb(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


# --- in words and a table


def in_words(found: Broken) -> list[str]:
    """`11 of 40 trainings were broken; 9 of the 10 with scaled_rate above 0.3`; nothing where none was."""
    if not found.count:
        return []
    said = f"{found.count} of {found.trainings} trainings were broken ({_meaning(found)})"
    if not found.sure:
        return [f"{said}; with no setting more often than chance explains."]
    worst = found.sure[0]
    rest = f"{worst.outside} of the other {worst.others}"
    return [f"{said}; {worst.inside} of the {worst.trainings} with {worst.setting} {worst.where}, {rest}."]


def _meaning(found: Broken) -> str:
    if found.base is None:
        return "diverged; what an untrained model has is unknown"
    within = f"within noise of {found.base.name}, {found.base.accuracy:.3f}, or below"
    return f"{within}, or diverged: {found.diverged}" if found.diverged else within


def sections(found: Broken) -> list[Section]:
    """By setting where most trainings were broken; nothing where none was, or no setting varied."""
    if not found.count or not found.culprits:
        return []
    rows = tuple(
        (c.setting, c.where, f"{c.inside} of {c.trainings}", f"{c.outside} of {c.others}", _p(c.p * found.ranges))
        for c in found.culprits
    )
    notes = (
        f"Broken: {_meaning(found)}. {found.count} of {found.trainings} trainings. Of every setting the value, or the "
        "range of values, whose share of broken trainings is least likely to be chance.",
        f"p: that chance puts as many there, times the {found.ranges} values and ranges looked at. scaled_rate is "
        "learning_rate · lora_alpha.",
    )
    head = ("setting", "value", "broken there", "broken elsewhere", "p")
    return [Section("Broken trainings", head, rows, notes)]


def _p(p: float) -> str:
    return "< .001" if p < 0.001 else "1" if p >= 1 else f"{p:.3f}".removeprefix("0")
