"""What the doctor looks at, one function a subject."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil

from allocators.core import words
from allocators.core.errors import StudyError, shown
from search.engine import surroundings
from trainers import models, storage, tasks
from trainers.versions import PACKAGES, versions

State = Literal["ok", "note", "wrong"]
_DISTRIBUTION = PACKAGES[0]
_HUB = "huggingface.co:443"
_LEAST_DISK, _LEAST_MEMORY, _LEAST_SHARED = 5e9, 3e9, 1e8  # bytes: a study of the embedded model takes 3.7 GB in all
_PORTS = {"mlflow": 5000, "Ray's dashboard": 8265}
_NVIDIA = Path("/proc/driver/nvidia/version")
_CGROUP = Path("/sys/fs/cgroup/memory.max")
_SHARED = Path("/dev/shm")  # noqa: S108  # Linux's, no temporary file


@dataclass(frozen=True)
class Asked:
    """What is looked at besides the machine; the same words as those of a study."""

    model: str = words.key("", "embedded name, folder or Hugging Face id (empty: none is looked at)")
    task: str = words.key("", "task, task file or group (empty: none is looked at)")
    storage: str = words.key("studies", "folder or URI of studies")
    ray_address: str = words.key("local", "HOST:PORT of a cluster, or local")
    trust_remote_code: bool = words.key(False, "run Python code from the model's repository")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    state   ok; note: it works, and may surprise; wrong: a study would end here
    """

    what: str
    state: State
    says: str


def examine(asked: Asked) -> Iterator[Finding]:
    """Everything, from the machine to the task. An examination that fails is a finding of its own."""
    looks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("machine", _machine),
        ("packages", _packages),
        ("GPU", _gpu),
        ("Ray", lambda: _ray(asked.ray_address)),
        ("storage", lambda: _storage(asked.storage)),
        ("hub", _hub),
        ("ports", _ports),
    ]
    if asked.model:
        looks.append(("model", lambda: _model(asked)))
    if asked.task:
        looks.append(("task", lambda: _task(asked)))
    for what, look in looks:
        try:
            yield from look()
        except StudyError as error:
            yield Finding(what, "wrong", str(error))
        except Exception as error:  # a doctor who faints tells nobody anything
            yield Finding(what, "wrong", f"could not be looked at: {type(error).__name__}: {shown(str(error))}")


def _machine() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("machine", "ok", f"{platform.system()} on {platform.machine()}, {cores} CPU cores for this process")
    free, limit = psutil.virtual_memory().available, _memory_limit()
    free = min(free, limit) if limit else free
    container = f", of which a container may have {_size(limit)}" if limit else ""
    enough = "" if free >= _LEAST_MEMORY else ": little, a study of the embedded model takes 3.7 GB in all"
    yield Finding("memory", "note" if enough else "ok", f"{_size(free)} free{container}{enough}")
    if _SHARED.is_dir() and (shared := shutil.disk_usage(_SHARED).free) < _LEAST_SHARED:
        yield Finding("shared memory", "note", f"{_SHARED} has {_size(shared)}: give a container --shm-size=1g")


def _memory_limit() -> int:
    """Bytes that a container may have, 0 without a limit."""
    with suppress(OSError, ValueError):
        return int(_CGROUP.read_text())
    return 0


def _size(number: float) -> str:
    return f"{number / 1e9:.1f} GB"


def _packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    found, wrong = versions(), []
    for line in metadata.requires(_DISTRIBUTION) or ():
        need = Requirement(line)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            have = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{need.name} is missing")
            continue
        if not need.specifier.contains(have, prereleases=True):
            wrong.append(f"{need.name} {have} is not {need.specifier}")
    if wrong:
        yield Finding("packages", "wrong", f"{', '.join(wrong)}: pip install -c constraints.txt -e .")
    else:
        yield Finding("packages", "ok", ", ".join(f"{name} {version}" for name, version in found.items()))


def _gpu() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(number)
            free, total = torch.cuda.mem_get_info(number)
            bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16: float32 is taken"
            yield Finding(f"GPU {number}", "ok", f"{card.name}, {_size(free)} of {_size(total)} free, {bf16}")
    elif _NVIDIA.exists():
        built = torch.version.cuda or "none: a build for CPUs"
        yield Finding("GPU", "wrong", f"there is an NVIDIA driver, and torch cannot use it (its CUDA: {built})")
    else:
        yield Finding("GPU", "note", "none: trainings run on the CPU")


def _ray(address: str) -> Iterator[Finding]:
    if address == "local":
        surroundings.check()
        yield Finding("Ray", "ok", "one of its own can start here")
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        yield Finding("Ray", "note", f"ray_address={address} is found by Ray itself when a study starts")
    elif surroundings.answers(address):
        yield Finding("Ray", "ok", f"{address} answers")
    else:
        yield Finding("Ray", "wrong", f"{address} does not answer: start a cluster with 'ray start --head'")


def _storage(place: str) -> Iterator[Finding]:
    if storage.is_uri(place):
        there = "is there" if storage.exists(place) else "is empty, or is made by the first study"
        yield Finding("storage", "ok", f"{place} answers and {there}")
        return
    folder = words.path(place, "storage").absolute()
    above = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        yield Finding(
            "storage", "wrong", f"storage={place} cannot be written ({error.strerror}): choose another folder"
        )
        return
    free = shutil.disk_usage(above).free
    little = f": little, adapters and checkpoints of a study can be more than {_size(_LEAST_DISK)}"
    state: State = "ok" if free >= _LEAST_DISK else "note"
    yield Finding("storage", state, f"{place}: {_size(free)} free{'' if state == 'ok' else little}")


def _hub() -> Iterator[Finding]:
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        yield Finding("hub", "note", "HF_HUB_OFFLINE is set: only models and data on this machine are used")
    elif surroundings.answers(_HUB):
        yield Finding("hub", "ok", "huggingface.co answers")
    else:
        yield Finding("hub", "note", "huggingface.co does not answer: only models and data on this machine can be used")


def _ports() -> Iterator[Finding]:
    taken = [f"{port} ({name})" for name, port in _PORTS.items() if surroundings.answers(f"127.0.0.1:{port}")]
    if taken:
        yield Finding("ports", "note", f"in use: {', '.join(taken)}; give the command another --port")
    else:
        yield Finding("ports", "ok", f"free: {', '.join(f'{port} ({name})' for name, port in _PORTS.items())}")


def _model(asked: Asked) -> Iterator[Finding]:
    shape = models.shape_of(asked.model, trust_remote_code=asked.trust_remote_code)
    experts = f", {shape.total_experts} routed experts" if shape.is_moe else ", dense"
    space = "sieve" if shape.is_moe else "dense"
    dry = f"python -m search.run space={space} model={asked.model} dry_run=true"
    says = (
        f"{asked.model}: {shape.num_layers} layers{experts} ({dry} says a worker's memory, with estimate=true the time)"
    )
    yield Finding("model", "ok", says)
    if models.has_weights(asked.model):
        models.check_files(asked.model, shape)
        yield Finding("weights", "ok", "the files on this machine are whole; the first study fetches what is missing")
        tokenizer = models.tokenizer_of(asked.model, trust_remote_code=asked.trust_remote_code)
        yield Finding("tokenizer", "ok", f"{len(tokenizer):,} tokens")
    else:
        yield Finding("weights", "wrong", f"'{asked.model}' holds a config.json and no weights")
    for note in models.left_out(asked.model, trust_remote_code=asked.trust_remote_code):
        yield Finding("model", "note", note)


def _task(asked: Asked) -> Iterator[Finding]:
    chosen = tasks.check_task(asked.task)
    for sentence in chosen.code:
        yield Finding("task", "note", sentence)
    task = tasks.load_task(asked.task)
    yield Finding("task", "ok", f"{tasks.sizes(task)} (python -m trainers.tasks {asked.task} shows its prompts)")
    if not asked.model:
        return
    try:
        limits = tasks.Limits.of(models.config_of(asked.model), recipe=chosen.recipe)
        tokenizer = models.tokenizer_of(asked.model, trust_remote_code=asked.trust_remote_code)
    except StudyError:  # said of the model already
        return
    for note in tasks.look(task, tokenizer, limits).notes:
        yield Finding("task", "note", note)
