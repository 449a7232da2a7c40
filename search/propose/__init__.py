"""Which points are tried, and which trainings go on: samplers and successive halving.

User attributes of an Optuna trial, by which a sampler that knows noise hears of it:

    RUN      which training its result is of; two trials with one run were trained once
    STDERR   standard error of its accuracy over the questions
    TEXT_STDERR   standard error of what it forgot over the rows of the text

Draws follow from the records: those of a question come from the study's seed and the question's number (`seed_of`), not
from how much a process drew before.
"""

from __future__ import annotations

import random

RUN = "run"
STDERR = "stderr"
TEXT_STDERR = "text_stderr"


def seed_of(seed: int, number: int) -> int:
    """Seed of the random numbers for the question with this number, 32 bits."""
    return random.Random(f"{seed} {number}").getrandbits(32)
