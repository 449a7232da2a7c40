"""How heavy the tail of each weight matrix's spectrum is. Reads weights, needs no data, changes nothing.

    signal = measure("models/llama-7b", shape, provenance={…})      # a folder, a Hugging Face id, or a resident model
    signal.metric("model.layers.0.self_attn.q_proj", "hill")
    fit_tail(eigenvalues(weight), xmin_rule="window").hill           # one matrix

Or from a terminal: python -m allocators.show model=tiny-dense

Per module: `hill`, `alpha_hat`, `stable_rank` by the published rule of where the tail begins, and `hill_window`,
`hill_peak`, `hill_median` by the others, which cost nothing beside the eigenvalues. Allocators take the plain mean over
a layer's modules (`core/layers.py`).

**Eigenvalues** λ of WᵀW come from the Gram matrix of the smaller side in fp32, which is several times faster than
singular values. The price is an absolute error of about δ = `NOISE`·λ_max, and the histogram of the published rule
feels it, because it begins at the smallest eigenvalue: on square matrices plain fp32 moves `hill` by tenths and more
(tests/benchmarks/spectrum.py prints by how much). So fp32 is kept where the result does not depend on what it cannot
tell:

- the smallest eigenvalue is above `TRUSTED`·δ (most matrices that are not square), or
- it and all below `RESOLVED`·δ are computed again from W itself in fp64, on the few directions that they span, and the
  histogram's fullest bin begins above `TRUSTED`·δ.

Otherwise, and where an eigenvalue may be zero, all are computed again from the Gram matrix in fp64.

A study's measurement streams the weights from disk as they are stored, one matrix at a time, and keeps the rows
measured so far beside the signal's file: one that is cut off goes on.

Letters: W [m, n] a weight, N = min(m, n) eigenvalues ascending, K of them refined.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import scipy.linalg
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import blas, lapack
from threadpoolctl import ThreadpoolController
from torch import Tensor, nn

from allocators.core.errors import StudyError, ToolkitWarning, did_you_mean, unknown
from allocators.core.types import ModelShape, ModuleShape, Signal, digest_of
from allocators.signals import Measurement, Source

VERSION = 1  # part of the provenance: raise it when the same weights would give other numbers

XminRule = Literal["published", "window", "peak", "median"]
XMIN_RULES: tuple[XminRule, ...] = get_args(XminRule)

BINS = 100
NOISE = float(np.finfo(np.float32).eps)  # δ/λ_max; small fp32 eigenvalues of weights err by δ/3 at most
TRUSTED = 1000  # times δ: from here up fp32 is right to 1/1000
RESOLVED = 20  # times δ: from here up it is right to 1/20: enough for bins that are not the fullest
FLOOR = 1e-10  # times λ_max: below it a refined eigenvalue may be zero, which only fp64 throughout can tell
SMALL = 128  # matrices up to this size cost nothing in fp64
# Up to this size BLAS gets one thread. It makes thousands of short calls that wait for all threads; where another
# process has one of the cores, two threads took 354 s for what one did in 5 (210 matrices, 576 and 1536 wide).
ONE_THREAD = 2048

Vector = NDArray[np.float64]
Weights = str | Path | nn.Module


# ------------------------------------------------------------------------------------------------- from λ to numbers


@dataclass(frozen=True, slots=True)
class Tail:
    """A power law fitted to the eigenvalues from `index` up.

    hill       the exponent α of the density λ^−α
    index      of the first eigenvalue of the tail, ascending order, zeros not counted
    xmin       that eigenvalue
    distance   Kolmogorov–Smirnov distance between the tail and the power law
    """

    hill: float
    index: int
    xmin: float
    distance: float


def fit_tail(eigenvalues: ArrayLike, *, xmin_rule: XminRule = "published") -> Tail:
    """Hill estimate of the tail that starts at eigenvalue i: n = N − i values, λ_i itself among them.

        hill = 1 + n / (Σ_{j≥i} ln λ_j − n ln λ_i)             D = max_j |1 − (λ_j/λ_i)^(1−hill) − j/n|,  j = 0..n−1

    This is what the published scripts compute; equation 5 of AlphaLoRA has k where this has k+1. x2 is the left edge of
    the first fullest of 100 equal bins of log10 λ.

    xmin_rule   published: the i < N−1 of smallest D, first on ties, with log10(0.95·x2) ≤ λ_i ≤ 1.5·x2. The lower
                bound compares a logarithm with an eigenvalue; all published scripts share this slip, so the rule
                depends on the scale of W
                window: the same with 0.95·x2, as it was meant
                peak: the first eigenvalue of that bin
                median: i = N // 2

    Zeros are dropped, the order does not matter. Raises StudyError for an unknown rule, fewer than two different
    eigenvalues, or a rule that leaves none to begin the tail with.
    """
    if xmin_rule not in XMIN_RULES:
        raise unknown("xmin_rule", str(xmin_rule), XMIN_RULES)
    lam = np.sort(np.asarray(eigenvalues, dtype=np.float64))
    if lam.size and not (math.isfinite(lam[-1]) and lam[0] >= 0):
        raise StudyError(f"eigenvalues of WᵀW are finite and not negative, got {lam[0]:.4g} to {lam[-1]:.4g}")
    lam = lam[lam > 0]
    if lam.size < 2 or lam[0] == lam[-1]:
        raise StudyError(f"a tail needs two different eigenvalues above zero, got {np.unique(lam).size}")
    ln = np.log(lam / lam[-1])  # relative to the largest: a tail of equal values then sums to exactly zero
    n = np.arange(lam.size, 0, -1.0)
    excess = np.cumsum(ln[::-1])[::-1] - n * ln
    with np.errstate(divide="ignore"):
        hill = np.where(excess > 0, 1 + n / excess, np.inf)
    index = _start(lam, ln, hill, xmin_rule)
    if index is None or not math.isfinite(hill[index]):
        raise StudyError(
            f"xmin_rule '{xmin_rule}' finds no tail in {lam.size} eigenvalues: try "
            f"{', '.join(rule for rule in XMIN_RULES if rule != xmin_rule)}"
        )
    return Tail(float(hill[index]), index, float(lam[index]), float(_distances(ln, hill, np.array([index]))[0]))


def alpha_hat(eigenvalues: ArrayLike, *, xmin_rule: XminRule = "published") -> float:
    """hill · log10 λ_max. Negative where λ_max < 1."""
    return fit_tail(eigenvalues, xmin_rule=xmin_rule).hill * math.log10(np.max(eigenvalues))


def stable_rank(eigenvalues: ArrayLike) -> float:
    """Σλ / λ_max, the squared Frobenius norm over the squared spectral norm: 1 … N. 0 for a zero matrix."""
    lam = np.asarray(eigenvalues, dtype=np.float64)
    return float(lam.sum() / lam.max()) if lam.any() else 0.0


def _start(lam: Vector, ln: Vector, hill: Vector, rule: XminRule) -> int | None:
    """Index where the tail begins; None where the rule allows none."""
    if rule == "median":
        return lam.size // 2
    first, x2 = _fullest_bin(lam)
    if rule == "peak":
        return first
    lowest = math.log10(0.95 * x2) if rule == "published" else 0.95 * x2
    allowed = (lam >= lowest) & (lam <= 1.5 * x2) & np.isfinite(hill)
    allowed[-1] = False
    return _best(ln, hill, np.flatnonzero(allowed))


def _fullest_bin(lam: Vector) -> tuple[int, float]:
    """Index of its first eigenvalue, and its left edge; the first bin of equally full ones."""
    counts, edges = np.histogram(np.log10(lam), bins=BINS)
    fullest = int(counts.argmax())
    return int(counts[:fullest].sum()), 10 ** edges[fullest]


def _best(ln: Vector, hill: Vector, candidates: NDArray[np.intp]) -> int | None:
    """The candidate of smallest distance, the first of equals.

    Distances at 32 places bound all candidates from below; whole ones are computed in the order of the bounds, until
    the next bound is above the best: exact, and a few dozen rows of N instead of N.
    """
    if not candidates.size:
        return None
    places = np.union1d(np.arange(0, ln.size, max(1, ln.size // 32)), [ln.size - 1])
    bounds = _distances(ln, hill, candidates, places)
    order = np.argsort(bounds, kind="stable")
    distances = np.full(candidates.size, np.inf)
    for block in np.array_split(order, math.ceil(order.size / 16)):
        if bounds[block[0]] > distances.min():
            break
        distances[block] = _distances(ln, hill, candidates[block])
    return int(candidates[distances.argmin()])


def _distances(ln: Vector, hill: Vector, starts: NDArray[np.intp], places: NDArray[np.intp] | None = None) -> Vector:
    """Kolmogorov–Smirnov distance of the tails from each start; over some places only, a lower bound of it."""
    start = starts[:, None]
    place = np.arange(starts.min(), ln.size) if places is None else places
    size = ln.size - start
    with np.errstate(over="ignore"):  # left of the start, where the value is not used
        beyond = np.exp((ln[place] - ln[start]) * (1 - hill[start]))
    gap = np.abs(1 - beyond - (place - start) / size)
    return np.where(place >= start, gap, 0.0).max(axis=1)


# ------------------------------------------------------------------------------------------------------ from W to λ


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
    lam = (_on_cuda if W.is_cuda else _on_cpu)(W / size if extreme else W)
    return lam * size**2 if extreme else lam


def _drop_zeros(lam: Vector) -> Vector:
    return lam[lam > lam.size * np.finfo(np.float64).eps * lam[-1]]


def _on_cuda(W: Tensor) -> Vector:
    def solve(W: Tensor) -> Vector:
        gram = W.T @ W if W.shape[0] >= W.shape[1] else W @ W.T
        return torch.linalg.eigvalsh(gram).double().cpu().numpy()

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


def _through_lapack(A: NDArray) -> Vector:
    """Half the Gram matrix (syrk), and the tridiagonal form that the refinement needs."""
    if min(A.shape) > SMALL:
        form = _tridiagonal(_gram(A, blas.ssyrk))
        lam = lapack.ssterf(form.diagonal, form.beside)[0].astype(np.float64)
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
            if lam[0] >= FLOOR * lam[-1] and _fullest_bin(lam)[1] >= TRUSTED * delta:
                return lam
    return _drop_zeros(np.linalg.eigvalsh(_gram(A.astype(np.float64), blas.dsyrk)))


def _gram(A: NDArray, syrk: Callable) -> NDArray:
    """Lower half of AᵀA or AAᵀ, whichever is smaller. `A.T` of a C-ordered array is Fortran-ordered: no copy."""
    return syrk(1.0, A.T, trans=A.shape[0] < A.shape[1], lower=True)


class _Tridiagonal(NamedTuple):
    """An fp32 matrix as Q T Qᵀ: T's diagonal and the one beside it, Q packed as reflectors below them."""

    diagonal: NDArray
    beside: NDArray
    packed: NDArray
    factors: NDArray


def _tridiagonal(gram: NDArray) -> _Tridiagonal:
    lwork = int(lapack.ssytrd_lwork(gram.shape[0], lower=1)[0])
    packed, diagonal, beside, factors, _ = lapack.ssytrd(gram, lower=1, lwork=lwork, overwrite_a=1)
    return _Tridiagonal(diagonal, beside, packed, factors)


def _refined(A: NDArray, form: _Tridiagonal, shift: float, K: int) -> Vector:
    """The K smallest eigenvalues to 1e-12·λ_max and better: one step of Davidson's method in fp64.

    V spans the K lowest eigenvectors of the fp32 Gram matrix G. Its error tilts them towards the others by
    S = (G + shift)⁻¹ (WᵀW V − V VᵀWᵀW V); on V and S together WᵀW is projected in fp64, from W and not from G.
    """
    reflectors = np.asfortranarray(form.packed[1:, :-1])

    def rotate(X: NDArray, turn: Literal["N", "T"] = "N") -> Vector:
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


def _apply_gram(A: NDArray, X: Vector) -> Vector:
    """WᵀW X in fp64 for the tall W, by rows of W: an fp64 copy of a 7B model's matrix would be 360 MB."""
    tall = A if A.shape[0] >= A.shape[1] else A.T
    total = np.zeros_like(X)
    for start in range(0, tall.shape[0], 256):
        rows = tall[start : start + 256].astype(np.float64)
        total += rows.T @ (rows @ X)
    return total


# ----------------------------------------------------------------------------------------------------- the signal


def measurement_of(source: Source) -> Measurement:
    """The spectrum of the base model's attention and MLP weights as they are stored, streamed from the source's folder,
    whatever the resident model was rounded to; of the resident model where there is no folder.
    """
    stored = source.folder
    provenance = provenance_of(source.name, source.identity) | ({} if stored else {"dtype": source.dtype})

    def run() -> Signal:
        source.scratch.mkdir(parents=True, exist_ok=True)
        return measure(
            stored() if stored else source.model,
            source.shape,
            provenance=provenance,
            device=str(source.device),
            progress=source.progress,
            resume=source.scratch / f"spectrum-{digest_of(provenance)}.part",
        )

    return Measurement(provenance, run)


def provenance_of(name: str, identity: str, *, modules: Collection[str] | None = None) -> dict[str, Any]:
    """What the numbers depend on when they are those of the stored weights."""
    chosen = {"modules": sorted(modules)} if modules is not None else {}
    return {"model": name, "weights": identity, "code": VERSION} | chosen


def measure(
    weights: Weights,
    shape: ModelShape,
    *,
    provenance: Mapping[str, Any],
    modules: Collection[str] | None = None,
    device: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    resume: Path | None = None,
) -> Signal:
    """Spectrum of every chosen module: rows by module path, metrics `hill`, `alpha_hat`, `stable_rank`, `hill_<rule>`.

    weights      folder with safetensors (sharded or not) or Hugging Face id, read one matrix at a time; or a resident
                 model
    provenance   everything the numbers depend on (`provenance_of`); becomes the signal's
    modules      names (`q_proj`) or paths; all attention and MLP projections unless given. On an MoE base that is
                 attention; routers and stacked experts are refused
    device       where to compute; unless given, CUDA where there is one, or where the resident model is
    progress     called with (done, total, path) after each module
    resume       file that keeps the rows measured so far, written whole or not at all, removed at the end

    A metric that a matrix does not have (a zero matrix has no tail) is left out of its row, with a warning.

    Raises StudyError for weights or modules that are not there or not what the shape says.
    """
    chosen = _choose(shape, modules)
    read = open_weights(weights)
    if device is None and not isinstance(weights, nn.Module):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    key = digest_of({"provenance": dict(provenance), "modules": [m.path for m in chosen]})
    rows: dict[str, Any] = _kept(resume, key) if resume else {}
    for done, module in enumerate(chosen, start=1):
        if module.path not in rows:
            rows[module.path] = _row(module, _checked(read(module.path), module), device)
            if resume:
                _keep(resume, key, rows)
        if progress:
            progress(done, len(chosen), module.path)
    signal = Signal("spectrum", rows, axis="module", unit="1", provenance=provenance)
    if resume:
        resume.unlink(missing_ok=True)
    return signal


def _row(module: ModuleShape, weight: Tensor, device: str | None) -> dict[str, list[float]]:
    try:
        lam = eigenvalues(weight.to(device) if device else weight)
    except StudyError as error:
        raise StudyError(f"{module.path}: {error}") from error
    row = {"stable_rank": [stable_rank(lam)]}
    for rule in XMIN_RULES:
        name = "hill" if rule == "published" else f"hill_{rule}"
        try:
            row[name] = [fit_tail(lam, xmin_rule=rule).hill]
        except StudyError as error:
            warnings.warn(f"{module.path} has no {name}: {error}", ToolkitWarning, stacklevel=3)
    if "hill" in row:
        row["alpha_hat"] = [row["hill"][0] * math.log10(lam[-1])]
    return row


def _choose(shape: ModelShape, modules: Collection[str] | None) -> list[ModuleShape]:
    usual = shape.of_role("attention", "mlp")
    if modules is None:
        return list(usual)
    possible = shape.of_role("attention", "mlp", "shared_expert")
    for asked in modules:
        if not any(asked in (m.name, m.path) for m in possible):
            names = sorted({m.name for m in possible})
            reason = ""
            if any(asked in (m.name, m.path) for m in shape.of_role("router", "expert")):
                reason = "; routers and stacked experts have no spectrum here"
            raise StudyError(
                f"{shape.name} has no matrix '{asked}' to take the spectrum of: choose from {', '.join(names)}{reason}"
                f"{did_you_mean(asked, names)}"
            )
    return [m for m in possible if m.name in modules or m.path in modules]


def _checked(weight: Tensor, module: ModuleShape) -> Tensor:
    expected = (module.out_features, module.in_features)
    if tuple(weight.shape) != expected or not weight.is_floating_point() or weight.element_size() < 2:
        raise StudyError(
            f"{module.path} is {weight.dtype} {tuple(weight.shape)} where the config says {expected}: "
            "the spectrum needs plain weights of 16 bits or more, not quantised ones"
        )
    return weight


# ------------------------------------------------------------------------------------------------- weights on disk


def open_weights(weights: Weights) -> Callable[[str], Tensor]:
    """Module path -> its weight."""
    if isinstance(weights, nn.Module):
        return lambda path: weights.get_parameter(f"{path}.weight")
    folder = Path(weights).expanduser()
    file_of = partial(_in_folder, folder) if folder.is_dir() else partial(_from_hub, str(weights))
    where = _tensors(file_of, str(weights))

    def read(path: str) -> Tensor:
        from safetensors import safe_open

        name = _tensor_name(path, where, str(weights))
        file = file_of(where[name])
        if file is None:
            raise StudyError(f"'{weights}' lacks the shard {where[name]} that its index names: fetch it again")
        with safe_open(
            file, framework="pt"
        ) as tensors:  # for each anew: what was read of a mapped shard counts as ours
            return tensors.get_tensor(name)

    return read


def _tensors(file_of: Callable[[str], Path | None], weights: str) -> Mapping[str, str]:
    """Tensor name -> name of the file that holds it."""
    from safetensors import safe_open

    index = file_of("model.safetensors.index.json")
    if index is not None:
        return json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    single = file_of("model.safetensors")
    if single is None:
        raise StudyError(
            f"no model.safetensors for '{weights}': give a folder that save_pretrained(...) wrote, or a Hugging Face "
            "id that is in the local cache or can be reached"
        )
    with safe_open(single, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), "model.safetensors")


def _tensor_name(path: str, where: Mapping[str, str], weights: str) -> str:
    """The tensor of a module: checkpoints may lack the leading `model.` or have something before it."""
    name = f"{path}.weight"
    if name in where:
        return name
    candidates = [n for n in where if name.endswith(f".{n}") or n.endswith(f".{name}")]
    if len(candidates) != 1:
        have = next((n for n in where if n.endswith("." + name.split(".", 3)[-1])), next(iter(where), "nothing"))
        raise StudyError(f"'{weights}' has {len(candidates)} tensors for {name}: it holds {len(where)}, e.g. {have}")
    return candidates[0]


def _in_folder(folder: Path, name: str) -> Path | None:
    return folder / name if (folder / name).is_file() else None


def _from_hub(repository: str, name: str) -> Path | None:
    """A file of a hub model, from the cache or fetched now; shards are fetched when their first matrix is read."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        cached = huggingface_hub.try_to_load_from_cache(repository, name)
        return Path(cached if isinstance(cached, str) else huggingface_hub.hf_hub_download(repository, name))
    except errors.EntryNotFoundError:  # not in the repository; or not in the cache, without a network
        return None
    except (OSError, errors.HTTPError, errors.HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise StudyError(
            f"'{repository}' is no folder here, and the hub does not give its weights: {reason}"
        ) from error


def _kept(file: Path, key: str) -> dict[str, dict[str, list[float]]]:
    """Rows of an interrupted measurement of the same weights."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["key"] == key:
            return kept["rows"]
        reason = "belongs to another measurement"
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        reason = "is damaged"
    warnings.warn(f"{file} {reason}: measuring the spectrum from the beginning", ToolkitWarning, stacklevel=3)
    return {}


def _keep(file: Path, key: str, rows: Mapping[str, Any]) -> None:
    beside = file.with_suffix(".tmp")
    beside.write_text(json.dumps({"key": key, "rows": rows}), encoding="utf-8")
    os.replace(beside, file)  # a kill leaves the old file or the new one
