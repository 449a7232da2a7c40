"""A look at a task before anything is trained: what would be wrong in silence, or in each trial, is one line here.

    looked = look(task, tokenizer, Limits(max_length=512, positions=2048, rows=32_000))
    looked.notes                      # what is doubtful and goes on: "4 of 30 rows are cut to max_length=512, …"

Every document of every split that is used makes its prompts and answers (documents.py, nulls.py) and its tokens
(tokens.py), and the right answer of every evaluated one is scored by the task's own metric (scores.py): it must be 1.
Each document is looked at once or twice, so that the time grows with their number and with nothing else. No weights
are needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from allocators.core.errors import StudyError
from trainers.tasks import harness
from trainers.tasks.check import documents, tokens
from trainers.tasks.check.scores import Ending, Text, scores
from trainers.tasks.check.tokens import POSITIONS, Limits
from trainers.tasks.data.origin import Origin
from trainers.tasks.data.read import is_local
from trainers.tasks.evaluation import Questions, Share
from trainers.tasks.harness import Document, HarnessTask
from trainers.tasks.rows import TrainingData, written_answer
from trainers.tasks.splits import Compared
from trainers.tasks.task_file import TaskFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainers.tasks.mixture import AnyTask
    from trainers.tasks.task import Task

UNLIKELY = 1e-3  # chance that answers drawn at random look so

__all__ = ["Limits", "Looked", "first_document", "look"]


@dataclass(frozen=True)
class Looked:
    """What a look at a task gives where nothing is wrong.

    notes      sentences on what is doubtful
    training   tokens of every training row, by data set
    asked      tokens of every sequence of an evaluation, by task and split; of written answers, with the right one
    """

    notes: list[str] = field(default_factory=list)
    training: dict[str, list[int]] = field(default_factory=dict)
    asked: dict[str, list[int]] = field(default_factory=dict)


def look(task: AnyTask, tokenizer: PreTrainedTokenizerBase, limits: Limits, *, trains: bool = True) -> Looked:
    """`trains=False` looks at the evaluated documents alone.

    Raises StudyError with one line, which names task, split and row, for what cannot be trained or scored.

    A split of a public data set may have rows that are only doubtful (choices that are the same): those are noted.
    """
    looked = Looked()
    task.check_tokenizer(tokenizer)
    datasets = task.datasets if trains else ()
    used = [part.training.task for part in datasets] + [part.questions.task for part in task.parts]
    tokens.check_tokenizer(tokenizer, used)
    if limits.asked and limits.positions is not None and limits.max_length > limits.positions:
        raise StudyError(
            f"max_length={limits.max_length} is more than the {limits.positions:,} positions of the model: ask for at "
            "most as many"
        )
    # The evaluated documents first: of them lm-eval takes what a field is, and whether choices are prompts.
    for part in task.parts:
        for counted in [part] if part.test is part else [part, part.test]:
            _look_at_questions(counted, tokenizer, limits, looked)
    for part in datasets:
        _look_at_training(part.training, tokenizer, limits, looked)
    if trains:
        _note_repeated(task, looked)
    return looked


def first_document(file: TaskFile, config: Mapping[str, Any], splits: Mapping[str, Any]) -> str:
    """What is wrong with the first document that a task evaluates, which lm-eval tries while it builds the task."""
    split = config.get("test_split") or config.get("validation_split")
    found = splits.get(str(split), [])
    if config.get("process_docs"):
        found = config["process_docs"](found)
    if not len(found):
        return f"task '{file.label}', split '{split}' has no rows"
    task = harness.unbuilt({**config, "dataset_kwargs": None}, found.features)
    wrong = documents.wrong_with(task, found[0], local=is_local(splits))
    if not wrong and config.get("doc_to_choice") and not all(task.doc_to_choice(found[0])):
        wrong = "a choice is empty"  # lm-eval asks for the first character of each
    place = f" ({found.place(0)})" if hasattr(found, "place") else ""
    return f"task '{file.label}', split '{split}', row 0{place}: {wrong}" if wrong else ""


# --- training ---------------------------------------------------------------------------------------------------------


def _look_at_training(data: TrainingData, tokenizer: PreTrainedTokenizerBase, limits: Limits, looked: Looked) -> None:
    _check_documents(data.task, data.documents, data.origin)
    stop, cut, bare, unknown = data.stop_ids(tokenizer), 0, 0, 0
    lengths = looked.training.setdefault(data.origin.task, [])
    encoded = data.encoded(tokenizer, range(len(data)))
    tokens.check_ids(tokenizer, (ids for pair in encoded for ids in pair), limits)
    for number, (context, completion) in enumerate(encoded):
        if wrong := tokens.wrong_row(context, completion):
            raise StudyError(f"{data.origin.name(number)}: {wrong}")
        length = len(context) + len(completion) + len(stop)
        lengths.append(length)
        dropped = length - limits.max_length
        cut, bare = cut + (dropped > 0), bare + (dropped >= len(context) > 1)  # one token may stand for no prompt
        unknown += tokens.is_unknown(tokenizer, [*context, *completion])
        if limits.positions is not None and min(length, limits.max_length) > limits.positions:
            raise StudyError(
                f"{data.origin.name(number)}: it has {length:,} tokens, and the model has {limits.positions:,} "
                f"positions: set recipe.max_length={limits.positions}, or a shorter row"
            )
    total = f"of {len(encoded):,} training rows of '{data.origin.task}'"
    if bare == len(encoded):
        raise StudyError(
            f"task '{data.origin.task}': none of its {len(encoded):,} training rows keeps any of its prompt with "
            f"max_length={limits.max_length}: set recipe.max_length to {max(lengths)} or so"
        )
    if cut:
        prompts = f", {bare:,} of them {'has' if bare == 1 else 'have'} no prompt left" if bare else ""
        looked.notes.append(
            f"{cut:,} {total} {'is' if cut == 1 else 'are'} cut to max_length={limits.max_length}{prompts}"
        )
    if unknown:
        looked.notes.append(f"{unknown:,} {total} {_have(unknown)} characters that the tokenizer does not know")


def _check_documents(task: HarnessTask, found: Sequence[Document], origin: Origin) -> None:
    """Raises StudyError for the first document that makes no question with a right answer."""
    for number, document in enumerate(found):
        if wrong := documents.wrong_with(task, document, local=origin.local):
            raise StudyError(f"{origin.name(number)}: {wrong}")


def _note_repeated(task: AnyTask, looked: Looked) -> None:
    """Says how many questions are trained on, by their own task or another, or selected on and tested on."""
    trained = [(other, Compared(other.training.task, other.training.documents)) for other in task.datasets]
    for part in task.parts:
        tested = Compared(part.test.questions.task, part.test.questions.documents)
        selected = Compared(part.questions.task, [] if part.test is part else part.questions.documents)
        for other, rows in trained:
            are = "training row{}" if other.training is part.training else f"training row{{}} of '{other.label}'"
            _note_shared(f"'{part.label}' is tested on", tested, rows, are, looked)
            _note_shared(f"'{part.label}' is selected on", selected, rows, are, looked)
        _note_shared(f"'{part.label}' is selected on", selected, tested, "test row{}", looked)


def _note_shared(what: str, questions: Compared, others: Compared, are: str, looked: Looked) -> None:
    if repeated := questions.among(others):
        said = f"is a {are.format('')}" if repeated == 1 else f"are {are.format('s')}"
        of = f"{repeated:,} of {len(questions.documents):,} rows that {what}"
        looked.notes.append(f"{of} {said} too, word for word")


def _check_examples(task: Task) -> None:
    """Raises StudyError for a solved example without a right answer. Training documents are looked at as such."""
    questions = task.questions
    if harness.examples_have_a_form_of_their_own(questions.task):
        return
    for number, example in enumerate(harness.examples_of(questions.task)):
        if wrong := documents.wrong_with(questions.task, example, local=questions.origin.local):
            raise StudyError(f"task '{task.label}', example {number} of its few-shot examples: {wrong}")


# --- evaluation -------------------------------------------------------------------------------------------------------


def _look_at_questions(task: Task, tokenizer: PreTrainedTokenizerBase, limits: Limits, looked: Looked) -> None:
    questions = task.questions
    origin, positions = questions.origin, limits.positions or POSITIONS
    _check_documents(questions.task, questions.documents, origin)
    end = None
    if questions.task.OUTPUT_TYPE == "generate_until":
        end = tokens.ending(task.label, questions.task, limits)
        tokens.check_writing(task.label, questions.task, tokenizer)
    if task.num_fewshot and task.test is task:
        _check_examples(task)
    share = task.prepare(tokenizer)
    _note_prompts(questions, share, looked)
    lengths = looked.asked.setdefault(f"{task.label}, {origin.split}", [])
    if end is not None:
        texts = _written(task, share, tokenizer, end, limits, looked, lengths)
        if task.trains_on_other_data:  # the answers that are trained have another form than the reference
            return
    else:
        _check_choices(questions, share, tokenizer, limits, looked, lengths)
        texts = {}
    long = sum(length > positions + 1 for length in lengths)
    if long and end is None:
        looked.notes.append(
            f"{long:,} of {len(lengths):,} sequences of '{task.label}', split '{origin.split}', lose their beginning: "
            f"the model takes {positions} tokens"
        )
    _check_scores(questions, scores(questions, share, texts), texts, looked)


def _note_prompts(questions: Questions, share: Share, looked: Looked) -> None:
    """Says what is doubtful in the texts of all questions together: it scores, and was hardly meant."""
    origin, total = questions.origin, len(share.documents)
    of = f"rows of '{origin.task}', split '{origin.split}'"
    said = questions.task.config.doc_to_text
    written = isinstance(said, str) and said.strip() and not any(mark in said for mark in ("{{", "{%", "{#"))
    if written and total > 1 and all(said not in requests[0].doc for requests in share.documents.values()):
        looked.notes.append(f"all {total:,} {of}, have the same prompt: doc_to_text names a field as {{{{field}}}}")
    elif total > 1 and len({repr([request.args[:2] for request in some]) for some in share.documents.values()}) == 1:
        looked.notes.append(f"all {total:,} {of}, are the same question, whatever their answers are")
    lists = sum(
        any(isinstance(value, list) and repr(value) in requests[0].args[0] for value in requests[0].doc.values())
        for requests in share.documents.values()
    )
    if lists:
        looked.notes.append(f"{lists:,} of {total:,} {of}, write a list as Python does: join its parts in doc_to_text")
    if questions.task.OUTPUT_TYPE == "generate_until":
        return
    pairs = (request.args[:2] for requests in share.documents.values() for request in requests[:1])
    spaced = sum(
        len(one) - len(one.rstrip(" ")) + len(other) - len(other.lstrip(" ")) > 1
        for one, other in pairs
        if other.strip()
    )
    if spaced:
        looked.notes.append(
            f"prompt and answer are joined by two spaces in {spaced:,} of {total:,} {of}: doc_to_text ends with one, "
            "target_delimiter is one, or the choices begin with one"
        )
    rights = [documents.number_of_right(questions.task, questions.documents[number]) for number in share.documents]
    never = math.prod(1 - 1 / choices for _, choices in rights)
    if rights and never < UNLIKELY and all(right > 0 for right, _ in rights):
        looked.notes.append(f"choice 0 is right in none of {total:,} {of}: are their answers counted from 1?")


def _check_choices(
    questions: Questions,
    share: Share,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    looked: Looked,
    lengths: list[int],
) -> None:
    """Tokens of questions whose answers are scored and not written."""
    assert share.tokens is not None
    origin, place, doubtful, alike = questions.origin, 0, 0, 0
    tokens.check_ids(tokenizer, (ids for _, *pair in share.tokens for ids in pair), limits)
    for number, requests in share.documents.items():
        pairs = []
        for request in requests:
            _, context, continuation = share.tokens[place]
            pairs.append((context, continuation))
            lengths.append(len(context) + len(continuation))
            place += request.repeats
        wrong = tokens.wrong_question(pairs, limits.positions or POSITIONS, local=origin.local)
        if wrong:
            unknown = any(tokens.is_unknown(tokenizer, ids) for _, ids in pairs)
            raise StudyError(f"{origin.name(number)}: {wrong}{' (unknown characters)' if unknown else ''}")
        same = len(pairs) - len({(tuple(one), tuple(other)) for one, other in pairs})
        doubtful += same > 0
        alike += len(requests) - len({documents.plain("".join(request.args[:2])) for request in requests}) > same
    if doubtful:
        looked.notes.append(
            f"{doubtful:,} of {len(share.documents):,} rows of '{origin.task}', split '{origin.split}', "
            f"{_have(doubtful)} two choices that are the same tokens"
        )
    if alike:
        looked.notes.append(
            f"{alike:,} of {len(share.documents):,} rows of '{origin.task}', split '{origin.split}', {_have(alike)} "
            "two choices that differ in white space or Unicode form alone"
        )


def _written(
    task: Task,
    share: Share,
    tokenizer: PreTrainedTokenizerBase,
    end: Ending,
    limits: Limits,
    looked: Looked,
    lengths: list[int],
) -> dict[int, Text]:
    """The right answer of every document as the evaluation would see it if it were written."""
    questions, origin = task.questions, task.questions.origin
    prompts = {number: requests[0].args[0] for number, requests in share.documents.items()}
    read = tokens.encode_prompts(tokenizer, list(prompts.values()))
    for number, prompt in zip(prompts, read, strict=True):
        if not prompt:
            raise StudyError(f"{origin.name(number)}: its prompt is empty")
    answers = [
        written_answer(questions.task, questions.documents[number], in_conversation=task.chat_template)
        for number in prompts
    ]
    with harness.quiet():
        pairs = harness.tokenise(tokenizer, list(zip(prompts.values(), answers, strict=True)), task.batch_size)
    tokens.check_ids(tokenizer, [*read, *(ids for pair in pairs for ids in pair)], limits)
    texts, room, long = {}, (limits.positions or POSITIONS) - end.most, 0
    least = questions.task.config.generation_kwargs.get("min_new_tokens") or 0
    for number, prompt, (context, completion) in zip(prompts, read, pairs, strict=True):
        if not completion:
            raise StudyError(f"{origin.name(number)}: its right answer has no tokens")
        if len(completion) < least:
            said = f"its right answer has {len(completion)} tokens, fewer than min_new_tokens={least}"
            raise StudyError(f"{origin.name(number)}: {said}")
        long += len(prompt) > room
        lengths.append(len(context) + len(completion))
        texts[number] = end.of(completion, tokenizer)
    if long:
        looked.notes.append(
            f"{long:,} of {len(prompts):,} prompts of '{task.label}', split '{origin.split}', lose their beginning: "
            f"beside max_gen_toks={end.most} the model takes {room} tokens"
        )
    return texts


def _check_scores(
    questions: Questions, found: Mapping[int, float | str], texts: Mapping[int, Text], looked: Looked
) -> None:
    """Raises StudyError for a right answer that scores less than 1; notes where a written one does for its form."""
    origin, metric = questions.origin, questions.metric
    if not found:
        raise StudyError(f"task '{origin.task}', split '{origin.split}': no row has a score called {metric}")
    failed = {number: score for number, score in found.items() if isinstance(score, str) or not score >= 1 - 1e-9}
    scored = {number: score for number, score in found.items() if isinstance(score, float)}
    if strange := [number for number, score in scored.items() if not math.isfinite(score)]:
        raise StudyError(f"{origin.name(strange[0])}: its right answer scores {scored[strange[0]]} by {metric}")
    if (most := max(scored, key=scored.__getitem__, default=None)) is not None and scored[most] > 1 + 1e-9:
        said = f"{origin.name(most)}: its right answer scores {scored[most]:g} by {metric}"
        looked.notes.append(f"{said}: accuracies are shown as the metric gives them, and not as a share of 1")
    if not failed:
        return
    number, score = next(((n, s) for n, s in failed.items() if isinstance(s, str)), next(iter(failed.items())))
    if isinstance(score, str):
        raise StudyError(f"{origin.name(number)}: its right answer cannot be scored by {metric}: {score}")
    if not texts:
        if metric.startswith(("acc", "exact_match")):
            raise StudyError(f"{origin.name(number)}: its right answer scores {score:g} by {metric}")
        return
    number = next((n for n in failed if texts[n].cut), number)
    text = texts[number]
    said = f"{origin.name(number)}: its right answer, {text.seen!r}, scores {failed[number]:g} by {metric}"
    if origin.local and (text.cut or len(failed) < len(found)):
        raise StudyError(f"{said}: {text.cut or 'answers of other rows score 1'}")
    many = f" ({len(failed):,} of {len(found):,} rows do)" if len(failed) > 1 else ""
    looked.notes.append(f"{said}{many}: {text.cut or _form(questions, text)}")


def _form(questions: Questions, text: Text) -> str:
    """What would make a right answer count, where its form does not suit the metric."""
    delimiter = questions.task.config.target_delimiter
    if delimiter.isspace() and text.seen[: len(delimiter)] == delimiter:
        return "set target_delimiter: '' in the task file, or a filter (remove_whitespace)"
    return "see doc_to_target, filter_list and metric_list in the task file"


def _have(count: int) -> str:
    return "has" if count == 1 else "have"
