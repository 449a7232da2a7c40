"""Who starts worker groups: where there is room, again where one died, more of them when nodes join. Edge file: Ray.

A group lives as long as one `TorchTrainer(serve).fit()`, in a thread of this process. On a cluster a group that waits
holds a pending placement group of its size, which Ray's autoscaler sees; where it is granted, it is given back and Ray
Train takes the same room. Nobody else is started meanwhile, or several would start for one room.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import ray
from ray.exceptions import ActorDiedError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from allocators.core.errors import StudyError
from search.engine.connect import NAMESPACE
from search.engine.groups import Resources, WorkerGroups
from search.engine.queue import News
from trainers import models
from trainers.worker_state import WorkerSetup

# Seconds that the workers of one trial wait for the first of them, which waits for a trial or measures a signal:
# torch's half an hour would end groups that have nothing to do while others train.
LONGEST_WAIT = 7 * 24 * 3600
MOST_DEATHS = 3  # of a worker group without a report between: then it is not started again
NO_RETRIES: dict[str, Any] = {"max_preemption_failures": 0, "controller_failure_limit": 0}
TOO_LATE = "WorkerGroupStartupTimeoutError"  # Ray Train's, which waits a minute for a group's resources
TICK = 0.5  # seconds between two looks
TOGETHER = 2.0  # seconds in which room for other groups may be granted, so that they start at once
AWAY = 3.0  # seconds without room after which others take a group's trials; what a dead worker had is free before
EVENTS = "workers.jsonl"
log = logging.getLogger(__name__)


@dataclass
class _Group:
    """One worker group in all its lives.

    state   waiting: for room; starting: its processes are not there yet
    away    it has waited for so long that its trials were given to others
    heard   reports that it had passed on when it died last
    """

    number: int
    away: bool = False
    life: int = -1
    state: Literal["waiting", "starting", "working", "over"] = "waiting"
    deaths: int = 0
    heard: int = 0
    since: float = 0.0
    room: PlacementGroup | None = None
    room_since: float = 0.0


class Steward:
    """The worker groups of one study.

    grows   whether nodes may join and leave; else all groups have room from the beginning to the end
    logs    a folder for what happened to the groups: `workers.jsonl`, an event a line
    """

    def __init__(
        self, resources: Resources, setup: WorkerSetup, *, study: str, notes: str, logs: Path, grows: bool
    ) -> None:
        self._resources, self._setup = resources, setup
        self._study, self._notes, self._logs = study, notes, logs
        self._grows = grows
        self._ends: queue.Queue[tuple[_Group, str | None]] = queue.Queue()
        self._threads: list[threading.Thread] = []
        self._closing = threading.Event()
        self._alone_since = time.monotonic()  # since when no group has room
        self._told = False
        self.lost: dict[int, str] = {}  # groups that ended for good, and why

    def plan(self) -> WorkerGroups:
        """How many groups there are to be now, and of what size. Raises StudyError for what can never be."""
        self._nodes = nodes_alive()
        resources = self._resources
        self.size = resources.room_in(self._nodes) if self._grows else resources.groups_in(self._nodes)
        here = resources.fitting(self._nodes)
        self._groups = [_Group(number, away=self._grows and number >= here) for number in range(self.size.groups)]
        return self.size

    def start(self, jobs: Any) -> None:
        """Begins to start groups, in threads of this process. `jobs` is the job queue's actor."""
        self._queue = jobs
        self._logs.mkdir(parents=True, exist_ok=True)
        thread = threading.Thread(target=self._run, daemon=True)
        self._threads.append(thread)
        thread.start()

    @property
    def present(self) -> int:
        """Groups that have room, or had it a moment ago."""
        return sum(not group.away for group in self._alive)

    @property
    def numbers(self) -> list[int]:
        """Of the groups that have not ended for good."""
        return [group.number for group in self._alive]

    @property
    def waits_for(self) -> str:
        """What there is no room for, in one line; empty where all groups have room."""
        waiting = sum(group.away for group in self._alive)
        if not waiting:
            return ""
        return f"{waiting} of {len(self._alive)} worker groups wait for nodes: {self._resources.lacks(self._nodes)}"

    @property
    def _alive(self) -> list[_Group]:
        return [group for group in self._groups if group.state != "over"]

    def close(self) -> None:
        """Starts nothing any more."""
        self._closing.set()

    def join(self, until: float) -> bool:
        """Waits until that monotonic time for the groups to end; whether they did."""
        for thread in list(self._threads):
            thread.join(max(until - time.monotonic(), 0.0))
        return not any(thread.is_alive() for thread in self._threads)

    # --- the loop

    def _run(self) -> None:
        steps: tuple[Callable[[], None], ...] = (self._hear, self._bury, self._resize, self._admit, self._lose_patience)
        try:
            while not self._closing.is_set():
                for step in steps:
                    step()
                self._closing.wait(TICK)
        except RayError:  # the queue is gone for good, or Ray is: whoever watches them says so
            return
        finally:
            with contextlib.suppress(Exception):
                self._give_rooms_back()
                self._hear()

    def _hear(self) -> None:
        """Which groups have arrived, and what they took: into the log."""
        news: list[News] = ray.get(self._queue.heard_of.remote())
        for item in news:
            group = next((group for group in self._alive if group.number == item.group), None)
            first = item.event == "arrived" and item.worker == 0
            if first and group is not None and group.life == item.life and group.state == "starting":
                group.state = "working"
        if news:
            with contextlib.suppress(OSError), (self._logs / EVENTS).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(item)) + "\n" for item in news)

    def _bury(self) -> None:
        """Groups that died wait for room again, until they die too often without a report between."""
        while not self._ends.empty() and not self._closing.is_set():
            group, reason = self._ends.get()
            group.state, group.since = "waiting", time.monotonic()
            if reason is None:
                self._give_up(group, "the worker group ended")
            elif TOO_LATE not in reason:  # there others have the resources, or the machine is busy: nobody died
                now = ray.get(self._queue.reports_of.remote(group.number))
                group.deaths, group.heard = 1 if now > group.heard else group.deaths + 1, now
                if group.deaths >= MOST_DEATHS:
                    often = f"it died {group.deaths} times without a report between, the last time because {reason}"
                    self._give_up(group, f"{often} ({self._memory()})")
                else:
                    log.warning("worker group %d is started again: %s", group.number, reason)

    def _resize(self) -> None:
        """More groups where nodes joined; fewer where nodes left, unless their number was asked for."""
        if not self._grows:
            return
        before, self._nodes = self._nodes, nodes_alive()
        if len(before) != len(self._nodes):
            change = "joined" if len(self._nodes) > len(before) else "left"
            cpus, gpus = (sum(node.get(what, 0.0) for node in self._nodes) for what in ("CPU", "GPU"))
            log.warning("a node %s: the cluster has %d, %g CPU and %g GPU", change, len(self._nodes), cpus, gpus)
        wanted, alive = self._resources.room_in(self._nodes).groups, self._alive
        for number in range(len(self._groups), len(self._groups) + wanted - len(alive)):
            ray.get(self._queue.expect.remote(number))
            self._groups.append(_Group(number, away=True, since=time.monotonic()))
        spare = [group for group in alive if group.away and group.state == "waiting"]
        for group in spare[: max(len(alive) - wanted, 0)]:
            self._give_up(group, "its node left the cluster")

    def _admit(self) -> None:
        """Starts the groups that wait, as far as there is room."""
        if any(group.state in ("waiting", "starting") for group in self._alive):
            give_back_rooms_of_the_dead()
        waiting = [group for group in self._alive if group.state == "waiting"]
        if not self._grows:
            for group in waiting:
                self._launch(group)
            return
        if any(group.state == "starting" for group in self._alive):
            return
        now = time.monotonic()
        for group in waiting:
            if group.room is None:
                group.room, group.room_since = self._request(group), now
        ready = [group for group in waiting if group.room is not None and group.room.wait(0.1)]
        late = [group for group in waiting if group not in ready]
        if ready and (not late or now - max(group.room_since for group in ready) > TOGETHER):
            self._give_rooms_back()
            for group in ready:
                self._launch(group)
        for group in late:
            if not group.away and now - max(group.since, group.room_since) > AWAY:
                group.away, group.deaths = True, 0  # it was its node that died
                ray.get(self._queue.leave.remote(group.number))
                log.warning("worker group %d has no room any more and waits for a node", group.number)

    def _lose_patience(self) -> None:
        """Ends the study where no group had room for too long."""
        if not self._grows or self.present:
            self._alone_since, self._told = time.monotonic(), False
            return
        waited, lacks = time.monotonic() - self._alone_since, self._resources.lacks(self._nodes)
        if not self._told:
            self._told = True
            log.warning("waiting for nodes, %g s at most (wait_for_workers): %s", self._resources.wait, lacks)
        if waited > self._resources.wait:
            for group in self._alive:
                self._give_up(group, f"after {waited:.0f} s {lacks}, add nodes, or raise wait_for_workers")

    # --- one group

    def _request(self, group: _Group) -> PlacementGroup:
        """A placement group of its size, which is pending until there is room: the autoscaler sees it."""
        bundle = {"CPU": float(self.size.cpus_per_worker)}
        if self.size.gpus_per_worker:
            bundle["GPU"] = self.size.gpus_per_worker
        room: PlacementGroup = placement_group([bundle] * self.size.workers, name=f"{self._study}-{group.number}")
        return room

    def _give_rooms_back(self) -> None:
        for group in self._groups:
            if group.room is not None:
                remove_placement_group(group.room)
                group.room = None

    def _launch(self, group: _Group) -> None:
        group.life += 1
        group.state, group.away = "starting", False
        thread = threading.Thread(target=lambda: self._ends.put((group, self._live(group))), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _live(self, group: _Group) -> str | None:
        """One life of a worker group; why it died, None where it ended by itself."""
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        from trainers.worker import serve

        size = self.size
        resources = {"CPU": float(size.cpus_per_worker)}
        if size.gpus_per_worker:
            resources["GPU"] = size.gpus_per_worker
        try:
            TorchTrainer(
                serve,
                train_loop_config={
                    "setup": self._setup,
                    "queue": queue_name(self._study),
                    "namespace": NAMESPACE,
                    "group": group.number,
                    "life": group.life,
                    "slots": size.pack,
                },
                torch_config=TorchConfig(timeout_s=LONGEST_WAIT),
                scaling_config=ScalingConfig(
                    num_workers=size.workers, use_gpu=size.gpus_per_worker > 0, resources_per_worker=resources
                ),
                run_config=RunConfig(
                    name=f"{self._study}-{group.number}-{group.life}",
                    storage_path=self._notes,
                    # none: whatever dies, controller or worker, it is started anew and counted here
                    failure_config=FailureConfig(max_failures=0, **NO_RETRIES),
                ),
            ).fit()
        except Exception as error:  # whatever ended it, the queue has to know, or trials would wait for ever
            return in_a_line(error)
        return None

    def _give_up(self, group: _Group, reason: str) -> None:
        group.state = "over"
        self.lost[group.number] = reason
        if group.room is not None:
            remove_placement_group(group.room)
            group.room = None
        with contextlib.suppress(RayError):
            ray.get(self._queue.lost.remote(group.number, reason))

    def _memory(self) -> str:
        """What there is of memory on this machine, and what a worker asks for at least."""
        memory = psutil.virtual_memory()
        there = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB are free here"
        count = self.size.groups * self.size.workers
        try:
            files = models.folder_of(self._setup.model).glob("*.safetensors")
            weights = sum(file.stat().st_size for file in files)
        except (OSError, StudyError):
            return f"{there}, for {count} worker(s)"
        return f"{there}; each of {count} worker(s) loads weights of {weights / 2**30:.2g} GiB"


def queue_name(study: str) -> str:
    """Of the actor with the job queue."""
    return f"queue-{study}"


def give_back_rooms_of_the_dead() -> None:
    """Removes the placement groups of this driver's actors that died: those of Ray Train's controllers.

    Such a group keeps its resources until the driver ends, and the next controller waits for them. Ray Train has an
    actor that would remove it. That one asks the dashboard, which a local Ray does not have, and dies where a second
    Ray runs on its machine.
    """
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData as Room  # type: ignore[attr-defined]  # generated

    job = ray.get_runtime_context().get_job_id()
    for text in state._connect_and_get_accessor().get_placement_group_table():
        room = Room.FromString(text)
        of_an_actor = room.creator_job_id.hex() == job and set(room.creator_actor_id) != {0xFF}  # 0xFF: the driver's
        if of_an_actor and room.creator_actor_dead and room.state != Room.REMOVED:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(room.placement_group_id)))


def nodes_alive() -> list[Mapping[str, float]]:
    """The resources of every node of the cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def in_a_line(error: BaseException) -> str:
    """Why a worker group ended, without the stacks that Ray's messages carry."""
    from ray.train import ControllerError, WorkerGroupError

    match error:
        case WorkerGroupError(worker_failures=failures) if failures:
            return f"a worker: {in_a_line(next(iter(failures.values())))}"
        case ControllerError(controller_failure=failure):
            return in_a_line(failure)
        case ActorDiedError():
            return "its process was killed or ended by itself"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1][:200] if lines else 'no message'}"
