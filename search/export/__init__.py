"""Takes a winner out of a study: which point, where its adapter lies, and one export with its model card.

    for line in write("studies/demo", Request(to="winner", format="peft")): print(line)

The command is `__main__.py`, what a format computes `formats.py`, the card `model_card.py`.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from allocators.core import words
from allocators.core.errors import StudyError, did_you_mean
from allocators.core.types import Outcome
from search import records
from search.config import RunConfig, before, keys
from search.export.elsewhere import write_config
from search.export.formats import Conversion, write_adapter, write_merged, write_peft
from search.export.model_card import PROJECT, Card, markdown
from search.export.served import write_gguf_ready, write_vllm
from search.front import Candidate
from search.records.files import ADAPTERS, refuse_links_out
from search.records.redact import portable_command
from search.report import Report
from search.text import human, run_id
from trainers import storage
from trainers.recipes import SETTINGS

# What writes each form: files in `conversion.target`, what to say in `conversion.notes`, and gives how to load it.
FORMATS: Mapping[str, Callable[[Conversion], str]] = {
    "adapter": write_adapter,
    "merged": write_merged,
    "peft": write_peft,
    "vllm": write_vllm,
    "gguf-ready": write_gguf_ready,
    "config": write_config,
}
WITHOUT_WEIGHTS = ("config",)  # needs the point alone, not its adapter


@dataclass(frozen=True)
class Request:
    """What the command line asks for besides the study's folder."""

    to: str = words.key("", "folder, or URI such as s3://bucket/dir, to write")
    point: str = words.key("best", "best (the most accurate), knee, or a run's id (its first digits, if unique)")
    format: str = words.key("adapter", "ours, a transformers model, PEFT's, or a server's", choices=tuple(FORMATS))
    dtype: str = words.key("float32", "of a merged model (stored: as the base's)", choices=("float32", "stored"))
    model: str = words.key("", "where the base model is now, if it has moved since the study")
    overwrite: bool = words.key(False, "replace an earlier export")


# --- the point


def find(report: Report, name: str) -> tuple[Candidate, Outcome]:
    """The point and the run of it that `point=name` means.

    Raises StudyError where there is none, or several have ids that begin like this.
    """
    if name in ("best", "knee"):
        chosen = report.knee if name == "knee" else report.rising[-1] if report.front else None
        if chosen is None:
            why = "its front has no knee" if report.front else "it has no finished trial"
            raise StudyError(f"{report.records.folder} has no point={name}: {why}; {_ids(report)}")
        loadable = report.loadable(chosen)
        return chosen, loadable[0] if loadable else chosen.best
    matching = [(c, run) for c in report.points for run in c.runs if name and run.digest.startswith(name)]
    if not matching:
        raise StudyError(
            f"no run of {report.records.folder} has an id that begins with '{name}'"
            f"{did_you_mean(name, ('best', 'knee'))}; {_ids(report)}"
        )
    if len(matching) > 1:
        several = ", ".join(run.digest for _, run in matching[:4]) + (", …" if len(matching) > 4 else "")
        raise StudyError(f"{len(matching)} ids begin with '{name}': {several}; give more")
    return matching[0]


def _ids(report: Report) -> str:
    front = ", ".join(report.ids.values())
    return f"the front has {front}; points.csv lists all" if front else "points.csv lists its runs"


def locate(report: Report, run: Outcome) -> str:
    """Where a run's adapter lies.

    Raises StudyError that says how to get it where there is none any more, or names the link that leads out of the
    study folder to it.
    """
    where = report.records.adapter_of(run)
    if where is not None and storage.exists(where):
        return where
    name = f"run {run_id(run)} of {report.records.folder}"
    if not run.adapter:
        raise StudyError(f"{name} has no adapter: it is {run.status.replace('_', ' ')}{_because(run)}")
    refuse_links_out(report.records.folder / ADAPTERS / run.digest, report.records.folder)
    loadable = (report.loadable(candidate) for candidate in report.points if run in candidate.runs)
    kept = next((other for other, _ in filter(None, loadable)), None)
    raise StudyError(
        f"the adapter of {name} is gone: keep=front keeps one for each point of the front, keep=all keeps everything; "
        + (f"another seed of this point is kept: point={run_id(kept)}; or " if kept else "")
        + f"train this point again: {retrain(report, run)}"
    )


def _because(run: Outcome) -> str:
    return f" ({run.message})" if run.message else ""


def retrain(report: Report, run: Outcome) -> str:
    """The command that trains this point alone in a study of its own, and keeps its adapter.

    Of a point that was cut from a training, the command that cuts that again.
    """
    header = report.records.header
    if run.trial.parent:
        energy = f"{run.trial.knobs.get('energy', 1.0):g}"
        words_ = ["python", "-m", "search.truncate", str(report.records.folder), f"point={run.trial.parent[:8]}"]
        return portable_command(shlex.join([*words_, f"energy={energy}"]))
    settings = before() | {name: header["config"][name] for name in keys() if name in header["config"]}
    config = RunConfig(**settings).without("amount")
    params = report.records.params_of(run.digest)
    pins = {name: value for name, value in params.items() if name not in SETTINGS}
    # as what they came to, whichever of them the space proposed when it was recorded
    decided = {name for name in SETTINGS if name in params} - {"scaled_rate"}
    decided |= {"rank", "lora_alpha", "learning_rate"} if SETTINGS.keys() & params.keys() else set()
    recipe = {name: getattr(run.trial.recipe, name) for name in SETTINGS if name in decided}
    seeds = 1 + run.trial.seed - config.seed  # repeats of a point have the seeds after the study's own
    name = f"{report.records.name}-{run_id(run)}"
    config = replace(
        config, trials=1, seeds=seeds, name=name, keep="all", recipe=config.recipe | recipe, pins=config.pins | pins
    )
    return portable_command(config.command())


# --- the export


def write(folder: str | Path, request: Request) -> Iterator[str]:
    """Writes one export; yields what to tell the user, line by line.

    Raises StudyError where the study, the point, its adapter or its base is missing, the format cannot express it, or
    the place is taken or cannot be written.
    """
    report = Report(records.read(folder))
    candidate, run = find(report, request.point)
    where = "" if request.format in WITHOUT_WEIGHTS else locate(report, run)
    _refuse_to_replace(request)
    size, accuracy = human(run.trainable_params), report.accuracy_words(candidate)
    yield f"run {run_id(run)}: {report.label(run)} ({size} trainable parameters, {accuracy})"
    reading = storage.reading_folder(where) if where else nullcontext(Path())
    with reading as source, storage.replacing_folder(request.to) as target:
        target.mkdir()
        conversion = Conversion(
            format=request.format,
            dtype=request.dtype,
            base=request.model or run.trial.model,
            name=_name(request.to),
            settings=report.records.header["config"],
            run=run,
            source=source,
            target=target,
        )
        load = FORMATS[request.format](conversion)
        card = _card(report, candidate, conversion, load)
        (target / "README.md").write_text(markdown(card), encoding="utf-8")
        written = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    yield f"{request.to}: format={request.format}, {human(written)} bytes with its model card"
    yield from (f"note: {note}" for note in conversion.notes)
    if (name := _name(request.to)) != request.to:
        yield f"note: the lines below name '{name}' without its path: run them in the folder that holds it"
    yield f"\nTo load it:\n{load}"


def _name(place: str) -> str:
    """What an export at this place is called in code that loads it."""
    return place.rstrip("/").rpartition("/")[2] if storage.is_uri(place) else Path(place).absolute().name


def _card(report: Report, candidate: Candidate, conversion: Conversion, load: str) -> Card:
    """What the export's model card says; `load` is the Python that loads it."""
    return Card(
        format=conversion.format,
        candidate=candidate,
        run=conversion.run,
        shape=report.records.shape,
        splits=report.splits,
        points=sum(point.accuracy is not None for point in report.points),
        base_params=conversion.base_params,
        command=portable_command(report.records.header["command"]),
        retrain=retrain(report, conversion.run),
        load=load,
        notes=conversion.notes,
    )


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
