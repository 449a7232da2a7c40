"""Linear layers whose weights are packed (bitsandbytes): which they are, and as what."""

from __future__ import annotations

from torch import nn


def is_quantized(module: nn.Module) -> bool:
    """Whether it is a linear layer with packed weights, which only its own forward can multiply."""
    if not isinstance(module, nn.Linear):
        return False
    weight = module._parameters["weight"]
    return weight is not None and not weight.is_floating_point()


def quantization_of(model: nn.Module) -> str:
    """`nf4`, `int8` or whatever the linear layers are packed as; "" where they are not."""
    packed = next((m for m in model.modules() if is_quantized(m)), None)
    if packed is None:
        return ""
    return getattr(getattr(packed.weight, "quant_state", None), "quant_type", "int8")
