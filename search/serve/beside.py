"""What studies side by side are compared by: their fronts, and the best accuracy under equal budgets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from allocators.core.errors import StudyError, one_line
from search.records.following import Following
from search.records.redact import redacted
from search.report.results import Results
from search.text import accuracy_text, forgotten_text, human, run_id

BUDGETS = 5


def beside(studies: Sequence[Following]) -> dict[str, Any]:
    """By study its front, or why it cannot be read; and what each has at equal parameters, as texts."""
    results: list[Results | str] = []
    for study in studies:
        try:
            results.append(Results(study.read()))
        except StudyError as error:
            results.append(one_line(str(redacted(str(error)))))
    readable = [one for one in results if isinstance(one, Results) and one.front]
    budgets = _budgets(readable)
    return {
        "studies": [
            _study(number, study.folder, one, budgets)
            for number, (study, one) in enumerate(zip(studies, results, strict=True))
        ],
        "budgets": [human(budget) for budget in budgets],
        "comparable": len({_questions(one) for one in readable}) < 2,
    }


def _questions(results: Results) -> tuple[object, ...]:
    """What accuracies have to share to be of the same questions."""
    identity = results.records.header["identity"]
    return identity.get("task"), identity.get("select_on"), identity.get("limit"), identity.get("metric")


def _budgets(readable: Sequence[Results]) -> list[int]:
    """Parameters from where all fronts have begun to where the longest ends, in equal ratios."""
    if not readable:
        return []
    low = max(max(one.front[0].trainable_params, 1) for one in readable)
    high = max(max(one.front[-1].trainable_params for one in readable), low)
    count = BUDGETS if high > low else 1
    return [round(math.exp(math.log(low) + n * math.log(high / low) / max(count - 1, 1))) for n in range(count)]


def _study(number: int, folder: Path, results: Results | str, budgets: Sequence[int]) -> dict[str, Any]:
    if isinstance(results, str):
        return {"number": number, "name": folder.name, "error": results}
    base = results.records.untrained
    members = [
        {
            "id": run_id(member.best),
            "params": member.trainable_params,
            "size": human(member.trainable_params),
            "accuracy": member.accuracy,
            "stderr": member.stderr or 0.0,
            "text": accuracy_text(member),
            "label": results.label(member.best),
            "knee": member is results.knee,
            "spares": results.spares(member),
            "forgotten": forgotten_text(member),
        }
        for member in results.front
    ]
    fitting = [
        max((m for m in results.front if m.trainable_params <= budget), key=lambda m: m.accuracy or 0.0, default=None)
        for budget in budgets
    ]
    return {
        "number": number,
        "name": results.title,
        "space": str(results.records.header["config"].get("space", "")),
        "points": len(results.points),
        "untrained": base["accuracy"] if base else None,
        "split": results.splits[0],
        "front": members,
        "at": [accuracy_text(member) if member is not None else "" for member in fitting],
    }
