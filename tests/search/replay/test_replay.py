"""Recorded trainings: what a table keeps and what a study against it proposes."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocators.core.errors import InfeasibleError, StudyError
from allocators.core.types import Outcome, Rung, Trial, canonical_json
from search import replay
from search.problem import Problem, corners
from search.propose.candidates import resolver
from search.propose.sampler import Proposer
from search.records import read
from search.records.folder import StudyFolder
from search.replay import export
from search.replay.__main__ import main as replay_main
from search.replay.problem import _Nearest, table_problem
from search.run import main
from tests.search.propose.test_sampler import problem

FRACTIONS, RANKS, RATES = (0.125, 0.25, 0.5), (4, 16, 32), (1e-3, 1e-2)
STEPS = (10, 20, 30)
Recorded = tuple[replay.Table, Path]  # with the folder of its studies
COMMAND = "python -m search.run space=sieve storage=/home/me/studies"


def accuracy(trial: Trial, seed: int) -> float:
    """Something smooth with a seed's own noise."""
    rate = abs(math.log10(trial.recipe.learning_rate) + 2.5)
    return round(0.3 + 0.01 * trial.allocation.total_experts + 0.002 * trial.recipe.rank - 0.1 * rate + 0.01 * seed, 4)


def grid() -> list[dict[str, Any]]:
    recipes = [{"rank": rank, "lora_alpha": 16.0, "scaled_rate": 16 * rate} for rank in RANKS for rate in RATES]
    points: list[dict[str, Any]] = [{"allocator": "all"}, {"allocator": "none"}]
    points += [{"allocator": "random", "fraction": fraction} for fraction in FRACTIONS]
    points += [{"allocator": "sieve", "fraction": fraction, "score": "count"} for fraction in FRACTIONS]
    return [point | recipe for point in points for recipe in recipes]


def record(folder: Path, *, seed: int = 0, points: list[dict[str, Any]] | None = None, repeats: int = 0) -> None:
    """A study of the grid as a worker would leave it; every fifth training diverges."""
    asked = problem(seed=seed)
    identity = {"space": "sieve", "model": "small", "task": "t", "seed": seed, "evaluations": 3, "limit": 0}
    with StudyFolder.open(folder, config=identity, identity=identity, shape=asked.shape, command=COMMAND) as study:
        (folder / "signals").mkdir(exist_ok=True)
        (folder / "signals" / "routing.json").write_text(json.dumps(asked.signals["routing"].to_json()))
        for number, params in enumerate(points or grid()):
            point, _ = asked.ask(optuna.trial.FixedTrial(params))
            first, cost = asked.resolve(point)
            for of in range(seed, seed + repeats + 1):
                trial = asked.repeat(first, of)
                diverged = number % 5 == 4
                curve = [0.5, 0.8, 1.0][: 1 if diverged else 3]
                reached = [(step, accuracy(trial, of) * share) for step, share in zip(STEPS, curve, strict=False)]
                rungs = tuple(
                    Rung(step, 100 * step * (1 + number % 3), at, 0.01, 1.0, eval_loss=2.0 - at, seconds=1.0 * step)
                    for step, at in reached
                )
                outcome = Outcome(trial, "diverged" if diverged else "complete", cost, rungs=rungs, seconds=30.0)
                outcome = outcome.updated(tokens=rungs[-1].tokens, versions={"torch": "2"}, adapter="adapters/x")
                if not diverged:
                    outcome = outcome.updated(accuracy=accuracy(trial, of))
                study.append_finished(outcome, params)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    folder = tmp_path_factory.mktemp("recorded")
    record(folder / "a", seed=0, repeats=1)
    record(folder / "b", seed=2)
    return export([folder / "a", folder / "b"], folder / "small.parquet"), folder


SHIPPED = sorted(replay.SHIPPED.glob("*.parquet"))


@pytest.mark.parametrize("name", [file.stem for file in SHIPPED] or ["none is shipped"])
def test_a_shipped_table_is_a_full_grid_at_every_seed_and_can_be_searched(name: str) -> None:
    shipped = replay.load(name)
    points = [canonical_json(dict(row.params)) for row in shipped.rows.values()]
    assert len(shipped.seeds) > 1
    assert set(Counter(points).values()) == {len(shipped.seeds)}, "every point has every seed"
    assert all(row.outcome.status in ("complete", "diverged") for row in shipped.rows.values())
    asked = table_problem(shipped, seed=0)
    plain = Problem(**{f.name: getattr(asked, f.name) for f in fields(Problem)})
    trials = [plain.resolve(point)[0] for point, _ in corners(plain)]
    found = {plain.repeat(trial, seed).digest for trial in trials for seed in shipped.seeds}
    assert found == set(shipped.rows), "the space is recorded, all of it"
    proposer = Proposer(asked, sampler="random")  # any branch may come after any other
    for _ in range(15):
        proposal = proposer.propose()
        assert proposal is not None
        proposer.tell(shipped.rows[proposal.trial.digest].outcome)
    texts = json.dumps([shipped.about, *(row.outcome.to_json() for row in shipped.rows.values())])
    assert not re.search(r"[\"\s=]/\w+/", texts), "no folder of the machine that recorded it"


def test_a_table_names_no_folder_of_the_machine_that_made_it(tmp_path: Path) -> None:
    record(tmp_path / "study")
    export([tmp_path / "study"], tmp_path / "t.parquet")
    about = replay.load(str(tmp_path / "t.parquet")).about
    assert about["studies"][0]["command"] == "python -m search.run space=sieve"
    assert "/home/me" not in json.dumps(about)


def test_a_table_holds_every_training_with_its_parameters_and_curve(table: Recorded) -> None:
    made, folder = table
    assert made.seeds == [0, 1, 2]
    assert len(made.rows) == 3 * len(grid())
    assert {row.study_seed for row in made.rows.values()} == {0, 2}
    for seed, name in ((0, "a"), (1, "a"), (2, "b")):
        records = read(folder / name)
        for digest, outcome in records.finished.items():
            row = made.rows[digest]
            assert dict(row.params) == records.params_of(digest)
            assert row.outcome == outcome.updated(adapter="")
        assert sum(row.outcome.trial.seed == seed for row in made.rows.values()) == len(grid())
    assert made.values["rank"] == list(RANKS)
    assert made.values["allocator"] == ["all", "none", "random", "sieve"]
    assert (folder / "small.parquet").stat().st_size < 100_000


def test_every_row_is_found_again_by_its_parameters_whatever_its_seed(table: Recorded) -> None:
    made, _ = table
    for seed in made.seeds:
        asked = table_problem(made, seed=seed)
        for row in made.rows.values():
            if row.outcome.trial.seed == seed:
                point, params = asked.ask(optuna.trial.FixedTrial(dict(row.params)))
                trial, cost = asked.resolve(point)
                assert made.rows[trial.digest].outcome.accuracy == row.outcome.accuracy
                assert cost == row.outcome.trainable_params
                assert params == dict(row.params)


@pytest.mark.parametrize(("sampler", "seed"), [("ehvi", 0), ("tpe", 1)])
def test_only_rows_of_the_table_are_proposed_and_in_the_end_all_of_a_seed(
    table: Recorded, sampler: str, seed: int
) -> None:
    made, _ = table
    pins = {"allocator": "sieve", "scaled_rate": 16 * RATES[0]}
    proposer, found = Proposer(table_problem(made, seed=seed, pins=pins), sampler=sampler), set()
    while (proposal := proposer.propose()) is not None:
        row = made.rows[proposal.trial.digest]
        assert row.outcome.trial.seed == seed
        assert all(proposal.params[name] == value for name, value in row.params.items())
        found.add(proposal.trial.digest)
        proposer.tell(row.outcome)
    assert len(found) == len(FRACTIONS) * len(RANKS)


def test_a_point_is_tried_again_with_the_seeds_that_the_table_has_of_it(table: Recorded) -> None:
    made, _ = table
    pins = {"allocator": "sieve", "fraction": FRACTIONS[0], "lora_alpha": 16, "scaled_rate": 16 * RATES[0]}
    proposer, found = Proposer(table_problem(made, seed=1, pins=pins), repeats=True), []
    while (proposal := proposer.propose()) is not None:
        found.append((proposal.trial.recipe.rank, proposal.trial.seed))
        proposer.tell(made.rows[proposal.trial.digest].outcome)
    assert sorted(found) == [(rank, seed) for rank in RANKS for seed in made.seeds]
    of_rank_4 = [seed for rank, seed in found if rank == 4]
    assert of_rank_4 == [1, 2, 0], "its own, those after it, those before it"


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["scheduler=pareto_halving"]])
def test_a_study_whose_sampler_decides_about_repeats_goes_on_where_it_was(
    table: Recorded, tmp_path: Path, more: list[str]
) -> None:
    _, folder = table
    words = [f"replay={folder / 'small.parquet'}", "seeds=auto", f"storage={tmp_path}", "name=auto", *more]
    for trials in (25, 40):
        assert main([*words, f"trials={trials}"]) == 0
        records = read(tmp_path / "auto")
        assert len(records.finished) == trials
    repeats = [outcome for outcome in records.finished.values() if outcome.trial.seed != 0]
    assert repeats
    assert all(outcome.status != "stopped" for outcome in repeats), "repeats run to their end"


def test_a_point_that_was_not_recorded_is_refused_not_guessed(tmp_path: Path) -> None:
    record(tmp_path / "study", points=[p for p in grid() if p != grid()[-1]])
    asked = table_problem(export([tmp_path / "study"], tmp_path / "small.parquet"), seed=0)
    with pytest.raises(InfeasibleError, match="has no row for this point at seed 0"):
        asked.resolve(asked.ask(optuna.trial.FixedTrial(grid()[-1]))[0])


def test_candidates_of_the_sampler_lie_on_the_table(table: Recorded) -> None:
    made, _ = table
    asked = table_problem(made, seed=1)
    drawn = {
        "allocator": "sieve",
        "fraction": 0.1875,
        "score": "count",
        "rank": 22,
        "lora_alpha": 20.0,
        "scaled_rate": 64e-3,
    }
    known = resolver(asked)(optuna.trial.FixedTrial(drawn))
    assert known.params == drawn | {"fraction": 0.125, "rank": 16, "lora_alpha": 16.0, "scaled_rate": 0.16}


@given(st.lists(st.sampled_from([1, 2, 4, 8, 16, 64]), min_size=3, unique=True), st.integers(0, 1000))
def test_choices_among_numbers_are_drawn_as_the_ordered_parameter_that_they_are(choices: list[int], seed: int) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    trial = study.ask()
    assert _Nearest(trial, {}).suggest_categorical("experts", choices) in choices
    assert isinstance(trial.distributions["experts"], optuna.distributions.FloatDistribution)


def test_seeds_and_budgets_that_no_row_has(table: Recorded) -> None:
    made, _ = table
    with pytest.raises(StudyError, match=r"seed=7 is not in the table small: choose from 0, 1, 2"):
        table_problem(made, seed=7)
    with pytest.raises(StudyError, match=r"max_trainable_params=3 is below the smallest row"):
        table_problem(made, seed=0, max_trainable_params=3)


def test_studies_that_do_not_belong_together_and_empty_ones_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path / "a")
    record(tmp_path / "b")
    header = json.loads((tmp_path / "b" / "study.json").read_text())
    header["identity"]["task"] = "another"
    (tmp_path / "b" / "study.json").write_text(json.dumps(header))
    records = tmp_path / "a" / "outcomes.jsonl"
    before = records.read_bytes()
    assert replay_main(["export", str(tmp_path / "a"), f"to={records}"]) == 2
    assert "is not a table: it is left as it is" in capsys.readouterr().err
    assert records.read_bytes() == before
    words = ["export", str(tmp_path / "a"), str(tmp_path / "b"), f"to={tmp_path / 'x.parquet'}"]
    assert replay_main(words) == 2
    assert "differ in their identity" in capsys.readouterr().err
    (tmp_path / "a" / "outcomes.jsonl").write_text("")
    assert replay_main(["export", str(tmp_path / "a"), f"to={tmp_path / 'x.parquet'}"]) == 2
    assert "nothing to export" in capsys.readouterr().err
    assert replay_main(["export", str(tmp_path / "a")]) == 2
    assert "usage" in capsys.readouterr().err


def test_a_table_whose_parameters_are_not_those_of_its_allocations_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    record(tmp_path / "a")
    replay.export([tmp_path / "a"], tmp_path / "x.parquet")
    table = pq.read_table(tmp_path / "x.parquet")
    place = table.column_names.index("trainable_params")
    more = pa.array([count.as_py() + 7 for count in table["trainable_params"]])
    pq.write_table(table.set_column(place, "trainable_params", more), tmp_path / "more.parquet")
    with pytest.raises(StudyError, match=r"more.parquet is no table .* trainable parameters, and its allocation has"):
        replay.load(str(tmp_path / "more.parquet"))


def test_tables_that_do_not_exist_and_files_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "no.parquet").write_text("no")
    for name, said in (
        (str(tmp_path / "no.parquet"), "is no table of recorded trainings"),
        ("missing.parquet", "there is no such file"),
        ("tiny-mo", "unknown table of replay= 'tiny-mo'"),
    ):
        assert main([f"replay={name}"]) == 2
        assert said in capsys.readouterr().err


def test_settings_that_the_table_was_not_recorded_with_are_refused(
    table: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = table
    assert main([f"replay={folder / 'small.parquet'}", "evaluations=5"]) == 2
    assert "evaluations=5 is not what" in capsys.readouterr().err
    assert main([f"replay={folder / 'small.parquet'}", "recipe.steps=3"]) == 2
    assert "recipe.steps is not what" in capsys.readouterr().err


def test_a_dry_run_shows_rows_with_exact_counts(table: Recorded, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = table
    assert main([f"replay={folder / 'small.parquet'}", "dry_run=true", "trials=5"]) == 0
    shown = capsys.readouterr().out
    assert "≤" not in shown
    assert "sieve on small: 5 points" in shown


# --- through the command line


def test_a_study_against_the_table(table: Recorded, tmp_path: Path) -> None:
    made, folder = table
    words = [f"replay={folder / 'small.parquet'}", "trials=20", "max_concurrent=3", f"storage={tmp_path}", "seed=1"]
    words += ["sampler=ehvi"]
    environment = os.environ | {"COLUMNS": "150"}
    command = [sys.executable, "-m", "search.run", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing is trained: 3 simulated workers" in done.stdout
    records = read(tmp_path / "sieve-small-t-replay-small")
    assert len(records.finished) == 20
    for digest, outcome in records.finished.items():
        row = made.rows[digest].outcome
        assert (outcome.status, outcome.accuracy, outcome.rungs) == (row.status, row.accuracy, row.rungs)
        assert outcome.versions["replayed"].startswith("small ")
