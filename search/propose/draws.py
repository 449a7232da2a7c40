"""Samplers whose draws follow from the records: a proposal's random numbers come from the study's seed and its number.

    draws = Draws("tpe", problem, seed=0)
    study.sampler = draws.of(12)        # for the twelfth question that the study asks its sampler

Optuna's samplers draw one sequence of numbers for as long as the process lives, and some remember earlier fits. A study
that was killed and went on would draw other numbers than one that was not. So a sampler of Optuna's is made anew for
every question; what it knows is in its study. `ehvi.py` keeps its model, and derives its draws in the same way.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from search.problem import Problem
from search.propose import seed_of

Recorded = Callable[[str, BaseDistribution, Any], Any]

POPULATION = 10  # of NSGA-II: Optuna's own, 50, is as much as most studies train
_GENERATION = optuna.samplers.NSGAIISampler._get_generation_key()

OPTUNAS: Mapping[str, Callable[[int], BaseSampler]] = MappingProxyType(
    {
        "gp": lambda seed: optuna.samplers.GPSampler(seed=seed, warn_independent_sampling=False),
        "tpe": lambda seed: optuna.samplers.TPESampler(multivariate=True, group=True, seed=seed),
        "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=POPULATION),
        "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    }
)


def made(name: str, seed: int) -> BaseSampler:
    """A sampler of Optuna's that knows nothing yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return OPTUNAS[name](seed)


class Draws:
    """The samplers of a study, by the number of the question.

    name       ehvi | gp | tpe | nsga2 | random
    repeats    a point may be trained again, with another seed
    expected, of_three   as for EHVISampler
    """

    def __init__(
        self,
        name: str,
        problem: Problem,
        *,
        seed: int,
        repeats: bool,
        expected: Mapping[str, float],
        of_three: bool = False,
    ) -> None:
        self._name = name
        self._seed = seed
        self._recorded = problem.recorded
        if name == "ehvi":
            from search.propose.candidates import resolver  # brings scipy, which no other sampler needs
            from search.propose.ehvi import EHVISampler

            resolve = resolver(problem, repeats=repeats)
            self._ehvi = EHVISampler(resolve, expected=expected, seed=seed, of_three=of_three)

    def of(self, number: int) -> BaseSampler:
        """The study's own sampler."""
        if self._name == "ehvi":
            return self._ehvi
        return _AsRecorded(made(self._name, seed_of(self._seed, number)), self._recorded)

    def at_random(self, number: int) -> BaseSampler:
        """A sampler that draws evenly."""
        return _AsRecorded(made("random", seed_of(self._seed, number)), self._recorded)

    def before(self, study: Study) -> None:
        """The study's own sampler was asked now, in an earlier run."""
        if self._name == "ehvi":
            self._ehvi.recall(study)

    def after(self, study: Study, number: int) -> None:
        """A question became the trial with this number, whoever answered it: NSGA-II breeds from all of them."""
        if self._name == "nsga2":
            study._thread_local.cached_all_trials = None  # which else only `ask` drops
            sampler = optuna.samplers.NSGAIISampler(population_size=POPULATION)
            generation = sampler.get_trial_generation(study, study.get_trials(deepcopy=False)[number])
            sampler.get_parent_population(study, generation)  # chosen when the generation begins, in an order of then

    def moved(self, trial: FrozenTrial) -> FrozenTrial:
        """The trial for a study that begins anew with what another one knew: its first generation.

        A later one would be bred from generations that the new study lacks: Optuna then goes back through all of them.
        """
        if self._name != "nsga2":
            return trial
        moved = copy.copy(trial)
        moved.system_attrs = {**trial.system_attrs, _GENERATION: 0}
        return moved


class _AsRecorded(BaseSampler):
    """A sampler whose draws are those that go on record: a table has values of its own, and takes the nearest."""

    def __init__(self, sampler: BaseSampler, recorded: Recorded) -> None:
        self._sampler = sampler
        self._recorded = recorded

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        params = self._sampler.sample_relative(study, trial, search_space)
        return {name: self._recorded(name, search_space[name], value) for name, value in params.items()}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        value = self._sampler.sample_independent(study, trial, param_name, param_distribution)
        return self._recorded(param_name, param_distribution, value)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._sampler.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: Any, values: Any) -> None:
        self._sampler.after_trial(study, trial, state, values)
