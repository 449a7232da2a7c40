"""K trainings in one pass over the frozen base: against one after another, and against taking turns.

    python -m tests.benchmarks.packing                               K = 8; 16, 64 and 256 tokens a training and step
    python -m tests.benchmarks.packing members=4 tokens=16,64 repeats=3
    python -m tests.benchmarks.packing device=cuda hidden=2048 dtype=bfloat16 layers=8

Two cases, random models: LoRA experts on a dense Llama (`dense`), LoRA on chosen experts of an OLMoE (`moe`, hidden and
width halved). The K trainings differ in rank, number of experts, learning rate and seed. A step is forward, backward,
clipping and AdamW (`loop.TrainingRun`), of rows of 16 tokens, half of them completion.

    alone    one after another: one model, one adapter attached, so many steps; then the next
    turns    a loop over trainings inside of every step: adapters are switched, nothing is shared
    packed   trainers/packing/

A last measurement packs LoRA experts in the upper half of the dense model only: trainings with one seed train on the
same rows, which then run through the lower half once (`shared`), against trainings with a seed each (`apart`).

All are measured in turn, so that a busy moment strikes all; a figure is the median over the turns of the ratio
within a turn. Seconds are CPU seconds of the process where there is one thread (what else the machine does counts
less), wall clock otherwise. c0 (seconds a step) and c1 (seconds a token) are a fit of the base with one training
alone to the three sizes by least squares of relative errors; `predicted` is what they would make of packing if
adapters and optimisers cost nothing of their own: K·(c0 + c1·M)/(c0 + c1·K·M).

Names in the JSON line, for each case and number M of tokens:
    gain_{case}_{M}         time of `alone` over that of `packed`
    turns_{case}_{M}        time of `turns` over that of `packed`
    predicted_{case}_{M}    K·(c0 + c1·M)/(c0 + c1·K·M)
    c0_{case}, c1_{case}    seconds; of this machine alone
    shared_{M}              time of `apart` over that of `shared`
    weights_{case}          a training's tensors after 15 steps, packed against alone: norm of the difference over norm,
                            [median, largest] over trainings. Where rounding sends one token to another expert (a tie
                            in a router, random here) that training goes another way from there
    ties                    of the first such tokens of a training: how far apart the logits of the two experts were
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from allocators.core.shapes import shape_from_config
from allocators.core.types import ExpertCounts, ExpertSelection, LoraSettings, Recipe
from tests.benchmarks._shared import parse
from trainers import loop, packing
from trainers.adapter import Adapter, attach
from trainers.loop import TrainingRun
from trainers.loop.device import own_random_state
from trainers.tasks import Row
from trainers.waiting import one_sample_a_row

ROW = 16  # tokens
STEPS = 15  # of the comparison of weights
ENDLESS = 10**6  # steps; no run ends here


@dataclass(frozen=True)
class Settings:
    tokens: tuple[int, ...] = (16, 64, 256)
    members: int = 8
    layers: int = 4
    hidden: int = 256
    repeats: int = 5
    steps: int = 4
    threads: int = 1
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: str = "float32"


class Rows:
    """As much of a task as a run that is never evaluated needs."""

    data_hash = metric = "benchmark"

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = [Row(torch.randint(3, 250, (ROW,), generator=generator).tolist(), ROW // 2) for _ in range(count)]

    def training_rows(self, tokenizer: Any, max_length: int) -> list[Row]:
        return self.rows

    def prepare(self, tokenizer: Any, *, rank: int, world_size: int) -> None:
        pass


class Tokenizer:
    pad_token_id = 0


def build(case: str, settings: Settings) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig, OlmoeConfig

    common: dict[str, Any] = {
        "vocab_size": 256,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.hidden // 64,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    if case == "dense":
        config: Any = LlamaConfig(hidden_size=settings.hidden, intermediate_size=3 * settings.hidden, **common)
    else:
        config = OlmoeConfig(
            hidden_size=settings.hidden // 2,
            intermediate_size=settings.hidden // 4,
            num_experts=16,
            num_experts_per_tok=2,
            **{**common, "num_attention_heads": max(1, settings.hidden // 128)},
        )
    torch.manual_seed(0)
    with torch.device(settings.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings.dtype))
    return model.requires_grad_(False).eval()


def recipes(settings: Settings, tokens: int, steps: int) -> list[Recipe]:
    batch = tokens // ROW
    return [
        Recipe(
            rank=(4, 8)[k % 2],
            learning_rate=1e-3 * (1 + k % 3),
            batch_size=batch,
            micro_batch_size=batch,
            steps=steps,
            max_length=ROW,
            top_k=1 + k % 2,
        )
        for k in range(settings.members)
    ]


def adapters(case: str, model: Any, recipes: list[Recipe], *, first: int = 0) -> list[Adapter]:
    """Detached. On a dense model none is below layer `first`."""
    shape = shape_from_config(model.config, name=case)
    made = []
    for k, recipe in enumerate(recipes):
        allocation: Any
        if case == "dense":
            modules = [m for m in shape.of_role("attention", "mlp") if m.layer >= first]
            allocation = ExpertCounts({m.path: 2 + (m.layer + k) % 3 for m in modules})
        else:
            allocation = ExpertSelection({layer: tuple(range(k % 4, k % 4 + 4)) for layer in shape.moe_layers})
        lora = LoraSettings(rank=recipe.rank, lora_alpha=2 * recipe.rank, top_k=recipe.top_k)
        adapter = attach(model, allocation, shape=shape, lora=lora, seed=k)
        for lora in getattr(adapter, "experts", {}).values():
            lora.stop_watching()  # as after the first step of a training
        adapter.detach()
        made.append(adapter)
    return made


def runs(model: Any, adapters: list[Adapter], recipes: list[Recipe], task: Rows, device: Any) -> list[TrainingRun]:
    """As `loop.train` makes them."""
    return [
        TrainingRun(
            model,
            adapter,
            task,  # type: ignore[arg-type]
            recipe,
            seed=k,
            tokenizer=Tokenizer,
            device=torch.device(device),
            evaluations=1,
            checkpoint=None,
        )
        for k, (adapter, recipe) in enumerate(zip(adapters, recipes, strict=True))
    ]


def packed_run(
    model: Any, adapters: list[Adapter], recipes: list[Recipe], task: Rows, device: Any, *, one_seed: bool = False
) -> packing.PackedRun:
    joint = packing.PackedRun(
        model,
        task,  # type: ignore[arg-type]
        tokenizer=Tokenizer,
        device=device,
        evaluations=1,
    )
    for k, (adapter, recipe) in enumerate(zip(adapters, recipes, strict=True)):
        joint.join(adapter, recipe, seed=0 if one_seed else k, on_rung=lambda rung: True)
    return joint


def step(run: TrainingRun) -> None:
    run.model.train()
    run.take_step(run.step)
    if run.unseen == loop.CHECK_EVERY:
        run._look()


def adapter_of(run: TrainingRun) -> Adapter:
    assert isinstance(run.adapter, Adapter)
    return run.adapter


def one_after_another(runs: list[TrainingRun], steps: int) -> None:
    for run in runs:
        adapter_of(run).reattach()
        for _ in range(steps):
            step(run)
        adapter_of(run).detach()


def in_turns(runs: list[TrainingRun], steps: int) -> None:
    for _ in range(steps):
        for run in runs:
            adapter_of(run).reattach()
            step(run)
            adapter_of(run).detach()


def measure(case: str, model: Any, tokens: int, settings: Settings) -> tuple[dict[str, float], float]:
    """(median ratios to `packed`, seconds of a step of one training alone)."""
    task, made = Rows(16 * tokens // ROW), recipes(settings, tokens, ENDLESS)
    joint = packed_run(model, adapters(case, model, made), made, task, settings.device)
    alone = runs(model, adapters(case, model, made), made, task, settings.device)
    turns = runs(model, adapters(case, model, made), made, task, settings.device)
    seconds = interleaved(
        {
            "alone": lambda: one_after_another(alone, settings.steps),
            "turns": lambda: in_turns(turns, settings.steps),
            "packed": lambda: together(joint, settings.steps),
        },
        settings,
    )
    joint.end_all()
    ratios = {name: ratio(seconds[name], seconds["packed"]) for name in ("alone", "turns")}
    return ratios, statistics.median(seconds["alone"]) / settings.members / settings.steps


def measure_shared(model: Any, tokens: int, settings: Settings) -> float:
    """What one pass through the lower half is worth, where all adapters are in the upper half."""
    task, made = Rows(16 * tokens // ROW), recipes(settings, tokens, ENDLESS)
    pairs = {}
    for name in ("shared", "apart"):
        upper = adapters("dense", model, made, first=settings.layers // 2)
        pairs[name] = packed_run(model, upper, made, task, settings.device, one_seed=name == "shared")
    seconds = interleaved({name: partial(together, joint, settings.steps) for name, joint in pairs.items()}, settings)
    for joint in pairs.values():
        joint.end_all()
    return ratio(seconds["apart"], seconds["shared"])


def together(joint: packing.PackedRun, steps: int) -> None:
    for _ in range(steps):
        joint.step()
    joint.detach()


def interleaved(variants: dict[str, Callable[[], None]], settings: Settings) -> dict[str, list[float]]:
    """Seconds of each in every turn; every other turn is in reverse."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    synchronize = torch.cuda.synchronize if settings.device.startswith("cuda") else lambda: None
    now = time.process_time if settings.device == "cpu" and settings.threads == 1 else time.perf_counter
    with own_random_state(torch.device(settings.device)), one_sample_a_row():
        for turn in range(settings.repeats + 1):
            for name in list(variants)[:: -1 if turn % 2 else 1]:
                synchronize()
                began = now()
                variants[name]()
                synchronize()
                if turn:  # the first warms up
                    seconds[name].append(now() - began)
    return seconds


def ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def differences(case: str, model: Any, settings: Settings) -> tuple[list[float], list[float]]:
    """Packed against alone: of each training's weights after STEPS steps, and of tokens that took another way.

    The second is, for each token whose experts differ, how far apart the logits of the last expert that it goes to and
    of the first that it does not are; it counts up to the first step of a training in which there is one.
    """
    made, task = recipes(settings, 64, STEPS + 1), Rows(64)
    packed, alone = adapters(case, model, made), adapters(case, model, made)
    joint = packed_run(model, packed, made, task, settings.device)
    trainings = runs(model, alone, made, task, settings.device)
    routers = [layer.mlp.gate for layer in model.model.layers] if case == "moe" else []
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []  # (logits, experts), router by router
    hooks = [r.register_forward_hook(lambda _m, _x, out: seen.append((out[0].detach(), out[2]))) for r in routers]
    ties: dict[int, list[float]] = {}
    with own_random_state(torch.device(settings.device)), one_sample_a_row():
        for _ in range(STEPS):
            joint.step()
            together = seen[:]
            joint.detach()
            seen.clear()
            for k, training in enumerate(trainings):
                one_after_another([training], 1)
                if k not in ties and (
                    apart := [gap for pair in zip(together, seen, strict=True) for gap in _ties(*pair, k)]
                ):
                    ties[k] = apart
                seen.clear()
    joint.end_all()
    for hook in hooks:
        hook.remove()
    found = []
    for ours, theirs in zip(packed, alone, strict=True):
        one, other = (torch.cat([p.detach().flatten() for p in a.parameters()]) for a in (ours, theirs))
        found.append(float(torch.linalg.vector_norm(one - other) / torch.linalg.vector_norm(other)))
    return found, [gap for gaps in ties.values() for gap in gaps]


def _ties(together: Any, alone: Any, member: int) -> list[float]:
    """Of one router in one step: gaps between the logits at the border of top-k, of tokens with other experts."""
    logits_TE, experts_TK = alone
    own = slice(member * len(logits_TE), (member + 1) * len(logits_TE))
    other_T = (experts_TK.sort().values != together[1][own].sort().values).any(dim=1)
    best = logits_TE[other_T].topk(experts_TK.size(1) + 1).values
    gaps: list[float] = (best[:, -2] - best[:, -1]).tolist()
    return gaps


def fit(seconds: dict[int, float]) -> tuple[float, float]:
    """c0, c1 of seconds = c0 + c1·tokens, by least squares of relative errors."""
    rows = torch.tensor([[1 / s, m / s] for m, s in seconds.items()], dtype=torch.float64)
    c0, c1 = torch.linalg.lstsq(rows, torch.ones(len(rows), 1, dtype=torch.float64)).solution.flatten().tolist()
    return c0, c1


def main(argv: list[str]) -> None:
    settings = parse(argv, Settings)
    if len(settings.tokens) < 2:
        sys.exit("tokens= takes two sizes at least: c0 and c1 are fitted to them")
    torch.set_num_threads(settings.threads)
    import transformers

    k = settings.members
    print(
        f"{k} trainings, {settings.layers} layers, hidden {settings.hidden} (moe: {settings.hidden // 2}), "
        f"{settings.dtype}, {settings.device}, median of {settings.repeats}"
    )
    ratios: dict[str, Any] = {}
    for case in ("dense", "moe"):
        model = build(case, settings)
        found, seconds = {}, {}
        for tokens in settings.tokens:
            found[tokens], seconds[tokens] = measure(case, model, tokens, settings)
        c0, c1 = fit(seconds)
        print(f"\n{case}: c0 {c0:.4f} s a step, c1 {c1 * 1e6:.1f} µs a token, one training alone")
        print(f"{'tokens a training':>18}{'alone/packed':>14}{'turns/packed':>14}{'predicted':>11}{'step alone s':>14}")
        for tokens in settings.tokens:
            predicted = k * (c0 + c1 * tokens) / (c0 + c1 * k * tokens)
            ratios[f"gain_{case}_{tokens}"] = round(found[tokens]["alone"], 3)
            ratios[f"turns_{case}_{tokens}"] = round(found[tokens]["turns"], 3)
            ratios[f"predicted_{case}_{tokens}"] = round(predicted, 3)
            print(
                f"{tokens:18}{found[tokens]['alone']:13.2f}×{found[tokens]['turns']:13.2f}×{predicted:10.2f}×"
                f"{seconds[tokens]:14.4f}",
                flush=True,
            )
        ratios |= {f"c0_{case}": round(c0, 6), f"c1_{case}": round(c1, 9)}
        gaps, ties = differences(case, model, settings)
        ratios[f"weights_{case}"] = [statistics.median(gaps), max(gaps)]
        print(
            f"weights after {STEPS} steps, packed against alone: relative difference {statistics.median(gaps):.1e} "
            f"in the median training, {max(gaps):.1e} in the worst"
        )
        if ties:
            ratios["ties"] = ties
            words = ", ".join(f"{gap:.0e}" for gap in ties)
            print(f"tokens that went to another expert, and how far its logit was behind: {words}")
    model = build("dense", settings)
    print(
        "\ndense, adapters in the upper half only: the same rows run through the lower half once, against a seed each"
    )
    for tokens in settings.tokens:
        ratios[f"shared_{tokens}"] = round(measure_shared(model, tokens, settings), 3)
        print(f"{tokens:18}{ratios[f'shared_{tokens}']:13.2f}×", flush=True)
    print(
        json.dumps(
            {
                "benchmark": "packing",
                "device": torch.cuda.get_device_name() if settings.device.startswith("cuda") else platform.machine(),
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
                "ratios": ratios,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
