"""Spectrum: LoRA on the matrices with the largest signal-to-noise ratio, type by type.

Spectrum (arXiv:2406.06623): singular values above σ_noise·(1 + √β) are signal, those below noise, with σ_noise =
IQR/1.349 and β the shorter side over the longer one; the ratio of their sums is divided by the largest singular value.
Because of that division cW has 1/c times the ratio of W, so that a matrix of almost zero weights comes first: of
Qwen2-57B-A14B's experts more than a quarter. Such matrices are dead and come last here, with a warning. A matrix whose
singular values are so alike that none is noise has an infinite ratio, too; it is alive, and first.

The published tool counts the number of an expert to its type, as if expert 3 of one layer had to do with expert 3 of
the next; here a type is a projection of all experts of all layers.

    python -m allocators.show model=tiny-dense allocator=spectrum
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from allocators._ranks import Equal, Matrix, dead, matrices_of, on_chosen, warn_of_dead
from allocators.core.apportion import check_share, floor_share
from allocators.core.errors import InfeasibleError
from allocators.core.types import ModelShape, ModuleRanks, Signal

NEEDS = "spectrum"
BASE = "any"
GIVES = "ranks"
FIXED_COST = False

DEAD = 1e6  # a ratio above it, or an infinite one, means weights of almost zero


def allocate(
    signal: Signal, shape: ModelShape, *, rank: int = 8, share: float = 0.5, equal: Equal = "parameters"
) -> ModuleRanks:
    """One rank for the int(n·share) matrices of largest ratio of each type, first on ties; none for the others.

    rank    the parameters (equal=parameters), or the rank of a chosen matrix (equal=rank, as published)
    share   of each type's matrices, 0.5 (the published default)
    equal   parameters: the chosen share what `rank` on every matrix has; rank: each has `rank`

    Raises InfeasibleError for a share outside (0, 1] or one that is no matrix of any type; StudyError where the signal
    lacks the ratio (`snr`).
    """
    check_share(share)
    matrices = matrices_of(shape)
    ratios = [_ratio(signal, m) for m in matrices]
    known = zip(matrices, ratios, dead(signal, matrices), strict=True)
    buried = [gone or (is_dead(r) and not _is_all_signal(signal, m, r)) for m, r, gone in known]
    warn_of_dead(sum(buried), len(matrices), what="makes their signal-to-noise ratio the largest")
    kinds: dict[str, list[int]] = {}
    for i, m in enumerate(matrices):
        kinds.setdefault(m.kind, []).append(i)
    chosen = [
        of[i] for of in kinds.values() for i in selected([ratios[i] for i in of], share, dead=[buried[i] for i in of])
    ]
    if not chosen:
        raise InfeasibleError(
            f"share {share} is no matrix of any type of {shape.name}: raise it to at least "
            f"{1 / max(map(len, kinds.values())):.4g}"
        )
    return on_chosen([matrices[i] for i in sorted(chosen)], matrices, rank=rank, equal=equal)


def selected(ratios: Sequence[float], share: float, *, dead: Sequence[bool] | None = None) -> list[int]:
    """Positions of the int(n·share) largest ratios of one type in their order, first on ties.

    Dead matrices are behind all others, those of the largest ratio last.
    """
    last = [is_dead(r) for r in ratios] if dead is None else list(dead)
    order = sorted(range(len(ratios)), key=lambda i: (last[i], ratios[i] if last[i] else -ratios[i]))
    return order[: floor_share(share, len(ratios))]


def is_dead(ratio: float) -> bool:
    """Whether a ratio says that the weights are almost zero."""
    return not ratio <= DEAD


def _is_all_signal(signal: Signal, matrix: Matrix, ratio: float) -> bool:
    """Whether no singular value is noise, of a matrix that is known to have weights: the largest ratio of all."""
    return math.isinf(ratio) and any(signal.rows.get(matrix.key, {}).get("spectral_norm", ()))


def _ratio(signal: Signal, matrix: Matrix) -> float:
    """Infinite where the matrix was measured and has no ratio: it is zero, or all signal. Its row is empty there."""
    if signal.rows.get(matrix.key, {}).get("snr") == ():
        return math.inf
    values = signal.metric(matrix.key, "snr")
    return math.fsum(values) / len(values)
