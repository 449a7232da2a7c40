"""Where the documents of a task come from, for messages: `task 'quiz', split 'test', row 3 (test.jsonl, line 4)`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainers.tasks.data.read import Documents, is_local
from trainers.tasks.harness import HarnessTask


@dataclass(frozen=True)
class Origin:
    """Documents of a split, or of some places in it.

    places   None: all of them, in order
    lines    the split as it was read, where a row has a line of a file
    local    whether they are of files that their owner can correct, and not of a public data set
    """

    task: str
    split: str
    places: Sequence[int] | None
    lines: Documents | None
    local: bool

    @classmethod
    def of(cls, task: HarnessTask, name: str, split: str, places: Sequence[int] | None) -> Origin:
        """Of documents that the task has under that split; after a `process_docs` a row has no line."""
        rows = task.dataset.get(split) if task.config.process_docs is None else None
        return cls(name, split, places, rows if isinstance(rows, Documents) else None, is_local(task.dataset))

    def row(self, number: int) -> int:
        """The row of the split that document `number` is; the first is row 0."""
        return number if self.places is None else self.places[number]

    def name(self, number: int) -> str:
        """The document in words."""
        row = self.row(number)
        line = f" ({self.lines.place(row)})" if self.lines is not None and row < len(self.lines) else ""
        return f"task '{self.task}', split '{self.split}', row {row}{line}"
