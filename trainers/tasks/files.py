"""Finds task files and groups of them by name, and checks them and their data before anything is loaded.

    check_task("arc_easy,my/questions.yaml").files      # two task files
    check_task("commonsense8").files                    # the eight of trainers/embedded/benchmarks/commonsense8.yaml

A name is that of an embedded task (trainers/embedded/tasks/), of a benchmark or a group that comes with this toolkit
(trainers/embedded/benchmarks/), the path of a YAML file, or a task or group of lm-evaluation-harness; several are
separated by commas, in brackets or not. How files look is said in trainers/tasks/. Neither torch nor lm-eval nor
datasets is imported here: a command line answers in a fraction of a second.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import yaml

from allocators.core.errors import StudyError, did_you_mean

_EMBEDDED = Path(__file__).parents[1] / "embedded"
EMBEDDED: dict[str, Path] = {file.stem: file for file in sorted((_EMBEDDED / "tasks").glob("*.yaml"))}
BENCHMARKS: dict[str, Path] = {
    file.stem: file for file in sorted((_EMBEDDED / "benchmarks").glob("*.yaml")) if file.stem[0] != "_"
}

# Data set "paths" that are file formats; anything else is a folder or an id on the hub.
_FORMATS = ("arrow", "csv", "json", "parquet", "text")

# What turns a document into a prompt and its completion.
PROMPT = (
    "output_type",
    "doc_to_text",
    "doc_to_target",
    "doc_to_choice",
    "description",
    "gen_prefix",
    "target_delimiter",
)

FEWSHOT_SEED = 1234  # lm-eval's own default: the same examples as its command line draws

# What another data set does not inherit from a task.
_OF_THE_DATA = ("dataset_name", "dataset_kwargs", "process_docs", "custom_dataset")


@dataclass(frozen=True)
class TaskFile:
    """A task's YAML as written, its functions not imported.

    name        as it was asked for
    config      with its includes and the changes that a group makes
    changes     those changes alone
    metric      what the group says its accuracy is, "" where it says nothing
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    changes: Mapping[str, Any] = field(default_factory=dict)
    metric: str = ""

    @property
    def label(self) -> str:
        """The name that the file gives its task, which results go by where there are several."""
        return str(self.config["task"])

    @property
    def recipe(self) -> dict[str, Any]:
        """Recipe settings that the file suggests (`metadata: recipe:`)."""
        return dict(_metadata(self.config).get("recipe") or {})

    @property
    def evaluation_split(self) -> str:
        return self.config.get("test_split") or self.config["validation_split"]


@dataclass(frozen=True)
class Chosen:
    """The task files that a study trains and evaluates on, and the recipe settings that they suggest."""

    name: str
    files: tuple[TaskFile, ...]
    recipe: Mapping[str, Any]

    @property
    def num_datasets(self) -> int:
        """Data sets that are trained on: fewer than tasks where some share one."""
        return len({training_key(file) for file in self.files})


def words(name: str) -> list[str]:
    """`"[a, b.yaml]"` and `"a,b.yaml"` are `["a", "b.yaml"]`; a file may have a comma in its path.

    Raises StudyError where a name is missing.
    """
    text = name.strip()
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    elif Path(text).is_file():
        return [text]
    found = [word.strip().strip("\"'") for word in text.split(",")]
    if not all(found):
        raise StudyError(f"task '{name}' lacks a name: give one, or several as task=[arc_easy,openbookqa]")
    return found


def absolute(name: str) -> str:
    """The same tasks for a process that runs in another folder."""
    return ",".join(str(_path(word).absolute()) if _is_path(word) else word for word in words(name))


def check_task(name: str) -> Chosen:
    """Finds tasks and checks what can be known without loading data or model, in a fraction of a second.

    Raises StudyError for an unknown task, a task without training or evaluation split, one that this search cannot
    score, a task that is named twice, and with one line for all missing local files and all data sets that are neither
    cached nor reachable.
    """
    files: list[TaskFile] = []
    groups: list[Mapping[str, Any]] = []
    for word in words(name):
        files += _members(word, groups)
    for file in files:
        _check(file)
    labels = [file.label for file in files]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise StudyError(f"task '{twice[0]}' is named twice in task={name}: a mixture holds each task once")
    _check_data(files)
    # What all suggest suits the mixture; what a single one suggests may not.
    suggested = [file.recipe for file in files]
    recipe = {key: value for key, value in suggested[0].items() if all(s.get(key) == value for s in suggested)}
    for group in groups:
        recipe |= _metadata(group).get("recipe") or {}
    return Chosen(name, tuple(files), recipe)


def training_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The task that training rows come from where `metadata: training:` names another data set, else None.

    What the block does not say is as in the task itself, except what belongs to a data set where it names another one.
    """
    block = _metadata(config).get("training")
    if block is None:
        return None
    skipped = _OF_THE_DATA if "dataset_path" in block else ()
    return {key: value for key, value in config.items() if key not in skipped} | dict(block)


def training_key(file: TaskFile) -> str:
    """Equal for tasks that train on the same rows."""
    other = training_config(file.config)
    if other is None:
        return f"{file.path} {sorted(file.changes.items())}"
    keys = ("dataset_path", *_OF_THE_DATA, "training_split", *PROMPT)
    # A block's files and functions are found from the folder of its file.
    return f"{file.path.parent} { {key: other.get(key) for key in keys} }"


def _metadata(config: Mapping[str, Any]) -> Mapping[str, Any]:
    metadata = config.get("metadata")
    return metadata if isinstance(metadata, Mapping) else {}


# --- from names to files ------------------------------------------------------------------------------------------


def _members(name: str, groups: list[Mapping[str, Any]], seen: tuple[Path, ...] = ()) -> list[TaskFile]:
    """The task file of that name, or those of the group of that name; group files on the way go into `groups`."""
    path = _find(name, seen[-1].parent if seen else Path())
    config = _read_yaml(path)
    if "group" not in config and not isinstance(config.get("task"), list):
        return [TaskFile(name, path, config)]
    entries = config.get("task")
    if not isinstance(entries, list) or not entries or path in seen:
        raise StudyError(f"group '{name}' ({path.name}) must list its tasks under `task:`, and not itself")
    groups.append(config)
    return [file for entry in entries for file in _entry(entry, groups, (*seen, path))]


def _entry(entry: Any, groups: list[Mapping[str, Any]], seen: tuple[Path, ...]) -> list[TaskFile]:
    """One line of a group's list: a name, a name with changes, or a group within the group."""
    if isinstance(entry, str):
        return _members(entry, groups, seen)
    inside = entry.get("task") if isinstance(entry, dict) else None
    if isinstance(inside, list):
        return [file for one in inside for file in _entry(one, groups, seen)]
    if not isinstance(inside, str):
        raise StudyError(
            f"group file {seen[-1].name} lists {entry!r}: give a task's name, or `task: NAME` with changes"
        )
    changes = {key: value for key, value in entry.items() if key not in ("task", "metric")}
    if functions := [key for key, value in changes.items() if isinstance(value, _Function)]:
        raise StudyError(
            f"group file {seen[-1].name} gives {inside} a function as {functions[0]}: that needs a task file"
        )
    return [
        replace(
            file,
            config={**file.config, **changes},
            changes={**file.changes, **changes},
            metric=entry.get("metric", file.metric),
        )
        for file in _members(inside, groups, seen)
    ]


def _is_path(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _path(name: str) -> Path:
    return Path(os.path.expandvars(name)).expanduser()


def _find(name: str, folder: Path) -> Path:
    """The YAML file of a task or group; paths are relative to `folder`."""
    if found := EMBEDDED.get(name) or BENCHMARKS.get(name):
        return found
    if _is_path(name):
        path = folder / _path(name)
        if not path.is_file():
            raise StudyError(f"task file '{name}' does not exist: give the path of a YAML file or the name of a task")
        return path.resolve()
    if path_of_task := _harness_file(name):
        return path_of_task
    tasks = _harness_index(_ALL)[0]
    raise StudyError(
        f"unknown task '{name}': choose an embedded one ({', '.join(EMBEDDED)}), a benchmark "
        f"({', '.join(BENCHMARKS)}), the path of a task YAML, or one of the {len(tasks):,} of lm-evaluation-harness"
        f"{did_you_mean(name, [*EMBEDDED, *BENCHMARKS, *tasks])}"
    )


def _harness_folder() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise StudyError("the package lm-eval is not installed: pip install lm-eval")
    return Path(spec.submodule_search_locations[0]) / "tasks"


_TASK_LINE = re.compile(rb"""^["']?task["']?:[ \t]*["']?([^\s"'#]+)["']?[ \t]*\r?$""", re.MULTILINE)
_GROUP_LINE = re.compile(rb"""^["']?group["']?:[ \t]*["']?([^\s"'#]+)["']?[ \t]*\r?$""", re.MULTILINE)


_FEW, _ALL = 8, 1_000_000  # files in a folder


def _harness_file(name: str) -> Path | None:
    """The file of one of lm-eval's tasks or groups. Reading all 14,000 takes seconds, so likely ones are tried first:
    most tasks lie in a file of their name, and most others in folders of a few files."""
    for path in _harness_files():
        if path.stem == name:
            match = _TASK_LINE.search(path.read_bytes())
            if match and match.group(1).decode() == name:
                return path
    for largest in (_FEW, _ALL):
        tasks, groups = _harness_index(largest)
        if found := tasks.get(name) or groups.get(name):
            return found
    return None


@functools.cache
def _harness_files() -> list[Path]:
    return sorted(_harness_folder().rglob("*.yaml"), key=Path.as_posix)


@functools.cache
def _harness_index(largest: int) -> tuple[dict[str, Path], dict[str, Path]]:
    """lm-eval's tasks and groups by name, of folders with at most `largest` files. Found line by line: lm-eval's own
    index parses them, for 5 s and more."""
    tasks: dict[str, Path] = {}
    groups: dict[str, Path] = {}
    in_folder = Counter(path.parent for path in _harness_files())
    for path in _harness_files():
        if in_folder[path.parent] > largest:
            continue
        text = path.read_bytes()
        for pattern, found in ((_TASK_LINE, tasks), (_GROUP_LINE, groups)):
            if match := pattern.search(text):
                found.setdefault(match.group(1).decode(), path)
    return tasks, groups


class _Function(str):
    """The name of a function that a task file refers to."""


class _Loader(yaml.SafeLoader):
    """Reads task files without importing the functions they name."""


_Loader.add_constructor("!function", lambda loader, node: _Function(loader.construct_scalar(node)))


def _read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A task file with its `include`s, local keys winning, as lm-eval merges them."""
    path = path.resolve()
    try:
        with path.open(encoding="utf-8") as stream:
            config = yaml.load(stream, Loader=_Loader)  # a SafeLoader: builds plain values only
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise StudyError(f"task file '{path}' cannot be read: {_one_line(error)}") from error
    if not isinstance(config, dict) or path in seen:
        raise StudyError(f"task file '{path}' must hold keys and values and must not include itself")
    includes = config.pop("include", [])
    merged: dict[str, Any] = {}
    for include in includes if isinstance(includes, list) else [includes]:
        merged.update(_read_yaml(path.parent / include, (*seen, path)))
    merged.update(config)
    return merged


# --- can it be searched -------------------------------------------------------------------------------------------


def _check(file: TaskFile) -> None:
    """Raises StudyError for what no data could mend."""
    config, block = file.config, _metadata(file.config).get("training")

    def refuse(why: str) -> NoReturn:
        raise StudyError(f"task '{file.name}' ({file.path.name}) {why}")

    if not isinstance(config.get("task"), str):
        refuse("has no name: write `task: NAME` into it")
    if "class" in config:
        refuse("is written as a Python class: a search needs a YAML task with doc_to_text and doc_to_target")
    if block is not None and not (isinstance(block, Mapping) and block.get("training_split")):
        refuse("has a `training:` block that names no training_split")
    if block is None and not config.get("training_split"):
        refuse("has no training split: set training_split in a task file of your own, or choose another task")
    if not (config.get("test_split") or config.get("validation_split")):
        refuse("has neither test nor validation split: set test_split in its task file")
    training = training_config(config) or config
    same_data = all(training.get(key) == config.get(key) for key in ("dataset_path", *_OF_THE_DATA))
    if same_data and file.evaluation_split == training["training_split"]:
        refuse(
            f"would be evaluated on what it is trained on ('{file.evaluation_split}'): set test_split to another split"
        )
    if config.get("output_type") == "loglikelihood_rolling":
        refuse("measures perplexity: a search needs multiple_choice, generate_until or loglikelihood")
    if config.get("unsafe_code"):
        refuse("runs code that a model has written: that is not supported")
    if config.get("doc_to_image") or config.get("doc_to_audio"):
        refuse("needs images or sound: only text models are searched")


# --- its data -----------------------------------------------------------------------------------------------------


def located_data(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """`dataset_path` and `dataset_kwargs` with local files found from the task file's folder."""
    path = config.get("dataset_path")
    kwargs = dict(config.get("dataset_kwargs") or {})
    if path in _FORMATS:
        kwargs |= {key: _absolute(kwargs[key], folder) for key in ("data_files", "data_dir") if key in kwargs}
    elif isinstance(path, str) and (folder / path).is_dir():
        path = str(folder / path)
    return {"dataset_path": path, "dataset_kwargs": kwargs}


def _absolute(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {key: _absolute(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_absolute(item, folder) for item in value]
    text = os.path.expandvars(str(value))
    return text if "://" in text else str(folder / Path(text).expanduser())


def _check_data(files: Sequence[TaskFile]) -> None:
    """Raises StudyError with one line that names all that is missing and how to fetch it."""
    local: list[str] = []
    hub: dict[tuple[str, str], tuple[str, list[str]]] = {}  # (path, name of the subset) -> (reason, tasks)
    unreachable = ""  # without a network every further question would wait as long as the first one
    for file in files:
        for config in filter(None, (file.config, training_config(file.config))):
            data = located_data(config, file.path.parent)
            local += [told for told in _missing_files(file, data) if told not in local]
            key = (data["dataset_path"], config.get("dataset_name") or "")
            if key in hub:
                hub[key][1].append(file.name)
            elif _is_remote(key[0]) and not _is_cached(*key):
                reason = unreachable or _missing_on_hub(key[0])
                unreachable = reason if reason == _UNREACHABLE else ""
                if reason:
                    hub[key] = (reason, [file.name])
    if hub or local:
        raise StudyError("; ".join([*([_how_to_fetch(hub)] if hub else []), *local]))


def _how_to_fetch(missing: Mapping[tuple[str, str], tuple[str, Sequence[str]]]) -> str:
    """`tasks 'a', 'b' need the data sets ..., which are ...: run ...` for (path, subset) -> (reason, tasks)."""
    by_reason: dict[str, list[str]] = {}
    for (path, subset), (reason, _) in missing.items():
        by_reason.setdefault(reason, []).append(f"'{path}'" + (f" ('{subset}')" if subset else ""))
    sets = "; and ".join(
        f"{', '.join(named)}, which {'is' if len(named) == 1 else 'are'} {why}" for why, named in by_reason.items()
    )
    tasks = list(dict.fromkeys(name for _, names in missing.values() for name in names))
    calls = "; ".join(f"load_dataset({', '.join(repr(part) for part in key if part)})" for key in missing)
    return (
        f"task{'s' if len(tasks) > 1 else ''} {', '.join(repr(name) for name in tasks)} "
        f"{'need' if len(tasks) > 1 else 'needs'} the data set{'s' if len(missing) > 1 else ''} {sets}: where there is "
        f'a network, run `python -c "from datasets import load_dataset; {calls}"`, '
        "or choose a task file over local data"
    )


def _missing_files(file: TaskFile, data: Mapping[str, Any]) -> Iterator[str]:
    files = data["dataset_kwargs"].get("data_files", []) if data["dataset_path"] in _FORMATS else []
    fetch = _metadata(file.config).get("fetch")
    for path in _flat(files):
        if "://" not in path and not any(c in path for c in "*?[") and not Path(path).is_file():
            yield f"task '{file.name}' ({file.path.name}) needs the data file '{path}', which does not exist: " + (
                f"fetch it with `{fetch}`"
                if fetch
                else "correct data_files (paths are relative to the task file) or set the variable it names"
            )


def _flat(value: Any) -> Iterator[str]:
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _flat(item)
    else:
        yield value


def _is_remote(path: Any) -> bool:
    return isinstance(path, str) and path not in _FORMATS and not Path(path).is_dir()


def _is_cached(path: str, name: str) -> bool:
    """Whether `datasets` has the data set (and of several subsets the one that is needed) on disk."""
    from huggingface_hub import constants

    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    folder = cache / path.replace("/", "___")
    return folder.is_dir() and (not name or any(inside.name.startswith(name) for inside in folder.iterdir()))


_UNREACHABLE = "not in the local cache, and the hub cannot be reached"


def _missing_on_hub(path: str) -> str:
    """Why a data set cannot be had, "" where it can. One request: without a network `datasets` retries for 23 s."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        huggingface_hub.HfApi().dataset_info(path, timeout=10)
    except errors.RepositoryNotFoundError:
        return "not on the hub, or not without a login"
    except (OSError, errors.HTTPError):
        return _UNREACHABLE
    return ""


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
