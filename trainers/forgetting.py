"""What a training makes a model forget: its loss on general text that it was not trained on, before and after.

    measure = forgetting.load("held_out", model="tiny-moe", tokenizer=tokenizer)
    measure(model)                                   # Loss(mean=1.02, by_row=(...)), nats a token

What the text is (`forgetting=` of a study):

    held_out      of the embedded models: 52 rows, four of each domain, drawn as the rows of their pretraining are, but
                  at a step that it did not have (`python -m trainers.embedded.domains held_out=FILE` wrote them)
    FILE          a text file (.txt), or one with a JSON object a line (.jsonl) whose `text` is taken
    a task        the loss of the right answers to questions of any task that `task=` takes and that has such a loss

Rows of a file have at most LENGTH tokens, and at most ROWS of them are taken, evenly spread: one forward pass over some
thousand tokens after every training, and one for the base.

Shapes: B sequences.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocators.core import checks, words
from allocators.core.errors import StudyError, shown
from trainers.models import EMBEDDED

if TYPE_CHECKING:
    import torch

    from trainers.tasks import Row

HELD_OUT = "held_out"
FILE = Path(__file__).parent / "embedded" / "held_out.jsonl"
ROWS, LENGTH, TOGETHER = 64, 256, 16  # rows of a file, tokens of a row, rows of a forward pass
QUESTIONS = 256  # of a task
KINDS = (".txt", ".jsonl")


@dataclass(frozen=True)
class Loss:
    """Mean −log p, nats a token; of every row its sum and its tokens, none where a task was asked."""

    mean: float
    by_row: tuple[tuple[float, int], ...] = ()


Measure = Callable[[Any], Loss]


def check(name: str, *, model: str) -> None:
    """Raises StudyError where no text of this name can be there; needs no torch."""
    if name == HELD_OUT and model not in EMBEDDED:
        raise StudyError(
            f"forgetting={HELD_OUT} is for the embedded models ({', '.join(EMBEDDED)}), not for {shown(model)}: name a "
            "text file (.txt, .jsonl) or a task that is not trained on"
        )
    if Path(name).suffix in KINDS and not words.path(name, "forgetting").is_file():
        raise StudyError(f"forgetting={shown(name)}: there is no such file")


def located(name: str) -> str:
    """A file's absolute path, as workers that run elsewhere read it; any other name as it is."""
    return str(Path(name).expanduser().absolute()) if Path(name).suffix in KINDS else name


def load(name: str, *, model: str, tokenizer: Any) -> tuple[Measure, str]:
    """What measures the loss of a model in eval mode, and a hash of the text.

    All workers of a group call the measure; each has the whole result.

    Raises StudyError for a file without text, or a task without a loss.
    """
    check(name, model=model)
    if name == HELD_OUT or Path(name).suffix in KINDS:
        file = FILE if name == HELD_OUT else Path(name)
        rows = _rows(_texts(file), tokenizer)
        if not rows:
            raise StudyError(f"{file} holds no text of two tokens or more: name another for forgetting=")
        return (lambda net: _loss_of_rows(net, rows, pad=tokenizer.pad_token_id or 0)), _digest(rows)
    return _of_task(name, tokenizer)


def _texts(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix == ".txt":
            return [text]
        # split by line ends alone: JSON may hold other characters that Python takes for one
        return [checks.text(json.loads(line)["text"], "text") for line in text.split("\n") if line.strip()]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StudyError(
            f"{file} cannot be read as text ({type(error).__name__}): forgetting= takes UTF-8 text (.txt), or a JSON "
            'object {"text": ...} a line (.jsonl)'
        ) from None


def _rows(texts: Sequence[str], tokenizer: Any) -> list[Row]:
    """Pieces of at most LENGTH tokens, at most ROWS of them, evenly spread; the first token of each has no loss."""
    from trainers.tasks import Row

    pieces = []
    for text in texts:
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        pieces += [ids[start : start + LENGTH] for start in range(0, len(ids), LENGTH)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    step = max(1.0, len(pieces) / ROWS)
    return [Row(pieces[int(i * step)], 1) for i in range(min(len(pieces), ROWS))]


def _digest(rows: Sequence[Row]) -> str:
    return hashlib.sha256(json.dumps([row.input_ids for row in rows]).encode()).hexdigest()[:16]


def _loss_of_rows(model: Any, rows: Sequence[Row], *, pad: int) -> Loss:
    """Every worker of a group takes its share of the passes; of a sharded model all run all of them."""
    import torch
    import torch.distributed as dist

    from trainers.loop.batches import collate
    from trainers.loop.losses import completion_losses
    from trainers.models import sharding
    from trainers.waiting import one_sample_a_row, send

    several = dist.is_available() and dist.is_initialized() and not sharding.is_sharded(model)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    device: torch.device = next(model.parameters()).device
    sums_B = torch.zeros(len(rows), device=device)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))  # rows of like length together
    passes = [order[start : start + TOGETHER] for start in range(0, len(order), TOGETHER)]
    with torch.no_grad(), one_sample_a_row():
        for places in passes[rank::world_size]:
            batch = collate([rows[i] for i in places], pad_token_id=pad, device=device)
            sums_B[send(places, device)] = completion_losses(model, batch, parts=len(places))
    if several:
        dist.all_reduce(sums_B)
    by_row = tuple((float(s), row.completion_tokens) for s, row in zip(sums_B.tolist(), rows, strict=True))
    return Loss(math.fsum(s for s, _ in by_row) / sum(n for _, n in by_row), by_row)


def _of_task(name: str, tokenizer: Any) -> tuple[Measure, str]:
    import torch.distributed as dist

    from trainers import tasks

    no_loss = StudyError(
        f"forgetting={name} has no loss: its model writes its answers; name a multiple-choice task or a text"
    )
    task = tasks.load_task(name, select_on="test", limit=QUESTIONS)
    if any(part.questions.task.OUTPUT_TYPE == "generate_until" for part in task.parts):
        raise no_loss
    several = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    task.prepare(tokenizer, rank=rank, world_size=world_size)

    def measure(model: Any) -> Loss:
        loss = task.evaluate(model).loss
        if loss is None or not math.isfinite(loss):
            raise no_loss
        return Loss(loss)

    return measure, task.data_hash


def difference(before: Loss, after: Loss) -> float | None:
    """Standard error of the rise of the mean, paired over the rows; None where it is not known.

    The mean over tokens is a ratio Σs/Σn of rows; its error is that of the residuals (delta method).
    """
    if len(after.by_row) < 2 or len(before.by_row) != len(after.by_row):
        return None
    rises = [(new - old, n) for (old, n), (new, _) in zip(before.by_row, after.by_row, strict=True)]
    tokens = sum(n for _, n in rises)
    mean = math.fsum(rise for rise, _ in rises) / tokens
    squares = math.fsum((rise - mean * n) ** 2 for rise, n in rises)
    count = len(rises)
    return math.sqrt(squares * count / (count - 1)) / tokens
