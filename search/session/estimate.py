"""What a study will take, said before it starts: memory of a worker from sizes alone, time from a few real steps.

    python -m search.run space=sieve model=tiny-moe dry_run=true                  with a line about memory
    python -m search.run space=sieve model=tiny-moe dry_run=true estimate=true    loads the model here and times it

Memory of a worker, in bytes, without its libraries and CUDA's own context:

    base          parameters × bytes of the format that dtype= or the device gives them; with quantization=nf4 or int8
                  linear layers take 4.5 or 8 bits each, stacked experts stay as they are
    adapter       16 × trainable parameters: fp32 values, gradients and AdamW's two moments
    activations   at most, of one micro-batch of t tokens, all its rows as long as the longest: what backward needs of
                  every linear map's inputs and outputs, (in + out)·t of a map and k times that of one of a stack of
                  experts, and four hidden states a layer for norms and residuals; with gradient_checkpointing one
                  hidden state a layer and the whole of one layer. Logits are counted of all t, not of completions
                  alone: vocabulary × t, in the model's numbers and twice in fp32

Attention is taken to keep no score matrix, as flash and memory-efficient kernels do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from allocators.core.errors import TrialError
from allocators.core.types import ModelShape, ModuleShape, Recipe
from search.config import RunConfig
from search.problem import Problem, Proposal
from search.session.make_workers import Locations, worker_setup
from search.text import clock, human
from trainers import models

if TYPE_CHECKING:  # torch comes with them
    from trainers.tasks import AnyTask
    from trainers.timing import Timing

_OPTIMISED = 16  # bytes of a trainable parameter
_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
_PACKED = {"nf4": 4.5 / 8, "int8": 1.0}  # of a weight of a linear layer; nf4 with a scale for every 64


@dataclass(frozen=True)
class Memory:
    """Of one worker, in bytes; see the file's head."""

    base: float
    adapter: float
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.base + self.adapter + self.activations


def memory(
    shape: ModelShape,
    recipe: Recipe,
    trainable_params: int,
    *,
    config: Mapping[str, Any],
    dtype: str,
    quantization: str = "",
    checkpointing: bool = False,
) -> Memory:
    """Memory of a worker that trains so many parameters.

    config   the model's config.json: vocabulary, hidden size, whether the embedding is the head
    dtype    of the resident weights, as torch names it
    """
    sizes = {**config, **(config.get("text_config") or {})}
    hidden, vocabulary = int(sizes.get("hidden_size", 0)), int(sizes.get("vocab_size", 0))
    width = _BYTES[dtype]
    embedded = vocabulary * hidden * (1 if sizes.get("tie_word_embeddings", config.get("tie_word_embeddings")) else 2)
    packed = _PACKED.get(quantization, width)
    base = embedded * width + sum(
        m.in_features * m.out_features * max(1, m.num_experts) * (width if m.num_experts else packed)
        for m in shape.modules
    )
    tokens = recipe.micro_batch_size * recipe.max_length
    layers = [_saved(shape, layer, hidden) for layer in range(shape.num_layers)]
    kept = hidden * shape.num_layers + max(layers) if checkpointing else sum(layers)
    return Memory(
        base, _OPTIMISED * trainable_params, tokens * (kept * width + vocabulary * (width + 2 * _BYTES["float32"]))
    )


def _saved(shape: ModelShape, layer: int, hidden: int) -> int:
    """Numbers that backward may need of one token in one layer."""
    of_layer = [m for m in shape.modules if m.layer == layer]
    return 4 * hidden + sum((m.in_features + m.out_features) * _times(m, shape) for m in of_layer)


def _times(module: ModuleShape, shape: ModelShape) -> int:
    return (shape.active_experts or module.num_experts) if module.num_experts else 1


def memory_line(config: RunConfig, problem: Problem, largest: Proposal) -> str:
    """The memory of the largest point, in words."""
    length = min(largest.trial.recipe.max_length, problem.longest_row or largest.trial.recipe.max_length)
    recipe = replace(largest.trial.recipe, max_length=length)
    dtype = models.dtype_on(_device(config)) if config.dtype == "auto" else config.dtype
    parts = memory(
        problem.shape,
        recipe,
        largest.trainable_params,
        config=models.config_of(config.model),
        dtype=dtype,
        quantization=config.quantization,
        checkpointing=config.gradient_checkpointing,
    )
    return (
        f"memory of a worker: about {_bytes(parts.total)} = base {_bytes(parts.base)} ({config.quantization or dtype}) "
        f"+ adapter {_bytes(parts.adapter)} (with gradients and AdamW) + activations at most "
        f"{_bytes(parts.activations)} ({recipe.micro_batch_size} rows of {recipe.max_length} tokens)"
    )


def _bytes(count: float) -> str:
    amount, letter = human(count)[:-1], human(count)[-1]
    return f"{amount} {'G' if letter == 'B' else letter}B" if letter in "kMB" else f"{human(count)} B"


def time_lines(config: RunConfig, problem: Problem, proposals: Sequence[Proposal], locations: Locations) -> list[str]:
    """What the study will take by a few steps of its smallest and its largest point, which run here and now.

    Raises StudyError for what `WorkerState` cannot load.
    """
    from trainers import tasks
    from trainers.timing import QUESTIONS, timed
    from trainers.worker_state import WorkerState

    device = _device(config)
    setup = worker_setup(config, locations)
    asked = tasks.load_task(setup.task, **setup.task_options)
    limit = min(QUESTIONS, asked.num_evaluation)
    state = WorkerState(replace(setup, task_options={**setup.task_options, "limit": limit}), device)
    by_size = sorted(proposals, key=lambda proposal: proposal.trainable_params)
    lines: list[str] = []
    timings: list[tuple[Proposal, Timing]] = []
    for proposal in by_size[:1] + by_size[1:][-1:]:
        what = f"{human(proposal.trainable_params)} parameters ({proposal.trial.allocator})"
        try:
            timing = timed(state, proposal.trial, proposal.trainable_params)
        except TrialError as error:
            lines.append(f"{what}: {error}")
            continue
        timings.append((proposal, timing))
        training = _training(config, timing, proposal.trial.recipe, asked)
        lines.append(
            f"{what}: {timing.step * 1e3:.0f} ms a step, {timing.question * 1e3:.1f} ms a question, "
            f"{clock(training)} a training, peak memory {_bytes(timing.peak_memory_bytes)}"
        )
    if not timings:
        return lines
    total = sum(
        _training(config, _between(timings, proposal), proposal.trial.recipe, asked) for proposal in proposals
    ) * (config.seeds if problem.is_table else 1)
    several = "" if problem.is_table or config.seeds == 1 else ", repeats with further seeds apart"
    lines.append(
        f"the study: about {clock(total)} of one worker on {state.versions['device']}, timed alone on the machine"
        f"{several}; divide by the workers that run at once. Signals and Ray's start come on top"
    )
    return lines


def _device(config: RunConfig) -> str:
    return models.device_or_default("cpu" if config.gpus_per_worker == 0 else "")


def _training(config: RunConfig, timing: Timing, recipe: Recipe, task: AnyTask) -> float:
    """Seconds of a training with its evaluations; that on the test split is the front's alone."""
    from trainers.loop.plan import total_steps

    steps = total_steps(recipe, task.num_training)
    evaluations = min(config.evaluations, steps)
    return steps * timing.step + evaluations * task.num_evaluation * timing.question


def _between(timings: Sequence[tuple[Proposal, Timing]], proposal: Proposal) -> Timing:
    """What was timed of the smallest and the largest, weighted by how near a point's parameters are to theirs."""
    (small, first), (large, last) = timings[0], timings[-1]
    span = large.trainable_params - small.trainable_params
    share = (proposal.trainable_params - small.trainable_params) / span if span else 0.0
    share = min(max(share, 0.0), 1.0)
    return replace(
        first,
        step=first.step + share * (last.step - first.step),
        question=first.question + share * (last.question - first.question),
    )
