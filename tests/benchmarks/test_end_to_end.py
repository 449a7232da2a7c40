"""What the end-to-end benchmark computes from its measurements, and that its plain way trains what it says.

python -m pytest tests/benchmarks/test_end_to_end.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allocators.core.errors import StudyError
from allocators.core.types import ExpertSelection, ModelShape, Recipe, Trial
from search import replay
from search.propose.candidates import Known
from tests.benchmarks import end_to_end
from tests.benchmarks.end_to_end import (
    RANKS,
    RATES,
    Cost,
    Ended,
    Judged,
    Log,
    Settings,
    cost_factors,
    parse,
    product,
    search_factors,
    shares_of,
    spaced,
    spread,
    times_less,
)
from tests.benchmarks.optimism import Judge, Place
from tests.benchmarks.search_tables import ALL, Asker, Covered, Rung, Table, simulate
from tests.trainers.reference import (
    every_expert,
    from_peft,
    peft_factors,
    shape_of_model,
    some_experts,
    tiny_model,
    tokens,
)


def test_factors_of_a_training_multiply_to_plain_against_ours() -> None:
    costs = {"plain": [Cost(40, 30)], "peft": [Cost(10, 10)], "lm-eval": [Cost(8, 8)]}
    costs |= {"ours": [Cost(4, 5)], "packed": [Cost(5, 4)]}
    wall, cpu = cost_factors(costs, "wall"), cost_factors(costs, "cpu")
    assert {name: value[0] for name, value in wall.items()} == {
        "warm_workers": 4.0,
        "adapters": 1.25,
        "evaluation": 2.0,
        "packing": 0.8,
    }
    assert product(wall, without=["packing"]) == 40 / 4
    assert product(wall) == pytest.approx(40 / 5)
    assert product(cpu) == pytest.approx(30 / 4)


def test_factors_of_the_search_are_medians_of_pairs() -> None:
    trainings = {"nsga2+repeats": [90.0, 40.0, 60.0], "nsga2": [45.0, 40.0, 20.0], "ehvi": [15.0, 10.0, 10.0]}
    found = search_factors(trainings | {"ehvi+halving": [30.0, 20.0, 5.0]})
    assert found["dedupe"] == (2.0, 1.5, 2.5)
    assert found["sampler"] == (3.0, 2.5, 3.5)
    assert found["halving"][0] == 0.5
    assert product(found, without=["halving"]) == 6.0


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=30))
def test_a_median_lies_between_its_quartiles_and_those_between_the_ends(values: list[float]) -> None:
    inner, outer = spread(values, quartiles=True), spread(values, quartiles=False)
    assert outer[1] <= inner[1] + 1e-9
    assert inner[1] <= inner[0] + 1e-9
    assert inner[0] <= inner[2] + 1e-9
    assert inner[2] <= outer[2] + 1e-9
    assert inner[0] == outer[0]


@given(st.integers(1, 9))
def test_points_are_spread_from_small_to_large(count: int) -> None:
    rows = [(str(n), 10 * n) for n in range(9)]
    chosen = spaced(rows[::-1], count)
    assert len(set(chosen)) == count
    assert chosen == sorted(chosen, key=lambda row: row[1])
    assert spaced(rows, 1) == [("4", 40)]


def small_table() -> Table:
    """Four points of a front, of which b covers two thirds of what there is and c the rest; the ends cover nothing."""
    judged = {"a": (0.0, 0.0), "b": (0.4, 1.0), "c": (0.8, 2.0), "d": (1.0, 3.0)}

    def suggest(trial: Any) -> Known:
        key = trial.suggest_categorical("key", list(judged))
        return Known(key, 1 + "abcd".index(key))

    return Table("small", suggest, lambda key: [Rung(1, 1.0, judged[key][0])], lambda key: 1.0, judged)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_repeat_costs_a_training_only_where_it_is_trained_again(workers: int) -> None:
    table = small_table()
    once = simulate(table, "random", 3, evaluations=30, workers=workers)["finished"]
    again = simulate(table, "random+repeats", 3, evaluations=30, workers=workers)["finished"]
    assert sorted(key for _, key in once) == ["a", "b", "c", "d"]
    assert len(again) == 30
    assert [budget for budget, _ in again] == [float(n) for n in range(1, 31)]


def test_a_search_may_end_when_enough_is_covered() -> None:
    table, covered = small_table(), Covered(small_table())
    found = simulate(table, "random+repeats", 0, evaluations=100, until=0.95)["finished"]
    shares = [covered.add(key) for _, key in found]
    assert shares[-1] == pytest.approx(1.0)
    assert all(share < 0.7 for share in shares[:-1])
    assert {"b", "c"} <= {key for _, key in found}


def test_results_of_equal_points_under_way_at_once_reach_their_own_trials() -> None:
    import optuna

    asker = Asker(small_table(), lambda _, seed: optuna.samplers.RandomSampler(seed=seed), 0, repeats="ever")
    runs = [run for _ in range(12) if (run := asker.propose()) is not None]
    assert len(set(runs)) == 12
    assert len({asker.rows[run] for run in runs}) < 12
    for run in runs:
        asker.tell(run, Rung(1, 1.0, 0.5))


@pytest.mark.parametrize("choose", [some_experts, every_expert])
def test_the_plain_way_trains_the_chosen_experts_and_counts_them(
    choose: Callable[[ModelShape], ExpertSelection],
) -> None:
    model = tiny_model("olmoe")
    shape = shape_of_model(model)
    recipe = Recipe(rank=2, lora_alpha=4.0, steps=1)
    allocation = choose(shape)
    trial = Trial(allocation, recipe, "tiny", "default", 0)
    with end_to_end.peft_adapter(model, shape, trial) as adapter:
        shared = sum(len(ids) for ids in allocation.experts.values()) * recipe.rank * 32  # one A for gate and up
        assert adapter.num_trained == allocation.trainable_params(shape, rank=recipe.rank) - shared
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1, weight_decay=0.0)
        started = {
            name: (a.detach().clone(), b.detach().clone()) for name, (a, b) in peft_factors(adapter.wrapped).items()
        }
        for _ in range(2):
            optimizer.zero_grad()
            model(tokens()).logits.square().mean().backward()
            optimizer.step()
        adapted = set()
        for stack, (a, b) in peft_factors(adapter.wrapped).items():
            if "experts" not in stack:
                continue
            layer = int(stack.split(".")[2])
            adapted.add(layer)
            ids = set(allocation.in_layer(layer))
            before = from_peft(stack, *started[stack], rank=2)
            for name, value in from_peft(stack, a.detach(), b.detach(), rank=2).items():
                moved = {e for e in range(8) if not torch.equal(value[e], before[name][e])}
                assert moved <= ids, name
                assert moved, name
        assert adapted == set(allocation.experts)
    assert not any(p.requires_grad for p in model.parameters())


def test_what_the_plain_way_trained_is_judged_from_its_files(tmp_path: Path) -> None:
    from peft import PeftModel

    model = tiny_model("olmoe")
    shape = shape_of_model(model)
    trial = Trial(some_experts(shape), Recipe(rank=2, lora_alpha=4.0, steps=1), "tiny", "default", 0)
    with end_to_end.peft_adapter(model, shape, trial) as adapter:
        for _, parameter in adapter.named_parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        trained = model(tokens()).logits.detach()
        adapter.wrapped.save_pretrained(str(tmp_path))
    base = model(tokens()).logits.detach()
    wrapped = PeftModel.from_pretrained(model, str(tmp_path))
    again = model(tokens()).logits.detach()
    wrapped.unload()
    torch.testing.assert_close(again, trained)
    assert not torch.allclose(base, trained)
    torch.testing.assert_close(model(tokens()).logits.detach(), base)


@given(seed=st.integers(0, 10**6))
def test_people_tune_rank_and_rate_and_set_alpha_to_twice_the_rank(seed: int) -> None:
    import optuna

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    asked = end_to_end.PlainSpace("tiny-moe", 0)(study.ask())
    trial = Trial.from_json(json.loads(asked["trial"]))
    assert trial.recipe.rank in RANKS
    assert trial.recipe.lora_alpha == 2 * trial.recipe.rank
    assert RATES[0] <= trial.recipe.learning_rate <= RATES[1]
    assert (trial.recipe.steps, trial.recipe.schedule) == (100, "linear")  # as the table's trainings
    assert asked["params"] > 0


def way(name: str, *seconds: float) -> Log:
    log = Log(name, Path("nowhere"))
    log.ended += [Ended(f"{n}", 10, 0.5, 100, Cost(wall, 2 * wall), "") for n, wall in enumerate(seconds)]
    return log


def test_both_ways_are_compared_at_one_share() -> None:
    ours = Judged(way("ours", 5.0, 10.0, 20.0), [0.2, 0.6, 0.9])
    plain = Judged(way("plain", 100.0, 200.0, 300.0, 400.0), [0.1, 0.5, 0.6, 0.6])
    assert times_less(plain, ours, 0.6, "same") == {
        "same_wall": 30.0,
        "same_cpu": 30.0,
        "same_trainings": 1.5,
        "same_is_lower_bound": False,
    }
    bound = times_less(plain, ours, 0.9, "real")
    assert (bound["real_wall"], bound["real_trainings"], bound["real_is_lower_bound"]) == (20.0, 1.33, True)
    assert set(times_less(plain, ours, 0.95, "front").values()) == {None}
    assert "reached after 2 trainings, 200 tokens, 10 s, 20 CPU-seconds" in ours.line(0.6)
    assert "not reached, 60.0% after 4 trainings" in plain.line(0.9)


def test_a_real_run_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    log, training = Log("plain", tmp_path / "a" / "plain.jsonl"), Ended("d", 10, None, 100, Cost(1.5, 2.5), "place")
    log.add(training)
    assert Log("plain", tmp_path / "a" / "plain.jsonl").ended == [training]


def test_trainings_that_are_no_rows_gain_nothing_outside_the_table() -> None:
    judge = Judge(replay.load("tiny-moe"))
    rows = list(judge.places.values())
    least, best = min(p.trainable_params for p in rows), max(p.accuracy or 0.0 for p in rows)
    shares = shares_of(judge, rows)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    small = judge.share_of([Place(least, 0.5)])
    assert judge.share_of([Place(1, 0.5)]) == small > 0
    assert judge.share_of([Place(least, 1.0)]) == judge.share_of([Place(least, best)])
    assert judge.share_of([Place(10 * max(p.trainable_params for p in rows), 1.0), Place(least, None)]) == 0.0


def test_every_search_that_is_replayed_is_one_that_there_is() -> None:
    assert set(end_to_end.SEARCHES) <= set(ALL)


def test_arguments_are_checked() -> None:
    assert parse(["seeds=3", "real=true"]) == Settings(seeds=3, real=True)
    with pytest.raises(StudyError, match="did you mean 'seeds'"):
        parse(["seed_s=3"])
    with pytest.raises(StudyError, match="must be true or false"):
        parse(["real=yes"])
    with pytest.raises(StudyError, match="whole number"):
        parse(["cap=many"])
