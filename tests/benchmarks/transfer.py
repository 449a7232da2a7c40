"""Does the best learning rate move with the rank and the allocation? In the coordinates that spaces propose: hardly.

    python -m tests.benchmarks.transfer                                        the shipped table of tiny-moe, and a plot
    python -m tests.benchmarks.transfer tables=mine.parquet png=mine.png       of a table that search.replay exported

A table is a full grid of allocations, ranks and scaled rates (learning_rate·lora_alpha), several seeds each: nothing is
trained here. An accuracy is the mean over the seeds, on the test split where the table has it. For every allocation and
rank the row's best rate is marked, and it is counted what is lost where all rows take one rate, the one that is best on
average.

The JSON line's `ratios` are
    TABLE/best_rate/rank=N            the scaled rate that is best on average over the allocations, at that rank
    TABLE/best_rate/ALLOCATION        the same over the ranks
    TABLE/one_rate                    the rate that is best on average over all rows
    TABLE/lost_by_one_rate/mean, max  accuracy that rows lose by it against their own best rate
    TABLE/lost_by_worst_rate/mean     the same where all rows take the rate that is worst on average
    TABLE/power_of_rank               p of best rate ∝ rank^p, a mean over the allocations: the best one between rates
                                      is the top of a parabola of accuracy in log rate, through a row's best and its
                                      neighbours (printed as `between`)
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from allocators.core import words
from allocators.core.errors import StudyError
from search import replay
from tests.benchmarks._shared import allocation_of, parse
from trainers.versions import versions

Cell = tuple[str, int, float]  # allocation, rank, scaled rate


@dataclass(frozen=True)
class Settings:
    """The keys of the command line."""

    tables: str = words.key("tiny-moe", "shipped tables or FILE.parquet, separated by commas")
    png: str = words.key("build/benchmarks/transfer.png", "where the plot goes (empty: none)")


def cells_of(table: replay.Table) -> dict[Cell, float]:
    """Mean accuracy over the seeds by allocation, rank and scaled rate; a training that diverged counts as 0.

    Raises StudyError for a table that is no full grid of them.
    """
    found: dict[Cell, list[float]] = {}
    for row in table.rows.values():
        outcome = row.outcome
        recipe = outcome.trial.recipe
        cell = (allocation_of(outcome), recipe.rank, float(f"{recipe.scaled_rate:.6g}"))
        found.setdefault(cell, []).append(outcome.judged or 0.0)
    rows, rates = {cell[:2] for cell in found}, {cell[2] for cell in found}
    if len(found) != len(rows) * len(rates):
        raise StudyError(f"{table.name} is no full grid: not every allocation and rank has all of {len(rates)} rates")
    return {cell: statistics.fmean(accuracies) for cell, accuracies in found.items()}


def best_on_average(cells: Mapping[Cell, float], *, worst: bool = False) -> float:
    """The scaled rate with the highest mean accuracy over the cells that share it; the lowest where `worst` is asked.

    >>> best_on_average({("a", 1, 0.1): 0.5, ("a", 1, 0.2): 0.7, ("b", 1, 0.1): 0.5, ("b", 1, 0.2): 0.4})
    0.2
    """
    by_rate: dict[float, list[float]] = {}
    for (_, _, rate), accuracy in cells.items():
        by_rate.setdefault(rate, []).append(accuracy)
    means = {rate: statistics.fmean(accuracies) for rate, accuracies in by_rate.items()}
    return (min if worst else max)(means, key=lambda rate: means[rate])


def lost_by(cells: Mapping[Cell, float], rate: float) -> list[float]:
    """Of every allocation and rank: its accuracy at its own best rate less that at `rate`."""
    rows = sorted({(allocation, rank) for allocation, rank, _ in cells})
    rates = sorted({at for _, _, at in cells})
    return [max(cells[(*row, at)] for at in rates if (*row, at) in cells) - cells[(*row, rate)] for row in rows]


def best_between(cells: Mapping[Cell, float], allocation: str, rank: int) -> float:
    """The rate at the top of the parabola through the best rate of a row and its neighbours; never outside of these.

    >>> round(best_between({("a", 1, 0.1): 0.5, ("a", 1, 0.2): 0.7, ("a", 1, 0.4): 0.7}, "a", 1), 3)
    0.283
    """
    rates = sorted(rate for at, its_rank, rate in cells if (at, its_rank) == (allocation, rank))
    heights = [cells[allocation, rank, rate] for rate in rates]
    first = min(max(heights.index(max(heights)) - 1, 0), max(len(rates) - 3, 0))
    x, y = np.log(rates[first : first + 3]), np.array(heights[first : first + 3])
    if len(x) < 3 or np.ptp(y) == 0:
        return rates[heights.index(max(heights))]
    curve, slope, _ = np.polyfit(x, y, 2)
    top = -slope / (2 * curve) if curve < 0 else x[int(y.argmax())]
    return float(np.exp(np.clip(top, x[0], x[-1])))


def power_of_rank(cells: Mapping[Cell, float]) -> float | None:
    """p of best rate ∝ rank^p, a mean over the allocations; None where all have one rank."""
    powers = []
    for allocation in sorted({allocation for allocation, _, _ in cells}):
        ranks = sorted({rank for at, rank, _ in cells if at == allocation})
        if len(ranks) > 1:
            best = [math.log(best_between(cells, allocation, rank)) for rank in ranks]
            powers.append(float(np.polyfit(np.log(ranks), best, 1)[0]))
    return statistics.fmean(powers) if powers else None


def summary(name: str, cells: Mapping[Cell, float]) -> dict[str, float]:
    """The ratios of one table."""
    ratios: dict[str, float] = {}
    for rank in sorted({rank for _, rank, _ in cells}):
        of_rank = {cell: accuracy for cell, accuracy in cells.items() if cell[1] == rank}
        ratios[f"{name}/best_rate/rank={rank}"] = best_on_average(of_rank)
    for allocation in sorted({allocation for allocation, _, _ in cells}):
        of_it = {cell: accuracy for cell, accuracy in cells.items() if cell[0] == allocation}
        ratios[f"{name}/best_rate/{allocation}"] = best_on_average(of_it)
    rate = best_on_average(cells)
    lost = lost_by(cells, rate)
    ratios[f"{name}/one_rate"] = rate
    ratios[f"{name}/lost_by_one_rate/mean"] = statistics.fmean(lost)
    ratios[f"{name}/lost_by_one_rate/max"] = max(lost)
    ratios[f"{name}/lost_by_worst_rate/mean"] = statistics.fmean(lost_by(cells, best_on_average(cells, worst=True)))
    if (power := power_of_rank(cells)) is not None:
        ratios[f"{name}/power_of_rank"] = power
    return ratios


def show(name: str, cells: Mapping[Cell, float]) -> None:
    """A line an allocation and rank, a column a rate; the best of a line has an asterisk."""
    rates = sorted({rate for _, _, rate in cells})
    print(f"\n{name}: accuracy by scaled rate, mean over seeds (* best of the line)")
    print(f"{'allocation':<60}{'rank':>5}" + "".join(f"{rate:>9g}" for rate in rates) + "  between")
    for allocation, rank in sorted({(allocation, rank) for allocation, rank, _ in cells}):
        line = [cells.get((allocation, rank, rate)) for rate in rates]
        best = max(accuracy for accuracy in line if accuracy is not None)
        texts = ("" if a is None else f"{a:.3f}" + ("*" if a == best else " ") for a in line)
        between = f"{best_between(cells, allocation, rank):>9.3f}"
        print(f"{allocation[:59]:<60}{rank:>5}" + "".join(f"{text:>9}" for text in texts) + between)


def plot(tables: Mapping[str, Mapping[Cell, float]], file: Path) -> None:
    """A panel a table: accuracy over the scaled rate, a thin line an allocation and a thick one their mean, by rank."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from search.report.plot import COLOURS

    figure = Figure(figsize=(5.2 * len(tables), 4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for place, (name, cells) in enumerate(tables.items(), start=1):
        axes = figure.add_subplot(1, len(tables), place)
        axes.set(xscale="log", xlabel="scaled rate, learning_rate·lora_alpha", ylabel="accuracy", title=name)
        rates = sorted({rate for _, _, rate in cells})
        axes.minorticks_off()
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        for colour, rank in zip(COLOURS, sorted({rank for _, rank, _ in cells}), strict=False):
            names = sorted({allocation for allocation, its_rank, _ in cells if its_rank == rank})
            for allocation in names:
                axes.plot(rates, [cells[allocation, rank, rate] for rate in rates], color=colour, lw=0.6, alpha=0.4)
            means = [statistics.fmean(cells[allocation, rank, rate] for allocation in names) for rate in rates]
            axes.plot(rates, means, color=colour, lw=2.2, marker="o", label=f"rank {rank}")
        axes.legend(fontsize=8, frameon=False)
        axes.grid(alpha=0.25)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def main(arguments: Sequence[str]) -> None:
    """Prints the tables and the JSON line, and draws the plot."""
    request = parse(arguments, Settings)
    ratios: dict[str, float] = {}
    tables = {}
    for name in request.tables.split(","):
        table = replay.load(name)
        tables[table.name] = cells_of(table)
        show(table.name, tables[table.name])
        ratios |= summary(table.name, tables[table.name])
    if request.png:
        plot(tables, Path(request.png))
        print(f"\nplot: {request.png}")
    ratios = {key: round(value, 4) for key, value in ratios.items()}
    print(json.dumps({"benchmark": "transfer", "device": "none", "versions": versions(), "ratios": ratios}))


if __name__ == "__main__":
    words.run(main)
