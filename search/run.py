"""Runs a study: `python -m search.run space=sieve`. `help` lists the keys, `help sieve` describes a space.

parse → shape and space (no weights) → [dry_run: table] → records, tracker → warm workers → signals → Tune → report
Everything that can be known to be wrong before workers start is said before, in one line, with exit code 2.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from allocators.core import plugins, words
from allocators.core.errors import StudyError, ToolkitError
from allocators.core.types import Signal, canonical_json
from search.config import RunConfig, help_text, parse
from search.problem import Problem, check_budget, check_pins, corners, load_space, placeholder
from trainers import storage


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 no trial reached an accuracy, 2 the request cannot work."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        if words.asks_for_help(given):
            names = [word.removeprefix("space=") for word in given if word not in words.HELP]
            print(describe(names[0]) if len(names) == 1 and "=" not in names[0] else overview())
            return 0
        return run(parse(given))
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where this one stopped", file=sys.stderr)
        return 130


def overview() -> str:
    """The keys, and every space with the question it asks."""
    lines = [help_text(), "", "spaces:"]
    for name in plugins.names("spaces"):
        lines.append(f"  {name:<16}{describe(name).splitlines()[0]}")
    return "\n".join(lines)


def describe(space: str) -> str:
    """A space's data sheet. Raises StudyError for a space that does not exist."""
    return plugins.load("spaces", space, "space").__doc__ or ""


def prepare(config: RunConfig) -> Problem:
    """What the study searches, from the words of the command line; loads no weights and starts nothing.

    Raises StudyError for anything that cannot work: unknown plug-in, space, model, task or knob, a model of the wrong
    kind, a task without a training split, a budget below the smallest allocation.
    """
    from trainers import models, tasks

    for plugin in config.plugins:
        plugins.add(plugin)
    shape = models.shape_of(config.model, trust_remote_code=config.trust_remote_code)
    space = load_space(config.space, shape)
    task = tasks.check_task(config.task)
    problem = Problem(
        space=space,
        shape=shape,
        model=config.model,
        task=config.task,
        seed=config.seed,
        max_trainable_params=config.max_trainable_params,
        signals={kind: placeholder(kind, shape, datasets=task.num_datasets) for kind in _needs(space)},
        task_recipe=task.recipe,
        fixed_recipe=config.recipe,
        # a recipe setting that the space would propose is fixed for the sampler as well
        pins={**{k: v for k, v in config.recipe.items() if k in _knobs_of(space, shape)}, **config.pins},
    )
    problem = replace(problem, pins=check_pins(problem))
    check_budget(problem)
    return problem


def prepare_replay(config: RunConfig) -> tuple[RunConfig, Problem]:
    """The same for a study that asks a table: the settings that it was recorded with, and its rows.

    Raises StudyError for a table that does not exist, a seed or budget that it has no row for, a setting that it was
    not recorded with.
    """
    from search import replay

    for plugin in config.plugins:
        plugins.add(plugin)
    table, defaults = replay.load(config.replay), RunConfig()
    known = {f.name for f in fields(RunConfig)}  # a table may be older than a key, or younger
    settings = {key: value for key, value in table.settings.items() if key in known and key != "replay"}
    for key, recorded in {**settings, "recipe": {}}.items():
        if getattr(config, key) not in (recorded, getattr(defaults, key)):
            asked = f"{key}={getattr(config, key)}" if key != "recipe" else f"recipe.{min(config.recipe)}"
            raise StudyError(f"{asked} is not what {config.replay} was recorded with ({recorded}): leave it out")
    problem = table.problem(seed=config.seed, max_trainable_params=config.max_trainable_params, pins=config.pins)
    return replace(config, **settings), replace(problem, pins=check_pins(problem))


def _needs(space: Any, pins: Mapping[str, Any] = MappingProxyType({})) -> list[Any]:
    """Kinds of signal that the space's allocators read; only that of the pinned allocator where one is pinned."""
    names = [pins["allocator"]] if "allocator" in pins else space.ALLOCATORS
    return sorted({kind for name in names if (kind := plugins.load("allocators", name).NEEDS)})


def _knobs_of(space: Any, shape: Any) -> set[str]:
    bare = Problem(space=space, shape=shape, model="", task="")  # resolves nothing: names need no signal
    return {name for _, params in corners(bare) for name in params}


def run(config: RunConfig) -> int:
    if config.replay:
        config, problem = prepare_replay(config)
    else:
        problem = prepare(config)
    config = amounts(config, problem)
    if problem.is_table and config.scheduler != "none":
        raise StudyError(
            f"scheduler={config.scheduler} stops trainings early, and every row of a table (space={config.space}) is "
            "trained to its end: leave it out"
        )
    if config.dry_run:
        dry_run(config, problem)
        return 0
    return study(config, problem)


def amounts(config: RunConfig, problem: Problem) -> RunConfig:
    """The same with `trials` and `seeds` as numbers where they were left to their defaults, and pins of their knobs."""
    trials, seeds = config.trials, config.seeds
    if trials == -1:
        trials = len(list(corners(problem))) if problem.is_table else 16
    if seeds == -1:
        seeds = getattr(problem.space, "SEEDS", 1) if problem.is_table else 1
    pins = {name: problem.pins[name] for name in config.pins}
    return replace(config, trials=trials, seeds=seeds, pins=pins)


def dry_run(config: RunConfig, problem: Problem) -> None:
    """Prints points with their parameter counts: what the study would start with and what the sampler would draw."""
    from rich.console import Console
    from rich.table import Table

    from search.front import human

    measured = dict(problem.signals) if config.replay else _measured(_folder(config))
    problem = replace(problem, signals={**problem.signals, **measured})
    proposals, refused = _drawn(config, problem, merge=set(_needs(problem.space, problem.pins)) <= set(measured))
    title = f"{config.space} on {config.model}: {len(proposals)} points, nothing is trained"
    table = Table(title=title)
    for column in ("", "allocator", "knobs", "recipe", "experts", "trainable parameters"):
        table.add_column(column, justify="right" if column in ("", "experts", "trainable parameters") else "left")
    bounds = False
    for number, proposal in enumerate(proposals, start=1):
        trial = proposal.trial
        module = plugins.load("allocators", trial.allocator)
        exact = module.FIXED_COST or module.NEEDS is None or module.NEEDS in measured
        bounds = bounds or not exact
        knobs = " ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in trial.knobs.items())
        settings = f"rank={trial.recipe.rank} learning_rate={trial.recipe.learning_rate:.2g}"
        mark = "" if exact else "≤ " if module.NEEDS == "routing" else "≈ "
        table.add_row(
            str(number),
            trial.allocator,
            knobs,
            settings,
            f"{mark}{trial.allocation.total_experts}",
            f"{mark}{proposal.trainable_params:,} ({human(proposal.trainable_params)})",
        )
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    if bounds:
        console.print("≤ at most, ≈ about: depends on a signal that the first run measures")
    if refused:
        console.print(f"{len(refused)} further points needed no training: {', '.join(sorted(set(refused)))}")
    if problem.is_table:
        total = len(proposals) * config.seeds
        console.print(f"{len(proposals)} rows with {config.seeds} seeds each: {total} trainings")
    elif config.seeds > 1:
        console.print(f"then the members of the front again, until {config.seeds} seeds stand behind each")


def _drawn(config: RunConfig, problem: Problem, *, merge: bool) -> tuple[list[Any], list[str]]:
    """Points to show, and why others need no training. Without `merge` rows that only look alike stay apart."""
    from search.propose.sampler import Proposal, Proposer, table_rows

    if problem.is_table:
        rows = table_rows(problem, merge=merge)
        refused: list[str] = [row.reason for row in rows if not isinstance(row, Proposal)]
        return [row for row in rows if isinstance(row, Proposal)][: config.trials], refused
    refused = []
    proposer = Proposer(problem, sampler="random", answered=lambda point: refused.append(point.reason))
    return [p for _ in range(config.trials) if (p := proposer.propose()) is not None], refused


def study(config: RunConfig, problem: Problem) -> int:
    """Opens the study's records and tracker, trains what is left to train, writes the report."""
    from search import report
    from search.records import Study
    from search.records.tracking import Tracker
    from search.study import remaining
    from spaces import _tables

    folder = _folder(config)
    with Study.open(
        folder,
        config=config.to_json(),
        identity=config.identity(),
        defaults=RunConfig().identity(),
        shape=problem.shape,
        command=config.command(),
        table=_tables.facts(problem.space) if problem.is_table else {},
    ) as records:
        tracker = Tracker.open(
            config.tracking_uri or None,
            folder.parent,
            experiment=config.space,
            study_name=config.study_name,
            tags={"model": config.model, "task": config.task},
            params=config.to_json(),
        )
        try:
            tracker.sync(records)
            known = replace(problem, signals={**problem.signals, **_measured(folder)})
            left, repeats = remaining(known, records, trials=config.trials, seeds=config.seeds)
            if left or repeats:
                _train(config, problem, records, tracker, left, repeats)
            else:
                print(
                    f"trials={config.trials}, seeds={config.seeds} and {len(records.finished)} are finished: "
                    "nothing to train"
                )
            summary = report.write(folder)
            tracker.sync(records)
        except BaseException:
            tracker.close(status="KILLED")
            raise
        tracker.close(summary)
    report.show(summary)
    print(f"Runs: {tracker.browse}")
    return 0 if any(outcome.accuracy is not None for outcome in records.finished.values()) else 1


def _train(config: RunConfig, problem: Problem, records: Any, tracker: Any, left: int, repeats: int) -> None:
    """Trains `left` of the trials, and repeats with other seeds: `repeats` of them and those that turn out so."""
    from search.report.live import Progress
    from search.study import Run

    folder, began = _folder(config), time.monotonic()
    # Before Ray starts its processes: they inherit it.
    for name, value in {"TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}.items():
        os.environ.setdefault(name, value)
    from search.engine import tune as ray_tune
    from search.engine import workers as pools
    from search.engine.memory import PeakMemory
    from search.propose.halving import NO_HALVING, Halving
    from search.records.reuse import FACTS, NOWHERE, Elsewhere, Nowhere
    from search.replay import WORKERS, Announcing, TableProblem
    from trainers import models

    if not config.replay:
        models.check_packages(attn=config.attn, quantization=config.quantization)
        for line in models.remarks(
            config.model, problem.shape, quantization=config.quantization, trust_remote_code=config.trust_remote_code
        ):
            print(f"note: {line}", file=sys.stderr)
    # Records lie here; what workers write lies where every node can reach it.
    shared = storage.join(config.storage, config.study_name) if storage.is_uri(config.storage) else str(folder)
    print(f"{config.space} on {config.model}, task {config.task}; records in {folder}", flush=True)
    cluster = pools.connect(config.ray_address, num_cpus=config.num_cpus)
    study = records.header["id"]
    pool: pools.Pool | pools.TablePool
    if isinstance(problem, TableProblem):
        pool = pools.TablePool(problem.table.answers(), workers=config.max_concurrent or WORKERS, study=study)
        facts = {"replayed": problem.table.mark}
    else:
        pool = _workers(config, cluster, trials=left + repeats, folder=folder, shared=shared, study=study)
    memory, before = PeakMemory(), list(records.finished.values())
    with (
        memory,
        Progress(
            config.trials,
            config.time_budget_seconds or None,
            done=before,
            reused=records.reused,
            seed=config.seed,
            evaluations=config.evaluations,
        ) as progress,
    ):
        try:
            pool.start()
            if isinstance(pool, pools.TablePool):
                progress.message(f"nothing is trained: {pool.plan.groups} simulated workers read {config.replay}")
            else:
                progress.message(f"starting workers: {pool.plan.describe()}")
                told = pool.ask({"kind": "task"}, told=lambda *_: None)
                progress.message(told["task"])
                facts = {key: told["versions"][key] for key in FACTS}
                if config.untrained:
                    _evaluate_untrained(pool, folder, progress)
                problem = replace(problem, signals=_signals(config, problem, pool, folder, progress))
                if config.pack == "auto":
                    _choose_pack(config, problem, pool, progress)
            elsewhere: Elsewhere | Nowhere = NOWHERE
            if config.reuse:
                elsewhere = Elsewhere(
                    folder,
                    identity=config.identity(),
                    defaults=RunConfig().identity(),
                    facts=facts,
                    adapters=storage.join(shared, "adapters"),
                )
                count = len(elsewhere)
                progress.message(f"other studies in {folder.parent} have {count} trainings with the same settings")
            pausing = config.scheduler != "none"
            conductor = Run(
                problem,
                records,
                tracker,
                progress,
                checkpoints=storage.join(shared, "checkpoints"),
                sampler=config.sampler,
                deadline=began + config.time_budget_seconds if config.time_budget else None,
                keep=config.keep,
                trials=config.trials,
                seeds=config.seeds,
                halving=Halving(evaluations=config.evaluations, eta=config.eta) if pausing else NO_HALVING,
                elsewhere=elsewhere,
            )
            # the conductor ends it; Tune wants a number, so one that every point with every seed stays below: at that
            # number it would ask no more, not for what is paused either
            most = repeats + (max(config.trials, len(records.outcomes)) + len(elsewhere)) * config.seeds + 1
            asked: Any = Announcing(conductor, pool) if isinstance(pool, pools.TablePool) else conductor
            ray_tune.search(asked, pool, study=study, trials=most, pausing=pausing)
            if conductor.cut_off:  # Tune takes Ctrl-C for itself and returns as if it were done
                raise KeyboardInterrupt
            conductor.settle()
        finally:
            pool.close()
            pools.disconnect()
            storage.delete_folder(storage.join(shared, ".ray"))  # Ray Train's own notes: a resume needs none of them
    seconds, gibibytes = time.monotonic() - began, memory.peak_bytes / 2**30
    earlier = {outcome.digest for outcome in before}
    new = [outcome for digest, outcome in records.trained.items() if digest not in earlier]
    own = sum(outcome.trial.seed == config.seed for outcome in new)
    others = len(new) - own
    done = "rows of the table read" if config.replay else "trainings"
    print(
        f"{own} {done}{f' and {others} repeats with other seeds' if others else ''} in {seconds / 60:.1f} minutes "
        f"with start-up; peak memory of driver, Ray and workers on this machine {gibibytes:.1f} GiB"
    )
    if records.sampler_seconds:
        mean = sum(records.sampler_seconds) / len(records.sampler_seconds)
        print(f"sampler {config.sampler}: {mean:.2g} s a suggestion")


def _workers(
    config: RunConfig, cluster: Mapping[str, float], *, trials: int, folder: Path, shared: str, study: str
) -> Any:
    """Worker groups that fit the cluster, not started yet."""
    from search.engine import workers as pools
    from trainers import models, tasks

    plan = pools.plan(
        cluster,
        workers_per_trial=config.workers_per_trial,
        cpus_per_worker=config.cpus_per_worker,
        gpus_per_worker=config.gpus_per_worker,
        max_concurrent=config.max_concurrent,
        trials=trials,
        pack=pools.MOST_PACKED if config.pack == "auto" else int(config.pack),
    )
    return pools.Pool(
        plan,
        study=study,
        storage=storage.join(shared, ".ray"),
        setup={
            "namespace": pools.NAMESPACE,
            "model": _located(config.model, {**models.EMBEDDED, **models.PACKAGED}),
            "options": config.options("model"),
            "task": tasks.absolute(config.task),
            "task_options": {
                **config.options("task"),
                "num_fewshot": config.num_fewshot if config.num_fewshot >= 0 else None,
            },
            "seed": config.seed,
            "evaluations": config.evaluations,
            "calibration_samples": config.calibration_samples,
            "cpus_per_worker": config.cpus_per_worker,
            "signals": str(folder.parent / "signals"),
            "adapters": storage.join(shared, "adapters"),
            "checkpoints": storage.join(shared, "checkpoints"),
        },
    )


def _located(name: str, embedded: Mapping[str, Any]) -> str:
    """A path of this folder as workers find it, who run elsewhere; any other name as it is."""
    return str(Path(name).absolute()) if name not in embedded and Path(name).exists() else name


def _evaluate_untrained(pool: Any, folder: Path, progress: Any) -> None:
    """Accuracy of the base alone, once a study, beside its records."""
    from search.records import UNTRAINED, write_atomically

    if (folder / UNTRAINED).exists():
        return
    answer = pool.ask({"kind": "untrained"}, told=lambda *_: None)
    found = {key: answer[key] for key in ("accuracy", "stderr", "by_task")}
    write_atomically(folder / UNTRAINED, canonical_json(found))
    progress.message(f"untrained, the base has accuracy {found['accuracy']:.3f} ± {found['stderr']:.3f}")


def _signals(config: RunConfig, problem: Problem, pool: Any, folder: Path, progress: Any) -> dict[str, Signal]:
    """Every kind of signal that the space's allocators need, measured once by a worker or taken from the cache."""
    from search.records import write_atomically

    signals: dict[str, Signal] = {}
    for kind in _needs(problem.space, problem.pins):
        progress.message(f"measuring {kind}, or reading what was measured before")
        told = partial(progress.measuring, kind)
        signals[kind] = Signal.from_json(pool.ask({"kind": "signal", "signal": kind}, told=told)["signal"])
        progress.measured()
        (folder / "signals").mkdir(exist_ok=True)
        write_atomically(folder / "signals" / f"{kind}.json", canonical_json(signals[kind].to_json()))
    return signals


def _choose_pack(config: RunConfig, problem: Problem, pool: Any, progress: Any) -> None:
    """Lets a worker time a few steps of the largest of some points, and packs as many as it says."""
    proposals, _ = _drawn(replace(config, trials=8), problem, merge=True)
    if proposals:
        largest = max(proposals, key=lambda proposal: proposal.trainable_params)
        job = {"trial": json.dumps(largest.trial.to_json()), "trainable_params": largest.trainable_params}
        answer = pool.ask({"kind": "pack", **job}, told=lambda *_: None)
        pool.limit(answer["pack"])
        progress.message(f"packs of {pool.plan.pack}: {answer['why']}")


def _measured(folder: Path) -> dict[str, Signal]:
    """Signals that an earlier run of the study left in its folder; a damaged one counts as not measured."""
    found: dict[str, Signal] = {}
    for file in sorted((folder / "signals").glob("*.json")):
        try:
            found[file.stem] = Signal.from_json(json.loads(file.read_text()))
        except (ValueError, KeyError, OSError) as error:
            print(f"warning: {file} cannot be read ({error}); shown without it", file=sys.stderr)
    return found


def _folder(config: RunConfig) -> Path:
    """The study's records lie on this machine, whatever `storage` is; workers write adapters to `storage`."""
    base = Path("studies") if storage.is_uri(config.storage) else Path(config.storage).expanduser()
    return base.absolute() / config.study_name


if __name__ == "__main__":
    sys.exit(main())
