"""What a GPU must do as a CPU does. Every test runs on the CPU too, by default, so that its own logic is known to work.

python -m pytest -m gpu tests/trainers/test_gpu.py
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from allocators.core.errors import OutOfMemoryError
from allocators.core.messages import TrainJob
from allocators.core.shapes import shape_from_config
from allocators.core.types import Allocation, ExpertCounts, ExpertSelection, ModuleRanks, Recipe, Trial
from tests.trainers.adapter.test_expert_lora import expert_layer, forward
from tests.trainers.conftest import PATHS, tiny_llama, tiny_olmoe, worker_setup
from trainers import loop, packing
from trainers.adapter import Adapter, attach
from trainers.loop.device import own_random_state
from trainers.tasks import AnyTask
from trainers.waiting import one_sample_a_row
from trainers.worker_state import WorkerState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
on_gpu = [pytest.mark.gpu, needs_gpu]
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])

RECIPE = Recipe(
    rank=4,
    lora_alpha=8,
    learning_rate=5e-3,
    batch_size=4,
    micro_batch_size=4,
    steps=4,
    max_length=64,
    lora_dropout=0.1,
)
CHOSEN = ExpertSelection({0: (0, 3, 5), 1: (1, 2)})
PACKS: dict[str, list[tuple[Allocation, Recipe]]] = {
    "chosen": [(CHOSEN, RECIPE), (ExpertSelection({1: tuple(range(8))}), replace(RECIPE, rank=2, lora_dropout=0.3))],
    "routed": [
        (ExpertCounts(dict(zip(PATHS, (2, 3, 1, 1, 4, 2), strict=True))), replace(RECIPE, balance_coef=0.1, top_k=1)),
        (ExpertCounts({PATHS[2]: 3}, "hydra"), RECIPE),
    ],
    "ranks": [(ModuleRanks({PATHS[0]: 3}), RECIPE), (ModuleRanks({PATHS[3]: 2, PATHS[0]: 1}), RECIPE)],
}


def on(device: str, allocation: Allocation, dtype: torch.dtype = torch.float32) -> Any:
    return (tiny_olmoe() if isinstance(allocation, ExpertSelection) else tiny_llama()).to(device, dtype)


def attached(model: Any, allocation: Allocation, recipe: Recipe) -> Adapter:
    return attach(model, allocation, shape=shape_from_config(model.config, name="tiny"), lora=recipe.lora)


def no_groups_without_a_wait(device: str) -> bool:
    """Whether torch's grouped_mm reads the sizes of its groups back: its kernels are for Hopper and Blackwell."""
    return device == "cuda" and torch.cuda.get_device_capability()[0] not in (9, 10)


@devices
@pytest.mark.parametrize("chosen", [(1, 2, 6), tuple(range(8))])
def test_a_layer_of_experts_is_that_of_fp32_on_a_cpu(device: str, chosen: tuple[int, ...]) -> None:
    """Output and all gradients in bf16; expert 7 has no token."""
    generator = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(7, generator=generator)[:2] for _ in range(64)])
    grad = torch.randn(64, 64, generator=generator).bfloat16()
    inputs = torch.randn(64, 64, generator=generator).bfloat16(), torch.rand(64, 2, generator=generator)

    def run(device: str, dtype: torch.dtype) -> list[Tensor]:
        module, lora = expert_layer(8, chosen, 4, hidden=64, width=32)
        module.to(torch.bfloat16).to(device, dtype)
        pairs = {n: tuple(nn.Parameter(p.detach().to(device)) for p in pair) for n, pair in lora.pairs.items()}
        lora.stop_watching()
        lora = type(lora)(module, chosen, pairs, path="layer", scale=0.5, dropout=0.0)  # type: ignore[arg-type]
        lora.every_row |= device != "cpu" or dtype == torch.bfloat16
        hidden, weight = (x.to(device, dtype).requires_grad_() for x in inputs)
        out = forward(module, lora, hidden, index.to(device), weight)
        leaves = [hidden, weight, *(p for pair in lora.pairs.values() for p in pair)]
        return [x.detach().float().cpu() for x in (out, *torch.autograd.grad(out, leaves, grad.to(device, dtype)))]

    for rough, exact in zip(run(device, torch.bfloat16), run("cpu", torch.float32), strict=True):
        assert torch.linalg.vector_norm(rough - exact) < 0.03 * torch.linalg.vector_norm(exact)


@devices
@pytest.mark.parametrize("kind", PACKS)
def test_packed_is_alone_on_one_device(
    task: AnyTask, tokenizer: PreTrainedTokenizerBase, device: str, kind: str
) -> None:
    """Losses and tensors of four steps in fp32, inputs dropped out."""
    members = PACKS[kind]
    model = on(device, members[0][0])
    packed = packing.PackedRun(model, task, tokenizer=tokenizer, device=device, evaluations=1)
    joined = []
    for allocation, recipe in members:
        packed.detach()
        adapter = attached(model, allocation, recipe)
        adapter.detach()
        joined.append(packed.join(adapter, recipe, seed=0, on_rung=lambda rung: True))
    while packed.members:
        packed.step()
    for member, (allocation, recipe) in zip(joined, members, strict=True):
        assert member.error is None
        assert member.result is not None
        adapter = attached(alone := on(device, allocation), allocation, recipe)
        expected = loop.train(
            alone, adapter, task, recipe, seed=0, tokenizer=tokenizer, device=device, on_rung=lambda rung: True
        )
        assert member.result.losses == pytest.approx(expected.losses, rel=1e-4)
        for mine, theirs in zip(member.adapter.parameters(), adapter.parameters(), strict=True):
            assert torch.linalg.vector_norm(mine - theirs) <= 1e-3 * torch.linalg.vector_norm(theirs)


@devices
def test_memory_that_does_not_suffice_comes_back(
    task: AnyTask, tokenizer: PreTrainedTokenizerBase, device: str
) -> None:
    model = on(device, CHOSEN)
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    adapter: Any = attached(model, CHOSEN, RECIPE)
    adapter.extra_loss = lambda real_BS: torch.empty(10**15, device=device).sum()
    with pytest.raises(OutOfMemoryError, match="out of memory on"):
        loop.train(model, adapter, task, RECIPE, seed=0, tokenizer=tokenizer, device=device, on_rung=lambda rung: True)
    adapter.detach()
    del adapter
    gc.collect()
    if device == "cuda":
        assert torch.cuda.memory_allocated() - before < 2**20


@devices
def test_a_trial_from_attach_to_detach(tmp_path: Path, device: str) -> None:
    """The embedded model in the device's own dtype: it is trained, evaluated on both splits, and saved."""
    state = WorkerState(worker_setup(tmp_path, task_options={"limit": 8}), device)
    recipe = replace(RECIPE, lora_dropout=0.0, steps=2)
    trial = Trial(ExpertSelection({0: (0, 1)}), recipe, state.name, state.task_name, 0)
    cost = trial.allocation.trainable_params(state.shape, rank=recipe.rank)
    outcome = state.train(TrainJob(trial, cost, tests=True), report=lambda rung: True)
    assert (outcome.status, outcome.message) == ("complete", "")
    assert outcome.test is not None
    assert Path(outcome.adapter).exists()
    assert 0 < outcome.peak_memory_bytes < 2**34
    assert state.dtype == (
        "bfloat16" if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    )


@contextmanager
def refused_by_cuda(device: str) -> Iterator[None]:
    """CUDA's own check: whatever waits for the device raises."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("device", "kind"), [("cpu", "chosen"), *(pytest.param("cuda", kind, marks=on_gpu) for kind in PACKS)]
)
def test_no_step_waits(
    monkeypatch: pytest.MonkeyPatch, task: AnyTask, tokenizer: PreTrainedTokenizerBase, device: str, kind: str
) -> None:
    """Of every member alone but the first step, which checks gradients; and of the pack."""
    if kind == "chosen" and no_groups_without_a_wait(device):
        pytest.skip("grouped_mm of this GPU waits by itself")
    members, original = PACKS[kind], loop.TrainingRun.take_step
    dtype = torch.bfloat16 if kind == "chosen" else torch.float32  # grouped_mm in fp32 waits by itself
    model = on(device, members[0][0], dtype)

    def step(self: loop.TrainingRun, number: int) -> None:
        with refused_by_cuda(device) if number else nullcontext():
            original(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainingRun, "take_step", step)
        for allocation, recipe in members:
            adapter = attached(model, allocation, recipe)
            result = loop.train(
                model, adapter, task, recipe, seed=0, tokenizer=tokenizer, device=device, on_rung=lambda rung: True
            )
            adapter.detach()
            assert result.status == "complete"
    packed = packing.PackedRun(model, task, tokenizer=tokenizer, device=device, evaluations=1)
    for allocation, recipe in members:
        adapter = attached(model, allocation, recipe)
        adapter.detach()
        packed.join(adapter, recipe, seed=0, on_rung=lambda rung: True)
    packed.step()
    with own_random_state(packed.device), one_sample_a_row(), refused_by_cuda(device):
        packed._take_step()
    assert [member.step for member in packed.members] == [2, 2]
    packed.end_all()
