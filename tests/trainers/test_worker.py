"""What a worker does with a trial, without Ray around it: every ending, and a base model that never changes."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest

from allocators.core.types import ExpertSelection, Recipe, Trial
from trainers import storage
from trainers.worker import Bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worker")
    setup = {
        "model": "tiny-moe",
        "options": {},
        "task": "tiny_cipher",
        "task_options": {"limit": 16},
        "seed": 0,
        "evaluations": 2,
        "calibration_samples": 8,
        "cpus_per_worker": 1,
        "signals": str(folder / "signals"),
        "adapters": str(folder / "adapters"),
        "checkpoints": str(folder / "checkpoints"),
    }
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


def test_the_same_trial_twice_is_the_same_result(bench):
    first = bench.train(*trial(bench), report=lambda rung: True)
    storage.delete_folder(storage.join(bench.setup["checkpoints"], first.digest))
    second = bench.train(*trial(bench), report=lambda rung: True)
    losses = [[rung["loss"] for rung in outcome.rungs] for outcome in (first, second)]
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
    assert [rung["step"] for rung in outcome.rungs] == [2]
    assert outcome.accuracy == outcome.rungs[-1]["accuracy"]


def test_a_signal_is_measured_once_for_everyone(bench):
    first = bench.measure("routing")["signal"]
    assert bench.measure("routing")["signal"] == first
    assert set(first["rows"]) == {str(layer) for layer in bench.shape.moe_layers}
    tokens = {sum(row["count"]) for row in first["rows"].values()}
    assert len(tokens) == 1, "every layer routes the same tokens"
