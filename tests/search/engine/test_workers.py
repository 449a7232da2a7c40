"""The board's bookkeeping, and how worker groups are fitted to a cluster. The groups run in test_study.py."""

from __future__ import annotations

import asyncio

import pytest

from allocators.core.errors import StudyError
from search.engine.workers import ATTEMPTS, MOST_CPU_GROUPS, NOTHING, Board, Plan, plan

DEFAULTS = {"workers_per_trial": 1, "cpus_per_worker": 1, "gpus_per_worker": -1.0, "max_concurrent": 0, "trials": 100}


@pytest.mark.parametrize(
    ("cluster", "asked", "expected"),
    [
        ({"CPU": 2}, {}, Plan(2, 1, 1, 0.0)),
        ({"CPU": 2}, {"trials": 1}, Plan(1, 1, 1, 0.0)),
        ({"CPU": 64}, {}, Plan(MOST_CPU_GROUPS, 1, 1, 0.0)),
        ({"CPU": 64}, {"max_concurrent": 20}, Plan(20, 1, 1, 0.0)),
        ({"CPU": 4}, {"workers_per_trial": 2}, Plan(2, 2, 1, 0.0)),
        ({"CPU": 16, "GPU": 4}, {}, Plan(4, 1, 1, 1.0)),
        ({"CPU": 16, "GPU": 4}, {"workers_per_trial": 4}, Plan(1, 4, 1, 1.0)),
        ({"CPU": 16, "GPU": 1}, {"gpus_per_worker": 0.25}, Plan(4, 1, 1, 0.25)),
        ({"CPU": 16, "GPU": 4}, {"gpus_per_worker": 0.0, "max_concurrent": 2}, Plan(2, 1, 1, 0.0)),
        ({"CPU": 2}, {"pack": 4}, Plan(2, 1, 1, 0.0, pack=4)),
        ({"CPU": 2}, {"pack": 4, "trials": 5}, Plan(2, 1, 1, 0.0, pack=3)),
        ({"CPU": 2}, {"pack": 4, "trials": 1}, Plan(1, 1, 1, 0.0, pack=1)),
    ],
)
def test_groups_fill_the_cluster_and_no_more(cluster, asked, expected):
    assert plan(cluster, **(DEFAULTS | asked)) == expected


@pytest.mark.parametrize(
    ("cluster", "asked"),
    [
        ({"CPU": 2}, {"workers_per_trial": 3}),
        ({"CPU": 2}, {"max_concurrent": 3}),
        ({"CPU": 2}, {"gpus_per_worker": 1.0}),
        ({"CPU": 16, "GPU": 1}, {"workers_per_trial": 2}),
    ],
)
def test_what_does_not_fit_is_refused_instead_of_waiting_for_ever(cluster, asked):
    with pytest.raises(StudyError, match=r"do not fit the cluster's .*lower max_concurrent"):
        plan(cluster, **(DEFAULTS | asked))


def test_workers_of_one_trial_need_a_gpu_each():
    with pytest.raises(StudyError, match="2 workers of one trial cannot share a GPU"):
        plan({"CPU": 16, "GPU": 1}, **(DEFAULTS | {"workers_per_trial": 2, "gpus_per_worker": 0.5}))


def test_a_job_goes_to_one_group_and_its_reports_to_who_asked():
    async def story():
        board = Board(groups=2)
        await board.submit("a", {"n": 1})
        await board.submit("b", {"n": 2})
        assert await board.take(0) == ("a", {"n": 1, "attempt": 1})
        assert await board.take(1) == ("b", {"n": 2, "attempt": 1})
        assert await board.report(1, "b", {"done": False, "rung": 1})
        assert await board.report(0, "a", {"done": True})
        assert await board.next_report("a") == {"done": True}
        assert await board.next_report("b") == {"done": False, "rung": 1}

    asyncio.run(story())


def test_of_two_workers_that_report_the_end_of_a_job_the_first_is_heard():
    """Both ran out of memory, and neither could ask the other; the group has the next job by the time of the second."""

    async def story():
        board = Board(groups=1)
        await board.submit("a", {})
        await board.submit("b", {})
        await board.take(0)
        assert await board.report(0, "a", {"done": True, "from": "second"})
        assert await board.take(0) == ("b", {"attempt": 1})
        assert not await board.report(0, "a", {"done": True, "from": "first"})
        assert await board.next_report("a") == {"done": True, "from": "second"}
        assert board.held[0] == {"b": {}}
        assert not board.reports["a"].qsize()

    asyncio.run(story())


def test_a_cancelled_job_is_told_to_stop_at_its_next_report():
    async def story():
        board = Board(groups=1)
        await board.submit("a", {})
        await board.take(0)
        await board.cancel("a")
        assert not await board.report(0, "a", {"done": False})

    asyncio.run(story())


def test_a_restarted_group_takes_its_job_again_until_the_job_has_killed_it_too_often():
    async def story():
        board = Board(groups=1)
        await board.submit("killer", {})
        await board.submit("next", {})
        for _ in range(ATTEMPTS):
            await board.start(0)
            assert (await board.take(0))[0] == "killer"
        await board.start(0)
        assert (await board.take(0))[0] == "next"
        answer = await board.next_report("killer")
        assert answer["done"]
        assert f"died {ATTEMPTS} times" in answer["error"]

    asyncio.run(story())


def test_a_worker_with_places_holds_several_jobs_and_takes_all_of_them_again_after_it_died():
    async def story():
        board = Board(groups=1, pack=3)
        await board.start(0)
        for job in "abc":
            await board.submit(job, {})
        for job in "abc":
            assert (await board.take(0, wait=False))[0] == job
        await board.submit("e", {})
        assert await board.take(0, wait=False) == NOTHING  # it has three places
        assert await board.report(0, "b", {"done": True})  # b's place is free, the others hold theirs
        assert list(board.held[0]) == ["a", "c"]
        await board.start(0)
        taken = [await board.take(0, wait=False) for _ in range(3)]
        assert taken == [("a", {"attempt": 2}), ("c", {"attempt": 2}), ("e", {"attempt": 1})]
        await board.cancel("c")
        assert await board.report(0, "a", {"done": False})
        assert not await board.report(0, "c", {"done": False})
        await board.lost(0, "no memory")
        for job in "ace":
            answers = [await board.next_report(job) for _ in range(1 + (job != "e"))]
            assert answers[-1]["error"] == "no memory"

    asyncio.run(story())


def test_no_worker_packs_what_another_one_could_train():
    async def story():
        board = Board(groups=3, pack=4)  # the third has not started yet: nobody waits for it
        await board.start(0)
        await board.start(1)
        for job in "abcd":
            await board.submit(job, {})
        assert (await board.take(0))[0] == "a"
        assert await board.take(0, wait=False) == NOTHING
        assert (await board.take(1))[0] == "b"
        assert (await board.take(0, wait=False))[0] == "c"
        assert await board.take(0, wait=False) == NOTHING
        await board.lost(1, "no memory")
        assert (await board.take(0, wait=False))[0] == "d"

    asyncio.run(story())


def test_a_job_goes_to_nobody_who_died_while_waiting_for_it():
    async def story():
        board = Board(groups=1)
        await board.start(0)
        dead = asyncio.create_task(board.take(0))
        await asyncio.sleep(0)
        await board.start(0)
        await board.submit("a", {})
        assert await dead is None
        assert await board.take(0) == ("a", {"attempt": 1})

    asyncio.run(story())


def test_when_the_last_group_is_lost_nothing_waits_for_ever():
    async def story():
        board = Board(groups=2)
        for job in "abc":
            await board.submit(job, {})
        await board.take(0)
        await board.take(1)
        await board.lost(0, "no memory")
        assert (await board.next_report("a"))["error"] == "no memory"
        await board.lost(1, "no memory either")
        assert (await board.next_report("b"))["error"] == "no memory either"
        assert "no worker is left" in (await board.next_report("c"))["error"]
        await board.submit("late", {})
        assert "no worker is left" in (await board.next_report("late"))["error"]

    asyncio.run(story())


def test_closing_lets_every_group_go():
    async def story():
        board = Board(groups=2)
        await board.close()
        assert await board.take(0) is None
        assert await board.take(1) is None

    asyncio.run(story())
