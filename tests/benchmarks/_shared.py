"""What several benchmarks share: settings from the command line, and the clock that their ratios are of."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TypeVar

import torch

from allocators.core import words
from allocators.core.errors import StudyError
from allocators.core.types import Outcome
from search.text import point

S = TypeVar("S")


def parse(argv: Sequence[str], settings: type[S]) -> S:
    """`key=value` words over a dataclass of defaults. Ends the program where help is asked for, or a word is wrong."""
    if words.asks_for_help(argv):
        print("\n".join(["keys (default):", *words.help_of(settings)]))
        sys.exit(0)
    try:
        return words.parse(argv, settings)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def allocation_of(outcome: Outcome) -> str:
    """`random fraction=0.25`: allocator and knobs, whether or not every seed draws anew."""
    return point(outcome).replace(" draw=each", "")


def clock(device: torch.device | str) -> float:
    """Seconds: on a GPU when all that was launched is done, on a CPU those that this process had it for."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()
