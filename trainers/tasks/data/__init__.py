"""The data that task files name: where it lies, and whether it is here, before anything is loaded.

    located_data(file.config, file.path.parent)      # dataset_path and dataset_kwargs with absolute paths
    check_data(files)                                # StudyError: one line with all that is missing and how to fetch it

read.py gives the documents themselves, with the text of local files as it is (parse.py), and imports `datasets`.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from allocators.core import words
from allocators.core.errors import StudyError, shown
from trainers.tasks.task_file import TaskFile, metadata_of, training_config

# Data set "paths" that are file formats; anything else is a folder or an id on the hub.
FORMATS = ("arrow", "csv", "json", "parquet", "text")

_UNREACHABLE = "not in the local cache, and the hub cannot be reached"


def located_data(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """`dataset_path` and `dataset_kwargs` with local files found from the task file's folder.

    `datasets` takes data_files and data_dir for patterns: what is there by this very name is escaped (`unescaped`).
    """
    path = config.get("dataset_path")
    kwargs = dict(config.get("dataset_kwargs") or {})
    if path in FORMATS:
        kwargs |= {key: _absolute(kwargs[key], folder) for key in ("data_files", "data_dir") if key in kwargs}
    elif isinstance(path, str) and _is_folder(folder / path):
        path = str(folder / path)
    return {"dataset_path": path, "dataset_kwargs": kwargs}


def _absolute(value: Any, folder: Path) -> Any:
    if isinstance(value, dict) and not any(isinstance(item, dict) for item in value.values()):
        return {key: _absolute(item, folder) for key, item in value.items()}
    if isinstance(value, list) and not any(isinstance(item, dict | list) for item in value):
        return [_absolute(item, folder) for item in value]
    if not isinstance(value, str) or not value:
        raise StudyError(f"data_files names {shown(repr(value))}: a path, or lists of paths by split, are needed")
    text = os.path.expandvars(value)
    if "://" in text:
        return text
    named = os.path.expanduser(text)
    place = words.path(os.path.join(folder, named), "data file")
    # else a pattern, in a folder that is none
    return glob.escape(str(place)) if place.exists() else str(Path(glob.escape(str(folder)), named))


def unescaped(path: str) -> str:
    """The name of a file or folder that `datasets` would take for a pattern, and that `located_data` has escaped."""
    return re.sub(r"\[([*?[])\]", r"\1", path)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # too long for a name
        return False


def check_data(files: Sequence[TaskFile]) -> None:
    """Raises StudyError with one line that names all that is missing and how to fetch it."""
    local: list[str] = []
    hub: dict[tuple[str, str], tuple[str, list[str]]] = {}  # (path, name of the subset) -> (reason, tasks)
    unreachable = ""  # without a network every further question would wait as long as the first one
    for file in files:
        for config in filter(None, (file.config, training_config(file.config))):
            data = located_data(config, file.path.parent)
            local += [line for line in _missing_files(file, data) if line not in local]
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
    files = data["dataset_kwargs"].get("data_files", []) if data["dataset_path"] in FORMATS else []
    fetch = metadata_of(file.config).get("fetch")
    for pattern in flat(files):
        path = unescaped(pattern)
        if "://" not in path and pattern == glob.escape(path) and not Path(path).is_file():
            lacks = "is no file" if os.path.exists(path) else "does not exist"
            yield f"task '{file.name}' ({file.path.name}) needs the data file '{path}', which {lacks}: " + (
                f"fetch it with `{fetch}`"
                if fetch
                else "correct data_files (paths are relative to the task file) or set the variable it names"
            )


def flat(value: Any) -> Iterator[str]:
    """The paths in `data_files`."""
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from flat(item)
    else:
        yield value


def _is_remote(path: Any) -> bool:
    return isinstance(path, str) and path not in FORMATS and not _is_folder(Path(path))


def _is_cached(path: str, name: str) -> bool:
    """Whether `datasets` has the data set (and of several subsets the one that is needed) on disk."""
    from huggingface_hub import constants

    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    folder = cache / path.replace("/", "___")
    return _is_folder(folder) and (not name or any(inside.name.startswith(name) for inside in folder.iterdir()))


def _missing_on_hub(path: str) -> str:
    """Why a data set cannot be had, "" where it can. One request: without a network `datasets` retries for 23 s."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        huggingface_hub.HfApi().dataset_info(path, timeout=10)
    except errors.RepositoryNotFoundError:
        return "not on the hub, or not without a login"
    except errors.HFValidationError:
        return "no folder here, and no name that a data set of the hub could have"
    except (OSError, errors.HTTPError):
        return _UNREACHABLE
    return ""
