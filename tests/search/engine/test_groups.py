"""How worker groups are fitted to a cluster. The groups run in test_study.py."""

from __future__ import annotations

from typing import Any

import pytest

from allocators.core.errors import StudyError
from search.engine.groups import MOST_CPU_GROUPS, MOST_PACKED, Resources, WorkerGroups


@pytest.mark.parametrize(
    ("cluster", "asked", "expected"),
    [
        ({"CPU": 2}, {}, WorkerGroups(2, 1, 1, 0.0)),
        ({"CPU": 2}, {"trials": 1}, WorkerGroups(1, 1, 1, 0.0)),
        ({"CPU": 64}, {}, WorkerGroups(MOST_CPU_GROUPS, 1, 1, 0.0)),
        ({"CPU": 64}, {"max_concurrent": 20}, WorkerGroups(20, 1, 1, 0.0)),
        ({"CPU": 4}, {"workers_per_trial": 2}, WorkerGroups(2, 2, 1, 0.0)),
        ({"CPU": 16, "GPU": 4}, {}, WorkerGroups(4, 1, 1, 1.0)),
        ({"CPU": 16, "GPU": 4}, {"workers_per_trial": 4}, WorkerGroups(1, 4, 1, 1.0)),
        ({"CPU": 16, "GPU": 1}, {"gpus_per_worker": 0.25}, WorkerGroups(4, 1, 1, 0.25)),
        ({"CPU": 16, "GPU": 4}, {"gpus_per_worker": 0.0, "max_concurrent": 2}, WorkerGroups(2, 1, 1, 0.0)),
        ({"CPU": 2}, {"pack": 4}, WorkerGroups(2, 1, 1, 0.0, pack=4)),
        ({"CPU": 2}, {"pack": 4, "trials": 5}, WorkerGroups(2, 1, 1, 0.0, pack=3)),
        ({"CPU": 2}, {"pack": 4, "trials": 1}, WorkerGroups(1, 1, 1, 0.0, pack=1)),
        ({"CPU": 2}, {"pack": None}, WorkerGroups(2, 1, 1, 0.0, pack=MOST_PACKED)),
    ],
)
def test_groups_fill_the_cluster_and_no_more(
    cluster: dict[str, int], asked: dict[str, Any], expected: WorkerGroups
) -> None:
    assert Resources(**({"trials": 100} | asked)).groups_in([cluster]) == expected


@pytest.mark.parametrize(
    ("cluster", "asked"),
    [
        ({"CPU": 2}, {"workers_per_trial": 3}),
        ({"CPU": 2}, {"max_concurrent": 3}),
        ({"CPU": 2}, {"gpus_per_worker": 1.0}),
        ({"CPU": 16, "GPU": 1}, {"workers_per_trial": 2}),
    ],
)
def test_what_does_not_fit_is_refused_instead_of_waiting_for_ever(
    cluster: dict[str, int], asked: dict[str, float] | dict[str, int]
) -> None:
    with pytest.raises(StudyError, match=r"do not fit the cluster's .*lower max_concurrent"):
        Resources(100, **asked).groups_in([cluster])


def test_workers_of_one_trial_need_a_gpu_each() -> None:
    with pytest.raises(StudyError, match="2 workers of one trial cannot share a GPU"):
        Resources(100, workers_per_trial=2, gpus_per_worker=0.5).groups_in([{"CPU": 16, "GPU": 1}])


def test_a_worker_has_to_fit_one_node_and_a_group_may_lie_on_several() -> None:
    nodes = [{"CPU": 3}, {"CPU": 1}]
    assert Resources(100, cpus_per_worker=2).fitting(nodes) == 1
    assert Resources(100, workers_per_trial=4).fitting(nodes) == 1
    assert Resources(100, cpus_per_worker=4).fitting(nodes) == 0


def test_a_cluster_that_may_grow_has_a_group_at_least_and_as_many_as_asked() -> None:
    assert Resources(100, workers_per_trial=2).room_in([{"CPU": 1}]).groups == 1
    assert Resources(100, max_concurrent=3).room_in([{"CPU": 1}]).groups == 3
    assert Resources(2, max_concurrent=3).room_in([]).groups == 2
