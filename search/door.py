"""What the commands on one finished study share: their help, how they read the folder, and how they end.

code = answer(argv, told=help_text, act=lambda given: write(*parse(given)))
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from allocators.core import words
from allocators.core.errors import StudyError, ToolkitError
from search.records.redact import redacted

R = TypeVar("R")


def help_text(usage: str, request: type, doc: str | None) -> str:
    """Usage, keys with their defaults, and the rest of a command's docstring behind its first sentence and commands."""
    lines = [f"usage: python -m {usage}", "", "keys (default):", *words.help_of(request)]
    return "\n\n".join(["\n".join(lines), *(doc or "").strip().split("\n\n")[2:]])


def one_study(given: Sequence[str], request: type[R], *, example: str) -> tuple[str, R]:
    """The study's folder, and the keys. Raises StudyError for none or several folders and for wrong keys."""
    folders, pairs = words.split(given)
    built = words.build(request, pairs)
    if len(folders) != 1:
        raise StudyError(f"give the folder of one study, got {len(folders)}: python -m {example}")
    return folders[0], built


def answer(
    argv: Sequence[str] | None, *, told: Callable[[], str], act: Callable[[Sequence[str]], Iterable[str]]
) -> int:
    """Prints the help, or what a command has to tell, line by line. Exit code: 0 done, 2 the request cannot work."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        if not given or words.asks_for_help(given):
            print(told(), file=sys.stdout if given else sys.stderr)
            return 0 if given else 2
        for line in act(given):
            print(line, flush=True)
    except ToolkitError as error:
        print(f"error: {redacted(str(error))}", file=sys.stderr)
        return 2
    return 0
