"""A model's folder: whether it is whole, how transformers may read it, and what transformers says in one line.

    notes = files.check(folder, stored="", numbers="float32")       # StudyError for files that are cut, missing, mixed
    with files.clean(folder) as clean, files.quiet(): …             # clean is what from_pretrained takes

Importing this file loads neither torch nor transformers: a study looks at the files before it starts workers.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from allocators.core.errors import StudyError
from allocators.core.types import ModelShape
from allocators.signals import weight_files
from trainers.models.options import packing_of

ADAPTER_CONFIG = "adapter_config.json"  # PEFT's; beside a base it is no part of it

_BOM = b"\xef\xbb\xbf"
# Types of tensors in a model that is not packed: weights, and what a few families keep of positions.
_PLAIN = ("F64", "F32", "F16", "BF16", "I64", "I32", "BOOL")
_WHOLE = ("I64", "I32", "BOOL")
_WEIGHT = re.compile(r"(\.weight|_proj)$")
_EXPERT = re.compile(r"(.*\.experts)\.(\d{1,5})\.(.*)")
_LONGEST = 300  # characters of somebody else's reason


def check(folder: Path, *, stored: str, numbers: str, shape: ModelShape | None = None) -> list[str]:
    """Notes on the files of a model: what the user should know, a line each. Loads nothing.

    stored    what `options.stored_as` says
    numbers   what `options.numbers_of` says
    shape     what config.json makes of it, where the load is not to say first that the files hold something else

    Raises StudyError for weight files that are missing, cut short or Git LFS pointers, experts that differ from the
    others, and weights that are not in the form that config.json says.
    """
    tensors = _tensors(folder)
    _check_experts(tensors, folder)
    if whole := [name for name, tensor in tensors.items() if tensor.dtype in _WHOLE and _WEIGHT.search(name)]:
        raise StudyError(
            f"{whole[0]} of '{folder}' is stored as {tensors[whole[0]].dtype}{more(whole)}, whole numbers, which no "
            "weight is: fetch the files again"
        )
    dtypes = {tensor.dtype for tensor in tensors.values()}
    packed = sorted(dtype for dtype in dtypes if dtype not in _PLAIN)
    if bool(packed) != bool(stored):
        says = f"says that the weights are stored as {stored}" if stored else "has no quantization_config"
        raise StudyError(
            f"the files of '{folder}' hold {', '.join(packed or sorted(dtypes))}, and config.json {says}: are both of "
            "one model?"
        )
    if shape is not None and not stored:
        _check_sizes(tensors, folder, shape)
    if stored == "fp8":
        _check_blocks(tensors, folder)
    notes = []
    if stored:
        notes.append(f"'{folder.name}' is stored as {stored}: dequantised to {numbers.partition(',')[0]}")
    if (folder / ADAPTER_CONFIG).is_file():
        notes.append(f"{ADAPTER_CONFIG} beside the weights of '{folder.name}' is not used: the base is taken alone")
    return notes


def _tensors(folder: Path) -> dict[str, weight_files.Stored]:
    """What the files of a model hold. Raises StudyError where two files hold a tensor: which is meant, nothing says."""
    tensors: dict[str, weight_files.Stored] = {}
    holder: dict[str, str] = {}
    for file in weight_files.files_in(folder):
        found = weight_files.head(file)
        if twice := sorted(found.keys() & tensors.keys()):
            raise StudyError(
                f"{twice[0]} of '{folder}' is in {holder[twice[0]]} and in {file.name}{more(twice)}: which of them "
                "counts is not said; fetch the files again"
            )
        tensors |= found
        holder |= dict.fromkeys(found, file.name)
    return tensors


def _experts_in(
    tensors: Mapping[str, weight_files.Stored],
) -> dict[str, dict[str, dict[int, weight_files.Stored]]]:
    """Experts that are stored one by one: by layer and part, the tensor of each."""
    layers: dict[str, dict[str, dict[int, weight_files.Stored]]] = {}
    for name, tensor in tensors.items():
        if match := _EXPERT.fullmatch(name):
            layer, number, part = match.groups()
            layers.setdefault(layer, {}).setdefault(part, {})[int(number)] = tensor
    return layers


def _check_experts(tensors: Mapping[str, weight_files.Stored], folder: Path) -> None:
    """Raises StudyError where one expert of a layer has other tensors than the rest, which cannot be stacked then."""
    for layer, parts in _experts_in(tensors).items():
        experts = sorted(set().union(*parts.values()))
        for part, by_expert in parts.items():
            if missing := [expert for expert in experts if expert not in by_expert]:
                raise StudyError(
                    f"the files of '{folder}' lack {layer}.{missing[0]}.{part}{more(missing)}, which other experts of "
                    "the layer have: fetch them again"
                )
            sizes = Counter(tensor.shape for tensor in by_expert.values())
            if len(sizes) > 1:
                odd = min(by_expert, key=lambda expert: sizes[by_expert[expert].shape])
                raise StudyError(
                    f"{layer}.{odd}.{part} of '{folder}' is {list(by_expert[odd].shape)}, and those of other experts "
                    f"{list(sizes.most_common(1)[0][0])}: fetch the files again"
                )


def _check_sizes(tensors: Mapping[str, weight_files.Stored], folder: Path, shape: ModelShape) -> None:
    """Tensors that a family stores under other names than it loads them are left to the load.

    Raises StudyError where the files hold a matrix in another size than config.json makes it, or other experts.
    """
    held = {layer: len(set().union(*parts.values())) for layer, parts in _experts_in(tensors).items()}
    for module in shape.modules:
        layer = module.path.rpartition(".")[0]
        if module.num_experts and held.get(layer, module.num_experts) != module.num_experts:
            raise StudyError(
                f"{layer} of '{folder}' has {held[layer]} experts in its files, and config.json makes it "
                f"{module.num_experts}: is config.json another model's?"
            )
        tensor, wanted = tensors.get(f"{module.path}.weight"), (module.out_features, module.in_features)
        # A few families store the transpose.
        if tensor and tensor.dtype in _PLAIN and sorted(tensor.shape) != sorted(wanted):
            raise StudyError(
                f"{module.path}.weight of '{folder}' is {list(tensor.shape)} in its files, and config.json makes it "
                f"{list(wanted)}: is config.json another model's?"
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


def more(several: Collection[object]) -> str:
    """` and 3 more`, where there are others than the first."""
    return f" and {len(several) - 1} more" if len(several) > 1 else ""


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
