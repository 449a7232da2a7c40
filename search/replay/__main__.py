"""Recorded trainings as a table: `python -m search.replay export STUDY [STUDY ...] to=FILE.parquet`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from allocators.core.errors import ToolkitError
from allocators.core.types import canonical_json
from search.records.redact import redacted
from search.replay import export


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 the request cannot work."""
    words = list(sys.argv[1:] if argv is None else argv)
    targets = [word.removeprefix("to=") for word in words if word.startswith("to=")]
    folders = [word for word in words[1:] if not word.startswith("to=")]
    if not words or words[0] != "export" or len(targets) != 1 or not folders:
        print("usage: python -m search.replay export STUDY [STUDY ...] to=FILE.parquet", file=sys.stderr)
        return 2
    try:
        table = export(folders, targets[0])
    except ToolkitError as error:
        print(f"error: {redacted(str(error))}", file=sys.stderr)
        return 2
    points = len({canonical_json(dict(row.params)) for row in table.rows.values()})
    size = Path(targets[0]).stat().st_size
    print(
        f"{len(table.rows)} trainings of {points} points with seeds {', '.join(map(str, table.seeds))}, "
        f"{size / 1024:.0f} KiB\npython -m search.run replay={targets[0]}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
