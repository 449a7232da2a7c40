"""Base models by name: embedded, packaged, a local folder or a Hugging Face id. Safetensors only, and no code from the
hub unless it is asked for.

    from trainers import models
    models.config_of("tiny-moe")["num_experts"]                 # reads config.json: no torch, no transformers
    models.shape_of("microsoft/Phi-3.5-mini-instruct")          # sizes, no weights
    loaded = models.load("allenai/OLMoE-1B-7B-0125", device="cuda")
    loaded = models.load("huggyllama/llama-7b", device="cuda", quantization="nf4", gradient_checkpointing=True)

A base model is frozen: `load` returns it in eval mode with no parameter that asks for a gradient. The weights of a hub
model are fetched once, by commit; with HF_HUB_OFFLINE=1 only what is cached is used.

On a CPU the workers of a node share the weights of a dense model that is loaded in the dtype it is stored in: they stay
pages of the mapped file. Weights that are cast, and experts, which are stored one by one and stacked on loading, are
each worker's own: sharing those would take a second copy of the model on disk, in its final form. `python -m
tests.benchmarks.shared_weights` measures both.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allocators.core import shapes
from allocators.core.errors import StudyError, did_you_mean, unknown
from allocators.core.types import ModelShape
from trainers.models import smollm2

_HERE = Path(__file__).parents[1] / "embedded"

# Folder `tiny_moe` is the model `tiny-moe`.
EMBEDDED: dict[str, Path] = {
    folder.name.replace("_", "-"): folder
    for folder in (sorted(_HERE.iterdir()) if _HERE.is_dir() else ())
    if (folder / "config.json").is_file()
}

# Models that a Python package ships: a function that gives their folder, converting them when it is first called.
PACKAGED: dict[str, Callable[[], Path]] = {smollm2.NAME: smollm2.folder}

DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTION = ("auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
QUANTIZATION = ("nf4", "int8")

# What an option needs besides this project's dependencies: the module, and what to type.
_PACKAGES = {
    "nf4": ("bitsandbytes", "pip install -e '.[quantization]'"),
    "int8": ("bitsandbytes", "pip install -e '.[quantization]'"),
    # without these transformers would take a kernel from the hub, which is somebody's code
    "flash_attention_2": ("flash_attn", "pip install flash-attn, or attn=sdpa"),
    "flash_attention_3": ("flash_attn_interface", "install FlashAttention 3, or attn=sdpa"),
}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_CHUNK = 1 << 22  # bytes read at once while hashing


@dataclass(frozen=True)
class Loaded:
    """A resident base model: frozen, in eval mode, with its tokenizer (which has a pad token).

    identity   of the stored weights, see `identity_of`
    numbers    what was made of them, see `numbers_of`
    """

    model: Any
    tokenizer: Any
    name: str
    identity: str
    numbers: str

    @property
    def weight_bytes(self) -> int:
        """Memory of all weights as they are now: packed where they are quantised, with the scales that go with them."""
        return self.model.get_memory_footprint() + sum(_scale_bytes(module) for module in self.model.modules())


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


def shape_of(name: str, *, trust_remote_code: bool = False) -> ModelShape:
    """Sizes of a model's adaptable modules: from config.json alone for the families of allocators/core/shapes.py, for
    others from the model's own classes, built without weights (imports transformers).

    Raises StudyError as `config_of` does, and for a model that is no causal language model of decoder layers.
    """
    config = config_of(name)
    if config.get("model_type") in shapes.FAMILIES:
        return shapes.shape_of(config, name=name)
    from trainers.models import discover

    return discover.shape_of(discover.without_weights(_config_file(name).parent, name, trust_remote_code), name=name)


def shape_of_model(model: Any, *, name: str) -> ModelShape:
    """The same for a model in memory. Raises StudyError as `shape_of` does."""
    if model.config.model_type in shapes.FAMILIES:
        return shapes.shape_of(model.config, name=name)
    from trainers.models import discover

    return discover.shape_of(model, name=name)


def dtype_on(device: str) -> str:
    """What dtype=auto means: bfloat16 on a CUDA device that supports it, else float32.

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


def numbers_of(device: str, *, dtype: str = "auto", attn: str = "auto", quantization: str = "") -> str:
    """Everything besides the stored weights that decides what a model computes, for provenance: `bfloat16`,
    `float32, nf4`, `bfloat16, eager`. Raises StudyError as `dtype_on` does.
    """
    parts = (dtype_on(device) if dtype == "auto" else dtype, quantization, "" if attn == "auto" else attn)
    return ", ".join(part for part in parts if part)


def check_options(*, dtype: str, attn: str, quantization: str) -> None:
    """Raises StudyError for a value that does not exist."""
    for key, value, possible in (("dtype", dtype, DTYPES), ("attn", attn, ATTENTION)):
        if value not in possible:
            raise unknown(key, value, possible)
    if quantization and quantization not in QUANTIZATION:
        raise unknown("quantization", quantization, QUANTIZATION)


def check_packages(*, attn: str, quantization: str) -> None:
    """Raises StudyError where an option needs a package that is not installed."""
    for key, value in (("quantization", quantization), ("attn", attn)):
        module, command = _PACKAGES.get(value, ("", ""))
        if module and importlib.util.find_spec(module) is None:
            raise StudyError(f"{key}={value} needs the package {module}, which is not installed: {command}")


def remarks(name: str, shape: ModelShape, *, quantization: str, trust_remote_code: bool) -> list[str]:
    """What the user should know of the options, a line each; said once, before anything is loaded."""
    lines = []
    if trust_remote_code:
        lines.append(f"trust_remote_code=true: Python code that comes with '{name}' may run, with all your rights")
    if quantization and shape.is_moe:
        stacked = sum(m.in_features * m.out_features * m.num_experts for m in shape.of_role("expert"))
        linear = sum(m.in_features * m.out_features for m in shape.of_role("attention", "mlp", "shared_expert"))
        lines.append(
            f"quantization={quantization} is for linear layers: the stacked experts of '{name}' stay as they are, "
            f"{stacked / (stacked + linear):.0%} of the weights of its layers ({stacked:,} of {stacked + linear:,})"
        )
    return lines


def load(
    name: str,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    attn: str = "auto",
    gradient_checkpointing: bool = False,
    quantization: str = "",
    trust_remote_code: bool = False,
    shard: bool = False,
) -> Loaded:
    """Loads a base model to `device`, frozen.

    dtype                    of weights and activations; auto: what `dtype_on` says
    attn                     implementation of attention; auto: what transformers takes, sdpa where the model has it
    gradient_checkpointing   keep a layer's input only and run the layer again in the backward pass: less memory for one
                             more forward pass, the same losses (non-reentrant; active in training only)
    quantization             weights of linear layers in 4 bits (`nf4`, QLoRA's, with quantised scales) or 8 (`int8`,
                             LLM.int8(), which multiplies in float16) by bitsandbytes; nf4 multiplies in `dtype`.
                             Stacked experts, routers, embeddings, norms and the head stay in `dtype`
    trust_remote_code        run model code from its repository
    shard                    this worker's part only, of a model that all workers of torch.distributed load together:
                             see trainers/models/sharding.py

    Raises StudyError for a name that `config_of` refuses, an option or device that does not exist here, and for a model
    that would need pickled weights, or code from its repository without `trust_remote_code`.
    """
    check_options(dtype=dtype, attn=attn, quantization=quantization)
    check_packages(attn=attn, quantization=quantization)
    numbers = numbers_of(device, dtype=dtype, attn=attn, quantization=quantization)
    identity, folder = identity_of(name), folder_of(name)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trainers.models import sharding

    options: dict[str, Any] = {"dtype": getattr(torch, numbers.partition(",")[0])}
    if attn != "auto":
        options["attn_implementation"] = attn
    if quantization:
        options["quantization_config"] = _quantizer(quantization, device, options["dtype"])
    # Everything lies here by now: transformers asks the hub for code alone, where that lies elsewhere.
    trust = {"trust_remote_code": trust_remote_code, "local_files_only": not trust_remote_code}
    # straight to the device: several workers of a node need no copy each in RAM
    place: Any = sharding.loading(torch.device(device)) if shard else nullcontext({"device_map": {"": device}})
    try:
        with no_progress_bars(), place as where:
            model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **where, **options, **trust)
            tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
        if gradient_checkpointing:
            _checkpoint_layers(model)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        code = "" if trust_remote_code else ", no remote code"
        hint = "; trust_remote_code=true runs it" if "custom code" in reason else ""
        raise StudyError(
            f"model '{name}' cannot be loaded (safetensors weights, a tokenizer{code}): {reason}{hint}"
        ) from error
    model.requires_grad_(False).eval()
    if shard:
        sharding.prepare(model)
    for module in model.modules():
        # At the first evaluation on a CPU with AVX512-BF16 bitsandbytes would repack 4-bit weights into a form that has
        # no gradient: training after an evaluation would go wrong silently.
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False
    _ensure_pad_token(tokenizer, name)
    _give_back_freed_memory()
    return Loaded(model, tokenizer, name, identity, numbers)


def _quantizer(quantization: str, device: str, dtype: Any) -> Any:
    import bitsandbytes
    import torch
    from transformers import BitsAndBytesConfig

    kind, possible = torch.device(device).type, sorted(bitsandbytes.supported_torch_devices)
    if kind not in possible:
        raise StudyError(f"quantization={quantization} does not run on {kind}: bitsandbytes supports {possible}")
    if quantization == "int8":
        # It multiplies in float16 whatever `dtype` is, and would say so for every layer of every pass.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _scale_bytes(module: Any) -> int:
    """Of a quantised layer, what is no parameter: the scales of its blocks or rows, and the scales of those."""
    weight = getattr(module, "weight", None)
    if (state := getattr(weight, "quant_state", None)) is not None:
        return state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    scales = getattr(weight, "SCB", None)  # moves at the first forward pass
    scales = getattr(getattr(module, "state", None), "SCB", None) if scales is None else scales
    return 0 if scales is None else scales.nbytes


def _give_back_freed_memory() -> None:
    """What casting and stacking left free in the heap, nearly the size of the weights, goes back to the node."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, others need no such call
    if trim is not None:
        trim(0)


def _checkpoint_layers(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its new name is not in all the versions that are supported
        # non-reentrant: the other kind needs an input that asks for a gradient, and runs without hooks on the graph
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


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
    except errors.OfflineModeIsEnabled:
        reason = "it is not in the local cache, and HF_HUB_OFFLINE=1 is set"
    except (OSError, errors.HTTPError):
        reason = "it is not in the local cache and the hub cannot be reached"
    raise _not_found(name, reason)


def _fetch(name: str, snapshot: Path) -> None:
    """Weights, tokenizer and code of a hub model, of the commit that the snapshot is named by."""
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
    if not _is_complete(snapshot):
        if constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE=1 is set"
        raise StudyError(
            f"the weights of '{name}' are neither in the local cache nor does the hub give them: {reason}; try "
            f"`hf download {name}`"
        )


def _is_complete(folder: Path) -> bool:
    """Whether all weights that transformers would load lie there, and a tokenizer."""
    if not any(any(folder.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "*.model")):
        return False
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
def no_progress_bars() -> Iterator[None]:
    """Loading bars would be drawn over the live table."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
