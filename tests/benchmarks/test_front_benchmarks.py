"""What benchmarks of the front say about tables whose truth is known."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import optuna
import pytest
import torch

from allocators import uniform
from allocators.core.errors import StudyError
from allocators.core.types import Recipe, Score
from search import replay
from search.config import parse
from search.replay import Row as Recorded
from search.session.prepare import prepare
from tests.benchmarks import coordinates, open_task, optimism, router_rate, transfer
from tests.search.replay.test_replay import record
from trainers import models
from trainers.adapter import attach, lora_moe
from trainers.loop.flat import FlatBuffers


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> replay.Table:
    """A small grid with three seeds; the test split is .05 below validation, whatever is trained."""
    folder = tmp_path_factory.mktemp("recorded")
    record(folder / "a", repeats=2)
    made = replay.export([folder / "a"], folder / "small.parquet")

    def tested(row: Recorded) -> Recorded:
        accuracy = row.outcome.accuracy
        score = None if accuracy is None else Score(accuracy - 0.05, 0.01)
        return replace(row, outcome=row.outcome.updated(test=score))

    return replace(made, rows={digest: tested(row) for digest, row in made.rows.items()})


def row(allocation: str, params: int, *accuracies: float, rank: int = 4, rate: float = 0.1) -> open_task.Row:
    return open_task.Row(allocation, (rank, rate), params, dict(enumerate(accuracies)), 0.01)


def test_span_and_steps_of_a_front_by_hand() -> None:
    rows = [
        row("none", 100, 0.30, 0.32),
        row("sieve", 200, 0.50, 0.52),
        row("sieve", 200, 0.40, 0.42, rate=0.2),
        row("random", 300, 0.51, 0.53),
        row("all", 400, 0.80, 0.82),
        row("all", 400, 0.90, 0.92, rate=0.2),
    ]
    assert open_task.best_recipe(rows) == (4, 0.2)  # of .41 and .91; the other has .31, .51, .52 and .81
    assert open_task.span([r for r in rows if r.recipe == (4, 0.1)]) == pytest.approx(0.5)
    assert open_task.span(rows) == pytest.approx(0.6)
    apart = open_task.steps(rows)
    assert [(r.allocation, r.trainable_params) for r in apart] == [("none", 100), ("sieve", 200), ("all", 400)]
    assert apart[-1].accuracy == pytest.approx(0.91)
    assert open_task.seed_variance(rows) == pytest.approx(0.0002)


def test_seeds_agree_where_they_rank_alike() -> None:
    alike = [row("a", 100 * n, 0.1 * n, 0.1 * n + 0.03) for n in range(1, 7)]
    against = [row("a", 100 * n, 0.1 * n, 0.9 - 0.1 * n) for n in range(1, 7)]
    assert open_task.agreement(alike) == pytest.approx(1.0)
    assert open_task.agreement(against) == pytest.approx(-1.0)
    assert open_task.agreement([row("a", 100, 0.5)]) is None


def test_the_best_rate_is_found_where_it_is_planted() -> None:
    peak = {0.05: 0.4, 0.1: 0.6, 0.2: 0.5}
    cells = {(name, rank, rate): a + 0.01 * rank for name in "ab" for rank in (1, 4) for rate, a in peak.items()}
    ratios = transfer.summary("t", cells)
    assert {ratios[f"t/best_rate/{what}"] for what in ("rank=1", "rank=4", "a", "b")} == {0.1}
    assert ratios["t/lost_by_one_rate/max"] == 0.0
    assert ratios["t/lost_by_worst_rate/mean"] == pytest.approx(0.2)
    assert ratios["t/power_of_rank"] == pytest.approx(0.0)


def test_the_power_of_the_rank_is_found_where_it_is_planted() -> None:
    rates = [0.05, 0.1, 0.2, 0.4]
    cells = {
        (name, rank, rate): 0.9 - 0.1 * math.log(rate / (0.08 * rank**0.25)) ** 2
        for name in "ab"
        for rank in (1, 4, 16)
        for rate in rates
    }
    assert transfer.power_of_rank(cells) == pytest.approx(0.25)
    assert transfer.best_between(cells, "a", 16) == pytest.approx(0.16)
    assert transfer.power_of_rank({cell: a for cell, a in cells.items() if cell[1] == 4}) is None


def test_a_table_that_is_no_full_grid_is_refused(table: replay.Table) -> None:
    some = next(row for row in table.rows.values() if row.outcome.trial.recipe.rank == 4)
    point = some.outcome.trial.point
    holes = {d: row for d, row in table.rows.items() if row.outcome.trial.point != point}
    assert transfer.cells_of(table)
    with pytest.raises(StudyError, match="no full grid"):
        transfer.cells_of(replace(table, rows=holes))


@pytest.mark.parametrize("variant", optimism.VARIANTS)
def test_the_gap_between_the_splits_is_what_was_planted(table: replay.Table, variant: str) -> None:
    found = optimism.study(optimism.Judge(table), number=1, trials=8, variant=variant)
    assert found.optimism == pytest.approx(0.05)
    assert 0 < found.share <= 1
    assert found.trainings >= 8
    assert optimism.Judge(table).unselected == pytest.approx(0.05)


def test_a_front_that_has_everything_has_the_whole_share(table: replay.Table) -> None:
    every = len({row.outcome.trial.point for row in table.rows.values()})
    found = optimism.study(optimism.Judge(table), number=0, trials=every, variant="once")
    assert found.share > 0.97  # seeds differ by .01, and with them which of two equal points is reported


def test_the_steps_of_a_router_alone_are_multiplied() -> None:
    """As AdamW to the bit where the factor is 1, no step where it is 0, three times as far where it is 3."""

    def stepped(factors: list[float] | None) -> torch.Tensor:
        values = torch.nn.Parameter(torch.linspace(-1, 1, 4))
        values.grad = torch.tensor([0.3, -0.2, 0.1, 0.4])
        with router_rate.steps_times(torch.tensor(factors)) if factors else nullcontext():
            torch.optim.AdamW([values], lr=0.01, weight_decay=0.0).step()
        return values.detach()

    start, plain = torch.linspace(-1, 1, 4), stepped(None)
    assert torch.equal(stepped([1.0, 1.0, 1.0, 1.0]), plain)
    torch.testing.assert_close(stepped([0.0, 1.0, 3.0, 0.5]) - start, (plain - start) * torch.tensor([0, 1, 3, 0.5]))


def test_routers_are_found_in_the_flat_buffer() -> None:
    """The last row for each expert of every `down`; parts begin at multiples of 16 numbers, as the loop lays them."""
    model = models.load("tiny-dense").model
    shape = models.shape_of("tiny-dense")
    allocation = uniform.allocate(None, shape, total_experts=2 * shape.num_layers)
    adapter = attach(model, allocation, shape=shape, lora=Recipe(rank=3).lora, seed=0)
    assert isinstance(adapter, lora_moe.LoraMoeAdapter)
    flat = FlatBuffers(adapter.parameters())
    factors = router_rate.factor_of_every_number(adapter, 0.25)
    assert factors.shape == flat.values.shape
    for (name, _), view in zip(adapter.named_parameters(), flat.views(factors), strict=True):
        router = view[-2:] if name.endswith(".down") else view[:0]
        assert (router == 0.25).all()
        assert (view == 0.25).sum() == router.numel()
    adapter.detach()


def test_the_papers_coordinates_are_the_same_search_with_another_recipe() -> None:
    words = coordinates.SIDES["papers"]
    _, old = prepare(parse(words))
    _, new = prepare(parse(coordinates.SIDES["ours"]))
    for seed in range(20):
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
        trial = study.ask()
        point, params = old.ask(trial)
        assert point.recipe["lora_alpha"] == 2 * point.recipe["rank"] >= 8
        assert {"rank", "learning_rate"} <= params.keys()
        assert "scaled_rate" not in params
        same, _ = new.ask(optuna.trial.FixedTrial(params | {"rank": 4, "lora_alpha": 64.0, "scaled_rate": 0.1}))
        assert (same.allocator, same.knobs) == (point.allocator, point.knobs)


def test_gain_is_of_pairs_alone(capsys: pytest.CaptureFixture[str]) -> None:
    shares = {"papers": {0: 0.5, 1: 0.7}, "ours": {0: 0.9, 1: 0.9, 2: 0.1}}
    ratios = coordinates.report(shares, {"papers": {0: 0.5, 1: 0.5}, "ours": {0: 0.0, 1: 0.0, 2: 0.0}})
    assert (ratios["gain"], ratios["gain_error"]) == (pytest.approx(0.3), pytest.approx(0.1))
    assert (ratios["papers"], ratios["ours"], ratios["papers_broken"]) == (0.6, pytest.approx(0.6333, abs=1e-4), 0.5)
    assert "2 pairs: +0.300 ± 0.100" in capsys.readouterr().out
