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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from allocators.core import words
from allocators.core.errors import StudyError, ToolkitError
from search.export import Request, write
from search.records import mirror
from search.records.redact import redacted
from trainers import command, storage


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 the request cannot work."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        if not given or words.asks_for_help(given):
            print(help_text(), file=sys.stdout if given else sys.stderr)
            return 0 if given else 2
        folder, request = parse(given)
        for line in write(mirror.here(folder), request):
            print(line, flush=True)
    except ToolkitError as error:
        print(f"error: {redacted(str(error))}", file=sys.stderr)
        return 2
    return 0


def help_text() -> str:
    """Usage, keys with their defaults, and the rest of this file's docstring."""
    lines = ["usage: python -m search.export STUDY to=FOLDER [key=value ...]", "", "keys (default):"]
    lines += words.help_of(Request)
    return "\n\n".join(["\n".join(lines), *(__doc__ or "").strip().split("\n\n")[2:]])


def parse(given: Sequence[str]) -> tuple[str, Request]:
    """The study's folder, and the rest. Raises StudyError with one line for what cannot work."""
    folders, pairs = words.split(given)
    request = words.build(Request, pairs)
    if len(folders) != 1:
        raise StudyError(f"give the folder of one study, got {len(folders)}: python -m search.export STUDY to=FOLDER")
    if not request.to:
        raise StudyError("to=FOLDER is missing: where shall the export go?")
    if not storage.is_uri(request.to):
        request = replace(request, to=str(Path(request.to).expanduser()))
    if request.dtype != "float32" and request.format not in ("merged", "gguf-ready"):
        raise StudyError("dtype is for format=merged and gguf-ready: adapters are float32, whatever the base is")
    return folders[0], request


if __name__ == "__main__":
    sys.exit(command.run(main))
