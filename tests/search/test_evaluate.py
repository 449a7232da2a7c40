"""A winner on another task is counted as the study counts; what cannot work is one line."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from allocators.core.messages import TrainJob
from search import evaluate, run
from search.evaluate.forgotten import Measured, _correlated
from search.front import candidates
from search.records import read
from search.records.files import EVALUATIONS
from tests.search.studies import outcome, score, selection
from tests.trainers.conftest import worker_setup
from trainers.worker_state import WorkerState


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = tmp_path_factory.mktemp("studies")
    given = f"space=sieve space.allocator=none workers=process recipe.steps=6 limit=40 trials=1 storage={storage}"
    assert run.main(given.split()) == 0
    return storage / "sieve-tiny-moe-default"


def test_on_its_own_task_a_winner_has_the_study_s_test_accuracy(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([str(study)]) == 0
    [done] = read(study).finished.values()
    assert done.test is not None
    [line] = (study / EVALUATIONS).read_text().splitlines()
    [result] = json.loads(line)["results"]
    assert (result["accuracy"], result["questions"]) == (pytest.approx(done.test.accuracy), 40)
    untrained = json.loads((study / "untrained.json").read_text())["test"]["accuracy"]
    assert result["base"] == pytest.approx(untrained)
    said = capsys.readouterr().out
    assert done.digest[:8] in said
    assert f"{done.test.accuracy:.3f}" in said


def test_several_tasks_have_a_row_each_and_their_mean(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(study), "task=tiny_cipher,tiny_backcipher", "limit=20"]) == 0
    rows = json.loads((study / EVALUATIONS).read_text().splitlines()[-1])["results"]
    assert [row["task"] for row in rows] == ["tiny_cipher", "tiny_backcipher", "mean of 2 tasks"]
    assert rows[2]["accuracy"] == pytest.approx((rows[0]["accuracy"] + rows[1]["accuracy"]) / 2)
    assert rows[2]["error"] == pytest.approx(math.hypot(rows[0]["error"], rows[1]["error"]) / 2)
    assert [row["questions"] for row in rows] == [20, 20, 40]
    assert "mean of 2 tasks" in capsys.readouterr().out


def test_one_question_has_no_standard_error(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(study), "task=tiny_cipher", "limit=1"]) == 0
    assert "standard error unknown" in capsys.readouterr().out


def test_what_kept_adapters_forgot_is_measured_without_training(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same number as with the worker's own measure at the end of that training."""
    [done] = read(study).finished.values()
    assert evaluate.main([str(study), "point=all", "forgetting=held_out"]) == 0
    said = capsys.readouterr().out
    line = json.loads((study / EVALUATIONS).read_text().splitlines()[-1])
    assert (line["digest"], line["asked"]) == (done.digest, {"forgetting": "held_out"})
    assert f"forgotten {line['results'][0]['rise']:+.4f}" in said
    state = WorkerState(worker_setup(study.parent / "again", forgetting="held_out", evaluations=3), "cpu")
    again = state.train(TrainJob(done.trial, done.trainable_params), report=lambda rung: True)
    assert again.forgetting is not None
    assert line["results"][0]["rise"] == pytest.approx(again.forgetting.rise, abs=1e-7)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["forgetting=held_out", "task=tiny_cipher"], "two questions"),
        (["forgetting=nosuch.txt"], "no such file"),
        (["forgetting=held_out", "limit=3"], "limit= is of a task's questions"),
        (["forgetting=held_out", "base=false"], "base= is of a task's questions"),
        (["point=all"], "no run"),
        (["point=zz"], "no run"),
        (["task=nosuchtask"], "nosuchtask"),
        (["limt=3"], "did you mean 'limit'"),
        (["another-study"], "give the folder of one study, got 2"),
    ],
)
def test_what_cannot_work_is_one_line(
    study: Path, capsys: pytest.CaptureFixture[str], given: list[str], says: str
) -> None:
    assert evaluate.main([str(study), *given]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.filterwarnings("error")
def test_what_is_equal_everywhere_has_no_order_to_correlate() -> None:
    def group(*accuracies: float) -> list[Measured]:
        runs = (outcome(selection(4), accuracy=a).updated(test=score(a)) for a in accuracies)
        trials = [run_.updated(trial=replace(run_.trial, seed=0, model=f"m{i}")) for i, run_ in enumerate(runs)]
        return [Measured(point, {0: 0.1 * place}) for place, point in enumerate(candidates(trials))]

    assert list(_correlated(group(*[0.5] * 5))) == []
    [said] = _correlated(group(0.1, 0.2, 0.3, 0.4, 0.5))
    assert said.endswith("parameters: with accuracy +1.00")
