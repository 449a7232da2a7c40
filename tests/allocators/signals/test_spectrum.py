"""Tails against golden values and an obvious loop, eigenvalues against fp64, weights read one matrix at a time."""

from __future__ import annotations

import json
import math
import random
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from scipy.linalg import blas, lapack
from torch import Tensor

from allocators import alphalora
from allocators.core.errors import InfeasibleError, StudyError, ToolkitWarning
from allocators.core.layers import layer_values
from allocators.core.shapes import shape_from_config
from allocators.core.types import ModelShape, ModuleShape, Signal
from allocators.signals import spectrum
from allocators.signals.cache import cached
from allocators.signals.spectrum import eigen, measure
from allocators.signals.spectrum.eigen import eigenvalues
from allocators.signals.spectrum.tails import XMIN_RULES, XminRule, alpha_hat, fit_tail, stable_rank
from allocators.signals.spectrum.values import condition, signal_to_noise, singular_values
from tests import GOLDEN, ROOT
from tests.allocators import tiny
from tests.allocators.models import dense_shape, moe_shape

PUBLISHED = json.loads((GOLDEN / "spectrum.json").read_text())
TINY_MOE = ROOT / "trainers" / "embedded" / "tiny_moe"

seeds = st.integers(0, 2**32 - 1)
rules = st.sampled_from(XMIN_RULES)


def random_spectrum(seed: int) -> NDArray[Any]:
    """Heavy, light or bent, of 3 to 300 eigenvalues."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(3, 300))
    lam = rng.pareto(rng.uniform(0.3, 5), size) + rng.uniform(0.01, 1)
    return lam if rng.random() < 0.5 else np.exp(rng.normal(0, rng.uniform(0.1, 2), size))


def hill_of(lam: Sequence[float] | NDArray[Any], rule: XminRule = "published") -> float:
    return fit_tail(lam, xmin_rule=rule).hill


# ------------------------------------------------------------------------------------------------- from λ to numbers


@pytest.mark.parametrize("rule", XMIN_RULES)
@pytest.mark.parametrize("case", PUBLISHED["spectra"], ids=lambda case: case["name"])
def test_golden_tails(case: dict[str, Any], rule: XminRule) -> None:
    tail, expected = fit_tail(case["eigenvalues"], xmin_rule=rule), case[rule]
    assert tail.index == expected["i"]
    assert tail.xmin == pytest.approx(expected["xmin"], rel=1e-12)
    assert tail.hill == pytest.approx(expected["alpha"], abs=1e-8)
    assert tail.distance == pytest.approx(expected["D"], abs=1e-8)


@pytest.mark.parametrize("case", PUBLISHED["spectra"], ids=lambda case: case["name"])
def test_golden_metrics(case: dict[str, Any]) -> None:
    assert stable_rank(case["eigenvalues"]) == pytest.approx(case["stable_rank"], abs=1e-8)
    assert alpha_hat(case["eigenvalues"], hill=fit_tail(case["eigenvalues"]).hill) == pytest.approx(
        case["alpha_hat"], abs=1e-8
    )


@pytest.mark.parametrize("case", PUBLISHED["hill"])
def test_the_scripts_count_one_more_than_equation_5(case: dict[str, Any]) -> None:
    k = case["paper_k"]
    ours = fit_tail(case["eigenvalues"], xmin_rule="published")
    assert len(case["eigenvalues"]) - ours.index == case["code_tail_n"] == k + 1
    assert ours.hill == pytest.approx(case["alpha_code"], abs=1e-12)
    assert (ours.hill - 1) == pytest.approx((k + 1) / k * (case["alpha_paper_eq5"] - 1))


def by_loop(eigenvalues: Sequence[float] | NDArray[Any], rule: XminRule) -> tuple[int, float] | None:
    """The published rule and its repair as their formulas stand, one candidate and one eigenvalue at a time."""
    lam = sorted(float(x) for x in eigenvalues)
    x = np.log10(lam)
    counts, edges = np.histogram(x, bins=np.linspace(x[0], x[-1], 101))
    x2 = 10 ** edges[list(counts).index(max(counts))]
    best = None
    for i, xmin in enumerate(lam[:-1]):
        if not (math.log10(0.95 * x2) if rule == "published" else 0.95 * x2) <= xmin <= 1.5 * x2:
            continue
        tail = lam[i:]
        n = len(tail)
        spread = math.fsum(math.log(x / xmin) for x in tail)
        if spread == 0:
            continue
        hill = 1 + n / spread
        distance = max(abs(1 - (x / xmin) ** (1 - hill) - j / n) for j, x in enumerate(tail))
        if best is None or distance < best[2] - 1e-12:
            best = (i, hill, distance)
    return best[:2] if best else None


@given(seeds, st.sampled_from(["published", "window"]))
def test_equals_a_loop_over_candidates(seed: int, rule: XminRule) -> None:
    lam = random_spectrum(seed)
    expected, tail = by_loop(lam, rule), fit_tail(lam, xmin_rule=rule)
    assert expected is not None
    index, hill = expected
    assert (tail.index, tail.hill) == (index, pytest.approx(hill, rel=1e-9))


@given(st.lists(st.integers(1, 40), min_size=2, max_size=80), st.sampled_from(["published", "window"]))
def test_equals_the_loop_where_values_repeat(values: list[float], rule: XminRule) -> None:
    assume(len(set(values)) > 1)
    expected = by_loop(values, rule)
    if expected is None:
        with pytest.raises(StudyError, match="finds no tail"):
            fit_tail(values, xmin_rule=rule)
    else:
        assert hill_of(values, rule) == pytest.approx(expected[1], rel=1e-9)


@given(seeds, st.sampled_from(["window", "peak", "median"]), st.floats(1e-6, 1e6))
def test_scale_changes_nothing_but_xmin(seed: int, rule: XminRule, factor: float) -> None:
    lam = random_spectrum(seed)
    tail, scaled = fit_tail(lam, xmin_rule=rule), fit_tail(lam * factor, xmin_rule=rule)
    assert (scaled.index, scaled.hill) == (tail.index, pytest.approx(tail.hill, rel=1e-9))
    assert scaled.xmin == pytest.approx(tail.xmin * factor, rel=1e-12)


def test_the_published_rule_feels_the_scale() -> None:
    """Its lower bound is log10(0.95·x2): at 0.1 times the scale it cuts off a tail that it admits at 100 times."""
    lam = np.r_[(1 - (np.arange(100) + 0.5) / 100) ** -1.0, np.linspace(30, 30.5, 12)]
    small, large = (fit_tail(lam * factor, xmin_rule="published") for factor in (0.1, 100))
    assert small.index > large.index
    assert fit_tail(lam * 0.1, xmin_rule="window").index == fit_tail(lam * 100, xmin_rule="window").index


@given(seeds, rules)
def test_order_and_zeros_change_nothing(seed: int, rule: XminRule) -> None:
    lam = random_spectrum(seed)
    mixed = [*lam, *[0.0] * (seed % 4)]
    random.Random(seed).shuffle(mixed)
    assert fit_tail(mixed, xmin_rule=rule) == fit_tail(lam, xmin_rule=rule)
    assert stable_rank(mixed) == pytest.approx(stable_rank(lam))


@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.0, 4.5, 7.0])
@pytest.mark.parametrize("size", [100, 1000])
def test_an_exact_power_law_is_recovered_within_its_standard_error(alpha: float, size: int) -> None:
    share_above = 1 - (np.arange(size) + 0.5) / size
    lam = share_above ** (-1 / (alpha - 1))
    for rule in XMIN_RULES:
        tail = fit_tail(lam, xmin_rule=rule)
        assert tail.hill == pytest.approx(alpha, abs=(alpha - 1) / math.sqrt(size - tail.index))


@settings(max_examples=25)
@given(seeds, st.floats(1.5, 5))
def test_a_sampled_power_law_is_recovered_within_five_standard_errors(seed: int, alpha: float) -> None:
    lam = np.random.default_rng(seed).pareto(alpha - 1, 2000) + 1
    tail = fit_tail(lam, xmin_rule="median")
    assert tail.hill == pytest.approx(alpha, abs=5 * (alpha - 1) / math.sqrt(1000))


@given(seeds)
def test_stable_rank_lies_between_one_and_the_size(seed: int) -> None:
    lam = random_spectrum(seed)
    assert 1 <= stable_rank(lam) <= len(lam)


@pytest.mark.parametrize(
    ("lam", "message"),
    [
        ([], "got 0"),
        ([0.0, 0.0], "got 0"),
        ([3.0], "got 1"),
        ([2.0, 2.0, 2.0, 0.0], "got 1"),
        ([1.0, math.nan], "finite"),
        ([1.0, math.inf], "finite"),
        ([-1.0, 2.0], "not negative"),
    ],
)
def test_what_has_no_tail_is_refused(lam: list[float], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        fit_tail(lam)


def test_smallest_spectra_that_have_one() -> None:
    assert hill_of([1.0, math.e]) == pytest.approx(1 + 2 / 1)
    assert hill_of([math.e, 1.0], "peak") == pytest.approx(1 + 2 / 1)
    with pytest.raises(StudyError, match=r"'median' finds no tail in 2 eigenvalues: try published, window, peak"):
        fit_tail([1.0, math.e], xmin_rule="median")
    with pytest.raises(StudyError, match="did you mean 'published'"):
        fit_tail([1.0, 2.0], xmin_rule="publish")  # type: ignore[arg-type]  # refused


# ------------------------------------------------------------------------------------------------------ from W to λ


def exact(W: Tensor) -> NDArray[Any]:
    return np.sort(np.linalg.svd(W.numpy().astype(np.float64), compute_uv=False)) ** 2


def with_singular_values(values: NDArray[Any], rows: int, columns: int, *, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.normal(size=(rows, len(values))))[0]
    right = np.linalg.qr(rng.normal(size=(columns, len(values))))[0]
    return torch.from_numpy((left * values) @ right.T).float()


def square(seed: int, size: int = 200) -> Tensor:
    """Half of them heavy-tailed, as trained attention weights are."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(size, size, generator=generator) / size**0.5
    heavy: Tensor = W * torch.rand(size, generator=generator) ** -0.4
    return heavy if seed % 2 else W


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 3), (40, 40), (130, 500), (500, 130), (200, 200)])
def test_eigenvalues_are_the_squared_singular_values(shape: tuple[int, int]) -> None:
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 1e-3)):
        W = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
        assert eigenvalues(W) == pytest.approx(exact(W.float()), rel=tolerance)
        assert eigenvalues(W.T) == pytest.approx(exact(W.float()), rel=tolerance)


@settings(max_examples=12, deadline=None)
@given(seeds)
def test_permuting_rows_and_columns_changes_nothing(seed: int) -> None:
    W = square(seed)
    generator = torch.Generator().manual_seed(seed)
    moved = W[torch.randperm(200, generator=generator)][:, torch.randperm(200, generator=generator)]
    assert eigenvalues(moved) == pytest.approx(eigenvalues(W), rel=0.02)
    assert hill_of(eigenvalues(moved)) == pytest.approx(hill_of(eigenvalues(W)), abs=1e-3)


@pytest.mark.parametrize("factor", [1e-30, 1e-4, 1e4, 1e30])
def test_scaling_the_weights_scales_the_eigenvalues(factor: float) -> None:
    W = square(1)
    assert eigenvalues(W * factor) == pytest.approx(eigenvalues(W) * factor**2, rel=0.02)
    assert hill_of(eigenvalues(W * factor), "window") == pytest.approx(hill_of(eigenvalues(W), "window"), abs=1e-3)


def plain_fp32(W: Tensor) -> NDArray[Any]:
    lam: NDArray[Any] = torch.linalg.eigvalsh(W.T @ W).double().numpy()
    positive: NDArray[Any] = lam[lam > 0]
    return positive


@pytest.mark.parametrize("seed", range(6))
def test_fp32_errs_by_less_than_the_bound_where_it_matters(seed: int) -> None:
    W = square(seed, size=400)
    form = eigen._tridiagonal(eigen._gram(W.numpy(), blas.ssyrk))
    lam, expected = lapack.ssterf(form.diagonal, form.beside)[0], exact(W)
    low = expected < eigen.TRUSTED * eigen.NOISE * expected[-1]
    assert low.any()
    assert abs(lam - expected)[low].max() < eigen.NOISE * expected[-1]


def test_square_matrices_need_more_than_fp32_and_get_it() -> None:
    """The criterion of the file's head: without it the histogram starts at rounding noise and `hill` jumps."""
    ours, plain = [], []
    for seed in range(16):
        W = square(seed)
        hill = hill_of(exact(W))
        ours.append(abs(hill_of(eigenvalues(W)) - hill))
        plain.append(abs(hill_of(plain_fp32(W)) - hill))
    assert max(ours) < 1e-4
    assert max(plain) > 1e-2


@pytest.mark.parametrize("seed", range(6))
def test_eigenvalues_are_right_where_the_result_needs_them(seed: int) -> None:
    """The smallest, where the histogram begins, and all that a tail may hold; those between, by a bin or less."""
    W = square(seed, size=300)
    lam, expected = eigenvalues(W), exact(W)
    error = abs(lam / expected - 1)
    trusted = expected >= eigen.TRUSTED * eigen.NOISE * expected[-1]
    assert not trusted[0]
    assert error[0] < 1e-3
    assert error[trusted].max() < 1 / eigen.TRUSTED
    assert error.max() < 1 / eigen.RESOLVED


def routes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which computations were done, in order."""
    seen: list[str] = []
    gram, refined = eigen._gram, eigen._refined

    def spy_gram(A: NDArray[Any], syrk: Any) -> NDArray[Any]:
        seen.append(str(A.dtype))
        return gram(A, syrk)

    def spy_refined(*arguments: Any) -> Any:
        seen.append("refined")
        return refined(*arguments)

    monkeypatch.setattr(eigen, "_gram", spy_gram)
    monkeypatch.setattr(eigen, "_refined", spy_refined)
    return seen


BULK = np.linspace(0.2, 1, 200)


@pytest.mark.parametrize(
    ("values", "rows", "expected"),
    [
        (BULK, 600, ["float32"]),
        (BULK, 200, ["float32"]),
        (np.r_[2e-3, BULK], 201, ["float32", "refined"]),
        (np.r_[1e-4, BULK], 201, ["float32", "refined"]),
        (np.r_[np.geomspace(1e-4, 1e-3, 40), BULK], 240, ["float32", "float64"]),
        (np.r_[np.full(8, 1e-4), np.linspace(3e-3, 4e-3, 192), 1], 201, ["float32", "refined", "float64"]),
        (np.r_[1e-6, BULK], 201, ["float32", "refined", "float64"]),
        (BULK[:100], 100, ["float64"]),
    ],
    ids=[
        "rectangular",
        "well conditioned",
        "smallest too near",
        "smallest lost",
        "many lost",
        "fullest bin too near",
        "nearly singular",
        "small matrix",
    ],
)
def test_fp64_is_used_where_the_result_asks_for_it(
    monkeypatch: pytest.MonkeyPatch, values: Any, rows: int, expected: list[str]
) -> None:
    seen = routes(monkeypatch)
    W = with_singular_values(values, rows, len(values))
    lam = eigenvalues(W)
    assert seen == expected
    assert lam[0] == pytest.approx(exact(W)[0], rel=4e-3)
    for rule in XMIN_RULES:
        assert hill_of(lam, rule) == pytest.approx(hill_of(exact(W), rule), rel=1e-3)


def test_a_refinement_that_lapack_gives_up_on_is_done_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    def give_up(*arguments: Any) -> None:
        raise np.linalg.LinAlgError

    monkeypatch.setattr(eigen, "_refined", give_up)
    assert eigenvalues(square(0)) == pytest.approx(exact(square(0)), rel=1e-6)


@pytest.mark.parametrize("rank", [1, 5, 150, 190, 199])
def test_zeros_are_dropped_whatever_the_rounding(rank: int) -> None:
    """Whole numbers: the products are exact, so the rank is."""
    generator = torch.Generator().manual_seed(rank)
    W = (
        torch.randint(-3, 4, (200, rank), generator=generator).float()
        @ torch.randint(-3, 4, (rank, 220), generator=generator).float()
    )
    lam = eigenvalues(W)
    assert len(lam) == rank
    assert lam == pytest.approx(exact(W)[-rank:], rel=1e-6)


@pytest.mark.parametrize("smallest", [1e-3, 1e-4, 1e-5, 3e-6])
@pytest.mark.parametrize("count", [1, 8, 20])
@pytest.mark.parametrize("diagonal", [True, False])
def test_equal_eigenvalues(smallest: float, count: int, diagonal: bool) -> None:
    """Clusters at both ends: rounding makes some of the small ones negative, by more than usual."""
    values = np.r_[np.full(count, smallest), np.ones(200 - count)]
    W = torch.diag(torch.from_numpy(values).float()) if diagonal else with_singular_values(values, 200, 200, seed=count)
    lam = eigenvalues(W)
    assert len(lam) == 200
    assert lam[0] == pytest.approx(exact(W)[0], rel=1e-2)


def test_zero_empty_and_broken_matrices() -> None:
    assert eigenvalues(torch.zeros(300, 200)).size == 0
    assert eigenvalues(torch.zeros(0, 5)).size == 0
    assert stable_rank(eigenvalues(torch.zeros(3, 3))) == 0.0
    assert eigenvalues(torch.eye(200)) == pytest.approx(np.ones(200))
    for bad in (math.nan, math.inf):
        W = torch.ones(200, 200)
        W[3, 4] = bad
        with pytest.raises(StudyError, match="not finite"):
            eigenvalues(W)


def test_the_cuda_route_keeps_the_same_criterion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arithmetic is plain torch: run here on the CPU, with the device's precision switch put back."""
    asked: list[torch.dtype] = []
    eigvalsh = torch.linalg.eigvalsh

    def spy(G: Tensor) -> Any:
        asked.append(G.dtype)
        return eigvalsh(G)

    monkeypatch.setattr(torch.linalg, "eigvalsh", spy)
    before = torch.backends.cuda.matmul.fp32_precision
    well, ill = with_singular_values(np.linspace(0.2, 1, 50), 50, 90), square(0)
    assert eigen._on_cuda(well) == pytest.approx(exact(well), rel=1e-4)
    assert asked == [torch.float32]
    assert eigen._on_cuda(ill) == pytest.approx(exact(ill), rel=1e-6)
    assert asked == [torch.float32, torch.float32, torch.float64]
    assert torch.backends.cuda.matmul.fp32_precision == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_and_cpu_agree() -> None:
    for W in (square(0), square(1), with_singular_values(np.linspace(0.2, 1, 200), 700, 200)):
        assert hill_of(eigenvalues(W.cuda())) == pytest.approx(hill_of(eigenvalues(W)), abs=1e-3)


# ----------------------------------------------------------------------------------------------------- the signal


def weights_of(shape: ModelShape, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{m.path}.weight": (torch.randn(m.out_features, m.in_features, generator=generator) / 4).to(dtype)
        for m in shape.of_role("attention", "mlp")
    }


def save(folder: Path, tensors: dict[str, Tensor], *, shards: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = sorted(tensors)
    where = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({n: tensors[n] for n in names if where[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


SHAPE = dense_shape(layers=3, hidden=24, width=40)


def test_rows_are_the_metrics_of_each_matrix(tmp_path: Path) -> None:
    tensors = weights_of(SHAPE)
    signal = measure(save(tmp_path, tensors), SHAPE, provenance={"test": True})
    assert set(signal.rows) == {m.path for m in SHAPE.modules}
    assert (signal.kind, signal.axis, signal.unit, dict(signal.provenance)) == (
        "spectrum",
        "module",
        "1",
        {"test": True},
    )
    for m in SHAPE.modules:
        lam = exact(tensors[f"{m.path}.weight"])
        expected = {
            "hill": hill_of(lam),
            "stable_rank": stable_rank(lam),
            "alpha_hat": alpha_hat(lam, hill=hill_of(lam)),
        }
        expected |= {f"hill_{rule}": hill_of(lam, rule) for rule in ("window", "peak", "median")}
        sigma = torch.linalg.svdvals(tensors[f"{m.path}.weight"].double())
        low, high = torch.quantile(sigma, torch.tensor([0.25, 0.75]).double())
        beta = min(m.in_features, m.out_features) / max(m.in_features, m.out_features)
        threshold = (high - low) / 1.349 * (1 + beta**0.5)
        signal_, noise = sigma[sigma > threshold].sum(), sigma[sigma <= threshold].sum()
        expected |= {"snr": float(signal_ / noise / sigma.max()), "spectral_norm": float(sigma.max())}
        expected["condition"] = float(sigma.max() / (sigma.min() + 1e-8))
        assert {name: values[0] for name, values in signal.rows[m.path].items()} == pytest.approx(expected, rel=1e-5)
    layer = [hill_of(exact(tensors[f"{m.path}.weight"])) for m in SHAPE.modules if m.layer == 1]
    assert len(layer) == 7
    assert layer_values(signal, SHAPE, metric="hill")[1] == pytest.approx(sum(layer) / 7, rel=1e-5)
    assert alphalora.allocate(signal, SHAPE, total_experts=12, rounding="largest_remainder").total_experts == 12 * 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_file_shards_other_prefixes_and_a_resident_model_agree(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = weights_of(SHAPE, dtype=dtype)

    def of(source: Any) -> Mapping[str, Any]:
        return measure(source, SHAPE, provenance={}).rows

    expected = of(save(tmp_path / "one", tensors))
    assert of(save(tmp_path / "three", tensors, shards=3)) == expected
    assert of(str(tmp_path / "three")) == expected
    bare = {name.removeprefix("model."): t for name, t in tensors.items()}
    assert of(save(tmp_path / "bare", bare)) == expected
    deeper = {f"language_model.{name}": t for name, t in tensors.items()} | {"vision.embed.weight": torch.ones(2, 2)}
    assert of(save(tmp_path / "deeper", deeper)) == expected
    resident = torch.nn.Module()
    for name, t in tensors.items():
        module = resident
        for part in name.split(".")[:-1]:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.weight = torch.nn.Parameter(t)
    assert of(resident) == expected


def test_one_matrix_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path, weights_of(SHAPE, dtype=torch.bfloat16), shards=2)
    read: list[weakref.ref[Tensor]] = []
    checked = spectrum._checked

    def spy(weight: Tensor, module: ModuleShape) -> Tensor:
        assert not any(earlier() is not None for earlier in read)
        read.append(weakref.ref(weight))
        return checked(weight, module)

    monkeypatch.setattr(spectrum, "_checked", spy)
    measure(folder, SHAPE, provenance={})
    assert len(read) == len(SHAPE.modules)


def test_the_embedded_moe_model_is_measured_on_its_attention_unless_experts_are_asked_for() -> None:
    shape = shape_from_config(json.loads((TINY_MOE / "config.json").read_text()), name="tiny-moe")
    signal = measure(TINY_MOE, shape, provenance={})
    assert set(signal.rows) == {m.path for m in shape.of_role("attention")}
    assert all(values[0] > 1 for row in signal.rows.values() for name, values in row.items() if "hill" in name)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_every_experts_spectrum_is_that_of_its_own_matrix(tmp_path: Path, family: str) -> None:
    """As the checkpoint has it, where each expert's projection is a matrix of its own."""
    model = tiny.model(family)
    shape = shape_from_config(model.config, name=family)
    specs = shape.of_role("expert")
    signal = measure(model, shape, provenance={}, modules=[m.path for m in specs])
    assert signal.rows.keys() == {f"{m.path}.{e}" for m in specs for e in range(m.num_experts)}
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for m in specs:
        for e in range(m.num_experts):
            sigma = torch.linalg.svdvals(stored[m.path.replace(f".{m.name}", f".{e}.{m.name}.weight")].double())
            assert signal.metric(f"{m.path}.{e}", "spectral_norm")[0] == pytest.approx(float(sigma[0]), rel=1e-4)
            assert signal.metric(f"{m.path}.{e}", "condition")[0] == pytest.approx(
                float(sigma[0] / sigma[-1]), rel=1e-3
            )


def test_experts_that_are_stored_transposed_and_by_turns() -> None:
    """GPT-OSS: [E, in, 2·out], gate in the even columns and up in the odd ones."""
    model = tiny.model("gpt_oss")
    up = next(m for m in shape_from_config(model.config, name="x").of_role("expert") if m.name == "up_proj")
    stack = model.get_submodule(up.path.rpartition(".")[0]).gate_up_proj
    assert torch.equal(spectrum.expert_weight(model, up, 2), stack[2, :, 1::2].t())


def test_experts_without_the_model_that_has_them_are_refused() -> None:
    shape = shape_from_config(json.loads((TINY_MOE / "config.json").read_text()), name="tiny-moe")
    with pytest.raises(StudyError, match="is a stack of experts: give the resident model"):
        measure(TINY_MOE, shape, provenance={}, modules=["up_proj"])


def test_a_ratio_by_hand_and_what_has_none() -> None:
    """σ 1..4 has quartiles 1.75 and 3.25, noise up to 1.5/1.349·2 = 2.22: (3 + 4)/(1 + 2)/4; 10 W has a tenth of it."""
    assert signal_to_noise([1, 2, 3, 4], sides=(4, 4)) == pytest.approx(7 / 12)
    assert signal_to_noise([10, 20, 30, 40], sides=(4, 4)) == pytest.approx(7 / 120)
    assert condition([1, 2, 3, 4]) == pytest.approx(4, rel=1e-7)
    assert condition(singular_values([4.0], size=2)) == pytest.approx(2e8)  # a zero was left out
    with pytest.raises(StudyError, match="all singular values are zero"):
        signal_to_noise(singular_values([], size=3), sides=(3, 3))
    with pytest.raises(StudyError, match="the ratio is infinite"):
        signal_to_noise([2.0] * 5, sides=(5, 9))


def test_modules_are_chosen_by_name_or_path(tmp_path: Path) -> None:
    folder = save(tmp_path, weights_of(SHAPE))
    path = SHAPE.modules[5].path
    signal = measure(folder, SHAPE, provenance={}, modules=["q_proj", path])
    assert set(signal.rows) == {path, *(m.path for m in SHAPE.modules if m.name == "q_proj")}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("gate", "routers have no spectrum"),
        ("q_pro", "choose from .*k_proj, o_proj, q_proj, up_proj, v_proj.*did you mean 'q_proj'"),
    ],
)
def test_modules_without_a_spectrum_are_refused(tmp_path: Path, asked: str, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        measure(tmp_path, moe_shape(), provenance={}, modules=[asked])


def test_a_dead_matrix_keeps_its_row_and_is_named(tmp_path: Path) -> None:
    tensors = weights_of(SHAPE)
    dead = SHAPE.modules[3].path
    tensors[f"{dead}.weight"].zero_()
    with pytest.warns(ToolkitWarning, match=rf"{dead} has no (hill|snr)"):
        signal = measure(save(tmp_path, tensors), SHAPE, provenance={})
    row = {metric: values for metric, values in signal.rows[dead].items() if values}
    assert row == {"stable_rank": (0.0,), "condition": (0.0,), "spectral_norm": (0.0,)}
    assert len(signal.rows) == len(SHAPE.modules)
    assert Signal.from_json(signal.to_json()) == signal
    with pytest.raises(InfeasibleError, match=rf"{dead} has no hill .*: metric=stable_rank exists everywhere"):
        alphalora.allocate(signal, SHAPE)
    assert alphalora.allocate(signal, SHAPE, metric="stable_rank").counts
    with pytest.raises(StudyError, match="signal has no 'hil'") as typo:
        alphalora.allocate(signal, SHAPE, metric="hil")
    assert not isinstance(typo.value, InfeasibleError)


@pytest.mark.parametrize("matrix", ["constant", "identity", "nan", "inf"])
def test_a_matrix_without_a_tail_makes_the_rule_infeasible_and_ends_nothing(matrix: str, tmp_path: Path) -> None:
    tensors, shape = weights_of(SHAPE), SHAPE
    path = next(m.path for m in shape.modules if m.in_features == m.out_features)
    weight = tensors[f"{path}.weight"]
    torch.nn.init.eye_(weight) if matrix == "identity" else weight.fill_({"constant": 0.5}.get(matrix, 0.0))
    if matrix in ("nan", "inf"):
        weight[0, 1] = float(matrix)
    with pytest.warns(ToolkitWarning, match=rf"{path} has no (hill|spectrum)"):
        signal = measure(save(tmp_path, tensors), shape, provenance={})
    with pytest.raises(InfeasibleError, match=rf"{path} has no hill") as error:
        alphalora.allocate(signal, shape)
    assert "\n" not in str(error.value)


class TestWeightsThatCannotBeRead:
    def refused(self, source: Any, message: str) -> None:
        with pytest.raises(StudyError, match=message) as error:
            measure(source, SHAPE, provenance={})
        assert "\n" not in str(error.value)

    def test_no_weights_in_the_folder(self, tmp_path: Path) -> None:
        self.refused(tmp_path, r"no model\.safetensors for")

    def test_no_such_model(self) -> None:
        self.refused("no-such/model", "no-such/model")

    def test_no_name_of_a_model(self) -> None:
        self.refused("no/such/model", "no/such/model")

    def test_a_missing_matrix(self, tmp_path: Path) -> None:
        tensors = weights_of(SHAPE)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        self.refused(save(tmp_path, tensors), r"0 tensors for model\.layers\.1\.mlp\.up_proj\.weight.*it holds 20")

    def test_a_missing_shard(self, tmp_path: Path) -> None:
        folder = save(tmp_path, weights_of(SHAPE), shards=3)
        (folder / "model-00002-of-00003.safetensors").unlink()
        self.refused(folder, "lacks the shard model-00002-of-00003")

    def test_sizes_of_another_model(self, tmp_path: Path) -> None:
        self.refused(save(tmp_path, weights_of(dense_shape(layers=3, hidden=8))), "where the config says")

    def test_quantised_weights(self, tmp_path: Path) -> None:
        tensors = {name: t.to(torch.float8_e4m3fn) for name, t in weights_of(SHAPE).items()}
        self.refused(save(tmp_path, tensors), "not quantised")

    def test_a_pointer_and_a_file_that_is_cut(self, tmp_path: Path) -> None:
        folder = save(tmp_path, weights_of(SHAPE))
        file = folder / "model.safetensors"
        content = file.read_bytes()
        for size in (len(content) - 2000, len(content) - 1, 100, 8, 7, 0):
            file.write_bytes(content[:size])
            self.refused(folder, r"model\.safetensors' is (cut short|no safetensors file).*fetch it again")
        file.write_bytes(content + b"\0")
        self.refused(folder, "longer than its head says")
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        self.refused(folder, r"model\.safetensors' is a Git LFS pointer.*git lfs pull")

    @pytest.mark.parametrize(
        "index", ["", "[]", "{", "{}", '{"weight_map": {"a": "../up"}}', '{"weight_map": {"a": 1}}']
    )
    def test_an_index_that_is_none(self, index: str, tmp_path: Path) -> None:
        folder = save(tmp_path, weights_of(SHAPE), shards=2)
        (folder / "model.safetensors.index.json").write_text(index)
        self.refused(folder, r"model\.safetensors\.index\.json'")


def test_other_names_on_disk_are_those_of_the_resident_model(tmp_path: Path) -> None:
    """Gemma 3: `language_model.model.layers…` in the file, `model.language_model.layers…` in memory, and a tower of
    vision layers with the same names beside them.
    """
    tensors = weights_of(SHAPE)
    expected = measure(save(tmp_path / "plain", tensors), SHAPE, provenance={})
    stored = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    stored |= {name.replace("model.", "vision_tower.vision_model.encoder.", 1): torch.ones(4, 4) for name in tensors}
    shape = replace(
        SHAPE,
        modules=tuple(replace(m, path=m.path.replace("model.", "model.language_model.", 1)) for m in SHAPE.modules),
    )
    signal = measure(save(tmp_path / "stored", stored), shape, provenance={})
    assert [*signal.rows.values()] == [*expected.rows.values()]


class Interrupted(Exception):
    pass


def stop_after(count: int) -> Callable[[int, int, str], None]:
    def progress(done: int, total: int, path: str) -> None:
        if done == count:
            raise Interrupted

    return progress


def test_an_interrupted_measurement_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, resume = save(tmp_path / "model", weights_of(SHAPE)), tmp_path / "partial.json"
    whole = measure(folder, SHAPE, provenance={"a": 1})
    with pytest.raises(Interrupted):
        measure(folder, SHAPE, provenance={"a": 1}, resume=resume, progress=stop_after(8))
    assert [f.name for f in tmp_path.iterdir() if f.is_file()] == ["partial.json"]
    seen: list[tuple[int, int]] = []
    calls: list[int] = []
    compute = spectrum.eigenvalues

    def spy(weight: Tensor) -> NDArray[Any]:
        calls.append(1)
        return compute(weight)

    monkeypatch.setattr(spectrum, "eigenvalues", spy)
    again = measure(
        folder, SHAPE, provenance={"a": 1}, resume=resume, progress=lambda done, total, path: seen.append((done, total))
    )
    assert again.digest == whole.digest
    assert len(calls) == 21 - 8
    assert seen == [(i, 21) for i in range(1, 22)]
    assert not resume.exists()


@pytest.mark.parametrize("damage", ["of another measurement", "cut short"])
def test_a_partial_file_that_does_not_fit_is_named_and_begun_anew(tmp_path: Path, damage: str) -> None:
    folder, resume = save(tmp_path / "model", weights_of(SHAPE)), tmp_path / "partial.json"
    with pytest.raises(Interrupted):
        measure(folder, SHAPE, provenance={"weights": "old"}, resume=resume, progress=stop_after(3))
    if damage == "cut short":
        resume.write_text(resume.read_text()[:-5])
    with pytest.warns(ToolkitWarning, match=r"partial\.json"):
        signal = measure(folder, SHAPE, provenance={"weights": "new"}, resume=resume)
    assert signal.digest == measure(folder, SHAPE, provenance={"weights": "new"}).digest


def test_is_measured_once_for_all_who_ask(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", weights_of(SHAPE))
    provenance = spectrum.provenance_of("mine", "sha256:0")
    calls = []

    def run() -> Signal:
        calls.append(1)
        return measure(folder, SHAPE, provenance=provenance, resume=tmp_path / "partial.json")

    first, second = (cached("spectrum", provenance, folder=tmp_path / "signals", measure=run) for _ in range(2))
    assert first.digest == second.digest
    assert len(calls) == 1


def test_the_plan_of_a_model_that_lies_in_no_folder(tmp_path: Path) -> None:
    from tests.allocators import tiny

    model = tiny.model("llama")
    shape = shape_from_config(model.config, name="tiny llama")
    source = SimpleNamespace(
        name="tiny llama", identity="sha256:1", model=model, shape=shape, folder=None, device="cpu", dtype="float32",
        scratch=tmp_path, progress=lambda *what: None,
    )  # fmt: skip
    provenance, run = spectrum.measurement_of(source)
    signal = run()
    assert (
        dict(signal.provenance) == provenance == spectrum.provenance_of("tiny llama", "sha256:1") | {"dtype": "float32"}
    )
    assert set(signal.rows) == {m.path for m in shape.modules}
    assert len(alphalora.allocate(signal, shape).counts) == 3 * 7
