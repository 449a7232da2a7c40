"""One worker in this process: the same results as Ray's workers give, pauses, and errors that belong to the study.

python -m pytest tests/search/engine/test_inprocess.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from allocators.core.errors import StudyError
from allocators.core.types import Outcome, Rung
from search.engine.inprocess import InProcessWorkers
from search.problem import Proposal
from search.records import read
from search.run import main
from tests.trainers.conftest import worker_setup
from tests.trainers.test_worker import trial

WORDS = ["space=sieve", "trials=3", "seed=1", "recipe.steps=10", "recipe.batch_size=4", "limit=24", "keep=all"]
WORDS += ["calibration_samples=16"]


def plain(outcome: Outcome) -> dict[str, Any]:
    """Everything but the clock, the memory and where things lie."""
    data = outcome.to_json()
    del data["seconds"], data["peak_memory_bytes"], data["adapter"]
    for rung in data["rungs"]:
        del rung["seconds"]
    return data


@pytest.mark.slow
def test_results_are_those_of_rays_workers_and_no_ray_is_loaded(tmp_path: Path) -> None:
    script = "import sys; from search.run import main; code = main(sys.argv[1:]); print('ray' in sys.modules, code)"
    studies = {}
    for workers in ("process", "ray"):
        words = [*WORDS, f"workers={workers}", f"storage={tmp_path}", f"name={workers}"]
        command = [sys.executable, "-c", script, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | {"COLUMNS": "150"})
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.splitlines()[-1] == f"{workers == 'ray'} 0"
        studies[workers] = read(tmp_path / workers)
    assert len(studies["process"].finished) == 3
    both = [{digest: plain(o) for digest, o in study.finished.items()} for study in studies.values()]
    assert both[0] == both[1]
    assert {outcome["status"] for outcome in both[0].values()} == {"complete"}
    for digest in both[0]:
        files = [tmp_path / workers / "adapters" / digest / "adapter.safetensors" for workers in studies]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert studies["process"].untrained == studies["ray"].untrained
    assert any(outcome["test"] for outcome in both[0].values()), "the front was evaluated on the test split"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["workers=rays"], "did you mean 'ray'"),
        (["workers=process", "workers_per_trial=2"], "workers=process and workers_per_trial=2 do not go together"),
        (["workers=process", "max_concurrent=2"], "max_concurrent=2"),
        (["workers=process", "pack=auto"], "pack=auto"),
        (["workers=process", "ray_address=auto"], "ray_address=auto"),
    ],
)
def test_what_one_worker_cannot_do_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    assert main(words) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert err.count("\n") == 1


class Script:
    """Proposes these trainings; pauses the first at its first rung and goes on with it at the end."""

    def __init__(self, proposals: list[Proposal], *, fails: bool = False) -> None:
        self.waiting, self.fails = list(proposals), fails
        self.first, self.was_paused = proposals[0], False
        self.came: list[tuple[str, int]] = []
        self.outcomes: list[Outcome] = []

    def propose(self) -> Proposal | None:
        return self.waiting.pop(0) if self.waiting else None

    def rung(self, digest: str, rung: Rung) -> bool:
        if self.fails:
            raise StudyError("the disk is full")
        self.came.append((digest, rung.step))
        if digest != self.first.trial.digest or self.was_paused:
            return True
        self.was_paused = True
        self.waiting.append(self.first)
        return False

    def finished(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    def lost(self, digest: str, reason: str, *, again: bool = True) -> None:
        raise AssertionError(f"{digest} is lost: {reason}")


@pytest.fixture
def workers(tmp_path: Path) -> InProcessWorkers:
    setup = worker_setup(tmp_path, task="tiny_cipher", task_options={"limit": 16}, evaluations=2, calibration_samples=8)
    made = InProcessWorkers(setup, device="cpu")
    made.start()
    return made


def test_a_paused_training_goes_on_from_its_checkpoint(workers: InProcessWorkers) -> None:
    proposals = [Proposal(*trial(workers._state, ids), {}) for ids in ((0, 3), (1,))]
    conductor = Script(proposals)
    workers.search(conductor, pausing=True)
    first, second = (proposal.trial.digest for proposal in proposals)
    assert conductor.came == [(first, 2), (second, 2), (second, 4), (first, 2), (first, 4)]
    assert [outcome.digest for outcome in conductor.outcomes] == [second, first]
    assert {outcome.status for outcome in conductor.outcomes} == {"complete"}


def test_an_error_of_the_study_is_not_the_outcome_of_a_trial(workers: InProcessWorkers) -> None:
    conductor = Script([Proposal(*trial(workers._state), {})], fails=True)
    with pytest.raises(StudyError, match="the disk is full"):
        workers.search(conductor, pausing=False)
    assert conductor.outcomes == []
    assert not hasattr(workers._state.model, "lora_adapter")
