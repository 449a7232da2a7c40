"""The three forms of an export for Python: what each writes, how it is checked, and the code that loads it.

    load = write_merged(conversion)        # files in conversion.target, what to say in conversion.notes

What a format cannot express is refused with the reason, before or after the computation, but never handed out: each
form is loaded back from what was written, by the library that will use it, and its logits (of our own form its tensors)
are compared with those of the adapter on its base.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocators.core.errors import StudyError
from allocators.core.types import Outcome
from allocators.signals import weight_files
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
        try:
            return sum(_stored(self.base_folder).values()) if self.base_folder is not None else None
        except StudyError:  # an adapter is exported without its base
            return None

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
            self.notes += loaded.notes
            return loaded
        except StudyError as error:
            raise StudyError(f"the base model is needed for format={self.format}: {error}") from error

    @property
    def quoted(self) -> str:
        """The export's name as Python."""
        return json.dumps(self.name)


def write_adapter(conversion: Conversion) -> str:
    """Our files, checked; texts without this machine's folders."""
    from trainers.adapter import files

    saved = checked(conversion)
    shutil.copyfile(conversion.source / "adapter.safetensors", conversion.target / "adapter.safetensors")
    text = json.dumps(files.sealed(portable(saved.config), saved.weights), indent=1) + "\n"
    (conversion.target / "adapter.json").write_text(text, encoding="utf-8")
    _compare_adapters(conversion, saved)
    return load_code(portable(conversion.base), conversion.name, settings=conversion.settings)


def write_merged(conversion: Conversion) -> str:
    """The base with the adapter in its weights."""
    from trainers import adapter
    from trainers.models import files

    refuse_to_merge(checked(conversion), conversion.settings)
    dtype = "float32"
    if conversion.dtype == "stored":
        dtype = _stored_dtype(models.folder_of(conversion.base), conversion.base)
    loaded = conversion.load_base(dtype=dtype)
    attached = adapter.load(loaded.model, conversion.source)
    expected = logits_of(loaded.model)
    attached.merge()
    merged = logits_of(loaded.model)
    with files.quiet():
        loaded.model.save_pretrained(conversion.target)
    loaded.tokenizer.save_pretrained(conversion.target)
    trusted = bool(conversion.settings.get("trust_remote_code"))
    again = logits_of(_load_plain(conversion, dtype, trusted))
    _refuse_other(conversion, again, merged)
    compare(conversion, f"{dtype} weights, loaded by transformers", again, expected, exact=dtype == "float32")
    code = ", trust_remote_code=True" if trusted else ""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({conversion.quoted}{code})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({conversion.quoted}{code})"
    )


def _load_plain(conversion: Conversion, dtype: str, trusted: bool) -> Any:
    """The merged model as its files have it, by plain transformers. Raises StudyError where they are not whole."""
    from transformers import AutoModelForCausalLM

    from trainers.models import files

    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        with files.quiet():
            model, report = load(
                conversion.target, trust_remote_code=trusted, local_files_only=not trusted, output_loading_info=True
            )
    except Exception as error:  # whatever transformers makes of its own files
        raise _failed(conversion, f"it cannot be loaded again ({files.reason_of(error)})") from error
    if dtype == "float32" and (other := {str(p.dtype) for p in model.parameters()} - {"torch.float32"}):
        raise _failed(conversion, f"its files hold {min(other)}, not float32")
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            example = min(map(str, report[kind]))
            raise _failed(conversion, f"loaded again it has {kind.replace('_', ' ')}, e.g. {example}")
    return model.eval()


def refuse_to_merge(saved: Saved, settings: Mapping[str, Any]) -> None:
    """Raises StudyError where no sum of weights equals the adapter on its base."""
    if quantization := settings.get("quantization"):
        raise StudyError(
            f"this adapter was trained on a base with quantization={quantization}: no sum fits into packed weights, "
            "and on full ones it was never measured; use format=adapter or format=peft, which load on the packed base"
        )
    if several := getattr(saved.allocation, "several", []):
        raise StudyError(
            f"{several[0]} and {len(several) - 1} more modules have several LoRA experts, mixed anew for every token: "
            "no merged weight equals them; use format=adapter, or train with one expert a module"
        )


def loaded_with_logits(conversion: Conversion, **changes: Any) -> tuple[models.Loaded, Tensor]:
    """The base in float32 without an adapter, and the logits that it has with the adapter."""
    from trainers import adapter

    loaded = conversion.load_base(dtype="float32", **changes)
    with adapter.applied(loaded.model, conversion.source):
        expected = logits_of(loaded.model)
    return loaded, expected


def write_peft(conversion: Conversion) -> str:
    """PEFT's files, loaded again by PEFT and compared."""
    from peft import PeftModel

    from trainers.adapter import peft_format

    saved = checked(conversion)
    if reason := peft_format.refusal(saved):
        raise StudyError(f"format=peft cannot express this adapter: {reason}; use format=adapter")
    loaded, expected = loaded_with_logits(conversion)
    revision = loaded.identity if conversion.is_hub else None
    base = portable(conversion.base)
    written = peft_format.write(loaded.model, saved, conversion.target, base=base, revision=revision)
    with peft_format.unheard():
        wrapped = PeftModel.from_pretrained(loaded.model, str(conversion.target))
    kind = conversion.settings.get("quantization") or "float32"
    compare(conversion, f"loaded by PEFT on a {kind} base", logits_of(wrapped), expected, exact=True)
    if written.misheard:
        conversion.notes.append(
            "loading it PEFT warns that rank_pattern and alpha_pattern of experts 'were ignored': they are not, since "
            "the logits are those above"
        )
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
    elif conversion.is_hub and not models.stored_as(models.config_of(conversion.base), name=conversion.base):
        library = "from transformers import AutoModelForCausalLM"
        base = f"AutoModelForCausalLM.from_pretrained({json.dumps(conversion.base)}, revision={revision!r})"
    return f"from peft import PeftModel\n{library}\nmodel = PeftModel.from_pretrained({base}, {conversion.quoted})"


# --- parts


def checked(conversion: Conversion) -> Saved:
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


def logits_of(model: Any) -> Tensor:
    """Of two fixed sequences of 16 random tokens, [2, 16, V]."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.get_input_embeddings().num_embeddings, (2, 16), generator=generator)
    with torch.no_grad():
        logits_2SV: Tensor = model(tokens.to(model.device)).logits.float()
        return logits_2SV


def _compare_adapters(conversion: Conversion, saved: Saved) -> None:
    """Raises StudyError where our files, read again, hold another adapter than the study's."""
    import torch

    from trainers import adapter

    try:
        again = adapter.read(conversion.target)
    except StudyError as error:
        raise _failed(conversion, f"it cannot be read again ({error})") from error
    same = (
        again.allocation == saved.allocation and again.lora == saved.lora and again.shape.modules == saved.shape.modules
    )
    same &= again.config["base"]["fingerprint"] == saved.config["base"]["fingerprint"]
    same &= again.weights.keys() == saved.weights.keys()
    if not same or not all(torch.equal(again.weights[name], tensor) for name, tensor in saved.weights.items()):
        raise _failed(conversion, "read again it holds another adapter")
    conversion.notes.append(f"read again: all {len(saved.weights)} tensors are those that were trained")


def _failed(conversion: Conversion, reason: str) -> StudyError:
    return StudyError(
        f"format={conversion.format} would not be what the adapter is: {reason}: nothing was written; use "
        "format=adapter and report this"
    )


def _refuse_other(conversion: Conversion, logits: Tensor, expected: Tensor) -> None:
    """Raises StudyError where logits differ by more than rounding in float32."""
    difference, largest = float((logits - expected).abs().max()), float(expected.abs().max())
    if not difference <= DIFFERENT * largest:  # not finite is not equal either
        raise _failed(conversion, f"logits differ by {difference:.3g}, the largest is {largest:.3g}")


def compare(conversion: Conversion, what: str, logits: Tensor, expected: Tensor, *, exact: bool) -> None:
    """Notes how far the logits are from the adapter's. Raises StudyError where that cannot be rounding."""
    if exact:
        _refuse_other(conversion, logits, expected)
    difference, largest = float((logits - expected).abs().max()), float(expected.abs().max())
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
    values: Counter[str] = Counter()
    for file in weight_files.files_in(folder):
        for tensor in weight_files.head(file).values():
            values[tensor.dtype] += math.prod(tensor.shape)
    return values


def _stored_dtype(folder: Path, name: str) -> str:
    """The type of most weights. Raises StudyError for one that torch models do not compute in."""
    kind = _stored(folder).most_common(1)[0][0]
    if kind not in DTYPES:
        raise StudyError(f"'{name}' is stored as {kind}, into which no sum can be rounded: use dtype=float32")
    return DTYPES[kind]
