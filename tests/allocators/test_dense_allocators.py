"""Allocators for dense bases: laws of votes and shares, then every published list and the cases to check by hand."""

from __future__ import annotations

import itertools
import json
import random
import warnings
from collections.abc import Sequence
from fractions import Fraction
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocators import alphalora, lora_smoe, mola, sensitivity, uniform
from allocators.core import plugins
from allocators.core.errors import InfeasibleError, StudyError, ToolkitWarning
from allocators.core.layers import layer_values, on_layers
from allocators.core.shapes import shape_from_config
from allocators.core.types import ExpertCounts, ModelShape, ModuleShape, Signal, SignalKind
from tests import GOLDEN
from tests.allocators.models import dense_shape

PUBLISHED = {n: json.loads((GOLDEN / f"{n}.json").read_text()) for n in ("allocation", "spectrum", "parameters")}
LLAMA_7B = shape_from_config(
    {"model_type": "llama"}, name="llama-7b"
)  # the sizes of LLaMA-7B are the config class's defaults


def by_layer(
    values: Sequence[float], shape: ModelShape, *, metric: str = "hill", kind: SignalKind = "spectrum"
) -> Signal:
    """A signal whose modules scatter around the layer's value, so that a mean is needed to see it."""
    rows = {}
    for layer, value in enumerate(values):
        modules = [m for m in shape.modules if m.layer == layer]
        for i, m in enumerate(modules):
            spread = (i - (len(modules) - 1) / 2) / 64  # sums to zero, exactly
            rows[m.path] = {metric: (value + spread,)}
    return Signal(kind, rows, "module", "1", {})


def exactly(values: Sequence[float], shape: ModelShape, **kwargs: Any) -> Signal:
    metric, kind = kwargs.get("metric", "hill"), kwargs.get("kind", "spectrum")
    return Signal(kind, {m.path: {metric: (values[m.layer],)} for m in shape.modules}, "module", "1", {})


def votes_signal(shape: ModelShape, by_dataset: Sequence[Sequence[float]]) -> Signal:
    """`by_dataset[d][b]`: score of block b on data set d."""
    rows = {m.path: {"sum_sq_grad": tuple(d[b] for d in by_dataset)} for b, m in enumerate(shape.modules)}
    return Signal("sensitivity", rows, "dataset", "1", {})


def layers_of(allocation: ExpertCounts, shape: ModelShape) -> list[int]:
    """N_l, having checked that all modules of a layer have it."""
    counts = [
        {allocation.counts.get(m.path, 0) for m in shape.modules if m.layer == n} for n in range(shape.num_layers)
    ]
    assert all(len(c) == 1 for c in counts)
    return [c.pop() for c in counts]


# ------------------------------------------------------------------------------------------------ the layer's value


def test_a_layer_is_the_plain_mean_of_its_seven_modules() -> None:
    shape, published = LLAMA_7B, PUBLISHED["spectrum"]["llama_7b"]
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert [m.name for m in shape.modules[:7]] == list(names)
    values = dict(zip((m.path for m in shape.modules), itertools.chain(*published["per_matrix"]), strict=True))
    signal = Signal("spectrum", {path: {"hill": (v,)} for path, v in values.items()}, "module", "1", {})
    assert layer_values(signal, shape, metric="hill") == pytest.approx(published["layer_mean"], abs=2e-6)


def test_a_module_that_was_not_measured_is_named() -> None:
    shape = dense_shape(layers=2)
    signal = Signal("spectrum", {shape.modules[0].path: {"hill": (2.0,)}}, "module", "1", {})
    with pytest.raises(StudyError, match=r"no 'hill' for 'model\.layers\.0\.self_attn\.k_proj'"):
        alphalora.allocate(signal, shape)


# ---------------------------------------------------------------------------------------------------------- uniform


@given(st.integers(1, 40), st.integers(0, 300))
def test_uniform_sums_to_the_total_and_differs_by_at_most_one(layers: int, extra: int) -> None:
    shape = dense_shape(layers=layers)
    counts = layers_of(uniform.allocate(None, shape, total_experts=layers + extra), shape)
    assert sum(counts) == layers + extra
    assert max(counts) - min(counts) <= 1


def test_uniform_by_number_and_by_total_are_one_allocation() -> None:
    shape = dense_shape(layers=32)
    assert uniform.allocate(None, shape, experts_per_layer=5) == uniform.allocate(None, shape, total_experts=160)
    assert uniform.allocate(None, shape) == uniform.allocate(None, shape, experts_per_layer=5)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"experts_per_layer": 5, "total_experts": 160}, "got both"),
        ({"experts_per_layer": 0}, "at least 1, got 0"),
        ({"total_experts": 20}, r"total_experts must be at least 32 \((1|one) a layer\), got 20"),
        ({"total_experts": 0, "min_experts": 0}, "at least one"),
    ],
)
def test_uniform_refuses(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(InfeasibleError, match=message):
        uniform.allocate(None, dense_shape(layers=32), **knobs)


# ------------------------------------------------------------------------------------------------------------- mola


@pytest.mark.parametrize(("pattern", "layers"), [("2468", 32), ("8228", 28)])
def test_mola_layouts(pattern: str, layers: int) -> None:
    shape = dense_shape(layers=layers)
    assert (
        layers_of(mola.allocate(None, shape, pattern=pattern), shape)
        == (PUBLISHED["allocation"]["mola"][f"{pattern} on {layers} layers"])
    )


@given(st.lists(st.integers(0, 12), min_size=2, max_size=8).filter(any), st.integers(0, 30))
def test_mola_gives_consecutive_groups_of_nearly_one_size(numbers: list[int], extra: int) -> None:
    shape = dense_shape(layers=len(numbers) + extra)
    counts = layers_of(mola.allocate(None, shape, pattern="-".join(map(str, numbers))), shape)
    # read the groups back: some split into consecutive groups of sizes that differ by at most one gives the pattern
    small, larger = divmod(shape.num_layers, len(numbers))
    reachable = {(0, 0)}  # (layers used, larger groups used)
    for n in numbers:
        reachable = {
            (used + size, big + (size > small))
            for used, big in reachable
            for size in (small, small + 1)
            if counts[used : used + size] == [n] * size
        }
    assert (shape.num_layers, larger) in reachable


def test_mola_reads_digits_dashes_and_numbers() -> None:
    shape = dense_shape(layers=4)
    assert layers_of(mola.allocate(None, shape, pattern="4-6-8-10"), shape) == [4, 6, 8, 10]
    assert layers_of(mola.allocate(None, shape, pattern=2468), shape) == [2, 4, 6, 8]
    assert layers_of(mola.allocate(None, shape, pattern="0204"), shape) == [0, 2, 0, 4]
    assert layers_of(mola.allocate(None, shape, pattern="5"), shape) == [5, 5, 5, 5]


@pytest.mark.parametrize("pattern", ["", "24x8", "2-", "-2", "2--4", "2,4", "24688", "0000", -2468, None])
def test_mola_refuses(pattern: Any) -> None:
    with pytest.raises(InfeasibleError):
        mola.allocate(None, dense_shape(layers=4), pattern=pattern)


# -------------------------------------------------------------------------------------------------------- alphalora


@pytest.mark.parametrize("case", PUBLISHED["allocation"]["mapping"], ids=lambda c: f"{c['v']} T={c['T']}")
@pytest.mark.parametrize(("rounding", "column"), [("paper", "paper_and_code"), ("largest_remainder",) * 2])
@pytest.mark.parametrize(
    ("module", "kind", "metric"), [(alphalora, "spectrum", "hill"), (sensitivity, "sensitivity", "sum_sq_grad")]
)
def test_mapping_by_hand(
    case: dict[str, Any], rounding: str, column: str, module: ModuleType, kind: SignalKind, metric: str
) -> None:
    shape = dense_shape(layers=len(case["v"]))
    signal = exactly(case["v"], shape, metric=metric, kind=kind)
    allocation = module.allocate(
        signal, shape, total_experts=case["T"], beta=case["beta"], rounding=rounding, min_experts=0
    )
    assert layers_of(allocation, shape) == case[column]


def test_mistral_7b_from_a_metric_vector() -> None:
    case = PUBLISHED["allocation"]["mistral_7b"]
    shape = shape_from_config({"model_type": "mistral"}, name="mistral-7b")
    for signal in (exactly(case["v"], shape), by_layer(case["v"], shape)):
        allocation = alphalora.allocate(
            signal, shape, total_experts=case["T"], beta=case["beta"], rounding="paper", min_experts=0
        )
        assert layers_of(allocation, shape) == case["expected"]


@pytest.mark.parametrize("setting", PUBLISHED["spectrum"]["llama_7b"]["derived_alloc"])
def test_llama_7b_from_its_published_spectrum(setting: str) -> None:
    """With all seven values of every layer given, as measured: mean, equation 6 and equation 7 together."""
    published, shape = PUBLISHED["spectrum"]["llama_7b"], LLAMA_7B
    total, beta = (float(part.split("=")[1]) for part in setting.split(","))
    values = itertools.chain(*published["per_matrix"])
    signal = Signal("spectrum", {m.path: {"hill": (next(values),)} for m in shape.modules}, "module", "1", {})
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        allocation = alphalora.allocate(
            signal, shape, total_experts=int(total), beta=beta, rounding="paper", min_experts=0
        )
    assert layers_of(allocation, shape) == published["derived_alloc"][setting]
    # three of the nine lists show the runaway: one layer took two or three corrections
    assert bool(warned) == (setting in ("T=80,beta=2.0", "T=160,beta=2.0", "T=224,beta=2.5"))
    assert sum(published["derived_alloc"][setting]) == total


def test_llama_7b_has_the_published_number_of_parameters() -> None:
    values = PUBLISHED["spectrum"]["llama_7b"]["layer_mean"]
    for total in (160, 128):
        expected = PUBLISHED["parameters"]["llama_7b_r8"][f"T={total}"]
        for allocation in (
            alphalora.allocate(exactly(values, LLAMA_7B), LLAMA_7B, total_experts=total),
            uniform.allocate(None, LLAMA_7B, total_experts=total),
        ):
            assert allocation.trainable_params(LLAMA_7B, rank=8) == expected
    assert mola.allocate(None, LLAMA_7B, pattern="2468").trainable_params(LLAMA_7B, rank=8) == 105635840


@given(st.lists(st.floats(1.1, 9), min_size=2, max_size=12), st.integers(0, 60), st.sampled_from([1.0, 2.5, 3.0]))
def test_alphalora_sums_to_the_total_and_a_heavier_tail_never_gets_more(
    values: Sequence[float], extra: int, beta: float
) -> None:
    shape = dense_shape(layers=len(values))
    total = len(values) + extra
    knobs: dict[str, Any] = {"total_experts": total, "beta": beta}
    counts = layers_of(alphalora.allocate(exactly(values, shape), shape, rounding="largest_remainder", **knobs), shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ToolkitWarning)
        paper = layers_of(alphalora.allocate(exactly(values, shape), shape, **knobs), shape)
    assert sum(counts) == sum(paper) == total
    assert min(counts) >= 1
    assert min(paper) >= 1
    assert [n for _, n in sorted(zip(values, counts, strict=True))] == sorted(counts)


def test_beta_zero_is_uniform() -> None:
    shape = dense_shape(layers=7)
    signal = exactly([3.0, 1.5, 2.0, 9.0, 4.0, 4.0, 2.5], shape)
    ours = alphalora.allocate(signal, shape, total_experts=24, beta=0.0, rounding="largest_remainder")
    assert ours == uniform.allocate(None, shape, total_experts=24)


def test_a_correction_that_runs_away_is_warned_about_by_whoever_called() -> None:
    values = [1.0, 1.0, 1.0, 1.0, 10.0]  # 0.357 a layer: equation 6 gives four zeros, all four raised to the floor
    shape = dense_shape(layers=5)
    with pytest.warns(ToolkitWarning, match="largest_remainder"):
        alphalora.allocate(exactly(values, shape), shape, total_experts=5, beta=1.0)


def test_a_negative_metric_is_refused_with_the_reason() -> None:
    shape = dense_shape(layers=4)
    signal = exactly([1.0, -0.5, 1.0, 1.0], shape, metric="alpha_hat")
    with pytest.raises(InfeasibleError, match=r"alpha_hat of layer 1 of dense is -0\.5.*not negative.*metric=hill"):
        alphalora.allocate(signal, shape, metric="alpha_hat", total_experts=20)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"total_experts": 20}, r"total_experts must be at least 32 \((1|one) a layer\), got 20"),
        ({"rounding": "largest-remainder"}, "largest_remainder"),
        ({"beta": -1.0}, "beta must not be negative"),
        ({"beta": float("nan")}, "beta must not be negative"),
        ({"min_experts": 6}, "total_experts must be at least 192"),
    ],
)
@pytest.mark.parametrize(("module", "metric"), [(alphalora, "hill"), (sensitivity, "sum_sq_grad")])
def test_equation_6_refuses(module: ModuleType, metric: str, knobs: dict[str, Any], message: str) -> None:
    shape = dense_shape(layers=32)
    with pytest.raises(InfeasibleError, match=message):
        module.allocate(exactly([2.0] * 32, shape, metric=metric), shape, **knobs)


def test_an_unknown_metric_names_those_that_were_measured() -> None:
    shape = dense_shape(layers=2)
    with pytest.raises(StudyError, match=r"no 'hil' .* metrics \['hill'\]"):
        alphalora.allocate(exactly([2.0, 3.0], shape), shape, metric="hil")


def test_sensitivity_is_the_mean_over_modules_and_data_sets() -> None:
    shape = dense_shape(layers=2)
    rows = {m.path: {"sum_sq_grad": (1.0, 3.0) if m.layer == 0 else (5.0, 7.0)} for m in shape.modules}
    signal = Signal("sensitivity", rows, "dataset", "1", {})
    assert layer_values(signal, shape, metric="sum_sq_grad") == [2.0, 6.0]
    assert layers_of(sensitivity.allocate(signal, shape, total_experts=8), shape) == [2, 6]


def test_no_expert_at_all_is_refused() -> None:
    with pytest.raises(InfeasibleError, match="at least one"):
        on_layers([0, 0], dense_shape(layers=2))


# -------------------------------------------------------------------------------------------------------- lora_smoe


def percentile(scores: Sequence[float], percent: Fraction) -> Fraction:
    """By linear interpolation, in exact numbers."""
    ordered = sorted(map(Fraction, scores))
    place = percent / 100 * (len(ordered) - 1)
    low = place.numerator // place.denominator
    if low + 1 == len(ordered):
        return ordered[low]
    return ordered[low] + (place - low) * (ordered[low + 1] - ordered[low])


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=40),
    st.integers(1, 100),
)
def test_kept_is_strictly_above_the_percentile(scores: Sequence[int], percent_kept: int) -> None:
    threshold = percentile(scores, Fraction(100 - percent_kept))
    expected = [s > threshold for s in scores]
    assert lora_smoe.above_percentile(scores, percent_kept / 100) == expected


def test_votes_by_hand() -> None:
    case = PUBLISHED["allocation"]["lora_smoe"]["vote_example"]
    assert [float(percentile(s, Fraction(40))) for s in case["scores_by_dataset"]] == case["thresholds"]
    modules = tuple(ModuleShape(f"model.layers.{i}.mlp.up_proj", i, 4, 4) for i in range(5))
    shape = ModelShape("five blocks", modules, 5)
    allocation = lora_smoe.allocate(votes_signal(shape, case["scores_by_dataset"]), shape, retention=case["keep"])
    assert layers_of(allocation, shape) == case["votes"]
    assert allocation.gating == "hydra"


def qwen_attention() -> ModelShape:
    """Attention of Qwen2.5-3B, 36 layers: the blocks of the published table."""
    whole = shape_from_config(
        {
            "model_type": "qwen2",
            "hidden_size": 2048,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "intermediate_size": 11008,
        },
        name="qwen2.5-3b",
    )
    return ModelShape("qwen2.5-3b attention", whole.of_role("attention"), 36)


@given(st.integers(1, 8), st.integers(0, 2**32))
def test_the_votes_sum_to_data_sets_times_blocks_kept(num_datasets: int, seed: int) -> None:
    """Distinct scores: every data set keeps n − 1 − floor((1−retention)(n−1)) blocks, 86 of the published 144."""
    shape = qwen_attention()
    rng = random.Random(seed)
    signal = votes_signal(shape, [rng.sample(range(10**6), len(shape.modules)) for _ in range(num_datasets)])
    allocation = lora_smoe.allocate(signal, shape, retention=0.6)
    assert allocation.total_experts == 86 * num_datasets
    assert max(allocation.counts.values()) <= num_datasets


def test_the_published_table_keeps_the_law_of_the_votes() -> None:
    published = PUBLISHED["allocation"]["lora_smoe"]
    table = published["published_expert_num_qwen2.5-3b_attention"]
    shape = qwen_attention()
    counts = ExpertCounts({m.path: table[m.name][m.layer] for m in shape.modules}, gating="hydra")
    assert counts.total_experts == published["sum"] == 8 * 86
    assert max(counts.counts.values()) == 8
    # a data set that scores blocks by their number of votes keeps the most voted-for ones
    again = lora_smoe.allocate(
        votes_signal(shape, [[counts.counts.get(m.path, 0) for m in shape.modules]]), shape, retention=0.6
    )
    floor = min(table[m.name][m.layer] for m in shape.modules if m.path in again.counts)
    assert all(table[m.name][m.layer] < floor for m in shape.modules if m.path not in again.counts)


@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 3))
def test_strategies_rank_within_their_groups(seed: int, num_datasets: int, layers: int) -> None:
    """S ranks attention and MLP apart: multiplying every MLP score changes S nothing and gives U to the MLP."""
    shape, rng = dense_shape(layers=layers), random.Random(seed)
    scores = [rng.sample(range(1, 1000), len(shape.modules)) for _ in range(num_datasets)]
    louder = [[s * 1000 if m.role == "mlp" else s for s, m in zip(d, shape.modules, strict=True)] for d in scores]
    quiet, loud = votes_signal(shape, scores), votes_signal(shape, louder)
    assert lora_smoe.allocate(quiet, shape, strategy="S") == lora_smoe.allocate(loud, shape, strategy="S")
    together = lora_smoe.allocate(loud, shape, strategy="U", retention=3 / 7)
    assert {p.split(".")[3] for p in together.counts} == {"mlp"}


def test_with_one_data_set_every_kept_block_gets_experts_per_block() -> None:
    shape = dense_shape(layers=2)
    signal = votes_signal(shape, [range(len(shape.modules))])
    allocation = lora_smoe.allocate(signal, shape, experts_per_block=4)
    assert set(allocation.counts.values()) == {4}
    assert allocation.counts.keys() == lora_smoe.allocate(signal, shape).counts.keys()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"retention": 0.0}, "retention must be above 0"),
        ({"retention": 1.1}, "at most 1"),
        ({"experts_per_block": 0}, "at least 1"),
        ({"strategy": "u"}, "did you mean 'U'"),
    ],
)
def test_lora_smoe_refuses(knobs: dict[str, Any], message: str) -> None:
    shape = dense_shape(layers=2)
    with pytest.raises(InfeasibleError, match=message):
        lora_smoe.allocate(votes_signal(shape, [range(14)]), shape, **knobs)


def test_equal_scores_keep_nothing_and_say_so() -> None:
    shape = dense_shape(layers=2)
    with pytest.raises(InfeasibleError, match="keeps no block"):
        lora_smoe.allocate(votes_signal(shape, [[1.0] * 14]), shape)


def test_data_sets_must_be_the_same_in_every_row() -> None:
    shape = dense_shape(layers=1)
    rows = {m.path: {"sum_sq_grad": (1.0,) * (1 + (i == 3))} for i, m in enumerate(shape.modules)}
    with pytest.raises(StudyError, match="one value a data set"):
        lora_smoe.allocate(Signal("sensitivity", rows, "dataset", "1", {}), shape)


def test_all_five_are_found_by_name() -> None:
    assert {"uniform", "mola", "alphalora", "lora_smoe", "sensitivity"} <= set(plugins.names("allocators"))
