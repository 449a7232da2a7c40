"""What two workers of one node hold of the same model on a CPU: which part of the weights is shared memory.

    python -m tests.benchmarks.shared_weights [mebibytes=128]

transformers reads safetensors by mapping the file. A tensor that is used as it is stored stays a view of the mapping:
its pages are the page cache's, shared by every process of the node and given back when memory is short. A tensor that
is cast (dtype other than stored) or assembled (experts are stored one by one and stacked on loading) is a private copy.

Two processes load the model, run one forward pass, and then read /proc/self/smaps_rollup at the same time. `private` is
what one process holds alone, `PSS` counts shared pages by their share; both minus what the process held after it had
loaded and run a tiny model of the same kind, in units of the weights' size.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKERS = 2


def make(kind: str, mebibytes: int, folder: Path) -> None:
    """A random model in bfloat16 of about that size."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.trainers.conftest import char_tokenizer

    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8}
    if kind == "olmoe":
        sizes |= {"intermediate_size": 256, "num_experts": 32, "num_experts_per_tok": 2}
    else:
        sizes |= {"intermediate_size": 4096}
    per_layer = 2 * (4 * 512**2 + 3 * 512 * (256 * 32 if kind == "olmoe" else 4096))
    sizes["num_hidden_layers"] = max(1, round(mebibytes * 2**20 / per_layer))
    config = AutoConfig.for_model(kind, **sizes, pad_token_id=1, eos_token_id=2)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    char_tokenizer().save_pretrained(folder)
    os.sync()  # pages that are not on disk yet would count as written to


def memory() -> dict[str, int]:
    """Bytes: PSS, and what only this process holds."""
    lines = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    kibibytes = {key: int(value.split()[0]) for key, value in lines.items()}
    return {
        "pss": kibibytes["Pss"] * 1024,
        "private": (kibibytes["Private_Clean"] + kibibytes["Private_Dirty"]) * 1024,
    }


def worker(folder: str, dtype: str) -> None:
    """Loads, says so, waits until all have, measures."""
    import torch

    from trainers import models

    torch.set_num_threads(1)

    def load(name: str) -> Any:
        loaded = models.load(name, dtype=dtype)
        with torch.no_grad():
            loaded.model(torch.zeros(1, 8, dtype=torch.long))
        return loaded

    load(f"{folder}/tiny")
    before = memory()
    loaded = load(folder)
    gc.collect()
    print("ready", flush=True)
    sys.stdin.readline()
    after = memory()
    print(json.dumps({key: after[key] - before[key] for key in after} | {"weights": loaded.weight_bytes}), flush=True)
    sys.stdin.readline()  # stay until the other has measured


def measure(folder: Path, dtype: str) -> list[dict[str, int]]:
    command = [sys.executable, "-m", "tests.benchmarks.shared_weights", "worker", str(folder), dtype]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(WORKERS)]
    for process in processes:
        while process.stdout.readline().strip() != "ready":  # type: ignore[union-attr]
            if process.poll() is not None:
                raise RuntimeError("a worker ended")
    for process in processes:
        process.stdin.write("\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    found = [json.loads(process.stdout.readline()) for process in processes]  # type: ignore[union-attr]
    for process in processes:
        process.communicate("\n")
    return found


@dataclass(frozen=True)
class Settings:
    mebibytes: int = 128


def main(argv: list[str]) -> int:
    if argv[:1] == ["worker"]:
        worker(*argv[1:])
        return 0
    from tests.benchmarks._shared import parse

    mebibytes = parse(argv, Settings).mebibytes
    print(f"{WORKERS} processes with one model each; stored in bfloat16\n")
    print(f"{'model':8} {'loaded as':10} {'weights':>9}   {'private':>8} {'PSS':>6}   (× weights, of one process)")
    rows = []
    for kind in ("llama", "olmoe"):
        with tempfile.TemporaryDirectory() as folder:
            make(kind, mebibytes, Path(folder))
            make(kind, 0, Path(folder, "tiny"))
            for dtype in ("bfloat16", "float32"):
                found = measure(Path(folder), dtype)
                weights = found[0]["weights"]
                private, pss = (max(f[key] for f in found) / weights for key in ("private", "pss"))
                print(f"{kind:8} {dtype:10} {weights / 2**20:5.0f} MiB   {private:8.2f} {pss:6.2f}")
                rows.append({"model": kind, "dtype": dtype, "weights": weights, "private": private, "pss": pss})
    from trainers.versions import versions

    print(json.dumps({"benchmark": "shared_weights", "rows": rows, "versions": versions(device="cpu")}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
