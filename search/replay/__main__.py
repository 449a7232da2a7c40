"""Recorded trainings as a table: `python -m search.replay export STUDY [STUDY ...] to=FILE.parquet`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from allocators.core import words
from allocators.core.errors import ToolkitError
from allocators.core.types import canonical_json
from search.records.redact import redacted
from search.replay import export
from trainers import command


@dataclass(frozen=True)
class Target:
    """The key of the command line."""

    to: str = words.key("", "the table to write, a .parquet file")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 the request cannot work."""
    given = list(sys.argv[1:] if argv is None else argv)
    usage = "usage: python -m search.replay export STUDY [STUDY ...] to=FILE.parquet"
    if words.asks_for_help(given):
        print("\n".join([usage, "", *words.help_of(Target)]))
        return 0
    try:
        bare, pairs = words.split(given)
        target = words.build(Target, pairs)
        if bare[:1] != ["export"] or not bare[1:] or not target.to:
            print(usage, file=sys.stderr)
            return 2
        table = export(bare[1:], target.to)
    except ToolkitError as error:
        print(f"error: {redacted(str(error))}", file=sys.stderr)
        return 2
    points = len({canonical_json(dict(row.params)) for row in table.rows.values()})
    size = Path(target.to).stat().st_size
    print(
        f"{len(table.rows)} trainings of {points} points with seeds {', '.join(map(str, table.seeds))}, "
        f"{size / 1024:.0f} KiB\npython -m search.run {shlex.quote(f'replay={target.to}')}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
