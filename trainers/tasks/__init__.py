"""Tasks are lm-evaluation-harness tasks: one definition of prompts, splits and metric for training and evaluation.

    task=shift                      an embedded one (trainers/embedded/tasks/NAME.yaml)
    task=arc_easy                   any YAML task of lm-evaluation-harness, by name
    task=my/questions.yaml          a task file of your own
    task=[arc_easy,openbookqa]      several: one mixture to train on, an accuracy each, and their mean
    task=commonsense8               a group: a file that lists tasks (trainers/embedded/benchmarks/)

A task file over local questions, one JSON object a line with the fields question, choices (a list) and label (the
index of the right choice):

    task: questions
    dataset_path: json
    dataset_kwargs:
      data_files: {train: train.jsonl, dev: dev.jsonl, test: $DATA/test.jsonl}     # relative to this file; $VARIABLES
                                                                   # and ~ work
    training_split: train                                          # needed: what the adapters are trained on
    validation_split: dev                                          # optional: what a search selects on
    test_split: test                                               # what the chosen adapters are tested on at the end
    output_type: multiple_choice                                   # or generate_until, loglikelihood
    doc_to_text: "Question: {{question}}\\nAnswer:"
    doc_to_choice: "{{choices}}"
    doc_to_target: label
    metric_list:
      - {metric: acc, aggregation: mean, higher_is_better: true}
    metadata:
      recipe: {steps: 200, learning_rate: 0.001}                   # optional: recipe settings that suit the task
      fetch: curl -O https://example.org/train.jsonl               # optional: said where a data file is missing
      training:                                                    # optional: train on other data than training_split,
        dataset_path: my/rationales                                # here with the keys that differ; training_split
        training_split: train                                      # above then gives few-shot and held-out examples
        doc_to_target: "{{rationale}}"

A group file, whose paths are relative to it; what is said of a member replaces what its file says:

    group: mine
    task:
      - arc_easy
      - {task: hellaswag, metric: acc_norm}                        # metric: which of its metrics is the accuracy
      - {task: gsm8k, num_fewshot: 0}
      - questions.yaml
    metadata: {recipe: {epochs: 3}}                                # of a list of tasks: the settings that all suggest

A search counts accuracy on one split, many times, and takes the best: what it counts on is not what it may report.

    test split        the task's test_split, else its validation_split: the one that lm-eval reports
    selection split   the task's validation_split where it has a test_split too; else a share `held_out` of the training
                      documents, at most as many as there are test questions. They are drawn with the seed of the study
                      and the same for each trial; none is trained on, or an example in a selection prompt
    select_on=test    the papers' protocol: both are the test split, nothing is held out

`evaluate` counts on the selection split, and `.test` is the same task counted on the test split. Splits that hold the
same documents are one. Where rows come from other data, documents are held out of the task's own training_split, and
rows that hold the question of one word for word are left out; rewritten questions cannot be told (splits.py). A task
that has neither a validation split beside its test split nor a training split of its own needs select_on=test.

A function of a task file (`!function`) or a draw in a template must give the same each time: every trial asks the same
questions. `process_docs` may draw: Python's, numpy's and torch's draws are seeded anew in every call.

Training rows are the task's own requests with the right answer filled in, tokenised as the evaluation tokenises them,
without few-shot examples; `generate_until` rows end with the eos token (or the first `until` string) so that a model
learns to stop. A mixture is all rows of all tasks, one after another, shuffled anew every epoch by the study's seed:
each task has the share that its size gives it, unless `training_limit` caps the large ones. Tasks that name the same
data to train on have it once.

Evaluation runs on the resident model and is equal, document by document, to `lm_eval.simple_evaluate` on the same
weights in fp32 (in bf16 up to rounding), with few-shot examples and chat template too: on the test split to that of the
task file as it is, on the selection split to that of a file whose test_split these documents are. As there,
`num_fewshot` does not change a task whose file says 0, and few-shot examples are turns of the conversation under a chat
template. Examples come from where the file says; held-out documents are no examples of each other.

"Accuracy" is the first metric in the task's metric_list that is a mean over documents and better when higher (`acc`
for arc_easy), after the task's first filter; `load_task(metric=...)` names another one (`acc_norm`). Of several tasks
it is the mean of theirs, each task counting the same, and its standard error √(Σ SE²)/K.

task_file.py index.py files.py             from names to task files, before anything is loaded
data/                                      where their data lie, and documents as the files have them
harness.py                                 every name of lm-eval that is touched
splits.py                                  which documents are selected on, and are not trained on
check/                                     what is wrong with documents, before anything is trained on them
rows.py task.py mixture.py                 training rows; one task; several (evaluation.py, scoring.py: their accuracy)

Importing this package loads neither torch nor transformers nor lm-eval: the command line answers its `help` with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from allocators.core import plugins
from allocators.core.errors import FAULTS, StudyError, unknown
from trainers.tasks import check, harness
from trainers.tasks.check import Limits, Looked, look
from trainers.tasks.data import located_data
from trainers.tasks.data.read import as_datasets, read
from trainers.tasks.evaluation import Evaluation
from trainers.tasks.files import BENCHMARKS, EMBEDDED, FEWSHOT_SEED, absolute, check_task, is_shipped
from trainers.tasks.harness import HarnessTask
from trainers.tasks.mixture import AnyTask, Mixture, sizes
from trainers.tasks.rows import Row, TrainingData
from trainers.tasks.splits import Selection, Splits, Unseen, repeats
from trainers.tasks.task import Task
from trainers.tasks.task_file import TaskFile, one_line, training_config, training_key

__all__ = [
    "BENCHMARKS",
    "EMBEDDED",
    "AnyTask",
    "Evaluation",
    "Limits",
    "Looked",
    "Mixture",
    "Row",
    "Task",
    "absolute",
    "check_task",
    "load_task",
    "look",
    "sizes",
]


def load_task(
    name: str,
    *,
    limit: int | None = None,
    training_limit: int | None = None,
    metric: str | None = None,
    num_fewshot: int | None = None,
    fewshot_seed: int = FEWSHOT_SEED,
    chat_template: bool = False,
    batch_size: int = 32,
    seed: int = 0,
    select_on: str = "validation",
    held_out: float = 0.1,
    split_seed: int = 0,
) -> AnyTask:
    """Loads the documents of one task or several; no model is needed.

    limit            evaluate the first so many documents of each split (as `lm_eval --limit`); None: all
    training_limit   train on at most so many documents of each data set, drawn with `seed`; None: all
    metric           what accuracy is, e.g. `acc_norm` or `exact_match,flexible-extract`; of several tasks those that
                     have it take it; None: see the file's head
    num_fewshot      examples before each question of an evaluation; None: as the task says
    chat_template    put prompts into the tokenizer's chat template, to train and to evaluate
    batch_size       sequences per forward pass of an evaluation
    select_on        what `evaluate` counts on, `.test` has the test split: "validation" or "test", see the file's head
    held_out         share of the training documents to select on where a task has no validation split
    split_seed       draws that share

    Raises StudyError as `check_task` does, where a task file does not fit its data, where nothing can be held out, and
    for a `held_out` that is no share.
    """
    splits = Splits(select_on=select_on, held_out=held_out, seed=split_seed, limit=limit or None)
    chosen = check_task(name, select_on=select_on)
    make_training = partial(
        TrainingData, limit=training_limit or None, seed=seed, chat_template=chat_template, batch_size=batch_size
    )
    make_task = partial(
        Task,
        limit=limit or None,
        metric=metric or None,
        num_fewshot=num_fewshot,
        fewshot_seed=fewshot_seed,
        chat_template=chat_template,
        batch_size=batch_size,
        strict=len(chosen.files) == 1,
    )
    parts = _parts([_built(file, splits) for file in chosen.files], make_training, make_task)
    if len(parts) == 1:
        return parts[0]
    if metric and not any(part.has_metric(metric) for part in parts):
        raise unknown(f"accuracy of the tasks in {name}:", metric, {m for part in parts for m in part.metrics})
    return Mixture(name, parts)


@dataclass(frozen=True)
class _Built:
    """task evaluates the test split; trained gives the training rows, `task` itself unless they are other data."""

    file: TaskFile
    task: HarnessTask
    trained: HarnessTask
    selection: Selection


def _parts(
    built: Sequence[_Built], make_training: Callable[..., TrainingData], make_task: Callable[..., Task]
) -> list[Task]:
    """A task of each file. Tasks that name the same data share them, and what one holds out none is trained on."""
    held_out = [one.selection.held_out for one in built if one.selection.held_out is not None]
    trainings: dict[str, TrainingData] = {}
    parts = []
    for one in built:
        key, selection = training_key(one.file), one.selection
        with _building(one.file):
            if key not in trainings:
                keep = Unseen.of(one.file, held_out).allows if held_out else None
                trainings[key] = make_training(one.file.name, one.trained, keep=keep)
            task = make_task(one.file, one.task, trainings[key])
            if selection.task is not one.task:
                task = make_task(one.file, selection.task, trainings[key], selection=selection, test=task)
        parts.append(task)
    return parts


def _built(file: TaskFile, splits: Splits) -> _Built:
    """lm-eval's tasks of a file."""
    folder = file.path.parent
    with _building(file), harness.quiet():
        config = {**harness.read_config(file.path), **file.changes}
        other = training_config(config)
        config |= located_data(config, folder)
        unused = ("validation_split",) if config.get("test_split") and splits.select_on == "test" else ()
        task = _over_its_data(file, config, unused)
        trained = task if other is None else _over_its_data(file, _only_trained(other, folder))
        made = (trained.training_docs, lambda: task.eval_docs)
        if config.get("process_docs") and not is_shipped(file) and not all(map(repeats, made)):
            raise StudyError(
                f"task '{file.name}' ({file.path.name}): process_docs makes other documents each time: a draw needs a "
                "fixed seed"
            )
        return _Built(file, task, trained, splits.selection(file, config, task, trained))


@contextlib.contextmanager
def _building(file: TaskFile) -> Iterator[None]:
    """Whatever the user's file makes lm-eval raise in the block is a StudyError with what is wrong with that file."""
    try:
        yield
    except StudyError:
        raise
    except FAULTS as error:
        if strange := sorted({*file.config} - {*harness.task_keys(), "include", "class"}):
            raise unknown(f"key of task '{file.name}' ({file.path.name})", strange[0], harness.task_keys()) from error
        reason = one_line(error, file.path.parent)
        raise StudyError(f"task '{file.name}' ({file.path.name}) cannot be built: {reason}") from error


def _only_trained(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The config of a `training:` block, made into that of a task. It evaluates nothing."""
    split = config["training_split"]
    return {
        **config,
        **located_data(config, folder),
        # lm-eval wants a split that it could count on
        **{"test_split": None, "validation_split": split, "fewshot_split": None, "num_fewshot": 0},
        **{"fewshot_config": {"samples": []}, "process_results": None},
    }


def _over_its_data(file: TaskFile, config: Mapping[str, Any], unused: Collection[str] = ()) -> HarnessTask:
    """Raises StudyError for a split that the data have not, and for a first document that makes no question."""
    if config.get("custom_dataset"):
        return harness.build(config)
    splits = read(config)
    few_shot = config.get("fewshot_config") or {}
    keys = {"training_split", "validation_split", "test_split", "fewshot_split"} - {*unused}
    for split in filter(None, (*(config.get(key) for key in sorted(keys)), few_shot.get("split"))):
        if splits and split not in splits:
            raise unknown(f"split of task '{file.name}' ({file.path.name})", split, map(str, splits))
    if config.get("process_docs") or few_shot.get("process_docs"):
        splits = as_datasets(splits)
    if unknown_metric := harness.unknown_metric(config):
        raise StudyError(f"task '{file.name}' ({file.path.name}) {unknown_metric}")
    makes = any(part.get("process_docs") for part in (config, few_shot))  # which may have much to do, and goes on
    try:
        with plugins.watched(None, f"building task '{file.name}' ({file.path.name})", ends=not makes):
            return harness.build(config, splits)
    except FAULTS as error:
        wrong = ""
        with contextlib.suppress(Exception):  # what is wrong with the task was raised above
            wrong = check.first_document(file, config, splits)
        raise (StudyError(wrong) if wrong else error) from None
