"""A base model by name, without its weights: which folder, what config, what identity, what sizes.

    base.config_of("tiny-moe")["num_experts"]                 # reads config.json: no torch, no transformers
    base.shape_of("microsoft/Phi-3.5-mini-instruct")          # sizes of what LoRA can go on
    base.identity_of("tiny-dense")                            # sha256:… of config and weights

A name is that of an embedded model (a folder of trainers/embedded/), of a packaged one, a local folder, or an id of the
hub.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocators.core import shapes, words
from allocators.core.errors import StudyError, did_you_mean
from allocators.core.types import ModelShape
from allocators.signals import weight_files
from trainers.models import files, hub, smollm2
from trainers.models.options import stored_as

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HERE = Path(__file__).parents[1] / "embedded"

# Folder `tiny_moe` is the model `tiny-moe`.
EMBEDDED: dict[str, Path] = {
    folder.name.replace("_", "-"): folder
    for folder in (sorted(_HERE.iterdir()) if _HERE.is_dir() else ())
    if (folder / "config.json").is_file()
}

# Models that a Python package ships: a function that gives their folder, converting them when it is first called.
PACKAGED: dict[str, Callable[[], Path]] = {smollm2.NAME: smollm2.folder}

_CHUNK = 1 << 22  # bytes read at once while hashing


def config_of(name: str) -> dict[str, Any]:
    """`config.json` of a model as a dict. Loads neither weights nor torch nor transformers, but for the conversion of a
    packaged model that is asked for the first time.

    Raises StudyError when the name is no embedded or packaged model, no model folder and no id that the hub or its
    cache knows, and for a config.json that is no JSON object of a model.
    """
    file = config_file(name)
    config = weight_files.json_object(file)
    model_type = config.get("model_type", "")
    if not isinstance(model_type, str):
        raise StudyError(f"'{file}' has model_type {str(model_type)[:80]}, which is no text: it names one family")
    if "transformers_weights" in config:
        raise StudyError(
            f"'{file}' names the weights by transformers_weights: call them {weight_files.SINGLE} and leave it out"
        )
    return config


def identity_of(name: str) -> str:
    """What the weights are, for provenance: the commit of a hub model, else `sha256:` of config and weight files.

    Raises StudyError as `config_of` does, and where a folder lacks safetensors that it should hold.
    """
    config = config_file(name)
    if hub.is_cached(config):
        return config.parent.name
    return hash_of((config, *weight_files.files_in(config.parent)))


def hash_of(files: Iterable[Path]) -> str:
    """`sha256:` of the names, sizes and contents of files, in their order. Raises OSError where one cannot be read."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    return f"sha256:{digest.hexdigest()[:32]}"


def matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files of a folder that match any of the patterns, sorted."""
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def folder_of(name: str) -> Path:
    """The folder with a model's config.json and safetensors; those of a hub model are fetched where they are not here.

    Raises StudyError as `config_of` does, and where a hub model has no safetensors or they cannot be fetched.
    """
    config = config_file(name)
    if hub.is_cached(config) and not hub.is_complete(config.parent):
        hub.fetch_weights(name, config.parent)
    return config.parent


def shape_of(name: str, *, trust_remote_code: bool = False) -> ModelShape:
    """Sizes of a model's adaptable modules: from config.json alone for the families of allocators/core/shapes.py, for
    others from the model's own classes, built without weights (imports transformers).

    Raises StudyError as `config_of` does, and for a model that is no causal language model of decoder layers.
    """
    config = config_of(name)
    if config.get("model_type") in shapes.FAMILIES:
        return shapes.shape_from_config(config, name=name)
    from trainers.models import discover

    model = discover.without_weights(config_file(name).parent, name, trust_remote_code)
    return discover.shape_from_modules(model, name=name)


def check_config(name: str, *, trust_remote_code: bool = False) -> None:
    """Builds a model from its config alone, without weights: values that no model takes are said before it is loaded.

    Raises StudyError as `config_of` does, and with transformers' reason. Packages that only workers have are not asked,
    and a model that comes with this one is right.
    """
    if name in EMBEDDED:
        return
    from trainers.models import discover

    try:
        discover.without_weights(config_file(name).parent, name, trust_remote_code)
    except StudyError as error:
        if not isinstance(error.__cause__, ImportError):
            raise


def check_files(name: str, shape: ModelShape) -> None:
    """Looks at the weight files of a model that lie here, before anything is started; loads and fetches nothing.

    Raises StudyError as `files.check` does.
    """
    config = config_file(name)
    if not hub.is_cached(config) or hub.is_complete(config.parent):
        files.check(config.parent, stored=stored_as(config_of(name), name=name), numbers="", shape=shape)


def has_weights(name: str) -> bool:
    """Whether a model has weights here or, from the hub, can have them: a folder may hold a config.json alone.

    Raises StudyError as `config_of` does.
    """
    config = config_file(name)
    return hub.is_cached(config) or any(f for kind in ("*.safetensors*", "*.bin*") for f in config.parent.glob(kind))


def left_out(name: str, *, trust_remote_code: bool = False) -> list[str]:
    """A note that names the linear maps of decoder layers that have no role, and so never get LoRA; [] for none.

    The families of allocators/core/shapes.py have a role for every map.

    Raises StudyError as `shape_of` does.
    """
    if config_of(name).get("model_type") in shapes.FAMILIES:
        return []
    from trainers.models import discover

    model = discover.without_weights(config_file(name).parent, name, trust_remote_code)
    paths = discover.left_out(model, name=name)
    return [f"left out, as parts without a role in '{name}': {paths}"] if paths else []


def shape_of_model(model: PreTrainedModel, *, name: str) -> ModelShape:
    """Sizes of the adaptable modules of a model in memory. Raises StudyError as `shape_of` does."""
    if model.config.model_type in shapes.FAMILIES:
        return shapes.shape_from_config(model.config, name=name)
    from trainers.models import discover

    return discover.shape_from_modules(model, name=name)


def config_file(name: str) -> Path:
    """Where a model's config.json lies on this machine, fetched from the hub where need be.

    Raises StudyError as `config_of` does.
    """
    if name in EMBEDDED:
        return EMBEDDED[name] / "config.json"
    if name in PACKAGED:
        return PACKAGED[name]() / "config.json"
    folder = words.path(name, "model")
    if name and folder.is_dir():
        file = folder / "config.json"
        if not file.is_file():
            raise _no_config(name, folder)
        return file
    if not hub.is_hub_id(name):
        raise _not_found(name, "it is no folder here and no Hugging Face id")
    try:
        return hub.config_file(name)
    except hub.NotFoundError as reason:
        raise _not_found(name, str(reason)) from None


def _no_config(name: str, folder: Path) -> StudyError:
    adapter = folder / files.ADAPTER_CONFIG
    if adapter.is_file():
        base = weight_files.json_object(adapter).get("base_model_name_or_path")
        return StudyError(
            f"'{name}' is a PEFT adapter of {str(base or 'an unnamed base')[:200]!r}, not a model: merge it first "
            "(peft's merge_and_unload, then save_pretrained), or give its base"
        )
    return StudyError(f"'{name}' is a folder without config.json: point to one that save_pretrained(...) wrote")


def _not_found(name: str, reason: str) -> StudyError:
    known = [*EMBEDDED, *PACKAGED]
    return StudyError(
        f"unknown model '{name}': {reason}; choose an embedded one ({', '.join(EMBEDDED) or 'none'}), a packaged one "
        f"({', '.join(PACKAGED)}), a folder with config.json and safetensors, or fetch one with "
        f"`hf download ORG/NAME`{did_you_mean(name, known)}"
    )
