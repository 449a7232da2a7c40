"""The job queue's bookkeeping. The groups that take its jobs run in test_study.py."""

from __future__ import annotations

import asyncio
import pickle

from allocators.core.messages import (
    Assignment,
    Failed,
    Finished,
    Progressed,
    RungReached,
    SignalMeasured,
    TaskDescribed,
    TaskJob,
    TrainJob,
)
from allocators.core.types import ExpertCounts, ExpertSelection, Outcome, Recipe, Rung, Signal, Trial
from search.engine.queue import ATTEMPTS, JobQueue

TRIAL = Trial(ExpertSelection({0: (1, 2)}), Recipe(), "m", "t", 0, "sieve", {"fraction": 0.5})
JOB = TrainJob(TRIAL, 10)
ASKS = TrainJob(TRIAL, 10, asks=True)
STOPPED = Finished(Outcome(TRIAL, "stopped", 10, accuracy=0.5))
END = Finished(Outcome(TRIAL, "complete", 10, accuracy=0.5))


async def assigned(queue: JobQueue, group: int, life: int = 0, *, wait: bool = True) -> Assignment:
    assignment = await queue.take(group, life, wait=wait)
    assert isinstance(assignment, Assignment)
    return assignment


async def failed(queue: JobQueue, job: str) -> Failed:
    report = await queue.next_report(job, JOB)
    assert isinstance(report, Failed)
    return report


def rung(step: int) -> RungReached:
    return RungReached(Rung(step, 10 * step, 0.5))


def test_everything_that_travels_pickles_as_it_is() -> None:
    signal = Signal("routing", {"0": {"count": (1.0, 2.0)}}, "expert", "tokens", {"model": "m"})
    dense = Trial(ExpertCounts({"model.layers.0.mlp.up_proj": 2}), Recipe(), "m", "t", 0)
    last = Rung(3, 30, 0.5, by_task={"arc_easy": {"accuracy": 0.5, "stderr": 0.1}})
    outcome = Outcome(dense, "complete", 10, accuracy=0.5, rungs=(last,), versions={"torch": "2"})
    for message in (
        *(JOB, ASKS, TrainJob(dense, 3), Assignment("a", TaskJob(), 2)),
        *(rung(1), RungReached(last), END, Finished(outcome), Failed("no"), Progressed(1, 2, "samples")),
        TaskDescribed("a task", {"torch": "2"}),
    ):
        assert pickle.loads(pickle.dumps(message)) == message
    again = pickle.loads(pickle.dumps(SignalMeasured(signal)))
    assert again.signal.to_json() == signal.to_json()
    assert pickle.loads(pickle.dumps(JOB)).trial.digest == TRIAL.digest


def test_a_job_goes_to_one_group_and_its_reports_to_who_asked() -> None:
    async def story() -> None:
        queue = JobQueue(groups=2)
        await queue.submit("a", JOB)
        await queue.submit("b", TaskJob())
        assert await queue.take(0, 0) == Assignment("a", JOB, attempt=1)
        assert await queue.take(1, 0) == Assignment("b", TaskJob(), attempt=1)
        assert await queue.report(1, 0, "b", TaskJob(), rung(1))
        assert await queue.report(0, 0, "a", JOB, END)
        assert await queue.next_report("a", JOB) == END
        assert await queue.next_report("b", TaskJob()) == rung(1)

    asyncio.run(story())


def test_if_two_workers_report_the_end_of_a_job_the_first_report_counts() -> None:
    """Both ran out of memory, and neither could ask the other; the group has the next job by the time of the second."""

    async def story() -> None:
        queue = JobQueue(groups=1)
        await queue.submit("a", JOB)
        await queue.submit("b", JOB)
        await queue.take(0, 0)
        assert await queue.report(0, 0, "a", JOB, Failed("of the second worker"))
        assert await queue.take(0, 0) == Assignment("b", JOB, attempt=1)
        assert not await queue.report(0, 0, "a", JOB, Failed("of the first worker"))
        assert await queue.next_report("a", JOB) == Failed("of the second worker")
        assert queue.held[0] == {"b": JOB}
        assert not queue.reports["a"]

    asyncio.run(story())


def test_a_cancelled_job_stops_at_its_next_report_and_that_it_stopped_is_no_news() -> None:
    async def story() -> None:
        queue = JobQueue(groups=1)
        await queue.submit("a", JOB)
        await queue.take(0, 0)
        await queue.cancel("a")
        assert not await queue.report(0, 0, "a", JOB, rung(1))
        assert not await queue.report(0, 0, "a", JOB, STOPPED)
        again = asyncio.create_task(queue.next_report("a", JOB))  # goes on later
        assert (await assigned(queue, 0)).job_id == "a"
        await queue.report(0, 0, "a", JOB, END)
        assert await again == END

    asyncio.run(story())


def test_a_job_that_is_cancelled_and_wanted_again_before_it_stopped_is_trained_on() -> None:
    async def story() -> None:
        queue = JobQueue(groups=1)
        await queue.submit("a", JOB)
        await queue.take(0, 0)
        await queue.cancel("a")
        assert not await queue.report(0, 0, "a", JOB, rung(1))
        again = asyncio.create_task(queue.next_report("a", JOB))
        await asyncio.sleep(0)
        assert not await queue.report(0, 0, "a", JOB, STOPPED)
        assert (await assigned(queue, 0)).job_id == "a"
        await queue.report(0, 0, "a", JOB, END)
        assert await again == END

    asyncio.run(story())


def test_a_restarted_group_takes_its_job_again_until_the_job_has_killed_it_too_often() -> None:
    async def story() -> None:
        queue = JobQueue(groups=1)
        await queue.submit("killer", JOB)
        await queue.submit("next", JOB)
        for attempt in range(ATTEMPTS):
            await queue.start(0, attempt)
            assert await queue.take(0, attempt) == Assignment("killer", JOB, attempt + 1)
        assert await queue.take(0, ATTEMPTS) == Assignment("next", JOB, 1)
        assert f"died {ATTEMPTS} times" in (await failed(queue, "killer")).reason

    asyncio.run(story())


def test_a_job_that_is_evaluated_before_its_worker_dies_is_no_killer() -> None:
    async def story() -> None:
        queue = JobQueue(groups=1)
        await queue.submit("a", JOB)
        for life in range(3 * ATTEMPTS):
            assert (await assigned(queue, 0, life)).job_id == "a"
            assert await queue.report(0, life, "a", JOB, rung(life + 1))
        assert await queue.reports_of(0) == 3 * ATTEMPTS

    asyncio.run(story())


def test_a_worker_with_slots_holds_several_jobs_and_takes_all_of_them_again_after_it_died() -> None:
    async def story() -> None:
        queue = JobQueue(groups=1, slots=3)
        await queue.start(0, 0)
        for job in "abc":
            await queue.submit(job, JOB)
        for job in "abc":
            assert (await assigned(queue, 0, wait=False)).job_id == job
        await queue.submit("e", JOB)
        assert await queue.take(0, 0, wait=False) == "empty"  # it has three slots
        assert await queue.report(0, 0, "b", JOB, END)  # b's slot is free, the others hold theirs
        assert list(queue.held[0]) == ["a", "c"]
        await queue.start(0, 1)
        taken = [await queue.take(0, 1, wait=False) for _ in range(3)]
        assert taken == [Assignment("a", JOB, 2), Assignment("c", JOB, 2), Assignment("e", JOB, 1)]
        await queue.cancel("c")
        assert await queue.report(0, 1, "a", JOB, rung(1))
        assert not await queue.report(0, 1, "c", JOB, rung(1))
        await queue.lost(0, "no memory")
        for job in "ae":
            answers = [await queue.next_report(job, JOB) for _ in range(1 + (job == "a"))]
            assert answers[-1] == Failed("no worker is left: no memory")

    asyncio.run(story())


def test_no_worker_packs_what_another_one_could_train() -> None:
    async def story() -> None:
        queue = JobQueue(groups=3, slots=4)  # the third has not started yet: nobody waits for it
        await queue.start(0, 0)
        await queue.start(1, 0)
        for job in "abcd":
            await queue.submit(job, JOB)
        assert (await assigned(queue, 0)).job_id == "a"
        assert await queue.take(0, 0, wait=False) == "empty"
        assert (await assigned(queue, 1)).job_id == "b"
        assert (await assigned(queue, 0, wait=False)).job_id == "c"
        assert await queue.take(0, 0, wait=False) == "empty"
        await queue.lost(1, "no memory")
        assert [(await assigned(queue, 0, wait=False)).job_id for _ in range(2)] == ["d", "b"], "it takes over b"

    asyncio.run(story())


def test_a_job_goes_to_nobody_who_died_while_waiting_for_it() -> None:
    async def story() -> None:
        queue = JobQueue(groups=1)
        await queue.start(0, 0)
        dead = asyncio.create_task(queue.take(0, 0))
        await asyncio.sleep(0)
        await queue.start(0, 1)
        await queue.submit("a", JOB)
        assert await dead == "closed"
        assert await queue.take(0, 1) == Assignment("a", JOB, 1)
        assert not await queue.report(0, 0, "a", JOB, END), "a worker that was thought dead has no say"
        assert await queue.take(0, 0) == "closed"

    asyncio.run(story())


def test_others_take_over_from_a_lost_group_and_after_the_last_one_nothing_waits_for_ever() -> None:
    async def story() -> None:
        queue = JobQueue(groups=2)
        for job in "abc":
            await queue.submit(job, JOB)
        await queue.take(0, 0)
        await queue.take(1, 0)
        await queue.lost(0, "no memory")
        await queue.report(1, 0, "b", JOB, END)
        assert [(await assigned(queue, 1)).job_id for _ in range(2)] == ["c", "a"]
        await queue.lost(1, "no memory either")
        for job in ("a", "c", "late"):
            assert (await failed(queue, job)).reason == "no worker is left: no memory either"

    asyncio.run(story())


def test_jobs_wait_for_a_group_that_was_added_and_has_not_come_when_the_last_other_one_is_lost() -> None:
    async def story() -> None:
        queue = JobQueue(groups=1)
        for job in "ab":
            await queue.submit(job, JOB)
        await queue.take(0, 0)
        await queue.expect(1)
        await queue.lost(0, "its node left")
        assert [(await assigned(queue, 1)).job_id for _ in range(2)] == ["b", "a"]
        await queue.expect(2)
        await queue.lost(2, "it never came")
        await queue.expect(2)  # once more, after the queue was told that it is gone
        await queue.lost(1, "nor did the other one stay")
        for job in "ab":
            assert (await failed(queue, job)).reason == "no worker is left: nor did the other one stay"

    asyncio.run(story())


def test_of_two_readers_of_a_job_the_last_gets_its_reports() -> None:
    """The process of a Tune trial was killed while it waited; what goes on with the trial asks for the same."""

    async def story() -> None:
        queue = JobQueue(groups=1)
        dead = asyncio.create_task(queue.next_report("a", JOB))
        await queue.take(0, 0)
        alive = asyncio.create_task(queue.next_report("a", JOB))
        await asyncio.sleep(0)
        await queue.report(0, 0, "a", JOB, END)
        assert await alive == END
        assert isinstance(await dead, Failed)
        assert await queue.next_report("a", JOB) == END, "the answer died with its reader: it is given again"

    asyncio.run(story())


def test_a_queue_that_was_killed_learns_from_open_calls_who_works_on_what() -> None:
    async def story() -> None:
        queue = JobQueue(groups=2, restarted=True, grace=0.05)
        readers = [asyncio.create_task(queue.next_report(job, JOB)) for job in "ab"]
        idle = asyncio.create_task(queue.take(1, 0))
        await asyncio.sleep(0)
        held = asyncio.create_task(queue.hold(0, 3, "a", JOB))
        await asyncio.sleep(0)
        assert (await idle) == Assignment("b", JOB, 1), "a is not trained twice"
        assert await queue.report(0, 3, "a", JOB, rung(1))
        assert await readers[0] == rung(1)
        assert not held.done()
        assert await queue.report(0, 3, "a", JOB, END)
        await held
        assert await queue.next_report("a", JOB) == END

    asyncio.run(story())


def test_closing_lets_every_group_go() -> None:
    async def story() -> None:
        queue = JobQueue(groups=2)
        await queue.close()
        assert await queue.take(0, 0) == "closed"
        assert await queue.take(1, 0) == "closed"

    asyncio.run(story())


# --- a worker at a rung, where trainings may be paused


def test_a_worker_that_asks_is_answered_by_what_is_wanted_next() -> None:
    async def story() -> None:
        queue = JobQueue(groups=2)
        await queue.submit("a", ASKS)
        await queue.submit("b", ASKS)
        await queue.take(0, 0)
        await queue.take(1, 0)
        first = [asyncio.ensure_future(queue.report(group, 0, job, ASKS, rung(1))) for group, job in enumerate("ab")]
        assert await queue.next_report("a", ASKS) == await queue.next_report("b", ASKS) == rung(1)
        assert not any(answer.done() for answer in first), "they wait: who decides has not said anything"
        wanted = asyncio.ensure_future(queue.next_report("a", ASKS))
        await queue.cancel("b")
        assert [await answer for answer in first] == [True, False]
        await queue.submit("c", JOB)
        assert (await assigned(queue, 1)).job_id == "c", "the worker of b is free at once"
        assert not await queue.report(1, 0, "b", ASKS, END), "and its last words on b are for nobody"
        await queue.report(0, 0, "a", ASKS, END)
        assert await wanted == END

    asyncio.run(story())


def test_a_job_that_left_goes_on_elsewhere_and_nothing_of_before_is_in_its_way() -> None:
    async def story() -> None:
        queue = JobQueue(groups=2)
        for number, group in enumerate((0, 1, 0, 1)):  # more often than a job may kill its worker
            await queue.submit("a", ASKS)
            assert (await assigned(queue, group)).job_id == "a"
            answer = asyncio.ensure_future(queue.report(group, 0, "a", ASKS, rung(number)))
            assert await queue.next_report("a", ASKS) == rung(number)
            await queue.cancel("a")
            assert not await answer
        await queue.submit("a", ASKS)
        await queue.take(0, 0)
        last = asyncio.ensure_future(queue.next_report("a", ASKS))
        assert await queue.report(0, 0, "a", ASKS, END)
        assert await last == END

    asyncio.run(story())


def test_a_worker_that_died_while_it_asked_asks_again() -> None:
    async def story() -> None:
        queue = JobQueue(groups=1)
        await queue.submit("a", ASKS)
        await queue.take(0, 0)
        dead = asyncio.ensure_future(queue.report(0, 0, "a", ASKS, rung(1)))
        assert await queue.next_report("a", ASKS) == rung(1)
        await queue.start(0, 1)
        assert (await assigned(queue, 0, 1)).job_id == "a", "the restarted group has it again"
        answer = asyncio.ensure_future(queue.report(0, 1, "a", ASKS, rung(1)))
        await asyncio.sleep(0)
        assert await queue.next_report("a", ASKS) == rung(1)
        wanted = asyncio.ensure_future(queue.next_report("a", ASKS))
        assert await answer
        await queue.report(0, 1, "a", ASKS, END)
        assert await wanted == END
        dead.cancel()

    asyncio.run(story())


def test_closing_lets_those_go_who_ask() -> None:
    async def story() -> None:
        queue = JobQueue(groups=1)
        await queue.submit("a", ASKS)
        await queue.take(0, 0)
        answer = asyncio.ensure_future(queue.report(0, 0, "a", ASKS, rung(1)))
        await asyncio.sleep(0)
        await queue.close()
        assert not await answer
        assert await queue.take(0, 0) == "closed"

    asyncio.run(story())


# --- groups that come and go


def test_jobs_of_a_group_without_a_node_go_to_others_first_and_that_is_no_sign_against_them() -> None:
    async def story() -> None:
        queue = JobQueue(groups=1)
        for job in ("a", "b"):
            await queue.submit(job, JOB)
        for life in range(3 * ATTEMPTS):  # each time its node is lost
            assert await queue.take(0, life) == Assignment("a", JOB, attempt=1)
            await queue.leave(0)
        assert not await queue.report(0, 3 * ATTEMPTS - 1, "a", JOB, rung(1)), "it was only cut off, and is to stop"
        assert await queue.take(1, 0) == Assignment("a", JOB, attempt=1), "a group that joined"
        assert await queue.take(0, 3 * ATTEMPTS) == Assignment("b", JOB, attempt=1), "the first has a node again"

    asyncio.run(story())


def test_a_group_without_a_node_is_not_waited_for() -> None:
    async def story() -> None:
        queue = JobQueue(groups=2, slots=2)
        await queue.start(0, 0)
        await queue.start(1, 0)
        for job in ("a", "b"):
            await queue.submit(job, JOB)
        await queue.take(0, 0, wait=False)
        assert await queue.take(0, 0, wait=False) == "empty"  # the other one has fewer
        await queue.leave(1)
        assert (await assigned(queue, 0, wait=False)).job_id == "b"

    asyncio.run(story())


def test_a_group_that_joins_is_one_of_those_that_are_left() -> None:
    async def story() -> None:
        queue = JobQueue(groups=1)
        await queue.arrive(1, 0, "node")
        await queue.arrive(1, 0, "another", 1)
        await queue.start(1, 0)
        await queue.lost(0, "its node left the cluster")
        await queue.submit("a", JOB)
        assert (await assigned(queue, 1)).job_id == "a"
        assert await queue.take(0, 1) == "closed"
        told = [(news.event, news.group, news.node, news.worker, news.job) for news in await queue.heard_of()]
        assert told == [("arrived", 1, "node", 0, ""), ("arrived", 1, "another", 1, ""), ("took", 1, "", 0, "a")]
        assert not await queue.heard_of()

    asyncio.run(story())
