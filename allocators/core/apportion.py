"""From real weights to whole experts: the only place that rounds.

    apportion([2.1, 2.9, 3.7], 10)                        # [2, 3, 5]; AlphaLoRA's equation 6, corrected by equation 7
    apportion(v, 160, rounding="largest_remainder")       # nearest whole numbers that sum to the total
    floor_share(0.25, 64)                                 # 16: Sieve's floor(fraction · E)

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


def floor_share(share: float, size: int) -> int:
    """floor(share · size) for the share that is meant: 0.29 of 100 is 29, though 0.29 * 100 is 28.99…"""
    return math.floor(share * size + 1e-9)


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
