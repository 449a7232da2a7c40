"""The view of a study in MLflow's UI: the Pareto scatter, and a table by accuracy with parameters and knobs.

    tag = saved_view(parent="…", name="demo", created=0, columns=["params.`allocator`"])     # value of the tag
    client.set_experiment_tag(experiment_id, tag_of(key), tag)
    f"http://127.0.0.1:5000/{link(experiment_id, key)}"                                       # opens the view

MLflow keeps the view that its button "Share" makes as a tag of the experiment: JSON, deflated, in base64. The format is
the UI's own and no interface that MLflow promises, so it is written for the versions that it was seen to work with
alone (`FITS`). The scatter has no logarithmic axis: it shows the metric `log10_trainable_params`.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Iterable
from typing import Any

FITS = re.compile(r"3\.(1[7-9]|[2-9]\d)\.")  # MLflow versions
LOG_SIZE = "log10_trainable_params"  # the metric on the scatter's horizontal axis
MOST_RUNS = 500  # that the UI draws
LONGEST = 4_500  # characters of the tag: MLflow takes 5,000
COLUMNS = ("metrics.`accuracy`", "metrics.`test_accuracy`", "metrics.`trainable_params`", "params.`allocator`")
_PREFIX = "deflate;"
_WIDE = {"columns": 1, "cardHeight": 560}  # of the section with the scatter


def tag_of(key: str) -> str:
    """Name of the tag that holds the view of this key."""
    return f"mlflow.sharedViewState.{key}"


def link(experiment_id: str, key: str, *, charts: bool = True) -> str:
    """What follows the server's address.

    charts   the scatter; False: the table

    `workflowType` leads past the page for language model applications, which the UI may prefer.
    """
    mode = "&compareRunsMode=CHART" if charts else ""
    return f"#/experiments/{experiment_id}/runs?workflowType=machine_learning{mode}&viewStateShareKey={key}"


def saved_view(*, parent: str, name: str, created: int, columns: Iterable[str]) -> str:
    """The tag's value: all child runs of `parent`, flat, the most accurate first.

    created   milliseconds since 1970
    columns   of the table, after `COLUMNS`, as the UI names them: params.`NAME`; the last ones are left out where the
              tag would be too long
    """
    more = list(columns)
    while len(text := _packed(_state(parent, [*COLUMNS, *more]), name, created)) > LONGEST and more:
        more.pop()
    return text


def unpacked(text: str) -> dict[str, Any]:
    """The state of the UI in a tag's value."""
    state: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(json.loads(text)["state"][len(_PREFIX) :])))
    return state


def _packed(state: dict[str, Any], name: str, created: int) -> str:
    packed = base64.b64encode(zlib.compress(json.dumps(state, separators=(",", ":")).encode(), 9)).decode()
    return json.dumps({"name": name, "createdAt": created, "updatedAt": created, "state": f"{_PREFIX}{packed}"})


def _state(parent: str, columns: list[str]) -> dict[str, Any]:
    section = "front"
    scatter = {
        "type": "SCATTER",
        "uuid": "pareto",
        "displayName": "Accuracy against log10 of trainable parameters",
        "isGenerated": False,
        "deleted": False,
        "metricSectionId": section,
        "runsCountToCompare": MOST_RUNS,
        "xaxis": {"key": LOG_SIZE, "type": "METRIC"},
        "yaxis": {"key": "accuracy", "type": "METRIC"},
    }
    return {
        "searchFilter": f"tags.mlflow.parentRunId = '{parent}'",
        "orderByKey": "metrics.`accuracy`",
        "orderByAsc": False,
        "lifecycleFilter": "Active",
        "selectedColumns": columns,
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": [scatter],
        "compareRunSections": [{"uuid": section, "name": "Front", "display": True, "isReordered": False, **_WIDE}],
    }
