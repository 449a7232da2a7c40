"""The model card of an export, README.md: what it is, how to load it, what is known of it. Pure text, no torch.

    python -m search.export studies/demo to=winner        # writes it beside the weights

The head is what the Hugging Face hub reads. Nothing of the machine gets out: paths become names, secrets were taken out
of the records when they were written and are taken out again here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from allocators.core.maps import AllocationMap
from allocators.core.types import Allocation, ExpertCounts, ExpertSelection, ModelShape, ModuleRanks, Outcome
from search.front import Candidate
from search.records.redact import portable
from search.text import Split, accuracy_text, number, point, run_id, settings_of

PROJECT = "lora-expert-search"
KIND = {
    "adapter": "LoRA experts, in the format of lora-expert-search",
    "merged": "A plain transformers model with the LoRA experts merged into its weights",
    "peft": "LoRA experts as a PEFT adapter",
    "vllm": "LoRA experts as an adapter for servers (vLLM, SGLang), every linear map by its own name",
    "gguf-ready": "A transformers model with the LoRA experts merged into its weights, for llama.cpp's converter",
    "config": "Where LoRA goes and how it is trained, as configuration files for PEFT, Axolotl and Unsloth",
}
# What runs an export of each form, and how that is known.
_AS_ANY = "as any model of its architecture; it did not run there"
_BY_NAME = "its loader's source was read, it did not run there"
RUNS_IN: Mapping[str, Sequence[tuple[str, str]]] = {
    "adapter": [(PROJECT, "tested: read again, every tensor is the trained one")],
    "merged": [("transformers", "tested: loaded from these files, logits compared"), ("vLLM, SGLang", _AS_ANY)],
    "peft": [("PEFT", "tested: loaded from these files, logits compared"), ("vLLM, SGLang", "no: use format=vllm")],
    "vllm": [
        (PROJECT, "tested: added to the base by name from these files, logits compared"),
        ("vLLM", _BY_NAME),
        ("SGLang", f"{_BY_NAME}; no LoRA on routers"),
    ],
    "gguf-ready": [
        ("transformers", "tested: loaded from these files, logits compared"),
        ("llama.cpp", "after conversion, where its converter knows architecture and tokenizer; it did not run there"),
    ],
    "config": [
        ("PEFT", "built by PEFT"),
        ("Axolotl, Unsloth", "the keys are those of their schemas, which were read; neither ran"),
    ],
}
MERGED = ("merged", "gguf-ready")
CHOSEN_ON: Mapping[Split, str] = {
    "accuracy": "on the questions that the accuracy is measured on, those of the test split: it is a little high",
    "validation": "by validation accuracy, which is therefore a little high; nothing was chosen by test accuracy",
}
LIBRARY = {
    "adapter": PROJECT,
    "merged": "transformers",
    "peft": "peft",
    "vllm": "peft",
    "gguf-ready": "transformers",
    "config": "peft",
}


@dataclass(frozen=True)
class Card:
    """Everything that a card says.

    format        as `search.export.FORMATS` has them
    splits        accuracies that points of the study have, as in `search.report.splits`
    points        measured points of the study, among which this one was chosen
    base_params   all parameters of the base model; None where it does not lie on this machine
    command       of the study; `retrain`: of this point alone
    load          Python, for servers shell commands
    notes         a sentence each: what the export measured, costs or leaves out
    """

    format: str
    candidate: Candidate
    run: Outcome
    shape: ModelShape
    splits: Sequence[Split]
    points: int
    base_params: int | None
    command: str
    retrain: str
    load: str
    notes: Sequence[str]

    @property
    def split(self) -> Split:
        """That of the accuracy which the card answers for: test, where the point was evaluated there."""
        return "test" if "test" in self.splits and self.candidate.tested else self.splits[0]

    @property
    def base(self) -> str:
        """The base model, without a folder of this machine."""
        model: str = portable(self.run.trial.model)
        return model

    @property
    def task(self) -> str:
        """The task, without a folder of this machine."""
        task: str = portable(self.run.trial.task)
        return task


def markdown(card: Card) -> str:
    """The whole README.md."""
    run = card.run
    parts = [
        f"---\n{_head(card)}\n---",
        f"# {card.base}, {point(run)}, {card.task}",
        f"{KIND[card.format]}: base model `{card.base}`, trained on the task `{card.task}`. Which experts or "
        f"layers get LoRA was chosen by the allocator `{point(run)}`, found by a search over allocators and LoRA "
        "settings for accuracy against trainable parameters.",
        "## How to load it\n" + _code(card.load, "bash" if card.format in ("vllm", "gguf-ready") else "python"),
        "## Runs in\n" + _table(RUNS_IN[card.format]),
        "## What is known\n" + _table(_facts(card)),
        *(f"- {note}" for note in card.notes),
        "## Where the LoRA experts are\n" + _code("\n".join(map_lines(run.trial.allocation, card.shape)), "text"),
        "## Recipe\n" + _table(settings_of(run.trial.recipe).items()),
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
    if card.split == "test":
        accuracy = card.candidate.test_accuracy
    named = "accuracy" if card.split == "accuracy" else f"{card.split} accuracy"
    kind = "mixture-of-experts" if card.shape.is_moe else "dense"
    result = EvalResult(
        task_type="text-generation",
        dataset_type=card.task,
        dataset_name=card.task,
        metric_type="accuracy",
        metric_value=None if accuracy is None else round(accuracy, 4),
        metric_name=f"{named} ({_seeds(card)})",
        dataset_split=None if card.split == "accuracy" else card.split,
    )
    relation = "finetune" if card.format in MERGED else "adapter"
    data = ModelCardData(
        base_model=card.base,
        library_name=LIBRARY[card.format],
        pipeline_tag="text-generation",
        tags=["lora", PROJECT, kind, run.trial.allocator or "unnamed"],
        model_name=f"{card.base}-{run_id(run)}",
        eval_results=None if accuracy is None else [result],
        metrics=["accuracy"],
        base_model_relation=relation,
    )
    return data.to_yaml().strip()


def _seeds(card: Card) -> str:
    count = len(card.candidate.tested if card.split == "test" else card.candidate.complete)
    return f"{count} seed" + ("" if count == 1 else "s")


def _facts(card: Card) -> list[tuple[str, str]]:
    run, candidate = card.run, card.candidate
    share = (
        f", {run.trainable_params / card.base_params:.2%} of the base's {card.base_params:,}"
        if card.base_params
        else ""
    )
    facts = [
        *_accuracies(card),
        ("seeds behind it", f"{len(candidate.complete)}; these weights: seed {run.trial.seed}, {_of_run(card)}"),
        ("chosen among", f"{card.points} points, {CHOSEN_ON[card.splits[0]]}"),
        ("trainable parameters", f"{run.trainable_params:,}{share}"),
        ("tokens trained on", f"{run.tokens:,}"),
        ("seconds of training and evaluation", f"{run.seconds:.0f}"),
        ("device", run.versions.get("device", "unknown")),
        ("id of the run", f"`{run.digest}`"),
    ]
    if chance := run.versions.get("chance"):
        facts.insert(len(card.splits), ("chance", chance))
    return facts


def _accuracies(card: Card) -> list[tuple[str, str]]:
    """A line a split."""
    lines = []
    for split in card.splits:
        text = accuracy_text(card.candidate, split)
        error = card.candidate.test_stderr if split == "test" else card.candidate.stderr
        said = f"{text} (one standard error)" if error is not None else text or "not evaluated"
        lines.append((split if split == "accuracy" else f"{split} accuracy", said))
    return lines


def _of_run(card: Card) -> str:
    """`validation 0.520, test 0.500` of the run that is exported."""
    run = card.run
    numbers = {"test": run.test.accuracy if run.test else None}
    values = ((split, numbers.get(split, run.accuracy)) for split in card.splits)
    return ", ".join(f"{split} {'unknown' if value is None else f'{value:.3f}'}" for split, value in values)


def _data(card: Card) -> list[tuple[str, str]]:
    run = card.run
    test = [("hash of the test documents", run.versions["test_data"])] if "test_data" in run.versions else []
    return [
        ("task", f"`{card.task}` (lm-evaluation-harness)"),
        ("hash of documents and prompts", run.versions.get("data", "unknown")),
        *test,
        ("base model", f"`{card.base}`"),
        ("its commit or hash", run.versions.get("model", "unknown")),
    ]


def map_lines(allocation: Allocation, shape: ModelShape) -> list[str]:
    """A line a layer with one mark an expert (a selection), or a line a kind of module with one number a layer."""
    rows = AllocationMap.of(allocation, shape)
    match allocation:
        case ExpertSelection():
            return [*_marks(allocation, shape), "and attention, routers and shared experts, in every layer"]
        case ExpertCounts():
            what = "with a router each" if allocation.gating == "routed" else "HydraLoRA: one A, several B, a router"
            head = f"{allocation.total_experts} LoRA experts ({what}): how many each module has"
            return [head, *_grid(rows, shape)]
        case ModuleRanks():
            stacks = "; of a stack of experts the mean, rounded up" if shape.is_moe else ""
            head = f"the LoRA rank of each module, {allocation.total_rank} in all{stacks}"
            marks = _marks(allocation.selection(shape), shape) if allocation.experts else []
            return [head, *_grid(rows, shape), *marks]


def _marks(selection: ExpertSelection, shape: ModelShape) -> list[str]:
    """A line a layer with one mark an expert."""
    lines = [f"{selection.total_experts} of {shape.total_experts} experts have LoRA (#), by layer"]
    for layer, row in zip(shape.moe_layers, AllocationMap.of(selection, shape).cells, strict=True):
        marks = "".join("#" if adapted else "." for adapted in row)
        lines.append(f"layer {layer:>3}  {marks.count('#'):>3} of {len(row)}  {marks}")
    return lines


def _grid(rows: AllocationMap, shape: ModelShape) -> list[str]:
    """A line a kind of module with one number a layer, under the layers' numbers."""
    numbers = [["" if cell is None else str(cell) for cell in row] for row in rows.cells]
    layers = [str(layer) for layer in range(shape.num_layers)]
    wide = max(len(cell) for row in (*numbers, layers) for cell in row)
    left = max(len(name) for name in (*rows.rows, "layer"))
    return [
        f"{name:<{left}}  " + " ".join(f"{cell:>{wide}}" for cell in row)
        for name, row in zip(("layer", *rows.rows), (layers, *numbers), strict=True)
    ]


def _table(rows: Iterable[tuple[str, object]]) -> str:
    lines = [f"| {name} | {_cell(number(value))} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _code(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```"
