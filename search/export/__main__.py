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

What a format cannot express is refused with the reason. Nothing is written in place: the folder appears whole or not
at all.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from allocators.core.errors import StudyError, ToolkitError, did_you_mean, unknown
from search.export import Request, write
from search.export.formats import FORMATS
from search.records.redact import redacted
from trainers import storage


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 the request cannot work."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if not words or words[0] in ("help", "-h", "--help"):
            print(help_text())
            return 0 if words else 2
        folder, request = parse(words)
        for line in write(folder, request):
            print(line, flush=True)
    except ToolkitError as error:
        print(f"error: {redacted(str(error))}", file=sys.stderr)
        return 2
    return 0


def help_text() -> str:
    lines = ["usage: python -m search.export STUDY to=FOLDER [key=value ...]", "", "keys (default):"]
    for f in fields(Request):
        head = f"  {f.name}" + (f" ({f.default})" if f.default not in ("", False) else "")
        lines += textwrap.wrap(f"{head:<22}{f.metadata['help']}", width=110, subsequent_indent=" " * 22)
    return "\n\n".join(["\n".join(lines), *(__doc__ or "").strip().split("\n\n")[2:]])


def parse(words: Sequence[str]) -> tuple[str, Request]:
    """The study's folder, and the rest. Raises StudyError with one line for what cannot work."""
    known = {f.name: f.default for f in fields(Request)}
    folders: list[str] = []
    given: dict[str, Any] = {}
    for word in words:
        name, separator, value = word.partition("=")
        if not separator:
            folders.append(word)
        elif name not in known:
            raise StudyError(f"unknown key '{name}'{did_you_mean(name, known)} (help lists the keys)")
        elif isinstance(known[name], bool):
            if value.lower() not in ("true", "false"):
                raise StudyError(f"{name} must be true or false, got '{value}'")
            given[name] = value.lower() == "true"
        else:
            given[name] = value
    request = Request(**given)
    if len(folders) != 1:
        raise StudyError(f"give the folder of one study, got {len(folders)}: python -m search.export STUDY to=FOLDER")
    if storage.is_uri(folders[0]):
        raise StudyError(
            f"'{folders[0]}' is no study: its records lie in studies/NAME on the machine that started it, whatever its "
            "storage is"
        )
    if not request.to:
        raise StudyError("to=FOLDER is missing: where shall the export go?")
    if not storage.is_uri(request.to):
        request = replace(request, to=str(Path(request.to).expanduser()))
    if request.format not in FORMATS:
        raise unknown("format", request.format, FORMATS)
    if request.dtype not in ("float32", "stored"):
        raise unknown("dtype", request.dtype, ("float32", "stored"))
    if request.dtype != "float32" and request.format != "merged":
        raise StudyError("dtype is for format=merged: adapters are float32, whatever the base is")
    return folders[0], request


if __name__ == "__main__":
    sys.exit(main())
