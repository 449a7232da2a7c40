"""Takes a winner out of a study, in a form that other tools load, with a model card.

    python -m search.export studies/sieve-tiny-moe-default to=winner                       # the most accurate point
    python -m search.export studies/sieve-tiny-moe-default to=small point=knee format=peft
    python -m search.export studies/sieve-tiny-moe-default to=plain point=3f2a91bc format=merged
    python -m search.export help

format=adapter   adapter.safetensors and adapter.json as they were trained, checked; `trainers.adapter.load` takes them
format=merged    a transformers model without LoRA: W + (lora_alpha/r)·B·A, summed in float32. dtype=float32 keeps it
                 so, with the logits of adapter and base; dtype=stored rounds once to the type in which the base lies
                 on disk: half the size for 16 bits, and logits that differ by as much as is said
format=peft      a PEFT adapter, where PEFT can express it (trainers/adapter/peft_format.py); loaded back before it is
                 handed out, and compared
format=vllm      an adapter for servers of many adapters (vLLM, SGLang): every linear map, and every expert of a layer,
                 by its own name, one rank and one lora_alpha for all; read back by name, and compared on the base.
                 Neither server runs in the tests: their loaders' sources were read
format=gguf-ready  the merged model, with the command of llama.cpp's converter
format=config    allocation and recipe, no weights, to be trained elsewhere: PEFT's LoraConfig, and YAML of Axolotl and
                 Unsloth where they can say it

What a format cannot express is refused with the reason. Nothing is written in place: the folder appears whole or not
at all.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

from allocators.core import words
from allocators.core.errors import StudyError
from search import door
from search.export import Request, write
from search.records import mirror
from trainers import command, storage


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 the request cannot work."""
    return door.answer(argv, told=help_text, act=_export)


def _export(given: Sequence[str]) -> Iterator[str]:
    folder, request = parse(given)
    return write(mirror.here(folder), request)


def help_text() -> str:
    """Usage, keys with their defaults, and the rest of this file's docstring."""
    return door.help_text("search.export STUDY to=FOLDER [key=value ...]", Request, __doc__)


def parse(given: Sequence[str]) -> tuple[str, Request]:
    """The study's folder, and the rest. Raises StudyError with one line for what cannot work."""
    folder, request = door.one_study(given, Request, example="search.export STUDY to=FOLDER")
    if not request.to:
        raise StudyError("to=FOLDER is missing: where shall the export go?")
    if not storage.is_uri(request.to):
        request = replace(request, to=str(words.path(request.to, "to")))
    if request.dtype != "float32" and request.format not in ("merged", "gguf-ready"):
        raise StudyError("dtype is for format=merged and gguf-ready: adapters are float32, whatever the base is")
    return folder, request


if __name__ == "__main__":
    sys.exit(command.run(main))
