"""What 95 % of a front costs: Ray Tune as its guide has it against this toolkit, split into factors.

    python -m tests.benchmarks.end_to_end                                    costs and replayed searches
    python -m tests.benchmarks.end_to_end table=mine.parquet seeds=20 repeats=3
    python -m tests.benchmarks.end_to_end costs=false                        replayed searches alone: nothing is trained
    python -m tests.benchmarks.end_to_end real=true seed=0 cap=100           and both ways once, trained
    python -m tests.benchmarks.end_to_end seeds=1 costs=false real=true      hardly more than that; resumes

The target is 95 % of the hypervolume of everything in a recorded table of a full grid (replay/tables/): accuracy up,
log trainable parameters down, both scaled by the table as in search_tables.py. Replayed, both ways search the table's
grid, whose coordinates are a gift to the plain way; for real each has its own. Model, task, number of steps and batch
are the table's, on two CPUs, two trainings at once.

The plain way is what one writes today: Ray Tune with OptunaSearch (NSGA-II, two objectives, a define-by-run space);
every trial is a Tune function that runs one TorchTrainer, which loads model and task, trains PEFT adapters and
evaluates by lm-eval. PEFT adapts all experts of a layer, so the gradient of the B of those that were not chosen is
masked; layers without a chosen one stay as they are. Its gate and up share an A: fewer parameters than ours, which its
objective does not see (both ways count what the allocation says). In its favour: its training loop, data order and
number of steps are ours; lm-eval's records of the environment (seconds of git and pip a trial) are left out; the
routing signal and the table's four shares of experts are gifts; NSGA-II has a population of 10, as `sampler=nsga2`
has, with 50, Optuna's own, beside it.

Cost of a training, the same points in all ways, which take turns, medians over `repeats` after one that warms up:
    plain        one Tune trial from the last one's end to its own
    peft         a warm worker: PEFT, lm-eval's evaluation
    lm-eval      a warm worker: our adapter, lm-eval's evaluation
    ours         a warm worker: our adapter, our evaluation
    curve        the same with three evaluations on the way, as a study has them by default
    packed       `pack` of these in one pass over the base, one's share
To those of a warm worker comes what Tune and the job queue cost (trial_overhead.py, measured in the same run).
Wall clock is that of a training alone on the machine; CPU-seconds are those of all its processes. Two trainings at once
keep both CPUs busy, so a study's wall clock goes by CPU-seconds; they also depend less on what else the machine does.

Trainings to the target: searches of the table by search_tables.py with two asynchronous workers, paired seeds. A search
takes one of the table's seeds and is judged by it, by the mean over all seeds with `mean=true`: then a point that one
seed was lucky with is no find. `+repeats` trains a repeated point again; trainings that halving stops count their
share. A search that does not get there in `evaluations` counts as having needed so many.

For real: the plain way searches as people do, rank 4, 8, 16 or 32, lora_alpha twice the rank, learning rate 5e-4 to
2e-2; ours is the command `python -m search.run space=sieve` with its defaults, from the start of its process. A way
trains `cap` or `ours` times. When both have ended, each training's adapter is evaluated on the test split, which no
search has seen, at no cost to its way; what the trainings so far cover of the hypervolume of the table's test front
(mean over the table's seeds) is compared. A training has one seed: more trainings are more luck, which favours the
plain way. Points smaller than all of the table, and more accurate ones, count as those at its edge. Compared is the
cost of three shares: 95 % of the front (which rows at rank 4 and above, alone, do not have); 95 % of what those rows
have; and what the plain way had in the end. A way that did not get there has spent its whole run: a lower bound.

The table's factors are medians (quartiles; of costs: smallest..largest) of paired ratios, the last lines products.
JSON `ratios`, how many times less (null: not in this run):
    warm_workers, adapters, evaluation, packing          cost of a training, as {"wall", "cpu"}
    sampler, dedupe, halving, trainings                  trainings to 95 %, the same as tokens; all but halving at once
    defaults, all                                        products as {"wall", "cpu"}: without packing and halving, which
                                                         are off unless asked for, and with them (halving then pays for
                                                         its evaluations on the way, as `curve` has them)
    front_*, real_*, same_*                              for real, to those three shares: `wall`, `cpu`, `trainings`,
                                                         `is_lower_bound` (null: our way did not get there)
    plain_share, ours_share                              what each way had in the end
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

os.environ |= {"RAY_AUTH_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
os.environ |= {"HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}

from allocators.core import words
from allocators.core.errors import StudyError, ToolkitError
from allocators.core.messages import TrainJob
from allocators.core.types import ExpertSelection, ModelShape, Outcome, Point, Trial
from search import replay
from tests.benchmarks import optimism, search_tables
from tests.benchmarks.trial_overhead import CpuWatch, make_trials, warm
from trainers.worker_state import WorkerSetup

if TYPE_CHECKING:
    from search.replay.problem import TableProblem

FOLDER = search_tables.BUILD / "end_to_end"
PLAIN, DEDUPED, OURS, HALVED = "nsga2+repeats", "nsga2", "ehvi", "ehvi+halving"
SEARCHES = (PLAIN, DEDUPED, OURS, HALVED, "nsga2-50+repeats", "random+repeats", "random")
COSTS = ("warm_workers", "adapters", "evaluation")  # factors of a training's cost, as studies have them by default
WARM = ("peft", "lm-eval", "ours", "curve", "packed")
WORKERS = 2
POPULATION = 10
RANKS = (4, 8, 16, 32)  # of the plain way for real; lora_alpha is twice the rank
RATES = (5e-4, 2e-2)  # its learning rates


@dataclass(frozen=True)
class Settings:
    table: str = "tiny-moe"
    seeds: int = 20
    mean: bool = False
    evaluations: int = 400
    costs: bool = True
    repeats: int = 3
    pack: int = 2
    real: bool = False
    seed: int = 0
    cap: int = 100
    ours: int = 32


@dataclass(frozen=True)
class Cost:
    """Seconds of one training: wall clock, and CPU of all processes."""

    wall: float
    cpu: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.wall + other.wall, self.cpu + other.cpu)

    def __truediv__(self, share: float) -> Cost:
        return Cost(self.wall / share, self.cpu / share)


Spread = tuple[float, float, float]  # median, low, high


# --- factors


def ratios(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """How many times less, pair by pair."""
    return [a / b for a, b in zip(slow, fast, strict=True)]


def spread(values: Sequence[float], *, quartiles: bool) -> Spread:
    """Median, and quartiles or ends."""
    low, high = min(values), max(values)
    if quartiles and len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return statistics.median(values), low, high


def cost_factors(costs: Mapping[str, Sequence[Cost]], unit: str) -> dict[str, Spread]:
    """What each change of a training alone is worth, in wall clock or CPU-seconds (`unit`)."""
    steps = {
        "warm_workers": ("plain", "peft"),
        "adapters": ("peft", "lm-eval"),
        "evaluation": ("lm-eval", "ours"),
        "packing": ("ours", "packed"),
    }
    seconds = {way: [getattr(cost, unit) for cost in found] for way, found in costs.items()}
    return {name: spread(ratios(seconds[a], seconds[b]), quartiles=False) for name, (a, b) in steps.items()}


def search_factors(trainings: Mapping[str, Sequence[float]]) -> dict[str, Spread]:
    """What each change of the search is worth, in trainings to the target; searches of a seed are a pair."""
    steps = {"sampler": (DEDUPED, OURS), "dedupe": (PLAIN, DEDUPED), "halving": (OURS, HALVED)}
    return {name: spread(ratios(trainings[a], trainings[b]), quartiles=True) for name, (a, b) in steps.items()}


def product(factors: Mapping[str, Spread], *, without: Sequence[str] = ()) -> float:
    return math.prod(median for name, (median, _, _) in factors.items() if name not in without)


def scaled(value: Spread, by: float) -> Spread:
    median, low, high = value
    return median * by, low * by, high * by


# --- trainings to the target, replayed


def searches(settings: Settings) -> dict[str, list[float]]:
    """Full trainings until 95 % of the table's hypervolume, of every kind of search, seed by seed."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found: dict[str, list[float]] = {variant: [] for variant in SEARCHES}
    for seed, variant in itertools.product(range(settings.seeds), SEARCHES):
        table = search_tables.own(settings.table, seed, mean=settings.mean)
        options: dict[str, Any] = {"evaluations": settings.evaluations, "workers": WORKERS}
        cell = search_tables.cell(table, variant, seed, until=search_tables.ENOUGH, **options)
        assert cell is not None
        reached = search_tables.measured(table, cell, settings.evaluations)["to95"]
        found[variant].append(settings.evaluations if reached is None else reached)
    return found


def tokens_of_training(name: str) -> float:
    table = search_tables.own(name, 0, mean=False)
    return statistics.median(table.tokens(key) for key in table.judged)


# --- the plain way


class PeftAdapter:
    """PEFT's LoRA on a model, as `trainers/loop/` asks for an adapter.

    masked   stacks of experts that are adapted: the chosen ones, and how many there are
    """

    def __init__(self, wrapped: Any, masked: Mapping[str, tuple[tuple[int, ...], int]]) -> None:
        self.wrapped = wrapped
        self._named = [(name, p) for name, p in wrapped.named_parameters() if p.requires_grad]
        self._idle = 0
        from tests.trainers.reference import peft_factors

        for stack, (a, b) in peft_factors(wrapped).items():
            if stack in masked:
                self._mask(a, b, *masked[stack])

    def _mask(self, a: Any, b: Any, ids: tuple[int, ...], num_experts: int) -> None:
        """Keeps the experts that were not chosen where they start: B = 0, under which A gets no gradient either."""
        import torch

        kept = torch.zeros(num_experts).index_fill(0, torch.tensor(ids), 1.0).repeat(b.size(1) // num_experts)
        b.register_hook(lambda gradient: gradient * kept)  # B's columns are rank-major: expert by expert, rank times
        self._idle += (a.numel() + b.numel()) * (num_experts - len(ids)) // num_experts

    @property
    def num_trained(self) -> int:
        """Parameters that can leave their start."""
        in_adapter: int = sum(p.numel() for _, p in self._named)
        return in_adapter - self._idle

    def parameters(self) -> list[Any]:
        return [p for _, p in self._named]

    def named_parameters(self) -> list[tuple[str, Any]]:
        return self._named

    def extra_loss(self, real_BS: Any) -> None:
        return None

    def check_gradients(self) -> None:
        pass


@contextmanager
def peft_adapter(model: Any, shape: ModelShape, trial: Trial) -> Iterator[PeftAdapter]:
    """PEFT's LoRA where the trial's allocation says, on experts by `target_parameters`."""
    import torch
    from peft import LoraConfig, get_peft_model

    assert isinstance(trial.allocation, ExpertSelection)
    masked: dict[str, tuple[tuple[int, ...], int]] = {}
    for module in shape.of_role("expert"):
        if ids := trial.allocation.in_layer(module.layer):
            experts = module.path.rpartition(".")[0]
            masked |= {f"{experts}.{stack}": (ids, module.num_experts) for stack in ("gate_up_proj", "down_proj")}
    config = LoraConfig(
        r=trial.recipe.rank,
        lora_alpha=trial.recipe.lora_alpha,  # type: ignore[arg-type]  # PEFT only divides it by the rank
        target_modules=[module.path for module in shape.of_role("attention")],
        target_parameters=[f"{module.path}.weight" for module in shape.of_role("router", "shared_expert")] + [*masked],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trial.seed)
        wrapped = get_peft_model(model, config)
    try:
        yield PeftAdapter(wrapped, masked)
    finally:
        wrapped.unload()
        model.requires_grad_(False)


class ByLmEval:
    """A task whose evaluation is `lm_eval.evaluate` around the model, from prompts to metrics."""

    def __init__(self, task: Any) -> None:
        self._task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def prepare(self, tokenizer: Any, **_: Any) -> None:
        self._tokenizer = tokenizer

    def evaluate(self, model: Any) -> Any:
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        from trainers.tasks import Evaluation

        began, task = time.perf_counter(), self._task
        model.eval()
        lm = HFLM(pretrained=model, tokenizer=self._tokenizer, backend="causal", batch_size=task.batch_size)
        asked = {"tasks": {task.name: task._task}, "groups": {}}
        found = evaluate(lm=lm, task_dict=asked, limit=task.limit, bootstrap_iters=0, log_samples=False)
        accuracy = found["results"][task.name][f"{task._metric},{task._filter}"]
        model.train()
        return Evaluation(accuracy, 0.0, (), task.metric, time.perf_counter() - began)


def train_with_peft(base: Any, shape: ModelShape, task: Any, trial: Trial, folder: str) -> tuple[float | None, int]:
    """Accuracy and trained tokens; the adapter is saved."""
    from trainers import loop

    with peft_adapter(base.model, shape, trial) as adapter:
        result = loop.train(
            base.model,
            adapter,  # type: ignore[arg-type]  # nothing is loaded from a checkpoint
            ByLmEval(task),  # type: ignore[arg-type]
            trial.recipe,
            seed=trial.seed,
            tokenizer=base.tokenizer,
            evaluations=1,
            device="cpu",
            on_rung=lambda rung: True,
        )
        adapter.wrapped.save_pretrained(folder, save_embedding_layers=False)
    return result.accuracy, result.tokens


def plain_loop(config: dict[str, Any]) -> None:
    """What the TorchTrainer of a trial runs."""
    import ray.train
    import torch

    from trainers import models, tasks

    torch.set_num_threads(1)
    base = models.load(config["model"])
    task = tasks.load_task(config["task"])
    trial = Trial.from_json(json.loads(config["trial"]))
    with tempfile.TemporaryDirectory() as folder:
        shape = models.shape_of_model(base.model, name=config["model"])
        accuracy, tokens = train_with_peft(base, shape, task, trial, folder)
        metrics = {"accuracy": math.nan if accuracy is None else accuracy, "tokens": tokens}
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def plain_trial(config: dict[str, Any]) -> None:
    """The Tune function: one TorchTrainer, as the Ray guide has it."""
    from ray import tune
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    result = TorchTrainer(
        plain_loop,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name=uuid.uuid4().hex, storage_path=config["storage"]),
    ).fit()
    assert result.metrics is not None
    assert result.checkpoint is not None
    told = {"params": config["params"], "digest": Trial.from_json(json.loads(config["trial"])).digest}
    told |= {"accuracy": result.metrics["accuracy"], "tokens": result.metrics["tokens"]}
    tune.report({**told, "adapter": result.checkpoint.path})


# --- cost of a training


class Resident:
    """A warm worker for all the ways that have one. Runs as an actor."""

    def __init__(self, setup: WorkerSetup) -> None:
        from trainers.worker_state import WorkerState

        self._state = WorkerState(setup, "cpu")
        self._task = self._state.task

    def train(self, way: str, trials: Sequence[tuple[str, int]]) -> Cost:
        """The first of the trials in this way, or all of them packed; one's share."""
        known = [(Trial.from_json(json.loads(text)), cost) for text, cost in trials]
        setup = self._state.setup
        with tempfile.TemporaryDirectory() as folder:
            self._state.setup = replace(setup, checkpoints=folder, evaluations=3 if way == "curve" else 1)
            self._state.task = cast(Any, ByLmEval(self._task)) if way == "lm-eval" else self._task
            wall, cpu = time.perf_counter(), time.process_time()
            if way == "peft":
                train_with_peft(self._state, self._state.shape, self._task, known[0][0], folder)
            elif way == "packed":
                self._pack(known, folder)
            else:
                outcome = self._state.train(TrainJob(*known[0]), report=lambda rung: True)
                assert outcome.status == "complete", outcome.message
            spent = Cost(time.perf_counter() - wall, time.process_time() - cpu)
        self._state.setup = setup
        return spent / len(known) if way == "packed" else spent

    def _pack(self, trials: Sequence[tuple[Trial, int]], folder: str) -> None:
        from trainers import adapter as adapters
        from trainers.packing import PackedRun

        state = self._state
        packed = PackedRun(state.model, self._task, tokenizer=state.tokenizer, device="cpu", evaluations=1)
        for trial, cost in trials:
            adapter = state.attach(trial, cost)
            adapter.detach()
            own = str(Path(folder) / trial.digest)
            packed.join(adapter, trial.recipe, seed=trial.seed, on_rung=lambda rung: True, checkpoint=own)
        while packed.members:
            for ended in packed.step():
                if ended.error is not None:
                    raise ended.error
                with tempfile.TemporaryDirectory() as saved:
                    adapters.save(ended.adapter, Path(saved), metadata={})


def costs(settings: Settings) -> dict[str, list[Cost]]:
    """Of a training in every way, repeat by repeat."""
    import ray
    from ray import tune

    from search.engine.workers import connect

    recorded = problem_of(settings.table, 0)
    chosen = spaced(recorded.rows, settings.repeats + settings.pack)
    watch = CpuWatch()
    watch.start()
    found: dict[str, list[Cost]] = {way: [] for way in ("plain", *WARM)}
    # One CPU more than trains: the outer Tune function takes a slot of its own, and the warm worker stays in between.
    connect("local", num_cpus=3)
    with tempfile.TemporaryDirectory() as name:
        overhead = warm(make_trials(6), Path(name) / "warm", watch)
        extra = Cost(statistics.median(overhead.overhead_seconds()), statistics.median(overhead.overhead_cpu()))
        resident: Any = ray.remote(num_cpus=1)(Resident).remote(worker_setup(recorded, Path(name)))
        for way in WARM:
            ray.get(resident.train.remote(way, chosen[-settings.pack :]))  # warms up

        class TakeTurns(tune.Callback):
            """After a plain trial, the same point in all other ways; Tune starts the next one when that is done."""

            def __init__(self) -> None:
                self.number = -1  # the first one pays for Tune's start
                self.rest = (time.monotonic(), watch.seconds())

            def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
                now = (time.monotonic(), watch.seconds())
                if self.number >= 0:
                    found["plain"].append(Cost(*(b - a for a, b in zip(self.rest, now, strict=True))))
                    for way in WARM[:: -1 if self.number % 2 else 1]:
                        points = chosen[self.number : self.number + settings.pack]
                        found[way].append(ray.get(resident.train.remote(way, points)) + extra)
                    show_costs(self.number, found)
                self.number += 1
                self.rest = (time.monotonic(), watch.seconds())

        points = [
            {"trial": text, "params": cost, "model": recorded.model, "task": recorded.task, "storage": f"{name}/train"}
            for text, cost in [chosen[0], *chosen[: settings.repeats]]
        ]
        tune.Tuner(
            tune.with_resources(inner_of_case, {"CPU": 0.01}),
            param_space={"case": tune.grid_search(points)},
            tune_config=tune.TuneConfig(max_concurrent_trials=1),
            run_config=tune.RunConfig(verbose=0, storage_path=f"{name}/tune", callbacks=[TakeTurns()]),
        ).fit()
        ray.kill(resident)
    watch.stop()
    ray.shutdown()
    return found


def inner_of_case(config: dict[str, Any]) -> None:
    plain_trial(config["case"])


def show_costs(number: int, found: Mapping[str, Sequence[Cost]]) -> None:
    latest = "  ".join(f"{way} {costs[-1].wall:.1f}/{costs[-1].cpu:.1f}" for way, costs in found.items())
    print(f"  point {number + 1}, wall/CPU-seconds: {latest}", flush=True)


def spaced(rows: Sequence[tuple[str, int]], count: int) -> list[tuple[str, int]]:
    """So many rows (trial, parameters), in equal steps from the smallest to the largest."""
    ordered = sorted(rows, key=lambda row: (row[1], row[0]))
    return [ordered[round((2 * n + 1) * len(ordered) / (2 * count) - 0.5)] for n in range(count)]


@dataclass(frozen=True)
class Recorded:
    """What a search against the table asks of it: the problem of one seed, and its rows (trial, parameters)."""

    problem: TableProblem
    rows: list[tuple[str, int]]

    @property
    def model(self) -> str:
        return self.problem.model

    @property
    def task(self) -> str:
        return self.problem.task


@cache
def problem_of(name: str, seed: int) -> Recorded:
    from search import replay
    from search.replay.problem import table_problem

    table = replay.load(name)
    problem = table_problem(table, seed=table.seeds[seed % len(table.seeds)])
    outcomes = [row.outcome for row in table.rows.values() if row.outcome.trial.seed == problem.seed]
    return Recorded(problem, [(json.dumps(o.trial.to_json()), o.trainable_params) for o in outcomes])


def worker_setup(recorded: Recorded, folder: Path) -> WorkerSetup:
    return WorkerSetup(
        model=recorded.model,
        options={},
        task=recorded.task,
        task_options={},
        seed=recorded.problem.seed,
        evaluations=1,
        calibration_samples=8,
        cpus_per_worker=1,
        signals=str(folder / "signals"),
        adapters=str(folder / "adapters"),
        checkpoints=str(folder / "checkpoints"),
    )


# --- both ways, for real


@dataclass(frozen=True)
class Ended:
    """A training of a real run, in the order in which they ended.

    accuracy   on the validation split, which the way searches by; None where the training diverged
    spent      by its way until this training had ended, the way's start included
    adapter    folder
    """

    digest: str
    trainable_params: int
    accuracy: float | None
    tokens: int
    spent: Cost
    adapter: str


class Log:
    """The trainings of one way, in a file that a later run of the benchmark goes on with."""

    def __init__(self, way: str, file: Path) -> None:
        self.way, self._file = way, file
        lines = file.read_text().splitlines() if file.exists() else []
        known = (json.loads(line) for line in lines)
        self.ended = [Ended(**entry | {"spent": Cost(**entry["spent"])}) for entry in known]

    def add(self, training: Ended) -> None:
        self.ended.append(training)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as file:
            file.write(json.dumps(asdict(training)) + "\n")
        shown = "diverged" if training.accuracy is None else f"accuracy {training.accuracy:.3f}"
        print(
            f"  {self.way}: training {len(self.ended)}, {training.trainable_params:,} parameters, {shown}, "
            f"{training.spent.wall:.0f} s, {training.spent.cpu:.0f} CPU-seconds",
            flush=True,
        )


def real_ours(settings: Settings, log: Log, watch: CpuWatch, folder: Path) -> None:
    """The command that a user types, `space=sieve` with its defaults; adapters are kept, to be judged afterwards."""
    from search.records import LINES

    if len(log.ended) >= settings.ours:
        return
    shutil.rmtree(folder, ignore_errors=True)  # minutes: from the start each time
    log.ended.clear()
    folder.mkdir(parents=True)
    recorded = problem_of(settings.table, settings.seed)
    command = [sys.executable, "-m", "search.run", "space=sieve", f"model={recorded.model}", f"task={recorded.task}"]
    command += [f"seed={recorded.problem.seed}", f"trials={settings.ours}", f"num_cpus={WORKERS}"]
    command += ["keep=all", f"storage={folder}", "name=ours"]
    began, cpu, read = time.time(), watch.seconds(), 0
    lines = folder / "ours" / LINES
    with (folder / "ours.txt").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None or read < lines.stat().st_size:
            time.sleep(0.1)
            text = lines.read_bytes()[read:] if lines.exists() else b""
            text = text[: text.rfind(b"\n") + 1]
            read += len(text)
            for line in map(json.loads, text.splitlines()):
                if line["event"] == "finished":
                    outcome = Outcome.from_json(line["outcome"])
                    spent = Cost(line["time"] - began, watch.seconds() - cpu)
                    place = str(folder / "ours" / "adapters" / outcome.digest)
                    params, accuracy = outcome.trainable_params, outcome.accuracy
                    log.add(Ended(outcome.digest, params, accuracy, outcome.tokens, spent, place))
    if process.returncode:
        raise StudyError(f"our way ended with exit code {process.returncode}: {folder}/ours.txt says why")


def of_people(trial: Any) -> Point:
    """What one lets Optuna choose: the table's allocations, rank and learning rate; lora_alpha is twice the rank.

    At the best scaled rate of tiny-moe, 0.05 to 0.2, the learning rate is .006 to .025 at rank 4 and .0008 to .003 at
    rank 32: the middle of its range.
    """
    from spaces import moe_grid

    allocator = trial.suggest_categorical("allocator", list(moe_grid.ALLOCATORS))
    knobs: dict[str, Any] = {}
    if allocator in ("sieve", "random"):
        knobs["fraction"] = trial.suggest_categorical("fraction", list(moe_grid.FRACTIONS))
        knobs |= {"score": "count"} if allocator == "sieve" else {"draw": "each"}
    rank = trial.suggest_categorical("rank", list(RANKS))
    rate = trial.suggest_float("learning_rate", *RATES, log=True)
    return Point(allocator, knobs, {"rank": rank, "lora_alpha": 2.0 * rank, "learning_rate": rate})


class PlainSpace:
    """The define-by-run function of OptunaSearch: Tune pickles it, so it holds names only."""

    def __init__(self, table: str, seed: int) -> None:
        self._table, self._seed = table, seed

    def __call__(self, trial: Any) -> dict[str, Any]:
        from search.problem import Problem

        problem = problem_of(self._table, self._seed).problem
        resolved, cost = Problem.resolve(problem, of_people(trial))  # not only rows of the table
        return {"trial": json.dumps(resolved.to_json()), "params": cost}


def real_plain(settings: Settings, log: Log, watch: CpuWatch, folder: Path) -> None:
    """Ray Tune with Optuna's NSGA-II. What an earlier run of this benchmark trained counts, with what it took."""
    import optuna
    import ray
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    from search.engine.workers import connect

    done = len(log.ended)
    if done >= settings.cap:
        return
    recorded = problem_of(settings.table, settings.seed)
    folder.mkdir(parents=True, exist_ok=True)
    before = log.ended[-1].spent if log.ended else Cost(0.0, 0.0)
    began, cpu = time.monotonic(), watch.seconds()

    class Follow(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            spent = before + Cost(time.monotonic() - began, watch.seconds() - cpu)
            told = trial.last_result
            accuracy = told["accuracy"] if math.isfinite(told["accuracy"]) else None
            log.add(Ended(told["digest"], told["params"], accuracy, told["tokens"], spent, told["adapter"]))

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    connect("local", num_cpus=WORKERS + 1)  # the Tune functions around the trainers take slots of their own
    # the same seed again would propose the same points again
    sampler = optuna.samplers.NSGAIISampler(seed=settings.seed + 7919 * done, population_size=POPULATION)
    search = OptunaSearch(
        PlainSpace(settings.table, settings.seed),
        metric=["accuracy", "params"],
        mode=["max", "min"],
        sampler=sampler,
        storage=JournalStorage(JournalFileBackend(str(folder / "optuna.log"))),
    )
    tune.Tuner(
        tune.with_resources(plain_trial, {"CPU": 0.01}),
        param_space={"model": recorded.model, "task": recorded.task, "storage": str(folder / "train")},
        tune_config=tune.TuneConfig(search_alg=search, num_samples=settings.cap - done, max_concurrent_trials=WORKERS),
        run_config=tune.RunConfig(verbose=0, storage_path=str(folder / "tune"), callbacks=[Follow()]),
    ).fit()
    ray.shutdown()


class Examiner:
    """Test accuracy of trainings, from their adapters, after the clock has stopped; kept in a file."""

    def __init__(self, recorded: Recorded, folder: Path) -> None:
        self._recorded, self._folder, self._file = recorded, folder, folder / "tested.jsonl"
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        self._known: dict[str, float] = {entry["adapter"]: entry["test"] for entry in map(json.loads, lines)}

    @cached_property
    def _state(self) -> Any:
        from trainers.worker_state import WorkerState

        return WorkerState(worker_setup(self._recorded, self._folder), "cpu")

    def places(self, log: Log) -> list[optimism.Place]:
        """Of every training of a way, in their order."""
        return [optimism.Place(one.trainable_params, self._tested(log.way, one)) for one in log.ended]

    def _tested(self, way: str, one: Ended) -> float | None:
        if one.accuracy is None:
            return None
        if one.adapter not in self._known:
            found = self._peft(one.adapter) if way == "plain" else self._state.test(one.adapter).score.accuracy
            self._known[one.adapter] = found
            with self._file.open("a") as file:
                file.write(json.dumps({"adapter": one.adapter, "test": found}) + "\n")
        return self._known[one.adapter]

    def _peft(self, folder: str) -> float:
        from peft import PeftModel

        state, test = self._state, self._state.task.test
        wrapped = PeftModel.from_pretrained(state.model, folder)
        try:
            test.prepare(state.tokenizer)
            accuracy: float = test.evaluate(state.model).accuracy
        finally:
            wrapped.unload()
        return accuracy


@dataclass(frozen=True)
class Judged:
    """A way's trainings, and what the trainings up to each of them cover of the table's hypervolume."""

    log: Log
    shares: Sequence[float]

    def reached(self, share: float) -> Ended | None:
        """The first training with which so much is covered."""
        return next((one for one, has in zip(self.log.ended, self.shares, strict=True) if has >= share), None)

    def number(self, one: Ended) -> int:
        return self.log.ended.index(one) + 1

    def line(self, share: float) -> str:
        one = self.reached(share)
        if one is None:
            one, said = self.log.ended[-1], f"not reached, {self.shares[-1]:.1%} after"
        else:
            said = "reached after"
        tokens = sum(training.tokens for training in self.log.ended[: self.number(one)])
        return (
            f"{self.log.way:<8}{said} {self.number(one)} trainings, {tokens:,} tokens, {one.spent.wall:.0f} s, "
            f"{one.spent.cpu:.0f} CPU-seconds, start included"
        )


def shares_of(judge: optimism.Judge, places: Sequence[optimism.Place]) -> list[float]:
    """What the first 1, 2, ... of these trainings cover of the table's hypervolume."""
    return [judge.share_of(places[: n + 1]) for n in range(len(places))]


def of_ranks(judge: optimism.Judge, least: int) -> float:
    """Share of a table's hypervolume that its rows of that rank and above have."""
    trials = (outcome.trial for outcome in judge.table.outcomes.values())
    return judge.share(trial.point for trial in trials if trial.recipe.rank >= least)


def times_less(plain: Judged, ours: Judged, share: float, name: str) -> dict[str, float | bool | None]:
    """How many times less of everything our way needs to a share; a way that did not get there needs more than it had.

    NAME_is_lower_bound   the plain way was not there in the end
    """
    there, early = plain.reached(share), ours.reached(share)
    units = ("wall", "cpu", "trainings")
    if early is None:
        return dict.fromkeys(f"{name}_{unit}" for unit in units)
    late = there or plain.log.ended[-1]
    found: dict[str, float | bool | None] = {
        f"{name}_wall": round(late.spent.wall / early.spent.wall, 2),
        f"{name}_cpu": round(late.spent.cpu / early.spent.cpu, 2),
        f"{name}_trainings": round(plain.number(late) / ours.number(early), 2),
    }
    return found | {f"{name}_is_lower_bound": there is None}


def both_for_real(settings: Settings) -> dict[str, float | bool | None]:
    """Ours and plain, one after the other, then judged; the plain way goes on where an earlier run was cut off."""
    judge = optimism.Judge(replay.load(settings.table))
    version = search_tables.own(settings.table, settings.seed, mean=False).version
    folder = (FOLDER / f"real-{Path(settings.table).stem}-{settings.seed}-{version}").absolute()  # Train needs it
    watch = CpuWatch()
    watch.start()
    logs = {way: Log(way, folder / f"{way}.jsonl") for way in ("ours", "plain")}
    real_ours(settings, logs["ours"], watch, folder / "ours")
    real_plain(settings, logs["plain"], watch, folder / "plain")
    watch.stop()
    examiner = Examiner(problem_of(settings.table, settings.seed), folder)
    ours, plain = (Judged(log, shares_of(judge, examiner.places(log))) for log in logs.values())
    within = of_ranks(judge, min(RANKS))
    shares = {
        "front": (search_tables.ENOUGH, f"95 % of the front of {settings.table}"),
        "real": (search_tables.ENOUGH * within, f"95 % of what its rows at rank {min(RANKS)} and more have"),
        "same": (plain.shares[-1], f"what the plain way had after {len(plain.shares)} trainings"),
    }
    found: dict[str, float | bool | None] = {"plain_share": plain.shares[-1], "ours_share": ours.shares[-1]}
    found = {name: round(value or 0.0, 4) for name, value in found.items()}
    for name, (share, what) in shares.items():
        print(f"{what} ({share:.1%})")
        print(f"  {plain.line(share)}\n  {ours.line(share)}")
        less = times_less(plain, ours, share, name)
        if less[f"{name}_wall"] is not None:
            least = "at least " if less[f"{name}_is_lower_bound"] else ""
            print(
                f"  {least}{less[f'{name}_wall']} × less wall clock, {less[f'{name}_cpu']} × fewer CPU-seconds, "
                f"{less[f'{name}_trainings']} × fewer trainings"
            )
        found |= less
    return found


# --- the report


def parse(arguments: Sequence[str]) -> Settings:
    """Raises StudyError for a word that is wrong."""
    if words.asks_for_help(arguments):
        print("\n".join(["keys (default):", *words.help_of(Settings)]))
        sys.exit(0)
    return words.parse(arguments, Settings)


def show(value: Spread, digits: int = 2) -> str:
    return "{0:.{d}f} ({1:.{d}f}..{2:.{d}f})".format(*value, d=digits)


def main(arguments: Sequence[str]) -> None:
    settings = parse(arguments)
    from trainers.versions import versions

    if settings.real and settings.seed >= settings.seeds:
        raise StudyError(
            f"seed={settings.seed} is not among the {settings.seeds} searches: choose one below {settings.seeds}"
        )
    report: dict[str, Any] = {}
    tokens = tokens_of_training(settings.table)
    trainings = searches(settings)
    by = "the mean over its seeds" if settings.mean else "one of its seeds"
    print(
        f"Trainings until 95 % of the hypervolume of {settings.table}, by {by}; {settings.seeds} searches, "
        f"{WORKERS} workers"
    )
    print(f"{'':<22}{'trainings':>24}{'tokens':>12}{'not in ' + str(settings.evaluations):>16}")
    for variant, needed in trainings.items():
        middle = spread(needed, quartiles=True)
        late = sum(number >= settings.evaluations for number in needed)
        print(f"{variant:<22}{show(middle, 1):>24}{middle[0] * tokens:>12,.0f}{f'{late} of {len(needed)}':>16}")
    found = search_factors(trainings)
    in_all = spread(ratios(trainings[PLAIN], trainings[OURS]), quartiles=True)
    rows: dict[str, dict[str, Spread]] = {name: {"wall": value, "cpu": value} for name, value in found.items()}
    report |= {name: round(value[0], 2) for name, value in found.items()}
    report |= {"trainings": round(in_all[0], 2)}
    report |= dict.fromkeys(("warm_workers", "adapters", "evaluation", "packing", "defaults", "all"))
    if settings.costs:
        print(f"\nCost of a training, {settings.repeats} points")
        spent = costs(settings)
        print(f"{'':<22}{'wall clock s':>24}{'CPU-seconds':>24}")
        for way, each in spent.items():
            wall, cpu = (spread([getattr(cost, unit) for cost in each], quartiles=False) for unit in ("wall", "cpu"))
            print(f"{way:<22}{show(wall):>24}{show(cpu):>24}")
        parts = {unit: cost_factors(spent, unit) for unit in ("wall", "cpu")}
        rows = {name: {unit: parts[unit][name] for unit in parts} for name in parts["wall"]} | rows
        report |= {name: {u: round(s[0], 2) for u, s in rows[name].items()} for name in parts["wall"]}
        for unit in parts:  # halving decides by evaluations on the way, which have to be paid for
            both = zip(spent["ours"], spent["curve"], strict=True)
            paid = statistics.median(getattr(one, unit) / getattr(three, unit) for one, three in both)
            rows["halving"] = rows["halving"] | {unit: scaled(found["halving"], paid)}
    print(f"\n{'× less':<22}{'wall clock':>24}{'CPU-seconds':>24}")
    for name, row in rows.items():
        print(f"{name:<22}{show(row['wall']):>24}{show(row['cpu']):>24}")
    if settings.costs:
        for name, without in (("defaults", ("packing", "halving")), ("all", ())):
            units = {u: product({n: row[u] for n, row in rows.items()}, without=without) for u in ("wall", "cpu")}
            report[name] = {unit: round(value, 2) for unit, value in units.items()}
            print(f"{'product, ' + name:<22}{units['wall']:>24.1f}{units['cpu']:>24.1f}")
    else:
        print("costs=true measures what a training costs: warm workers, adapters, evaluation, packing")
    if settings.real:
        print(f"\nBoth ways for real: {settings.ours} trainings of ours, {settings.cap} of the plain way")
        report |= both_for_real(settings)
    record = {"benchmark": "end_to_end", "device": "cpu", "versions": versions(), "settings": vars(settings)}
    print(json.dumps(record | {"ratios": report}))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ToolkitError as error:
        sys.exit(f"error: {error}")
