"""What can be asked of `python -m allocators.show`."""

from __future__ import annotations

from dataclasses import dataclass

from allocators.core import words


@dataclass(frozen=True)
class ShowConfig:
    """The keys of the command line; every other key is a knob of the allocators."""

    model: str = words.key(
        "", "embedded or packaged name, folder or Hugging Face id (empty: the signal's model, or tiny-moe)"
    )
    dtype: str = words.key("auto", "number type of the model; this key and the next three are as in a study")
    attn: str = words.key("auto", "implementation of attention")
    quantization: str = words.key("", "nf4 or int8 for linear layers (empty: none)")
    trust_remote_code: bool = words.key(False, "run Python code from the model's repository: it gets all your rights")
    task: str = words.key("default", "whose training documents signals are measured on")
    allocator: tuple[str, ...] = words.key((), "which allocators (empty: all that fit the model)")
    gives: str = words.key("experts", "experts, ranks or all: which kind of allocators, where `allocator` names none")
    rank: int = words.key(8, "LoRA rank at which parameters are counted; of rules for ranks their mean rank", least=1)
    samples: int = words.key(256, "training documents to measure on", least=1)
    seed: int = words.key(0, "seed of the sample, and of allocators that draw", least=0)
    signal: tuple[str, ...] = words.key((), "signal files to read instead of measuring")
    cache: str = words.key("studies/signals", "folder where measured signals are kept")
    device: str = words.key("", "torch device to measure on (empty: cuda where there is one)")
    png: str = words.key("", "also draw everything into this PNG file")
    html: str = words.key("", "also write everything into this HTML file")
    plugins: tuple[str, ...] = words.key((), "files, folders or modules with own allocators")
