"""What a run remembers of its finished steps, and what became of it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from allocators.core.types import Rung

EXPLODED = (10.0, 10.0)  # a loss above 10 × the first one + 10 ...
PATIENCE = 3  # ... for this many steps in a row ends the run, as a loss that is not finite does at once

Ending = Literal["complete", "stopped", "diverged"]


@dataclass(frozen=True)
class Result:
    """What became of a run.

    status              complete | stopped (by `on_rung`) | diverged
    losses              training loss of every step, those before a resume included
    tokens              trained tokens, prompts included, padding excluded
    seconds             wall clock of training and evaluation, that before a resume included
    peak_memory_bytes   CUDA: most memory allocated during this run; CPU: the process's largest resident size so far
    """

    status: Ending
    rungs: tuple[Rung, ...]
    losses: tuple[float, ...]
    tokens: int
    seconds: float
    peak_memory_bytes: int

    @property
    def accuracy(self) -> float | None:
        """Of the last rung; None for a diverged run, whatever it reached before."""
        return self.rungs[-1].accuracy if self.rungs and self.status != "diverged" else None


@dataclass
class Past:
    """What a run remembers of its finished steps."""

    losses: list[float] = field(default_factory=list)
    rungs: list[Rung] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0  # before this process
    began: float | None = field(default_factory=time.monotonic)  # None: whatever runs it counts its seconds
    exploded: int = 0  # steps in a row
    diverged: bool = False

    def elapsed(self) -> float:
        """Seconds of training, those before a resume included."""
        return self.seconds + (0.0 if self.began is None else time.monotonic() - self.began)

    def add(self, losses: Sequence[float]) -> None:
        """Takes in the losses of steps, in order; notes whether the run has diverged."""
        factor, offset = EXPLODED
        for loss in losses:
            self.losses.append(loss)
            self.exploded = self.exploded + 1 if loss > factor * self.losses[0] + offset else 0
            self.diverged |= not math.isfinite(loss) or self.exploded >= PATIENCE

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads; `seconds` are those up to now."""
        return {
            "losses": self.losses,
            "rungs": [rung.to_json() for rung in self.rungs],
            "tokens": self.tokens,
            "seconds": self.elapsed(),
            "exploded": self.exploded,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Past:
        """The clock goes on from now."""
        return cls(**{**data, "rungs": [Rung.from_json(rung) for rung in data["rungs"]]})
