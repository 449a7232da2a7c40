"""Base models by name: embedded, packaged, a local folder or a Hugging Face id. Safetensors only, no code from the hub.

    from trainers import models
    models.config_of("tiny-moe")["num_experts"]                 # reads config.json: no torch, no transformers
    loaded = models.load("allenai/OLMoE-1B-7B-0125", device="cuda")

A base model is frozen: `load` returns it in eval mode with no parameter that asks for a gradient.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allocators.core.errors import StudyError, did_you_mean
from trainers import smollm2

_HERE = Path(__file__).parent / "embedded"

# Folder `tiny_moe` is the model `tiny-moe`.
EMBEDDED: dict[str, Path] = {
    folder.name.replace("_", "-"): folder
    for folder in (sorted(_HERE.iterdir()) if _HERE.is_dir() else ())
    if (folder / "config.json").is_file()
}

# Models that a Python package ships: a function that gives their folder, converting them when it is first called.
PACKAGED: dict[str, Callable[[], Path]] = {smollm2.NAME: smollm2.folder}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_CHUNK = 1 << 22  # bytes read at once while hashing


@dataclass(frozen=True)
class Loaded:
    """A resident base model: frozen, in eval mode, with its tokenizer (which has a pad token)."""

    model: Any
    tokenizer: Any
    name: str
    identity: str


def config_of(name: str) -> dict[str, Any]:
    """`config.json` of a model as a dict. Loads neither weights nor torch nor transformers, but for the conversion of a
    packaged model that is asked for the first time.

    Raises StudyError when the name is no embedded or packaged model, no model folder and no id that the hub or its
    cache knows.
    """
    return json.loads(_config_file(name).read_text(encoding="utf-8"))


def identity_of(name: str) -> str:
    """What the weights are, for provenance: the commit of a hub model, else `sha256:` of config and weight files.

    Raises StudyError as `config_of` does, and where a folder holds no safetensors.
    """
    config = _config_file(name)
    if _is_hub(config):
        return config.parent.name
    weights = sorted(config.parent.glob("*.safetensors"))
    if not weights:
        raise StudyError(f"model folder '{config.parent}' has no *.safetensors: save it with save_pretrained(...)")
    digest = hashlib.sha256()
    for file in (config, *weights):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    return f"sha256:{digest.hexdigest()[:32]}"


def folder_of(name: str) -> Path:
    """The folder with a model's config.json and safetensors; those of a hub model are fetched where they are not here.

    Raises StudyError as `config_of` does, and where a hub model has no safetensors or they cannot be fetched.
    """
    config = _config_file(name)
    if _is_hub(config) and not _is_complete(config.parent):
        _fetch(name, config.parent)
    return config.parent


def dtype_on(device: str) -> str:
    """What `load` makes of a model unless told otherwise: bfloat16 on a CUDA device that supports it, else float32.

    Raises StudyError for a device that does not exist.
    """
    import torch

    try:
        cuda = torch.device(device).type == "cuda"
    except RuntimeError as error:
        raise StudyError(f"there is no device '{device}': choose cpu, cuda or cuda:N") from error
    if cuda and not torch.cuda.is_available():
        raise StudyError(f"device '{device}' was asked for and torch {torch.__version__} finds none here: choose cpu")
    return "bfloat16" if cuda and torch.cuda.is_bf16_supported() else "float32"


def load(name: str, *, device: str = "cpu", dtype: Any = None) -> Loaded:
    """Loads a base model to `device`, frozen.

    dtype   a torch dtype or its name; default: what `dtype_on` says

    Raises StudyError for a name that `config_of` refuses, and for a model that would need pickled weights or code
    from its repository.
    """
    config = _config_file(name)
    identity = identity_of(name)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = dtype_on(device) if dtype is None else dtype
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    # A local folder is read from there; a hub model is asked for at the commit that `identity` names.
    source, revision = (name, identity) if _is_hub(config) else (str(config.parent), None)
    kwargs = {"revision": revision} if revision else {"local_files_only": True}
    try:
        with _no_progress_bars():
            model = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                device_map={"": device},  # straight to the device: several workers of a node need no copy each in RAM
                use_safetensors=True,
                trust_remote_code=False,
                **kwargs,
            )
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **kwargs)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise StudyError(
            f"model '{name}' cannot be loaded (safetensors weights, a tokenizer, no remote code): {reason}"
        ) from error
    model.requires_grad_(False).eval()
    _ensure_pad_token(tokenizer, name)
    return Loaded(model, tokenizer, name, identity)


def _is_hub(config: Path) -> bool:
    """The hub's cache: models--ORG--NAME/snapshots/COMMIT/config.json."""
    return config.parent.parent.name == "snapshots"


def _config_file(name: str) -> Path:
    """Where a model's config.json lies on this machine, fetched from the hub where need be."""
    if name in EMBEDDED:
        return EMBEDDED[name] / "config.json"
    if name in PACKAGED:
        return PACKAGED[name]() / "config.json"
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        file = folder / "config.json"
        if not file.is_file():
            raise StudyError(f"'{name}' is a folder without config.json: point to one that save_pretrained(...) wrote")
        return file
    if not _HUB_ID.fullmatch(name):
        raise _not_found(name, "it is no folder here and no Hugging Face id")
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    """A cached model is used as it lies there; the hub is asked once, without retries, for others."""
    import huggingface_hub
    from huggingface_hub import errors

    cached = huggingface_hub.try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return Path(cached)
    try:
        huggingface_hub.HfApi().model_info(name, timeout=10)  # hf_hub_download retries for 23 s without a network
        return Path(huggingface_hub.hf_hub_download(name, "config.json"))
    except errors.GatedRepoError:
        reason = "its licence must be accepted on huggingface.co first"
    except errors.RepositoryNotFoundError:
        reason = "the hub has no such public model"
    except errors.RemoteEntryNotFoundError:
        reason = "its repository has no config.json"
    except (OSError, errors.HTTPError):
        reason = "it is not in the local cache and the hub cannot be reached"
    raise _not_found(name, reason)


def _fetch(name: str, snapshot: Path) -> None:
    """The weights of a hub model, of the commit that the snapshot is named by."""
    import huggingface_hub
    from huggingface_hub import errors

    # what transformers loads; some repositories hold other copies of the weights beside them
    patterns = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
    reason = "it has no model.safetensors there"
    try:
        huggingface_hub.snapshot_download(name, revision=snapshot.name, allow_patterns=patterns)
    except (OSError, errors.HTTPError) as error:
        reason = str(error).strip().splitlines()[0]
    if not _is_complete(snapshot):
        raise StudyError(
            f"the weights of '{name}' are neither in the local cache nor does the hub give them: {reason}; try "
            f"`hf download {name}`"
        )


def _is_complete(folder: Path) -> bool:
    """Whether all weights that transformers would load lie there."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return (folder / "model.safetensors").is_file()
    return all((folder / shard).is_file() for shard in json.loads(index.read_bytes())["weight_map"].values())


def _not_found(name: str, reason: str) -> StudyError:
    known = [*EMBEDDED, *PACKAGED]
    return StudyError(
        f"unknown model '{name}': {reason}; choose an embedded one ({', '.join(EMBEDDED) or 'none'}), a packaged one "
        f"({', '.join(PACKAGED)}), a folder with config.json and safetensors, or fetch one with "
        f"`hf download ORG/NAME`{did_you_mean(name, known)}"
    )


def _ensure_pad_token(tokenizer: Any, name: str) -> None:
    """Padding is masked everywhere, so any known token serves; a new one would not fit the embedding."""
    if tokenizer.pad_token_id is None:
        token = tokenizer.eos_token or tokenizer.unk_token
        if token is None:
            raise StudyError(
                f"the tokenizer of '{name}' has neither a pad, an eos nor an unk token: define one of them"
            )
        tokenizer.pad_token = token


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Loading bars would be drawn over the live table."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
