"""What a worker does with a trial, without Ray around it: every ending, and a base model that never changes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
import torch

from allocators.core.types import ExpertSelection, Outcome, Recipe, Trial
from tests.trainers.conftest import bench_setup
from trainers import storage
from trainers.worker import Bench, Places


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worker")
    setup = bench_setup(folder, task="tiny_cipher", task_options={"limit": 16}, evaluations=2, calibration_samples=8)
    return Bench(setup, "cpu")


def trial(bench, ids=(0, 3), **recipe) -> tuple[Trial, int]:
    settings = Recipe(**({"rank": 4, "steps": 4, "batch_size": 4, "micro_batch_size": 4} | recipe))
    selection = ExpertSelection(dict.fromkeys(bench.shape.moe_layers, ids))
    made = Trial(selection, settings, "tiny-moe", "tiny_cipher", 0, "sieve", {"fraction": 0.125})
    return made, selection.trainable_params(bench.shape, rank=settings.rank)


def weights_hash(model) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().numpy().tobytes())
    return digest.hexdigest()


def test_trial_after_trial_leaves_the_base_bit_identical(bench):
    before = weights_hash(bench.model)
    for ids in ((0, 3), (), tuple(range(16)), (15,)):
        outcome = bench.train(*trial(bench, ids), report=lambda rung: True)
        assert outcome.status == "complete", outcome.message
        assert weights_hash(bench.model) == before
    assert not any(p.requires_grad for p in bench.model.parameters())


def test_the_base_alone_is_evaluated_as_an_adapter_that_was_not_trained(bench):
    base = bench.untrained()
    hardly = bench.train(*trial(bench, steps=1, learning_rate=1e-12), report=lambda rung: True)
    assert base["accuracy"] == hardly.accuracy
    assert base["stderr"] == hardly.rungs[-1].stderr > 0


def test_the_same_trial_twice_is_the_same_result(bench):
    first = bench.train(*trial(bench), report=lambda rung: True)
    storage.delete_folder(storage.join(bench.setup["checkpoints"], first.digest))
    second = bench.train(*trial(bench), report=lambda rung: True)
    losses = [[rung.loss for rung in outcome.rungs] for outcome in (first, second)]
    assert losses[0] == losses[1]
    assert first.accuracy == second.accuracy


def test_a_diverged_trial_has_no_accuracy_and_no_adapter(bench):
    outcome = bench.train(*trial(bench, learning_rate=1e30, max_grad_norm=0.0, steps=20), report=lambda rung: True)
    assert outcome.status == "diverged"
    assert outcome.accuracy is None
    assert outcome.adapter == ""


def test_a_trial_that_cannot_work_is_an_outcome_with_its_reason(bench):
    asked, params = trial(bench)
    outcome = bench.train(asked, params + 1, report=lambda rung: True)
    assert outcome.status == "failed"
    assert f"{params:,}" in outcome.message
    assert bench.train(replace(asked, seed=5), params, report=lambda rung: True).status == "complete"


def test_a_trial_stops_where_its_report_is_answered_with_no(bench):
    outcome = bench.train(*trial(bench, (7,)), report=lambda rung: False)
    assert outcome.status == "stopped"
    assert [rung.step for rung in outcome.rungs] == [2]
    assert outcome.accuracy == outcome.rungs[-1].accuracy


def test_a_signal_is_measured_once_for_everyone(bench):
    first = bench.measure("routing")["signal"]
    assert bench.measure("routing")["signal"] == first
    assert set(first["rows"]) == {str(layer) for layer in bench.shape.moe_layers}
    tokens = {sum(row["count"]) for row in first["rows"].values()}
    assert len(tokens) == 1, "every layer routes the same tokens"


# --- several trials in one pass ---


def packed(bench, jobs, *, places, report=lambda job_id, message: True, late=()):
    """What a worker with `places` reports of jobs; `late` ones are there only when a place has become free."""
    told, waiting, later = [], list(jobs), list(late)

    def take(wait):
        if waiting:
            return waiting.pop(0)
        if later and any(message["done"] for _, message in told):
            return later.pop(0)
        return None if wait else ("", {})

    def heard(job_id, message):
        told.append((job_id, message))
        return report(job_id, message)

    Places(bench, places, take=take, report=heard, told=lambda job_id: lambda done, total, what: None).serve()
    assert not hasattr(bench.model, "lora_adapter")
    ends = [(job_id, message) for job_id, message in told if message["done"]]
    assert len(ends) == len({job_id for job_id, _ in ends}), "every job ends once"
    return told, {i: Outcome.from_json(json.loads(m["outcome"])) for i, m in ends if "outcome" in m}


def job(bench, name, ids=(0, 3), *, attempt=1, off=0, **recipe):
    asked, params = trial(bench, ids, **recipe)
    work = {"kind": "trial", "trial": json.dumps(asked.to_json()), "trainable_params": params + off}
    return name, work | {"attempt": attempt}


@pytest.fixture
def fresh(bench, tmp_path):
    """The bench with no checkpoint of an earlier test."""
    before = bench.setup
    bench.setup = before | {"checkpoints": str(tmp_path / "checkpoints")}
    yield bench
    bench.setup = before


def test_packed_trials_are_those_of_a_worker_each(fresh, tmp_path):
    """One ends early and another takes its place; one is as large as was not counted; a signal waits for its turn."""
    before = weights_hash(fresh.model)
    jobs = [
        job(fresh, "a"),
        job(fresh, "b", (1, 2, 3), rank=2, steps=2),
        job(fresh, "wrong", (5,), off=1),
        ("task", {"kind": "task", "attempt": 1}),
    ]
    told, outcomes = packed(fresh, jobs, places=3, late=[job(fresh, "c", (7,), learning_rate=1e-3)])
    assert weights_hash(fresh.model) == before
    assert next(i for i, m in told if m["done"]) == "wrong"
    assert {i: o.status for i, o in outcomes.items()} == {
        "a": "complete",
        "b": "complete",
        "c": "complete",
        "wrong": "failed",
    }
    assert (outcomes["a"].pack, outcomes["b"].pack) == (2, 2)
    fresh.setup |= {"checkpoints": str(tmp_path / "others")}
    for name in "abc":
        one = outcomes[name]
        alone = fresh.train(one.trial, one.trainable_params, report=lambda rung: True)
        assert [rung.loss for rung in one.rungs] == pytest.approx([rung.loss for rung in alone.rungs], rel=1e-5)
        assert (one.tokens, one.adapter, alone.pack) == (alone.tokens, alone.adapter, 1)
        assert one.accuracy == pytest.approx(alone.accuracy, abs=1 / 16)  # of 16 questions rounding may flip one


def test_a_packed_trial_stops_and_diverges_by_itself(fresh):
    jobs = [
        job(fresh, "stops"),
        job(fresh, "diverges", learning_rate=1e30, max_grad_norm=0.0),
        job(fresh, "goes on", (1,)),
    ]
    _, outcomes = packed(fresh, jobs, places=3, report=lambda name, message: name != "stops")
    assert {i: o.status for i, o in outcomes.items()} == {
        "stops": "stopped",
        "diverges": "diverged",
        "goes on": "complete",
    }
    assert outcomes["stops"].rungs[-1].step == 2


def test_after_a_pass_that_failed_each_goes_on_alone_and_the_one_to_blame_is_named(fresh, monkeypatch, capsys):
    from trainers.adapter import Adapter

    def greedy(self, real_BS=None):
        return torch.empty(10**15).sum() if self.lora.rank == 2 else None  # 4 PB: the allocator refuses

    monkeypatch.setattr(Adapter, "extra_loss", greedy)
    _, outcomes = packed(fresh, [job(fresh, "large", rank=2), job(fresh, "small"), job(fresh, "other", (1,))], places=3)
    assert {i: (o.status, o.pack) for i, o in outcomes.items()} == {
        "large": ("out_of_memory", 1),
        "small": ("complete", 1),
        "other": ("complete", 1),
    }
    assert "a step of 3 trials failed, each goes on alone" in capsys.readouterr().err


def test_how_many_to_pack_is_measured_and_leaves_nothing_behind(fresh):
    before = weights_hash(fresh.model)
    asked, params = trial(fresh)
    work = {"kind": "pack", "trial": json.dumps(asked.to_json()), "trainable_params": params, "attempt": 1}
    ((_, answer),), _ = packed(fresh, [("pack", work)], places=8)
    assert answer["pack"] in (1, 2, 4)
    assert "a step takes" in answer["why"]
    assert weights_hash(fresh.model) == before


def test_what_cannot_share_a_pass_waits_for_its_end(fresh):
    """Another batch size, and a trial whose worker died with it."""
    jobs = [job(fresh, "a"), job(fresh, "b", batch_size=2, micro_batch_size=2), job(fresh, "c", (1,), attempt=2)]
    _, outcomes = packed(fresh, jobs, places=3)
    assert {i: (o.status, o.pack) for i, o in outcomes.items()} == dict.fromkeys("abc", ("complete", 1))
