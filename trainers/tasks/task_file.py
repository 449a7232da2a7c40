"""A task's YAML file as it is written: its keys with includes merged, its functions not imported.

    config = read_yaml(Path("my/questions.yaml"))
    file = TaskFile("my/questions.yaml", path, config)
    training_config(file.config)                    # what the rows come from where it is other data, else None

How files look is said in trainers/tasks/. Neither torch nor lm-eval nor datasets is imported.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from allocators.core.errors import StudyError, shown, text_of

LARGEST = 1 << 20  # bytes of a task file
MOST_VALUES = 100_000  # in a task file

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

# What another data set does not inherit from a task.
OF_THE_DATA = ("dataset_name", "dataset_kwargs", "process_docs", "custom_dataset")


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
        return dict(metadata_of(self.config).get("recipe") or {})

    @property
    def evaluation_split(self) -> str:
        """The test split, or the validation split where the file names no other."""
        split: str = self.config.get("test_split") or self.config["validation_split"]
        return split

    @property
    def names_validation_split(self) -> bool:
        """Whether there is a validation split beside the test split, as far as names say."""
        test, validation = self.config.get("test_split"), self.config.get("validation_split")
        return bool(test and validation) and test != validation

    @property
    def names_training_split(self) -> bool:
        """Whether the task has a training split of its own that is not the one it is tested on."""
        return self.config.get("training_split") not in (None, "", self.evaluation_split)


def nothing_to_select_on(file: TaskFile) -> StudyError:
    """Of a task whose only questions are those of its test split."""
    return StudyError(
        f"task '{file.name}' ({file.path.name}) has no questions to select on besides those that it is tested on: name "
        "a validation_split beside test_split in its task file, or a training_split with questions of the same form, "
        "or select_on=test (as the papers do: the search then sees the test questions)"
    )


def training_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The task that training rows come from where `metadata: training:` names another data set, else None.

    What the block does not say is as in the task itself, except what belongs to a data set where it names another one.
    """
    block = metadata_of(config).get("training")
    if block is None:
        return None
    skipped = OF_THE_DATA if "dataset_path" in block else ()
    return {key: value for key, value in config.items() if key not in skipped} | dict(block)


def training_key(file: TaskFile) -> str:
    """Equal for tasks that train on the same rows."""
    other = training_config(file.config)
    if other is None:
        return f"{file.path} {sorted(file.changes.items())}"
    keys = ("dataset_path", *OF_THE_DATA, "training_split", *PROMPT)
    # A block's files and functions are found from the folder of its file.
    return f"{file.path.parent} { {key: other.get(key) for key in keys} }"


def code_of(config: Any) -> Iterator[Path]:
    """The files, or modules, whose functions a config names, wherever in it."""
    if isinstance(config, FunctionName):
        yield config.code
    elif isinstance(config, Mapping | list):
        for part in config.values() if isinstance(config, Mapping) else config:
            yield from code_of(part)


def metadata_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Empty where the file has no metadata, or no mapping as such."""
    metadata = config.get("metadata")
    return metadata if isinstance(metadata, Mapping) else {}


class FunctionName(str):
    """The name of a function that a task file refers to, and the file that has it."""

    code: Path

    @classmethod
    def of(cls, name: str, folder: Path) -> FunctionName:
        """As lm-eval finds it: in a file beside the task file, else in an installed module."""
        made = cls(name)
        module = name.rpartition(".")[0]
        beside = folder / f"{module.replace('.', '/')}.py"
        made.code = beside if beside.is_file() else Path(module)
        return made


class _Loader(yaml.SafeLoader):
    """Reads task files without importing the functions they name.

    A key that is there twice is refused: of two values the last would count, in silence. Files that come with lm-eval
    stay as lm-eval reads them.
    """

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._read: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if id(node) in self._read:  # what is merged into others has their keys beside its own by now
            return
        self._read.add(id(node))
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if (twice := [name for name in names if names.count(name) > 1]) and "lm_eval" not in Path(self.name).parts:
            lines = [key.start_mark.line + 1 for key, _ in node.value if key.value == twice[0]]
            raise yaml.YAMLError(f"{shown(twice[0])} is given twice, in lines {lines[0]} and {lines[1]}")
        super().flatten_mapping(node)


_Loader.add_constructor(
    "!function", lambda loader, node: FunctionName.of(loader.construct_scalar(node), Path(loader.name).parent)
)


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A task file with its `include`s, local keys winning, as lm-eval merges them."""
    path = path.resolve()
    try:
        if path.stat().st_size > LARGEST or not path.is_file():
            raise StudyError(f"task file '{path}' is no file of keys: it is larger than {LARGEST >> 20} MiB, or a pipe")
        with path.open(encoding="utf-8") as stream:
            config = yaml.load(stream, Loader=_Loader)  # noqa: S506 - a SafeLoader: plain values only
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no date
        raise StudyError(f"task file '{path}' cannot be read: {one_line(error)}") from error
    if not isinstance(config, dict) or path in seen:
        raise StudyError(f"task file '{path}' must hold keys and values and must not include itself")
    if strange := [key for key in config if not isinstance(key, str)]:
        raise StudyError(f"task file '{path}' has the key {shown(repr(strange[0]))}, which is no name")
    if _unfolds(config):
        raise StudyError(f"task file '{path}' unfolds to more than {MOST_VALUES:,} values, or holds itself (&, *)")
    includes = config.pop("include", [])
    merged: dict[str, Any] = {}
    for include in includes if isinstance(includes, list) else [includes]:
        if not isinstance(include, str):
            raise StudyError(f"task file '{path}' includes {shown(repr(include))}: name a file, or a list of files")
        merged.update(read_yaml(path.parent / include, (*seen, path)))
    merged.update(config)
    for key, value in {"dataset_kwargs": merged.get("dataset_kwargs"), "metadata": merged.get("metadata")}.items():
        _names_and_values(path, key, value)
    _names_and_values(path, "metadata: recipe", metadata_of(merged).get("recipe"))
    return merged


def _unfolds(value: Any) -> bool:
    """Whether there are too many values in a value, where each counts as often as it is referred to."""
    left, waiting = MOST_VALUES, [value]
    while waiting and left:
        left -= 1
        part = waiting.pop()
        if isinstance(part, Mapping | list):
            waiting += part.values() if isinstance(part, Mapping) else part
    return not left


def _names_and_values(path: Path, key: str, value: Any) -> None:
    if value is not None and not (isinstance(value, Mapping) and all(isinstance(name, str) for name in value)):
        raise StudyError(f"task file '{path}': {key} must hold names and values, got {shown(repr(value))}")


def one_line(error: BaseException, folder: Path | None = None) -> str:
    """Type and first line of what an error came from first, and where in a file of that folder it was raised."""
    while error.__cause__ is not None and not (isinstance(error, KeyError) and isinstance(error.__cause__, KeyError)):
        error = error.__cause__
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark is not None:
        return f"{type(error).__name__}: {error.problem} (line {error.problem_mark.line + 1})"
    lines = text_of(error).strip().splitlines()
    frames = traceback.extract_tb(error.__traceback__)
    of_user = [f for f in frames if folder is not None and Path(f.filename).parent == folder.resolve()]
    where = f" ({Path(of_user[-1].filename).name}, line {of_user[-1].lineno})" if of_user else ""
    return f"{type(error).__name__}: {lines[0] if lines else 'it gives no reason'}{where}"
