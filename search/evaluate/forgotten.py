"""What the trainings of a study made their base forget, measured from the adapters that are kept: nothing is trained.

for line in forgotten(report, chosen, text="held_out", loaded=loaded): print(line)

A study measures it at the end of every training with `forgetting=`; this is for one that did not, or for another text.
Points are compared by the mean over their seeds; the rows of a table, as the table compares them, seed by seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from allocators.core.types import Allocation, Forgetting, ModuleRanks, Outcome
from search.evaluate.lines import record
from search.front import Candidate
from search.report import Report
from search.report.sections import is_table, row_of
from search.report.uncertainty import paired
from search.text import amount, human, run_id
from trainers import forgetting

if TYPE_CHECKING:
    from trainers.models import Loaded

EQUAL = 0.05  # parameters that differ by less, as a share, are equal


@dataclass(frozen=True)
class Measured:
    """A point and what its trainings forgot, by seed; only those whose adapter is kept."""

    point: Candidate
    by_seed: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Over the seeds, nats a token."""
        return statistics.fmean(self.by_seed.values())

    @property
    def accuracy(self) -> float:
        """On the test split where the point was evaluated there, else on validation; a mean over its seeds."""
        test = self.point.test_accuracy
        return (self.point.accuracy or 0.0) if test is None else test


def forgotten(report: Report, runs: Sequence[tuple[Outcome, str]], *, text: str, loaded: Loaded) -> Iterator[str]:
    """Measures the adapters of these trainings, which lie at these places; yields what to tell, and records it.

    Raises StudyError for a text that cannot be there, or that has no loss.
    """
    from trainers import adapter

    measure, digest = forgetting.load(text, model=runs[0][0].trial.model, tokenizer=loaded.tokenizer)
    loaded.model.eval()
    before = measure(loaded.model)
    yield f"the base's loss on {text}: {before.mean:.4f} nats a token"
    rises: dict[str, Forgetting] = {}
    for run, where in runs:
        with adapter.applied(loaded.model, where):
            loaded.model.eval()
            after = measure(loaded.model)
        lost = rises[run.digest] = Forgetting(before.mean, after.mean, forgetting.difference(before, after))
        result = {"before": lost.before, "after": lost.after, "rise": lost.rise, "stderr": lost.stderr}
        record(report, run, asked={"forgetting": text}, data=digest, results=[result])
    points = []
    for point in report.points:
        by_seed = {run.trial.seed: rises[run.digest].rise for run in point.complete if run.digest in rises}
        if by_seed:
            points.append(Measured(point, by_seed))
    errors = [lost.stderr for lost in rises.values() if lost.stderr is not None]
    yield from _lines(report, sorted(points, key=lambda one: one.mean))
    if errors:
        error = statistics.median(errors)
        yield f"standard error of one training's rise over the rows of the text: {error:.4f} (median)"
    yield from _compared(report, points)
    yield from _correlated(points)


def _lines(report: Report, points: Sequence[Measured]) -> Iterator[str]:
    """A line a point, that which forgets least first."""
    split = "test" if "test" in report.splits else report.splits[0]
    for one in points:
        allocation, n = one.point.best.trial.allocation, len(one.by_seed)
        spread = f" ± {statistics.stdev(one.by_seed.values()):.4f} (s.d. of {n} seeds)" if n > 1 else ""
        matrices = adapted(allocation)
        where = f", {matrices} matrices" if matrices is not None else f", {amount(allocation)}"
        yield (
            f"{run_id(one.point.best)} {report.label(one.point.best)}: {human(one.point.trainable_params)} parameters"
            f"{where}, {split} {one.accuracy:.3f}, forgotten {one.mean:+.4f}{spread}"
        )


def adapted(allocation: Allocation) -> int | None:
    """How many weight matrices have a rank; None of experts."""
    return allocation.matrices if isinstance(allocation, ModuleRanks) else None


def _compared(report: Report, points: Sequence[Measured]) -> Iterator[str]:
    """The comparisons of a table, paired seed by seed: what the first row forgets less what the second does."""
    if not is_table(report.records):
        return
    by_point = {one.point.point: one for one in points}
    for wanted in report.records.header["table"]["comparisons"]:
        sides = [row_of(report.records, report.points, wanted[side]) for side in ("first", "second")]
        known = [by_point[side.point] for side in sides if side is not None and side.point in by_point]
        if len(known) < 2 or known[0] is known[1]:
            continue
        pair = paired(known[0].by_seed, known[1].by_seed)
        if pair is None or pair.low is None or pair.high is None:
            continue
        accuracy = known[0].accuracy - known[1].accuracy
        yield (
            f"{wanted['name']}: forgotten {pair.difference:+.4f} ({pair.low:+.4f} to {pair.high:+.4f}, 95 %, "
            f"{pair.n} seeds), accuracy {accuracy:+.3f}"
        )


def _correlated(points: Sequence[Measured]) -> Iterator[str]:
    """Over the points of equal parameters: what forgetting goes with."""
    sizes = sorted(points, key=lambda one: one.point.trainable_params)
    groups: list[list[Measured]] = []
    for one in sizes:
        first = groups[-1][0].point.trainable_params if groups else 0
        if groups and one.point.trainable_params <= (1 + EQUAL) * first:
            groups[-1].append(one)
        else:
            groups.append([one])
    for group in groups:
        if len(group) < 5:
            continue
        from scipy import stats

        rises = [one.mean for one in group]
        others: dict[str, list[Any]] = {
            "accuracy": [one.accuracy for one in group],
            "the number of adapted matrices": [adapted(one.point.best.trial.allocation) for one in group],
        }
        said = [
            f"with {what} {stats.spearmanr(rises, of).statistic:+.2f}"
            for what, of in others.items()
            if None not in of and min(len(set(of)), len(set(rises))) > 1  # equal numbers have no order
        ]
        if not said:
            continue
        size = human(group[len(group) // 2].point.trainable_params)
        yield f"rank correlation of forgetting over {len(group)} points of about {size} parameters: {', '.join(said)}"
