"""Scores the right answer of every document by the task's own metric: what cannot be right once trained is wrong now.

    for number, wrong in wrong_scores(questions, share, written): ...     # (3, "scores 0 by acc")

A choice is right with all probability on it; where text is written, the text that is trained is the answer, cut as the
evaluation cuts it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from allocators.core import plugins
from allocators.core.errors import FAULTS
from trainers.tasks import harness
from trainers.tasks.evaluation import Questions, Share
from trainers.tasks.harness import Request
from trainers.tasks.rows import right_choice
from trainers.tasks.task_file import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Log-likelihoods: of the right answer, not 0, which is right whatever it is divided by; and of all others.
RIGHT, WRONG = -1.0, -1e6


@dataclass(frozen=True)
class Text:
    """A written answer: what of it the evaluation sees, and what cut it there ("": nothing did)."""

    seen: str
    cut: str = ""


@dataclass(frozen=True)
class Ending:
    """Where an evaluation stops to write, as the task file says it.

    most    tokens
    stops   texts
    """

    most: int
    stops: tuple[str, ...]

    def of(self, tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> Text:
        """What lm-eval makes of an answer that is written token by token."""
        whole = str(tokenizer.decode(tokens, skip_special_tokens=True))
        if len(tokens) > self.most:
            return Text(
                str(tokenizer.decode(tokens[: self.most], skip_special_tokens=True)),
                f"cut after max_gen_toks={self.most} of its {len(tokens)} tokens",
            )
        stop = next((stop for stop in self.stops if stop in whole), None)
        if stop is None:
            return Text(whole)
        seen = whole
        for one in self.stops:
            seen = seen.split(one)[0]
        return Text(seen, f"cut at the stop string {stop!r}")


def scores(questions: Questions, share: Share, texts: Mapping[int, Text]) -> dict[int, float | str]:
    """By document, the score of its right answer, or why it has none: no other is scored behind the first of these.

    A document without a score is left out.

    texts   of a task that writes its answers, the right one of every document
    """
    try:
        with plugins.watched(None, "scoring right answers", ends=True):
            return dict(_scores(questions, share.documents, texts))
    except FAULTS:  # one document's: which one, and why, is found by asking one by one; or there are many
        found: dict[int, float | str] = {}
        for number, requests in share.documents.items():
            found |= _alone(questions, number, requests, texts)
            if isinstance(found.get(number), str):  # a pattern that looks for ever would do so in every row
                break
        return found


def _alone(
    questions: Questions, number: int, requests: list[Request], texts: Mapping[int, Text]
) -> Mapping[int, float | str]:
    try:
        with plugins.watched(None, "scoring a right answer", ends=True):  # a filter's pattern may look for ever
            return _scores(questions, {number: requests}, texts)
    except FAULTS as error:  # a user's function, or lm-eval on an answer that it did not expect
        return {number: one_line(error)}


def _scores(
    questions: Questions, documents: Mapping[int, list[Request]], texts: Mapping[int, Text]
) -> dict[int, float]:
    with harness.quiet():
        return harness.scores_of(
            questions.task,
            documents,
            _right_answers(questions, documents, texts),
            metric=questions.metric,
            filtered=questions.filtered,
        )


def _right_answers(
    questions: Questions, documents: Mapping[int, list[Request]], texts: Mapping[int, Text]
) -> Iterator[tuple[Request, Any]]:
    task = questions.task
    for number, requests in documents.items():
        right = right_choice(task, requests[0].doc) if task.OUTPUT_TYPE == "multiple_choice" else 0
        for place, request in enumerate(requests):
            answer: Any = (
                texts[number].seen if number in texts else (RIGHT if place == right else WRONG, place == right)
            )
            for _ in range(request.repeats):
                yield request, answer
