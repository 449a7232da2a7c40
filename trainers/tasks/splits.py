"""Selection and test apart: which documents accuracy is counted on, and which are therefore not trained on.

    splits = Splits(select_on="validation", held_out=0.1, seed=0, limit=None)
    selection = splits.selection(file, config, task)      # the task on other documents, and what is held out for that
    keep = Unseen.of(file, [selection.held_out]).allows   # whether a document may be trained on

Held-out documents are told from training documents

    by place      in the split that they were taken from; documents that ask the same word for word go with it
    by question   in other data: a document is left out where one of its texts holds the longest text of a held-out
                  question, word for word but for case and white space. A rewritten question cannot be told.
"""

from __future__ import annotations

import functools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from allocators.core.errors import FAULTS, StudyError, unknown
from trainers.tasks import harness
from trainers.tasks.data import located_data
from trainers.tasks.files import SELECT_ON
from trainers.tasks.harness import Document, HarnessTask
from trainers.tasks.task_file import TaskFile, nothing_to_select_on, training_config

MOST_WORDS = 8  # of the beginnings that questions are looked up by
MOST_ALIKE = 4  # documents of one question, on average


@dataclass(frozen=True)
class Source:
    """Where documents come from: equal for tasks whose documents are the same, place by place.

    data        data set and split
    functions   what is made of its rows before a task sees them
    """

    data: str
    functions: str

    @classmethod
    def of(cls, file: TaskFile, config: Mapping[str, Any]) -> Source:
        """Of the training split that a config names."""
        folder = file.path.parent
        located, split = located_data(config, folder), config.get("training_split")
        kwargs = dict(located["dataset_kwargs"])
        if isinstance(files := kwargs.get("data_files"), Mapping):  # those of other splits are no part of it
            kwargs["data_files"] = files.get(split)
        functions = {key: f"{folder}/{config[key]}" for key in ("process_docs", "custom_dataset") if config.get(key)}
        data = [located["dataset_path"], config.get("dataset_name"), sorted(kwargs.items()), split]
        return cls(str(data), str(functions))


@dataclass(frozen=True)
class HeldOut:
    """Training documents that a task is not trained on, because accuracy is counted on them.

    places   in the training split, in the order drawn
    words    "held out: 160 of 1,600 training documents, seed 0"
    """

    source: Source
    task: HarnessTask
    places: tuple[int, ...]
    documents: Sequence[Document]
    words: str

    @functools.cached_property
    def questions(self) -> list[str]:
        """The longest text of each document that its prompt shows; the prompt itself where it shows none as it is."""
        return [_question(self.task, document) for document in self.documents]


@dataclass(frozen=True)
class Selection:
    """What accuracy is counted on.

    task       evaluates these documents
    words      what they are: "test split", "held out: 160 of 1,600 training documents, seed 0"
    split      the name of the split that they are of
    held_out   where they were taken from the training split
    """

    task: HarnessTask
    words: str
    split: str
    held_out: HeldOut | None = None


@dataclass(frozen=True)
class Splits:
    """What a study selects on.

    select_on   "validation": the validation split where a task has one beside its test split, else a share of the
                training split; "test": the test split, as the papers do
    held_out    that share
    seed        draws it
    limit       evaluate the first so many documents; None: all

    Raises StudyError for another select_on, or a share that is none.
    """

    select_on: str
    held_out: float
    seed: int
    limit: int | None

    def __post_init__(self) -> None:
        if self.select_on not in SELECT_ON:
            raise unknown("select_on", self.select_on, SELECT_ON)
        if not 0 < self.held_out < 1:
            raise StudyError(f"held_out must be above 0 and below 1, got {self.held_out:g}: 0.1 is a tenth")

    def selection(
        self, file: TaskFile, config: Mapping[str, Any], task: HarnessTask, trained: HarnessTask
    ) -> Selection:
        """What a task is selected on, where `task` evaluates its test split and `trained` gives its training rows.

        Raises StudyError where there is nothing besides the test split, and whatever the user's data raise.
        """
        if self.select_on == "test":
            return Selection(task, "test split", file.evaluation_split)
        if file.names_validation_split:
            validation = task.validation_docs()
            others = (task.task_docs, trained.training_docs())
            if len(validation) and not any(_same(validation, other) for other in others):
                count = min(len(validation), self.limit or len(validation))
                on_validation = harness.on_validation_split(task, config)
                words = f"validation split ({count:,} questions)"
                return Selection(on_validation, words, config["validation_split"])
        held_out = self._held_out(file, task)
        if file.names_validation_split:
            held_out = replace(
                held_out, words=f"{held_out.words}, since the validation split is empty or has the rows of another"
            )
        # Examples that are no training documents place by place are told by their questions.
        there = held_out.source if harness.learns_from_training_split(task) else Source("", "")
        unseen = Unseen(there, [held_out], by_question=True)
        examples = [doc for place, doc in enumerate(harness.examples_of(task)) if unseen.allows(place, doc)]
        documents = cast("Any", task.training_docs()).select(held_out.places)
        on_held_out = harness.on_documents(config, documents, examples)
        return Selection(on_held_out, held_out.words, config["training_split"], held_out)

    def _held_out(self, file: TaskFile, task: HarnessTask) -> HeldOut:
        if not file.names_training_split or _same(documents := task.training_docs(), task.task_docs):
            raise nothing_to_select_on(file)
        total = len(documents)
        if total < 2:
            raise StudyError(
                f"task '{file.name}' has {total} training document{'s' * (total != 1)}, too few to hold any out: name "
                "a validation_split in its task file, or take select_on=test"
            )
        # All in the order drawn, then the first: of two tasks on one data set the smaller share is part of the larger.
        order = random.Random(f"held out {self.seed}").sample(range(total), total)
        size = min(max(1, round(self.held_out * total)), len(task.task_docs), total - 1)
        places = tuple(order[:size])
        words = f"held out: {size:,} of {total:,} training documents, seed {self.seed}"
        source = Source.of(file, file.config)
        other = training_config(file.config)
        if other is not None and Source.of(file, other) != source:
            words += ", left out of the other data that is trained on where its rows hold them word for word"
        return HeldOut(source, task, places, [documents[i] for i in places], words)


class Unseen:
    """Says which documents of a source may be trained on.

    by_question   whether documents of other sources are compared with it by their questions
    """

    def __init__(self, source: Source, held_out: Sequence[HeldOut], *, by_question: bool) -> None:
        here = [one for one in held_out if one.source == source]
        there = [one for one in held_out if one.source != source and (by_question or one.source.data == source.data)]
        self._places = {place for one in here for place in one.places}
        self._held_out = [Compared(one.task, one.documents) for one in here]
        self._questions = _Questions([question for one in there for question in one.questions])

    @classmethod
    def of(cls, file: TaskFile, held_out: Sequence[HeldOut]) -> Unseen:
        """Of the documents that a task file's rows are made of; by question where they are other data."""
        other = training_config(file.config)
        return cls(Source.of(file, other or file.config), held_out, by_question=other is not None)

    def allows(self, place: int, document: Document) -> bool:
        """Whether the document at that place may be trained on."""
        if place in self._places or any(one.has(document) for one in self._held_out):
            return False
        return not self._questions.are_in(document)


class _Questions:
    """Finds questions in documents, word for word; looked up by their first words, so that many cost no more."""

    def __init__(self, questions: Sequence[str]) -> None:
        words = [question.split() for question in questions if question]
        self._first = min(MOST_WORDS, *(len(one) for one in words)) if words else 0
        self._first_words = {one[0] for one in words}
        self._by_first: dict[tuple[str, ...], list[list[str]]] = {}
        for one in words:
            self._by_first.setdefault(tuple(one[: self._first]), []).append(one)

    def are_in(self, document: Document) -> bool:
        """Whether one of them is in a text of the document."""
        if not self._by_first:
            return False
        return any(self._are_in_text(text.casefold().split()) for text in _texts(document))

    def _are_in_text(self, words: Sequence[str]) -> bool:
        return any(
            words[start : start + len(question)] == question
            for start, word in enumerate(words)
            if word in self._first_words
            for question in self._by_first.get(tuple(words[start : start + self._first]), ())
        )


def _question(task: HarnessTask, document: Document) -> str:
    prompt: Any = task.doc_to_text(document)
    if not isinstance(prompt, str):  # several prompts, of which this is the number of the right one
        prompt = " ".join(task.doc_to_choice(document))
    prompt = _normal(prompt)
    shown = [text for text in map(_normal, _texts(document)) if text and text in prompt]
    return max(shown, key=len, default=prompt)


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold()


def _texts(value: Any) -> Iterator[str]:
    """Every text in a document, its lists and parts included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _texts(part)


class Compared:
    """Documents that others are compared with: by what they ask, or as a whole where these mostly ask the same, so that
    a prompt is no question of its own.
    """

    def __init__(self, task: HarnessTask, documents: Sequence[Document]) -> None:
        self.task, self.documents = task, documents

    @functools.cached_property
    def by_question(self) -> Counter[int]:
        """How many ask the same. Numbers, because the texts of a large data set would fill the memory."""
        return Counter(hash(_asked(self.task, document)) for document in self.documents)

    @functools.cached_property
    def as_whole(self) -> Counter[int]:
        """How many have the same fields."""
        return Counter(hash(_text(document)) for document in self.documents)

    @property
    def _differ(self) -> bool:
        return len(self.documents) < 2 or len(self.by_question) > len(self.documents) / MOST_ALIKE

    def has(self, document: Document) -> bool:
        """Whether a document of the same task is one of them."""
        if self._differ:
            return hash(_asked(self.task, document)) in self.by_question
        return hash(_text(document)) in self.as_whole

    def among(self, others: Compared) -> int:
        """How many of them are among the others."""
        mine, theirs = (self.by_question, others.by_question) if self._differ else (self.as_whole, others.as_whole)
        return sum(count for number, count in mine.items() if number in theirs)


def _asked(task: HarnessTask, document: Document) -> str:
    """What a document asks as one text, equal where two ask the same word for word.

    It is its prompt with its choices, or with its answer where it has none. A field that is not shown, as an id, makes
    no other question of it; where the prompt shows nothing of the document, the whole document counts.
    """
    try:
        said: list[Any] = [task.doc_to_text(document)]
        if task.OUTPUT_TYPE != "multiple_choice":
            said.append(task.doc_to_target(document))
        elif task.multiple_input:  # the choices are prompts, and the number of the right one is no question
            said = [task.doc_to_target(document), task.doc_to_choice(document)]
        else:
            said.append(task.doc_to_choice(document))
    except FAULTS:  # a document that makes no question is named where it is looked at
        return _text(document)
    prompt = "\n".join(_texts(said if task.multiple_input else said[:1]))
    if not any(text and text in prompt for text in _texts(document)):
        return _text(document)
    return json.dumps(said, sort_keys=True, default=str)


def _text(document: Document) -> str:
    return json.dumps(document, sort_keys=True, default=str)


def repeats(documents: Callable[[], Sequence[Document]]) -> bool:
    """Whether a task's documents are the same when they are made again: functions may draw as they like."""
    return _same(documents(), documents())


def _same(some: Sequence[Document], others: Sequence[Document]) -> bool:
    return len(some) == len(others) and all(one == other for one, other in zip(some, others, strict=True))
