"""Finds task files and groups of them by name, and checks them and their data before anything is loaded.

    check_task("arc_easy,my/questions.yaml").files      # two task files
    check_task("commonsense8").files                    # the eight of trainers/embedded/benchmarks/commonsense8.yaml

A name is that of an embedded task (trainers/embedded/tasks/), of a benchmark or a group that comes with this toolkit
(trainers/embedded/benchmarks/), the path of a YAML file, or a task or group of lm-evaluation-harness; several are
separated by commas, in brackets or not. How files look is said in trainers/tasks/. Neither torch nor lm-eval nor
datasets is imported here: a command line answers in a fraction of a second.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from allocators.core.errors import StudyError, did_you_mean, shown, unknown
from allocators.core.words import path as named
from trainers.recipes import make_recipe
from trainers.tasks import index
from trainers.tasks.data import check_data, flat, located_data, unescaped
from trainers.tasks.task_file import (
    OF_THE_DATA,
    FunctionName,
    TaskFile,
    code_of,
    metadata_of,
    nothing_to_select_on,
    read_yaml,
    training_config,
    training_key,
)

_EMBEDDED = Path(__file__).parents[1] / "embedded"
EMBEDDED: dict[str, Path] = {file.stem: file for file in sorted((_EMBEDDED / "tasks").glob("*.yaml"))}
BENCHMARKS: dict[str, Path] = {
    file.stem: file for file in sorted((_EMBEDDED / "benchmarks").glob("*.yaml")) if file.stem[0] != "_"
}

DEFAULT = "default"
_DEFAULT_OF = {"tiny-dense": "tiny_turncipher"}  # it has learnt little where tiny-moe knows most of tiny_pairs

SELECT_ON = ("validation", "test")  # what a search counts accuracy on

_OUTPUT_TYPES = ("multiple_choice", "generate_until", "loglikelihood")

FEWSHOT_SEED = 1234  # lm-eval's own default: the same examples as its command line draws


@dataclass(frozen=True)
class Chosen:
    """The task files that a study trains and evaluates on, and the recipe settings that they suggest."""

    name: str
    files: tuple[TaskFile, ...]
    recipe: Mapping[str, Any]

    @property
    def code(self) -> list[str]:
        """A sentence for each task file that runs code which came neither with this toolkit nor with lm-eval."""
        said = []
        for file in self.files:
            code = dict.fromkeys(path for path in code_of(file.config) if not index.is_shipped(path, _EMBEDDED))
            if code:
                said.append(f"{file.path.name} runs code of {', '.join(str(path) for path in code)}")
        return said

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
    with suppress(OSError):  # too long for the name of one file
        if Path(text).is_file():
            return [text]
    names = [word.strip().strip("\"'") for word in text.split(",")]
    if not all(names):
        raise StudyError(f"task '{name}' lacks a name: give one, or several as task=[arc_easy,openbookqa]")
    return names


def default_for(model: str, task: str) -> str:
    """The task of this model where `task` says no more than "default": an embedded model may have one of its own."""
    return _DEFAULT_OF.get(model, task) if task == DEFAULT else task


def absolute(name: str) -> str:
    """The same tasks for a process that runs in another folder."""
    return ",".join(str(_path(word).absolute()) if _is_path(word) else word for word in words(name))


def check_task(name: str, *, select_on: str = "test") -> Chosen:
    """Finds tasks and checks what can be known without loading data or model, in a fraction of a second.

    select_on   "validation": a task must have questions to select on besides those of its test split

    Raises StudyError for an unknown task, a task without training or evaluation split, one that this search cannot
    score, a task that is named twice, a data file that is named twice for a split, a recipe setting that is none, and
    with one line for all missing local files and all data sets that are neither cached nor reachable.
    """
    files: list[TaskFile] = []
    groups: list[Mapping[str, Any]] = []
    for word in words(name):
        files += _members(word, groups)
    for file in files:
        _check(file)
        if select_on == "validation" and not (file.names_validation_split or file.names_training_split):
            raise nothing_to_select_on(file)
    labels = [file.label for file in files]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise StudyError(f"task '{twice[0]}' is named twice in task={name}: a mixture holds each task once")
    check_data(files)
    # What all suggest suits the mixture; what a single one suggests may not.
    suggested = [file.recipe for file in files]
    recipe = {key: value for key, value in suggested[0].items() if all(s.get(key) == value for s in suggested)}
    for group in groups:
        recipe |= metadata_of(group).get("recipe") or {}
    try:
        make_recipe(recipe)
    except StudyError as error:
        raise StudyError(f"task {shown(name)} suggests what no recipe has: {error}") from error
    return Chosen(name, tuple(files), recipe)


def _members(name: str, groups: list[Mapping[str, Any]], seen: tuple[Path, ...] = ()) -> list[TaskFile]:
    """The task file of that name, or those of the group of that name; group files on the way go into `groups`."""
    path = _find(name, seen[-1].parent if seen else Path())
    config = read_yaml(path)
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
    if functions := [key for key, value in changes.items() if isinstance(value, FunctionName)]:
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
    return named(os.path.expandvars(name), "task file")


def is_shipped(file: TaskFile) -> bool:
    """Whether the file came with this toolkit or with lm-eval."""
    return index.is_shipped(file.path, _EMBEDDED)


def _find(name: str, folder: Path) -> Path:
    """The YAML file of a task or group; paths are relative to `folder`."""
    if ours := EMBEDDED.get(name) or BENCHMARKS.get(name):
        return ours
    if _is_path(name):
        file = folder / _path(name)
        if not file.is_file():
            raise StudyError(f"task file '{name}' does not exist: give the path of a YAML file or the name of a task")
        return file.resolve()
    if theirs := index.file_of(name):
        return theirs
    tasks = index.task_names()
    raise StudyError(
        f"unknown task '{name}': choose an embedded one ({', '.join(EMBEDDED)}), a benchmark "
        f"({', '.join(BENCHMARKS)}), the path of a task YAML, or one of the {len(tasks):,} of lm-evaluation-harness"
        f"{did_you_mean(name, [*EMBEDDED, *BENCHMARKS, *tasks])}"
    )


def _counted_file_that_is_trained(file: TaskFile, training: Mapping[str, Any]) -> str:
    """A local data file of both the training split and the one that is evaluated; "" where there is none."""
    named = located_data(file.config, file.path.parent)["dataset_kwargs"].get("data_files")
    if not isinstance(named, Mapping):
        return ""
    trained, counted = (
        {_place_of(path): path for name in flat(named.get(split, [])) for path in _matched(name)}
        for split in (training["training_split"], file.evaluation_split)
    )
    return next((counted[place] for place in counted if place in trained), "")


def _named_twice(file: TaskFile) -> tuple[str, str] | None:
    """A split and a local data file that is twice in it; None where there is none."""
    named = located_data(file.config, file.path.parent)["dataset_kwargs"].get("data_files")
    for split, files in (named if isinstance(named, Mapping) else {"train": named or []}).items():
        seen: set[object] = set()
        for path in (path for name in flat(files) for path in _matched(name)):
            if (place := _place_of(path)) in seen:
                return split, path
            seen.add(place)
    return None


def _matched(name: str) -> list[str]:
    """The files that a name with * or ? stands for; else the name."""
    return sorted(glob.glob(name, recursive=True)) or [unescaped(name)]


def _place_of(path: str) -> object:
    """Equal for two names of one file, whether the file system or a link has both."""
    try:
        state = os.stat(path)
    except OSError:
        return path
    return state.st_dev, state.st_ino


_KINDS: Mapping[str, tuple[str, tuple[type, ...]]] = {
    **dict.fromkeys(
        ("dataset_path", "dataset_name", "training_split", "validation_split", "test_split", "fewshot_split"),
        ("text", (str,)),
    ),
    **dict.fromkeys(
        ("output_type", "description", "target_delimiter", "fewshot_delimiter", "gen_prefix", "doc_to_text"),
        ("text", (str,)),
    ),
    **dict.fromkeys(("process_docs", "process_results", "custom_dataset"), ("!function FILE.NAME", (FunctionName,))),
    "num_fewshot": ("a whole number of at least 0", (int,)),
    "repeats": ("a whole number of at least 1", (int,)),
    **dict.fromkeys(("generation_kwargs", "fewshot_config"), ("names and values", (Mapping,))),
    **dict.fromkeys(("metric_list", "filter_list"), ("a list of names and values", (list,))),
    "doc_to_target": ("text, a number or a list", (str, int, list)),
    "doc_to_choice": ("text, or a list of texts", (str, list, Mapping)),
}


_NEVER_NULL = ("target_delimiter", "fewshot_delimiter", "repeats")


def _of_another_kind(config: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with values of the keys that every task has."""
    for key, (needed, kinds) in _KINDS.items():
        value = config.get(key)
        good = value is None and (key not in config or key not in _NEVER_NULL)
        good = good or (isinstance(value, kinds) and not isinstance(value, bool))
        if good and key in ("metric_list", "filter_list"):
            good = all(isinstance(part, Mapping) and part for part in value or ())
        if good and key == "filter_list":
            good = all(map(_is_filter, value or ())) and len({part["name"] for part in value or ()}) == len(value or ())
            needed = "a list of {name: TEXT, filter: [{function: NAME}, …]}, each with another name,"
        if good and isinstance(value, Mapping):
            good = all(isinstance(name, str) for name in value)
        if good and key in ("num_fewshot", "repeats"):
            good = value is None or value >= (key == "repeats")
        if not good:
            yield f"has {key}: {shown(repr(value))}: {needed} is needed"


def _is_filter(value: Mapping[str, Any]) -> bool:
    steps = value.get("filter")
    named = isinstance(value.get("name"), str) and value["name"] and isinstance(steps, list)
    return bool(named) and all(
        isinstance(step, Mapping) and isinstance(step.get("function"), str) for step in steps or ()
    )


def _check(file: TaskFile) -> None:
    """Raises StudyError for what no data could mend."""
    config, block = file.config, metadata_of(file.config).get("training")

    def refuse(why: str) -> NoReturn:
        raise StudyError(f"task '{file.name}' ({file.path.name}) {why}")

    if not isinstance(config.get("task"), str) or not config["task"].isprintable() or not config["task"].strip():
        refuse("has no name: write `task: NAME` into it")
    if not is_shipped(file):
        for part in filter(None, (config, block if isinstance(block, Mapping) else None)):
            if wrong := next(_of_another_kind(part), ""):
                refuse(wrong)
    if "class" in config:
        refuse("is written as a Python class: a search needs a YAML task with doc_to_text and doc_to_target")
    if block is not None and not (isinstance(block, Mapping) and block.get("training_split")):
        refuse("has a `training:` block that names no training_split")
    if block is None and not config.get("training_split"):
        refuse("has no training split: set training_split in a task file of your own, or choose another task")
    if not (config.get("test_split") or config.get("validation_split")):
        refuse("has neither test nor validation split: set test_split in its task file")
    training = training_config(config) or config
    same_data = all(training.get(key) == config.get(key) for key in ("dataset_path", *OF_THE_DATA))
    if same_data and file.evaluation_split == training["training_split"]:
        refuse(
            f"would be evaluated on what it is trained on ('{file.evaluation_split}'): set test_split to another split"
        )
    if (again := _named_twice(file)) is not None:
        refuse(f"names the data file '{again[1]}' twice for split '{again[0]}': its rows would count twice")
    if same_data and (file_twice := _counted_file_that_is_trained(file, training)):
        refuse(f"would be evaluated on what it is trained on: the file '{file_twice}' is named for both splits")
    output_type = config.get("output_type", "generate_until")  # as lm-eval has it
    if output_type == "loglikelihood_rolling":
        refuse("measures perplexity: a search needs multiple_choice, generate_until or loglikelihood")
    if output_type not in _OUTPUT_TYPES:
        raise unknown(f"output_type of task '{file.name}' ({file.path.name})", str(output_type), _OUTPUT_TYPES)
    for key in ("doc_to_text", "doc_to_target", *(["doc_to_choice"] if output_type == "multiple_choice" else [])):
        if config.get(key) is None and not config.get("use_prompt"):
            refuse(f"has no {key}: say how a row becomes a question with its right answer")
    if config.get("unsafe_code"):
        refuse("runs code that a model has written: that is not supported")
    if config.get("doc_to_image") or config.get("doc_to_audio"):
        refuse("needs images or sound: only text models are searched")
