"""The numbers of a study as one small JSON file, with what they follow from: for a paper, a table or another program.

    python -m search.report studies/demo results=demo.json

    summary(results)["rows"]          # every point: what was asked, settings, parameters, accuracy of every seed

Fields of the file

    study, command, started, resumed   which study it was, without the folders of its machine
    versions, contents                 of the programs; hashes of weights, tokenizer, task and data (a study of an
                                       earlier version has no contents)
    untrained                          the base before training: accuracy and standard error on each split
    seeds                              of the rows, in order
    rows                               a point each: id, what the space was asked (several where several gave one
                                       allocation), allocator, knobs, recipe, what is adapted, trainable parameters (by
                                       seed where every seed draws its own), accuracy by seed and its standard error on
                                       each split
    front, knee                        ids of rows
    comparisons                        those that a table names: rows, seeds in both, mean difference, 95 % interval, p
    not_trained                        points that were answered without a training, and why
    said                               the report's sentences

Accuracies have six decimals, which is more than a thousand questions can tell apart; comparisons have all digits, so
that they round as in the report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from allocators.core.types import ModuleRanks, Outcome
from search.front import Candidate
from search.records import Records
from search.records.evaluations import rises
from search.records.redact import portable, portable_command
from search.report.results import Results
from search.report.sections import Compared, compared
from search.text import amount, number, run_id, settings_of

RECIPE = ("rank", "lora_alpha", "learning_rate", "scaled_rate")


def summary(results: Results, *, said: Sequence[str] = ()) -> dict[str, Any]:
    """The study as plain JSON values.

    said   the report's sentences

    Raises StudyError for a line of evaluations.jsonl that cannot be read.
    """
    header, records = results.records.header, results.records
    lost = rises(records)
    data = {
        "study": records.name,
        "command": portable_command(header["command"]),
        "started": header["started"],
        "resumed": header["resumed"],
        "versions": header["versions"],
        "contents": header.get("contents", {}),
        "untrained": _untrained(records),
        "seeds": sorted({run.trial.seed for run in records.finished.values()}),
        "rows": [_row(results, point, lost) for point in results.points],
        "front": [_id(point) for point in results.front],
        "knee": _id(results.knee) if results.knee else None,
        "comparisons": [_comparison(one) for one in compared(records, results.points)],
        "not_trained": [{"asked": dict(a.params), "why": a.message} for a in records.answered],
        "said": list(said),
    }
    plain: dict[str, Any] = portable(data)
    return plain


BEGINS = '{\n "study": '  # every file of results


def text(data: Mapping[str, Any]) -> str:
    """JSON with one line a row, so that a change of one row is a change of one line."""
    fields = []
    for name, value in data.items():
        if isinstance(value, list) and any(isinstance(item, dict | str) for item in value):
            inner = ",\n  ".join(json.dumps(item, ensure_ascii=False) for item in value)
            fields.append(f' "{name}": [\n  {inner}\n ]')
        else:
            fields.append(f' "{name}": {json.dumps(value, ensure_ascii=False)}')
    return "{\n" + ",\n".join(fields) + "\n}\n"


def keep_seeds(records: Records, most: int) -> None:
    """Takes the trainings of all but the first `most` seeds out of records that were read, and nothing from disk."""
    kept = sorted({run.trial.seed for run in records.finished.values()})[:most]
    for digest, run in list(records.finished.items()):
        if run.trial.seed not in kept:
            records.points.discard(digest)


def _id(point: Candidate) -> str:
    return run_id(point.runs[0])


def _untrained(records: Records) -> dict[str, Any] | None:
    base = records.untrained
    if base is None:
        return None
    splits = {"accuracy": base, "test": base.get("test")}
    return {name: {"accuracy": _short(s["accuracy"]), "stderr": _short(s["stderr"])} for name, s in splits.items() if s}


def _row(results: Results, point: Candidate, lost: Mapping[str, float]) -> dict[str, Any]:
    first, records = point.runs[0], results.records
    digests = {run.digest for run in point.runs}
    asked = [records.params_of(run.digest) for run in point.runs]
    asked += [dict(answer.params) for answer in records.answered if answer.digest in digests]
    recipe = settings_of(first.trial.recipe)
    names = [*RECIPE, *(name for name in results.settings if name not in RECIPE)]
    return {
        "id": _id(point),
        "asked": [one for i, one in enumerate(asked) if one not in asked[:i]],
        "allocator": first.trial.allocator,
        "knobs": dict(first.trial.knobs),
        "recipe": {name: _rounded(recipe[name]) for name in names},
        **({"cut_from": first.trial.parent} if first.trial.parent else {}),
        "adapted": amount(first.trial.allocation),
        **_matrices(point.runs),
        "trainable_params": _one_or_by_seed({str(run.trial.seed): run.trainable_params for run in point.runs}),
        "accuracy": {str(run.trial.seed): _short(run.accuracy) for run in point.complete},
        "test": {str(run.trial.seed): _short(run.test.accuracy) for run in point.tested if run.test},
        "stderr": {"accuracy": _short(point.stderr), "test": _short(point.test_stderr)},
        **_forgotten(point.runs, lost),
        **_others(point.runs),
    }


def _matrices(runs: Sequence[Outcome]) -> dict[str, Any]:
    """How many matrices have a rank; nothing of experts."""
    counts = {str(run.trial.seed): a.matrices for run in runs if isinstance(a := run.trial.allocation, ModuleRanks)}
    return {"matrices": _one_or_by_seed(counts)} if counts else {}


def _one_or_by_seed(numbers: Mapping[str, int]) -> int | Mapping[str, int]:
    """The number that all seeds have; all by seed where every seed draws its own."""
    different = set(numbers.values())
    return different.pop() if len(different) == 1 else numbers


def _forgotten(runs: Sequence[Outcome], lost: Mapping[str, float]) -> dict[str, Any]:
    by_seed = {str(run.trial.seed): _short(lost[run.digest]) for run in runs if run.digest in lost}
    return {"forgotten": by_seed} if by_seed else {}


def _others(runs: Sequence[Outcome]) -> dict[str, Any]:
    """Runs that did not come to their end."""
    statuses = {str(run.trial.seed): run.status for run in runs if run.status != "complete"}
    return {"status": statuses} if statuses else {}


def _comparison(one: Compared) -> dict[str, Any]:
    pair = one.pair
    data: dict[str, Any] = {"name": one.wanted["name"], "rows": [_id(side) for side in one.sides], "split": one.split}
    if pair is not None:
        data |= {"n": pair.n, "difference": pair.difference, "low": pair.low, "high": pair.high, "p": one.p}
    return data | ({"margin": one.wanted["margin"]} if one.wanted["margin"] else {})


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _rounded(value: object) -> object:
    return float(number(value)) if isinstance(value, float) else value
