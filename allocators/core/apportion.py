"""From real weights to whole experts and whole ranks: the only place that rounds.

    apportion([2.1, 2.9, 3.7], 10)                        # [2, 3, 5]; AlphaLoRA's equation 6, corrected by equation 7
    apportion(v, 160, rounding="largest_remainder")       # nearest whole numbers that sum to the total
    floor_share(0.25, 64)                                 # 16: Sieve's floor(fraction · E)
    ranks_for([.7, .1, .1, .1], [64] * 4, 16 * 64, maximum=[8] * 4)   # (8, 3, 3, 2): parameters, as ranks

Arithmetic is exact (fractions of integers), so ties are ties on every machine and the first one wins.
"""

from __future__ import annotations

import bisect
import math
import warnings
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from allocators.core.errors import InfeasibleError, ToolkitWarning, did_you_mean

Rounding = Literal["paper", "largest_remainder"]
ROUNDINGS: tuple[Rounding, ...] = ("paper", "largest_remainder")


def apportion(
    weights: Sequence[float], total: int, *, rounding: Rounding = "paper", min_experts: int = 1
) -> tuple[int, ...]:
    """Whole numbers, one a weight, that sum to `total`, follow the weights and are at least `min_experts`.

    rounding   `paper`: AlphaLoRA (arXiv:2410.10054), equations 6 and 7, see `paper_rounding`
               `largest_remainder`: nearest whole numbers, corrected where rounding erred most

    Raises InfeasibleError when the total cannot be reached or the weights are not positive numbers.
    """
    if rounding == "paper":
        return paper_rounding(weights, total, minimum=min_experts)
    if rounding == "largest_remainder":
        return largest_remainder(weights, total, minimum=min_experts)
    raise InfeasibleError(
        f"rounding must be one of {', '.join(ROUNDINGS)}, got '{rounding}'{did_you_mean(str(rounding), ROUNDINGS)}"
    )


def paper_rounding(weights: Sequence[float], total: int, *, minimum: int = 0) -> tuple[int, ...]:
    """AlphaLoRA's mapping, with w = v^β the weights:

        S_i = round(w_i / Σw · T)                                                     (eq. 6, half to even)
        until ΣS = T:   S[argmin(w − S)] += 1   or   S[argmax(w − S)] −= 1            (eq. 7, first on ties)

    Equation 7 compares the raw w with S, as printed and as published: adding one makes the same layer the argmin
    again, so a single layer takes every correction. That is kept, because it is what gave the published numbers, and
    warned about when a layer moves by more than one. What we add is the floor: equation 6 is raised to `minimum`, and
    equation 7 takes nothing from a layer that is down to it. With minimum 0 this is the paper's result wherever the
    paper's stays at zero or above.

    Raises InfeasibleError for weights that are not positive numbers or a total below the floor.
    """
    exact = _exact(weights)
    _check_total(total, len(exact), minimum, None)
    scale = Fraction(total) / sum(exact)
    start = [max(minimum, round(w * scale)) for w in exact]
    counts = list(start)
    missing = total - sum(counts)
    for _ in range(missing):
        counts[min(range(len(counts)), key=lambda i: exact[i] - counts[i])] += 1
    for _ in range(-missing):
        above = [i for i, n in enumerate(counts) if n > minimum]
        counts[max(above, key=lambda i: exact[i] - counts[i])] -= 1
    moved, worst = max((abs(n - s), -i) for i, (n, s) in enumerate(zip(counts, start, strict=True)))
    if moved > 1:
        warnings.warn(
            f"equation 7 moved layer {-worst} from {start[-worst]} to {counts[-worst]} experts (total {total}): "
            "rounding='largest_remainder' spreads such corrections over the layers",
            ToolkitWarning,
            stacklevel=3,
        )
    return tuple(counts)


def largest_remainder(
    weights: Sequence[float], total: int, *, minimum: int = 0, maximum: int | None = None
) -> tuple[int, ...]:
    """Proportional shares within [minimum, maximum], rounded to whole numbers that sum to `total`.

        t_i = clamp(λ w_i, minimum, maximum) with λ such that Σt = total
        S_i = round(t_i), half to even; then the layers where rounding erred most move by one, first on ties

    Every S_i is within one of t_i; a heavier layer never gets less; scaling all weights changes nothing.

    Raises InfeasibleError for weights that are not positive numbers or a total out of reach.
    """
    exact = _exact(weights)
    _check_total(total, len(exact), minimum, maximum)
    targets = _clamped_shares(exact, total, minimum, total if maximum is None else maximum)
    counts = [round(t) for t in targets]
    missing = total - sum(counts)
    step = 1 if missing > 0 else -1
    by_error = sorted(range(len(counts)), key=lambda i: step * (counts[i] - targets[i]))
    for i in by_error[: abs(missing)]:
        counts[i] += step
    return tuple(counts)


def ranks_for(
    weights: Sequence[float],
    costs: Sequence[int],
    budget: int,
    *,
    maximum: Sequence[int],
    minimum: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """Ranks, one a module, that follow the weights and spend a budget of parameters: FIM-LoRA's order of steps.

        t_i = min(λ w_i, maximum_i) with λ such that Σ c_i t_i = budget     whoever reaches its maximum stays there, and
                                                                            the rest is shared again (water-filling)
        r_i = ⌊t_i⌋, and what that leaves goes to the largest remainders, first on ties, as far as it pays for a rank
        r_i = max(r_i, minimum_i), paid for by the modules of the least weight, last on ties

    Costs differ between modules, so that a rest smaller than any module's price of a rank may stay unspent, and the
    budget is never overdrawn. Where the weights cannot take the budget, because all that are positive are at their
    maximum, the modules without weight share what is left equally.

    costs      parameters of one rank of a module, in + out
    maximum    most a module may have
    minimum    least a module gets; zeros unless given

    Raises InfeasibleError for weights that are not numbers from 0 up, or a budget below the minimum.
    """
    exact = _exact(weights)
    low = [0] * len(costs) if minimum is None else list(minimum)
    least = sum(c * r for c, r in zip(costs, low, strict=True))
    if any(r < 0 for r in low) or any(a > b for a, b in zip(low, maximum, strict=True)):
        raise InfeasibleError(
            f"ranks must be from 0 up to the largest possible, got {low[:3]}… to {list(maximum)[:3]}…"
        )
    if budget < least:
        raise InfeasibleError(
            f"{budget:,} parameters are below the {least:,} of the least rank in every module: raise rank, or lower "
            "min_rank"
        )
    targets = _filled(exact, costs, budget, maximum)
    ranks = [math.floor(t) for t in targets]
    by_remainder = sorted((i for i, t in enumerate(targets) if t), key=lambda i: ranks[i] - targets[i])
    _spend(ranks, by_remainder, costs, budget, maximum)
    by_weight = sorted(range(len(ranks)), key=lambda i: (exact[i], -i))
    _lift(ranks, low, by_weight, costs, budget)
    _spend(ranks, by_remainder, costs, budget, maximum)  # where a dear module paid for a cheap one
    return tuple(ranks)


def _filled(weights: Sequence[Fraction], costs: Sequence[int], budget: int, maximum: Sequence[int]) -> list[Fraction]:
    """min(λ w, maximum) that costs the budget; modules without weight share equally what the others cannot take."""
    targets = [Fraction(0)] * len(weights)
    left = Fraction(budget)
    for group in ([i for i, w in enumerate(weights) if w], [i for i, w in enumerate(weights) if not w]):
        share = [weights[i] or Fraction(1) for i in group]
        # the factor λ at which a module is full, ascending: before it, the module takes λ·w
        order = sorted(range(len(group)), key=lambda k: Fraction(maximum[group[k]]) / share[k])
        slope = sum((costs[group[k]] * share[k] for k in order), Fraction(0))
        for place, k in enumerate(order):
            i = group[k]
            if left <= 0 or left * share[k] < maximum[i] * slope:  # nobody after this one is full either
                for rest in order[place:]:
                    targets[group[rest]] = max(left, Fraction(0)) / slope * share[rest]
                return targets
            targets[i] = Fraction(maximum[i])
            left -= costs[i] * maximum[i]
            slope -= costs[i] * share[k]
    return targets


def _spend(ranks: list[int], order: Sequence[int], costs: Sequence[int], budget: int, maximum: Sequence[int]) -> None:
    """One rank more in this order, round after round, for everyone whose price the rest of the budget covers."""
    left = budget - sum(c * r for c, r in zip(costs, ranks, strict=True))
    more = True
    while more:
        more = False
        for i in order:
            if ranks[i] < maximum[i] and costs[i] <= left:
                ranks[i] += 1
                left -= costs[i]
                more = True


def _lift(ranks: list[int], minimum: Sequence[int], order: Sequence[int], costs: Sequence[int], budget: int) -> None:
    """Nobody below the minimum; where that overdraws the budget, ranks are taken in this order, module by module."""
    ranks[:] = map(max, ranks, minimum)
    over = sum(c * r for c, r in zip(costs, ranks, strict=True)) - budget
    for i in order:
        if over <= 0:
            return
        taken = min(ranks[i] - minimum[i], -(-over // costs[i]))
        ranks[i] -= taken
        over -= taken * costs[i]


def ceilings(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """⌈w_i·K⌉ with the K at which they sum to `total` (Adams's method); first on ties, at least one each.

    Raises InfeasibleError for weights that are not positive numbers, or a total below one each.
    """
    exact = _exact(weights)
    if not all(exact):
        raise InfeasibleError("weights must be positive: the ceiling of nothing is no expert")
    _check_total(total, len(exact), 1, None)
    counts = [1] * len(exact)
    for _ in range(total - len(exact)):
        counts[min(range(len(exact)), key=lambda i: counts[i] / exact[i])] += 1
    return tuple(counts)


def powers(values: Sequence[float], beta: float) -> list[float]:
    """v^β of values from 0 up, as weights; of their shares of the largest where v^β leaves what a float can hold.

    Raises InfeasibleError for a β that is no number from 0 up.
    """
    if not (math.isfinite(beta) and beta >= 0):
        raise InfeasibleError(f"beta must not be negative, got {beta}: 0 gives all the same share")
    try:
        weights = [value**beta for value in values]
    except OverflowError:
        weights = [math.inf]
    top = max(values, default=0.0)
    if top == 0 or (any(weights) and all(map(math.isfinite, weights))):
        return weights
    return [(value / top) ** beta for value in values]


def check_share(share: float) -> None:
    """Raises InfeasibleError for a share of things that is not above 0 and at most 1."""
    if not 0 < share <= 1:
        raise InfeasibleError(f"share must be above 0 and at most 1, got {share}")


def floor_share(share: float, size: int) -> int:
    """floor(share · size) for the share that is meant: 0.29 of 100 is 29, though 0.29 * 100 is 28.99…"""
    return math.floor(share * size + 1e-9)


def part_of_rank(rank: int, parts: int) -> int:
    """rank/parts rounded down, at least 1: an expert's rank as r/k or r/E."""
    return max(1, rank // parts)


def nearest_share(share: float, size: int) -> int:
    """floor(share · size + 1/2): a half goes up, as D-MoLE's script rounds."""
    return math.floor(share * size + 0.5 + 1e-9)


def _exact(weights: Sequence[float]) -> list[Fraction]:
    bad = [(i, w) for i, w in enumerate(weights) if not (math.isfinite(w) and w >= 0)]
    if bad:
        raise InfeasibleError(f"weights must be finite and not negative, got {bad[0][1]} at position {bad[0][0]}")
    exact = [Fraction(w) for w in weights]
    if not any(exact):
        raise InfeasibleError(f"at least one weight must be positive, got {len(exact)} zeros")
    return exact


def _check_total(total: int, size: int, minimum: int, maximum: int | None) -> None:
    if minimum < 0:
        raise InfeasibleError(f"min_experts must not be negative, got {minimum}")
    if total < size * minimum or total < 0:
        raise InfeasibleError(f"total_experts must be at least {size * minimum} ({minimum} a layer), got {total}")
    if maximum is not None and total > size * maximum:
        raise InfeasibleError(f"total_experts must be at most {size * maximum} ({maximum} a layer), got {total}")


def _clamped_shares(weights: Sequence[Fraction], total: int, low: int, high: int) -> list[Fraction]:
    """`clamp(λ w, low, high)` with the λ that makes them sum to `total`; a function of λ that only rises."""

    def shares(factor: Fraction) -> list[Fraction]:
        return [min(max(factor * w, Fraction(low)), Fraction(high)) for w in weights]

    def whole(factor: Fraction) -> Fraction:
        return sum(shares(factor), Fraction(0))

    bends = sorted({Fraction(bound) / w for w in weights if w for bound in (low, high)})
    right = bisect.bisect_left(bends, Fraction(total), key=whole)
    if right == len(bends):
        zeros = sum(1 for w in weights if not w)
        raise InfeasibleError(f"{total} experts do not fit: {zeros} of {len(weights)} weights are zero")
    at_right = shares(bends[right])
    if right == 0 or whole(bends[right]) == total:
        return at_right
    at_left = shares(bends[right - 1])  # between two bends the sum is a straight line
    way = (total - whole(bends[right - 1])) / (whole(bends[right]) - whole(bends[right - 1]))
    return [a + way * (b - a) for a, b in zip(at_left, at_right, strict=True)]
