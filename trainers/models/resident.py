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
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocators.core.errors import StudyError
from trainers.models import files
from trainers.models.base import config_of, folder_of, identity_of
from trainers.models.options import check_options, check_packages, numbers_of, stored_as

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Loaded:
    """A resident base model: frozen, in eval mode, with its tokenizer (which has a pad token).

    identity   of the stored weights, see `identity_of`
    numbers    what was made of them, see `numbers_of`
    notes      what the user should know of its files, a line each
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    identity: str
    numbers: str
    notes: tuple[str, ...] = ()

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

    A base that is stored as fp8 or mxfp4 is dequantised to `dtype`.

    Raises StudyError for a name that `config_of` refuses, an option or device that does not exist here, for a model
    that would need pickled weights, or code from its repository without `trust_remote_code`, and for one that is not
    whole: tensors that its files lack or that have another size, values that are not finite, a tokenizer without an
    eos token or with ids outside of the embedding.
    """
    check_options(dtype=dtype, attn=attn, quantization=quantization)
    check_packages(attn=attn, quantization=quantization)
    stored = stored_as(config_of(name), name=name)
    if stored and quantization:
        raise StudyError(
            f"quantization={quantization} packs plain weights, and '{name}' is stored as {stored}: leave it out"
        )
    numbers = numbers_of(device, dtype=dtype, attn=attn, quantization=quantization, stored=stored)
    identity, folder = identity_of(name), folder_of(name)
    from trainers.models import checks, quantized, sharding

    notes = files.check(folder, stored=stored, numbers=numbers)
    options = _options(numbers, device=device, attn=attn, quantization=quantization)
    model, tokenizer, report = _read(
        name, folder, device, options, checkpointing=gradient_checkpointing, trusted=trust_remote_code, shard=shard
    )
    notes += checks.check_report(report, name=name)
    model.requires_grad_(False).eval()
    if stored:
        quantized.forget(model)
    if shard:
        sharding.prepare(model)
    quantized.keep_gradients(model)
    checks.check_tokenizer(tokenizer, model, name=name)
    checks.check_runs(model, name=name, numbers=numbers)
    _give_back_freed_memory()
    return Loaded(model, tokenizer, name, identity, numbers, tuple(notes))


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
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]:
    """Model and tokenizer of a folder, and transformers' report of its tensors.

    Raises StudyError with transformers' reason in one line.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trainers.models import sharding

    # Everything lies here by now: transformers asks the hub for code alone, where that lies elsewhere.
    trust = {"trust_remote_code": trusted, "local_files_only": not trusted}
    # a tensor of another size is to be in the report, by name, like one that is missing
    options = {**options, "use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    # straight to the device: several workers of a node need no copy each in RAM
    place: AbstractContextManager[dict[str, Any]] = (
        sharding.loading(torch.device(device)) if shard else nullcontext({"device_map": {"": device}})
    )
    try:
        with files.quiet(), files.clean(folder) as clean, place as where:
            load: Any = AutoModelForCausalLM.from_pretrained
            model, report = load(clean, **where, **options, **trust)
            tokenizer = AutoTokenizer.from_pretrained(clean, **trust)
        if checkpointing:
            _checkpoint_layers(model)
    except StudyError:
        raise
    except Exception as error:  # whatever transformers makes of somebody's files
        reason = files.reason_of(error)
        code = "" if trusted else ", no remote code"
        hint = "; trust_remote_code=true runs it" if "custom code" in reason else ""
        raise StudyError(
            f"model '{name}' cannot be loaded (safetensors weights, a tokenizer{code}): {reason}{hint}"
        ) from error
    return model, tokenizer, report


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
