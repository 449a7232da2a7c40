"""The evaluation of one task: a worker's share of the questions, and what comes of all shares.

    share = Share.of(task, requests, tokenizer, rank=0, world_size=1, batch_size=32)
    counted, failed = gathered(counted, total=300, failed=False, device=model.device)     # of all workers
    Evaluation(accuracy=0.41, stderr=0.01, correct=(1.0, 0.0, …), metric="acc", seconds=3.2, loss=1.13)

A score is the metric of one document, usually 0 or 1, and goes by the document's number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trainers.tasks import harness
from trainers.tasks.data.origin import Origin
from trainers.tasks.harness import Document, HarnessTask, Request
from trainers.tasks.rows import right_choice

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Evaluation:
    """accuracy and its standard error over documents, the score of every document in order, the metric's name.

    loss    Σ -log p / Σ tokens over the right answers of all documents, nats a token; None where a model writes its
            answers, and where the right answer to a document is not among those that were scored
    parts   evaluation of each task of a mixture, by its label; empty for a single task
    """

    accuracy: float
    stderr: float
    correct: tuple[float, ...]
    metric: str
    seconds: float
    loss: float | None = None
    parts: Mapping[str, Evaluation] = field(default_factory=dict)

    @property
    def by_task(self) -> dict[str, dict[str, float]]:
        """`{"arc_easy": {"accuracy": 0.41, "stderr": 0.01}}`, for records."""
        return {label: {"accuracy": part.accuracy, "stderr": part.stderr} for label, part in self.parts.items()}


@dataclass(frozen=True)
class Questions:
    """The documents that a task evaluates, before they are asked.

    metric, filtered   what accuracy is, after which filter
    """

    task: HarnessTask
    documents: Sequence[Document]
    origin: Origin
    metric: str
    filtered: str


@dataclass(frozen=True)
class Counted:
    """What was counted on each document, by its number.

    scores   the metric; a task may give a document none
    nats     -log p of the right answer, and its tokens; a document whose right answer was not scored has none
    """

    scores: Mapping[int, float] = field(default_factory=dict)
    nats: Mapping[int, tuple[float, int]] = field(default_factory=dict)

    def loss(self, total: int) -> float | None:
        """`Evaluation.loss` over `total` documents."""
        if len(self.nats) < total:
            return None
        nats = sum(self.nats[i][0] for i in sorted(self.nats))
        return nats / sum(tokens for _, tokens in self.nats.values())


@dataclass(frozen=True)
class Share:
    """One worker's share of the evaluation.

    asked       its requests, each as often as the task repeats it
    tokens      (prompt and continuation, tokens of each) of every request; None where text is generated
    documents   its requests by document
    right       by document, the place in `asked` of the request with its right answer, and that answer's tokens
    """

    tokenizer: PreTrainedTokenizerBase
    rank: int
    world_size: int
    asked: list[Request]
    tokens: list[tuple[tuple[str, str], list[int], list[int]]] | None
    documents: dict[int, list[Request]]
    right: dict[int, tuple[int, int]]

    @classmethod
    def of(
        cls,
        task: HarnessTask,
        requests: Sequence[Request],
        tokenizer: PreTrainedTokenizerBase,
        *,
        rank: int,
        world_size: int,
        batch_size: int,
    ) -> Share:
        """The requests of every `world_size`-th document of the task, tokenised."""
        share = [request for request in requests if request.doc_id % world_size == rank]
        # As lm-eval does: a request is asked as often as the task repeats it.
        asked = [request for request in share for _ in range(request.repeats)]
        tokens = None
        if task.OUTPUT_TYPE != "generate_until":
            pairs: list[tuple[str, str]] = [request.args[:2] for request in asked]
            encoded = harness.tokenise(tokenizer, pairs, batch_size)
            tokens = [(pair, *ids) for pair, ids in zip(pairs, encoded, strict=True)]
        documents: dict[int, list[Request]] = {}
        for request in share:
            documents.setdefault(request.doc_id, []).append(request)
        right = _right_answers(task, documents, [len(ids) for *_, ids in tokens]) if tokens is not None else {}
        return cls(tokenizer, rank, world_size, asked, tokens, documents, right)

    def fits(self, tokenizer: PreTrainedTokenizerBase, rank: int, world_size: int) -> bool:
        """Whether it was made for this tokenizer and this worker."""
        return self.tokenizer is tokenizer and (self.rank, self.world_size) == (rank, world_size)


def _right_answers(
    task: HarnessTask, documents: Mapping[int, Sequence[Request]], lengths: Sequence[int]
) -> dict[int, tuple[int, int]]:
    """`Share.right`, of the tokens that each request that is asked continues its prompt with."""
    right: dict[int, tuple[int, int]] = {}
    place = 0  # in the requests as they are asked: document by document, each as often as it is repeated
    for doc_id, requests in documents.items():
        choice = right_choice(task, requests[0].doc) if task.OUTPUT_TYPE == "multiple_choice" else 0
        for number, request in enumerate(requests):
            if number == choice:
                right[doc_id] = (place, lengths[place])
            place += request.repeats
    return right


def gathered(counted: Counted, total: int, *, failed: bool, device: torch.device) -> tuple[Counted, bool]:
    """What all workers counted, and whether any worker failed.

    One sum over a table [score, known, nats, tokens] per document; all workers call this together. `total` is the
    number of documents.
    """
    import torch
    import torch.distributed as dist

    table = torch.zeros(4, total + 1, dtype=torch.float64)
    for doc_id, score in counted.scores.items():
        table[0, doc_id], table[1, doc_id] = score, 1.0
    for doc_id, (nats, tokens) in counted.nats.items():
        table[2, doc_id], table[3, doc_id] = nats, tokens
    table[0, total] = float(failed)
    table = table.to(device)
    dist.all_reduce(table)
    scores, known, all_nats, all_tokens = table.tolist()
    of_all = Counted(
        {i: scores[i] for i in range(total) if known[i]},
        {i: (all_nats[i], int(all_tokens[i])) for i in range(total) if all_tokens[i]},
    )
    return of_all, scores[total] > 0
