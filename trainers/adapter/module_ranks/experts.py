"""LoRA of one layer's experts, each projection of each with its own rank.

Experts run as in `expert_lora.py`, on two small grouped GEMMs: for these the ranks of a layer's experts are filled up
with zeros to the largest. What is trained, counted and saved has no filling: the A of a projection are one matrix
[Σr, in], expert below expert, its B one matrix [out, Σr], expert beside expert.

Shapes: C experts with a rank in one of the projections, R the largest rank, N = Σr over the experts of a projection,
        I input features, O output features.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from allocators.core.types import ModuleRanks, ModuleShape
from trainers.adapter.expert_lora import ExpertLora


class RaggedExpertLora(ExpertLora):
    """LoRA of one layer's experts, each projection of each with its own rank.

    flat    projection → (A [N, I], B [O, N]); projections without any rank are left out
    ranks   projection → rank of each of the C experts
    sizes   projection → (O, I)
    """

    def __init__(
        self,
        module: Any,
        ids: tuple[int, ...],
        flat: dict[str, tuple[nn.Parameter, nn.Parameter]],
        ranks: dict[str, list[int]],
        sizes: dict[str, tuple[int, int]],
        *,
        path: str,
        scale: float,
        dropout: float,
    ) -> None:
        super().__init__(module, ids, flat, path=path, scale=scale, dropout=dropout)
        self.ranks, self.sizes = ranks, sizes
        # where the rows of A, and the columns of B, lie among C·R filled up ones
        self.places_N = {name: _places(of, self.most).to(self.device) for name, of in ranks.items()}

    @property
    def most(self) -> int:
        """The largest rank of an expert in any projection."""
        return max(max(of) for of in self.ranks.values())

    def size(self, projection: str) -> tuple[int, int]:
        """O and I of a projection."""
        return self.sizes[projection]

    def pair(self, projection: str) -> tuple[Tensor, Tensor]:
        """A [C, R, I] and B [C, O, R], filled up with zeros."""
        outputs, inputs = self.sizes[projection]
        experts = len(self.ids)
        if projection not in self.pairs:
            down = self.module.down_proj
            zeros_A = torch.zeros(experts, self.most, inputs, device=down.device)
            return zeros_A, torch.zeros(experts, outputs, self.most, device=down.device)
        return _fill(*self.pairs[projection], self.places_N[projection], experts=experts, most=self.most)

    def parts(self, projection: str) -> list[tuple[int, slice]]:
        """Of every expert with a rank its place among the C, and where its rows of A and columns of B lie."""
        ends = [0, *itertools.accumulate(self.ranks[projection])]
        return [(c, slice(*ends[c : c + 2])) for c, rank in enumerate(self.ranks[projection]) if rank]

    def reached(self) -> Tensor:
        """Which of the C experts have a gradient that is not zero."""
        reached_C = torch.zeros(len(self.ids), dtype=torch.bool, device=self.device)
        for name, (a_NI, b_ON) in self.pairs.items():
            owner_N = self.places_N[name] // self.most
            for gradient in (a_NI.grad, None if b_ON.grad is None else b_ON.grad.t()):
                if gradient is not None:
                    reached_C[owner_N[gradient.ne(0).any(dim=1)]] = True
        return reached_C


def filled_up(
    specs: Sequence[ModuleShape], allocation: ModuleRanks, weights: Mapping[str, Tensor]
) -> tuple[tuple[int, ...], dict[str, tuple[Tensor, Tensor]]]:
    """Ids of a layer's experts with a rank, and their A [C, R, I] and B [C, O, R] by projection, from what was saved.

    R is the largest rank in the projections of one weight stack. Of gate and up both are there where one of them has a
    rank, because they lie in one stack; a down_proj without any is left out.
    """
    ranks = {spec.name: allocation.of(spec) for spec in specs}
    ids = tuple(e for e, of in enumerate(zip(*ranks.values(), strict=True)) if any(of))
    pairs = {}
    for spec in specs:
        stack = [other for other in specs if (other.name == "down_proj") == (spec.name == "down_proj")]
        most = max(max(ranks[other.name]) for other in stack)
        if not most or not ids:
            continue
        if any(ranks[spec.name]):
            places = _places([ranks[spec.name][e] for e in ids], most)
            a_NI, b_ON = weights[f"{spec.path}.lora_A"], weights[f"{spec.path}.lora_B"]
            pairs[spec.name] = _fill(a_NI, b_ON, places, experts=len(ids), most=most)
        else:
            a_CRI = torch.zeros(len(ids), most, spec.in_features)
            pairs[spec.name] = a_CRI, torch.zeros(len(ids), spec.out_features, most)
    return ids, pairs


def _places(ranks: Sequence[int], most: int) -> Tensor:
    """Where the rows of A, and the columns of B, of every expert lie among C·R filled up ones, [N]."""
    return torch.tensor([c * most + r for c, rank in enumerate(ranks) for r in range(rank)], dtype=torch.long)


def _fill(a_NI: Tensor, b_ON: Tensor, places_N: Tensor, *, experts: int, most: int) -> tuple[Tensor, Tensor]:
    """A [C, R, I] and B [C, O, R] with zeros where an expert has less than the largest rank."""
    a_RI = a_NI.new_zeros(experts * most, a_NI.size(1)).index_copy(0, places_N, a_NI)
    b_OR = b_ON.new_zeros(b_ON.size(0), experts * most).index_copy(1, places_N, b_ON)
    return a_RI.unflatten(0, (experts, most)), b_OR.unflatten(1, (experts, most)).transpose(0, 1)
