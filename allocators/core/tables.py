"""What a table space says about its paper: published numbers, and the comparisons that the paper makes.

    PUBLISHED = (Published(model="Llama-2-7b-hf", task="arc_easy", row={"allocator": "uniform"}, accuracy=0.84, ...),)
    COMPARISONS = (Comparison("AlphaLoRA against uniform", {"allocator": "alphalora"}, {"allocator": "uniform"}, ...),)

A row is named by the knobs that single it out among the table's rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """One published accuracy.

    model, task   what it was measured on: the last part of the Hugging Face id; the task's name here, or words that
                  say why it is no single task
    row           the row it belongs to
    accuracy      between 0 and 1
    source        where it stands
    """

    model: str
    task: str
    row: Mapping[str, Any]
    accuracy: float
    source: str


@dataclass(frozen=True)
class Comparison:
    """Two rows that the paper sets against each other, tested pairwise over the seeds.

    claim    what the paper found, in its own size where it gives one
    margin   above 0: the claim is that they are equal to within it, and equivalence is tested
    """

    name: str
    first: Mapping[str, Any]
    second: Mapping[str, Any]
    claim: str
    source: str
    margin: float = 0.0


def facts(space: Any) -> dict[str, Any]:
    """What a table says about its paper, as JSON, for the study's records: the report then needs no space.

    Empty for a space that is no table.
    """
    if not getattr(space, "TABLE", False):
        return {}
    return {
        "published": [asdict(entry) for entry in getattr(space, "PUBLISHED", ())],
        "comparisons": [asdict(entry) for entry in getattr(space, "COMPARISONS", ())],
    }
