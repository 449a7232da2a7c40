"""The command line end to end without Ray: help, dry run, and one clear line for every request that cannot work."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from search.config import HEADINGS
from search.export import __main__ as export
from search.replay import __main__ as replay
from search.report import __main__ as report
from search.run import main
from search.show import __main__ as show


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line on stderr of a refused request."""
    assert main(list(words)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture
def dense_model(tmp_path: Path) -> Path:
    folder = tmp_path / "dense"
    folder.mkdir()
    config = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def task_without_training(tmp_path: Path) -> Path:
    (tmp_path / "test.jsonl").write_text('{"question": "1+1=", "choices": ["2", "3"], "label": 0}\n')
    task = tmp_path / "only_test.yaml"
    task.write_text(
        "task: only_test\ndataset_path: json\ndataset_kwargs: {data_files: {test: test.jsonl}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: question\ndoc_to_choice: choices\ndoc_to_target: label\n"
        "metric_list: [{metric: acc}]\n"
    )
    return task


def test_help_lists_keys_and_spaces_and_describes_a_space(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help"]) == 0
    text = capsys.readouterr().out
    assert "max_trainable_params" in text
    assert "Which experts of an MoE model should get LoRA" in text
    assert main(["help", "sieve"]) == 0
    assert "Starting points" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["space=seive"], "unknown space 'seive': choose from"),
        (["model=tiny-mo"], "did you mean 'tiny-moe'"),
        (["task=no_such_task_at_all"], "no_such_task_at_all"),
        (["trails=3"], "did you mean 'trials'"),
        (["trials=0"], "trials must be at least 1, got 0"),
        (["space.fractoin=0.5"], "did you mean 'fraction'"),
        (["space.allocator=sieve", "space.fraction=0.01"], "fraction"),
        (["max_trainable_params=100"], "is below the smallest allocation of tiny-moe in this space"),
        (["space=mola", "model=tiny-dense", "space.allocator=mola", "deployable=peft"], "has several LoRA experts"),
        (["deployable=merged", "quantization=nf4"], "no sum fits into packed weights"),
        (["deployable=onnx"], "unknown deployable 'onnx': choose from merged, peft, vllm"),
        (["plugins=nowhere.py"], "no such file"),
        (
            ["space=mola", "model=tiny-dense", "space.pattern=2469"],
            "unknown value of space.pattern '2469'",
        ),
        (["trials=3", "trials=4"], "trials is given twice"),
    ],
)
def test_a_request_that_cannot_work_gets_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    assert expected in said(capsys, *words)


@pytest.mark.parametrize("name", ["~nobody_at_all/x", "a" * 300, "a" * 5000])
@pytest.mark.parametrize(
    "key", ["model={}", "task={}.yaml", "forgetting={}.txt", "replay={}", "plugins={}", "storage={}"]
)
def test_a_name_that_no_file_can_have_is_one_line(capsys: pytest.CaptureFixture[str], key: str, name: str) -> None:
    typed = key.format(name)
    assert name[:40] in said(capsys, "space=sieve", typed, *(["replay=tiny-moe"] if "storage" in key else []))


def test_names_that_no_file_can_have_are_one_line_for_the_commands_on_a_study(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("~nobody_at_all/x", "a" * 300):
        for command, words in {
            export.main: [str(tmp_path), f"to={name}"],
            report.main: [name],
            show.main: [f"model={name}"],
            replay.main: ["export", name, "to=x.parquet"],
        }.items():
            assert command(words) == 2
            assert capsys.readouterr().err.count("\n") == 1


def test_a_file_that_lacks_what_a_space_defines_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bare.py"
    file.write_text('"""Bare."""\n\n\ndef suggest(trial, shape):\n    pass\n')
    lines = said(capsys, f"plugins={file}", "space=bare", f"storage={tmp_path}")
    assert lines == "error: space=bare has no BASE, no ALLOCATORS: spaces/__init__.py says what a space defines\n"


def test_a_point_of_mola_is_pinned_as_it_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["space=mola", "model=tiny-dense", "space.allocator=mola", "space.pattern=8228", "space.rank=8"]
    assert main([*words, "dry_run=true", "trials=1"]) == 0
    assert "pattern=8228" in capsys.readouterr().out


def test_what_cannot_be_deployed_is_not_proposed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["space=dense", "model=tiny-dense", "space.allocator=uniform", "trials=6", "dry_run=true"]
    assert main([*words, "deployable=vllm"]) == 0
    totals = set(re.findall(r"total_experts=(\d+)", capsys.readouterr().out))
    assert totals == {"8"}  # one expert a layer of eight
    assert main(words) == 0
    assert len(set(re.findall(r"total_experts=(\d+)", capsys.readouterr().out))) > 1


def test_help_is_asked_for_in_any_place_and_is_grouped(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["-h"], ["--help"], ["trials=3", "help"]):
        assert main(words) == 0
        text = capsys.readouterr().out
        places = [text.index(f"\n{heading} (default):\n") for heading in HEADINGS.values()]
        assert places == sorted(places)
        assert "[ehvi | gp | tpe | nsga2 | random]" in " ".join(text.split())
        assert max(map(len, text.partition("spaces:")[0].splitlines())) <= 120
    assert main(["help", "space=mola"]) == 0
    assert "pattern" in capsys.readouterr().out


@pytest.mark.parametrize("command", [main, export.main, replay.main, report.main, show.main])
def test_every_command_has_a_help_and_one_reading(
    command: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    for word in ("help", "-h", "--help"):
        assert command([word]) == 0
        out, err = capsys.readouterr()
        assert "python -m " in out
        assert not err


def test_a_dense_model_in_the_sieve_space_is_refused(capsys: pytest.CaptureFixture[str], dense_model: Path) -> None:
    line = said(capsys, f"model={dense_model}")
    assert "is dense" in line
    assert "tiny-moe" in line


def test_a_task_without_a_training_split_is_refused(
    capsys: pytest.CaptureFixture[str], task_without_training: Path
) -> None:
    assert "training" in said(capsys, f"task={task_without_training}")


def test_an_unwritable_folder_is_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in said(capsys, f"storage={tmp_path / 'file'}")


def test_a_tracking_server_that_is_down_is_said_in_one_line_and_keeps_no_study_from_running(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    words = ["replay=tiny-moe", "trials=2", "name=s", f"storage={tmp_path}", "tracking_uri=http://127.0.0.1:9"]
    assert main(words) == 0
    [line] = [record.getMessage() for record in caplog.records if "MLflow" in record.getMessage()]
    assert "127.0.0.1:9 fails" in line
    assert "\n" not in line
    assert "2 of 2 finished" in capsys.readouterr().out


def quiz(folder: Path, *labels: int, more: str = "") -> Path:
    """A task file over four questions to train on, and one to test for each label."""
    rows = {"train": [0, 1, 0, 1], "test": labels}
    for split, own in rows.items():
        lines = [{"question": f"{split} {n} ?", "choices": ["x", "y"], "label": label} for n, label in enumerate(own)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = folder / "quiz.yaml"
    task.write_text(
        "task: quiz\ndataset_path: json\ndataset_kwargs: {data_files: {train: train.jsonl, test: test.jsonl}}\n"
        "training_split: train\ntest_split: test\noutput_type: multiple_choice\ndoc_to_text: question\n"
        f"doc_to_choice: choices\ndoc_to_target: label\nmetric_list: [{{metric: acc}}]\n{more}"
    )
    return task


@pytest.mark.parametrize("dry", ["true", "false"])
def test_a_row_that_cannot_be_scored_is_one_line_before_anything_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, dry: str
) -> None:
    line = said(capsys, f"task={quiz(tmp_path, 0, -1)}", f"dry_run={dry}", f"storage={tmp_path / 'studies'}")
    assert "task 'quiz', split 'test', row 1 (test.jsonl, line 2): its answer is the number -1" in line
    assert not (tmp_path / "studies").exists()


def test_what_is_doubtful_and_whose_code_runs_is_said_before(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code = tmp_path / "more_of_quiz.py"
    code.write_text("print('runs')\ndef same(docs):\n    return docs\n")
    task = quiz(tmp_path, 0, 1, more="process_docs: !function more_of_quiz.same\n")
    words = [f"task={task}", "dry_run=true", "trials=1", "recipe.max_length=8", f"storage={tmp_path}"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    assert notes[0] == f"note: quiz.yaml runs code of {code}"
    assert notes[1] == "note: 3 of 3 training rows of 'quiz' are cut to max_length=8"
    assert out.startswith("runs")
    assert "max_length=2048 is more than the 512 positions" in said(capsys, "dry_run=true", "recipe.max_length=2048")


def test_a_dry_run_prints_exact_counts_and_imports_no_ray(tmp_path: Path) -> None:
    script = (
        "import sys; from search.run import main; code = main(sys.argv[1:]); "
        "heavy = {'ray', 'mlflow'} & set(sys.modules); "
        "print('heavy:', sorted(heavy)); sys.exit(code)"
    )
    words = ["dry_run=true", "trials=4", "recipe.rank=8", f"storage={tmp_path}"]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    assert "heavy: []" in done.stdout
    from allocators.core.shapes import shape_from_config
    from allocators.core.types import ExpertSelection
    from trainers.models import config_of

    shape = shape_from_config(config_of("tiny-moe"), name="tiny-moe")
    full = ExpertSelection({layer: tuple(range(shape.experts_in(layer))) for layer in shape.moe_layers})
    for selection in (full, ExpertSelection({})):
        assert f"{selection.trainable_params(shape, rank=8):,}" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_below_uv_run_a_local_ray_does_not_pack_the_working_folder(tmp_path: Path) -> None:
    script = (
        "from search.session.make_workers import Locations, make_workers; from search.session.prepare import prepare; "
        "from search.config import parse; import sys; config, problem = prepare(parse(sys.argv[1:])); "
        "make_workers(config, problem, Locations.of(config), study='s', trainings=1); "
        "from ray._private import ray_constants; print('packs:', ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ENABLE_UV_RUN_RUNTIME_ENV"}
    for address, packs in (("local", "False"), ("auto", "True")):
        command = [sys.executable, "-c", script, f"storage={tmp_path}", f"ray_address={address}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        assert f"packs: {packs}" in done.stdout


@pytest.mark.parametrize(
    ("metadata", "kwargs", "line"),
    [
        ("{recipe: {steps: .inf}}", "", "suggests what no recipe has: recipe.steps must be a whole number, got inf"),
        ("{recipe: {learning_rate: 1.e+400}}", "", "recipe.learning_rate must be a finite number, got inf"),
        ("{recipe: {rankk: 3}}", "", "unknown recipe setting 'rankk': choose from"),
        ("{recipe: {weight_decay: -1}}", "", "recipe.weight_decay must be not negative, got -1"),
        ("{recipe: {lora_alpha: 0}}", "", "recipe.lora_alpha must be positive, got 0"),
        ('{recipe: {rank: "8"}}', "", "recipe.rank must be a whole number, got '8'"),
        ("{recipe: {steps: [1]}}", "", "recipe.steps must be a whole number, got [1]"),
        ("{recipe: [1]}", "", "metadata: recipe must hold names and values, got [1]"),
        ("{recipe: {1: 2}}", "", "metadata: recipe must hold names and values, got {1: 2}"),
        ("[1]", "", "metadata must hold names and values, got [1]"),
        ("{}", "[a]", "dataset_kwargs must hold names and values, got ['a']"),
    ],
)
def test_what_a_task_file_suggests_is_checked(
    capsys: pytest.CaptureFixture[str], task_without_training: Path, metadata: str, kwargs: str, line: str
) -> None:
    text = task_without_training.read_text().replace("test_split: test", "test_split: test\ntraining_split: train")
    text = text.replace("{test: test.jsonl}", "{test: test.jsonl, train: train.jsonl}")
    if kwargs:
        text = "\n".join(f"dataset_kwargs: {kwargs}" if "data_files" in row else row for row in text.splitlines())
    task_without_training.write_text(f"{text}\nmetadata: {metadata}\n")
    rows = '{"question": "1+2=", "choices": ["2", "3"], "label": 1}\n'
    (task_without_training.parent / "train.jsonl").write_text(rows)
    assert line in said(capsys, f"task={task_without_training}")
