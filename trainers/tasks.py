"""Tasks are lm-evaluation-harness tasks: one definition of prompts, splits and metric for training and evaluation.

    task=shift                      an embedded one (trainers/embedded/tasks/NAME.yaml)
    task=arc_easy                   any YAML task of lm-evaluation-harness, by name
    task=my/questions.yaml          a task file of your own

A task file over local questions, one JSON object a line with the fields question, choices (a list) and label (the
index of the right choice):

    task: questions
    dataset_path: json
    dataset_kwargs:
      data_files: {train: train.jsonl, test: $DATA/test.jsonl}     # relative to this file; $VARIABLES and ~ work
    training_split: train                                          # needed: what the adapters are trained on
    test_split: test                                               # or validation_split: what accuracy is counted on
    output_type: multiple_choice                                   # or generate_until, loglikelihood
    doc_to_text: "Question: {{question}}\\nAnswer:"
    doc_to_choice: "{{choices}}"
    doc_to_target: label
    metric_list:
      - {metric: acc, aggregation: mean, higher_is_better: true}
    metadata:
      recipe: {steps: 200, learning_rate: 0.001}                   # optional: recipe settings that suit the task

Training rows are the task's own requests with the right answer filled in, tokenised as the evaluation tokenises them,
without few-shot examples; `generate_until` rows end with the eos token (or the first `until` string) so that a model
learns to stop. Evaluation runs through lm-eval's own model class on the resident model and is equal, document by
document, to `lm_eval.simple_evaluate` on the same weights.

"Accuracy" is the first metric in the task's metric_list that is a mean over documents and better when higher (`acc`
for arc_easy), after the task's first filter; `load_task(metric=...)` names another one (`acc_norm`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import logging
import os
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from allocators.core.errors import StudyError, did_you_mean, unknown

EMBEDDED: dict[str, Path] = {
    file.stem: file for file in sorted((Path(__file__).parent / "embedded" / "tasks").glob("*.yaml"))
}

# Data set "paths" that are file formats; anything else is a folder or an id on the hub.
_FORMATS = ("arrow", "csv", "json", "parquet", "text")

# What prompts and scores depend on besides the documents.
_HASHED = (
    "output_type",
    "doc_to_text",
    "doc_to_target",
    "doc_to_choice",
    "process_results",
    "description",
    "gen_prefix",
    "target_delimiter",
    "fewshot_delimiter",
    "num_fewshot",
    "metric_list",
    "generation_kwargs",
    "filter_list",
    "repeats",
)

_FEWSHOT_SEED = 1234  # lm-eval's own default: the same examples as its command line draws


@dataclass(frozen=True)
class Row:
    """One training sequence. Tokens from `labels_start` on are the completion, the others carry no loss."""

    input_ids: list[int]
    labels_start: int

    @property
    def completion_tokens(self) -> int:
        return len(self.input_ids) - self.labels_start


@dataclass(frozen=True)
class Evaluation:
    """accuracy and its standard error over documents, the score of every document in order, the metric's name."""

    accuracy: float
    stderr: float
    correct: tuple[float, ...]
    metric: str
    seconds: float


@dataclass(frozen=True)
class TaskFile:
    """A task's YAML as written, its functions not imported."""

    name: str
    path: Path
    config: Mapping[str, Any]

    @property
    def recipe(self) -> dict[str, Any]:
        """Recipe settings that the file suggests (`metadata: recipe:`)."""
        return dict((self.config.get("metadata") or {}).get("recipe") or {})

    @property
    def evaluation_split(self) -> str:
        return self.config.get("test_split") or self.config["validation_split"]


def check_task(name: str) -> TaskFile:
    """Finds a task and checks what can be known without loading data or model, in a fraction of a second.

    Raises StudyError for an unknown task, a task without training or evaluation split, one that this search cannot
    score, missing local files, and a data set that is neither cached nor reachable.
    """
    path = _find(name)
    config = _read_yaml(path)
    file = TaskFile(name, path, config)

    def refuse(why: str) -> None:
        raise StudyError(f"task '{name}' ({path.name}) {why}")

    if not isinstance(config.get("task"), str):
        refuse("is a group of tasks: name one of its members")
    if "class" in config:
        refuse("is written as a Python class: a search needs a YAML task with doc_to_text and doc_to_target")
    if not config.get("training_split"):
        refuse("has no training split: set training_split in a task file of your own, or choose another task")
    if not (config.get("test_split") or config.get("validation_split")):
        refuse("has neither test nor validation split: set test_split in its task file")
    if file.evaluation_split == config["training_split"]:
        refuse(
            f"would be evaluated on what it is trained on ('{file.evaluation_split}'): set test_split to another split"
        )
    if config.get("output_type") == "loglikelihood_rolling":
        refuse("measures perplexity: a search needs multiple_choice, generate_until or loglikelihood")
    if config.get("unsafe_code"):
        refuse("runs code that a model has written: that is not supported")
    if config.get("doc_to_image") or config.get("doc_to_audio"):
        refuse("needs images or sound: only text models are searched")
    data = _located_data(config, path.parent)
    _check_files(file, data)
    _check_reachable(file, data)
    return file


def load_task(
    name: str,
    *,
    limit: int | None = None,
    training_limit: int | None = None,
    metric: str | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> Task:
    """Loads a task's documents; no model is needed.

    limit            evaluate the first so many documents (as `lm_eval --limit`); None: all
    training_limit   train on so many documents, drawn with `seed`; None: all
    metric           what accuracy is, e.g. `acc_norm` or `exact_match,flexible-extract`; None: see the file's head
    batch_size       sequences per forward pass of an evaluation

    Raises StudyError as `check_task` does, and where the task file does not fit its data.
    """
    file = check_task(name)
    try:
        with _quiet():
            from lm_eval.tasks import TaskManager
            from lm_eval.tasks._yaml_loader import load_yaml

            config = load_yaml(file.path)
            config.update(_located_data(config, file.path.parent))
            loaded = TaskManager(include_defaults=False).load([config])["tasks"]
    except Exception as error:  # lm-eval ran the user's file: whatever it raises says what is wrong with that file
        raise StudyError(f"task '{name}' ({file.path.name}) cannot be built: {_one_line(error)}") from error
    (task,) = loaded.values()
    return Task(
        file,
        task,
        limit=limit or None,
        training_limit=training_limit or None,
        metric=metric,
        batch_size=batch_size,
        seed=seed,
    )


class Task:
    """Documents, training rows and evaluation of one lm-eval task."""

    has_training = True  # check_task lets no other pass

    def __init__(
        self,
        file: TaskFile,
        task: Any,
        *,
        limit: int | None,
        training_limit: int | None,
        metric: str | None,
        batch_size: int,
        seed: int,
    ) -> None:
        self.file = file
        self.name = file.name
        self.limit = limit
        self.batch_size = batch_size
        self._task = task
        if task.config.num_fewshot is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(_FEWSHOT_SEED)
        self._metric, self._filter = _accuracy_metric(self.name, task, metric)
        documents = list(task.training_docs())
        if training_limit and training_limit < len(documents):
            chosen = sorted(random.Random(seed).sample(range(len(documents)), training_limit))
            documents = [documents[i] for i in chosen]
        if not documents:
            raise StudyError(f"the training split of task '{self.name}' is empty")
        self._training = documents
        self._rows: dict[tuple[int, int], list[Row]] = {}
        self._prepared: _Prepared | None = None
        self._lm: Any = None

    @property
    def metric(self) -> str:
        """Name of the accuracy, with its filter where the task has named ones: `acc`, `exact_match,strict-match`."""
        return self._metric if self._filter == "none" else f"{self._metric},{self._filter}"

    @functools.cached_property
    def data_hash(self) -> str:
        """16 hex digits over the training and evaluation documents and everything that turns them into prompts."""
        evaluation = list(self._task.eval_docs)[: self.limit]
        config = self._task.dump_config()
        value = {
            "config": {key: config.get(key) for key in _HASHED},
            "training": self._training,
            "evaluation": evaluation,
        }
        text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=_stable_text)
        return sha256(text.encode()).hexdigest()[:16]

    @property
    def num_training(self) -> int:
        return len(self._training)

    @property
    def num_evaluation(self) -> int:
        total = len(self._task.eval_docs)
        return min(total, self.limit) if self.limit else total

    # --- training -------------------------------------------------------------------------------------------------

    def training_rows(self, tokenizer: Any, max_length: int) -> list[Row]:
        """Every training document as tokens, in the order of the split. Long rows lose their beginning.

        Raises StudyError naming a document whose right answer is not among its choices.
        """
        key = (id(tokenizer), max_length)
        if key not in self._rows:
            self._rows[key] = self._rows_of(range(len(self._training)), tokenizer, max_length)
        return self._rows[key]

    def prompts(self, tokenizer: Any, samples: int, seed: int, *, max_length: int = 512) -> list[list[int]]:
        """Tokens (prompt and completion) of `samples` training documents drawn with `seed`, for calibration."""
        count = min(samples, len(self._training))
        chosen = random.Random(seed).sample(range(len(self._training)), count)
        return [row.input_ids for row in self._rows_of(chosen, tokenizer, max_length)]

    def _rows_of(self, indices: Sequence[int], tokenizer: Any, max_length: int) -> list[Row]:
        pairs = [self._training_pair(i) for i in indices]
        stop = self._stop_ids(tokenizer)
        rows = []
        for context, completion in _tokenise(tokenizer, pairs, self.batch_size):
            ids = [*context, *completion, *stop]
            dropped = max(0, len(ids) - max_length)
            # The first token has nothing before it that could predict it.
            rows.append(Row(ids[dropped:], max(1, len(context) - dropped)))
        return rows

    def _training_pair(self, index: int) -> tuple[str, str]:
        """Prompt and completion of a training document: the request of its right answer."""
        task, doc = self._task, self._training[index]
        context = task.fewshot_context(doc, num_fewshot=0, gen_prefix=task.doc_to_prefix(doc))
        if task.OUTPUT_TYPE == "generate_until":
            target = task.doc_to_target(doc)
            if task.config.doc_to_choice is not None and isinstance(target, int):
                target = task.doc_to_choice(doc)[target]
            target = target[0] if isinstance(target, list) else str(target)
            return context, f"{task.config.target_delimiter}{target}"
        requests = task.construct_requests(doc=doc, ctx=context, metadata=(self.name, index, 1))
        if not isinstance(requests, list):
            return requests.args[:2]
        gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        gold = gold[0] if isinstance(gold, list) else gold
        choices = task.doc_to_choice(doc)
        if isinstance(gold, str) and gold in choices:
            gold = choices.index(gold)
        if not isinstance(gold, int) or not 0 <= gold < len(choices):
            raise StudyError(
                f"training document {index} of task '{self.name}' has the answer {gold!r}, which is none of its "
                f"{len(choices)} choices: correct the document or doc_to_target"
            )
        return requests[gold].args[:2]

    def _stop_ids(self, tokenizer: Any) -> list[int]:
        if self._task.OUTPUT_TYPE != "generate_until":
            return []
        if tokenizer.eos_token_id is not None:
            return [tokenizer.eos_token_id]
        until = self._task.config.generation_kwargs["until"]
        return tokenizer.encode(until if isinstance(until, str) else until[0], add_special_tokens=False)

    # --- evaluation -----------------------------------------------------------------------------------------------

    def prepare(self, tokenizer: Any, *, rank: int = 0, world_size: int = 1) -> None:
        """Builds and tokenises this worker's share of the evaluation requests; a second call changes nothing."""
        if self._prepared is not None and self._prepared.fits(tokenizer, rank, world_size):
            return
        # All requests on every worker, then a share of them: the examples of few-shot prompts are drawn in sequence.
        self._task.set_fewshot_seed(_FEWSHOT_SEED)
        with _quiet(), contextlib.redirect_stderr(io.StringIO()):  # no argument turns this progress bar off
            self._task.build_all_requests(limit=self.limit)
        instances = [instance for instance in self._task.instances if instance.doc_id % world_size == rank]
        # As lm-eval does: a request is asked as often as the task repeats it.
        asked = [instance for instance in instances for _ in range(instance.repeats)]
        tokens = None
        if self._task.OUTPUT_TYPE != "generate_until":
            pairs = [instance.args[:2] for instance in asked]
            encoded = _tokenise(tokenizer, pairs, self.batch_size)
            tokens = [(pair, *ids) for pair, ids in zip(pairs, encoded, strict=True)]
        documents: dict[int, list[Any]] = {}
        for instance in instances:
            documents.setdefault(instance.doc_id, []).append(instance)
        self._prepared = _Prepared(tokenizer, rank, world_size, asked, tokens, documents)

    def evaluate(self, model: Any) -> Evaluation:
        """Accuracy of the model as it is now, adapter included. Call `prepare` first.

        With several workers each answers its share; every one of them returns the whole result, and an out-of-memory
        error on one is raised on all.
        """
        import torch
        from lm_eval.api.metrics import mean_stderr

        began = time.perf_counter()
        prepared = self._prepared
        assert prepared is not None, "prepare(tokenizer) comes before evaluate(model)"
        scores: dict[int, float] = {}
        failure: torch.OutOfMemoryError | None = None
        was_training = model.training
        try:
            with _quiet(), torch.no_grad():
                scores = self._scores(self._lm_around(model, prepared.tokenizer), prepared)
        except torch.OutOfMemoryError as error:
            failure = error
        finally:
            model.train(was_training)
        if prepared.world_size > 1:
            scores, failed = _gathered(scores, self.num_evaluation, failure is not None, model.device)
            if failed and failure is None:
                failure = torch.OutOfMemoryError("another worker ran out of memory during the evaluation")
        if failure is not None:
            raise failure
        correct = tuple(scores[i] for i in sorted(scores))
        return Evaluation(
            accuracy=float(self._task.aggregation()[self._metric](correct)),
            stderr=float(mean_stderr(correct)) if len(correct) > 1 else 0.0,
            correct=correct,
            metric=self.metric,
            seconds=time.perf_counter() - began,
        )

    def _lm_around(self, model: Any, tokenizer: Any) -> Any:
        """lm-eval's own model class around the resident model; kept, as its constructor ties weights anew."""
        from lm_eval.models.huggingface import HFLM

        if self._lm is None or self._lm.model is not model:
            self._lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=self.batch_size)
        model.eval()
        return self._lm

    def _scores(self, lm: Any, prepared: _Prepared) -> dict[int, float]:
        """The metric of every document of this worker's share (a task may leave documents out)."""
        if not prepared.asked:
            return {}
        if prepared.tokens is None:
            answers = lm.generate_until(prepared.asked, disable_tqdm=True)
        else:
            answers = lm._loglikelihood_tokens(prepared.tokens, disable_tqdm=True)
        for instance in prepared.asked:
            instance.resps, instance.filtered_resps = [], {}
        for instance, answer in zip(prepared.asked, answers, strict=True):
            instance.resps.append(answer)
        instances = [instance for share in prepared.documents.values() for instance in share]
        for ensemble in self._task._filters:
            ensemble.apply(instances)
        scores = {}
        for doc_id, instances in prepared.documents.items():
            responses = [instance.filtered_resps[self._filter] for instance in instances]
            metrics = self._task.process_results(instances[0].doc, responses)
            if self._metric in metrics:
                scores[doc_id] = float(metrics[self._metric])
        return scores


@dataclass(frozen=True)
class _Prepared:
    """One worker's share of the evaluation. `tokens` is None where text is generated."""

    tokenizer: Any
    rank: int
    world_size: int
    asked: list[Any]
    tokens: list[tuple[tuple[str, str], list[int], list[int]]] | None
    documents: dict[int, list[Any]]

    def fits(self, tokenizer: Any, rank: int, world_size: int) -> bool:
        return self.tokenizer is tokenizer and (self.rank, self.world_size) == (rank, world_size)


def _gathered(scores: dict[int, float], total: int, failed: bool, device: Any) -> tuple[dict[int, float], bool]:
    """Scores of all workers, and whether any of them failed: one sum over a table [value, known] per document."""
    import torch
    import torch.distributed as dist

    table = torch.zeros(2, total + 1, dtype=torch.float64)
    for doc_id, score in scores.items():
        table[0, doc_id], table[1, doc_id] = score, 1.0
    table[0, total] = float(failed)
    table = table.to(device)
    dist.all_reduce(table)
    values, known = table.tolist()
    return {i: values[i] for i in range(total) if known[i]}, values[total] > 0


def _tokenise(tokenizer: Any, pairs: Sequence[tuple[str, str]], batch_size: int) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) as lm-eval splits them into tokens, its treatment of spaces and BOS included."""
    with _quiet():
        from lm_eval.models.huggingface import HFLM

        class Tokeniser(HFLM):
            """Hands back the tokens that it should have scored."""

            def _loglikelihood_tokens(self, requests: Any, **_: Any) -> Any:
                return requests

        model = SimpleNamespace(device="cpu", config=SimpleNamespace())
        lm = Tokeniser(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        requests = lm.loglikelihood([SimpleNamespace(args=pair) for pair in pairs], disable_tqdm=True)
    return [(context, continuation) for _, context, continuation in requests]


def _accuracy_metric(name: str, task: Any, asked: str | None) -> tuple[str, str]:
    """Which metric is the accuracy, and after which filter."""
    from lm_eval.api.metrics import mean

    filters = [f.name for f in task._filters]
    higher = task.higher_is_better()
    metrics = [m for m, aggregate in task.aggregation().items() if aggregate is mean and higher.get(m)]
    if not metrics:
        raise StudyError(
            f"task '{name}' has no accuracy: none of its metrics ({', '.join(task.aggregation())}) is a mean over "
            "documents that is better when higher; name one in the metric_list of a task file"
        )
    metric, _, chosen = (asked or metrics[0]).partition(",")
    chosen = chosen or filters[0]
    if metric not in metrics or chosen not in filters:
        possible = [m if f == "none" else f"{m},{f}" for m in metrics for f in filters]
        raise unknown(f"accuracy of task '{name}':", str(asked), possible)
    return metric, chosen


# --- finding a task and its data ----------------------------------------------------------------------------------


def _find(name: str) -> Path:
    if name in EMBEDDED:
        return EMBEDDED[name]
    if name.endswith((".yaml", ".yml")):
        path = Path(os.path.expandvars(name)).expanduser()
        if not path.is_file():
            raise StudyError(f"task file '{name}' does not exist: give the path of a YAML file or the name of a task")
        return path.resolve()
    found = _harness_file(name)
    if found is None:
        tasks, groups = _harness_index()
        if name in groups:
            raise StudyError(f"task '{name}' ({groups[name].name}) is a group of tasks: name one of its members")
        raise StudyError(
            f"unknown task '{name}': choose an embedded one ({', '.join(EMBEDDED) or 'none'}), the path of a task "
            f"YAML, or one of the {len(tasks):,} of lm-evaluation-harness{did_you_mean(name, [*EMBEDDED, *tasks])}"
        )
    return found


def _harness_folder() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise StudyError("the package lm-eval is not installed: pip install lm-eval")
    return Path(spec.submodule_search_locations[0]) / "tasks"


_TASK_LINE = re.compile(rb"""^["']?task["']?:[ \t]*["']?([^\s"'#]+)["']?[ \t]*\r?$""", re.MULTILINE)
_GROUP_LINE = re.compile(rb"""^["']?group["']?:[ \t]*["']?([^\s"'#]+)["']?[ \t]*\r?$""", re.MULTILINE)


def _harness_file(name: str) -> Path | None:
    """Most tasks lie in a file of their name; reading all 14,000 files takes seconds, so those are tried first."""
    if re.fullmatch(r"[\w.+-]+", name):
        for path in sorted(_harness_folder().rglob(f"{name}.yaml")):
            match = _TASK_LINE.search(path.read_bytes())
            if match and match.group(1).decode() == name:
                return path
    return _harness_index()[0].get(name)


@functools.cache
def _harness_index() -> tuple[dict[str, Path], dict[str, Path]]:
    """Tasks and groups of lm-eval by name. Found line by line: its own index parses 14,000 files, for 5 s and more."""
    tasks: dict[str, Path] = {}
    groups: dict[str, Path] = {}
    for path in sorted(_harness_folder().rglob("*.yaml"), key=Path.as_posix):
        text = path.read_bytes()
        for pattern, found in ((_TASK_LINE, tasks), (_GROUP_LINE, groups)):
            if match := pattern.search(text):
                found.setdefault(match.group(1).decode(), path)
    return tasks, groups


class _Loader(yaml.SafeLoader):
    """Reads task files without importing the functions they name."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


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


def _located_data(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
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


def _check_files(file: TaskFile, data: Mapping[str, Any]) -> None:
    files = data["dataset_kwargs"].get("data_files", []) if data["dataset_path"] in _FORMATS else []
    for path in _flat(files):
        if "://" not in path and not any(c in path for c in "*?[") and not Path(path).is_file():
            raise StudyError(
                f"task '{file.name}' ({file.path.name}) needs the data file '{path}', which does not exist: correct "
                "data_files (paths are relative to the task file) or set the variable it names"
            )


def _flat(value: Any) -> Iterator[str]:
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _flat(item)
    else:
        yield value


def _check_reachable(file: TaskFile, data: Mapping[str, Any]) -> None:
    """One request to the hub, for a data set that is not cached: without a network `datasets` retries for 23 s."""
    path = data["dataset_path"]
    if not isinstance(path, str) or path in _FORMATS or Path(path).is_dir():
        return
    import huggingface_hub
    from huggingface_hub import constants, errors

    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    if (cache / path.replace("/", "___")).is_dir():
        return
    try:
        huggingface_hub.HfApi().dataset_info(path, timeout=10)
        return
    except errors.RepositoryNotFoundError:
        reason = "which the hub does not have, or not without a login"
    except (OSError, errors.HTTPError):
        reason = "which is not in the local cache, and the hub cannot be reached"
    name = file.config.get("dataset_name")
    call = f"load_dataset({', '.join(repr(part) for part in (path, name) if part)})"
    raise StudyError(
        f"task '{file.name}' needs the data set '{path}', {reason}: where there is a network, run "
        f'`python -c "from datasets import load_dataset; {call}"`, or choose a task file over local data'
    )


# --- small things -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval logs and datasets draws progress bars, which would end up in the live table."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, not are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            enable_progress_bars()


def _stable_text(value: Any) -> str:
    """For the data hash: text that does not hold a memory address."""
    return value.__qualname__ if callable(value) else str(value)


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
