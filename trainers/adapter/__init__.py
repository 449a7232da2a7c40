"""The door to every adapter: put LoRA where an allocation says, take it off again, save it, load it.

    adapter = attach(model, allocation, shape=shape, rank=8, lora_alpha=16)      # freezes the base
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=3e-4)
    ...                                                                          # train, evaluate
    save(adapter, "best", metadata={"accuracy": 0.41})
    adapter.detach()                                                             # or adapter.merge()

    adapter = load(model, "best")                                                # later, on the same base

    adapters = Adapters(model, {"small": "knee", "large": "best"})               # several on one base, one at a time
    adapters.set_adapter("large")
    adapters.set_adapter(None)                                                   # the base itself, bit for bit

An MoE base takes an `ExpertSelection` (`trainers/adapter/expert_lora.py`), a dense base takes `ExpertCounts`
(`lora_moe.py`). Both build on the `Adapter` below: it holds the trainable tensors, which never become part of
the model (its `state_dict` stays that of the base), and the list of things to undo.

Shapes: T tokens, I input features, O output features, R rank.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allocators.core.errors import StudyError, TrialError, unknown
from allocators.core.types import (
    Allocation,
    ExpertCounts,
    ExpertSelection,
    ModelShape,
    ModuleShape,
    allocation_from_json,
)
from trainers import storage
from trainers.models import sharding
from trainers.models.quantized import is_quantized, quantization_of

FORMAT = 1  # of adapter.json
_WEIGHTS, _CONFIG = "adapter.safetensors", "adapter.json"


def attach(
    model: nn.Module,
    allocation: Allocation,
    *,
    shape: ModelShape,
    rank: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    top_k: int = 2,
    balance_coef: float = 0.0,
    seed: int = 0,
) -> Adapter:
    """Freezes `model` and inserts LoRA in place, as `allocation` says.

    A fresh adapter changes nothing, bit for bit, because every B is zero. The start values of A depend on `seed`, the
    module's path and the expert's id alone: not on the global random state and not on what else is adapted.

    `top_k` (experts per token) and `balance_coef` concern dense bases only: an MoE base keeps its own router.

    Raises InfeasibleError where the allocation does not fit `shape`, StudyError where `shape` does not fit `model` or
    the model carries an adapter already.
    """
    match allocation:
        case ExpertSelection():
            from trainers.adapter import expert_lora

            return expert_lora.attach(
                model, allocation, shape=shape, rank=rank, lora_alpha=lora_alpha, lora_dropout=lora_dropout, seed=seed
            )
        case ExpertCounts():
            from trainers.adapter import lora_moe

            return lora_moe.attach(
                model,
                allocation,
                shape=shape,
                rank=rank,
                lora_alpha=lora_alpha,
                lora_dropout=lora_dropout,
                top_k=top_k,
                balance_coef=balance_coef,
                seed=seed,
            )


class Adapter(ABC):
    """Trainable tensors hooked into a frozen model, and the way back. Subclasses add what they insert.

    settings      the numbers besides the allocation that `attach` needs to build this adapter again
    fingerprint   of the base's weights, taken before anything was inserted
    """

    def __init__(
        self,
        model: nn.Module,
        allocation: Allocation,
        *,
        shape: ModelShape,
        rank: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        **settings: Any,
    ) -> None:
        allocation.check(shape)
        _refuse_second(model, shape.name)
        self.model: Any = model
        self.allocation = allocation
        self.shape = shape
        self.rank = rank
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.settings = {"rank": rank, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout, **settings}
        self.fingerprint = fingerprint(model)
        self._tensors: dict[str, nn.Parameter] = {}
        self._puts: list[Callable[[], Callable[[], Any]]] = []
        self._undo: list[Callable[[], Any]] = []
        self._put(self._freeze)

    @property
    def scale(self) -> float:
        """lora_alpha / rank."""
        return self.lora_alpha / self.rank

    # --- for subclasses ---

    def _freeze(self) -> Callable[[], None]:
        return freeze(self.model, self)

    def _put(self, put: Callable[[], Callable[[], Any]]) -> None:
        """Puts something into the model, now and at every `reattach`; `put` returns what takes it out again."""
        self._puts.append(put)
        self._undo.append(put())

    def _on_detach(self, undo: Callable[[], Any]) -> None:
        """For what is there until the first detach only."""
        self._undo.append(undo)

    def _add(self, name: str, value: Tensor, *, device: torch.device) -> nn.Parameter:
        """A trainable tensor, fp32 whatever the base has: bf16 loses updates below 0.4 % of a weight."""
        self._tensors[name] = nn.Parameter(value.to(device=device, dtype=torch.float32))
        return self._tensors[name]

    def _add_linear_lora(self, module: Any, spec: ModuleShape, *, seed: int) -> None:
        """Plain LoRA on a linear layer, or on a router: a small module whose forward calls F.linear on its `weight`."""
        weight = module.weight
        a_RI = self._add(
            f"{spec.path}.lora_A", uniform(self.rank, spec.in_features, seed=seed, name=spec.path), device=weight.device
        )
        b_OR = self._add(f"{spec.path}.lora_B", torch.zeros(spec.out_features, self.rank), device=weight.device)

        def add(out: Tensor, x: Tensor) -> Tensor:
            x = F.dropout(x, self.lora_dropout, module.training)
            return add_lora(out, x, a_RI, b_OR, scale=self.scale)

        self._put(lambda: put_on_linear(module, add))

    def _put_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        self._put(lambda: put_attribute(module, name, value))

    def _merge_linear_lora(self, module: Any, spec: ModuleShape) -> None:
        """W += (lora_alpha/r)·B·A, summed in fp32. Call it after the hooks are gone."""
        a_RI, b_OR = self._tensors[f"{spec.path}.lora_A"], self._tensors[f"{spec.path}.lora_B"]
        add_to_weight(module.weight, self.scale * (b_OR @ a_RI))

    # --- for everybody ---

    def parameters(self) -> list[nn.Parameter]:
        return list(self._tensors.values())

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self._tensors.items())

    @property
    def num_trainable(self) -> int:
        """Equals `allocation.trainable_params(shape, rank=rank)`; a test holds every family to it."""
        return sum(p.numel() for p in self._tensors.values())

    def state_dict(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self._tensors.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies values in. Raises StudyError where names or sizes differ; nothing is copied then."""
        strangers = sorted(set(state) ^ set(self._tensors))
        if strangers:
            raise StudyError(
                f"adapter weights do not fit: {strangers[0]!r} and {len(strangers) - 1} more exist on one side only"
            )
        for name, parameter in self._tensors.items():
            if state[name].shape != parameter.shape:
                raise StudyError(
                    f"adapter weights do not fit: {name} is {list(state[name].shape)}, "
                    f"this allocation and rank need {list(parameter.shape)}"
                )
        with torch.no_grad():
            for name, parameter in self._tensors.items():
                parameter.copy_(state[name])

    def extra_loss(self, real_BS: Tensor | None = None) -> Tensor | None:
        """What to add to the training loss (a balance loss of added routers), None where there is none.

        real_BS   nonzero where there is a token and not padding; None: as the attention mask of the last pass says
        """
        return None

    def check_gradients(self) -> None:
        """Call after the first backward pass.

        Raises TrialError naming a tensor that is no part of the loss.
        """
        for name, parameter in self._tensors.items():
            if parameter.grad is None:
                raise TrialError(f"{name} got no gradient: its module took no part in the loss; is it still attached?")

    @contextmanager
    def detached_on_error(self) -> Iterator[None]:
        """A failure inside the block leaves the base model as it was found."""
        try:
            yield
        except Exception:
            self.detach()
            raise

    def detach(self) -> None:
        """Restores the base model: its weights were never touched, hooks and flags go back. Twice is once."""
        while self._undo:
            self._undo.pop()()

    def reattach(self) -> None:
        """Puts a detached adapter back with the values it has: hooks only, nothing is loaded, copied or drawn.

        Raises StudyError where the model carries an adapter, or this one was merged into it.
        """
        _refuse_second(self.model, self.shape.name)
        if not self._puts:
            raise StudyError(
                f"this adapter was merged into {self.shape.name}: load that base model and the adapter again"
            )
        with self.detached_on_error():
            for put in self._puts:
                self._undo.append(put())

    def merge(self) -> None:
        """Adds the deltas to the base weights and detaches for good: what stays is a plain model.

        Raises TrialError on a quantised base, which then stays as it is, with the adapter on it.
        """
        if kind := quantization_of(self.model):
            raise TrialError(
                f"{self.shape.name} is quantised ({kind}): W + B·A is no {kind} matrix, merging would change what was "
                "trained; use the adapter attached, or train on the base without quantization"
            )
        self.detach()
        self._puts.clear()
        self._merge()

    @abstractmethod
    def _merge(self) -> None:
        """Adds the deltas to the weights of the base, which is as it was before `attach`."""


# ---------------------------------------------------------------------------------------------------------------------
# Plain LoRA


def uniform(*size: int, seed: int, name: str) -> Tensor:
    """Start values of one A [..., R, I]: kaiming-uniform(√5), that is U(−1/√I, 1/√I), from a generator of its own."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    bound = 1 / math.sqrt(size[-1])
    return torch.empty(*size).uniform_(-bound, bound, generator=generator)


def add_lora(out: Tensor, x: Tensor, a_RI: Tensor, b_OR: Tensor, *, scale: float) -> Tensor:
    """`out + scale · x Aᵀ Bᵀ`, one GEMM in and one accumulated into `out` [..., O] in place; in the dtype of `out`."""
    rank_space = F.linear(x.to(out.dtype), a_RI.to(out.dtype))
    total = out.flatten(0, -2).addmm_(rank_space.flatten(0, -2), b_OR.to(out.dtype).t(), alpha=scale)
    return total.view_as(out)


def add_to_weight(weight: Tensor, delta: Tensor) -> None:
    """`weight += delta` in fp32, rounded once; of a sharded weight the rows that this worker holds."""
    rows, first = sharding.local_rows(weight)
    with torch.no_grad():
        rows.copy_(rows.float() + delta[first : first + len(rows)])


def put_on_linear(module: Any, add: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
    """`add(out, x)`, which may write to `out`, after a linear layer, or inside a router before its softmax.

    Returns what takes it off.
    """
    packed = is_quantized(module)
    if packed or type(module).forward is nn.Linear.forward:

        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            # what bitsandbytes returns may be a view, which must not be written to
            return add(out.clone() if packed else out, args[0])

        return module.register_forward_hook(hook).remove
    # An instance attribute hides the parameter from the router's forward, and from nothing else.
    return put_attribute(module, "weight", _RouterWeight(module, add))


def put_attribute(module: nn.Module, name: str, value: Any) -> Callable[[], None]:
    """An attribute of one module alone, which is no submodule or parameter and so not in the state_dict."""
    vars(module)[name] = value
    return lambda: vars(module).pop(name)


class _RouterWeight:
    """What a router's forward finds as `self.weight`: F.linear with it yields logits that include the LoRA part.

    A router is no nn.Linear and returns logits, weights and ids at once, so a hook on it would come after softmax and
    top-k. Adding B·A to the weight instead would lose small deltas to bf16 rounding and could not drop inputs out.
    """

    def __init__(
        self,
        router: nn.Module,
        add: Callable[[Tensor, Tensor], Tensor],
        dtype: torch.dtype | None = None,
    ) -> None:
        self.router, self.add = router, add
        self._dtype = dtype  # None: the parameter's own

    @property
    def weight(self) -> Tensor:
        """The parameter as it is now: that of a sharded model is another tensor while its layer runs."""
        weight = self.router._parameters["weight"]
        assert weight is not None
        return weight if self._dtype is None else weight.type(self._dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def type(self, dtype: torch.dtype) -> _RouterWeight:
        """Some families compute their logits in fp32: F.linear(x.type(float32), weight.type(float32))."""
        return _RouterWeight(self.router, self.add, dtype)

    def float(self) -> _RouterWeight:
        return self.type(torch.float32)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Tensor:
        if func is not F.linear:  # anything else would compute on W alone and lose the adapter silently
            raise StudyError(f"LoRA on a router supports F.linear(x, weight), this router calls {func.__name__}")
        x, self, *bias = args
        return self.add(F.linear(x, self.weight, *bias, **(kwargs or {})), x)


# ---------------------------------------------------------------------------------------------------------------------
# The base model


def freeze(model: Any, owner: Any) -> Callable[[], None]:
    """No gradient for the base, and a sign on it that `owner` is attached; returns what undoes both."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    model.lora_adapter = owner

    def undo() -> None:
        delattr(model, "lora_adapter")
        for parameter in trainable:
            parameter.requires_grad_(True)

    return undo


def _refuse_second(model: nn.Module, name: str) -> None:
    if getattr(model, "lora_adapter", None) is not None:
        raise StudyError(f"{name} carries an adapter already: call its detach() or merge() first")


def module_at(model: nn.Module, path: str, *, name: str) -> Any:
    """The submodule at a dotted path. Raises StudyError where the model has none."""
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise StudyError(
            f"{type(model).__name__} has no module {path!r}, which {name} should have: is it another model family?"
        ) from error


def weight_size(module: Any) -> tuple[int, ...]:
    """[O, I] of a linear layer, packed or not, or of a router."""
    return (module.out_features, module.in_features) if isinstance(module, nn.Linear) else tuple(module.weight.shape)


def check_size(size: Sequence[int], expected: tuple[int, ...], *, path: str, name: str) -> None:
    """Raises StudyError where a weight is not as large as the shape says."""
    if tuple(size) != expected:
        raise StudyError(f"{path} is {list(size)} in this model, {name} has {list(expected)}: another model size?")


def fingerprint(model: nn.Module, *, samples: int = 64) -> str:
    """16 hex digits that tell one set of base weights from another.

    Reads `samples` evenly spaced values of every parameter of the model, rounded to bf16, so that one checkpoint has
    one fingerprint whether it was loaded in fp32 or bf16. Packed weights count as the bytes they are: a quantised base
    has a fingerprint of its own. That of a sharded base is computed by all its workers together.
    """
    values = sharding.sampled(model.parameters(), samples).to(torch.bfloat16).float()
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Files


def save(adapter: Adapter, folder: str | os.PathLike, *, metadata: Mapping[str, Any]) -> None:
    """Writes `adapter.safetensors` and `adapter.json` (allocation, settings, base model, `metadata`) into `folder`.

    Works before and after detach() and merge(). Raises StudyError where the folder cannot be written.
    """
    from safetensors.torch import save_file

    path = Path(folder)
    config = {
        "format": FORMAT,
        "base": {
            "name": adapter.shape.name,
            "family": _family(adapter.model),
            "fingerprint": adapter.fingerprint,
            "quantization": quantization_of(adapter.model),
        },
        "allocation": adapter.allocation.to_json(),
        "settings": adapter.settings,
        "trainable_params": adapter.num_trainable,
        "shape": adapter.shape.to_json(),
        "metadata": dict(metadata),
    }
    try:
        path.mkdir(parents=True, exist_ok=True)
        save_file({n: t.contiguous().cpu() for n, t in adapter.state_dict().items()}, path / _WEIGHTS)
        (path / _CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise StudyError(
            f"cannot save the adapter in {path}: {error.strerror}; choose a folder you may write"
        ) from error


@dataclass(frozen=True)
class Saved:
    """What a folder holds that `save` wrote: the contents of adapter.json, and the weights by name."""

    folder: str
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]

    @property
    def allocation(self) -> Allocation:
        return allocation_from_json(self.config["allocation"])

    @property
    def shape(self) -> ModelShape:
        return ModelShape.from_json(self.config["shape"])

    @property
    def scale(self) -> float:
        """lora_alpha / rank."""
        return self.config["settings"]["lora_alpha"] / self.config["settings"]["rank"]


def read(folder: str | os.PathLike) -> Saved:
    """What a folder (a path or a URI) holds; needs no model.

    Raises StudyError where it holds no adapter, a damaged one, or not as many weights as its allocation has.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with storage.reading_folder(folder) as path:
        try:
            config = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
            weights = load_file(path / _WEIGHTS)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StudyError(f"no adapter in {folder}: expected {_CONFIG} and {_WEIGHTS} there") from error
        except (json.JSONDecodeError, SafetensorError) as error:
            raise StudyError(f"the adapter in {folder} is damaged: {error}; save it again") from error
    if config["format"] != FORMAT:
        raise StudyError(f"{folder}/{_CONFIG} has format {config['format']}, this version reads {FORMAT}")
    saved = Saved(str(folder), config, weights)
    held = sum(tensor.numel() for tensor in weights.values())
    counted = saved.allocation.trainable_params(saved.shape, rank=config["settings"]["rank"])
    if held != counted:
        raise StudyError(
            f"the adapter in {folder} is damaged: it holds {held:,} values, its allocation {counted:,}; save it again"
        )
    return saved


def load(model: nn.Module, folder: str | os.PathLike) -> Adapter:
    """Attaches a saved adapter to `model`, which must be the base it was trained on.

    folder   a path or a URI

    Raises StudyError as `read` does, and where the base is of another family, size or training.
    """
    saved = read(folder)
    config, weights, path = saved.config, saved.weights, saved.folder
    shape, base = saved.shape, config["base"]
    if _family(model) != base["family"]:
        raise StudyError(
            f"the adapter in {path} is for {base['name']} ({base['family']}), got a {_family(model)} model"
        )
    adapter = attach(model, saved.allocation, shape=shape, **config["settings"])
    with adapter.detached_on_error():
        have, wanted = quantization_of(model), base.get("quantization", "")  # earlier versions had no quantised bases
        if have != wanted:
            raise StudyError(
                f"the adapter in {path} was trained on {base['name']} with quantization '{wanted}', this model has "
                f"'{have}': models.load({base['name']!r}, quantization={wanted!r})"
            )
        if adapter.fingerprint != base["fingerprint"]:
            raise StudyError(
                f"the adapter in {path} was trained on other weights of {base['name']} "
                f"(fingerprint {base['fingerprint']}, this model has {adapter.fingerprint}): load that base model"
            )
        adapter.load_state_dict(weights)
    return adapter


# ---------------------------------------------------------------------------------------------------------------------
# Several adapters


class Adapters:
    """Several saved adapters on one resident base, by name; one of them is active, or none.

        adapters = Adapters(model, {"small": "exports/knee", "large": "exports/best"})     # the first is active
        adapters.set_adapter("large")
        with adapters.disable_adapter():                                                   # the base itself
            ...
        adapters.load_adapter("exports/other", "other")                                    # added, not activated
        adapters.delete_adapter("small")

    Names are as in PEFT. Switching takes hooks out and puts others in: the base is not loaded, copied or written to, so
    without an active adapter it computes what it did before, bit for bit.
    """

    def __init__(self, model: nn.Module, folders: Mapping[str, str | os.PathLike]) -> None:
        self.model = model
        self._adapters: dict[str, Adapter] = {}
        self._active: str | None = None
        for name, folder in folders.items():
            self.load_adapter(folder, name)
        self.set_adapter(next(iter(folders), None))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._adapters)

    @property
    def active_adapter(self) -> str | None:
        return self._active

    def __getitem__(self, name: str) -> Adapter:
        """Raises StudyError where no adapter has that name."""
        if name not in self._adapters:
            raise unknown("adapter", name, self._adapters)
        return self._adapters[name]

    def load_adapter(self, folder: str | os.PathLike, name: str) -> None:
        """Adds a saved adapter; who is active stays so. Raises StudyError as `load` does, and for a name in use."""
        if name in self._adapters:
            raise StudyError(
                f"an adapter '{name}' is loaded already: choose another name or delete_adapter('{name}') first"
            )
        with self.disable_adapter():
            loaded = load(self.model, folder)
            loaded.detach()
        self._adapters[name] = loaded

    def set_adapter(self, name: str | None) -> None:
        """Activates one adapter in place of the other; None: the base alone. Raises StudyError for an unknown name."""
        chosen = None if name is None else self[name]
        if name == self._active:
            return
        if self._active is not None:
            self._adapters[self._active].detach()
            self._active = None
        if chosen is not None:
            chosen.reattach()
        self._active = name

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base alone inside the block."""
        before = self._active
        self.set_adapter(None)
        try:
            yield
        finally:
            self.set_adapter(before)

    def delete_adapter(self, name: str) -> None:
        """Forgets an adapter; where it was active, none is afterwards. Raises StudyError for an unknown name."""
        if self[name] is self._adapters.get(self._active or ""):
            self.set_adapter(None)
        del self._adapters[name]


def _family(model: nn.Module) -> str:
    return model.config.model_type  # type: ignore[union-attr,return-value]
