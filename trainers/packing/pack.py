"""Adapters of one model side by side: hooked in together, out together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from allocators.core.errors import StudyError, TrialError
from trainers.adapter.base import Adapter, Undo, freeze
from trainers.adapter.expert_lora import ExpertLoraAdapter, dispatch
from trainers.adapter.lora_moe import LoraMoeAdapter
from trainers.adapter.module_ranks import ModuleRanksAdapter
from trainers.packing import expert_lora, lora_moe
from trainers.packing.buffers import Buffers
from trainers.packing.passes import Part, Passes
from trainers.packing.shared_layers import SharedLayers


class Pack:
    """Adapters of one model, hooked in together.

    adapters   detached, and of one kind. Their parameters have gradients to write to (`FlatBuffers.install`)

    Raises StudyError where they are of two kinds.
    """

    def __init__(self, model: Any, adapters: Sequence[Adapter]) -> None:
        device = next(model.parameters()).device
        self.buffers = Buffers(device)
        self.passes = Passes([adapter.lora for adapter in adapters], device)
        self.parts = self._parts(model, adapters)
        self._undo: list[Undo] = []
        self._puts: list[Callable[[], Undo]] = [partial(freeze, model, self), *(part.put for part in self.parts)]
        if any(isinstance(part, expert_lora.PackedExperts) for part in self.parts):
            self._puts.append(partial(dispatch, model))
        adapted = {part.path for part in self.parts}
        if first := min((m.layer for m in adapters[0].shape.modules if m.path in adapted), default=0):
            self._puts += SharedLayers(model.get_decoder().layers, first, self.passes).puts()

    def _parts(self, model: nn.Module, adapters: Sequence[Adapter]) -> list[Part]:
        of_moe = [adapter for adapter in adapters if isinstance(adapter, ExpertLoraAdapter)]
        of_ranks = [adapter for adapter in adapters if isinstance(adapter, ModuleRanksAdapter)]
        of_dense = [adapter for adapter in adapters if isinstance(adapter, LoraMoeAdapter)]
        if len(of_moe) == len(adapters):
            return expert_lora.parts(model, of_moe, self.buffers, self.passes)
        if len(of_dense) == len(adapters):
            return lora_moe.parts(model, of_dense, self.buffers, self.passes)
        if len(of_ranks) == len(adapters):
            return expert_lora.parts_of_ranks(model, of_ranks, self.buffers, self.passes)
        raise StudyError("adapters of two kinds (experts that are added, experts that are chosen, ranks) share no pass")

    def attach(self) -> None:
        """Hooks in; nothing where they are in already."""
        if not self._undo:
            try:
                for put in self._puts:
                    self._undo.append(put())
            except BaseException:  # half hooked in, the base would be neither itself nor the pack's
                self.detach()
                raise

    def detach(self) -> None:
        """Takes all hooks out, the last one first; a second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def check(self) -> None:
        """Call after the first pass. Raises TrialError naming a module that took no part in it."""
        if missing := sorted(part.path for part in self.parts if not part.seen):
            raise TrialError(f"{missing[0]} and {len(missing) - 1} more modules took no part in the pass of a pack")
