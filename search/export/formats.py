"""The three forms of an export: what each writes, how it is checked, and the Python that loads it.

    load = FORMATS["merged"](conversion)        # files in conversion.target, what to say in conversion.notes

What a format cannot express is refused with the reason, before or after the computation, but never handed out: the
logits of what was written are compared with those of the adapter on its base.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocators.core.errors import StudyError
from allocators.core.types import Outcome
from search.config import load_arguments
from search.records.redact import portable
from search.report.words import base_code, load_code
from trainers import models

if TYPE_CHECKING:  # a request that cannot work is refused without torch
    from torch import Tensor

    from trainers.adapter import Saved

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # in safetensors, in torch
DIFFERENT = 1e-3  # of the largest logit: more than this is no rounding in float32


@dataclass
class Conversion:
    """One adapter on its way into a format: from the folder `source` to the folder `target`.

    format, dtype   as the command line has them
    base            name of the base model
    name            what the export is called in code that loads it
    settings        of the study, which the base is loaded with
    run             that trained the adapter
    notes           a sentence each: what the export measured, costs or leaves out
    base_folder     where the base's files lie on this machine, None where they do not
    """

    format: str
    dtype: str
    base: str
    name: str
    settings: Mapping[str, Any]
    run: Outcome
    source: Path
    target: Path
    notes: list[str] = field(default_factory=list)
    base_folder: Path | None = None

    def __post_init__(self) -> None:
        self.base_folder = _local_folder(self.base)

    @property
    def base_params(self) -> int | None:
        """Of the base model, from the heads of its files; None where they do not lie here."""
        return sum(_stored(self.base_folder).values()) if self.base_folder is not None else None

    @property
    def is_hub(self) -> bool:
        """Whether the base is called by its id on the hub."""
        known = self.base in models.EMBEDDED or self.base in models.PACKAGED
        return not known and not Path(self.base).expanduser().is_dir()

    def load_base(self, **changes: Any) -> models.Loaded:
        """The base as the study loaded it, but for `changes`, on the CPU."""
        arguments = load_arguments(self.settings) | changes
        try:
            loaded = models.load(self.base, **arguments)
            self.base_folder = models.folder_of(self.base)
            return loaded
        except StudyError as error:
            raise StudyError(f"the base model is needed for format={self.format}: {error}") from error

    @property
    def quoted(self) -> str:
        """The export's name as Python."""
        return json.dumps(self.name)


def write_adapter(conversion: Conversion) -> str:
    """Our files, checked; texts without this machine's folders."""
    saved = _checked(conversion)
    shutil.copyfile(conversion.source / "adapter.safetensors", conversion.target / "adapter.safetensors")
    text = json.dumps(portable(saved.config), indent=1) + "\n"
    (conversion.target / "adapter.json").write_text(text, encoding="utf-8")
    return load_code(portable(conversion.base), conversion.name, settings=conversion.settings)


def write_merged(conversion: Conversion) -> str:
    """The base with the adapter in its weights."""
    from trainers import adapter

    _refuse_to_merge(_checked(conversion), conversion.settings)
    dtype = "float32"
    if conversion.dtype == "stored":
        dtype = _stored_dtype(models.folder_of(conversion.base), conversion.base)
    loaded = conversion.load_base(dtype=dtype)
    attached = adapter.load(loaded.model, conversion.source)
    expected = _logits(loaded.model)
    attached.merge()
    _compare(conversion, f"{dtype} weights", _logits(loaded.model), expected, exact=dtype == "float32")
    with models.no_progress_bars():
        loaded.model.save_pretrained(conversion.target)
    loaded.tokenizer.save_pretrained(conversion.target)
    code = ", trust_remote_code=True" if conversion.settings.get("trust_remote_code") else ""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({conversion.quoted}{code})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({conversion.quoted}{code})"
    )


def _refuse_to_merge(saved: Saved, settings: Mapping[str, Any]) -> None:
    """Raises StudyError where no sum of weights equals the adapter on its base."""
    if quantization := settings.get("quantization"):
        raise StudyError(
            f"this adapter was trained on a base with quantization={quantization}: no sum fits into packed weights, "
            "and on full ones it was never measured; use format=adapter or format=peft, which load on the packed base"
        )
    several = [path for path, n in getattr(saved.allocation, "counts", {}).items() if n > 1]
    if several:
        raise StudyError(
            f"{several[0]} and {len(several) - 1} more modules have several LoRA experts, mixed anew for every token: "
            "no merged weight equals them; use format=adapter, or train with one expert a module"
        )


def write_peft(conversion: Conversion) -> str:
    """PEFT's files, loaded again by PEFT and compared."""
    from peft import PeftModel

    from trainers import adapter
    from trainers.adapter import peft_format

    saved = _checked(conversion)
    if reason := peft_format.refusal(saved):
        raise StudyError(f"format=peft cannot express this adapter: {reason}; use format=adapter")
    loaded = conversion.load_base(dtype="float32")
    attached = adapter.load(loaded.model, conversion.source)
    expected = _logits(loaded.model)
    attached.detach()
    revision = loaded.identity if conversion.is_hub else None
    base = portable(conversion.base)
    written = peft_format.write(loaded.model, saved, conversion.target, base=base, revision=revision)
    wrapped = PeftModel.from_pretrained(loaded.model, str(conversion.target))
    kind = conversion.settings.get("quantization") or "float32"
    _compare(conversion, f"loaded by PEFT on a {kind} base", _logits(wrapped), expected, exact=True)
    if written.stored > written.trained:
        conversion.notes.append(
            "PEFT says which experts are adapted, and that gate and up have an A each, by zeros: the file holds "
            f"{written.stored:,} values, {written.stored / written.trained:.2f} times the {written.trained:,} trained"
        )
    if left_out := saved.config["trainable_params"] - written.trained:
        conversion.notes.append(
            f"the {left_out:,} router parameters of single experts are left out: their gate is always 1"
        )
    return _load_with_peft(conversion, revision)


def _load_with_peft(conversion: Conversion, revision: str | None) -> str:
    """Python that puts PEFT's files on the base, by transformers alone where the base is one of the hub's."""
    library, base = "from trainers import models", f"models.load({json.dumps(portable(conversion.base))}).model"
    if conversion.settings.get("quantization"):
        base = base_code(portable(conversion.base), conversion.settings)
    elif conversion.is_hub:
        library = "from transformers import AutoModelForCausalLM"
        base = f"AutoModelForCausalLM.from_pretrained({json.dumps(conversion.base)}, revision={revision!r})"
    return f"from peft import PeftModel\n{library}\nmodel = PeftModel.from_pretrained({base}, {conversion.quoted})"


FORMATS: dict[str, Callable[[Conversion], str]] = {"adapter": write_adapter, "merged": write_merged, "peft": write_peft}


# --- parts


def _checked(conversion: Conversion) -> Saved:
    """The adapter as it was saved. Raises StudyError where it is damaged, not finite or another run's."""
    from trainers import adapter

    saved, run = adapter.read(conversion.source), conversion.run
    if saved.allocation != run.trial.allocation:
        raise StudyError(
            f"the adapter in {conversion.source} has another allocation than run {run.digest}: is it another's?"
        )
    if bad := [name for name, tensor in saved.weights.items() if not tensor.isfinite().all()]:
        raise StudyError(f"the adapter of run {run.digest} is not finite ({bad[0]}): train this point again")
    return saved


def _logits(model: Any) -> Tensor:
    """Of two fixed sequences of 16 random tokens, [2, 16, V]."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.get_input_embeddings().num_embeddings, (2, 16), generator=generator)
    with torch.no_grad():
        logits_2SV: Tensor = model(tokens.to(model.device)).logits.float()
        return logits_2SV


def _compare(conversion: Conversion, what: str, logits: Tensor, expected: Tensor, *, exact: bool) -> None:
    """Notes how far the logits are from the adapter's. Raises StudyError where that cannot be rounding."""
    difference, largest = float((logits - expected).abs().max()), float(expected.abs().max())
    if exact and not difference <= DIFFERENT * largest:  # not finite is not equal either
        raise StudyError(
            f"format={conversion.format} would compute something else than the adapter does (logits differ by "
            f"{difference:.3g}, the largest is {largest:.3g}): nothing was written; use format=adapter and report this"
        )
    conversion.notes.append(
        f"{what}: logits of 32 random tokens differ from those of the adapter on its base by {difference:.1e} at most "
        f"(the largest is {largest:.3g})"
        + ("" if exact else ", which is the rounding of the weights; dtype=float32 has none")
    )


def _local_folder(name: str) -> Path | None:
    """Where a base model lies on this machine; nothing is fetched, converted or asked of a network."""
    if name in models.EMBEDDED:
        return models.EMBEDDED[name]
    if (folder := Path(name).expanduser()).is_dir():
        return folder
    if name in models.PACKAGED:
        return None
    import huggingface_hub

    try:
        cached = huggingface_hub.try_to_load_from_cache(name, "config.json")
    except ValueError:  # no id of a hub model
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _stored(folder: Path) -> Counter[str]:
    """Type → number of values, from the heads of a model folder's safetensors."""
    from safetensors import safe_open

    values: Counter[str] = Counter()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (it is no mapping)
                tensor = tensors.get_slice(name)  # its head: nothing is loaded
                values[tensor.get_dtype()] += math.prod(tensor.get_shape())
    return values


def _stored_dtype(folder: Path, name: str) -> str:
    """The type of most weights. Raises StudyError for one that torch models do not compute in."""
    kind = _stored(folder).most_common(1)[0][0]
    if kind not in DTYPES:
        raise StudyError(f"'{name}' is stored as {kind}, into which no sum can be rounded: use dtype=float32")
    return DTYPES[kind]
