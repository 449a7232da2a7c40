"""A model's folder as transformers may read it, and what transformers says about it in one line.

with files.clean(folder) as clean, files.quiet():
    config = AutoConfig.from_pretrained(clean)
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from allocators.core import weight_files

ADAPTER_CONFIG = "adapter_config.json"  # PEFT's; beside a base it is no part of it

_BOM = b"\xef\xbb\xbf"
_LONGEST = 300  # characters of somebody else's reason


@contextmanager
def clean(folder: Path) -> Iterator[Path]:
    """The folder itself, or one of links to its files where transformers would misread it.

    An adapter_config.json beside the base would put that adapter on it, a byte order mark before config.json ends in a
    JSON error, and what becomes of quantised weights depends on the device: the folder of links has no such adapter,
    and a config.json without the mark that asks for plain weights.
    """
    config, adapter = folder / "config.json", folder / ADAPTER_CONFIG
    data = weight_files.json_object(config)
    with config.open("rb") as stream:
        as_it_is = stream.read(len(_BOM)) != _BOM and not adapter.exists()
    for part in (data, data.get("text_config")):
        if isinstance(part, dict) and isinstance(part.get("quantization_config"), dict):
            part["quantization_config"]["dequantize"], as_it_is = True, False
    if as_it_is:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="model-") as place:
        links = Path(place) / folder.name
        links.mkdir()
        for file in folder.iterdir():
            if file not in (adapter, config):
                (links / file.name).symlink_to(file.absolute())
        (links / config.name).write_text(json.dumps(data), encoding="utf-8")
        yield links


@contextmanager
def quiet() -> Iterator[None]:
    """Neither bars nor reports of transformers: what matters of them is said in our words."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def reason_of(error: BaseException) -> str:
    """What an exception of another library says, in one line; its type where the text alone would say little."""
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
    return text if text and isinstance(error, OSError | ValueError | ImportError) else f"{type(error).__name__}: {text}"
