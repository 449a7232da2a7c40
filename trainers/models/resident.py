"""A resident base model: loaded, frozen, in eval mode, with its tokenizer.

    loaded = resident.load("allenai/OLMoE-1B-7B-0125", device="cuda")
    loaded = resident.load("huggyllama/llama-7b", device="cuda", quantization="nf4", gradient_checkpointing=True)

On a CPU the workers of a node share the weights of a dense model that is loaded in the dtype it is stored in: they stay
pages of the mapped file. Weights that are cast, and experts, which are stored one by one and stacked on loading, are
each worker's own: sharing those would take a second copy of the model on disk, in its final form. `python -m
tests.benchmarks.shared_weights` measures both.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocators.core.errors import StudyError
from trainers.models.base import folder_of, identity_of
from trainers.models.options import check_options, check_packages, numbers_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Loaded:
    """A resident base model: frozen, in eval mode, with its tokenizer (which has a pad token).

    identity   of the stored weights, see `identity_of`
    numbers    what was made of them, see `numbers_of`
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    identity: str
    numbers: str

    @property
    def weight_bytes(self) -> int:
        """Memory of all weights as they are now: packed where they are quantised, with the scales that go with them."""
        from trainers.models.quantized import scale_bytes

        parameter_bytes: int = self.model.get_memory_footprint()
        return parameter_bytes + sum(scale_bytes(module) for module in self.model.modules())


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
    from trainers.models import quantized, sharding

    options = _options(numbers, device=device, attn=attn, quantization=quantization)
    model, tokenizer = _read(
        name, folder, device, options, checkpointing=gradient_checkpointing, trusted=trust_remote_code, shard=shard
    )
    model.requires_grad_(False).eval()
    if shard:
        sharding.prepare(model)
    quantized.keep_gradients(model)
    _ensure_pad_token(tokenizer, name)
    _give_back_freed_memory()
    return Loaded(model, tokenizer, name, identity, numbers)


def _options(numbers: str, *, device: str, attn: str, quantization: str) -> dict[str, Any]:
    """What `from_pretrained` makes of the stored weights: dtype, attention, quantisation."""
    import torch

    from trainers.models import quantized

    dtype = getattr(torch, numbers.partition(",")[0])
    options: dict[str, Any] = {"dtype": dtype}
    if attn != "auto":
        options["attn_implementation"] = attn
    if quantization:
        options["quantization_config"] = quantized.config_for(quantization, device=device, dtype=dtype)
    return options


def _read(
    name: str,
    folder: Path,
    device: str,
    options: Mapping[str, Any],
    *,
    checkpointing: bool,
    trusted: bool,
    shard: bool,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder. Raises StudyError with transformers' reason in one line."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trainers.models import sharding

    # Everything lies here by now: transformers asks the hub for code alone, where that lies elsewhere.
    trust = {"trust_remote_code": trusted, "local_files_only": not trusted}
    # straight to the device: several workers of a node need no copy each in RAM
    place: AbstractContextManager[dict[str, Any]] = (
        sharding.loading(torch.device(device)) if shard else nullcontext({"device_map": {"": device}})
    )
    try:
        with no_progress_bars(), place as where:
            model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **where, **options, **trust)
            tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
        if checkpointing:
            _checkpoint_layers(model)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        code = "" if trusted else ", no remote code"
        hint = "; trust_remote_code=true runs it" if "custom code" in reason else ""
        raise StudyError(
            f"model '{name}' cannot be loaded (safetensors weights, a tokenizer{code}): {reason}{hint}"
        ) from error
    return model, tokenizer


def _give_back_freed_memory() -> None:
    """What casting and stacking left free in the heap, nearly the size of the weights, goes back to the node."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, others need no such call
    if trim is not None:
        trim(0)


def _checkpoint_layers(model: PreTrainedModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its new name is not in all the versions that are supported
        # non-reentrant: the other kind needs an input that asks for a gradient, and runs without hooks on the graph
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _ensure_pad_token(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
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
