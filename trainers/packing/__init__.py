"""K training runs in one pass over the frozen base: their rows lie in one batch, run after run.

    packed = PackedRun(model, task, tokenizer=tokenizer, device="cpu", evaluations=3)
    member = packed.join(adapter, recipe, seed=0, on_rung=lambda rung: True, checkpoint=None)     # adapter is detached
    while packed.members:
        for ended in packed.step():                       # one optimiser step of every member
            ended.result or ended.error
    python -m tests.benchmarks.packing                  what it gains

The base's linear layers are one GEMM for all rows; adapters are batched GEMMs over members. Each run keeps its own
tensors, optimiser, schedule, clipping, alpha, rank, experts, top_k, seed and dropout (`loop.TrainingRun`): before a
step its tensors are copied into the pack's, padded with zeros to the largest of them, and after it the gradients are
copied back, so that padding is never trained, counted or saved. Routers that lack an expert have the logit −inf for
it: its gate and gradients are exactly zero. Runs join and leave between steps. A run gives what it gives alone, up to
rounding.

What diverges in one run reaches no other: every sum over rows (gradients, losses, norms, balance) is taken member by
member, and the base works row by row.

Runs that began together with one seed train on the same rows: below the first layer that any of them adapts these run
once for all of them.

`packed_run.py` holds the runs, `pack.py` hooks their adapters in, `buffers.py` lays their tensors side by side.
"""

from __future__ import annotations

from trainers.packing.how_many import WORTH, choose, gain, seconds_of_a_step
from trainers.packing.packed_run import GROUPS, Member, PackedRun, most, refused

__all__ = ["GROUPS", "WORTH", "Member", "PackedRun", "choose", "gain", "most", "refused", "seconds_of_a_step"]
