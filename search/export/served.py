"""The two forms of an export for servers: adapters by name for vLLM and SGLang, and a model for llama.cpp's converter.

command = write_vllm(conversion)       # files in conversion.target, what to say in conversion.notes
"""

from __future__ import annotations

import json

from allocators.core.errors import StudyError
from search.export.formats import Conversion, checked, compare, loaded_with_logits, logits_of, write_merged
from search.records.redact import portable
from trainers import models


def write_vllm(conversion: Conversion) -> str:
    """LoRA on every linear map by its own name, read from the files again and compared."""
    from search.export import by_name

    saved = checked(conversion)
    reason = by_name.refusal(saved, str(models.config_of(conversion.base).get("model_type")))
    if reason:
        raise StudyError(f"format=vllm cannot express this adapter: {reason}; use format=adapter or format=merged")
    if quantization := conversion.settings.get("quantization"):
        conversion.notes.append(
            f"it was trained on a base with quantization={quantization}, and is compared on the base in float32: a "
            "server that holds the base otherwise rounds otherwise"
        )
    loaded, expected = loaded_with_logits(conversion, quantization="")
    base, revision = portable(conversion.base), loaded.identity if conversion.is_hub else None
    allowed = by_name.write(loaded.model, saved, conversion.target, base=base, revision=revision)
    by_name.apply(loaded.model, conversion.target)
    compare(conversion, "read by name from the files, on a float32 base", logits_of(loaded.model), expected, exact=True)
    if saved.shape.is_moe:
        conversion.notes.append(
            "of a layer where some experts have LoRA all experts are in the file, the others as zeros: the loaders of "
            "vLLM and SGLang stack them"
        )
        conversion.notes.append(
            "routers are in the file where they were trained: vLLM takes LoRA on them in its newest versions only, and "
            "SGLang nowhere"
        )
    name = json.dumps(conversion.name)
    return (
        f"vllm serve {base} --enable-lora --max-lora-rank {allowed} --lora-modules {name}={name}\n"
        f"sglang serve --model-path {base} --enable-lora --lora-paths {name}={name}"
    )


def write_gguf_ready(conversion: Conversion) -> str:
    """The merged model, and how llama.cpp turns it into its own file."""
    write_merged(conversion)
    conversion.notes.append(
        "llama.cpp's converter has to know the architecture and the tokenizer of the base; nothing of it ran here"
    )
    name = conversion.name
    return (
        f"python llama.cpp/convert_hf_to_gguf.py {name} --outfile {name}.gguf\n"
        f"llama.cpp/build/bin/llama-server --model {name}.gguf"
    )
