"""Says what this machine, the packages, a model and a task are like, and what would not work.

    python -m search.doctor
    python -m search.doctor model=allenai/OLMoE-1B-7B-0924 task=arc_easy storage=/data/studies
    python -m search.doctor ray_address=10.0.0.5:6379
    python -m search.doctor help

Exit code 0 where nothing is wrong, 1 where something is, 2 for words that it does not know. Nothing is trained, started
or fetched.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from allocators.core import words
from allocators.core.errors import ToolkitError
from search.doctor import Asked, examine
from search.records.redact import redacted
from trainers import command

MARKS = {"ok": "ok   ", "note": "note ", "wrong": "WRONG"}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line a finding; gives the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    if words.asks_for_help(given):
        print("\n".join([(__doc__ or "").strip(), "", "keys (default):", *words.help_of(Asked)]))
        return 0
    try:
        asked = words.parse(given, Asked, example="model=tiny-moe")
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    wrong = 0
    for finding in examine(asked):
        wrong += finding.state == "wrong"
        print(f"{MARKS[finding.state]}  {finding.what:<13}  {redacted(finding.says)}", flush=True)
    if wrong:
        print(f"{wrong} {'thing' if wrong == 1 else 'things'} would end a study here", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(command.run(main))
