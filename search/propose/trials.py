"""Trials as a space sees them, without Optuna's study: they give values, and remember what was asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution


class Asked:
    """A trial that remembers what it was asked for; what it answers, `_take` says."""

    def __init__(self) -> None:
        self.params: dict[str, Any] = {}
        self.distributions: dict[str, BaseDistribution] = {}

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """One of the choices."""
        return self._take(name, CategoricalDistribution(choices))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """A number between the bounds."""
        value: float = self._take(name, FloatDistribution(low, high, log, step))
        return value

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """A whole number between the bounds."""
        value: int = self._take(name, IntDistribution(low, high, log, step))
        return value

    def _take(self, name: str, distribution: Any) -> Any:
        raise NotImplementedError


class Repeating(Asked):
    """A trial with given parameters. Raises KeyError for one that is not given."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        super().__init__()
        self._given = given

    def _take(self, name: str, distribution: Any) -> Any:
        self.params[name] = self._given[name]
        self.distributions[name] = distribution
        return self.params[name]
