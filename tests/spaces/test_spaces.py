"""One contract for every space: what it proposes can be allocated, its starting points lie on its own grid."""

from __future__ import annotations

import warnings

import pytest

from allocators.core import plugins
from allocators.core.errors import InfeasibleError
from allocators.core.shapes import shape_of
from allocators.core.types import ModelShape
from search.sampler import Proposer
from search.trial import Problem, corners, load_space, placeholder

SPACES = plugins.names("spaces")
LLAMA = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
OLMOE = {"model_type": "olmoe", "hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4}


def shape_for(space: str, layers: int = 8) -> ModelShape:
    base = plugins.load("spaces", space, "space").BASE
    sizes = {"num_hidden_layers": layers, "vocab_size": 64}
    if base == "moe":
        return shape_of(OLMOE | sizes | {"num_experts": 16, "num_experts_per_tok": 2}, name="moe")
    return shape_of(LLAMA | sizes | {"num_key_value_heads": 4}, name="dense")


def problem_of(name: str, layers: int = 8, **changes) -> Problem:
    shape = shape_for(name, layers)
    space = load_space(name, shape)
    kinds = {plugins.load("allocators", a).NEEDS for a in space.ALLOCATORS} - {None}
    signals = {kind: placeholder(kind, shape) for kind in kinds}
    return Problem(space=space, shape=shape, model=shape.name, task="t", signals=signals, **changes)


def test_the_published_methods_all_have_their_space():
    assert set(SPACES) >= {"sieve", "alphalora", "mola", "lora_smoe", "dense"}


@pytest.mark.parametrize("name", SPACES)
def test_every_corner_of_a_space_is_an_allocation_or_says_why_not(name):
    problem, resolved = problem_of(name), set()
    for high in (False, True):
        for point, _ in corners(problem, high=high):
            try:
                trial, params = problem.resolve(point)
            except InfeasibleError:
                continue
            assert params == trial.allocation.trainable_params(problem.shape, rank=trial.recipe.rank) > 0
            resolved.add(point.allocator)
    assert resolved == set(problem.space.ALLOCATORS)


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("layers", [4, 7, 32])
def test_starting_points_lie_on_the_grid_and_are_proposed_as_they_stand(name, layers):
    problem = problem_of(name, layers)
    proposer = Proposer(problem)
    expected = problem.space.starting_points(problem.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Optuna warns of a value outside its distribution, and draws another
        proposals = [proposer.propose() for _ in expected]
    for point, proposal in zip(expected, proposals, strict=True):
        assert {key: proposal.params[key] for key in point} == pytest.approx(point)


@pytest.mark.parametrize("name", SPACES)
def test_the_data_sheet_asks_a_question_and_names_every_knob(name):
    problem = problem_of(name)
    sheet = problem.space.__doc__
    assert "?" in sheet.split("\n\n")[0]
    assert f"python -m search.run space={name}" in sheet
    for knob in {knob for _, params in corners(problem) for knob in params}:
        assert knob in sheet, knob


@pytest.mark.parametrize("name", [s for s in SPACES if plugins.load("spaces", s, "space").BASE == "dense"])
def test_the_controls_have_the_parameters_of_the_method(name):
    """At the starting points, uniform and random cost the same; so does every method that takes the same T."""
    proposer = Proposer(problem_of(name))
    first = [proposer.propose() for _ in range(len(problem_of(name).space.starting_points(shape_for(name))))]
    costs = {p.trial.allocator: p.trainable_params for p in first}
    assert costs["uniform"] == costs["random"]
    for allocator in {"alphalora", "sensitivity", "mola"} & set(costs):
        assert costs[allocator] == costs["uniform"]
