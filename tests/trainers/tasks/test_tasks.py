"""Tasks: training rows are the evaluation's own requests, and scores are lm-eval's, document by document.

python -m pytest tests/trainers/tasks/test_tasks.py
LORA_TASK_DATA=FOLDER python -m pytest tests/trainers/tasks/test_tasks.py     # also on arc_easy_{train,test}.jsonl
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from allocators.core.errors import StudyError
from tests.trainers.conftest import write_task
from trainers import tasks
from trainers.tasks.evaluation import Share

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = [{"question": "ab", "choices": ["x", "y"], "label": 1}, {"question": "cd", "choices": ["x", "y"], "label": 0}]
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}?",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


# One split: what a task file says of it is what is tested here. test_splits.py has the other one.
load = partial(tasks.load_task, select_on="test")


def changed(path: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a task file with other keys; its data stay where they are."""
    config = yaml.safe_load(path.read_text())
    config["dataset_kwargs"]["data_files"] = {
        split: str(path.parent / file) for split, file in config["dataset_kwargs"]["data_files"].items()
    }
    config.update(changes)
    target = folder / f"{config['task']}.yaml"
    target.write_text(yaml.safe_dump(config))
    return target


def single(file: Path, **options: Any) -> tasks.Task:
    """The task of a file that holds one."""
    task = load(str(file), **options)
    assert isinstance(task, tasks.Task)
    return task


def share_of(task: tasks.Task) -> Share:
    """What a prepared task evaluates on this worker."""
    assert task._prepared is not None
    return task._prepared


def tokens_of(task: tasks.Task) -> list[Any]:
    """Requests of a prepared task whose answers are scored, as lm-eval tokenises them."""
    tokens = share_of(task).tokens
    assert tokens is not None
    return tokens


@pytest.mark.parametrize("limit", [None, 11])
@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_multiple_choice_scores_are_those_of_lm_eval(
    choice_task: Path,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    by_lm_eval: Callable[..., Any],
    metric: str,
    limit: int | None,
) -> None:
    task = load(str(choice_task), limit=limit, metric=metric, batch_size=7)
    task.prepare(tokenizer)
    ours = task.evaluate(model)
    accuracy, stderr, correct = by_lm_eval([choice_task], model, tokenizer, limit=limit, metric=metric)
    assert ours.correct == correct
    assert len(correct) == (limit or 30)
    assert 0 < sum(correct) < len(correct)  # an answer that is always right or wrong would prove nothing
    assert (ours.accuracy, ours.stderr) == pytest.approx((accuracy, stderr), abs=1e-12)
    assert ours.metric == metric


@pytest.mark.parametrize("filter_name", ["letter", "whole"])
def test_generated_text_is_scored_as_lm_eval_does(
    copy_task: Path, model: Any, tokenizer: PreTrainedTokenizerBase, by_lm_eval: Callable[..., Any], filter_name: str
) -> None:
    task = load(str(copy_task), metric=f"exact_match,{filter_name}")
    task.prepare(tokenizer)
    accuracy, stderr, correct = by_lm_eval([copy_task], model, tokenizer, metric="exact_match", filter_name=filter_name)
    ours = task.evaluate(model)
    assert ours.correct == correct
    assert len(correct) == 12
    assert (ours.accuracy, ours.stderr) == pytest.approx((accuracy, stderr), abs=1e-12)
    assert task.evaluate(model).correct == correct  # requests are built once and answered often


@pytest.mark.parametrize(("shots", "chat"), [(2, False), (0, True), (2, True)])
@pytest.mark.parametrize("kind", ["choice", "prefixed", "copy"])
def test_fewshot_and_chat_are_those_of_lm_eval(
    choice_task: Path,
    copy_task: Path,
    model: Any,
    chatty: PreTrainedTokenizerBase,
    by_lm_eval: Callable[..., Any],
    tmp_path: Path,
    kind: str,
    shots: int,
    chat: bool,
) -> None:
    path = copy_task if kind == "copy" else choice_task
    if kind == "prefixed":  # the answer's beginning is given, in the assistant's turn
        path = changed(choice_task, tmp_path, gen_prefix="it is")
    task = load(str(path), num_fewshot=shots or None, chat_template=chat)
    task.prepare(chatty)
    name, filter_name = ("exact_match", "letter") if kind == "copy" else ("acc", "none")
    theirs = by_lm_eval(
        [path], model, chatty, metric=name, filter_name=filter_name, num_fewshot=shots, apply_chat_template=chat
    )
    ours = task.evaluate(model)
    assert ours.correct == theirs[2]
    assert (ours.accuracy, ours.stderr) == pytest.approx(theirs[:2], abs=1e-12)
    # Training sees the conversation that an evaluation without examples would have.
    row = task.training_rows(chatty, 128)[0]
    prompt, answer = (
        str(chatty.decode(ids)) for ids in (row.input_ids[: row.labels_start], row.input_ids[row.labels_start :])
    )
    assert prompt.endswith("assistant:") == (chat and kind != "prefixed")
    assert answer.startswith(" ") == (not chat or kind == "prefixed")


def test_another_fewshot_seed_draws_other_examples_as_in_lm_eval(
    choice_task: Path, model: Any, tokenizer: PreTrainedTokenizerBase, by_lm_eval: Callable[..., Any]
) -> None:
    prompts = []
    for seed in (1234, 5):
        task = single(choice_task, num_fewshot=1, fewshot_seed=seed, limit=8)
        task.prepare(tokenizer)
        prompts.append([pair for pair, *_ in tokens_of(task)])
    assert prompts[0] != prompts[1]
    theirs = by_lm_eval([choice_task], model, tokenizer, limit=8, num_fewshot=1, fewshot_random_seed=5)
    assert task.evaluate(model).correct == theirs[2]


def test_a_task_whose_file_says_zero_stays_without_examples(
    choice_task: Path, model: Any, tokenizer: PreTrainedTokenizerBase, by_lm_eval: Callable[..., Any], tmp_path: Path
) -> None:
    path = changed(choice_task, tmp_path, num_fewshot=0)
    task = single(path, num_fewshot=3)
    assert task.num_fewshot == 0
    task.prepare(tokenizer)
    assert task.evaluate(model).correct == by_lm_eval([path], model, tokenizer, num_fewshot=3)[2]


def test_more_examples_than_there_are_is_an_error(choice_task: Path) -> None:
    with pytest.raises(StudyError, match="num_fewshot=49 asks for more examples than the 48 that task"):
        load(str(choice_task), num_fewshot=49)


def test_a_chat_template_that_the_tokenizer_lacks_is_an_error(
    choice_task: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    task = load(str(choice_task), chat_template=True)
    with pytest.raises(StudyError, match=r"chat_template=true needs a tokenizer with a chat template, .* has none"):
        task.check_tokenizer(tokenizer)


# --- several tasks --------------------------------------------------------------------------------------------------


def test_several_tasks_are_each_as_lm_eval_has_them(
    choice_task: Path, model: Any, chatty: PreTrainedTokenizerBase, by_lm_eval: Callable[..., Any], tmp_path: Path
) -> None:
    other = changed(choice_task, tmp_path, task="again", doc_to_text="say {{question}}:")
    every_options: list[dict[str, Any]] = [{}, {"num_fewshot": 1}, {"num_fewshot": 2, "chat_template": True}]
    for options in every_options:
        mixture = load(f"[{choice_task}, {other}]", limit=13, **options)
        mixture.prepare(chatty)
        ours = mixture.evaluate(model)
        theirs = by_lm_eval(
            [choice_task, other],
            model,
            chatty,
            limit=13,
            num_fewshot=options.get("num_fewshot"),
            apply_chat_template=options.get("chat_template", False),
        )
        assert {label: part.correct for label, part in ours.parts.items()} == {k: v[2] for k, v in theirs.items()}
        (first, one, _), (second, two, _) = theirs.values()
        assert ours.accuracy == pytest.approx((first + second) / 2, abs=1e-12)
        assert ours.stderr == pytest.approx((one**2 + two**2) ** 0.5 / 2, abs=1e-12)
        assert ours.by_task["again"] == {"accuracy": pytest.approx(second), "stderr": pytest.approx(two)}
        assert len(ours.correct) == 26


def test_a_mixture_is_the_rows_of_all_and_calibrates_on_an_equal_share(
    choice_task: Path, copy_task: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    mixture = load(f"{choice_task},{copy_task}")
    parts = [load(str(path)) for path in (choice_task, copy_task)]
    rows = [row for part in parts for row in part.training_rows(tokenizer, 64)]
    assert mixture.training_rows(tokenizer, 64) == rows
    assert (mixture.num_training, mixture.num_evaluation) == (48 + 20, 30 + 12)
    assert [part.chance for part in mixture.parts] == [0.25, None]  # four choices; a text
    assert mixture.chance is None
    shares = [part.prompts(tokenizer, n, 3) for part, n in zip(parts, (6, 5), strict=True)]
    assert mixture.prompts(tokenizer, 11, 3) == [*shares[0], *shares[1]]
    assert len(mixture.prompts(tokenizer, 1000, 3)) == 68
    assert mixture.metric == "mean of acc, exact_match,letter"
    assert tasks.sizes(mixture) == (
        "68 rows to train on (choice 48, copy 20); accuracy is the mean over choice (30 × acc), "
        "copy (12 × exact_match,letter); selected on test split; tested on the same"
    )


def test_a_limit_caps_each_data_set_and_is_the_same_in_every_study(
    choice_task: Path, copy_task: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    capped = load(f"{choice_task},{copy_task}", training_limit=30)
    assert [part.num_training for part in capped.parts] == [30, 20]
    assert capped.training_rows(tokenizer, 64)[:30] == load(str(choice_task), training_limit=30).training_rows(
        tokenizer, 64
    )


def test_the_order_and_the_members_are_in_the_hash(choice_task: Path, copy_task: Path) -> None:
    one, two, three = (
        load(text).data_hash
        for text in (f"{choice_task},{copy_task}", f"{copy_task},{choice_task}", f"[{choice_task},  {copy_task}]")
    )
    assert one == three != two


def test_a_metric_is_taken_by_the_tasks_that_have_it(choice_task: Path, copy_task: Path) -> None:
    mixture = load(f"{choice_task},{copy_task}", metric="acc_norm")
    assert [part.metric for part in mixture.parts] == ["acc_norm", "exact_match,letter"]
    with pytest.raises(StudyError, match="'bleu': choose from acc, acc_norm, exact_match,letter, exact_match,whole"):
        load(f"{choice_task},{copy_task}", metric="bleu")


def test_workers_of_a_mixture_share_its_questions(
    choice_task: Path, copy_task: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    mixture = load(f"{choice_task},{copy_task}")
    asked = []
    for rank in range(2):
        mixture.prepare(tokenizer, rank=rank, world_size=2)
        asked += [(part.label, doc) for part in mixture.parts for doc in share_of(part).documents]
    assert sorted(asked) == sorted([("choice", i) for i in range(30)] + [("copy", i) for i in range(12)])


# --- training data of its own ---------------------------------------------------------------------------------------

RATIONALES = [{"ask": "ab", "say": "x as ab"}, {"ask": "cd", "say": "y as cd"}, {"ask": "ef", "say": "x"}]


@pytest.fixture
def rationales(tmp_path: Path) -> list[Path]:
    """Two tasks that are evaluated on different questions and trained on the same rationales."""
    block = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"more": "more.jsonl"}},
        "training_split": "more",
        "output_type": "generate_until",
        "doc_to_text": "q {{ask}}?",
        "doc_to_choice": None,
        "doc_to_target": "{{say}}",
    }
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in RATIONALES))
    paths = [
        write_task(tmp_path, name, {"train": ROWS, "test": ROWS[:count]}, **CHOICE, metadata={"training": block})
        for name, count in (("first", 1), ("second", 2))
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return paths


def test_training_data_may_be_another_data_set(
    rationales: list[Path], model: Any, tokenizer: PreTrainedTokenizerBase, by_lm_eval: Callable[..., Any]
) -> None:
    task = load(str(rationales[0]))
    rows = task.training_rows(tokenizer, 64)
    assert [tokenizer.decode(row.input_ids) for row in rows] == [
        "q ab? x as ab<eos>",
        "q cd? y as cd<eos>",
        "q ef? x<eos>",
    ]
    task.prepare(tokenizer)
    assert task.evaluate(model).correct == by_lm_eval([rationales[0]], model, tokenizer)[2]


def test_tasks_that_share_training_data_have_it_once(
    rationales: list[Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    mixture = load(",".join(map(str, rationales)))
    assert tasks.check_task(",".join(map(str, rationales))).num_datasets == len(mixture.datasets) == 1
    assert len(mixture.training_rows(tokenizer, 64)) == mixture.num_training == 3
    assert len(mixture.prompts(tokenizer, 2, 0)) == 2
    assert "3 rows to train on (first 3, shared" in tasks.sizes(mixture)


def test_the_hash_follows_the_other_data_set(rationales: list[Path], tmp_path: Path) -> None:
    before = load(str(rationales[0])).data_hash
    rationales[0].write_text(rationales[0].read_text().replace("q {{ask}}?", "now {{ask}}?"))
    assert load(str(rationales[0])).data_hash != before


# --- groups ---------------------------------------------------------------------------------------------------------


def test_a_group_file_lists_tasks_beside_it_and_what_is_different(
    choice_task: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    changed(choice_task, tmp_path, task="near")
    inner = {"group": "inner", "task": ["near.yaml"]}
    outer = {
        "group": "outer",
        "task": [{"task": "inner.yaml", "metric": "acc_norm"}, {"task": str(choice_task), "num_fewshot": 2}],
        "metadata": {"recipe": {"epochs": 2}},
    }
    for group in (inner, outer):
        (tmp_path / f"{group['group']}.yaml").write_text(yaml.safe_dump(group))
    chosen = tasks.check_task(str(tmp_path / "outer.yaml"))
    assert [file.label for file in chosen.files] == ["near", "choice"]
    assert chosen.recipe == {"steps": 7, "epochs": 2}  # what both tasks suggest, and what the group does
    mixture = load(str(tmp_path / "outer.yaml"))
    assert [(part.metric, part.num_fewshot) for part in mixture.parts] == [("acc_norm", 0), ("acc", 2)]
    mixed = load(f"{tmp_path / 'inner.yaml'},tiny_cipher", limit=3)
    assert [part.label for part in mixed.parts] == ["near", "tiny_cipher"]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"group": "g", "task": []}, "must list its tasks under `task:`"),
        ({"group": "g", "task": ["g.yaml"]}, "and not itself"),
        ({"group": "g", "task": [{"metric": "acc"}]}, "give a task's name"),
        ({"group": "g", "task": ["tiny_cipher", "tiny_cipher"]}, "'tiny_cipher' is named twice"),
        ({"group": "g", "task": ["tiny_cipher", "nothing.yaml"]}, "'nothing.yaml' does not exist"),
    ],
)
def test_a_group_that_cannot_work_is_one_line(tmp_path: Path, group: dict[str, Any], message: str) -> None:
    (tmp_path / "g.yaml").write_text(yaml.safe_dump(group))
    with pytest.raises(StudyError, match=message) as error:
        tasks.check_task(str(tmp_path / "g.yaml"))
    assert "\n" not in str(error.value)


def test_a_group_does_not_replace_functions(tmp_path: Path) -> None:
    (tmp_path / "g.yaml").write_text("group: g\ntask:\n  - {task: tiny_cipher, doc_to_text: !function words.ask}\n")
    with pytest.raises(StudyError, match=r"g\.yaml gives tiny_cipher a function as doc_to_text"):
        tasks.check_task(str(tmp_path / "g.yaml"))


def test_a_list_with_a_hole_is_an_error() -> None:
    with pytest.raises(StudyError, match="lacks a name"):
        tasks.check_task("tiny_cipher,,tiny_backshift")


def test_paths_of_a_list_are_found_from_another_folder(choice_task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(choice_task.parent)
    assert tasks.absolute("tiny_cipher, choice.yaml") == f"tiny_cipher,{choice_task}"
    assert tasks.absolute("choice") == "choice"


def test_shares_of_several_workers_are_the_whole(choice_task: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    task = single(choice_task)
    task.prepare(tokenizer)
    whole = tokens_of(task)
    shares = []
    for rank in range(3):
        task.prepare(tokenizer, rank=rank, world_size=3)
        shares += tokens_of(task)
        assert len(share_of(task).documents) == 10
    assert sorted(map(str, shares)) == sorted(map(str, whole))


def test_evaluation_leaves_the_model_in_its_mode_and_says_nothing(
    choice_task: Path, model: Any, tokenizer: PreTrainedTokenizerBase, capfd: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger("lm_eval").setLevel(logging.NOTSET)
    task = load(str(choice_task))
    task.prepare(tokenizer)
    model.train()
    task.evaluate(model)
    assert model.training
    assert capfd.readouterr() == ("", "")


def test_training_rows_are_the_requests_of_the_right_answers(
    choice_task: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    task = load(str(choice_task))
    rows = task.training_rows(tokenizer, 128)
    documents = [json.loads(line) for line in (choice_task.parent / "train.jsonl").read_text().splitlines()]
    assert len(rows) == len(documents) == task.num_training
    for row, doc in zip(rows, documents, strict=True):
        prompt, completion = row.input_ids[: row.labels_start], row.input_ids[row.labels_start :]
        assert tokenizer.decode(prompt) == f"Pick one.\nwhich is {doc['question']}?".replace("P", "<unk>", 1)
        assert tokenizer.decode(completion) == f" {doc['choices'][doc['label']]}"
        assert row.completion_tokens == len(completion)


def test_generated_rows_learn_to_stop(copy_task: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    task = load(str(copy_task))
    doc = json.loads((copy_task.parent / "train.jsonl").read_text().splitlines()[0])
    row = task.training_rows(tokenizer, 128)[0]
    assert tokenizer.decode(row.input_ids) == f"copy {doc['question']}: {doc['answer']}<eos>"
    assert tokenizer.decode(row.input_ids[row.labels_start :]) == f" {doc['answer']}<eos>"


def test_long_rows_lose_their_beginning(choice_task: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    task = load(str(choice_task))
    whole, cut = task.training_rows(tokenizer, 128), task.training_rows(tokenizer, 9)
    for a, b in zip(whole, cut, strict=True):
        assert b.input_ids == a.input_ids[-9:]
        assert b.labels_start == 9 - a.completion_tokens
    assert all(row.labels_start == 1 for row in task.training_rows(tokenizer, 2))  # nothing predicts the first token


def test_inputs_as_choices(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
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
    rows = load(str(path)).training_rows(tokenizer, 64)
    assert [tokenizer.decode(row.input_ids) for row in rows] == ["y ab", "x cd"]
    assert [row.labels_start for row in rows] == [1, 1]


def test_an_answer_that_is_no_choice_is_named(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    bad = [{**ROWS[0], "label": 2}]
    path = write_task(tmp_path, "bad", {"train": ROWS + bad, "test": ROWS}, **CHOICE)
    with pytest.raises(StudyError, match=r"training document 2 of task .* answer 2, .* none of its 2 choices"):
        load(str(path)).training_rows(tokenizer, 64)


def test_prompts_are_drawn_by_seed(choice_task: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    task = load(str(choice_task))
    first = task.prompts(tokenizer, 10, 0)
    assert first == task.prompts(tokenizer, 10, 0)
    assert first != task.prompts(tokenizer, 10, 1)
    rows = [row.input_ids for row in task.training_rows(tokenizer, 512)]
    assert all(prompt in rows for prompt in first)
    assert len(task.prompts(tokenizer, 10_000, 0)) == task.num_training


def test_training_limit_draws_documents(choice_task: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    few = load(str(choice_task), training_limit=5).training_rows(tokenizer, 64)
    other = load(str(choice_task), training_limit=5, seed=1).training_rows(tokenizer, 64)
    assert len(few) == 5
    assert few == load(str(choice_task), training_limit=5).training_rows(tokenizer, 64)
    assert few != other


def test_the_data_hash_follows_documents_and_prompts(choice_task: Path, tmp_path: Path) -> None:
    before = load(str(choice_task)).data_hash
    again = changed(choice_task, tmp_path)
    assert load(str(again)).data_hash == before  # the place of the files is not part of it
    assert load(str(choice_task), limit=5).data_hash != before
    other = changed(choice_task, tmp_path, doc_to_text="what is {{question}}?")
    assert load(str(other)).data_hash != before


# --- check_task: before anything is loaded --------------------------------------------------------------------------


def test_check_reads_the_file_alone(choice_task: Path) -> None:
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
def test_a_task_that_cannot_be_searched_is_refused_early(
    choice_task: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = yaml.safe_load(choice_task.read_text())
    path = choice_task.parent / f"{tmp_path.name}.yaml"
    path.write_text(yaml.safe_dump({**config, **changes}))
    with pytest.raises(StudyError, match=message) as error:
        tasks.check_task(str(path))
    assert "\n" not in str(error.value)


def test_a_near_miss_of_a_harness_task_is_suggested() -> None:
    with pytest.raises(StudyError, match=r"unknown task 'arc_eazy': choose .* did you mean 'arc_easy'\?"):
        tasks.check_task("arc_eazy")


def test_a_harness_task_without_training_split_is_refused_without_network() -> None:
    with pytest.raises(StudyError, match=r"'lambada_openai' \(lambada_openai\.yaml\) has no training split"):
        tasks.check_task("lambada_openai")


def test_an_unreachable_data_set_is_named_with_the_way_to_fetch_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(
        StudyError, match=r"needs the data set 'allenai/ai2_arc'.*load_dataset\('allenai/ai2_arc', 'ARC-"
    ):
        tasks.check_task("arc_easy")


def test_all_that_is_missing_is_said_at_once_and_the_hub_asked_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "openai___gsm8k" / "main").mkdir(parents=True)  # cached
    (tmp_path / "allenai___ai2_arc" / "ARC-Easy").mkdir(parents=True)  # cached, but not the other subset
    asked, real = [], huggingface_hub.HfApi.dataset_info

    def noted(*words: Any, **more: Any) -> Any:
        asked.append(words[1])
        return real(*words, **more)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", noted)
    with pytest.raises(StudyError) as error:
        tasks.check_task("math4,arc_challenge")
    text = str(error.value)
    assert "\n" not in text
    assert len(asked) == 1
    for call in (
        "'meta-math/MetaMathQA'",
        "'ChilleD/SVAMP'",
        "'ChilleD/MultiArith'",
        "'allenai/ai2_arc', 'ARC-Challenge'",
    ):
        assert text.count(f"load_dataset({call})") == 1
    assert "'gsm8k_metamath'" in text.partition(" need ")[0]  # its own data is there, MetaMathQA is not
    assert "load_dataset('openai/gsm8k'" not in text
    assert "fetch it with `curl -fL --create-dirs -o ~/.cache/lora-expert-search/addsub_test.json https://" in text


def test_includes_and_variables_are_followed(
    choice_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUESTIONS", str(choice_task.parent))
    base = yaml.safe_load(choice_task.read_text())
    base["dataset_kwargs"]["data_files"] = {split: f"$QUESTIONS/{split}.jsonl" for split in ("train", "test")}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "mine.yaml").write_text("include: base.yaml\ntask: mine\n")
    task = single(tmp_path / "mine.yaml")
    assert task.num_training == 48
    assert task.file.config["task"] == "mine"


def test_functions_beside_a_task_file_are_used(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = write_task(tmp_path, "shout", {"train": ROWS, "test": ROWS}, **CHOICE)
    path.write_text(path.read_text().replace("doc_to_text: '{{question}}?'", "doc_to_text: !function words.ask"))
    (tmp_path / "words.py").write_text("def ask(doc):\n    return doc['question'] * 2\n")
    (file,) = tasks.check_task(str(path)).files
    assert file.config["doc_to_text"] == "words.ask"
    rows = load(str(path)).training_rows(tokenizer, 64)
    assert [tokenizer.decode(row.input_ids) for row in rows] == ["abab y", "cdcd x"]


def test_a_task_file_that_does_not_fit_its_data_is_named(tmp_path: Path) -> None:
    path = write_task(tmp_path, "misfit", {"train": ROWS, "test": ROWS}, **{**CHOICE, "doc_to_choice": "{{nothing}}"})
    with pytest.raises(
        StudyError, match=r"task 'misfit', split 'test', row 0 \(test.jsonl, line 1\): .*'nothing' is"
    ) as error:
        load(str(path))
    assert "\n" not in str(error.value)


def test_an_accuracy_that_the_task_lacks_is_named_with_the_others(choice_task: Path, copy_task: Path) -> None:
    with pytest.raises(StudyError, match=r"'f1': choose from acc, acc_norm"):
        load(str(choice_task), metric="f1")
    with pytest.raises(StudyError, match="exact_match,letter, exact_match,whole"):
        load(str(copy_task), metric="exact_match,none")
    assert load(str(copy_task)).metric == "exact_match,letter"


@pytest.mark.parametrize("name", sorted(tasks.EMBEDDED))
def test_embedded_tasks_have_both_splits(name: str) -> None:
    task = load(name, limit=10)
    assert task.num_training > 100
    assert task.num_evaluation == 10


# --- benchmarks: their own rows from files of the same columns, as there is no network here ---------------------------

METAMATH = {"type": "GSM_AnsAug", "query": "What is 6 + 6?", "response": "6 + 6 = 12\n#### 12\nThe answer is: 12"}
REASONED = ("Question: What is 6 + 6?\nAnswer:", " 6 + 6 = 12\n#### 12\nThe answer is: 12")
# file: a row of its data set, the prompt and completion it is trained on, an answer that is right, one that is not
COLUMNS = {
    "cola_acc": (
        {"sentence": "They drank the pub.", "label": 0, "idx": 0},
        ("They drank the pub.\nQuestion: Does this sentence make sense?\nAnswer:", " no"),
        None,
        None,
    ),
    "scienceqa_text": (
        {
            "question": "Which is a plant?",
            "choices": ["a cow", "a fern", "a rock"],
            "answer": 1,
            "hint": "Look.",
            "lecture": "",
        },
        ("Look.\nQuestion: Which is a plant?\nA. a cow\nB. a fern\nC. a rock\nAnswer:", " B"),
        None,
        None,
    ),
    "spider_match": (
        {
            "db_id": "farm",
            "schema": ["CREATE TABLE cow (id int, name text)", "CREATE TABLE barn (id int)"],
            "question": "Who is cow 1?",
            "query": "SELECT name  FROM cow WHERE id = '1'",
        },
        (
            "CREATE TABLE cow (id int, name text)\nCREATE TABLE barn (id int)\n-- Who is cow 1?\n",
            "SELECT name FROM cow WHERE id = '1'",
        ),
        'select name\nfrom cow where id="1" ;',
        "SELECT name FROM cow WHERE id = '2'",
    ),
    "gsm8k_metamath": (
        {"question": "How much is 600 + 600?", "answer": "It is <<600+600=1200>>1200.\n#### 1,200"},
        REASONED,
        "600 + 600 = 1200. The answer is: 1200",
        "The answer is: 12",
    ),
    "svamp_metamath": (
        {
            "ID": "chal-1",
            "Body": "Two cows. ",
            "Question": "How many? ",
            "Equation": "2",
            "Answer": "2.0",
            "Type": "Sum",
        },
        REASONED,
        "There are two of them. The answer is: 2",
        "The answer is: 20",
    ),
    "multiarith_metamath": (
        {"question": " How many? ", "final_ans": "9"},
        REASONED,
        "3 x 3. The answer is: $9.00",
        "9, said nobody",
    ),
    "addsub_metamath": (
        {"instruction": "How far? ", "input": "", "output": "The answer is 0.5.", "answer": ["0.5"]},
        REASONED,
        "The answer is 0.5 mile.",
        "The answer is: 5",
    ),
}


def offline(name: str, folder: Path) -> Path:
    """A group of one benchmark whose data sets are local files of the same columns, two rows each."""
    row = COLUMNS[name][0]
    for file, one in (("own", row), ("metamath", METAMATH)):
        (folder / f"{file}.jsonl").write_text(2 * (json.dumps(one) + "\n"))
    (file,) = known(name)
    local: dict[str, Any] = {"dataset_path": "json", "dataset_name": None}
    splits = {file.config.get("training_split"), file.evaluation_split} - {None}
    for split in splits:
        (folder / f"own_{split}.jsonl").write_text((folder / "own.jsonl").read_text())
    entry: dict[str, Any] = {
        "task": name,
        **local,
        "dataset_kwargs": {"data_files": {split: str(folder / f"own_{split}.jsonl") for split in splits}},
    }
    if block := file.config["metadata"].get("training"):
        files = {block["training_split"]: str(folder / "metamath.jsonl")}
        entry["metadata"] = {"training": {**block, **local, "dataset_kwargs": {"data_files": files}}}
    (folder / "group.yaml").write_text(yaml.safe_dump({"group": "g", "task": [entry]}))
    return folder / "group.yaml"


def known(name: str) -> Any:
    """Its task files, whether their data can be reached or not."""
    from trainers.tasks import files as task_files

    files = task_files._members(name, [])
    for file in files:
        task_files._check(file)
    return files


def test_every_benchmark_file_is_tried() -> None:
    groups = {"alphalora6", "commonsense8", "math4", "sieve3"}
    assert {*COLUMNS} | groups == {*tasks.BENCHMARKS}


@pytest.mark.parametrize("name", sorted(COLUMNS))
def test_a_benchmark_makes_its_rows_and_scores_its_answers(name: str, tmp_path: Path) -> None:
    _, trained, right, wrong = COLUMNS[name]
    task = single(offline(name, tmp_path))
    assert task.training._pair(0, None) == trained
    if right is None:
        assert task.metric == "acc"
        return
    harness: Any = task._task
    scores = []
    for answer in (right, wrong):
        harness.build_all_requests()
        (instance, *_) = harness.instances
        instance.resps = [answer]
        for ensemble in harness._filters:
            ensemble.apply([instance])
        metrics = harness.process_results(instance.doc, [instance.filtered_resps[task._filter]])
        scores.append(float(metrics[task._metric]))
    assert scores == [1.0, 0.0]


@pytest.mark.parametrize(
    ("group", "members"),
    [
        (
            "commonsense8",
            "boolq piqa social_iqa winogrande arc_easy arc_challenge openbookqa hellaswag",
        ),
        ("alphalora6", "mrpc rte cola_acc scienceqa_text commonsense_qa openbookqa"),
        ("math4", "gsm8k_metamath svamp_metamath addsub_metamath multiarith_metamath"),
        ("sieve3", "spider_match gsm8k hellaswag"),
    ],
)
def test_the_groups_of_the_papers(group: str, members: str) -> None:
    files = known(group)
    assert [file.label for file in files] == members.split()
    if group == "sieve3":
        assert (files[1].config["num_fewshot"], files[2].metric) == (0, "acc_norm")


def test_what_a_search_selects_on_in_the_groups_of_the_papers() -> None:
    groups = ("commonsense8", "alphalora6", "math4", "sieve3")
    files = {file.label: file for group in groups for file in known(group)}
    validation = {label for label, file in files.items() if file.names_validation_split}
    assert validation == {"arc_easy", "arc_challenge", "openbookqa", "scienceqa_text"}
    assert {label for label, file in files.items() if not file.names_training_split} == {"addsub_metamath"}


def test_rows_that_were_made_from_a_held_out_question_are_left_out(tmp_path: Path) -> None:
    path = offline("gsm8k_metamath", tmp_path)
    questions = [f"How much is {i} + {i}?" for i in range(20)]
    rows = [{"question": question, "answer": "#### 1"} for question in questions]
    (tmp_path / "own_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own_test.jsonl").write_text(json.dumps({"question": "?", "answer": "#### 2"}) + "\n")
    made = [{**METAMATH, "query": f"Say {i} twice.", "original_question": q} for i, q in enumerate(questions)]
    (tmp_path / "metamath.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    task = tasks.load_task(str(path))
    (held,) = task.parts[0]._documents  # one: as many as there are test questions
    trained = [row["original_question"] for row in task.parts[0].training.documents]
    assert trained == [question for question in questions if question != held["question"]]


def test_cola_differs_from_the_harness_in_the_metric_alone() -> None:
    (ours,), (theirs,) = known("cola_acc"), known("cola")
    differing = {key for key in {*ours.config, *theirs.config} if ours.config.get(key) != theirs.config.get(key)}
    assert differing == {"task", "tag", "metric_list", "should_decontaminate", "doc_to_decontamination_query"}


# --- real questions -------------------------------------------------------------------------------------------------


def test_real_questions(model: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
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
    task = load(str(path), limit=20)
    assert (task.num_training, task.num_evaluation) == (2251, 20)
    rows = task.training_rows(tokenizer, 64)
    assert str(tokenizer.decode(rows[0].input_ids)).endswith(": a bacterial population in the bloodstream")
    task.prepare(tokenizer)
    assert 0 <= task.evaluate(model).accuracy <= 1
