"""What an evaluation on the way says about the end: values to rank trainings by, and how far they rank as the end does.

    merit(rung, "eval_loss")        # higher is better
    signals(outcomes)               # rank correlations with the accuracy at the end, `report.html` has them

Halving ranks by a merit; whether it should is a question to recorded trainings, which `signals` answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from allocators.core.types import Outcome, Rung
from search.config import SIGNALS

NAMES = {"accuracy": "accuracy", "loss": "− training loss", "eval_loss": "− loss of right answers"}
PARTS = {"third": 1 / 3, "two_thirds": 2 / 3}  # of a training, by name

FEWEST_RANKS = 5  # a rank correlation of fewer trainings says nothing


def merit(rung: Rung, by: str) -> float | None:
    """Accuracy, or minus a loss: the higher, the better. None where it is not known.

    Where a rung has an accuracy and no `eval_loss`, as where the task's model writes its answers, `eval_loss` ranks by
    accuracy; then no rung of the study has one, so that both never meet in one ranking.
    """
    if by == "loss":
        return None if rung.loss is None else -rung.loss
    return rung.accuracy if by == "accuracy" or rung.eval_loss is None else -rung.eval_loss


def rank_correlation(pairs: Sequence[tuple[float, float]], *, fewest: int = FEWEST_RANKS) -> float | None:
    """Spearman's rank correlation, ties sharing their rank; None for too few pairs, or where one side is constant."""
    first, last = [a for a, _ in pairs], [b for _, b in pairs]
    if len(pairs) < fewest or len(set(first)) == 1 or len(set(last)) == 1:
        return None
    from scipy import stats

    return float(stats.spearmanr(first, last).statistic)


@dataclass(frozen=True)
class Early:
    """How a signal at a part of the training ranks trainings, beside how they rank at the end.

    signal        one of SIGNALS; a loss counts negative
    part          key of PARTS: the evaluation nearest to it stands for it
    share         of the training where that evaluation is, a mean over the trainings
    correlation   Spearman's, of the signal's merit with the accuracy at the end; None where it says nothing
    n             trainings that it is about
    """

    signal: str
    part: str
    share: float
    correlation: float | None
    n: int


def signals(outcomes: Iterable[Outcome]) -> list[Early]:
    """Every signal at every part, over trainings that are complete; nothing of a signal that no training recorded.

    Give one training a point: seeds of one point are no trainings that a search would have to tell apart.
    """
    complete = [o for o in outcomes if o.status == "complete" and o.accuracy is not None and len(o.rungs) > 1]
    found = []
    for part, place in PARTS.items():
        rungs = [(_nearest(outcome, place), outcome) for outcome in complete]
        for signal in SIGNALS:
            known = [(rung, o) for rung, o in rungs if _is_finite(_recorded(rung, signal))]
            if known:
                pairs = [(merit(rung, signal) or 0.0, o.accuracy or 0.0) for rung, o in known]
                share = math.fsum(rung.step / o.rungs[-1].step for rung, o in known) / len(known)
                found.append(Early(signal, part, share, rank_correlation(pairs), len(pairs)))
    return found


def _nearest(outcome: Outcome, share: float) -> Rung:
    """The evaluation before the last one that is nearest to this share of the steps; the earlier of two."""
    end = outcome.rungs[-1].step
    return min(outcome.rungs[:-1], key=lambda rung: (abs(rung.step - share * end), rung.step))


def _recorded(rung: Rung, signal: str) -> float | None:
    return {"accuracy": rung.accuracy, "loss": rung.loss, "eval_loss": rung.eval_loss}[signal]


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
