"""What the rules for ranks share: the matrices that can have one, the budget, and the way to ranks.

    matrices = matrices_of(shape)                                     # every projection, of stacks every expert's
    weighted(scores, matrices, rank=8, min_rank=1, max_rank=16)       # ranks that follow the scores
    on_chosen([matrices[3]], matrices, rank=8, equal="parameters")    # ranks on these matrices alone

Every rule has the knob `rank`: its budget is what LoRA of this rank on every matrix has as parameters, so that rules at
one rank are compared at equal parameters. A study gives the recipe's rank. Routers are no candidates: they are frozen.

Not a rule itself: files that begin with an underscore are left out.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from allocators.core.apportion import largest_remainder, part_of_rank, ranks_for
from allocators.core.errors import InfeasibleError, StudyError, ToolkitWarning, did_you_mean
from allocators.core.types import ModelShape, ModuleRanks, ModuleShape, Role, Signal

CANDIDATES: tuple[Role, ...] = ("attention", "mlp", "shared_expert", "expert")

Equal = Literal["parameters", "rank"]


@dataclass(frozen=True)
class RoleShape(ModelShape):
    """A shape whose experts may have a part of the rank that other modules have (`allocators/_roles.py`).

    expert_rank   r | r/k | r/E
    """

    expert_rank: str = "r"


def parts_of(module: ModuleShape, shape: ModelShape) -> int:
    """By how much an expert's rank is divided: by k, by E, or by 1; any other module's by 1."""
    ranking = shape.expert_rank if isinstance(shape, RoleShape) and module.num_experts else "r"
    return {"r": 1, "r/k": shape.active_experts, "r/E": module.num_experts}[ranking]


def rank_in(module: ModuleShape, rank: int, shape: ModelShape) -> int:
    """The rank of a module where the recipe's is `rank`."""
    return part_of_rank(rank, parts_of(module, shape))


@dataclass(frozen=True, slots=True)
class Matrix:
    """One weight matrix that can have a rank of its own.

    module   whose it is
    expert   which of a stack, None of a plain module
    parts    by how much its rank is divided, beside those of other matrices
    """

    module: ModuleShape
    expert: int | None = None
    parts: int = 1

    @property
    def key(self) -> str:
        """Its row in a signal: the module's path, of an expert `<path>.<expert>`."""
        return self.module.path if self.expert is None else f"{self.module.path}.{self.expert}"

    @property
    def kind(self) -> str:
        """What matrices of all layers have in common: `self_attn.q_proj`, `mlp.experts.gate_proj`."""
        return self.module.path.partition(f"layers.{self.module.layer}.")[2] or self.module.name

    @property
    def cost(self) -> int:
        """Parameters of one rank, in + out."""
        return self.module.in_features + self.module.out_features

    @property
    def full(self) -> int:
        """The largest rank that the matrix can have."""
        return min(self.module.in_features, self.module.out_features)

    def of(self, rank: int) -> int:
        """The rank that it has where every matrix has `rank`."""
        return min(part_of_rank(rank, self.parts), self.full)


def matrices_of(shape: ModelShape) -> list[Matrix]:
    """The candidates of a model in the order of its modules, of stacks expert by expert.

    Raises InfeasibleError where there is none: of a model, or of the roles that are asked for.
    """
    matrices = [
        Matrix(module, expert, parts_of(module, shape))
        for module in shape.of_role(*CANDIDATES)
        for expert in (range(module.num_experts) if module.num_experts else [None])
    ]
    if not matrices:
        raise InfeasibleError(
            "rules for ranks choose among the matrices of attention, mlp, shared and experts, and no role that is "
            f"asked for in {shape.name} is one of these: add one to roles"
        )
    return matrices


def budget_of(matrices: Sequence[Matrix], rank: int) -> int:
    """Parameters of LoRA of this rank on each of the matrices, or of the full rank of those that have less.

    Raises InfeasibleError for a rank below 1.
    """
    if rank < 1:
        raise InfeasibleError(f"rank must be at least 1, got {rank}")
    return sum(m.cost * m.of(rank) for m in matrices)


def as_ranks(matrices: Sequence[Matrix], ranks: Sequence[int]) -> ModuleRanks:
    """One rank a matrix, as an allocation. Raises InfeasibleError where none is above zero."""
    if not any(ranks):
        raise InfeasibleError("no matrix gets a rank: ask for at least one")
    plain = {m.key: r for m, r in zip(matrices, ranks, strict=True) if m.expert is None}
    stacks: dict[str, list[int]] = {}
    for m, r in zip(matrices, ranks, strict=True):
        if m.expert is not None:
            stacks.setdefault(m.module.path, [0] * m.module.num_experts)[m.expert] = r
    return ModuleRanks(plain, {path: tuple(rs) for path, rs in stacks.items()})


def weighted(
    weights: Sequence[float],
    matrices: Sequence[Matrix],
    *,
    rank: int,
    min_rank: int = 0,
    max_rank: int | None = None,
    budget: int | None = None,
) -> ModuleRanks:
    """Ranks that follow the weights, one a matrix, within [min_rank, max_rank] and the matrix's full rank.

    budget   parameters; those of `rank` on every matrix unless given

    Raises InfeasibleError for weights that are not numbers from 0 up, or bounds that leave the budget no room.
    """
    most = budget_of(matrices, rank)
    if min_rank < 0:
        raise InfeasibleError(f"min_rank must not be negative, got {min_rank}")
    if min_rank > rank:
        raise InfeasibleError(f"min_rank must be at most rank ({rank}), got {min_rank}: there is no budget for more")
    if max_rank is not None and max_rank < rank:
        raise InfeasibleError(f"max_rank must be at least rank ({rank}), got {max_rank}: the budget would not be spent")
    ranks = ranks_for(
        [weight / m.parts for weight, m in zip(weights, matrices, strict=True)],
        [m.cost for m in matrices],
        most if budget is None else budget,
        minimum=[min_rank and m.of(min_rank) for m in matrices],
        maximum=[m.full if max_rank is None else m.of(max_rank) for m in matrices],
    )
    return as_ranks(matrices, ranks)


def on_chosen(chosen: Sequence[Matrix], matrices: Sequence[Matrix], *, rank: int, equal: Equal) -> ModuleRanks:
    """One rank for all that were chosen, none for the others.

    equal   what is as it is where every matrix has `rank`. parameters: the chosen ones share all of them, up to their
            full rank. rank: each has `rank`, as the papers do, and there are fewer parameters

    Raises InfeasibleError where nothing was chosen, or for another `equal`.
    """
    if equal not in ("parameters", "rank"):
        raise InfeasibleError(
            f"equal must be parameters or rank, got '{equal}'{did_you_mean(str(equal), ('parameters', 'rank'))}"
        )
    if not chosen:
        raise InfeasibleError("no matrix is chosen: ask for at least one")
    if equal == "rank":
        return as_ranks(chosen, [m.of(rank) for m in chosen] if budget_of(chosen, rank) else [])
    return weighted([1.0] * len(chosen), chosen, rank=rank, budget=budget_of(matrices, rank))


def scores_of(signal: Signal, matrices: Sequence[Matrix], metric: str) -> list[float]:
    """Value of every matrix; a row that holds several (one a data set) enters with their mean.

    Raises StudyError where the signal lacks the metric for a matrix, or holds what is no finite number.
    """
    values = []
    for m in matrices:
        row = signal.metric(m.key, metric)
        values.append(math.fsum(row) / len(row))
        if not math.isfinite(values[-1]):
            raise StudyError(f"the {signal.kind} signal's {metric} of {m.key} is {values[-1]}: measure it again")
    return values


def by_layer(values: Sequence[float], matrices: Sequence[Matrix], shape: ModelShape) -> list[list[float]]:
    """The values of every layer's matrices, first layer to last."""
    layers: list[list[float]] = [[] for _ in range(shape.num_layers)]
    for m, value in zip(matrices, values, strict=True):
        layers[m.module.layer].append(value)
    return layers


def largest(scores: Sequence[float], number: int) -> list[int]:
    """Positions of the largest scores, first on ties, in their order."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:number]


def groups_of_layers(shape: ModelShape, groups: int) -> list[int]:
    """For every layer its group: so many consecutive ones, low to high, whose sizes differ by one at most."""
    sizes = largest_remainder([1] * groups, shape.num_layers, minimum=1)
    return list(itertools.chain.from_iterable([group] * size for group, size in enumerate(sizes)))


# --- dead matrices

ALIVE = 1e-4  # of the largest spectral norm among the matrices of a kind: what a trained matrix has at least


def dead(signal: Signal, matrices: Sequence[Matrix]) -> list[bool]:
    """Which matrices have weights of almost zero, by `spectral_norm`; none where the signal does not hold it."""
    norms = [(signal.rows.get(m.key, {}).get("spectral_norm") or (math.inf,))[0] for m in matrices]
    largest_of: dict[str, float] = {}
    for m, norm in zip(matrices, norms, strict=True):
        if math.isfinite(norm):
            largest_of[m.kind] = max(norm, largest_of.get(m.kind, 0.0))
    top = max(largest_of.values(), default=0.0)  # a kind may be dead as a whole
    return [n <= ALIVE * max(largest_of.get(m.kind, 0.0), ALIVE * top) for m, n in zip(matrices, norms, strict=True)]


def warn_of_dead(number: int, of: int, *, what: str, stacklevel: int = 3) -> None:
    """One line that says how many matrices came last, and why; nothing where there is none."""
    if number:
        warnings.warn(
            f"{number} of {of} matrices have weights of almost zero, which {what}: they are ranked last",
            ToolkitWarning,
            stacklevel=stacklevel,
        )
