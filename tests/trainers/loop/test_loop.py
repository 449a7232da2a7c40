"""The training loop: what must not change a run does not, what ends one is told apart, what was saved goes on exactly.

python -m pytest tests/trainers/loop/test_loop.py
"""

from __future__ import annotations

import itertools
import math
import os
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from allocators.core.errors import OutOfMemoryError, TrialError
from allocators.core.shapes import shape_from_config
from allocators.core.types import ExpertCounts, ExpertSelection, LoraSettings, Recipe, Rung
from tests.trainers.conftest import char_tokenizer, tiny_llama, tiny_olmoe
from tests.trainers.waits import watched
from trainers import loop, tasks
from trainers.adapter import Adapter, attach
from trainers.loop import plan
from trainers.loop.batches import Feed, collate
from trainers.loop.losses import completion_loss
from trainers.loop.past import Past
from trainers.tasks import AnyTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECIPE = Recipe(
    rank=4,
    lora_alpha=8,
    learning_rate=2e-2,
    batch_size=8,
    micro_batch_size=8,
    steps=6,
    max_length=64,
    warmup_ratio=0.2,
)
DROPOUT = replace(RECIPE, lora_dropout=0.1)


def run(
    task: AnyTask,
    *,
    recipe: Recipe = RECIPE,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase,
    on_rung: Callable[[Rung], bool] = lambda rung: True,
    prepare: Callable[[Any], None] = lambda adapter: None,
    **options: Any,
) -> tuple[loop.Result, dict[str, Tensor]]:
    """One run of a fresh adapter on a fresh model: the result and the trained tensors."""
    model = tiny_olmoe()
    adapter = attach(
        model,
        ExpertSelection({0: (0, 3, 5), 1: (1, 2)}),
        shape=shape_from_config(model.config, name="tiny"),
        lora=recipe.lora,
        seed=seed,
    )
    prepare(adapter)
    result = loop.train(
        model, adapter, task, recipe, seed=seed, tokenizer=tokenizer, device="cpu", on_rung=on_rung, **options
    )
    return result, {name: tensor.clone() for name, tensor in adapter.state_dict().items()}


@pytest.fixture(scope="module")
def task(choice_task: Path) -> AnyTask:
    return tasks.load_task(str(choice_task), limit=8)


def without_seconds(rungs: Sequence[Rung]) -> list[Rung]:
    return [replace(rung, seconds=0.0) for rung in rungs]


# --- the plan ---------------------------------------------------------------------------------------------------------


@given(num_rows=st.integers(1, 50), batch_size=st.integers(1, 20), seed=st.integers(0, 5))
def test_every_epoch_visits_every_row_once(num_rows: int, batch_size: int, seed: int) -> None:
    steps = -(-3 * num_rows // batch_size)
    visits = [i for s in range(steps) for i in plan.batch_at(s, num_rows=num_rows, batch_size=batch_size, seed=seed)]
    for epoch in range(3):
        assert sorted(visits[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


def test_the_order_depends_on_the_seed() -> None:
    assert plan.batch_at(0, num_rows=50, batch_size=50, seed=0) != plan.batch_at(0, num_rows=50, batch_size=50, seed=1)


@given(steps=st.integers(1, 200), evaluations=st.integers(1, 20))
def test_the_last_rung_is_the_end(steps: int, evaluations: int) -> None:
    rungs = plan.rung_steps(steps, evaluations)
    assert rungs[-1] == steps
    assert len(rungs) == min(steps, evaluations)
    assert all(0 < a < b for a, b in itertools.pairwise(rungs))


def test_rungs_by_hand() -> None:
    assert plan.rung_steps(10, 3) == (3, 7, 10)
    assert plan.total_steps(replace(RECIPE, steps=0, epochs=1.5), 48) == 9
    assert plan.total_steps(replace(RECIPE, steps=0, epochs=1.0), 49) == 7


@example(steps=77, warmup=0.734375, schedule="cosine")  # 0.003 · 57 / 57 is above 0.003
@given(
    steps=st.integers(1, 100),
    warmup=st.floats(0, 1),
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
)
def test_the_rate_rises_then_falls_and_stays_in_bounds(
    steps: int, warmup: float, schedule: Literal["cosine", "linear", "constant"]
) -> None:
    recipe = replace(RECIPE, warmup_ratio=warmup, schedule=schedule)
    rates = [plan.learning_rate(recipe, step, steps) for step in range(steps)]
    peak = round(warmup * steps)
    assert all(0 < rate <= recipe.learning_rate for rate in rates)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    if schedule == "constant":
        assert set(rates[peak:]) <= {recipe.learning_rate}


@given(lengths=st.lists(st.integers(2, 30), max_size=20), world=st.integers(1, 4), micro=st.integers(1, 7))
def test_workers_share_a_batch_without_loss(lengths: list[int], world: int, micro: int) -> None:
    rows = [tasks.Row([i] * n, 1) for i, n in enumerate(lengths)]
    shares = [plan.share_of(rows, rank=r, world_size=world, micro_batch_size=micro) for r in range(world)]
    dealt = [row.input_ids for share in shares for group in share for row in group]
    assert sorted(dealt) == sorted(row.input_ids for row in rows)
    assert all(len(group) <= micro for share in shares for group in share)
    sizes = [sum(len(group) for group in share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_completion_tokens_alone(model: Any) -> None:
    """By hand: −log p of each completion token given everything before it, row by row, without padding."""
    rows = [tasks.Row([5, 6, 7, 8, 9, 10], 4), tasks.Row([11, 12, 13], 1), tasks.Row([20, 21, 22, 23], 3)]
    expected = 0.0
    for row in rows:
        log_p_SV = model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        for position in range(row.labels_start, len(row.input_ids)):
            expected -= log_p_SV[position - 1, row.input_ids[position]].item()
    loss = completion_loss(model, collate(rows, pad_token_id=1, device=torch.device("cpu")))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_micro_batches_change_nothing(task: AnyTask, tokenizer: PreTrainedTokenizerBase, micro_batch_size: int) -> None:
    whole, tensors = run(task, tokenizer=tokenizer, evaluations=1)
    parts, others = run(
        task, recipe=replace(RECIPE, micro_batch_size=micro_batch_size), tokenizer=tokenizer, evaluations=1
    )
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    for name in tensors:
        torch.testing.assert_close(others[name], tensors[name], rtol=1e-3, atol=1e-5)


def test_training_lowers_the_loss_and_counts_real_tokens(task: AnyTask, tokenizer: PreTrainedTokenizerBase) -> None:
    recipe = replace(RECIPE, steps=25)
    result, _ = run(task, recipe=recipe, tokenizer=tokenizer, evaluations=2)
    assert result.status == "complete"
    assert sum(result.losses[-5:]) < 0.8 * sum(result.losses[:5])
    assert [rung.step for rung in result.rungs] == [12, 25]
    assert result.rungs[1].loss == pytest.approx(sum(result.losses[12:]) / 13)
    assert result.accuracy == result.rungs[-1].accuracy
    rows = task.training_rows(tokenizer, 64)
    visited = [i for s in range(25) for i in plan.batch_at(s, num_rows=len(rows), batch_size=8, seed=0)]
    assert result.tokens == result.rungs[-1].tokens == sum(len(rows[i].input_ids) for i in visited)
    assert result.peak_memory_bytes > 1e7


def test_accuracy_and_loss_at_a_rung_are_the_tasks_own(task: AnyTask, tokenizer: PreTrainedTokenizerBase) -> None:
    seen = []
    model = tiny_olmoe()
    adapter = attach(
        model, ExpertSelection({0: (0,)}), shape=shape_from_config(model.config, name="tiny"), lora=RECIPE.lora
    )

    def on_rung(rung: Rung) -> bool:
        evaluation = task.evaluate(model)
        seen.append((evaluation.accuracy, evaluation.loss))
        return True

    result = loop.train(model, adapter, task, RECIPE, seed=0, tokenizer=tokenizer, device="cpu", on_rung=on_rung)
    assert [(rung.accuracy, rung.eval_loss) for rung in result.rungs] == seen
    assert all(rung.eval_loss is not None for rung in result.rungs)
    assert not model.training
    assert all(parameter.grad is None for parameter in adapter.parameters())


@pytest.mark.parametrize("loss", [math.inf, math.nan, None])
def test_an_evaluation_loss_that_is_no_number_is_left_out(
    monkeypatch: pytest.MonkeyPatch, task: AnyTask, tokenizer: PreTrainedTokenizerBase, loss: float | None
) -> None:
    evaluate = task.evaluate
    monkeypatch.setattr(task, "evaluate", lambda model: replace(evaluate(model), loss=loss))
    result, _ = run(task, tokenizer=tokenizer, evaluations=1)
    assert [rung.eval_loss for rung in result.rungs] == [None]
    assert result.status == "complete"


# --- determinism and resuming -----------------------------------------------------------------------------------------


def test_equal_seeds_give_equal_runs_and_touch_no_other_random_state(
    task: AnyTask, tokenizer: PreTrainedTokenizerBase
) -> None:
    torch.manual_seed(123)
    random.seed(123)
    states = torch.get_rng_state(), random.getstate()
    first, tensors = run(task, recipe=DROPOUT, tokenizer=tokenizer)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    torch.manual_seed(5)
    again, others = run(task, recipe=DROPOUT, tokenizer=tokenizer)
    assert again.losses == first.losses
    assert all(torch.equal(others[name], tensors[name]) for name in tensors)
    other, _ = run(task, recipe=DROPOUT, seed=1, tokenizer=tokenizer)
    assert other.losses != first.losses


def test_evaluations_do_not_change_the_training(task: AnyTask, tokenizer: PreTrainedTokenizerBase) -> None:
    often, _ = run(task, recipe=DROPOUT, tokenizer=tokenizer, evaluations=6)
    once, _ = run(task, recipe=DROPOUT, tokenizer=tokenizer, evaluations=1)
    assert often.losses == once.losses


class Killed(Exception):
    """What ends a worker in mid-trial."""


@pytest.mark.parametrize("as_uri", [False, True])
def test_a_killed_run_goes_on_exactly(
    task: AnyTask, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, as_uri: bool
) -> None:
    place = tmp_path.as_uri() if as_uri else tmp_path
    whole, tensors = run(task, recipe=DROPOUT, tokenizer=tokenizer)

    def die(rung: Rung) -> bool:
        if rung.step == 4:
            raise Killed
        return True

    with pytest.raises(Killed):
        run(task, recipe=DROPOUT, tokenizer=tokenizer, on_rung=die, checkpoint=place)
    reported: list[Rung] = []

    def note(rung: Rung) -> bool:
        reported.append(rung)
        return True

    resumed, others = run(task, recipe=DROPOUT, tokenizer=tokenizer, on_rung=note, checkpoint=place)
    assert resumed.losses == whole.losses
    assert None not in [rung.eval_loss for rung in resumed.rungs]  # those before the end too
    assert without_seconds(resumed.rungs) == without_seconds(whole.rungs)
    assert all(torch.equal(others[name], tensors[name]) for name in tensors)
    assert tuple(reported) == resumed.rungs  # those from before the end are told again: nobody may have heard them
    assert resumed.tokens == whole.tokens


def test_a_finished_run_trains_nothing_again(task: AnyTask, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    first, tensors = run(task, tokenizer=tokenizer, checkpoint=tmp_path)
    counted = []
    again, others = run(
        task,
        tokenizer=tokenizer,
        checkpoint=tmp_path,
        prepare=lambda adapter: setattr(adapter, "check_gradients", lambda: counted.append(1)),
    )
    assert (again.status, again.losses, again.rungs) == ("complete", first.losses, first.rungs)
    assert all(torch.equal(others[name], tensors[name]) for name in tensors)
    assert not counted
    assert os.listdir(tmp_path) == ["checkpoint.safetensors"]


def test_a_stopped_run_says_so_and_stays_stopped(
    task: AnyTask, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    for _ in range(2):
        result, _ = run(task, tokenizer=tokenizer, on_rung=lambda rung: False, checkpoint=tmp_path)
        assert result.status == "stopped"
        assert [rung.step for rung in result.rungs] == [2]
        assert len(result.losses) == 2
        assert result.accuracy == result.rungs[0].accuracy
    result, _ = run(task, tokenizer=tokenizer, on_rung=lambda rung: rung.step < 6, checkpoint=tmp_path)
    assert (result.status, len(result.losses)) == ("complete", 6)  # at the end there is nothing left to stop


def test_a_checkpoint_of_another_run_is_set_aside(
    task: AnyTask, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(task, tokenizer=tokenizer, checkpoint=tmp_path)
    alone, _ = run(task, tokenizer=tokenizer, seed=1)
    again, _ = run(task, tokenizer=tokenizer, seed=1, checkpoint=tmp_path)
    assert again.losses == alone.losses
    assert "it belongs to another run" in caplog.text


def _bit_flipped(file: Path, place: float) -> None:
    data = bytearray(file.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    file.write_bytes(data)


def _a_folder(file: Path) -> None:
    file.unlink()
    (file / "inside").mkdir(parents=True)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:1000]),
    "cut by one byte": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "empty": lambda file: file.write_bytes(b""),
    "garbage": lambda file: file.write_bytes(b"garbage" * 1000),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "a folder": _a_folder,
    **{f"a bit flipped at {place}": partial(_bit_flipped, place=place) for place in (0, 0.01, 0.3, 0.5, 0.8, 1.0)},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_and_the_run_starts_anew(
    damage: str, task: AnyTask, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, _ = run(task, tokenizer=tokenizer)
    run(task, tokenizer=tokenizer, on_rung=lambda rung: False, checkpoint=tmp_path)
    DAMAGE[damage](tmp_path / "checkpoint.safetensors")
    again, _ = run(task, tokenizer=tokenizer, checkpoint=tmp_path)
    assert again.losses == whole.losses
    assert "was set aside" in caplog.text
    assert len(list(tmp_path.glob("checkpoint.safetensors.damaged-*"))) == 1


# --- bad endings ------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_run_without_an_accuracy(
    task: AnyTask, tokenizer: PreTrainedTokenizerBase
) -> None:
    recipe = replace(RECIPE, learning_rate=1e30, warmup_ratio=0.0, steps=40, max_grad_norm=0.0)
    rungs: list[Rung] = []

    def note(rung: Rung) -> bool:
        rungs.append(rung)
        return True

    result, _ = run(task, recipe=recipe, tokenizer=tokenizer, on_rung=note, evaluations=1)
    assert result.status == "diverged"
    assert result.accuracy is None
    assert len(result.losses) <= 2 * loop.CHECK_EVERY
    assert not rungs


def test_a_last_update_that_spoils_the_adapter_is_noticed(task: AnyTask, tokenizer: PreTrainedTokenizerBase) -> None:
    """No training loss follows it, and an evaluation of NaN would be some number."""
    recipe = replace(RECIPE, learning_rate=1e39, warmup_ratio=0.0, schedule="constant", steps=1)
    result, tensors = run(task, recipe=recipe, tokenizer=tokenizer, evaluations=1)
    assert not all(tensor.isfinite().all() for tensor in tensors.values())
    assert (result.status, result.accuracy, result.rungs) == ("diverged", None, ())


def test_an_exploding_loss_is_told_from_a_bump() -> None:
    past = Past()
    past.add([2.0, 31.0, 31.0, 2.0])
    assert not past.diverged  # two steps above 10 · 2 + 10
    past.add([31.0, 31.0])
    assert not past.diverged
    past.add([31.0])
    assert past.diverged


def test_running_out_of_memory_is_an_error_of_the_trial_and_gives_memory_back(
    task: AnyTask, tokenizer: PreTrainedTokenizerBase
) -> None:
    def greedy(adapter: Any) -> None:
        adapter.extra_loss = lambda real: torch.empty(10**15).sum()  # 4 PB: the allocator refuses

    with pytest.raises(OutOfMemoryError, match="out of memory on cpu with micro_batch_size 8") as error:
        run(task, tokenizer=tokenizer, prepare=greedy)
    assert "\n" not in str(error.value)
    frames, traceback = [], error.value.__traceback__
    while traceback is not None:
        frames.append(traceback.tb_frame.f_code.co_name)
        held = traceback.tb_frame.f_locals.values()
        traceback = traceback.tb_next
    assert not any(isinstance(value, loop.TrainingRun) for value in held)
    assert frames[-1] == "train"  # no frame of the failed step, which would hold its tensors
    assert error.value.__context__ is None
    result, _ = run(task, tokenizer=tokenizer)
    assert result.status == "complete"


def test_an_adapter_without_gradient_is_an_error(task: AnyTask, tokenizer: PreTrainedTokenizerBase) -> None:
    def lose_one(adapter: Any) -> None:
        adapter._tensors["nowhere"] = torch.nn.Parameter(torch.zeros(3))

    with pytest.raises(TrialError, match="nowhere got no gradient"):
        run(task, tokenizer=tokenizer, prepare=lose_one)


def test_an_extra_loss_moves_the_adapter_and_stays_out_of_the_reported_loss(
    task: AnyTask, tokenizer: PreTrainedTokenizerBase
) -> None:
    def pull(adapter: Any) -> None:
        adapter.extra_loss = lambda real: sum(p.square().sum() for p in adapter.parameters())

    plain, tensors = run(task, tokenizer=tokenizer, evaluations=1)
    pulled, others = run(task, tokenizer=tokenizer, evaluations=1, prepare=pull)
    assert pulled.losses[0] == plain.losses[0]
    assert sum(t.square().sum() for t in others.values()) < sum(t.square().sum() for t in tensors.values())


# --- cost -------------------------------------------------------------------------------------------------------------


def every_row(adapter: Any) -> None:
    """As on a GPU, where the rows of chosen experts are not picked out."""
    for lora in getattr(adapter, "experts", {}).values():
        lora.every_row = True


def adapted(kind: str) -> tuple[Any, Adapter]:
    """A model with an adapter that has a random part and, where it can, a balance loss."""
    model = tiny_olmoe() if kind == "expert_lora" else tiny_llama()
    shape = shape_from_config(model.config, name="tiny")
    places = [m.path for m in shape.of_role("attention", "mlp")]
    allocation = (
        ExpertSelection({0: (0, 3, 5), 1: (1, 2)})
        if kind == "expert_lora"
        else ExpertCounts({path: 1 + n % 3 for n, path in enumerate(places)})
    )
    lora = LoraSettings(rank=4, lora_alpha=8, lora_dropout=0.1, balance_coef=0.1)
    adapter = attach(model, allocation, shape=shape, lora=lora)
    every_row(adapter)
    return model, adapter


def steps_that_wait(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    task: AnyTask,
    tokenizer: PreTrainedTokenizerBase,
    *,
    watched: Callable[[], AbstractContextManager[None]],
) -> loop.Result:
    """Trains; `watched(step)` is entered around every optimiser step but the first, in which gradients are checked."""
    original = loop.TrainingRun.take_step

    def step(self: loop.TrainingRun, number: int) -> None:
        with watched() if number else nullcontext():
            original(self, number)

    monkeypatch.setattr(loop.TrainingRun, "take_step", step)
    recipe = replace(DROPOUT, steps=loop.CHECK_EVERY + 2, micro_batch_size=3)
    model, adapter = adapted(kind)
    return loop.train(
        model,
        adapter,
        task,
        recipe,
        seed=0,
        tokenizer=tokenizer,
        device="cpu",
        on_rung=lambda rung: True,
        evaluations=1,
    )


@pytest.mark.parametrize("kind", ["expert_lora", "lora_moe"])
def test_no_step_waits_for_the_device(
    monkeypatch: pytest.MonkeyPatch, task: AnyTask, tokenizer: PreTrainedTokenizerBase, kind: str
) -> None:
    """Model, adapter and optimiser included; the losses are read every CHECK_EVERY steps, and not in one."""
    waits: list[str] = []

    def on_cpu() -> AbstractContextManager[None]:
        return watched(waits, torch.device("cpu"))

    result = steps_that_wait(monkeypatch, kind, task, tokenizer, watched=on_cpu)
    assert result.status == "complete"
    assert waits == []
    with on_cpu():  # and a look is seen
        torch.ones(2).tolist(), torch.ones(1).item(), torch.ones(2).nonzero()
    assert {"tolist", "item", "nonzero"} <= set(waits)


def test_the_next_step_is_on_its_way_while_one_computes() -> None:
    """Each step's rows are asked for once, before the step that needs them, and in order."""
    asked: list[int] = []

    def ask(step: int) -> list[Any]:
        asked.append(step)
        return []

    feed = Feed(ask, torch.device("cpu"))
    for step in (3, 4, 5):  # a run that goes on from a checkpoint
        feed.take(step)
        feed.fetch(step + 1)
        assert asked == list(range(3, step + 2))


def test_padding_changes_no_loss(model: Any) -> None:
    """The model is given no mask: what stands right of a row's end is not seen under causal attention."""
    rows = [tasks.Row([5, 6, 7, 8, 9, 10], 4), tasks.Row([11, 12, 13], 1)]
    losses = [completion_loss(model, collate(rows, pad_token_id=pad, device=torch.device("cpu"))) for pad in (1, 40)]
    assert losses[0].item() == losses[1].item()
    nothing = collate(rows, pad_token_id=1, device=torch.device("cpu"), counted=False)
    assert nothing.completion_tokens == 0
    assert completion_loss(model, nothing).item() == 0


# --- two workers ------------------------------------------------------------------------------------------------------


def worker(rank: int, world_size: int, folder: str, path: str) -> None:
    """One of two: the same run as alone, one where the other runs out of memory, one that goes on from a checkpoint."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    tokenizer, task = char_tokenizer(), tasks.load_task(path, limit=8)
    result, tensors = run(task, tokenizer=tokenizer, checkpoint=f"{folder}/checkpoint")
    again, _ = run(task, tokenizer=tokenizer, checkpoint=f"{folder}/checkpoint")
    assert again.losses == result.losses

    def greedy(adapter: Any) -> None:
        if rank == 1:
            adapter.extra_loss = lambda real: torch.empty(10**15).sum()

    try:
        run(task, tokenizer=tokenizer, prepare=greedy)
        ending = "complete"
    except TrialError as error:
        ending = type(error).__name__
    small, _ = run(task, recipe=replace(RECIPE, batch_size=1, steps=3), tokenizer=tokenizer, evaluations=1)
    task.test.prepare(tokenizer, rank=rank, world_size=world_size)
    test = task.test.evaluate(tiny_olmoe())
    torch.save(
        {
            "losses": result.losses,
            "accuracies": [rung.accuracy for rung in result.rungs],
            "eval_losses": [rung.eval_loss for rung in result.rungs],
            "test": (test.correct, test.loss),
            "tokens": result.tokens,
            "tensors": tensors,
            "small": small.losses,
            "ending": ending,
        },
        f"{folder}/{rank}.pt",
    )
    dist.destroy_process_group()


def test_two_workers_are_one(
    choice_task: Path, task: AnyTask, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    torch.multiprocessing.spawn(worker, args=(2, str(tmp_path), str(choice_task)), nprocs=2)
    zero, one = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    alone, tensors = run(task, tokenizer=tokenizer)
    assert zero["losses"] == one["losses"] == pytest.approx(alone.losses, rel=1e-5)
    assert zero["accuracies"] == one["accuracies"] == [rung.accuracy for rung in alone.rungs]
    assert zero["eval_losses"] == one["eval_losses"]
    assert zero["eval_losses"] == pytest.approx([rung.eval_loss for rung in alone.rungs], rel=1e-4)
    assert zero["tokens"] == alone.tokens
    task.test.prepare(tokenizer)
    test = task.test.evaluate(tiny_olmoe())
    assert zero["test"] == one["test"] == (test.correct, pytest.approx(test.loss, rel=1e-4))
    for name in tensors:
        assert torch.equal(zero["tensors"][name], one["tensors"][name])
        torch.testing.assert_close(zero["tensors"][name], tensors[name], rtol=1e-3, atol=1e-5)
    small, _ = run(task, recipe=replace(RECIPE, batch_size=1, steps=3), tokenizer=tokenizer, evaluations=1)
    assert zero["small"] == one["small"] == pytest.approx(small.losses, rel=1e-5)  # a worker without a row
    assert zero["ending"] == one["ending"] == "OutOfMemoryError"  # instead of waiting for the other for ever
