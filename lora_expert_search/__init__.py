"""Where should LoRA experts go? The toolkit as a Python library, with the keys and checks of the command line.

    import lora_expert_search as les

    study = les.search(space="sieve", model="tiny-moe", trials=16)     # trains; in a notebook too
    study.points; study.front                                          # pandas DataFrames, a column a knob
    study.best(max_params=50_000).load()                               # the base with the winner's adapter
    study.best(max_params=50_000).export("winner", format="peft")
    study.plot(); study                                                # a figure; the report page in a notebook cell
    les.open_study("studies/sieve-tiny-moe-default").front             # later, elsewhere, while it runs

    allocation = les.allocate("alphalora", model="tiny-dense", total_experts=40)     # only the rule, nothing is trained
    model = les.load_model("tiny-dense").model
    adapter = les.attach(model, allocation, rank=8)                    # then train adapter.parameters() as you like

Importing it loads neither torch nor Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from allocators.core.errors import InfeasibleError, StudyError, ToolkitError, shown
from allocators.core.types import Allocation, ExpertCounts, ExpertSelection, LoraSettings, ModuleRanks, Recipe
from lora_expert_search import values
from lora_expert_search.study import Point, Study, open_study

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trainers.adapter import Adapter
    from trainers.models import Loaded

__all__ = [
    "Allocation",
    "ExpertCounts",
    "ExpertSelection",
    "InfeasibleError",
    "LoraSettings",
    "ModuleRanks",
    "Point",
    "Recipe",
    "Study",
    "StudyError",
    "ToolkitError",
    "allocate",
    "attach",
    "load_model",
    "open_study",
    "search",
]


def search(*, recipe: Mapping[str, Any] | None = None, pins: Mapping[str, Any] | None = None, **keys: Any) -> Study:
    """Runs a study, or continues the one in the same folder, and returns its results.

    recipe   settings that are fixed for the whole study: `{"steps": 200}` is `recipe.steps=200`
    pins     knobs of the space that are fixed: `{"rank": 8}` is `space.rank=8`
    keys     every key of `python -m search.run help`, by name; lists stand for several values

    An interrupt (Ctrl-C, the stop button of a notebook) ends the search and returns what is there so far. In the main
    thread SIGTERM and SIGHUP end it in the same order, and then the process.

    Raises StudyError for what cannot work, as the command does in one line; SystemExit after SIGTERM or SIGHUP.
    """
    from search import interrupts
    from search.config import parse
    from search.session import session
    from search.session.make_workers import Locations
    from search.session.prepare import prepare

    groups = {"recipe": values.named(recipe, "recipe"), "space": values.named(pins, "pins")}
    config, problem = prepare(parse(values.as_words(keys, **groups)))
    if config.dry_run:
        raise StudyError("dry_run=true prints points and leaves no study: use the command line for it")
    with interrupts.watched(interrupts.ENDING):
        try:
            session.run_study(config, problem)
        except KeyboardInterrupt:
            print("interrupted: the same call goes on where this one stopped", flush=True)
            if interrupts.ended():
                raise SystemExit(interrupts.exit_code()) from None
    return open_study(Locations.of(config).folder)


def allocate(
    allocator: str,
    *,
    model: str = "tiny-moe",
    task: str = "default",
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    **knobs: Any,
) -> Allocation:
    """What one rule would do with a model; nothing is trained.

    A signal that the rule needs is measured, once, and kept under `studies/signals`.

    allocator   `sieve`, `alphalora`, …: `python -m allocators.show help` lists them with their knobs
    task        whose training documents a signal is measured on
    options     further keys of `python -m allocators.show`: dtype, device, cache, samples, signal, plugins, …
    knobs       of the rule, e.g. `fraction=0.25` or `total_experts=160`

    Raises StudyError for an unknown rule, model or knob, InfeasibleError where the rule cannot work on this model.
    """
    from dataclasses import replace

    from allocators.core import words
    from search.show.config import ShowConfig
    from search.show.look import look

    if not isinstance(allocator, str):
        raise StudyError(f"allocate takes the name of one rule, got {shown(repr(allocator))}")
    asked = {"model": model, "task": task, "allocator": allocator, "seed": seed, **values.named(options, "options")}
    config = words.parse(values.as_words(asked), ShowConfig)
    plain = {name: values.plain(value) for name, value in knobs.items()}
    answer = look(replace(config, allocator=(allocator,)), plain).answers[0]
    if answer.allocation is None:
        raise InfeasibleError(f"{allocator}: {answer.reason}")
    return answer.allocation


def load_model(name: str, **options: Any) -> Loaded:
    """A frozen base model with its tokenizer: embedded name, folder or Hugging Face id (`trainers.models.load`)."""
    from trainers import models

    return models.load(name, **options)


def attach(model: PreTrainedModel, allocation: Allocation, *, seed: int = 0, **lora: Any) -> Adapter:
    """Freezes `model` and puts LoRA where the allocation says; the model computes what it did until it is trained.

    lora   settings of `LoraSettings`: rank, lora_alpha, lora_dropout, top_k, balance_coef; one that is not given is
           that of `Recipe()`: rank 8, lora_alpha 16

    Raises StudyError for an unknown setting, what is no allocation, or a model that carries an adapter already,
    InfeasibleError where the allocation does not fit the model.
    """
    from dataclasses import fields

    from allocators.core.errors import unknown
    from trainers import adapter, models

    known = {f.name for f in fields(LoraSettings)}
    for name in lora:
        if name not in known:
            raise unknown("setting of LoRA:", name, known)
    if not isinstance(allocation, Allocation):
        raise StudyError(f"attach takes an allocation, as allocate gives it, got {shown(repr(allocation))}")
    if not hasattr(model, "config"):
        raise StudyError(f"attach takes a causal language model of transformers, got a {type(model).__name__}")
    settings = Recipe(**{name: values.plain(value) for name, value in lora.items()}).lora
    shape = models.shape_of_model(model, name=getattr(model, "name_or_path", "") or type(model).__name__)
    return adapter.attach(model, allocation, shape=shape, lora=settings, seed=seed)
