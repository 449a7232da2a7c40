"""What packed runs and one alone share: the same functions, and masks and layouts that make up for the differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allocators.core.errors import StudyError
from allocators.core.shapes import shape_from_config
from allocators.core.types import ExpertCounts, ExpertSelection, Gating, LoraSettings
from tests.trainers.conftest import tiny_llama, tiny_olmoe
from trainers.adapter import attach
from trainers.adapter.expert_lora import ExpertLoraAdapter, side_by_side
from trainers.adapter.lora_moe import Blocks, LoraMoeAdapter, mix, mix_backward
from trainers.packing.lora_moe import PackedExperts
from trainers.packing.pack import Pack

PATH = "model.layers.0.self_attn.q_proj"
LORA = LoraSettings(rank=2, lora_alpha=3.0)


def adapter_of(n: int, rank: int, top_k: int, gating: Gating) -> LoraMoeAdapter:
    model = tiny_llama()
    lora = replace(LORA, rank=rank, top_k=top_k)
    adapter = attach(
        model, ExpertCounts({PATH: n}, gating), shape=shape_from_config(model.config, name="tiny"), lora=lora
    )
    assert isinstance(adapter, LoraMoeAdapter)
    return adapter


@given(
    members=st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.sampled_from(["routed", "hydra"])),
        min_size=1,
        max_size=3,
    ),
    seed=st.integers(0, 100),
)
def test_mixing_members_together_is_mixing_each_alone(members: list[tuple[int, int, int, Gating]], seed: int) -> None:
    """Forward, and the gradients of rank space and router; what a member lacks is exactly zero."""
    adapters = [adapter_of(*member) for member in members]
    scales = [adapter.lora.scale for adapter in adapters]
    packed = PackedExperts(PATH, adapters, scales, "cpu")
    generator = torch.Generator().manual_seed(seed)
    z_PTD = torch.zeros(len(members), 5, packed.num_columns + packed.num_experts)
    dh_PTC = torch.zeros(len(members), 5, packed.num_columns)
    for p, (n, rank, _, gating) in enumerate(members):
        part = torch.randn(5, rank if gating == "hydra" else n * rank, generator=generator)
        z_PTD[p, :, : n * rank] = part.repeat(1, n) if gating == "hydra" else part
        z_PTD[p, :, packed.num_columns :] = torch.randn(5, packed.num_experts, generator=generator)
        dh_PTC[p, :, : n * rank] = torch.randn(5, n * rank, generator=generator)
    h_PTC, gates_PTN = mix(z_PTD, packed)
    again_PTC, dz_PTD = mix_backward(dh_PTC, z_PTD, gates_PTN, packed)
    assert torch.equal(h_PTC, again_PTC)
    for p, ((n, rank, _, gating), adapter, scale) in enumerate(zip(members, adapters, scales, strict=True)):
        columns = rank if gating == "hydra" else n * rank
        first = packed.num_columns
        z_TD = torch.cat([z_PTD[p, :, :columns], z_PTD[p, :, first : first + n]], dim=1)
        blocks = Blocks(n, rank, adapter.picks(PATH))
        h_TC, gates_TN = mix(z_TD, blocks)
        torch.testing.assert_close(h_PTC[p, :, : n * rank], scale * h_TC)
        torch.testing.assert_close(gates_PTN[p, :, :n], gates_TN)
        assert not gates_PTN[p, :, n:].any()
        assert not h_PTC[p, :, n * rank :].any()
        _, dz_TD = mix_backward(scale * dh_PTC[p, :, : n * rank], z_TD, gates_TN, blocks)
        da_TC = dz_PTD[p, :, : n * rank]
        if gating == "hydra":  # the one A is there once for each expert
            da_TC = da_TC.unflatten(1, (n, rank)).sum(1)
        torch.testing.assert_close(da_TC, dz_TD[:, :columns])
        torch.testing.assert_close(dz_PTD[p, :, first : first + n], dz_TD[:, columns:], atol=1e-6, rtol=1e-5)
        assert not dz_PTD[p, :, first + n :].any()


@pytest.mark.parametrize("concatenated", [True, False])
def test_projections_lie_where_rows_of_says(concatenated: bool) -> None:
    model = tiny_olmoe()
    shape = shape_from_config(model.config, name="tiny")
    adapter = attach(model, ExpertSelection({0: (1, 4)}), shape=shape, lora=LORA)
    assert isinstance(adapter, ExpertLoraAdapter)
    lora = adapter.experts[0]
    lora.module.is_concatenated = concatenated
    projections = lora.stacks["gate_up_proj"]
    for name in projections:
        lora.pairs[name][1].data.normal_()
    _, b_COR = side_by_side([lora.pairs[name] for name in projections], concatenated=concatenated)
    for position, name in enumerate(projections):
        own = lora.pairs[name][1]
        in_rank = slice(position * LORA.rank, (position + 1) * LORA.rank)
        assert torch.equal(b_COR[:, lora.rows_of("gate_up_proj", position, own.size(1)), in_rank], own)


def test_adapters_of_two_kinds_are_refused() -> None:
    chosen = attach(
        tiny_olmoe(), ExpertSelection({}), shape=shape_from_config(tiny_olmoe().config, name="tiny"), lora=LORA
    )
    with pytest.raises(StudyError, match="share no pass"):
        Pack(tiny_olmoe(), [chosen, adapter_of(2, 2, 1, "routed")])


def test_a_pack_that_cannot_hook_in_leaves_the_base_as_it_was() -> None:
    adapter = adapter_of(2, 2, 1, "routed")
    adapter.detach()
    for parameter in adapter.parameters():
        parameter.grad = torch.zeros_like(parameter)
    pack = Pack(adapter.model, [adapter])

    def refuse() -> Callable[[], None]:
        raise StudyError("no")

    pack._puts.append(refuse)
    with pytest.raises(StudyError, match="no"):
        pack.attach()
    assert not hasattr(adapter.model, "lora_adapter")
    assert all("forward" not in vars(module) for module in adapter.model.modules())
    pack._puts.pop()
    pack.attach()
    assert any("forward" in vars(module) for module in adapter.model.modules())
    pack.detach()
