"""What LoRA on the experts of an MoE model costs: ours against frozen experts and against PEFT's `target_parameters`.

    python -m tests.benchmarks.expert_lora                                    fp32, one thread, a few minutes
    python -m tests.benchmarks.expert_lora tokens=512 repeats=1               a quick look
    python -m tests.benchmarks.expert_lora device=cuda dtype=bfloat16 hidden=2048 width=1024 rank=32

A random OLMoE (64 experts, 8 a token) whose router prefers a quarter of its experts about as much as the published
models do. One training step is forward and backward; LoRA is on the experts alone in every variant (attention and
router stay frozen), and the gradient always flows down to the input, as it does when anything below is adapted.

    frozen         transformers' grouped_mm, nothing to train: the least that a step can cost
    peft_grouped   PEFT target_parameters on all experts, experts_implementation=grouped_mm
    peft_eager     the same on transformers' eager loop (slow: one turn, at the smallest token count)
    ours_all       every expert, A for gate and up apart (PEFT shares one: it trains fewer parameters)
    ours_hot       the 25 % of experts that most tokens go to
    ours_full      ours_hot and LoRA on attention and router too, as a study trains it (whole step only)

`layer` times one layer's experts, `step` a whole 4-layer model. Variants take turns, every other turn in reverse; a
ratio is the median over the turns. Seconds are CPU seconds of the process where there is one thread (what else the
machine does counts less), wall clock otherwise. Last comes one JSON line, whose ratios are

    layer_<tokens>_<variant>, step_<tokens>_<variant>     time, × frozen
    step_<tokens>_speedup                                 time of peft_grouped ÷ time of ours_hot
    step_<tokens>_saved_<variant>                         bytes kept for backward, × frozen
    agreement_logits, agreement_gradients                 ours_all against PEFT with equal factors, largest difference
                                                          ÷ largest value
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from allocators.core.shapes import shape_from_config
from allocators.core.types import ExpertSelection, LoraSettings, ModelShape
from tests.benchmarks._shared import parse
from tests.trainers.reference import PEFT_STACKS, every_expert, from_peft, peft_factors, share_first_factor
from trainers.adapter import Adapter, attach
from trainers.adapter.expert_lora import ExpertLoraAdapter

EXPERTS, TOP_K, LAYERS, SEQUENCE = 64, 8, 4, 256


@dataclass(frozen=True)
class Settings:
    tokens: tuple[int, ...] = (512, 1024, 4096)
    hidden: int = 512
    width: int = 256
    rank: int = 8
    repeats: int = 5
    threads: int = 1
    device: str = "cpu"
    dtype: str = "float32"


def build(settings: Settings, *, layers: int = LAYERS, vocabulary: int = 256) -> Any:
    """A random OLMoE; a quarter of each router's rows is longer, so these experts get more of the tokens."""
    from transformers import AutoModelForCausalLM, OlmoeConfig

    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.width,
        num_hidden_layers=layers,
        num_attention_heads=settings.hidden // 64,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        pad_token_id=0,
        eos_token_id=None,
    )
    with torch.device(settings.device):  # drawn there: billions of numbers
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings.dtype)).train()
    for layer in model.model.layers:
        with torch.no_grad():
            layer.mlp.gate.weight.normal_()
            layer.mlp.gate.weight[torch.randperm(EXPERTS)[: EXPERTS // 4]] *= 1.7
    return model.requires_grad_(False)


def route_counts(model: Any, embeddings: Tensor) -> list[Tensor]:
    """Rows per expert [E] of each layer."""
    counts: list[Tensor] = []

    def hook(_: Any, args: tuple[Any, ...]) -> None:
        counts.append(torch.bincount(args[1].flatten(), minlength=EXPERTS))

    handles = [layer.mlp.experts.register_forward_pre_hook(hook) for layer in model.model.layers]
    with torch.no_grad():
        model(inputs_embeds=embeddings)
    for handle in handles:
        handle.remove()
    return counts


@contextmanager
def ours(model: Any, shape: ModelShape, selection: ExpertSelection, rank: int) -> Iterator[Adapter]:
    adapter = attach(model, selection, shape=shape, lora=LoraSettings(rank=rank, lora_alpha=2 * rank))
    assert isinstance(adapter, ExpertLoraAdapter)
    for lora in adapter.experts.values():
        lora.stop_watching()  # as after the first step of training
    yield adapter
    adapter.detach()


@contextmanager
def peft(model: Any, rank: int, implementation: str, *, modules: Sequence[str] = ()) -> Iterator[Any]:
    """On all experts, and on linear layers of these names."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(modules), target_parameters=PEFT_STACKS)
    model.set_experts_implementation(implementation)
    wrapped = get_peft_model(model, config)
    yield wrapped
    wrapped.unload()
    model.set_experts_implementation("grouped_mm")
    model.requires_grad_(False)


def timed(step: Callable[[], Tensor], settings: Settings) -> float:
    """Seconds of forward and backward."""
    clock = time.process_time if settings.device == "cpu" and settings.threads == 1 else time.perf_counter
    synchronize = torch.cuda.synchronize if settings.device.startswith("cuda") else lambda: None
    synchronize()
    start = clock()
    out = step()
    out.backward(torch.ones_like(out))
    synchronize()
    return clock() - start


def saved_bytes(step: Callable[[], Tensor], model: Any) -> int:
    """Bytes that the forward pass keeps for backward, each storage once, the base's own weights not counted."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = step()
    own = {p.untyped_storage().data_ptr() for p in model.parameters() if not p.requires_grad}
    del out
    return sum(size for pointer, size in storages.items() if pointer not in own)


def agreement(model: Any, shape: ModelShape, embeddings: Tensor, rank: int) -> tuple[float, float]:
    """Largest relative difference of logits and of gradients between ours_all and PEFT with the same factors."""
    generator = torch.Generator().manual_seed(2)
    factors: dict[str, Tensor] = {}
    theirs: dict[str, Tensor] = {}
    with peft(model, rank, "grouped_mm") as wrapped:
        pairs = peft_factors(wrapped)
        for stack, pair in pairs.items():
            for factor in pair:
                factor.data.copy_(torch.randn(factor.shape, generator=generator) * 0.02)
            factors |= {name: value.detach().clone() for name, value in from_peft(stack, *pair, rank=rank).items()}
        expected = wrapped(inputs_embeds=embeddings).logits
        weight = torch.randn(expected.shape, generator=generator).to(expected)
        expected.backward(weight)
        for stack, (a, b) in pairs.items():
            assert a.grad is not None
            assert b.grad is not None
            theirs |= {n: g.clone() for n, g in from_peft(stack, a.grad, b.grad, rank=rank).items()}
    with ours(model, shape, every_expert(shape), rank) as adapter:
        adapter.load_state_dict(factors)
        logits = model(inputs_embeds=embeddings).logits
        logits.backward(weight)
        mine = share_first_factor({name: p.grad for name, p in adapter.named_parameters() if p.grad is not None})

    def difference(ours: Tensor, peft: Tensor) -> float:
        return float(((ours - peft).abs().max() / peft.abs().max()).detach())

    return difference(logits, expected), max(difference(mine[name], grad) for name, grad in theirs.items())


def main(argv: list[str]) -> None:
    settings = parse(argv, Settings)
    torch.set_num_threads(settings.threads)
    import peft as peft_package
    import transformers

    model = build(settings)
    shape = shape_from_config(model.config, name="random OLMoE")
    experts_only = replace(shape, modules=shape.of_role("expert"))
    everything = every_expert(shape)
    ratios: dict[str, float] = {}
    print(
        f"OLMoE {LAYERS} layers, {EXPERTS} experts, top {TOP_K}, hidden {settings.hidden}, width {settings.width}, "
        f"rank {settings.rank}, {settings.dtype}, {settings.device}, {settings.threads} thread(s), "
        f"median of {settings.repeats}"
    )
    for num_tokens in settings.tokens:
        size = (max(1, num_tokens // SEQUENCE), min(num_tokens, SEQUENCE), settings.hidden)
        embeddings = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(model.lm_head.weight)
        embeddings.requires_grad_(True)
        counts = route_counts(model, embeddings)
        hottest = [count.topk(EXPERTS // 4).indices for count in counts]
        hot = ExpertSelection({layer: tuple(ids.tolist()) for layer, ids in enumerate(hottest)})
        share = sum(float(c[ids].sum()) for c, ids in zip(counts, hottest, strict=True)) / float(sum(map(sum, counts)))
        variants: dict[str, Callable[[], Any]] = {
            "frozen": lambda: ours(model, experts_only, ExpertSelection({}), settings.rank),
            "peft_grouped": lambda: peft(model, settings.rank, "grouped_mm"),
            "peft_eager": lambda: peft(model, settings.rank, "eager"),
            "ours_all": lambda: ours(model, experts_only, everything, settings.rank),
            "ours_hot": partial(ours, model, experts_only, hot, settings.rank),
            "ours_full": partial(ours, model, shape, hot, settings.rank),
        }
        rows = embeddings.detach().flatten(0, 1).requires_grad_(True)
        with torch.no_grad():
            _, picked_weight, picked = model.model.layers[0].mlp.gate(rows)
        picked_weight.requires_grad_(True)

        def layer(rows: Tensor = rows, picked: Tensor = picked, picked_weight: Tensor = picked_weight) -> Any:
            return model.model.layers[0].mlp.experts(rows, picked, picked_weight)

        def step(embeddings: Tensor = embeddings) -> Any:
            return model(inputs_embeds=embeddings).logits

        print(f"\n{num_tokens} tokens; the hot 25 % of experts take {share:.0%} of the rows")
        print(f"{'':14}{'layer s':>10}{'× frozen':>10}{'step s':>10}{'× frozen':>10}{'saved MiB':>11}")
        seconds: dict[str, dict[str, list[float]]] = {v: {"layer": [], "step": []} for v in variants}
        saved: dict[str, int] = {}
        for repeat in range(settings.repeats + 1):
            for name in list(variants)[:: -1 if repeat % 2 else 1]:
                if name == "peft_eager" and (repeat > 1 or num_tokens > min(settings.tokens)):
                    continue
                with variants[name]():
                    for kind, run in (("layer", layer), ("step", step)):
                        if kind == "layer" and name == "ours_full":
                            continue
                        if repeat:  # the first turn warms up
                            seconds[name][kind].append(timed(run, settings))
                        elif kind == "step":
                            saved[name] = saved_bytes(run, model)
        for name in saved:
            line = f"{name:14}"
            for kind in ("layer", "step"):
                if not seconds[name][kind]:
                    line += f"{'':20}"
                    continue
                turns = zip(seconds[name][kind], seconds["frozen"][kind], strict=False)
                ratio = statistics.median(mine / base for mine, base in turns)
                ratios[f"{kind}_{num_tokens}_{name}"] = round(ratio, 3)
                line += f"{statistics.median(seconds[name][kind]):10.3f}{ratio:10.2f}"
            print(line + f"{saved[name] / 2**20:11.0f}")
            ratios[f"step_{num_tokens}_saved_{name}"] = round(saved[name] / saved["frozen"], 3)
        turns = zip(seconds["peft_grouped"]["step"], seconds["ours_hot"]["step"], strict=True)
        ratios[f"step_{num_tokens}_speedup"] = round(statistics.median(theirs / mine for theirs, mine in turns), 3)
    logits, gradients = agreement(model, experts_only, embeddings.detach()[:2], settings.rank)
    ratios |= {"agreement_logits": logits, "agreement_gradients": gradients}
    print(f"\nours_all against PEFT, equal factors: logits {logits:.1e}, gradients {gradients:.1e}")
    print(
        json.dumps(
            {
                "benchmark": "expert_lora",
                "device": torch.cuda.get_device_name() if settings.device.startswith("cuda") else "cpu",
                "versions": {
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                    "peft": peft_package.__version__,
                },
                "ratios": ratios,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
