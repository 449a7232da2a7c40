"""PLoP: LoRA on the types of matrices that answer least to the task's tokens: attention or MLP, and which of them?

PLoP (arXiv:2506.20629): a matrix that is aligned with its inputs makes them longer than random inputs of the same norm
would become. The types whose mean of that ratio is the lowest have the most to learn. The paper adapts three of q, k,
v, o, up, gate and down; its own control is the inverse, the types of the highest mean.

    python -m allocators.show model=tiny-dense allocator=plop
"""

from __future__ import annotations

import math
from typing import Literal

from allocators._ranks import Equal, matrices_of, on_chosen
from allocators.core.errors import InfeasibleError, did_you_mean
from allocators.core.types import ModelShape, ModuleRanks, Signal

NEEDS = "representation"
BASE = "any"
GIVES = "ranks"
FIXED_COST = False


def allocate(
    signal: Signal,
    shape: ModelShape,
    *,
    rank: int = 8,
    types: int = 3,
    order: Literal["lowest", "highest"] = "lowest",
    equal: Equal = "parameters",
) -> ModuleRanks:
    """One rank for all matrices of the chosen types.

    rank    the parameters (equal=parameters), or the rank of a chosen matrix (equal=rank, as published)
    types   how many
    order   lowest: those of the lowest mean feature norm; highest: the paper's control
    equal   parameters: the chosen share what `rank` on every matrix has; rank: each has `rank`

    Raises InfeasibleError for a number of types that the model does not have, or where no matrix has a feature norm.
    """
    if order not in ("lowest", "highest"):
        raise InfeasibleError(
            f"order must be lowest or highest, got '{order}'{did_you_mean(str(order), ('lowest', 'highest'))}"
        )
    matrices = matrices_of(shape)
    of_type: dict[str, list[float]] = {}
    for m in matrices:
        of_type.setdefault(m.kind, []).extend(signal.rows.get(m.key, {}).get("feature_norm", ()))
    means = {kind: math.fsum(values) / len(values) for kind, values in of_type.items() if values}
    if not 1 <= types <= len(means):
        have = ", ".join(means) or "none"
        raise InfeasibleError(f"types must be 1..{len(means)}, got {types}: {shape.name} has {have}")
    ranked = sorted(means, key=lambda kind: means[kind] if order == "lowest" else -means[kind])
    chosen = [m for m in matrices if m.kind in ranked[:types]]
    return on_chosen(chosen, matrices, rank=rank, equal=equal)
