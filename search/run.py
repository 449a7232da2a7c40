"""Runs a study: `python -m search.run space=sieve`. `help` lists the keys, `help sieve` describes a space.

parse → shape and space (no weights) → [dry_run: table] → records, tracker → warm workers → signals → search → report
Everything that can be known to be wrong before workers start is said before, in one line, with exit code 2.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Sequence

from allocators.core import plugins, words
from allocators.core.errors import ToolkitError
from search import interrupts
from search.config import PROGRAM, RunConfig, help_text, parse
from search.records.redact import redacted
from search.session.prepare import prepare
from trainers import command


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 no trial reached an accuracy or one was lost too often, 2 the request cannot work.

    130, 143, 129: Ctrl-C, SIGTERM, SIGHUP.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        with interrupts.watched():
            return _answer(given)
    except ToolkitError as error:
        if not isinstance(error, interrupts.Said):
            print(f"error: {redacted(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # the terminal may be closed
            typed = shlex.join([*PROGRAM, *map(redacted, given)])
            print(f"interrupted: the same command goes on where this one stopped:\n    {typed}", file=sys.stderr)
        return interrupts.exit_code()


def _answer(given: list[str]) -> int:
    if not given:
        usage = "usage: python -m search.run [key=value ...]   for example space=sieve; help lists the keys"
        print(usage, file=sys.stderr)
        return 2
    if words.asks_for_help(given):
        names = [word.removeprefix("space=") for word in given if word not in words.HELP]
        print(describe(names[0]) if len(names) == 1 and "=" not in names[0] else overview())
        return 0
    return run(parse(given))


def script() -> int:
    """The installed command `lora-search`."""
    code = command.run(main)
    interrupts.leave(code)
    return code


def overview() -> str:
    """The keys, and every space with the question it asks."""
    lines = [help_text(), "", "spaces:"]
    for name in plugins.names("spaces"):
        lines.append(f"  {name:<16}{describe(name).splitlines()[0]}")
    return "\n".join(lines)


def describe(space: str) -> str:
    """A space's data sheet. Raises StudyError for a space that does not exist."""
    return plugins.load("spaces", space, "space").__doc__ or ""


def run(config: RunConfig) -> int:
    """Exit code as `main`; raises StudyError for what cannot work."""
    config, problem = prepare(config)
    if config.dry_run:
        from search.session.dry_run import dry_run
        from search.session.make_workers import Locations

        dry_run(config, problem, Locations.of(config))
        return 0
    from search.session.session import run_study

    return run_study(config, problem)


if __name__ == "__main__":
    sys.exit(script())
