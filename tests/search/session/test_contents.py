"""A study notices when its model, tokenizer, chat template, task files or data are not what they were."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from allocators.core.errors import StudyError
from search.config import parse
from search.records import read
from search.run import main
from search.session.contents import contents_of, refuse_other_facts
from tests.search.studies import fill, open_study, outcome
from trainers.models import EMBEDDED

TASK = """
include: parts/common.yaml
task: mine
dataset_path: json
dataset_kwargs: {data_files: {train: train.jsonl, validation: [validation.jsonl], test: "shards/*.jsonl"}}
training_split: train
validation_split: validation
test_split: test
process_docs: !function own.process
metadata: {version: 1, fetch: nothing, recipe: {steps: 2}}
"""
COMMON = """
output_type: multiple_choice
doc_to_text: !function utils.question
doc_to_target: label
doc_to_choice: choices
target_delimiter: " "
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def rows(count: int, word: str) -> str:
    lines = ({"question": f"{word} {n}", "choices": ["one", "two"], "label": n % 2} for n in range(count))
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, and a group of a task with an include, functions in two folders and data in three files."""
    home = tmp_path_factory.mktemp("contents")
    shutil.copytree(EMBEDDED["tiny-moe"], home / "model")
    (home / "model" / "notes.txt").write_text("nobody reads me")
    task = home / "task"
    for folder in ("parts", "shards"):
        (task / folder).mkdir(parents=True)
    (task / "group.yaml").write_text("group: all\ntask:\n  - mine.yaml\nmetadata: {recipe: {rank: 4}}\n")
    (task / "mine.yaml").write_text(TASK)
    (task / "parts" / "common.yaml").write_text(COMMON)
    (task / "parts" / "utils.py").write_text("from helper import ask\ndef question(doc): return doc['question']\n")
    (task / "parts" / "helper.py").write_text("ask = 1\n")
    (task / "own.py").write_text("def process(docs): return docs\n")
    (task / "unrelated.py").write_text("x = 1\n")
    for name, word in (("train", "a"), ("validation", "b"), ("shards/one", "c"), ("shards/two", "d")):
        (task / f"{name}.jsonl").write_text(rows(12, word))
    return home


@pytest.fixture
def home(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "home", copy_function=shutil.copy2))


def words(home: Path, *more: str) -> list[str]:
    return ["space=sieve", f"model={home / 'model'}", f"task={home / 'task' / 'group.yaml'}", *more]


def contents(home: Path, *more: str) -> dict[str, str]:
    found = contents_of(parse(words(home, *more)), cache=home / "cache.json")
    return {name.replace(str(home), "HOME"): value for name, value in found.items()}


def replaced(old: str, new: str) -> Callable[[Path], None]:
    def edit(file: Path) -> None:
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))

    return edit


def same_size_and_times(file: Path) -> None:
    """As `rsync -t` or an editor that keeps times does it."""
    times, data = file.stat(), bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def with_template(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": "{{ messages }}"}))


def reformatted(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()), indent=7))


EDITS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "weights": ("model/model.safetensors", same_size_and_times, "weights of HOME/model"),
    "config": ("model/config.json", reformatted, "config.json of HOME/model"),
    "tokenizer": ("model/tokenizer.json", reformatted, "tokenizer of HOME/model"),
    "a template in the tokenizer's config": (
        "model/tokenizer_config.json",
        with_template,
        "chat template of HOME/model",
    ),
    "a template beside it": (
        "model/chat_template.jinja",
        lambda file: file.write_text("{{ messages }}"),
        "chat template of HOME/model",
    ),
    "training data": ("task/train.jsonl", replaced("a 3", "a 4"), "task mine, data train.jsonl"),
    "labels": ("task/validation.jsonl", replaced('"label": 1', '"label": 0'), "task mine, data validation.jsonl"),
    "one of several files": ("task/shards/two.jsonl", replaced("d 3", "d 4"), "task mine, data shards/*.jsonl"),
    "a further file": (
        "task/shards/three.jsonl",
        lambda file: file.write_text(rows(2, "e")),
        "task mine, data shards/*.jsonl",
    ),
    "a file less": ("task/shards/two.jsonl", Path.unlink, "task mine, data shards/*.jsonl"),
    "the task file": ("task/mine.yaml", replaced("[validation.jsonl]", "validation.jsonl"), "task mine"),
    "an include": ("task/parts/common.yaml", replaced('" "', '"  "'), "task mine"),
    "a function": ("task/own.py", replaced("return docs", "return docs.shuffle()"), "task mine, code own.py"),
    "a function of an include": ("task/parts/utils.py", replaced("'question'", "'label'"), "code parts/utils.py"),
    "what a function imports": ("task/parts/helper.py", replaced("1", "2"), "code parts/helper.py"),
    "the recipe of a group": ("task/group.yaml", replaced("rank: 4", "rank: 8"), "recipe that the task suggests"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_named(name: str, home: Path) -> None:
    before = contents(home)
    file, edit, expected = EDITS[name]
    edit(home / file)
    after = contents(home)
    assert before.keys() == after.keys()
    [changed] = [key for key in before if before[key] != after[key]]
    assert expected in changed


HARMLESS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "times": ("model/model.safetensors", lambda file: os.utime(file, (1, 1))),
    "a note": ("model/notes.txt", lambda file: file.write_text("other")),
    "other code": ("task/unrelated.py", lambda file: file.write_text("x = 2")),
    "a comment": ("task/mine.yaml", replaced("task: mine", "# said\ntask: mine")),
    "how to fetch": ("task/mine.yaml", replaced("fetch: nothing", "fetch: something")),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_no_result_depends_on_may_change(name: str, home: Path) -> None:
    before = contents(home)
    file, edit = HARMLESS[name]
    edit(home / file)
    assert contents(home) == before


def test_a_moved_home_has_the_same_contents_and_large_files_are_read_once(home: Path, tmp_path: Path) -> None:
    first = contents(home)
    assert sorted(set(first.values())) != ["none"]
    moved = Path(shutil.copytree(home, tmp_path / "moved"))
    (moved / "cache.json").unlink(missing_ok=True)
    assert contents(moved) == first
    weights = home / "model" / "model.safetensors"
    state = weights.stat()
    mark = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
    (home / "cache.json").write_text(json.dumps({str(weights): [*mark, "known"]}))
    second = contents(home)
    assert second["weights of HOME/model"] != first["weights of HOME/model"], "it was taken from the cache"
    for damaged in ("", "[]", "[" * 100_000, json.dumps({str(weights): 5}), json.dumps({str(weights): [*mark, 5]})):
        (home / "cache.json").write_text(damaged)
        assert contents(home) == first


def test_a_commit_stands_for_a_model_of_the_hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = home / "hub" / "models--me--mine"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "refs").mkdir()
    seen = []
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(home / "model", cache / "snapshots" / commit)
        (cache / "refs" / "main").write_text(commit)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
        config = parse(["space=sieve", "model=me/mine", f"task={home / 'task' / 'group.yaml'}"])
        seen.append(contents_of(config, cache=home / "cache.json"))
    assert [found["commit of me/mine"] for found in seen] == ["a" * 40, "b" * 40]


# --- what a study does with them


def changed(tmp_path: Path, before: dict[str, str], after: dict[str, str], *, filled: bool = True) -> dict[str, Any]:
    with open_study(tmp_path / "s", contents=before) as study:
        if filled:
            fill(study)
    (tmp_path / "s" / "untrained.json").write_text('{"accuracy": 0.5, "stderr": 0.1}')
    open_study(tmp_path / "s", contents=after).close()
    return dict(read(tmp_path / "s").header["contents"])


@pytest.mark.parametrize(
    ("after", "named"),
    [
        ({"a": "1", "b": "3"}, "b"),
        ({"a": "1"}, "b"),
        ({"a": "1", "b": "2", "c": "3"}, "c"),
        ({"x": "1", "y": "2"}, "a; b; x; y"),
    ],
)
def test_other_contents_are_refused_in_one_line_that_names_them(
    after: dict[str, str], named: str, tmp_path: Path
) -> None:
    with pytest.raises(StudyError, match=f"has changed since they were made: {named}; put back") as refused:
        changed(tmp_path, {"a": "1", "b": "2"}, after)
    assert "\n" not in str(refused.value)
    assert "name=NEW" in str(refused.value)
    assert read(tmp_path / "s").header["contents"] == {"a": "1", "b": "2"}


def test_what_is_not_known_is_not_compared_and_known_from_then_on(tmp_path: Path) -> None:
    assert changed(tmp_path, {"a": "1", "b": ""}, {"a": "1", "b": "2"}) == {"a": "1", "b": "2"}
    assert changed(tmp_path, {"a": "1", "b": "2"}, {"a": "", "b": "2"}) == {"a": "1", "b": "2"}


def test_a_study_without_results_takes_what_is_there_now(tmp_path: Path) -> None:
    assert changed(tmp_path, {"a": "1"}, {"a": "2"}, filled=False) == {"a": "2"}
    assert not (tmp_path / "s" / "untrained.json").exists(), "it was measured on the other one"


def test_of_a_study_of_an_earlier_version_it_is_said_that_nothing_can_be_checked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert changed(tmp_path, {}, {"a": "1"}) == {"a": "1"}
    [line] = [record.getMessage() for record in caplog.records if "cannot be checked" in record.getMessage()]
    assert "\n" not in line
    with pytest.raises(StudyError, match="has changed since"):
        open_study(tmp_path / "s", contents={"a": "2"})


def test_workers_that_load_something_else_than_what_is_on_record_are_refused(tmp_path: Path) -> None:
    known = [outcome().updated(versions={"model": "m", "data": "d", "torch": "2"}).versions]
    refuse_other_facts(tmp_path, known, {"model": "m", "data": "d", "torch": "3", "test_data": "t"})
    refuse_other_facts(tmp_path, [{}], {"model": "m", "data": "d"})
    for now, named in (({"model": "n"}, "the base model"), ({"data": "e"}, "the documents of the task")):
        with pytest.raises(StudyError, match=f"{named} changed since") as refused:
            refuse_other_facts(tmp_path, known, now)
        assert "\n" not in str(refused.value)


def test_edits_between_two_runs_of_one_study_are_refused_also_when_nothing_is_left_to_train(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["workers=process", "trials=1", "space.allocator=none", "untrained=false", "name=s", f"storage={tmp_path}"]
    command = words(home, *more, "limit=4", "evaluations=1", "tracking_uri=sqlite:///:memory:")
    monkeypatch.syspath_prepend(str(home / "task" / "parts"))
    assert main(command) == 0
    assert main(command) == 0
    assert "nothing to train" in capsys.readouterr().out
    before = (tmp_path / "s" / "outcomes.jsonl").read_bytes()
    for name in ("training data", "tokenizer", "weights", "a template beside it", "a function of an include"):
        file, edit, expected = EDITS[name]
        kept = shutil.copytree(home, tmp_path / "kept", copy_function=shutil.copy2)
        edit(home / file)
        for trials in ("trials=1", "trials=2"):
            assert main([word for word in command if word != "trials=1"] + [trials]) == 2
            [line] = capsys.readouterr().err.splitlines()
            assert expected.replace("HOME", str(home)) in line
            assert line.startswith("error: what the results in ")
        shutil.rmtree(home)
        shutil.move(kept, home)
    assert (tmp_path / "s" / "outcomes.jsonl").read_bytes() == before
    assert main(command) == 0, "what was there is there again"
