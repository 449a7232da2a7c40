"""What a worker does with a trial, without Ray around it: every ending, and a base model that never changes."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from allocators.core.messages import (
    Assignment,
    Finished,
    PackChosen,
    PackJob,
    Report,
    TaskDescribed,
    TaskJob,
    TrainJob,
    is_end,
)
from allocators.core.types import ExpertSelection, Outcome, Recipe, Trial
from tests.trainers.conftest import worker_setup
from trainers import models, storage
from trainers.adapter import Adapter
from trainers.worker_slots import WorkerSlots
from trainers.worker_state import WorkerState


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> WorkerState:
    folder = tmp_path_factory.mktemp("worker")
    setup = worker_setup(folder, task="tiny_cipher", task_options={"limit": 16}, evaluations=2, calibration_samples=8)
    return WorkerState(setup, "cpu")


def test_what_is_odd_about_the_files_of_the_base_is_told_with_the_task(tmp_path: Path) -> None:
    folder = shutil.copytree(models.EMBEDDED["tiny-moe"], tmp_path / "moe")
    (folder / "adapter_config.json").write_text("{}")
    setup = worker_setup(tmp_path, model=str(folder), task="tiny_cipher", task_options={"limit": 8})
    described = WorkerState(setup, "cpu").answer(TaskJob())
    assert isinstance(described, TaskDescribed)
    assert described.notes == ("adapter_config.json beside the weights of 'moe' is not used: the base is taken alone",)


def trial(state: WorkerState, ids: tuple[int, ...] = (0, 3), **recipe: Any) -> tuple[Trial, int]:
    settings = Recipe(**({"rank": 4, "steps": 4, "batch_size": 4, "micro_batch_size": 4} | recipe))
    selection = ExpertSelection(dict.fromkeys(state.shape.moe_layers, ids))
    made = Trial(selection, settings, "tiny-moe", "tiny_cipher", 0, "sieve", {"fraction": 0.125})
    return made, selection.trainable_params(state.shape, rank=settings.rank)


def weights_hash(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().numpy().tobytes())
    return digest.hexdigest()


def test_trial_after_trial_leaves_the_base_bit_identical(state: WorkerState) -> None:
    before = weights_hash(state.model)
    for ids in ((0, 3), (), tuple(range(16)), (15,)):
        outcome = state.train(TrainJob(*trial(state, ids)), report=lambda rung: True)
        assert outcome.status == "complete", outcome.message
        assert weights_hash(state.model) == before
    assert not any(p.requires_grad for p in state.model.parameters())


def test_the_base_alone_is_evaluated_as_an_adapter_that_was_not_trained(state: WorkerState) -> None:
    base = state.untrained().selection
    hardly = state.train(TrainJob(*trial(state, steps=1, learning_rate=1e-12)), report=lambda rung: True)
    assert base.accuracy == hardly.accuracy
    assert base.stderr is not None
    assert base.stderr == hardly.rungs[-1].stderr
    assert base.stderr > 0


def test_the_same_trial_twice_is_the_same_result(state: WorkerState) -> None:
    first = state.train(TrainJob(*trial(state)), report=lambda rung: True)
    storage.delete_folder(storage.join(state.setup.checkpoints, first.digest))
    second = state.train(TrainJob(*trial(state)), report=lambda rung: True)
    losses = [[rung.loss for rung in outcome.rungs] for outcome in (first, second)]
    assert losses[0] == losses[1]
    assert first.accuracy == second.accuracy


def test_a_diverged_trial_has_no_accuracy_and_no_adapter(state: WorkerState) -> None:
    outcome = state.train(
        TrainJob(*trial(state, learning_rate=1e30, max_grad_norm=0.0, steps=20)), report=lambda rung: True
    )
    assert outcome.status == "diverged"
    assert outcome.accuracy is None
    assert outcome.adapter == ""


def test_a_trial_that_cannot_work_is_an_outcome_with_its_reason(state: WorkerState) -> None:
    asked, params = trial(state)
    outcome = state.train(TrainJob(asked, params + 1), report=lambda rung: True)
    assert outcome.status == "failed"
    assert f"{params:,}" in outcome.message
    assert state.train(TrainJob(replace(asked, seed=5), params), report=lambda rung: True).status == "complete"


def test_a_trial_stops_where_its_report_is_answered_with_no(state: WorkerState) -> None:
    outcome = state.train(TrainJob(*trial(state, (7,))), report=lambda rung: False)
    assert outcome.status == "stopped"
    assert [rung.step for rung in outcome.rungs] == [2]
    assert outcome.accuracy == outcome.rungs[-1].accuracy


def test_a_signal_is_measured_once_for_everyone(state: WorkerState) -> None:
    first = state.measure("routing")
    again = state.measure("routing")
    assert first is not None
    assert again is not None
    assert again.to_json() == first.to_json()
    assert set(first.rows) == {str(layer) for layer in state.shape.moe_layers}
    tokens = {sum(row["count"]) for row in first.rows.values()}
    assert len(tokens) == 1, "every layer routes the same tokens"


# --- several trials in one pass ---


class Jobs:
    """These jobs; `late` ones are there only when a slot has become free. Keeps what is reported."""

    def __init__(
        self,
        jobs: Sequence[Assignment],
        late: Sequence[Assignment] = (),
        go_on: Callable[[str], bool] = lambda job_id: True,
    ) -> None:
        self.waiting, self.late, self.go_on = list(jobs), list(late), go_on
        self.reports: list[tuple[str, Report]] = []

    def take(self, *, wait: bool = True) -> Assignment | Literal["empty", "closed"]:
        if self.waiting:
            return self.waiting.pop(0)
        if self.late and any(is_end(report) for _, report in self.reports):
            return self.late.pop(0)
        return "closed" if wait else "empty"

    def report(self, job_id: str, report: Report) -> bool:
        self.reports.append((job_id, report))
        return self.go_on(job_id)

    def progress(self, job_id: str) -> Callable[[int, int, str], None]:
        return lambda done, total, what: None


def packed(
    state: WorkerState,
    jobs: Sequence[Assignment],
    *,
    slots: int,
    late: Sequence[Assignment] = (),
    go_on: Callable[[str], bool] = lambda job_id: True,
) -> tuple[list[tuple[str, Report]], dict[str, Outcome]]:
    """What a worker with `slots` reports of jobs, and the outcomes among it by job."""
    taken = Jobs(jobs, late, go_on)
    WorkerSlots(state, slots, taken).serve()
    assert not hasattr(state.model, "lora_adapter")
    ends = [(job_id, report) for job_id, report in taken.reports if is_end(report)]
    assert len(ends) == len({job_id for job_id, _ in ends}), "every job ends once"
    return taken.reports, {job_id: report.outcome for job_id, report in ends if isinstance(report, Finished)}


def job(
    state: WorkerState, name: str, ids: tuple[int, ...] = (0, 3), *, attempt: int = 1, off: int = 0, **recipe: Any
) -> Assignment:
    asked, params = trial(state, ids, **recipe)
    return Assignment(name, TrainJob(asked, params + off), attempt)


@pytest.fixture
def fresh(state: WorkerState, tmp_path: Path) -> Iterator[WorkerState]:
    """The worker's state with no checkpoint of an earlier test."""
    before = state.setup
    state.setup = replace(before, checkpoints=str(tmp_path / "checkpoints"))
    yield state
    state.setup = before


def test_packed_trials_are_those_of_a_worker_each(fresh: WorkerState, tmp_path: Path) -> None:
    """One ends early and another takes its place; one is as large as was not counted; a signal waits for its turn."""
    before = weights_hash(fresh.model)
    jobs = [
        job(fresh, "a"),
        job(fresh, "b", (1, 2, 3), rank=2, steps=2),
        job(fresh, "wrong", (5,), off=1),
        Assignment("task", TaskJob()),
    ]
    reports, outcomes = packed(fresh, jobs, slots=3, late=[job(fresh, "c", (7,), learning_rate=1e-3)])
    assert weights_hash(fresh.model) == before
    assert next(i for i, report in reports if is_end(report)) == "wrong"
    assert {i: o.status for i, o in outcomes.items()} == {
        "a": "complete",
        "b": "complete",
        "c": "complete",
        "wrong": "failed",
    }
    assert (outcomes["a"].pack, outcomes["b"].pack) == (2, 2)
    fresh.setup = replace(fresh.setup, checkpoints=str(tmp_path / "others"))
    for name in "abc":
        one = outcomes[name]
        alone = fresh.train(TrainJob(one.trial, one.trainable_params), report=lambda rung: True)
        assert [rung.loss for rung in one.rungs] == pytest.approx([rung.loss for rung in alone.rungs], rel=1e-5)
        assert (one.tokens, one.adapter, alone.pack) == (alone.tokens, alone.adapter, 1)
        assert one.accuracy == pytest.approx(alone.accuracy, abs=1 / 16)  # of 16 questions rounding may flip one


@pytest.mark.slow
def test_what_a_packed_trial_forgot_is_what_it_forgot_alone(tmp_path: Path) -> None:
    """Experts and ranks of every matrix in one pass; the first to end measures the base, with its own adapter off."""
    options = {"task": "tiny_cipher", "task_options": {"limit": 8}, "forgetting": "held_out"}
    state = WorkerState(worker_setup(tmp_path / "packed", **options), "cpu")
    jobs = [job(state, "a", steps=2), job(state, "b", (1, 2, 3), steps=4), job(state, "c", (7,), learning_rate=1e-2)]
    _, outcomes = packed(state, jobs, slots=3)
    assert max(outcome.pack for outcome in outcomes.values()) > 1
    other = WorkerState(worker_setup(tmp_path / "alone", **options), "cpu")
    for outcome in reversed(outcomes.values()):
        alone = other.train(TrainJob(outcome.trial, outcome.trainable_params), report=lambda rung: True)
        assert outcome.forgetting is not None
        assert alone.forgetting is not None
        assert outcome.forgetting.before == alone.forgetting.before
        assert outcome.forgetting.after == pytest.approx(alone.forgetting.after, rel=1e-5)
        assert abs(outcome.forgetting.rise) > 1e-4


@pytest.mark.slow
def test_a_training_that_was_cut_off_and_went_on_forgot_what_it_would_have(tmp_path: Path) -> None:
    options = {"task": "tiny_cipher", "task_options": {"limit": 8}, "forgetting": "held_out", "evaluations": 2}
    whole = WorkerState(worker_setup(tmp_path / "whole", **options), "cpu")
    asked, params = trial(whole)
    expected = whole.train(TrainJob(asked, params), report=lambda rung: True)
    stopping = WorkerState(worker_setup(tmp_path / "cut", **options), "cpu")
    assert stopping.train(TrainJob(asked, params), report=lambda rung: False).forgetting is None
    again = WorkerState(worker_setup(tmp_path / "cut", **options), "cpu")  # a worker that knows nothing of it
    went_on = again.train(TrainJob(asked, params), report=lambda rung: True)
    assert went_on.forgetting == expected.forgetting is not None


def test_a_packed_trial_stops_and_diverges_by_itself(fresh: WorkerState) -> None:
    jobs = [
        job(fresh, "stops"),
        job(fresh, "diverges", learning_rate=1e30, max_grad_norm=0.0),
        job(fresh, "goes on", (1,)),
    ]
    _, outcomes = packed(fresh, jobs, slots=3, go_on=lambda name: name != "stops")
    assert {i: o.status for i, o in outcomes.items()} == {
        "stops": "stopped",
        "diverges": "diverged",
        "goes on": "complete",
    }
    assert outcomes["stops"].rungs[-1].step == 2


@pytest.mark.slow
def test_after_a_pass_that_failed_each_goes_on_alone_and_the_one_to_blame_is_named(
    fresh: WorkerState, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainers.adapter import Adapter

    def greedy(self: Adapter, real_BS: Tensor | None = None) -> Tensor | None:
        return torch.empty(10**15).sum() if self.lora.rank == 2 else None  # 4 PB: the allocator refuses

    monkeypatch.setattr(Adapter, "extra_loss", greedy)
    _, outcomes = packed(fresh, [job(fresh, "large", rank=2), job(fresh, "small"), job(fresh, "other", (1,))], slots=3)
    assert {i: (o.status, o.pack) for i, o in outcomes.items()} == {
        "large": ("out_of_memory", 1),
        "small": ("complete", 1),
        "other": ("complete", 1),
    }
    assert "a step of 3 trials failed, each goes on alone" in capsys.readouterr().err


def test_how_many_to_pack_is_measured_and_leaves_nothing_behind(fresh: WorkerState) -> None:
    before = weights_hash(fresh.model)
    asked, params = trial(fresh)
    ((_, answer),), _ = packed(fresh, [Assignment("pack", PackJob(asked, params))], slots=8)
    assert isinstance(answer, PackChosen)
    assert answer.pack in (1, 2, 4)
    assert "a step takes" in answer.why
    assert weights_hash(fresh.model) == before


def test_what_cannot_share_a_pass_waits_for_its_end(fresh: WorkerState) -> None:
    """Another batch size, and a trial whose worker died with it."""
    jobs = [job(fresh, "a"), job(fresh, "b", batch_size=2, micro_batch_size=2), job(fresh, "c", (1,), attempt=2)]
    _, outcomes = packed(fresh, jobs, slots=3)
    assert {i: (o.status, o.pack) for i, o in outcomes.items()} == dict.fromkeys("abc", ("complete", 1))
