"""Reads what a report wrote: the data in its page, the rows of its tables."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path


def data_of(folder: Path) -> dict:
    """What the page's script reads."""
    page = (folder / "report.html").read_text()
    return json.loads(re.search(r'<script id="study" type="application/json">(.*?)</script>', page, re.DOTALL)[1])


def rows_of(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(file.read_text())))
