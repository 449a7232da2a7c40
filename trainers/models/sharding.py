"""A frozen base in parts: FSDP2 over the workers of one trial, for models that do not fit one device.

    loaded = models.load("Qwen/Qwen3-30B-A3B", device="cuda", shard=True)     # the same call on every worker
    python -m search.run model=Qwen/Qwen3-30B-A3B workers_per_trial=8 shard=true

transformers loads the model so (`DistributedConfig(fsdp_size=workers)`): each weight is cut into as many pieces of rows
(experts, where they are stacked) as there are workers, and a worker reads its piece from the safetensors straight to
its device. What a worker needs, P bytes of weights and W workers:

    device memory   P/W for its pieces; the whole weights of two decoder layers, or of the embeddings or the head, while
                    they run; adapter, gradients and activations as without sharding
    RAM             what is being read, some tensors at a time; P/W more where the device is the CPU

Before a layer runs, forward or backward, its weights are gathered from all workers and given back afterwards. So
everything that runs the model is done by all workers together, pass by pass:

- a step has as many passes on a worker as on the one with most rows; those without rows run on two tokens that no loss
  is taken on (trainers/loop/)
- in an evaluation, where workers have different numbers of passes, those that are done go on until all are (`in_step`)
- signals that run the model are measured by every worker on the same documents (trainers/worker_state.py)

Adapters are tensors outside of the model's parameters, so each worker has all of them, as without sharding, and their
gradients are summed as there. What reads weights outside of a pass finds this worker's rows only: `local_rows`.

A worker that runs out of memory in the middle of a pass leaves the others waiting in it: it ends, and Ray Train starts
the group anew (trainers/worker.py).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from allocators.core.errors import StudyError


def is_sharded(model: nn.Module) -> bool:
    """Whether its weights are spread over the workers."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


@contextmanager
def loading(device: torch.device) -> Iterator[dict[str, Any]]:
    """What `from_pretrained` must be told inside this block to load this worker's part to `device`.

    Raises StudyError where there are no workers to share the model, or transformers cannot share it.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        raise StudyError("shard=true spreads a model over the workers of a trial: set workers_per_trial to 2 or more")
    try:
        from transformers.distributed import DistributedConfig

        parts = DistributedConfig(fsdp_size=dist.get_world_size())
    except (ImportError, TypeError) as error:  # an earlier version has no such class, or one without FSDP
        raise StudyError(
            "shard=true needs a transformers that loads models in parts: pip install 'transformers>=5.23'"
        ) from error
    # transformers takes the device of that number; Ray may have given this worker another one.
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    try:
        yield {"distributed_config": parts}
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before


def prepare(model: Any) -> None:
    """Lets a model that was loaded in parts have whole weights in a pass only, whatever part of it runs last."""
    model.set_reshard_after_forward(True)
    # Its mark for `generate`, which would add a sum over the workers to every token: `in_step` does that for passes.
    model._is_fsdp_managed_module = False
    # In the first pass FSDP looks at the parameters and at what hangs below what: it must come before an adapter hides
    # some of them, and before a signal runs a part of the model.
    _pass_without_effect(model)


def local_rows(weight: Tensor) -> tuple[Tensor, int]:
    """The rows of a weight that this worker holds, and the number of the first; writing to them changes the weight.

    Of a model that is not sharded: all rows.
    """
    from torch.distributed.tensor import DTensor

    if not isinstance(weight, DTensor):
        return weight, 0
    size = -(-weight.shape[0] // weight.device_mesh.size())
    return weight.to_local(), min(size * weight.device_mesh.get_local_rank(), weight.shape[0])


def sampled(parameters: Iterable[Tensor], samples: int) -> Tensor:
    """`samples` evenly spaced values of every parameter (all of a smaller one), fp32 on the CPU.

    Of a sharded model every worker must ask; each gives what it holds, and all get all.
    """
    picked, shared = [], False
    for parameter in parameters:
        rows, first = local_rows(parameter.detach())
        shared |= rows is not parameter and rows.numel() < parameter.numel()
        offset, held = first * math.prod(parameter.shape[1:]), rows.flatten()
        places = torch.arange(0, parameter.numel(), max(1, parameter.numel() // samples), device=rows.device)
        places = places[:samples] - offset
        here = (places >= 0) & (places < held.numel())
        values = torch.zeros(len(places), device=rows.device)
        values[here] = held[places[here]].float()
        picked.append(values)
    everything = torch.cat(picked)
    if shared:
        bits = everything.view(torch.int32)  # one worker has the value, the others zero bits: the sum is exact
        dist.all_reduce(bits)
    return everything.cpu()


@contextmanager
def in_step(model: Any) -> Iterator[None]:
    """Inside, workers may run different numbers of passes: those that are done run passes on one token until all are.

    Before each pass the workers count those that still have work. An error between two passes is raised when all are
    done, one within a pass at once: the others then wait in it for ever, and only the end of this process can tell
    them.
    """
    if not is_sharded(model):
        yield
        return
    device, inside = model.device, False

    def begin(*_: Any) -> None:
        nonlocal inside
        inside = True
        dist.all_reduce(torch.ones(1, device=device))

    def end(*_: Any) -> None:
        nonlocal inside
        inside = False

    def somebody_works() -> bool:
        working = torch.zeros(1, device=device)
        dist.all_reduce(working)
        return bool(working)

    hooks = [model.register_forward_pre_hook(begin, prepend=True), model.register_forward_hook(end)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        if not inside:
            while somebody_works():
                _pass_without_effect(model)


@torch.no_grad()
def _pass_without_effect(model: Any) -> None:
    """On one token."""
    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
