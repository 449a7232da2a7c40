"""What a study of many results costs its driver: seconds and bytes at 100, 1,000 and 10,000 results.

    python -m tests.benchmarks.growth sizes=100,1000,10000
    python -m tests.benchmarks.growth sizes=100,1000 samplers=ehvi browser=none      without a browser

Nothing is trained. A study folder is made from the recorded trainings of a table (`search/replay/tables/`), multiplied:
every copy has a learning rate of its own, and an accuracy that is moved by its own standard error, so that points do
not tie. The folder is what a study writes line by line, without the waiting for the disk (fsync), and without adapters
and MLflow. Then each size is measured in a process of its own, in CPU seconds:

    result      what the driver does at the end of one training: record, front, repeats, adapters to drop, live view
                drawn once. Mean of `repeats` results
    SAMPLER     a proposal after so many results, told of each before the next. Mean of `repeats`
    read        reading outcomes.jsonl
    resume      what the same command does before its first proposal: records, front, and a sampler (the first of
                `samplers`) that has learnt everything
    report      `search.report`: four files and the words, in MB of memory at its peak, too
    served      `search.serve`: the page of a study that runs, made again after one more result; what a look costs that
                found the page in `search.serve` before. served MB: of that page
    page        report.html in Chromium until it is laid out: wall-clock seconds by the page's own clock, the least of
                three. Left out where there is no /usr/bin/chromium (`browser=`)
    lines, html MB of outcomes.jsonl and report.html

The last column is the growth exponent between the two largest sizes: 1 is linear, 0 constant.
The JSON line's `ratios` are those exponents.
"""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console

from allocators.core import words
from allocators.core.types import ModelShape, Outcome, Recipe, Signal
from search import replay, report
from search.points.starting import starting_points
from search.problem import Problem, load_space
from search.propose.sampler import Proposer
from search.records import LINES, read
from search.records.folder import StudyFolder
from search.report.live import Progress
from search.serve import Serving
from search.study import Conductor
from tests.benchmarks._shared import parse
from trainers.versions import versions


@dataclass(frozen=True)
class Settings:
    """The keys of the command line."""

    sizes: str = words.key("100,1000,10000", "numbers of results, ascending")
    samplers: str = words.key("ehvi,tpe,nsga2,random", "whose proposals are timed")
    repeats: int = words.key(20, "results and proposals that a mean is of")
    table: str = words.key("tiny-moe", "recorded trainings that are multiplied")
    browser: str = words.key("/usr/bin/chromium", "which draws the page (empty: none)")


class NoTracker:
    """In the place of MLflow's."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **named: None


def problem_of(table: replay.Table) -> Problem:
    """The space that the multiplied points are of: the recorded model and its signals, searched by `sieve`."""
    shape = ModelShape.from_json(table.about["shape"])
    first = next(iter(table.rows.values())).outcome.trial
    return Problem(
        space=load_space("sieve", shape),
        shape=shape,
        model=first.model,
        task=first.task,
        signals={kind: Signal.from_json(signal) for kind, signal in table.about["signals"].items()},
        task_recipe={"steps": first.recipe.steps, "schedule": first.recipe.schedule},
    )


def multiplied(table: replay.Table) -> Iterator[tuple[Outcome, dict[str, Any]]]:
    """Results without end, and the parameters of their points: the rows of the table again and again."""
    rows = [row for row in table.rows.values() if row.outcome.trial.seed == 0]
    draw, now = random.Random(0), versions()
    while True:
        for row in draw.sample(rows, len(rows)):
            outcome, params = _copy(row, draw)
            yield outcome.updated(versions=now), params


def _copy(row: replay.Row, draw: random.Random) -> tuple[Outcome, dict[str, Any]]:
    recipe: Recipe = row.outcome.trial.recipe
    rate, alpha = recipe.scaled_rate * math.exp(draw.gauss(0, 0.7)), float(draw.choice((32, 64, 128)))
    rate = min(max(rate, 5e-4), 0.5)
    settings = {"rank": recipe.rank, "lora_alpha": alpha, "scaled_rate": rate}
    trial = replace(row.outcome.trial, recipe=replace(recipe, lora_alpha=alpha, learning_rate=rate / alpha))
    error = row.outcome.rungs[-1].stderr or 0.0
    moved = draw.gauss(0, error) if row.outcome.accuracy is not None else 0.0
    rungs = tuple(replace(rung, accuracy=(rung.accuracy or 0.0) + moved) for rung in row.outcome.rungs)
    accuracy = None if row.outcome.accuracy is None else row.outcome.accuracy + moved
    outcome = row.outcome.updated(trial=trial, rungs=rungs, accuracy=accuracy, test=None)
    score = {"score": "count"} if row.params["allocator"] == "sieve" else {}  # the grid has no other
    return outcome, {**row.params, **score, **settings}


def build(folder: Path, table: replay.Table, results: int) -> None:
    """A study folder with so many results, and one training in flight."""
    with _opened(folder, table) as study, mock.patch("os.fsync"):
        for number, (outcome, params) in zip(range(results + 1), multiplied(table), strict=False):
            study.append_started(Outcome(outcome.trial, "started", outcome.trainable_params), params)
            if number < results:
                for rung in outcome.rungs:
                    study.append_rung(outcome.digest, rung)
                study.append_finished(outcome, params)


def _opened(folder: Path, table: replay.Table) -> StudyFolder:
    identity = table.about["identity"] | {"space": "sieve", "seed": 0}
    config = identity | {"trials": 20_000, "seeds": 1}
    return StudyFolder.open(folder, config=config, identity=identity, shape=problem_of(table).shape)


class Measurement:
    """CPU seconds of blocks, by name."""

    def __init__(self) -> None:
        self.numbers: dict[str, float] = {}

    def timed(self, name: str, act: Callable[[], Any]) -> Any:
        began = time.process_time()
        result = act()
        self.numbers[name] = time.process_time() - began
        return result


def measure(folder: Path, settings: Settings, results: int) -> dict[str, float]:
    """All costs at one size."""
    table, measurement = replay.load(settings.table), Measurement()
    build(folder, table, results)
    numbers = measurement.numbers
    numbers["lines MB"] = (folder / LINES).stat().st_size / 1e6
    _warm_up()
    measurement.timed("read", lambda: read(folder))
    for name in settings.samplers.split(","):
        numbers[name] = seconds_a_proposal(folder, table, name, settings.repeats)
    copy = folder.with_name(f"{folder.name}-goes-on")
    shutil.copytree(folder, copy)
    numbers |= seconds_a_result(copy, table, settings)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    written = measurement.timed("report", lambda: report.write(folder))
    report.show(written, console=Console(file=io.StringIO(), width=140))
    numbers["memory MB"] = max(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1e3
    numbers["html MB"] = (folder / "report.html").stat().st_size / 1e6
    numbers |= seconds_to_serve(folder, table)
    if settings.browser and Path(settings.browser).exists():
        numbers["page"] = seconds_to_draw(settings.browser, folder / "report.html")
    return numbers


def _warm_up() -> None:
    """Imports that a first call would pay for, and nothing of them grows."""
    with tempfile.TemporaryDirectory() as folder:
        table = replay.load("tiny-moe")
        build(Path(folder) / "small", table, 40)
        report.write(Path(folder) / "small")


def seconds_a_proposal(folder: Path, table: replay.Table, sampler: str, repeats: int) -> float:
    """CPU seconds of a proposal, each told of its result; those of the starting points are not counted."""
    records, problem = read(folder), problem_of(table)
    proposer = Proposer(problem, sampler=sampler)
    for digest, outcome in records.finished.items():
        proposer.recall(outcome.trial, records.params_of(digest))
        proposer.tell(outcome)
    results, seconds = multiplied(table), []
    skipped = len(starting_points(problem))
    for number in range(skipped + repeats):
        began = time.process_time()
        proposal = proposer.propose()
        if number >= skipped:
            seconds.append(time.process_time() - began)
        assert proposal is not None
        outcome, _ = next(results)
        proposer.tell(outcome.updated(trial=proposal.trial, trainable_params=proposal.trainable_params))
    return statistics.fmean(seconds)


def seconds_a_result(folder: Path, table: replay.Table, settings: Settings) -> dict[str, float]:
    """CPU seconds of the driver's own work at a result, and of a start that goes on with the study."""
    results, problem, seconds = multiplied(table), problem_of(table), []
    with mock.patch("os.fsync"):
        began = time.process_time()
        with _opened(folder, table) as records:
            progress = Progress(20_000, done=records.points, quiet=True, console=Console(file=io.StringIO()))
            conductor = Conductor(
                problem,
                records,
                NoTracker(),  # type: ignore[arg-type]
                progress,
                sampler=settings.samplers.split(",")[0],
                deadline=None,
                keep="front",
                trials=20_000,
            )
            numbers = {"resume": time.process_time() - began}
            for _ in range(settings.repeats):
                proposal = conductor.propose()
                assert proposal is not None
                assert proposal != "wait"
                outcome, _ = next(results)
                done = outcome.updated(trial=proposal.trial, trainable_params=proposal.trainable_params)
                began = time.process_time()
                for rung in done.rungs:
                    conductor.rung(done.digest, rung)
                conductor.finished(done)
                Console(file=io.StringIO(), width=140).print(progress.view())
                seconds.append(time.process_time() - began)
    return numbers | {"result": statistics.fmean(seconds)}


def seconds_to_serve(folder: Path, table: replay.Table) -> dict[str, float]:
    """CPU seconds of a page that was made before, after one more result, and its size."""
    serving = Serving([folder])
    with _opened(folder, table) as study:
        serving.page(0)
        outcome, params = next(multiplied(table))
        study.append_finished(outcome, params)
        began = time.process_time()
        page = serving.page(0)
        return {"served": time.process_time() - began, "served MB": len(page.encode()) / 1e6}


def seconds_to_draw(browser: str, page: Path) -> float:
    """Seconds by the browser's clock from the beginning of the page to its layout, the least of three."""
    said = "<script>document.body.getBoundingClientRect(); document.title = performance.now()</script></body>"
    timed = page.with_name("timed.html")
    timed.write_text(page.read_text(encoding="utf-8").replace("</body>", said), encoding="utf-8")
    seconds = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as profile:
            words_of_browser = [
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                f"--user-data-dir={profile}",
                "--dump-dom",
            ]
            command = [browser, *words_of_browser, timed.as_uri()]
            shown = subprocess.run(command, capture_output=True, check=True, timeout=600, text=True).stdout
        assert "All points" in shown
        title = re.search(r"<title>([\d.]+)</title>", shown)
        assert title is not None
        seconds.append(float(title[1]) / 1_000)
    return min(seconds)


def _in_a_process(folder: Path, settings: Settings, results: int) -> dict[str, float]:
    """Measured where no other size has left its memory."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (folder, settings, results))


def exponent(numbers: dict[int, float]) -> float | None:
    """d log cost / d log results between the two largest sizes; None where that is unknown."""
    *_, small, large = sorted(numbers) if len(numbers) > 1 else [0, 0]
    if not small or numbers[small] <= 0 or numbers[large] <= 0:
        return None
    return math.log(numbers[large] / numbers[small]) / math.log(large / small)


def show(by_size: dict[int, dict[str, float]]) -> dict[str, float | None]:
    """Prints the table; the exponents by name of the cost."""
    sizes = sorted(by_size)
    names = list(dict.fromkeys(name for numbers in by_size.values() for name in numbers))
    found = {name: exponent({n: by_size[n][name] for n in sizes if name in by_size[n]}) for name in names}
    print(f"{'':<12}" + "".join(f"{size:>12,}" for size in sizes) + f"{'exponent':>12}")
    for name in names:
        values = "".join(f"{by_size[size].get(name, math.nan):>12.4g}" for size in sizes)
        print(f"{name:<12}{values}" + (f"{found[name]:>12.2f}" if found[name] is not None else ""))
    return found


def main(argv: list[str] | None = None) -> None:
    """Prints the table and the JSON line."""
    import sys

    settings = parse(sys.argv[1:] if argv is None else argv, Settings)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    by_size: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in map(int, settings.sizes.split(",")):
            by_size[size] = _in_a_process(Path(folder) / str(size), settings, size)
            print(f"{size:,} results measured", flush=True)
    found = show(by_size)
    print(json.dumps({"benchmark": "growth", "costs": by_size, "ratios": found, "versions": versions()}))


if __name__ == "__main__":
    main()
