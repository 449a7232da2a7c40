"""report.html while a study runs: written as results come in, as often as it is cheap.

    page = RunningPage(records)
    page()            # whenever the records have changed

A page costs what the results cost, so after one was written none is written before `SHARE` times as long has passed:
all pages together take at most one part in twenty of the driver's time, however many results there are.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from search.records import Records, write_atomically
from search.report import Report

log = logging.getLogger(__name__)

SHARE = 20
LEAST = 2.0  # seconds between two pages, however cheap they are


class RunningPage:
    """Writes the page of these records, which another part of this process keeps up to date."""

    def __init__(self, records: Records, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._records = records
        self._clock = clock
        self._next = 0.0
        self._failed = False

    def __call__(self) -> None:
        """Writes the page where the last one is old enough. A page that cannot be written is no error of the study."""
        began = self._clock()
        if began < self._next:
            return
        try:
            write_atomically(self._records.folder / "report.html", Report(self._records).running_page)
        except OSError as error:
            if not self._failed:
                log.warning("report.html cannot be written while the study runs (%s)", error.strerror)
            self._failed = True
        ended = self._clock()
        self._next = ended + max(LEAST, SHARE * (ended - began))
