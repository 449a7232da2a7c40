"""What the toolkit costs on a GPU, in one call of at most eight minutes: layers, whole steps, a study, signals, trials.

    python -m tests.benchmarks.gpu                          all parts at the sizes of OLMoE-1B-7B and Llama-7B
    python -m tests.benchmarks.gpu parts=moe_steps,study budget=200 results=/tmp/gpu.jsonl
    python -m tests.benchmarks.gpu write=true               and into tests/benchmarks/RESULTS.md
    python -m tests.benchmarks.gpu device=cpu size=small limit=600 budget=3600
                                                            the same code on a CPU, at sizes that tell nothing about a
                                                            GPU: to know that it works

The parts, what they measure and what their numbers mean: tests/benchmarks/gpu_parts.py. Each runs in a process of its
own that has so many seconds (`LIMITS`), so what fails, hangs or runs out of memory there costs its own rows alone: rows
that were measured before stay, and the reason is printed. `results` takes every row as it comes, a JSON object a line,
and RESULTS.md is written anew after every part. Once `budget` seconds are gone nothing runs any more.

Last comes one JSON line with the numbers of all parts, and for those that ended early the reason (`failed`) or that
they did not run (`not_run`). The exit status is 1 where a part failed.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from allocators.core import words
from allocators.core.errors import StudyError, ToolkitError, unknown
from tests.benchmarks.gpu_parts import NEEDS_GPU, PARTS, SIZES

RESULTS = Path(__file__).with_name("RESULTS.md")
ROOT = Path(__file__).parents[2]
# Seconds that a part may take; together more than the budget, because none of them should need so many.
LIMITS = {"study": 120.0, "whole_moe": 90.0, "whole_dense": 90.0}
LIMIT = 75.0  # of all others


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
        known["capability"] = "{}.{}".format(*torch.cuda.get_device_capability(device))
        known["cuda"] = torch.version.cuda
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):  # a container may lack it
            answer = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True)
            known["driver"] = answer.stdout.split()[0]
    return known | {"versions": versions()}


@dataclass
class Found:
    """Numbers by part, why parts ended early, and why others did not run."""

    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return vars(self)


def run_part(command: Sequence[str], *, seconds: float) -> str:
    """Runs a part and prints what it prints; why it failed, "" where it did not. It ends with all that it started."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=complaints, start_new_session=True
        )

        def show() -> None:
            for line in process.stdout or ():
                print(line, end="", flush=True)

        reader = threading.Thread(target=show, daemon=True)
        reader.start()
        try:
            status: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        reader.join(timeout=5)  # a process that left the group may hold its end of the pipe
        complaints.seek(0)
        said = [line.strip() for line in complaints if line.strip()]
    if status is None:
        return f"cut after {seconds:.0f} s"
    return "" if status == 0 else f"exit {status}: {said[-1] if said else 'without a word'}"


def rows_in(file: Path) -> dict[str, dict[str, Any]]:
    """Rows by part, of all that was written; a line that was cut in the middle counts for nothing."""
    parts: dict[str, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            parts.setdefault(row["part"], {}).update(row["found"])
    return parts


@dataclass(frozen=True)
class Settings:
    device: str = "cuda"
    size: str = words.key("large", "of the models", choices=tuple(SIZES))
    dtype: str = words.key("", "of the models (empty: bfloat16, on a CPU float32)")
    parts: tuple[str, ...] = words.key(tuple(PARTS), "what is measured, in this order")
    budget: float = words.key(470.0, "seconds that all parts together may take", least=0)
    limit: float = words.key(0.0, "seconds that a part may take (0: what is right for it on a GPU)", least=0)
    results: str = words.key("", "file that takes every row as it comes (empty: none that stays)")
    write: bool = words.key(False, "put the tables into RESULTS.md")

    @property
    def numbers(self) -> str:
        """The dtype, where none was asked for that of the device."""
        return self.dtype or ("float32" if self.device == "cpu" else "bfloat16")


def measure(settings: Settings, rows: Path, *, after: Callable[[Found], None]) -> Found:
    """All parts, one after another; `after` is called with what there is when one has ended."""
    began, found = time.monotonic(), Found()
    for name in settings.parts:
        gone = time.monotonic() - began
        if name in NEEDS_GPU and settings.device == "cpu":
            found.not_run[name] = "needs a GPU"
            continue
        if gone >= settings.budget:
            found.not_run[name] = f"the budget of {settings.budget:.0f} s was gone"
            continue
        print(f"\n--- {name}, after {gone:.0f} s")
        asked = {"part": name, "device": settings.device, "size": settings.size, "dtype": settings.numbers}
        command = [sys.executable, "-m", "tests.benchmarks.gpu_parts", *(f"{k}={v}" for k, v in asked.items())]
        limit = settings.limit or LIMITS.get(name, LIMIT)
        reason = run_part([*command, f"results={rows}"], seconds=min(limit, settings.budget - gone))
        found.parts = rows_in(rows)
        broken = [row for row, of in found.parts.get(name, {}).items() if isinstance(of, dict) and "failed" in of]
        if reason or broken:
            found.failed[name] = reason or f"rows without a number: {', '.join(broken)}"
            print(f"{name} failed: {found.failed[name]}")
        after(found)
    print(f"\n{len(found.parts)} parts in {time.monotonic() - began:.0f} s")
    for name, reason in found.not_run.items():
        print(f"not run: {name} ({reason})")
    return found


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
    text = "\n## ".join([head, *(section.rstrip() + "\n" for section in kept), new])
    beside = RESULTS.with_suffix(".new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(RESULTS)


def parse(argv: Sequence[str]) -> Settings:
    settings = words.parse(argv, Settings)
    for part in settings.parts:
        if part not in PARTS:
            raise unknown("part", part, PARTS)
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise StudyError("there is no GPU here: device=cpu size=small shows that the benchmark works")
    return settings


def report(settings: Settings, argv: Sequence[str], rows: Path) -> Found:
    """Measures, and writes what there is after every part; prints the line with all numbers."""
    known, tee = facts(settings.device), Tee(sys.stdout)

    def line(found: Found) -> str:
        return json.dumps(
            {"benchmark": "gpu", "size": settings.size, "dtype": settings.numbers, **known, **found.to_json()}
        )

    def into_results(found: Found) -> None:
        if not settings.write:
            return
        remark = ""
        if settings.device == "cpu":
            remark = "**A CPU at small sizes: shows that the benchmark runs, and nothing about a GPU.**\n\n"
        command = " ".join(["python -m tests.benchmarks.gpu", *argv])
        write(f"{known['device']}, {settings.size}", remark, command, tee.getvalue(), line(found))

    with contextlib.redirect_stdout(tee):
        print(", ".join(f"{key} {value}" for key, value in known.items() if key != "versions"))
        print(", ".join(f"{key} {value}" for key, value in known["versions"].items() if value))
        found = measure(settings, rows, after=into_results)
    into_results(found)
    print(line(found))
    return found


def main(argv: Sequence[str]) -> int:
    if words.asks_for_help(argv):
        print("\n".join(["keys (default):", *words.help_of(Settings)]))
        return 0
    try:
        settings = parse(argv)
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(settings.results or Path(folder) / "rows.jsonl").absolute()
        rows.write_text("")
        found = report(settings, argv, rows)
    return 1 if found.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
