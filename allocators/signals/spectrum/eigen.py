"""Eigenvalues λ of WᵀW for a weight W, on a CPU or on CUDA.

    lam = eigenvalues(weight)              # ascending, zeros left out

They come from the Gram matrix of the smaller side in fp32, which is several times faster than singular values. The
price is an absolute error of about δ = `NOISE`·λ_max, and the histogram of the published rule (`tails.py`) feels it,
because it begins at the smallest eigenvalue: on square matrices plain fp32 moves `hill` by tenths and more
(tests/benchmarks/spectrum.py prints by how much). So fp32 is kept where the result does not depend on what it cannot
tell:

- the smallest eigenvalue is above `TRUSTED`·δ (most matrices that are not square), or
- it and all below `RESOLVED`·δ are computed again from W itself in fp64, on the few directions that they span, and the
  histogram's fullest bin begins above `TRUSTED`·δ.

Otherwise, and where an eigenvalue may be zero, all are computed again from the Gram matrix in fp64.

Letters: W [m, n] a weight, N = min(m, n) eigenvalues ascending, K of them refined.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from scipy.linalg import blas, lapack
from threadpoolctl import ThreadpoolController
from torch import Tensor

from allocators.core.errors import StudyError
from allocators.signals.spectrum.tails import Vector, fullest_bin

NOISE = float(np.finfo(np.float32).eps)  # δ/λ_max; small fp32 eigenvalues of weights err by δ/3 at most
TRUSTED = 1000  # times δ: from here up fp32 is right to 1/1000
RESOLVED = 20  # times δ: from here up it is right to 1/20: enough for bins that are not the fullest
FLOOR = 1e-10  # times λ_max: below it a refined eigenvalue may be zero, which only fp64 throughout can tell
SMALL = 128  # matrices up to this size cost nothing in fp64
# Up to this size BLAS gets one thread. It makes thousands of short calls that wait for all threads; where another
# process has one of the cores, two threads took 354 s for what one did in 5 (210 matrices, 576 and 1536 wide).
ONE_THREAD = 2048


def eigenvalues(weight: Tensor) -> Vector:
    """Non-zero eigenvalues of WᵀW (squared singular values), ascending, computed on the weight's device.

    weight   [m, n], any floating dtype; converted to fp32

    Zero is what fp64 cannot tell from it: λ ≤ N·2⁻⁵²·λ_max. Raises StudyError for weights that are not finite.
    """
    W = weight.detach().float()
    size = float(W.abs().max()) if W.numel() else 0.0
    if not math.isfinite(size):
        raise StudyError("the weights are not finite: there is a NaN or an infinity among them")
    if not size:
        return np.empty(0)
    extreme = not 1e-12 < size < 1e12  # squares would leave fp32
    lam: Vector = (_on_cuda if W.is_cuda else _on_cpu)(W / size if extreme else W)
    return lam * size**2 if extreme else lam


def _drop_zeros(lam: Vector) -> Vector:
    kept: Vector = lam[lam > lam.size * np.finfo(np.float64).eps * lam[-1]]
    return kept


def _on_cuda(W: Tensor) -> Vector:
    def solve(W: Tensor) -> Vector:
        gram = W.T @ W if W.shape[0] >= W.shape[1] else W @ W.T
        lam: Vector = torch.linalg.eigvalsh(gram).double().cpu().numpy()
        return lam

    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"  # TF32 has ten bits: NOISE would be a thousand times larger
    try:
        lam = solve(W)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    return lam if lam[0] >= TRUSTED * NOISE * lam[-1] else _drop_zeros(solve(W.double()))


def _on_cpu(W: Tensor) -> Vector:
    A = W.cpu().numpy()
    with _blas().limit(limits=1 if min(A.shape) <= ONE_THREAD else None, user_api="blas"):
        return _through_lapack(A)


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def _through_lapack(A: NDArray[Any]) -> Vector:
    """Half the Gram matrix (syrk), and the tridiagonal form that the refinement needs."""
    if min(A.shape) > SMALL:
        form = _tridiagonal(_gram(A, blas.ssyrk))
        lam: Vector = lapack.ssterf(form.diagonal, form.beside)[0].astype(np.float64)
        delta = NOISE * lam[-1]
        if lam[0] >= TRUSTED * delta:
            return lam
        K = max(4, int(np.searchsorted(lam, RESOLVED * delta)))
        if lam.size // 8 >= K:
            try:
                lowest = _refined(A, form, max(4 * delta, -2 * lam[0]), K)
            except np.linalg.LinAlgError:  # LAPACK may give up on vectors of a cluster: fp64 needs none
                lowest = np.zeros(K)
            lam = np.sort(np.append(lowest, lam[K:]))
            if lam[0] >= FLOOR * lam[-1] and fullest_bin(lam)[1] >= TRUSTED * delta:
                return lam
    return _drop_zeros(np.linalg.eigvalsh(_gram(A.astype(np.float64), blas.dsyrk)))


def _gram(A: NDArray[Any], syrk: Callable[..., Any]) -> NDArray[Any]:
    """Lower half of AᵀA or AAᵀ, whichever is smaller. `A.T` of a C-ordered array is Fortran-ordered: no copy."""
    gram: NDArray[Any] = syrk(1.0, A.T, trans=A.shape[0] < A.shape[1], lower=True)
    return gram


class _Tridiagonal(NamedTuple):
    """An fp32 matrix as Q T Qᵀ: T's diagonal and the one beside it, Q packed as reflectors below them."""

    diagonal: NDArray[Any]
    beside: NDArray[Any]
    packed: NDArray[Any]
    factors: NDArray[Any]


def _tridiagonal(gram: NDArray[Any]) -> _Tridiagonal:
    lwork = int(lapack.ssytrd_lwork(gram.shape[0], lower=1)[0])
    packed, diagonal, beside, factors, _ = lapack.ssytrd(gram, lower=1, lwork=lwork, overwrite_a=1)
    return _Tridiagonal(diagonal, beside, packed, factors)


def _refined(A: NDArray[Any], form: _Tridiagonal, shift: float, K: int) -> Vector:
    """The K smallest eigenvalues to 1e-12·λ_max and better: one step of Davidson's method in fp64.

    V spans the K lowest eigenvectors of the fp32 Gram matrix G. Its error tilts them towards the others by
    S = (G + shift)⁻¹ (WᵀW V − V VᵀWᵀW V); on V and S together WᵀW is projected in fp64, from W and not from G.
    """
    reflectors = np.asfortranarray(form.packed[1:, :-1])

    def rotate(X: NDArray[Any], turn: Literal["N", "T"] = "N") -> Vector:
        """Q X, or Qᵀ X with turn T; the first row stays. fp32 is enough for directions."""
        Y = np.asfortranarray(X, dtype=np.float32)
        Y[1:] = lapack.sormqr("L", turn, reflectors, form.factors, Y[1:], lwork=64 * K)[0]
        return Y.astype(np.float64)

    T = form.diagonal.astype(np.float64), form.beside.astype(np.float64)
    low = scipy.linalg.eigh_tridiagonal(*T, select="i", select_range=(0, K - 1), check_finite=False)[1]
    V = np.linalg.qr(rotate(low))[0]
    GV = _apply_gram(A, V)
    H = V.T @ GV
    shifted = np.stack([T[0] + shift, np.append(T[1], 0.0)])  # positive definite in spite of rounding
    tilt = rotate(GV - V @ H, "T")
    S = rotate(scipy.linalg.solveh_banded(shifted, tilt, lower=True, check_finite=False))
    S = np.linalg.qr(S - V @ (V.T @ S))[0]
    across = S.T @ GV
    projected = np.block([[H, across.T], [across, S.T @ _apply_gram(A, S)]])
    return np.linalg.eigvalsh(projected)[:K]


def _apply_gram(A: NDArray[Any], X: Vector) -> Vector:
    """WᵀW X in fp64 for the tall W, by rows of W: an fp64 copy of a 7B model's matrix would be 360 MB."""
    tall = A if A.shape[0] >= A.shape[1] else A.T
    total = np.zeros_like(X)
    for start in range(0, tall.shape[0], 256):
        rows = tall[start : start + 256].astype(np.float64)
        total += rows.T @ (rows @ X)
    return total
