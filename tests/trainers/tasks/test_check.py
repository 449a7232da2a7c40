"""The look before a study: whatever would be wrong in silence, or in each trial, is one line with task, split and row.

python -m pytest tests/trainers/tasks/test_check.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from allocators.core import plugins
from allocators.core.errors import StudyError, ToolkitWarning
from tests.trainers.conftest import char_tokenizer
from trainers import tasks
from trainers.tasks import harness
from trainers.tasks.task_file import read_yaml

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHOICES = ["ruby", "reed", "fern", "opal"]
MC: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc"}],
}
GEN: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "answer",
    "target_delimiter": "",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
NORM = {"metric_list": [{"metric": "acc_norm"}]}
LIMITS = tasks.Limits(max_length=64, positions=128, rows=64)


def row(label: Any, choices: Any = CHOICES, question: Any = "which is ruby ?") -> dict[str, Any]:
    return {"question": question, "choices": choices, "label": label}


FOUR = [row(label) for label in range(4)]


def say(*answers: Any) -> list[dict[str, Any]]:
    return [{"question": f"q{number} :", "answer": answer} for number, answer in enumerate(answers)]


def write(folder: Path, form: Mapping[str, Any], train: Any, test: Any = None, **changes: Any) -> Path:
    """A task file called quiz; rows, or the text of a file as it is."""
    for split, rows in (("train", train), ("test", train if test is None else test)):
        text = rows if isinstance(rows, str) else "".join(json.dumps(one) + "\n" for one in rows)
        (folder / f"{split}.jsonl").write_text(text)
    config = {"task": "quiz", "dataset_path": "json", "training_split": "train", "test_split": "test", **form}
    config["dataset_kwargs"] = {"data_files": {"train": "train.jsonl", "test": "test.jsonl"}}
    path = folder / "quiz.yaml"
    path.write_text(yaml.safe_dump({**config, **changes}))
    return path


def looked(
    path: Path, tokenizer: PreTrainedTokenizerBase | None = None, limits: tasks.Limits = LIMITS, **options: Any
) -> tasks.Looked:
    return tasks.look(loaded(path, **options), tokenizer or char_tokenizer(), limits)


def loaded(path: Path, **options: Any) -> tasks.Task:
    task = tasks.load_task(str(path), **{"select_on": "test", **options})
    assert isinstance(task, tasks.Task)
    return task


def refused(path: Path, *parts: str, **options: Any) -> str:
    """The one line of a task that is refused."""
    with pytest.raises(StudyError) as error:
        looked(path, **options)
    line = str(error.value)
    assert "\n" not in line
    for part in parts:
        assert part in line, line
    return line


def trained(path: Path) -> list[str]:
    """The text that each row learns."""
    return [text for _, text in pairs(path)]


def pairs(path: Path) -> list[tuple[str, str]]:
    """Prompt and answer of each training row."""
    training = loaded(path).training
    return [training._pair(number, None) for number in range(len(training))]


# --- right answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "parts"),
    [
        (row(-1), ["-1", "the answers of this split are hidden: name another split"]),
        (row(-100), ["-100", "hidden"]),
        (row(4), ["the number 4, none of its 4 choices"]),
        (row(None), ["label' is null or missing"]),
        (row("jade"), ["'jade', none of its 4 choices"]),
        (row(1.5), ["1.5"]),
        (row({}), ["none of its 4 choices"]),
        ({"question": "which ?", "choices": CHOICES}, ["'label' is null or missing"]),
    ],
)
def test_an_evaluated_row_has_a_right_answer(tmp_path: Path, bad: dict[str, Any], parts: list[str]) -> None:
    path = write(tmp_path, MC, FOUR, [*FOUR[:3], bad])
    refused(path, "task 'quiz', split 'test', row 3 (test.jsonl, line 4): ", *parts)


@pytest.mark.parametrize("text", ["jade", "Ruby", "ruby "])
def test_an_answer_as_text_is_one_of_the_choices(tmp_path: Path, text: str) -> None:
    good = [row(choice) for choice in CHOICES]
    assert looked(write(tmp_path, MC, good)).training
    line = refused(write(tmp_path, MC, good, [*good, row(text)]), "row 4", repr(text))
    assert ("'ruby' is like it" in line) == (text != "jade")


def test_lists_of_right_answers_and_templates_are_checked_too(tmp_path: Path) -> None:
    many = [row([label, 0]) for label in range(4)]
    looked(write(tmp_path, MC, many))
    refused(write(tmp_path, MC, many, [*many[:2], row([])]), "split 'test', row 2", "hidden")
    template = {**MC, "doc_to_target": "{{label}}"}
    looked(write(tmp_path, template, FOUR))
    refused(write(tmp_path, template, FOUR, [FOUR[0], row(-1)]), "split 'test', row 1", "'-1'", "hidden")


@pytest.mark.parametrize(
    ("label", "why"),
    [
        ("2", "the text '2', which is choice 1, and lm-eval takes digits that come from a template for the number"),
        ("01", "'01', which lm-eval cannot read as the number of a choice: write 0, 1, 2, …"),
        ("²", "'²', which lm-eval cannot read as the number of a choice"),
        ("٣", "'٣', which lm-eval cannot read as the number of a choice"),
        (
            "[1, 2]",
            "'[1, 2]', which lm-eval reads as a list where it comes from a template: write doc_to_target: label",
        ),
    ],
)
def test_a_template_hands_no_text_on_that_is_read_as_something_else(tmp_path: Path, label: str, why: str) -> None:
    template, rows = {**MC, "doc_to_target": "{{label}}"}, [row(0, ["1", "2", "3"])]
    refused(write(tmp_path, template, rows, [*rows, row(label, ["1", "2", "3"])]), "split 'test', row 1", why)
    refused(write(tmp_path, template, [*rows, row(label, ["1", "2", "3"])], rows), "split 'train', row 1", why)
    taken = [row("2", ["1", "2", "3"])]
    assert trained(write(tmp_path, MC, taken)) == [" 2"]
    assert trained(write(tmp_path, template, [row(1, ["1", "2", "3"])])) == [" 2"]


@pytest.mark.parametrize(
    ("bad", "changes", "why"),
    [
        (row("A"), {}, "a letter is its number by doc_to_target: \"{{'ABCD'.index(FIELD)}}\""),
        (row("d"), {}, "{{'abcd'.index(FIELD)}}"),
        (row(2.0), {}, "it is the number of a choice by doc_to_target: '{{FIELD|int}}'"),
        (row("cafe\u0301", ["caf\u00e9", "the"]), {}, "though the text 'caf\u00e9' is like it"),
        (row([0, 1, 0, 0]), {}, "a 0 or 1 for each choice where numbers of choices are needed: write doc_to_target"),
        (row([0, 1], ["a", "b"]), {}, "each of its 2 choices is right"),
        (row([1, 4]), {}, "its answer is the number 4, none of its 4 choices"),
        (row([1, -2]), {}, "its answer is the number -2, none of its 4 choices"),
        (row([1.0, 2.0]), {}, "of several the numbers are needed (0 to 3)"),
        (row(["ruby", "fern"]), {}, "of several the numbers are needed (0 to 3)"),
        (row(0), {"doc_to_choice": ["{{choices[0]}}", "{{choices[1]}}"]}, "what doc_to_choice lists is no template"),
        (row(0), {"doc_to_choice": {"a": "{% if 1 %}x{% endif %}", "b": "y"}}, "what doc_to_choice lists is no"),
        (row(0), {"target_delimiter": "{{' '}}"}, "target_delimiter is no template"),
        (row(0), {"doc_to_text": "Q: {question}"}, "a field is written {{question}}"),
        (row(0), {"doc_to_text": "{{'{{question}}'}}"}, "its prompt holds the text {{question}}"),
        (row(0), {"doc_to_text": "{{choices|map('upper')}}"}, "a template writes <generator object sync_do_map at 0x"),
        (row(0), {"doc_to_text": "{{question.format}}"}, "which is no text: end it with |list, |join or a call"),
        ({**row(0), "none": "x"}, {"doc_to_text": "{{ none }}"}, "called 'none', a name that templates keep"),
    ],
)
def test_forms_that_people_have_their_answers_in(
    tmp_path: Path, bad: dict[str, Any], changes: dict[str, Any], why: str
) -> None:
    rows = [bad] if changes else [*FOUR[:2], bad]
    refused(write(tmp_path, {**MC, **changes}, FOUR, rows), f"split 'test', row {len(rows) - 1}", why)


@pytest.mark.parametrize(
    ("rows", "changes", "note"),
    [
        (
            [row(1 + number % 3, question=f"q{number}") for number in range(30)],
            {},
            "choice 0 is right in none of 30 rows of 'quiz', split 'test': are their answers counted from 1?",
        ),
        (
            FOUR,
            {"doc_to_text": "which ?"},
            "all 4 rows of 'quiz', split 'test', have the same prompt: doc_to_text names a field as {{field}}",
        ),
        (
            FOUR,
            {"doc_to_text": "{{hint|default('which ?')}}"},
            "all 4 rows of 'quiz', split 'test', are the same question, whatever their answers are",
        ),
        (
            [row(0, question=[f"q{number}"]) for number in range(2)],
            {},
            "2 of 2 rows of 'quiz', split 'test', write a list as Python does: join its parts in doc_to_text",
        ),
        (
            [row(0, question=f"q{number}") for number in range(2)],
            {"doc_to_text": "{{question}} "},
            "prompt and answer are joined by two spaces in 2 of 2 rows of 'quiz', split 'test': doc_to_text ends with "
            "one, target_delimiter is one, or the choices begin with one",
        ),
    ],
)
def test_what_was_hardly_meant_is_noted(
    tmp_path: Path, rows: list[dict[str, Any]], changes: dict[str, Any], note: str
) -> None:
    train = [row(number % 4, question=f"t{number}") for number in range(4)]
    assert looked(write(tmp_path, {**MC, **changes}, train, rows)).notes == [note]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"description": "{{zzz}}"}, ["makes no prompts (description", "'zzz' is undefined"]),
        ({"fewshot_config": {"samples": [{"question": "a"}]}}, ["example 0 of its few-shot", "no field 'label'"]),
        ({"fewshot_config": {"samples": [row(1), row(-1)]}}, ["example 1 of its few-shot examples", "-1", "hidden"]),
        ({"fewshot_config": {"doc_to_text": "{{zzz}}"}}, ["makes no prompts", "'zzz' is undefined"]),
        ({"filter_list": [{"name": "x", "filter": [{"function": "nope"}]}]}, ["Unknown filter 'nope'"]),
        ({"filter_list": [{"name": "x", "filter": "take_first"}]}, ["filter: [{function: NAME}"]),
        ({"filter_list": [{"filter": [{"function": "take_first"}]}]}, ["name: TEXT"]),
        ({"filter_list": [{"name": "", "filter": [{"function": "take_first"}]}]}, ["name: TEXT"]),
        ({"filter_list": [{"name": "x", "filter": [{"function": 5}]}]}, ["filter: [{function: NAME}"]),
        ({"filter_list": [{"name": "x", "filter": [{"function": "take_first"}]}] * 2}, ["each with another name"]),
        ({"dataset_kwargs": {"data_files": {"train": {"a": "b"}, "test": "test.jsonl"}}}, ["lists of paths by split"]),
        ({"dataset_kwargs": {"data_files": {"train": "*.jsonl", "test": "test.jsonl"}}}, ["what it is trained on"]),
    ],
)
@pytest.mark.parametrize("form", [MC, GEN])
def test_what_stands_around_the_rows_of_a_task_is_looked_at(
    tmp_path: Path, form: dict[str, Any], changes: dict[str, Any], parts: list[str]
) -> None:
    if "fewshot_config" in changes and form is GEN:
        changes = {"fewshot_config": {"samples": [{"question": "a", "answer": None}]}}
        parts = ["example 0 of its few-shot examples", "'answer' is null"]
    rows = FOUR if form is MC else say("a", "b")
    refused(write(tmp_path, form, rows, rows[:1], num_fewshot=1, **changes), *parts)


def test_a_metric_that_is_not_here_is_named(tmp_path: Path) -> None:
    metric = {"metric": "nope", "aggregation": "mean", "higher_is_better": True}  # which lm-eval builds all the same
    refused(write(tmp_path, GEN, say("a"), metric_list=[metric]), "the metric 'nope', which is not here: lm-eval has ")


def test_an_answer_that_looks_like_a_list_is_taken_as_it_is_by_its_name_alone(tmp_path: Path) -> None:
    assert trained(write(tmp_path, GEN, say("[1, 2]"))) == ["[1, 2]"]
    path = write(tmp_path, {**GEN, "doc_to_target": "{{answer}}"}, say("a"), say("a", "[1, 2]"))
    refused(path, "split 'test', row 1", "reads as a list", "write doc_to_target: answer")


def test_a_file_is_not_trained_on_and_tested_on(tmp_path: Path) -> None:
    path = write(tmp_path, GEN, say("a"))
    (tmp_path / "again.jsonl").symlink_to(tmp_path / "train.jsonl")
    (tmp_path / "hard.jsonl").hardlink_to(tmp_path / "train.jsonl")
    for name in ("train.jsonl", "./train.jsonl", ["train.jsonl"], "again.jsonl", "hard.jsonl"):
        files = {"data_files": {"train": "train.jsonl", "test": name}}
        path = write(tmp_path, GEN, say("a"), dataset_kwargs=files)
        said = name if isinstance(name, str) and "train" not in name else "train.jsonl"
        refused(path, "evaluated on what it is trained on", said)


def test_rows_that_are_tested_and_trained_on_are_counted(tmp_path: Path) -> None:
    notes = looked(write(tmp_path, MC, FOUR, [FOUR[1], row(0, question="another ?")])).notes
    assert notes == ["1 of 2 rows that 'quiz' is tested on is a training row too, word for word"]


def test_a_question_is_known_by_what_it_asks(tmp_path: Path) -> None:
    """An id, or another label, makes no other question of it."""
    train = [{**row(number % 4, question=f"q{number} ?"), "id": number} for number in range(6)]
    test = [{**row((number + 1) % 4, question=f"q{number} ?"), "id": 100 + number} for number in range(4, 8)]
    notes = looked(write(tmp_path, MC, train, test)).notes
    assert notes == ["2 of 4 rows that 'quiz' is tested on are training rows too, word for word"]


def test_rows_that_another_task_of_the_mixture_is_trained_on_are_counted(tmp_path: Path) -> None:
    one = [row(number % 4, question=f"q{number} ?") for number in range(4)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = write(tmp_path / "a", MC, one, [row(1, question="a ?")])
    second = write(tmp_path / "b", MC, [row(2, question="b ?")], one[:3], task="other")
    notes = tasks.look(tasks.load_task(f"{first},{second}", select_on="test"), char_tokenizer(), LIMITS).notes
    assert notes == ["3 of 3 rows that 'other' is tested on are training rows of 'quiz' too, word for word"]


@pytest.mark.parametrize(
    ("rows", "changes"),
    [
        ([row([1, -1]), row([0, 2])], {}),  # lists of equal length are filled up
        ([row(0)], {"doc_to_choice": ["x^{{2}}", "x^{3}"]}),  # a formula
    ],
)
def test_what_looks_wrong_and_scores_is_taken(tmp_path: Path, rows: list[Any], changes: dict[str, Any]) -> None:
    assert looked(write(tmp_path, {**MC, **changes}, FOUR[:2], rows)).training


def test_texts_without_a_prompt_are_cut(tmp_path: Path) -> None:
    form = {"output_type": "loglikelihood", "doc_to_text": "", "doc_to_target": "{{answer}}", "target_delimiter": ""}
    path = write(tmp_path, {**form, "metric_list": [{"metric": "acc"}]}, say("a" * 90, "b" * 90), say("ab"))
    (note,) = looked(path, limits=tasks.Limits(max_length=16, positions=128, rows=64)).notes
    assert note.startswith("2 of 2 training rows of 'quiz' are cut to max_length=16")


def test_one_column_may_hold_its_own_name(tmp_path: Path) -> None:
    form = {**GEN, "doc_to_text": "spell {{word}} :", "doc_to_target": "word"}
    assert trained(csv_task(tmp_path, "word\nword\nab\n", form)) == ["word", "ab"]


def test_a_chat_template_that_leaves_the_question_out_is_refused(tmp_path: Path) -> None:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['role'] }} {% endfor %}a:"
    with pytest.raises(StudyError, match=r"the chat template of the tokenizer leaves out the question 'which is ruby"):
        looked(write(tmp_path, MC, FOUR), tokenizer, chat_template=True)


def test_no_row_keeps_its_prompt(tmp_path: Path) -> None:
    rows = say("a", "b")
    with pytest.raises(StudyError, match=r"none of its 2 training rows keeps any of its prompt with max_length=2: set"):
        looked(write(tmp_path, GEN, rows), limits=tasks.Limits(max_length=2, positions=128, rows=64))


def test_rows_that_are_selected_on_and_trained_or_tested_on_are_counted(tmp_path: Path) -> None:
    rows = [row(0, question=f"q{number} ?") for number in range(8)]
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(rows[place]) + "\n" for place in (0, 1, 4, 6)))
    files = {split: f"{split}.jsonl" for split in ("train", "validation", "test")}
    names = {"validation_split": "validation", "dataset_kwargs": {"data_files": files}}
    notes = looked(write(tmp_path, MC, rows[:4], rows[4:6], **names), select_on="validation").notes
    assert notes == [
        "2 of 4 rows that 'quiz' is selected on are training rows too, word for word",
        "1 of 4 rows that 'quiz' is selected on is a test row too, word for word",
    ]


def test_choices_that_differ_in_white_space_alone_are_counted(tmp_path: Path) -> None:
    rows = [row(0, ["x", "x ", "y"]), row(0, [" ", "  "]), row(0, ["x", "y"])]
    assert looked(write(tmp_path, MC, FOUR, rows)).notes == [
        "2 of 3 rows of 'quiz', split 'test', have two choices that differ in white space or Unicode form alone"
    ]


@pytest.mark.parametrize("rows", [[row(0), row("1"), row("C"), row(3)], [*FOUR[:2], {}], [FOUR[0], row(0, question=5)]])
def test_faults_of_the_training_data_are_found_before(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    refused(write(tmp_path, MC, rows, FOUR), "task 'quiz', split 'train', row ")


def test_held_out_rows_go_by_their_place_in_the_training_split(tmp_path: Path) -> None:
    rows = [row(0, question=f"q{number} ?") for number in range(12)]
    rows[7]["label"] = 9
    refused(write(tmp_path, MC, rows, FOUR), "split 'train', row 7 (train.jsonl, line 8)", select_on="validation")


# --- texts that are written -------------------------------------------------------------------------------------------


def test_a_form_that_its_own_metric_calls_wrong_is_said_and_goes_on(tmp_path: Path) -> None:
    rows, others = say("pine", "fir"), say("oak", "elm", "ash")
    (note,) = looked(write(tmp_path, {**GEN, "target_delimiter": " "}, rows, others)).notes
    assert note == (
        "task 'quiz', split 'test', row 0 (test.jsonl, line 1): its right answer, ' oak', scores 0 by exact_match "
        "(3 of 3 rows do): set target_delimiter: '' in the task file, or a filter (remove_whitespace)"
    )
    assert looked(write(tmp_path, GEN, rows, others)).notes == []
    strip = [{"name": "strip", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}]
    assert looked(write(tmp_path, {**GEN, "target_delimiter": " ", "filter_list": strip}, rows, others)).notes == []


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("nine letters", "cut after max_gen_toks=8 of its 12 tokens"),
        ("two\nrows", r"cut at the stop string '\n'"),
        ({"a": 1}, "a text is needed"),
        ([], "empty"),
        ("", "no tokens"),
        ([[1]], "a text is needed"),
    ],
)
def test_an_answer_that_the_evaluation_cannot_see_is_refused(tmp_path: Path, answer: Any, why: str) -> None:
    path = write(tmp_path, GEN, say("a", "b"), [*say("c", "d"), {"question": "e", "answer": answer}])
    refused(path, "split 'test', row 2", why)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"max_gen_toks": 128}, ["max_gen_toks: 128", "the model takes 128 tokens"]),
        ({"max_gen_toks": 1024}, ["max_gen_toks: 1024"]),
        ({"max_gen_toks": 0}, ["max_gen_toks: 0", "at least 1"]),
        ({"max_gen_toks": "8"}, ["whole number"]),
        ({"max_gen_tokens": 8}, ["max_gen_tokens", "did you mean"]),
        ({"do_sample": "false"}, ["do_sample", "true or false, without quotes"]),
        ({"until": 5}, ["until"]),
        ({"temperature": -1.0, "do_sample": True}, ["no answer can be written", "strictly positive"]),
        ({"do_sample": True}, ["no answer can be written", "`temperature` (=0.0)"]),
        ({"num_beams": 0}, ["no answer can be written", "ZeroDivisionError"]),
        ({"num_return_sequences": 3}, ["no answer can be written", "num_return_sequences"]),
        ({"use_cache": False}, ["no answer can be written", "use_cache"]),
        ({"max_length": 3}, ["no answer can be written", "max_length"]),
        ({5: 6}, ["names and values is needed"]),
        ({"until": [""]}, ["until: ['']", "would stop every answer at once"]),
        ({"min_new_tokens": 9}, ["min_new_tokens: 9", "at most 8 tokens"]),
        ({"eos_token_id": 5}, ["eos_token_id: 5", "the tokenizer's: leave it out"]),
    ],
)
def test_settings_of_generation_are_checked(tmp_path: Path, changes: dict[str, Any], parts: list[str]) -> None:
    settings = {**GEN["generation_kwargs"], **changes}
    refused(write(tmp_path, {**GEN, "generation_kwargs": settings}, say("a")), "generation_kwargs", *parts)


def test_drawn_answers_repeat(tmp_path: Path, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    import torch

    drawn = {"until": ["\n"], "max_gen_toks": 8, "do_sample": True, "temperature": 0.9}
    task = loaded(write(tmp_path, {**GEN, "generation_kwargs": drawn}, say(*"abcdefgh")))
    task.prepare(tokenizer)
    answers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        task.evaluate(model)
        assert torch.equal(before, torch.get_rng_state())
        answers.append([request.resps for request in task._task.instances])
    assert answers[0] == answers[1]
    assert len({text for (text,) in answers[0]}) > 1


# --- tokens -----------------------------------------------------------------------------------------------------------


def ends_with(*added: str) -> PreTrainedTokenizerBase:
    from tokenizers.processors import TemplateProcessing

    tokenizer = char_tokenizer()
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in dict.fromkeys(added)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join(["$A", *added]), special_tokens=special
    )
    return tokenizer


@pytest.mark.parametrize("added", [("<eos>",), ("<pad>",), ("<eos>", "<eos>")])
def test_a_tokenizer_that_ends_every_text_is_refused(tmp_path: Path, added: tuple[str, ...]) -> None:
    rows = [row(0, ["a", "b", "c", "d"], "a :")]
    refused(write(tmp_path, MC, rows), f"ends every text with {''.join(added)}", tokenizer=ends_with(*added))


def test_a_tokenizer_without_eos_suits_choices_alone(tmp_path: Path) -> None:
    tokenizer = char_tokenizer()
    tokenizer.eos_token = None
    refused(write(tmp_path, MC, FOUR), "has no eos token", tokenizer=tokenizer)
    tokenizer.bos_token = "<pad>"
    assert looked(write(tmp_path, MC, FOUR), tokenizer=tokenizer).training
    refused(write(tmp_path, GEN, say("a")), "has no eos token", tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("choices", "why"),
    [
        (["RUBY", "REED"], "choices 0 and 1 are the same tokens (unknown characters)"),
        (["x", "x"], "choices 0 and 1 are the same tokens"),
        (["a", "x", "x"], "choices 1 and 2 are the same tokens"),
    ],
)
def test_choices_that_are_the_same_tokens_are_refused(tmp_path: Path, choices: list[str], why: str) -> None:
    refused(write(tmp_path, MC, FOUR, [FOUR[0], row(0, choices)]), "split 'test', row 1", why)


def test_ids_outside_of_the_embedding_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, MC, FOUR)
    largest = max(char_tokenizer().get_vocab()[char] for char in "which is ruby ? reed fern opal")
    assert looked(path, limits=tasks.Limits(rows=largest + 1)).training
    refused(path, f"is {largest}, and the model's embedding has {largest} rows", limits=tasks.Limits(rows=largest))


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% if %}", "TemplateSyntaxError: Expected an expression"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[5].content }}", "UndefinedError: list object has no element 5"),
        ("{% for i in range(10**9) %}x{% endfor %}", "OverflowError: Range too big"),
    ],
)
def test_a_chat_template_that_fails_is_told(tmp_path: Path, template: str, why: str) -> None:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = template
    said = "the chat template of the tokenizer cannot write a conversation: "
    for form, rows in ((MC, FOUR), (GEN, say("a"))):
        refused(write(tmp_path, form, rows), said, why, tokenizer=tokenizer, chat_template=True)


LONG = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_never_ends_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, MC, FOUR)
    looked(path)  # what is imported at the first call is not counted
    monkeypatch.setattr(plugins, "PATIENCE", 0.5)
    ended = "TimeoutError: it has run for 0.5 s and was ended"
    tokenizer = char_tokenizer()
    tokenizer.chat_template = LONG
    refused(path, "the chat template of the tokenizer cannot", ended, tokenizer=tokenizer, chat_template=True)
    stuck = {**MC, "doc_to_text": "{{question}}{% if question == 'stuck' %}" + LONG + "{% endif %}"}
    refused(write(tmp_path, stuck, FOUR, [row(0), row(1, question="stuck")]), "split 'test', row 1", ended)
    refused(write(tmp_path, stuck, FOUR, [row(1, question="stuck")]), "split 'test', row 0", ended)


def test_a_pattern_that_looks_for_ever_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the interpreter: no other thread could end it."""
    path = write(tmp_path, GEN, say("a"), say("a" * 40, "b"))
    looked(write(tmp_path, GEN, say("a")))
    monkeypatch.setattr(plugins, "PATIENCE", 0.5)
    steps = [{"function": "regex", "regex_pattern": "(a+)+b"}, {"function": "take_first"}]
    ends = {**GEN, "generation_kwargs": {"until": ["x"], "max_gen_toks": 64}}
    path = write(tmp_path, ends, say("b"), say("b", "a" * 40), filter_list=[{"name": "x", "filter": steps}])
    refused(path, "split 'test', row 1", "cannot be scored by exact_match: TimeoutError: it has run for 0.5 s and was")
    path = write(tmp_path, ends, say("b"), say(*["a" * 40] * 9), filter_list=[{"name": "x", "filter": steps}])
    with mock.patch.object(harness, "scores_of", wraps=harness.scores_of) as scored:
        refused(path, "split 'test', row 0", "TimeoutError: it has run for 0.5 s and was")
    assert scored.call_count == 2, "all nine rows, then the first alone"
    (tmp_path / "utils.py").write_text("import re\ndef found(doc):\n    return re.sub('(a+)+$', '', doc['question'])\n")
    path = write(tmp_path, GEN, say("a"), [{"question": "a" * 40 + "!", "answer": "b"}], doc_to_text="TEXT")
    path.write_text(path.read_text().replace("TEXT", "!function utils.found"))
    refused(path, "split 'test', row 0", "TimeoutError: it has run for 0.5 s and was ended")


def test_a_template_that_takes_long_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "PATIENCE", 0.0001)
    monkeypatch.setattr(plugins._Clock, "is_up", False)
    tokenizer = char_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.warns(ToolkitWarning, match="the chat template of the tokenizer takes .* s for a conversation") as said:
        loaded(write(tmp_path, MC, FOUR), chat_template=True).prepare(tokenizer)
    assert len(said) == 1


# --- empty texts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "changes", "why"),
    [
        (row(0, ["", "y"]), NORM, "choice 0 is empty"),
        (row(0, ["", "y"]), {"target_delimiter": ""}, "choice 0 is empty"),
        (row(0, ["x", ""]), {"target_delimiter": ""}, "choice 1 is empty"),
        (row(0, "xyz"), {"doc_to_choice": "choices"}, "its choices are the text 'xyz': a list of texts is needed"),
        (row(0, []), {}, "it has no choices"),
        (row(0, [5, 7]), {}, "choice 0 is the number 5: a text is needed"),
        (row(0, None), {"doc_to_choice": "choices"}, "'choices' is null or missing"),
        (row(0, ["x", None]), {}, "'choices[1]' is null or missing"),
        (row(0, question=""), {"doc_to_text": "{{question}}\n"}, "its prompt is empty"),
        (row(0, question="  "), {}, "its prompt is empty"),
        (row(0, question=None), {}, "'question' is null or missing"),
        (row(0, question="5"), {}, "its prompt is the number 5"),
        (row(0, question={"a": "b"}), {}, "'question' is an object, which would be written as Python writes it"),
        (row(0, question=[{"a": "b"}]), {}, "'question[0]' is an object"),
        (row(0, "abc"), {}, "its choices are the text 'abc': a list of texts is needed"),
        (row(0, ""), {}, "its choices are the text '': a list of texts is needed"),
    ],
)
@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("split", ["train", "test"])
def test_empty_texts_are_named(
    tmp_path: Path, bad: dict[str, Any], changes: dict[str, Any], why: str, place: int, split: str
) -> None:
    rows = [*FOUR[:place], bad, *FOUR[place:]]
    path = write(tmp_path, {**MC, **changes}, *((rows, FOUR) if split == "train" else (FOUR, rows)))
    refused(path, f"task 'quiz', split '{split}', row {place} ({split}.jsonl, line {place + 1}): ", why)


# --- lengths ----------------------------------------------------------------------------------------------------------


def test_rows_that_lose_their_prompt_are_counted(tmp_path: Path) -> None:
    long = [row(0, ["x" * 60, "y"]), row(1, ["x" * 60, "y"]), row(0, ["x" * 90, "y"])]
    notes = looked(write(tmp_path, MC, long, [row(0)]), limits=tasks.Limits(max_length=64)).notes
    assert notes == ["2 of 3 training rows of 'quiz' are cut to max_length=64, 1 of them has no prompt left"]


def test_a_max_length_above_the_positions_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, MC, FOUR)
    refused(path, "max_length=2048 is more than the 512 positions", limits=tasks.Limits(2048, True, 512, None))
    assert looked(path, limits=tasks.Limits(2048, False, 512, None)).training  # nobody asked, and no row is as long
    path = write(tmp_path, MC, [*FOUR, row(0, ["x" * 600, "y"])], FOUR)
    refused(
        path,
        "split 'train', row 4",
        "616 tokens, and the model has 512 positions",
        limits=tasks.Limits(2048, False, 512),
    )


def test_a_choice_as_long_as_the_model_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, MC, FOUR, [FOUR[0], row(1, ["x" * 512, "y"])])
    refused(
        path,
        "split 'test', row 1",
        "choice 0 has 513 tokens, and the model takes 512",
        limits=tasks.Limits(positions=512),
    )


# --- the text of the file ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answers",
    [
        ["2019-05-04", "2020-01-02"],
        ["2019-05-04 10:00", "2019-05-04 10:00"],
        ["2019-05-04t10:00:00z"],
        [5, 7.5],
        ["00501", "007"],
        ["null", "none", "na", "nan", "true"],
        [12345678901234567890123, 3],
        ["1", 2, "03"],
    ],
)
def test_the_characters_of_a_json_file_are_trained(tmp_path: Path, answers: list[Any]) -> None:
    path = write(tmp_path, GEN, say(*answers))
    assert trained(path) == [str(answer) for answer in answers]


def test_numbers_are_trained_as_they_are_written(tmp_path: Path) -> None:
    numbers = ["0.50", "1e3", "5.00", "1.0", "100000000000000000000.0", "-0", "3"]
    path = write(tmp_path, GEN, "".join(f'{{"question": "q :", "answer": {number}}}\n' for number in numbers))
    assert trained(path) == numbers
    path.write_text(path.read_text().replace("doc_to_target: answer", "doc_to_target: '{{answer}}'"))
    assert trained(path) == numbers
    hashes = {loaded(path).data_hash}
    (tmp_path / "train.jsonl").write_text((tmp_path / "train.jsonl").read_text().replace("0.50", "0.5"))
    assert loaded(path).data_hash not in hashes


@pytest.mark.parametrize("form", [GEN, {**GEN, "doc_to_target": "{{answer}}"}, {**GEN, "doc_to_text": "question"}])
@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"question": "q", "answer": None}, "'answer' is null or missing"),
        ({"question": "q"}, "'answer' is null or missing"),
        ({"answer": "no"}, "'question' is null or missing"),
        ({"question": "q", "answer": True}, "'answer' is the value true"),
    ],
)
def test_null_and_missing_are_refused(tmp_path: Path, form: dict[str, Any], bad: dict[str, Any], why: str) -> None:
    rows = [*say("yes"), bad]
    refused(write(tmp_path, form, rows, say("a")), "split 'train', row 1 (train.jsonl, line 2): ", why)
    refused(write(tmp_path, form, say("a"), rows), "split 'test', row 1 (test.jsonl, line 2): ", why)


def test_a_template_may_ask_whether_a_field_is_null(tmp_path: Path) -> None:
    text = "{% if hint %}{{hint}} {% endif %}{{ '' if note is none else note }}{{question}}"
    rows = [{**say("a")[0], "hint": None, "note": None}, {**say("b")[0], "hint": "h", "note": "n"}, say("c")[0]]
    assert looked(write(tmp_path, {**GEN, "doc_to_text": text}, rows)).training
    refused(write(tmp_path, {**GEN, "doc_to_text": "{{question ~ hint}}"}, rows), "row 0", "'hint' is null")


def csv_task(folder: Path, text: str, form: Mapping[str, Any] = GEN, **kwargs: Any) -> Path:
    for split in ("train", "test"):
        (folder / f"{split}.csv").write_bytes(text.encode(kwargs.get("encoding", "utf-8")))
    files = {"train": "train.csv", "test": "test.csv"}
    return write(folder, form, [], dataset_path="csv", dataset_kwargs={"data_files": files, **kwargs})


def test_the_cells_of_a_csv_file_are_trained_as_they_are(tmp_path: Path) -> None:
    cells = ["00501", "na", "none", "nan", "2019-05-04", "1e3", "true", "5", "5.0", " x ", "null"]
    path = csv_task(tmp_path, "question,answer\n" + "".join(f"q :,{cell}\n" for cell in cells))
    assert trained(path) == cells
    path = csv_task(tmp_path, 'question;answer\r\nq;"a\nb ""c"""\r\n\r\n', sep=";")
    assert trained(path) == ['a\nb "c"']
    path = csv_task(tmp_path, "q,1\nq,2.5\n", column_names=["question", "answer"])
    assert trained(path) == ["1", "2.5"]


def test_files_that_were_put_together_have_no_header_among_their_rows(tmp_path: Path) -> None:
    refused(csv_task(tmp_path, "question,answer\nq :,a\nquestion,answer\nq :,b\n"), "line 3", "names of the columns")


def test_labels_of_a_csv_file_are_numbers(tmp_path: Path) -> None:
    form = {**MC, "doc_to_choice": "{{[a, b]}}"}
    assert looked(csv_task(tmp_path, "question,a,b,label\nwhich ?,x,y,1\nwhat ?,x,z,0\n", form)).training
    refused(csv_task(tmp_path, "question,a,b,label\nwhich ?,x,y,1\nwhat ?,x,z,2\n", form), "row 1 (t", "line 3", "2")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("question,answer\nq,\n", ["row 0 (t", "line 2)", "'answer' is null or missing"]),
        ("question,answer\nq,a\nq\n", ["line 3", "1 cells for 2 columns"]),
        ("question,answer\nq,a,b\n", ["line 2", "3 cells for 2 columns (question, answer)"]),
        ("question,question\nq,a\n", ["two columns are called 'question'"]),
        ('question,answer\nq,"a\n', ["line 2"]),
        ("question,answer\n", ["holds no rows"]),
        (
            'question,answer\nq,a\nq, "a"\n',
            ["line 3", "quotes follow a space in '\"a\"': say dataset_kwargs: {skip"],
        ),
        ("question;answer\nq;a\n", ["line 1", "one column, 'question;answer': say dataset_kwargs: {sep: \";\"}"]),
        ("question\tanswer\nq\ta\n", ["line 1", 'say dataset_kwargs: {sep: "\\t"}']),
        ("", ["holds no rows"]),
    ],
)
def test_what_is_wrong_in_a_csv_file_has_its_line(tmp_path: Path, text: str, parts: list[str]) -> None:
    refused(csv_task(tmp_path, text), *parts)


def test_a_data_file_may_be_called_like_a_pattern_and_lie_in_such_a_folder(tmp_path: Path) -> None:
    """`datasets` takes every name for a pattern, in which [1] is a 1."""
    folder = tmp_path / "runs [1] *" / "b?"
    folder.mkdir(parents=True)
    looked(write(folder, MC, FOUR))
    (folder / "train.jsonl").rename(folder / "train[0]?.jsonl")
    for named in ("train[0]?.jsonl", "tr*.jsonl", ["train[[]0]?.jsonl"]):
        path = write(folder, MC, FOUR, dataset_kwargs={"data_files": {"train": named, "test": "test.jsonl"}})
        (folder / "train.jsonl").unlink()
        assert len(loaded(path).training) == len(FOUR)
    files = {"train": "train[1]?.jsonl", "test": "test.jsonl"}
    refused(write(folder, MC, FOUR, dataset_kwargs={"data_files": files}), "split 'train': nothing is called", "[1]?")
    files = {"train": "missing.jsonl", "test": "test.jsonl"}
    path = write(folder, MC, FOUR, dataset_kwargs={"data_files": files})
    refused(path, f"the data file '{folder}/missing.jsonl', which does not exist")


def test_dates_as_choices_are_text(tmp_path: Path) -> None:
    dates = ["2011-02-02", "2015-06-06"]
    path = write(tmp_path, MC, [row(1, dates), row(0, dates)])
    looked(path)
    assert trained(path) == [" 2015-06-06", " 2011-02-02"]


def test_functions_of_a_task_file_get_a_data_set_with_the_same_texts(tmp_path: Path) -> None:
    rows = [
        {"question": "2019-05-04 :", "answer": answer, "more": more}
        for answer, more in (("01", 5), ("2020-01-01", 7.5))
    ]
    path = write(tmp_path, {**GEN, "doc_to_target": "{{answer}}/{{more}}"}, rows)
    path.write_text(path.read_text() + "process_docs: !function quiz_functions.shout\n")
    (tmp_path / "quiz_functions.py").write_text(
        "def shout(docs):\n    return docs.map(lambda doc: {'question': doc['question'] * 2})\n"
    )
    assert pairs(path)[0] == ("2019-05-04 :2019-05-04 :", "01/5")
    assert trained(path) == ["01/5", "2020-01-01/7.5"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("output_type: multiple_choice\n", "output_type is given twice, in lines 1 and"),
        ("metadata:\n  recipe:\n    rank: 4\n    rank: 8\n", "rank is given twice"),
        ('metadata: {recipe: {rank: 4, "rank": 8}}\n', "rank is given twice"),
    ],
)
def test_a_key_that_a_task_file_gives_twice_is_refused(tmp_path: Path, more: str, said: str) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("output_type: generate_until\ntask: twice\n" + more)
    with pytest.raises(StudyError) as error:
        read_yaml(path)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_key_that_is_merged_in_may_be_there_too(tmp_path: Path) -> None:
    path = tmp_path / "merged.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: &b {<<: *a, y: 3}\nc: {<<: *b, x: 4}\n")
    assert read_yaml(path) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 4, "y": 3}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("metadata: {version: 2020-13-45}", "ValueError: month must be in 1..12"),
        ("metadata: " + "[" * 3000, "cannot be read: RecursionError"),
        ("metadata: " + "9" * 5000, "cannot be read: ValueError"),
        ("metadata: &m {self: *m}", "unfolds to more than 100,000 values, or holds itself"),
        ("metadata: {v: 1}\n\tx: 1", r"cannot start any token \(line 3\)"),
        ("5: 6", "has the key 5, which is no name"),
        ("include: 5", "includes 5: name a file"),
        ("include: [{a: b}]", "includes {'a': 'b'}: name a file"),
        ("include: .", "is no file of keys"),
        ("include: ~nobody_at_all/x.yaml", "No such file"),
        (f"include: {'a' * 300}.yaml", "File name too long"),
        ("!!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_what_is_no_task_file_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(f"task: odd\n{text}\n" if not text.startswith("!!") else text)
    with pytest.raises(StudyError, match=said) as error:
        tasks.check_task(str(path))
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_a_small_task_file_that_unfolds_to_a_billion_values_is_no_hang(tmp_path: Path) -> None:
    lines = [f"x{number}: &x{number} [{', '.join([f'*x{number - 1}'] * 9)}]" for number in range(1, 14)]
    (tmp_path / "bomb.yaml").write_text("\n".join(["x0: &x0 [1, 2]", *lines]))
    with pytest.raises(StudyError, match="unfolds to more than"):
        read_yaml(tmp_path / "bomb.yaml")


ODD: list[Any] = [None, True, 5, -1, 1.5, "", "x", "~nobody_at_all/x", "a" * 300, [], ["x"], [5], {}, {"x": 1}, {5: 6}]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(key=st.sampled_from([*harness.task_keys(), "include", "group", "class"]), value=st.sampled_from(ODD), form=...)
def test_any_value_of_any_key_is_one_line_or_a_task(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: Any, form: bool
) -> None:
    path = write(tmp_path_factory.mktemp("any"), MC if form else GEN, FOUR if form else say("a", "b"))
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), key: value}))
    try:
        task = tasks.load_task(str(path), select_on="test")
        tasks.look(task, char_tokenizer(), LIMITS)
    except StudyError as error:
        assert "\n" not in str(error)  # noqa: PT017 - which values are refused depends on the key


# --- tables -----------------------------------------------------------------------------------------------------------


def parquet_task(folder: Path, form: Mapping[str, Any], train: Any, test: Any) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for split, rows in (("train", train), ("test", test)):
        pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    files = {"data_files": {"train": "train.parquet", "test": "test.parquet"}}
    return write(folder, form, [], dataset_path="parquet", dataset_kwargs=files)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"question": "q", "answer": None}, "'answer' is null or missing"),
        ({"question": None, "answer": "a"}, "'question' is null or missing"),
        ({"question": "q", "answer": float("nan")}, "'answer' is null or missing"),
        ({"question": "q", "answer": b"a"}, "'answer' is bytes and no text"),
        ({"question": {"a": 1}, "answer": "a"}, "'question' is an object"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_table_is_looked_at_as_text_files_are(tmp_path: Path, bad: dict[str, Any], why: str, split: str) -> None:
    rows, form = [{"question": "q", "answer": "a"}], {**GEN, "doc_to_target": "{{answer}}"}
    refused(parquet_task(tmp_path, form, *(([bad], rows) if split == "train" else (rows, [bad]))), f"'{split}'", why)


def test_each_split_of_a_table_has_its_own_types(tmp_path: Path) -> None:
    import pyarrow as pa

    words = [row(choice) for choice in CHOICES]
    assert looked(parquet_task(tmp_path, MC, FOUR, words)).training
    assert looked(parquet_task(tmp_path, MC, words, [{**FOUR[0], "more": 1}])).training
    assert trained(parquet_task(tmp_path, {**GEN, "doc_to_target": "{{answer}}"}, say(5), say("a"))) == ["5"]
    refused(parquet_task(tmp_path, MC, FOUR, pa.Table.from_pylist(FOUR).slice(0, 0)), "holds no rows")
    path = parquet_task(tmp_path, MC, FOUR, FOUR)
    (tmp_path / "test.parquet").write_bytes((tmp_path / "test.parquet").read_bytes()[:-9])
    refused(path, f"data file '{tmp_path / 'test.parquet'}' cannot be read as parquet")


# --- files that cannot be read ----------------------------------------------------------------------------------------

GOOD = json.dumps(say("a")[0])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (f"{GOOD}\n// more to come\n{GOOD}\n", ["line 2", "Expecting value: '// more to come'"]),
        (f"{GOOD},\n{GOOD}\n", ["line 1", "a comma follows the object"]),
        (f"{GOOD}\n{{'question': 'q'}}\n", ["line 2", "double quotes"]),
        ('{"question": "q", "answer": None}\n', ["line 1", "None"]),
        (f"{GOOD}\n[1, 2]\n", ["line 2", "an object", "a list: [1, 2]"]),
        (f"{GOOD}\n5\n", ["line 2", "a number: 5"]),
        (f"{GOOD}\nnull\n", ["line 2", "null"]),
        (f'{{"data": [{GOOD}]}}', ["dataset_kwargs: {field: data}"]),
        (f"{GOOD}\n{GOOD[:-9]}", ["line 2"]),
        (f"[{GOOD},\n{GOOD}", ["the list is cut"]),
        ("", ["holds no rows"]),
        ("\n \n", ["holds no rows"]),
        ('{"question": "q", "answer": "a", "answer": "b"}', ["line 1", "'answer' is there twice"]),
        ('{"question": "q", "answer": Infinity}', ["line 1", "Infinity"]),
        ('{"question": "q", "answer": "\\ud800"}', ["line 1", "half a character"]),
        ("[" * 100_000, ["line 1", "nested too deeply"]),
        ('{"question": ["q", "r"], "answer": ["a", "b"]}', ["line 1", "columns and not rows", "lines=True"]),
        ('{"question": {"0": "q", "1": "r"}, "answer": {"0": "a", "1": "b"}}', ["line 1", "columns and not rows"]),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_what_is_wrong_in_a_json_file_has_its_line(tmp_path: Path, text: str, parts: list[str], split: str) -> None:
    path = write(tmp_path, GEN, *((text, say("a")) if split == "train" else (say("a"), text)))
    refused(path, f"data file '{tmp_path / split}.jsonl'", *parts)


def test_bytes_that_are_no_utf8_have_their_line(tmp_path: Path) -> None:
    path = write(tmp_path, GEN, say("a"))
    for encoding, line in (("latin-1", 2), ("utf-16", 1)):
        (tmp_path / "test.jsonl").write_bytes(f'{GOOD}\n{{"question": "é", "answer": "a"}}\n'.encode(encoding))
        refused(path, f"test.jsonl', line {line}", "save it as UTF-8")
    (tmp_path / "test.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert looked(path).training


def test_json_that_is_a_list_or_lies_under_a_key_or_is_packed_is_read(tmp_path: Path) -> None:
    import gzip

    rows = json.dumps(say("a", "b"), indent=1)
    for text, kwargs in (
        (rows, {}),
        (f'{{"data": {rows}}}', {"field": "data"}),
        ('{"question": "q",\n "answer": "a"}', {}),
    ):
        files = {"data_files": {"train": "train.jsonl", "test": "test.jsonl"}}
        assert looked(write(tmp_path, GEN, text, text, dataset_kwargs={**files, **kwargs})).training
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as stream:
        stream.write(f"{GOOD}\n{GOOD}\n")
    packed = {"data_files": {"train": "train.jsonl", "test": ["rows.jsonl.gz", "t*t.jsonl"]}}
    task = loaded(write(tmp_path, GEN, say("c"), dataset_kwargs=packed))
    assert [document["answer"] for document in task.questions.documents] == ["a", "a", "c"]
    assert task.questions.origin.name(1) == "task 'quiz', split 'test', row 1 (rows.jsonl.gz, line 2)"


def test_messages_name_the_packed_file_and_not_what_is_unpacked_in_a_cache(tmp_path: Path) -> None:
    import gzip
    import zipfile

    bad = f"{GOOD}\n{{'a': 1}}\n"
    (tmp_path / "bad.jsonl.gz").write_bytes(gzip.compress(bad.encode()))
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("in/side.jsonl", bad)
    (tmp_path / "cut.jsonl.gz").write_bytes((tmp_path / "bad.jsonl.gz").read_bytes()[:-20])
    (tmp_path / "no.jsonl.gz").write_text(GOOD)
    for name, said in (
        ("bad.jsonl.gz", "bad.jsonl.gz', line 2"),
        ("bad.zip", "bad.zip/in/side.jsonl', line 2"),
        ("cut.jsonl.gz", "cut.jsonl.gz' cannot be unpacked: EOFError"),
    ):
        files = {"data_files": {"train": "train.jsonl", "test": name}}
        line = refused(write(tmp_path, GEN, say("c"), dataset_kwargs=files), f"data file '{tmp_path}/{said}")
        assert "extracted" not in line
    assert looked(
        write(tmp_path, GEN, say("c"), dataset_kwargs={"data_files": {"train": "train.jsonl", "test": "no.jsonl.gz"}})
    ).training


def test_a_folder_of_files_is_read_as_they_are(tmp_path: Path) -> None:
    path = write(tmp_path, GEN, say("2019-05-04"), say("2020-01-02"))
    for file in ("train.jsonl", "test.jsonl"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / file).rename(tmp_path / "data" / file)
    path.write_text(
        yaml.safe_dump({**yaml.safe_load(path.read_text()), "dataset_path": "data", "dataset_kwargs": None})
    )
    assert trained(path) == ["2019-05-04"]


def test_a_field_that_templates_cannot_take_is_named(tmp_path: Path) -> None:
    refused(
        write(tmp_path, MC, FOUR, [{**FOUR[0], "self": 1}]), "row 0", "a field called 'self', a name that templates"
    )


def test_columns_may_differ_between_splits_and_rows(tmp_path: Path) -> None:
    more = [{**FOUR[0], "source": "a book"}, {**FOUR[1], "source": 5}]
    assert looked(write(tmp_path, MC, FOUR, more)).training
    assert looked(write(tmp_path, MC, more, FOUR)).training
    mixed = [{**one, "extra": extra} for one, extra in zip(FOUR, [{"x": 1}, {"y": [2]}, None, "z"], strict=True)]
    assert looked(write(tmp_path, MC, mixed)).training


def test_a_label_that_is_missing_in_one_split_is_named(tmp_path: Path) -> None:
    without = [{"question": "which ?", "choices": CHOICES}]
    refused(write(tmp_path, MC, without, FOUR), "split 'train', row 0 (train.jsonl, line 1)", "label")
    refused(write(tmp_path, MC, FOUR, without), "split 'test', row 0", "label")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"test_split": "tset"}, ["unknown split", "'tset'", "choose from test, train; did you mean 'test'?"]),
        ({"doc_to_text": None}, ["has no doc_to_text"]),
        ({"doc_to_choice": None}, ["has no doc_to_choice"]),
        ({"output_type": "multiple-choice"}, ["unknown output_type", "did you mean 'multiple_choice'?"]),
        ({"doc_to_text": "{{nothing}}"}, ["split 'test', row 0 (test.jsonl, line 1)", "'nothing' is undefined"]),
        ({"doc_to_text": "{{question"}, ["split 'test', row 0", "TemplateSyntaxError"]),
        ({"doc_to_choice": "{{question}}"}, ["split 'test', row 0"]),
        ({"doc_to_text": "{{question.__class__.__mro__}}"}, ["SecurityError"]),
        ({"dataset_path": "jsonl"}, ["jsonl"]),
        ({"dataset_path": ["json"]}, ["has dataset_path: ['json']: text is needed"]),
        ({"dataset_path": "my data/of/mine"}, ["no name that a data set of the hub could have"]),
        ({"dataset_path": "a" * 300}, ["no name that a data set of the hub could have"]),
        ({"test_split": ["test"]}, ["has test_split: ['test']: text is needed"]),
        ({"repeats": 0}, ["has repeats: 0: a whole number of at least 1"]),
        ({"num_fewshot": -3}, ["has num_fewshot: -3: a whole number of at least 0"]),
        ({"metric_list": {"metric": "acc"}}, ["has metric_list: {'metric': 'acc'}: a list of names and values"]),
        ({"filter_list": [{"name": "x", "filter": [{"function": "nope"}]}]}, ["nope"]),
        ({"fewshot_config": {"sampler": "nope"}}, ["nope"]),
        ({"doc_to_txt": "x"}, ["unknown key of task", "'doc_to_txt'", "did you mean 'doc_to_text'?"]),
        ({"task": "a\nb"}, ["has no name"]),
        ({"dataset_kwargs": {"data_files": {"train": None, "test": "test.jsonl"}}}, ["data_files names None"]),
        ({"dataset_kwargs": {"data_files": {"train": [], "test": "test.jsonl"}}}, ["no file for split 'train'"]),
        ({"dataset_kwargs": {"data_files": {"train": "a" * 300, "test": "test.jsonl"}}}, ["File name too long"]),
    ],
)
def test_a_task_file_that_does_not_fit_says_where(tmp_path: Path, changes: dict[str, Any], parts: list[str]) -> None:
    path = write(tmp_path, MC, FOUR, **changes)
    path.write_text(yaml.safe_dump({k: v for k, v in yaml.safe_load(path.read_text()).items() if v is not None}))
    refused(path, *parts)


def with_function(folder: Path, form: Mapping[str, Any], body: str, key: str, train: Any, test: Any = None) -> Path:
    """A task whose key is the function of that body; it is called with x, and with y where it takes two."""
    arguments = "x, y" if key == "process_results" else "x"
    (folder / "utils.py").write_text(f"import random, sys\nimport numpy as np\ndef made({arguments}):\n    {body}\n")
    path = write(folder, form, train, test, **{key: "FUNCTION"})
    path.write_text(path.read_text().replace("FUNCTION", "!function utils.made"))
    return path


@pytest.mark.parametrize(
    ("key", "body", "why"),
    [
        ("doc_to_text", "return f'{random.random()}'", "doc_to_text gives the text '0."),
        ("doc_to_choice", "return random.sample(x['choices'], 4)", "it must give the same each time"),
        ("doc_to_text", "x['label'] = 0; return x['question']", "doc_to_target gives the number 0, then the number 1"),
        ("doc_to_text", "sys.exit(3)", "SystemExit: 3"),
        ("doc_to_target", "return np.int64(x['label'])", "its answer is a value of type int64"),
        ("doc_to_choice", "return iter(x['choices'])", "its choices are a value of type list_iterator"),
        ("process_results", "return {'acc': float('nan')}", "its right answer scores nan by acc"),
        ("process_results", "return {'acc': float('inf')}", "its right answer scores inf by acc"),
        ("process_results", "sys.exit()", "its right answer cannot be scored by acc: SystemExit"),
        ("process_results", "return {}", "no row has a score called acc"),
        ("process_docs", "sys.exit(3)", "cannot be built: SystemExit: 3 (utils.py, line 4)"),
        ("process_docs", "return x.shuffle(np.random.default_rng().integers(99))", "makes other documents each time"),
        ("process_docs", "return x if len(x) == 1 else 1 / 0", "cannot be built: ZeroDivisionError"),
    ],
)
def test_what_a_function_of_a_task_file_may_not_do(tmp_path: Path, key: str, body: str, why: str) -> None:
    metrics = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    form = {**MC, "doc_to_target": "{{label}}" if "label" in body and key == "doc_to_text" else "label"}
    rows = [row(number % 4, question=f"q{number}") for number in range(40)]
    path = with_function(tmp_path, {**form, "metric_list": metrics}, body, key, rows, [row(1)])
    refused(path, "task '", why)


@pytest.mark.parametrize("answer", ["b'bytes'", "float('nan')", "{'a'}", "(part for part in 'ab')"])
def test_a_written_answer_is_a_text_or_a_number(tmp_path: Path, answer: str) -> None:
    path = with_function(tmp_path, GEN, f"return {answer}", "doc_to_target", say("a"))
    refused(path, "split 'test', row 0", "a text is needed (doc_to_target)")


def test_a_draw_of_a_template_is_refused(tmp_path: Path) -> None:
    rows = [row(0, question=[f"q{number}" for number in range(1000)])]
    refused(write(tmp_path, MC, rows, doc_to_text="{{question|random}}"), "doc_to_text gives the text", "then the text")


def test_an_error_whose_text_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    path = with_function(tmp_path, MC, "raise Broken", "doc_to_text", FOUR)
    broken = "class Broken(Exception):\n    def __str__(self): return 1\n"
    (tmp_path / "utils.py").write_text(broken + (tmp_path / "utils.py").read_text())
    refused(path, "row 0", "Broken: its text cannot be read")


def test_a_function_that_shuffles_makes_the_same_documents_in_every_call(tmp_path: Path) -> None:
    """What is held out goes by its place: another order would train on what is selected on."""
    rows = [row(number % 4, question=f"q{number}") for number in range(40)]
    body = "random.random(); return x.shuffle().select(np.random.permutation(len(x)))"
    path = with_function(tmp_path, MC, body, "process_docs", rows, [row(1, question=f"t{n}") for n in range(9)])
    task, again = loaded(path, select_on="validation"), loaded(path, select_on="validation")
    trained, selected = (
        [document["question"] for document in some] for some in (task.training.documents, task.questions.documents)
    )
    assert len(trained) == 36
    assert {*trained, *selected} == {f"q{number}" for number in range(40)}
    assert trained == [document["question"] for document in again.training.documents]
    assert trained != sorted(trained)
    assert task.data_hash == again.data_hash


def test_a_metric_beyond_1_is_noted(tmp_path: Path) -> None:
    metrics = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    form = {**MC, "metric_list": metrics}
    notes = looked(
        with_function(tmp_path, form, "return {'acc': 100}", "process_results", FOUR, [row(0, question="t")])
    ).notes
    assert "its right answer scores 100 by acc: accuracies are shown as the metric gives them" in notes[0]


@pytest.mark.parametrize("named", [["train.jsonl", "train.jsonl"], ["train.jsonl", "./again.jsonl"], ["*n.jsonl"] * 2])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_data_file_is_named_once_in_a_split(tmp_path: Path, named: list[str], split: str) -> None:
    files: dict[str, Any] = {"train": "train.jsonl", "test": "test.jsonl"}
    files = {**files, split: [name.replace("train", split).replace("*n", f"*{split[-1]}") for name in named]}
    path = write(tmp_path, MC, FOUR, [row(0, question="t")], dataset_kwargs={"data_files": files})
    (tmp_path / "again.jsonl").symlink_to(tmp_path / f"{split}.jsonl")
    refused(path, "names the data file", f"twice for split '{split}'")


def test_an_error_of_a_function_names_its_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, MC, FOUR)
    path.write_text(path.read_text() + "process_docs: !function broken_functions.take\n")
    (tmp_path / "broken_functions.py").write_text("def take(docs):\n    return docs['nothing']\n")
    refused(path, "(broken_functions.py, line 2)")


def test_code_beside_a_task_file_is_said(tmp_path: Path) -> None:
    path = write(tmp_path, MC, FOUR)
    assert tasks.check_task(str(path)).code == []
    path.write_text(path.read_text() + "fewshot_config: {samples: !function more.samples}\n")
    (tmp_path / "more.py").write_text("raise SystemExit\n")
    assert tasks.check_task(str(path)).code == [f"quiz.yaml runs code of {tmp_path / 'more.py'}"]


# --- any rows ---------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)
WORDS = st.text("ab 0\n:é٣", max_size=4)
ROW = st.fixed_dictionaries(
    {},
    optional={
        "question": WORDS | JSON,
        "choices": st.lists(WORDS, max_size=4) | st.lists(JSON, max_size=3) | JSON,
        "label": st.integers(-2, 4) | WORDS | st.lists(st.integers(-1, 4), max_size=2) | JSON,
        "answer": WORDS | JSON | st.lists(WORDS, max_size=2),
    },
)
FORMS: list[dict[str, Any]] = [
    MC,
    {**MC, "doc_to_text": "question", "doc_to_choice": "choices", **NORM},
    {**MC, "doc_to_target": "{{label}}", "target_delimiter": ""},
    {**MC, "doc_to_text": "label", "doc_to_target": "question"},
    GEN,
    {**GEN, "doc_to_text": "{{question}} is", "doc_to_target": "{{answer}}"},
    {**GEN, "output_type": "loglikelihood", "metric_list": [{"metric": "acc"}], "generation_kwargs": None},
]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(rows=st.lists(ROW, min_size=1, max_size=3), form=st.sampled_from(FORMS))
def test_any_rows_are_refused_in_one_line_or_score_1(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], form: dict[str, Any]
) -> None:
    path = write(tmp_path_factory.mktemp("any"), form, rows)
    try:
        notes = looked(path).notes
    except StudyError as error:
        said = str(error)
    else:
        said = "quiz"
        if not any("scores 0" in note for note in notes):
            assert set(scores_of_what_is_trained(loaded(path))) <= {1.0}
    assert "\n" not in said
    assert "quiz" in said or "data file" in said


def scores_of_what_is_trained(task: tasks.Task) -> Sequence[float]:
    """What the metric says of the very tokens that are trained, as both splits have the same rows."""
    tokenizer = char_tokenizer()
    share = task.prepare(tokenizer)
    learnt = [
        (one.input_ids[: one.labels_start], one.input_ids[one.labels_start :])
        for one in task.training_rows(tokenizer, 10**6)
    ]
    answers: list[tuple[Any, Any]] = []
    place = 0
    for (number, requests), (_, completion) in zip(share.documents.items(), learnt, strict=True):
        for request in requests:
            if share.tokens is None:
                text = str(tokenizer.decode(completion, skip_special_tokens=True))
                answers.append((request, text.split("\n")[0]))
            else:
                _, context, continuation = share.tokens[place]
                right = [*context, *continuation] == [*learnt[number][0], *completion]
                answers.append((request, (-1.0 if right else -1e6, right)))
            place += 1
    questions = task.questions
    return list(
        harness.scores_of(
            questions.task, share.documents, answers, metric=questions.metric, filtered=questions.filtered
        ).values()
    )
