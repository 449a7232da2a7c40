"""Two workers that share one base model are one worker that has it alone: losses, accuracy, signals, merged weights.

Both run once, for all tests; every worker writes what it found and the tests compare it with the same done here.

python -m pytest tests/trainers/models/test_sharding.py
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from allocators.core.errors import StudyError
from allocators.core.types import Allocation, ExpertCounts, ExpertSelection, ModelShape, Recipe
from allocators.signals import measurement_of
from tests.trainers.conftest import char_tokenizer, tiny_llama
from tests.trainers.reference import fill
from trainers import loop, models, tasks
from trainers.adapter import Adapter, attach, fingerprint
from trainers.models import sharding
from trainers.tasks import AnyTask

Arguments = tuple[str, str, str, str]  # folders of the MoE and the dense model, files of the two tasks

# Of 5 rows the first worker has 3, in two micro-batches, and the second has 2 in one: it has a pass without rows.
RECIPE = Recipe(
    rank=4, lora_alpha=8, learning_rate=2e-2, batch_size=5, micro_batch_size=2, steps=3, max_length=64, warmup_ratio=0.2
)


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its head is its embedding, and two workers cannot share its 67 rows evenly."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_llama().save_pretrained(folder)
    char_tokenizer().save_pretrained(folder)
    return folder


def selection(shape: ModelShape) -> ExpertSelection:
    """Experts of both workers' halves, and of one worker alone."""
    return ExpertSelection({0: (0, 3, 5), 1: (1, 2)})


def counts(shape: ModelShape) -> ExpertCounts:
    return ExpertCounts({m.path: 1 + n % 3 for n, m in enumerate(shape.of_role("attention", "mlp")) if n % 4})


def train(
    loaded: models.Loaded, shape: ModelShape, allocation: Allocation, task: AnyTask, recipe: Recipe
) -> tuple[loop.Result, Adapter]:
    adapter = attach(loaded.model, allocation, shape=shape, lora=recipe.lora)
    result = loop.train(
        loaded.model,
        adapter,
        task,
        recipe,
        seed=0,
        tokenizer=loaded.tokenizer,
        device="cpu",
        on_rung=lambda rung: True,
        evaluations=2,
    )
    return result, adapter


def everything(moe: str, dense: str, choice: str, copy: str, *, shard: bool) -> dict[str, Any]:
    """All that has to be equal, of one worker; everything it needs is in files."""
    results: dict[str, Any] = {}
    # 7 documents in batches of 2 requests: 8 passes for the first worker, 6 for the second
    choose, generate = tasks.load_task(choice, limit=7, batch_size=2), tasks.load_task(copy, limit=5, batch_size=1)
    for name, folder, allocation in (("moe", moe, selection), ("dense", dense, counts)):
        loaded = models.load(folder, shard=shard)
        shape = models.shape_of_model(loaded.model, name=name)
        results[f"{name} bytes"] = held_bytes(loaded.model)
        results[f"{name} fingerprint"] = fingerprint(loaded.model)
        # a balance loss is that of each micro-batch: it is the same where those are the same, a row each
        recipe = replace(RECIPE, balance_coef=0.1, micro_batch_size=1) if name == "dense" else RECIPE
        result, adapter = train(loaded, shape, allocation(shape), choose, recipe)
        adapter.detach()
        results[f"{name} losses"] = result.losses
        results[f"{name} accuracies"] = [rung.accuracy for rung in result.rungs]
        results[f"{name} tensors"] = dict(adapter.state_dict())
        results[f"{name} bytes after training"] = held_bytes(loaded.model)
        source = SimpleNamespace(
            name=name,
            identity=loaded.identity,
            tokenizer_identity="",
            shape=shape,
            dtype=loaded.numbers,
            model=loaded.model,
            tokenizer=loaded.tokenizer,
            task_name="choice",
            task=choose,
            samples=10,
            seed=0,
            progress=lambda done, total, what: None,
        )
        for signal in ("routing", "sensitivity") if name == "moe" else ("sensitivity",):
            rows = measurement_of(signal, source).measure().rows
            results[f"{name} {signal}"] = [v for row in rows.values() for values in row.values() for v in values]
        if name == "moe":
            result, adapter = train(loaded, shape, allocation(shape), generate, replace(RECIPE, steps=1))
            results["generated losses"], results["generated accuracy"] = result.losses, result.accuracy
            fill(adapter)
            adapter.merge()
        results[f"{name} logits"] = loaded.model(torch.arange(3, 23).view(2, 10), use_cache=False).logits.detach()
    loaded = models.load(dense, shard=shard, gradient_checkpointing=True)
    results["checkpointed losses"] = train(loaded, shape, counts(shape), choose, recipe)[0].losses
    return results


def held_bytes(model: Any) -> int:
    return sum(sharding.local_rows(parameter)[0].nbytes for parameter in model.parameters())


def worker(rank: int, world_size: int, folder: str, arguments: Arguments) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    results = everything(*arguments, shard=True)
    results["ending"] = out_of_memory(rank, *arguments)
    torch.save(results, f"{folder}/{rank}.pt")


def out_of_memory(rank: int, moe: str, dense: str, choice: str, copy: str) -> str:
    """How a run ends where the second worker has no memory for its third pass; last, as nobody can go on after it."""
    loaded = models.load(moe, shard=True)
    shape = models.shape_of_model(loaded.model, name="moe")
    passes = 0

    def greedy(module: Any, arguments: Any) -> None:
        nonlocal passes
        passes += 1
        if rank == 1 and passes == 3:
            torch.empty(10**15)

    loaded.model.model.layers[1].register_forward_pre_hook(greedy)
    try:
        train(loaded, shape, selection(shape), tasks.load_task(choice, limit=7), RECIPE)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        if rank == 1:  # what the end of its process does: the other one hears that nobody is there
            torch.distributed.destroy_process_group()
    return "complete"


@pytest.fixture(scope="module")
def arguments(model_folder: Path, dense_folder: Path, choice_task: Path, copy_task: Path) -> Arguments:
    return str(model_folder), str(dense_folder), str(choice_task), str(copy_task)


@pytest.fixture(scope="module")
def alone(arguments: Arguments) -> dict[str, Any]:
    return everything(*arguments, shard=False)


@pytest.fixture(scope="module")
def together(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sharded")
    torch.multiprocessing.spawn(worker, args=(2, str(folder), arguments), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", ["moe", "dense"])
def test_each_worker_holds_half_of_the_base(name: str, alone: dict[str, Any], together: list[dict[str, Any]]) -> None:
    whole, parts = alone[f"{name} bytes"], [results[f"{name} bytes"] for results in together]
    assert sum(parts) == whole
    assert max(parts) <= 0.51 * whole
    assert [results[f"{name} bytes after training"] for results in together] == parts


@pytest.mark.parametrize("name", ["moe", "dense"])
def test_two_workers_with_half_a_model_train_as_one_with_all_of_it(
    name: str, alone: dict[str, Any], together: list[dict[str, Any]]
) -> None:
    zero, one = together
    assert zero[f"{name} losses"] == one[f"{name} losses"] == pytest.approx(alone[f"{name} losses"], rel=1e-5)
    assert zero[f"{name} accuracies"] == one[f"{name} accuracies"] == alone[f"{name} accuracies"]
    for key, tensor in alone[f"{name} tensors"].items():
        assert torch.equal(zero[f"{name} tensors"][key], one[f"{name} tensors"][key])
        # Adam divides a gradient by its size: where it is next to nothing, its rounding counts as much as any other's
        assert (zero[f"{name} tensors"][key] - tensor).abs().max() <= 2e-3 * tensor.abs().max()


def test_running_layers_again_in_the_backward_pass_gives_the_same_losses(
    alone: dict[str, Any], together: list[dict[str, Any]]
) -> None:
    for results in (alone, *together):
        assert results["checkpointed losses"] == pytest.approx(alone["dense losses"], rel=1e-5)


def test_answers_that_are_generated_differ_in_length_between_workers_and_are_counted_all_the_same(
    alone: dict[str, Any], together: list[dict[str, Any]]
) -> None:
    for results in together:
        assert results["generated losses"] == pytest.approx(alone["generated losses"], rel=1e-5)
        assert results["generated accuracy"] == alone["generated accuracy"]


@pytest.mark.parametrize("signal", ["moe routing", "moe sensitivity", "dense sensitivity"])
def test_signals_are_those_of_the_whole_model(
    signal: str, alone: dict[str, Any], together: list[dict[str, Any]]
) -> None:
    assert any(value > 0 for value in alone[signal])
    for results in together:
        assert results[signal] == pytest.approx(alone[signal], rel=1e-4)


@pytest.mark.parametrize("name", ["moe", "dense"])
def test_an_adapter_finds_the_same_base_in_parts_and_whole(
    name: str, alone: dict[str, Any], together: list[dict[str, Any]]
) -> None:
    assert {results[f"{name} fingerprint"] for results in together} == {alone[f"{name} fingerprint"]}


@pytest.mark.parametrize("name", ["moe", "dense"])  # that of the MoE model after an adapter was merged into it
def test_logits_are_those_of_the_whole_model(name: str, alone: dict[str, Any], together: list[dict[str, Any]]) -> None:
    for results in together:
        torch.testing.assert_close(results[f"{name} logits"], alone[f"{name} logits"], rtol=1e-4, atol=1e-4)


def test_out_of_memory_in_a_pass_ends_the_run_there_and_leaves_no_worker_waiting(
    together: list[dict[str, Any]],
) -> None:
    zero, one = (results["ending"] for results in together)
    assert one.startswith("OutOfMemoryError: out of memory on cpu")
    assert zero.startswith("RuntimeError"), zero  # gloo says who is gone


def test_a_model_is_not_shared_by_one_worker(model_folder: Path) -> None:
    with pytest.raises(StudyError, match="set workers_per_trial to 2 or more"):
        models.load(str(model_folder), shard=True)


def test_rows_of_a_model_that_is_not_sharded_are_all_of_them(model: Any, tmp_path: Path) -> None:
    assert not sharding.is_sharded(model)
    weight = model.lm_head.weight
    rows, first = sharding.local_rows(weight)
    assert rows is weight
    assert first == 0
    every = math.ceil(weight.numel() / 64)
    expected = weight.flatten()[::every][:64]
    torch.testing.assert_close(sharding.sampled([weight], 64), expected)
