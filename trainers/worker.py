"""What runs on every Ray Train worker for a whole study: one base model, then job after job. Edge file: ray.train.

A job is a signal to measure or a trial: attach the adapter, train, evaluate at rungs, report, detach. A diverged or
failing trial is reported and never takes the worker with it; a worker that dies is restarted by Ray Train, takes its
job again and goes on from the trial's last checkpoint.

Several workers of one trial agree on an error before they raise it. What strikes one of them alone, in the middle of
what they do together (a fault of the program; out of memory in a pass through a sharded model), leaves the others
waiting: that worker reports the end of the job and ends itself, and Ray Train starts the group anew.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from allocators.core.errors import OutOfMemoryError, ToolkitError, TrialError
from allocators.core.types import Outcome, Trial
from trainers.versions import versions

MOST_ON_CPU, MOST_ON_GPU = 4, 8  # trainings in a pack that is chosen by measuring


class Bench:
    """The resident base model and task of one worker, and the two kinds of job that it does.

    It is the `Source` that signals are measured on (`allocators/signals/`).
    """

    def __init__(self, setup: Mapping[str, Any], device: Any) -> None:
        import torch

        from trainers import models, tasks
        from trainers.models import sharding

        torch.set_num_threads(setup["cpus_per_worker"])
        self.setup = setup
        self.device = device
        loaded = models.load(setup["model"], device=str(device), **setup["options"])
        self.name, self.identity, self.dtype = setup["model"], loaded.identity, loaded.numbers
        self.folder, self.scratch = partial(models.folder_of, self.name), Path(setup["signals"])
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.sharded = sharding.is_sharded(self.model)
        self.broken = False  # whether other workers of the group wait for this one, in vain
        self.task_name, self.task = setup["task"], tasks.load_task(setup["task"], **setup["task_options"])
        self.task.check_tokenizer(self.tokenizer)
        self.samples, self.seed = setup["calibration_samples"], setup["seed"]
        self.shape = models.shape_of_model(self.model, name=self.name)
        self.versions = versions(
            device=_device_name(device), model=self.identity, numbers=self.dtype, data=self.task.data_hash
        )
        if (chance := self.task.chance) is not None:
            self.versions["chance"] = f"{chance:.3g}"

        self.progress: Callable[[int, int, str], None] = lambda done, total, what: None

    def told_of_task(self) -> dict[str, Any]:
        """What is trained and counted on, in one line, and what an outcome's versions say of it."""
        from trainers import tasks

        return {"task": tasks.sizes(self.task), "versions": self.versions}

    def untrained(self) -> dict[str, Any]:
        """Accuracy of the base alone. All workers of a group call this: each answers its share of the questions."""
        import torch.distributed as dist

        several = dist.is_available() and dist.is_initialized()
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        self.task.prepare(self.tokenizer, rank=rank, world_size=world_size)
        evaluation = self.task.evaluate(self.model)
        self.model.eval()
        return {"accuracy": evaluation.accuracy, "stderr": evaluation.stderr, "by_task": evaluation.by_task}

    def needs_all(self, work: Mapping[str, Any]) -> bool:
        """Whether all workers of the group have to do a job that is no trial: an evaluation, a sharded model's signal.

        A spectrum does not need them: it is read from the weights as they are stored.
        """
        return work["kind"] == "untrained" or (self.sharded and work.get("signal", "spectrum") != "spectrum")

    def answer(
        self, work: Mapping[str, Any], *, leads: bool = True, shared: Callable[[Any], Any] = lambda value: value
    ) -> dict[str, Any]:
        """What a job that is no trial comes to. All workers call this where it `needs_all`, else the first alone.

        shared   as in `measure`, where it `needs_all`
        """
        match work["kind"]:
            case "signal":
                return self.measure(work["signal"], leads=leads, shared=shared)
            case "untrained":
                return self.untrained()
            case "pack":
                return self.measure_pack(Trial.from_json(json.loads(work["trial"])), work["trainable_params"])
        return self.told_of_task()

    def measure(
        self, kind: str, *, leads: bool = True, shared: Callable[[Any], Any] = lambda value: value
    ) -> dict[str, Any]:
        """One signal, from the cache where it was measured before. Raises StudyError for what this model lacks.

        shared   gives every worker the first one's value. Where it `needs_all`, all workers call this; the first one
                 looks into the cache, tells the others by `shared` whether they measure, and has the answer
        """
        from allocators import signals
        from allocators.signals.cache import cached

        provenance, run = signals.measurement_of(kind, self)
        asked = False

        def measure() -> Any:
            nonlocal asked
            asked = shared(True)
            return run()

        try:
            if leads:
                return {
                    "signal": cached(kind, provenance, folder=Path(self.setup["signals"]), measure=measure).to_json()
                }
        finally:
            if leads and not asked:
                shared(False)
        if shared(None):
            run()
        return {}

    def train(
        self, trial: Trial, trainable_params: int, *, report: Callable[[Any], bool], leads: bool = True
    ) -> Outcome:
        """One trial from attach to detach; every ending that belongs to the trial becomes an outcome."""
        from trainers import loop

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
                evaluations=self.setup["evaluations"],
                device=self.device,
                on_rung=report,
                checkpoint=self.checkpoint(trial),
            )
            return self.ended(started, adapter, result, leads=leads)
        except Exception as error:  # a trial never takes the worker with it: its error is its outcome
            self.broken = self.sharded if isinstance(error, OutOfMemoryError) else not isinstance(error, ToolkitError)
            return self.failed(started, error).updated(seconds=time.monotonic() - began)
        finally:
            if adapter is not None:
                adapter.detach()
            self.clean_up()

    def measure_pack(self, trial: Trial, trainable_params: int) -> dict[str, Any]:
        """How many trainings such as this one to pack, from a few real steps of one and of two; nothing is kept.

        Memory: each further one is taken to need as much as the second, and four fifths of what is free is used.
        """
        from trainers import packing

        if reason := packing.refused(self.model):
            return {"pack": 1, "why": reason}
        crew = packing.PackedRun(self.model, self.task, tokenizer=self.tokenizer, device=self.device, evaluations=1)
        endless, seconds, memory = replace(trial.recipe, steps=10**6), [], []
        try:
            for seed in range(2):
                crew.detach()
                adapter = self.attach(replace(trial, recipe=endless, seed=seed), trainable_params)
                adapter.detach()
                crew.join(adapter, endless, seed=seed, on_rung=lambda rung: True)
                seconds.append(packing.seconds_of_a_step(crew))
                memory.append(_memory_used(self.device))
        except OutOfMemoryError as error:
            return {"pack": 1, "why": str(error)}
        finally:
            crew.end_all()
            self.clean_up()
        one, two = seconds
        fitting = 1 + int(0.8 * _memory_free(self.device) / max(memory[1] - memory[0], 1))
        most = MOST_ON_CPU if str(self.device) == "cpu" else MOST_ON_GPU
        pack = packing.choose(one, two, most=min(most, fitting))
        why = f"a step takes {one:.3g} s, one of two trainings {two:.3g} s"
        return {"pack": pack, "why": f"{why}: {packing.gain(one, two, pack):.2f}x the speed, evaluations apart"}

    # --- the parts of a trial, which `Places` takes one by one ---

    def started(self, trial: Trial, trainable_params: int) -> Outcome:
        return Outcome(trial, "started", trainable_params, versions=self.versions)

    def checkpoint(self, trial: Trial) -> Any:
        from trainers import storage

        return storage.join(self.setup["checkpoints"], trial.digest)

    def attach(self, trial: Trial, trainable_params: int) -> Any:
        """The trial's adapter on the model. Raises TrialError where it is not as large as was counted."""
        from trainers import adapter as adapters

        adapter = adapters.attach(
            self.model, trial.allocation, shape=self.shape, lora=trial.recipe.lora, seed=trial.seed
        )
        if adapter.num_trainable != trainable_params:
            adapter.detach()
            raise TrialError(f"the adapter has {adapter.num_trainable:,} parameters, counted {trainable_params:,}")
        return adapter

    def ended(self, started: Outcome, adapter: Any, result: Any, *, leads: bool = True) -> Outcome:
        """The outcome of a run that trained; its adapter is saved where it is complete."""
        outcome = started.updated(
            status=result.status,
            accuracy=result.accuracy,
            rungs=result.rungs,
            tokens=result.tokens,
            seconds=result.seconds,
            peak_memory_bytes=result.peak_memory_bytes,
        )
        if leads and result.status == "complete":  # one that was stopped is paused, perhaps: it has a checkpoint
            return outcome.updated(adapter=self._save(adapter, outcome))
        return outcome

    def failed(self, started: Outcome, error: Exception) -> Outcome:
        if isinstance(error, OutOfMemoryError):
            return started.updated(status="out_of_memory", message=str(error))
        return started.updated(status="failed", message=_in_words(error))

    def clean_up(self) -> None:
        gc.collect()
        _return_memory(self.device)

    def _save(self, adapter: Any, outcome: Outcome) -> str:
        from trainers import adapter as adapters
        from trainers import storage

        target = storage.join(self.setup["adapters"], outcome.digest)
        record = outcome.to_json()
        facts = {key: record[key] for key in ("trial", "accuracy", "trainable_params", "tokens", "seconds", "versions")}
        with tempfile.TemporaryDirectory() as folder:
            base = {"base_model": self.setup["model"], "options": self.setup["options"]}
            adapters.save(adapter, Path(folder), metadata=facts | base)
            storage.put_folder(Path(folder), target)
        return target


def serve(config: dict[str, Any]) -> None:
    """The loop of one worker. Rank 0 takes jobs from the board and tells the others."""
    import ray
    import torch.distributed as dist
    from ray.train import get_context
    from ray.train.torch import get_device

    context = get_context()
    leads, several = context.get_world_rank() == 0, context.get_world_size() > 1
    board = ray.get_actor(config["board"], namespace=config["namespace"])
    group = config["group"]

    def shared(value: Any) -> Any:  # rank 0 decides, everyone hears
        box = [value]
        if several:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        bench = Bench(config, get_device())
    except Exception as error:  # nothing can be trained: say why once instead of being restarted for ever
        ray.get(board.lost.remote(group, _in_words(error)))
        return
    if leads:
        ray.get(board.start.remote(group))
    if config["pack"] > 1 and not several:

        def take(wait: bool) -> Any:
            return ray.get(board.take.remote(group, wait=wait))

        def report(job_id: str, message: dict[str, Any]) -> Any:
            return ray.get(board.report.remote(group, job_id, message))

        def told(job_id: str) -> Callable[[int, int, str], None]:
            return _now_and_then(partial(_pass_on, board, group, job_id))

        Places(bench, config["pack"], take=take, report=report, told=told).serve()
        return
    while (job := shared(ray.get(board.take.remote(group)) if leads else None)) is not None:
        job_id, work = job

        def send(message: dict[str, Any], job_id: str = job_id) -> bool:
            return shared(ray.get(board.report.remote(group, job_id, message)) if leads else None)

        def finish(result: dict[str, Any], *, broken: bool, job_id: str = job_id, send: Any = send) -> None:
            if broken and several:  # nobody there to agree with
                ray.get(board.report.remote(group, job_id, {"done": True, **result}))
                raise RuntimeError(f"ended in the middle of {job_id}, so that the group starts anew: {result}")
            send({"done": True, **result})

        if work["kind"] != "trial":
            answer: dict[str, Any] = {}
            broken, together = False, bench.needs_all(work)
            if leads:
                bench.progress = _now_and_then(partial(_pass_on, board, group, job_id))
            try:
                if together:
                    answer = bench.answer(work, leads=leads, shared=shared)
                elif leads:
                    answer = bench.answer(work)
            except Exception as error:  # the driver decides what a missing signal means
                answer = {"error": _in_words(error)}
                broken = together and not isinstance(error, ToolkitError)
            finish(answer, broken=broken)
        else:

            def on_rung(rung: Any, send: Any = send) -> bool:
                return send({"done": False, "rung": rung})

            trial = Trial.from_json(json.loads(work["trial"]))
            outcome = bench.train(trial, work["trainable_params"], report=on_rung, leads=leads)
            finish({"outcome": json.dumps(outcome.to_json())}, broken=bench.broken)


class Places:
    """A worker whose trials train in one pass (trainers/packing/): it takes jobs while it has a free place.

    take     the next job, None where there is none any more; without `wait` a job without a name where none is waiting
    report   passes a message of a job on; whether it goes on
    told     of a job: who hears how far it is

    What cannot share the pass under way (another batch size, a signal to measure) waits until it is over. Where a pass
    of all fails, or killed this process before, each of them is run alone from its last checkpoint, so that one alone
    is to blame, and recorded.
    """

    def __init__(
        self,
        bench: Bench,
        places: int,
        *,
        take: Callable[[bool], tuple[str, dict[str, Any]] | None],
        report: Callable[[str, dict[str, Any]], bool],
        told: Callable[[str], Callable[[int, int, str], None]],
    ) -> None:
        from trainers import packing

        self.bench, self.take, self.report, self.told = bench, take, report, told
        self.places = 1 if packing.refused(bench.model) else places
        self.crew = packing.PackedRun(
            bench.model,
            bench.task,
            tokenizer=bench.tokenizer,
            device=bench.device,
            evaluations=bench.setup["evaluations"],
        )
        self.jobs: dict[Any, tuple[str, dict[str, Any]]] = {}  # of the members of the crew
        self.waiting: list[tuple[str, dict[str, Any]]] = []  # taken, and to be begun when the crew is empty
        self.looked = 0.0

    def serve(self) -> None:
        """Until the board has no job any more."""
        open_ = True
        while open_ or self.jobs or self.waiting:
            if not self.jobs and self.waiting:
                self._begin(*self.waiting.pop(0))
            elif open_ and not self.waiting and len(self.jobs) < self.places and (self._is_time() or not self.jobs):
                job = self.take(not self.jobs)
                open_ = job is not None
                if job is not None and job[0]:
                    self._begin(*job)
                    self.looked = 0.0
                    continue  # there may be more, which then begin with the same step
            if self.jobs:
                self._step()

    def _is_time(self) -> bool:
        """A look at the board costs as much as a step of a tiny model: ten a second."""
        now = time.monotonic()
        if now - self.looked < 0.1:
            return False
        self.looked = now
        return True

    def _begin(self, job_id: str, work: dict[str, Any]) -> None:
        trial = Trial.from_json(json.loads(work["trial"])) if work["kind"] == "trial" else None
        alone = trial is None or self.places == 1 or work["attempt"] > 1
        if self.jobs and (alone or not self.crew.fits(trial.recipe)):  # type: ignore[union-attr]
            self.waiting.append((job_id, work))
            return
        self.crew.detach()
        if trial is None:
            self._answer(job_id, work)
        elif alone:
            self._train_alone(job_id, work)
        else:
            self._join(job_id, work, trial)

    def _answer(self, job_id: str, work: dict[str, Any]) -> None:
        """A job that is no trial."""
        self.bench.progress = self.told(job_id)
        try:
            answer = self.bench.answer(work)
        except Exception as error:  # the driver decides what a missing signal means
            answer = {"error": _in_words(error)}
        self.report(job_id, {"done": True, **answer})

    def _join(self, job_id: str, work: dict[str, Any], trial: Trial) -> None:
        adapter = None
        try:
            adapter = self.bench.attach(trial, work["trainable_params"])
            adapter.detach()
            member = self.crew.join(
                adapter,
                trial.recipe,
                seed=trial.seed,
                on_rung=partial(self._rung, job_id),
                checkpoint=self.bench.checkpoint(trial),
            )
        except Exception as error:  # of this trial alone
            started = self.bench.started(trial, work["trainable_params"])
            self._finish(job_id, self.bench.failed(started, error))
            return
        self.jobs[member] = (job_id, work)
        if member.result is not None:
            self._end(member)

    def _step(self) -> None:
        try:
            ended = self.crew.step()
        except Exception as error:  # whoever is to blame will say so
            given_back, self.jobs = list(self.jobs.values()), {}
            print(f"a step of {len(given_back)} trials failed, each goes on alone: {error}", file=sys.stderr)
            self.bench.clean_up()
            for job in given_back:
                self._train_alone(*job)
            return
        for member in ended:
            self._end(member)

    def _end(self, member: Any) -> None:
        job_id, work = self.jobs.pop(member)
        if isinstance(member.error, OutOfMemoryError) or _is_out_of_memory(member.error):
            self.waiting.append((job_id, work | {"attempt": 2}))  # with the memory of a worker for itself
            return
        trial = Trial.from_json(json.loads(work["trial"]))
        started = self.bench.started(trial, work["trainable_params"]).updated(pack=member.most)
        if member.error is not None:
            outcome = self.bench.failed(started, member.error).updated(seconds=member.past.elapsed())
        else:
            try:
                outcome = self.bench.ended(started, member.adapter, member.result)
            except Exception as error:  # the adapter cannot be saved
                outcome = self.bench.failed(started, error)
        self._finish(job_id, outcome)

    def _train_alone(self, job_id: str, work: dict[str, Any]) -> None:
        trial = Trial.from_json(json.loads(work["trial"]))
        outcome = self.bench.train(trial, work["trainable_params"], report=partial(self._rung, job_id))
        self._finish(job_id, outcome)

    def _rung(self, job_id: str, rung: Any) -> bool:
        return self.report(job_id, {"done": False, "rung": rung})

    def _finish(self, job_id: str, outcome: Outcome) -> None:
        self.report(job_id, {"done": True, "outcome": json.dumps(outcome.to_json())})
        self.bench.clean_up()


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, ToolkitError) else f"{type(error).__name__}: {error}"


def _is_out_of_memory(error: Exception | None) -> bool:
    from trainers import loop

    return error is not None and loop.is_out_of_memory(error)


def _pass_on(board: Any, group: int, job_id: str, done: int, total: int, what: str) -> None:
    board.report.remote(group, job_id, {"done": False, "progress": (done, total, what)})


def _now_and_then(tell: Callable[[int, int, str], None], *, seconds: float = 0.5) -> Callable[[int, int, str], None]:
    """`tell`, at most once in so many seconds."""
    last = 0.0

    def progress(done: int, total: int, what: str) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= seconds:
            last = now
            tell(done, total, what)

    return progress


def _device_name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if str(device).startswith("cuda") else platform.machine() + " CPU"


def _memory_used(device: Any) -> int:
    """Most bytes so far: of a GPU, or of the process."""
    import torch

    if str(device).startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def _memory_free(device: Any) -> int:
    import torch

    if str(device).startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _return_memory(device: Any) -> None:
    import torch

    if str(device).startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
