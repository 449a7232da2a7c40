"""Representations against full SVDs of inputs that are kept, and against loops over tokens and documents."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from allocators.core.errors import StudyError
from allocators.core.shapes import shape_from_config
from allocators.core.types import Signal
from allocators.signals.representation import COMPONENTS, Spread, measure
from allocators.signals.sensitivity import pad
from allocators.signals.spectrum import expert_weight
from tests.allocators import tiny
from tests.benchmarks.sensitivity import Sample

ROWS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15, 16, 17, 18, 19, 20, 4], [20, 21], [22, 23, 24, 25, 26, 27]]
OTHERS = [[30, 31, 32], [33, 9, 35, 36, 5]]
MODELS = ["llama", "olmoe", "qwen2_moe", "gpt_oss"]


def samples(rows: Sequence[Sequence[int]]) -> list[Sample]:
    return [Sample(list(row), len(row) // 2) for row in rows]


def signal_of(model: Any, *datasets: Sequence[Sequence[int]], batch_size: int = 16) -> Signal:
    batches = [pad(samples(rows), pad_token_id=0, batch_size=batch_size) for rows in datasets or (ROWS,)]
    return measure(model, batches, provenance={"test": True})


def shares_of(x_TI: Tensor) -> list[float]:
    values = torch.linalg.svdvals((x_TI - x_TI.mean(0)).double()).square()
    shares: list[float] = (values / values.sum()).tolist()
    return shares


# --- the sums


@pytest.mark.parametrize("sizes", [[400], [1, 399], [100] * 4, [3, 150, 2, 245]])
def test_a_covariance_that_fits_is_that_of_a_full_svd(sizes: list[int]) -> None:
    x_TI = torch.randn(400, 40, generator=torch.Generator().manual_seed(0)) * torch.linspace(3, 0.1, 40) + 5
    spread = Spread(40, torch.device("cpu"))
    for part in x_TI.split(sizes):
        spread.add(part)
    assert spread.shares(COMPONENTS) == pytest.approx(shares_of(x_TI), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("sizes", [[400], [100] * 4, [3, 150, 2, 245]])
def test_the_incremental_svd_is_exact_up_to_the_rank_that_it_keeps(sizes: list[int]) -> None:
    draw = torch.Generator().manual_seed(1)
    x_TI = torch.randn(400, 20, generator=draw) @ torch.randn(20, 90, generator=draw) + 2
    spread = Spread(90, torch.device("cpu"), kept=24, exact=8)
    for part in x_TI.split(sizes):
        spread.add(part)
    assert spread.shares(20) == pytest.approx(shares_of(x_TI)[:20], rel=1e-3, abs=1e-6)


def test_the_incremental_svd_of_a_larger_rank_is_near_in_what_it_keeps() -> None:
    x_TI = torch.randn(2000, 90, generator=torch.Generator().manual_seed(2)) * 0.9 ** torch.arange(90)
    spread = Spread(90, torch.device("cpu"), kept=24, exact=8)
    for part in x_TI.split(50):
        spread.add(part)
    assert spread.shares(12) == pytest.approx(shares_of(x_TI)[:12], rel=0.03)


def test_memory_does_not_grow_with_the_samples() -> None:
    def held(count: int) -> int:
        spread = Spread(700, torch.device("cpu"))
        for _ in range(count):
            spread.add(torch.randn(64, 700))
        own = [t for t in vars(spread).values() if isinstance(t, Tensor)]
        return sum(t.numel() for t in [*own, *spread.waiting])

    assert held(64) == held(4)


def test_equal_tokens_have_no_variance_and_none_have_no_shares() -> None:
    spread = Spread(6, torch.device("cpu"))
    assert spread.shares(4) == ()
    spread.add(torch.full((50, 6), 3.7))
    assert spread.shares(4) == (0.0,) * 4


# --- on models


def inputs_of(model: Any) -> dict[str, list[tuple[Tensor, Tensor, bool]]]:
    """By matrix, in order: (input, output without bias, whether the loss counts it), a prompt at a time, by loops."""
    shape = shape_from_config(model.config, name="x")
    seen: dict[str, list[tuple[Tensor, Tensor, bool]]] = {}
    calls: dict[str, Any] = {}
    for spec in shape.of_role("attention", "mlp", "shared_expert"):
        model.get_submodule(spec.path).register_forward_hook(
            lambda _m, args, _out, path=spec.path: calls.__setitem__(path, args[0])
        )
    stacks = {spec.path.rpartition(".")[0] for spec in shape.of_role("expert")}
    for path in stacks:
        model.get_submodule(path).register_forward_pre_hook(lambda _m, args, path=path: calls.__setitem__(path, args))
    for sample in samples(ROWS):
        with torch.no_grad():
            model(input_ids=torch.tensor([sample.input_ids]))
        counted = [place >= sample.labels_start for place in range(len(sample.input_ids))]
        for spec in shape.of_role("attention", "mlp", "shared_expert"):
            x_TI = calls[spec.path].reshape(-1, spec.in_features)
            y_TO = x_TI @ model.get_submodule(spec.path).weight.detach().T
            seen.setdefault(spec.path, []).extend(zip(x_TI, y_TO, counted, strict=True))
        for path in stacks:
            _through_experts(model, shape, path, calls[path], counted, seen)
    return seen


def _through_experts(model: Any, shape: Any, path: str, call: Any, counted: list[bool], seen: dict[str, Any]) -> None:
    specs = {s.name: s for s in shape.of_role("expert") if s.path.startswith(f"{path}.")}
    module = model.get_submodule(path)
    for place, ids in enumerate(call[1].tolist()):
        for e in ids:
            x_I = call[0][place]
            weights = {name: expert_weight(model, spec, e) for name, spec in specs.items()}
            gate_O, up_O = weights["gate_proj"] @ x_I, weights["up_proj"] @ x_I
            biased = torch.cat([gate_O, up_O])
            if not module.is_concatenated:
                biased = torch.stack([gate_O, up_O], dim=1).flatten()
            if module.has_bias:
                biased = biased + module.gate_up_proj_bias[e].detach()
            h_I = module._apply_gate(biased.unsqueeze(0))[0].detach()
            through = {
                "gate_proj": (x_I, gate_O),
                "up_proj": (x_I, up_O),
                "down_proj": (h_I, weights["down_proj"] @ h_I),
            }
            for name, (z, y) in through.items():
                seen.setdefault(f"{specs[name].path}.{e}", []).append((z, y, counted[place]))


@pytest.mark.parametrize("family", MODELS)
def test_equals_a_full_svd_and_a_loop_over_tokens(family: str) -> None:
    model = tiny.model(family)
    shape = shape_from_config(model.config, name="x")
    signal, seen = signal_of(model, batch_size=2), inputs_of(tiny.model(family))
    assert set(seen) <= set(signal.rows)
    for key, tokens in seen.items():
        path, _, expert = key.rpartition(".")
        spec = next(s for s in shape.modules if s.path in (key, path))
        counted = [z for z, _, counts in tokens if counts]
        expected = shares_of(torch.stack(counted)) if len(counted) > 1 else []
        shares = signal.rows[key]["explained"]
        assert shares[: len(expected)] == pytest.approx(expected[: len(shares)], rel=1e-3, abs=2e-5)
        weight = expert_weight(model, spec, int(expert)) if spec.num_experts else model.get_submodule(key).weight
        random = float(weight.detach().norm()) / spec.in_features**0.5
        ratios = [float(y.norm() / z.norm()) / random for z, y, _ in tokens]
        assert signal.metric(key, "feature_norm")[0] == pytest.approx(sum(ratios) / len(ratios), rel=1e-3)


def test_padding_and_batches_change_nothing() -> None:
    whole, single = signal_of(tiny.model("olmoe")), signal_of(tiny.model("olmoe"), batch_size=1)
    for key, row in whole.rows.items():
        for metric, values in row.items():
            assert single.rows[key][metric] == pytest.approx(values, rel=1e-3, abs=1e-5), (key, metric)


def documents_of(model: Any, rows: Sequence[Sequence[int]]) -> dict[int, list[Tensor]]:
    found: dict[int, list[Tensor]] = {}
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.register_forward_hook(
            lambda _m, _a, out, number=number: found.setdefault(number, []).append(out[0].mean(0))
        )
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([list(row)]))
    return found


def test_similarity_is_the_mean_cosine_of_all_pairs_of_documents() -> None:
    one, other = documents_of(tiny.model("llama"), ROWS), documents_of(tiny.model("llama"), OTHERS)
    both, alone = signal_of(tiny.model("llama"), ROWS, OTHERS), signal_of(tiny.model("llama"), ROWS)
    for layer, documents in one.items():
        pairs = [torch.cosine_similarity(a, b, dim=0) for a in documents for b in other[layer]]
        assert both.metric(layer, "similarity")[0] == pytest.approx(float(sum(pairs)) / len(pairs), abs=1e-4)
        own = [torch.cosine_similarity(a, b, dim=0) for a, b in itertools.combinations(documents, 2)]
        assert alone.metric(layer, "similarity")[0] == pytest.approx(float(sum(own)) / len(own), abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "olmoe"])
def test_the_model_comes_back_as_it_was(family: str) -> None:
    model = tiny.model(family).bfloat16()
    model.train()
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    signal_of(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(module.training for module in model.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_no_token_is_an_error() -> None:
    with pytest.raises(StudyError, match="give a sample"):
        signal_of(tiny.model("llama"), [])
