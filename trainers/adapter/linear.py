"""Plain LoRA on a linear layer, or on a router: y = W x + scale · B A drop(x).

Shapes: T tokens, I input features, O output features, R rank. Functions that say so take members of a packed run in
front of T (trainers/packing/), each with its own A and B.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allocators.core.errors import StudyError
from trainers.models import sharding
from trainers.models.quantized import is_quantized

Add = Callable[[Tensor, Tensor], Tensor]  # (output, input) → output


def uniform(*size: int, seed: int, name: str) -> Tensor:
    """Start values of one A [..., R, I]: kaiming-uniform(√5), that is U(−1/√I, 1/√I), from a generator of its own."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    bound = 1 / math.sqrt(size[-1])
    return torch.empty(*size).uniform_(-bound, bound, generator=generator)


def add_lora(out: Tensor, x: Tensor, a_RI: Tensor, b_OR: Tensor, *, scale: float) -> Tensor:
    """`out + scale · x Aᵀ Bᵀ`, one GEMM in and one accumulated into `out` [..., O] in place; in the dtype of `out`."""
    rank_space = F.linear(x.to(out.dtype), a_RI.to(out.dtype))
    total = add_product_(out.flatten(0, -2), rank_space.flatten(0, -2), b_OR.to(out.dtype).t(), scale=scale)
    return total.view_as(out)


def add_product_(total: Tensor, left: Tensor, right: Tensor, *, scale: float = 1.0) -> Tensor:
    """`total += scale · left @ right` in place, as one GEMM; with members in front as one batched GEMM."""
    if total.dim() == 2:
        return total.addmm_(left, right, alpha=scale)
    return total.baddbmm_(left, right, alpha=scale)


def kept_inputs(*size: int, dropout: float, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Which inputs of A stay, as booleans: each with probability 1 − dropout. None: the global random state."""
    return torch.empty(size, dtype=torch.bool, device=device).bernoulli_(1 - dropout, generator=generator)


def scale_of_kept(scale: float, dropout: float) -> float:
    """`scale`/(1 − dropout): what stays is scaled up, which is the same before A and after it."""
    return scale / (1 - dropout)


def add_to_weight(weight: Tensor, delta: Tensor) -> None:
    """`weight += delta` in fp32, rounded once; of a sharded weight the rows that this worker holds."""
    rows, first = sharding.local_rows(weight)
    with torch.no_grad():
        rows.copy_(rows.float() + delta[first : first + len(rows)])


# ---------------------------------------------------------------------------------------------------------------------
# Into a module of the base and out of it


def put_on_linear(module: Any, add: Add) -> Callable[[], None]:
    """`add(out, x)`, which may write to `out`, after a linear layer, or inside a router before its softmax.

    Returns what takes it off.
    """
    packed = is_quantized(module)
    if packed or type(module).forward is nn.Linear.forward:

        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            # what bitsandbytes returns may be a view, which must not be written to
            return add(out.clone() if packed else out, args[0])

        take_off: Callable[[], None] = module.register_forward_hook(hook).remove
        return take_off
    # An instance attribute hides the parameter from the router's forward, and from nothing else.
    return put_attribute(module, "weight", _RouterWeight(module, add))


def put_attribute(module: nn.Module, name: str, value: Any) -> Callable[[], None]:
    """An attribute of one module alone, which is no submodule or parameter and so not in the state_dict."""
    vars(module)[name] = value

    def undo() -> None:
        del vars(module)[name]

    return undo


class _RouterWeight:
    """What a router's forward finds as `self.weight`: F.linear with it yields logits that include the LoRA part.

    A router is no nn.Linear and returns logits, weights and ids at once, so a hook on it would come after softmax and
    top-k. Adding B·A to the weight instead would lose small deltas to bf16 rounding and could not drop inputs out.
    """

    def __init__(self, router: nn.Module, add: Add, dtype: torch.dtype | None = None) -> None:
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
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Tensor:
        if func is not F.linear:  # anything else would compute on W alone and lose the adapter silently
            raise StudyError(f"LoRA on a router supports F.linear(x, weight), this router calls {func.__name__}")
        x, self, *bias = args
        y: Tensor = self.add(F.linear(x, self.weight, *bias, **(kwargs or {})), x)
        return y


# ---------------------------------------------------------------------------------------------------------------------
# Modules of the base


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
