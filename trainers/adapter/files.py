"""An adapter's folder: `adapter.safetensors` holds its tensors, `adapter.json` everything else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from allocators.core import checks
from allocators.core.errors import StudyError, ToolkitError
from allocators.core.types import Allocation, LoraSettings, ModelShape, allocation_from_json
from trainers import storage
from trainers.adapter.base import Adapter
from trainers.models.quantized import quantization_of

FORMAT = 1  # of adapter.json
_WEIGHTS, _CONFIG = "adapter.safetensors", "adapter.json"


def save(adapter: Adapter, folder: storage.Location, *, metadata: Mapping[str, Any]) -> None:
    """Writes `adapter.safetensors` and `adapter.json` (allocation, settings, base model, `metadata`) into `folder`.

    Works before and after detach() and merge(). Raises StudyError where the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(folder)
    config = {
        "format": FORMAT,
        "base": {
            "name": adapter.shape.name,
            "family": family_of(adapter.model),
            "fingerprint": adapter.fingerprint,
            "quantization": quantization_of(adapter.model),
        },
        "allocation": adapter.allocation.to_json(),
        "settings": adapter.settings,
        "trainable_params": adapter.num_trainable,
        "shape": adapter.shape.to_json(),
        "metadata": dict(metadata),
    }
    weights = {n: t.detach().contiguous().cpu() for n, t in adapter.state_dict().items()}
    config = sealed(config, weights)
    try:
        path.mkdir(parents=True, exist_ok=True)
        save_file(weights, path / _WEIGHTS)
        (path / _CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise StudyError(
            f"cannot save the adapter in {path}: {getattr(error, 'strerror', error)}; choose a folder you may write"
        ) from error


@dataclass(frozen=True)
class Saved:
    """What a folder holds that `save` wrote: the contents of adapter.json, and the weights by name."""

    folder: str
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]

    @property
    def allocation(self) -> Allocation:
        """Raises KeyError or ValueError where adapter.json names none."""
        return allocation_from_json(self.config["allocation"])

    @property
    def shape(self) -> ModelShape:
        """The shape of the model that the adapter was trained on."""
        return ModelShape.from_json(self.config["shape"])

    @property
    def lora(self) -> LoraSettings:
        """As the adapter was attached with; settings that its kind has no use for, or are younger, have defaults."""
        settings = self.config["settings"]
        return LoraSettings(**{f.name: settings[f.name] for f in fields(LoraSettings) if f.name in settings})


def read(folder: storage.Location) -> Saved:
    """What a folder (a path or a URI) holds; needs no model.

    Raises StudyError where it holds no adapter, a damaged one, or not as many weights as its allocation has.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with storage.reading_folder(folder) as path:
        for name in (_CONFIG, _WEIGHTS):
            if (path / name).exists() and not (path / name).is_file():  # a pipe would be waited for
                raise StudyError(f"the adapter in {folder} is damaged: {name} is no file; save it again")
        try:
            config = checks.mapping(json.loads((path / _CONFIG).read_text(encoding="utf-8")), _CONFIG)
            weights = load_file(path / _WEIGHTS)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StudyError(f"no adapter in {folder}: expected {_CONFIG} and {_WEIGHTS} there") from error
        except (OSError, ValueError, SafetensorError) as error:  # no JSON, no UTF-8
            raise StudyError(f"the adapter in {folder} is damaged: {error}; save it again") from error
    if config.get("format") != FORMAT:
        raise StudyError(f"{folder}/{_CONFIG} has format {config.get('format')}, this version reads {FORMAT}")
    saved = Saved(str(folder), config, weights)
    held = sum(tensor.numel() for tensor in weights.values())
    try:
        counted = saved.allocation.trainable_params(saved.shape, rank=saved.lora.rank)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ToolkitError) as error:
        raise StudyError(f"the adapter in {folder} is damaged: {_CONFIG} is not that of one; save it again") from error
    if held != counted:
        raise StudyError(
            f"the adapter in {folder} is damaged: it holds {held:,} values, its allocation {counted:,}; save it again"
        )
    if "checksum" in config and config["checksum"] != _checksum(weights, config):  # an earlier version wrote none
        raise StudyError(f"the adapter in {folder} is damaged: its checksum is another; save it again")
    return saved


def sealed(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The contents of adapter.json with the checksum that belongs to them and to the weights."""
    return {**config, "checksum": _checksum(weights, config)}


def _checksum(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
    """Of the weights, and of everything else in adapter.json."""
    rest = {key: value for key, value in config.items() if key != "checksum"}
    return storage.checksum(weights, {_CONFIG: json.dumps(rest, sort_keys=True)})


def family_of(model: nn.Module) -> str:
    """What transformers calls the model's family."""
    return model.config.model_type  # type: ignore[union-attr,return-value]
