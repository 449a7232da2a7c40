"""One forward pass and its loss, −log p over completion tokens.

Shapes: K positions that may predict a completion token, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers.loop.batches import IGNORED, MicroBatch


def completion_loss(model: nn.Module, batch: MicroBatch) -> Tensor:
    """Sum of −log p over the completion tokens of a micro-batch, a scalar in fp32."""
    return _log_losses(model, batch, reduction="sum")


def completion_losses(model: nn.Module, batch: MicroBatch, *, parts: int) -> Tensor:
    """The same sum for each of so many equal parts of the micro-batch's rows, [parts]."""
    return _log_losses(model, batch, reduction="none").view(parts, -1).sum(dim=1)


def _log_losses(model: nn.Module, batch: MicroBatch, *, reduction: str) -> Tensor:
    ids_BS, labels_BS, _ = batch.tokens_3BS
    # Logits only where a completion token follows in some row: prompts are most of the tokens, V is large.
    keep_K = torch.arange(batch.first - 1, ids_BS.shape[1] - 1, device=ids_BS.device)
    logits_BKV = model(input_ids=ids_BS, logits_to_keep=keep_K, use_cache=False).logits
    labels = labels_BS[:, batch.first :].flatten()
    return F.cross_entropy(logits_BKV.float().flatten(0, 1), labels, ignore_index=IGNORED, reduction=reduction)
