"""What a study takes from this machine: the most memory that the driver and all its processes held at once.

with PeakMemory() as memory:
    ...
memory.peak_bytes
"""

from __future__ import annotations

import threading
from typing import Self

import psutil

EVERY = 2.0  # seconds between two looks


def memory_of_tree() -> int:
    """Bytes that this process and its descendants hold. Shared pages are counted once (PSS, where Linux tells it)."""
    total, root = 0, psutil.Process()
    for process in [root, *root.children(recursive=True)]:
        try:
            info = process.memory_full_info()
        except psutil.Error:  # it ended, or belongs to another user
            continue
        total += getattr(info, "pss", info.rss)
    return total


class PeakMemory:
    """Looks at `memory_of_tree` every two seconds, in a thread of its own."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.peak_bytes = max(self.peak_bytes, memory_of_tree())
            self._stop.wait(EVERY)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
