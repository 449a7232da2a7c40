"""Packed runs: each is what it is alone, and what happens in one reaches no other.

python -m pytest tests/trainers/packing/test_packing.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from allocators.core.errors import OutOfMemoryError, StudyError, TrialError
from allocators.core.shapes import shape_from_config
from allocators.core.types import Allocation, ExpertCounts, ExpertSelection, Gating, ModuleRanks, Recipe, Rung
from tests.trainers.conftest import PATHS, tiny_llama, tiny_olmoe
from tests.trainers.reference import gradient
from trainers import loop, packing
from trainers.adapter import Adapter, attach, expert_lora
from trainers.packing.pack import Pack
from trainers.tasks import AnyTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECIPE = Recipe(
    rank=4,
    lora_alpha=8,
    learning_rate=5e-3,
    batch_size=4,
    micro_batch_size=4,
    steps=15,
    max_length=64,
    warmup_ratio=0.2,
)
Spec = tuple[Allocation, Recipe, int]  # and a seed
TOLERANCE = 1e-5


def counts(*numbers: int, gating: Gating = "routed") -> ExpertCounts:
    """So many experts on the places of PATHS, in their order."""
    return ExpertCounts({p: n for p, n in zip(PATHS, numbers, strict=True) if n}, gating)


# (allocation, recipe, seed): different N, r, alpha, top_k, learning rate, decay, clipping, schedule and seed
ROUTED = (
    (counts(2, 3, 0, 1, 4, 2), RECIPE, 0),
    (counts(0, 1, 2, 0, 3, 3), replace(RECIPE, rank=2, lora_alpha=2, learning_rate=2e-3, top_k=1), 1),
    (counts(5, 0, 2, 1, 0, 0), replace(RECIPE, rank=6, top_k=3, weight_decay=0.1, max_grad_norm=0.0), 0),
)
HYDRA = (
    (counts(2, 3, 0, 1, 4, 2, gating="hydra"), RECIPE, 0),
    (counts(0, 2, 2, 0, 3, 3, gating="hydra"), replace(RECIPE, rank=3, schedule="linear"), 2),
)
# top_k below every N: the balance loss of experts that are all picked has a gradient of rounding errors, no more
BALANCED = (
    (counts(2, 3, 0, 3, 4, 2), replace(RECIPE, balance_coef=0.1, top_k=1), 0),
    (counts(3, 3, 3, 3, 3, 3), replace(RECIPE, balance_coef=0.5, rank=2, max_grad_norm=0.1), 1),
    (counts(1, 2, 3, 0, 1, 2), RECIPE, 1),
)
CHOSEN = (
    (ExpertSelection({0: (0, 3, 5), 1: (1, 2)}), RECIPE, 0),
    (ExpertSelection({1: tuple(range(8))}), replace(RECIPE, rank=2, lora_alpha=1, learning_rate=1e-2), 1),
    (ExpertSelection({}), replace(RECIPE, rank=3, weight_decay=0.1), 0),
    (ExpertSelection({0: (7,), 1: (0, 7)}), replace(RECIPE, max_grad_norm=0.1, warmup_ratio=0.0), 2),
)


EXPERTS = "model.layers.{}.mlp.experts.{}_proj"
# members adapt modules of their own: the first and the last share a place that the second leaves alone
RANKS_DENSE = (
    (ModuleRanks({PATHS[0]: 3, PATHS[3]: 1, PATHS[5]: 6}), RECIPE, 0),
    (ModuleRanks({PATHS[1]: 2, PATHS[3]: 5}), replace(RECIPE, rank=2, lora_alpha=2, learning_rate=2e-3), 1),
    (ModuleRanks(dict.fromkeys(PATHS[::2], 4)), replace(RECIPE, weight_decay=0.1, max_grad_norm=0.0), 0),
)
RANKS_MOE = (
    (
        ModuleRanks(
            {PATHS[0]: 3, "model.layers.1.mlp.gate": 2},
            {EXPERTS.format(0, "gate"): (1, 0, 5, 0, 0, 2, 0, 3), EXPERTS.format(0, "down"): (0, 2, 1, 0, 0, 0, 0, 1)},
        ),
        RECIPE,
        0,
    ),
    (ModuleRanks({}, {EXPERTS.format(1, "down"): (2,) * 8}), replace(RECIPE, rank=2, lora_alpha=1), 1),
    (
        ModuleRanks({"model.layers.0.self_attn.q_proj": 1}, {EXPERTS.format(0, "up"): (0, 4, 0, 0, 1, 0, 0, 0)}),
        replace(RECIPE, rank=3, weight_decay=0.1),
        0,
    ),
)


def dropped(members: Iterable[Spec]) -> tuple[Spec, ...]:
    return tuple((a, replace(r, lora_dropout=0.1 * (n + 1)), s) for n, (a, r, s) in enumerate(members))


KINDS: dict[str, Sequence[Spec]] = {
    "routed": ROUTED,
    "hydra": HYDRA,
    "mixed": (ROUTED[0], HYDRA[1], ROUTED[2], HYDRA[0]),
    "balanced": BALANCED,
    "chosen": CHOSEN,
    "routed-dropout": dropped(ROUTED),
    "chosen-dropout": dropped(CHOSEN),
    "ranks-dense": RANKS_DENSE,
    "ranks-moe": RANKS_MOE,
    "ranks-dropout": dropped(RANKS_MOE),
    "micro-batches": tuple((a, replace(r, micro_batch_size=3), s) for a, r, s in (*BALANCED, *HYDRA)),
}


def model_for(allocation: Allocation) -> Any:
    chosen = isinstance(allocation, ExpertSelection) or (isinstance(allocation, ModuleRanks) and allocation.experts)
    return tiny_olmoe() if chosen else tiny_llama()


def fresh(model: Any, allocation: Allocation, recipe: Recipe, seed: int) -> Adapter:
    adapter = attach(model, allocation, shape=shape_from_config(model.config, name="tiny"), lora=recipe.lora, seed=seed)
    adapter.detach()
    return adapter


def yes(rung: Rung) -> bool:
    return True


class Story:
    """A packed run on a fresh model; members join by number."""

    def __init__(
        self, members: Sequence[Spec], task: AnyTask, tokenizer: PreTrainedTokenizerBase, *, evaluations: int = 1
    ) -> None:
        self.specs, self.model = members, model_for(members[0][0])
        self.packed = packing.PackedRun(self.model, task, tokenizer=tokenizer, device="cpu", evaluations=evaluations)
        self.members: dict[int, packing.Member] = {}

    def join(self, *numbers: int, on_rung: Callable[[Rung], bool] = yes, checkpoint: Path | None = None) -> Story:
        for n in numbers:
            self.packed.detach()
            allocation, recipe, seed = self.specs[n]
            adapter = fresh(self.model, allocation, recipe, seed)
            place = None if checkpoint is None else checkpoint / str(n)
            self.members[n] = self.packed.join(adapter, recipe, seed=seed, on_rung=on_rung, checkpoint=place)
        return self

    def steps(self, count: int = 1000) -> Story:
        while self.packed.members and count:
            self.packed.step()
            count -= 1
        return self

    def result(self, number: int) -> loop.Result:
        """Of a member that has ended without an error."""
        result = self.members[number].result
        assert result is not None
        return result


KNOWN: dict[str, tuple[loop.Result, dict[str, Tensor]]] = {}  # what several tests compare with


def alone(
    spec: Spec, task: AnyTask, tokenizer: PreTrainedTokenizerBase, *, evaluations: int = 1, **options: Any
) -> tuple[loop.Result, dict[str, Tensor]]:
    """The same run by `loop.train`: (result, tensors)."""
    if options:
        return alone_anew(spec, task, tokenizer, evaluations=evaluations, **options)
    key = repr((spec, evaluations))
    if key not in KNOWN:
        KNOWN[key] = alone_anew(spec, task, tokenizer, evaluations=evaluations)
    return KNOWN[key]


def alone_anew(
    spec: Spec,
    task: AnyTask,
    tokenizer: PreTrainedTokenizerBase,
    *,
    on_rung: Callable[[Rung], bool] = yes,
    **options: Any,
) -> tuple[loop.Result, dict[str, Tensor]]:
    allocation, recipe, seed = spec
    model = model_for(allocation)
    adapter = fresh(model, allocation, recipe, seed)
    adapter.reattach()
    result = loop.train(
        model, adapter, task, recipe, seed=seed, tokenizer=tokenizer, device="cpu", on_rung=on_rung, **options
    )
    return result, adapter.state_dict()


def agree(
    member: packing.Member, expected: loop.Result, tensors: dict[str, Tensor], *, rtol: float = TOLERANCE
) -> None:
    assert member.error is None
    result = member.result
    assert result is not None
    assert result.losses == pytest.approx(expected.losses, rel=rtol)
    assert (result.status, result.tokens) == (expected.status, expected.tokens)
    assert [r.step for r in result.rungs] == [r.step for r in expected.rungs]
    for name, tensor in member.adapter.state_dict().items():
        difference = torch.linalg.vector_norm(tensor - tensors[name]) / torch.linalg.vector_norm(tensors[name])
        assert difference <= rtol, (name, difference)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_is_alone(task: AnyTask, tokenizer: PreTrainedTokenizerBase, kind: str) -> None:
    """Losses and parameters after 15 steps of AdamW in fp32; ranks, experts, rates and seeds differ between members."""
    specs = KINDS[kind]
    story = Story(specs, task, tokenizer).join(*range(len(specs))).steps()
    for n, spec in enumerate(specs):
        agree(story.members[n], *alone(spec, task, tokenizer))
        shape = shape_from_config(story.model.config, name="tiny")
        counted = spec[0].trainable_params(shape, rank=spec[1].rank)
        assert sum(p.numel() for p in story.members[n].adapter.parameters()) == counted  # padding is none of them
        flat = story.members[n].flat
        moments = flat.views(flat_moments := story.members[n].optimizer.state[flat.values]["exp_avg"])
        assert sum(view.numel() for view in moments) == counted
        assert flat_moments.any()
        for view in moments:
            view.zero_()
        assert not flat_moments.any()  # nothing was in the gaps


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No number is read back from the device, and LoRA runs over all rows."""
    for module in (expert_lora, packing.expert_lora):
        monkeypatch.setattr(module, "waits", lambda weight: True)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("kind", ["chosen", "chosen-dropout", "ranks-dropout"])
def test_packed_is_alone_on_a_gpu_too(task: AnyTask, tokenizer: PreTrainedTokenizerBase, kind: str) -> None:
    specs = KINDS[kind]
    story = Story(specs, task, tokenizer).join(*range(len(specs))).steps()
    for n, spec in enumerate(specs):
        agree(story.members[n], *alone_anew(spec, task, tokenizer, evaluations=1))


def test_one_in_a_pack_is_one_alone(task: AnyTask, tokenizer: PreTrainedTokenizerBase) -> None:
    for spec in (ROUTED[0], CHOSEN[0]):
        story = Story([spec], task, tokenizer, evaluations=3).join(0).steps()
        expected, tensors = alone(spec, task, tokenizer, evaluations=3)
        agree(story.members[0], expected, tensors)
        assert [rung.accuracy for rung in story.result(0).rungs] == [rung.accuracy for rung in expected.rungs]


@pytest.mark.parametrize("specs", [ROUTED, CHOSEN], ids=["routed", "chosen"])
def test_who_joins_later_and_who_leaves_early_changes_nothing(
    task: AnyTask, tokenizer: PreTrainedTokenizerBase, specs: Sequence[Spec]
) -> None:
    """One is stopped at its only rung but the last, at step 7 of 14; one comes when the others took 5 steps."""
    specs = [(a, replace(r, steps=14) if n == 1 else r, s) for n, (a, r, s) in enumerate(specs)]
    story = Story(specs, task, tokenizer, evaluations=2)
    story.join(0).join(1, on_rung=lambda rung: False).steps(5).join(2).steps(2)
    assert [member is story.members[1] for member in story.packed.members] == [False, False]
    story.steps()
    for n, spec in enumerate(specs[:3]):
        agree(story.members[n], *alone(spec, task, tokenizer, evaluations=2, on_rung=lambda _, n=n: n != 1))
    assert story.result(1).status == "stopped"
    assert not hasattr(story.model, "lora_adapter")


@pytest.mark.parametrize("specs", [(*ROUTED, HYDRA[0]), CHOSEN], ids=["dense", "moe"])
def test_nan_stays_where_it_arose(task: AnyTask, tokenizer: PreTrainedTokenizerBase, specs: Sequence[Spec]) -> None:
    """One member's tensors are NaN after its fifth step: it ends as diverged, the others are as they are without it."""
    specs = [(a, replace(r, balance_coef=0.1 * (n == 1)), s) for n, (a, r, s) in enumerate(specs)]
    story = Story(specs, task, tokenizer).join(*range(len(specs))).steps(5)
    with torch.no_grad():
        for parameter in story.members[0].adapter.parameters():
            parameter.fill_(torch.nan)
    story.steps()
    assert (story.result(0).status, story.result(0).accuracy) == ("diverged", None)
    for n, spec in enumerate(specs[1:], start=1):
        agree(story.members[n], *alone(spec, task, tokenizer))
        assert all(p.isfinite().all() for p in story.members[n].adapter.parameters())


class Killed(Exception):
    """What ends a worker in mid-training."""


@pytest.mark.parametrize("first", ["alone", "packed"])
def test_what_began_alone_goes_on_packed_and_the_reverse(
    task: AnyTask, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, first: str
) -> None:
    def die(rung: Rung) -> bool:
        if rung.step == 8:
            raise Killed
        return True

    specs = dropped(CHOSEN[:2])
    seen: list[int] = []

    def note(rung: Rung) -> bool:
        seen.append(rung.step)
        return True

    expected, tensors = alone(specs[0], task, tokenizer, evaluations=2)
    if first == "alone":
        with pytest.raises(Killed):
            alone(specs[0], task, tokenizer, evaluations=2, on_rung=die, checkpoint=tmp_path / "0")
        story = Story(specs, task, tokenizer, evaluations=2)
        story.join(0, checkpoint=tmp_path, on_rung=note).join(1).steps()
        assert seen == [8, 15]
        agree(story.members[0], expected, tensors)
    else:
        story = Story(specs, task, tokenizer, evaluations=2).join(0, checkpoint=tmp_path, on_rung=die).join(1).steps(9)
        assert isinstance(story.members[0].error, Killed)
        assert story.packed.members == [story.members[1]]  # its error is its own
        resumed, others = alone(specs[0], task, tokenizer, evaluations=2, checkpoint=tmp_path / "0")
        assert resumed.losses == pytest.approx(expected.losses, rel=TOLERANCE)
        for name in tensors:
            torch.testing.assert_close(others[name], tensors[name], rtol=1e-4, atol=1e-5)


def test_rungs_are_those_of_the_member_alone(task: AnyTask, tokenizer: PreTrainedTokenizerBase) -> None:
    rungs: dict[int, list[Rung]] = {n: [] for n in range(3)}

    def note(n: int, rung: Rung) -> bool:
        rungs[n].append(rung)
        return True

    story = Story(CHOSEN, task, tokenizer, evaluations=2)
    for n in range(3):
        story.join(n, on_rung=partial(note, n))
    story.steps()
    for n in range(3):
        expected, _ = alone(CHOSEN[n], task, tokenizer, evaluations=2)
        assert [rung.step for rung in rungs[n]] == [8, 15]
        assert [rung.accuracy for rung in rungs[n]] == [rung.accuracy for rung in expected.rungs]
        assert [rung.tokens for rung in rungs[n]] == [rung.tokens for rung in expected.rungs]


def test_seconds_are_shares(task: AnyTask, tokenizer: PreTrainedTokenizerBase) -> None:
    """Together the members claim no more than the time that went by."""
    import time

    began = time.monotonic()
    story = Story(ROUTED, task, tokenizer, evaluations=2).join(0, 1, 2).steps()
    assert 0 < sum(story.result(n).seconds for n in story.members) <= time.monotonic() - began


def test_memory_that_does_not_suffice_gives_everyone_back(task: AnyTask, tokenizer: PreTrainedTokenizerBase) -> None:
    story = Story(ROUTED, task, tokenizer).join(0, 1).steps(3)
    adapter: Any = story.members[1].adapter
    adapter.extra_loss = lambda real: torch.empty(10**15).sum()  # 4 PB: the allocator refuses
    with pytest.raises(OutOfMemoryError, match=r"2 training\(s\) in a pack"):
        story.packed.step()
    assert not story.packed.members
    assert not hasattr(story.model, "lora_adapter")
    assert all(p.grad is None for member in story.members.values() for p in member.adapter.parameters())
    story.join(0).steps()  # and it goes on
    agree(story.members[0], *alone(ROUTED[0], task, tokenizer))


def test_a_module_that_takes_no_part_is_named(
    task: AnyTask, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = Story(ROUTED, task, tokenizer).join(0, 1)
    attention = story.model.model.layers[0].self_attn
    monkeypatch.setattr(attention, "forward", lambda hidden_states, **_: (hidden_states, None))
    with pytest.raises(TrialError, match=r"layers\.0\.self_attn\.q_proj .*took no part"):
        story.packed.step()


def test_what_cannot_share_a_pass_is_refused(task: AnyTask, tokenizer: PreTrainedTokenizerBase) -> None:
    other = (ROUTED[1][0], replace(RECIPE, batch_size=8), 0)
    story = Story((ROUTED[0], other), task, tokenizer).join(0)
    with pytest.raises(StudyError, match=r"\(8, 4, 64\), of the trainings under way \(4, 4, 64\)"):
        story.join(1)
    story.model.model.gradient_checkpointing = True
    assert "checkpointing" in packing.refused(story.model)
    assert packing.refused(tiny_olmoe()) == ""


def test_places_that_nobody_adapts_are_not_touched() -> None:
    model = tiny_llama()
    adapters = [fresh(model, allocation, recipe, seed) for allocation, recipe, seed in ROUTED]
    for adapter in adapters:
        for parameter in adapter.parameters():
            parameter.grad = torch.zeros_like(parameter)
    pack = Pack(model, adapters)
    pack.attach()
    hooked = {name for name, module in model.named_modules() if "forward" in vars(module)}
    assert hooked == set(PATHS)
    sizes = sorted(len(tensor) for tensor in pack.buffers.written)
    adapted = [sum(path in allocation.counts for allocation, _, _ in ROUTED) for path in PATHS]
    assert sizes == sorted(adapted * 2)  # a down and an up for as many members as have experts there
    pack.detach()
    assert not any("forward" in vars(module) for module in model.modules())


def test_gradients_are_those_of_one_step() -> None:
    """The first pass of a step takes the place of what lay there, NaN too; without a pass there is nothing."""
    model = tiny_llama()
    adapters = [fresh(model, allocation, recipe, seed) for allocation, recipe, seed in ROUTED]
    for adapter in adapters:
        for parameter in adapter.parameters():
            parameter.grad = torch.full_like(parameter, torch.nan)
    pack = Pack(model, adapters)
    one, none, *_ = pack.buffers.written
    left, right = torch.randn(len(one), one.size(1), 3), torch.randn(len(one), 3, one.size(2))
    for passes in (2, 1):
        for tensor in pack.buffers.written:
            gradient(tensor).fill_(torch.nan)
        pack.buffers.load()
        for _ in range(passes):
            pack.buffers.add_gradient(one, left, right)
        pack.buffers.unload()
        torch.testing.assert_close(one.grad, passes * torch.bmm(left, right))
        assert not gradient(none).any()
    assert all(gradient(parameter).isfinite().all() for adapter in adapters for parameter in adapter.parameters())


# --- layers below the first adapter -----------------------------------------------------------------------------------

# Nothing in layer 0, one member has nothing in layer 1 either; two train on the same rows from seed 3
UPPER = (
    (counts(0, 0, 2, 1, 4, 2), RECIPE, 3),
    (counts(0, 0, 0, 0, 3, 3, gating="hydra"), replace(RECIPE, rank=2, lora_alpha=2, learning_rate=2e-3), 3),
    (counts(0, 0, 1, 2, 0, 1), replace(RECIPE, lora_dropout=0.2), 4),
)


def rows_by_layer(story: Story) -> dict[int, list[int]]:
    """Rows that went through each layer's attention, in the order of the passes."""
    seen: dict[int, list[int]] = {number: [] for number in range(3)}
    for number, layer in enumerate(story.model.model.layers):
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, number=number: seen[number].append(kwargs["hidden_states"].size(0)),
            with_kwargs=True,
        )
    return seen


@pytest.mark.parametrize("micro", [4, 3], ids=["one-pass", "micro-batches"])
def test_layers_below_the_first_adapter_run_once_for_the_same_rows(
    task: AnyTask, tokenizer: PreTrainedTokenizerBase, micro: int
) -> None:
    specs = [(a, replace(r, micro_batch_size=micro), s) for a, r, s in UPPER]
    story = Story(specs, task, tokenizer).join(0, 1, 2)
    seen = rows_by_layer(story)
    passes, distinct = [], []
    for _ in range(15):
        for one, other in zip(*(story.members[n].micro_batches() for n in (0, 2)), strict=True):
            passes.append(len(one))
            distinct.append(len(one) if one == other else 2 * len(one))  # a last row alone may be the same by chance
        story.steps(1)
    assert seen[0][: len(passes)] == distinct
    assert sum(distinct) > 1.8 * sum(passes)  # 0 and 1 train on the same rows, 2 on others
    assert seen[1][: len(passes)] == seen[2][: len(passes)] == [3 * rows for rows in passes]
    for n, spec in enumerate(specs):
        agree(story.members[n], *alone(spec, task, tokenizer))


def test_who_joins_later_trains_on_other_rows(task: AnyTask, tokenizer: PreTrainedTokenizerBase) -> None:
    """The same seed, but three steps behind: nothing to share until the first has left."""
    story = Story(UPPER, task, tokenizer)
    seen = rows_by_layer(story)
    story.join(0).steps(3).join(1).steps(12)
    assert seen[0][:15] == [4] * 3 + [8] * 12
    story.steps()
    for n in (0, 1):
        agree(story.members[n], *alone(UPPER[n], task, tokenizer))


def test_inputs_that_cannot_be_divided_are_run_for_all(task: AnyTask, tokenizer: PreTrainedTokenizerBase) -> None:
    """A model that hands its layers a bias for every row and head, as some position encodings do."""
    story = Story(UPPER, task, tokenizer).join(0, 1, 2)
    seen = rows_by_layer(story)
    bias = torch.zeros(12 * 4, 1, 1)
    first = story.model.model.layers[0]
    # ahead of the pack's own hook, which the first step puts in
    first.register_forward_pre_hook(lambda module, args, kwargs: (args, {**kwargs, "bias": bias}), with_kwargs=True)
    story.steps()
    assert set(seen[0][:15]) == {12}
    for n, spec in enumerate(UPPER):
        agree(story.members[n], *alone(spec, task, tokenizer))


# --- how many to pack -------------------------------------------------------------------------------------------------


@given(c0=st.floats(1e-4, 1.0), c1=st.floats(1e-4, 1.0), most=st.integers(1, 16))
def test_the_gain_is_that_of_fixed_and_growing_cost(c0: float, c1: float, most: int) -> None:
    one, two = c0 + c1, c0 + 2 * c1
    for members in (1, 2, 5):
        expected = members * (c0 + c1) / (c0 + members * c1)
        assert packing.gain(one, two, members) == pytest.approx(expected, rel=1e-6)
    chosen = packing.choose(one, two, most=most)
    assert 1 <= chosen <= most
    assert packing.gain(one, two, chosen) >= packing.WORTH or chosen == 1


def test_how_many_by_hand() -> None:
    """Fixed cost 9, a training 1: two gain 20/11, four 40/13, eight 80/17; of nothing fixed nothing is gained."""
    assert packing.choose(10.0, 11.0, most=8) == 8
    assert packing.choose(10.0, 11.0, most=4) == 4
    assert packing.choose(10.0, 19.0, most=8) == 1
    assert packing.choose(10.0, 25.0, most=8) == 1  # two in a pack took longer than one after another: noise
    assert packing.choose(10.0, 16.0, most=8) == 4
