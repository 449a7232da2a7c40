"""One contract for every space: what it proposes can be allocated, its starting points lie on its own grid."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocators import uniform_ranks
from allocators.core import plugins
from allocators.core.errors import InfeasibleError, StudyError
from allocators.core.layers import blocks
from allocators.core.shapes import shape_from_config
from allocators.core.tables import facts
from allocators.core.types import TRANSFERABLE, ExpertCounts, ModelShape, Point, Recipe
from search.config import parse
from search.problem import Problem, Proposal, corners, load_space, placeholder
from search.propose.sampler import Proposer, table_rows
from search.session.prepare import prepare, prepare_training
from search.study import table_trainings
from spaces._tables import RECIPES
from tests.search.propose.proposals import next_proposal
from trainers.recipes import make_recipe

SPACES = plugins.names("spaces")
TABLES = [name for name in SPACES if getattr(plugins.load("spaces", name, "space"), "TABLE", False)]
SEARCHED = [name for name in SPACES if name not in TABLES]
LLAMA = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
OLMOE = {"model_type": "olmoe", "hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4}


def shape_for(space: str, layers: int = 8, *, base: str = "") -> ModelShape:
    """Of a space for any base a dense one, unless `base` says moe."""
    base = base or plugins.load("spaces", space, "space").BASE
    sizes = {"num_hidden_layers": layers, "vocab_size": 64}
    if base == "moe":
        return shape_from_config(OLMOE | sizes | {"num_experts": 16, "num_experts_per_tok": 2}, name="moe")
    return shape_from_config(LLAMA | sizes | {"num_key_value_heads": 4}, name="dense")


def problem_of(name: str, layers: int = 8, *, base: str = "", **changes: Any) -> Problem:
    shape = shape_for(name, layers, base=base)
    space = load_space(name, shape)
    kinds = {plugins.load("allocators", a).NEEDS for a in space.ALLOCATORS} - {None}
    signals = {kind: placeholder(kind, shape) for kind in kinds}
    return Problem(space=space, shape=shape, model=shape.name, task="t", signals=signals, **changes)


def test_the_published_methods_all_have_their_space() -> None:
    assert set(SEARCHED) >= {"sieve", "alphalora", "mola", "lora_smoe", "dense"}
    assert set(TABLES) >= {"sieve_ablation", "alphalora_table", "smoe_table", "dense_table"}


@pytest.mark.parametrize(("name", "base"), [*((name, "") for name in SPACES), ("ranks", "moe")])
def test_every_corner_of_a_space_is_an_allocation_or_says_why_not(name: str, base: str) -> None:
    problem, resolved = problem_of(name, base=base), set()
    for high in (False, True):
        for point, _ in corners(problem, high=high):
            try:
                trial, params = problem.resolve(point)
            except InfeasibleError:
                continue
            assert params == trial.allocation.trainable_params(problem.shape, rank=trial.recipe.rank) > 0
            resolved.add(point.allocator)
    assert resolved == set(problem.space.ALLOCATORS)


@pytest.mark.parametrize(("name", "base"), [*((name, "") for name in SEARCHED), ("ranks", "moe")])
@pytest.mark.parametrize("layers", [4, 7, 32])
def test_starting_points_lie_on_the_grid_and_are_proposed_as_they_stand(name: str, base: str, layers: int) -> None:
    problem = problem_of(name, layers, base=base)
    proposer = Proposer(problem)
    expected = problem.space.starting_points(problem.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Optuna warns of a value outside its distribution, and draws another
        proposals = [next_proposal(proposer) for _ in expected]
    for point, proposal in zip(expected, proposals, strict=True):
        assert {key: proposal.params[key] for key in point} == pytest.approx(point)


@pytest.mark.parametrize("name", SPACES)
def test_the_data_sheet_asks_a_question_and_names_every_knob(name: str) -> None:
    problem = problem_of(name)
    sheet = problem.space.__doc__
    assert sheet is not None
    assert "?" in sheet.split("\n\n")[0]
    assert f"python -m search.run space={name}" in sheet
    for knob in {knob for _, params in corners(problem) for knob in params}:
        assert knob in sheet, knob


@pytest.mark.parametrize("name", [s for s in SEARCHED if plugins.load("spaces", s, "space").BASE == "dense"])
def test_the_controls_have_the_parameters_of_the_method(name: str) -> None:
    """At the starting points, uniform and random cost the same; so does every method that takes the same T."""
    proposer = Proposer(problem_of(name))
    first = [next_proposal(proposer) for _ in range(len(problem_of(name).space.starting_points(shape_for(name))))]
    costs = {p.trial.allocator: p.trainable_params for p in reversed(first)}  # the paper's recipe comes last
    assert costs["uniform"] == costs["random"]
    for allocator in {"alphalora", "sensitivity", "mola"} & set(costs):
        assert costs[allocator] == costs["uniform"]


@pytest.mark.parametrize("base", ["dense", "moe"])
@pytest.mark.parametrize("fixed", [{}, {"rank": 6}])
def test_rules_for_ranks_start_at_equal_parameters_and_the_recipes_rank_is_the_budget(
    base: str, fixed: dict[str, Any]
) -> None:
    """Equal to a rank of the smallest matrices; domlora, which has one matrix, apart."""
    problem = problem_of("ranks", base=base, fixed_recipe=fixed)
    proposer = Proposer(problem)
    first = [next_proposal(proposer) for _ in problem.space.starting_points(problem.shape)]
    assert {p.trial.recipe.rank for p in first} == {fixed.get("rank", TRANSFERABLE["rank"])}
    costs = {p.trial.allocator: p.trainable_params for p in first}
    assert set(costs) == set(problem.space.ALLOCATORS)
    uniform = uniform_ranks.allocate(None, problem.shape, rank=first[0].trial.recipe.rank)
    assert first[0].trial.allocation == uniform
    budget = costs.pop("uniform_ranks")
    assert budget == uniform.trainable_params(problem.shape)
    assert costs.pop("domlora") < 0.06 * budget
    assert all(0.99 * budget < cost <= budget for cost in costs.values())


def test_a_repeat_of_ranks_keeps_them_or_draws_anew_at_the_same_rank() -> None:
    problem = problem_of("ranks")
    row = problem.resolve(Point("random_ranks", {}, {"rank": 5}))[0]
    assert problem.repeat(row, 3).allocation == row.allocation
    each = problem.resolve(Point("random_ranks", {"draw": "each"}, {"rank": 5}))[0]
    others = {problem.repeat(each, seed).allocation for seed in range(1, 5)}
    assert len(others) == 4
    budget = uniform_ranks.allocate(None, problem.shape, rank=5).trainable_params(problem.shape)
    assert all(0.99 * budget < a.trainable_params(problem.shape, rank=5) <= budget for a in others)


def test_trainings_of_ranks_that_each_seed_draws_anew_say_their_own_size() -> None:
    problem = problem_of("ranks_table")
    trainings, _ = table_trainings(problem, trials=100, seeds=3)
    sizes: dict[str, set[int]] = {}
    for each in trainings:
        trial = each.trial
        assert each.trainable_params == trial.allocation.trainable_params(problem.shape, rank=trial.recipe.rank)
        sizes.setdefault(trial.point, set()).add(each.trainable_params)
    assert any(len(of_a_row) > 1 for of_a_row in sizes.values())


# --- tables: fixed grids


def rows_of(name: str, layers: int = 8, **changes: Any) -> list[Proposal]:
    return [row for row in table_rows(problem_of(name, layers, **changes), merge=False) if isinstance(row, Proposal)]


def named(row: dict[str, Any], proposals: list[Proposal]) -> list[Proposal]:
    return [p for p in proposals if row.items() <= p.params.items()]


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("layers", [4, 7, 32])
def test_every_row_of_a_table_can_be_trained_and_has_a_name_of_its_own(name: str, layers: int) -> None:
    everything = table_rows(problem_of(name, layers), merge=False)
    rows = [row for row in everything if isinstance(row, Proposal)]
    assert rows == everything, "every combination of knobs is an allocation"
    assert len({tuple(sorted(row.params.items())) for row in rows}) == len(rows) > 1
    assert {row.trial.allocator for row in rows} == set(problem_of(name).space.ALLOCATORS)
    named = {tuple(row.params.get(name) for name in ("rank", "scaled_rate", "recipe")) for row in rows}
    assert len({row.trial.recipe for row in rows}) == len(named), "what rows do not name is the same in all of them"
    assert problem_of(name).space.SEEDS > 1


@pytest.mark.parametrize("name", TABLES)
def test_what_a_table_says_about_its_paper_names_single_rows(name: str) -> None:
    rows, said = rows_of(name), facts(problem_of(name).space)
    assert said["comparisons"]
    for comparison in said["comparisons"]:
        assert len(named(comparison["first"], rows)) == len(named(comparison["second"], rows)) == 1, comparison
        assert comparison["first"] != comparison["second"]
    assert len({comparison["name"] for comparison in said["comparisons"]}) == len(said["comparisons"])
    for entry in said["published"]:
        assert len(named(entry["row"], rows)) == 1, entry
        assert 0 < entry["accuracy"] < 1
        assert "arXiv" in entry["source"]


@pytest.mark.parametrize(
    ("name", "exact"), [("sieve_ablation", ("sieve", "random", "greedy")), ("alphalora_table", ("mola", "alphalora"))]
)
def test_rows_of_one_budget_cost_the_same(name: str, exact: tuple[str, ...]) -> None:
    knob = {"sieve_ablation": "fraction", "alphalora_table": "experts_per_layer"}[name]
    budgets: dict[float, set[int]] = {}
    for row in named({"recipe": "paper"}, rows_of(name)):
        if row.trial.allocator in (*exact, "uniform"):
            budgets.setdefault(row.params[knob], set()).add(row.trainable_params)
    assert len(budgets) == 3
    assert {len(costs) for costs in budgets.values()} == {1}


@pytest.mark.parametrize("layers", [4, 8, 30])
@pytest.mark.parametrize("recipe_name", list(RECIPES))
def test_every_rule_of_the_dense_table_gets_uniforms_parameters(layers: int, recipe_name: str) -> None:
    rows, shape = named({"recipe": recipe_name}, rows_of("dense_table", layers)), shape_for("dense_table", layers)
    near = {"lora_smoe"} | ({"mola"} if layers % 4 else set())  # a layout of four groups does not divide 30 layers
    (budget,) = {row.trainable_params for row in rows if row.trial.allocator not in near}
    assert all(abs(r.trainable_params / budget - 1) < 0.03 for r in rows if r.trial.allocator == "mola")
    (n,) = {row.trial.knobs["experts_per_block"] for row in rows if row.trial.allocator == "lora_smoe"}
    recipe = rows[0].trial.recipe

    def kept(each: int) -> float:
        everywhere = ExpertCounts({b.path: each for b in blocks(shape)}, gating="hydra")
        return 0.6 * everywhere.trainable_params(shape, rank=recipe.rank)

    assert kept(n) <= budget < kept(n + 1)


def test_the_papers_budgets_are_met_at_the_papers_depth() -> None:
    rows = named({"recipe": "paper"}, rows_of("alphalora_table", 32))
    totals = {r.trial.knobs["total_experts"] for r in rows if "total_experts" in r.trial.knobs}
    assert totals == {80, 160, 224}
    layouts = {
        r.trial.knobs["pattern"]: r.trainable_params
        for r in rows
        if "pattern" in r.params or "pattern" in r.trial.knobs
    }
    uniform = {r.trial.knobs["total_experts"]: r.trainable_params for r in rows if r.trial.allocator == "uniform"}
    assert layouts == {"1234": uniform[80], "2468": uniform[160], "4-6-8-10": uniform[224]}


def test_a_row_of_random_experts_draws_anew_for_every_seed_and_costs_the_same() -> None:
    problem = problem_of("sieve_ablation")
    rows = named({"recipe": "tuned"}, rows_of("sieve_ablation"))
    (row,) = named({"allocator": "random", "fraction": 0.25}, rows)
    repeats = [problem.repeat(row.trial, seed) for seed in range(1, 5)]
    assert problem.repeat(row.trial, problem.seed) == row.trial
    assert len({trial.allocation for trial in [row.trial, *repeats]}) == 5
    assert {t.allocation.trainable_params(problem.shape, rank=t.recipe.rank) for t in repeats} == {row.trainable_params}
    (hot,) = named({"allocator": "sieve", "fraction": 0.25, "score": "count"}, rows)
    assert problem.repeat(hot.trial, 3).allocation == hot.trial.allocation
    assert problem.repeat(hot.trial, 3).seed == 3


def test_pins_keep_some_rows_of_a_table() -> None:
    kept = rows_of("sieve_ablation", pins={"fraction": 0.25})
    assert {row.params.get("fraction", 0.25) for row in kept} == {0.25}
    assert {row.trial.allocator for row in kept} == set(problem_of("sieve_ablation").space.ALLOCATORS)


def test_rows_that_come_to_the_same_are_trained_once() -> None:
    """Under flat routing the experts with the most tokens are those with the most gate weight."""
    rows = table_rows(problem_of("sieve_ablation"))
    answered = [row for row in rows if not isinstance(row, Proposal)]
    trained = {row.trial.digest for row in rows if isinstance(row, Proposal)}
    assert {row.reason for row in answered} == {"duplicate"}
    assert {row.digest for row in answered} <= trained


# --- coordinates of the recipe


@pytest.mark.parametrize("name", SEARCHED)
def test_rank_alpha_and_the_scaled_rate_are_independent_and_the_learning_rate_follows(name: str) -> None:
    problem, seen = problem_of(name), []
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    for _ in range(200):
        point, params = problem.ask(study.ask())
        recipe = problem.resolve(point)[0].recipe
        assert recipe.scaled_rate == pytest.approx(params["scaled_rate"])
        seen.append([math.log(value) for value in (recipe.rank, recipe.lora_alpha, recipe.scaled_rate)])
    correlations = np.corrcoef(np.array(seen).T)[np.triu_indices(3, 1)]
    assert np.abs(correlations).max() < 0.25
    ranks = {round(math.exp(rank)) for rank, _, _ in seen}
    assert 1 in ranks
    assert max(ranks) > 24


@given(st.integers(1, 32), st.floats(8, 256), st.floats(5e-4, 0.5))
def test_the_scaled_rate_of_a_recipe_is_what_was_asked_whatever_the_alpha(rank: int, alpha: float, rate: float) -> None:
    recipe = make_recipe({"learning_rate": 1.0}, {"rank": rank, "lora_alpha": alpha, "scaled_rate": rate})
    assert recipe.learning_rate == rate / alpha
    assert recipe.scaled_rate == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(
    ("fixed", "expected"),
    [
        ({"learning_rate": 1e-3}, {"learning_rate": 1e-3}),
        ({"lora_alpha": 12.5}, {"lora_alpha": 12.5}),
        ({"scaled_rate": 0.1, "lora_alpha": 10.0}, {"learning_rate": 0.01}),
    ],
)
def test_a_fixed_setting_holds_for_every_point_and_for_what_the_sampler_is_told(
    fixed: dict[str, float], expected: dict[str, float]
) -> None:
    config = parse(["space=sieve", "trials=8", *(f"recipe.{name}={value}" for name, value in fixed.items())])
    proposer = Proposer(prepare_training(config), sampler="random")
    for proposal in [next_proposal(proposer) for _ in range(8)]:
        recipe = proposal.trial.recipe
        assert {name: getattr(recipe, name) for name in expected} == pytest.approx(expected)
        assert proposal.params["scaled_rate"] == pytest.approx(recipe.scaled_rate)
        assert proposal.params["lora_alpha"] == recipe.lora_alpha


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["space.learning_rate=1e-3"],
            "space=sieve does not propose learning_rate: recipe.learning_rate=0.001 fixes it",
        ),
        (["recipe.learning_rate=1e-3", "recipe.scaled_rate=0.1"], "say the same: give one of them"),
        (["recipe.scaled_rate=0"], "recipe.scaled_rate must be positive"),
        (["recipe.scaled_rate=fast"], "recipe.scaled_rate must be a finite number"),
    ],
)
def test_a_rate_that_cannot_be_is_said_in_one_line(words: list[str], said: str) -> None:
    with pytest.raises(StudyError) as error:
        prepare(parse(["space=sieve", *words]))
    assert said in str(error.value)


def test_what_a_task_or_the_command_line_suggests_is_where_a_search_starts() -> None:
    def first(**changes: Any) -> Recipe:
        return next_proposal(Proposer(problem_of("sieve", **changes))).trial.recipe

    transferable = make_recipe(TRANSFERABLE)
    assert first() == transferable
    assert first(task_recipe={"steps": 9}) == replace(transferable, steps=9)
    assert first(task_recipe={"rank": 2}) == replace(transferable, rank=2)
    assert first(task_recipe={"learning_rate": 1e-3}) == replace(make_recipe({}), learning_rate=1e-3)


def test_a_rate_that_no_number_holds_is_said_and_never_reaches_a_record() -> None:
    with pytest.raises(StudyError, match=r"recipe\.learning_rate must be a finite number"):
        make_recipe({"lora_alpha": 1e-320, "scaled_rate": 0.1})
