"""Reads what a report wrote: the data in its page, the rows of its tables."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any


def data_of(folder: Path) -> dict[str, Any]:
    """What the page's script reads, its points and their runs one by one."""
    page = (folder / "report.html").read_text()
    script = re.search(r'<script id="study" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert script is not None
    data: dict[str, Any] = json.loads(script[1])
    data["points"] = unpacked(data["points"])
    for point in data["points"]:
        runs = [dict(zip(data["fields"]["runs"], run, strict=True)) for run in point["runs"]]
        rungs = [[dict(zip(data["fields"]["rungs"], rung, strict=True)) for rung in run["rungs"]] for run in runs]
        point["runs"] = [run | {"rungs": own} for run, own in zip(runs, rungs, strict=True)]
    return data


def unpacked(packed: dict[str, Any]) -> list[dict[str, Any]]:
    """Points one by one, of columns (`search/report/page/`)."""
    points: list[dict[str, Any]] = [{} for _ in range(packed["count"])]
    for name, column in packed["columns"].items():
        for place, point in enumerate(points):
            each = column.get("each")
            point[name] = (
                each[place] if each is not None else column["of"][column["at"][place] if "at" in column else 0]
            )
    return points


def rows_of(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(file.read_text())))
