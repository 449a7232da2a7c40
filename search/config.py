"""The command line: `key=value` words to one frozen dataclass, and the one table of what each key decides.

    space=sieve model=tiny-moe trials=16          plain keys
    recipe.steps=200 recipe.rank=4                LoRA and optimiser settings fixed for the whole study
    space.allocator=sieve space.fraction=0.25     pins a knob of the space
    config=file.yaml                              loads a file first; words on the command line win

Order of precedence for a recipe: the papers' defaults (`Recipe`), then what the task file suggests
(`metadata: recipe:`), then what the space proposes for the point, then `recipe.NAME=` and `space.NAME=`.

Every key of `RunConfig` says once what it decides and which part of the program takes it. What a rerun must share,
which trainings of other studies may be reused, what a replayed table fixes, which options a model or a task is loaded
with and what a printed command leaves out all follow from it.
"""

from __future__ import annotations

import math
import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from allocators.core import words
from allocators.core.checks import is_folder_name
from allocators.core.errors import StudyError, did_you_mean, shown
from allocators.core.types import Recipe
from allocators.core.words import Value
from search import config_file
from trainers import forgetting, models, recipes
from trainers.recipes import SETTINGS, make_recipe
from trainers.tasks import files as task_files

SAMPLERS = ("ehvi", "gp", "tpe", "nsga2", "random")
SCHEDULERS = ("none", "pareto_halving")
SIGNALS = ("accuracy", "loss", "eval_loss")  # of an evaluation on the way, which trainings can be ranked by
TWO, THREE = "accuracy,params", "accuracy,params,forgetting"  # `objectives=`
AUTO = -2  # `seeds=auto`
MOST_SEEDS = 10_000  # trainings of one point
MOST_SEED = 2**32 - 1  # numpy's generators, which samplers draw with, take no more
# What studies share in a storage folder; more of it begins with a dot.
OTHERS = ("signals", "mlflow.db", "mlflow-artifacts")
PROGRAM = ("python", "-m", "search.run")
EXAMPLE = "space=sieve model=allenai/OLMoE-1B-7B-0924 task=arc_easy trials=40 max_trainable_params=100M"

# What a key decides:
# results    what a training comes to: a rerun in the folder, and a study whose trainings are reused, have the same
# proposals  which points are proposed, how they are allocated and who is stopped: a rerun has the same
# running    how much is searched, by whom, where and how: a rerun may have another
Decides = Literal["results", "proposals", "running"]

# Which part of the program takes a key, and the heading of these keys in the help:
# space      what points are made of: a replayed table brings it with its rows
# model      an option of `models.load`
# task       an option of `tasks.load_task`
# amount     how much is trained: a command for one point leaves it out
# machine    of the one machine or cluster that a study runs on: a command for others leaves it out
Where = Literal["space", "model", "task", "search", "amount", "workers", "machine"]
HEADINGS: dict[Where, str] = {
    "space": "what is searched",
    "model": "base model",
    "task": "task",
    "search": "search",
    "amount": "how much",
    "workers": "workers of a trial",
    "machine": "machine and folders",
}


def _key(default: Any, meaning: str, *, decides: Decides, where: Where, **limits: Any) -> Any:
    return words.key(default, meaning, decides=decides, where=where, **limits)


@dataclass(frozen=True)
class RunConfig:
    """Everything that is fixed for a study. What varies between its trials is the space."""

    space: str = _key(
        "sieve",
        "which search space, a file in spaces/: help SPACE says what it asks",
        decides="proposals",
        where="space",
    )
    model: str = _key("tiny-moe", "embedded name, local folder or Hugging Face id", decides="results", where="model")
    dtype: str = _key(
        "auto",
        "number type of the model (auto: bfloat16 on a GPU that has it, else float32)",
        decides="results",
        where="model",
        choices=models.DTYPES,
    )
    attn: str = _key(
        "auto",
        "implementation of attention (auto: as transformers chooses)",
        decides="results",
        where="model",
        choices=models.ATTENTION,
    )
    gradient_checkpointing: bool = _key(
        False,
        "run layers again in the backward pass: same losses, less memory, slower",
        decides="running",
        where="model",
    )
    quantization: str = _key(
        "",
        "quantise the frozen base's linear layers, by bitsandbytes (empty: no)",
        decides="results",
        where="model",
        choices=("", *models.QUANTIZATION),
    )
    trust_remote_code: bool = _key(
        False, "run Python code from the model's repository: it gets all your rights", decides="results", where="model"
    )
    task: str = _key(
        "default",
        "lm-evaluation-harness task, task file (.yaml), embedded task (default: tiny_pairs, with model=tiny-dense "
        "tiny_turncipher), or a group such as commonsense8; several: task=[arc_easy,openbookqa]",
        decides="results",
        where="task",
    )
    select_on: str = _key(
        "validation",
        "which split the search counts accuracy on. validation: a task's validation split if it has one beside its "
        "test split, else a held-out share of its training split; the test split stays unseen until the end. test: the "
        "test split, as in the papers; the best point then looks better than it is",
        decides="results",
        where="task",
        choices=task_files.SELECT_ON,
        before="test",
    )
    held_out: float = _key(
        0.1,
        "share of the training documents that select_on=validation holds out if a task has no validation split: no "
        "trial trains on them, and they are at most as many as the test questions (more: less noise, fewer rows)",
        decides="results",
        where="task",
        least=0.001,
        most=0.999,
    )
    trials: int = _key(
        -1,
        "trainings to run (-1: 16; in a table space one for every row); points that are answered without training and "
        "repeats with other seeds do not count",
        decides="running",
        where="amount",
        least=1,
        unset=-1,
    )
    seeds: int = _key(
        -1,
        "how many seeds stand behind each point of the front (-1: 1), in a table space behind each row (-1: as its "
        "data sheet says): points are trained again until they have as many. Seeds differ in adapter initialisation "
        "and data order; a rerun with more adds only what is missing. auto: the sampler decides which points it "
        "tries again, and these trainings count among the trials",
        decides="running",
        where="amount",
        least=1,
        unset=-1,
        most=MOST_SEEDS,
        names={"auto": AUTO},
    )
    time_budget: str = _key(
        "", "stop starting trials after this long: 90s, 10m, 2h (empty: no limit)", decides="running", where="amount"
    )
    seed: int = _key(
        0,
        "seed of the sampler, the random allocator, data order and adapter initialisation; repeats take the next seeds",
        decides="proposals",
        where="search",
        least=0,
        most=MOST_SEED,
    )
    max_trainable_params: int = _key(
        0,
        "points with more trainable parameters are not trained (0: no limit)",
        decides="running",
        where="amount",
        least=0,
    )
    deployable: str = _key(
        "",
        "points that this export format cannot express are not trained (search.export help describes the formats)",
        decides="running",
        where="amount",
        choices=("", "peft", "vllm", "merged"),
    )
    sampler: str = _key(
        "ehvi",
        "how points are proposed: ehvi by expected hypervolume improvement (parameters are known, so only accuracy is "
        "modelled), gp by Optuna's GPSampler (models both), tpe and nsga2 by Optuna's samplers, random by chance",
        decides="running",
        where="search",
        choices=SAMPLERS,
    )
    replay: str = _key(
        "",
        "ask this table of recorded trainings instead of training: tiny-moe, tiny-dense or FILE.parquet",
        decides="results",
        where="search",
    )
    scheduler: str = _key(
        "none",
        "whether trainings are stopped early. pareto_halving pauses every training at its rungs (evaluations after a "
        "share 1/eta, 1/eta², ... of all) and continues the best 1/eta by rank_by and trainable parameters; trials "
        "counts the trainings that were started, and only those that ran to their end are on the front",
        decides="proposals",
        where="search",
        choices=SCHEDULERS,
    )
    eta: int = _key(
        3,
        "scheduler=pareto_halving: one training in so many is continued at a rung",
        decides="proposals",
        where="search",
        least=2,
    )
    rank_by: str = _key(
        "eval_loss",
        "scheduler=pareto_halving: what trainings are ranked by at a rung; eval_loss is the loss of the right answers "
        "(accuracy, where the task's model writes its answers), loss that of training",
        decides="proposals",
        where="search",
        choices=SIGNALS,
        before="accuracy",
    )
    first_rung: int = _key(
        1,
        "scheduler=pareto_halving: the first evaluation at which trainings may pause; 0: the first rung, but only "
        "after eight complete trainings have shown that it ranks as the end does",
        decides="proposals",
        where="search",
        least=0,
    )
    evaluations: int = _key(
        3,
        "evaluations during a training, equally spaced; the last is at the end",
        decides="results",
        where="search",
        least=1,
    )
    forgetting: str = _key(
        "",
        "measure after every training what the model has forgotten: its loss on this text less that of the base "
        "(held_out: rows of the embedded models' pretraining mixture; a .txt or .jsonl file; a task; empty: not "
        "measured)",
        decides="results",
        where="search",
    )
    max_forgetting: float = _key(
        0.0,
        "points that forget more than so many nats a token are not on the front (0: no limit; needs forgetting=)",
        decides="running",
        where="search",
        least=0,
    )
    objectives: str = _key(
        TWO,
        f"what the front weighs against each other. {THREE}: no other point beats a member in all three, and the "
        "sampler looks for points that forget less, too (needs forgetting=)",
        decides="running",
        where="search",
        choices=(TWO, THREE),
    )
    limit: int = _key(
        0,
        "evaluate on the first N documents of each split of each task (0: all)",
        decides="results",
        where="task",
        least=0,
    )
    training_limit: int = _key(
        0,
        "train on at most N documents of each data set, the same for every seed (0: all)",
        decides="results",
        where="task",
        least=0,
    )
    metric: str = _key(
        "",
        "what accuracy is, e.g. acc_norm; of several tasks those that have it use it (empty: as the task says)",
        decides="results",
        where="task",
    )
    num_fewshot: int = _key(
        -1,
        "examples before each question of an evaluation (-1: as the task says); a task that fixes 0 keeps 0",
        decides="results",
        where="task",
        least=0,
        unset=-1,
    )
    fewshot_seed: int = _key(
        task_files.FEWSHOT_SEED,
        "seed that draws those examples; lm_eval draws the same examples with the same seed",
        decides="results",
        where="task",
        least=0,
    )
    chat_template: bool = _key(
        False,
        "put prompts into the tokenizer's chat template, to train and to evaluate",
        decides="results",
        where="task",
    )
    untrained: bool = _key(
        True,
        "evaluate the base before anything is trained, to say what training gained",
        decides="running",
        where="search",
    )
    calibration_samples: int = _key(
        256, "training documents that the routing signal is measured on", decides="proposals", where="space", least=1
    )
    workers: str = _key(
        "ray",
        "where trials train: ray (workers that stay up for the whole study, here or on a cluster) or process (this "
        "process, one trial after another, without Ray: for a debugger, a notebook, tests). Results are the same",
        decides="running",
        where="machine",
        choices=("ray", "process"),
    )
    workers_per_trial: int = _key(
        1, "Ray Train workers of one trial (data parallel)", decides="running", where="workers", least=1
    )
    shard: bool = _key(
        False,
        "spread the frozen base over the workers of a trial (FSDP2), for a model that does not fit one device: same "
        "losses, more traffic between workers; needs workers_per_trial of 2 or more",
        decides="running",
        where="model",
    )
    cpus_per_worker: int = _key(
        1, "CPUs, and torch threads, of one worker", decides="running", where="workers", least=1
    )
    gpus_per_worker: float = _key(
        -1.0,
        "GPUs of one worker; fractions share a GPU (-1: 1 if the cluster has GPUs, else 0)",
        decides="running",
        where="workers",
        least=0,
        unset=-1,
    )
    pack: str = _key(
        "1",
        "how many trainings at most share a worker and its passes over the frozen base: each begins, pauses and ends "
        "by itself, with the result that it has alone but for rounding (1: each has its own worker). auto: as many "
        "as a few timed steps and the free memory allow, at most 4 on a CPU and 8 on a GPU; the proposed points then "
        "depend on timing",
        decides="running",
        where="workers",
    )
    max_concurrent: int = _key(
        0,
        "trials that train at once; a pack counts as one (0: as many as the cluster holds)",
        decides="running",
        where="machine",
        least=0,
    )
    ray_address: str = _key(
        "local", "'local' starts Ray here; 'auto' or an address joins a cluster", decides="running", where="machine"
    )
    num_cpus: int = _key(
        0, "logical CPUs of a local Ray (0: as many as the machine has)", decides="running", where="machine", least=0
    )
    wait_for_workers: str = _key(
        "10m",
        "on a cluster that is joined: how long a study waits for a node with room for one trial, at its beginning and "
        "after the last such node was lost (90s, 10m, 2h)",
        decides="running",
        where="machine",
    )
    storage: str = _key(
        "studies", "folder, or URI such as s3://bucket/dir, that all nodes see", decides="running", where="machine"
    )
    lock: bool = _key(
        True,
        "lock the study's folder against a second driver; false on a file system without locks: start one at a time",
        decides="running",
        where="machine",
    )
    name: str = _key(
        "", "name of the study, its folder under storage (empty: SPACE-MODEL-TASK)", decides="running", where="search"
    )
    tracking_uri: str = _key(
        "", "MLflow tracking URI (empty: sqlite in the storage folder)", decides="running", where="machine"
    )
    reuse: bool = _key(
        False,
        "take over results of other studies in the storage folder for trainings that are equal (allocation, recipe, "
        "model, task, seed, and all settings that decide a result); in a search they do not count as trials",
        decides="running",
        where="search",
    )
    keep: str = _key(
        "front",
        "which trained adapters stay on disk",
        decides="running",
        where="search",
        choices=("front", "all"),
    )
    plugins: list[str] = _key(  # noqa: RUF009 (a field)
        [], "files, folders or modules with own allocators and spaces", decides="proposals", where="search"
    )
    dry_run: bool = _key(
        False,
        "print points with exact parameter counts and a worker's memory; no weights, no Ray",
        decides="running",
        where="amount",
    )
    estimate: bool = _key(
        False,
        "with dry_run=true: load the model here, time a few steps, and say how long the study will take",
        decides="running",
        where="amount",
    )
    recipe: dict[str, Value] = _key(  # noqa: RUF009 (a field)
        {}, "recipe.NAME=VALUE fixes a LoRA or optimiser setting for every trial", decides="proposals", where="search"
    )
    pins: dict[str, Value] = _key(  # noqa: RUF009 (a field)
        {},
        "space.NAME=VALUE fixes a knob of the space (in a file: pins: {NAME: VALUE})",
        decides="proposals",
        where="search",
    )

    @property
    def time_budget_seconds(self) -> float:
        """0 where there is no limit."""
        return _seconds("time_budget", self.time_budget)

    @property
    def seconds_for_workers(self) -> float:
        """How long a study waits for room for one worker group."""
        return _seconds("wait_for_workers", self.wait_for_workers)

    @property
    def study_name(self) -> str:
        """The folder's name: `name`, or space, model and task (and the replayed table), joined by dashes."""
        return self.name or self.experiment

    @property
    def experiment(self) -> str:
        """The name that studies of one space, model and task (and replayed table) share in MLflow."""
        task = "-".join(Path(word).stem for word in task_files.words(self.task))
        parts = [self.space, Path(self.model).name or self.model, task]
        parts += ["replay", Path(self.replay).stem] if self.replay else []
        return "-".join(re.sub(r"[^A-Za-z0-9._]+", "-", part) for part in parts)

    def to_json(self) -> dict[str, Any]:
        """Every key with its value, nested as the keys are."""
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """What a rerun in the same folder must share: all that decides a result, or which points there are."""
        return {key: getattr(self, key) for key in keys(decides="results") + keys(decides="proposals")}

    def options(self, where: Literal["model", "task"]) -> dict[str, Any]:
        """The settings that `models.load` or `tasks.load_task` takes besides the name."""
        return {key: getattr(self, key) for key in keys(where=where) if key != where}

    def without(self, where: Where) -> RunConfig:
        """The same with the keys of one part of the program at their defaults."""
        defaults = RunConfig()
        settings: dict[str, Any] = {key: getattr(defaults, key) for key in keys(where=where)}
        return replace(self, **settings)

    def command(self) -> str:
        """The command line that makes this study, quoted for a shell."""
        written, defaults = [*PROGRAM], RunConfig()
        for f in fields(self):
            value = getattr(self, f.name)
            if value == getattr(defaults, f.name) and f.name != "space":
                continue
            if isinstance(value, Mapping):
                written += [f"{_PREFIXES[f.name]}{name}={v}" for name, v in value.items()]
            else:
                written.append(f"{f.name}={words.written(self, f.name)}")
        return shlex.join(written)


# What keys are called elsewhere.
ALIASES = {
    **{name: f"recipe.{setting}" for name, setting in recipes.ALIASES.items()},
    "n_trials": "trials",
    "num_samples": "trials",
    "budget": "max_trainable_params",
    "max_params": "max_trainable_params",
    "base_model": "model",
    "dataset": "task",
    "timeout": "time_budget",
    "output_dir": "storage",
}
_KINDS = get_type_hints(RunConfig)
_PREFIXES = {"recipe": "recipe.", "pins": "space."}  # of the names in the two keys that are groups


def keys(*, decides: Decides | None = None, where: Where | None = None) -> tuple[str, ...]:
    """Names of the keys that decide this, or that this part of the program takes, in the order of the table."""
    return tuple(
        f.name
        for f in fields(RunConfig)
        if decides in (None, f.metadata["decides"]) and where in (None, f.metadata["where"])
    )


def before() -> dict[str, Any]:
    """What keys were in a study or table whose identity lacks them: the default, or what was done before they came."""
    younger = {f.name: f.metadata["before"] for f in fields(RunConfig) if "before" in f.metadata}
    return RunConfig().identity() | younger


def load_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `models.load` must be told besides the name to make of it what a study with these settings trained on."""
    names = [name for name in keys(where="model", decides="results") if name != "model" and name in settings]
    return {name: settings[name] for name in names if settings[name] != getattr(RunConfig, name)}


def portable_words(command: str) -> list[str]:
    """The words of a printed command without those that say on which machine it ran."""
    machine = keys(where="machine")
    return [word for word in words.shell_words(command) if word.partition("=")[0] not in machine]


def _seconds(key: str, text: str) -> float:
    if not text:
        return 0.0
    amount = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text, re.ASCII)
    if not amount or not math.isfinite(float(amount[1])):
        raise StudyError(f"{key} must look like 90s, 10m or 2h, got '{shown(text)}'")
    return float(amount[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[amount[2]]


def parse(argv: Sequence[str]) -> RunConfig:
    """Words of the command line to a checked `RunConfig`.

    Raises StudyError with one line for a word without `=`, an unknown key or one given twice, a value of the wrong
    type, a file that cannot be read, or a value that cannot work (zero trials).
    """
    pairs = words.split(argv, example="trials=16", repeatable=("config",))[1]
    values: dict[str, Any] = {}
    groups: dict[str, dict[str, Value]] = {name: {} for name in _PREFIXES}
    for file in (text for key, text in pairs if key == "config"):
        _take(config_file.load(file), values, groups, source=f" in {file}")
    _take([(key, text) for key, text in pairs if key != "config"], values, groups)
    config = RunConfig(**(values | groups))
    task = ",".join(task_files.words(_without_brackets(config.task)))
    config = replace(config, task=task_files.default_for(config.model, task))
    check(config)
    return config


def _take(
    pairs: Sequence[tuple[str, str]], values: dict[str, Any], groups: dict[str, dict[str, Value]], *, source: str = ""
) -> None:
    """Reads pairs of key and text into `values` and `groups`, over what is there."""
    for key, text in pairs:
        group = next((name for name, prefix in _PREFIXES.items() if key.startswith(prefix)), None)
        if group:
            name = key.removeprefix(_PREFIXES[group])
            groups[group][name] = str(text) if isinstance(text, config_file.Quoted) else words.read_value(text)
        elif key in _PREFIXES:
            raise StudyError(f"{shown(key)}{source} has no names: give {_PREFIXES[key]}NAME=VALUE")
        elif key not in _KINDS:
            if key in ALIASES:
                raise StudyError(f"unknown key '{key}'{source}; did you mean '{ALIASES[key]}'?")
            meant = did_you_mean(key, [*_KINDS, *SETTINGS])
            if any(f"'{name}'" in meant for name in SETTINGS):
                meant = meant.replace("'", f"'{_PREFIXES['recipe']}", 1)
            raise StudyError(f"unknown key '{shown(key)}'{source}{meant}{'' if source else ' (help lists the keys)'}")
        else:
            names = words.names_of(RunConfig, key)
            values[key] = words.read(f"{key}{source}", text, _KINDS[key], names=names)


def _without_brackets(task: str) -> str:
    """Several tasks are kept as text: `[a, b]` is `a, b`."""
    return task.strip().removeprefix("[").removesuffix("]")


def check(config: RunConfig) -> None:
    """Raises StudyError for a value that cannot work."""
    words.check(config)
    if config.name and not is_folder_name(config.name):
        raise StudyError(
            f"name={shown(config.name)} must be that of one folder below storage, of at most 255 bytes, without a slash"
        )
    if config.name in OTHERS or config.name.startswith("."):
        raise StudyError(f"name={config.name} is what studies share in the storage folder: choose another")
    if not is_folder_name(config.study_name):
        raise StudyError(f"'{shown(config.study_name)}' is too long for a folder: give the study a name with name=NAME")
    if config.workers == "process" and (reason := _needs_ray(config)):
        raise StudyError(f"workers=process and {reason} do not go together: leave one of them out")
    if config.scheduler != "none" and config.evaluations < 2:
        raise StudyError(
            f"scheduler={config.scheduler} compares trainings before their end, and evaluations={config.evaluations} "
            "is at the end: set it to 2 or more"
        )
    if config.scheduler != "none" and config.first_rung >= config.evaluations:
        raise StudyError(
            f"first_rung={config.first_rung} must be before the end, which is at evaluation {config.evaluations}: "
            "lower it, or raise evaluations"
        )
    if config.estimate and (config.replay or not config.dry_run):
        why = "replay= trains nothing: leave it out" if config.replay else "trains no more: give it with dry_run=true"
        raise StudyError(f"estimate=true times a few steps, and {why}")
    _check_forgetting(config)
    _check_workers(config)
    _seconds("time_budget", config.time_budget)
    _seconds("wait_for_workers", config.wait_for_workers)
    make_recipe(config.recipe)


def _check_forgetting(config: RunConfig) -> None:
    """Raises StudyError where what is not measured is limited or an objective, or for a text that cannot be there."""
    if reason := _asks_forgetting(config):
        raise StudyError(f"{reason}: name a text with forgetting= (forgetting=held_out with an embedded model)")
    if config.forgetting:
        forgetting.check(config.forgetting, model=config.model)


def _asks_forgetting(config: RunConfig) -> str:
    """What asks how much is forgotten where it is not measured; a replayed table brings what was measured."""
    if config.forgetting or config.replay:
        return ""
    if config.max_forgetting:
        return f"max_forgetting={config.max_forgetting:g} limits what is not measured"
    return f"objectives={config.objectives} has an objective that is not measured" if config.objectives == THREE else ""


def _needs_ray(config: RunConfig) -> str:
    """What a single worker in this process cannot do."""
    alone = {"workers_per_trial": (1,), "max_concurrent": (0, 1), "pack": ("1",), "ray_address": ("local",)}
    return next((f"{key}={getattr(config, key)}" for key, can in alone.items() if getattr(config, key) not in can), "")


def _check_workers(config: RunConfig) -> None:
    """Raises StudyError for what one worker, or several of a trial, cannot do together."""
    if config.shard and config.workers_per_trial < 2:
        raise StudyError(
            f"shard=true spreads the model over the workers of a trial, and workers_per_trial is "
            f"{config.workers_per_trial}: set it to 2 or more, or leave shard out"
        )
    if config.pack != "auto" and not _is_count(config.pack):
        raise StudyError(f"pack must be auto or at least 1, got {shown(config.pack)}")
    if config.pack != "1" and (reason := _no_pack(config)):
        raise StudyError(f"pack={config.pack} and {reason} do not go together: leave one of them out")
    if config.shard and config.quantization:
        raise StudyError(
            f"shard=true and quantization={config.quantization} do not go together: packed weights cannot be cut into "
            "rows; choose one of them"
        )


def _is_count(text: str) -> bool:
    try:
        return bool(words.read("pack", text, int) >= 1)
    except StudyError:
        return False


def _no_pack(config: RunConfig) -> str:
    """What keeps trainings from sharing a pass."""
    if config.workers_per_trial > 1:
        return f"workers_per_trial={config.workers_per_trial}"
    if config.quantization:
        return f"quantization={config.quantization}"
    return "gradient_checkpointing=true" if config.gradient_checkpointing else ""


def help_text() -> str:
    """Every key with its default and meaning, the recipe's keys, and where to go on."""
    lines = ["usage: python -m search.run [key=value ...]", f"for example: {EXAMPLE}", *words.READING]
    for where, heading in HEADINGS.items():
        lines += ["", f"{heading} (default):", *words.help_of(RunConfig, only=keys(where=where))]
    lines += ["", "recipe.NAME (papers' default; a task file may suggest others):"]
    recipe = "  ".join(f"{f.name}={f.default}" for f in fields(Recipe))
    lines += textwrap.wrap(recipe, width=108, initial_indent="  ", subsequent_indent="  ")
    lines += textwrap.wrap(
        "recipe.scaled_rate=VALUE sets learning_rate = scaled_rate/lora_alpha. A step moves ΔW by about the scaled "
        "rate whatever the rank, so the best value hardly changes with rank, alpha and allocation. Spaces propose it.",
        width=108,
        initial_indent="  ",
        subsequent_indent="  ",
    )
    lines += [
        "",
        "  config=FILE.yaml   the same keys from a file; the command line wins",
        "  help SPACE         what a space asks, its knobs, and what it costs where that was measured",
    ]
    return "\n".join(lines)
