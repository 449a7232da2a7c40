"""Several tasks as one: their rows together, an accuracy each, and the mean of those.

    mixture = load_task("[arc_easy,openbookqa]")
    mixture.evaluate(model).by_task                # an accuracy each; .accuracy is their mean

A mixture answers what a task answers (trainers/tasks/task.py), and `sizes` describes either.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING

from trainers.tasks.evaluation import Evaluation
from trainers.tasks.rows import Row
from trainers.tasks.task import Task

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


class Mixture:
    """Several tasks as one: their rows to train on, an accuracy each, and the mean of those."""

    def __init__(self, name: str, parts: Sequence[Task]) -> None:
        self.name = name
        self.parts = tuple(parts)
        self._rows: dict[tuple[int, int], list[Row]] = {}

    @property
    def datasets(self) -> tuple[Task, ...]:
        """One task for every data set that is trained on: the first of those that share it."""
        first: dict[int, Task] = {}
        for part in self.parts:
            first.setdefault(id(part.training), part)
        return tuple(first.values())

    @property
    def metric(self) -> str:
        """`acc`, or `mean of acc, acc_norm` where tasks differ."""
        names = list(dict.fromkeys(part.metric for part in self.parts))
        return names[0] if len(names) == 1 else f"mean of {', '.join(names)}"

    @functools.cached_property
    def test(self) -> Mixture:
        """The same tasks counted on their test splits; the mixture itself where they are counted on these."""
        if all(part.test is part for part in self.parts):
            return self
        return Mixture(self.name, [part.test for part in self.parts])

    @property
    def split(self) -> str:
        """What accuracy is counted on, in words: `test split`, or by task where they differ."""
        words = {part.label: part.split for part in self.parts}
        one, *others = dict.fromkeys(words.values())
        return "; ".join(f"{label}: {split}" for label, split in words.items()) if others else one

    @functools.cached_property
    def data_hash(self) -> str:
        """16 hex digits over the tasks' hashes, in their order."""
        text = json.dumps([[part.label, part.metric, part.data_hash] for part in self.parts])
        return sha256(text.encode()).hexdigest()[:16]

    @property
    def num_training(self) -> int:
        """The number of training documents over all tasks; those that several tasks share count once."""
        return sum(part.num_training for part in self.datasets)

    @property
    def num_evaluation(self) -> int:
        """The number of questions over all tasks."""
        return sum(part.num_evaluation for part in self.parts)

    @property
    def chance(self) -> float | None:
        """Mean of the tasks' chances; None where one has none."""
        chances = [part.chance for part in self.parts]
        return None if None in chances else sum(chance or 0.0 for chance in chances) / len(chances)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises StudyError as a single task does."""
        self.parts[0].check_tokenizer(tokenizer)

    def training_rows(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
        """The rows of every data set, one after another; see `Task.training_rows`."""
        key = (id(tokenizer), max_length)
        if key not in self._rows:
            self._rows[key] = [row for part in self.datasets for row in part.training_rows(tokenizer, max_length)]
        return self._rows[key]

    def prompts(
        self, tokenizer: PreTrainedTokenizerBase, samples: int, seed: int, *, max_length: int = 512
    ) -> list[list[int]]:
        """An equal share of `samples` from every data set (all it has, where that is less), for calibration."""
        share, rest = divmod(samples, len(self.datasets))
        return [
            prompt
            for place, part in enumerate(self.datasets)
            for prompt in part.prompts(tokenizer, share + (place < rest), seed, max_length=max_length)
        ]

    def prepare(self, tokenizer: PreTrainedTokenizerBase, *, rank: int = 0, world_size: int = 1) -> None:
        """See `Task.prepare`."""
        for part in self.parts:
            part.prepare(tokenizer, rank=rank, world_size=world_size)

    def evaluate(self, model: nn.Module) -> Evaluation:
        """accuracy = Σ_k a_k / K over the K tasks and its standard error √(Σ_k SE_k²) / K; see `Task.evaluate`.

        The loss is the mean of theirs too; None where one has none.
        """
        done = {part.label: part.evaluate(model) for part in self.parts}
        losses = [e.loss for e in done.values() if e.loss is not None]
        return Evaluation(
            accuracy=math.fsum(e.accuracy for e in done.values()) / len(done),
            stderr=math.hypot(*(e.stderr for e in done.values())) / len(done),
            correct=tuple(score for e in done.values() for score in e.correct),
            metric=self.metric,
            seconds=sum(e.seconds for e in done.values()),
            loss=math.fsum(losses) / len(done) if len(losses) == len(done) else None,
            parts=done,
        )


AnyTask = Task | Mixture


def sizes(task: AnyTask) -> str:
    """What is trained, selected and tested on, in one line.

    `7,208 rows to train on (arc_easy 2,251, openbookqa 4,957); accuracy is the mean over arc_easy (570 × acc), ...;
    selected on arc_easy: validation split (570 questions); ...; tested on arc_easy (2,376), openbookqa (500)`
    """
    rows = ", ".join(f"{part.label} {part.num_training:,}" for part in task.datasets)
    shared = len(task.parts) > len(task.datasets)
    counted = ", ".join(
        f"{part.label} ({part.num_evaluation:,} × {part.metric}"
        f"{f', {part.num_fewshot} examples before each' if part.num_fewshot else ''})"
        for part in task.parts
    )
    tested = ", ".join(f"{part.label} ({part.num_evaluation:,})" for part in task.test.parts)
    return (
        f"{task.num_training:,} rows to train on ({rows}{', shared by the tasks that name it' if shared else ''}); "
        f"accuracy {'is the mean over' if len(task.parts) > 1 else 'on'} {counted}; selected on {task.split}; "
        f"tested on {'the same' if task.test is task else tested}"
    )
