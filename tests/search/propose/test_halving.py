"""Pareto halving: its ranking against brute force, its decisions by hand and by law, a real study."""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocators.core.types import Outcome
from search.config import parse
from search.front import candidates, front
from search.propose import halving as halving_module
from search.propose.halving import (
    BEYOND,
    NO_HALVING,
    WATCHED,
    Halving,
    ordered,
    rungs,
    second_rung,
    tokens_saved,
)
from search.propose.sampler import Proposer
from search.records import read
from search.records.folder import StudyFolder
from search.replay import export
from search.run import main
from search.session.prepare import prepare_replay
from tests.search.propose.proposals import next_proposal, recalled
from tests.search.propose.test_sampler import problem
from tests.search.replay.test_replay import record
from tests.search.test_study import lines

COSTS = st.integers(1, 10**9)
ACCURACIES = st.sampled_from([0.0, 0.25, 0.5, 0.53, 0.7, 1.0]) | st.floats(0, 1)
UNKNOWN = st.sampled_from([None, math.nan, math.inf, -math.inf])
POINTS = st.lists(st.tuples(st.sampled_from([1, 10, 10, 400]) | COSTS, ACCURACIES | UNKNOWN), max_size=12)


def named(points: Sequence[tuple[int, float | None]]) -> dict[str, tuple[int, float | None]]:
    return {f"t{i:02}": point for i, point in enumerate(points)}


def known(points: Sequence[tuple[int, float | None]]) -> dict[str, tuple[int, float]]:
    """Those with an accuracy that is a finite number."""
    return {k: (cost, a) for k, (cost, a) in named(points).items() if a is not None and math.isfinite(a)}


def beats(a: tuple[int, float], b: tuple[int, float]) -> bool:
    return a[0] <= b[0] and a[1] >= b[1] and a != b


def front_numbers(members: dict[str, tuple[int, float]]) -> dict[str, int]:
    """By definition: take away what nothing beats, again and again."""
    left, number = dict(members), 0
    numbers: dict[str, int] = {}
    while left:
        top = [key for key in left if not any(beats(other, left[key]) for other in left.values())]
        numbers |= dict.fromkeys(top, number)
        left = {key: point for key, point in left.items() if key not in top}
        number += 1
    return numbers


def area(points: list[tuple[float, float]], corner: tuple[float, float]) -> float:
    """Area dominated by (x, y) points above a corner: a sum over vertical strips."""
    total, edges = 0.0, sorted({corner[0], *(x for x, _ in points)})
    for left, right in pairwise(edges):
        total += (right - left) * max((y - corner[1] for x, y in points if x >= right), default=0.0)
    return total


def contributions(front: list[tuple[int, float]]) -> list[float]:
    costs, accuracies = [math.log(c) for c, _ in front], [a for _, a in front]
    wide, high = max(costs) - min(costs) or 1.0, max(accuracies) - min(accuracies) or 1.0
    rows = [((max(costs) - c) / wide, (a - min(accuracies)) / high) for c, a in zip(costs, accuracies, strict=True)]
    corner = (-BEYOND, -BEYOND)
    return [area(rows, corner) - area([r for r in rows if r is not row], corner) for row in rows]


# --- the ranking


@given(POINTS)
def test_everyone_is_ranked_once_and_unknown_accuracies_come_last(points: list[tuple[int, float | None]]) -> None:
    members = named(points)
    best = ordered(members)
    assert sorted(best) == sorted(members)
    finite = known(points)
    is_known = [key in finite for key in best]
    assert is_known == sorted(is_known, reverse=True)


@given(POINTS)
def test_fronts_are_those_of_brute_force_one_after_another(points: list[tuple[int, float | None]]) -> None:
    members = known(points)
    numbers = front_numbers(members)
    found = [numbers[key] for key in ordered(members)]
    assert found == sorted(found)


@given(POINTS)
def test_in_a_front_who_adds_more_area_comes_first(points: list[tuple[int, float | None]]) -> None:
    members = known(points)
    numbers, best = front_numbers(members), ordered(members)
    for number in set(numbers.values()):
        front = [key for key in best if numbers[key] == number]
        places = sorted({members[key] for key in front})
        share = dict(zip(places, contributions(places), strict=True))
        first = {members[key]: key for key in reversed(front)}  # of equal points one has the contribution
        adds = [share[members[key]] if first[members[key]] == key else 0.0 for key in front]
        assert all(a >= b - 1e-9 for a, b in pairwise(adds))


@given(POINTS, st.randoms())
def test_the_order_of_arrival_does_not_matter(points: list[tuple[int, float | None]], draw: random.Random) -> None:
    members = named(points)
    shuffled = list(members.items())
    draw.shuffle(shuffled)
    assert ordered(dict(shuffled)) == ordered(members)


def test_an_order_is_not_read_as_ranks() -> None:
    """Accuracies that fall in the order given, where argsort and rank agree least."""
    members = {"a": (400, 0.9), "b": (10, 0.2), "c": (400, 0.3), "d": (20, 0.6), "e": (10, 0.1), "f": (800, 0.6)}
    # fronts: {a, b, d}, {c, e, f}; in the first d spans most, in the second the ends do
    assert set(ordered(members)[:3]) == {"a", "b", "d"}
    assert ordered({"only": (5, 0.1)}) == ["only"]
    assert ordered({}) == []


def test_equal_points_stand_together_but_one_of_them_first() -> None:
    members = {"a": (10, 0.5), "b": (10, 0.5), "c": (10, 0.5), "d": (100, 0.9)}
    assert ordered(members)[2:] == ["b", "c"]


# --- the rungs


@given(st.integers(1, 500), st.integers(2, 10))
def test_rungs_are_evaluations_before_the_last_each_a_part_of_the_next(evaluations: int, eta: int) -> None:
    found = rungs(evaluations, eta)
    assert list(found) == sorted(set(found))
    assert all(1 <= rung < evaluations for rung in found)
    assert (1 in found) == (evaluations > 1)
    assert all(low == math.ceil(high / eta) for low, high in pairwise((*found, evaluations)))


# --- who goes on: driven as workers would, one training after another


class Toy:
    """Asynchronous workers on trainings whose accuracy never changes: `final[key]`, reached at every evaluation."""

    def __init__(self, points: Mapping[str, tuple[int, float | None]], *, evaluations: int, eta: int) -> None:
        self.points, self.evaluations = points, evaluations
        self.halving = Halving(evaluations=evaluations, eta=eta)
        self.at = dict.fromkeys(points, 0)
        self.log: list[str] = []

    def train(self, key: str) -> None:
        """Until it is paused or complete."""
        cost, accuracy = self.points[key]
        while self.at[key] < self.evaluations:
            self.at[key] += 1
            self.log.append(f"{key}@{self.at[key]}")
            if not self.halving.reached(key, self.at[key], merit=accuracy, cost=cost):
                return
        self.halving.ended(key, accuracy=accuracy)

    def say_again(self, halving: Halving) -> None:
        """What a driver that goes on tells another one."""
        for entry in self.log:
            key, number = entry.split("@")
            cost, accuracy = self.points[key]
            if key in halving.paused:
                halving.go_on(key)
            halving.reached(key, int(number), merit=accuracy, cost=cost)
            if int(number) == self.evaluations:
                halving.ended(key, accuracy=accuracy)

    def run(self) -> Toy:
        for key in self.points:
            while (paused := self.halving.next()) is not None:
                self.train(paused)
            self.train(key)
        self.halving.close()
        while (paused := self.halving.next()) is not None:
            self.train(paused)
        return self

    @property
    def complete(self) -> set[str]:
        return {key for key, reached in self.at.items() if reached == self.evaluations}


def test_by_hand_four_trainings_two_rungs() -> None:
    points = {"a": (10, 0.5), "b": (20, 0.4), "c": (10, 0.6), "d": (40, 0.9)}
    toy = Toy(points, evaluations=4, eta=2)
    for key in "ab":
        toy.train(key)
    assert toy.halving.paused == {"a": 1, "b": 1}, "of one training none goes on; of two the better one may"
    assert toy.halving.next() == "a"
    assert toy.halving.next() is None
    toy.train("a")
    assert toy.halving.paused == {"b": 1, "a": 2}, "alone at the second rung"
    toy.train("c")
    assert toy.log[-4:] == ["c@1", "c@2", "c@3", "c@4"], "better than both, and better than a at the second rung"
    toy.train("d")
    # fronts at the first rung: {c, d}, {a}, {b}: d is one of the best two, so it goes on at once
    # at the second: {c, d}, {a}: c and d add equally much, c comes first by name, and of three only one goes on
    assert toy.log[-2:] == ["d@1", "d@2"]
    assert toy.halving.paused == {"b": 1, "a": 2, "d": 2}
    toy.halving.close()
    assert toy.halving.next() == "d", "two of three, when no more will come"
    assert toy.halving.next() is None
    assert toy.halving.paused == {"b": 1, "a": 2}


def test_one_training_alone_is_trained_to_its_end() -> None:
    toy = Toy({"only": (10, 0.5)}, evaluations=4, eta=4).run()
    assert toy.complete == {"only"}


@given(POINTS, st.integers(2, 4), st.integers(2, 9))
def test_some_are_complete_and_nobody_without_an_accuracy_goes_on(
    points: list[tuple[int, float | None]], eta: int, evaluations: int
) -> None:
    toy = Toy(named(points), evaluations=evaluations, eta=eta).run()
    known = {k for k, (_, acc) in toy.points.items() if acc is not None and math.isfinite(acc)}
    assert toy.complete <= known
    assert bool(toy.complete) or not known or len(known) < len(points)
    for rung in rungs(evaluations, eta):
        behind = [key for key, reached in toy.at.items() if reached == rung]
        assert set(behind) == {key for key, at in toy.halving.paused.items() if at == rung}


@given(st.lists(st.tuples(COSTS, st.floats(0, 1)), min_size=1, max_size=20, unique=True), st.integers(2, 4))
def test_in_the_end_the_best_part_of_every_rung_has_gone_on(points: list[tuple[int, float]], eta: int) -> None:
    """Whatever was promoted too early on the way, those that should go on have gone."""
    toy = Toy(named(points), evaluations=eta**2, eta=eta).run()
    for rung in rungs(eta**2, eta):
        members = {key: toy.points[key] for key, reached in toy.at.items() if reached >= rung}
        best = ordered(members)[: math.ceil(len(members) / eta)]
        assert all(toy.at[key] > rung for key in best)


@given(st.lists(st.tuples(COSTS, st.floats(0, 1)), min_size=2, max_size=12), st.integers(0, 30))
def test_a_restart_decides_as_if_there_had_been_none(points: list[tuple[int, float]], when: int) -> None:
    """Everything can be told from the evaluations on record, in their order."""
    toy = Toy(named(points), evaluations=4, eta=2)
    for key in list(toy.points)[:when]:
        toy.train(key)
        while (paused := toy.halving.next()) is not None:
            toy.train(paused)
    again = Halving(evaluations=4, eta=2)
    toy.say_again(again)
    assert again.paused == toy.halving.paused
    for halving in (toy.halving, again):
        halving.close()
    ends = [[halving.next() for _ in points] for halving in (toy.halving, again)]
    assert ends[0] == ends[1]


def test_what_goes_on_from_its_checkpoint_reports_old_rungs_and_is_not_paused_there() -> None:
    toy = Toy({"a": (10, 0.9), "b": (10, 0.1)}, evaluations=4, eta=2)
    toy.train("a")
    toy.train("b")
    assert toy.halving.next() == "a"
    assert toy.halving.reached("a", 1, merit=0.9, cost=10)
    assert not toy.halving.reached("a", 2, merit=0.9, cost=10)


# --- from which rung on


@given(st.integers(1, 60), st.integers(2, 5), st.integers(1, 60))
def test_no_rung_is_before_the_first_that_may_pause(evaluations: int, eta: int, first: int) -> None:
    found = rungs(evaluations, eta, first)
    assert all(first <= rung < evaluations for rung in found)
    assert bool(found) == (first < evaluations)
    assert set(found) <= {*rungs(evaluations, eta), first}


def test_a_second_rung_lies_between_the_first_and_the_end() -> None:
    assert [second_rung(n, eta) for n, eta in ((3, 3), (4, 2), (9, 3), (2, 2))] == [2, 2, 3, 2]
    assert second_rung(2, 2) == 2, "the end: there is none"


def train_whole(halving: Halving, key: str, *, merits: Sequence[float], accuracy: float, cost: int = 10) -> int:
    """Until it is paused or complete; after how many evaluations."""
    for number, merit in enumerate(merits, start=1):
        if not halving.reached(key, number, merit=merit, cost=cost):
            return number
    halving.ended(key, accuracy=accuracy)
    return len(merits)


@pytest.mark.parametrize(("agrees", "stops"), [(True, 1), (False, 2)])
def test_the_first_rung_pauses_once_it_is_known_to_rank_as_the_end_does(agrees: bool, stops: int) -> None:
    """Better and better trainings, so that none is paused at the second rung; then a bad one."""
    halving, finals = Halving(evaluations=3, eta=2, first_rung=WATCHED), [0.1 * n for n in range(1, 10)]
    for n, final in enumerate(finals):
        first = final if agrees else -final
        reached = train_whole(halving, f"t{n}", merits=(first, final, final), accuracy=final)
        assert reached == (2 if n == 0 else 3), "of one training none goes on from the second rung"
    assert train_whole(halving, "bad", merits=(-2.0, 0.01, 0.01), accuracy=0.01) == stops


def test_what_waits_at_a_rung_that_is_not_believed_any_more_goes_on() -> None:
    halving = Halving(evaluations=3, eta=2, first_rung=WATCHED)
    for n in range(8):
        halving.restore(f"t{n}", [n / 10] * 3, cost=10, accuracy=n / 10)
    assert train_whole(halving, "low", merits=(-1.0,), accuracy=0.0) == 1
    assert halving.next() is None
    for n in range(8, 16):
        halving.restore(f"t{n}", [n / 10] * 3, cost=10, accuracy=-n / 10)
    assert halving.next() == "low"


@given(st.lists(st.tuples(COSTS, st.floats(0, 1)), min_size=1, max_size=12))
def test_only_the_order_of_merits_inside_a_front_and_their_extent_matter(points: list[tuple[int, float]]) -> None:
    """Minus a loss is as good a merit as an accuracy: below zero and of any unit."""
    members = {key: (cost, merit) for key, (cost, merit) in named(points).items()}
    finite = {key: (cost, merit) for key, (cost, merit) in members.items() if merit is not None}
    moved = {key: (cost, round(merit, 3) * 4 - 8) for key, (cost, merit) in finite.items()}
    same = {key: (cost, round(merit, 3)) for key, (cost, merit) in finite.items()}
    numbers = front_numbers(same)
    assert [numbers[key] for key in ordered(moved)] == [numbers[key] for key in ordered(same)]


def test_a_rung_ranks_its_latest_rivals_and_keeps_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halving_module, "MOST_RIVALS", 10)
    halving = Halving(evaluations=4, eta=2)
    for number in range(40):  # worse and worse
        train_whole(halving, f"t{number:02}", merits=(1 - number / 50,) * 4, accuracy=0.5)
    assert max(map(len, halving._at.values())) == 10
    reached = train_whole(halving, "new", merits=(0.45,) * 4, accuracy=0.5)
    assert reached == 2, "the best of the latest ten goes on; it is the 28th of all"
    assert len(halving._ends) <= 20


def test_without_halving_nothing_is_ever_paused() -> None:
    halving = NO_HALVING
    assert halving.reached("a", 1, merit=None, cost=1)
    assert halving.next() is None
    halving.restore("a", [0.1], cost=1)
    assert not halving.paused


def test_tokens_that_were_not_trained_are_counted() -> None:
    from tests.search.studies import outcome, selection

    whole = outcome(selection(4), tokens=900)
    stopped = outcome(selection(8), status="stopped", tokens=300)
    stopped = stopped.updated(rungs=stopped.rungs[:1])
    assert tokens_saved([whole, stopped], evaluations=3) == (600, 1800)
    assert tokens_saved([whole], evaluations=3) == (0, 900)


# --- as keys of a study


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["scheduler=pareto_halvin"], "did you mean 'pareto_halving'"),
        (["scheduler=pareto_halving", "evaluations=1"], "set it to 2 or more"),
        (["eta=1"], "eta must be at least 2, got 1"),
        (["rank_by=speed"], "rank_by"),
        (["scheduler=pareto_halving", "first_rung=3"], "first_rung=3 must be before the end, which is at evaluation 3"),
        (["space=sieve_ablation", "scheduler=pareto_halving"], "every row of a table"),
    ],
)
def test_halving_that_cannot_work_gets_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    assert main(words) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert err.count("\n") == 1


def test_results_depend_on_who_is_trained_to_the_end() -> None:
    plain = parse([]).identity()
    assert parse(["scheduler=pareto_halving"]).identity() != plain
    assert parse(["eta=4"]).identity() != plain
    assert parse(["rank_by=accuracy"]).identity() != plain
    assert parse(["first_rung=2"]).identity() != plain


def test_who_was_stopped_early_is_told_as_pruned_and_never_as_a_point_of_the_front() -> None:
    asked = problem(seed=0)
    first, second = Proposer(asked, sampler="random"), []
    for status in ("complete", "stopped"):
        proposal = next_proposal(first)
        outcome = Outcome(proposal.trial, status, proposal.trainable_params, accuracy=0.9)
        second.append((outcome, proposal.params))
    again = Proposer(asked, sampler="tpe")
    recalled(again, second)
    states = [trial.state.name for trial in again._study.get_trials(deepcopy=False)]
    assert states == ["COMPLETE", "PRUNED"]
    assert len(again._study.best_trials) == 1
    digests = {outcome.digest for outcome, _ in second}
    assert next_proposal(again).trial.digest not in digests


# --- whole studies


@pytest.mark.parametrize("rank_by", ["accuracy", pytest.param("eval_loss", marks=pytest.mark.slow)])
def test_a_study_that_was_cut_off_goes_on_where_its_trainings_paused(tmp_path: Path, rank_by: str) -> None:
    """A table answers instead of workers; what a killed driver leaves is written by hand: paused, under way, over."""
    record(tmp_path / "recorded")
    table = export([tmp_path / "recorded"], tmp_path / "small.parquet")
    words = [f"replay={tmp_path / 'small.parquet'}", "scheduler=pareto_halving", "eta=2", "sampler=random", "trials=12"]
    words += [f"storage={tmp_path}", "max_concurrent=3", "num_cpus=2", f"rank_by={rank_by}"]
    config, asked = prepare_replay(parse(words))
    folder = tmp_path / config.study_name
    proposer = Proposer(asked, sampler="random")
    with StudyFolder.open(folder, config=config.to_json(), identity=config.identity(), shape=asked.shape) as study:
        begun = [next_proposal(proposer) for _ in range(5)]
        for number, proposal in enumerate(begun):
            row = table.rows[proposal.trial.digest].outcome
            started = Outcome(proposal.trial, "started", proposal.trainable_params)
            study.append_started(started, proposal.params)
            for rung in row.rungs[: (1, 1, 2, 0, 3)[number]]:
                study.append_rung(row.digest, rung)
            if number == 4:
                study.append_finished(row, proposal.params)
    cut_off = len(lines(folder))

    command = [sys.executable, "-m", "search.run", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "150"}, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    finished = read(folder).finished
    assert len(finished) == 12, "trials counts what was started"
    statuses = Counter(outcome.status for outcome in finished.values())
    assert statuses["complete"] >= 2
    assert statuses["stopped"] >= 4
    assert {p.trial.digest for p in begun} <= set(finished)
    for digest, outcome in finished.items():
        row = table.rows[digest].outcome
        assert outcome.rungs == row.rungs[: len(outcome.rungs)]
        if outcome.status == "stopped":
            assert len(outcome.rungs) in rungs(3, 2)
            assert (outcome.tokens, outcome.adapter) == (outcome.rungs[-1].tokens, "")
        else:
            assert (outcome.status, outcome.accuracy) == (row.status, row.accuracy)
    assert all(run.status == "complete" for run in (c.best for c in front(candidates(finished.values()))))
    began = Counter(
        line["outcome"]["trial"]["digest"] for line in lines(folder)[cut_off:] if line["event"] == "started"
    )
    assert began[begun[4].trial.digest] == 0, "it had finished"
    assert any(finished[digest].status == "complete" for digest, times in began.items() if times > 1), "pause, go on"
    assert f"{statuses['stopped']} stopped" in done.stdout
    assert "% of all tokens not trained" in done.stdout
    assert f"Stopped early at an evaluation: {statuses['stopped']} trainings" in done.stdout


@pytest.mark.slow
def test_real_trainings_pause_go_on_from_their_checkpoints_and_survive_a_killed_driver(tmp_path: Path) -> None:
    words = ["space=sieve", "trials=8", "sampler=random", "scheduler=pareto_halving", "eta=2", "evaluations=4"]
    words += ["limit=24", "calibration_samples=16", "recipe.steps=12", "recipe.batch_size=4", f"storage={tmp_path}"]
    command = [sys.executable, "-m", "search.run", *words]
    folder = tmp_path / "sieve-tiny-moe-default"
    with (tmp_path / "first.log").open("w") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 400
    while sum(line["event"] == "rung" for line in lines(folder)) < 5:
        assert driver.poll() is None, (tmp_path / "first.log").read_text()
        assert time.monotonic() < deadline, (tmp_path / "first.log").read_text()
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    killed = read(folder)
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    finished = read(folder).finished
    assert len(finished) == 8
    assert {"complete", "stopped"} == {outcome.status for outcome in finished.values()}
    for outcome, _ in killed.in_flight:  # wall clock is never the same twice: equal seconds, trained once
        seconds = [rung.seconds for rung in outcome.rungs]
        assert [rung.seconds for rung in finished[outcome.digest].rungs][: len(seconds)] == seconds
    whole = [outcome for outcome in finished.values() if outcome.status == "complete"]
    assert all([rung.step for rung in outcome.rungs] == [3, 6, 9, 12] for outcome in whole)
    assert not list((folder / "checkpoints").glob("*"))
    adapters = {path.name for path in (folder / "adapters").glob("*")}
    assert adapters == {c.best.digest for c in front(candidates(finished.values()))}
