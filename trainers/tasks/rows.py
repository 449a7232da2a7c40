"""What is trained: the documents of a data set as prompts with their right answers, in tokens.

    data = TrainingData("arc_easy", task, limit=None, seed=0, chat_template=False, batch_size=32)
    data.rows(tokenizer, max_length=512)                            # every document, in the order of the split
    data.prompts(tokenizer, samples=256, seed=0, max_length=512)    # token ids of some, for calibration

A row is tokenised as the evaluation tokenises its question, so that what is trained is what is scored.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from allocators.core.errors import StudyError
from trainers.tasks import harness
from trainers.tasks.data.origin import Origin
from trainers.tasks.harness import Document, HarnessTask, Messages, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Row:
    """One training sequence. Tokens from `labels_start` on are the completion, the others carry no loss."""

    input_ids: list[int]
    labels_start: int

    @property
    def completion_tokens(self) -> int:
        """The number of tokens that carry a loss."""
        return len(self.input_ids) - self.labels_start


class TrainingData:
    """The training documents of one task, or of several that name the same ones, and their rows of tokens.

    limit   at most so many documents, drawn with `seed`; None: all
    keep    whether the document at a place may be trained on, as what is held out may not; None: all of them

    Raises StudyError where nothing is left to train on.
    """

    def __init__(
        self,
        name: str,
        task: HarnessTask,
        *,
        limit: int | None,
        seed: int,
        chat_template: bool,
        batch_size: int,
        keep: Callable[[int, Document], bool] | None = None,
    ) -> None:
        self.name = name
        self.task = task
        self.batch_size = batch_size
        self.chat_template = chat_template
        # Indexed where they lie: a data set of a million documents is not copied into lists of Python's.
        self._all = task.training_docs()
        if not len(self._all):
            raise StudyError(f"the training split of task '{name}' is empty")
        self._chosen = self._choose(limit, seed, keep)
        if not self._chosen:
            raise StudyError(
                f"nothing is left to train task '{name}' on: each of its {len(self._all):,} training documents is held "
                "out, or repeats one that is: make held_out smaller, or take select_on=test"
            )
        self._rows: dict[tuple[int, int], list[Row]] = {}

    def _choose(self, limit: int | None, seed: int, keep: Callable[[int, Document], bool] | None) -> Sequence[int]:
        """Places of the documents that are trained on, in order."""
        places = range(len(self._all))
        if keep is None:
            return sorted(random.Random(seed).sample(places, limit)) if limit and limit < len(places) else places
        # All in the order drawn, until there are enough: a large data set is not read to its end for a small limit.
        drawn: Sequence[int] = random.Random(seed).sample(places, len(places)) if limit else places
        return sorted(islice((i for i in drawn if keep(i, self._all[i])), limit))

    def __len__(self) -> int:
        return len(self._chosen)

    @property
    def documents(self) -> list[Document]:
        """The documents that are trained on, in their order."""
        return [self._all[i] for i in self._chosen]

    def rows(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
        """Every document as tokens, in the order of the split; made once. Long rows lose their beginning.

        Raises StudyError naming a document whose right answer is not among its choices.
        """
        key = (id(tokenizer), max_length)
        if key not in self._rows:
            self._rows[key] = self._some_rows(range(len(self)), tokenizer, max_length)
        return self._rows[key]

    def prompts(self, tokenizer: PreTrainedTokenizerBase, samples: int, seed: int, max_length: int) -> list[list[int]]:
        """Tokens (prompt and completion) of `samples` documents drawn with `seed`."""
        chosen = random.Random(seed).sample(range(len(self)), min(samples, len(self)))
        return [row.input_ids for row in self._some_rows(chosen, tokenizer, max_length)]

    def _some_rows(self, indices: Sequence[int], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
        stop = self.stop_ids(tokenizer)
        rows = []
        for context, completion in self.encoded(tokenizer, indices):
            ids = [*context, *completion, *stop]
            dropped = max(0, len(ids) - max_length)
            # The first token has nothing before it that could predict it.
            rows.append(Row(ids[dropped:], max(1, len(context) - dropped)))
        return rows

    def encoded(self, tokenizer: PreTrainedTokenizerBase, indices: Sequence[int]) -> list[Tokens]:
        """Prompt and completion of some documents, in full and without what ends a generated answer."""
        messages = harness.chat_template(tokenizer, self.batch_size) if self.chat_template else None
        return harness.tokenise(tokenizer, [self._pair(i, messages) for i in indices], self.batch_size)

    @property
    def origin(self) -> Origin:
        """Where the documents come from."""
        config = self.task.config
        return Origin.of(self.task, config.task, config.training_split, self._chosen)

    def _pair(self, index: int, messages: Messages | None) -> tuple[str, str]:
        """Prompt and completion of a training document: the request of its right answer."""
        task, doc = self.task, self._all[self._chosen[index]]
        prefix = task.doc_to_prefix(doc)
        context = task.fewshot_context(doc, num_fewshot=0, gen_prefix=prefix, **harness.conversation(messages))
        if task.OUTPUT_TYPE == "generate_until":
            return context, written_answer(task, doc, in_conversation=messages is not None)
        requests = task.construct_requests(
            doc=doc,
            ctx=context,
            metadata=(self.name, index, 1),
            apply_chat_template=messages is not None,
            chat_template=messages,
        )
        request = requests[self._right_choice(doc, index)] if isinstance(requests, list) else requests
        prompt, answer, *_ = request.args
        return prompt, answer

    def _right_choice(self, doc: Document, index: int) -> int:
        """Which of a document's choices is right. Raises StudyError where none is."""
        choice = right_choice(self.task, doc)
        if choice is None:
            raise StudyError(
                f"training document {index} of task '{self.name}' has the answer {right_answer(self.task, doc)!r}, "
                f"which is none of its {len(self.task.doc_to_choice(doc))} choices: correct the document or "
                "doc_to_target"
            )
        return choice

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Tokens after a generated answer, so that a model learns to stop."""
        if self.task.OUTPUT_TYPE != "generate_until":
            return []
        if tokenizer.eos_token_id is not None:
            return [tokenizer.eos_token_id]
        until = self.task.config.generation_kwargs["until"]
        ids: list[int] = tokenizer.encode(until if isinstance(until, str) else until[0], add_special_tokens=False)
        return ids


def written_answer(task: HarnessTask, doc: Document, *, in_conversation: bool) -> str:
    """The text that a model should generate behind the prompt; of several right ones the first."""
    target = task.doc_to_target(doc)
    if task.config.doc_to_choice is not None and isinstance(target, int):
        target = task.doc_to_choice(doc)[target]
    # In a conversation the answer begins its own turn, as lm-eval has it for choices.
    delimiter = "" if in_conversation and not task.doc_to_prefix(doc) else task.config.target_delimiter
    return f"{delimiter}{target[0] if isinstance(target, list) else target}"


def right_choice(task: HarnessTask, doc: Document) -> int | None:
    """Which of a document's choices is right, the first of several; None where its answer is no choice."""
    answer, choices = right_answer(task, doc), task.doc_to_choice(doc)
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    return answer if isinstance(answer, int) and 0 <= answer < len(choices) else None


def right_answer(task: HarnessTask, doc: Document) -> Any:
    """What a document says that its right answer is: the number of a choice, or its text."""
    answer = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    return answer[0] if isinstance(answer, list) and answer else answer
