"""Linear layers with packed weights: nf4 and int8 by bitsandbytes.

    quantized.is_quantized(module)                            # whether only its own forward can multiply its weight
    quantized.config_for("nf4", device="cuda", dtype=torch.bfloat16)

bitsandbytes is an extra of this project (`pip install -e '.[quantization]'`) and is imported by `config_for` alone.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from allocators.core.errors import StudyError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


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


def keep_gradients(model: nn.Module) -> None:
    """Keeps 4-bit layers trainable after an evaluation on a CPU with AVX512-BF16.

    At the first evaluation there bitsandbytes would repack 4-bit weights into a form that has no gradient: training
    after an evaluation would go wrong silently.
    """
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False


def forget(model: Any) -> None:
    """Takes the quantizer off a model that was dequantised while it was loaded: it is saved as what it is."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    vars(model).pop("_weight_conversions", None)  # how it was read: saved the same way it would be packed again


def config_for(quantization: str, *, device: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What transformers needs to pack linear layers while it loads a model; nf4 multiplies in `dtype`.

    Raises StudyError for a device that bitsandbytes has no kernels for.
    """
    import bitsandbytes
    from transformers import BitsAndBytesConfig

    kind, possible = torch.device(device).type, sorted(bitsandbytes.supported_torch_devices)
    if kind not in possible:
        raise StudyError(f"quantization={quantization} does not run on {kind}: bitsandbytes supports {possible}")
    if quantization == "int8":
        # It multiplies in float16 whatever `dtype` is, and would say so for every layer of every pass.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def scale_bytes(module: nn.Module) -> int:
    """Bytes of what is no parameter of a quantised layer: scales of its blocks or rows, and the scales of those."""
    weight = getattr(module, "weight", None)
    if (state := getattr(weight, "quant_state", None)) is not None:
        num_bytes: int = state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
        return num_bytes
    scales = getattr(weight, "SCB", None)  # moves at the first forward pass
    scales = getattr(getattr(module, "state", None), "SCB", None) if scales is None else scales
    return 0 if scales is None else scales.nbytes
