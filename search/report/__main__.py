"""The command: writes a study's report into its folder and prints it.

python -m search.report studies/demo
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from allocators.core.errors import ToolkitError
from search.records.redact import redacted
from search.report import show, write


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 there is no study in the folder or it cannot be written."""
    parser = argparse.ArgumentParser(prog="python -m search.report", description="Writes and prints a study's report.")
    parser.add_argument("folder", help="folder of the study, as search.run named it")
    folder = parser.parse_args(argv).folder
    try:
        show(write(folder))
    except ToolkitError as error:
        print(f"error: {redacted(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: the report cannot be written to {folder} ({error.strerror})", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
