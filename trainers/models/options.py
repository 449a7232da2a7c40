"""How a base model is loaded: dtype, attention, quantisation; which values exist, what they need and what they mean.

    options.check_options(dtype="auto", attn="sdpa", quantization="nf4")      # StudyError for an unknown value
    options.numbers_of("cuda", quantization="nf4")                            # "bfloat16, nf4", for provenance

Nothing is loaded here; what the options do is said at `load` (trainers/models/resident.py).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from allocators.core.errors import StudyError, unknown
from allocators.core.types import ModelShape

DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTION = ("auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
QUANTIZATION = ("nf4", "int8")

# Forms in which a base may lie on disk besides plain weights; `load` turns them into plain ones.
DEQUANTIZED = ("fp8", "mxfp4")

# What an option needs besides this project's dependencies: the module, and what to type.
PACKAGES = {
    "nf4": ("bitsandbytes", "pip install -e '.[quantization]'"),
    "int8": ("bitsandbytes", "pip install -e '.[quantization]'"),
    # without these transformers would take a kernel from the hub, which is somebody's code
    "flash_attention_2": ("flash_attn", "pip install flash-attn, or attn=sdpa"),
    "flash_attention_3": ("flash_attn_interface", "install FlashAttention 3, or attn=sdpa"),
}


def device_or_default(asked: str = "") -> str:
    """The device that was asked for, else a GPU where there is one, else the CPU."""
    import torch

    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def dtype_on(device: str) -> str:
    """What dtype=auto means: bfloat16 on a CUDA device that computes in it, else float32.

    Raises StudyError for a device that does not exist.
    """
    import torch

    try:
        cuda = torch.device(device).type == "cuda"
    except RuntimeError as error:
        raise StudyError(f"there is no device '{device}': choose cpu, cuda or cuda:N") from error
    if cuda and not torch.cuda.is_available():
        raise StudyError(f"device '{device}' was asked for and torch {torch.__version__} finds none here: choose cpu")
    # not as torch counts by itself, where a GPU that only imitates bf16, many times slower than fp32, supports it too
    return "bfloat16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"


def numbers_of(
    device: str, *, dtype: str = "auto", attn: str = "auto", quantization: str = "", stored: str = ""
) -> str:
    """Everything besides the stored weights that decides what a model computes, for provenance: `bfloat16`,
    `float32, nf4`, `bfloat16, eager`, `float32, of fp8`. Raises StudyError as `dtype_on` does.

    stored   what `stored_as` says of the base
    """
    of = f"of {stored}" if stored else ""
    parts = (dtype_on(device) if dtype == "auto" else dtype, of, quantization, "" if attn == "auto" else attn)
    return ", ".join(part for part in parts if part)


def packing_of(config: Mapping[str, Any]) -> Any:
    """What config.json says of how the weights are packed, for the whole model or its text; None: nothing."""
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, Mapping)]
    given = [part.get(key) for part in parts for key in ("quantization_config", "compression_config")]
    return next((value for value in given if value is not None), None)


def stored_as(config: Mapping[str, Any], *, name: str) -> str:
    """`fp8` or `mxfp4` where config.json says that the weights lie in that form; "" where they are plain.

    Raises StudyError for any other form: no LoRA was ever compared on it, and it may not be what its name says.
    """
    given = packing_of(config)
    if given is None:
        return ""
    method = given.get("quant_method") if isinstance(given, Mapping) else None
    if isinstance(method, str) and method in DEQUANTIZED:
        return method
    kind = (
        "in a form that its quantization_config does not name" if not isinstance(method, str) else f"as {method[:40]}"
    )
    raise StudyError(
        f"the weights of '{name}' are stored {kind}: plain weights are needed, or {' or '.join(DEQUANTIZED)}, which is "
        "dequantised; take the model that it was made from, with quantization=nf4 or int8 where it shall be packed"
    )


def check_options(*, dtype: str, attn: str, quantization: str) -> None:
    """Raises StudyError for a value that does not exist."""
    for key, value, possible in (("dtype", dtype, DTYPES), ("attn", attn, ATTENTION)):
        if value not in possible:
            raise unknown(key, value, possible)
    if quantization and quantization not in QUANTIZATION:
        raise unknown("quantization", quantization, QUANTIZATION)


def check_packages(*, attn: str, quantization: str) -> None:
    """Raises StudyError where an option needs a package that is not installed."""
    for key, value in (("quantization", quantization), ("attn", attn)):
        module, command = PACKAGES.get(value, ("", ""))
        if module and importlib.util.find_spec(module) is None:
            raise StudyError(f"{key}={value} needs the package {module}, which is not installed: {command}")


def remarks(name: str, shape: ModelShape, *, quantization: str, trust_remote_code: bool) -> list[str]:
    """What the user should know of the options, a line each; said once, before anything is loaded."""
    lines = []
    if trust_remote_code:
        lines.append(f"trust_remote_code=true: Python code that comes with '{name}' may run, with all your rights")
    if quantization and shape.is_moe:
        stacked = sum(m.in_features * m.out_features * m.num_experts for m in shape.of_role("expert"))
        linear = sum(m.in_features * m.out_features for m in shape.of_role("attention", "mlp", "shared_expert"))
        lines.append(
            f"quantization={quantization} is for linear layers: the stacked experts of '{name}' stay as they are, "
            f"{stacked / (stacked + linear):.0%} of the weights of its layers ({stacked:,} of {stacked + linear:,})"
        )
    return lines
