"""Repeats with other seeds: who gets them, that none is trained twice, whatever is killed and asked for afterwards."""

from __future__ import annotations

import io
import random
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

import spaces.sieve_ablation
from allocators.core.types import FINISHED, Outcome, Status, Trial
from search import front as pareto
from search.config import AUTO
from search.problem import Problem, Proposal
from search.propose import RUN
from search.propose.sampler import Proposer
from search.records import Records, read
from search.records.folder import StudyFolder
from search.records.reuse import NO_OTHER_STUDIES, OtherStudies
from search.records.tracking import Tracker
from search.report.live import Progress
from search.study import Conductor, missing_repeats, table_trainings, trainings_left
from tests.search.propose.proposals import recalled
from tests.search.propose.test_sampler import problem as search_problem
from tests.search.studies import CONFIG, identity_of
from trainers import storage

TRIALS = 6


@pytest.fixture(scope="module")
def mlflow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One database for all: making its tables takes seconds."""
    return tmp_path_factory.mktemp("mlflow")


def table_problem(**changes: Any) -> Problem:
    return search_problem(space=spaces.sieve_ablation, **changes)


def accuracy_of(outcome: Outcome) -> float:
    """Better with more experts, with noise between points and between seeds: the search's pick is often a lucky one."""
    point, run = random.Random(outcome.trial.point), random.Random(outcome.digest)
    share = outcome.trial.allocation.total_experts / 48
    return round(min(max(0.4 + 0.2 * share + point.gauss(0, 0.05) + run.gauss(0, 0.08), 0), 1), 4)


def drive(
    problem: Problem,
    folder: Path,
    mlflow_folder: Path,
    *,
    seeds: int,
    trials: int = TRIALS,
    stop: int = 10**6,
    at_once: int = 2,
    end: Status = "complete",
    reuse: bool = False,
    **more: Any,
) -> tuple[list[Trial], StudyFolder, str, tuple[int, int]]:
    """A study's driver without Ray: `at_once` workers that finish in order. Killed after `stop` results."""
    settings: dict[str, Any] = {"identity": identity_of(problem), "defaults": {}, "facts": {}, "place": str(folder)}
    printed = io.StringIO()
    out = Console(file=printed, width=200)
    names: dict[str, Any] = {"study_name": folder.name, "experiment": "seeds", "tags": {}, "params": {}}
    with StudyFolder.open(folder, config=CONFIG, identity=identity_of(problem), shape=problem.shape) as records:
        tracker = Tracker.open(None, mlflow_folder, **names)
        tracker.sync(records)
        expected = trainings_left(problem, records, trials=trials, seeds=seeds)
        proposed: list[Trial] = []
        running: list[Proposal] = []
        results = 0
        known: dict[str, Any] = {"done": records.points, "reused": records.reused, "seed": problem.seed}
        with Progress(trials, console=out, **known) as progress:
            run = Conductor(
                problem,
                records,
                tracker,
                progress,
                deadline=None,
                trials=trials,
                seeds=seeds,
                others=OtherStudies(folder, **settings) if reuse else NO_OTHER_STUDIES,
                **{"sampler": "random", "keep": "front"} | more,
            )
            while results < stop:
                while len(running) < at_once and isinstance(proposal := run.propose(), Proposal):
                    running.append(proposal)
                    proposed.append(proposal.trial)
                if not running:
                    assert proposal is None, "waits for a result that nobody is working on"
                    assert run.propose() is None
                    run.settle()
                    break
                done = running.pop(0)
                started = Outcome(done.trial, "started", done.trainable_params)
                repeat_fails = end != "complete" and done.trial.seed != problem.seed
                run.finished(
                    started.updated(status=end, message="lost")
                    if repeat_fails
                    else started.updated(
                        status="complete", accuracy=accuracy_of(started), adapter=made(folder, started)
                    )
                )
                results += 1
        tracker.close()
        return proposed, records, printed.getvalue(), expected


def made(folder: Path, started: Outcome) -> str:
    adapter = folder / "adapters" / started.digest
    adapter.mkdir(parents=True, exist_ok=True)
    return str(adapter)


def seeds_by_point(records: Records) -> dict[str, list[int]]:
    seeds_of = defaultdict(list)
    for outcome in records.finished.values():
        seeds_of[outcome.trial.point].append(outcome.trial.seed)
    return seeds_of


def check_front(records: Records, seeds: int, *, base: int = 0) -> None:
    """All members have their seeds; points that were never on a front have one."""
    wanted = list(range(base, base + seeds))
    for member in pareto.front(pareto.candidates(records.finished.values())):
        assert sorted(run.trial.seed for run in member.runs) == wanted
        assert len({run.trial.allocation for run in member.runs}) == 1
        assert len({run.trial.recipe for run in member.runs}) == 1
    for tried in seeds_by_point(records).values():
        assert sorted(tried) == wanted[: len(tried)], "seeds are taken in order, none twice"


@pytest.mark.parametrize("seed", [0, 5])
def test_members_of_the_front_have_their_seeds_and_trials_count_alone(
    seed: int, tmp_path: Path, mlflow_folder: Path
) -> None:
    problem = search_problem(seed=seed)
    proposed, records, said, _ = drive(problem, tmp_path / f"front-{seed}", mlflow_folder, seeds=3)
    assert len({trial.digest for trial in proposed}) == len(proposed) == len(records.finished)
    assert [trial.seed for trial in proposed[:TRIALS]] == [seed] * TRIALS, "the search comes first"
    assert all(trial.seed > seed for trial in proposed[TRIALS:])
    check_front(records, 3, base=seed)
    assert min(len(tried) for tried in seeds_by_point(records).values()) == 1, "who is dominated is not repeated"
    repeats = len(proposed) - TRIALS
    assert f"{TRIALS} of {TRIALS} finished · {repeats} of {repeats} repeats with other seeds" in said
    assert trainings_left(problem, records, trials=TRIALS, seeds=3) == (0, 0)


@pytest.mark.parametrize("stop", [4, 8])
def test_killed_anywhere_and_run_again_nothing_is_trained_twice(stop: int, tmp_path: Path, mlflow_folder: Path) -> None:
    problem, folder = search_problem(), tmp_path / f"killed-{stop}"
    _, killed, _, _ = drive(problem, folder, mlflow_folder, seeds=3, stop=stop)
    cut_off = [outcome.digest for outcome, _ in killed.in_flight]
    before = set(killed.finished)
    again, records, _, _ = drive(problem, folder, mlflow_folder, seeds=3)
    assert not before & {trial.digest for trial in again}
    assert set(cut_off) <= {trial.digest for trial in again}
    assert not records.in_flight
    assert Counter(o.trial.seed == 0 for o in records.finished.values())[True] == TRIALS
    check_front(records, 3)


def test_more_seeds_later_add_only_what_is_missing_and_fewer_none(tmp_path: Path, mlflow_folder: Path) -> None:
    problem, folder = search_problem(), tmp_path / "more"
    drive(problem, folder, mlflow_folder, seeds=1)
    for seeds in (2, 4, 2):
        before = drive(problem, folder, mlflow_folder, seeds=seeds, stop=0)[1].finished
        added, records, _, (own, repeats) = drive(problem, folder, mlflow_folder, seeds=seeds)
        assert own == 0
        assert (repeats == 0) == (added == [])
        assert len(records.finished) == len(before) + len(added)
    check_front(records, 4)
    assert added == []


def test_a_repeat_that_fails_is_not_tried_for_ever(tmp_path: Path, mlflow_folder: Path) -> None:
    problem = search_problem()
    proposed, records, _, _ = drive(problem, tmp_path / "fails", mlflow_folder, seeds=3, end="diverged")
    assert len(proposed) == len(records.finished)
    members = pareto.front(pareto.candidates(records.finished.values()))
    assert all(len(member.runs) == 3 and len(member.complete) == 1 for member in members)


def test_one_adapter_a_member_of_the_front_is_kept(tmp_path: Path, mlflow_folder: Path) -> None:
    _, records, _, _ = drive(search_problem(), tmp_path / "adapters", mlflow_folder, seeds=3)
    kept = {folder.name for folder in (tmp_path / "adapters" / "adapters").iterdir()}
    members = pareto.front(pareto.candidates(records.finished.values()))
    assert len(kept) == len(members)
    assert all(len(kept & {run.digest for run in member.runs}) == 1 for member in members)


def test_every_seed_comes_before_the_next_and_small_points_first(tmp_path: Path, mlflow_folder: Path) -> None:
    problem = search_problem()
    _, records, _, _ = drive(problem, tmp_path / "order", mlflow_folder, seeds=1)
    missing = missing_repeats(problem, records, seeds=3)
    members = pareto.front(pareto.candidates(records.finished.values()))
    assert [p.trial.seed for p in missing] == [1] * len(members) + [2] * len(members)
    assert [p.trainable_params for p in missing[: len(members)]] == [m.trainable_params for m in members]


# --- seeds=auto


def test_the_sampler_tries_points_again_and_these_trainings_are_among_the_trials(
    tmp_path: Path, mlflow_folder: Path
) -> None:
    pins = {"rank": 8, "lora_alpha": 16, "scaled_rate": 0.1}  # else there is always another point to try
    problem, folder = search_problem(seed=5, pins=pins), tmp_path / "auto"
    asked: dict[str, Any] = {"seeds": AUTO, "trials": 30, "sampler": "ehvi"}
    _, killed, _, expected = drive(problem, folder, mlflow_folder, stop=22, **asked)
    assert expected == (30, 0)
    second, records, _, expected = drive(problem, folder, mlflow_folder, **asked)
    assert expected == (8, 0)
    assert not set(killed.finished) & {trial.digest for trial in second}
    assert {outcome.digest for outcome, _ in killed.in_flight} <= {trial.digest for trial in second}
    assert len(records.finished) == 30
    assert any(outcome.trial.seed > 5 for outcome in killed.finished.values()), "a seed moves accuracy by .08 here"
    for tried in seeds_by_point(records).values():
        assert sorted(tried) == list(range(5, 5 + len(tried))), "seeds are taken in order, none twice"
    known = Proposer(problem, repeats=True)
    recalled(known, [(o, records.params_of(d)) for d, o in records.finished.items()])
    runs = Counter(trial.user_attrs[RUN] for trial in known._study.get_trials())
    assert runs == Counter(list(records.finished)), "a rerun's sampler knows every run, repeats included"


# --- tables


def test_a_table_trains_every_row_with_every_seed_seed_by_seed(tmp_path: Path, mlflow_folder: Path) -> None:
    problem = table_problem(pins={"recipe": "tuned"})
    proposed, records, said, expected = drive(problem, tmp_path / "table", mlflow_folder, seeds=2, trials=100)
    seeds = [trial.seed for trial in proposed]
    rows = seeds.count(0)
    assert seeds == [0] * rows + [1] * rows
    assert expected == (rows, rows)
    assert set(map(len, seeds_by_point(records).values())) == {2}
    assert f"{rows} of {rows} finished · {rows} of {rows} repeats with other seeds" in said
    draws = [trial for trial in proposed if trial.knobs == {"fraction": 0.25, "draw": "each"}]
    assert len({trial.allocation for trial in draws}) == len(draws) == 2
    # nothing is left, and rows that needed no training are not answered once more
    answered = len(records.answered)
    again, records, _, expected = drive(problem, tmp_path / "table", mlflow_folder, seeds=2, trials=100)
    assert (again, expected, len(records.answered)) == ([], (0, 0), answered)


def test_a_table_goes_on_where_it_was_killed(tmp_path: Path, mlflow_folder: Path) -> None:
    problem, folder = table_problem(pins={"fraction": 0.25, "share": 0.5}), tmp_path / "killed-table"
    first, killed, _, _ = drive(problem, folder, mlflow_folder, seeds=3, trials=100, stop=8)
    done = set(killed.finished)
    second, records, _, _ = drive(problem, folder, mlflow_folder, seeds=3, trials=100)
    assert not done & {trial.digest for trial in second}
    assert set(map(len, seeds_by_point(records).values())) == {3}
    assert all(outcome.status in FINISHED for outcome in records.outcomes.values())
    cut_off = [trial.digest for trial in first[8:]]
    assert [trial.digest for trial in second[: len(cut_off)]] == cut_off, "what was cut off comes first"


def test_fewer_trials_are_the_first_rows() -> None:
    proposals, _ = table_trainings(table_problem(), trials=3, seeds=2)
    assert [(p.trial.allocator, p.trial.seed) for p in proposals][:3] == [("all", 0), ("none", 0), ("sieve", 0)]
    assert [p.trial.seed for p in proposals] == [0, 0, 0, 1, 1, 1]


def test_what_a_result_costs_does_not_grow_with_the_results(
    tmp_path: Path, mlflow_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a whole study: each result builds one candidate and parses its two lines; nothing is computed from all."""
    counted: Counter[str] = Counter()

    def count(module: ModuleType, name: str) -> None:
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: counted.update([name]) or function(*a, **k))

    for name in ("_candidate", "candidates", "front"):
        count(pareto, name)
    count(storage, "exists")
    count(storage, "delete_folder")
    for trials in (20, 60):
        counted.clear()
        proposed, records, _, _ = drive(search_problem(), tmp_path / f"{trials}", mlflow_folder, seeds=1, trials=trials)
        assert len(proposed) == len(records.finished) == trials
        assert counted["_candidate"] == trials
        assert counted["candidates"] == counted["front"] == 0
        moves = len(records.points.front) + trials  # what joins a front leaves it once at most; then all once more
        assert counted["exists"] <= 3 * moves + trials
        assert counted["delete_folder"] <= 4 * trials


def test_resumed_and_whole_studies_keep_the_same_adapters_and_numbers(tmp_path: Path, mlflow_folder: Path) -> None:
    """Kept up to date or read from the file, records say the same; so do the live view's counts."""
    _, records, said, _ = drive(search_problem(), tmp_path / "whole", mlflow_folder, seeds=3, trials=12)
    again = read(tmp_path / "whole")
    assert list(again.points) == list(records.points) == pareto.candidates(records.finished.values())
    assert again.points.front == records.points.front == pareto.front(pareto.candidates(records.finished.values()))
    assert again.tried == records.tried == {(o.trial.point, o.trial.seed) for o in records.outcomes.values()}
    assert dict(again.trained) == dict(records.trained) == dict(records.finished)
    assert list(again.finished) == [digest for digest, o in records.outcomes.items() if o.status in FINISHED]
    kept = {folder.name for folder in (tmp_path / "whole" / "adapters").iterdir()}
    assert len(kept) == len(records.points.front)
    repeats = sum(o.trial.seed != 0 for o in records.finished.values())
    assert f"12 of 12 finished · {repeats} of {repeats} repeats with other seeds" in said
