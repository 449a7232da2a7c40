"""Cuts a trained adapter to the ranks that it needs: singular values of every B·A, one threshold over all modules.

    ranks, weights = truncated(read("studies/demo/adapters/1a2b..."), energy=0.9)

With B·A = U S Vᵀ, the squares of all singular values of all modules are pooled, and the largest are kept that have a
share `energy` of their sum; a module's rank is how many of its own are among them (PARA, arXiv:2604.27796, pools the
values in the same way). The new factors are B = U √S and A = √S Vᵀ, so that nothing else is lost, and the scale
lora_alpha/r of the recipe stays as it is for every module.

Shapes: n pairs of one size, I input features, O output features, R rank, N = Σr over the experts of a projection.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from allocators.core.errors import StudyError
from allocators.core.types import ExpertSelection, ModelShape, ModuleRanks, ModuleShape
from trainers.adapter.files import Saved

ROUNDING = 1e-9  # of the energy: `energy=1` keeps what is not rounding


class Pair(NamedTuple):
    """LoRA on one matrix: A [R, I] and B [O, R]."""

    module: ModuleShape
    expert: int | None
    a_RI: Tensor
    b_OR: Tensor


class Cut(NamedTuple):
    """Singular values of one B·A [R], descending, and B [O, R] and A [R, I] made of them."""

    values_R: Tensor
    a_RI: Tensor
    b_OR: Tensor


def truncated(saved: Saved, *, energy: float) -> tuple[ModuleRanks, dict[str, Tensor]]:
    """Ranks, and the tensors of `ModuleRanksAdapter` by name, of what is kept.

    energy   share of Σσ² over all modules, in (0, 1]; 1 keeps all but rounding

    Raises StudyError for another share, an adapter whose kind has no ranks of its own for every matrix (LoRA-MoE on a
    dense model), or one that is zero.
    """
    if not 0 < energy <= 1:
        raise StudyError(f"energy must be above 0 and at most 1, got {energy}: 0.9 keeps nine tenths of Σσ²")
    pairs = list(_pairs(saved))
    cuts = _decomposed(pairs)
    squares = torch.cat([cut.values_R.double() ** 2 for cut in cuts])
    total = float(squares.sum())
    if total == 0:
        raise StudyError(f"the adapter in {saved.folder} is zero: there is nothing to cut")
    order = torch.argsort(squares, descending=True, stable=True)
    enough = squares[order].cumsum(0) >= total * min(energy, 1 - ROUNDING)
    kept = torch.zeros(len(squares), dtype=torch.bool)
    kept[order[: int(enough.nonzero()[0]) + 1]] = True
    ends = [0, *itertools.accumulate(len(cut.values_R) for cut in cuts)]
    ranks = [int(kept[slice(*span)].sum()) for span in itertools.pairwise(ends)]
    return _as_ranks(pairs, ranks, saved.shape), _weights(pairs, cuts, ranks)


def _pairs(saved: Saved) -> Iterator[Pair]:
    """Every pair of the adapter, module by module, of stacks expert by expert."""
    allocation, weights = saved.allocation, saved.weights
    if not isinstance(allocation, ExpertSelection | ModuleRanks):
        raise StudyError(
            f"the adapter in {saved.folder} is LoRA-MoE on a dense model, whose experts share one rank a module: what "
            "can be cut are adapters of chosen experts (space=sieve) and of module ranks (space=ranks)"
        )
    for spec in saved.shape.modules:
        a, b = weights.get(f"{spec.path}.lora_A"), weights.get(f"{spec.path}.lora_B")
        if a is None or b is None:
            continue
        if not spec.num_experts:
            yield Pair(spec, None, a, b)
        elif isinstance(allocation, ExpertSelection):
            for expert, a_RI, b_OR in zip(allocation.in_layer(spec.layer), a, b, strict=True):
                yield Pair(spec, expert, a_RI, b_OR)
        else:
            ends = [0, *itertools.accumulate(allocation.of(spec))]
            for expert, (start, end) in enumerate(itertools.pairwise(ends)):
                if end > start:
                    yield Pair(spec, expert, a[start:end], b[:, start:end])


def _decomposed(pairs: list[Pair]) -> list[Cut]:
    """Singular value decompositions of all B·A, those of one size in one batch; B·A itself is never made."""
    by_size: dict[tuple[torch.Size, torch.Size], list[int]] = defaultdict(list)
    for place, pair in enumerate(pairs):
        by_size[pair.a_RI.shape, pair.b_OR.shape].append(place)
    cuts: dict[int, Cut] = {}
    for places in by_size.values():
        left, inner_left = torch.linalg.qr(torch.stack([pairs[i].b_OR for i in places]).double())
        right, inner_right = torch.linalg.qr(torch.stack([pairs[i].a_RI.t() for i in places]).double())
        u, values_nR, vh = torch.linalg.svd(inner_left @ inner_right.mT, full_matrices=False)
        root = values_nR.sqrt()
        b_nOR, a_nRI = (left @ u) * root.unsqueeze(1), root.unsqueeze(2) * (vh @ right.mT)
        cuts |= {i: Cut(*of) for i, *of in zip(places, values_nR, a_nRI.float(), b_nOR.float(), strict=True)}
    return [cuts[place] for place in range(len(pairs))]


def _as_ranks(pairs: list[Pair], ranks: list[int], shape: ModelShape) -> ModuleRanks:
    plain = {pair.module.path: rank for pair, rank in zip(pairs, ranks, strict=True) if pair.expert is None}
    stacks: dict[str, list[int]] = {}
    for pair, rank in zip(pairs, ranks, strict=True):
        if pair.expert is not None:
            stacks.setdefault(pair.module.path, [0] * pair.module.num_experts)[pair.expert] = rank
    allocation = ModuleRanks(plain, {path: tuple(of) for path, of in stacks.items()})
    allocation.check(shape)
    return allocation


def _weights(pairs: list[Pair], cuts: list[Cut], ranks: list[int]) -> dict[str, Tensor]:
    """A [N, I], B [O, N] by name, experts below and beside each other; modules of rank 0 are left out."""
    parts: Mapping[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for pair, cut, rank in zip(pairs, cuts, ranks, strict=True):
        if rank:
            parts[pair.module.path].append((cut.a_RI[:rank], cut.b_OR[:, :rank]))
    weights: dict[str, Tensor] = {}
    for path, of in parts.items():
        weights[f"{path}.lora_A"] = torch.cat([a for a, _ in of]).contiguous()
        weights[f"{path}.lora_B"] = torch.cat([b for _, b in of], dim=1).contiguous()
    return weights
