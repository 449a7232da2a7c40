"""Is the ranking of weight matrices by sensitivity stable over samples? A table and a plot; nothing is trained.

    python -m search.show.stability model=tiny-moe task=tiny_cipher samples=36,108,288

`python -m allocators.signals.sensitivity` is the same command.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from allocators.core import words
from allocators.core.errors import StudyError, ToolkitError
from allocators.signals.sensitivity import MAX_LENGTH, SCORES, Score, drawn, pad, per_sample
from search.records.redact import redacted
from trainers import command

if TYPE_CHECKING:  # only the plot needs it
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Stability:
    """How well `samples` documents rank the blocks.

    nested     (Spearman, overlap) of the first `samples` with all documents, which contain them
    disjoint   the same between every two of the draws of `samples` that share no document; empty where only one fits
    """

    samples: int
    nested: tuple[float, float]
    disjoint: tuple[tuple[float, float], ...]


def stability(values: Mapping[str, Tensor], *, sizes: Sequence[int], share: float) -> list[Stability]:
    """Rank agreement at several sample sizes from one measurement of all samples, in the order they were drawn.

    Spearman's correlation over blocks, and the share of the best blocks (`share` of all) that both have among theirs;
    two rankings by chance overlap by `share`.
    """
    table = torch.stack(list(values.values()), dim=1)  # [n, blocks]
    everything = table.sum(0)
    agreements = []
    for size in sizes:
        draws = [table[i : i + size].sum(0) for i in range(0, len(table) - size + 1, size)]
        disjoint = [_agreement(a, b, share) for i, a in enumerate(draws) for b in draws[:i]]
        agreements.append(Stability(size, _agreement(draws[0], everything, share), tuple(disjoint)))
    return agreements


def _agreement(a: Tensor, b: Tensor, share: float) -> tuple[float, float]:
    """Spearman's correlation, NaN where all blocks score the same, and overlap of the best."""
    from scipy import stats

    constant = any(bool((scores == scores[0]).all()) for scores in (a, b))
    spearman = math.nan if constant else float(stats.spearmanr(a.numpy(), b.numpy()).statistic)
    best = max(1, round(share * len(a)))
    both = torch.isin(a.topk(best).indices, b.topk(best).indices)
    return spearman, both.double().mean().item()


# --- the command ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """The keys of the command line."""

    model: str = words.key("tiny-moe", "embedded name, local folder or Hugging Face id")
    task: str = words.key("tiny_cipher", "whose training documents are measured")
    samples: tuple[int, ...] = words.key((36, 108, 288), "sizes to compare: the others with the largest")
    score: str = words.key("sum_sq_grad", "how a block is scored", choices=SCORES)
    share: float = words.key(0.6, "share of blocks that count as kept (LoRA-SMoE's retention)")
    seed: int = words.key(0, "of the drawn documents", least=0)
    device: str = words.key("", "torch device (empty: cuda where there is one)")
    plot: str = words.key("studies/sensitivity.png", "where the plot goes")

    @property
    def sizes(self) -> list[int]:
        """Of the samples, ascending."""
        return sorted(set(self.samples))

    @property
    def title(self) -> str:
        """What the plot shows."""
        return f"{self.score}, {self.model} on {self.task}"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line on stderr where the request cannot be answered."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        if words.asks_for_help(given):
            print("\n".join([__doc__ or "", *words.help_of(Request)]))
            return 0
        _answer(parse(given))
    except ToolkitError as error:
        print(f"error: {redacted(str(error))}", file=sys.stderr)
        return 2
    return 0


def parse(given: Sequence[str]) -> Request:
    """Raises StudyError with one line for what cannot work."""
    request = words.parse(given, Request)
    if not request.samples or request.sizes[0] < 1 or not 0 < request.share < 1:
        sizes = ",".join(map(str, request.samples))
        raise StudyError(f"samples must be at least 1 and share between 0 and 1, got {sizes} and {request.share}")
    return request


def _answer(request: Request) -> None:
    """Measures once, prints the table and draws the plot."""
    values, seconds = _measured(request)
    print(f"{request.score} of {len(values)} blocks of {request.model} on {request.task}, {seconds:.1f} s\n")
    rows = stability(values, sizes=request.sizes, share=request.share)
    for line in _lines(rows, request):
        print(line)
    try:
        Path(request.plot).parent.mkdir(parents=True, exist_ok=True)
        _draw(rows, values, request)
    except (OSError, ValueError) as error:  # ValueError: no format that matplotlib draws
        reason = getattr(error, "strerror", None) or error
        raise StudyError(f"the plot cannot be written to '{request.plot}': {reason}") from error
    print(f"plot: {request.plot}")


def _measured(request: Request) -> tuple[dict[str, Tensor], float]:
    """Every sample's score by block, [n], and the seconds that it took."""
    from trainers import models, tasks

    task = tasks.load_task(request.task, select_on="test")  # nothing is selected here
    if task.num_training < request.sizes[-1]:
        raise StudyError(
            f"task '{request.task}' has {task.num_training} training documents, {request.sizes[-1]} samples were "
            "asked for"
        )
    device = models.device_or_default(request.device)
    loaded = models.load(request.model, device=device)
    rows = drawn(task.training_rows(loaded.tokenizer, MAX_LENGTH), request.sizes[-1], request.seed)
    begun = time.monotonic()
    batches = pad(rows, pad_token_id=loaded.tokenizer.pad_token_id)
    values = per_sample(loaded.model, batches, score=cast(Score, request.score), seed=request.seed)
    return values, time.monotonic() - begun


def _lines(rows: Sequence[Stability], request: Request) -> list[str]:
    """The table, and how it is to be read."""
    lines = [
        f"{'':8}  {f'against all {request.sizes[-1]}':^20}  {'between draws without common documents':^40}",
        f"{'samples':>8}  {'Spearman':>9} {'overlap':>9}   {'Spearman (range)':>22} {'overlap':>9} {'pairs':>6}",
    ]
    for row in rows:
        spearman, overlap = row.nested
        line = f"{row.samples:8}  {spearman:9.3f} {overlap:9.1%}"
        if row.disjoint:
            ranks, shares = zip(*row.disjoint, strict=True)
            spread = f"{statistics.fmean(ranks):.3f} ({min(ranks):.3f}…{max(ranks):.3f})"
            line += f"   {spread:>22} {statistics.fmean(shares):9.1%} {len(ranks):6}"
        lines.append(line)
    share = f"{request.share:.0%}"
    return [*lines, f"\noverlap: of the best {share} of the blocks; chance alone gives {share}"]


def _draw(rows: Sequence[Stability], values: Mapping[str, Tensor], request: Request) -> None:
    """Agreement by sample size, and every block's mean score in few samples against all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _draw_agreement(left, rows, request)
    few = rows[0].samples
    table = torch.stack(list(values.values()), dim=1)
    right.loglog(table[:few].mean(0), table.mean(0), ".", markersize=4)
    right.set(xlabel=f"mean score, first {few}", ylabel=f"mean score, all {len(table)}", title="every block")
    figure.savefig(request.plot, dpi=130)


def _draw_agreement(axes: Axes, rows: Sequence[Stability], request: Request) -> None:
    sizes = [row.samples for row in rows]
    for place, name in enumerate(("Spearman", f"overlap of the best {request.share:.0%}")):
        colour = f"C{place}"
        axes.plot(sizes, [row.nested[place] for row in rows], "o--", color=colour, label=f"{name}, nested")
        points = [(row.samples, pair[place]) for row in rows for pair in row.disjoint]
        if points:
            axes.plot(*zip(*points, strict=True), "x", color=colour, alpha=0.5, label=f"{name}, disjoint draws")
    axes.axhline(request.share, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="samples", ylabel="agreement", title=request.title)
    axes.legend(fontsize=8)


if __name__ == "__main__":
    sys.exit(command.run(main))
