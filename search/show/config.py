"""What can be asked of `python -m allocators.show`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _key(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class ShowConfig:
    """The keys of the command line; every other key is a knob of the allocators."""

    model: str = _key(
        "", "embedded or packaged name, folder or Hugging Face id (empty: the signal's model, or tiny-moe)"
    )
    dtype: str = _key("auto", "of the model that signals are measured on, and the next three: as in a study")
    attn: str = _key("auto", "implementation of attention")
    quantization: str = _key("", "nf4 or int8 for linear layers (empty: none)")
    trust_remote_code: bool = _key(False, "run Python code from the model's repository: it gets all your rights")
    task: str = _key("default", "whose training documents signals are measured on")
    allocator: str = _key("", "which ones, comma-separated (empty: all that fit the model)")
    rank: int = _key(8, "LoRA rank that parameters are counted at")
    samples: int = _key(256, "training documents to measure on")
    seed: int = _key(0, "seed of the sample, and of allocators that draw")
    signal: str = _key("", "signal files to read instead of measuring, comma-separated")
    cache: str = _key("studies/signals", "folder where measured signals are kept")
    device: str = _key("", "torch device to measure on (empty: cuda where there is one)")
    png: str = _key("", "also draw everything into this PNG file")
    html: str = _key("", "also write everything into this HTML file")
    plugins: str = _key("", "files, folders or modules with own allocators, comma-separated")
