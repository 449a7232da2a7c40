"""What a study's results depend on besides its settings, by content: base model, tokenizer, task files and their data.

    contents_of(config, cache=Path("studies/.contents.json"))
    # {"weights of tiny-moe": "9f0c…", "tokenizer of tiny-moe": …, "task shift": …, "task shift, data train.jsonl": …}

A study keeps the hashes in its header, and a rerun that finds another one is refused (`search/records/folder.py`): else
results of different data would stand in one front. What is not here yet, or lies behind a URL, has an empty hash and is
not compared; the workers say what they loaded, and `refuse_other_facts` compares that.

Large files are hashed once: their size, times and inode say whether they were touched since. Reads files; imports
neither torch nor `datasets`.
"""

from __future__ import annotations

import ast
import glob
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from allocators.core.errors import StudyError
from search.config import RunConfig
from search.records.files import read_bytes, write_atomically
from search.replay import file_of
from trainers import tasks
from trainers.models import base, hub, tokenizer
from trainers.tasks.data import FORMATS, located_data
from trainers.tasks.task_file import TaskFile, code_of, metadata_of, training_config

_SMALL = 1 << 20  # bytes: hashed each time
_SETTLED = 2_000_000_000  # ns: a file that was written so recently may change again within one tick of its clock
_OF_THE_FILE = ("fetch", "version")  # metadata of a task file that no result depends on


def contents_of(config: RunConfig, *, cache: Path) -> dict[str, str]:
    """Hashes of everything that the study reads, by what it is.

    cache   a file with the hashes of large files, which is written where it can be

    Raises StudyError where a file cannot be read.
    """
    hashes = _Hashes(cache)
    try:
        if config.replay:
            return {f"table {Path(config.replay).stem}": hashes.of(file_of(config.replay))}
        found = {**_model(config, hashes), **_tasks(config, hashes)}
    except OSError as error:
        raise StudyError(f"'{error.filename}' cannot be read: {error.strerror}") from None
    hashes.save()
    return found


def refuse_other_facts(folder: Path, known: Iterable[Mapping[str, str]], now: Mapping[str, str]) -> None:
    """Raises StudyError where trainings on record had another model or other documents than the workers have loaded.

    known   versions of these trainings; `now` those of the next
    """
    words = {"model": "the base model", "data": "the documents of the task", "test_data": "the test questions"}
    for versions in known:
        for key, what in words.items():
            if key in versions and key in now and versions[key] != now[key]:
                raise StudyError(
                    f"{what} changed since the trainings in {folder} ({versions[key]} -> {now[key]}): put back "
                    "what was there, or start another study with name=NEW"
                )


# --- the model


def _model(config: RunConfig, hashes: _Hashes) -> dict[str, str]:
    """Of a hub model its commit, of a folder its files by what they are for."""
    file, name = base.config_file(config.model), config.model
    if hub.is_cached(file):
        return {f"commit of {name}": file.parent.name}
    folder = file.parent
    text, template = _tokenizer(folder, hashes)
    found = {
        f"weights of {name}": hashes.of_all(base.matching(folder, ("*.safetensors", "*.safetensors.index.json"))),
        f"config.json of {name}": hashes.of_all(base.matching(folder, ("config.json", "generation_config.json"))),
        f"tokenizer of {name}": text,
        f"chat template of {name}": template,
    }
    if config.trust_remote_code:
        found[f"code of {name}"] = hashes.of_all(base.matching(folder, ("*.py",)))
    return found


def _tokenizer(folder: Path, hashes: _Hashes) -> tuple[str, str]:
    """Hashes of the tokenizer, and of its chat template, which may lie in the tokenizer's config or beside it."""
    files = base.matching(folder, tokenizer.FILES)
    settings: dict[str, Any] = {}
    config = folder / "tokenizer_config.json"
    try:
        settings = dict(json.loads(config.read_bytes()))
        files.remove(config)
    except (OSError, ValueError, TypeError):  # as it is, then
        pass
    template = settings.pop("chat_template", None)
    templates = hashes.of_all(base.matching(folder, tokenizer.TEMPLATES))
    return _joined([hashes.of_all(files), _text(settings)]), _joined([templates, _text(template)])


# --- tasks


def _tasks(config: RunConfig, hashes: _Hashes) -> dict[str, str]:
    chosen = tasks.check_task(config.task, select_on=config.select_on)
    found = {"recipe that the task suggests": _joined([_text(chosen.recipe)])}
    for file in chosen.files:
        found[f"task {file.label}"] = _joined([_text(_deciding(file))])
        for name, where in _code(file).items():
            found[f"task {file.label}, code {name}"] = hashes.of(where)
        for part in filter(None, (file.config, training_config(file.config))):
            for name, content in _data(part, file, hashes):
                found[f"task {file.label}, data {name}"] = content
    return found


def _deciding(file: TaskFile) -> dict[str, Any]:
    """What the file says, less what no result depends on."""
    metadata = {key: value for key, value in metadata_of(file.config).items() if key not in _OF_THE_FILE}
    return {**file.config, "metadata": metadata, "accuracy": file.metric}


def _text(value: Any) -> str:
    """JSON of what a file says; equal values have equal text."""
    return json.dumps(
        value, sort_keys=True, default=lambda item: dict(item) if isinstance(item, Mapping) else str(item)
    )


def _code(file: TaskFile) -> dict[str, Path]:
    """Modules that hold the functions of a task file, and those beside them that they import, by their path from it."""
    left = [code for code in code_of(file.config) if code.suffix == ".py"]
    found: dict[str, Path] = {}
    while left:
        module = Path(os.path.normpath(left.pop()))
        name = os.path.relpath(module, file.path.parent)
        if name not in found and module.is_file():
            found[name] = module
            left += _imported(module)
    return found


def _imported(module: Path) -> list[Path]:
    """Files that may be what a module imports; most of them do not exist."""
    try:
        tree = ast.parse(module.read_bytes())
    except (SyntaxError, ValueError, RecursionError):  # building the task will say so
        return []
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module or ''}.{alias.name}".strip(".") for alias in node.names}
    paths = [name.replace(".", "/") for name in names if name]
    paths += [f"{path.rpartition('/')[2]}" for path in paths]  # lm_eval.tasks.mmlu.utils lies beside the others too
    return [module.parent / f"{path}{end}" for path in paths for end in (".py", "/__init__.py")]


def _data(config: Mapping[str, Any], file: TaskFile, hashes: _Hashes) -> Iterator[tuple[str, str]]:
    """Name and hash of everything that `datasets` is told to read: files, folders, or a data set of the hub."""
    located = located_data(config, file.path.parent)
    path, kwargs = located["dataset_path"], located["dataset_kwargs"]
    if not isinstance(path, str):
        return
    if path in FORMATS:
        asked = dict(config.get("dataset_kwargs") or {})
        for key in ("data_files", "data_dir"):
            written, places = list(_flat(asked.get(key))), list(_flat(kwargs.get(key)))
            for name, place in zip(written, places, strict=True):
                yield name, _of_place(place, hashes)
    elif Path(path).is_dir():
        yield str(config["dataset_path"]), _of_place(path, hashes)
    else:
        yield path, _revision_of(path, str(config.get("dataset_name") or "default"))


def _flat(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _flat(item)
    elif value is not None:
        yield str(value)


def _of_place(place: str, hashes: _Hashes) -> str:
    """Of a file, a folder with all that is in it, or all files that a pattern matches; "" for a URL."""
    if "://" in place:
        return ""
    paths = [place] if os.path.exists(place) else glob.glob(place, recursive=True)
    files = [file for path in map(Path, paths) for file in (path.rglob("*") if path.is_dir() else [path])]
    return hashes.of_all(sorted(file for file in files if file.is_file()))


def _revision_of(path: str, subset: str) -> str:
    """Which version of a data set of the hub is in the cache of `datasets`: the latest, as there; "" if none."""
    from huggingface_hub import constants

    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    folder = cache / path.replace("/", "___")
    subsets = [*folder.glob(glob.escape(subset)), *folder.glob(f"{glob.escape(subset)}-*")]
    infos = [info for found in subsets for info in found.glob("*/*/dataset_info.json")]
    latest = max(infos, key=lambda info: info.stat().st_mtime_ns, default=None)
    return "" if latest is None else f"{latest.parent.parent.name}/{latest.parent.name}"


# --- hashes


def _joined(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


class _Hashes:
    """Hashes of files, kept by path, size, times and inode for those that are large."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._kept: dict[str, list[Any]] = {}
        self._changed = False
        try:
            kept = json.loads(read_bytes(cache.parent, cache.name))
            self._kept = {str(path): list(entry) for path, entry in dict(kept).items()}
        except (OSError, ValueError, TypeError, RecursionError, StudyError):  # none yet, or none of ours
            pass

    def of(self, file: Path) -> str:
        """Of one file; raises OSError where it cannot be read."""
        state = file.stat()
        mark = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
        path = str(file.absolute())
        known = self._kept.get(path)
        if known and known[:-1] == mark and isinstance(known[-1], str):
            return known[-1]
        began = time.time_ns()
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()[:32]
        if state.st_size > _SMALL and began - max(mark[1], mark[2]) > _SETTLED:
            self._kept[path], self._changed = [*mark, digest], True
        return digest

    def of_all(self, files: Iterable[Path]) -> str:
        """Of several files, their names included; "none" of none."""
        parts = [f"{file.name}\0{self.of(file)}" for file in files]
        return _joined(parts) if parts else "none"

    def save(self) -> None:
        """Keeps what was hashed; where that cannot be written, the files are hashed again."""
        if not self._changed:
            return
        try:
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._cache, json.dumps(self._kept))
        except OSError:
            pass
