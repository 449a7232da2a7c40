"""How many trainings to pack, from the seconds of real steps of one and of two."""

from __future__ import annotations

import statistics
import time

import torch

from allocators.core.errors import TrialError
from trainers.packing.packed_run import PackedRun

WORTH = 1.1  # what a pack of twice as many has to gain: a sampler has seen fewer results when it proposes for it


def gain(one: float, two: float, members: int) -> float:
    """How much faster so many trainings are packed than one after another: K·(c0 + c1·M)/(c0 + K·c1·M).

    one, two   seconds of a step of one training, c0 + c1·M, and of two in a pack, c0 + 2·c1·M
    """
    per_member = min(max(two - one, 0.0), one)
    return members * one / (one - per_member + members * per_member)


def choose(one: float, two: float, *, most: int) -> int:
    """How many trainings to pack: twice as many as long as that is worth `WORTH` times the speed, at most `most`."""
    members = 1
    while 2 * members <= most and gain(one, two, 2 * members) >= WORTH * gain(one, two, members):
        members *= 2
    return members


def seconds_of_a_step(packed: PackedRun, *, steps: int = 5) -> float:
    """Median over so many steps of the packed run as it is, after two that warm up.

    On a CPU those of the process: what else the machine does, other workers above all, counts less.
    """
    clock = time.process_time if packed.device.type == "cpu" else time.perf_counter
    seconds = []
    for number in range(steps + 2):
        began = clock()
        if packed.step():
            raise TrialError("a training ended while its steps were timed")
        if packed.device.type == "cuda":
            torch.cuda.synchronize(packed.device)
        if number > 1:
            seconds.append(clock() - began)
    return statistics.median(seconds)
