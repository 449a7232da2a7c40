"""How sure a difference is: between points of a front, between two rows of a table, between early and final ranks.

    paired(a, b)                   two points at the same seeds: mean difference, 95 % interval, paired t-test
    equivalence(pair, margin=.02)  two one-sided tests (TOST): are they equal to within a margin?
    compare(lower, higher, ...)    two points of a front: rise, its standard error, P(higher is better)
    interval(point, ...)           95 % of one point's accuracy, from its questions and its seeds
    picked_elsewhere(points)       the best of several points by seed, each time picked at the other seeds
    selection_bias(points, seed)   what picking the best at one seed added to the picked

Every number comes with the n it stands on. Distributions are scipy's; nothing is resampled.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from search.front import Candidate

CONFIDENCE = 0.95
TOO_CLOSE = 2.0  # standard errors of a difference below which it may be chance


@dataclass(frozen=True)
class Paired:
    """Differences a − b, seed by seed.

    n            seeds that both have
    difference   mean of the differences
    spread       their standard deviation; None for one seed
    low, high    95 % confidence interval of the mean (Student's t, n − 1 degrees of freedom)
    p            of the two-sided paired t-test; None, as the interval is, for one seed or differences without spread
    """

    n: int
    difference: float
    spread: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Paired | None:
    """Accuracies by seed of two points, compared at the seeds that both have; None where they share none.

    The test questions are the same at every seed, so this is about the trainings, not about other questions.
    """
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return None
    differences = [a[seed] - b[seed] for seed in seeds]
    n, mean = len(seeds), statistics.fmean(differences)
    if n == 1:
        return Paired(1, mean)
    spread = statistics.stdev(differences)
    if spread < 1e-12:  # equal but for rounding
        return Paired(n, mean, 0.0)
    from scipy import stats  # here: half a second that a study without repeats does not need

    error = spread / math.sqrt(n)
    reach = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, n - 1))
    return Paired(n, mean, spread, mean - reach, mean + reach, p)


def equivalence(pair: Paired, *, margin: float) -> float | None:
    """p of the two one-sided t-tests that the mean difference is above −margin and below +margin (Schuirmann's TOST).

    Below .05 the two are equal to within the margin, which is where the 90 % interval lies inside it. None where there
    is no spread to test with.
    """
    if not pair.spread:
        return None
    from scipy import stats

    error = pair.spread / math.sqrt(pair.n)
    above = stats.t.sf((pair.difference + margin) / error, pair.n - 1)
    below = stats.t.cdf((pair.difference - margin) / error, pair.n - 1)
    return float(max(above, below))


def holm(values: Sequence[float]) -> list[float]:
    """p values of so many tests, corrected for their number, in their order (Holm 1979).

    Below .05 all such differences are real at once with 95 %, whatever depends on what: the k-th smallest of m values
    counts (m − k + 1) times, and no less than a smaller one.
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    corrected, least = [0.0] * len(values), 0.0
    for place, i in enumerate(order):
        least = max(least, min(1.0, (len(values) - place) * values[i]))
        corrected[i] = least
    return corrected


@dataclass(frozen=True)
class Noise:
    """Variance of accuracy between the seeds of one point, pooled over the points that have several; its freedom."""

    variance: float
    freedom: int


def pooled(points: Iterable[Candidate]) -> Noise | None:
    """Σ (n_i − 1) s_i² / Σ (n_i − 1); None where no point has two seeds."""
    several = [[run.accuracy or 0.0 for run in point.complete] for point in points if len(point.complete) > 1]
    freedom = sum(len(accuracies) - 1 for accuracies in several)
    if not freedom:
        return None
    return Noise(math.fsum((len(a) - 1) * statistics.variance(a) for a in several) / freedom, freedom)


@dataclass(frozen=True)
class Difference:
    """rise: how much more accurate the second point is; stderr of that; chance: P(the second is the better one).

    stderr and chance are None where neither the evaluation's error nor a spread between seeds is known, and where both
    are 0: one question, or questions that were all answered alike, say nothing.
    freedom: degrees of freedom of stderr, infinite where no spread between seeds is in it.
    """

    rise: float
    stderr: float | None
    chance: float | None
    freedom: float = math.inf

    def reach(self, *, comparisons: int = 1) -> float | None:
        """Half the width of the 95 % interval of the rise; None where that is unknown.

        Of several comparisons all intervals hold at once with 95 % (Bonferroni): that of the best one among them is
        then no more flattered than its picking allows.
        """
        return None if self.stderr is None else half_width(self.stderr, self.freedom, comparisons=comparisons)

    @property
    def inside_noise(self) -> bool:
        """Whether it may be chance; False where that is unknown."""
        return self.stderr is not None and abs(self.rise) <= TOO_CLOSE * self.stderr

    @property
    def reading(self) -> str:
        """The verdict in words, as the report prints it."""
        if self.stderr is None:
            return "standard error unknown"
        return "inside the noise" if self.inside_noise else "more than noise"


def compare(lower: Candidate, higher: Candidate, *, noise: Noise | None, pool: bool = False) -> Difference:
    """P(higher > lower) = T_ν(rise / stderr), Student's t, from a flat prior on the difference.

    stderr² adds for each point the evaluation's error² and s²/n over its n seeds; a point with one seed takes s² from
    `noise`, the pooled variance, and where that is unknown too only the evaluation's error counts. ν by Welch and
    Satterthwaite, the evaluation's errors counting as known. Cautious: as if both had answered different questions.
    With `pool` every point takes its s² from `noise`: three seeds hardly know their own spread.
    """
    rise = (higher.accuracy or 0.0) - (lower.accuracy or 0.0)
    known = _error((lower, higher), noise, pool=pool)
    if known is None:
        return Difference(rise, None, None)
    error, freedom = known
    from scipy import special  # lighter than scipy.stats, and every report comes here

    ratio = rise / error
    chance = special.ndtr(ratio) if math.isinf(freedom) else special.stdtr(freedom, ratio)
    return Difference(rise, error, float(chance), freedom)


def interval(point: Candidate, *, noise: Noise | None, pool: bool = False) -> tuple[float, float] | None:
    """95 % interval of a point's accuracy, with the errors that `compare` takes; None where none of them is known.

    It ends at 0 and 1 where the accuracy lies between them.
    """
    known = _error((point,), noise, pool=pool)
    if known is None or point.accuracy is None:
        return None
    reach = half_width(*known)
    return max(point.accuracy - reach, min(0.0, point.accuracy)), min(point.accuracy + reach, max(1.0, point.accuracy))


def _error(points: Sequence[Candidate], noise: Noise | None, *, pool: bool) -> tuple[float, float] | None:
    """Standard error of a sum or difference of the points' accuracies, and its degrees of freedom.

    None where it is not known: an error of 0 is that of one question, or of questions that were all answered alike, and
    says nothing of other questions.
    """
    variance, by_freedom, known = 0.0, 0.0, False
    shared = 0.0
    for point in points:
        n = len(point.complete)
        if point.question_error is not None:
            variance, known = variance + point.question_error**2, True
        if noise is not None and (pool or n < 2):
            shared += noise.variance / max(n, 1)
        elif n > 1:
            part = (point.spread or 0.0) ** 2 / n
            variance, by_freedom, known = variance + part, by_freedom + part**2 / (n - 1), True
    if noise is not None and shared:
        variance, by_freedom, known = variance + shared, by_freedom + shared**2 / noise.freedom, True
    if not known or variance < 1e-24:
        return None
    return math.sqrt(variance), variance**2 / by_freedom if by_freedom else math.inf


def half_width(error: float, freedom: float, *, comparisons: int = 1) -> float:
    """Half the width of the 95 % interval of what has this standard error; of several, all hold at once."""
    from scipy import special

    tail = 1 - (1 - CONFIDENCE) / 2 / comparisons
    return error * float(special.ndtri(tail) if math.isinf(freedom) else special.stdtrit(freedom, tail))


def picked_elsewhere(points: Sequence[Candidate]) -> dict[int, float] | None:
    """By seed the accuracy there of the point that is best at the other seeds, of all that are complete at all seeds.

    The best of several points is flattered by the seed that it was picked at; this is not. The mean over the seeds is
    what picking by n − 1 seeds gives. None where the points share fewer than two seeds. All answer the same questions,
    so that what a point owes to them stays in.
    """
    by_seed = [{run.trial.seed: run.accuracy or 0.0 for run in point.complete} for point in points if point.complete]
    shared = sorted(set.intersection(*(set(of) for of in by_seed))) if by_seed else []
    if len(shared) < 2:
        return None
    best = {seed: max(by_seed, key=lambda of: math.fsum(of[s] for s in shared if s != seed)) for seed in shared}
    return {seed: of[seed] for seed, of in best.items()}


@dataclass(frozen=True)
class Bias:
    """How the runs that a search picked compare with fresh trainings of the same points.

    points, fresh   points picked; fresh trainings of them
    picked, mean    accuracy of the runs that were picked; of the fresh ones (means over the points)
    stderr          standard error of the difference over the points; None for one point
    """

    points: int
    fresh: int
    picked: float
    mean: float
    stderr: float | None


def selection_bias(points: Iterable[Candidate], *, seed: int) -> Bias | None:
    """The winner's curse, measured: points picked at `seed`, against the mean of their other seeds.

    None where no point has both.
    """
    picked, fresh, number = [], [], 0
    for point in points:
        own = [run.accuracy or 0.0 for run in point.complete if run.trial.seed == seed]
        others = [run.accuracy or 0.0 for run in point.complete if run.trial.seed != seed]
        if own and others:
            picked.append(own[0])
            fresh.append(statistics.fmean(others))
            number += len(others)
    if not picked:
        return None
    drops = [a - b for a, b in zip(picked, fresh, strict=True)]
    error = statistics.stdev(drops) / math.sqrt(len(drops)) if len(drops) > 1 else None
    return Bias(len(picked), number, statistics.fmean(picked), statistics.fmean(fresh), error)
