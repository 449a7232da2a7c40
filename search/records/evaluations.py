"""What was measured of a study's adapters after it: the lines of evaluations.jsonl, which `search/evaluate/` adds.

rises(records)     # by digest of a training: nats a token by which it raised the loss on the text
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from allocators.core.errors import StudyError
from search.records import Records
from search.records.files import EVALUATIONS, read_bytes

_KEYS = {"digest": str, "asked": dict, "results": list}


def lines(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines, in the order in which they were added; none where nothing was evaluated.

    Raises StudyError where one cannot be read.
    """
    try:
        text = read_bytes(folder, EVALUATIONS).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return
    except OSError as error:
        raise StudyError(f"{folder / EVALUATIONS} cannot be read ({error.strerror})") from None
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict) or not all(isinstance(value.get(key), kind) for key, kind in _KEYS.items()):
            raise StudyError(f"{folder / EVALUATIONS}, line {number}, is no evaluation: delete the line")
        yield value


def rises(records: Records) -> dict[str, float]:
    """What trainings forgot, by digest: measured by the study, else later; of several texts that measured last.

    Raises StudyError for a line that cannot be read.
    """
    found: dict[str, float] = {}
    for line in lines(records.folder):
        if "forgetting" in line["asked"]:
            try:
                found[line["digest"]] = float(line["results"][0]["rise"])
            except (LookupError, TypeError, ValueError):
                raise StudyError(
                    f"{records.folder / EVALUATIONS}: the line of {line['digest']} has no rise of a loss: delete it"
                ) from None
    measured = {digest: run.forgetting.rise for digest, run in records.finished.items() if run.forgetting}
    return found | measured
