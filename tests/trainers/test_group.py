"""What a worker of a group does where another one is gone, between two processes that gloo connects."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from allocators.core.messages import Assignment, Job, Report, TrainJob, UntrainedJob
from allocators.core.types import ExpertSelection, Recipe, Trial
from tests.trainers.conftest import worker_setup
from trainers.worker import Ranks, _GroupMember
from trainers.worker_state import WorkerState, has_lost_others


class OneJob:
    """A queue that hands out this job, and keeps what is reported of it."""

    def __init__(self, job: Job) -> None:
        self.job: Job | None = job
        self.reports: list[str] = []

    def take(self) -> Assignment | str:
        job, self.job = self.job, None
        return "closed" if job is None else Assignment("job", job, 1)

    def note(self, taken: Assignment) -> None:
        pass

    def report(self, job_id: str, report: Report) -> bool:
        self.reports.append(type(report).__name__)
        return True

    def progress(self, job_id: str) -> Callable[[int, int, str], None]:
        return lambda done, total, what: None


class Dying(OneJob):
    """The queue as the second worker sees it, which dies as soon as it has heard of its job."""

    def note(self, taken: Assignment) -> None:
        os._exit(1)


def member(rank: int, kind: str, folder: str) -> None:
    """A worker of two: the first one writes what it reported, and how it ended."""
    meeting, limit = f"file://{folder}/rendezvous", timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=limit)
    setup = worker_setup(Path(folder), task="tiny_cipher", task_options={"limit": 8}, evaluations=1)
    state = WorkerState(setup, "cpu")
    job: Job = UntrainedJob()
    if kind == "training":
        chosen = ExpertSelection(dict.fromkeys(state.shape.moe_layers, (0, 3)))
        trial = Trial(chosen, Recipe(rank=4, steps=2, batch_size=4, micro_batch_size=2), "tiny-moe", "tiny_cipher", 0)
        job = TrainJob(trial, chosen.trainable_params(state.shape, rank=4))
    queue = (OneJob, Dying)[rank](job)
    try:
        _GroupMember(state, queue, Ranks(rank, True)).serve()  # type: ignore[arg-type]
    except RuntimeError as error:
        told = {"reports": queue.reports, "lost": has_lost_others(error), "error": str(error)}
        (Path(folder) / "told.json").write_text(json.dumps(told))


@pytest.mark.parametrize("kind", ["training", pytest.param("question", marks=pytest.mark.slow)])
def test_a_worker_whose_other_one_is_gone_reports_no_failure(kind: str, tmp_path: Path) -> None:
    both = torch.multiprocessing.get_context("spawn")
    workers = [both.Process(target=member, args=(rank, kind, str(tmp_path))) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["lost"], told["error"]
    assert told["reports"] == []
