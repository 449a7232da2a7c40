"""How many worker groups a cluster holds, of what size. Arithmetic alone: no Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    wait     seconds that a study on a cluster waits for the resources of one worker group
    """

    trials: int
    ray_address: str = "local"
    num_cpus: int = 0
    workers_per_trial: int = 1
    cpus_per_worker: int = 1
    gpus_per_worker: float = -1.0
    max_concurrent: int = 0
    pack: int | None = 1
    wait: float = 600.0

    def groups_in(self, nodes: Sequence[Mapping[str, float]]) -> WorkerGroups:
        """Fits worker groups to what the nodes of a cluster hold. Rather another worker than another trial in a pack.

        Raises StudyError when not even one group fits, or fewer than `max_concurrent` asks for: on a machine that does
        not grow they would wait for ever. Also what `room_in` raises.
        """
        if self.fitting(nodes) < max(1, self.max_concurrent):
            raise StudyError(f"{self.lacks(nodes)} (num_cpus raises a local cluster's logical CPUs)")
        return self.room_in(nodes)

    def room_in(self, nodes: Sequence[Mapping[str, float]]) -> WorkerGroups:
        """The groups of a cluster that may grow: at least one, and as many as `max_concurrent` asks for.

        Raises StudyError for several workers of a trial with a part of a GPU each: Ray would put them on one, and NCCL
        refuses two ranks on one device.
        """
        wanted = self._gpus(nodes)
        if self.workers_per_trial > 1 and 0 < wanted < 1:
            raise StudyError(
                f"{self.workers_per_trial} workers of one trial cannot share a GPU (gpus_per_worker={wanted:g}): use "
                "gpus_per_worker=1, or workers_per_trial=1 to have several trials share one"
            )
        fitting = max(1, self.fitting(nodes))
        groups = self.max_concurrent or (fitting if wanted else min(fitting, MOST_CPU_GROUPS))
        groups = min(groups, self.trials)
        pack = MOST_PACKED if self.pack is None else self.pack
        return WorkerGroups(
            groups, self.workers_per_trial, self.cpus_per_worker, wanted, min(pack, -(-self.trials // groups))
        )

    def fitting(self, nodes: Sequence[Mapping[str, float]]) -> int:
        """How many groups the nodes hold; a worker has to fit one of them, a group may lie on several."""
        wanted, workers = self._gpus(nodes), 0
        for node in nodes:
            fit = int(node.get("CPU", 0.0) // self.cpus_per_worker)
            workers += min(fit, int(node.get("GPU", 0.0) / wanted + 1e-9)) if wanted else fit
        return workers // self.workers_per_trial

    def lacks(self, nodes: Sequence[Mapping[str, float]]) -> str:
        """What was asked for, what there is, and what to lower."""
        cpus, gpus = (sum(node.get(what, 0.0) for node in nodes) for what in ("CPU", "GPU"))
        count = f"{self.max_concurrent} times " if self.max_concurrent > 1 else ""
        asked = f"{self.workers_per_trial} worker(s) of {self.cpus_per_worker} CPU and {self._gpus(nodes):g} GPU"
        return (
            f"{count}{asked} do not fit the cluster's {cpus:g} CPU and {gpus:g} GPU on {len(nodes)} node(s): lower "
            "max_concurrent, workers_per_trial, cpus_per_worker or gpus_per_worker"
        )

    def _gpus(self, nodes: Sequence[Mapping[str, float]]) -> float:
        """Of one worker."""
        if self.gpus_per_worker >= 0:
            return self.gpus_per_worker
        return 1.0 if any(node.get("GPU", 0.0) for node in nodes) else 0.0
