"""Rows on their way to the device: micro-batches, and those of the next step while this one computes.

Rows are padded on the right and no mask is given to the model: under causal attention no real token sees padding, so
attention runs its fastest kernels and no values of a mask are read, which would wait for the device.

Shapes: B sequences, S tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from trainers.tasks import Row
from trainers.waiting import send

IGNORED = -100  # label of tokens without loss


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass trains on: rows of tokens on the device, padded on the right.

    tokens_3BS          token ids, labels (−100 where no loss is taken), 1 where there is a token and 0 at padding
    first               place of the first completion token of any row: nothing before it is predicted
    completion_tokens   how many tokens the loss is summed over
    padded              whether there is padding at all
    """

    tokens_3BS: Tensor
    first: int
    completion_tokens: int
    padded: bool

    @property
    def real_BS(self) -> Tensor | None:
        """1 where there is a token; None: everywhere."""
        return self.tokens_3BS[2] if self.padded else None


def collate(rows: Sequence[Row], *, pad_token_id: int, device: torch.device, counted: bool = True) -> MicroBatch:
    """Rows on their way to the device, which is not waited for. Not `counted`: none of their tokens has a loss."""
    length, first = max(len(row.input_ids) for row in rows), min(row.labels_start for row in rows)
    ids_BS, labels_BS, real_BS = [], [], []
    for row in rows:
        padding = length - len(row.input_ids)
        completion = row.input_ids[row.labels_start :] if counted else [IGNORED] * row.completion_tokens
        ids_BS.append(row.input_ids + [pad_token_id] * padding)
        labels_BS.append([IGNORED] * row.labels_start + completion + [IGNORED] * padding)
        real_BS.append([1] * len(row.input_ids) + [0] * padding)
    return MicroBatch(
        send([ids_BS, labels_BS, real_BS], device),
        first,
        sum(row.completion_tokens for row in rows) if counted else 0,
        padded=any(len(row.input_ids) < length for row in rows),
    )


class Feed:
    """Micro-batches of a step on the device; those of the next one travel there in a stream of their own."""

    def __init__(self, make: Callable[[int], list[MicroBatch]], device: torch.device) -> None:
        self.make, self.device = make, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.step = -1
        self.batches: list[MicroBatch] = []

    def fetch(self, step: int) -> None:
        """Puts a step's micro-batches on their way."""
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            self.step, self.batches = step, self.make(step)

    def take(self, step: int) -> list[MicroBatch]:
        """Those of a step, for the current stream."""
        if self.step != step:
            self.fetch(step)
        if self.stream is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_stream(self.stream)  # the device waits, not the host
            for batch in self.batches:
                batch.tokens_3BS.record_stream(now)  # else their memory could be given away before it was read
        return self.batches
