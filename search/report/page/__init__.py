"""report.html: one file that works offline, from `page.html`, `page.css`, two scripts and the study's data as JSON.

Path("report.html").write_text(html(results, headlines=[...], words=[...], sections=[...]))
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path

from allocators.core.maps import AllocationMap
from allocators.core.types import ModuleRanks, Outcome
from search.front import Candidate
from search.records import flattened
from search.report.plot import colours
from search.report.results import Results
from search.report.sections import Section
from search.report.words import export_command, load_code
from search.text import amount, human, number, probability, settings_of

FOLDER = Path(__file__).parent
_ORDERS = 20  # of the latest that the page shows
_MOST = 50_000  # one character further lie halves of pairs, which no JSON holds
# what a list stands for on the page: a run, an evaluation
RUN = ("seed", "status", "accuracy", "test", "seconds", "tokens", "memory", "message", "rungs")
RUNG = ("tokens", "step", "accuracy", "loss")


@dataclass(frozen=True)
class Live:
    """A page that is not the last one.

    runs     the study's driver is at work
    served   by `search.serve`: the page then learns of new results by itself, and can ask the driver for something
    at       when the page was made
    """

    runs: bool = True
    served: bool = False
    at: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S"))


def html(
    results: Results,
    *,
    headlines: Sequence[str],
    words: Sequence[str],
    sections: Sequence[Section],
    live: Live | None = None,
    script: str = "",
) -> str:
    """The page with the study's data inside. The data is text for the browser, never markup.

    headlines   the sentences that stand below the picture; the others among `words` are folded
    live        None: the last page of the study
    script      of whoever serves the page, run before the page is drawn
    """
    more = [sentence for sentence in words if sentence not in headlines]
    data = _data(results, headlines, more, sections) | _live(results, live)
    scripts = (script, *((FOLDER / name).read_text(encoding="utf-8") for name in ("draw.js", "page.js")))
    return filled(results.records.name, data, "".join(scripts))


def filled(title: str, data: Mapping[str, object], script: str) -> str:
    """A page of this data, drawn by this script."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    parts = {
        "title": escape(title),
        "style": (FOLDER / "page.css").read_text(encoding="utf-8"),
        "data": text.replace("<", "\\u003c"),
        "script": script,
    }
    template = (FOLDER / "page.html").read_text(encoding="utf-8")
    # in one pass: a study may be called {{data}}
    return re.sub(r"\{\{(\w+)\}\}", lambda slot: parts[slot[1]], template)


def _data(
    results: Results, headlines: Sequence[str], words: Sequence[str], sections: Sequence[Section]
) -> dict[str, object]:
    header, places = results.records.header, AllocationMap.empty(results.records.shape)
    ranks = AllocationMap.empty(results.records.shape, ranks=True)
    return {
        "name": results.title,
        "started": header["started"],
        "resumed": header["resumed"],
        "command": header["command"],
        "config": flattened(header["config"]),
        "versions": header["versions"] | _worker_versions(results),
        "headlines": headlines,
        "words": words,
        "sections": [asdict(section) for section in sections],
        "colours": colours(c.best.trial.allocator for c in results.points),
        "settings": results.settings,
        "knobs": list(dict.fromkeys(knob for c in results.points for knob in c.best.trial.knobs)),
        "splits": results.splits,
        "forgets": results.forgets,
        "of_three": results.records.points.of_three,
        "untrained": results.records.untrained,
        "points": packed(_points(results)),
        "fields": {"runs": RUN, "rungs": RUNG},
        "answered": _answered(results),
        "map": {"rows": places.rows, "exists": places.places, "across": places.across},
        "rank_map": {"rows": ranks.rows, "exists": ranks.places, "across": ranks.across},
    }


def _live(results: Results, live: Live | None) -> dict[str, object]:
    """What is under way, and what was asked of the driver."""
    records = results.records
    orders = [{"what": one.order.words, "answer": one.answer} for one in records.orders[-_ORDERS:]]
    if live is None:
        return {"live": None, "running": [], "orders": orders}
    running = [_under_way(results, outcome) for outcome, _ in records.in_flight] if live.runs else []
    told: dict[str, object] = {"live": asdict(live), "running": running, "orders": orders}
    if live.served and live.runs:  # what the form begins with
        told["asked"] = {c.best.digest: records.params_of(c.best.digest) for c in results.points}
    return told


def _under_way(results: Results, outcome: Outcome) -> dict[str, object]:
    last = outcome.rungs[-1] if outcome.rungs else None
    return {
        "digest": outcome.digest,
        "label": results.label(outcome),
        "size": human(outcome.trainable_params),
        "status": outcome.status,
        "step": last.step if last else None,
        "accuracy": _short(last.accuracy) if last else None,
    }


def _answered(results: Results) -> list[dict[str, object]]:
    """By reason how many points needed no training, with the most frequent messages."""
    reasons: dict[str, list[str]] = {}
    for answer in results.records.answered:
        reasons.setdefault(answer.reason, []).append(answer.message)
    return [
        {"reason": reason.replace("_", " "), "count": len(texts), "messages": _counted(texts)}
        for reason, texts in sorted(reasons.items())
    ]


def _worker_versions(results: Results) -> dict[str, str]:
    """What the runs say about themselves (device, model revision, data hash); several values are all named."""
    versions: dict[str, dict[str, None]] = {}
    for run in results.records.finished.values():
        for name, version in run.versions.items():
            versions.setdefault(name, {})[version] = None
    return {name: ", ".join(values) for name, values in versions.items()}


def _counted(texts: Sequence[str]) -> list[str]:
    """The five most frequent messages with their counts."""
    return [f"{n}x {text}" for text, n in Counter(text for text in texts if text).most_common(5)]


def packed(points: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """Points as columns, so that no name is said more than once; of what many points share, the allocation too.

    `{"count": n, "columns": {name: {"each": [...]} | {"of": [different values], "at": [which one, point by point]}}}`;
    without "at" all have the same.
    """
    columns: dict[str, object] = {}
    for name in points[0] if points else ():
        values = [point[name] for point in points]
        texts = [json.dumps(value) for value in values]
        places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        if 2 * len(places) > len(values) > 1:
            columns[name] = {"each": values}
            continue
        column: dict[str, object] = {"of": [json.loads(text) for text in places]}
        columns[name] = column | ({"at": [places[text] for text in texts]} if len(places) > 1 else {})
    return {"count": len(points), "columns": columns}


def _points(results: Results) -> list[dict[str, object]]:
    on_step = {member.point for member in results.step}
    cells: dict[str, list[str]] = {}  # by digest of the allocation
    points = []
    for candidate in results.points:
        allocation = candidate.best.trial.allocation
        if allocation.digest not in cells:
            cells[allocation.digest] = _cells(AllocationMap.of(allocation, results.records.shape))
        own = {"step": candidate.point in on_step, "cells": cells[allocation.digest]}
        points.append(_point(results, candidate) | own)
    return points


def _point(results: Results, candidate: Candidate) -> dict[str, object]:
    best, loadable, judged = candidate.best, results.loadable(candidate), results.tested.get(candidate.point)
    settings = results.records.header["config"]
    return {
        "digest": best.digest,
        "allocator": best.trial.allocator or "unnamed",
        "knobs": {name: number(value) for name, value in best.trial.knobs.items()},
        **{f"recipe.{name}": number(value) for name, value in settings_of(best.trial.recipe).items()},
        "params": candidate.trainable_params,
        "size": human(candidate.trainable_params),
        "accuracy": _short(candidate.accuracy),
        "stderr": _short(candidate.stderr),
        "test": _short(judged.accuracy) if judged else None,
        "test_stderr": _short(judged.stderr) if judged else None,
        "spread": _short(candidate.spread),
        "seeds": len(candidate.complete),
        "forgotten": _short(candidate.forgetting),
        "spares": results.spares(candidate),
        "chance": probability(results.chances.get(best.digest)),
        "status": best.status.replace("_", " "),
        "front": best.digest in results.winners,
        "knee": candidate is results.knee,
        "experts": best.trial.allocation.total_experts,
        "amount": amount(best.trial.allocation),
        "ranks": isinstance(best.trial.allocation, ModuleRanks),
        "load": load_code(best.trial.model, loadable[1], settings=settings) if loadable else "",
        "export": export_command(results.records.folder, loadable[0]) if loadable else "",
        "runs": [_run(results, run) for run in candidate.runs],
    }


def _short(value: float | None) -> float | None:
    """Six digits, which is more than any picture or text shows."""
    return None if value is None else float(f"{value:.6g}")


def _cells(drawn: AllocationMap) -> list[str]:
    """A text a row, one character a column, "0" plus the number of experts there, or the rank.

    Texts, because a study of a large model has millions of cells.
    """
    return ["".join(chr(ord("0") + min(number or 0, _MOST)) for number in row) for row in drawn.cells]


def _run(results: Results, run: Outcome) -> list[object]:
    """The values of RUN."""
    study = results.records.reused.get(run.digest)
    message = "; ".join(text for text in (f"reused from {study}" if study else "", run.message) if text)
    return [
        run.trial.seed,
        run.status.replace("_", " "),
        _short(run.accuracy),
        _short(run.test.accuracy) if run.test and results.tested else None,
        _short(run.seconds),
        run.tokens,
        run.peak_memory_bytes,
        message,
        [[rung.tokens, rung.step, _short(rung.accuracy), _short(rung.loss)] for rung in run.rungs],
    ]
