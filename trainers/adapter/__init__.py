"""The door to every adapter: put LoRA where an allocation says, take it off again, save it, load it.

    adapter = attach(model, allocation, shape=shape, lora=LoraSettings(rank=8, lora_alpha=16))      # freezes the base
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=3e-4)
    ...                                                                          # train, evaluate
    save(adapter, "best", metadata={"accuracy": 0.41})
    adapter.detach()                                                             # or adapter.merge()

    adapter = load(model, "best")                                                # later, on the same base

    adapters = Adapters(model, {"small": "knee", "large": "best"})               # several on one base, one at a time
    adapters.set_adapter("large")
    adapters.set_adapter(None)                                                   # the base itself, bit for bit

An MoE base takes an `ExpertSelection` (`expert_lora.py`), a dense base takes `ExpertCounts` (`lora_moe.py`), either
takes `ModuleRanks` (`module_ranks.py`). All build on the `Adapter` of `base.py`; an adapter's folder is in `files.py`,
PEFT's form of it in `peft_format.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from allocators.core.errors import StudyError, unknown
from allocators.core.types import Allocation, ExpertCounts, ExpertSelection, LoraSettings, ModelShape, ModuleRanks
from trainers import storage
from trainers.adapter.base import Adapter, fingerprint
from trainers.adapter.expert_lora import ExpertLoraAdapter
from trainers.adapter.files import Saved, family_of, read, save
from trainers.adapter.lora_moe import LoraMoeAdapter
from trainers.adapter.module_ranks import ModuleRanksAdapter
from trainers.models.quantized import quantization_of

__all__ = ["Adapter", "Adapters", "Saved", "applied", "attach", "fingerprint", "load", "read", "save"]


def attach(
    model: nn.Module, allocation: Allocation, *, shape: ModelShape, lora: LoraSettings, seed: int = 0
) -> Adapter:
    """Freezes `model` and inserts LoRA in place, as `allocation` says.

    A fresh adapter changes nothing, bit for bit, because every B is zero. The start values of A depend on `seed`, the
    module's path and the expert's id alone: not on the global random state and not on what else is adapted.

    `lora.top_k` and `lora.balance_coef` concern dense bases only: an MoE base keeps its own router.

    Raises InfeasibleError where the allocation does not fit `shape`, StudyError where `shape` does not fit `model` or
    the model carries an adapter already.
    """
    match allocation:
        case ExpertSelection():
            return ExpertLoraAdapter(model, allocation, shape=shape, lora=lora, seed=seed)
        case ExpertCounts():
            return LoraMoeAdapter(model, allocation, shape=shape, lora=lora, seed=seed)
        case ModuleRanks():
            return ModuleRanksAdapter(model, allocation, shape=shape, lora=lora, seed=seed)


def load(model: nn.Module, folder: storage.Location) -> Adapter:
    """Attaches a saved adapter to `model`, which must be the base it was trained on.

    folder   a path or a URI

    Raises StudyError as `read` does, and where the base is of another family, size or training.
    """
    saved = read(folder)
    config, weights, path = saved.config, saved.weights, saved.folder
    shape, base = saved.shape, config["base"]
    if family_of(model) != base["family"]:
        raise StudyError(
            f"the adapter in {path} is for {base['name']} ({base['family']}), got a {family_of(model)} model"
        )
    seed = config["settings"].get("seed", 0)
    adapter = attach(model, saved.allocation, shape=shape, lora=saved.lora, seed=seed)
    with adapter.detached_on_error():
        have, wanted = quantization_of(model), base.get("quantization", "")  # earlier versions had no quantised bases
        if have != wanted:
            raise StudyError(
                f"the adapter in {path} was trained on {base['name']} with quantization '{wanted}', this model has "
                f"'{have}': models.load({base['name']!r}, quantization={wanted!r})"
            )
        if adapter.fingerprint != base["fingerprint"]:
            raise StudyError(
                f"the adapter in {path} was trained on other weights of {base['name']} "
                f"(fingerprint {base['fingerprint']}, this model has {adapter.fingerprint}): load that base model"
            )
        adapter.load_state_dict(weights)
    return adapter


@contextmanager
def applied(model: nn.Module, folder: storage.Location) -> Iterator[Adapter]:
    """A saved adapter on `model` for the block; afterwards the base is as it was. Raises StudyError as `load` does."""
    adapter = load(model, folder)
    try:
        yield adapter
    finally:
        adapter.detach()


class Adapters:
    """Several saved adapters on one resident base, by name; one of them is active, or none.

        adapters = Adapters(model, {"small": "exports/knee", "large": "exports/best"})     # the first is active
        adapters.set_adapter("large")
        with adapters.disable_adapter():                                                   # the base itself
            ...
        adapters.load_adapter("exports/other", "other")                                    # added, not activated
        adapters.delete_adapter("small")

    Names are as in PEFT. Switching takes hooks out and puts others in: the base is not loaded, copied or written to, so
    without an active adapter it computes what it did before, bit for bit.
    """

    def __init__(self, model: nn.Module, folders: Mapping[str, storage.Location]) -> None:
        self.model = model
        self._adapters: dict[str, Adapter] = {}
        self._active: str | None = None
        for name, folder in folders.items():
            self.load_adapter(folder, name)
        self.set_adapter(next(iter(folders), None))

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in the order in which they were added."""
        return tuple(self._adapters)

    @property
    def active_adapter(self) -> str | None:
        """None: the base runs alone."""
        return self._active

    def __getitem__(self, name: str) -> Adapter:
        """Raises StudyError where no adapter has that name."""
        if name not in self._adapters:
            raise unknown("adapter", name, self._adapters)
        return self._adapters[name]

    def load_adapter(self, folder: storage.Location, name: str) -> None:
        """Adds a saved adapter, not active. Raises StudyError as `load` does, and for a name in use."""
        if name in self._adapters:
            raise StudyError(
                f"an adapter '{name}' is loaded already: choose another name or delete_adapter('{name}') first"
            )
        with self.disable_adapter():
            loaded = load(self.model, folder)
            loaded.detach()
        self._adapters[name] = loaded

    def set_adapter(self, name: str | None) -> None:
        """Activates one adapter in place of the other; None: the base alone. Raises StudyError for an unknown name."""
        chosen = None if name is None else self[name]
        if name == self._active:
            return
        if self._active is not None:
            self._adapters[self._active].detach()
            self._active = None
        if chosen is not None:
            chosen.reattach()
        self._active = name

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base alone inside the block."""
        before = self._active
        self.set_adapter(None)
        try:
            yield
        finally:
            self.set_adapter(before)

    def delete_adapter(self, name: str) -> None:
        """Forgets an adapter; where it was active, none is afterwards. Raises StudyError for an unknown name."""
        if self[name] is self._adapters.get(self._active or ""):
            self.set_adapter(None)
        del self._adapters[name]
