"""Trials that a space is asked with beside the sampler's own: with pinned knobs, and at the ends of its ranges.

    PinnedTrial(trial, {"rank": 8})        rank is given, everything else is suggested by the trial
    Corner([0, 2], high=False)             the first and the third choice, numbers at their low end
    FixedTrial({"rank": 8})                checks that a point lies in the space

Each has the three methods of an Optuna trial that a space calls. Pure Python: no Optuna.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from random import Random
from typing import Any, TypeVar

from allocators.core import words
from allocators.core.errors import StudyError, shown, unknown
from allocators.core.types import Recipe
from allocators.core.words import Value

T = TypeVar("T")
ANY = "any"  # `space.NAME=any`: a knob that a space has only where it is asked for is searched
Kind = tuple[str, object]  # categorical and the choices, or float or int and whether it is logarithmic


class PinnedTrial:
    """An Optuna trial whose pinned knobs are not suggested but given; everything else goes to the real trial.

    anything        pins of recipe settings that the command line fixes, whatever the space proposes; any other pin is
                    one of the values that the space could suggest
    learning_rate   that all points have: the knob scaled_rate then follows from the point's lora_alpha
    """

    def __init__(
        self,
        trial: Any,
        pins: Mapping[str, Value],
        *,
        anything: Collection[str] = (),
        learning_rate: Value | None = None,
    ) -> None:
        self._trial = trial
        self._pins = pins
        self._anything = anything
        self._learning_rate = None if learning_rate is None else number_of(learning_rate)
        self.params: dict[str, Any] = {}

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Raises StudyError where the pin is none of the choices, or may mean several."""
        if name not in self._pins:
            return self._keep(name, self._trial.suggest_categorical(name, choices))
        meant = words.matching(self._pins[name], choices)
        if not meant:
            raise unknown(f"value of space.{name}", str(self._pins[name]), [str(c) for c in choices])
        if len(meant) > 1:
            several = ", ".join(map(repr, meant))
            raise StudyError(f"space.{name}={self._pins[name]} is one of {several}: quote it, in a file (config=FILE)")
        return self._keep(name, meant[0])

    def suggest_optional(self, name: str, choices: Sequence[Any], *, searched: Sequence[Any]) -> Any:
        """A knob that a space has only where `space.NAME=` names it; None where it does not.

        choices    what a pin can be
        searched   what the pin `any` leaves to the sampler, the value of starting points first

        Raises StudyError as `suggest_categorical` does.
        """
        if name not in self._pins:
            return None
        if self._pins[name] == ANY:
            return self._keep(name, self._trial.suggest_categorical(name, list(searched)))
        return self.suggest_categorical(name, [*choices, ANY])

    def suggest_float(self, name: str, low: float, high: float, **options: Any) -> float:
        """Raises StudyError where the pin is no finite number, out of the range or not on its grid."""
        if name not in self._pins:
            if name == "scaled_rate" and self._learning_rate is not None and "lora_alpha" in self.params:
                return self._keep(name, float(self._learning_rate * self.params["lora_alpha"]))
            suggested: float = self._trial.suggest_float(name, low, high, **options)
            return self._keep(name, suggested)
        value = number_of(self._pins[name])
        if value is None or not math.isfinite(value):
            raise self._impossible(name, f"must be a number, the space uses {low} .. {high}")
        return self._keep(name, float(self._in_range(name, value, low, high, **options)))

    def suggest_int(self, name: str, low: int, high: int, **options: Any) -> int:
        """Raises StudyError where the pin is no whole number, out of the range or not on its grid."""
        if name not in self._pins:
            suggested: int = self._trial.suggest_int(name, low, high, **options)
            return self._keep(name, suggested)
        value = number_of(self._pins[name])
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int):
            raise self._impossible(name, f"must be whole, the space uses {low} .. {high}")
        return self._keep(name, int(self._in_range(name, value, low, high, **options)))

    def _in_range(self, name: str, value: float, low: float, high: float, **options: Any) -> float:
        """The pin, which may be anything where the space has one value: that is a default."""
        if name not in self._anything and low != high and (missed := out_of_range(value, low, high, **options)):
            instead = f"; recipe.{name}={value} fixes it all the same" if name in _SETTINGS and value > 0 else ""
            raise self._impossible(name, f"must be {missed}{instead}")
        return value

    def _impossible(self, name: str, reason: str) -> StudyError:
        return StudyError(f"space.{name}={shown(str(self._pins[name]))} is not possible: it {reason}")

    def _keep(self, name: str, value: T) -> T:
        self.params[name] = value
        return value


_SETTINGS = {"scaled_rate", *Recipe.__dataclass_fields__}


def number_of(pin: Value) -> int | float | None:
    """A pin as the number that it is, or that a file has between quotes; None where it is none."""
    value = words.read_value(pin) if isinstance(pin, str) else pin
    return None if isinstance(value, bool | str) else value


def out_of_range(value: float, low: float, high: float, *, step: float | None = None, log: bool = False) -> str:
    """What a suggested number must be and this one is not; empty for one that could be suggested."""
    reach = 1e-9 * max(abs(low), abs(high))
    if not low - reach <= value <= high + reach:
        return f"in {low:g} .. {high:g}"
    if not step or log:
        return ""
    place = (value - low) / step
    if abs(place - round(place)) < 1e-6:
        return ""
    below = low + math.floor(place) * step
    near = f"{below:g}" + (f" or {below + step:g}" if below + step <= high + reach else "")
    return f"on the grid {low:g} .. {high:g} in steps of {step:g}, for example {near}"


class _Trial:
    """What the trials of this file have in common: they check what a space asks, and remember it.

    asked    by name of a knob, what kind of knob it is
    given    by name of a knob, its value; a knob that is asked for twice has one
    """

    def __init__(self) -> None:
        self.asked: dict[str, Kind] = {}
        self.given: dict[str, Any] = {}

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Raises StudyError for what are no choices."""
        if not isinstance(choices, list | tuple | range) or not choices:
            raise StudyError(f"knob {name} needs a list of choices, got {shown(repr(choices))}")
        for choice in choices:
            plain = choice is None or isinstance(choice, str | bool | int | float)
            if not plain or (isinstance(choice, float) and not math.isfinite(choice)):
                raise StudyError(
                    f"a choice of knob {name} must be a text, a finite number, true, false or None, got "
                    f"{shown(repr(choice))}"
                )
        return self._ask(name, ("categorical", tuple(choices)), lambda: self._choose(name, choices))

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False) -> Any:
        """Raises StudyError for what is no range."""
        _check_range(name, low, high, step=step, log=log)
        return self._ask(name, ("float", log), lambda: self._number(name, float(low), float(high), step, log))

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> Any:
        """Raises StudyError for what is no range of whole numbers."""
        _check_range(name, low, high, step=step, log=log and step == 1)
        if any(int(end) != end for end in (low, high, step)):
            raise StudyError(f"the ends and the step of knob {name} must be whole, got {low}, {high} and {step}")
        return self._ask(name, ("int", log), lambda: self._number(name, int(low), int(high), step, log))

    def _ask(self, name: str, kind: Kind, value: Any) -> Any:
        if not isinstance(name, str):
            raise StudyError(f"the name of a knob must be a text, got {shown(repr(name))}")
        if self.asked.setdefault(name, kind) != kind:
            raise differs(name, self.asked[name], kind)
        if name not in self.given:
            self.given[name] = value()
        return self.given[name]

    def _choose(self, name: str, choices: Sequence[Any]) -> Any:
        raise NotImplementedError

    def _number(self, name: str, low: T, high: T, step: float | None, log: bool) -> T:
        """Of a knob whose ends are two ints or two floats."""
        raise NotImplementedError


def differs(name: str, one: Kind, other: Kind) -> StudyError:
    """The error for a knob that is asked for in two ways: a sampler learns one range a name."""

    def said(kind: Kind) -> str:
        if isinstance(kind[1], tuple):
            return f"{list(kind[1])}"
        return f"{'whole ' * (kind[0] == 'int')}numbers{' on a logarithmic scale' * bool(kind[1])}"

    what = "other choices" if one[0] == other[0] == "categorical" else "another kind"
    return StudyError(
        f"{name} has {what} in another branch, {shown(said(one))} and {shown(said(other))}: give each its own name"
    )


def _check_range(name: str, low: Any, high: Any, *, step: Any, log: bool) -> None:
    for end in (low, high, *(() if step is None else (step,))):
        if isinstance(end, bool) or not isinstance(end, int | float) or not math.isfinite(end):
            raise StudyError(f"the ends and the step of knob {name} must be finite numbers, got {shown(repr(end))}")
    if low > high or (log and low <= 0) or (step is not None and step <= 0):
        log_ = " of a logarithmic range" if log else ""
        raise StudyError(f"knob {name}{log_} cannot go from {low} to {high}{f' in steps of {step}' if step else ''}")


class Corner(_Trial):
    """A trial that takes one end of every numeric knob and a scripted choice of every categorical one.

    script   numbers of choices, in the order asked; the first choice where it ends
    draw     takes the choices that are not in the script
    taken    (choice, number of choices), in the order asked
    """

    def __init__(self, script: Sequence[int], *, high: bool, draw: Random | None = None) -> None:
        super().__init__()
        self._script = script
        self._high = high
        self._draw = draw
        self.taken: list[tuple[int, int]] = []

    def _choose(self, name: str, choices: Sequence[Any]) -> Any:  # noqa: ARG002
        turn = len(self.taken)
        if turn < len(self._script):
            choice = min(self._script[turn], len(choices) - 1)
        else:
            choice = self._draw.randrange(len(choices)) if self._draw else 0
        self.taken.append((choice, len(choices)))
        return choices[choice]

    def _number(self, name: str, low: T, high: T, step: float | None, log: bool) -> T:  # noqa: ARG002
        return high if self._high else low


class FixedTrial(_Trial):
    """A trial that gives the values of a point, and the low end (or first choice) of what the point leaves out.

    Raises StudyError for a value that the space could not suggest.
    """

    def __init__(self, point: Mapping[str, Any]) -> None:
        super().__init__()
        self._point = point

    def _choose(self, name: str, choices: Sequence[Any]) -> Any:
        if name not in self._point:
            return choices[0]
        value = self._point[name]
        same = [choice for choice in choices if choice == value and isinstance(choice, bool) == isinstance(value, bool)]
        if not same:
            raise unknown(f"{name}", str(value), [str(choice) for choice in choices])
        return same[0]

    def _number(self, name: str, low: Any, high: Any, step: float | None, log: bool) -> Any:
        value, whole = self._point.get(name, low), isinstance(low, int)
        kind = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not kind or not math.isfinite(value):
            raise StudyError(f"{name} must be a {'whole' if whole else 'finite'} number, got {shown(repr(value))}")
        if missed := out_of_range(value, low, high, step=step, log=log):
            raise StudyError(f"{name}={value} must be {missed}")
        return value
