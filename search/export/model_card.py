"""The model card of an export, README.md: what it is, how to load it, what is known of it. Pure text, no torch.

    python -m search.export studies/demo to=winner        # writes it beside the weights

The head is what the Hugging Face hub reads. Nothing of the machine gets out: paths become names, secrets were taken out
of the records when they were written and are taken out again here.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allocators.core.types import Allocation, ExpertCounts, ExpertSelection, ModelShape, Outcome
from search.config import portable_words
from search.front import Candidate
from search.records import redacted
from search.report.live import accuracy_text, number, point

PROJECT = "lora-expert-search"
KIND = {
    "adapter": "LoRA experts, in the format of lora-expert-search",
    "merged": "A plain transformers model with the LoRA experts merged into its weights",
    "peft": "LoRA experts as a PEFT adapter",
}
LIBRARY = {"adapter": PROJECT, "merged": "transformers", "peft": "peft"}

# A path that begins at the root or at home, after anything that can precede one in a command or a message.
_PATH = re.compile(r"(?<![\w.:/~-])(?:file://)?~?/(?:[^\s'\",\]/]+/)*([^\s'\",\]/]+)/?")


@dataclass(frozen=True)
class Card:
    """Everything that a card says.

    format        adapter | merged | peft
    points        measured points of the study, among which this one was chosen
    base_params   all parameters of the base model; None where it does not lie on this machine
    command       of the study; `retrain`: of this point alone
    load          Python
    notes         a sentence each: what the export measured, costs or leaves out
    """

    format: str
    candidate: Candidate
    run: Outcome
    shape: ModelShape
    points: int
    base_params: int | None
    command: str
    retrain: str
    load: str
    notes: Sequence[str]

    @property
    def base(self) -> str:
        return portable(self.run.trial.model)

    @property
    def task(self) -> str:
        return portable(self.run.trial.task)


def portable(value: Any) -> Any:
    """The same text, or JSON value, without secrets and without the folders of this machine.

    >>> portable({"model": "/home/me/models/olmoe", "command": "run task=/data/q.yaml", "uri": "s3://me:pw@bucket/x"})
    {'model': 'olmoe', 'command': 'run task=path/to/q.yaml', 'uri': 's3://***@bucket/x'}
    """
    if isinstance(value, Mapping):
        return {str(key): redacted(portable(item), str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item) for item in value]
    if not isinstance(value, str):
        return value
    text = redacted(value)
    if text.startswith(("/", "~/")) and not re.search(r"[\s,]", text):  # a path and nothing else: its name
        return Path(text).name or text
    return _PATH.sub(r"path/to/\1", text)


def portable_command(command: str) -> str:
    """A command line for another machine: without what says where a study runs, and without this one's folders."""
    return shlex.join(portable(word) for word in portable_words(command))


def markdown(card: Card) -> str:
    """The whole README.md."""
    run = card.run
    parts = [
        f"---\n{_head(card)}\n---",
        f"# {card.base}, {point(run)}, {card.task}",
        f"{KIND[card.format]}: base model `{card.base}`, trained on the task `{card.task}`. Which experts or "
        f"layers get LoRA was chosen by the allocator `{point(run)}`, found by a search over allocators and LoRA "
        "settings for accuracy against trainable parameters.",
        "## How to load it\n" + _code(card.load, "python"),
        "## What is known\n" + _table(_facts(card)),
        *(f"- {note}" for note in card.notes),
        "## Where the LoRA experts are\n" + _code("\n".join(allocation_map(run.trial.allocation, card.shape)), "text"),
        "## Recipe\n" + _table(run.trial.recipe.to_json().items()),
        "## Data\n" + _table(_data(card)),
        "## How it was made\n" + _code(card.command, "bash"),
        "This point alone, with its adapter kept:\n" + _code(card.retrain, "bash"),
        _table(portable(run.versions).items()),
        "## Licence\nThe licence of the base model applies to this export as it does to the base model, and so may "
        "those of the data that it was trained on. lora-expert-search, which made it, adds no terms of its own.",
    ]
    return "\n\n".join(parts) + "\n"


def _head(card: Card) -> str:
    """YAML as the hub reads it."""
    from huggingface_hub import EvalResult, ModelCardData

    run, accuracy = card.run, card.candidate.accuracy
    kind = "mixture-of-experts" if card.shape.is_moe else "dense"
    result = EvalResult(
        task_type="text-generation",
        dataset_type=card.task,
        dataset_name=card.task,
        metric_type="accuracy",
        metric_value=None if accuracy is None else round(accuracy, 4),
        metric_name=f"accuracy ({_seeds(card)})",
    )
    relation = "finetune" if card.format == "merged" else "adapter"
    data = ModelCardData(
        base_model=card.base,
        library_name=LIBRARY[card.format],
        pipeline_tag="text-generation",
        tags=["lora", PROJECT, kind, run.trial.allocator or "unnamed"],
        model_name=f"{card.base}-{run.digest[:8]}",
        eval_results=None if accuracy is None else [result],
        metrics=["accuracy"],
        base_model_relation=relation,
    )
    return data.to_yaml().strip()


def _seeds(card: Card) -> str:
    count = len(card.candidate.complete)
    return f"{count} seed" + ("" if count == 1 else "s")


def _facts(card: Card) -> list[tuple[str, str]]:
    run, candidate = card.run, card.candidate
    accuracy = "unknown" if run.accuracy is None else f"{run.accuracy:.3f}"
    share = (
        f", {run.trainable_params / card.base_params:.2%} of the base's {card.base_params:,}"
        if card.base_params
        else ""
    )
    facts = [
        ("accuracy", accuracy_text(candidate) + (" (one standard error)" if candidate.stderr is not None else "")),
        ("seeds behind it", f"{len(candidate.complete)}; these weights: seed {run.trial.seed}, accuracy {accuracy}"),
        (
            "chosen among",
            f"{card.points} points, on the questions that the accuracy is measured on: it is a little high",
        ),
        ("trainable parameters", f"{run.trainable_params:,}{share}"),
        ("tokens trained on", f"{run.tokens:,}"),
        ("seconds of training and evaluation", f"{run.seconds:.0f}"),
        ("device", run.versions.get("device", "unknown")),
        ("id of the run", f"`{run.digest}`"),
    ]
    if chance := run.versions.get("chance"):
        facts.insert(1, ("chance", chance))
    return facts


def _data(card: Card) -> list[tuple[str, str]]:
    run = card.run
    return [
        ("task", f"`{card.task}` (lm-evaluation-harness)"),
        ("hash of documents and prompts", run.versions.get("data", "unknown")),
        ("base model", f"`{card.base}`"),
        ("its commit or hash", run.versions.get("model", "unknown")),
    ]


def allocation_map(allocation: Allocation, shape: ModelShape) -> list[str]:
    """A line a layer with one mark an expert (MoE), or a line a kind of module with one number a layer (dense)."""
    match allocation:
        case ExpertSelection() as chosen:
            lines = [f"{chosen.total_experts} of {shape.total_experts} experts have LoRA (#), by layer"]
            for layer in shape.moe_layers:
                ids, total = set(chosen.in_layer(layer)), shape.experts_in(layer)
                marks = "".join("#" if expert in ids else "." for expert in range(total))
                lines.append(f"layer {layer:>3}  {len(ids):>3} of {total}  {marks}")
            return [*lines, "and attention, routers and shared experts, in every layer"]
        case ExpertCounts() as counted:
            what = "with a router each" if counted.gating == "routed" else "HydraLoRA: one A, several B, a router"
            modules = shape.of_role("attention", "mlp")
            names = list(dict.fromkeys(module.name for module in modules))
            numbers = {(m.name, m.layer): str(counted.counts.get(m.path, 0)) for m in modules}
            wide = max([len(n) for n in numbers.values()] + [len(str(shape.num_layers - 1))])
            left = max(len(name) for name in [*names, "layer"])

            def row(name: str, cells: Iterable[str]) -> str:
                return f"{name:<{left}}  " + " ".join(f"{cell:>{wide}}" for cell in cells)

            layers = range(shape.num_layers)
            return [
                f"{counted.total_experts} LoRA experts ({what}): how many each module has",
                row("layer", (str(layer) for layer in layers)),
                *(row(name, (numbers.get((name, layer), "") for layer in layers)) for name in names),
            ]


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    lines = [f"| {name} | {_cell(number(value))} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _code(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```"
