"""The records of a study that is looked at again and again: only what was added since the last look is read.

    following = Following(Path("studies/demo"))
    records = following.read()        # all of it
    records = following.read()        # the same object, with the lines that came since

A study of 10,000 results takes seconds to read; its next line takes none. No lock is taken, and nothing is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from allocators.core.errors import StudyError
from search.records import Records
from search.records.files import HEADER, LINES, plain_file
from search.records.header import read_header


class Following:
    """Records of one folder. One thread at a time may read.

    torn   a last line without its newline counts where it is whole, as for `search.records.read`; else it waits
    say    is told once of every damaged line
    """

    def __init__(self, folder: Path, *, torn: bool = False, say: Callable[[str], object] = lambda _: None) -> None:
        self.folder = folder
        self._torn, self._say = torn, say
        self._records: Records | None = None
        self._header: tuple[tuple[int, ...], dict[str, Any]] = ((), {})  # which file it was read from, and what it says
        self._file: tuple[int, int] | None = None  # device and inode of the lines that were read
        self._taken = 0  # bytes of them

    def read(self) -> Records:
        """What the folder says now; what an earlier call returned says it, too.

        All is read again where the study was opened anew, or its lines are another file or fewer. Raises StudyError
        where there is no study in the folder, or its lines lie outside of it.
        """
        header = self._read_header()
        try:
            with plain_file(self.folder, LINES).open("rb") as lines:
                status = os.fstat(lines.fileno())
                records = self._known(header, status) or self._begin(header, status)
                lines.seek(self._taken)
                data = lines.read()
        except OSError as error:
            reason = f"{self.folder / LINES} cannot be read ({error.strerror}): is {self.folder} a study folder?"
            raise StudyError(reason) from None
        if not self._torn:
            data = data[: data.rfind(b"\n") + 1]
        said = len(records.problems)
        skipped = int(self._taken > 0 and data.startswith(b"\n"))  # of a line that was whole but for its end
        self._taken += skipped + records.take_in(data[skipped:])
        for name in ("untrained", "signals"):  # files of their own, which may be there only now
            records.__dict__.pop(name, None)
        for problem in records.problems[said:]:
            self._say(problem)
        return records

    def _read_header(self) -> dict[str, Any]:
        """It is parsed again only where it is another file: that of a large model is long."""
        try:
            status = (self.folder / HEADER).stat()
            stamp: tuple[int, ...] = (status.st_ino, status.st_mtime_ns, status.st_size)
        except OSError:  # `read_header` says what is wrong
            stamp = ()
        if not stamp or stamp != self._header[0]:
            self._header = stamp, read_header(self.folder)
        return self._header[1]

    def _known(self, header: dict[str, Any], status: os.stat_result) -> Records | None:
        """What was read so far, where the lines go on from it."""
        same = self._file == (status.st_dev, status.st_ino) and status.st_size >= self._taken
        return self._records if self._records is not None and same and self._records.header == header else None

    def _begin(self, header: dict[str, Any], status: os.stat_result) -> Records:
        self._records = Records(self.folder, header)
        self._file, self._taken = (status.st_dev, status.st_ino), 0
        return self._records
