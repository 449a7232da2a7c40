"""How many worker groups a cluster holds, of what size. Arithmetic alone: no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from allocators.core.errors import StudyError

MOST_PACKED = 8  # trials of a worker where it measures how many to pack
MOST_CPU_GROUPS = 8  # default on machines without a GPU: every group holds one copy of the base model


@dataclass(frozen=True)
class WorkerGroups:
    """How many worker groups of what size run at once, and how many trials each of them packs."""

    groups: int
    workers: int
    cpus_per_worker: int
    gpus_per_worker: float
    pack: int = 1

    @property
    def slots(self) -> int:
        """Trials that train at once."""
        return self.groups * self.pack

    def describe(self) -> str:
        """How many trials train at once, and on what, in one line."""
        devices = f"{self.gpus_per_worker:g} GPU" if self.gpus_per_worker else f"{self.cpus_per_worker} CPU"
        if self.pack > 1:
            return f"{self.groups} worker(s) that train up to {self.pack} trials in one pass, {devices} each"
        return f"{self.groups} trial(s) at once, {self.workers} worker(s) each, {devices} a worker"


@dataclass(frozen=True)
class Resources:
    """What a study asks of Ray: keys of the same names in `search/config.py`, and the trainings that are left.

    trials   no more groups or packed trials are started than there are trainings
    pack     trainings that share a worker; None: as many as it measures
    """

    trials: int
    ray_address: str = "local"
    num_cpus: int = 0
    workers_per_trial: int = 1
    cpus_per_worker: int = 1
    gpus_per_worker: float = -1.0
    max_concurrent: int = 0
    pack: int | None = 1

    def groups_in(self, cluster: Mapping[str, float]) -> WorkerGroups:
        """Fits worker groups to what the cluster holds. Rather another worker than another trial in a pack.

        Raises StudyError when not even one group fits, or fewer than `max_concurrent` asks for: a group that waits for
        resources that do not exist would wait for ever. Also for several workers of a trial with a part of a GPU each:
        Ray would put them on one, and NCCL refuses two ranks on one device.
        """
        cpus, gpus = cluster.get("CPU", 0.0), cluster.get("GPU", 0.0)
        wanted = (1.0 if gpus else 0.0) if self.gpus_per_worker < 0 else self.gpus_per_worker
        if self.workers_per_trial > 1 and 0 < wanted < 1:
            raise StudyError(
                f"{self.workers_per_trial} workers of one trial cannot share a GPU (gpus_per_worker={wanted:g}): use "
                "gpus_per_worker=1, or workers_per_trial=1 to have several trials share one"
            )
        fitting = int(cpus // (self.workers_per_trial * self.cpus_per_worker))
        if wanted:
            fitting = min(fitting, int(gpus / (self.workers_per_trial * wanted) + 1e-9))
        if fitting < max(1, self.max_concurrent):
            count = f"{self.max_concurrent} times " if self.max_concurrent > 1 else ""
            asked = f"{self.workers_per_trial} worker(s) of {self.cpus_per_worker} CPU and {wanted:g} GPU"
            raise StudyError(
                f"{count}{asked} do not fit the cluster's {cpus:g} CPU and {gpus:g} GPU: lower max_concurrent, "
                "workers_per_trial, cpus_per_worker or gpus_per_worker (num_cpus raises a local cluster's logical CPUs)"
            )
        groups = self.max_concurrent or (fitting if wanted else min(fitting, MOST_CPU_GROUPS))
        groups = min(groups, self.trials)
        pack = MOST_PACKED if self.pack is None else self.pack
        return WorkerGroups(
            groups, self.workers_per_trial, self.cpus_per_worker, wanted, min(pack, -(-self.trials // groups))
        )
