"""What several benchmarks share: settings from the command line, and the clock that their ratios are of."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch

S = TypeVar("S")


def parse(argv: Sequence[str], settings: S) -> S:
    """`key=value` words over a dataclass of defaults; lists are `key=1,2`. Ends the program at an unknown key."""
    known: Any = settings
    for argument in argv:
        key, _, value = argument.partition("=")
        if key not in {f.name for f in fields(known)} or not value:
            sys.exit(f"unknown argument {argument!r}: possible are {', '.join(f.name + '=' for f in fields(known))}")
        old = getattr(known, key)
        new = tuple(map(int, value.split(","))) if isinstance(old, tuple) else type(old)(value)
        known = replace(known, **{key: new})
    return known


def clock(device: torch.device | str) -> float:
    """Seconds: on a GPU when all that was launched is done, on a CPU those that this process had it for."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()
