"""The nouns of the toolkit: what a model looks like, what was measured on it, and where LoRA experts go.

Read this file first. Standard library only; every value is immutable, has a JSON form and a digest.

    ModelShape   sizes of a model's adaptable modules, no weights          (from a config: `core/shapes.py`)
    Signal       one measurement: spectrum, sensitivity, routing, …        (`allocators/signals/`)
    Allocation   = ExpertCounts (experts to *add* to a dense model)
                 | ExpertSelection (experts to *adapt* in an MoE model)    (`allocators/*.py`)
                 | ModuleRanks (a LoRA rank for every module, of either)
    Recipe       LoRA and optimiser settings of one training run; `.lora` is the part that adapters are built from
    Point        what a space proposes: allocator, knobs, recipe settings
    Trial        allocation + recipe + model + task + seed: one training run, named by its digest
    Rung         one evaluation on the way, on the split that selects
    Score        an evaluation on the test split, which the search never sees
    Outcome      what became of a trial

Trainable parameters are counted here and nowhere else; adapters are tested to hold exactly as many.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, lru_cache
from itertools import groupby, islice
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

from allocators.core import checks
from allocators.core.errors import InfeasibleError, StudyError, shown

Role = Literal["attention", "mlp", "expert", "router", "shared_expert", "shared_gate"]

# What a selection of experts always adapts besides them: settled by the published parameter counts (tests/golden/).
ALWAYS_ADAPTED: tuple[Role, ...] = ("attention", "router", "shared_expert")


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values have equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest_of(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


class Hashed:
    """A value's canonical JSON, hashed once, alone and as the first entry of a mapping that holds it."""

    def __init__(self, value: Any) -> None:
        text = canonical_json(value).encode()
        self.digest = hashlib.sha256(text).hexdigest()[:16]
        self._text = text
        self._begun: dict[str, Any] = {}

    def digest_with(self, key: str, rest: Mapping[str, Any]) -> str:
        """`digest_of({key: value} | rest)`, where no key of the rest comes before `key`."""
        assert all(key < other for other in rest), sorted(rest)
        if key not in self._begun:
            self._begun[key] = hashlib.sha256(f"{{{canonical_json(key)}:".encode() + self._text)
        whole = self._begun[key].copy()
        whole.update(b"," + canonical_json(rest).encode()[1:])
        digest: str = whole.hexdigest()
        return digest[:16]


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """Sizes of one linear map, or of one projection of a layer's stacked experts.

    path          dotted module path in the transformers model; for fused experts the path of the experts module
                  plus the projection's name, e.g. `model.layers.0.mlp.experts.gate_proj`
    layer         decoder layer, from 0
    in_features, out_features   of one expert's projection where the module is stacked
    num_experts   0 for a plain linear map, E for a stack of E experts
    role          attention | mlp | expert | router | shared_expert | shared_gate (Qwen's, with one output)
    """

    path: str
    layer: int
    in_features: int
    out_features: int
    num_experts: int = 0
    role: Role = "mlp"

    @property
    def name(self) -> str:
        """Last part of the path: `q_proj`, `gate_proj`, `gate`."""
        return self.path.rsplit(".", 1)[-1]

    def lora_params(self, rank: int) -> int:
        """Parameters of one LoRA pair on this map: A [r, in] and B [out, r]."""
        return rank * (self.in_features + self.out_features)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model's adaptable modules, in the order of the layers. Holds no weights and needs no torch.

    active_experts   k, the experts that a token goes to; 0 for a dense model, and where it is not known
    """

    name: str
    modules: tuple[ModuleShape, ...]
    num_layers: int
    active_experts: int = 0

    def __reduce__(self) -> tuple[Any, ...]:  # what was looked up stays behind
        return (type(self), tuple(getattr(self, f.name) for f in fields(self)))

    @cached_property
    def _experts(self) -> dict[int, int]:
        """By layer the number of its routed experts. Candidates of a search ask thousands of times."""
        first = {m.layer: m.num_experts for m in reversed(self.modules) if m.role == "expert"}
        return dict(sorted(first.items()))

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers that have experts, ascending (DeepSeek's first layers have none)."""
        return tuple(self._experts)

    @property
    def is_moe(self) -> bool:
        """Whether a layer has routed experts."""
        return bool(self._experts)

    def experts_in(self, layer: int) -> int:
        """Number of routed experts E of a layer; 0 where the layer is dense."""
        return self._experts.get(layer, 0)

    @cached_property
    def params_of_rank_one(self) -> tuple[int, dict[int, int]]:
        """Of LoRA with rank 1 on all that is always adapted; by layer of LoRA on one routed expert."""
        always, of_expert = 0, dict.fromkeys(self.moe_layers, 0)
        for module in self.modules:
            if module.role == "expert":
                of_expert[module.layer] += module.lora_params(1)
            elif module.role in ALWAYS_ADAPTED:
                always += module.lora_params(1)
        return always, of_expert

    @property
    def total_experts(self) -> int:
        """Routed experts over all layers."""
        return sum(self._experts.values())

    def of_role(self, *roles: Role) -> tuple[ModuleShape, ...]:
        """The modules that have one of these roles, in the order of the layers."""
        return tuple(m for m in self.modules if m.role in roles)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads: name, number of layers, the fields of every module, and k where it is known."""
        active = {"active_experts": self.active_experts} if self.active_experts else {}
        modules = [asdict(m) for m in self.modules]
        return {"name": self.name, "num_layers": self.num_layers, "modules": modules, **active}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelShape:
        """Raises KeyError or TypeError where a field is missing."""
        modules = tuple(ModuleShape(**m) for m in data["modules"])
        return cls(data["name"], modules, data["num_layers"], data.get("active_experts", 0))

    @property
    def digest(self) -> str:
        """Two shapes with the same digest have the same name and the same modules."""
        return digest_of(self.to_json())


SignalKind = Literal["spectrum", "sensitivity", "routing", "representation"]


@dataclass(frozen=True)
class Signal:
    """One measurement on one model.

    kind         spectrum | sensitivity | routing | representation
    rows         `rows[key][metric]` is a tuple of floats. Keys are layer numbers as text (`"0"`, routing) or module
                 paths (spectrum, sensitivity), or both (representation). Routing has the metrics `count` (tokens
                 dispatched to each expert, [E]), `mass` (sum of gate weights, [E]), `reap` and `ean` (mean norm of the
                 expert's outputs with and without the gate, [E]).
    axis         what the position in a tuple means, e.g. `expert`
    unit         e.g. `tokens`, `1`
    provenance   model, revision or weight hash, data hash, samples, seed, code version: everything that the numbers
                 depend on, so that its digest names the cache file

    A value that does not exist (the tail of a matrix of zeros) is an empty tuple.
    """

    kind: SignalKind
    rows: Mapping[str, Mapping[str, tuple[float, ...]]]
    axis: str
    unit: str
    provenance: Mapping[str, Any]

    def __post_init__(self) -> None:
        frozen = {
            str(key): MappingProxyType({m: tuple(float(x) for x in values) for m, values in metrics.items()})
            for key, metrics in self.rows.items()
        }
        object.__setattr__(self, "rows", MappingProxyType(frozen))
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    def __reduce__(self) -> tuple[Any, ...]:  # a MappingProxy does not pickle
        return (Signal.from_json, (self.to_json(),))

    def metric(self, key: str | int, name: str) -> tuple[float, ...]:
        """The values of one metric in one row.

        Raises StudyError when the signal has no such row or metric, InfeasibleError where what was measured does not
        have it: the row is empty then.
        """
        try:
            values = self.rows[str(key)][name]
        except KeyError:
            row = self.rows.get(str(key))
            possible = f"metrics {sorted(row)}" if row is not None else f"rows {sorted(self.rows)}"
            raise StudyError(f"{self.kind} signal has no '{name}' for '{key}': it has {possible}") from None
        if not values:
            rows = self.rows.values()
            have = [metric for metric in self.rows[str(key)] if all(row.get(metric) for row in rows)]
            instead = f"metric={have[0]} exists everywhere" if have else f"take a rule that needs no {self.kind}"
            raise InfeasibleError(
                f"{key} has no {name} (a matrix of zeros, of equal numbers or with a NaN has none): {instead}"
            )
        return values

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads; rows are lists."""
        rows = {key: {m: list(v) for m, v in metrics.items()} for key, metrics in self.rows.items()}
        return {
            "kind": self.kind,
            "axis": self.axis,
            "unit": self.unit,
            "provenance": dict(self.provenance),
            "rows": rows,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Signal:
        """Raises KeyError where a field is missing."""
        return cls(data["kind"], data["rows"], data["axis"], data["unit"], data["provenance"])

    @property
    def digest(self) -> str:
        """It changes with the rows and with the provenance."""
        return digest_of(self.to_json())


def _whole(value: Any, what: str) -> int:
    """A whole number of any type; a mask or a share, which Python would take for one, is none."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise InfeasibleError(f"{what} must be a whole number, got {shown(repr(value))}")


@dataclass(frozen=True)
class ExpertSelection:
    """Which routed experts of an MoE model get LoRA: ids per layer, ascending.

    Attention, router and shared experts are adapted whatever is chosen (`ALWAYS_ADAPTED`).
    `experts` may leave layers out or map them to nothing: no routed expert is adapted there.
    """

    experts: Mapping[int, tuple[int, ...]]
    kind: Literal["expert_selection"] = field(default="expert_selection", init=False)

    def __post_init__(self) -> None:
        clean: dict[int, tuple[int, ...]] = {}
        for layer, given in sorted((_whole(layer, "a layer"), ids) for layer, ids in self.experts.items()):
            ids = [_whole(i, f"an expert id of layer {layer}") for i in islice(given, checks.MOST_EXPERTS + 1)]
            unique = tuple(sorted(set(ids)))
            if len(unique) != len(ids) or len(ids) > checks.MOST_EXPERTS or any(i < 0 for i in unique):
                raise InfeasibleError(
                    f"expert ids of layer {layer} must be distinct and not negative, got {shown(str(ids[:20]))}"
                )
            if unique:
                clean[layer] = unique
        object.__setattr__(self, "experts", MappingProxyType(clean))

    def __reduce__(self) -> tuple[Any, ...]:
        return (allocation_from_json, (self.to_json(),))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ExpertSelection) and dict(self.experts) == dict(other.experts)

    def __hash__(self) -> int:
        return hash(tuple(self.experts.items()))

    def in_layer(self, layer: int) -> tuple[int, ...]:
        """Ids of a layer's chosen experts, ascending; empty for a layer without any."""
        return self.experts.get(layer, ())

    @property
    def total_experts(self) -> int:
        """The number of chosen experts, over all layers."""
        return sum(len(ids) for ids in self.experts.values())

    def check(self, shape: ModelShape) -> None:
        """Raises InfeasibleError where a layer or an id does not exist in the model."""
        for layer, ids in self.experts.items():
            have = shape.experts_in(layer)
            if not have:
                raise InfeasibleError(
                    f"layer {layer} of {shape.name} has no routed experts; layers that have: {list(shape.moe_layers)}"
                )
            if ids[-1] >= have:
                raise InfeasibleError(f"layer {layer} of {shape.name} has experts 0..{have - 1}, got {ids[-1]}")

    def trainable_params(self, shape: ModelShape, *, rank: int) -> int:
        """Exact number of trainable parameters: r(in+out) for every adapted map (MoE-Sieve's published counts)."""
        self.check(shape)
        always, of_expert = shape.params_of_rank_one
        return rank * (always + sum(len(ids) * of_expert[layer] for layer, ids in self.experts.items()))

    def to_json(self) -> dict[str, Any]:
        """What `allocation_from_json` reads; JSON has texts as keys, so that layers become texts."""
        return {"kind": self.kind, "experts": {str(layer): list(ids) for layer, ids in self.experts.items()}}

    def to_compact(self) -> dict[str, Any]:
        """What `allocation_from_json` reads, too, in a tenth of the room and less: `{"0-3": "0-15,17", "4": "x8001"}`.

        Layers with the same experts share an entry. Ids are ranges, or the bits of a hexadecimal number, whichever is
        shorter.
        """
        layers: dict[tuple[int, ...], list[int]] = {}
        for layer, ids in self.experts.items():
            layers.setdefault(ids, []).append(layer)
        return {"kind": self.kind, "experts": {as_ranges(own): _compact_ids(ids) for ids, own in layers.items()}}

    @cached_property
    def hashed(self) -> Hashed:
        """Its JSON as `digest_of` takes it, hashed once."""
        return Hashed(self.to_json())

    @property
    def digest(self) -> str:
        """Two selections with the same digest choose the same experts."""
        return self.hashed.digest


Gating = Literal["routed", "hydra"]
Schedule = Literal["cosine", "linear", "constant"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


@dataclass(frozen=True)
class ExpertCounts:
    """How many LoRA experts each module of a dense model gets: `counts[module path]`, zeros left out.

    gating   `routed`: N pairs (A_j, B_j) and a router without bias on the module's input (MoLA, AlphaLoRA)
             `hydra`: one A, N B's, the same router, soft weights (HydraLoRA, LoRA-SMoE)
    """

    counts: Mapping[str, int]
    gating: Gating = "routed"
    kind: Literal["expert_counts"] = field(default="expert_counts", init=False)

    def __post_init__(self) -> None:
        if self.gating not in ("routed", "hydra"):
            raise InfeasibleError(f"gating must be 'routed' or 'hydra', got '{self.gating}'")
        counts = {path: _whole(n, f"the experts of {path}") for path, n in self.counts.items()}
        if negative := {path: n for path, n in counts.items() if n < 0}:
            raise InfeasibleError(f"expert counts must not be negative, got {negative}")
        if many := {path: n for path, n in counts.items() if n > checks.MOST_EXPERTS}:
            raise InfeasibleError(f"a module has at most {checks.MOST_EXPERTS:,} experts, got {shown(str(many))}")
        clean = {path: n for path, n in sorted(counts.items()) if n}
        object.__setattr__(self, "counts", MappingProxyType(clean))

    def __reduce__(self) -> tuple[Any, ...]:
        return (allocation_from_json, (self.to_json(),))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ExpertCounts) and dict(self.counts) == dict(other.counts) and self.gating == other.gating
        )

    def __hash__(self) -> int:
        return hash((tuple(self.counts.items()), self.gating))

    @property
    def total_experts(self) -> int:
        """Sum over modules (the papers' T counts layers: T experts a layer on all seven modules is 7T here)."""
        return sum(self.counts.values())

    @property
    def several(self) -> list[str]:
        """Modules with more than one expert, whose mix changes with every token: no plain LoRA equals them."""
        return [path for path, n in self.counts.items() if n > 1]

    def check(self, shape: ModelShape) -> None:
        """Raises InfeasibleError where a module does not exist or cannot take added experts."""
        known = {m.path for m in shape.modules if m.role in ("attention", "mlp")}
        strangers = sorted(set(self.counts) - known)
        if strangers:
            raise InfeasibleError(
                f"{shape.name} has no dense module {strangers[0]!r}; it has {len(known)}, e.g. {sorted(known)[:3]}"
            )

    def trainable_params(self, shape: ModelShape, *, rank: int) -> int:
        """Exact number of trainable parameters, routers included.

        routed: Σ N·(r(in+out) + in)      hydra: Σ r·in + N·(r·out + in)      (tests/golden/parameters.json)
        """
        self.check(shape)
        total = 0
        for module in shape.modules:
            n = self.counts.get(module.path, 0)
            if n and self.gating == "routed":
                total += n * (module.lora_params(rank) + module.in_features)
            elif n:
                total += rank * module.in_features + n * (rank * module.out_features + module.in_features)
        return total

    def to_json(self) -> dict[str, Any]:
        """What `allocation_from_json` reads."""
        return {"kind": self.kind, "gating": self.gating, "counts": dict(self.counts)}

    def to_compact(self) -> dict[str, Any]:
        """What `allocation_from_json` reads, too: `{"model.layers.*.mlp.up_proj": {"0-15": 2, "16": 3}}`.

        The star stands for the first number of a path; a path without one is written as it is.
        """
        return {"kind": self.kind, "gating": self.gating, "counts": _starred(self.counts)}

    @cached_property
    def hashed(self) -> Hashed:
        """Its JSON as `digest_of` takes it, hashed once."""
        return Hashed(self.to_json())

    @property
    def digest(self) -> str:
        """Two allocations with the same digest add the same experts with the same gating."""
        return self.hashed.digest


_NUMBER = re.compile(r"(?<=\.)(0|[1-9][0-9]{0,8})(?=\.)")  # as a part of a module's path
_MOST_PLACES = 1 << 20  # of an allocation that is written in ranges: a few bytes could ask for any number of them


def as_ranges(numbers: Iterable[int]) -> str:
    """Whole numbers, distinct and not negative, as text.

    >>> as_ranges([5, 0, 1, 2, 3])
    '0-3,5'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)


def of_ranges(text: str, what: str, *, high: int) -> tuple[int, ...]:
    """The numbers of `as_ranges`, ascending as they are written. Raises ValueError where one is above `high`."""
    numbers: list[int] = []
    for run in text.split(","):
        first, _, last = run.partition("-")
        low = checks.whole(int(first), what, high=high)
        numbers += range(low, checks.whole(int(last or first), what, low=low, high=high) + 1)
        if len(numbers) > high + 1:
            raise ValueError(f"{what}: more than there can be")
    return tuple(numbers)


def _starred(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by module path, those of paths that differ in their first number together: `{"a.*.b": {"0-3": value}}`."""
    starred: dict[str, Any] = {}
    alike: dict[str, dict[Any, list[int]]] = {}
    for path, value in values.items():
        parts = _NUMBER.split(path, maxsplit=1)
        if len(parts) == 3 and "*" not in path and int(parts[1]) <= checks.MOST_LAYERS:
            alike.setdefault(f"{parts[0]}*{parts[2]}", {}).setdefault(value, []).append(int(parts[1]))
        else:
            starred[path] = value
    for path, of in alike.items():
        starred[path] = {as_ranges(layers): value for value, layers in of.items()}
    return starred


def _unstarred(written: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Values by module path, unchecked; those of a path with a star stand by the ranges of its layers."""
    values: dict[str, Any] = {}
    for path, value in written.items():
        for layers, each in value.items() if isinstance(value, Mapping) else ((None, value),):
            numbers = of_ranges(layers, f"layer of {path}", high=checks.MOST_LAYERS) if layers is not None else ("*",)
            values |= {path.replace("*", str(number), 1): each for number in numbers}
            if len(values) > _MOST_PLACES:
                raise ValueError(f"{what}: more than there can be")
    return values


def _as_runs(numbers: tuple[int, ...]) -> str:
    return ",".join(f"{number}*{len(list(run))}" for number, run in groupby(numbers))


def _of_runs(text: str, what: str) -> tuple[int, ...]:
    numbers: list[int] = []
    for run in text.split(","):
        number, _, times = run.partition("*")
        numbers += [int(number)] * checks.whole(int(times), what, high=checks.MOST_EXPERTS)
        if len(numbers) > checks.MOST_EXPERTS:
            raise ValueError(f"{what}: more experts than there can be")
    return tuple(numbers)


def _stacks_of(written: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Ranks of stacks by module path; a list, or text of `_as_runs`."""
    stacks: dict[str, tuple[int, ...]] = {}
    high, places = checks.MOST_RANK, 0
    for path, each in _unstarred(written, "experts").items():
        ranks = _of_runs(each, f"ranks of {path}") if isinstance(each, str) else checks.sequence(each, path)
        stacks[path] = tuple(checks.whole(r, f"rank in {path}", high=high) for r in ranks)
        places += len(ranks)
        if places > _MOST_PLACES:
            raise ValueError("experts: more ranks than there can be")
    return stacks


def _compact_ids(ids: tuple[int, ...]) -> str:
    ranges, bits = as_ranges(ids), f"x{sum(1 << number for number in ids):x}"
    return min(ranges, bits, key=len)


def _of_compact_ids(text: str, what: str) -> tuple[int, ...]:
    last = checks.MOST_EXPERTS - 1
    if not text.startswith("x"):
        return of_ranges(text, what, high=last)
    if not re.fullmatch("x[0-9a-f]+", text) or len(text) > 1 + checks.MOST_EXPERTS // 4:
        raise ValueError(f"{what}: no hexadecimal number of at most {checks.MOST_EXPERTS} bits")
    return tuple(number for number, bit in enumerate(f"{int(text[1:], 16):b}"[::-1]) if bit == "1")


@dataclass(frozen=True)
class ModuleRanks:
    """Plain LoRA with a rank of its own for every module, on a dense or an MoE model; 0: the module is left alone.

    ranks     rank by module path, zeros left out
    experts   ranks [E] by the path of a projection of stacked experts, one an expert; all zeros are left out

    Nothing is adapted besides: attention, router and shared experts have LoRA where they have a rank. The scale
    lora_alpha/rank of the recipe holds for every module (its alpha follows its rank), so that a comparison of
    placements measures no scale, and a server that knows one alpha/r serves all of them.
    """

    ranks: Mapping[str, int]
    experts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    kind: Literal["module_ranks"] = field(default="module_ranks", init=False)

    def __post_init__(self) -> None:
        if twice := sorted(set(self.ranks) & set(self.experts)):
            raise InfeasibleError(f"{twice[0]} has both a rank and ranks of experts: a module has one of the two")
        plain = {path: _rank(r, path) for path, r in sorted(self.ranks.items())}
        stacks = {path: tuple(_rank(r, path) for r in ranks) for path, ranks in sorted(self.experts.items())}
        object.__setattr__(self, "ranks", MappingProxyType({path: r for path, r in plain.items() if r}))
        object.__setattr__(self, "experts", MappingProxyType({path: rs for path, rs in stacks.items() if any(rs)}))

    def __reduce__(self) -> tuple[Any, ...]:
        return (allocation_from_json, (self.to_json(),))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ModuleRanks):
            return NotImplemented
        return dict(self.ranks) == dict(other.ranks) and dict(self.experts) == dict(other.experts)

    def __hash__(self) -> int:
        return hash((tuple(self.ranks.items()), tuple(self.experts.items())))

    def of(self, module: ModuleShape) -> tuple[int, ...]:
        """The module's rank, or of a stack the rank of each of its experts; zeros where it is left alone."""
        if module.num_experts:
            return self.experts.get(module.path, (0,) * module.num_experts)
        return (self.ranks.get(module.path, 0),)

    @property
    def total_rank(self) -> int:
        """Σr over modules and experts. Modules differ in size: parameters, and not Σr, say what a model costs."""
        return sum(self.ranks.values()) + sum(map(sum, self.experts.values()))

    @property
    def matrices(self) -> int:
        """Weight matrices that have a rank, every expert's projection counted by itself."""
        stacked = (rank for ranks in self.experts.values() for rank in ranks)
        return sum(rank > 0 for rank in (*self.ranks.values(), *stacked))

    @property
    def total_experts(self) -> int:
        """Experts that have a rank in at least one of their projections, over all layers; 0 on a dense base."""
        adapted = {(path.rpartition(".")[0], i) for path, rs in self.experts.items() for i, r in enumerate(rs) if r}
        return len(adapted)

    def selection(self, shape: ModelShape) -> ExpertSelection:
        """The experts that have a rank in at least one of their projections, of a shape that fits."""
        chosen: dict[int, set[int]] = {}
        for module in shape.of_role("expert"):
            chosen.setdefault(module.layer, set()).update(e for e, rank in enumerate(self.of(module)) if rank)
        return ExpertSelection({layer: tuple(ids) for layer, ids in chosen.items()})

    def check(self, shape: ModelShape) -> None:
        """Raises InfeasibleError where a module does not exist, or a stack has not as many experts as ranks."""
        modules = {module.path: module for module in shape.modules}
        for path in (*self.ranks, *self.experts):
            if path not in modules:
                raise InfeasibleError(
                    f"{shape.name} has no module {path!r}; it has {len(modules)}, e.g. {sorted(modules)[:3]}"
                )
        for path in self.ranks:
            if size := modules[path].num_experts:
                raise InfeasibleError(
                    f"{path} is a stack of {size} experts: give `experts` {size} ranks, one an expert"
                )
        for path, ranks in self.experts.items():
            size = modules[path].num_experts
            if not size:
                raise InfeasibleError(f"{path} is no stack of experts: give `ranks` its one rank")
            if len(ranks) != size:
                raise InfeasibleError(f"{path} of {shape.name} has {size} experts, got {len(ranks)} ranks")

    def trainable_params(self, shape: ModelShape, *, rank: int = 0) -> int:  # noqa: ARG002
        """Exact number of trainable parameters, Σ r(in+out) over modules and experts.

        rank   of the recipe; it has no say here, because every module has its own
        """
        self.check(shape)
        return sum(module.lora_params(sum(self.of(module))) for module in shape.modules)

    def to_json(self) -> dict[str, Any]:
        """What `allocation_from_json` reads."""
        experts = {path: list(ranks) for path, ranks in self.experts.items()}
        return {"kind": self.kind, "ranks": dict(self.ranks), "experts": experts}

    def to_compact(self) -> dict[str, Any]:
        """What `allocation_from_json` reads, too: paths as those of `ExpertCounts`, ranks of a stack `4*16,0*240`."""
        experts = {path: _as_runs(ranks) for path, ranks in self.experts.items()}
        return {"kind": self.kind, "ranks": _starred(self.ranks), "experts": _starred(experts)}

    @cached_property
    def hashed(self) -> Hashed:
        """Its JSON as `digest_of` takes it, hashed once."""
        return Hashed(self.to_json())

    @property
    def digest(self) -> str:
        """Two allocations with the same digest give every module the same rank."""
        return self.hashed.digest


def _rank(value: Any, path: str) -> int:
    """A whole number that is not negative. Raises InfeasibleError for anything else."""
    try:
        rank = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        rank = None
    if rank is None or not 0 <= rank <= checks.MOST_RANK:
        raise InfeasibleError(f"the rank of {path} must be a whole number from 0 to {checks.MOST_RANK}, got {value!r}")
    return rank


Allocation = ExpertCounts | ExpertSelection | ModuleRanks


def allocation_from_json(data: Mapping[str, Any]) -> Allocation:
    """Reads what `Allocation.to_json` wrote.

    Raises StudyError for a kind that does not exist, ValueError or InfeasibleError for what no allocation holds.
    """
    text = json.dumps(data)
    return _remembered(text) if len(text) < 20_000 else _allocation_of(data)


@lru_cache(maxsize=256)
def _remembered(text: str) -> Allocation:
    """Trainings of a study share few allocations, and each then holds the same object."""
    return _allocation_of(json.loads(text))


def _allocation_of(data: Mapping[str, Any]) -> Allocation:
    match data.get("kind"):
        case "expert_selection":
            return ExpertSelection(_experts_of(checks.mapping(data["experts"], "experts")))
        case "expert_counts":
            counts = _unstarred(checks.mapping(data["counts"], "counts"), "counts")
            most = checks.MOST_EXPERTS
            return ExpertCounts(
                {path: checks.whole(n, f"experts of {path}", high=most) for path, n in counts.items()},
                checks.text(data["gating"], "gating"),  # type: ignore[arg-type]
            )
        case "module_ranks":
            ranks = _unstarred(checks.mapping(data["ranks"], "ranks"), "ranks")
            return ModuleRanks(
                {path: checks.whole(r, f"rank of {path}", high=checks.MOST_RANK) for path, r in ranks.items()},
                _stacks_of(checks.mapping(data["experts"], "experts")),
            )
        case other:
            raise StudyError(
                f"unknown allocation kind {other!r}: possible are expert_selection, expert_counts, module_ranks"
            )


class _Range(NamedTuple):
    """What a setting can be: from `low` to `high`, both included; `beyond` and `below`: without the end itself."""

    low: float
    high: float
    beyond: bool = False
    below: bool = False

    def missed_by(self, value: float) -> str:
        """What the value must be and is not; empty for a value in the range."""
        too_low = value <= self.low if self.beyond else value < self.low
        if not too_low and (value < self.high if self.below else value <= self.high):
            return ""
        if self.high <= 1:
            return f"in {'(' if self.beyond else '['}{self.low:g}, {self.high:g}{')' if self.below else ']'}"
        if not too_low:
            return f"at most {self.high:g}"
        return "positive" if self.beyond else f"at least {self.low:g}" if self.low else "not negative"


_LARGEST = checks.LARGEST
_RANGES = {
    "rank": _Range(1, checks.MOST_EXPERTS),
    "lora_alpha": _Range(0, _LARGEST, beyond=True),
    "lora_dropout": _Range(0, 1, below=True),
    "learning_rate": _Range(0, 1e40, beyond=True),  # whatever diverges is an outcome, also in float32
    "weight_decay": _Range(0, _LARGEST),
    "warmup_ratio": _Range(0, 1),
    "max_grad_norm": _Range(0, _LARGEST),
    "batch_size": _Range(1, 1 << 20),
    "micro_batch_size": _Range(1, 1 << 20),
    "steps": _Range(0, 10**9),
    "epochs": _Range(0, 10**6),
    "max_length": _Range(2, 1 << 24),
    "top_k": _Range(1, checks.MOST_EXPERTS),
    "balance_coef": _Range(0, _LARGEST),
}


def _check_ranges(settings: LoraSettings | Recipe) -> None:
    """Raises StudyError for the first number that is not finite, of the wrong kind or out of its range."""
    for f in fields(settings):
        if (of := _RANGES.get(f.name)) is None:
            continue
        value, whole = getattr(settings, f.name), f.type == "int"
        kind = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not kind or not math.isfinite(value):
            raise StudyError(f"{f.name} must be a {'whole' if whole else 'finite'} number, got {shown(repr(value))}")
        if must_be := of.missed_by(value):
            raise StudyError(f"{f.name} must be {must_be}, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """The settings that an adapter is built from: the part of a `Recipe` that goes through the adapters as one value.

    rank, lora_alpha, lora_dropout   LoRA: y = Wx + (lora_alpha/rank)·B·A·drop(x); where modules have ranks of their own
                                     (`ModuleRanks`), rank is that of a module that has its even share
    top_k                            experts per token of added LoRA-MoE layers (dense bases only)
    balance_coef                     coefficient of the balance loss of added LoRA-MoE layers

    Raises StudyError where a value is impossible.
    """

    rank: int
    lora_alpha: float
    lora_dropout: float = 0.0
    top_k: int = 2
    balance_coef: float = 0.0

    def __post_init__(self) -> None:
        _check_ranges(self)

    @property
    def scale(self) -> float:
        """lora_alpha / rank."""
        return self.lora_alpha / self.rank


def _experts_of(written: Mapping[str, Any]) -> dict[int, tuple[int, ...]]:
    """Expert ids by layer; layers, which are text in JSON, may be ranges, and ids then are text, too."""
    experts: dict[int, tuple[int, ...]] = {}
    places = 0
    for layers, ids in written.items():
        if isinstance(ids, str):
            chosen = _of_compact_ids(ids, f"expert id of layer {layers}")
            numbers = of_ranges(layers, "layer", high=checks.MOST_LAYERS)
        else:
            numbers = (checks.whole(int(layers), "layer", high=checks.MOST_LAYERS),)
            what, last = f"expert id of layer {layers}", checks.MOST_EXPERTS - 1
            chosen = tuple(checks.whole(each, what, high=last) for each in checks.sequence(ids, what))
        places += len(numbers) * len(chosen)
        if places > _MOST_PLACES or experts.keys() & set(numbers):
            raise ValueError("experts: a layer twice, or more than there can be")
        experts |= dict.fromkeys(numbers, chosen)
    return experts


@dataclass(frozen=True, slots=True)
class Recipe:
    """LoRA and optimiser settings of one training run; the same fields for every allocator of a comparison.

    rank, lora_alpha, lora_dropout   LoRA: y = Wx + (lora_alpha/rank)·B·A·drop(x)
    learning_rate, weight_decay      AdamW
    warmup_ratio, schedule           share of steps with rising rate; then `cosine | linear | constant`
    max_grad_norm                    clipping, 0 turns it off
    batch_size                       sequences per optimiser step over all workers
    micro_batch_size                 sequences per forward pass of one worker; the rest is gradient accumulation
    steps                            optimiser steps; 0: use `epochs`
    epochs                           passes over the training split, used where steps is 0
    max_length                       tokens per training sequence; longer ones lose their beginning
    top_k                            experts per token of added LoRA-MoE layers (dense bases only)
    balance_coef                     coefficient of the balance loss of added LoRA-MoE layers

    A LoRA setting is a field here and one of the same name in `LoraSettings`. It is no base class of this one, because
    inherited fields come first: tables, reports and forests go by the order of these fields, which would change.
    """

    rank: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    learning_rate: float = 3e-4
    weight_decay: float = 0.0
    warmup_ratio: float = 0.1
    schedule: Schedule = "cosine"
    max_grad_norm: float = 1.0
    batch_size: int = 16
    micro_batch_size: int = 16
    steps: int = 0
    epochs: float = 1.0
    max_length: int = 512
    top_k: int = 2
    balance_coef: float = 0.0

    def __post_init__(self) -> None:
        _check_ranges(self)
        if self.steps == 0 and self.epochs == 0:
            raise StudyError("steps or epochs must be positive")
        if self.schedule not in SCHEDULES:
            raise StudyError(f"schedule must be cosine, linear or constant, got '{shown(str(self.schedule))}'")

    @property
    def lora(self) -> LoraSettings:
        """The settings that an adapter is built from."""
        return LoraSettings(**{f.name: getattr(self, f.name) for f in fields(LoraSettings)})

    @property
    def scaled_rate(self) -> float:
        """learning_rate · lora_alpha: how fast an adapter's ΔW moves, whatever its rank.

        ΔW = (lora_alpha/r)·B·A is a sum of r terms, and Adam moves each entry of B by learning_rate a step, so that a
        step moves ΔW by about learning_rate·lora_alpha. The best scaled rate therefore hardly depends on the rank
        (Schulman and Thinking Machines Lab 2025, "LoRA Without Regret"). At one scaled rate a larger alpha moves A less
        and B as before, as LoRA+ does with two learning rates (Hayou et al. 2024, arXiv:2402.12354).
        """
        return self.learning_rate * self.lora_alpha

    def to_json(self) -> dict[str, Any]:
        """Every field, defaults included."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Recipe:
        """Raises TypeError for a field that recipes do not have; one that is missing takes its default."""
        return cls(**data)


# A recipe for a first look at any model, where neither the task nor the command line suggests one.
TRANSFERABLE: Mapping[str, float] = {"rank": 4, "lora_alpha": 64.0, "scaled_rate": 0.1}


@dataclass(frozen=True)
class Point:
    """What a space proposes: an allocator, its knobs, and recipe settings that differ from the study's."""

    allocator: str
    knobs: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """One training run. Two trials with equal digests are the same run, whichever allocator proposed them.

    allocator, knobs   what proposed it: for the record, and no part of the digest
    parent             digest of the training whose adapter this one was cut from (`search/truncate/`): it was not
                       trained, and is a point of its own. Empty for a training
    """

    allocation: Allocation
    recipe: Recipe
    model: str
    task: str
    seed: int
    allocator: str = ""
    knobs: Mapping[str, Any] = field(default_factory=dict)
    parent: str = ""

    @cached_property
    def digest(self) -> str:
        """It covers allocation, recipe, model, task and seed: allocator and knobs say only where it came from."""
        rest = {"recipe": self.recipe.to_json(), "model": self.model, "task": self.task, "seed": self.seed}
        return self.allocation.hashed.digest_with("allocation", rest | self._origin)

    @property
    def _origin(self) -> dict[str, str]:
        """What sets a cut adapter apart from a training with the same ranks."""
        return {"parent": self.parent} if self.parent else {}

    @cached_property
    def point(self) -> str:
        """Digest of all but the seed: the trials of one point share it.

        Where every seed draws its own random experts (`draw=each`), the rule is the point and not what it drew.
        """
        what = {"recipe": self.recipe.to_json(), "model": self.model, "task": self.task} | self._origin
        if self.knobs.get("draw") == "each":
            return digest_of(what | {"allocator": self.allocator, "knobs": dict(self.knobs)})
        return self.allocation.hashed.digest_with("allocation", what)

    def to_json(self, *, compact: bool = False) -> dict[str, Any]:
        """What `from_json` reads, and the digest; the allocation in few bytes where it is to be compact."""
        return {
            "digest": self.digest,
            "allocator": self.allocator,
            "knobs": dict(self.knobs),
            "allocation": self.allocation.to_compact() if compact else self.allocation.to_json(),
            "recipe": self.recipe.to_json(),
            "model": self.model,
            "task": self.task,
            "seed": self.seed,
        } | self._origin

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trial:
        """Raises KeyError, TypeError, ValueError or a ToolkitError where it is no trial.

        Its name is computed from what it holds: a digest that is written beside it is only checked to be one.
        """
        if "digest" in data:
            checks.digest(data["digest"])
        return cls(
            allocation_from_json(checks.mapping(data["allocation"], "allocation")),
            Recipe.from_json(checks.like(data["recipe"], _EXAMPLE_RECIPE, "recipe")),
            checks.text(data["model"], "model"),
            checks.text(data["task"], "task"),
            checks.whole(data["seed"], "seed"),
            checks.text(data.get("allocator", ""), "allocator"),
            checks.scalars(data.get("knobs", {}), "knobs"),
            checks.digest(data["parent"]) if data.get("parent") else "",
        )


_EXAMPLE_RECIPE = Recipe().to_json()


@dataclass(frozen=True, slots=True)
class Rung:
    """One evaluation on the way.

    step       optimiser steps so far
    tokens     trained tokens so far, padding excluded
    accuracy   on the split that selects (`select_on=`); None where it is not finite
    stderr     standard error of the accuracy over the questions; None where it is not known
    loss       mean training loss since the rung before, nats a token; None where it is not finite
    seconds    wall clock so far
    by_task    of several tasks: `{"arc_easy": {"accuracy", "stderr"}}`; accuracy is the mean of theirs
    eval_loss  mean loss of the right answers to the same questions, nats a token; None where it is not known, as where
               the model writes its answers, or not finite
    """

    step: int
    tokens: int
    accuracy: float | None
    stderr: float | None = None
    loss: float | None = None
    seconds: float = 0.0
    by_task: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    eval_loss: float | None = None

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads; `by_task` is left out where there is one task."""
        data = asdict(self)
        return data if self.by_task else {name: value for name, value in data.items() if name != "by_task"}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Rung:
        """Raises KeyError where step, tokens or accuracy is missing, TypeError or ValueError where it is no rung.

        Keys of other versions are left out.
        """
        known = {f.name: data[f.name] for f in fields(cls) if data.get(f.name) is not None}
        rung = cls(**{"accuracy": data["accuracy"], **known})
        checks.whole(rung.step, "step")
        checks.whole(rung.tokens, "tokens")
        checks.optional_number(rung.accuracy, "accuracy")
        checks.optional_number(rung.stderr, "stderr", low=0)
        checks.optional_number(rung.loss, "loss", low=-_MOST_LOSS, high=_MOST_LOSS)
        checks.optional_number(rung.eval_loss, "eval_loss", low=-_MOST_LOSS, high=_MOST_LOSS)
        checks.number(rung.seconds, "seconds", low=0)
        _check_by_task(rung.by_task)
        return rung


_MOST_LOSS = 1e300  # a loss on its way to infinity is a fact, and is only drawn


def _check_by_task(by_task: Any) -> None:
    for label, of_task in checks.mapping(by_task, "by_task").items():
        checks.number(of_task["accuracy"], f"accuracy of {label}")
        checks.number(of_task["stderr"], f"stderr of {label}", low=0)


@dataclass(frozen=True, slots=True)
class Score:
    """An evaluation on the test split.

    accuracy, stderr   over the questions of the split; of several tasks the mean of theirs and its standard error
    by_task            of several tasks: `{"arc_easy": {"accuracy", "stderr"}}`
    """

    accuracy: float
    stderr: float
    by_task: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads; `by_task` is left out where there is one task."""
        data = asdict(self)
        return data if self.by_task else {name: value for name, value in data.items() if name != "by_task"}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Score:
        """Raises KeyError, TypeError or ValueError where it is no score. Keys of other versions are left out."""
        score = cls(data["accuracy"], data["stderr"], data.get("by_task") or {})
        checks.number(score.accuracy, "accuracy of the test split")
        checks.number(score.stderr, "stderr of the test split", low=0)
        _check_by_task(score.by_task)
        return score


@dataclass(frozen=True, slots=True)
class Forgetting:
    """Loss on general text that was not trained on, nats a token (`trainers/forgetting.py`).

    before, after   of the base alone, and with the trained adapter
    stderr          of the rise, paired over the rows of the text; None where it is not known
    """

    before: float
    after: float
    stderr: float | None = None

    @property
    def rise(self) -> float:
        """What was forgotten; below zero where the text is foreseen better than before."""
        return self.after - self.before

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Forgetting:
        """Raises KeyError or ValueError where it is none. Keys of other versions are left out."""
        for name in ("before", "after"):
            checks.number(data[name], f"loss {name} training", low=-_MOST_LOSS, high=_MOST_LOSS)
        checks.optional_number(data.get("stderr"), "stderr of forgetting", low=0)
        return cls(data["before"], data["after"], data.get("stderr"))


# What became of a trial. Results, which are in FINISHED: complete, stopped (a scheduler ended it early), and diverged,
# failed and out_of_memory, which this point does here every time. `lost` is no result: the platform took the training
# away (a process that was killed, a disk that is full), and it is to be trained again.
Status = Literal["started", "lost", "complete", "stopped", "diverged", "failed", "out_of_memory"]
FINISHED: tuple[Status, ...] = ("complete", "stopped", "diverged", "failed", "out_of_memory")


@dataclass(frozen=True)
class Outcome:
    """What became of a trial. `accuracy` is None unless the run reached an evaluation; it is never NaN.

    rungs       one an evaluation, in the order of their steps
    test        of the trained adapter on the test split; None where it was not evaluated there
    seconds     wall clock of training and evaluation on the worker
    tokens      trained tokens, padding excluded
    adapter     where the trained adapter was saved, "" where none was; records keep that there is one, not where
    pack        how many trainings shared its passes over the base at most, itself included; seconds are its share then
    forgetting  loss on general text before and after; None where the study does not measure it, or nothing was saved
    """

    trial: Trial
    status: Status
    trainable_params: int
    accuracy: float | None = None
    rungs: tuple[Rung, ...] = ()
    seconds: float = 0.0
    tokens: int = 0
    peak_memory_bytes: int = 0
    adapter: str = ""
    message: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    pack: int = 1
    test: Score | None = None
    forgetting: Forgetting | None = None

    @property
    def digest(self) -> str:
        """The trial's digest."""
        return self.trial.digest

    @property
    def judged(self) -> float | None:
        """Accuracy on the test split where it was evaluated there, else as the search saw it."""
        return self.test.accuracy if self.test else self.accuracy

    @property
    def by_task(self) -> Mapping[str, Mapping[str, float]]:
        """`{"arc_easy": {"accuracy", "stderr"}}` where several tasks were trained and evaluated, else empty."""
        return self.rungs[-1].by_task if self.rungs and self.accuracy is not None else {}

    def check_count(self, shape: ModelShape) -> None:
        """Raises ValueError where it has not the parameters that it says, InfeasibleError for an allocation that the
        model has no place for.
        """
        counted = self.trial.allocation.trainable_params(shape, rank=self.trial.recipe.rank)
        if counted != self.trainable_params:
            says = f"it says {self.trainable_params:,} trainable parameters"
            raise ValueError(f"{says}, and its allocation has {counted:,}")

    def updated(self, **changes: Any) -> Outcome:
        """A copy with these fields changed."""
        return replace(self, **changes)

    def to_json(self, *, compact: bool = False) -> dict[str, Any]:
        """What `from_json` reads; the trial's allocation in few bytes where it is to be compact."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "trial"}
        data["rungs"] = [rung.to_json() for rung in self.rungs]
        data["test"] = self.test.to_json() if self.test else None
        data["versions"] = dict(self.versions)
        del data["forgetting"]
        if self.forgetting is not None:  # a study that does not measure it has no such key
            data["forgetting"] = asdict(self.forgetting)
        return {"trial": self.trial.to_json(compact=compact), **data}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Outcome:
        """Raises KeyError, TypeError, ValueError or a ToolkitError where it is no outcome."""
        known = {f.name for f in fields(cls)}
        rest = {k: v for k, v in data.items() if k in known and k != "trial"}
        rest["rungs"] = tuple(Rung.from_json(rung) for rung in checks.sequence(rest.get("rungs", ()), "rungs"))
        rest["test"] = Score.from_json(rest["test"]) if rest.get("test") else None
        rest["forgetting"] = Forgetting.from_json(rest["forgetting"]) if rest.get("forgetting") else None
        outcome = cls(Trial.from_json(data["trial"]), **rest)
        if outcome.status not in get_args(Status):
            raise ValueError(f"status must be one of {', '.join(get_args(Status))}, got {ascii(outcome.status)[:60]}")
        checks.whole(outcome.trainable_params, "trainable_params")
        checks.optional_number(outcome.accuracy, "accuracy")
        checks.number(outcome.seconds, "seconds", low=0)
        checks.whole(outcome.tokens, "tokens")
        checks.whole(outcome.peak_memory_bytes, "peak_memory_bytes")
        checks.text(outcome.adapter, "adapter")
        checks.text(outcome.message, "message")
        checks.whole(outcome.pack, "pack", low=1)
        for name, version in checks.mapping(outcome.versions, "versions").items():
            checks.text(version, f"version of {name}")
        return outcome


def best_under(outcomes: Iterable[Outcome], max_params: int) -> Outcome | None:
    """The most accurate finished outcome with at most `max_params` trainable parameters; ties go to the smaller."""
    fitting = [o for o in outcomes if o.accuracy is not None and o.trainable_params <= max_params]
    return max(fitting, key=lambda o: (o.accuracy or 0.0, -o.trainable_params), default=None)
