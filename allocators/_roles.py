"""Which roles of an MoE model get LoRA beside the experts that a rule chooses, and with which rank of an expert.

    call(sieve, signal, shape, {"fraction": 0.25, "roles": "attention+experts", "expert_rank": "r/k"}, rank=8)

Two knobs of every rule on an MoE base:

    roles         default: what the rule adapts without the knob. A selection of experts (sieve, random, …) comes with
                  attention, router and shared experts, as in MoE-Sieve; a rule for ranks has attention, shared experts,
                  experts and the MLPs of dense layers. all: every role that the model has. Else some of attention,
                  router, shared, gate (Qwen's, of the shared expert), mlp (of dense layers) and experts, joined by +
    expert_rank   r: an expert's projection has the rank of the recipe; r/k: that by the k experts that a token goes to;
                  r/E: that by all of the layer's. Rounded down, at least 1; lora_alpha/r is the same for all

Peers disagree on both, so that both are searched. The router is frozen in Unsloth and ESFT, adapted in MoE-Sieve; r/k
is "LoRA Without Regret" (Schulman and Thinking Machines Lab 2025) and NeMo Automodel's `moe_rank_scaling`, r/E is in
PEFT's documentation, r is everybody's default.

At their defaults both leave a rule's allocation as it is, an `ExpertSelection` with its digest. Anything else is
written down as what it is, a rank for every module (`ModuleRanks`).

Not a rule itself: files that begin with an underscore are left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from allocators._ranks import CANDIDATES, RoleShape, rank_in
from allocators.core import plugins
from allocators.core.errors import InfeasibleError, RuleError, StudyError, unknown
from allocators.core.types import (
    ALWAYS_ADAPTED,
    Allocation,
    ExpertSelection,
    ModelShape,
    ModuleRanks,
    ModuleShape,
    Role,
    Signal,
)

ROLES: Mapping[str, Role] = {
    "attention": "attention",
    "router": "router",
    "shared": "shared_expert",
    "gate": "shared_gate",
    "mlp": "mlp",
    "experts": "expert",
}
EXPERT_RANKS = ("r", "r/k", "r/E")
KNOBS = {"roles": "default", "expert_rank": "r"}
_OF_SELECTION = frozenset[Role]({*ALWAYS_ADAPTED, "expert"})
_OF_RANKS = frozenset[Role](CANDIDATES)


def split(knobs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A rule's own knobs, and those of this file."""
    return {k: v for k, v in knobs.items() if k not in KNOBS}, {k: v for k, v in knobs.items() if k in KNOBS}


def possible(shape: ModelShape) -> list[str]:
    """Every value of `roles` on a model: default, all, and the combinations of the roles that it has."""
    have = {module.role for module in shape.modules}
    words = [word for word, role in ROLES.items() if role in have]
    sizes = range(1, len(words) + 1)
    return ["default", "all", *("+".join(some) for n in sizes for some in itertools.combinations(words, n))]


def call(
    module: ModuleType, signal: Signal | None, shape: ModelShape, knobs: Mapping[str, Any], *, rank: int
) -> Allocation:
    """`plugins.call` for knobs that may have `roles` and `expert_rank` among them.

    rank   of the recipe: what every module that is adapted has, an expert's projection as `expert_rank` says

    Raises StudyError for a value that is none, or one of these knobs on a dense base; InfeasibleError where the model
    does not say how many experts are active, or an allocation is infeasible as in `plugins.call`.
    """
    own, asked = split(knobs)
    if not asked:
        return plugins.call(module, signal, shape, own)
    if not shape.is_moe:
        raise StudyError(f"{next(iter(asked))} is a knob of MoE models, and {shape.name} is dense: leave it out")
    of_ranks = plugins.gives(module) == "ranks"
    roles = _roles(str(asked.get("roles", "default")), _OF_RANKS if of_ranks else _OF_SELECTION)
    ranking = str(asked.get("expert_rank", "r"))
    if ranking not in EXPERT_RANKS:
        raise unknown("expert_rank", ranking, EXPERT_RANKS)
    if ranking == "r/k" and not shape.active_experts:
        raise InfeasibleError(f"the config of {shape.name} does not say how many experts are active: use r/E or r")
    part = RoleShape(shape.name, shape.modules, shape.num_layers, shape.active_experts, ranking)
    if of_ranks:
        return _ranks(module, signal, part, own, roles, rank)
    allocation = plugins.call(module, signal, shape, own)
    if not isinstance(allocation, ExpertSelection):
        raise RuleError(f"allocator {plugins.plugin_name(module)} gives ranks: it must say so, by GIVES = 'ranks'")
    return of_selection(allocation, part, roles=roles, rank=rank)


def of_selection(
    selection: ExpertSelection, shape: RoleShape, *, roles: frozenset[Role], rank: int
) -> ExpertSelection | ModuleRanks:
    """The selection as it is where the roles are MoE-Sieve's and experts have the whole rank, else its ranks."""
    have = {module.role for module in shape.modules}
    if roles & have == _OF_SELECTION & have and shape.expert_rank == "r":
        return selection
    experts = {
        module.path: tuple(
            rank_in(module, rank, shape) if e in ids else 0
            for ids in [frozenset(selection.in_layer(module.layer))]
            for e in range(module.num_experts)
        )
        for module in shape.of_role("expert")
        if "expert" in roles
    }
    return ModuleRanks(_plain(shape, roles - {"expert"}, rank), experts)


def _ranks(
    module: ModuleType,
    signal: Signal | None,
    shape: RoleShape,
    knobs: Mapping[str, Any],
    roles: frozenset[Role],
    rank: int,
) -> ModuleRanks:
    """The rule's ranks among the matrices of these roles; routers and gates, which are no candidates, have `rank`."""
    chosen = RoleShape(
        shape.name,
        tuple(m for m in shape.modules if m.role in roles & _OF_RANKS),
        shape.num_layers,
        shape.active_experts,
        shape.expert_rank,
    )
    own = dict(knobs)
    if "rank" in plugins.knobs_of(module):
        own.setdefault("rank", rank)
    allocation = plugins.call(module, signal, shape, own, among=chosen)
    assert isinstance(allocation, ModuleRanks), allocation
    beside = _plain(shape, roles - _OF_RANKS, int(own.get("rank", rank)))
    return ModuleRanks({**allocation.ranks, **beside}, allocation.experts)


def _plain(shape: ModelShape, roles: frozenset[Role], rank: int) -> dict[str, int]:
    def of(module: ModuleShape) -> int:
        return 1 if module.role == "shared_gate" else rank  # one output: a larger rank would be the same map

    return {module.path: of(module) for module in shape.modules if module.role in roles}


def _roles(asked: str, default: frozenset[Role]) -> frozenset[Role]:
    """Raises StudyError for a word that is no role."""
    if asked in ("default", "all"):
        return default if asked == "default" else frozenset(ROLES.values())
    words = [word.strip() for word in asked.split("+")]
    for word in words:
        if word not in ROLES:
            raise unknown("role", word, ["default", "all", *ROLES])
    return frozenset(ROLES[word] for word in words)
