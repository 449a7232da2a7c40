"""Tables of the report beyond the front: a heading, rows of text, and what has to be said about them.

    for section in sections_of(records, points): ...        # search/report/ prints them and puts them on the page

A builder takes the records and the points and returns sections, none where it has nothing to say; `BUILDERS` lists
them in order. Here are those of a table space: every row with its seeds beside what its paper published, and the
comparisons that the paper makes, tested pairwise over the seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.front import Candidate
from search.records import Records
from search.report.splits import same_split, splits_of, tested
from search.report.uncertainty import Paired, equivalence, holm, paired
from search.text import Split, accuracy_text, forgotten_text, human, label, number, varying

LEVEL = 0.05


@dataclass(frozen=True)
class Section:
    """A table: `head` has one text a column, every row as many; the first column stands left, numbers right.

    bars   (label, share, error), which the page draws above the table
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    bars: tuple[tuple[str, float, float], ...] = ()


def is_table(records: Records) -> bool:
    """Whether the study's space is a fixed grid: nothing in it was selected."""
    return "comparisons" in records.header.get("table", {})


def sections_of(records: Records, points: Sequence[Candidate]) -> list[Section]:
    """All tables of a study's report, in order."""
    return [section for build in BUILDERS for section in build(records, points)]


# --- table spaces


def _rows(records: Records, points: Sequence[Candidate]) -> list[Section]:
    """Every row of a table with mean and spread over its seeds, beside what was published for it."""
    if not is_table(records):
        return []
    published = [entry for entry in records.header["table"]["published"] if _agrees(entry, records.header["config"])]
    rows_of = ((entry, row_of(records, points, entry["row"])) for entry in published)
    beside = {id(candidate): entry for entry, candidate in rows_of if candidate is not None}
    splits, judged = splits_of(records, points), tested(records, points)
    forgets = any(candidate.forgetting is not None for candidate in points)
    head: tuple[str, ...] = ("row", "trainable parameters", *splits, _spread(splits))
    head += ("forgotten", "seeds") if forgets else ("seeds",)
    settings = varying(records.finished.values())
    rows = []
    for candidate in points:
        shown = judged.get(candidate.point) if "test" in splits else candidate  # None: not evaluated there
        cells: tuple[str, ...] = (
            label(candidate.runs[0], settings),
            human(candidate.trainable_params),
            *(_mean(candidate, split) for split in splits),
            "" if shown is None or shown.spread is None else f"{shown.spread:.3f}",
            *([forgotten_text(candidate)] if forgets else []),
            f"{len(candidate.complete)}",
        )
        if published:
            entry = beside.get(id(candidate))
            accuracy = shown.accuracy if shown and splits[-1] != "validation" else None  # papers have test accuracies
            cells += (f"{entry['accuracy']:.3f}" if entry else "",)
            cells += (f"{accuracy - entry['accuracy']:+.3f}" if entry and accuracy is not None else "",)
        rows.append(cells)
    if published:
        head += ("published", "difference")
    title = "Every row: mean and standard deviation over its seeds"
    return [Section(title, head, tuple(rows), (*_not_trained(records), *_about_published(records, published)))]


def _mean(candidate: Candidate, split: Split) -> str:
    accuracy = candidate.test_accuracy if split == "test" else candidate.accuracy
    return "" if accuracy is None else f"{accuracy:.3f}"


def _spread(splits: Sequence[Split]) -> str:
    return "s.d." if splits == ("accuracy",) else f"s.d. of {splits[-1]}"


def _not_trained(records: Records) -> list[str]:
    """Rows that are not among the trained ones, and why."""
    said, settings = [], varying(records.finished.values())
    for answer in records.answered:
        row = " ".join(f"{name}={number(value)}" for name, value in answer.params.items())
        same = records.finished.get(answer.digest or "")
        said.append(f"Not trained: {row} ({f'the allocation of {label(same, settings)}' if same else answer.message}).")
    return said


def _about_published(records: Records, agreeing: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the published numbers stand; where none belongs to this model and task, why."""
    entries = records.header["table"]["published"]
    if agreeing:
        return [f"Published: {', '.join(dict.fromkeys(entry['source'] for entry in agreeing))}."]
    if not entries:
        return ["No published numbers are on file for this table."]
    models, tasks, sources = (", ".join(dict.fromkeys(e[key] for e in entries)) for key in ("model", "task", "source"))
    config = records.header["config"]
    return [
        f"Published numbers ({sources}) are for {models} on {tasks}; this study has {_name(config['model'])} on "
        f"{_task(config)}, so none stands beside what was measured here."
    ]


def _agrees(entry: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    model: str = entry["model"]
    return model.lower() == _name(config["model"]).lower() and str(entry["task"]) == _task(config)


def _name(model: str) -> str:
    """The last part of a hub id or of a local folder."""
    return Path(model).name


def _task(config: Mapping[str, Any]) -> str:
    return ", ".join(Path(word).name.removesuffix(".yaml") for word in config["task"].split(","))


@dataclass(frozen=True)
class Compared:
    """A comparison that a table names, worked out.

    wanted   name, claim, source and margin, as the space has them
    sides    the two rows with the accuracies that are compared; fewer where one was not trained
    split    which accuracies those are; None where a row is missing
    pair     None where there is nothing to pair: a row is missing, both are one, or they share no seed
    p        of the t-test, or with a margin of the two one-sided tests; None where there is none
    """

    wanted: Mapping[str, Any]
    sides: tuple[Candidate, ...]
    split: Split | None = None
    pair: Paired | None = None
    p: float | None = None


def compared(records: Records, points: Sequence[Candidate]) -> list[Compared]:
    """The comparisons that the table names, paired seed by seed; by test accuracy where all runs of both have one."""
    wanted = records.header["table"]["comparisons"] if is_table(records) else []
    complete = {point.point: len(point.complete) for point in points}
    judged = {name: on_test for name, on_test in tested(records, points).items() if len(on_test.runs) == complete[name]}
    return [_compared(records, points, one, judged) for one in wanted]


def _compared(
    records: Records, points: Sequence[Candidate], wanted: Mapping[str, Any], judged: Mapping[str, Candidate]
) -> Compared:
    rows = [row_of(records, points, wanted[side]) for side in ("first", "second")]
    known = [row for row in rows if row is not None]
    if len(known) < len(rows):
        return Compared(wanted, tuple(known))
    split, sides = same_split(known, judged, otherwise=splits_of(records, points)[0])
    pair = None if sides[0] is sides[1] else paired(_by_seed(sides[0]), _by_seed(sides[1]))
    p, margin = pair.p if pair else None, wanted["margin"]
    if pair and p is not None and margin:
        p = equivalence(pair, margin=margin)
    return Compared(wanted, tuple(sides), split, pair, p)


def _comparisons(records: Records, points: Sequence[Candidate]) -> list[Section]:
    """`compared` as a table."""
    every = compared(records, points)
    if not every:
        return []
    head = ("comparison", "parameters", "n", "difference", "95 % interval", "p", "reading", "the claim")
    sources = dict.fromkeys(one.wanted["source"] for one in every if "arXiv" in one.wanted["source"])
    notes = [f"Claims are those of {', '.join(sources)}."] if sources else []
    notes += [
        "n: seeds that both rows were trained with. Differences are paired seed by seed and tested by the two-sided "
        "t-test, or, where a margin is named, for equivalence by two one-sided t-tests (TOST).",
    ]
    notes += _on_which({one.wanted["name"]: one.split for one in every if one.split is not None})
    alone = {one.wanted["name"]: one.p for one in every if one.p is not None}
    if len(alone) > 1:
        notes.append(_corrected(alone))
    judged = tested(records, points)
    shown = (judged.get(point.point, point) for point in points)
    errors = [point.question_error for point in shown if point.question_error is not None]
    if errors:
        notes.append(
            "The tests are about training again, on these same questions; other questions would move a row's accuracy "
            f"by a standard error of about {statistics.median(errors):.3f}."
        )
    return [Section("Comparisons, paired seed by seed", head, tuple(map(_comparison, every)), tuple(notes))]


def _corrected(alone: Mapping[str, float]) -> str:
    """What is left of the readings when their number is counted."""
    kept = [name for name, p in zip(alone, holm(list(alone.values())), strict=True) if p < LEVEL]
    left = f"{len(kept)} remain below .05: {', '.join(kept)}" if kept else "none remains below .05"
    return (
        f"p is that of each of the {len(alone)} tests by itself: of twenty true nulls one falls below .05 by chance. "
        f"Corrected for their number (Holm) {left}."
    )


def _on_which(splits: Mapping[str, Split]) -> list[str]:
    """The split that accuracies of the comparisons are from; nothing where the study has one number."""
    others = [name for name, split in splits.items() if split != "test"]
    if not splits or "accuracy" in splits.values():
        return []
    if not others:
        return ["Accuracy is that on the test split."]
    why = "since not every training of both rows was evaluated on the test split"
    if len(others) == len(splits):
        return [f"Accuracy is that on the validation split, {why}."]
    return [f"Accuracy is that on the test split, but on the validation split for {', '.join(others)}, {why}."]


def _comparison(one: Compared) -> tuple[str, ...]:
    """A line of the comparisons."""
    name, claim, pair = one.wanted["name"], one.wanted["claim"], one.pair
    if len(one.sides) < 2:
        return (name, "", "", "", "", "", "not both rows were trained", claim)
    first, second = one.sides
    sizes = f"{human(first.trainable_params)} / {human(second.trainable_params)}"
    if first is second:
        return (name, sizes, "", "", "", "", "both rows are one allocation", claim)
    if pair is None:
        return (name, sizes, "0", "", "", "", "no seed in common yet", claim)
    interval = "" if pair.low is None else f"{pair.low:+.3f} … {pair.high:+.3f}"
    p, reading = _reading(pair, one.wanted["margin"])
    return (name, sizes, str(pair.n), f"{pair.difference:+.3f}", interval, p, reading, claim)


def _reading(pair: Paired, margin: float) -> tuple[str, str]:
    """p as text, and what the test says in words; it never says more than the test."""
    if pair.n == 1:
        return "", "one seed: no test"
    if pair.p is None or pair.low is None or pair.high is None:
        return "", "the same at every seed: no test" if not pair.difference else "no spread: no test"
    if margin:
        p, size = equivalence(pair, margin=margin) or 0.0, f"{100 * margin:g} points"
        if pair.low > margin or pair.high < -margin:
            return f"TOST {_p(p)}", f"further apart than {size}"
        return f"TOST {_p(p)}", f"{'equal' if p < LEVEL else 'not shown to be equal'} to within {size}"
    if pair.p >= LEVEL:
        return _p(pair.p), "cannot be told apart"
    return _p(pair.p), "the first is better" if pair.difference > 0 else "the second is better"


def _p(p: float) -> str:
    return "< .001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def _by_seed(candidate: Candidate) -> dict[int, float]:
    return {run.trial.seed: run.accuracy or 0.0 for run in candidate.complete}


def row_of(records: Records, points: Iterable[Candidate], row: Mapping[str, Any]) -> Candidate | None:
    """The point that stands for a row, which may have been trained as another row with the same allocation."""
    digests = {d for d in records.finished if row.items() <= records.params_of(d).items()}
    digests |= {a.digest for a in records.answered if a.digest is not None and row.items() <= a.params.items()}
    return next((c for c in points if any(run.digest in digests for run in c.runs)), None)


# --- several tasks


def _by_task(records: Records, points: Sequence[Candidate]) -> list[Section]:
    """Each task's accuracy at the points of the front, or in every row of a table; on both splits where both are."""
    shown = [c for c in (points if is_table(records) else records.points.front) if c.by_task]
    if not shown:
        return []
    splits, judged = splits_of(records, shown), tested(records, shown)
    tasks = list(dict.fromkeys(label for c in shown for label in c.by_task))
    settings = varying(records.finished.values())
    rows = []
    for c in shown:
        cells = []
        for by_task in (c.by_task, *([judged[c.point].by_task if c.point in judged else {}] if judged else [])):
            cells.append([f"{by_task[t][0]:.3f} ± {by_task[t][1]:.3f}" if t in by_task else "" for t in tasks])
        means = [accuracy_text(c, split) for split in splits]
        columns = zip(*([*of_tasks, mean] for of_tasks, mean in zip(cells, means, strict=True)), strict=True)
        rows.append((label(c.best, settings), human(c.trainable_params), *(cell for cs in columns for cell in cs)))
    names = [name if splits == ("accuracy",) else f"{name}, {split}" for name in (*tasks, "mean") for split in splits]
    note = "± one standard error. The mean, in which each task counts the same, is the accuracy of this study."
    return [Section("Accuracy by task", ("point", "trainable parameters", *names), tuple(rows), (note,))]


Builder = Callable[[Records, Sequence[Candidate]], list[Section]]
BUILDERS: tuple[Builder, ...] = (_by_task, _rows, _comparisons)
