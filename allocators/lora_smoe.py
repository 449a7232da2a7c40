"""LoRA-SMoE: data sets vote for the weight matrices whose gradients are largest; a matrix gets an expert a vote.

python -m allocators.show model=tiny-dense allocator=lora_smoe
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from allocators.core.apportion import floor_share
from allocators.core.errors import InfeasibleError, StudyError, did_you_mean
from allocators.core.layers import blocks
from allocators.core.types import ExpertCounts, ModelShape, Role, Signal

NEEDS = "sensitivity"
BASE = "dense"
FIXED_COST = False

GROUPS: dict[str, tuple[tuple[Role, ...], ...]] = {"S": (("attention",), ("mlp",)), "U": (("attention", "mlp"),)}


def allocate(
    signal: Signal,
    shape: ModelShape,
    *,
    retention: float = 0.6,
    strategy: Literal["S", "U"] = "S",
    experts_per_block: int = 1,
    metric: str = "sum_sq_grad",
) -> ExpertCounts:
    """N(block) = experts_per_block · number of data sets d with score_d(block) > percentile of its group; 0 is frozen.

    The signal's rows hold one value a data set (axis `dataset`): all of them vote. With one data set N is 0 or
    experts_per_block, so give more than the 1 that several data sets are published with.

    retention           share of the blocks that a data set keeps, 0.6 (the paper's): those strictly above the
                        (100·(1−retention))-th percentile, linear interpolation
    strategy            S: attention and MLP blocks are ranked separately; U: all together
    experts_per_block   experts a vote is worth
    metric              the score, sum_sq_grad

    Raises InfeasibleError where nothing is kept, StudyError where the signal lacks a block or its data sets differ.
    """
    if not 0 < retention <= 1:
        raise InfeasibleError(f"retention must be above 0 and at most 1, got {retention}")
    if experts_per_block < 1:
        raise InfeasibleError(f"experts_per_block must be at least 1, got {experts_per_block}")
    if strategy not in GROUPS:
        raise InfeasibleError(f"strategy must be S or U, got '{strategy}'{did_you_mean(str(strategy).upper(), GROUPS)}")
    scores = {m.path: signal.metric(m.path, metric) for m in blocks(shape)}
    datasets = {len(values) for values in scores.values()}
    if len(datasets) != 1:
        raise StudyError(f"{metric} must have one value a data set in every row, got rows of {sorted(datasets)} values")
    counts = dict.fromkeys(scores, 0)
    for d in range(datasets.pop()):
        for roles in GROUPS[strategy]:
            group = [m.path for m in shape.of_role(*roles)]
            if not group:
                continue
            for path, kept in zip(group, above_percentile([scores[p][d] for p in group], retention), strict=True):
                counts[path] += experts_per_block * kept
    if not any(counts.values()):
        raise InfeasibleError(
            f"retention {retention} keeps no block of {shape.name}: raise it, or see whether the {metric} scores differ"
        )
    return ExpertCounts(counts, gating="hydra")


def above_percentile(scores: Sequence[float], retention: float) -> list[bool]:
    """Which scores lie strictly above the (100·(1−retention))-th percentile, by linear interpolation.

    The percentile lies at place (1−retention)·(n−1) of the sorted scores; between two of them there is no score, so
    being above it is being above the lower of the two.
    """
    threshold = sorted(scores)[floor_share(1 - retention, len(scores) - 1)]
    return [score > threshold for score in scores]
