"""Trainings of other studies: taken where everything agrees, never where anything differs, and safe from each other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from allocators.core.types import FINISHED, Outcome, Score, Status, Trial
from search import report
from search.config import RunConfig
from search.records import LINES, read
from search.records.folder import StudyFolder
from search.records.reuse import INDIFFERENT, OtherStudies, same_settings
from search.replay import export
from tests.search.propose.test_sampler import problem
from tests.search.replay.test_replay import record
from tests.search.studies import CONFIG, moe_shape, open_study, outcome, selection, started
from tests.search.test_seeds import TRIALS, drive, table_problem

FACTS = {"model": "hash of weights", "numbers": "float32", "data": "hash of data"}
OWN = RunConfig(task="shift").identity()


@pytest.fixture(scope="module")
def mlflow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One database for all: making its tables takes seconds."""
    return tmp_path_factory.mktemp("mlflow")


def other(
    folder: Path, *outcomes: Outcome, identity: Mapping[str, Any] = OWN, storage: str = "studies", **more: Any
) -> StudyFolder:
    """A finished study `folder` beside the one that asks."""
    config = CONFIG | {"storage": storage}
    study = StudyFolder.open(folder, config=config, identity=identity, shape=moe_shape(), **more)
    for each in outcomes:
        each = each.updated(trial=replace(each.trial, model=identity["model"], task=identity["task"]))
        study.append_started(started(each), {})
        if each.status in FINISHED:
            study.append_finished(each.updated(versions={"torch": "2", **FACTS} | dict(each.versions)), {})
    study.close()
    return study


def asking(
    tmp_path: Path, *, identity: Mapping[str, Any] = OWN, facts: Mapping[str, str] = FACTS, place: str = ""
) -> OtherStudies:
    mine = tmp_path / "mine"
    return OtherStudies(mine, identity=identity, defaults=OWN, facts=facts, place=place or str(mine))


def asked_for(of: Outcome | None = None) -> tuple[Trial, int]:
    of = of or outcome()
    return of.trial, of.trainable_params


def take(others: OtherStudies, of: Outcome | None = None) -> tuple[Outcome, str]:
    """The result and the study that it is of, where there is one."""
    taken = others.take(*asked_for(of))
    assert taken is not None
    return taken


def trained(folder: Path) -> set[str]:
    records = read(folder)
    return records.finished.keys() - records.reused.keys()


# --- what matches


def test_an_equal_training_is_found_and_keeps_to_what_was_asked(tmp_path: Path) -> None:
    other(tmp_path / "first", outcome(allocator="sieve", accuracy=0.6))
    asked = outcome(allocator="coverage")  # another rule that comes to the same experts
    taken, study = take(asking(tmp_path), asked)
    assert (study, taken.accuracy, taken.trial.allocator) == ("first", pytest.approx(0.6), "coverage")
    assert len(taken.rungs) == 3


def another(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    return {int: 77, float: 0.77, str: "another", list: ["another"], dict: {"another": 1}}[type(value)]


@pytest.mark.parametrize("key", OWN)
def test_every_setting_that_a_result_depends_on_has_to_agree(key: str, tmp_path: Path) -> None:
    changed = {**OWN, key: another(OWN[key])}
    other(tmp_path / "first", outcome(), identity=changed)
    assert (asking(tmp_path).take(*asked_for()) is not None) == (key in INDIFFERENT)
    assert same_settings(OWN, changed) == same_settings(changed, OWN) == (key in INDIFFERENT)


def test_a_setting_that_nobody_thought_of_has_to_agree_and_one_that_came_later_is_at_its_default(
    tmp_path: Path,
) -> None:
    assert not same_settings(OWN, OWN | {"new": 1})
    older = {key: value for key, value in OWN.items() if key != "chat_template"}
    other(tmp_path / "first", outcome(), identity=older)
    assert asking(tmp_path).take(*asked_for()) is not None
    assert asking(tmp_path, identity=OWN | {"chat_template": True}).take(*asked_for()) is None


@pytest.mark.parametrize("fact", FACTS)
def test_weights_number_format_and_data_have_to_be_the_same(fact: str, tmp_path: Path) -> None:
    other(tmp_path / "first", outcome(versions={fact: "another"}))
    assert asking(tmp_path).take(*asked_for()) is None
    without = {key: value for key, value in FACTS.items() if key != fact}
    assert asking(tmp_path, facts=without).take(*asked_for()) is not None


@pytest.mark.parametrize("asked", [outcome(selection(5)), outcome(rank=8), outcome(seed=1)])
def test_another_allocation_recipe_or_seed_is_another_training(asked: Outcome, tmp_path: Path) -> None:
    other(tmp_path / "first", outcome())
    assert asking(tmp_path).take(*asked_for(asked)) is None


@pytest.mark.parametrize(("theirs", "kept"), [("the same", True), ("other questions", False), ("", False)])
def test_a_test_score_comes_along_where_the_test_split_is_the_same(theirs: str, kept: bool, tmp_path: Path) -> None:
    tested = outcome().updated(test=Score(0.7, 0.01), versions={"test_data": theirs} if theirs else {})
    other(tmp_path / "theirs", tested)
    taken = asking(tmp_path, facts=FACTS | {"test_data": "the same"}).take(*asked_for())
    assert taken is not None
    assert taken[0].test == (Score(0.7, 0.01) if kept else None)


def test_a_score_is_not_taken_by_a_study_that_does_not_say_what_it_tests_on(tmp_path: Path) -> None:
    other(tmp_path / "theirs", outcome().updated(test=Score(0.7, 0.01), versions={"test_data": "the same"}))
    taken = asking(tmp_path).take(*asked_for())
    assert taken is not None
    assert taken[0].test is None


@pytest.mark.parametrize("status", ["started", *FINISHED])
def test_only_what_ended_by_itself_is_taken(status: Status, tmp_path: Path) -> None:
    other(tmp_path / "first", outcome(status=status))
    taken = asking(tmp_path).take(*asked_for())
    assert (taken is not None) == (status in ("complete", "diverged"))


def test_a_folder_that_is_no_study_is_left_out_and_so_is_this_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "study.json").write_text("{")
    (tmp_path / "signals").mkdir()
    other(tmp_path / "mine", outcome())
    others = asking(tmp_path)
    assert others.take(*asked_for()) is None
    assert len(others) == 0
    assert caplog.text.count("nothing is reused from damaged") == 1


# --- while the other one writes


def test_records_of_a_running_study_are_followed_and_a_torn_line_waits(tmp_path: Path) -> None:
    others = asking(tmp_path)
    assert others.take(*asked_for()) is None
    other(tmp_path / "first", outcome(selection(5)))
    assert others.take(*asked_for()) is None
    other(tmp_path / "whole", outcome())
    line = (tmp_path / "whole" / LINES).read_bytes().splitlines(keepends=True)[-1]
    shutil.rmtree(tmp_path / "whole")
    with (tmp_path / "first" / LINES).open("ab") as file:
        for half in (line[:100], line[100:-1]):
            file.write(half)
            file.flush()
            assert others.take(*asked_for()) is None, "its newline is not there yet"
        file.write(b"\n")
    assert others.take(*asked_for()) is not None
    assert len(others) == 2
    shutil.rmtree(tmp_path / "first")
    assert others.take(*asked_for()) is None


# --- adapters


def store(scheme: str, tmp_path: Path) -> str:
    """The storage of the studies: the folder they lie in, or a URI."""
    return f"{scheme}{tmp_path / 'store'}" if scheme else str(tmp_path)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_the_adapter_is_a_copy_that_outlives_the_other_study(scheme: str, tmp_path: Path) -> None:
    storage = store(scheme, tmp_path)
    base = Path(storage.removeprefix("file://"))
    kept = base / "first" / "adapters" / outcome().digest
    kept.mkdir(parents=True)
    (kept / "adapter.json").write_text("{}")
    other(tmp_path / "first", outcome(adapter=f"{scheme}{kept}"), storage=storage)
    taken, _ = take(asking(tmp_path, place=f"{storage}/mine"))
    shutil.rmtree(base / "first")
    assert taken.adapter == f"{storage}/mine/adapters/{outcome().digest}"
    assert (Path(taken.adapter.removeprefix("file://")) / "adapter.json").read_text() == "{}"


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_of_a_deleted_adapter_the_numbers_are_taken_and_one_that_is_kept_is_preferred(
    scheme: str, tmp_path: Path
) -> None:
    gone = outcome(adapter=f"{scheme}{tmp_path}/first/adapters/gone")
    other(tmp_path / "first", gone, storage=store(scheme, tmp_path))
    taken, _ = take(asking(tmp_path))
    assert (taken.adapter, taken.accuracy) == ("", gone.accuracy)
    assert not (tmp_path / "mine" / "adapters").exists()
    if not scheme:
        there = tmp_path / "second" / "adapters" / gone.digest
        there.mkdir(parents=True)
        other(tmp_path / "second", outcome(adapter=str(there)))
        taken, study = take(asking(tmp_path))
        assert (study, Path(taken.adapter).is_dir()) == ("second", True)


# --- whole studies, without Ray


def test_trials_are_trained_and_what_another_study_trained_comes_on_top(tmp_path: Path, mlflow_folder: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    drive(problem(), first, mlflow_folder, seeds=1)
    adapters = {folder.name for folder in (first / "adapters").iterdir()}
    proposed, records, said, expected = drive(problem(), second, mlflow_folder, seeds=2, reuse=True)
    assert expected == (TRIALS, 0)
    assert not trained(first) & {trial.digest for trial in proposed}
    assert sum(trial.seed == 0 for trial in proposed) == TRIALS
    assert set(records.reused.values()) == {"first"}
    assert len(records.reused) >= 4, "the starting points are the same"
    assert set(records.reused) <= trained(first)
    assert f"{TRIALS} of {TRIALS} finished" in said
    assert f"{len(records.reused)} reused from other studies" in said
    assert {folder.name for folder in (first / "adapters").iterdir()} == adapters, "the other study keeps its adapters"
    # the same command again trains nothing, and the report says where results are from
    assert drive(problem(), second, mlflow_folder, seeds=2, reuse=True)[0] == []
    told = report.write(second)
    assert any(f"Reused from first: {len(records.reused)} " in sentence for sentence in told.words)
    assert any(f"{len(proposed)} of {CONFIG['trials']} runs are finished" in sentence for sentence in told.words)
    shutil.rmtree(first)
    for candidate in report.write(second).front:
        assert all((second / run.adapter).is_dir() for run in candidate.by_accuracy[:1] if run.adapter)


def test_repeats_that_were_trained_elsewhere_are_not_trained(tmp_path: Path, mlflow_folder: Path) -> None:
    _, records, _, _ = drive(problem(), tmp_path / "first", mlflow_folder, seeds=3)
    repeats = {digest for digest, done in records.finished.items() if done.trial.seed}
    proposed, records, _, _ = drive(problem(), tmp_path / "second", mlflow_folder, seeds=3, reuse=True)
    assert not repeats & {trial.digest for trial in proposed}
    third, _, _, _ = drive(problem(), tmp_path / "third", mlflow_folder, seeds=1, reuse=True)
    assert set(read(tmp_path / "third").reused.values()) == {"first", "second"}, "who trained it, not who passed it on"
    assert not {trial.digest for trial in third} & (trained(tmp_path / "first") | trained(tmp_path / "second"))


@pytest.mark.slow
def test_rows_of_a_table_that_were_trained_elsewhere_are_done(tmp_path: Path, mlflow_folder: Path) -> None:
    few = table_problem(pins={"fraction": 0.25, "share": 0.5})
    drive(few, tmp_path / "few", mlflow_folder, seeds=2, trials=100)
    proposed, records, said, (rows, repeats) = drive(
        table_problem(), tmp_path / "all", mlflow_folder, seeds=2, trials=100, reuse=True
    )
    assert trained(tmp_path / "few") == records.reused.keys()
    assert len(proposed) == rows + repeats - len(records.reused)
    left = rows - sum(read(tmp_path / "few").finished[digest].trial.seed == 0 for digest in records.reused)
    assert f"{left} of {left} finished" in said
    assert drive(table_problem(), tmp_path / "again", mlflow_folder, seeds=2, trials=100, reuse=True)[0] == []


def test_a_table_of_recorded_trainings_is_made_of_reused_ones_too(tmp_path: Path) -> None:
    record(tmp_path / "recorded")
    before = read(tmp_path / "recorded")
    digest, done = next(iter(before.finished.items()))
    identity = before.header["identity"]
    with StudyFolder.open(tmp_path / "reused", config=identity, identity=identity, shape=before.shape) as study:
        study.append_finished(done, before.params_of(digest), reused="recorded")
    assert read(tmp_path / "reused").reused == {digest: "recorded"}
    assert list(export([tmp_path / "reused"], tmp_path / "t.parquet").rows) == [digest]


def test_a_study_without_reuse_says_nothing_of_it(tmp_path: Path) -> None:
    with open_study(tmp_path / "demo") as study:
        study.append_finished(outcome(), {})
    assert b"reused" not in (tmp_path / "demo" / LINES).read_bytes()
    assert not any("eused" in sentence for sentence in report.write(tmp_path / "demo").words)


# --- through Ray


def run(storage: Path, *words: str) -> str:
    command = [sys.executable, "-m", "search.run", f"storage={storage}", "num_cpus=2", *words]
    environment = os.environ | {"COLUMNS": "150"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=570)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def starts(folder: Path) -> Counter[str]:
    """How often each training was started."""
    lines = (folder / LINES).read_text().splitlines()
    return Counter(line.split('"digest": "')[1][:16] for line in lines if '"event": "started"' in line)


@pytest.mark.slow
def test_two_real_studies_of_one_storage_train_no_point_twice(tmp_path: Path) -> None:
    words = ["limit=24", "calibration_samples=16", "evaluations=1", "recipe.steps=3", "recipe.batch_size=4", "keep=all"]
    run(tmp_path, *words, "space=sieve", "sampler=random", "trials=5", "name=first")
    said = run(tmp_path, *words, "space=sieve", "sampler=tpe", "trials=2", "name=second", "reuse=true")
    first, second = starts(tmp_path / "first"), starts(tmp_path / "second")
    assert (len(first), len(second)) == (5, 2)
    assert not first.keys() & second.keys()
    records = read(tmp_path / "second")
    assert len(records.reused) >= 4
    assert f"Reused from first: {len(records.reused)} trainings" in said
    shutil.rmtree(tmp_path / "first")
    code = "import sys; from trainers import adapter, models; adapter.load(models.load('tiny-moe').model, sys.argv[1])"
    kept = records.adapter_of(records.finished[next(iter(records.reused))])
    assert kept is not None
    subprocess.run([sys.executable, "-c", code, kept], check=True, capture_output=True)


@pytest.mark.slow
def test_studies_against_one_table_share_their_results_through_tune(tmp_path: Path) -> None:
    record(tmp_path / "recorded", seed=0)
    export([tmp_path / "recorded"], tmp_path / "small.parquet")
    words = [f"replay={tmp_path / 'small.parquet'}", "max_concurrent=2"]
    run(tmp_path / "st", *words, "sampler=random", "trials=12", "name=first")
    said = run(tmp_path / "st", *words, "sampler=tpe", "trials=8", "name=second", "reuse=true")
    first, second = starts(tmp_path / "st" / "first"), starts(tmp_path / "st" / "second")
    assert (len(first), len(second)) == (12, 8)
    assert not first.keys() & second.keys()
    records = read(tmp_path / "st" / "second")
    assert len(records.finished) == 8 + len(records.reused)
    assert f"Reused from first: {len(records.reused)} trainings" in said


def test_nothing_is_taken_from_a_study_of_another_tokenizer_or_task_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, contents in (("one", {"tokenizer": "a", "data": ""}), ("two", {"tokenizer": "b"}), ("old", {})):
        with open_study(tmp_path / name, identity=OWN, contents=contents) as study:
            study.append_finished(outcome(selection(len(name), seed=len(contents)), versions=FACTS), {})
    mine = {"tokenizer": "a", "data": "d"}
    others = OtherStudies(
        tmp_path / "mine", identity=OWN, defaults=OWN, facts=FACTS, place=str(tmp_path / "mine"), contents=mine
    )
    assert len(others) == 2
    assert "nothing is reused from two: it was made with another tokenizer" in caplog.text
