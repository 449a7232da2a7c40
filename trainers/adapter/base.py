"""What every adapter is: trainable tensors beside a frozen model, hooked into it, and the way back.

The tensors never become part of the model (its `state_dict` stays that of the base). There are two kinds: LoRA on
chosen experts of an MoE base (`expert_lora.py`) and LoRA experts on a dense base (`lora_moe.py`).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allocators.core.errors import StudyError, TrialError
from allocators.core.types import Allocation, LoraSettings, ModelShape, ModuleShape
from trainers.adapter.linear import add_lora, add_to_weight, put_attribute, put_on_linear, uniform
from trainers.models import sharding
from trainers.models.quantized import quantization_of

Undo = Callable[[], object]


class Adapter(ABC):
    """Trainable tensors hooked into a frozen model, and the way back. Subclasses say what they insert.

    lora          rank, scale, dropout and the like
    seed          of the start values of A, and of nothing else
    fingerprint   of the base's weights, taken before anything was inserted

    Raises InfeasibleError where the allocation does not fit `shape`, StudyError where `shape` does not fit `model` or
    the model carries an adapter already; the model is as it was then.
    """

    UNUSED: ClassVar[tuple[str, ...]] = ()  # LoRA settings that say nothing to this kind of adapter

    def __init__(
        self, model: nn.Module, allocation: Allocation, *, shape: ModelShape, lora: LoraSettings, seed: int
    ) -> None:
        allocation.check(shape)
        _refuse_second(model, shape.name)
        self.model: Any = model
        self.allocation = allocation
        self.shape = shape
        self.lora = lora
        self.seed = seed
        self.fingerprint = fingerprint(model)
        self._tensors: dict[str, nn.Parameter] = {}
        self._puts: list[Callable[[], Undo]] = []
        self._undo: list[Undo] = []
        self._put(lambda: freeze(self.model, self))
        with self.detached_on_error():
            self._insert()

    @property
    def settings(self) -> dict[str, Any]:
        """What adapter.json holds besides the allocation, for `attach` to build this adapter again."""
        return {name: value for name, value in asdict(self.lora).items() if name not in self.UNUSED}

    # --- for subclasses ---

    @abstractmethod
    def _insert(self) -> None:
        """Adds the tensors and puts the hooks in."""

    @abstractmethod
    def _merge(self) -> None:
        """Adds the deltas to the weights of the base, which is as it was before `attach`."""

    def _put(self, put: Callable[[], Undo]) -> None:
        """Puts something into the model, now and at every `reattach`; `put` returns what takes it out again."""
        self._puts.append(put)
        self._undo.append(put())

    def _on_detach(self, undo: Undo) -> None:
        """For what is there until the first detach only."""
        self._undo.append(undo)

    def _add(self, name: str, value: Tensor, *, device: torch.device) -> nn.Parameter:
        """A trainable tensor, fp32 whatever the base has: bf16 loses updates below 0.4 % of a weight."""
        self._tensors[name] = nn.Parameter(value.to(device=device, dtype=torch.float32))
        return self._tensors[name]

    def _add_linear_lora(self, module: Any, spec: ModuleShape, *, rank: int | None = None) -> None:
        """Plain LoRA on a linear layer, or on a router: a small module whose forward calls F.linear on its `weight`.

        rank   of the module, that of the settings unless given; the scale is that of the settings whatever it is
        """
        lora, device = self.lora, module.weight.device
        rank = lora.rank if rank is None else rank
        start_RI = uniform(rank, spec.in_features, seed=self.seed, name=spec.path)
        a_RI = self._add(f"{spec.path}.lora_A", start_RI, device=device)
        b_OR = self._add(f"{spec.path}.lora_B", torch.zeros(spec.out_features, rank), device=device)

        def add(out: Tensor, x: Tensor) -> Tensor:
            x = F.dropout(x, lora.lora_dropout, module.training)
            return add_lora(out, x, a_RI, b_OR, scale=lora.scale)

        self._put(partial(put_on_linear, module, add))

    def _put_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        self._put(lambda: put_attribute(module, name, value))

    def _merge_linear_lora(self, module: Any, spec: ModuleShape) -> None:
        """W += (lora_alpha/r)·B·A, summed in fp32. Call it after the hooks are gone."""
        a_RI, b_OR = self.linear_lora(spec.path)
        add_to_weight(module.weight, self.lora.scale * (b_OR @ a_RI))

    # --- for everybody ---

    def linear_lora(self, path: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A [R, I] and B [O, R] of the plain LoRA on a module."""
        return self._tensors[f"{path}.lora_A"], self._tensors[f"{path}.lora_B"]

    def parameters(self) -> list[nn.Parameter]:
        """The trainable tensors, in the order of `named_parameters`."""
        return list(self._tensors.values())

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The trainable tensors by the names that they have in a file."""
        return list(self._tensors.items())

    @property
    def num_trainable(self) -> int:
        """Equals `allocation.trainable_params(shape, rank=rank)`; a test holds every family to it."""
        return sum(p.numel() for p in self._tensors.values())

    def state_dict(self) -> dict[str, Tensor]:
        """The trainable tensors by name, detached; they share memory with the adapter's."""
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
        """A failure inside the block leaves the base model as it was before."""
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

        Raises TrialError on a quantised base, and where a weight serves several modules, each with LoRA of its own or
        none: the base then stays as it is, with the adapter on it.
        """
        if kind := quantization_of(self.model):
            raise TrialError(
                f"{self.shape.name} is quantised ({kind}): W + B·A is no {kind} matrix, merging would change what was "
                "trained; use the adapter attached, or train on the base without quantization"
            )
        if shared := self._shared_weight():
            raise TrialError(
                f"{shared[0]} and {shared[1]} of {self.shape.name} are one weight: a sum would put the LoRA of each "
                "into both, merging would change what was trained; use the adapter attached"
            )
        self.detach()
        self._puts.clear()
        self._merge()

    def _shared_weight(self) -> tuple[str, str] | None:
        """Paths of an adapted module and of another one with the same weight; None where no weight serves two."""
        adapted = {name.rpartition(".")[0] for name in self._tensors}
        owners: dict[int, str] = {}
        for path, module in self.model.named_modules(remove_duplicate=False):
            for parameter in module._parameters.values():
                other = owners.setdefault(id(parameter), path) if parameter is not None else path
                if other != path and {path, other} & adapted:
                    return other, path
        return None


def freeze(model: Any, owner: object) -> Callable[[], None]:
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


def fingerprint(model: nn.Module, *, samples: int = 64) -> str:
    """16 hex digits that tell one set of base weights from another.

    Reads `samples` evenly spaced values of every parameter of the model, rounded to bf16, so that one checkpoint has
    one fingerprint whether it was loaded in fp32 or bf16. Packed weights count as the bytes they are: a quantised base
    has a fingerprint of its own. That of a sharded base is computed by all its workers together.
    """
    values = sharding.sampled(model.parameters(), samples).to(torch.bfloat16).float()
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]
