"""Selection and test apart: what is selected on is neither trained on nor tested on, and both are lm-eval's numbers.

python -m pytest tests/trainers/tasks/test_splits.py
"""

from __future__ import annotations

import json
import math
import random
import string
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from allocators.core.errors import StudyError
from tests.trainers.conftest import write_task
from trainers import tasks
from trainers.tasks.splits import _Questions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ACC = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
CHOICE: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}?",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "label",
    "metric_list": ACC,
}
BLANK: dict[str, Any] = {  # Winogrande's form: the choices are prompts, the target is what all of them share
    "output_type": "multiple_choice",
    "doc_to_text": "label",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "question",
    "metric_list": ACC,
}
WRITTEN: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "copy {{question}}:",
    "doc_to_target": "{{choices[label]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
    "metric_list": [
        {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "regexes_to_ignore": ["[a-y]"]}
    ],
}
KINDS: dict[str, dict[str, Any]] = {"choice": CHOICE, "blank": BLANK, "written": WRITTEN}


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Questions that differ, with three choices."""
    rng = random.Random(seed)

    def word(length: int) -> str:
        return "".join(rng.choices(string.ascii_lowercase, k=length))

    return [
        {
            "question": f"{word(5)} {i}",
            "choices": [word(rng.randint(1, 4)) for _ in "abc"],
            "label": rng.randrange(3),
        }
        for i in range(count)
    ]


def task_file(folder: Path, *splits: str, kind: dict[str, Any] = CHOICE, count: int = 40, **config: Any) -> Path:
    """A task whose splits have `count` training documents and 12 others; its name is that of the folder."""
    folder.mkdir(exist_ok=True)
    data: dict[str, Iterable[dict[str, Any]]] = {
        split: rows(count if split == "train" else 12, seed) for seed, split in enumerate(splits)
    }
    named = {"validation_split": "validation"} if "validation" in splits else {}
    return write_task(folder, folder.name, data, **{**kind, **named, **config})


def single(path: Path, **options: Any) -> tasks.Task:
    """The task of a file that holds one."""
    task = tasks.load_task(str(path), **options)
    assert isinstance(task, tasks.Task)
    return task


def evaluated(task: tasks.Task) -> list[Any]:
    """The documents that accuracy is counted on."""
    return task._documents


def examples(task: tasks.Task) -> list[Any]:
    """The documents that few-shot examples are drawn from."""
    harness: Any = task._task
    return list(harness.sampler.df)


def as_test_split(path: Path, folder: Path, task: tasks.Task) -> Path:
    """A task file over data that really have the selected documents as their test split, and no others to train on."""
    folder.mkdir()
    config = yaml.safe_load(path.read_text())
    data: dict[str, Iterable[dict[str, Any]]] = {"train": examples(task), "test": evaluated(task)}
    for key in ("task", "dataset_kwargs", "dataset_path", "training_split", "validation_split", "test_split"):
        config.pop(key, None)
    return write_task(folder, f"{path.stem}_apart", data, **config)


# --- which split ------------------------------------------------------------------------------------------------------


def test_an_embedded_task_without_validation_split_holds_a_share_out() -> None:
    task = tasks.load_task("tiny_backcipher")
    assert task.split == "held out: 160 of 1,600 training documents, seed 0"
    assert (task.num_training, task.num_evaluation, task.test.num_evaluation) == (1440, 160, 300)
    assert task.test.split == "test split"
    assert task.test.test is task.test
    assert tasks.sizes(task) == (
        "1,440 rows to train on (tiny_backcipher 1,440); accuracy on tiny_backcipher (160 × acc); selected on "
        "held out: 160 of 1,600 training documents, seed 0; tested on tiny_backcipher (300)"
    )


def test_a_validation_split_beside_a_test_split_is_selected_on(tmp_path: Path) -> None:
    path = task_file(tmp_path / "both", "train", "validation", "test")
    task = single(path)
    assert task.split == "validation split (12 questions)"
    assert (evaluated(task), evaluated(task.test)) == (rows(12, 1), rows(12, 2))
    assert task.num_training == 40
    assert single(path, limit=5).split == "validation split (5 questions)"
    # Nothing is held out, so that the test split's numbers are those of a study that selects on it.
    assert task.test.data_hash == single(path, select_on="test").data_hash != task.data_hash


def test_a_validation_split_alone_is_the_test_split(tmp_path: Path) -> None:
    task = single(task_file(tmp_path / "alone", "train", "validation"))
    assert task.split == "held out: 4 of 40 training documents, seed 0"
    assert evaluated(task.test) == rows(12, 1)


@pytest.mark.parametrize("kind", ["the same name", "the same documents", "the training split"])
def test_a_validation_split_that_is_another_split_is_none(tmp_path: Path, kind: str) -> None:
    path = task_file(tmp_path / "same", "train", "validation", "test")
    if kind == "the same documents":
        (tmp_path / "same" / "validation.jsonl").write_text((tmp_path / "same" / "test.jsonl").read_text())
    else:
        split = "test" if kind == "the same name" else "train"
        path.write_text(path.read_text().replace("validation_split: validation", f"validation_split: {split}"))
    why = "" if kind == "the same name" else ", since the validation split is empty or has the rows of another"
    assert single(path).split == f"held out: 4 of 40 training documents, seed 0{why}"


def test_the_papers_protocol_selects_on_the_test_split(tmp_path: Path) -> None:
    path = task_file(tmp_path / "both", "train", "validation", "test")
    for name in (str(path), f"{path},tiny_cipher"):
        task = tasks.load_task(name, select_on="test")
        assert task.test is task
        assert task.split == "test split"
        assert tasks.sizes(task).endswith("; selected on test split; tested on the same")
    assert task.num_training == 40 + 1600


@pytest.mark.parametrize(
    ("name", "options", "hashed"),
    [  # computed by the code before there were two splits (commit 9ec2d08)
        ("tiny_backcipher", {}, "f7812723b1dc313f"),
        ("tiny_cipher", {"limit": 20}, "8cdd3c78fe7777b5"),
        ("tiny_backshift", {"training_limit": 50, "num_fewshot": 2, "fewshot_seed": 5}, "f2eeedb4f8aaf481"),
        ("tiny_cipher,tiny_backshift", {"chat_template": True}, "fac0cb63d3833e29"),
    ],
)
def test_what_was_recorded_before_has_the_same_hash(name: str, options: dict[str, Any], hashed: str) -> None:
    assert tasks.load_task(name, select_on="test", **options).data_hash == hashed
    assert tasks.load_task(name, **options).data_hash != hashed


# --- both splits are lm-eval's ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shots", "chat"), [(0, False), (2, False), (2, True)])
@pytest.mark.parametrize("validation", [False, True], ids=["held out", "validation"])
@pytest.mark.parametrize("kind", [*KINDS])
def test_both_splits_are_scored_as_lm_eval_does(
    kind: str,
    validation: bool,
    shots: int,
    chat: bool,
    model: Any,
    chatty: PreTrainedTokenizerBase,
    by_lm_eval: Callable[..., Any],
    tmp_path: Path,
) -> None:
    path = task_file(tmp_path / "own", "train", *["validation"] * validation, "test", kind=KINDS[kind], count=110)
    task = single(path, num_fewshot=shots or None, chat_template=chat, batch_size=7)
    apart = as_test_split(path, tmp_path / "apart", task)
    for counted, file in ((task, apart), (task.test, path)):
        counted.prepare(chatty)
        ours = counted.evaluate(model)
        theirs = by_lm_eval(
            [file],
            model,
            chatty,
            metric="exact_match" if kind == "written" else "acc",
            num_fewshot=shots,
            apply_chat_template=chat,
        )
        assert ours.correct == theirs[2]
        assert len(ours.correct) == (11 if counted is task and not validation else 12)
        assert (ours.accuracy, ours.stderr) == pytest.approx(theirs[:2], abs=1e-12)


def test_a_validation_split_that_gives_the_examples_gives_no_question_as_its_own_example(
    model: Any, tokenizer: PreTrainedTokenizerBase, by_lm_eval: Callable[..., Any], tmp_path: Path
) -> None:
    path = task_file(tmp_path / "dev", "train", "validation", "test", fewshot_split="validation")
    task = single(path, num_fewshot=11)  # all but the question
    task.prepare(tokenizer)
    assert task._prepared is not None
    for doc_id, requests in task._prepared.documents.items():
        assert requests[0].args[0].count(evaluated(task)[doc_id]["question"]) == 1
    text = path.read_text().replace("test_split: test", "test_split: validation")
    renamed = path.with_name("renamed.yaml")
    renamed.write_text(text.replace("validation_split: validation\n", ""))
    assert task.evaluate(model).correct == by_lm_eval([renamed], model, tokenizer, num_fewshot=11)[2]


def test_shares_of_two_workers_are_the_whole_of_both_splits(
    model: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    task = single(task_file(tmp_path / "own", "train", "test", count=90))
    for counted in (task, task.test):
        counted.prepare(tokenizer)
        whole = counted._count(counted._lm_around(model, tokenizer), counted._prepared)  # type: ignore[arg-type]
        scores: dict[int, float] = {}
        nats: dict[int, tuple[float, int]] = {}
        for rank in range(2):
            counted.prepare(tokenizer, rank=rank, world_size=2)
            share = counted._count(counted._lm_around(model, tokenizer), counted._prepared)  # type: ignore[arg-type]
            scores |= share.scores
            nats |= share.nats
        assert scores == whole.scores
        assert {i: tokens for i, (_, tokens) in nats.items()} == {i: n for i, (_, n) in whole.nats.items()}
        assert [nats[i][0] for i in sorted(nats)] == pytest.approx([whole.nats[i][0] for i in sorted(nats)], abs=1e-4)


# --- held-out documents are seen by nobody ----------------------------------------------------------------------------


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    share=st.floats(0.01, 0.6),
    seed=st.integers(0, 99),
    limit=st.sampled_from([None, 1, 5]),
    training_limit=st.sampled_from([None, 3, 25]),
)
def test_what_is_held_out_is_neither_trained_on_nor_an_example(
    tmp_path_factory: pytest.TempPathFactory, share: float, seed: int, limit: int | None, training_limit: int | None
) -> None:
    path = task_file(tmp_path_factory.getbasetemp() / "held", "train", "test")
    options: dict[str, Any] = {"held_out": share, "training_limit": training_limit, "num_fewshot": 1}
    whole = single(path, split_seed=seed, **options)
    task = single(path, split_seed=seed, limit=limit, **options)
    size = min(max(1, round(share * 40)), 12)  # as many as the test split has, at most
    held = evaluated(whole)
    assert len(held) == whole.num_evaluation == size
    assert evaluated(task) == held[:limit]
    assert evaluated(task.test) == rows(12, 1)[:limit]
    trained = task.training.documents
    assert len(trained) == min(40 - size, training_limit or 40)
    assert not [doc for doc in held if doc in trained or doc in examples(task)]
    order = [rows(40, 0).index(dict(doc)) for doc in trained]
    assert order == sorted(order)
    assert trained == whole.training.documents
    assert len(examples(task)) == 40 - size
    assert examples(task.test) == rows(40, 0)  # as lm-eval itself has them


def test_the_seed_draws_what_is_held_out(tmp_path: Path) -> None:
    path = task_file(tmp_path / "own", "train", "test")
    first, again, other = (single(path, split_seed=seed) for seed in (0, 0, 1))
    assert evaluated(first) == evaluated(again) != evaluated(other)
    assert first.data_hash == again.data_hash != other.data_hash
    assert first.data_hash != single(path, held_out=0.2).data_hash
    assert [rows(40, 0).index(doc) for doc in evaluated(first)] == [23, 31, 11, 1]  # on every machine


def test_training_rows_are_the_others_in_their_order(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = task_file(tmp_path / "own", "train", "test")
    task, whole = single(path), single(path, select_on="test")
    places = [i for i, doc in enumerate(rows(40, 0)) if doc not in evaluated(task)]
    every = whole.training_rows(tokenizer, 64)
    assert task.training_rows(tokenizer, 64) == [every[i] for i in places]
    assert task.test.training is task.training


def test_a_document_that_repeats_a_held_out_one_goes_with_it(tmp_path: Path) -> None:
    path = task_file(tmp_path / "twice", "train", "test", num_fewshot=2)
    file = path.with_name("train.jsonl")
    file.write_text(file.read_text() * 2)
    task = single(path)
    assert task.num_evaluation == 8
    assert not [doc for doc in evaluated(task) if doc in task.training.documents or doc in examples(task)]


def test_a_document_that_asks_the_same_as_a_held_out_one_goes_with_it(tmp_path: Path) -> None:
    path = task_file(tmp_path / "twice", "train", "test")
    file = path.with_name("train.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines() * 2]
    file.write_text("".join(json.dumps(line | {"id": number}) + "\n" for number, line in enumerate(lines)))
    task = single(path)
    held_out = {doc["question"] for doc in evaluated(task)}
    assert len(held_out) > 4
    assert not held_out & {doc["question"] for doc in task.training.documents}
    assert task.num_training == 80 - 2 * len(held_out)


def test_prompts_that_are_no_questions_of_their_own_hold_nothing_else_out(tmp_path: Path) -> None:
    path = task_file(tmp_path / "few", "train", "test", count=100)
    file = path.with_name("train.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    same = lines[0]["choices"]
    changed = [{**line, "question": "left", "choices": same, "n": number} for number, line in enumerate(lines)]
    file.write_text("".join(json.dumps(line) + "\n" for line in changed))
    assert single(path).num_training == 90


def test_the_order_of_tasks_does_not_change_what_is_trained(tmp_path: Path) -> None:
    path = task_file(tmp_path / "own", "train", "test", count=200)
    file = path.with_name("train.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    topics = [f"topic {random.Random(number).randrange(60)}" for number in range(len(lines))]
    same = lines[0]["choices"]
    changed = [{**line, "choices": same, "topic": topic} for line, topic in zip(lines, topics, strict=True)]
    file.write_text("".join(json.dumps(line) + "\n" for line in changed))
    asked = [json.loads(line) | {"topic": "another"} for line in path.with_name("test.jsonl").read_text().splitlines()]
    path.with_name("test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    other = path.with_name("topic.yaml")
    other.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"task": "topic", "doc_to_text": "{{topic}}"}))
    orders = [tasks.load_task(f"{one},{two}") for one, two in ((path, other), (other, path))]
    documents = [[part.training.documents for part in sorted(mix.parts, key=lambda p: p.label)] for mix in orders]
    assert documents[0] == documents[1]
    held_out = {doc["topic"] for mix in orders for doc in evaluated(mix.parts[0])}
    assert not held_out & {doc["topic"] for doc in documents[0][0]}


def test_tasks_over_the_same_questions_train_on_what_none_holds_out(tmp_path: Path) -> None:
    path = task_file(tmp_path / "own", "train", "test", count=200)
    other = write_task(tmp_path / "own", "fewer", {}, **{**CHOICE, "doc_to_text": "say {{question}}:"})
    config = yaml.safe_load(other.read_text()) | {"training_split": "train", "test_split": "few"}
    config["dataset_kwargs"]["data_files"] = {"train": "train.jsonl", "few": "few.jsonl"}
    other.write_text(yaml.safe_dump(config))
    (tmp_path / "own" / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(3, 5)))
    mixture = tasks.load_task(f"{path},{other}")
    more, fewer = mixture.parts
    assert (more.num_evaluation, fewer.num_evaluation) == (12, 3)
    assert evaluated(fewer) == evaluated(more)[:3]
    for part in mixture.parts:
        assert part.training.documents == [doc for doc in rows(200, 0) if doc not in evaluated(more)]


def test_two_prompts_over_one_data_set_hold_out_the_same_documents(tmp_path: Path) -> None:
    path = task_file(tmp_path / "own", "train", "test")
    config = yaml.safe_load(path.read_text()) | {"task": "again", "doc_to_text": "say {{question}}:"}
    (tmp_path / "own" / "again.yaml").write_text(yaml.safe_dump(config))
    mixture = tasks.load_task(f"{path},{tmp_path / 'own' / 'again.yaml'}")
    one, two = mixture.parts
    assert evaluated(one) == evaluated(two)
    assert one.training.documents == two.training.documents
    assert mixture.split == "held out: 4 of 40 training documents, seed 0"
    assert [part.num_evaluation for part in mixture.test.parts] == [12, 12]


def test_a_mixture_selects_and_tests_on_what_each_of_its_tasks_does(
    tmp_path: Path, model: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    paths = [task_file(tmp_path / "own", "train", "test"), task_file(tmp_path / "dev", "train", "validation", "test")]
    mixture = tasks.load_task(f"{paths[0]},{paths[1]}")
    assert mixture.split == "own: held out: 4 of 40 training documents, seed 0; dev: validation split (12 questions)"
    assert mixture.test is mixture.test
    assert mixture.test.training_rows(tokenizer, 64) == mixture.training_rows(tokenizer, 64)
    for counted, alone in ((mixture, single), (mixture.test, lambda path: single(path).test)):
        counted.prepare(tokenizer)
        ours = counted.evaluate(model)
        parts = [alone(path) for path in paths]
        for part in parts:
            part.prepare(tokenizer)
        evaluations = [part.evaluate(model) for part in parts]
        assert [part.correct for part in ours.parts.values()] == [one.correct for one in evaluations]
        assert ours.loss == pytest.approx(sum(one.loss or 0 for one in evaluations) / 2)


@pytest.mark.parametrize("splits", [("train", "test"), ("train", "validation", "test")])
def test_documents_that_a_function_makes_are_made_once(tmp_path: Path, splits: tuple[str, ...]) -> None:
    """As HellaSwag's: what is held out is taken from the documents that the function leaves."""
    path = task_file(tmp_path / "made", *splits, num_fewshot=2)
    path.write_text(path.read_text() + "process_docs: !function made.even\n")
    path.with_name("made.py").write_text(
        "def even(documents):\n"
        "    kept = documents.filter(lambda doc: int(doc['question'].split()[1]) % 2 == 0)\n"
        "    return kept.map(lambda doc: {'question': doc['question'] + '!'})\n"
    )
    task = single(path)
    held = evaluated(task)
    assert len(held) == (2 if len(splits) == 2 else 6)  # of 20 and of 12
    for doc in [*held, *evaluated(task.test), *task.training.documents, *examples(task)]:
        assert doc["question"].count("!") == 1
    assert len(task.training.documents) == len(examples(task)) == 20 - (2 if len(splits) == 2 else 0)
    assert not [doc for doc in held if doc in task.training.documents or doc in examples(task)]


def test_written_examples_that_hold_a_held_out_question_are_left_out(tmp_path: Path) -> None:
    path = task_file(tmp_path / "own", "train", "test")
    held = evaluated(single(path))
    written = [
        {**rows(1, 9)[0], "question": f"{question} or"} for question in (held[0]["question"], "another", "a third")
    ]
    config = yaml.safe_load(path.read_text()) | {"fewshot_config": {"samples": written}, "num_fewshot": 2}
    path.write_text(yaml.safe_dump(config))
    task = single(path)
    assert evaluated(task) == held
    assert examples(task) == written[1:]
    assert examples(task.test) == written


def test_examples_otherwise_made_of_the_training_split_hold_no_held_out_question(tmp_path: Path) -> None:
    path = task_file(tmp_path / "own", "train", "test", num_fewshot=1)
    path.write_text(path.read_text() + "fewshot_config:\n  split: train\n  process_docs: !function made.backwards\n")
    path.with_name("made.py").write_text(
        "def backwards(documents):\n    return [dict(doc, note='made') for doc in documents][::-1]\n"
    )
    task = single(path)
    questions = {doc["question"] for doc in evaluated(task)}
    assert [doc["question"] for doc in examples(task)] == [
        doc["question"] for doc in reversed(rows(40, 0)) if doc["question"] not in questions
    ]


# --- rows that come from other data -----------------------------------------------------------------------------------


def with_rows_of(path: Path, folder: Path, documents: Sequence[dict[str, Any]], **changes: Any) -> Path:
    """The task of a file that is trained on these documents instead."""
    (folder / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    block = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"more": "more.jsonl"}},
        "training_split": "more",
        "output_type": "generate_until",
        "doc_to_text": "q {{ask}}?",
        "doc_to_choice": None,
        "doc_to_target": "{{say}}",
        **changes,
    }
    config = yaml.safe_load(path.read_text()) | {"metadata": {"training": block}}
    path.write_text(yaml.safe_dump(config))
    return path


def test_rows_of_other_data_that_hold_a_held_out_question_are_left_out(tmp_path: Path) -> None:
    path = task_file(tmp_path / "own", "train", "test")
    held = evaluated(single(path))
    other = [doc for doc in rows(40, 0) if doc not in held]
    documents = [
        {"ask": held[0]["question"], "from": "", "say": "x"},
        {"ask": "Rewritten", "from": f"Of {held[1]['question'].upper()}  then", "say": "y"},
        {"ask": f"z{held[2]['question']}", "from": "", "say": "another word"},
        {"ask": other[0]["question"], "from": other[1]["question"], "say": "trained on in any case"},
    ]
    task = single(with_rows_of(path, tmp_path / "own", documents))
    assert evaluated(task) == held
    assert task.training.documents == documents[2:]
    assert task.split.startswith("held out: 4 of 40 training documents, seed 0, left out of the other data")
    assert task.num_training == 2


def test_a_block_that_names_the_same_data_leaves_out_the_same_documents(tmp_path: Path) -> None:
    path = task_file(tmp_path / "own", "train", "test")
    held = evaluated(single(path))
    config = yaml.safe_load(path.read_text())
    config["metadata"] = {"training": {"training_split": "train", "doc_to_text": "so {{question}}:"}}
    path.write_text(yaml.safe_dump(config))
    task = single(path)
    assert task.split == "held out: 4 of 40 training documents, seed 0"
    assert task.training.documents == [doc for doc in rows(40, 0) if doc not in held]


def test_tasks_that_share_other_data_leave_out_what_any_holds_out(tmp_path: Path) -> None:
    paths = [task_file(tmp_path / "own", "train", "test")]
    paths.append(write_task(tmp_path / "own", "two", {"train2": rows(30, 7), "test2": rows(12, 8)}, **CHOICE))
    paths[1].write_text(paths[1].read_text() + "training_split: train2\ntest_split: test2\n")
    held = [doc for path in paths for doc in evaluated(single(path))]
    documents = [{"ask": doc["question"], "say": "x"} for doc in [*rows(40, 0), *rows(30, 7)]]
    for path in paths:
        with_rows_of(path, tmp_path / "own", documents)
    mixture = tasks.load_task(",".join(map(str, paths)))
    questions = {doc["question"] for doc in held}
    assert len(mixture.datasets) == 1
    assert mixture.parts[0].training.documents == [doc for doc in documents if doc["ask"] not in questions]
    assert mixture.num_training == 70 - 4 - 3


word = st.sampled_from(["a", "b", "c"])


@given(questions=st.lists(st.lists(word, min_size=1, max_size=10), max_size=4), text=st.lists(word, max_size=14))
def test_questions_are_found_where_their_words_are(questions: list[list[str]], text: list[str]) -> None:
    found = _Questions([" ".join(one) for one in questions]).are_in({"n": 1, "parts": [{"text": " ".join(text)}]})
    assert found == any(f" {' '.join(one)} " in f" {' '.join(text)} " for one in questions)


# --- what cannot work -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, math.nan])
def test_a_share_that_is_none_is_an_error(share: float) -> None:
    with pytest.raises(StudyError, match="held_out must be above 0 and below 1"):
        tasks.load_task("tiny_cipher", held_out=share)


def test_another_split_to_select_on_is_an_error() -> None:
    with pytest.raises(StudyError, match="unknown select_on 'train': choose from test, validation"):
        tasks.load_task("tiny_cipher", select_on="train")


def test_one_document_cannot_be_held_out_and_trained_on(tmp_path: Path) -> None:
    path = task_file(tmp_path / "own", "train", "test", count=1)
    with pytest.raises(StudyError, match=r"has 1 training document, too few to hold any out: .*select_on=test"):
        single(path)
    assert single(path, select_on="test").num_training == 1


def test_documents_that_all_repeat_a_held_out_one_leave_nothing(tmp_path: Path) -> None:
    path = task_file(tmp_path / "own", "train", "test", count=1)
    path.with_name("train.jsonl").write_text(path.with_name("train.jsonl").read_text() * 5)
    with pytest.raises(StudyError, match=r"nothing is left to train task .* held out, or repeats one that is"):
        single(path)


def test_a_task_with_a_test_split_alone_names_the_ways_out(tmp_path: Path) -> None:
    path = with_rows_of(task_file(tmp_path / "own", "test"), tmp_path / "own", [{"ask": "a", "say": "b"}])
    for load in (single, lambda file: tasks.check_task(str(file), select_on="validation")):
        with pytest.raises(StudyError, match=r"no questions to select on .*validation_split.* or select_on=test"):
            load(path)
    assert single(path, select_on="test").num_training == 1
    tasks.check_task(str(path))


def test_training_documents_that_are_the_test_documents_cannot_be_held_out(tmp_path: Path) -> None:
    path = task_file(tmp_path / "own", "train", "test")
    path.with_name("train.jsonl").write_text(path.with_name("test.jsonl").read_text())
    with pytest.raises(StudyError, match="no questions to select on"):
        single(path)


# --- the loss of the right answers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["choice", "blank"])
def test_the_loss_is_that_of_the_right_answers(
    kind: str, model: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    task = single(task_file(tmp_path / "own", "train", "test", kind=KINDS[kind]), limit=9)
    for counted in (task, task.test):
        counted.prepare(tokenizer)
        nats, tokens = 0.0, 0
        for doc in evaluated(counted):
            answer = doc["choices"][doc["label"]]
            prompt, completion = (answer, doc["question"]) if kind == "blank" else (f"{doc['question']}?", answer)
            ids = tokenizer.encode(f"{prompt} {completion}")
            own = len(tokenizer.encode(f" {completion}"))
            with torch.no_grad():
                logs_SV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            nats -= sum(float(logs_SV[place - 1, ids[place]]) for place in range(len(ids) - own, len(ids)))
            tokens += own
        assert counted.evaluate(model).loss == pytest.approx(nats / tokens, abs=1e-5)


def test_a_loss_that_is_not_known_is_none(
    model: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, choice_task: Path
) -> None:
    written = single(task_file(tmp_path / "own", "train", "test", kind=WRITTEN), limit=3)
    path = task_file(tmp_path / "bad", "train", "test", doc_to_target="{{label if question[-2:] != ' 5' else 7}}")
    bad = single(path)
    assert any(doc["question"].endswith(" 5") for doc in evaluated(bad.test))
    mixture = tasks.load_task(f"{choice_task},{tmp_path / 'own' / 'own.yaml'}", limit=3)
    for task in (written, bad.test, mixture):
        task.prepare(tokenizer)
        assert task.evaluate(model).loss is None
    assert mixture.evaluate(model).parts["choice"].loss is not None


def test_the_loss_costs_no_pass_of_its_own(
    model: Any, tokenizer: PreTrainedTokenizerBase, choice_task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainers.tasks import scoring

    task = single(choice_task)
    task.prepare(tokenizer)
    assert task._prepared is not None
    assert task._prepared.tokens is not None
    passes: list[None] = []
    hook = model.register_forward_hook(lambda *_: passes.append(None))
    scoring.loglikelihoods(model, task._prepared.tokens, max_length=128, batch_size=32)
    alone = len(passes)
    assert task.evaluate(model).loss is not None
    hook.remove()
    assert len(passes) == 2 * alone
