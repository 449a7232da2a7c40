"""The command line: `key=value` words to one frozen dataclass. The only file that imports OmegaConf.

    space=sieve model=tiny-moe trials=16          plain keys
    recipe.steps=200 recipe.rank=4                LoRA and optimiser settings fixed for the whole study
    space.allocator=sieve space.fraction=0.25     pins a knob of the space
    config=file.yaml                              loads a file first; words on the command line win

Order of precedence for a recipe: the papers' defaults (`Recipe`), then what the task file suggests
(`metadata: recipe:`), then what the space proposes for the point, then `recipe.NAME=` and `space.NAME=`.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from allocators.core.errors import StudyError, did_you_mean, unknown
from allocators.core.types import Recipe
from trainers import models
from trainers.tasks import files as task_files

SAMPLERS = ("ehvi", "tpe", "nsga2", "random")
SCHEDULERS = ("none", "pareto_halving")
WORKERS = ("ray", "process")


def _key(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class RunConfig:
    """Everything that is fixed for a study. What varies between its trials is the space."""

    space: str = _key("sieve", "which search space: a file in spaces/ (its docstring says what it asks)")
    model: str = _key("tiny-moe", "embedded name, local folder or Hugging Face id")
    dtype: str = _key(
        "auto", f"of the model: {', '.join(models.DTYPES)} (auto: bfloat16 on a GPU that has it, else float32)"
    )
    attn: str = _key("auto", f"attention: {', '.join(models.ATTENTION)} (auto: as transformers chooses)")
    gradient_checkpointing: bool = _key(
        False, "run layers again in the backward pass: same losses, less memory, slower"
    )
    quantization: str = _key(
        "", f"of the frozen base's linear layers: {' or '.join(models.QUANTIZATION)}, by bitsandbytes (empty: none)"
    )
    trust_remote_code: bool = _key(False, "run Python code from the model's repository: it gets all your rights")
    task: str = _key(
        "default",
        "lm-evaluation-harness task, task file (.yaml), embedded task, or a group such as commonsense8; several: "
        "task=[arc_easy,openbookqa]",
    )
    trials: int = _key(
        -1,
        "trainings to run (-1: 16, in a table space one for every row); points answered without training and repeats "
        "with other seeds do not count",
    )
    seeds: int = _key(
        -1,
        "seeds behind each point of the front: its members are trained again until they have as many (-1: 1); in a "
        "table space behind every row (-1: what its data sheet says). They differ in adapter initialisation and data "
        "order; a rerun with more adds only what is missing",
    )
    time_budget: str = _key("", "stop starting trials after this long: 90s, 10m, 2h (empty: no limit)")
    seed: int = _key(
        0,
        "seed of the sampler, the random allocator, data order and adapter initialisation; repeats take those after it",
    )
    max_trainable_params: int = _key(0, "points with more trainable parameters are not trained (0: no limit)")
    sampler: str = _key(
        "ehvi",
        "who proposes points: ehvi (expected hypervolume improvement; parameters are known, so only accuracy is "
        "modelled), tpe, nsga2, random",
    )
    replay: str = _key(
        "", "ask this table of recorded trainings instead of training: a name or FILE.parquet (search/replay/)"
    )
    scheduler: str = _key(
        "none",
        f"who stops trainings early: {', '.join(SCHEDULERS)}. Halving pauses every training at an evaluation (after a "
        "share 1/eta, 1/eta², ... of all evaluations) and goes on with the best 1/eta by accuracy there and trainable "
        "parameters; trials counts what is started, the front has what ran to its end",
    )
    eta: int = _key(3, "scheduler=pareto_halving: one in so many trainings goes on at a rung")
    evaluations: int = _key(3, "evaluations during a training, equally spaced; the last is at the end")
    limit: int = _key(0, "evaluate on the first N documents of the test split only, of each task (0: all)")
    training_limit: int = _key(0, "train on at most N documents of each data set, the same for every seed (0: all)")
    metric: str = _key(
        "", "what accuracy is, e.g. acc_norm; of several tasks those that have it take it (empty: as the task says)"
    )
    num_fewshot: int = _key(
        -1, "examples before each question of an evaluation (-1: as the task says, which may fix 0)"
    )
    fewshot_seed: int = _key(task_files.FEWSHOT_SEED, "seed of those examples; lm_eval draws the same with the same")
    chat_template: bool = _key(False, "put prompts into the tokenizer's chat template, to train and to evaluate")
    untrained: bool = _key(True, "evaluate the base before anything is trained, to say what training gained")
    calibration_samples: int = _key(256, "training documents that the routing signal is measured on")
    workers: str = _key(
        "ray",
        "where trials train: ray (workers that stay up for the whole study, here or on a cluster) or process (this "
        "process, one trial after another, without Ray: for a debugger, a notebook, tests). Results are the same",
    )
    workers_per_trial: int = _key(1, "Ray Train workers of one trial (data parallel)")
    shard: bool = _key(
        False,
        "spread the frozen base over the workers of a trial (FSDP2), for a model that does not fit one device: same "
        "losses, more traffic between workers; needs workers_per_trial of 2 or more",
    )
    cpus_per_worker: int = _key(1, "CPUs, and torch threads, of one worker")
    gpus_per_worker: float = _key(
        -1.0, "GPUs of one worker; fractions share a GPU (-1: 1 if the cluster has GPUs, else 0)"
    )
    pack: str = _key(
        "1",
        "trainings that share a worker and its passes over the frozen base: up to so many begin, pause and end by "
        "themselves, each with the result that it has alone but for rounding (1: each has a worker for itself). auto: "
        "as a few timed steps and free memory say, at most 4 on a CPU and 8 on a GPU; what is proposed then depends "
        "on timing",
    )
    max_concurrent: int = _key(
        0, "trials that train at once, those in a pack counting as one (0: as many as the cluster holds)"
    )
    ray_address: str = _key("local", "'local' starts Ray here; 'auto' or an address joins a cluster")
    num_cpus: int = _key(0, "logical CPUs of a local Ray (0: as many as the machine has)")
    storage: str = _key("studies", "folder, or URI such as s3://bucket/dir, that all nodes see")
    name: str = _key("", "name of the study, its folder under storage (empty: SPACE-MODEL-TASK)")
    tracking_uri: str = _key("", "MLflow tracking URI (empty: sqlite in the storage folder)")
    reuse: bool = _key(
        False,
        "take results from the other studies in the storage folder that did an equal training (allocation, recipe, "
        "model, task, seed, and all settings that decide a result); in a search they do not count as trials",
    )
    keep: str = _key("front", "which trained adapters stay on disk: front or all")
    plugins: list[str] = field(
        default_factory=list, metadata={"help": "files, folders or modules with own allocators and spaces"}
    )
    dry_run: bool = _key(False, "print points with exact parameter counts; no weights, no Ray")
    recipe: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "recipe.NAME=VALUE fixes a LoRA or optimiser setting for every trial"}
    )
    pins: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "space.NAME=VALUE fixes a knob of the space (in a file: pins: {NAME: VALUE})"},
    )

    @property
    def time_budget_seconds(self) -> float:
        """0 where there is no limit."""
        return _seconds(self.time_budget)

    @property
    def study_name(self) -> str:
        if self.name:
            return self.name
        task = "-".join(Path(word).stem for word in task_files.words(self.task))
        parts = [self.space, Path(self.model).name or self.model, task]
        parts += ["replay", Path(self.replay).stem] if self.replay else []
        return "-".join(re.sub(r"[^A-Za-z0-9._]+", "-", part) for part in parts)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """What a rerun in the same folder must share: everything a result depends on."""
        keys = (
            "space",
            "model",
            "task",
            "seed",
            "evaluations",
            *("scheduler", "eta"),  # who is trained to the end decides what the sampler learns
            "limit",
            "calibration_samples",
            "plugins",
            "recipe",
            "pins",
            "replay",
            *("training_limit", "metric", "num_fewshot", "fewshot_seed", "chat_template"),
            *("dtype", "attn", "quantization", "trust_remote_code"),  # gradient checkpointing gives the same losses
        )
        return {key: getattr(self, key) for key in keys}

    def command(self) -> str:
        """The command line that makes this study."""
        words, defaults = ["python -m search.run"], RunConfig()
        for f in fields(self):
            value = getattr(self, f.name)
            if value == getattr(defaults, f.name) and f.name != "space":
                continue
            if f.name in ("recipe", "pins"):
                prefix = "space" if f.name == "pins" else "recipe"
                words += [f"{prefix}.{name}={v}" for name, v in value.items()]
            elif isinstance(value, list):
                words.append(f"'{f.name}=[{','.join(value)}]'")
            else:
                words.append(f"{f.name}={value}")
        return " ".join(words)


def _seconds(text: str) -> float:
    if not text:
        return 0.0
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", str(text))
    if not found:
        raise StudyError(f"time_budget must look like 90s, 10m or 2h, got '{text}'")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def parse(argv: Sequence[str]) -> RunConfig:
    """Words of the command line to a checked `RunConfig`.

    Raises StudyError with one line for a word without `=`, an unknown key, a value of the wrong type, a file that
    cannot be read, or a value that cannot work (zero trials).
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    known = {f.name for f in fields(RunConfig)}
    plain: list[str] = []
    files: list[str] = []
    pins: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    for word in argv:
        key, separator, value = word.partition("=")
        if not separator:
            raise StudyError(f"'{word}' is not key=value; for example trials=16 (help lists the keys)")
        if key == "config":
            files.append(value)
        elif key.startswith(("space.", "recipe.")):
            group, _, name = key.partition(".")
            (pins if group == "space" else recipe)[name] = _scalar(value)
        elif key not in known:
            raise StudyError(f"unknown key '{key}'{did_you_mean(key, known)} (help lists the keys)")
        else:
            if key == "task":  # a list is kept as text: "a,b"
                word = f"task={value.strip().removeprefix('[').removesuffix(']')}"
            # one plug-in needs no brackets
            plain.append(f"plugins=[{value}]" if key == "plugins" and not value.startswith("[") else word)

    settings = OmegaConf.structured(RunConfig)
    try:
        for file in files:
            loaded = _load_file(file)
            strangers = sorted(set(loaded) - known)
            if strangers:
                raise StudyError(f"unknown key '{strangers[0]}' in {file}{did_you_mean(strangers[0], known)}")
            if isinstance(loaded.get("task"), list):
                loaded = {**loaded, "task": ",".join(map(str, loaded["task"]))}
            settings = OmegaConf.merge(settings, loaded)
        settings = OmegaConf.merge(settings, OmegaConf.from_dotlist(plain), {"pins": pins, "recipe": recipe})
        config = RunConfig(**OmegaConf.to_container(settings, resolve=True))  # type: ignore[arg-type]
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or ""
        raise StudyError(f"{key}: {str(error).splitlines()[0]}" if key else str(error).splitlines()[0]) from None
    config = replace(config, task=",".join(task_files.words(config.task)))
    check(config)
    return config


def _scalar(text: str) -> Any:
    """`8` is an int, `0.25` and `3e-4` floats, `true` a bool, anything else text."""
    lowered = text.lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _load_file(file: str) -> Mapping[str, Any]:
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        loaded = OmegaConf.to_container(OmegaConf.load(file))
    except FileNotFoundError:
        raise StudyError(f"config={file}: there is no such file") from None
    except (OSError, YAMLError) as error:
        raise StudyError(f"config={file} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(loaded, dict):
        raise StudyError(f"config={file} must hold key: value lines")
    return {str(key): value for key, value in loaded.items()}


def check(config: RunConfig) -> None:
    """Raises StudyError for a value that cannot work."""
    at_least = {"evaluations": 1, "limit": 0, "calibration_samples": 1, "workers_per_trial": 1}
    at_least |= {"eta": 2, "training_limit": 0, "num_fewshot": -1, "fewshot_seed": 0}
    at_least |= {"cpus_per_worker": 1, "max_concurrent": 0, "num_cpus": 0, "max_trainable_params": 0, "seed": 0}
    for key, minimum in at_least.items():
        if getattr(config, key) < minimum:
            raise StudyError(f"{key} must be at least {minimum}, got {getattr(config, key)}")
    for key in ("trials", "seeds"):
        if (value := getattr(config, key)) < 1 and value != -1:
            raise StudyError(f"{key} must be at least 1, got {value}")
    if config.sampler not in SAMPLERS:
        raise unknown("sampler", config.sampler, SAMPLERS)
    if config.scheduler not in SCHEDULERS:
        raise unknown("scheduler", config.scheduler, SCHEDULERS)
    if config.workers not in WORKERS:
        raise unknown("workers", config.workers, WORKERS)
    if config.workers == "process" and (reason := _needs_ray(config)):
        raise StudyError(f"workers=process and {reason} do not go together: leave one of them out")
    if config.scheduler != "none" and config.evaluations < 2:
        raise StudyError(
            f"scheduler={config.scheduler} compares trainings before their end, and evaluations={config.evaluations} "
            "is at the end: set it to 2 or more"
        )
    models.check_options(dtype=config.dtype, attn=config.attn, quantization=config.quantization)
    if config.shard and config.workers_per_trial < 2:
        raise StudyError(
            f"shard=true spreads the model over the workers of a trial, and workers_per_trial is "
            f"{config.workers_per_trial}: set it to 2 or more, or leave shard out"
        )
    if config.pack != "auto" and (not config.pack.isdecimal() or int(config.pack) < 1):
        raise StudyError(f"pack must be auto or at least 1, got {config.pack}")
    if config.pack != "1" and (reason := _no_pack(config)):
        raise StudyError(f"pack={config.pack} and {reason} do not go together: leave one of them out")
    if config.shard and config.quantization:
        raise StudyError(
            f"shard=true and quantization={config.quantization} do not go together: packed weights cannot be cut into "
            "rows; choose one of them"
        )
    if config.keep not in ("front", "all"):
        raise StudyError(f"keep must be front or all, got '{config.keep}'")
    if config.gpus_per_worker < 0 and config.gpus_per_worker != -1:
        raise StudyError(f"gpus_per_worker must be 0 or more (or -1 for automatic), got {config.gpus_per_worker}")
    _seconds(config.time_budget)
    known = {f.name for f in fields(Recipe)}
    for name in config.recipe:
        if name not in known:
            raise StudyError(
                f"unknown key 'recipe.{name}': choose from {', '.join(sorted(known))}{did_you_mean(name, known)}"
            )
    make_recipe(config.recipe)


def _needs_ray(config: RunConfig) -> str:
    """What a single worker in this process cannot do."""
    alone = {"workers_per_trial": (1,), "max_concurrent": (0, 1), "pack": ("1",), "ray_address": ("local",)}
    return next((f"{key}={getattr(config, key)}" for key, can in alone.items() if getattr(config, key) not in can), "")


def _no_pack(config: RunConfig) -> str:
    """What keeps trainings from sharing a pass."""
    if config.workers_per_trial > 1:
        return f"workers_per_trial={config.workers_per_trial}"
    if config.quantization:
        return f"quantization={config.quantization}"
    return "gradient_checkpointing=true" if config.gradient_checkpointing else ""


def make_recipe(*layers: Mapping[str, Any]) -> Recipe:
    """`Recipe` from layers of settings, later ones win.

    Raises StudyError for an unknown name or a value that is not a number where one is needed.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        if "epochs" in layer and "steps" not in layer:
            merged.pop("steps", None)  # steps win over epochs inside one layer, not over a later layer's epochs
        merged |= layer
    types: dict[str, type] = {f.name: type(f.default) for f in fields(Recipe)}
    for name, value in merged.items():
        if name not in types:
            raise StudyError(
                f"unknown recipe setting '{name}': choose from {', '.join(sorted(types))}{did_you_mean(name, types)}"
            )
        wanted = types[name]
        if wanted is not str and (isinstance(value, (str, bool)) or (wanted is int and value != int(value))):
            raise StudyError(
                f"recipe.{name} must be {'a whole number' if wanted is int else 'a number'}, got {value!r}"
            )
        merged[name] = wanted(value)
    return Recipe(**merged)


def help_text() -> str:
    """Every key with its default and meaning, the recipe's keys, and where to go on."""
    lines = ["usage: python -m search.run [key=value ...]", "", "keys (default):"]
    for f in fields(RunConfig):
        default = f.default if f.default is not MISSING else ""
        head = f"  {f.name}" + (f" ({default})" if default not in ("", -1.0) else "")
        lines += textwrap.wrap(f"{head:<34}{f.metadata['help']}", width=110, subsequent_indent=" " * 34)
    lines += ["", "recipe.NAME (papers' default; a task file may suggest others):"]
    recipe = "  ".join(f"{f.name}={f.default}" for f in fields(Recipe))
    lines += textwrap.wrap(recipe, width=108, initial_indent="  ", subsequent_indent="  ")
    lines += [
        "",
        "  config=FILE.yaml   the same keys from a file; the command line wins",
        "  help SPACE         what a space asks, its knobs, what it costs",
    ]
    return "\n".join(lines)
