"""Shows a task as a study would train and score it, and what the look before a study says of it.

    python -m trainers.tasks tiny_pairs
    python -m trainers.tasks my/questions.yaml model=tiny-dense max_length=256 num_fewshot=2
    python -m trainers.tasks help

Prints splits and their sizes, a few prompts with the text that is trained between ▸ and ◂, how long rows are in tokens,
what guessing would score, and what is doubtful. What a study would refuse ends in one line and exit code 2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from allocators.core import words
from allocators.core.errors import StudyError
from allocators.core.words import key
from trainers import command, models, tasks
from trainers.tasks.files import DEFAULT, FEWSHOT_SEED, SELECT_ON, default_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BINS, WIDEST = 8, 40  # of a histogram: its lines, and characters of its longest bar


@dataclass(frozen=True)
class Settings:
    """What can be said besides the task; the same words as those of a study."""

    task: str = key(DEFAULT, "the task; a word without = is the task, too")
    model: str = key("tiny-moe", "the model whose tokenizer and sizes are taken")
    select_on: str = key("validation", "what a search counts accuracy on", choices=SELECT_ON)
    held_out: float = key(0.1, "share of training documents held out for it without a validation split",
                          least=0.001, most=0.999)  # fmt: skip
    max_length: int = key(0, "tokens of a training row (0: what the task file suggests, else 512)", least=2, unset=0)
    limit: int = key(0, "evaluate the first N documents (0: all)", least=0)
    training_limit: int = key(0, "train on at most N documents of each data set (0: all)", least=0)
    metric: str = key("", "what accuracy is, e.g. acc_norm (empty: as the task says)")
    num_fewshot: int = key(-1, "examples before each question (-1: as the task says)", least=0, unset=-1)
    fewshot_seed: int = key(FEWSHOT_SEED, "seed that draws those examples", least=0)
    chat_template: bool = key(False, "put prompts into the tokenizer's chat template")
    trust_remote_code: bool = key(False, "run code of the model's repository")
    seed: int = key(0, "draws the share that is held out, and the training_limit", least=0)
    prompts: int = key(3, "how many prompts are shown", least=0)


def main(argv: Sequence[str]) -> int:
    """Exit code 0. Raises StudyError for what a study would refuse."""
    if words.asks_for_help(argv):
        print("\n".join([(__doc__ or "").strip(), "", *words.help_of(Settings())]))
        return 0
    settings = parse(argv)
    name = default_for(settings.model, settings.task)
    chosen = tasks.check_task(name, select_on=settings.select_on)
    for sentence in chosen.code:
        print(f"note: {sentence}", file=sys.stderr)
    limits = tasks.Limits.of(models.config_of(settings.model), recipe=chosen.recipe, max_length=settings.max_length)
    task = tasks.load_task(name, **_options(settings))
    models.check_config(settings.model, trust_remote_code=settings.trust_remote_code)
    tokenizer = models.tokenizer_of(settings.model, trust_remote_code=settings.trust_remote_code)
    looked = tasks.look(task, tokenizer, limits)
    print("\n".join(_lines(task, tokenizer, looked, limits, settings)))
    return 0


def parse(argv: Sequence[str]) -> Settings:
    """A task's name and pairs of key and value. Raises StudyError for other words."""
    names, pairs = words.split(argv)
    if len(names) > 1 or (names and any(name == "task" for name, _ in pairs)):
        raise StudyError(f"one task is shown at a time, or several as one: task={','.join(names)}")
    return words.build(Settings, [*(("task", name) for name in names), *pairs])


def _options(settings: Settings) -> dict[str, Any]:
    return {
        "limit": settings.limit,
        "training_limit": settings.training_limit,
        "metric": settings.metric,
        "num_fewshot": settings.num_fewshot if settings.num_fewshot >= 0 else None,
        "fewshot_seed": settings.fewshot_seed,
        "chat_template": settings.chat_template,
        "seed": settings.seed,
        "select_on": settings.select_on,
        "held_out": settings.held_out,
        "split_seed": settings.seed,
    }


def _lines(
    task: tasks.AnyTask,
    tokenizer: PreTrainedTokenizerBase,
    looked: tasks.Looked,
    limits: tasks.Limits,
    settings: Settings,
) -> list[str]:
    chance = "none, the model writes its answers" if task.chance is None else f"{task.chance:.3f}"
    lines = [tasks.sizes(task), f"chance: {chance}"]
    if settings.prompts:
        lines.append("a training row is trained on the text between ▸ and ◂")
    for part in task.datasets:
        data = part.training
        for number in _spread(len(data), settings.prompts):
            lines += [
                "",
                data.origin.name(number),
                *_marked(data.rows(tokenizer, limits.max_length)[number], tokenizer),
            ]
    for what, lengths in [(f"training rows of {name}", some) for name, some in looked.training.items()] + [
        (f"sequences of {name} (evaluation)", some) for name, some in looked.asked.items()
    ]:
        lines += ["", f"tokens of {len(lengths):,} {what}", *_histogram(lengths)]
    room = f"max_length {limits.max_length}"
    if limits.positions is not None:
        room += f"; {settings.model} has {limits.positions:,} positions"
    lines += ["", room, *(f"note: {note}" for note in looked.notes)]
    return [*lines, "the right answer of every evaluated row was scored" + (": see the notes" if looked.notes else "")]


def _spread(total: int, count: int) -> list[int]:
    """`count` places from the first on, equally far apart."""
    return sorted({place * total // count for place in range(count)}) if count else []


def _marked(row: tasks.Row, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A training row as text: what is learnt stands between ▸ and ◂."""
    start = row.labels_start
    prompt, learnt = (tokenizer.decode(ids) for ids in (row.input_ids[:start], row.input_ids[start:]))
    return [f"  {line}" for line in f"{prompt}▸{learnt}◂".splitlines()]


def _histogram(lengths: Sequence[int]) -> list[str]:
    """A line for each bin of token counts, the same number wide."""
    least, most = min(lengths), max(lengths)
    width = max(1, -(-(most - least + 1) // BINS))
    counts = [0] * (1 + (most - least) // width)
    for length in lengths:
        counts[(length - least) // width] += 1
    lines = []
    for place, count in enumerate(counts):
        first = least + place * width
        label = f"{first}" if width == 1 else f"{first}-{min(first + width - 1, most)}"
        bar = "█" * -(-count * WIDEST // max(counts))
        lines.append(f"{label:>13}  {count:>7,}  {bar}".rstrip())
    return lines


if __name__ == "__main__":
    sys.exit(command.run(lambda: words.run(main)))
