"""Training steps and evaluations on the meta device: sizes without values, so that whatever reads a value back fails.

What a GPU would be waited for besides, a copy from the host that is not said to be on its way, is noted as well; so is
a tensor that lies on another device than those it meets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from allocators.core.shapes import shape_from_config
from allocators.core.types import Allocation, ExpertCounts, ExpertSelection, ModuleRanks, Recipe
from tests.trainers.conftest import PATHS, tiny_llama, tiny_olmoe
from tests.trainers.waits import watched
from trainers import forgetting, loop, packing
from trainers.adapter import Adapter, attach, base
from trainers.loop.device import own_random_state
from trainers.tasks import AnyTask, Row
from trainers.tasks.scoring import loglikelihoods
from trainers.waiting import one_sample_a_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

META = torch.device("meta")
RECIPE = Recipe(rank=4, lora_alpha=8, batch_size=4, micro_batch_size=2, steps=5, max_length=64, lora_dropout=0.1)
EXPERTS = "model.layers.{}.mlp.experts.{}_proj"


def on_meta(allocation: Allocation) -> Any:
    """The tiny model that the allocation is for, in bf16 as on a GPU."""
    moe = isinstance(allocation, ExpertSelection) or (isinstance(allocation, ModuleRanks) and allocation.experts)
    return (tiny_olmoe() if moe else tiny_llama()).to(META, torch.bfloat16)


class OfTheHost(torch.Generator):
    """A generator of the host, whatever device was asked for."""

    def __new__(cls, device: Any = "cpu") -> OfTheHost:
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]


@pytest.fixture(autouse=True)
def _no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base has no values to tell it by, and fused AdamW no kernel on meta (foreach does the same arithmetic)."""
    monkeypatch.setattr(base, "fingerprint", lambda model: "none")
    adamw = torch.optim.AdamW

    def foreach(parameters: Any, *, fused: bool, **options: Any) -> torch.optim.AdamW:
        assert fused
        return adamw(parameters, foreach=True, **options)

    monkeypatch.setattr(torch.optim, "AdamW", foreach)
    monkeypatch.setattr(torch, "Generator", OfTheHost)  # meta draws no numbers, and has none


def attached(model: Any, allocation: Allocation, recipe: Recipe) -> Adapter:
    return attach(model, allocation, shape=shape_from_config(model.config, name="tiny"), lora=recipe.lora)


BALANCED = replace(RECIPE, balance_coef=0.1, top_k=1)
ROUTED = ExpertCounts(dict(zip(PATHS, (2, 3, 1, 4, 2, 1), strict=True)))
HYDRA = ExpertCounts(dict(zip(PATHS, (2, 3, 1, 4, 2, 1), strict=True)), "hydra")
CHOSEN = ExpertSelection({0: (0, 3, 5), 1: (1, 2)})
ALL = ExpertSelection({0: tuple(range(8)), 1: tuple(range(8))})
RANKS = ModuleRanks({PATHS[0]: 3, PATHS[3]: 1})
RANKS_MOE = ModuleRanks(
    {"model.layers.1.self_attn.q_proj": 3, "model.layers.1.mlp.gate": 2},
    {EXPERTS.format(0, "gate"): (1, 0, 5, 0, 0, 2, 0, 3), EXPERTS.format(0, "down"): (0, 2, 1, 0, 0, 0, 0, 1)},
)
UPPER = ExpertSelection({1: (0, 7)})
KINDS: dict[str, Sequence[tuple[Allocation, Recipe]]] = {
    "routed": [(ROUTED, BALANCED), (ExpertCounts({PATHS[4]: 3}), replace(RECIPE, rank=2, lora_dropout=0.0))],
    "all picked": [(ROUTED, replace(RECIPE, top_k=8)), (ROUTED, replace(RECIPE, rank=2))],
    "hydra": [(HYDRA, RECIPE), (ROUTED, replace(RECIPE, max_grad_norm=0.0))],
    "ranks": [(RANKS, RECIPE), (ModuleRanks({PATHS[5]: 2}), RECIPE)],
    "chosen": [(CHOSEN, RECIPE), (ALL, replace(RECIPE, rank=2)), (UPPER, replace(RECIPE, lora_dropout=0.0))],
    "ranks of experts": [(RANKS_MOE, RECIPE), (ModuleRanks({}, {EXPERTS.format(1, "down"): (2,) * 8}), RECIPE)],
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_waits(task: AnyTask, tokenizer: PreTrainedTokenizerBase, kind: str) -> None:
    """Two steps, the second with the rows that the first sent ahead; the look at the losses is not part of a step."""
    allocation, recipe = KINDS[kind][0]
    model, waits = on_meta(allocation), list[str]()
    with own_random_state(META), one_sample_a_row():
        run = loop.TrainingRun(
            model,
            attached(model, allocation, recipe),
            task,
            recipe,
            seed=0,
            tokenizer=tokenizer,
            device=META,
            evaluations=1,
            checkpoint=None,
        )
        run.flat.install()  # gradients are checked in the first step of a run
        model.train()
        with watched(waits, META):
            run.take_step(0)
            run.take_step(1)
    assert waits == []
    assert run.flat.gradients.is_meta


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_of_a_pack_waits(task: AnyTask, tokenizer: PreTrainedTokenizerBase, kind: str) -> None:
    """The first step of a pack included; members that train on the same rows run them once below `first`."""
    model, waits = on_meta(KINDS[kind][0][0]), list[str]()
    packed = packing.PackedRun(model, task, tokenizer=tokenizer, device=META, evaluations=1)
    for allocation, recipe in KINDS[kind]:
        packed.detach()
        adapter = attached(model, allocation, recipe)
        adapter.detach()
        packed.join(adapter, recipe, seed=0, on_rung=lambda rung: True)
    with own_random_state(META), one_sample_a_row():
        packed._take_step()
        with watched(waits, META):
            packed._take_step()
    assert waits == []


@pytest.mark.parametrize("allocation", [ROUTED, CHOSEN], ids=["dense", "moe"])
def test_an_evaluation_waits_once(allocation: Allocation) -> None:
    """Contexts that several continuations share, and one that stands alone; answers are read when all have run."""
    model, waits = on_meta(allocation), list[str]()
    attached(model, allocation, RECIPE)
    requests = [(None, [4, 5, 6, context], [7, choice]) for context in range(3, 9) for choice in (1, 2, 3)]
    requests.append((None, [4, 5], [6, 7, 8]))
    with watched(waits, META), pytest.raises(NotImplementedError):
        loglikelihoods(model, requests, max_length=32, batch_size=4)
    assert waits == ["tolist"]
    del waits[:]
    with watched(waits, META), pytest.raises(NotImplementedError):
        forgetting._loss_of_rows(model, [Row([4, 5, 6, 7], 1), Row([4, 5], 1)], pad=1)
    assert waits == ["tolist"]


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x[[0, 1]],
        lambda x: torch.where(x > 0),
        lambda x: x.unique(),
        lambda x: x + torch.tensor([1.0, 2.0], device=x.device),
        lambda x: x.copy_(torch.ones(2)),
        lambda x: torch.ones(2).to(x.device),
        lambda x: torch.repeat_interleave(x, x.long()),
        lambda x: x[torch.tensor([0, 1])],
    ],
)
def test_a_wait_is_seen(look: Callable[[Tensor], Any]) -> None:
    waits: list[str] = []
    with watched(waits, META):
        try:
            look(torch.empty(2, device=META))
        except (NotImplementedError, RuntimeError) as error:  # meta has no values to read
            waits.append(type(error).__name__)
    assert waits
