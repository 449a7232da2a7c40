"""What a search was worth: the front against one-line recipes, the trainings that were saved, what early signals say.

    recipes(records, points, front, noise=noise), saved(records), foretold(signals)

Each gives sections of the report, none where there is nothing to say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from search import baselines
from search.config import SIGNALS
from search.early import NAMES, PARTS, Early
from search.front import Candidate
from search.propose.halving import tokens_saved
from search.records import Records
from search.report.sections import Section, is_table
from search.report.splits import same_split, splits_of, tested
from search.report.uncertainty import Noise, compare, pooled
from search.text import Split, accuracy_text, human

# --- one-line recipes


def recipes(
    records: Records, points: Sequence[Candidate], on_front: Sequence[Candidate], *, noise: Noise | None
) -> list[Section]:
    """What a search has over what anybody would type: each recipe that was trained, at its best, against the front.

    A recipe's best is the best by the accuracy that the search saw, as the front's rival is; the two are compared by
    test accuracy where both have one.
    """
    if is_table(records):  # nothing was searched: `search/report/sections.py` compares its rows
        return []
    splits, judged = splits_of(records, points), tested(records, points)
    spreads: dict[Split, Noise | None] = {splits[0]: noise, "test": pooled(judged.values()) or noise}
    rows = []
    for name, tried in baselines.tried(points).items():
        recipe, rival = tried[0], _rival(tried[0], on_front)
        if rival is None:
            continue
        split, (own, other) = same_split((recipe, rival), judged, otherwise=splits[0])
        members = [judged[c.point] for c in on_front if c.point in judged] if split == "test" else on_front
        cells = _against(own, other, members, spreads[split])
        texts = (accuracy_text(recipe, one) for one in splits)
        rows.append((name, human(recipe.trainable_params), *texts, *cells, str(len(tried))))
        if splits != ("accuracy",):
            rows[-1] += (split,)
    if not rows:
        return []
    head = (
        "recipe",
        "trainable parameters",
        *splits,
        "front − recipe",
        "reading",
        "parameters of the front",
        "tried",
        *(["split"] if splits != ("accuracy",) else []),
    )
    return [Section("One-line recipes against the front", head, tuple(rows), _about_recipes(splits))]


def _about_recipes(splits: Sequence[Split]) -> tuple[str, ...]:
    """What the columns of the recipes mean."""
    chosen = "by validation the most accurate" if splits[0] == "validation" else "the most accurate"
    picked = "The front was picked as the best of all points, which flatters it"
    if splits[0] == "validation":
        picked += " on validation, and not on the test split"
    return (
        f"front − recipe: accuracy of the front's point of no more parameters that is {chosen}, less the recipe's, ± "
        "the standard error of the difference (questions, and seeds where there are several). Of a recipe that was "
        f"tried with several settings the one that is {chosen} stands here.",
        "parameters of the front: what its smallest point of at least the recipe's accuracy has, × the recipe's own; "
        f"in brackets for an accuracy of one standard error less and more (– where no point has as much). {picked}.",
    )


def _rival(recipe: Candidate, on_front: Sequence[Candidate]) -> Candidate | None:
    """The most accurate point of the front with no more parameters; the recipe itself where it is on the front.

    None where a limit on forgetting keeps all such points off the front.
    """
    smaller = (c for c in on_front if c.trainable_params <= recipe.trainable_params)
    return max(smaller, key=lambda c: c.accuracy or 0.0, default=None)


def _against(
    recipe: Candidate, rival: Candidate, on_front: Sequence[Candidate], noise: Noise | None
) -> tuple[str, str, str]:
    """Difference, its reading, and parameters of the front at the recipe's accuracy; all by the accuracies given."""
    size = recipe.trainable_params
    needed = _needed(on_front, recipe.accuracy or 0.0)
    if any(c.point == recipe.point for c in on_front):
        return "", "on the front", _times(needed, size)
    difference = compare(recipe, rival, noise=noise)
    if difference.stderr is None:
        return f"{difference.rise:+.3f}", difference.reading, _times(needed, size)
    error = recipe.stderr or 0.0
    ends = (_times(_needed(on_front, (recipe.accuracy or 0.0) + by), size) for by in (-error, error))
    span = f"{_times(needed, size)} ({' … '.join(ends)})"
    return f"{difference.rise:+.3f} ± {difference.stderr:.3f}", difference.reading, span


def _needed(on_front: Sequence[Candidate], accuracy: float) -> int | None:
    return min((c.trainable_params for c in on_front if (c.accuracy or 0.0) >= accuracy), default=None)


def _times(needed: int | None, own: int) -> str:
    return "–" if needed is None else f"{needed / max(own, 1):.2f}"


# --- what was saved


def tokens_cut(records: Records) -> tuple[int, int]:
    """Tokens that stopped trainings were not trained for, and what all trainings would have taken to their ends."""
    return tokens_saved(records.trained.values(), evaluations=records.header["config"].get("evaluations", 1))


def saved(records: Records) -> list[Section]:
    """Trainings and tokens that were not needed, by what saved them; nothing where nothing was."""
    finished = records.finished
    trained = list(records.trained.values())
    reasons = Counter(answer.reason for answer in records.answered)
    repeated = [finished.get(answer.digest or "") for answer in records.answered if answer.reason == "duplicate"]
    stopped = [outcome for outcome in trained if outcome.status == "stopped"]
    by: list[tuple[str, int, int | None]] = [
        ("answered as a repeat", reasons["duplicate"], sum(outcome.tokens for outcome in repeated if outcome)),
        ("reused from other studies", len(records.reused), sum(finished[digest].tokens for digest in records.reused)),
        ("stopped early", len(stopped), tokens_cut(records)[0]),
        ("over max_trainable_params", reasons["over_budget"], None),
        ("trained, but in a pack", sum(outcome.pack > 1 for outcome in trained), None),
    ]
    by = [(what, count, tokens) for what, count, tokens in by if count]
    if not by:
        return []
    own = sum(outcome.tokens for outcome in trained)
    whole = own + sum(tokens or 0 for _, _, tokens in by)

    def share(tokens: int | None) -> str:
        return f"{100 * tokens / whole:.0f} %" if tokens is not None and whole else ""

    rows = [("trained", str(len(trained)), human(own), share(own))]
    rows += [(what, str(n), "" if tokens is None else human(tokens), share(tokens)) for what, n, tokens in by]
    notes = [
        "tokens: that were trained, or were not because of this; a repeat and a reused training count with those of "
        "the training that they equal. A sampler that is not told of repeats would have trained them."
    ]
    if any(outcome.pack > 1 for outcome in trained):
        most = max(outcome.pack for outcome in trained)
        notes.append(
            f"In a pack up to {most} trainings share each pass over the frozen base; all their tokens are trained."
        )
    if reasons["infeasible"]:
        notes.append(f"{reasons['infeasible']} more points could not exist, and none was given to a worker.")
    return [Section("Trainings saved", ("what", "trainings", "tokens", "share of tokens"), tuple(rows), tuple(notes))]


# --- early signals


def foretold(early: Sequence[Early]) -> list[Section]:
    """Rank correlations with the end, a row a part of the training; nothing where none is known."""
    cells = {(at.signal, at.part): f"{at.correlation:.2f}" for at in early if at.correlation is not None}
    shown = [signal for signal in SIGNALS if any((signal, part) in cells for part in PARTS)]
    rows = []
    for part in PARTS:
        at_part = [at for at in early if at.part == part and (at.signal, part) in cells]
        if at_part:
            values = (cells.get((signal, part), "") for signal in shown)
            rows.append((f"{at_part[0].share:.0%}", *values, str(at_part[0].n)))
    if not rows:
        return []
    notes = (
        "Spearman's rank correlation with the accuracy at the end, over the points that trained to it (of each the "
        "first training), at the evaluations nearest to a third and to two thirds. 1: it ranks as the end does. "
        "Halving pauses by one of these signals (rank_by=).",
    )
    head = ("part of the training", *(NAMES[signal] for signal in shown), "n")
    return [Section("Early signals", head, tuple(rows), notes)]
