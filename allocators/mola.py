"""MoLA: a pattern of expert counts from the low layers to the high ones. Looks at neither model nor data.

MoLA (arXiv:2402.08562) found that higher layers need more experts: 2468 beats 5555 and 8642 at the same total.

    python -m allocators.show model=tiny-dense allocator=mola
"""

from __future__ import annotations

import re

from allocators.core.apportion import largest_remainder
from allocators.core.errors import InfeasibleError
from allocators.core.layers import on_layers
from allocators.core.types import ExpertCounts, ModelShape, Signal

NEEDS = None
BASE = "dense"
FIXED_COST = True


def allocate(signal: Signal | None, shape: ModelShape, *, pattern: str | int = "2468") -> ExpertCounts:
    """One count for each of G consecutive groups of layers, low to high.

    pattern   digits (`2468`, `8642`, `8228`, `2882`, `5555`, `8888`, of any length), or numbers with dashes where one
              has two digits (`4-6-8-10`). Layers that G does not divide: groups whose sizes differ by at most one.

    Raises InfeasibleError for a pattern that is none, has more groups than the model has layers, or is all zeros.
    """
    groups = groups_in(pattern, shape)
    sizes = largest_remainder([1] * len(groups), shape.num_layers, minimum=1)
    return on_layers([n for n, size in zip(groups, sizes, strict=True) for _ in range(size)], shape)


def groups_in(pattern: str | int, shape: ModelShape) -> list[int]:
    """The numbers of a pattern, one a group of layers.

    Raises InfeasibleError for a pattern that is none, or has more groups than the model has layers.
    """
    text = str(pattern)  # a command line or YAML file reads 2468 as a number
    if not re.fullmatch(r"\d+(-\d+)*", text):
        raise InfeasibleError(f"pattern must be digits such as 2468 or numbers such as 4-6-8-10, got '{pattern}'")
    groups = [int(n) for n in (text.split("-") if "-" in text else text)]
    if len(groups) > shape.num_layers:
        raise InfeasibleError(
            f"pattern '{pattern}' has {len(groups)} groups, and {shape.name} has only {shape.num_layers} layers"
        )
    return groups
