"""Rules for ranks: laws of all of them, then published numbers and cases to check by hand."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocators import (
    _roles,
    aletheia,
    dmole,
    domlora,
    eva,
    hill_ranks,
    hilo,
    kappatune,
    layermoe,
    plop,
    random_ranks,
    sensitivity_ranks,
    spectrum,
    stratified_ranks,
    uniform_ranks,
)
from allocators._ranks import matrices_of
from allocators.core import plugins
from allocators.core.apportion import ceilings, nearest_share
from allocators.core.errors import InfeasibleError, StudyError, ToolkitWarning
from allocators.core.types import ModelShape, ModuleRanks, ModuleShape, Signal
from tests import GOLDEN
from tests.allocators.models import dense_shape, moe_shape

SELECTION = json.loads((GOLDEN / "spectrum_selection.json").read_text())["models"]
DEAD = json.loads((GOLDEN / "spectrum_dead.json").read_text())
RULES = [n for n in plugins.names("allocators") if plugins.gives(plugins.load("allocators", n)) == "ranks"]
SHAPES = {
    "dense": dense_shape(layers=8, hidden=24, width=40),
    "moe": moe_shape(layers=4, experts=4, hidden=24, width=16),
}


def signal_of(kind: str, shape: ModelShape, values: Mapping[str, Sequence[float]] | None = None, **more: Any) -> Signal:
    """Of every matrix random values, the same for all metrics; `values`: of some metrics, in the matrices' order."""
    rng, matrices = random.Random(more.get("seed", 0)), matrices_of(shape)
    if kind == "representation":
        rows = {
            m.key: {"explained": tuple(rng.uniform(1, 9) / c for c in range(9, 73)), "feature_norm": (1.0,)}
            for m in matrices
        }
        return Signal("representation", rows, "component", "1", {})
    metrics = {"spectrum": ("hill", "snr", "condition"), "sensitivity": ("sum_sq_grad",)}[kind]
    rows = {m.key: dict.fromkeys(metrics, (rng.uniform(1, 9),)) for m in matrices}
    for metric, of in (values or {}).items():
        for m, value in zip(matrices, of, strict=True):
            rows[m.key] |= {metric: (value,)}
    return Signal(kind, rows, "module", "1", {})  # type: ignore[arg-type]


def row_of(*sizes: tuple[int, int], layers: Sequence[int] | None = None, name: str = "q_proj") -> ModelShape:
    """A matrix a size, each in a layer of its own unless `layers` says otherwise."""
    at = list(layers or range(len(sizes)))
    modules = tuple(
        ModuleShape(f"model.layers.{layer}.self_attn.{name}{i if layers else ''}", layer, a, b, role="attention")
        for i, (layer, (a, b)) in enumerate(zip(at, sizes, strict=True))
    )
    return ModelShape("row", modules, max(at) + 1)


def ranks(allocation: ModuleRanks, shape: ModelShape) -> list[int]:
    return [r for module in shape.modules for r in allocation.of(module)]


# --- laws


@pytest.mark.parametrize("base", SHAPES)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("rank", [1, 4, 7, 100])
def test_no_rule_overdraws_the_parameters_of_uniform_and_most_spend_them(name: str, base: str, rank: int) -> None:
    shape, rule = SHAPES[base], plugins.load("allocators", name)
    budget = uniform_ranks.allocate(None, shape, rank=rank).trainable_params(shape)
    for seed in range(5):
        signal = signal_of(rule.NEEDS, shape, seed=seed) if rule.NEEDS else None
        allocation = plugins.call(rule, signal, shape, {"rank": rank})
        assert isinstance(allocation, ModuleRanks)
        allocation.check(shape)
        spent = allocation.trainable_params(shape)
        assert spent <= budget
        got = list(zip(matrices_of(shape), _of_matrices(allocation, shape), strict=True))
        room = [m.cost for m, r in got if 0 < r < m.full]  # what could take one rank more of those that were chosen
        if name != "domlora" and room:
            assert budget - spent < min(room) * (4 if name == "stratified_ranks" else 1)
        assert all(0 <= r <= m.full for m, r in got)


def _of_matrices(allocation: ModuleRanks, shape: ModelShape) -> list[int]:
    of = {module.path: allocation.of(module) for module in shape.modules}
    return [of[m.module.path][m.expert or 0] for m in matrices_of(shape)]


@pytest.mark.parametrize("name", RULES)
def test_a_rank_below_one_is_refused(name: str) -> None:
    rule = plugins.load("allocators", name)
    with pytest.raises(InfeasibleError, match="rank must be at least 1, got 0"):
        plugins.call(rule, signal_of(rule.NEEDS or "spectrum", SHAPES["dense"]), SHAPES["dense"], {"rank": 0})


@given(st.lists(st.integers(1, 10**6), min_size=8 * 7, max_size=8 * 7), st.integers(1, 12))
def test_matrices_of_one_size_get_no_less_for_a_larger_score(scores: list[int], rank: int) -> None:
    shape = SHAPES["dense"]
    got = sensitivity_ranks.allocate(signal_of("sensitivity", shape, {"sum_sq_grad": scores}), shape, rank=rank)
    by_size: dict[tuple[int, int], list[tuple[float, int]]] = {}
    for m, score, r in zip(matrices_of(shape), scores, _of_matrices(got, shape), strict=True):
        by_size.setdefault((m.module.in_features, m.module.out_features), []).append((score, r))
    for pairs in by_size.values():
        lower: dict[float, int] = dict.fromkeys(sorted(s for s, _ in pairs), 0)
        for value, r in pairs:
            lower[value] = max(lower[value], r)
        # a rest that pays for a small matrix only may go to a lighter one: one rank at most
        assert all(r >= most - 1 for s, r in pairs for other, most in lower.items() if other < s)


@pytest.mark.parametrize("rule", [random_ranks, stratified_ranks])
@pytest.mark.parametrize("share", [None, 0.5])
def test_a_draw_is_its_seeds_alone(rule: Any, share: float | None) -> None:
    draws = [rule.allocate(None, SHAPES["moe"], rank=4, share=share, seed=seed) for seed in (0, 1, 2, 0)]
    assert draws[0] == draws[3]
    assert len(set(draws)) == 3


@pytest.mark.parametrize("share", [None, 0.25, 1.0])
def test_stratified_random_has_uniforms_parameters_in_every_quarter(share: float | None) -> None:
    shape = SHAPES["dense"]
    even, drawn = (
        uniform_ranks.allocate(None, shape, rank=4),
        stratified_ranks.allocate(None, shape, rank=4, share=share),
    )
    for quarter in range(4):
        own = ModelShape("quarter", tuple(m for m in shape.modules if m.layer // 2 == quarter), 8)
        spent = [sum(m.lora_params(r) for m in own.modules for r in a.of(m)) for a in (even, drawn)]
        assert 0 <= spent[0] - spent[1] < 24 + 24
        if share:
            assert sum(1 for m in own.modules if drawn.of(m) != (0,)) == int(share * len(own.modules))


def test_random_is_not_stratified() -> None:
    shape = SHAPES["dense"]
    first = [m for m in shape.modules if m.layer < 2]
    spent = {
        sum(m.lora_params(r) for m in first for r in random_ranks.allocate(None, shape, rank=4, seed=seed).of(m))
        for seed in range(8)
    }
    assert max(spent) > 1.2 * min(spent)


# --- published numbers, and cases to check by hand


def test_fim_loras_vector() -> None:
    """Shares .7 .1 .1 .1 at r = 4 and r_max = 8: 11.2 is cut to 8, and 8 shared by three is 2.67 each."""
    shape = row_of(*[(16, 16)] * 4)
    signal = signal_of("sensitivity", shape, {"sum_sq_grad": [0.7, 0.1, 0.1, 0.1]})
    assert ranks(sensitivity_ranks.allocate(signal, shape, rank=4), shape) == [8, 3, 3, 2]
    assert ranks(sensitivity_ranks.allocate(signal, shape, rank=4, max_rank=16), shape) == [11, 2, 2, 1]


def test_who_is_lifted_to_the_least_rank_is_paid_for_by_the_least_important() -> None:
    """.5 is cut to 8; .3, .199, .001 share 8 as 4.8, 3.18, .02, rounded 5, 3, 0: the third pays for the fourth."""
    shape = row_of(*[(16, 16)] * 4)
    signal = signal_of("sensitivity", shape, {"sum_sq_grad": [0.5, 0.3, 0.199, 0.001]})
    assert ranks(sensitivity_ranks.allocate(signal, shape, rank=4), shape) == [8, 5, 2, 1]
    assert ranks(sensitivity_ranks.allocate(signal, shape, rank=4, min_rank=0), shape) == [8, 5, 3, 0]


def test_a_score_is_a_mean_over_the_matrix() -> None:
    """Squared gradients that go with the size are the same sensitivity everywhere: equal ranks, not equal costs."""
    shape = row_of((8, 8), (8, 16), (16, 16))
    signal = signal_of("sensitivity", shape, {"sum_sq_grad": [64.0, 128.0, 256.0]})
    assert ranks(sensitivity_ranks.allocate(signal, shape, rank=4), shape) == [4, 4, 4]


def test_hilo_at_its_own_mean_is_the_pattern() -> None:
    shape = row_of(*[(16, 16)] * 8)
    assert ranks(hilo.allocate(None, shape, rank=5), shape) == [2, 2, 4, 4, 6, 6, 8, 8]
    assert ranks(hilo.allocate(None, shape, rank=5, pattern="8642"), shape) == [8, 8, 6, 6, 4, 4, 2, 2]
    assert ranks(hilo.allocate(None, shape, rank=2, pattern="01"), shape) == [0] * 4 + [4] * 4
    with pytest.raises(InfeasibleError, match="all zeros"):
        hilo.allocate(None, shape, pattern="00")


def test_hill_ranks_follow_the_layers_mean_or_each_matrix() -> None:
    shape = row_of(*[(16, 16)] * 4, layers=[0, 0, 1, 1])
    signal = signal_of("spectrum", shape, {"hill": [1.0, 3.0, 6.0, 6.0]})
    assert ranks(hill_ranks.allocate(signal, shape, rank=4, beta=1.0), shape) == [2, 2, 6, 6]
    assert ranks(hill_ranks.allocate(signal, shape, rank=4, beta=1.0, by="matrix"), shape) == [1, 3, 6, 6]
    assert ranks(hill_ranks.allocate(signal, shape, rank=4, beta=0.0), shape) == [4] * 4
    with pytest.raises(InfeasibleError, match=r"hill at .* is negative"):
        hill_ranks.allocate(signal_of("spectrum", shape, {"hill": [-1.0] * 4}), shape)


@pytest.mark.parametrize(("share", "chosen"), [(0.2, {1}), (0.4, {1, 3}), (0.01, {1})])
def test_kappatunes_vector(share: float, chosen: set[int]) -> None:
    kappa = [10.0, 3.0, 7.0, 5.0, 100.0]
    assert set(kappatune.lowest(kappa, share=share)) == chosen
    shape = row_of(*[(64, 64)] * 5)
    allocation = kappatune.allocate(signal_of("spectrum", shape, {"condition": kappa}), shape, rank=4, share=share)
    assert {i for i, r in enumerate(ranks(allocation, shape)) if r} == chosen
    assert allocation.total_rank == 5 * 4  # all of the parameters are on the chosen ones
    few = kappatune.allocate(
        signal_of("spectrum", shape, {"condition": kappa}), shape, rank=4, share=share, equal="rank"
    )
    assert few.total_rank == 4 * len(chosen)


def test_kappatune_by_number_by_threshold_and_what_it_skips() -> None:
    kappa = [10.0, 3.0, 7.0, 5.0, 100.0]
    assert kappatune.lowest(kappa, number=3) == [1, 3, 2]
    assert kappatune.lowest(kappa, threshold=7.0) == [1, 3, 2]
    with pytest.raises(InfeasibleError, match="give one of share, number and threshold"):
        kappatune.lowest(kappa, number=3, share=0.2)
    with pytest.raises(InfeasibleError, match="the smallest is 3"):
        kappatune.lowest(kappa, threshold=2.0)
    shape = row_of((16, 20_000), (16, 16), (16, 16))
    allocation = kappatune.allocate(signal_of("spectrum", shape, {"condition": [1.0, 3.0, 2.0]}), shape, rank=2)
    assert [bool(r) for r in ranks(allocation, shape)] == [False, False, True]


@pytest.mark.parametrize("by", ["formula", "norm"])
def test_kappatune_ranks_dead_matrices_last_and_says_how_many(by: str) -> None:
    """σ_max 1e-9 and σ_min 1e-10: κ is .099, the smallest. A dead matrix of κ 2 is known by its norm only."""
    shape = row_of(*[(64, 64)] * 5)
    values = {"condition": [0.099 if by == "formula" else 2.0, 3.0, 7.0, 5.0, 100.0]}
    if by == "norm":
        values["spectral_norm"] = [1e-7, 8.0, 9.0, 7.0, 8.0]
    with pytest.warns(ToolkitWarning, match="1 of 5 matrices have weights of almost zero"):
        allocation = kappatune.allocate(signal_of("spectrum", shape, values), shape, rank=4, share=0.8, equal="rank")
    assert ranks(allocation, shape) == [0, 4, 4, 4, 4]


@pytest.mark.parametrize("model", SELECTION)
def test_spectrums_published_selections_in_their_order(model: str) -> None:
    assert len(SELECTION[model]) == 7
    for published in SELECTION[model].values():
        assert spectrum.selected(published["snr_by_layer"], published["share"]) == published["selected_in_order"]


def test_spectrum_puts_the_published_selection_on_the_model() -> None:
    published = SELECTION["meta-llama-Meta-Llama-3.1-8B-Instruct"]["mlp.down_proj"]
    shape = row_of(*[(64, 64)] * 32)
    signal = signal_of("spectrum", shape, {"snr": published["snr_by_layer"]})
    allocation = spectrum.allocate(signal, shape, rank=3)
    assert {i for i, r in enumerate(ranks(allocation, shape)) if r} == set(published["selected_in_order"])
    assert set(allocation.ranks.values()) == {6}


def test_spectrum_chooses_in_each_type_alone() -> None:
    shape = SHAPES["dense"]
    values = [float(i if m.module.name == "q_proj" else 1000 + i) for i, m in enumerate(matrices_of(shape))]
    allocation = spectrum.allocate(signal_of("spectrum", shape, {"snr": values}), shape, rank=2, share=0.25)
    chosen = [m for m in matrices_of(shape) if allocation.of(m.module) != (0,)]
    assert {m.module.layer for m in chosen} == {6, 7}
    assert len(chosen) == 2 * 7


def test_dead_experts_of_a_published_scan_come_last() -> None:
    """Qwen2-57B-A14B: by the formula alone the first 1,429 of 5,376 matrices would be those of almost zero weights."""
    dead = [0] * 28
    for rows in DEAD["ratios"].values():
        values = [math.inf if r is None else r for row in rows for r in row]
        for i, r in enumerate(values):
            dead[i // 64] += spectrum.is_dead(r)
        alive = sum(not spectrum.is_dead(r) for r in values)
        order = spectrum.selected(values, 1.0)
        assert not any(spectrum.is_dead(values[i]) for i in order[:alive])
        assert all(spectrum.is_dead(values[i]) for i in order[alive:])
        assert not {i for i in spectrum.selected(values, 0.5) if spectrum.is_dead(values[i])}
    assert dead == DEAD["dead_by_layer"]
    assert sum(dead) == 1429


def test_spectrum_says_how_many_matrices_are_dead_a_zero_one_included() -> None:
    shape = row_of(*[(64, 64)] * 4)
    signal = signal_of("spectrum", shape, {"snr": [5e7, 2.0, 1.0, 3.0]})
    rows = {key: dict(row) for key, row in signal.rows.items()}
    rows["model.layers.3.self_attn.q_proj"]["snr"] = ()  # a zero matrix has none
    signal = Signal("spectrum", rows, "module", "1", {})
    with pytest.warns(ToolkitWarning, match="2 of 4 matrices have weights of almost zero"):
        allocation = spectrum.allocate(signal, shape, rank=4, share=0.75, equal="rank")
    assert ranks(allocation, shape) == [4, 4, 4, 0]


def test_spectrum_takes_a_matrix_without_noise_for_a_good_one_and_not_for_a_dead_one() -> None:
    """A k_proj of one narrow head, or any matrix of alike singular values: no value lies below where noise ends."""
    shape = row_of(*[(64, 64)] * 4)
    signal = signal_of("spectrum", shape, {"snr": [1.0, 2.0, 3.0, 4.0], "spectral_norm": [2.0, 2.0, 2.0, 0.0]})
    rows = {key: dict(row) for key, row in signal.rows.items()}
    for layer in (0, 3):
        rows[f"model.layers.{layer}.self_attn.q_proj"]["snr"] = ()
    signal = Signal("spectrum", rows, "module", "1", {})
    with pytest.warns(ToolkitWarning, match="1 of 4 matrices have weights of almost zero"):
        allocation = spectrum.allocate(signal, shape, rank=4, share=0.5, equal="rank")
    assert ranks(allocation, shape) == [4, 0, 4, 0]


def test_a_signal_without_the_ratio_is_named() -> None:
    shape = row_of((16, 16))
    bare = Signal("spectrum", {m.path: {"hill": (2.0,)} for m in shape.modules}, "module", "1", {})
    with pytest.raises(StudyError, match="has no 'snr'"):
        spectrum.allocate(bare, shape)
    with pytest.raises(StudyError, match="has no 'condition'"):
        kappatune.allocate(bare, shape)


@pytest.mark.parametrize(("scores", "chosen"), [([1, 4, 2, 3], {1, 3}), ([5, 1, 3, 2, 4], {0, 4}), ([7], {0})])
def test_aletheias_vectors(scores: list[float], chosen: set[int]) -> None:
    assert set(aletheia.top_layers(scores, 0.5)) == chosen
    shape = row_of(*[(64, 64)] * len(scores))
    allocation = aletheia.allocate(signal_of("sensitivity", shape, {"sum_sq_grad": scores}), shape, rank=4)
    assert {i for i, r in enumerate(ranks(allocation, shape)) if r} == chosen


def test_aletheias_asymmetric_ranks() -> None:
    """At rank 40 the published 16 and 64 on one attention and one MLP matrix of one size."""
    modules = (
        ModuleShape("model.layers.0.self_attn.q_proj", 0, 64, 64, role="attention"),
        ModuleShape("model.layers.0.mlp.up_proj", 0, 64, 64, role="mlp"),
    )
    shape = ModelShape("two", modules, 1)
    allocation = aletheia.allocate(signal_of("sensitivity", shape), shape, rank=40, mlp_ratio=4.0)
    assert ranks(allocation, shape) == [16, 64]


def test_dmole_keeps_four_of_seven_and_of_eight() -> None:
    assert [nearest_share(0.5, n) for n in (7, 8)] == [4, 4]
    assert [nearest_share(0.29, 100), nearest_share(0.35, 10)] == [29, 4]
    for n in (7, 8):
        shape = row_of(*[(64, 64)] * n)
        signal = signal_of("sensitivity", shape, {"sum_sq_grad": range(n)})
        allocation = dmole.allocate(signal, shape, rank=4)
        assert [i for i, r in enumerate(ranks(allocation, shape)) if r] == list(range(n))[-4:]


def test_domlora_divides_by_the_inputs() -> None:
    """9 over 8 inputs is more than 16 over 16: the energy of B's gradient, not of W's."""
    shape = row_of((8, 16), (16, 8), (16, 16))
    signal = signal_of("sensitivity", shape, {"sum_sq_grad": [9.0, 16.0, 15.0]})
    assert ranks(domlora.allocate(signal, shape, rank=4), shape) == [4, 0, 0]
    assert ranks(domlora.allocate(signal, shape, rank=4, number=2), shape) == [4, 4, 0]
    with pytest.raises(InfeasibleError, match=r"number must be 1\.\.3"):
        domlora.allocate(signal, shape, number=4)


@pytest.mark.parametrize(
    ("rule", "knobs", "said"),
    [
        (sensitivity_ranks, {"min_rank": 5, "rank": 4}, "min_rank must be at most rank"),
        (sensitivity_ranks, {"max_rank": 3, "rank": 4}, "max_rank must be at least rank"),
        (sensitivity_ranks, {"min_rank": -1}, "min_rank must not be negative"),
        (sensitivity_ranks, {"beta": -1.0}, "beta must not be negative"),
        (dmole, {"share": 0.0}, "share must be above 0"),
        (dmole, {"equal": "parms"}, "did you mean 'parameters'"),
        (aletheia, {"mlp_ratio": 0.0}, "mlp_ratio must be positive"),
        (random_ranks, {"share": 0.001}, "is no matrix"),
        (spectrum, {"share": 0.01}, "is no matrix of any type"),
    ],
)
def test_a_knob_that_asks_for_what_cannot_be_is_said(rule: Any, knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(InfeasibleError, match=said):
        rule.allocate(signal_of(rule.NEEDS or "spectrum", SHAPES["dense"]), SHAPES["dense"], **knobs)


@pytest.mark.parametrize("values", [[1e200, 1e200, 1e100, 0.0], [1e-200, 1e-200, 1e-300, 0.0]])
@pytest.mark.parametrize(("rule", "metric"), [(sensitivity_ranks, "sum_sq_grad"), (hill_ranks, "hill")])
def test_an_exponent_leaves_shares_that_a_float_cannot_hold(rule: Any, metric: str, values: list[float]) -> None:
    """v^4 of the two largest overflows, or is zero: they are equal all the same, and have everything."""
    shape = row_of(*[(64, 64)] * 4)
    signal = signal_of(rule.NEEDS, shape, {metric: values})
    allocation = rule.allocate(signal, shape, rank=4, beta=4.0, min_rank=0, max_rank=16)
    assert ranks(allocation, shape) == [8, 8, 0, 0]
    with pytest.raises(InfeasibleError, match="beta must not be negative, got nan"):
        rule.allocate(signal, shape, beta=math.nan)


@pytest.mark.parametrize("name", RULES)
def test_roles_without_a_candidate_are_said(name: str) -> None:
    rule = plugins.load("allocators", name)
    shape = moe_shape(layers=4)
    signal = signal_of(rule.NEEDS, shape) if rule.NEEDS else None
    knobs = {"share": 0.2} if name == "random_ranks" else {}
    with pytest.raises(InfeasibleError, match="no role that is asked for in moe is one of these"):
        _roles.call(rule, signal, shape, {"roles": "router", **knobs}, rank=4)


# --- rules that read representations

SHARES = [[0.4, 0.3, 0.2, 0.05], [0.9, 0.05, 0.03, 0.01]]


def test_evas_ranks_are_the_winners_of_one_pool() -> None:
    """The hand-made vector: r = 2, ρ = 2, two matrices of one size."""
    assert eva.winners(SHARES, [1, 1], 4) == [3, 1]
    assert eva.winners(SHARES, [10, 10], 40) == [3, 1]
    assert eva.winners(SHARES, [10, 30], 50) == [2, 1], (
        "a share is worth what it explains, and costs what its matrix does"
    )
    assert eva.winners([[0.5, 0.0], [0.0]], [1, 1], 9) == [1, 0], "what explains nothing gets no rank"


def test_eva_and_plop_on_a_model() -> None:
    shape = dense_shape(layers=2)
    matrices = matrices_of(shape)
    rows = {m.key: {"explained": (0.5, 0.2, 0.1, 0.05), "feature_norm": (1.0 + i % 7,)} for i, m in enumerate(matrices)}
    rows[matrices[3].key] = {"explained": (0.9, 0.8, 0.7, 0.6), "feature_norm": ()}
    signal = Signal("representation", rows, "component", "1", {})
    given = eva.allocate(signal, shape, rank=2, rho=2.0, equal="rank")
    assert given.total_rank == 2 * len(matrices)
    assert given.ranks[matrices[3].key] == 4
    least = plop.allocate(signal, shape, rank=2, types=2, equal="rank")
    assert {path.rpartition(".")[2] for path in least.ranks} == {"q_proj", "k_proj"}
    most = plop.allocate(signal, shape, rank=2, types=1, order="highest", equal="rank")
    assert {path.rpartition(".")[2] for path in most.ranks} == {"down_proj"}
    with pytest.raises(InfeasibleError, match=r"types must be 1\.\.7, got 8"):
        plop.allocate(signal, shape, types=8)
    with pytest.raises(InfeasibleError, match="rho must be from 1 to 64"):
        eva.allocate(signal, shape, rho=0.5)


def test_eva_does_not_rank_by_shares_that_were_not_measured() -> None:
    """Four of sixteen shares are there: more ranks than these would be handed out to whoever is there, as uniform."""
    shape = row_of(*[(16, 16)] * 2)
    for left, rank, fits in ((0.3, 2, True), (0.3, 3, False), (0.0, 3, True)):
        rows = {m.path: {"explained": (0.7 - left, 0.15, 0.1, 0.05)} for m in shape.modules}
        signal = Signal("representation", rows, "component", "1", {})
        if fits:
            assert max(ranks(eva.allocate(signal, shape, rank=rank), shape)) <= 4
            continue
        with pytest.raises(InfeasibleError, match="up to 6 ranks, and the signal holds the 4 largest shares"):
            eva.allocate(signal, shape, rank=rank)


SIMILARITIES = (
    ".03594 .04022 .03522 .05034 .06356 .06976 .08423 .09601 .09449 .09777 .10596 .10938 .11644 .10744 .11516 .11086 "
    ".09725 .09073 .08303 .08354 .07783 .06833 .06847 .0548 .04981 .04966 .0481 .04534"
)


def test_layermoe_gives_the_published_list() -> None:
    """Llama-3.2-3B, the similarities and the list of the paper's code: 84 experts over 28 layers."""
    shape = dense_shape(layers=28)
    rows = {str(layer): {"similarity": (float(s),)} for layer, s in enumerate(SIMILARITIES.split())}
    counts = layermoe.allocate(Signal("representation", rows, "component", "1", {}), shape, total_experts=84)
    by_layer = [counts.counts[f"model.layers.{layer}.mlp.up_proj"] for layer in range(28)]
    assert by_layer == [5, 5, 5, 4, 3, 3, *[2] * 12, *[3] * 5, *[4] * 5]
    inverse = [1 / float(s) for s in SIMILARITIES.split()]
    assert by_layer == [math.ceil(v / sum(inverse) * 70) for v in inverse], "the paper's formula at its K"
    for total in range(28, 200):
        assert sum(ceilings(inverse, total)) == total
    rows["3"] = {"similarity": (-0.01,)}
    with pytest.raises(InfeasibleError, match=r"similarity of layer 3 of dense is -0\.01"):
        layermoe.allocate(Signal("representation", rows, "component", "1", {}), shape)
