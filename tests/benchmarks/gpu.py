"""What the toolkit costs on a GPU, in one call of at most eight minutes: layers, whole steps, signals, trials.

    python -m tests.benchmarks.gpu                          all parts at the sizes of OLMoE-1B-7B and Llama-7B
    python -m tests.benchmarks.gpu parts=moe_steps,spectrum budget=200
    python -m tests.benchmarks.gpu write=true               and into tests/benchmarks/RESULTS.md
    python -m tests.benchmarks.gpu device=cpu size=small    the same code on a CPU, in a minute or two and at sizes that
                                                            tell nothing about a GPU: to know that it works

Weights are random, in bf16 (dtype=float32: fp32, as on a CPU); routers prefer a quarter of the experts about as much as
the published models do.

    expert_lora   tests/benchmarks/expert_lora at OLMoE's layer size: frozen, PEFT, ours; agreement with PEFT
    lora_moe      tests/benchmarks/lora_moe at Llama-7B's width: frozen, the loops of the papers, ours
    moe_steps     training steps as trainers/loop/ does them, 4 layers of OLMoE's size: attention and router alone,
                  the hot quarter of the experts, all experts; PEFT on attention and all experts (it adapts no router,
                  and gate and up share an A)
    dense_steps   the same, 4 layers of Llama-7B's size, all seven projections of a layer: ours with 1, with 5 routed
                  and with 5 Hydra experts; PEFT; the two loops
    whole_moe     OLMoE-1B-7B as it is, 16 layers, the hot quarter of the experts: tokens a second, peak memory
    whole_dense   Llama-7B as it is, 32 layers, 5 routed experts in every projection: tokens a second, peak memory
    memory        a trial that runs out of memory is an OutOfMemoryError, and its memory is returned
    spectrum      tests/benchmarks/spectrum on the matrices of a Llama-7B: svdvals and a loop, ours
    overhead      tests/benchmarks/trial_overhead: warm workers, one TorchTrainer per trial

Parts run in this order, or in that of `parts`; once `budget` seconds are gone no further part starts, and those left
out are named. A part that needs a GPU is left out without one. A step is a whole optimiser step, timed between two
evaluations that do nothing; tokens are real ones, without padding. Last comes one JSON line with the numbers of all
parts: for those of other files their own line, for the others by variant

    tokens_per_second, step_seconds, peak_gib (GPU only), trainable
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import io
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from allocators.core import words
from allocators.core.errors import OutOfMemoryError, StudyError, ToolkitError, unknown
from allocators.core.shapes import shape_from_config
from allocators.core.types import ExpertCounts, ExpertSelection, LoraSettings, Recipe
from tests.benchmarks import expert_lora, lora_moe, spectrum, trial_overhead
from tests.trainers.reference import every_expert
from trainers import loop
from trainers.adapter import attach
from trainers.tasks import Evaluation, Row

RESULTS = Path(__file__).with_name("RESULTS.md")
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
        expert_lora="tokens=1024,4096 hidden=2048 width=1024 rank=8 repeats=5",
        lora_moe="sizes=4096 experts=2,8 repeats=9",
        spectrum="sizes=4096x4096,11008x4096 repeats=3",
        overhead="trials=4",
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
    ),
}


@dataclass(frozen=True)
class Bench:
    device: str
    dtype: str
    size: Size

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")


# --- other benchmarks ---------------------------------------------------------------------------------------------


def theirs(main: Callable[[list[str]], Any], words: str) -> dict[str, Any]:
    """What another benchmark says in its JSON line; its tables are printed."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        main(words.split())
    *lines, last = text.getvalue().rstrip().splitlines()
    print("\n".join(lines))
    said = json.loads(last)
    return {key: value for key, value in said.items() if key not in ("benchmark", "device", "versions")}


def run_expert_lora(bench: Bench) -> dict[str, Any]:
    return theirs(expert_lora.main, f"{bench.size.expert_lora} device={bench.device} dtype={bench.dtype}")


def run_lora_moe(bench: Bench) -> dict[str, Any]:
    return theirs(lora_moe.main, f"{bench.size.lora_moe} device={bench.device} dtype={bench.dtype}")


def run_spectrum(bench: Bench) -> dict[str, Any]:
    return theirs(spectrum.main, f"{bench.size.spectrum} device={bench.device}")


def run_overhead(bench: Bench) -> dict[str, Any]:
    return theirs(trial_overhead.main, bench.size.overhead)


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


def timed(bench: Bench, title: str, variants: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Trains with each variant for twice `steps` optimiser steps; the second half is timed."""
    print(
        f"{title}; {bench.size.rows} rows of {bench.size.length // 2} to {bench.size.length} tokens a step, rank {RANK}"
    )
    print(f"{'':18}{'tokens/s':>12}{'step s':>10}{'peak GiB':>10}{'trainable':>14}")
    size, found = bench.size, {}
    task, tokenizer = Rows(size), SimpleNamespace(pad_token_id=0)
    recipe = Recipe(
        rank=RANK,
        batch_size=size.rows,
        micro_batch_size=size.rows,
        steps=2 * size.steps,
        max_length=size.length,
        learning_rate=1e-4,
    )
    for name, variant in variants.items():
        rungs: list[tuple[float, int]] = []

        def on_rung(rung: Any, rungs: Any = rungs) -> bool:
            rungs.append((time.perf_counter(), rung.tokens))  # its losses were read: the device is done with the steps
            return True

        with variant() as (model, adapter):
            result = loop.train(
                model,
                adapter,
                task,  # type: ignore[arg-type]
                recipe,
                seed=0,
                tokenizer=tokenizer,
                device=bench.device,
                on_rung=on_rung,
                evaluations=2,
            )
            trainable = adapter.num_trainable
        assert result.status == "complete", f"{name}: {result.status}"
        (began, before), (ended, after) = rungs
        found[name] = {
            "tokens_per_second": round((after - before) / (ended - began), 1),
            "step_seconds": round((ended - began) / size.steps, 5),
            "peak_gib": round(result.peak_memory_bytes / 2**30, 2) if bench.cuda else None,
            "trainable": trainable,
        }
        speed, step, peak, _ = found[name].values()
        print(f"{name:18}{speed:12,.0f}{step:10.4f}{peak if bench.cuda else '–':>10}{trainable:14,}", flush=True)
    return found


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


def run_moe_steps(bench: Bench) -> dict[str, Any]:
    model, shape, hot = moe(bench, bench.size.layers)
    variants: dict[str, Callable[[], Any]] = {
        "no expert": lambda: ours(model, ExpertSelection({}), shape),
        "hot quarter": lambda: ours(model, hot, shape),
        "all experts": lambda: ours(model, every_expert(shape), shape),
        "PEFT all": lambda: peft_moe(model),
    }
    return timed(bench, f"{bench.size.layers} layers of OLMoE's kind, hidden {bench.size.hidden}", variants)


def run_dense_steps(bench: Bench) -> dict[str, Any]:
    model, shape = dense(bench, bench.size.layers)
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
    return timed(bench, f"{bench.size.layers} layers of Llama's kind, hidden {bench.size.dense_hidden}", variants)


def run_whole_moe(bench: Bench) -> dict[str, Any]:
    model, shape, hot = moe(bench, bench.size.whole_moe)
    title = f"{bench.size.whole_moe} layers of OLMoE's kind, hidden {bench.size.hidden}"
    return timed(bench, title, {"hot quarter": lambda: ours(model, hot, shape)})


def run_whole_dense(bench: Bench) -> dict[str, Any]:
    model, shape = dense(bench, bench.size.whole_dense)
    counts = ExpertCounts({m.path: EXPERTS for m in shape.of_role("attention", "mlp")})
    title = f"{bench.size.whole_dense} layers of Llama's kind, hidden {bench.size.dense_hidden}"
    return timed(bench, title, {f"{EXPERTS} routed": lambda: ours(model, counts, shape)})


def run_memory(bench: Bench) -> dict[str, Any]:
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
    return {"ending": ending, "left_mib": round(left / 2**20, 1)}


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "expert_lora": run_expert_lora,
    "lora_moe": run_lora_moe,
    "moe_steps": run_moe_steps,
    "dense_steps": run_dense_steps,
    "whole_moe": run_whole_moe,
    "whole_dense": run_whole_dense,
    "memory": run_memory,
    "spectrum": run_spectrum,
    "overhead": run_overhead,
}
NEEDS_GPU = ("memory",)


# --- the run ------------------------------------------------------------------------------------------------------


class Tee(io.StringIO):
    """Keeps what is printed, and prints it."""

    def __init__(self, shown: Any) -> None:
        super().__init__()
        self.shown = shown

    def write(self, text: str) -> int:
        self.shown.write(text)
        return super().write(text)

    def flush(self) -> None:
        self.shown.flush()


def facts(device: str) -> dict[str, Any]:
    """Device, driver and versions."""
    from trainers.versions import versions

    known: dict[str, Any] = {"device": f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"}
    known |= {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "date": str(datetime.date.today())}
    if device.startswith("cuda"):
        known["device"] = torch.cuda.get_device_name(device)
        known["cuda"] = torch.version.cuda
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):  # a container may lack it
            answer = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True)
            known["driver"] = answer.stdout.split()[0]
    return known | {"versions": versions()}


def measure(bench: Bench, parts: Sequence[str], budget: float) -> tuple[dict[str, Any], dict[str, str]]:
    """Numbers by part, and why others did not run."""
    began, found, left_out = time.monotonic(), {}, {}
    for name in parts:
        if name in NEEDS_GPU and not bench.cuda:
            left_out[name] = "needs a GPU"
            continue
        if time.monotonic() - began > budget:
            left_out[name] = f"the budget of {budget:.0f} s was gone"
            continue
        print(f"\n--- {name}, after {time.monotonic() - began:.0f} s")
        found[name] = PARTS[name](bench)
        gc.collect()
        if bench.cuda:
            torch.cuda.empty_cache()
    print(f"\n{len(found)} parts in {time.monotonic() - began:.0f} s")
    for name, reason in left_out.items():
        print(f"not run: {name} ({reason})")
    return found, left_out


HEAD = """# Measured on a machine at a time

Written by `python -m tests.benchmarks.gpu write=true`, a section for each device and size; the newest run replaces its
section. Ratios within a table are what carries over to another machine; where `load` is above the number of cores,
other programs had their share of them.
"""


def write(title: str, remark: str, command: str, tables: str, line: str) -> None:
    """Puts the section into RESULTS.md, in place of the one of the same title."""
    old = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else HEAD
    head, *sections = old.split("\n## ")
    kept = [section for section in sections if section.partition("\n")[0] != title]
    new = f"{title}\n\n{remark}`{command}`\n\n```\n{tables.strip()}\n```\n\n<details><summary>JSON</summary>\n\n"
    new += f"```json\n{line}\n```\n</details>\n"
    RESULTS.write_text("\n## ".join([head, *(section.rstrip() + "\n" for section in kept), new]), encoding="utf-8")


@dataclass(frozen=True)
class Settings:
    device: str = "cuda"
    size: str = words.key("large", "of the models", choices=tuple(SIZES))
    dtype: str = words.key("", "of the models (empty: bfloat16, on a CPU float32)")
    parts: tuple[str, ...] = words.key(tuple(PARTS), "what is measured, in this order")
    budget: float = words.key(400.0, "seconds after which no further part starts", least=0)
    write: bool = words.key(False, "put the tables into RESULTS.md")


def parse(argv: Sequence[str]) -> Settings:
    settings = words.parse(argv, Settings)
    for part in settings.parts:
        if part not in PARTS:
            raise unknown("part", part, PARTS)
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise StudyError("there is no GPU here: device=cpu size=small shows that the benchmark works")
    return settings


def main(argv: Sequence[str]) -> int:
    if words.asks_for_help(argv):
        print("\n".join(["keys (default):", *words.help_of(Settings)]))
        return 0
    try:
        settings = parse(argv)
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device, size = settings.device, settings.size
    if device == "cpu":
        torch.set_num_threads(1)
    dtype = settings.dtype or ("float32" if device == "cpu" else "bfloat16")
    bench, known, tee = Bench(device, dtype, SIZES[size]), facts(device), Tee(sys.stdout)
    with contextlib.redirect_stdout(tee):
        print(", ".join(f"{key} {value}" for key, value in known.items() if key != "versions"))
        print(", ".join(f"{key} {value}" for key, value in known["versions"].items() if value))
        found, left_out = measure(bench, settings.parts, settings.budget)
    line = json.dumps({"benchmark": "gpu", "size": size, "dtype": dtype, **known, "parts": found, "not_run": left_out})
    print(line)
    if settings.write:
        remark = ""
        if device == "cpu":
            remark = "**A CPU at small sizes: shows that the benchmark runs, and nothing about a GPU.**\n\n"
        command = " ".join(["python -m tests.benchmarks.gpu", *argv])
        write(f"{known['device']}, {size}", remark, command, tee.getvalue(), line)
        print(f"written to {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
