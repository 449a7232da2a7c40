"""The GPU benchmark's frame, without a GPU: what fails, hangs or is cut costs its own rows, and all others stay."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from allocators.core.types import ExpertSelection
from tests.benchmarks import gpu, gpu_parts


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_part_that_ends_fails_or_hangs(capfd: pytest.CaptureFixture[str]) -> None:
    assert gpu.run_part(python("print('a row')"), seconds=60) == ""
    failing = "import sys; print('another row'); print('CUDA error: device lost', file=sys.stderr); sys.exit(3)"
    assert gpu.run_part(python(failing), seconds=60) == "exit 3: CUDA error: device lost"
    assert gpu.run_part(python("import os; os.abort()"), seconds=60) == "exit -6: without a word"
    assert gpu.run_part(["sh", "-c", "echo before; sleep 600; echo after"], seconds=4) == "cut after 4 s"
    assert capfd.readouterr().out.split("\n") == ["a row", "another row", "before", ""]


def test_rows_stay_where_the_last_one_was_cut(tmp_path: Path) -> None:
    bench = gpu_parts.Bench("whole_moe", "cpu", "float32", gpu_parts.SIZES["small"], str(tmp_path / "rows"))
    bench.note(first={"step_seconds": 1.5})
    bench.note(second={"failed": "OutOfMemoryError: 140 GiB"})
    replace(bench, part="spectrum").note(ratios={"total": 4.0})
    with open(bench.results, "a") as file:
        file.write('{"part": "spectrum", "fou')
    assert gpu.rows_in(Path(bench.results)) == {
        "whole_moe": {"first": {"step_seconds": 1.5}, "second": {"failed": "OutOfMemoryError: 140 GiB"}},
        "spectrum": {"ratios": {"total": 4.0}},
    }


def test_a_variant_that_fails_costs_its_own_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    size = replace(gpu_parts.SIZES["small"], steps=1, rows=1)
    bench = gpu_parts.Bench("moe_steps", "cpu", "bfloat16", size, str(tmp_path / "rows"))
    model, shape, hot = gpu_parts.moe(bench, 1)

    @contextmanager
    def greedy() -> Any:
        with gpu_parts.ours(model, hot, shape) as (_, adapter):
            adapter.extra_loss = lambda real_BS: torch.empty(10**15).sum()
            yield model, adapter

    variants = {"greedy": greedy, "hot quarter": lambda: gpu_parts.ours(model, ExpertSelection({}), shape)}
    gpu_parts.timed(bench, "one layer", variants)
    rows = gpu.rows_in(Path(bench.results))["moe_steps"]
    assert rows["greedy"]["failed"].startswith("OutOfMemoryError: out of memory on cpu")
    assert rows["hot quarter"]["tokens_per_second"] > 0
    assert "greedy              failed: OutOfMemoryError" in capsys.readouterr().out


def as_if_run(command: list[str]) -> str:
    """What a process leaves of its part: one works, one is cut, of one a row fails."""
    part = command[3].removeprefix("part=")
    print(f"table of {part}")
    if part == "spectrum":
        return "cut after 75 s"
    found = {"ratios": {"total": 4.0}} if part == "lora_moe" else {"PEFT all": {"failed": "no kernel"}}
    with open(command[-1].removeprefix("results="), "a") as file:
        file.write(json.dumps({"part": part, "found": found}) + "\n")
    return ""


def test_results_are_written_after_every_part(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "RESULTS.md"
    results.write_text(f"{gpu.HEAD}\n## another GPU, large\n\nkept\n")
    monkeypatch.setattr(gpu, "RESULTS", results)
    seen: list[str] = []

    def run_part(command: list[str], *, seconds: float) -> str:
        seen.append(results.read_text())
        return as_if_run(command)

    monkeypatch.setattr(gpu, "run_part", run_part)
    asked = "device=cpu size=small write=true parts=lora_moe,memory,spectrum,moe_steps"
    assert gpu.main(asked.split()) == 1
    said = json.loads(capsys.readouterr().out.rstrip().splitlines()[-1])
    assert said["parts"] == {"lora_moe": {"ratios": {"total": 4.0}}, "moe_steps": {"PEFT all": {"failed": "no kernel"}}}
    assert said["failed"] == {"spectrum": "cut after 75 s", "moe_steps": "rows without a number: PEFT all"}
    assert said["not_run"] == {"memory": "needs a GPU"}
    assert "table of lora_moe" in seen[1]
    text = results.read_text()
    assert text.count("\n## ") == 2
    assert "kept" in text
    assert "table of moe_steps" in text
    assert f"`python -m tests.benchmarks.gpu {asked}`" in text


def test_no_part_begins_when_the_time_is_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limits: list[float] = []

    def run_part(command: list[str], *, seconds: float) -> str:
        limits.append(seconds)
        return ""

    monkeypatch.setattr(gpu, "run_part", run_part)
    (tmp_path / "rows").touch()
    settings = gpu.Settings(device="cpu", parts=("study", "spectrum"))
    gpu.measure(settings, tmp_path / "rows", after=lambda found: None)
    assert limits[0] == gpu.LIMITS["study"]
    assert limits[1] == gpu.LIMIT
    assert sum(gpu.LIMITS.values()) < settings.budget < 480
    found = gpu.measure(replace(settings, budget=0.0), tmp_path / "rows", after=lambda found: None)
    assert list(found.not_run) == ["study", "spectrum"]


@pytest.mark.slow
def test_the_command_runs_on_a_cpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    words = f"device=cpu size=small limit=900 budget=3600 parts=moe_steps,spectrum,study results={rows}"
    assert gpu.main(words.split()) == 0
    said = json.loads(capfd.readouterr().out.rstrip().splitlines()[-1])
    assert list(said["parts"]) == ["moe_steps", "spectrum", "study"]
    assert said["parts"]["study"]["study"]["complete"] > 0
    assert gpu.rows_in(rows) == said["parts"]
