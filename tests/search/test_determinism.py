"""With one worker a study that was killed and went on proposes what the uninterrupted one does, wherever it was killed.

A training is a function here; the driver is killed behind any line that it writes, and its next life reads the records.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest

from allocators.core.types import Outcome, Rung
from search.config import AUTO
from search.problem import Problem, Proposal
from search.propose import ehvi, sampler
from search.propose.halving import NO_HALVING, WATCHED, Halving
from search.propose.sampler import Proposer
from search.records import Records, read
from search.records.folder import StudyFolder
from search.records.tracking import Tracker
from search.report.live import Progress
from search.study import Conductor
from tests.search.propose.test_sampler import problem
from tests.search.studies import identity_of, open_study

EVALUATIONS = 4


class Silent:
    """In the place of MLflow's tracker."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **named: None


class KilledError(BaseException):
    """The driver's end."""


def rungs_of(proposal: Proposal) -> list[Rung]:
    draw = random.Random(proposal.trial.digest)
    share = proposal.trial.allocation.total_experts / 48
    final = round(0.3 + 0.4 * share + draw.gauss(0, 0.05), 3)
    return [
        Rung(step, 100 * step, round(final * step / EVALUATIONS + draw.gauss(0, 0.05), 3), stderr=0.02, loss=1.0)
        for step in range(1, EVALUATIONS + 1)
    ]


def live(asked: Problem, folder: Path, *, lines: int, halving: bool = False, first_rung: int = 1, **more: Any) -> bool:
    """One life of a driver with one worker, which is killed behind so many lines; whether it came to its end."""
    written = 0
    append = StudyFolder._append

    def counted(study: StudyFolder, line: dict[str, Any]) -> None:
        nonlocal written
        append(study, line)
        written += 1
        if written == lines:
            raise KilledError

    with mock.patch("os.fsync"), open_study(folder, shape=asked.shape, identity=identity_of(asked)) as study:
        pauses = Halving(evaluations=EVALUATIONS, eta=2, first_rung=first_rung) if halving else NO_HALVING
        settings: dict[str, Any] = {"sampler": "random", "trials": 14, "keep": "front", "deadline": None} | more
        with mock.patch.object(StudyFolder, "_append", counted):
            try:
                conductor = Conductor(
                    asked,
                    study,
                    cast(Tracker, Silent()),
                    Progress(settings["trials"], done=study.points, quiet=True),
                    halving=pauses,
                    **settings,
                )
                while isinstance(proposal := conductor.propose(), Proposal):
                    train(conductor, proposal)
            except KilledError:
                return False
        assert proposal is None, "waits for a result that nobody is working on"
        return True


def train(conductor: Conductor, proposal: Proposal) -> None:
    rungs = rungs_of(proposal)
    for rung in rungs:
        if not conductor.rung(proposal.trial.digest, rung):
            return
    done = Outcome(proposal.trial, "complete", proposal.trainable_params, rungs[-1].accuracy, tuple(rungs))
    conductor.finished(done)


def story(folder: Path) -> tuple[list[Any], list[Any], list[Any]]:
    """What was asked in its order, what became of it, and in which order it ended."""
    records: Records = read(folder)
    asked, seen = list[Any](), set[str]()
    for what, digest, number in records.events:
        if what == "answered":
            answer = records.answered[number]
            asked.append((answer.reason, dict(answer.params)))
        elif what == "started" and digest not in seen:
            seen.add(digest)
            asked.append((digest, records.params_of(digest)))
    ended = [(digest, o.status, len(o.rungs), o.accuracy) for digest, o in records.finished.items()]
    return asked, sorted(ended), [digest for digest, *_ in ended]


def check(asked: Problem, folder: Path, *, kills: int = 3, draw: random.Random | None = None, **more: Any) -> None:
    """Compares a study with one that is killed behind every few lines, drawn at random."""
    assert live(asked, folder / "whole", lines=10**6, **more)
    whole = (folder / "whole" / "outcomes.jsonl").read_text().count("\n")
    draw = draw or random.Random(str(more))
    lives = 1
    while not live(asked, folder / "cut", lines=draw.randint(1, 2 * whole // kills), **more):
        lives += 1
    assert lives > 1
    for one, other in zip(story(folder / "whole"), story(folder / "cut"), strict=True):
        assert one == other


@pytest.mark.parametrize("name", ["ehvi", "tpe", "nsga2", "random", "gp"])
def test_a_killed_study_proposes_what_an_uninterrupted_one_proposes(name: str, tmp_path: Path) -> None:
    check(problem(), tmp_path, sampler=name, trials=13 if name == "gp" else 26 if name == "nsga2" else 16)


@pytest.mark.parametrize("seeds", [2, AUTO])
def test_and_so_with_repeats(seeds: int, tmp_path: Path) -> None:
    check(problem(), tmp_path, sampler="ehvi" if seeds == AUTO else "random", seeds=seeds, trials=12)


@pytest.mark.parametrize("first_rung", [1, WATCHED])
@pytest.mark.parametrize("seeds", [1, 2])
def test_and_so_where_trainings_pause(first_rung: int, seeds: int, tmp_path: Path) -> None:
    more: dict[str, Any] = {"halving": True, "first_rung": first_rung, "seeds": seeds, "trials": 14}
    check(problem(), tmp_path, kills=6, **more)


def test_and_so_where_points_are_refused_and_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small space: most of what is drawn was trained or is over the budget, and in the end nothing is left."""
    monkeypatch.setattr(sampler, "EXHAUSTED", 40)
    monkeypatch.setattr(sampler, "PATIENCE", 5)
    pins: dict[str, Any] = {"scaled_rate": 0.01, "lora_alpha": 16, "rank": 4}
    check(problem(pins=pins, max_trainable_params=1_500), tmp_path, sampler="tpe", trials=60, kills=4)
    assert {answer.reason for answer in read(tmp_path / "cut").answered} == {"duplicate", "over_budget"}


def test_and_so_after_many_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the model is fitted to a part of them, and Optuna has forgotten the oldest."""
    monkeypatch.setattr(sampler, "MOST_TOLD", 10)
    for bound, value in (("MOST_FITTED", 12), ("DRAWN", 20), ("NEAR", 20), ("KEPT", 3)):
        monkeypatch.setattr(ehvi, bound, value)
    for name in ("ehvi", "tpe", "nsga2"):
        check(problem(), tmp_path / name, sampler=name, trials=30, kills=2)


def test_the_same_question_gets_the_same_answer_with_trainings_under_way(tmp_path: Path) -> None:
    """Several workers: what the next life of the driver proposes is what this one would have, had it lived."""
    for name in ("ehvi", "tpe"):
        proposer, events = Proposer(problem(), sampler=name), list[Any]()
        draw = random.Random(name)
        running: list[Proposal] = []
        for _ in range(18):
            proposal = proposer.propose()
            assert proposal is not None
            events.append(proposal)
            running.append(proposal)
            if len(running) == 3:
                ended = running.pop(draw.randrange(3))
                done = Outcome(ended.trial, "complete", ended.trainable_params, rungs_of(ended)[-1].accuracy)
                proposer.tell(done)
                events.append(done)
        again = Proposer(problem(), sampler=name)
        for event in events:
            if isinstance(event, Proposal):
                again.recall(event.trial, event.params)
            else:
                again.tell(event)
        expected, found = proposer.propose(), again.propose()
        assert expected is not None
        assert found is not None
        assert found.trial.digest == expected.trial.digest
