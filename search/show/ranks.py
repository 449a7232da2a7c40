"""What resembles what: Spearman's rank correlation between signals, and between allocators' answers.

for heading, correlations in comparisons(shown): print(heading, triangle(correlations))
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from allocators.core.layers import blocks, layer_values
from allocators.core.types import ModelShape, Signal
from search.show.views import Shown, by_layer, per_layer

Place = tuple[str, int] | int  # a layer's expert, or a layer
Column = Mapping[Place, float]
Correlations = dict[tuple[str, str], float]


def signal_columns(signals: Mapping[str, Signal], shape: ModelShape) -> dict[str, Column]:
    """What signals are compared by: an expert's value by (layer, expert), a layer's mean over its modules by layer."""
    columns: dict[str, Column] = {}
    for kind, signal in sorted(signals.items()):
        for metric in sorted({metric for metrics in signal.rows.values() for metric in metrics}):
            if by_layer(signal):
                rows = {key: metrics.get(metric, ()) for key, metrics in signal.rows.items()}
                columns[f"{kind}.{metric}"] = {(key, i): v for key, row in rows.items() for i, v in enumerate(row)}
            elif all(signal.rows.get(m.path, {}).get(metric) for m in blocks(shape)):
                columns[f"{kind}.{metric}"] = dict(enumerate(layer_values(signal, shape, metric=metric)))
    return columns


def correlations(columns: Mapping[str, Column]) -> Correlations:
    """Spearman's rank correlation of every two columns about the same things; a constant one has no ranks."""
    by_pair: Correlations = {}
    for (a, left), (b, right) in itertools.combinations(columns.items(), 2):
        if left.keys() == right.keys() and len({*left.values()}) > 1 and len({*right.values()}) > 1:
            from scipy import stats  # here: half a second that a model without two signals does not need

            by_pair[a, b] = float(stats.spearmanr([*left.values()], [right[key] for key in left]).statistic)
    return by_pair


def comparisons(shown: Shown) -> list[tuple[str, Correlations]]:
    """Rank correlations between signals and between allocators, those that there are, with their headings."""
    counts: dict[str, Column] = {
        answer.name: dict(enumerate(per_layer(answer.allocation, shown.shape)))
        for answer in shown.answers
        if answer.allocation is not None
    }
    experts = any(map(by_layer, shown.signals.values()))
    both = [
        (f"signals, by {'expert' if experts else 'layer'}", correlations(signal_columns(shown.signals, shown.shape))),
        (f"allocators' {'ranks' if shown.of_ranks else 'experts'} by layer", correlations(counts)),
    ]
    return [(f"rank correlation (Spearman) of {what}", by_pair) for what, by_pair in both if by_pair]


def triangle(by_pair: Mapping[tuple[str, str], float]) -> list[list[str]]:
    """Lines of a lower triangle: number and name, then the correlation with 1, 2, …; the head first."""
    names = list(dict.fromkeys(name for pair in by_pair for name in pair))
    lines = [["", *(str(i) for i in range(1, len(names)))]]
    for i, name in enumerate(names):
        values = [by_pair.get((other, name), by_pair.get((name, other))) for other in names[:i]]
        lines.append([f"{i + 1} {name}", *("" if value is None else f"{value:.2f}" for value in values)])
    return lines
