"""What an evaluation adds to a study's folder: one line of evaluations.jsonl. The study itself stays as it is.

`search/records/evaluations.py` reads the lines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from allocators.core.types import Outcome
from search.records.files import EVALUATIONS, append_line
from search.records.redact import redacted
from search.report import Report


def record(
    report: Report, run: Outcome, *, asked: Mapping[str, Any], data: str, results: Sequence[Mapping[str, Any]]
) -> None:
    """Adds a line about one training.

    asked     the keys that decide what was measured; `data` the hash of what it was measured on
    results   what came out, a mapping each
    """
    line = {
        "digest": run.digest,
        "asked": dict(asked),
        "data": data,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "results": list(results),
    }
    append_line(json.dumps(redacted(line)), report.records.folder, EVALUATIONS)
