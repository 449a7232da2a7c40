"""Does a change leave results as they were? The same commands in this checkout and in another one, compared.

    git worktree add /tmp/before HEAD~1
    python -m tests.benchmarks.same_results base=/tmp/before                     everything, some ten minutes
    python -m tests.benchmarks.same_results base=/tmp/before what=packed         losses and tensors only, a minute

packed     losses and tensors of nine trainings, alone and three in a pass, bit for bit (fingerprints.py)
trained    a study of an MoE and one of a dense model, trial after trial: outcomes, and adapters byte for byte
replays    both shipped tables by every sampler, with and without halving: every outcome in its order
report     what `search.report` prints of the base's studies

Outcomes are compared without times and versions. A study that the base trained is then resumed by this checkout with
one trial more: its recorded lines must stay, and one training must come. Exit code 1 where anything differs.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allocators.core import words
from tests import ROOT
from tests.benchmarks._shared import parse

PARTS = ("packed", "trained", "replays", "report")
SAMPLERS, SCHEDULERS, TABLES = (
    ("ehvi", "tpe", "nsga2", "random"),
    ("none", "pareto_halving"),
    ("tiny-moe", "tiny-dense"),
)
TRAINED = {
    "moe": ("space=sieve", "recipe.steps=30"),
    "dense": ("space=dense", "model=tiny-dense", "recipe.steps=20"),
}
TRIALS = 4
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "150"}


@dataclass(frozen=True)
class Settings:
    base: str = words.key("", "folder of the checkout to compare with")
    what: tuple[str, ...] = words.key(PARTS, "parts, of packed, trained, replays and report")


def python(checkout: Path, *arguments: str) -> str:
    """What Python prints in a checkout. Raises CalledProcessError where it fails."""
    environment = os.environ | ENVIRONMENT
    run = [sys.executable, *arguments]
    return subprocess.run(run, cwd=checkout, env=environment, check=True, capture_output=True, text=True).stdout


def outcomes(folder: Path) -> list[dict[str, Any]]:
    """Finished trainings and answered points in their order, without times, versions and places."""
    events = [json.loads(line) for line in (folder / "outcomes.jsonl").read_text().splitlines()]
    return [_timeless(event) for event in events if event["event"] in ("finished", "answered")]


def _timeless(value: Any) -> Any:
    left_out = ("time", "seconds", "versions", "adapter", "peak_memory_bytes", "by_task")
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in left_out}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def adapters(folder: Path) -> dict[str, str]:
    """Digest of every adapter's weights, by training."""
    files = (folder / "adapters").glob("*/adapter.safetensors")
    return {file.parent.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def study(checkout: Path, storage: Path, name: str, *arguments: str) -> Path:
    python(checkout, "-m", "search.run", *arguments, f"storage={storage}", f"name={name}")
    return storage / name


def packed(base: Path, folder: Path) -> Iterator[tuple[str, bool]]:
    script = str(ROOT / "tests" / "benchmarks" / "fingerprints.py")
    before, after = (python(checkout, script).splitlines() for checkout in (base, ROOT))
    yield from ((line.partition(" = ")[0], line in after) for line in before)


def trained(base: Path, folder: Path) -> Iterator[tuple[str, bool]]:
    for name, arguments in TRAINED.items():
        common = (*arguments, f"trials={TRIALS}", "seed=3", "keep=all", "max_concurrent=1", "num_cpus=1")
        before, after = (study(c, folder / side, name, *common) for c, side in ((base, "base"), (ROOT, "here")))
        yield f"{name}: {len(outcomes(before))} outcomes", outcomes(before) == outcomes(after)
        yield f"{name}: {len(adapters(before))} adapters", adapters(before) == adapters(after)
        resumed = shutil.copytree(before, folder / "resumed" / name)
        recorded = (resumed / "outcomes.jsonl").read_bytes()
        study(ROOT, folder / "resumed", name, *(word.replace(f"={TRIALS}", f"={TRIALS + 1}") for word in common))
        more = (resumed / "outcomes.jsonl").read_bytes()
        new = [json.loads(line) for line in more[len(recorded) :].splitlines()]
        yield f"{name}: lines of the base stay when it is resumed", more.startswith(recorded)
        yield f"{name}: one training more", sum(event["event"] == "finished" for event in new) == 1


def replays(base: Path, folder: Path) -> Iterator[tuple[str, bool]]:
    for table, sampler, scheduler in itertools.product(TABLES, SAMPLERS, SCHEDULERS):
        name = f"{table}-{sampler}-{scheduler}"
        common = (f"replay={table}", f"sampler={sampler}", f"scheduler={scheduler}", "trials=24", "seeds=2")
        before, after = (study(c, folder / side, name, *common) for c, side in ((base, "base"), (ROOT, "here")))
        yield f"{name}: {len(outcomes(before))} outcomes in their order", outcomes(before) == outcomes(after)


def report(base: Path, folder: Path) -> Iterator[tuple[str, bool]]:
    for one in sorted((folder / "base").glob("*/study.json")):
        before, after = (python(checkout, "-m", "search.report", str(one.parent)) for checkout in (base, ROOT))
        yield f"{one.parent.name}: {len(before.splitlines())} lines of the report", before == after


def main(arguments: list[str]) -> int:
    settings = parse(arguments, Settings)
    base = Path(settings.base).absolute()
    if not (base / "search" / "run.py").is_file():
        sys.exit(f"error: base={settings.base} is no checkout of this project: make one with 'git worktree add'")
    if strangers := [part for part in settings.what if part not in PARTS]:
        sys.exit(f"error: unknown part '{strangers[0]}': choose from {', '.join(PARTS)}")
    parts = {"packed": packed, "trained": trained, "replays": replays, "report": report}
    results: dict[str, list[bool]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            for name, same in parts[part](base, Path(folder)) if part in settings.what else ():
                results.setdefault(part, []).append(same)
                print(f"{'same' if same else 'DIFFERENT':<10} {part:<8} {name}", flush=True)
    ratios = {part: sum(same) / len(same) for part, same in results.items()}
    print(json.dumps({"benchmark": "same_results", "device": "cpu", "ratios": ratios}))
    return 0 if all(itertools.chain(*results.values())) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
