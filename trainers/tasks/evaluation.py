"""The evaluation of one task: a worker's share of the questions, and what comes of all shares.

    share = Share.of(requests, tokenizer, rank=0, world_size=1, generates=False, batch_size=32)
    scores, failed = gathered(scores, total=300, failed=False, device=model.device)     # of all workers
    Evaluation(accuracy=0.41, stderr=0.01, correct=(1.0, 0.0, …), metric="acc", seconds=3.2)

A score is the metric of one document, usually 0 or 1, and goes by the document's number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trainers.tasks import harness
from trainers.tasks.harness import Request

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Evaluation:
    """accuracy and its standard error over documents, the score of every document in order, the metric's name.

    parts   evaluation of each task of a mixture, by its label; empty for a single task
    """

    accuracy: float
    stderr: float
    correct: tuple[float, ...]
    metric: str
    seconds: float
    parts: Mapping[str, Evaluation] = field(default_factory=dict)

    @property
    def by_task(self) -> dict[str, dict[str, float]]:
        """`{"arc_easy": {"accuracy": 0.41, "stderr": 0.01}}`, for records."""
        return {label: {"accuracy": part.accuracy, "stderr": part.stderr} for label, part in self.parts.items()}


@dataclass(frozen=True)
class Share:
    """One worker's share of the evaluation.

    asked       its requests, each as often as the task repeats it
    tokens      (prompt and continuation, tokens of each) of every request; None where text is generated
    documents   its requests by document
    """

    tokenizer: PreTrainedTokenizerBase
    rank: int
    world_size: int
    asked: list[Request]
    tokens: list[tuple[tuple[str, str], list[int], list[int]]] | None
    documents: dict[int, list[Request]]

    @classmethod
    def of(
        cls,
        requests: Sequence[Request],
        tokenizer: PreTrainedTokenizerBase,
        *,
        rank: int,
        world_size: int,
        generates: bool,
        batch_size: int,
    ) -> Share:
        """The requests of every `world_size`-th document, tokenised."""
        share = [request for request in requests if request.doc_id % world_size == rank]
        # As lm-eval does: a request is asked as often as the task repeats it.
        asked = [request for request in share for _ in range(request.repeats)]
        tokens = None
        if not generates:
            pairs: list[tuple[str, str]] = [request.args[:2] for request in asked]
            encoded = harness.tokenise(tokenizer, pairs, batch_size)
            tokens = [(pair, *ids) for pair, ids in zip(pairs, encoded, strict=True)]
        documents: dict[int, list[Request]] = {}
        for request in share:
            documents.setdefault(request.doc_id, []).append(request)
        return cls(tokenizer, rank, world_size, asked, tokens, documents)

    def fits(self, tokenizer: PreTrainedTokenizerBase, rank: int, world_size: int) -> bool:
        """Whether it was made for this tokenizer and this worker."""
        return self.tokenizer is tokenizer and (self.rank, self.world_size) == (rank, world_size)


def gathered(
    scores: Mapping[int, float], total: int, *, failed: bool, device: torch.device
) -> tuple[dict[int, float], bool]:
    """Scores of all workers by document, and whether any worker failed.

    One sum over a table [value, known] per document; all workers call this together. `total` is the number of
    documents.
    """
    import torch
    import torch.distributed as dist

    table = torch.zeros(2, total + 1, dtype=torch.float64)
    for doc_id, score in scores.items():
        table[0, doc_id], table[1, doc_id] = score, 1.0
    table[0, total] = float(failed)
    table = table.to(device)
    dist.all_reduce(table)
    values, known = table.tolist()
    return {i: values[i] for i in range(total) if known[i]}, values[total] > 0
