"""Which early signal ranks trainings as the end does? Recorded trainings of replay tables; nothing is trained.

    python -m tests.benchmarks.early_signals                                     all tables of search/replay/tables/
    python -m tests.benchmarks.early_signals tables=tiny-moe,tiny-dense
    python -m tests.benchmarks.early_signals tables=mine.parquet                 a table that search.replay exported

Printed is Spearman's rank correlation with the accuracy at the end, at the evaluations nearest to a third and to two
thirds of the training, by accuracy, training loss and the loss of the right answers (losses negative): the mean over
the table's seeds, each seed for itself as a search meets it, and the least and the most of them. A table that was
recorded without the loss of the right answers has no such column. A study's report has the same for the study
(`python -m search.report STUDY`, "Early signals").

The JSON line's `ratios` are TABLE/SIGNAL/PART.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from allocators.core import words
from search import replay
from search.early import NAMES, PARTS, signals
from tests.benchmarks._shared import parse

SHIPPED = tuple(sorted(file.stem for file in replay.SHIPPED.glob("*.parquet")))


@dataclass(frozen=True)
class Settings:
    tables: tuple[str, ...] = words.key(SHIPPED, "of search/replay/tables/, or FILE.parquet")


def correlations(table: replay.Table) -> dict[tuple[str, str], list[float]]:
    """By signal and part of the training the correlation at every seed that has one."""
    found: dict[tuple[str, str], list[float]] = {}
    for seed in table.seeds:
        outcomes = [row.outcome for row in table.rows.values() if row.outcome.trial.seed == seed]
        for at in signals(outcomes):
            if at.correlation is not None:
                found.setdefault((at.signal, at.part), []).append(at.correlation)
    return found


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments, Settings)
    ratios: dict[str, float] = {}
    print(f"{'table':<12} {'signal':<24} {'seeds':>5}" + "".join(f"{part.replace('_', ' '):>24}" for part in PARTS))
    for name in given.tables:
        found, label = correlations(replay.load(name)), Path(name).stem
        for signal in dict.fromkeys(signal for signal, _ in found):
            at_parts = {part: found[signal, part] for part in PARTS if (signal, part) in found}
            line = f"{label:<12} {NAMES[signal]:<24} {max(map(len, at_parts.values())):>5}"
            for part in PARTS:
                values = at_parts.get(part, [])
                line += f"{_shown(values):>24}"
                if values:
                    ratios[f"{label}/{signal}/{part}"] = round(statistics.fmean(values), 3)
            print(line)
    print(json.dumps({"benchmark": "early_signals", "ratios": ratios}))
    return 0


def _shown(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{statistics.fmean(values):.2f} ({min(values):.2f} .. {max(values):.2f})"


if __name__ == "__main__":
    words.run(main)
