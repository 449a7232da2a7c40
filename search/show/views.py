"""What is shown: each allocator's answer, the signals behind it, and the table that compares the answers.

    for answer in shown.answers: print(cells(answer, shown))

Everything here is text and numbers; `terminal.py` and `files.py` draw it, with the heat maps of `panels.py` and the
comparisons of `ranks.py`. Nothing is measured and no allocator is asked.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from allocators._ranks import budget_of, matrices_of
from allocators.core.layers import blocks, on_layers
from allocators.core.ranking import covered_shares
from allocators.core.types import Allocation, ExpertCounts, ExpertSelection, ModelShape, ModuleRanks, Signal


@dataclass(frozen=True)
class Answer:
    """One allocator's answer, or why it has none."""

    name: str
    knobs: Mapping[str, object]
    allocation: Allocation | None
    reason: str = ""
    notes: tuple[str, ...] = ()

    def trainable_params(self, shape: ModelShape, *, rank: int) -> int:
        """Trainable parameters; where there is no allocation more than any has, so that the answer comes last."""
        return self.allocation.trainable_params(shape, rank=rank) if self.allocation is not None else sys.maxsize


@dataclass(frozen=True)
class Shown:
    """Everything that is displayed; the terminal, PNG and HTML are three views of it.

    origins         where each signal came from
    total_experts   T that allocators for dense bases are compared at; None on an MoE base
    """

    shape: ModelShape
    rank: int
    answers: tuple[Answer, ...]
    signals: Mapping[str, Signal]
    origins: tuple[str, ...]
    total_experts: int | None = None

    @property
    def title(self) -> str:
        """Name, number of layers and, of an MoE model, of routed experts."""
        experts = f", {self.shape.total_experts:,} routed experts" if self.shape.is_moe else ""
        return f"{self.shape.name}: {self.shape.num_layers} layers{experts}"

    @property
    def of_ranks(self) -> bool:
        """Whether every answer is one of ranks."""
        return all(isinstance(a.allocation, ModuleRanks) for a in self.answers if a.allocation is not None)

    @property
    def budget(self) -> int | None:
        """Parameters of T layers' worth of experts: what an allocator costs that spends T on layers of one size.

        Of ranks those of `rank` on every matrix.
        """
        if self.of_ranks:
            return budget_of(matrices_of(self.shape), self.rank)
        if self.total_experts is None:
            return None
        one_a_layer = on_layers([1] * self.shape.num_layers, self.shape).trainable_params(self.shape, rank=self.rank)
        return round(self.total_experts * one_a_layer / self.shape.num_layers)


def per_layer(allocation: Allocation, shape: ModelShape) -> list[float]:
    """Experts of every layer, of counts the mean over its modules (the papers' N of a layer); of ranks their sum."""
    match allocation:
        case ExpertSelection():
            return [len(allocation.in_layer(layer)) for layer in shape.moe_layers]
        case ExpertCounts():
            layers: list[list[int]] = [[] for _ in range(shape.num_layers)]
            for m in blocks(shape):
                layers[m.layer].append(allocation.counts.get(m.path, 0))
            return [statistics.fmean(counts) for counts in layers]
        case ModuleRanks():
            ranks = [0] * shape.num_layers
            for m in shape.modules:
                ranks[m.layer] += sum(allocation.of(m))
            return [float(total) for total in ranks]


def in_runs(numbers: Iterable[float]) -> str:
    """`[4, 4, 4, 6.5]` as `4×3 6.5`."""
    texts = (f"{number:.2f}".rstrip("0").rstrip(".") for number in numbers)
    runs = [(text, len(list(same))) for text, same in itertools.groupby(texts)]
    return " ".join(f"{text}×{times}" if times > 1 else text for text, times in runs)


def by_layer(signal: Signal) -> bool:
    """Whether rows are layers with a value an expert, rather than weight matrices."""
    return all(key.isdecimal() for key in signal.rows)


# --- the table --------------------------------------------------------------------------------------------------------


def cells(answer: Answer, shown: Shown) -> tuple[str, ...]:
    """Allocator, knobs, experts, experts by layer, parameters, share of the budget, share of tokens covered."""
    knobs = " ".join(f"{k}={v}" for k, v in answer.knobs.items())
    if answer.allocation is None:
        return answer.name, knobs, "", answer.reason, "", "", ""
    counts = per_layer(answer.allocation, shown.shape)
    covers = ""
    allocation = answer.allocation
    selection = allocation.selection(shown.shape) if isinstance(allocation, ModuleRanks) else allocation
    if isinstance(selection, ExpertSelection) and "routing" in shown.signals:
        shares = covered_shares(selection, shown.signals["routing"], shown.shape).values()
        covers = f"{statistics.fmean(shares):.0%} ({min(shares):.0%}–{max(shares):.0%})"
    params = answer.trainable_params(shown.shape, rank=shown.rank)
    share = f"{params / shown.budget:.1%}" if shown.budget else ""
    return answer.name, knobs, f"{math.fsum(counts):.4g}", in_runs(counts), f"{params:,}", share, covers


def headings(shown: Shown) -> tuple[str, ...]:
    """Heads of the table's columns; the last two are empty where there is nothing to show."""
    covers = "tokens covered (by layer)" if "routing" in shown.signals else ""
    share = f"of T = {shown.total_experts}" if shown.budget else ""
    what, parameters = "experts", f"parameters, rank {shown.rank}"
    if shown.of_ranks:
        what, parameters, share = "total rank", "parameters", f"of rank {shown.rank} everywhere"
    return "allocator", "knobs", what, "by layer", parameters, share, covers
