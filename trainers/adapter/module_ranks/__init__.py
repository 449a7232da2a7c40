"""Plain LoRA with a rank of its own for every module: linear layers, routers, and every expert of a stack.

    adapter = attach(model, ModuleRanks({"model.layers.0.self_attn.q_proj": 4, ...}), shape=shape, lora=lora)

    y = W x + (lora_alpha/r) · B A drop(x),  A [r_m, in], B [out, r_m],  lora_alpha/r of the recipe for every module m

so that a module of twice the rank has twice the alpha. A module of rank 0 is left alone.

Experts are in `experts.py`.

Shapes: I input features, O output features, N = Σr over the experts of a projection.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn

from allocators.core.types import ModuleRanks, ModuleShape
from trainers.adapter.base import Adapter
from trainers.adapter.expert_lora import check_stacks, dispatched
from trainers.adapter.linear import check_size, module_at, uniform, weight_size
from trainers.adapter.module_ranks.experts import RaggedExpertLora


class ModuleRanksAdapter(Adapter):
    """LoRA in place. Tensors: `<path>.lora_A` [r, I] and `.lora_B` [O, r]; of a projection of experts [N, I], [O, N].

    experts   of every layer that has experts with a rank
    """

    UNUSED = ("top_k", "balance_coef")  # there is no added router

    allocation: ModuleRanks
    experts: dict[int, RaggedExpertLora]

    def _insert(self) -> None:
        stacked: dict[int, list[ModuleShape]] = defaultdict(list)
        for spec in self.shape.modules:
            if spec.num_experts:
                stacked[spec.layer].append(spec)
            elif rank := self.allocation.ranks.get(spec.path):
                module = module_at(self.model, spec.path, name=self.shape.name)
                size = spec.out_features, spec.in_features
                check_size(weight_size(module), size, path=spec.path, name=self.shape.name)
                self._add_linear_lora(module, spec, rank=rank)
        self.experts = {
            layer: self._add_experts(specs)
            for layer, specs in stacked.items()
            if any(spec.path in self.allocation.experts for spec in specs)
        }
        dispatched(self, self.experts)

    def _add_experts(self, specs: list[ModuleShape]) -> RaggedExpertLora:
        path = specs[0].path.rpartition(".")[0]
        module = module_at(self.model, path, name=self.shape.name)
        by_name = {spec.name: spec for spec in specs}
        check_stacks(module, by_name, path=path, name=self.shape.name)
        ranks = {name: self.allocation.of(spec) for name, spec in by_name.items()}
        ids = tuple(e for e, of in enumerate(zip(*ranks.values(), strict=True)) if any(of))
        pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for name, spec in by_name.items():
            if not any(ranks[name]):
                continue
            starts = [
                uniform(rank, spec.in_features, seed=self.seed, name=f"{spec.path}.{expert}")
                for expert, rank in enumerate(ranks[name])
                if rank
            ]
            device, total = module.down_proj.device, sum(ranks[name])
            a_NI = self._add(f"{spec.path}.lora_A", torch.cat(starts), device=device)
            b_ON = self._add(f"{spec.path}.lora_B", torch.zeros(spec.out_features, total), device=device)
            pairs[name] = (a_NI, b_ON)
        lora = RaggedExpertLora(
            module,
            ids,
            pairs,
            {name: [of[e] for e in ids] for name, of in ranks.items()},
            {name: (spec.out_features, spec.in_features) for name, spec in by_name.items()},
            path=path,
            scale=self.lora.scale,
            dropout=self.lora.lora_dropout,
        )
        self._put_attribute(module, "lora", lora)  # where experts_forward finds it
        self._on_detach(lora.stop_watching)
        return lora

    def check_gradients(self) -> None:
        """As `ExpertLoraAdapter.check_gradients`.

        Raises TrialError for an expert that received tokens but no gradient, or a tensor that is no part of the loss.
        """
        for layer, lora in self.experts.items():
            lora.check_gradients(layer)
        super().check_gradients()

    def _merge(self) -> None:
        """W += (lora_alpha/r)·B A where there is a rank."""
        for spec in self.shape.modules:
            if spec.path in self.allocation.ranks:
                self._merge_linear_lora(module_at(self.model, spec.path, name=self.shape.name), spec)
        for lora in self.experts.values():
            lora.merge()
