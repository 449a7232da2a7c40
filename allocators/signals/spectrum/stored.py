"""Weights by module path, as they are stored: one matrix at a time from safetensors, or from a resident model.

    read = open_weights("models/llama-7b")                        # a folder, a Hugging Face id, or a model
    read("model.layers.0.self_attn.q_proj")                       # [out, in], in the dtype it is stored in

Shards of a hub model are fetched when their first matrix is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from allocators.core.errors import StudyError
from allocators.signals import weight_files

Weights = str | Path | nn.Module


def open_weights(weights: Weights) -> Callable[[str], Tensor]:
    """Module path -> its weight."""
    if isinstance(weights, nn.Module):
        return lambda path: weights.get_parameter(f"{path}.weight")
    folder = Path(weights).expanduser()
    file_of = partial(_in_folder, folder) if folder.is_dir() else partial(_from_hub, str(weights))
    where = _tensors(file_of, str(weights))

    def read(path: str) -> Tensor:
        from safetensors import safe_open

        name = _tensor_name(path, where, str(weights))
        file = file_of(where[name])
        if file is None:
            raise StudyError(f"'{weights}' lacks the shard {where[name]} that its index names: fetch it again")
        if name not in weight_files.head(file):
            raise StudyError(f"'{file}' lacks {name}, which the index says it holds: fetch it again")
        with safe_open(
            file, framework="pt"
        ) as tensors:  # for each anew: what was read of a mapped shard counts as ours
            tensor: Tensor = tensors.get_tensor(name)
            return tensor

    return read


def _tensors(file_of: Callable[[str], Path | None], weights: str) -> Mapping[str, str]:
    """Tensor name -> name of the file that holds it."""
    if (single := file_of(weight_files.SINGLE)) is not None:
        return dict.fromkeys(weight_files.head(single), weight_files.SINGLE)
    if (index := file_of(weight_files.INDEX)) is not None:
        return weight_files.shards_of(index)
    raise StudyError(
        f"no model.safetensors for '{weights}': give a folder that save_pretrained(...) wrote, or a Hugging Face "
        "id that is in the local cache or can be reached"
    )


def _tensor_name(path: str, where: Mapping[str, str], weights: str) -> str:
    """The tensor of a module: checkpoints may lack the leading `model.`, have something before it, or have these parts
    in another order (`language_model.model.layers…` on disk, `model.language_model.layers…` in memory).
    """
    name = f"{path}.weight"
    if name in where:
        return name
    candidates = [n for n in where if name.endswith(f".{n}") or n.endswith(f".{name}")] or _reordered(name, where)
    if len(candidates) != 1:
        have = next((n for n in where if n.endswith("." + name.split(".", 3)[-1])), next(iter(where), "nothing"))
        raise StudyError(f"'{weights}' has {len(candidates)} tensors for {name}: it holds {len(where)}, e.g. {have}")
    return candidates[0]


def _reordered(name: str, where: Iterable[str]) -> list[str]:
    """Tensors with the same name from `layers` on, those whose parts before it differ least from the module's."""
    before, layers, after = name.partition("layers.")
    differing: dict[str, int] = {}
    for other in where:
        others, _, rest = other.partition("layers.")
        if layers and rest == after:
            left, right = Counter(before.split(".")), Counter(others.split("."))
            differing[other] = ((left - right) + (right - left)).total()
    return [other for other, number in differing.items() if number == min(differing.values())]


def _in_folder(folder: Path, name: str) -> Path | None:
    return folder / name if (folder / name).is_file() else None


def _from_hub(repository: str, name: str) -> Path | None:
    """A file of a hub model, from the cache or fetched now; shards are fetched when their first matrix is read."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        cached = huggingface_hub.try_to_load_from_cache(repository, name)
        return Path(cached if isinstance(cached, str) else huggingface_hub.hf_hub_download(repository, name))
    except errors.EntryNotFoundError:  # not in the repository; or not in the cache, without a network
        return None
    except (OSError, errors.HTTPError, errors.HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise StudyError(
            f"'{repository}' is no folder here, and the hub does not give its weights: {reason}"
        ) from error
