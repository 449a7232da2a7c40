"""The parts of `python -m tests.benchmarks.gpu`, one a process: layers, whole steps, a study, signals, trials.

    python -m tests.benchmarks.gpu_parts part=moe_steps                            at the sizes of OLMoE-1B-7B, on a GPU
    python -m tests.benchmarks.gpu_parts part=study device=cpu size=small dtype=float32

Weights are random, in bf16 (dtype=float32: fp32, as on a CPU); routers prefer a quarter of the experts about as much as
the published models do.

    study         `space=sieve` on the embedded model and task, two workers that share the GPU, as many trainings in a
                  pass as pays: trainings, what became of them, tokens a second, peak memory
    moe_steps     training steps as trainers/loop/ does them, 4 layers of OLMoE's size: attention and router alone,
                  one expert and the hot quarter of the experts (over all rows, as a GPU runs it, and over picked rows,
                  whose number is waited for), all experts; PEFT on attention and all experts (it adapts no router, and
                  gate and up share an A)
    whole_moe     OLMoE-1B-7B as it is, 16 layers: the hot quarter, all experts, PEFT
    whole_dense   Llama-7B as it is, 32 layers: LoRA on every projection, ours and PEFT's; 5 routed experts in each
    dense_steps   4 layers of Llama-7B's size, all seven projections of a layer: ours with 1, with 5 routed and with
                  5 Hydra experts; PEFT; the two loops
    expert_lora   tests/benchmarks/expert_lora at OLMoE's layer size: frozen, PEFT, ours; agreement with PEFT
    lora_moe      tests/benchmarks/lora_moe at Llama-7B's width: frozen, the loops of the papers, ours
    packing       tests/benchmarks/packing: 8 trainings in a pass against one after another
    memory        a trial that runs out of memory is an OutOfMemoryError, and its memory is returned
    spectrum      tests/benchmarks/spectrum on the matrices of a Llama-7B: svdvals and a loop, ours
    overhead      tests/benchmarks/trial_overhead: warm workers, one TorchTrainer per trial

A step is a whole optimiser step, timed between two evaluations that do nothing; tokens are real ones, without padding.
A row that fails has the reason under `failed`, and the rows after it are measured. Numbers of the other benchmarks are
those of their own line; of steps, by variant:

    tokens_per_second, step_seconds, peak_gib (GPU only), trainable
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from allocators.core import words
from allocators.core.errors import OutOfMemoryError
from allocators.core.shapes import shape_from_config
from allocators.core.types import ExpertCounts, ExpertSelection, LoraSettings, Recipe
from search import records
from tests.benchmarks import expert_lora, lora_moe, packing, spectrum, trial_overhead
from tests.benchmarks._shared import parse
from tests.trainers.reference import every_expert
from trainers import loop
from trainers.adapter import attach
from trainers.tasks import Evaluation, Row

RANK, EXPERTS = 8, 5  # LoRA rank everywhere; experts that dense projections get
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Size:
    """Model sizes of the parts; words are the arguments of the other benchmarks."""

    hidden: int
    expert_width: int
    dense_hidden: int
    dense_width: int
    layers: int
    whole_moe: int  # layers
    whole_dense: int
    vocabulary: int
    length: int  # tokens of the longest row
    rows: int  # of a step
    steps: int  # that are timed
    expert_lora: str
    lora_moe: str
    spectrum: str
    overhead: str
    packing: str
    study: str


SIZES = {
    "large": Size(
        hidden=2048,
        expert_width=1024,
        dense_hidden=4096,
        dense_width=11008,
        layers=4,
        whole_moe=16,
        whole_dense=32,
        vocabulary=50304,
        length=512,
        rows=8,
        steps=10,
        expert_lora="tokens=1024,4096 hidden=2048 width=1024 rank=8 repeats=3",
        lora_moe="sizes=4096 experts=2,8 repeats=9",
        spectrum="sizes=4096x4096,11008x4096 repeats=3",
        overhead="trials=4",
        packing="tokens=64,512 hidden=2048 layers=4 repeats=3 steps=3",
        study="trials=16 gpus_per_worker=0.5 pack=auto",
    ),
    "small": Size(
        hidden=64,
        expert_width=32,
        dense_hidden=64,
        dense_width=128,
        layers=2,
        whole_moe=2,
        whole_dense=2,
        vocabulary=256,
        length=32,
        rows=4,
        steps=2,
        expert_lora="tokens=256 hidden=128 width=64 rank=8 repeats=1",
        lora_moe="sizes=128 experts=2,8 repeats=3",
        spectrum="sizes=256x256,256x688 repeats=2",
        overhead="trials=2",
        packing="tokens=16,64 hidden=128 layers=2 members=2 repeats=1 steps=1",
        study="trials=2 workers=process limit=8 calibration_samples=8 evaluations=1 recipe.steps=2",
    ),
}


@dataclass(frozen=True)
class Bench:
    """What a part runs on. `results` takes its rows, and is on disk after each of them."""

    part: str
    device: str
    dtype: str
    size: Size
    results: str = ""

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    def note(self, **found: Any) -> None:
        """Rows by name, as soon as there are numbers."""
        if self.results:
            with open(self.results, "a", encoding="utf-8") as file:
                file.write(json.dumps({"part": self.part, "found": found}) + "\n")
                file.flush()
                os.fsync(file.fileno())


# --- other benchmarks ---------------------------------------------------------------------------------------------


class Shown(io.StringIO):
    """Keeps what is printed, and prints all but the line of JSON."""

    def write(self, text: str) -> int:
        if not text.startswith("{"):
            sys.__stdout__.write(text)  # type: ignore[union-attr]
        return super().write(text)


def theirs(bench: Bench, main: Callable[[list[str]], Any], words: str) -> None:
    """What another benchmark prints, and what it says in its line of JSON."""
    text = Shown()
    with contextlib.redirect_stdout(text):
        main(words.split())
    said = json.loads(text.getvalue().rstrip().splitlines()[-1])
    bench.note(**{key: value for key, value in said.items() if key not in ("benchmark", "device", "versions")})


def run_expert_lora(bench: Bench) -> None:
    theirs(bench, expert_lora.main, f"{bench.size.expert_lora} device={bench.device} dtype={bench.dtype}")


def run_lora_moe(bench: Bench) -> None:
    theirs(bench, lora_moe.main, f"{bench.size.lora_moe} device={bench.device} dtype={bench.dtype}")


def run_packing(bench: Bench) -> None:
    theirs(bench, packing.main, f"{bench.size.packing} device={bench.device} dtype={bench.dtype}")


def run_spectrum(bench: Bench) -> None:
    theirs(bench, spectrum.main, f"{bench.size.spectrum} device={bench.device}")


def run_overhead(bench: Bench) -> None:
    theirs(bench, trial_overhead.main, bench.size.overhead)


# --- a study ------------------------------------------------------------------------------------------------------


def run_study(bench: Bench) -> None:
    """As a user starts it; its last lines are shown."""
    with tempfile.TemporaryDirectory() as folder:
        asked = ["space=sieve", f"storage={folder}", "name=gpu", *bench.size.study.split()]
        began = time.monotonic()
        ran = subprocess.run(
            [sys.executable, "-m", "search.run", *asked], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        seconds = time.monotonic() - began
        print("\n".join(ran.stdout.rstrip().splitlines()[-25:]))
        outcomes = list(records.read(Path(folder) / "gpu").finished.values()) if ran.returncode == 0 else []
    complete = [o for o in outcomes if o.status == "complete"]
    broken = Counter(o.status for o in outcomes if o.status in ("failed", "lost", "out_of_memory"))
    found: dict[str, Any] = {
        "words": " ".join(asked[:1] + asked[3:]),
        "seconds": round(seconds, 1),
        "trainings": len(outcomes),
        "complete": len(complete),
        "best_accuracy": max((o.accuracy for o in complete if o.accuracy is not None), default=None),
        "largest_pack": max((o.pack for o in outcomes), default=None),
        "tokens_per_second": round(sum(o.tokens for o in outcomes) / seconds, 1),
        "peak_gib": max((round(o.peak_memory_bytes / 2**30, 2) for o in outcomes), default=None),
    }
    if ran.returncode or broken or not complete:
        found["failed"] = f"exit {ran.returncode}, {len(complete)} trainings complete, {dict(broken)}"
    bench.note(study=found)
    print(", ".join(f"{key} {value}" for key, value in found.items()))


# --- whole steps --------------------------------------------------------------------------------------------------


class Rows:
    """A task of random rows, half as long to as long as `length`, a quarter of each with a loss; evaluates nothing."""

    data_hash, metric = "random", "none"

    def __init__(self, size: Size) -> None:
        draw = random.Random(0)
        self.rows = []
        for _ in range(8 * size.rows):
            length = draw.randint(size.length // 2, size.length)
            ids = [draw.randrange(1, size.vocabulary) for _ in range(length)]
            self.rows.append(Row(ids, length - length // 4))

    def training_rows(self, tokenizer: Any, max_length: int) -> list[Row]:
        return self.rows

    def prepare(self, tokenizer: Any, *, rank: int, world_size: int) -> None:
        pass

    def evaluate(self, model: Any) -> Evaluation:
        return Evaluation(0.0, 0.0, (0.0,), "none", 0.0)


class Trainable:
    """Parameters of somebody else's adapter as the loop takes ours."""

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        self.named = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        self.num_trainable = sum(parameter.numel() for _, parameter in self.named)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return self.named

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named]

    def extra_loss(self, real_BS: Tensor | None = None) -> None:
        return None

    def check_gradients(self) -> None:
        pass


@contextmanager
def ours(model: Any, allocation: Any, shape: Any) -> Iterator[tuple[Any, Any]]:
    adapter = attach(model, allocation, shape=shape, lora=LoraSettings(rank=RANK, lora_alpha=2 * RANK))
    try:
        yield model, adapter
    finally:
        adapter.detach()


@contextmanager
def picked(model: Any, allocation: ExpertSelection, shape: Any) -> Iterator[tuple[Any, Any]]:
    """Ours as on a CPU: only rows of chosen experts run through LoRA, and their number is waited for in every layer."""
    with ours(model, allocation, shape) as (_, adapter):
        for lora in adapter.experts.values():
            lora.every_row = lora.all_chosen
        yield model, adapter


@contextmanager
def peft_moe(model: Any) -> Iterator[tuple[Any, Any]]:
    with expert_lora.peft(model, RANK, "grouped_mm", modules=ATTENTION) as wrapped:
        yield wrapped, Trainable(list(wrapped.named_parameters()))


@contextmanager
def peft_dense(model: Any, names: Sequence[str]) -> Iterator[tuple[Any, Any]]:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(names)))
    yield wrapped, Trainable(list(wrapped.named_parameters()))
    wrapped.unload()
    model.requires_grad_(False)


@contextmanager
def loops(model: Any, paths: Sequence[str], kind: Any) -> Iterator[tuple[Any, Any]]:
    """Every projection runs as a loop over experts, as the papers describe it."""
    named: list[tuple[str, nn.Parameter]] = []
    with ExitStack() as undo:
        for path in paths:
            module = model.get_submodule(path)
            with torch.device(module.weight.device):
                layer = kind(module.weight, EXPERTS)

            def forward(x: Tensor, layer: nn.Module = layer) -> Any:
                with torch.autocast(x.device.type, x.dtype, enabled=x.dtype != torch.float32):  # factors stay fp32
                    return layer(x.flatten(0, -2)).unflatten(0, x.shape[:-1])

            vars(module)["forward"] = forward
            undo.callback(vars(module).pop, "forward")
            own = ((n, p) for n, p in layer.named_parameters() if p is not module.weight)
            named += [(f"{path}.{name}", parameter) for name, parameter in own]
        yield model, Trainable(named)


def timed(bench: Bench, title: str, variants: dict[str, Callable[[], Any]]) -> None:
    """Trains with each variant for twice `steps` optimiser steps; the second half is timed. One that fails says why."""
    print(
        f"{title}; {bench.size.rows} rows of {bench.size.length // 2} to {bench.size.length} tokens a step, rank {RANK}"
    )
    print(f"{'':18}{'tokens/s':>12}{'step s':>10}{'peak GiB':>10}{'trainable':>14}")
    for name, variant in variants.items():
        try:
            found = timed_one(bench, variant)
        except Exception as error:  # of this row alone: memory that does not suffice, a kernel that is not there
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            bench.note(**{name: {"failed": reason}})
            print(f"{name:18}  failed: {reason}", flush=True)
        else:
            bench.note(**{name: found})
            speed, step, peak, trainable = found.values()
            print(f"{name:18}{speed:12,.0f}{step:10.4f}{peak if bench.cuda else '–':>10}{trainable:14,}", flush=True)
        gc.collect()  # past the handler, whose traceback held tensors
        if bench.cuda:
            torch.cuda.empty_cache()


def timed_one(bench: Bench, variant: Callable[[], Any]) -> dict[str, Any]:
    """Numbers of one variant."""
    size = bench.size
    recipe = Recipe(
        rank=RANK,
        batch_size=size.rows,
        micro_batch_size=size.rows,
        steps=2 * size.steps,
        max_length=size.length,
        learning_rate=1e-4,
    )
    rungs: list[tuple[float, int]] = []

    def on_rung(rung: Any) -> bool:
        rungs.append((time.perf_counter(), rung.tokens))  # its losses were read: the device is done with the steps
        return True

    with variant() as (model, adapter):
        result = loop.train(
            model,
            adapter,
            Rows(size),  # type: ignore[arg-type]
            recipe,
            seed=0,
            tokenizer=SimpleNamespace(pad_token_id=0),
            device=bench.device,
            on_rung=on_rung,
            evaluations=2,
        )
        trainable = adapter.num_trainable
    if result.status != "complete":
        raise RuntimeError(result.status)
    (began, before), (ended, after) = rungs
    return {
        "tokens_per_second": round((after - before) / (ended - began), 1),
        "step_seconds": round((ended - began) / size.steps, 5),
        "peak_gib": round(result.peak_memory_bytes / 2**30, 2) if bench.cuda else None,
        "trainable": trainable,
    }


def moe(bench: Bench, layers: int) -> tuple[Any, Any, ExpertSelection]:
    """A random OLMoE with its shape and the quarter of each layer's experts that random tokens go to most."""
    size = bench.size
    settings = expert_lora.Settings(
        hidden=size.hidden, width=size.expert_width, rank=RANK, device=bench.device, dtype=bench.dtype
    )
    model = expert_lora.build(settings, layers=layers, vocabulary=size.vocabulary)
    ids = torch.tensor([row.input_ids[: size.length // 2] for row in Rows(size).rows[: size.rows]], device=bench.device)
    counts = expert_lora.route_counts(model, model.model.embed_tokens(ids))
    hot = {n: tuple(count.topk(len(count) // 4).indices.tolist()) for n, count in enumerate(counts)}
    return model, shape_from_config(model.config, name="random OLMoE"), ExpertSelection(hot)


def dense(bench: Bench, layers: int) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, LlamaConfig

    size = bench.size
    config = LlamaConfig(
        hidden_size=size.dense_hidden,
        intermediate_size=size.dense_width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, size.dense_hidden // 128),
        vocab_size=min(size.vocabulary, 32000) if bench.cuda else size.vocabulary,
        pad_token_id=0,
        eos_token_id=None,
    )
    with torch.device(bench.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, bench.dtype))
    return model.requires_grad_(False), shape_from_config(config, name="random Llama")


MOE_WHOLE = ("hot quarter", "all experts", "PEFT all")  # of the variants below, those that a whole model is tried with
DENSE_WHOLE = ("1 expert", "PEFT LoRA", f"{EXPERTS} routed")


def run_moe_steps(bench: Bench, *, layers: int = 0, only: Sequence[str] = ()) -> None:
    layers = layers or bench.size.layers
    model, shape, hot = moe(bench, layers)
    one = ExpertSelection({layer: ids[:1] for layer, ids in hot.experts.items()})
    variants: dict[str, Callable[[], Any]] = {
        "no expert": lambda: ours(model, ExpertSelection({}), shape),
        "1 expert": lambda: ours(model, one, shape),
        "1, rows picked": lambda: picked(model, one, shape),
        "hot quarter": lambda: ours(model, hot, shape),
        "hot, rows picked": lambda: picked(model, hot, shape),
        "all experts": lambda: ours(model, every_expert(shape), shape),
        "PEFT all": lambda: peft_moe(model),
    }
    timed(bench, f"{layers} layers of OLMoE's kind, hidden {bench.size.hidden}", chosen(variants, only))


def run_dense_steps(bench: Bench, *, layers: int = 0, only: Sequence[str] = ()) -> None:
    layers = layers or bench.size.layers
    model, shape = dense(bench, layers)
    paths = [m.path for m in shape.of_role("attention", "mlp")]
    names = sorted({m.name for m in shape.of_role("attention", "mlp")})
    variants: dict[str, Callable[[], Any]] = {
        "1 expert": lambda: ours(model, ExpertCounts(dict.fromkeys(paths, 1)), shape),
        "PEFT LoRA": lambda: peft_dense(model, names),
        f"{EXPERTS} routed": lambda: ours(model, ExpertCounts(dict.fromkeys(paths, EXPERTS)), shape),
        "MoLA loop": lambda: loops(model, paths, lora_moe.MolaLoop),
        f"{EXPERTS} Hydra": lambda: ours(model, ExpertCounts(dict.fromkeys(paths, EXPERTS), gating="hydra"), shape),
        "Hydra loop": lambda: loops(model, paths, lora_moe.HydraLoop),
    }
    timed(bench, f"{layers} layers of Llama's kind, hidden {bench.size.dense_hidden}", chosen(variants, only))


def chosen(variants: Mapping[str, Callable[[], Any]], only: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """Those that are named; all where none is."""
    return {name: make for name, make in variants.items() if name in only or not only}


def run_whole_moe(bench: Bench) -> None:
    run_moe_steps(bench, layers=bench.size.whole_moe, only=MOE_WHOLE)


def run_whole_dense(bench: Bench) -> None:
    run_dense_steps(bench, layers=bench.size.whole_dense, only=DENSE_WHOLE)


def run_memory(bench: Bench) -> None:
    """A step of far too many rows; then what is allocated is what was before."""
    model, shape, hot = moe(bench, 1)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    task, rows = Rows(bench.size), 1 << 14
    recipe = Recipe(rank=RANK, batch_size=rows, micro_batch_size=rows, steps=1, max_length=bench.size.length)
    ending = "complete"
    with ours(model, hot, shape) as (_, adapter):
        try:
            loop.train(
                model,
                adapter,
                task,  # type: ignore[arg-type]
                recipe,
                seed=0,
                tokenizer=SimpleNamespace(pad_token_id=0),
                device=bench.device,
                on_rung=lambda rung: True,
            )
        except OutOfMemoryError as error:
            ending = type(error).__name__
    del adapter
    gc.collect()
    left = torch.cuda.memory_allocated() - before
    print(f"{rows:,} rows at once: {ending}; {left / 2**20:.1f} MiB more allocated than before")
    bench.note(ending=ending, left_mib=round(left / 2**20, 1))


PARTS: dict[str, Callable[[Bench], None]] = {
    "study": run_study,
    "moe_steps": run_moe_steps,
    "whole_moe": run_whole_moe,
    "whole_dense": run_whole_dense,
    "dense_steps": run_dense_steps,
    "expert_lora": run_expert_lora,
    "memory": run_memory,
    "lora_moe": run_lora_moe,
    "packing": run_packing,
    "spectrum": run_spectrum,
    "overhead": run_overhead,
}
NEEDS_GPU = ("memory",)


@dataclass(frozen=True)
class Settings:
    part: str = words.key("moe_steps", "what is measured", choices=tuple(PARTS))
    device: str = "cuda"
    size: str = words.key("large", "of the models", choices=tuple(SIZES))
    dtype: str = "bfloat16"
    results: str = words.key("", "file that takes the rows, a JSON object a line")


def main(argv: Sequence[str]) -> None:
    settings = parse(argv, Settings)
    if settings.device == "cpu":
        torch.set_num_threads(1)
    bench = Bench(settings.part, settings.device, settings.dtype, SIZES[settings.size], settings.results)
    PARTS[settings.part](bench)


if __name__ == "__main__":
    main(sys.argv[1:])
