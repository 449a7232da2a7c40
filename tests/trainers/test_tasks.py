"""Tasks: training rows are the evaluation's own requests, and scores are lm-eval's, document by document.

python -m pytest tests/trainers/test_tasks.py
LORA_TASK_DATA=FOLDER python -m pytest tests/trainers/test_tasks.py     # also on arc_easy_{train,test}.jsonl
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from allocators.core.errors import StudyError
from tests.trainers.conftest import write_task
from trainers import tasks

ROWS = [{"question": "ab", "choices": ["x", "y"], "label": 1}, {"question": "cd", "choices": ["x", "y"], "label": 0}]
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}?",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def changed(path: Path, folder: Path, **changes) -> Path:
    """A copy of a task file with other keys; its data stay where they are."""
    config = yaml.safe_load(path.read_text())
    config["dataset_kwargs"]["data_files"] = {
        split: str(path.parent / file) for split, file in config["dataset_kwargs"]["data_files"].items()
    }
    config.update(changes)
    target = folder / f"{config['task']}.yaml"
    target.write_text(yaml.safe_dump(config))
    return target


@pytest.fixture
def by_lm_eval(monkeypatch):
    """What lm-eval itself says about a local task file: accuracy, standard error, one score a document."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    # Seconds of git, pip and lscpu in every call, for a record that is not looked at here.
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)

    def run(path: Path, model, tokenizer, *, limit=None, metric="acc", filter_name="none"):
        config = yaml.safe_load(path.read_text())
        files = config["dataset_kwargs"]["data_files"]
        config["dataset_kwargs"]["data_files"] = {split: str(path.parent / file) for split, file in files.items()}
        result = evaluator.simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=5),
            tasks=[config],
            limit=limit,
            bootstrap_iters=10,
            task_manager=TaskManager(include_defaults=False),
        )
        samples = [s for s in result["samples"][config["task"]] if s["filter"] == filter_name]
        scores = [float(s[metric]) for s in sorted(samples, key=lambda s: s["doc_id"])]
        numbers = result["results"][config["task"]]
        return numbers[f"{metric},{filter_name}"], numbers[f"{metric}_stderr,{filter_name}"], tuple(scores)

    return run


@pytest.mark.parametrize("limit", [None, 11])
@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_multiple_choice_scores_are_those_of_lm_eval(choice_task, model, tokenizer, by_lm_eval, metric, limit):
    task = tasks.load_task(str(choice_task), limit=limit, metric=metric, batch_size=7)
    task.prepare(tokenizer)
    ours = task.evaluate(model)
    accuracy, stderr, correct = by_lm_eval(choice_task, model, tokenizer, limit=limit, metric=metric)
    assert ours.correct == correct
    assert len(correct) == (limit or 30)
    assert 0 < sum(correct) < len(correct)  # an answer that is always right or wrong would prove nothing
    assert (ours.accuracy, ours.stderr) == pytest.approx((accuracy, stderr), abs=1e-12)
    assert ours.metric == metric


@pytest.mark.parametrize("filter_name", ["letter", "whole"])
def test_generated_text_is_scored_as_lm_eval_does(copy_task, model, tokenizer, by_lm_eval, filter_name):
    task = tasks.load_task(str(copy_task), metric=f"exact_match,{filter_name}")
    task.prepare(tokenizer)
    accuracy, stderr, correct = by_lm_eval(copy_task, model, tokenizer, metric="exact_match", filter_name=filter_name)
    ours = task.evaluate(model)
    assert ours.correct == correct
    assert len(correct) == 12
    assert (ours.accuracy, ours.stderr) == pytest.approx((accuracy, stderr), abs=1e-12)
    assert task.evaluate(model).correct == correct  # requests are built once and answered often


def test_fewshot_prompts_are_those_of_lm_eval(choice_task, model, tokenizer, by_lm_eval, tmp_path):
    path = changed(choice_task, tmp_path, num_fewshot=2)
    task = tasks.load_task(str(path))
    task.prepare(tokenizer)
    assert task.evaluate(model).correct == by_lm_eval(path, model, tokenizer)[2]


def test_shares_of_several_workers_are_the_whole(choice_task, tokenizer):
    task = tasks.load_task(str(choice_task))
    task.prepare(tokenizer)
    whole = task._prepared.tokens
    shares = []
    for rank in range(3):
        task.prepare(tokenizer, rank=rank, world_size=3)
        shares += task._prepared.tokens
        assert len(task._prepared.documents) == 10
    assert sorted(map(str, shares)) == sorted(map(str, whole))


def test_evaluation_leaves_the_model_in_its_mode_and_says_nothing(choice_task, model, tokenizer, capfd):
    logging.getLogger("lm_eval").setLevel(logging.NOTSET)
    task = tasks.load_task(str(choice_task))
    task.prepare(tokenizer)
    model.train()
    task.evaluate(model)
    assert model.training
    assert capfd.readouterr() == ("", "")


def test_training_rows_are_the_requests_of_the_right_answers(choice_task, tokenizer):
    task = tasks.load_task(str(choice_task))
    rows = task.training_rows(tokenizer, 128)
    documents = [json.loads(line) for line in (choice_task.parent / "train.jsonl").read_text().splitlines()]
    assert len(rows) == len(documents) == task.num_training
    for row, doc in zip(rows, documents, strict=True):
        prompt, completion = row.input_ids[: row.labels_start], row.input_ids[row.labels_start :]
        assert tokenizer.decode(prompt) == f"Pick one.\nwhich is {doc['question']}?".replace("P", "<unk>", 1)
        assert tokenizer.decode(completion) == f" {doc['choices'][doc['label']]}"
        assert row.completion_tokens == len(completion)


def test_generated_rows_learn_to_stop(copy_task, tokenizer):
    task = tasks.load_task(str(copy_task))
    doc = json.loads((copy_task.parent / "train.jsonl").read_text().splitlines()[0])
    row = task.training_rows(tokenizer, 128)[0]
    assert tokenizer.decode(row.input_ids) == f"copy {doc['question']}: {doc['answer']}<eos>"
    assert tokenizer.decode(row.input_ids[row.labels_start :]) == f" {doc['answer']}<eos>"


def test_long_rows_lose_their_beginning(choice_task, tokenizer):
    task = tasks.load_task(str(choice_task))
    whole, cut = task.training_rows(tokenizer, 128), task.training_rows(tokenizer, 9)
    for a, b in zip(whole, cut, strict=True):
        assert b.input_ids == a.input_ids[-9:]
        assert b.labels_start == 9 - a.completion_tokens
    assert all(row.labels_start == 1 for row in task.training_rows(tokenizer, 2))  # nothing predicts the first token


def test_inputs_as_choices(tokenizer, tmp_path):
    """Winogrande's form: the choices are prompts, the target is what all of them share."""
    path = write_task(
        tmp_path,
        "blank",
        {"train": ROWS, "test": ROWS},
        output_type="multiple_choice",
        doc_to_text="label",
        doc_to_choice="{{choices}}",
        doc_to_target="question",
        metric_list=CHOICE["metric_list"],
    )
    rows = tasks.load_task(str(path)).training_rows(tokenizer, 64)
    assert [tokenizer.decode(row.input_ids) for row in rows] == ["y ab", "x cd"]
    assert [row.labels_start for row in rows] == [1, 1]


def test_an_answer_that_is_no_choice_is_named(tokenizer, tmp_path):
    bad = [{**ROWS[0], "label": 2}]
    path = write_task(tmp_path, "bad", {"train": ROWS + bad, "test": ROWS}, **CHOICE)
    with pytest.raises(StudyError, match=r"training document 2 of task .* answer 2, .* none of its 2 choices"):
        tasks.load_task(str(path)).training_rows(tokenizer, 64)


def test_prompts_are_drawn_by_seed(choice_task, tokenizer):
    task = tasks.load_task(str(choice_task))
    first = task.prompts(tokenizer, 10, 0)
    assert first == task.prompts(tokenizer, 10, 0)
    assert first != task.prompts(tokenizer, 10, 1)
    rows = [row.input_ids for row in task.training_rows(tokenizer, 512)]
    assert all(prompt in rows for prompt in first)
    assert len(task.prompts(tokenizer, 10_000, 0)) == task.num_training


def test_training_limit_draws_documents(choice_task, tokenizer):
    few = tasks.load_task(str(choice_task), training_limit=5).training_rows(tokenizer, 64)
    other = tasks.load_task(str(choice_task), training_limit=5, seed=1).training_rows(tokenizer, 64)
    assert len(few) == 5
    assert few == tasks.load_task(str(choice_task), training_limit=5).training_rows(tokenizer, 64)
    assert few != other


def test_the_data_hash_follows_documents_and_prompts(choice_task, tmp_path):
    before = tasks.load_task(str(choice_task)).data_hash
    again = changed(choice_task, tmp_path)
    assert tasks.load_task(str(again)).data_hash == before  # the place of the files is not part of it
    assert tasks.load_task(str(choice_task), limit=5).data_hash != before
    other = changed(choice_task, tmp_path, doc_to_text="what is {{question}}?")
    assert tasks.load_task(str(other)).data_hash != before


# --- check_task: before anything is loaded --------------------------------------------------------------------------


def test_check_reads_the_file_alone(choice_task):
    """Neither torch nor transformers, datasets or lm-eval: a command line answers in a fraction of a second."""
    code = (
        "import sys; from trainers import tasks; file = tasks.check_task(sys.argv[1]); print(file.recipe, "
        "[m for m in ('torch', 'transformers', 'datasets', 'lm_eval') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code, str(choice_task)], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "{'steps': 7} []"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training_split": None}, "has no training split: set training_split"),
        ({"test_split": None}, "has neither test nor validation split"),
        ({"test_split": "train"}, "evaluated on what it is trained on"),
        ({"output_type": "loglikelihood_rolling"}, "measures perplexity"),
        ({"unsafe_code": True}, "runs code"),
        ({"doc_to_image": "x"}, "images or sound"),
        ({"task": 3}, "has no name"),
        (
            {"dataset_kwargs": {"data_files": {"train": "none.jsonl"}}},
            r"data file '.*none\.jsonl', which does not exist",
        ),
    ],
)
def test_a_task_that_cannot_be_searched_is_refused_early(choice_task, tmp_path, changes, message):
    config = yaml.safe_load(choice_task.read_text())
    path = choice_task.parent / f"{tmp_path.name}.yaml"
    path.write_text(yaml.safe_dump({**config, **changes}))
    with pytest.raises(StudyError, match=message) as error:
        tasks.check_task(str(path))
    assert "\n" not in str(error.value)


def test_a_near_miss_of_a_harness_task_is_suggested():
    with pytest.raises(StudyError, match=r"unknown task 'arc_eazy': choose .* did you mean 'arc_easy'\?"):
        tasks.check_task("arc_eazy")


def test_a_harness_task_without_training_split_is_refused_without_network():
    with pytest.raises(StudyError, match=r"'lambada_openai' \(lambada_openai\.yaml\) has no training split"):
        tasks.check_task("lambada_openai")


def test_an_unreachable_data_set_is_named_with_the_way_to_fetch_it(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(
        StudyError, match=r"needs the data set 'allenai/ai2_arc'.*load_dataset\('allenai/ai2_arc', 'ARC-"
    ):
        tasks.check_task("arc_easy")


def test_includes_and_variables_are_followed(choice_task, tmp_path, monkeypatch):
    monkeypatch.setenv("QUESTIONS", str(choice_task.parent))
    base = yaml.safe_load(choice_task.read_text())
    base["dataset_kwargs"]["data_files"] = {split: f"$QUESTIONS/{split}.jsonl" for split in ("train", "test")}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "mine.yaml").write_text("include: base.yaml\ntask: mine\n")
    task = tasks.load_task(str(tmp_path / "mine.yaml"))
    assert task.num_training == 48
    assert task.file.config["task"] == "mine"


def test_functions_beside_a_task_file_are_used(tokenizer, tmp_path):
    path = write_task(tmp_path, "shout", {"train": ROWS, "test": ROWS}, **CHOICE)
    path.write_text(path.read_text().replace("doc_to_text: '{{question}}?'", "doc_to_text: !function words.ask"))
    (tmp_path / "words.py").write_text("def ask(doc):\n    return doc['question'] * 2\n")
    (file,) = tasks.check_task(str(path)).files
    assert file.config["doc_to_text"] == "words.ask"
    rows = tasks.load_task(str(path)).training_rows(tokenizer, 64)
    assert [tokenizer.decode(row.input_ids) for row in rows] == ["abab y", "cdcd x"]


def test_a_task_file_that_does_not_fit_its_data_is_named(tmp_path):
    path = write_task(tmp_path, "misfit", {"train": ROWS, "test": ROWS}, **{**CHOICE, "doc_to_choice": "{{nothing}}"})
    with pytest.raises(StudyError, match=r"task '.*misfit\.yaml' \(misfit\.yaml\) cannot be built: ") as error:
        tasks.load_task(str(path))
    assert "\n" not in str(error.value)


def test_an_accuracy_that_the_task_lacks_is_named_with_the_others(choice_task, copy_task):
    with pytest.raises(StudyError, match=r"'f1': choose from acc, acc_norm"):
        tasks.load_task(str(choice_task), metric="f1")
    with pytest.raises(StudyError, match="exact_match,letter, exact_match,whole"):
        tasks.load_task(str(copy_task), metric="exact_match,none")
    assert tasks.load_task(str(copy_task)).metric == "exact_match,letter"


@pytest.mark.parametrize("name", sorted(tasks.EMBEDDED))
def test_embedded_tasks_have_both_splits(name):
    task = tasks.load_task(name, limit=10)
    assert task.num_training > 100
    assert task.num_evaluation == 10


# --- real questions -------------------------------------------------------------------------------------------------


def test_real_questions(model, tokenizer, tmp_path):
    """The task file of this module's head over ARC-Easy's questions, where they are at hand."""
    folder = Path(os.environ.get("LORA_TASK_DATA", "data"))
    files = {split: str((folder / f"arc_easy_{split}.jsonl").absolute()) for split in ("train", "test")}
    if not all(Path(file).is_file() for file in files.values()):
        pytest.skip("set LORA_TASK_DATA to a folder with arc_easy_train.jsonl and arc_easy_test.jsonl")
    path = write_task(
        tmp_path,
        "arc_easy_local",
        {},
        dataset_kwargs={"data_files": files},
        training_split="train",
        test_split="test",
        **{**CHOICE, "doc_to_text": "Question: {{question}}\nAnswer:"},
    )
    task = tasks.load_task(str(path), limit=20)
    assert (task.num_training, task.num_evaluation) == (2251, 20)
    rows = task.training_rows(tokenizer, 64)
    assert tokenizer.decode(rows[0].input_ids).endswith(": a bacterial population in the bloodstream")
    task.prepare(tokenizer)
    assert 0 <= task.evaluate(model).accuracy <= 1
