"""What a reader of a running study asks its driver for, as files in the study folder; the driver obeys and records it.

    give(folder, Order("stop", digest="3f2a…"))          # `search.serve`: one file, written as a whole
    for order in take(folder): ...                       # the driver: each file is read once and removed

    {"do": "stop", "digest": "…"}                a training ends at its next evaluation, and is recorded as stopped
    {"do": "try", "point": {"fraction": 0.5}}    one more training, checked like pins of the space
    {"do": "end"}                                nothing new is started; what runs goes on to its end

A folder may come from anybody: what is no order is removed unread, and no link that leads out is followed.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from allocators.core import checks
from allocators.core.errors import StudyError, shown
from allocators.core.words import Value
from search.records.files import ORDERS, inside, plain_file, write_atomically

Do = Literal["stop", "try", "end"]
LARGEST = 1 << 16  # bytes of an order
MOST = 100  # orders that wait at once, and knobs of a point


@dataclass(frozen=True)
class Order:
    """stop: `digest` names the training. try: `point` has values of knobs; those that it leaves out are at their low
    end, or the first choice.
    """

    do: Do
    digest: str = ""
    point: Mapping[str, Value] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: Any) -> Order:
        """Raises ValueError for what is no order."""
        given = checks.mapping(value, "order")
        do: Any = given.get("do")
        if do not in get_args(Do):
            raise ValueError(f"an order is one of {', '.join(get_args(Do))}, got {ascii(do)[:40]}")
        if len(point := checks.scalars(given.get("point", {}), "point")) > MOST:
            raise ValueError("a point has too many knobs")
        if do == "try" and not point:
            raise ValueError("a point that is to be tried has no knobs")
        return cls(do, checks.digest(given.get("digest")) if do == "stop" else "", point if do == "try" else {})

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        more: dict[str, dict[str, Any]] = {
            "stop": {"digest": self.digest},
            "try": {"point": dict(self.point)},
            "end": {},
        }
        return {"do": self.do, **more[self.do]}

    @property
    def words(self) -> str:
        """In words, on one line."""
        if self.do == "end":
            return "end the study after what runs"
        if self.do == "stop":
            return f"stop {self.digest[:8]}"
        return f"try {shown(' '.join(f'{name}={value}' for name, value in self.point.items()))}"


@dataclass(frozen=True)
class Obeyed:
    """An order that the driver has looked at, and what it answered."""

    order: Order
    answer: str


def give(folder: Path, order: Order) -> None:
    """Leaves an order for the study's driver.

    Raises StudyError where the folder cannot be written, or too many orders wait.
    """
    try:
        place = inside(folder, ORDERS)
        place.mkdir(exist_ok=True)
        if len(os.listdir(place)) >= MOST:
            raise StudyError(f"{MOST} orders wait already: the driver looks at them when a training reports")
        name = f"{time.time_ns():020d}-{secrets.token_hex(4)}.json"
        write_atomically(inside(folder, ORDERS, name), json.dumps(order.to_json(), allow_nan=False))
    except OSError as error:
        raise StudyError(f"{folder / ORDERS} cannot be written ({error.strerror})") from None


def take(folder: Path) -> list[Order]:
    """The orders that wait, in the order in which they were given; their files are gone then."""
    try:
        place = inside(folder, ORDERS)
        names = sorted(name for name in os.listdir(place) if not name.startswith("."))
    except (OSError, StudyError):
        return []
    found = (_taken(folder, place / name) for name in names)
    return [order for order in found if order is not None]


def _taken(folder: Path, file: Path) -> Order | None:
    """Reads an order and removes its file; None for what is none."""
    order = None
    with contextlib.suppress(OSError, StudyError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        if not file.is_symlink() and plain_file(folder, ORDERS, file.name).stat().st_size <= LARGEST:
            order = Order.from_json(json.loads(file.read_bytes()))
    with contextlib.suppress(OSError):  # a folder stays, and is none in the next look either
        file.unlink()
    return order
