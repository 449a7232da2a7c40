"""What a run leaves of the process as it was: its random state, and the device's memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256

import torch


@contextmanager
def own_random_state(device: torch.device) -> Iterator[None]:
    """The process's random state afterwards is the one from before."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def seed_dropout(device: torch.device, seed: int, step: int, rank: int) -> None:
    """Anew at every step: a resumed run then needs no stored random state, and an evaluation cannot shift it."""
    number = dropout_seed(seed, step, rank)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(number)
    else:
        torch.default_generator.manual_seed(number)


def dropout_seed(seed: int, step: int, rank: int = 0) -> int:
    """One of 2⁶³ seeds, from a hash: neighbouring steps and ranks draw independently."""
    return int.from_bytes(sha256(f"{seed}/{step}/{rank}".encode()).digest()[:8], "big") >> 1


def give_memory_back(device: torch.device) -> None:
    """Call it where no traceback holds the tensors of a step that failed."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# What torch raises as a RuntimeError: of the CPU, of memory that CUDA or one of its libraries asks for beside torch.
_NO_MEMORY = ("DefaultCPUAllocator: ", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch says so, of a GPU or of the CPU."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY)
