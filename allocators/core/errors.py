"""Errors typed by what a search must do with them.

`StudyError` stops the study: every trial would fail the same way (bad key, unknown model, unwritable folder).
`TrialError` belongs to one point: it is recorded with the point and the study goes on.
A message says what was asked, what is possible and what to try, in one line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST_LISTED = 60  # names in a message
FAULTS = (Exception, SystemExit)  # what somebody's code may raise besides an interruption


class ToolkitError(Exception):
    """Base of every error that is raised on purpose; its text is written for the user and is one line, whatever
    names, values and messages of others it quotes.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class StudyError(ToolkitError):
    """Every trial would fail like this: stop, one line, exit code 2."""


class NotFiniteError(StudyError):
    """The base model computes numbers that are not finite: nothing can be trained on it, or measured by running it."""


class SpaceError(StudyError):
    """The code of a space failed, or what it returned is no point."""


class TrialError(ToolkitError):
    """This point cannot be trained or was lost; record it and go on."""


class InfeasibleError(TrialError):
    """The knobs ask for an allocation that does not exist on this model (for example zero experts)."""


class RuleError(InfeasibleError):
    """The code of an allocator failed at these knobs, or returned no allocation: none of its points has a training."""


class BudgetError(TrialError):
    """The allocation exists but has more trainable parameters than `max_trainable_params`."""


class OutOfMemoryError(TrialError):
    """The device ran out of memory while this point trained."""


class ToolkitWarning(UserWarning):
    """Something the user should know, though the work goes on."""


def one_line(text: str) -> str:
    """The text on one line, with `?` for what moves a terminal's cursor or cannot be written.

    >>> one_line("two\\nlines,\\ta tab \\x1b[2J")
    'two lines, a tab ?[2J'
    """
    lines = " ".join(line.strip() for line in text.strip().splitlines())
    return "".join(" " if c.isspace() else c if c.isprintable() else "?" for c in lines)


def text_of(error: BaseException) -> str:
    """What an error of somebody's code says; it may fail even at that."""
    try:
        return str(error)
    except Exception:
        return "its text cannot be read"


def shown(text: str) -> str:
    """A text for a message: on one line, and of one that is very long the beginning."""
    line = one_line(text)
    return line if len(line) <= 80 else f"{line[:77]}..."


def did_you_mean(asked: str, possible: Iterable[str]) -> str:
    """`"; did you mean 'sieve'?"` for a near miss, else `""`."""
    near = difflib.get_close_matches(asked, list(possible), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def unknown(what: str, asked: str, possible: Iterable[str]) -> StudyError:
    """The error for a name that is not on the list: names what was asked, what is possible, what was meant.

    >>> str(unknown("space", "seive", ["sieve", "dense"]))
    "unknown space 'seive': choose from dense, sieve; did you mean 'sieve'?"
    """
    names = sorted(possible)
    listed = ", ".join(names[:MOST_LISTED]) + (f" and {len(names) - MOST_LISTED} more" * (len(names) > MOST_LISTED))
    return StudyError(f"unknown {what} '{shown(asked)}': choose from {listed}{did_you_mean(asked, names)}")
