"""Models of the Hugging Face hub: their config.json and weights, in the cache or fetched. Imports no torch.

    config = hub.config_file("allenai/OLMoE-1B-7B-0125")       # a path within the hub's cache, named by the commit
    hub.fetch_weights("allenai/OLMoE-1B-7B-0125", config.parent)

With HF_HUB_OFFLINE=1 only what is cached is used.
"""

from __future__ import annotations

import re
from pathlib import Path

from allocators.core.errors import StudyError
from allocators.signals import weight_files

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class NotFoundError(Exception):
    """The hub and its cache do not give a model; the text is the reason."""


def is_hub_id(name: str) -> bool:
    """Whether it is written as one; the hub is not asked."""
    return bool(_HUB_ID.fullmatch(name))


def is_cached(config: Path) -> bool:
    """Whether a config.json lies in the hub's cache: models--ORG--NAME/snapshots/COMMIT/config.json."""
    return config.parent.parent.name == "snapshots"


def config_file(name: str) -> Path:
    """A model's config.json in the cache. A cached one is used as it lies there; for others the hub is asked once.

    Raises NotFoundError with the reason.
    """
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
    except errors.OfflineModeIsEnabled:
        reason = "it is not in the local cache, and HF_HUB_OFFLINE=1 is set"
    except (OSError, errors.HTTPError):
        reason = "it is not in the local cache and the hub cannot be reached"
    raise NotFoundError(reason)


def fetch_weights(name: str, snapshot: Path) -> None:
    """Fetches weights, tokenizer and code of a hub model, of the commit that the snapshot is named by.

    Raises StudyError where neither the cache nor the hub has safetensors and a tokenizer.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    # what transformers loads; some repositories hold other copies of the weights beside them
    patterns = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
    patterns += ["*.json", "*.model", "*.txt", "*.jinja", "*.py"]  # code is read only where it is trusted
    reason = "it has no model.safetensors there"
    try:
        huggingface_hub.snapshot_download(name, revision=snapshot.name, allow_patterns=patterns)
    except (OSError, errors.HTTPError) as error:
        reason = str(error).strip().splitlines()[0]
    if not is_complete(snapshot):
        if constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE=1 is set"
        raise StudyError(
            f"the weights of '{name}' are neither in the local cache nor does the hub give them: {reason}; try "
            f"`hf download {name}`"
        )


def is_complete(folder: Path) -> bool:
    """Whether all weights that transformers would load lie there, and a tokenizer."""
    if not any(any(folder.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "*.model")):
        return False
    try:
        return all((folder / name).is_file() for name in weight_files.names_in(folder))
    except StudyError:
        return False
