"""The generators: seeded, answered rightly, disjoint, and equal to what is committed."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocators.core.errors import StudyError
from trainers.embedded import domains

TASKS = Path(domains.__file__).parent / "tasks"


def committed(name: str, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (TASKS / f"tiny_{name}_{split}.jsonl").read_text().splitlines()]


@settings(deadline=None)  # the first real text reads the standard library
@given(st.sampled_from(sorted(domains.MIXTURE)), st.integers(0, 2**32))
def test_equal_seeds_give_equal_text_of_known_characters(name: str, seed: int) -> None:
    text = domains.MIXTURE[name](Random(seed))
    assert text == domains.MIXTURE[name](Random(seed))
    assert set(text) <= set(domains.ALPHABET)


# Each answer again, from the example's text alone and by another route than the generator's.
CHECKS: dict[str, Callable[..., str]] = {
    "add": lambda a, b: str(int(a) - -int(b)),
    "sub": lambda a, b: str(int(a) + -int(b)),
    "max": lambda *numbers: sorted(numbers, key=int)[-1],
    "seq": lambda a, b, c: f"{2 * int(c) - int(b)} {3 * int(c) - 2 * int(b)}",
    "count": lambda letter, word: str(sum(c == letter for c in word)),
    "close": lambda opening: opening[::-1].translate(str.maketrans("([{", ")]}")),
    "edit": lambda old, new, word: "".join(new if c == old else c for c in word),
    "upper": lambda word: "".join(chr(ord(c) - 32) for c in word),
    "rev": lambda word: "".join(word[-1 - i] for i in range(len(word))),
    "sort": lambda word: "".join(c * word.count(c) for c in map(chr, range(97, 123))),
    "date": lambda iso: (
        f"{int(iso[8:])} {'JanFebMarAprMayJunJulAugSepOctNovDec'[int(iso[5:7]) * 3 - 3 :][:3]} {iso[:4]}"
    ),
}


@given(st.sampled_from(sorted(set(domains.MIXTURE) - set(domains.REAL_TEXT))), st.integers(0, 2**32))
def test_generated_answers_are_right(name: str, seed: int) -> None:
    prompt, answer = domains.MIXTURE[name](Random(seed)).split(" > ")
    command, *inputs = prompt.split(" ")
    assert CHECKS[command](*inputs) == answer


def test_a_step_holds_every_domain_in_equal_parts() -> None:
    rows = domains.rows(0, 3, 4 * len(domains.MIXTURE), 96, end="\0")
    names = [name for name, _ in rows]
    assert all(names.count(name) == 4 for name in domains.MIXTURE)
    assert {len(text) for _, text in rows} == {96}
    assert rows == domains.rows(0, 3, 4 * len(domains.MIXTURE), 96, end="\0")
    assert rows != domains.rows(0, 4, 4 * len(domains.MIXTURE), 96, end="\0")
    assert rows != domains.rows(1, 3, 4 * len(domains.MIXTURE), 96, end="\0")


def test_the_generator_writes_the_committed_files_again(tmp_path: Path) -> None:
    domains.write_tasks(tmp_path)
    written = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert written == {file.name: file.read_bytes() for file in TASKS.glob("*.jsonl")}


@pytest.mark.parametrize("name", domains.HELD_OUT)
def test_splits_share_no_question_and_no_command_with_the_mixture(name: str) -> None:
    questions = {split: {entry["question"] for entry in committed(name, split)} for split in domains.SPLITS[name]}
    assert {split: len(asked) for split, asked in questions.items()} == domains.SPLITS[name]
    everything = set().union(*questions.values())
    assert len(everything) == sum(domains.SPLITS[name].values())
    assert max(map(len, everything)) <= 64
    commands = {example(Random(0)).split(" ")[0] for example in domains.MIXTURE.values()}
    assert not {question.split(" ")[0] for question in everything} & commands


def facts(name: str, word: str) -> list[tuple[str, bool]]:
    """(letter, whether it stands before b, d, f, … z) in the order of the answer; False where that does not matter."""
    before = [c in "bdfhjlnprtvxz" and name == "turncipher" for c in [*word[1:], "a"]]
    order = -1 if name.startswith("back") or name == "turncipher" else 1
    return list(zip(word, before, strict=True))[::order]


CIPHERS = [name for name in domains.HELD_OUT if name != "pairs"]


@pytest.mark.parametrize("name", CIPHERS)
def test_answers_of_all_splits_follow_from_the_train_split(name: str) -> None:
    """The tables are learnt from the training answers alone; each must be one-to-one, and together they answer every
    question.
    """
    tables: dict[bool, dict[str, str]] = {False: {}, True: {}}
    for entry in committed(name, "train"):
        word, answer = entry["question"].split(" ")[1], entry["choices"][entry["label"]]
        for (source, before), target in zip(facts(name, word), answer, strict=True):
            assert tables[before].setdefault(source, target) == target
    for table, size in zip(tables.values(), SIZES.get(name, (26, 0)), strict=True):
        assert len(set(table.values())) == len(table) == size
    for entry in [entry for split in domains.SPLITS[name] for entry in committed(name, split)]:
        answer = "".join(tables[before][source] for source, before in facts(name, entry["question"].split(" ")[1]))
        assert entry["choices"].index(answer) == entry["label"]


SIZES = {"turncipher": (26, 26)}


def test_eighteen_letters_have_a_second_image_and_eight_have_one() -> None:
    """By hand: k stands before f, which takes the second image of k; f and m have no such neighbour."""
    assert domains._turned("kfm") == domains.CIPHER["m"] + domains.CIPHER["f"] + domains.SECOND["k"]
    assert domains._turned("mz") == domains.CIPHER["z"] + domains.SECOND["m"]
    assert domains._turned("zb") == domains.CIPHER["b"] + domains.CIPHER["z"]
    assert "".join(domains.SECOND) == domains.LETTERS[:18]
    assert all(image not in (letter, domains.CIPHER[letter]) for letter, image in domains.SECOND.items())
    assert set(domains.SECOND.values()) == {domains.CIPHER[letter] for letter in domains.SECOND}


def test_every_letter_and_every_image_has_seven_pairs_with_seven_different_images() -> None:
    assert len(domains.PAIRS) == 91
    assert Counter(domains.PAIRS.values()) == dict.fromkeys(domains.LETTERS[13:], 7)
    for place in (0, 1):
        for letter in domains.LETTERS[:13]:
            images = [image for pair, image in domains.PAIRS.items() if pair[place] == letter]
            assert len(set(images)) == len(images) == 7
    assert all(pair[0] != pair[1] for pair in domains.PAIRS)


@pytest.mark.parametrize("split", domains.LARGE)
def test_answers_of_pairs_are_the_images_and_all_pairs_are_asked_in_training(split: str) -> None:
    entries = committed("pairs", split)
    asked = [entry["question"].split(" ")[1:-1] for entry in entries]
    for words, entry in zip(asked, entries, strict=True):
        assert entry["choices"][entry["label"]] == "".join(domains.PAIRS[word] for word in words)
    assert split != "train" or {word for words in asked for word in words} == set(domains.PAIRS)


@pytest.mark.parametrize("name", ["turncipher", "pairs"])
def test_images_are_about_as_frequent_as_each_other(name: str) -> None:
    """Always the image that is most frequent in training answers is right about one time in four."""
    asked = [entry for split in domains.SPLITS[name] for entry in committed(name, split)]
    answers = "".join(entry["choices"][entry["label"]] for entry in asked)
    counts = {c: answers.count(c) for c in domains.LETTERS}
    right = 0
    for entry in asked:
        (column,) = (set(column) for column in zip(*entry["choices"], strict=True) if len(set(column)) > 1)
        right += max(sorted(column), key=counts.__getitem__) in entry["choices"][entry["label"]]
    assert abs(right / len(asked) - 0.25) < 0.04


@given(st.sampled_from(sorted(domains.HELD_OUT)), st.integers(0, 2**32))
def test_choices_differ_in_one_place_and_nothing_but_the_table_tells_them_apart(name: str, seed: int) -> None:
    question = domains.HELD_OUT[name](Random(seed))
    words = question.question.split(" ")[1:-1]
    word = "".join(words)
    columns = [set(column) for column in zip(*question.choices, strict=True)]
    characters = len(words) if name == "pairs" else len(word)  # of an answer: one a pair, one a letter
    assert sorted(map(len, columns)) == [1] * (characters - 1) + [4]
    doubtful = max(columns, key=len)
    elsewhere = set().union(*(column for column in columns if column is not doubtful))
    assert not doubtful & (set(word) | elsewhere)


@pytest.mark.parametrize("name", domains.HELD_OUT)
def test_right_answers_are_spread_over_the_four_places(name: str) -> None:
    labels = [entry["label"] for entry in committed(name, "test")]
    deviation = math.sqrt(len(labels) * 3 / 16)
    assert all(abs(labels.count(place) - len(labels) / 4) < 3.3 * deviation for place in range(4))


def test_a_wrong_command_line_says_what_is_possible(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="tasks=FOLDER"):
        domains.main([f"tasks={tmp_path / 'missing'}"])
