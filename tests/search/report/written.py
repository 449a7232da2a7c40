"""Reads what a report wrote: the data in its page, the rows of its tables."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any


def data_of(folder: Path) -> dict[str, Any]:
    """What the page's script reads."""
    page = (folder / "report.html").read_text()
    script = re.search(r'<script id="study" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert script is not None
    data: dict[str, Any] = json.loads(script[1])
    return data


def rows_of(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(file.read_text())))
