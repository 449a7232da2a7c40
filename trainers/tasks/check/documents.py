"""What is wrong with one document, in words: no tokens and no model are needed.

wrong_with(task, {"question": "which ?", "choices": ["x", "y"], "label": -1}, local=True)
# "its answer is -1, none of its 2 choices: the answers of this split are hidden: name another split"
"""

from __future__ import annotations

import copy
import datetime
import json
import numbers
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from allocators.core import plugins
from allocators.core.errors import FAULTS
from allocators.core.words import shown
from trainers.tasks import harness
from trainers.tasks.check import nulls
from trainers.tasks.harness import Document, HarnessTask
from trainers.tasks.rows import right_answer, right_choice
from trainers.tasks.task_file import one_line

_ASKED = ("doc_to_text", "doc_to_target", "doc_to_choice")
_DRAWS = re.compile(r"\b(random|lipsum)\b")  # what a template can draw with
_KEPT = re.compile(r"{{\s*(none|None|true|True|false|False)\b")  # the same in every template
_IN_BRACES = re.compile(r"{{-?\s*(\w+)")
_ADDRESS = re.compile(r"<[^<>]+ at 0x[0-9a-f]+>")  # as Python writes an object that has no text
_WRITTEN_SO = re.compile(r"(?<![{\w])\{(\w+)\}(?!\})")  # as Python's format has it
_HIDDEN = "the answers of this split are hidden: name another split"


def wrong_with(task: HarnessTask, document: Document, *, local: bool) -> str:
    """Why a document makes no question with a right answer; "" where it makes one.

    local   it is a row of a file that its owner can correct: what is only doubtful is wrong too
    """
    try:
        with plugins.watched(None, "a question", ends=True):
            as_it_is = copy.deepcopy(document) if _draws(task) else {}
            return _wrong_with(task, document, local=local) or _made_anew(task, as_it_is)
    except FAULTS as error:  # the user's templates and functions raise what they like
        return f"it makes no question: {one_line(error)}"


def _wrong_with(task: HarnessTask, document: Document, *, local: bool) -> str:
    if local and (
        doubtful := _no_field(task, document) or nulls.spelled_out(task, document) or _read_anew(task, document)
    ):
        return doubtful
    prompt, prefix = task.doc_to_text(document), task.doc_to_prefix(document)
    if local and isinstance(prompt, str) and "{{" in prompt and (left := _left_over(prompt, document)):
        return f"its prompt holds the text {{{{{left}}}}}, which is no field any more: write it once (doc_to_text)"
    if local and (strange := _object_in((prompt, prefix, _target(task, document)), document)):
        return f"a template writes {strange}, which is no text: end it with |list, |join or a call"
    if not isinstance(prefix, str | None):
        return f"its gen_prefix is {value_of(prefix)}: a text is needed"
    if task.OUTPUT_TYPE == "multiple_choice":
        return _wrong_choices(task, document, prompt, local=local)
    return _wrong_answer(task, document) if isinstance(prompt, str) else _wrong_prompt(prompt)


def _draws(task: HarnessTask) -> bool:
    """Whether a prompt or an answer comes of a function, or of a template that can draw."""
    said = [getattr(task.config, key) for key in _ASKED]
    return any(callable(one) or (isinstance(one, str) and _DRAWS.search(one) is not None) for one in said)


def _made_anew(task: HarnessTask, document: Document) -> str:
    """What a function, or a draw in a template, makes otherwise when it is asked again: each trial would ask other
    questions, and the number of a right choice would be that of another choice.
    """
    made: dict[str, Any] = {}
    keys = [key for key in _ASKED if getattr(task.config, key) is not None]
    for order in (keys, keys[::-1]) if document else ():  # one may have changed the document for the others
        asked = copy.deepcopy(document)
        for key in order:
            text = getattr(task, key)(asked)
            if made.setdefault(key, text) != text:
                again = f"{value_of(made[key])}, then {value_of(text)}"
                return f"its {key} gives {again}: it must give the same each time, whatever was asked before"
    return ""


def value_of(value: Any) -> str:
    """A value for a message: `the text 'xyz'`, `the number 5`, `null`, `the list [1, 2]`."""
    if value is None or isinstance(value, bool):
        return f"the value {json.dumps(value)}" if value is not None else "null"
    kinds = {str: "the text", int: "the number", float: "the number", list: "the list", dict: "the object"}
    kind = next((word for of, word in kinds.items() if isinstance(value, of)), "")
    return f"{kind} {shown(repr(value))}" if kind else f"a value of type {type(value).__name__}"


def _no_field(task: HarnessTask, document: Document) -> str:
    """A name that is meant as that of a field, and would be the text of every prompt or answer."""
    if "self" in document:
        return _kept("self")
    for key in _ASKED:
        said = getattr(task.config, key, None)
        if isinstance(said, str) and (kept := _KEPT.search(said)) and kept[1] in document:
            return _kept(kept[1])
        if isinstance(said, str) and said.isidentifier() and said not in document:
            return f"it has no field '{said}', which {key} names: its fields are {', '.join(document)}"
    for key in ("target_delimiter", "fewshot_delimiter"):
        if _is_template(said := getattr(task.config, key, None) or ""):
            return f"it would be joined by the text {shown(repr(said))}: {key} is no template"
    for key in ("doc_to_choice", "doc_to_target"):
        listed = getattr(task.config, key, None)
        entries = listed.values() if isinstance(listed, Mapping) else listed if isinstance(listed, list) else ()
        if literal := next((one for one in entries if isinstance(one, str) and _names_field(one, document)), ""):
            return (
                f"one of its answers would be the text {shown(repr(literal))}: what {key} lists is no template; one "
                f"template that makes the list is, as in {key}: '{{{{[first, second]}}}}'"
            )
    said = task.config.doc_to_text
    written = _WRITTEN_SO.findall(said) if isinstance(said, str) else []
    if meant := next((name for name in written if name in document), ""):
        return f"its prompt would hold the text {{{meant}}}: a field is written {{{{{meant}}}}} (doc_to_text)"
    return ""


def _names_field(text: str, document: Document) -> bool:
    """Whether a text is a template that was meant to hold a field, and not a formula with braces."""
    return "{%" in text or any(name in document for name in _IN_BRACES.findall(text))


def _is_template(text: str) -> bool:
    return "{{" in text or "{%" in text


def _target(task: HarnessTask, document: Document) -> Any:
    """What its answer is, where it is no choice."""
    return None if task.OUTPUT_TYPE == "multiple_choice" else task.doc_to_target(document)


def _object_in(texts: Sequence[Any], document: Document) -> str:
    """How Python writes an object, in a text that comes of no row; "" where no text has such."""
    for text in texts:
        if isinstance(text, str) and (found := _ADDRESS.search(text)) and found[0] not in str(document):
            return found[0]
    return ""


def _kept(name: str) -> str:
    return f"it has a field called '{name}', a name that templates keep for themselves: call the field otherwise"


def _read_anew(task: HarnessTask, document: Document) -> str:
    """A text of the document that a template of the answer hands on, and lm-eval takes for a number or a list."""
    said = task.config.doc_to_target
    if not isinstance(said, str) or said in document:
        return ""
    text = harness.templates().from_string(said).render(**document)
    if task.config.doc_to_choice is not None and text.isdigit() and not (text.isascii() and text == str(int(text))):
        return f"its answer is {value_of(text)}, which lm-eval cannot read as the number of a choice: write 0, 1, 2, …"
    fields = [name for name, value in document.items() if value == text and isinstance(value, str)]
    target = task.doc_to_target(document)
    if not fields or isinstance(target, str):
        return ""
    write = f"write doc_to_target: {fields[0]}, which takes it as it is"
    if isinstance(target, list):
        return f"its answer is {value_of(text)}, which lm-eval reads as a list where it comes from a template: {write}"
    choices = task.doc_to_choice(document)
    if text not in choices or choices.index(text) == target:
        return ""
    return (
        f"its answer is {value_of(text)}, which is choice {choices.index(text)}, and lm-eval takes digits that come "
        f"from a template for the number of a choice: {write}"
    )


def _wrong_prompt(prompt: Any) -> str:
    return f"its prompt is {value_of(prompt)}: a text is needed (doc_to_text)"


def _wrong_choices(task: HarnessTask, document: Document, prompt: Any, *, local: bool) -> str:
    try:
        choices = task.doc_to_choice(document)
    except (ValueError, SyntaxError):  # lm-eval reads what a template gives as a list of Python's
        if not isinstance(task.config.doc_to_choice, str):
            raise
        choices = harness.templates().from_string(task.config.doc_to_choice).render(**document)
    if not isinstance(choices, list | tuple):
        return f"its choices are {value_of(choices)}: a list of texts is needed (doc_to_choice)"
    if not choices:
        return "it has no choices"
    for number, choice in enumerate(choices):
        if not isinstance(choice, str):
            return f"choice {number} is {value_of(choice)}: a text is needed"
        if local and not choice:
            return f"choice {number} is empty"
    if local and len(choices) == 1:
        return f"it has one choice, {value_of(choices[0])}: any answer is right"
    if task.multiple_input:  # the choices are prompts, and the target is what follows each
        if not isinstance(task.doc_to_target(document), str):
            return _wrong_prompt(prompt)
    elif not isinstance(prompt, str):
        return _wrong_prompt(prompt)
    elif local and (wrong := _wrong_list(task.doc_to_target(document), choices)):
        return wrong
    return "" if right_choice(task, document) is not None else _no_choice(right_answer(task, document), choices)


def _wrong_list(answers: Any, choices: Sequence[str]) -> str:
    """What is wrong with several right answers of a question; "" where nothing is, or there is one."""
    if not isinstance(answers, list) or len(answers) < 2:
        return ""
    if any(not isinstance(answer, int) or isinstance(answer, bool) for answer in answers):
        return f"its right answers are {value_of(answers)}: of several the numbers are needed (0 to {len(choices) - 1})"
    # -1 behind a choice fills a list up, and is never answered.
    if none := [answer for answer in answers if answer not in range(len(choices)) and answer != -1]:
        return _no_choice(none[0], choices)
    if len(answers) == len(choices) > 2 and all(answer in (0, 1) for answer in answers):
        return (
            f"its right answers are {value_of(answers)}, a 0 or 1 for each choice where numbers of choices are needed: "
            "write doc_to_target: '{{FIELD.index(1)}}'"
        )
    different = len({repr(answer) for answer in answers})
    return f"each of its {len(choices)} choices is right" if different == len(choices) else ""


def number_of_right(task: HarnessTask, document: Document) -> tuple[int, int]:
    """Which choice of a document is right, by number, and of how many; (0, 2) where it is not said by number."""
    if task.OUTPUT_TYPE != "multiple_choice" or not isinstance(answer := right_answer(task, document), int):
        return 0, 2
    return answer, len(task.doc_to_choice(document))


def _left_over(prompt: str, document: Document) -> str:
    """A field whose name stands in a prompt as a template would have it, and in none of the document's texts."""
    for name in document:
        mark = f"{{{{{name}}}}}"
        if mark in prompt and mark not in json.dumps(document, default=str):
            return name
    return ""


def _no_choice(answer: Any, choices: Sequence[str]) -> str:
    number = int(answer) if isinstance(answer, str) and answer.lstrip("-").isdecimal() else answer
    said = f"its answer is {value_of(answer)}, none of its {len(choices)} choices"
    if isinstance(number, int) and number < 0:
        return f"{said}: {_HIDDEN}"
    if isinstance(answer, list) and not answer:
        return f"its answer is an empty list: {_HIDDEN}"
    if answer is None or answer == "":
        return f"{said}: {_HIDDEN}"
    if isinstance(number, int):
        text = ", as text: write it without quotes, or as {{label}}" if isinstance(answer, str) else ""
        return f"{said} (numbers 0 to {len(choices) - 1}{text})"
    like = [choice for choice in choices if isinstance(answer, str) and _folded(choice) == _folded(answer)]
    near = f", though {value_of(like[0])} is like it" if like else _instead(answer, len(choices))
    return f"{said} ({shown(', '.join(choices))}){near}"


def _instead(answer: Any, choices: int) -> str:
    """How an answer that is the letter of a choice, or its number with a point, is said as a number."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:choices]
    for case in (letters, letters.lower()):
        if isinstance(answer, str) and len(answer) == 1 and answer in case:
            return f": a letter is its number by doc_to_target: \"{{{{'{case}'.index(FIELD)}}}}\""
    if isinstance(answer, float) and answer in range(choices):
        return ": it is the number of a choice by doc_to_target: '{{FIELD|int}}'"
    return ""


def plain(text: str) -> str:
    """A text without what is not seen: white space beyond one space, and the Unicode form of its characters."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def _folded(text: str) -> str:
    return plain(text).casefold()


def _wrong_answer(task: HarnessTask, document: Document) -> str:
    """Of a task whose answer is a text that is written, or scored whole."""
    target = task.doc_to_target(document)
    if task.OUTPUT_TYPE == "generate_until" and task.config.doc_to_choice is not None:
        choices = task.doc_to_choice(document)
        if not isinstance(target, int) or not isinstance(choices, list | tuple) or not 0 <= target < len(choices):
            return f"its answer is {value_of(target)}, not the number of one of its choices, {value_of(choices)}"
        target = choices[target]
    if task.OUTPUT_TYPE == "generate_until" and isinstance(target, list):
        if not target:
            return f"its list of right answers is empty: {_HIDDEN}"
        wrong = [one for one in target if not isinstance(one, str | int | float) or isinstance(one, bool)]
        return f"one of its right answers is {value_of(wrong[0])}: a text is needed" if wrong else ""
    if not isinstance(target, str | numbers.Number | datetime.date | datetime.time) or target != target:
        return f"its answer is {value_of(target)}: a text is needed (doc_to_target)"
    if task.OUTPUT_TYPE == "loglikelihood" and not isinstance(target, str):
        return f"its answer is {value_of(target)}: a text is needed (doc_to_target)"
    return "" if str(target) or task.OUTPUT_TYPE == "generate_until" else "its answer is empty"
