"""Takes a winner out of a study, in a form that other tools load, with a model card.

    python -m search.export studies/sieve-tiny-moe-default to=winner                       # the most accurate point
    python -m search.export studies/sieve-tiny-moe-default to=small point=knee format=peft
    python -m search.export studies/sieve-tiny-moe-default to=plain point=3f2a91bc format=merged
    python -m search.export help

format=adapter   adapter.safetensors and adapter.json as they were trained, checked; `trainers.adapter.load` takes them
format=merged    a transformers model without LoRA: W + (lora_alpha/r)·B·A, summed in float32. dtype=float32 keeps it
                 so, with the logits of adapter and base; dtype=stored rounds once to the type in which the base lies
                 on disk: half the size for 16 bits, and logits that differ by as much as is said
format=peft      a PEFT adapter, where PEFT can express it (trainers/adapter/peft_format.py); loaded back before it is
                 handed out, and compared

What a format cannot express is refused with the reason. Nothing is written in place: the folder appears whole or not
at all.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from allocators.core import words
from allocators.core.errors import StudyError, ToolkitError, did_you_mean
from allocators.core.types import Outcome
from search import records
from search.config import RunConfig, keys, load_arguments
from search.export.model_card import PROJECT, Card, markdown, portable, portable_command
from search.front import Candidate, human
from search.report import SHORT, Report
from search.report.live import accuracy_text
from trainers import models, storage

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # in safetensors, in torch
DIFFERENT = 1e-3  # of the largest logit: more than this is no rounding in float32


@dataclass(frozen=True)
class Request:
    """What the command line asks for besides the study's folder."""

    to: str = words.key("", "folder, or URI such as s3://bucket/dir, to write")
    point: str = words.key("best", "best (the most accurate), knee, or the id of a run: as many digits as are unique")
    format: str = words.key("adapter", "ours, a transformers model, or PEFT's", choices=("adapter", "merged", "peft"))
    dtype: str = words.key("float32", "of a merged model (stored: as the base's)", choices=("float32", "stored"))
    model: str = words.key("", "the base model, where it has moved since the study")
    overwrite: bool = words.key(False, "replace an earlier export")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 the request cannot work."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        if not given or words.asks_for_help(given):
            print(help_text())
            return 0 if given else 2
        folder, request = parse(given)
        for line in export(folder, request):
            print(line, flush=True)
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def help_text() -> str:
    lines = ["usage: python -m search.export STUDY to=FOLDER [key=value ...]", "", "keys (default):"]
    lines += words.help_of(Request)
    return "\n\n".join(["\n".join(lines), *(__doc__ or "").strip().split("\n\n")[2:]])


def parse(given: Sequence[str]) -> tuple[str, Request]:
    """The study's folder, and the rest. Raises StudyError with one line for what cannot work."""
    folders, pairs = words.split(given)
    request = words.build(Request, pairs)
    if len(folders) != 1:
        raise StudyError(f"give the folder of one study, got {len(folders)}: python -m search.export STUDY to=FOLDER")
    if storage.is_uri(folders[0]):
        raise StudyError(
            f"'{folders[0]}' is no study: its records lie in studies/NAME on the machine that started it, whatever its "
            "storage is"
        )
    if not request.to:
        raise StudyError("to=FOLDER is missing: where shall the export go?")
    if not storage.is_uri(request.to):
        request = replace(request, to=str(Path(request.to).expanduser()))
    if request.dtype != "float32" and request.format != "merged":
        raise StudyError("dtype is for format=merged: adapters are float32, whatever the base is")
    return folders[0], request


# --- the point


def find(report: Report, name: str) -> tuple[Candidate, Outcome]:
    """The point and the run of it that `point=name` means.

    Raises StudyError where there is none, or several have ids that begin like this.
    """
    if name in ("best", "knee"):
        chosen = report.knee if name == "knee" else report.front[-1] if report.front else None
        if chosen is None:
            why = "its front has no knee" if report.front else "it has no finished trial"
            raise StudyError(f"{report.records.folder} has no point={name}: {why}; {_ids(report)}")
        loadable = report.loadable(chosen)
        return chosen, loadable[0] if loadable else chosen.best
    found = [(c, run) for c in report.points for run in c.runs if name and run.digest.startswith(name)]
    if not found:
        raise StudyError(
            f"no run of {report.records.folder} has an id that begins with '{name}'"
            f"{did_you_mean(name, ('best', 'knee'))}; {_ids(report)}"
        )
    if len(found) > 1:
        several = ", ".join(run.digest for _, run in found[:4])
        raise StudyError(f"{len(found)} ids begin with '{name}': {several}{', …' if len(found) > 4 else ''}; give more")
    return found[0]


def _ids(report: Report) -> str:
    front = ", ".join(report.ids.values())
    return f"the front has {front}; points.csv lists all" if front else "points.csv lists its runs"


def locate(report: Report, run: Outcome) -> str:
    """Where a run's adapter lies. Raises StudyError that says how to get it where there is none any more."""
    where = report.adapter_folder(run)
    if where is not None and storage.exists(where):
        return where
    name = f"run {run.digest[:SHORT]} of {report.records.folder}"
    if not run.adapter:
        raise StudyError(f"{name} has no adapter: it is {run.status.replace('_', ' ')}{_because(run)}")
    kept = next((found[0] for c in report.points if run in c.runs and (found := report.loadable(c))), None)
    raise StudyError(
        f"the adapter of {name} is gone: keep=front keeps one for each point of the front, keep=all keeps everything; "
        + (f"another seed of this point is kept: point={kept.digest[:SHORT]}; or " if kept else "")
        + f"train this point again: {retrain(report, run)}"
    )


def _because(run: Outcome) -> str:
    return f" ({run.message})" if run.message else ""


def retrain(report: Report, run: Outcome) -> str:
    """The command that trains this point alone in a study of its own, and keeps its adapter."""
    header = report.records.header
    settings = {name: header["config"][name] for name in keys() if name in header["config"]}
    config = RunConfig(**settings).without("amount")
    pins = {k: v for k, v in report.records.params_of(run.digest).items() if k not in config.recipe}
    seeds = 1 + run.trial.seed - config.seed  # repeats of a point have the seeds after the study's own
    name = f"{report.records.name}-{run.digest[:SHORT]}"
    config = replace(config, trials=1, seeds=seeds, name=name, keep="all", pins=config.pins | pins)
    return portable_command(config.command())


# --- the export


def export(folder: str, request: Request) -> Iterator[str]:
    """Writes one export; yields what to tell the user, line by line.

    Raises StudyError where the study, the point, its adapter or its base is missing, the format cannot express it, or
    the place is taken or cannot be written.
    """
    report = Report(records.read(folder))
    candidate, run = find(report, request.point)
    where = locate(report, run)
    _refuse_to_replace(request)
    size, accuracy = human(run.trainable_params), accuracy_text(candidate)
    yield f"run {run.digest[:SHORT]}: {report.label(run)} ({size} trainable parameters, accuracy {accuracy})"
    with storage.reading_folder(where) as source, storage.replacing_folder(request.to) as target:
        target.mkdir()
        job = Job(request, report, run, source, target)
        load = FORMATS[request.format](job)
        card = Card(
            format=request.format,
            candidate=candidate,
            run=run,
            shape=report.records.shape,
            points=sum(point.accuracy is not None for point in report.points),
            base_params=job.base_params,
            command=portable_command(report.records.header["command"]),
            retrain=retrain(report, run),
            load=load,
            notes=job.notes,
        )
        (target / "README.md").write_text(markdown(card), encoding="utf-8")
        written = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    yield f"{request.to}: format={request.format}, {human(written)} bytes with its model card"
    yield from (f"note: {note}" for note in job.notes)
    yield f"\nTo load it:\n{load}"


def _refuse_to_replace(request: Request) -> None:
    """Raises StudyError where something lies at `to`, but for an empty folder and, with overwrite=true, an export."""
    place = request.to
    if storage.is_uri(place):
        taken, ours = storage.exists(place), storage.exists(storage.join(place, "README.md"))
    else:
        path = Path(place)
        taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
        ours = _is_export(path)
    if not taken:
        return
    if not request.overwrite:
        raise StudyError(
            f"to={place} is not empty: choose another folder, or overwrite=true to replace an earlier export"
        )
    if not ours:
        raise StudyError(f"to={place} is not empty and no export, so overwrite=true does not touch it: choose another")


def _is_export(folder: Path) -> bool:
    """Whether the folder has the card of an export."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return text.startswith("---\n") and f"- {PROJECT}\n" in text


@dataclass
class Job:
    """One export on the way: from the adapter in `source` to the folder `target`, with what is to be said of it.

    base_folder   where the base's files lie on this machine, None where they do not
    """

    request: Request
    report: Report
    run: Outcome
    source: Path
    target: Path
    notes: list[str] = field(default_factory=list)
    base_folder: Path | None = None

    def __post_init__(self) -> None:
        self.base_folder = _local_folder(self.base)

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.report.records.header["config"]

    @property
    def base(self) -> str:
        return self.request.model or self.run.trial.model

    @property
    def name(self) -> str:
        """What the export is called in code that loads it."""
        place = self.request.to
        return place.rstrip("/").rpartition("/")[2] if storage.is_uri(place) else Path(place).absolute().name

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
            raise StudyError(f"the base model is needed for format={self.request.format}: {error}") from error

    def loading(self, changes: Mapping[str, Any]) -> str:
        """Python that loads the base with this project."""
        arguments = "".join(f", {k}={v!r}" for k, v in (load_arguments(self.settings) | dict(changes)).items())
        return f"models.load({json.dumps(portable(self.base))}{arguments}).model"


def write_adapter(job: Job) -> str:
    """Our files, checked; texts without this machine's folders."""
    saved = _checked(job)
    shutil.copyfile(job.source / "adapter.safetensors", job.target / "adapter.safetensors")
    text = json.dumps(portable(saved.config), indent=1) + "\n"
    (job.target / "adapter.json").write_text(text, encoding="utf-8")
    return (
        f"from trainers import adapter, models\nmodel = {job.loading({})}\nadapter.load(model, {json.dumps(job.name)})"
    )


def write_merged(job: Job) -> str:
    """The base with the adapter in its weights."""
    from trainers import adapter

    saved = _checked(job)
    if quantization := job.settings.get("quantization"):
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
    dtype = "float32"
    if job.request.dtype == "stored":
        dtype = _stored_dtype(models.folder_of(job.base), job.base)
    loaded = job.load_base(dtype=dtype)
    attached = adapter.load(loaded.model, job.source)
    expected = _logits(loaded.model)
    attached.merge()
    difference, size = _difference(_logits(loaded.model), expected)
    _say(job, f"{dtype} weights", difference, size, exact=dtype == "float32")
    with models.no_progress_bars():
        loaded.model.save_pretrained(job.target)
    loaded.tokenizer.save_pretrained(job.target)
    code = ", trust_remote_code=True" if job.settings.get("trust_remote_code") else ""
    name = json.dumps(job.name)
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({name}{code})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({name}{code})"
    )


def write_peft(job: Job) -> str:
    """PEFT's files, loaded again by PEFT and compared."""
    from peft import PeftModel

    from trainers import adapter
    from trainers.adapter import peft_format

    saved = _checked(job)
    if reason := peft_format.refusal(saved):
        raise StudyError(f"format=peft cannot express this adapter: {reason}; use format=adapter")
    loaded = job.load_base(dtype="float32")
    attached = adapter.load(loaded.model, job.source)
    expected = _logits(loaded.model)
    attached.detach()
    revision = loaded.identity if job.is_hub else None
    written = peft_format.write(loaded.model, saved, job.target, base=portable(job.base), revision=revision)
    wrapped = PeftModel.from_pretrained(loaded.model, str(job.target))
    difference, size = _difference(_logits(wrapped), expected)
    kind = job.settings.get("quantization") or "float32"
    _say(job, f"loaded by PEFT on a {kind} base", difference, size, exact=True)
    if written.stored > written.trained:
        job.notes.append(
            "PEFT says which experts are adapted, and that gate and up have an A each, by zeros: the file holds "
            f"{written.stored:,} values, {written.stored / written.trained:.2f} times the {written.trained:,} trained"
        )
    left_out = saved.config["trainable_params"] - written.trained
    if left_out:
        job.notes.append(f"the {left_out:,} router parameters of single experts are left out: their gate is always 1")
    base = f"models.load({json.dumps(portable(job.base))}).model"
    library = "from trainers import models"
    if job.is_hub and not job.settings.get("quantization"):
        base = f"AutoModelForCausalLM.from_pretrained({json.dumps(job.base)}, revision={revision!r})"
        library = "from transformers import AutoModelForCausalLM"
    elif job.settings.get("quantization"):
        base = job.loading({})
    return f"from peft import PeftModel\n{library}\nmodel = PeftModel.from_pretrained({base}, {json.dumps(job.name)})"


FORMATS: dict[str, Callable[[Job], str]] = {"adapter": write_adapter, "merged": write_merged, "peft": write_peft}


# --- parts


def _checked(job: Job) -> Any:
    """The adapter as it was saved. Raises StudyError where it is damaged, not finite or another run's."""
    from trainers import adapter

    saved = adapter.read(job.source)
    if saved.allocation != job.run.trial.allocation:
        raise StudyError(
            f"the adapter in {job.source} has another allocation than run {job.run.digest}: is it another's?"
        )
    if bad := [name for name, tensor in saved.weights.items() if not tensor.isfinite().all()]:
        raise StudyError(f"the adapter of run {job.run.digest} is not finite ({bad[0]}): train this point again")
    return saved


def _logits(model: Any) -> Any:
    """Of two fixed sequences of 16 random tokens."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.get_input_embeddings().num_embeddings, (2, 16), generator=generator)
    with torch.no_grad():
        return model(tokens.to(model.device)).logits.float()


def _difference(found: Any, expected: Any) -> tuple[float, float]:
    """Largest difference, and the largest logit."""
    return float((found - expected).abs().max()), float(expected.abs().max())


def _say(job: Job, what: str, difference: float, size: float, *, exact: bool) -> None:
    """Notes how far the logits are. Raises StudyError where that cannot be rounding."""
    if exact and not difference <= DIFFERENT * size:  # not finite is not equal either
        raise StudyError(
            f"format={job.request.format} would compute something else than the adapter does (logits differ by "
            f"{difference:.3g}, the largest is {size:.3g}): nothing was written; use format=adapter and report this"
        )
    job.notes.append(
        f"{what}: logits of 32 random tokens differ from those of the adapter on its base by {difference:.1e} at most "
        f"(the largest is {size:.3g})"
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
    found: Counter[str] = Counter()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            head = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, tensor in head.items():
            if name != "__metadata__":
                found[tensor["dtype"]] += math.prod(tensor["shape"])
    return found


def _stored_dtype(folder: Path, name: str) -> str:
    """The type of most weights. Raises StudyError for one that torch models do not compute in."""
    kind = _stored(folder).most_common(1)[0][0]
    if kind not in DTYPES:
        raise StudyError(f"'{name}' is stored as {kind}, into which no sum can be rounded: use dtype=float32")
    return DTYPES[kind]
