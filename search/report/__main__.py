"""The command: writes a study's report into its folder and prints it.

python -m search.report studies/demo
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from allocators.core import words
from allocators.core.errors import ToolkitError
from search.records import mirror
from search.records.redact import redacted
from search.report import show, write
from trainers import command


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 there is no study in the folder or it cannot be written."""
    given = list(sys.argv[1:] if argv is None else argv)
    usage = "usage: python -m search.report STUDY     the folder of a study, or URI/NAME: writes and prints its report"
    if words.asks_for_help(given) or len(given) != 1:
        asked = words.asks_for_help(given)
        print(usage, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    folder = given[0]
    try:
        folder = mirror.here(folder)
        show(write(folder))
    except ToolkitError as error:
        print(f"error: {redacted(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: the report cannot be written to {folder} ({error.strerror})", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
