"""Errors typed by what a search must do with them.

`StudyError` stops the study: every trial would fail the same way (bad key, unknown model, unwritable folder).
`TrialError` belongs to one point: it is recorded with the point and the study goes on.
A message says what was asked, what is possible and what to try, in one line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ToolkitError(Exception):
    """Base of every error that is raised on purpose; its text is written for the user."""


class StudyError(ToolkitError):
    """Every trial would fail like this: stop, one line, exit code 2."""


class NotFiniteError(StudyError):
    """The base model computes numbers that are not finite: nothing can be trained on it, or measured by running it."""


class TrialError(ToolkitError):
    """This point cannot be trained or was lost; record it and go on."""


class InfeasibleError(TrialError):
    """The knobs ask for an allocation that does not exist on this model (for example zero experts)."""


class BudgetError(TrialError):
    """The allocation exists but has more trainable parameters than `max_trainable_params`."""


class OutOfMemoryError(TrialError):
    """The device ran out of memory while this point trained."""


class ToolkitWarning(UserWarning):
    """Something the user should know, though the work goes on."""


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
    return StudyError(f"unknown {what} '{asked}': choose from {', '.join(names)}{did_you_mean(asked, names)}")
