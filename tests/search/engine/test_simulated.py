"""Simulated workers: the order in which reports come, by hand and against an event simulation."""

from __future__ import annotations

from typing import Literal

from hypothesis import given
from hypothesis import strategies as st

from allocators.core.types import ExpertSelection, Outcome, Recipe, Rung, Trial
from search.engine.simulated import SimulatedWorkers
from search.problem import Proposal


def trial(number: int) -> Trial:
    return Trial(ExpertSelection({}), Recipe(), "small", "t", number)


def recorded(number: int, times: list[int]) -> Outcome:
    rungs = tuple(Rung(tokens, tokens, 0.5) for tokens in times)
    return Outcome(trial(number), "complete", 10, accuracy=0.5, rungs=rungs, tokens=times[-1], versions={"torch": "2"})


class Script:
    """A conductor that proposes trainings in turn, and notes what comes.

    Those in `pauses` leave after their first rung and are proposed again when nothing else is left.
    """

    def __init__(self, names: dict[str, str], pauses: tuple[str, ...] = ()) -> None:
        self.names = names  # by digest
        self.waiting = [Proposal(trial(number), 10, {}) for number in range(len(names))]
        self.pauses = pauses
        self.paused: list[Proposal] = []
        self.running: dict[str, Proposal] = {}
        self.came: list[tuple[str, str]] = []
        self.outcomes: list[Outcome] = []

    def propose(self) -> Proposal | Literal["wait"] | None:
        if self.waiting or self.paused:
            proposal = self.waiting.pop(0) if self.waiting else self.paused.pop(0)
            self.running[proposal.trial.digest] = proposal
            return proposal
        return None

    def rung(self, digest: str, rung: Rung) -> bool:
        name = self.names[digest]
        first = name not in [job for job, _ in self.came]
        self.came.append((name, str(rung.tokens)))
        if name in self.pauses and first:
            self.paused.append(self.running.pop(digest))
            return False
        return True

    def finished(self, outcome: Outcome) -> None:
        self.came.append((self.names[outcome.digest], "end"))
        self.outcomes.append(outcome)

    def lost(self, digest: str, reason: str, *, again: bool = True) -> None:
        raise AssertionError(f"{self.names[digest]} is lost: {reason}")


def run(tokens: dict[str, list[int]], workers: int, *, pauses: tuple[str, ...] = ()) -> Script:
    """Free workers take the trainings in turn; `tokens` of each are when it reports."""
    outcomes = {trial(i).digest: recorded(i, times) for i, times in enumerate(tokens.values())}
    conductor = Script({trial(i).digest: name for i, name in enumerate(tokens)}, pauses)
    simulated = SimulatedWorkers(outcomes, workers=workers, source="table", mark="table 1")
    simulated.search(conductor, pausing=bool(pauses))
    return conductor


def order(tokens: dict[str, list[int]], workers: int, *, pauses: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    return run(tokens, workers, pauses=pauses).came


def test_two_workers_by_hand() -> None:
    #   a: 10 20 | b: 15 40 | c starts when a ends at 20 and reports at 20 + 5
    came = order({"a": [10, 20], "b": [15, 40], "c": [5]}, workers=2)
    expected = [
        ("a", "10"),
        ("b", "15"),
        ("a", "20"),
        ("a", "end"),
        ("c", "5"),
        ("c", "end"),
        ("b", "40"),
        ("b", "end"),
    ]
    assert came == expected


@given(
    st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=3, unique=True).map(sorted), min_size=1, max_size=7),
    st.integers(1, 4),
)
def test_reports_come_in_the_order_of_an_event_simulation(curves: list[list[int]], workers: int) -> None:
    tokens = {f"job{i}": curve for i, curve in enumerate(curves)}
    came = order(tokens, workers)
    assert sorted(job for job, what in came if what == "end") == sorted(tokens)
    free, starts, ends = [0.0] * workers, {}, {}
    for name, curve in tokens.items():  # greedy: the worker that is free first takes the next job
        at = min(free)
        free.remove(at)
        starts[name], ends[name] = at, at + curve[-1]
        free.append(ends[name])
    times = [ends[job] if what == "end" else starts[job] + int(what) for job, what in came]
    assert times == sorted(times)


def test_of_reports_at_one_time_that_of_the_training_that_began_first_comes_first() -> None:
    came = order({name: [10, 20] for name in "abc"}, workers=3)
    assert came == [*((name, "10") for name in "abc"), *((name, what) for name in "abc" for what in ("20", "end"))]


def test_a_job_that_was_paused_goes_on_behind_what_it_had_reached() -> None:
    came = order({"a": [10, 20, 30], "b": [12]}, workers=1, pauses=("a",))
    assert came == [("a", "10"), ("b", "12"), ("b", "end"), ("a", "10"), ("a", "20"), ("a", "30"), ("a", "end")]


def test_a_training_that_the_table_lacks_is_an_error_not_a_number() -> None:
    conductor = Script({trial(0).digest: "unknown"})
    SimulatedWorkers({}, workers=1, source="table", mark="table 1").search(conductor, pausing=False)
    (outcome,) = conductor.outcomes
    assert (outcome.status, outcome.message) == ("failed", "the table has no row for this training")


def test_an_outcome_names_its_table_and_the_allocator_that_was_asked_for() -> None:
    asked = Trial(ExpertSelection({}), Recipe(), "small", "t", 0, "sieve", {"fraction": 0.25})
    conductor = Script({asked.digest: "a"})
    conductor.waiting = [Proposal(asked, 10, {})]
    known = recorded(0, [10]).updated(adapter="adapters/x")
    assert known.trial.allocator == ""
    SimulatedWorkers({asked.digest: known}, workers=1, source="table", mark="table 1").search(conductor, pausing=False)
    (outcome,) = conductor.outcomes
    assert outcome.trial == asked
    assert (outcome.adapter, outcome.versions) == ("", {"torch": "2", "replayed": "table 1"})


def test_a_free_worker_waits_for_a_result_where_the_conductor_does() -> None:
    class Careful(Script):
        """Proposes nothing while anything is under way."""

        def propose(self) -> Proposal | Literal["wait"] | None:
            return "wait" if self.running else super().propose()

        def finished(self, outcome: Outcome) -> None:
            super().finished(outcome)
            del self.running[outcome.digest]

    tokens = {"a": [10], "b": [5]}
    conductor = Careful({trial(i).digest: name for i, name in enumerate(tokens)})
    outcomes = {trial(i).digest: recorded(i, times) for i, times in enumerate(tokens.values())}
    SimulatedWorkers(outcomes, workers=2, source="table", mark="table 1").search(conductor, pausing=False)
    assert [job for job, what in conductor.came if what == "end"] == ["a", "b"]
