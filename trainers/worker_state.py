"""What a worker holds for a whole study, the base model and the task, and what it does with them. Knows no Ray.

    state = WorkerState(setup, "cpu")
    state.train(TrainJob(trial, 18_688), report=lambda rung: True)      # one trial from attach to detach: an Outcome
    state.answer(TaskJob())                                             # any other job

A diverged or failing trial is an outcome and never takes the worker with it.
"""

from __future__ import annotations

import gc
import math
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocators.core.errors import OutOfMemoryError, StudyError, ToolkitError, TrialError
from allocators.core.messages import (
    Answer,
    PackChosen,
    PackJob,
    Question,
    SignalJob,
    SignalMeasured,
    TaskDescribed,
    TaskJob,
    Tested,
    TestJob,
    TrainJob,
    UntrainedEvaluated,
    UntrainedJob,
)
from allocators.core.types import Forgetting, Outcome, Rung, Score, Signal, SignalKind, Trial
from trainers import forgetting
from trainers.versions import versions

if TYPE_CHECKING:  # the driver imports this file, and needs no torch
    import torch

    from trainers.adapter import Adapter
    from trainers.loop import Result
    from trainers.tasks import AnyTask

MOST_ON_CPU, MOST_ON_GPU = 4, 8  # trainings in a pack that is chosen by measuring
GLOO = "/gloo/"  # in the path that its messages begin with

Shared = Callable[[bool | None], bool | None]  # gives every worker of a group the first one's value


@dataclass(frozen=True)
class WorkerSetup:
    """What the workers of a study are made with.

    model, options       for `models.load`
    task, task_options   for `tasks.load_task`
    seed                 of the study: what signals are drawn with
    evaluations          of a whole training
    calibration_samples  training documents that a signal is measured on
    cpus_per_worker      torch's threads
    signals              folder of the signals' cache
    adapters, checkpoints   where trained adapters and the state of trials go: paths or URIs that every node sees
    forgetting           text that forgetting is measured on (`trainers/forgetting.py`); empty: it is not
    device_share         the part of its device that is a worker's: less than 1 where several share a GPU
    """

    model: str
    options: Mapping[str, Any]
    task: str
    task_options: Mapping[str, Any]
    seed: int
    evaluations: int
    calibration_samples: int
    cpus_per_worker: int
    signals: str
    adapters: str
    checkpoints: str
    forgetting: str = ""
    device_share: float = 1.0


class WorkerState:
    """The resident base model and task of one worker. It is the `Source` that signals are measured on."""

    def __init__(self, setup: WorkerSetup, device: str | torch.device) -> None:
        import torch

        from trainers import models, tasks
        from trainers.models import sharding

        torch.set_num_threads(setup.cpus_per_worker)
        self.setup = setup
        self.device = device
        loaded = models.load(setup.model, device=str(device), **setup.options)
        self.name, self.identity, self.dtype = setup.model, loaded.identity, loaded.numbers
        self.notes = loaded.notes
        # what lies on disk as fp8 is measured as it is resident, dequantised
        stored = models.stored_as(models.config_of(self.name), name=self.name)
        self.folder = None if stored else partial(models.folder_of, self.name)
        self.scratch = Path(setup.signals)
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.tokenizer_identity = models.identity_of_tokenizer(setup.model)
        self.sharded = sharding.is_sharded(self.model)
        self.device_broke = False  # whether nothing can be trained in this process any more
        self.broken = False  # whether other workers of the group wait for this one, in vain
        self.task_name, self.task = setup.task, tasks.load_task(setup.task, **setup.task_options)
        self.task.check_tokenizer(self.tokenizer)
        self.samples, self.seed = setup.calibration_samples, setup.seed
        self.shape = models.shape_of_model(self.model, name=self.name)
        self.versions = versions(
            device=_device_name(device), model=self.identity, numbers=self.dtype, data=self.task.data_hash
        )
        if not self.selects_on_test:
            self.versions["test_data"] = self.task.test.data_hash
        if (chance := self.task.chance) is not None:
            self.versions["chance"] = f"{chance:.3g}"
        self._general: forgetting.Measure | None = None
        self._before: forgetting.Loss | None = None  # of the base alone, once it was asked for
        if setup.forgetting:
            self._general, text = forgetting.load(setup.forgetting, model=setup.model, tokenizer=self.tokenizer)
            self.versions["general_text"] = text
        self.progress: Callable[[int, int, str], None] = lambda *_: None

    # --- questions ----------------------------------------------------------------------------------------------------

    def needs_all(self, question: Question) -> bool:
        """Whether all workers of the group have to answer: an evaluation, a sharded model's signal.

        A spectrum does not need them: it is read from the weights as they are stored.
        """
        match question:
            case UntrainedJob() | TestJob():
                return True
            case SignalJob(kind="spectrum"):
                return False
        return self.sharded

    def answer(self, question: Question, *, leads: bool = True, shared: Shared = lambda value: value) -> Answer | None:
        """All workers call this where the question `needs_all`, else the first alone.

        None from the others where a signal is asked for.

        shared   as in `measure`, where the question `needs_all`
        """
        match question:
            case SignalJob(kind):
                signal = self.measure(kind, leads=leads, shared=shared)
                return None if signal is None else SignalMeasured(signal)
            case UntrainedJob():
                return self.untrained()
            case PackJob(trial, trainable_params):
                return self.measure_pack(trial, trainable_params)
            case TestJob(adapter=folder):
                return self.test(folder)
            case TaskJob():
                from trainers import tasks

                return TaskDescribed(tasks.sizes(self.task), self.versions, self.notes)

    def untrained(self) -> UntrainedEvaluated:
        """The base alone on both splits. All workers of a group call this: each answers its share of the questions."""
        selection = self._score(self.task)
        return UntrainedEvaluated(selection, selection if self.selects_on_test else self._score(self.task.test))

    def test(self, folder: str) -> Tested:
        """A saved adapter on the test split. All workers of a group call this.

        Raises StudyError where no adapter lies in the folder, or one of another base.
        """
        from trainers import adapter as adapters

        try:
            with adapters.applied(self.model, folder):
                return Tested(self._score(self.task.test))
        finally:
            self.clean_up()

    @property
    def selects_on_test(self) -> bool:
        """Whether the accuracy that the search sees is that on the test split (`select_on=test`)."""
        return self.task.test is self.task

    def _score(self, task: AnyTask) -> Score:
        """The model as it is now; all workers of a group answer their share of the questions."""
        import torch.distributed as dist

        several = dist.is_available() and dist.is_initialized()
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        task.prepare(self.tokenizer, rank=rank, world_size=world_size)
        evaluation = task.evaluate(self.model)
        self.model.eval()
        return Score(evaluation.accuracy, evaluation.stderr, evaluation.by_task)

    def measure(self, kind: SignalKind, *, leads: bool = True, shared: Shared = lambda value: value) -> Signal | None:
        """One signal, from the cache where it was measured before. Raises StudyError for what this model lacks.

        shared   gives every worker the first one's value. Where the signal `needs_all`, all workers call this; the
                 first one looks into the cache, shares whether they measure, and has the answer
        """
        from allocators import signals
        from allocators.signals.cache import cached

        provenance, run = signals.measurement_of(kind, self)
        asked = False

        def measure() -> Signal:
            nonlocal asked
            asked = bool(shared(True))
            return run()

        try:
            if leads:
                return cached(kind, provenance, folder=Path(self.setup.signals), measure=measure)
        finally:
            if leads and not asked:
                shared(False)
        if shared(None):
            run()
        return None

    def measure_pack(self, trial: Trial, trainable_params: int) -> PackChosen:
        """How many trainings such as this one to pack, from a few real steps of one and of two; nothing is kept.

        Memory: each further one is taken to need as much as the second, and four fifths of what is free is used, of a
        GPU that several workers share this one's part of it.
        """
        from trainers import packing

        if reason := packing.refused(self.model):
            return PackChosen(1, reason)
        if packing.most(self.shape, self.device) < 2:
            return PackChosen(1, f"the experts of two trainings are more than {packing.GROUPS} groups")
        packed = packing.PackedRun(self.model, self.task, tokenizer=self.tokenizer, device=self.device, evaluations=1)
        endless, seconds, memory = replace(trial.recipe, steps=10**6), [], []
        try:
            for seed in range(2):
                packed.detach()
                adapter = self.attach(replace(trial, recipe=endless, seed=seed), trainable_params)
                adapter.detach()
                packed.join(adapter, endless, seed=seed, on_rung=lambda _: True)
                seconds.append(packing.seconds_of_a_step(packed))
                memory.append(_memory_used(self.device))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return PackChosen(1, in_words(error))
        finally:
            packed.end_all()
            self.clean_up()
        one, two = seconds
        free = _memory_free(self.device) * self.setup.device_share
        fitting = 1 + int(0.8 * free / max(memory[1] - memory[0], 1))
        most = MOST_ON_CPU if str(self.device) == "cpu" else MOST_ON_GPU
        pack = packing.choose(one, two, most=min(most, fitting, packing.most(self.shape, self.device)))
        why = f"a step takes {one:.3g} s, one of two trainings {two:.3g} s"
        return PackChosen(pack, f"{why}: {packing.gain(one, two, pack):.2f}x the speed, evaluations apart")

    # --- a trial, and its parts, which `WorkerSlots` takes one by one -------------------------------------------------

    def train(self, job: TrainJob, *, report: Callable[[Rung], bool], leads: bool = True) -> Outcome:
        """One trial from attach to detach; every ending that belongs to the trial becomes an outcome.

        report   takes every rung, on every worker, and answers whether the training goes on

        Raises what a lost connection to other workers of the group raises: that ends no trial.
        """
        from trainers import loop

        trial, trainable_params = job.trial, job.trainable_params
        started = self.started(trial, trainable_params)
        began, self.broken = time.monotonic(), False
        adapter = None
        try:
            adapter = self.attach(trial, trainable_params)
            result = loop.train(
                self.model,
                adapter,
                self.task,
                trial.recipe,
                seed=trial.seed,
                tokenizer=self.tokenizer,
                evaluations=self.setup.evaluations,
                device=self.device,
                on_rung=report,
                checkpoint=self.checkpoint(trial),
            )
            return self.ended(started, adapter, result, leads=leads, tests=job.tests)
        except Exception as error:  # a trial never takes the worker with it: its error is its outcome
            if has_lost_others(error):
                raise
            self.broken = self.sharded if is_out_of_memory(error) else not isinstance(error, ToolkitError)
            return self.failed(started, error).updated(seconds=time.monotonic() - began)
        finally:
            if adapter is not None:
                adapter.detach()
            self.clean_up()

    def started(self, trial: Trial, trainable_params: int) -> Outcome:
        """The outcome of a training that has only begun."""
        return Outcome(trial, "started", trainable_params, versions=self.versions)

    def checkpoint(self, trial: Trial) -> str:
        """The place of the trial's checkpoint."""
        from trainers import storage

        return storage.join(self.setup.checkpoints, trial.digest)

    def attach(self, trial: Trial, trainable_params: int) -> Adapter:
        """The trial's adapter on the model. Raises TrialError where it is not as large as was counted."""
        from trainers import adapter as adapters

        adapter = adapters.attach(
            self.model, trial.allocation, shape=self.shape, lora=trial.recipe.lora, seed=trial.seed
        )
        if adapter.num_trainable != trainable_params:
            adapter.detach()
            raise TrialError(f"the adapter has {adapter.num_trainable:,} parameters, counted {trainable_params:,}")
        return adapter

    def ended(
        self, started: Outcome, adapter: Adapter, result: Result, *, leads: bool = True, tests: bool = False
    ) -> Outcome:
        """The outcome of a run that trained; its adapter, which is on the model, is saved where it is complete.

        tests   a complete one is evaluated on the test split, by all workers of a group
        """
        outcome = started.updated(
            status=result.status,
            accuracy=result.accuracy,
            rungs=result.rungs,
            tokens=result.tokens,
            seconds=result.seconds,
            peak_memory_bytes=result.peak_memory_bytes,
        )
        if result.status == "complete" and self.selects_on_test:
            last = result.rungs[-1]
            if last.accuracy is not None:
                outcome = outcome.updated(test=Score(last.accuracy, last.stderr or 0.0, last.by_task))
        elif result.status == "complete" and tests:
            outcome = outcome.updated(test=self._score(self.task.test))
        if result.status == "complete":
            outcome = outcome.updated(forgetting=self._forgotten(adapter))
        if leads and result.status == "complete":  # one that was stopped is paused, perhaps: it has a checkpoint
            return outcome.updated(adapter=self._save(adapter, outcome))
        return outcome

    def _forgotten(self, adapter: Adapter) -> Forgetting | None:
        """With the adapter, which is on the model, and without; all workers of a group call this."""
        if self._general is None:
            return None
        self.model.eval()
        after = self._general(self.model)
        if self._before is None:
            adapter.detach()
            try:
                self._before = self._general(self.model)
            finally:
                adapter.reattach()
        if not math.isfinite(after.mean):
            return None
        return Forgetting(self._before.mean, after.mean, forgetting.difference(self._before, after))

    def made(self, trial: Trial, weights: Mapping[str, torch.Tensor], *, of: Rung) -> Outcome:
        """The outcome of an adapter that was made from a trained one: evaluated on both splits, and saved.

        of   the last evaluation of the training: this one stands at the same step

        Raises TrialError, or StudyError, where the weights do not fit the trial.
        """
        began = time.monotonic()
        cost = trial.allocation.trainable_params(self.shape, rank=trial.recipe.rank)
        adapter = self.attach(trial, cost)
        try:
            adapter.load_state_dict(weights)
            self.task.prepare(self.tokenizer, rank=0, world_size=1)
            evaluation = self.task.evaluate(self.model)
            score = Score(evaluation.accuracy, evaluation.stderr, evaluation.by_task)
            rung = replace(
                of,
                accuracy=score.accuracy,
                stderr=score.stderr,
                by_task=score.by_task,
                loss=None,
                eval_loss=evaluation.loss if evaluation.loss is not None and math.isfinite(evaluation.loss) else None,
                seconds=0.0,
            )
            outcome = self.started(trial, cost).updated(
                status="complete",
                accuracy=score.accuracy,
                rungs=(rung,),
                test=score if self.selects_on_test else self._score(self.task.test),
                forgetting=self._forgotten(adapter),
                seconds=time.monotonic() - began,
            )
            return outcome.updated(adapter=self._save(adapter, outcome))
        finally:
            adapter.detach()
            self.clean_up()

    def failed(self, started: Outcome, error: Exception) -> Outcome:
        """The outcome of a training that raised, with the reason in words.

        `out_of_memory` or `failed` where this point would do so again, `lost` where it is no affair of the point:
        storage that cannot be read or written, a device that broke.
        """
        self.device_broke |= is_device_error(error)
        if is_out_of_memory(error):
            return started.updated(status="out_of_memory", message=in_words(error))
        return started.updated(status="lost" if is_of_platform(error) else "failed", message=in_words(error))

    def clean_up(self) -> None:
        """Collects garbage and returns unused memory, so that the next trial has it."""
        gc.collect()
        _return_memory(self.device)

    def _save(self, adapter: Adapter, outcome: Outcome) -> str:
        from trainers import adapter as adapters
        from trainers import storage

        target = storage.join(self.setup.adapters, outcome.digest)
        record = outcome.to_json()
        named = ("trial", "accuracy", "test", "trainable_params", "tokens", "seconds", "versions", "forgetting")
        facts = {key: record[key] for key in named if key in record}
        with tempfile.TemporaryDirectory() as folder:
            base = {"base_model": self.setup.model, "options": dict(self.setup.options)}
            adapters.save(adapter, Path(folder), metadata=facts | base)
            storage.put_folder(Path(folder), target)
        return target


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice, in a training's steps or beside them: to attach it, to test it."""
    from trainers import loop

    return isinstance(error, OutOfMemoryError) or loop.is_out_of_memory(error)


def is_device_error(error: Exception) -> bool:
    """Whether a GPU broke: this process can use it no more."""
    import torch

    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


def has_lost_others(error: BaseException | None) -> bool:
    """Whether a worker of the group, or its node, is gone: no fault of what the group was doing, which is done again.

    gloo raises a plain RuntimeError, which names its source file.
    """
    import torch

    while error is not None:
        if isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and GLOO in str(error)):
            return not is_out_of_memory(error)
        error = error.__cause__ or error.__context__
    return False


def is_of_platform(error: Exception) -> bool:
    """Whether another attempt may succeed: the fault is of a disk, a device, a network, and of no trial."""
    return isinstance(error, StudyError | OSError) or is_device_error(error)


def in_words(error: Exception) -> str:
    """The message of an error that was raised on purpose; the class as well of any other."""
    return str(error) if isinstance(error, ToolkitError) else f"{type(error).__name__}: {error}"


def _device_name(device: str | torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if str(device).startswith("cuda") else platform.machine() + " CPU"


def _memory_used(device: str | torch.device) -> int:
    """Most bytes so far: of a GPU, or of the process."""
    import torch

    if str(device).startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def _memory_free(device: str | torch.device) -> int:
    """Bytes that can be allocated now."""
    import torch

    if str(device).startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _return_memory(device: str | torch.device) -> None:
    import torch

    if str(device).startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
