"""Whether a model is whole: its files before it is loaded; tensors, values and tokenizer afterwards.

    notes = checks.check_folder(folder, stored="", numbers="float32")       # what the user should know, a line each
    checks.check_finite(model, name="tiny-moe", numbers="float32")          # StudyError, in one line

transformers draws a weight that the files lack at random, obeys an adapter that lies beside the base, and looks no
token up before it is used: each would go wrong in silence.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from allocators.core import weight_files
from allocators.core.errors import NotFiniteError, StudyError
from trainers.models import files, sharding
from trainers.models.options import packing_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Types of tensors in a model that is not packed: weights, and what a few families keep of positions.
_PLAIN = ("F64", "F32", "F16", "BF16", "I64", "I32", "BOOL")
_EXPERT = re.compile(r"(.*\.experts)\.(\d{1,5})\.(.*)")
_TOKENS = 16  # of the pass that shows whether logits are finite


def check_folder(folder: Path, *, stored: str, numbers: str) -> list[str]:
    """Notes on the files of a model.

    stored    what `options.stored_as` says
    numbers   what `options.numbers_of` says

    Raises StudyError for weight files that are missing, cut short or Git LFS pointers.
    """
    tensors = {
        name: tensor for file in weight_files.files_in(folder) for name, tensor in weight_files.head(file).items()
    }
    _check_experts(tensors, folder)
    dtypes = {tensor.dtype for tensor in tensors.values()}
    packed = sorted(dtype for dtype in dtypes if dtype not in _PLAIN)
    if bool(packed) != bool(stored):
        says = f"says that the weights are stored as {stored}" if stored else "has no quantization_config"
        raise StudyError(
            f"the files of '{folder}' hold {', '.join(packed or sorted(dtypes))}, and config.json {says}: are both of "
            "one model?"
        )
    if stored == "fp8":
        _check_blocks(tensors, folder)
    notes = []
    if stored:
        notes.append(f"'{folder.name}' is stored as {stored}: dequantised to {numbers.partition(',')[0]}")
    if (folder / files.ADAPTER_CONFIG).is_file():
        notes.append(
            f"{files.ADAPTER_CONFIG} beside the weights of '{folder.name}' is not used: the base is taken alone"
        )
    return notes


def _check_experts(tensors: Mapping[str, weight_files.Stored], folder: Path) -> None:
    """Raises StudyError where one expert of a layer has other tensors than the rest, which cannot be stacked then."""
    layers: dict[str, dict[str, dict[int, weight_files.Stored]]] = {}
    for name, tensor in tensors.items():
        if match := _EXPERT.fullmatch(name):
            layer, number, part = match.groups()
            layers.setdefault(layer, {}).setdefault(part, {})[int(number)] = tensor
    for layer, parts in layers.items():
        experts = sorted(set().union(*parts.values()))
        for part, by_expert in parts.items():
            if missing := [expert for expert in experts if expert not in by_expert]:
                raise StudyError(
                    f"the files of '{folder}' lack {layer}.{missing[0]}.{part}{_more(missing)}, which other experts of "
                    "the layer have: fetch them again"
                )
            sizes = Counter(tensor.shape for tensor in by_expert.values())
            if len(sizes) > 1:
                odd = min(by_expert, key=lambda expert: sizes[by_expert[expert].shape])
                raise StudyError(
                    f"{layer}.{odd}.{part} of '{folder}' is {list(by_expert[odd].shape)}, and those of other experts "
                    f"{list(sizes.most_common(1)[0][0])}: fetch the files again"
                )


def _check_blocks(tensors: Mapping[str, weight_files.Stored], folder: Path) -> None:
    """transformers takes the blocks of a scale to be equally large; where the last one is smaller, all would be wrong.

    Raises StudyError for such a matrix.
    """
    packing = packing_of(weight_files.json_object(folder / "config.json"))
    block = packing.get("weight_block_size", [128, 128])
    if block is None:  # a scale for the whole matrix
        return
    if not isinstance(block, list) or [type(width) for width in block] != [int, int]:
        raise StudyError(
            f"the config of '{folder}' has a weight_block_size that is no two whole numbers: fetch it again"
        )
    for name, scale in tensors.items():
        weight = tensors.get(name.removesuffix("_scale_inv"))
        if (
            weight is None
            or weight is scale
            or not weight.dtype.startswith("F8")
            or len(weight.shape) != len(scale.shape)
        ):
            continue
        sizes = list(zip(weight.shape[-2:], scale.shape[-2:], block or (), strict=False))
        if any(scales > 1 and size != scales * width for size, scales, width in sizes):
            raise StudyError(
                f"{name} of '{folder}' has {list(scale.shape)} scales for {list(weight.shape)} values, which blocks of "
                f"{block} do not divide: transformers would spread the scales wrongly; take plain weights"
            )


def check_report(report: Mapping[str, Any], *, name: str) -> list[str]:
    """Notes on tensors that were read for nothing.

    report   what transformers gives for `output_loading_info`

    Raises StudyError for tensors that the files lack, have in another size, or that could not be converted.
    """
    if mismatched := sorted(report.get("mismatched_keys", ())):
        tensor, found, wanted = mismatched[0]
        raise StudyError(
            f"{tensor} of '{name}' is {list(found)} in its files, and config.json makes it {list(wanted)}"
            f"{_more(mismatched)}: is config.json another model's?"
        )
    if missing := sorted(report.get("missing_keys", ())):
        example = sorted(report.get("unexpected_keys", ()))
        instead = f"; they hold {example[0]}, which the model does not have" if example else ""
        raise StudyError(
            f"the files of '{name}' lack {missing[0]}{_more(missing)}, which would be drawn at random{instead}: save "
            "the whole model with save_pretrained(...)"
        )
    if errors := report.get("error_msgs") or report.get("conversion_errors"):
        text = " ".join(str(next(iter(errors.items())) if isinstance(errors, Mapping) else errors[0]).split())
        raise StudyError(f"tensors of '{name}' cannot be read: {text[:300]}")
    if unused := sorted(report.get("unexpected_keys", ())):
        what = f"{len(unused)} tensors" if len(unused) > 1 else "1 tensor"
        return [f"{what} of the files of '{name}' unused, e.g. {unused[0]}: config.json has no place for them"]
    return []


def _more(several: Collection[Any]) -> str:
    return f" and {len(several) - 1} more" if len(several) > 1 else ""


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: Any, *, name: str) -> None:
    """Gives the tokenizer a pad token whose id the embedding has: padding is masked, so any known token serves.

    Raises StudyError where the tokenizer has no eos token, or another token has an id outside of the embedding.
    """
    rows: int = model.get_input_embeddings().num_embeddings
    if tokenizer.eos_token is None or tokenizer.eos_token_id is None:
        raise StudyError(
            f"the tokenizer of '{name}' has no eos token: name one of its tokens in tokenizer_config.json (eos_token)"
        )
    outside = {token: number for token, number in tokenizer.get_vocab().items() if not 0 <= number < rows}
    pad = tokenizer.pad_token_id
    if pad is None or not 0 <= pad < rows:
        outside.pop(tokenizer.pad_token or "", None)
        tokenizer.pad_token = tokenizer.eos_token
    if outside:
        number, token = min((number, token) for token, number in outside.items())
        raise StudyError(
            f"token {token}{_more(outside)} of '{name}' is {number}, the embedding has {rows} rows: resize "
            "the embedding, or take the tokenizer that belongs to this model"
        )


def check_finite(model: Any, *, name: str, numbers: str) -> None:
    """Looks at every weight, and at the logits of one pass; of a sharded model all workers call this.

    Raises NotFiniteError where one is not finite, StudyError where the model does not run.
    """
    for path, parameter in model.named_parameters():
        rows, _ = sharding.local_rows(parameter.detach())
        if rows.is_floating_point() and rows.numel() and not _is_finite(rows):
            raise NotFiniteError(
                f"the base's logits are not finite: {path} of '{name}' holds values that are not finite in {numbers}"
            )
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = torch.arange(_TOKENS, device=model.device) * 7919 % vocabulary
    try:
        with torch.no_grad():
            logits = model(input_ids=tokens.unsqueeze(0), use_cache=False).logits
    except Exception as error:  # whatever sizes do not fit
        raise StudyError(f"model '{name}' does not run: {files.reason_of(error)}") from error
    if not logits.isfinite().all():
        raise NotFiniteError(
            f"the base's logits are not finite: '{name}' overflows in {numbers}; try dtype=float32, or bfloat16"
        )


def _is_finite(rows: torch.Tensor) -> bool:
    """Without a tensor of booleans as large as the weights: extremes are not finite where a value is not."""
    lowest, highest = rows.aminmax()
    return bool(lowest.isfinite() and highest.isfinite())
