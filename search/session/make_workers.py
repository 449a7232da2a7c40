"""Which workers a study gets, and what they are made with. No worker is started here."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from allocators.core import words
from search.config import RunConfig
from search.engine import Workers
from search.problem import Problem
from search.records.files import LOGS, RAY
from search.replay.problem import TableProblem
from trainers import forgetting, models, storage, tasks
from trainers.worker_state import WorkerSetup


@dataclass(frozen=True)
class Locations:
    """Where a study keeps what.

    folder   the study's records, on this machine whatever `storage` is
    shared   what workers write: a path or URI that every node can reach
    """

    folder: Path
    shared: str

    @classmethod
    def of(cls, config: RunConfig) -> Locations:
        """With a URI as storage, records stay on this machine in `studies/`."""
        away = storage.is_uri(config.storage)
        base = Path("studies") if away else words.path(config.storage, "storage")
        folder = base.absolute() / config.study_name
        return cls(folder, storage.join(config.storage, config.study_name) if away else str(folder))

    @property
    def signals(self) -> Path:
        """Signals that the workers of all studies beside this one have measured."""
        return self.folder.parent / "signals"

    @property
    def adapters(self) -> str:
        """The place of trained adapters, one folder a digest."""
        return storage.join(self.shared, "adapters")

    @property
    def checkpoints(self) -> str:
        """The place of checkpoints, one folder a digest."""
        return storage.join(self.shared, "checkpoints")

    @property
    def ray(self) -> str:
        """Ray Train's own notes."""
        return storage.join(self.shared, RAY)

    @property
    def tune(self) -> Path:
        """Ray Tune's own notes, on this machine."""
        return self.folder / RAY / "tune"

    @property
    def logs(self) -> Path:
        """What the workers print, and which of them took what."""
        return self.folder / LOGS

    def check(self) -> None:
        """Raises StudyError where workers cannot write: before any of them starts, and no trial is lost to it."""
        for place in (self.adapters, self.checkpoints, str(self.signals)):
            storage.check(place)


def make_workers(config: RunConfig, problem: Problem, locations: Locations, *, study: str, trainings: int) -> Workers:
    """The workers of a study, not started yet.

    study       the study's id
    trainings   how many are left

    Raises StudyError where a package is missing that the model needs, or its files are not whole; prints what the user
    should know of the model.
    """
    if isinstance(problem, TableProblem):
        from search.engine.simulated import WORKERS, SimulatedWorkers

        table, count = problem.table, config.max_concurrent or WORKERS
        return SimulatedWorkers(table.outcomes, workers=count, source=config.replay, mark=table.mark)
    models.check_packages(attn=config.attn, quantization=config.quantization)
    models.check_files(config.model, problem.shape)
    lines = models.remarks(
        config.model, problem.shape, quantization=config.quantization, trust_remote_code=config.trust_remote_code
    )
    for line in [*lines, *models.left_out(config.model, trust_remote_code=config.trust_remote_code)]:
        print(f"note: {line}", file=sys.stderr)
    setup = worker_setup(config, locations)
    if config.workers == "process":
        from search.engine.inprocess import InProcessWorkers

        return InProcessWorkers(setup, device="cpu" if config.gpus_per_worker == 0 else "")
    if config.ray_address == "local":  # read when Ray is imported: below `uv run` it would pack the working folder
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    elif "RAY_AUTH_MODE" not in os.environ and _has_token():  # a head node asks for it; Ray sends it in this mode alone
        os.environ["RAY_AUTH_MODE"] = "token"
    from search.engine.groups import Resources
    from search.engine.workers import RayWorkers

    resources = Resources(
        trainings,
        ray_address=config.ray_address,
        num_cpus=config.num_cpus,
        workers_per_trial=config.workers_per_trial,
        cpus_per_worker=config.cpus_per_worker,
        gpus_per_worker=config.gpus_per_worker,
        max_concurrent=config.max_concurrent,
        pack=None if config.pack == "auto" else int(config.pack),
        wait=config.seconds_for_workers,
    )
    return RayWorkers(resources, setup, study=study, notes=locations.ray, here=locations.tune, logs=locations.logs)


def _has_token() -> bool:
    """Whether this machine has a token by which Ray's processes know each other."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path("~/.ray/auth_token").expanduser()
    return "RAY_AUTH_TOKEN" in os.environ or Path(path).is_file()


def worker_setup(config: RunConfig, locations: Locations) -> WorkerSetup:
    """What each worker loads, and where it writes."""
    return WorkerSetup(
        model=_located(config.model),
        options=config.options("model"),
        task=tasks.absolute(config.task),
        task_options={
            **config.options("task"),
            "split_seed": config.seed,
            "num_fewshot": config.num_fewshot if config.num_fewshot >= 0 else None,
        },
        seed=config.seed,
        evaluations=config.evaluations,
        calibration_samples=config.calibration_samples,
        cpus_per_worker=config.cpus_per_worker,
        signals=str(locations.signals),
        adapters=locations.adapters,
        checkpoints=locations.checkpoints,
        forgetting=forgetting.located(config.forgetting),
        device_share=config.gpus_per_worker if 0 < config.gpus_per_worker < 1 else 1.0,
    )


def _located(model: str) -> str:
    """A path of this folder as workers read it, which run elsewhere; any other name as it is."""
    known = {**models.EMBEDDED, **models.PACKAGED}
    return str(Path(model).absolute()) if model not in known and Path(model).exists() else model
