"""Base models by name: embedded, packaged, a local folder or a Hugging Face id. Safetensors only, and no code from the
hub unless it is asked for.

    from trainers import models
    models.config_of("tiny-moe")["num_experts"]                 # reads config.json: no torch, no transformers
    models.shape_of("microsoft/Phi-3.5-mini-instruct")          # sizes, no weights
    loaded = models.load("allenai/OLMoE-1B-7B-0125", device="cuda")
    loaded = models.load("huggyllama/llama-7b", device="cuda", quantization="nf4", gradient_checkpointing=True)

A base model is frozen: `load` returns it in eval mode with no parameter that asks for a gradient. The weights of a hub
model are fetched once, by commit; with HF_HUB_OFFLINE=1 only what is cached is used.

base.py         names, config, identity, sizes (hub.py, smollm2.py: models that come from elsewhere; discover.py: sizes
                of families that allocators/core/shapes.py does not list)
options.py      what `load` takes: which values exist, what they need and what they mean
files.py        whether a folder is whole, and how transformers may read it
tokenizer.py    a tokenizer alone
resident.py     `load` (checks.py: whether what was read is whole; quantized.py: packed weights; sharding.py: a model
                in parts)

Importing this package loads neither torch nor transformers: the command line answers its `help` with it.
"""

from trainers.models.base import (
    EMBEDDED,
    PACKAGED,
    check_config,
    check_files,
    config_of,
    folder_of,
    has_weights,
    identity_of,
    left_out,
    shape_of,
    shape_of_model,
)
from trainers.models.options import (
    ATTENTION,
    DTYPES,
    QUANTIZATION,
    check_options,
    check_packages,
    device_or_default,
    dtype_on,
    numbers_of,
    remarks,
    stored_as,
)
from trainers.models.resident import Loaded, load
from trainers.models.tokenizer import identity_of_tokenizer, tokenizer_of

__all__ = [
    "ATTENTION",
    "DTYPES",
    "EMBEDDED",
    "PACKAGED",
    "QUANTIZATION",
    "Loaded",
    "check_config",
    "check_files",
    "check_options",
    "check_packages",
    "config_of",
    "device_or_default",
    "dtype_on",
    "folder_of",
    "has_weights",
    "identity_of",
    "identity_of_tokenizer",
    "left_out",
    "load",
    "numbers_of",
    "remarks",
    "shape_of",
    "shape_of_model",
    "stored_as",
    "tokenizer_of",
]
