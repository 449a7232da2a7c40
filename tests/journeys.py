"""The commands that README and docs print in blocks, run as printed: what a reader would type, page by page.

    python -m tests.journeys                           # what needs no network, no cluster and no hours; resumes
    python -m tests.journeys pages=export,report       # of these pages alone
    python -m tests.journeys long=true                 # benchmarks and the papers' tables, too
    python -m tests.journeys show=true                 # what ran and what did not, and why; runs nothing

All commands run in one folder (`storage=`), as a reader's would, first the searches that make what others read. What
came out is kept in `journeys.jsonl` there, beside a log of every command: page, command, exit code, seconds, last line.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from allocators.core import plugins, words
from allocators.core.errors import ToolkitError, unknown
from search import config
from tests import ROOT
from trainers.tasks import files as tasks

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
DEMO = "python -m search.run space=sieve"  # as `make demo` runs it
QUESTIONS = ROOT / "docs" / "tasks.md"  # its YAML block is the file that it names
SERVED = 15.0  # seconds until a server is ended as a reader ends it
OURS = {*tasks.EMBEDDED, "default"}


@dataclass(frozen=True)
class Settings:
    """What is run."""

    pages: tuple[str, ...] = words.key((), "pages to run, with commas between (none: all)")
    long: bool = words.key(False, "run what takes hours as well")
    show: bool = words.key(False, "run nothing: print what ran, and what did not")
    storage: str = words.key("build/journeys", "folder in which the commands run")
    limit: float = words.key(3600.0, "seconds that a command has", least=1)


@dataclass(frozen=True)
class Ran:
    """What became of a command."""

    page: str
    command: str
    code: int
    seconds: float
    said: str


@cache
def printed() -> list[tuple[str, str]]:
    """Page and command, in the order of the pages; a command that stands twice once."""
    pages = {DEMO: "README"}
    for page in PAGES:
        for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines() if language in ("", "bash", "sh") else ():
                command = re.sub(r"\s+", " ", re.split(r"\s#\s", line)[0]).strip()
                if re.match(r"(\w+=\S+ )*(python|ray|make) ", command):
                    pages.setdefault(command, page.stem)
    return [(page, command) for command, page in pages.items()]


def why_not(command: str, *, long: bool) -> str:
    """Why this command is not run here; empty where it is."""
    if command.startswith("make "):
        return "it sets up a fresh clone"
    if re.search(r"\bray |ray_address=|s3://", command):
        return "it needs a cluster"
    task = re.search(r"\btask='?\[?([\w,/.]+)", command)
    foreign = task is not None and any(name not in OURS and "/" not in name for name in task[1].split(","))
    if foreign or re.search(r"model=\w+/|task=sieve3|LORA_TASK_DATA", command):
        return "it needs files of a hub"
    if "smollm2" in command:
        return "it needs the extra smollm2"
    if re.search(r"studies/[ab]\b|mine\.parquet|config=study", command):
        return "it names files of the reader's"
    if is_long(command) and not long:
        return "it takes hours (long=true)"
    read = set(re.findall(r"studies/([\w-]+)", command))
    reasons = [why_not(maker, long=long) for _, maker in printed() if study_of(maker) in read]
    if read and not reasons:
        return "no printed command makes the study that it reads"
    return f"of the study that it reads, {reasons[0]}" if reasons and all(reasons) else ""


def is_long(command: str) -> bool:
    """A benchmark, or a table space with all of its rows."""
    space = re.search(r"space=(\w+)", command)
    table = space is not None and getattr(plugins.load("spaces", space[1], "space"), "TABLE", False)
    return "tests.benchmarks." in command or (table and "dry_run" not in command and "space.allocator" not in command)


@cache
def search_of(command: str) -> config.RunConfig | None:
    """What a command that makes a study asks for; None for other commands."""
    given = shlex.split(command.partition("-m search.run ")[2])
    with suppress(ToolkitError):
        return config.parse(given) if given and "dry_run=true" not in given else None
    return None


def study_of(command: str) -> str:
    """The name of the study that a search makes; empty for other commands."""
    asked = search_of(command)
    return asked.study_name if asked else ""


def in_order(long: bool) -> list[tuple[str, str]]:
    """What is run: first the searches that make the studies which other commands read."""
    all_of_them = [(page, command) for page, command in printed() if not why_not(command, long=long)]
    makers = {study_of(command): command for _, command in reversed(all_of_them)}
    first = {makers.get(name) for name in read_by_others()}
    return sorted(all_of_them, key=lambda each: each[1] not in first)


@cache
def read_by_others() -> set[str]:
    """Names of studies that commands read."""
    return {name for _, command in printed() for name in re.findall(r"studies/([\w-]+)", command)}


def a_file_of_the_readers(folder: Path) -> None:
    """The task that the page on tasks prints, and questions for it."""
    folder.mkdir(parents=True, exist_ok=True)
    page = QUESTIONS.read_text(encoding="utf-8").partition("## A file of your own")[2]
    (folder / "questions.yaml").write_text(next(text for kind, text in BLOCK.findall(page) if kind == "yaml"))
    pairs = [(a, b) for a in range(2, 26) for b in range(2, 26)]
    rows = [{"question": f"{a} + {b}", "choices": [f"{a + b}", f"{a * b + 1}"], "label": 0} for a, b in pairs]
    for name, some in (("train", rows[::2]), ("test", rows[1::2])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))


def run(page: str, command: str, storage: Path, *, limit: float) -> Ran:
    """Runs it where its files are."""
    a_file_of_the_readers(storage / "my")
    log_file = storage / f"{re.sub(r'[^a-zA-Z0-9_]+', '-', command.removeprefix('python -m '))[:150]}.log"
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "TERM": "dumb"}
    environment, quiet = os.environ | paths, subprocess.DEVNULL
    began = time.monotonic()
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"], cwd=storage, env=environment, stdin=quiet, stdout=log, stderr=log
        )
        try:
            code = process.wait(SERVED if "search.serve" in command else limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            code = process.wait()
    lines = log_file.read_text(errors="replace").strip().splitlines()
    return Ran(page, command, code, round(time.monotonic() - began, 1), lines[-1][:200] if lines else "")


def past(file: Path) -> dict[str, Ran]:
    """What ran before of what is printed today, by command; the last time counts."""
    lines, today = file.read_text().splitlines() if file.exists() else [], {command for _, command in printed()}
    return {ran.command: ran for ran in (Ran(**json.loads(line)) for line in lines) if ran.command in today}


def main(argv: list[str]) -> int:
    """Exit code 1 where a command of these pages failed."""
    if words.asks_for_help(argv):
        print((__doc__ or "").strip(), "", "keys:", *words.help_of(Settings), sep="\n")
        return 0
    settings = words.parse(argv, Settings)
    for name in settings.pages:
        if name not in (known := [page.stem for page in PAGES]):
            raise unknown("page", name, known)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it, and all it starts
    storage = Path(settings.storage).absolute()
    storage.mkdir(parents=True, exist_ok=True)
    file = storage / "journeys.jsonl"
    results = past(file)
    for page, command in () if settings.show else in_order(settings.long):
        asked = not settings.pages or page in settings.pages or study_of(command) in read_by_others()
        if asked and (command not in results or results[command].code):
            ran = results[command] = run(page, command, storage, limit=settings.limit)
            print(f"{ran.code:>4} {ran.seconds:>7.1f} s  {page:<13} {command}", flush=True)
            with file.open("a") as log:
                log.write(json.dumps(asdict(ran)) + "\n")
    for page, command in printed():
        one, reason = results.get(command), why_not(command, long=settings.long)
        if one is None or one.code:
            print(f"{page:<13} {command}\n{'':<14}{reason or (f'exit {one.code}: {one.said}' if one else 'not yet')}")
    ended = [ran for ran in results.values() if ran.code == 0]
    print(json.dumps({"claim": "journeys", "ran": len(results), "right": len(ended), "printed": len(printed())}))
    return int(len(ended) < len(results))


if __name__ == "__main__":
    words.run(main)
