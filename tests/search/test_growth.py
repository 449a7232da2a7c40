"""What a result and a proposal cost does not grow with the results: calls are counted, not seconds.

A call is one of a Python or a C function, or a step of a generator. `tests/benchmarks/growth.py` measures seconds.
"""

from __future__ import annotations

import io
import json
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest import mock

import optuna
import pytest
from rich.console import Console

from allocators.core.types import ExpertSelection, Outcome, Recipe, Rung, Trial
from search.front import Points
from search.propose import ehvi, sampler
from search.propose.ehvi import EHVISampler
from search.propose.sampler import Proposer
from search.records import read
from search.records.folder import StudyFolder
from search.records.tracking import Tracker
from search.report.live import Progress
from search.report.page import packed
from search.study import Conductor
from tests.search.propose.proposals import recalled
from tests.search.propose.test_ehvi import Space, accuracy
from tests.search.propose.test_sampler import problem
from tests.search.report.written import unpacked
from tests.search.studies import identity_of, open_study, outcome, selection


def calls(act: Callable[[], Any]) -> int:
    """How many calls an act makes."""
    count = 0

    def counted(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        act()
    finally:
        sys.setprofile(None)
    return count


class Silent:
    """In the place of MLflow's tracker."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **named: None


def results(number: int) -> list[tuple[Outcome, dict[str, Any]]]:
    """Points of the small sieve space of `problem()`, each with a rate of its own."""
    draw, made = random.Random(1), []
    for _ in range(number):
        fraction, rate = draw.randint(1, 15) / 16, 10 ** draw.uniform(-3, -0.4)
        params = {"allocator": "random", "fraction": fraction, "rank": 4, "lora_alpha": 64.0, "scaled_rate": rate}
        experts = {layer: tuple(range(int(16 * fraction))) for layer in range(3)}
        recipe = Recipe(rank=4, lora_alpha=64.0, learning_rate=rate / 64)
        trial = Trial(ExpertSelection(experts), recipe, "small", "t", 0, "random", {"fraction": fraction})
        cost = trial.allocation.trainable_params(problem().shape, rank=4)
        reached = 0.3 + 0.3 * fraction + draw.gauss(0, 0.05)
        made.append((Outcome(trial, "complete", cost, reached, (Rung(9, 90, reached, stderr=0.02),)), params))
    return made


def calls_of_a_result(folder: Path, number: int) -> int:
    """Of the conductor and of a drawn live view, when training `number` ends."""
    own = identity_of(problem())
    with mock.patch("os.fsync"), open_study(folder, shape=problem().shape, identity=own) as study:
        fill(study, number)
        progress = Progress(9_999, done=study.points, console=Console(file=io.StringIO()), quiet=True)
        conductor = Conductor(
            problem(),
            study,
            cast(Tracker, Silent()),
            progress,
            sampler="random",
            deadline=None,
            keep="front",
            trials=9_999,
        )
        counts = []
        for done, _ in results(number + 7)[number:]:
            proposal = conductor.propose()
            assert proposal is not None
            assert proposal != "wait"
            told = done.updated(trial=proposal.trial, trainable_params=proposal.trainable_params)

            def end(told: Outcome = told) -> None:
                conductor.rung(told.digest, told.rungs[0])
                conductor.finished(told)
                Console(file=io.StringIO(), width=120).print(progress.view())

            counts.append(calls(end))
        return sorted(counts)[3]


def fill(study: StudyFolder, number: int) -> None:
    for done, params in results(number):
        study.append_finished(done, params)


def test_the_end_of_a_training_costs_the_same_after_many(tmp_path: Path) -> None:
    few, many = (calls_of_a_result(tmp_path / str(number), number) for number in (150, 600))
    assert many < 1.3 * few


def proposed_and_told(proposer: Proposer, done: Outcome) -> None:
    proposal = proposer.propose()
    assert proposal is not None
    proposer.tell(done.updated(trial=proposal.trial, trainable_params=proposal.trainable_params))


@pytest.mark.parametrize("name", ["ehvi", "tpe", "nsga2", "random"])
def test_a_proposal_costs_the_same_after_many(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "MOST_TOLD", 60)
    monkeypatch.setattr(ehvi, "MOST_FITTED", 40)
    monkeypatch.setattr(ehvi, "KEPT", 2)
    for drawn in ("DRAWN", "NEAR"):
        monkeypatch.setattr(ehvi, drawn, 20)
    counts = []
    for number in (130, 390):
        proposer = Proposer(problem(), sampler=name)
        recalled(proposer, results(number))
        each = [calls(partial(proposed_and_told, proposer, done)) for done, _ in results(number + 5)[number:]]
        counts.append(sorted(each)[2])
    assert counts[1] < 1.3 * counts[0]


def test_a_point_that_falls_costs_its_neighbours_alone() -> None:
    counts = []
    for number in (200, 2_000):
        points = Points(done for done, _ in results(number))
        member = points.front[len(points.front) // 2].best
        counts.append(calls(partial(points.update, member.updated(accuracy=0.01))))
    assert counts[1] < 2 * counts[0]


# --- what a model of many results is fitted to


def told(memory: ehvi.Memory, study: optuna.Study, trials: list[optuna.trial.FrozenTrial], *, at_once: bool) -> None:
    for trial in trials:
        study.add_trial(trial)
        if not at_once:
            memory.update(study, -1)
    memory.update(study, -1)


def test_the_points_of_a_model_are_bounded_hold_the_front_and_follow_from_the_results() -> None:
    source = optuna.create_study(directions=["maximize", "minimize"], sampler=optuna.samplers.RandomSampler(seed=1))
    space = Space()
    seen: dict[str, tuple[float, int]] = {}
    for _ in range(400):
        trial = source.ask()
        try:
            known = space(trial)
        except Exception:
            source.tell(trial, state=optuna.trial.TrialState.PRUNED)
            continue
        seen[known.key] = max(seen.get(known.key, (0.0, known.cost)), (accuracy(trial.params), known.cost))
        source.tell(trial, (accuracy(trial.params), known.cost))
    trials, kept = source.get_trials(), []
    for at_once in (False, True):
        proposer = EHVISampler(space, seed=3, fitted=30)
        study = optuna.create_study(directions=["maximize", "minimize"])
        told(proposer._memory, study, trials, at_once=at_once)
        memory = proposer._memory
        assert len(memory.fitted) == 30
        assert memory.tried.keys() == seen.keys()
        assert memory.done == memory.heard == len(seen)
        assert {one.point.known.key for one in memory.front} <= memory.fitted.keys()
        assert list(memory.tried)[-1] in memory.fitted
        kept.append(list(memory.fitted))
    assert kept[0] == kept[1]


def test_what_optuna_forgets_leaves_the_front_and_the_trainings_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "MOST_TOLD", 10)
    for name in ("DRAWN", "NEAR", "MOST_FITTED"):
        monkeypatch.setattr(ehvi, name, 15)
    proposer = Proposer(problem(), sampler="ehvi")
    first = proposer.propose()
    assert first is not None
    waiting = proposer.propose()
    assert waiting is not None
    best = Outcome(first.trial, "complete", first.trainable_params, 0.99)
    proposer.tell(best)
    for number in range(30):
        proposal = proposer.propose()
        assert proposal is not None
        proposer.tell(Outcome(proposal.trial, "complete", proposal.trainable_params, 0.1 + number / 1_000))
        assert len(proposer._study.get_trials(deepcopy=False)) <= 25
    proposer.tell(Outcome(waiting.trial, "complete", waiting.trainable_params, 0.98))
    accuracies = [t.values[0] for t in proposer._study.get_trials(deepcopy=False) if t.values]
    assert 0.99 in accuracies
    assert 0.98 in accuracies
    assert len(accuracies) == len(set(accuracies))


@pytest.mark.parametrize("recalls", [False, True])
def test_generations_of_nsga2_are_bred_from_what_is_remembered(monkeypatch: pytest.MonkeyPatch, recalls: bool) -> None:
    monkeypatch.setattr(sampler, "MOST_TOLD", 20)
    key, numbers = optuna.samplers.NSGAIISampler._get_generation_key(), []
    proposer = Proposer(problem(), sampler="nsga2")
    if recalls:
        recalled(proposer, results(200))
    for done, _ in results(300)[200:]:
        proposed_and_told(proposer, done)
        numbers += [trial.system_attrs[key] for trial in proposer._study.get_trials(deepcopy=False)]
    assert 1 <= max(numbers) <= 5  # 4,900 trainings were as many generations as Python goes back through


# --- the page


def test_what_points_share_is_said_once_and_every_point_comes_back() -> None:
    draw = random.Random(0)
    points = [
        {"same": [1, {"a": None}], "few": draw.choice("abc"), "own": number, "none": None} for number in range(50)
    ]
    data: Any = packed(points)
    assert unpacked(json.loads(json.dumps(data))) == points
    assert set(data["columns"]) == {"same", "few", "own", "none"}
    assert "at" not in data["columns"]["same"]
    assert len(data["columns"]["few"]["of"]) == 3
    assert unpacked(dict(packed([]))) == []


# --- lines of earlier versions


def test_lines_that_list_every_expert_are_read_and_gone_on_with(tmp_path: Path) -> None:
    runs = [outcome(selection(4, seed=seed), accuracy=seed / 10) for seed in range(1, 4)]
    with open_study(tmp_path / "new") as study:
        for run in runs:
            study.append_finished(run, {"fraction": 0.25})
    lines = [json.loads(line) for line in (tmp_path / "new" / "outcomes.jsonl").read_text().splitlines()]
    for line, run in zip(lines, runs, strict=True):
        line["outcome"]["trial"]["allocation"] = run.trial.allocation.to_json()
    open_study(tmp_path / "old").close()
    (tmp_path / "old" / "outcomes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with open_study(tmp_path / "old") as old:
        assert old.finished == read(tmp_path / "new").finished
        old.append_finished(outcome(selection(5), accuracy=0.5), {"fraction": 0.3})
    assert len(read(tmp_path / "old").finished) == 4
    assert not read(tmp_path / "old").problems
