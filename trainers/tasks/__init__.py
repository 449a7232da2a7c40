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
      fetch: curl -O https://example.org/train.jsonl               # optional: said where a data file is missing
      training:                                                    # optional: train on other data than training_split,
        dataset_path: my/rationales                                # here with the keys that differ; training_split
        training_split: train                                      # above then only gives the few-shot examples
        doc_to_target: "{{rationale}}"

A group file, whose paths are relative to it; what is said of a member replaces what its file says:

    group: mine
    task:
      - arc_easy
      - {task: hellaswag, metric: acc_norm}                        # metric: which of its metrics is the accuracy
      - {task: gsm8k, num_fewshot: 0}
      - questions.yaml
    metadata: {recipe: {epochs: 3}}                                # of a list of tasks: the settings that all suggest

Training rows are the task's own requests with the right answer filled in, tokenised as the evaluation tokenises them,
without few-shot examples; `generate_until` rows end with the eos token (or the first `until` string) so that a model
learns to stop. A mixture is all rows of all tasks, one after another, shuffled anew every epoch by the study's seed:
each task has the share that its size gives it, unless `training_limit` caps the large ones. Tasks that name the same
data to train on have it once.

Evaluation runs on the resident model and is equal, document by document, to `lm_eval.simple_evaluate` on the same
weights in fp32 (in bf16 up to rounding), with few-shot examples and chat template too. As there, `num_fewshot` does not
change a task whose file says 0, and few-shot examples are turns of the conversation under a chat template.

"Accuracy" is the first metric in the task's metric_list that is a mean over documents and better when higher (`acc`
for arc_easy), after the task's first filter; `load_task(metric=...)` names another one (`acc_norm`). Of several tasks
it is the mean of theirs, each task counting the same, and its standard error √(Σ SE²)/K.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from types import SimpleNamespace
from typing import Any

from allocators.core.errors import StudyError, unknown
from trainers.tasks.files import (
    BENCHMARKS,
    EMBEDDED,
    FEWSHOT_SEED,
    PROMPT,
    Chosen,
    TaskFile,
    _one_line,
    absolute,
    check_task,
    located_data,
    training_config,
    training_key,
)

__all__ = ["BENCHMARKS", "EMBEDDED", "AnyTask", "Mixture", "Row", "Task", "absolute", "check_task", "load_task"]

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

Messages = Callable[..., str]  # a conversation to the text of a prompt


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
    """accuracy and its standard error over documents, the score of every document in order, the metric's name.

    parts   evaluation of each task of a mixture, by its label; empty for a single task
    """

    accuracy: float
    stderr: float
    correct: tuple[float, ...]
    metric: str
    seconds: float
    parts: Mapping[str, Evaluation] = field(default_factory=dict)

    @property
    def by_task(self) -> dict[str, dict[str, float]]:
        """`{"arc_easy": {"accuracy": 0.41, "stderr": 0.01}}`, for records."""
        return {label: {"accuracy": part.accuracy, "stderr": part.stderr} for label, part in self.parts.items()}


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
) -> AnyTask:
    """Loads the documents of one task or several; no model is needed.

    limit            evaluate the first so many documents of each (as `lm_eval --limit`); None: all
    training_limit   train on at most so many documents of each data set, drawn with `seed`; None: all
    metric           what accuracy is, e.g. `acc_norm` or `exact_match,flexible-extract`; of several tasks those that
                     have it take it; None: see the file's head
    num_fewshot      examples before each question of an evaluation; None: as the task says
    chat_template    put prompts into the tokenizer's chat template, to train and to evaluate
    batch_size       sequences per forward pass of an evaluation

    Raises StudyError as `check_task` does, and where a task file does not fit its data.
    """
    chosen = check_task(name)
    trainings: dict[str, _Training] = {}
    parts: list[Task] = []
    for file in chosen.files:
        task, training = _built(file)
        key = training_key(file)
        if key not in trainings:
            trainings[key] = _Training(
                file.name,
                training or task,
                limit=training_limit or None,
                seed=seed,
                chat_template=chat_template,
                batch_size=batch_size,
            )
        parts.append(
            Task(
                file,
                task,
                trainings[key],
                limit=limit or None,
                metric=metric or None,
                num_fewshot=num_fewshot,
                fewshot_seed=fewshot_seed,
                chat_template=chat_template,
                batch_size=batch_size,
                strict=len(chosen.files) == 1,
            )
        )
    if len(parts) == 1:
        return parts[0]
    if metric and not any(part.has_metric(metric) for part in parts):
        raise unknown(f"accuracy of the tasks in {name}:", metric, {m for part in parts for m in part.metrics})
    return Mixture(chosen, parts)


def _built(file: TaskFile) -> tuple[Any, Any]:
    """lm-eval's task, and the one that gives the training rows where `metadata: training:` names another data set."""
    try:
        with _quiet():
            from lm_eval.tasks._yaml_loader import load_yaml

            config = {**load_yaml(file.path), **file.changes}
            other = training_config(config)
            if other is not None:
                split = other["training_split"]
                # It evaluates nothing, but lm-eval wants a split that it could count on.
                other |= {"test_split": None, "validation_split": split, "fewshot_split": None, "num_fewshot": 0}
                other |= {"fewshot_config": {"samples": []}, "process_results": None}
            return _by_lm_eval(config, file), _by_lm_eval(other, file) if other is not None else None
    except Exception as error:  # lm-eval ran the user's file: whatever it raises says what is wrong with that file
        raise StudyError(f"task '{file.name}' ({file.path.name}) cannot be built: {_one_line(error)}") from error


def _by_lm_eval(config: Mapping[str, Any], file: TaskFile) -> Any:
    from lm_eval.tasks import TaskManager

    located = {**config, **located_data(config, file.path.parent)}
    (task,) = TaskManager(include_defaults=False).load([located])["tasks"].values()
    return task


class _Training:
    """The training documents of one task, or of several that name the same ones, and their rows of tokens."""

    def __init__(
        self, name: str, task: Any, *, limit: int | None, seed: int, chat_template: bool, batch_size: int
    ) -> None:
        self.name = name
        self.task = task
        self.batch_size = batch_size
        self.chat_template = chat_template
        # Indexed where they lie: a data set of a million documents is not copied into lists of Python's.
        self._all = task.training_docs()
        self._chosen: Sequence[int] = range(len(self._all))
        if limit and limit < len(self._all):
            self._chosen = sorted(random.Random(seed).sample(range(len(self._all)), limit))
        if not self._chosen:
            raise StudyError(f"the training split of task '{name}' is empty")
        self._rows: dict[tuple[int, int], list[Row]] = {}

    def __len__(self) -> int:
        return len(self._chosen)

    @property
    def documents(self) -> list[Any]:
        return [self._all[i] for i in self._chosen]

    def rows(self, tokenizer: Any, max_length: int) -> list[Row]:
        key = (id(tokenizer), max_length)
        if key not in self._rows:
            self._rows[key] = self.some_rows(range(len(self)), tokenizer, max_length)
        return self._rows[key]

    def prompts(self, tokenizer: Any, samples: int, seed: int, max_length: int) -> list[list[int]]:
        chosen = random.Random(seed).sample(range(len(self)), min(samples, len(self)))
        return [row.input_ids for row in self.some_rows(chosen, tokenizer, max_length)]

    def some_rows(self, indices: Sequence[int], tokenizer: Any, max_length: int) -> list[Row]:
        messages = _messages(tokenizer, self.batch_size) if self.chat_template else None
        pairs = [self._pair(i, messages) for i in indices]
        stop = self._stop_ids(tokenizer)
        rows = []
        for context, completion in _tokenise(tokenizer, pairs, self.batch_size):
            ids = [*context, *completion, *stop]
            dropped = max(0, len(ids) - max_length)
            # The first token has nothing before it that could predict it.
            rows.append(Row(ids[dropped:], max(1, len(context) - dropped)))
        return rows

    def _pair(self, index: int, messages: Messages | None) -> tuple[str, str]:
        """Prompt and completion of a training document: the request of its right answer."""
        task, doc = self.task, self._all[self._chosen[index]]
        prefix = task.doc_to_prefix(doc)
        context = task.fewshot_context(doc, num_fewshot=0, gen_prefix=prefix, **_conversation(messages))
        if task.OUTPUT_TYPE == "generate_until":
            target = task.doc_to_target(doc)
            if task.config.doc_to_choice is not None and isinstance(target, int):
                target = task.doc_to_choice(doc)[target]
            target = target[0] if isinstance(target, list) else str(target)
            # In a conversation the answer begins its own turn, as lm-eval has it for choices.
            delimiter = "" if messages and not prefix else task.config.target_delimiter
            return context, f"{delimiter}{target}"
        requests = task.construct_requests(
            doc=doc,
            ctx=context,
            metadata=(self.name, index, 1),
            apply_chat_template=messages is not None,
            chat_template=messages,
        )
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
        if self.task.OUTPUT_TYPE != "generate_until":
            return []
        if tokenizer.eos_token_id is not None:
            return [tokenizer.eos_token_id]
        until = self.task.config.generation_kwargs["until"]
        return tokenizer.encode(until if isinstance(until, str) else until[0], add_special_tokens=False)


class Task:
    """Documents, training rows and evaluation of one lm-eval task."""

    def __init__(
        self,
        file: TaskFile,
        task: Any,
        training: _Training,
        *,
        limit: int | None,
        metric: str | None,
        num_fewshot: int | None,
        fewshot_seed: int,
        chat_template: bool,
        batch_size: int,
        strict: bool,
    ) -> None:
        self.file = file
        self.name, self.label = file.name, file.label
        self.limit = limit
        self.batch_size = batch_size
        self.chat_template = chat_template
        self.training = training
        self._task = task
        self._fewshot_seed = fewshot_seed
        if task.config.num_fewshot is None or (num_fewshot is not None and task.config.num_fewshot != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(fewshot_seed)
        self._check_fewshot()
        asked = metric if metric and (strict or self.has_metric(metric)) else file.metric or None
        self._metric, self._filter = _accuracy_metric(self.name, task, asked)
        self._prepared: _Prepared | None = None
        self._lm: Any = None

    def _check_fewshot(self) -> None:
        config, pool = self._task.config, len(self._task.sampler.df)
        # Where examples come from the evaluated split, the question itself is left out.
        needed = self.num_fewshot + (config.fewshot_split is not None and config.fewshot_split == config.test_split)
        if self.num_fewshot and needed > pool:
            raise StudyError(
                f"num_fewshot={self.num_fewshot} asks for more examples than the {pool} that task '{self.name}' has: "
                "ask for fewer, or name a fewshot_split in its task file"
            )

    @property
    def num_fewshot(self) -> int:
        return self._task.config.num_fewshot

    @property
    def metric(self) -> str:
        """Name of the accuracy, with its filter where the task has named ones: `acc`, `exact_match,strict-match`."""
        return self._metric if self._filter == "none" else f"{self._metric},{self._filter}"

    @property
    def metrics(self) -> list[str]:
        """All that `metric` may be."""
        return _possible_metrics(self._task)

    def has_metric(self, metric: str) -> bool:
        return any(metric in (one, one.partition(",")[0]) for one in self.metrics)

    @functools.cached_property
    def data_hash(self) -> str:
        """16 hex digits over the training and evaluation documents and everything that turns them into prompts."""
        evaluation = list(self._task.eval_docs)[: self.limit]
        config = self._task.dump_config()
        value: dict[str, Any] = {
            "config": {key: config.get(key) for key in _HASHED},
            "training": self.training.documents,
            "evaluation": evaluation,
        }
        if self.training.task is not self._task:
            other = self.training.task.dump_config()
            value["training_config"] = {key: other.get(key) for key in PROMPT}
        # Said only where it differs from what there once was alone: earlier signals and checkpoints stay good.
        if self._fewshot_seed != FEWSHOT_SEED:
            value["fewshot_seed"] = self._fewshot_seed
        if self.chat_template:
            value["chat_template"] = True
        text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=_stable_text)
        return sha256(text.encode()).hexdigest()[:16]

    @property
    def parts(self) -> tuple[Task, ...]:
        return (self,)

    @property
    def datasets(self) -> tuple[Task, ...]:
        """One task for every data set that is trained on."""
        return (self,)

    @property
    def num_training(self) -> int:
        return len(self.training)

    @property
    def num_evaluation(self) -> int:
        total = len(self._task.eval_docs)
        return min(total, self.limit) if self.limit else total

    @property
    def chance(self) -> float | None:
        """Accuracy of answers drawn at random, the mean of 1/choices; None where a model writes its answer."""
        if self._task.OUTPUT_TYPE != "multiple_choice" or not self._metric.startswith("acc"):
            return None
        documents = list(self._task.eval_docs)[: self.limit]
        return sum(1 / len(self._task.doc_to_choice(document)) for document in documents) / len(documents)

    # --- training -------------------------------------------------------------------------------------------------

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raises StudyError where a chat template is asked for and the tokenizer has none."""
        if self.chat_template and not tokenizer.chat_template:
            raise StudyError(
                "chat_template=true needs a tokenizer with a chat template, and this model's has none: leave it out, "
                "or take a model that was trained on conversations"
            )

    def training_rows(self, tokenizer: Any, max_length: int) -> list[Row]:
        """Every training document as tokens, in the order of the split. Long rows lose their beginning.

        Raises StudyError naming a document whose right answer is not among its choices.
        """
        return self.training.rows(tokenizer, max_length)

    def prompts(self, tokenizer: Any, samples: int, seed: int, *, max_length: int = 512) -> list[list[int]]:
        """Tokens (prompt and completion) of `samples` training documents drawn with `seed`, for calibration."""
        return self.training.prompts(tokenizer, samples, seed, max_length)

    # --- evaluation -----------------------------------------------------------------------------------------------

    def prepare(self, tokenizer: Any, *, rank: int = 0, world_size: int = 1) -> None:
        """Builds and tokenises this worker's share of the evaluation requests; a second call changes nothing."""
        if self._prepared is not None and self._prepared.fits(tokenizer, rank, world_size):
            return
        # All requests on every worker, then a share of them: the examples of few-shot prompts are drawn in sequence.
        self.check_tokenizer(tokenizer)
        self._task.set_fewshot_seed(self._fewshot_seed)
        messages = _messages(tokenizer, self.batch_size) if self.chat_template else None
        with _quiet(), contextlib.redirect_stderr(io.StringIO()):  # no argument turns this progress bar off
            self._task.build_all_requests(limit=self.limit, **_conversation(messages))
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

        Text is generated by lm-eval's model class; choices are scored by `scoring.py`, which gives that class's
        numbers from fewer tokens: a question runs once for all of its choices, and only answers have logits.

        With several workers each answers its share; every one of them returns the whole result, and an out-of-memory
        error on one is raised on all, unless they share one sharded model.
        """
        import torch
        from lm_eval.api.metrics import mean_stderr

        from trainers.models import sharding

        began = time.perf_counter()
        prepared = self._prepared
        assert prepared is not None, "prepare(tokenizer) comes before evaluate(model)"
        scores: dict[int, float] = {}
        failure: torch.OutOfMemoryError | None = None
        was_training = model.training
        try:
            with _quiet(), torch.no_grad(), sharding.in_step(model):
                scores = self._scores(self._lm_around(model, prepared.tokenizer), prepared)
        except torch.OutOfMemoryError as error:
            if sharding.is_sharded(model):  # the others wait in this pass, and not for what is gathered below
                raise
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
        from trainers.tasks import scoring

        if not prepared.asked:
            return {}
        if prepared.tokens is None:
            answers = lm.generate_until(prepared.asked, disable_tqdm=True)
        else:
            answers = scoring.loglikelihoods(
                lm.model, prepared.tokens, max_length=lm.max_length, batch_size=self.batch_size
            )
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


class Mixture:
    """Several tasks as one: their rows to train on, an accuracy each, and the mean of those."""

    def __init__(self, chosen: Chosen, parts: Sequence[Task]) -> None:
        self.name = chosen.name
        self.parts = tuple(parts)
        self._rows: dict[tuple[int, int], list[Row]] = {}

    @property
    def datasets(self) -> tuple[Task, ...]:
        """One task for every data set that is trained on: the first of those that share it."""
        first: dict[int, Task] = {}
        for part in self.parts:
            first.setdefault(id(part.training), part)
        return tuple(first.values())

    @property
    def metric(self) -> str:
        """`acc`, or `mean of acc, acc_norm` where tasks differ."""
        names = list(dict.fromkeys(part.metric for part in self.parts))
        return names[0] if len(names) == 1 else f"mean of {', '.join(names)}"

    @functools.cached_property
    def data_hash(self) -> str:
        """16 hex digits over the tasks' hashes, in their order."""
        text = json.dumps([[part.label, part.metric, part.data_hash] for part in self.parts])
        return sha256(text.encode()).hexdigest()[:16]

    @property
    def num_training(self) -> int:
        return sum(part.num_training for part in self.datasets)

    @property
    def num_evaluation(self) -> int:
        return sum(part.num_evaluation for part in self.parts)

    @property
    def chance(self) -> float | None:
        """Mean of the tasks' chances; None where one has none."""
        chances = [part.chance for part in self.parts]
        return None if None in chances else sum(chance or 0.0 for chance in chances) / len(chances)

    def check_tokenizer(self, tokenizer: Any) -> None:
        self.parts[0].check_tokenizer(tokenizer)

    def training_rows(self, tokenizer: Any, max_length: int) -> list[Row]:
        """The rows of every data set, one after another; see `Task.training_rows`."""
        key = (id(tokenizer), max_length)
        if key not in self._rows:
            self._rows[key] = [row for part in self.datasets for row in part.training_rows(tokenizer, max_length)]
        return self._rows[key]

    def prompts(self, tokenizer: Any, samples: int, seed: int, *, max_length: int = 512) -> list[list[int]]:
        """An equal share of `samples` from every data set (all it has, where that is less), for calibration."""
        share, rest = divmod(samples, len(self.datasets))
        return [
            prompt
            for place, part in enumerate(self.datasets)
            for prompt in part.prompts(tokenizer, share + (place < rest), seed, max_length=max_length)
        ]

    def prepare(self, tokenizer: Any, *, rank: int = 0, world_size: int = 1) -> None:
        """See `Task.prepare`."""
        for part in self.parts:
            part.prepare(tokenizer, rank=rank, world_size=world_size)

    def evaluate(self, model: Any) -> Evaluation:
        """accuracy = Σ_k a_k / K over the K tasks and its standard error √(Σ_k SE_k²) / K; see `Task.evaluate`."""
        done = {part.label: part.evaluate(model) for part in self.parts}
        return Evaluation(
            accuracy=math.fsum(e.accuracy for e in done.values()) / len(done),
            stderr=math.hypot(*(e.stderr for e in done.values())) / len(done),
            correct=tuple(score for e in done.values() for score in e.correct),
            metric=self.metric,
            seconds=sum(e.seconds for e in done.values()),
            parts=done,
        )


AnyTask = Task | Mixture


def sizes(task: AnyTask) -> str:
    """What is trained and counted on, in one line.

    `7,208 rows to train on (arc_easy 2,251, openbookqa 4,957); accuracy is the mean over arc_easy (2,376 × acc), ...`
    """
    rows = ", ".join(f"{part.label} {part.num_training:,}" for part in task.datasets)
    shared = len(task.parts) > len(task.datasets)
    counted = ", ".join(
        f"{part.label} ({part.num_evaluation:,} × {part.metric}"
        f"{f', {part.num_fewshot} examples before each' if part.num_fewshot else ''})"
        for part in task.parts
    )
    return (
        f"{task.num_training:,} rows to train on ({rows}{', shared by the tasks that name it' if shared else ''}); "
        f"accuracy {'is the mean over' if len(task.parts) > 1 else 'on'} {counted}"
    )


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


def _tokeniser(tokenizer: Any, batch_size: int) -> Any:
    """lm-eval's model class around the tokenizer alone."""
    with _quiet():
        from lm_eval.models.huggingface import HFLM

        class Tokeniser(HFLM):
            """Hands back the tokens that it should have scored."""

            def _loglikelihood_tokens(self, requests: Any, **_: Any) -> Any:
                return requests

        model = SimpleNamespace(device="cpu", config=SimpleNamespace())
        return Tokeniser(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)


def _tokenise(tokenizer: Any, pairs: Sequence[tuple[str, str]], batch_size: int) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) as lm-eval splits them into tokens, its treatment of spaces and BOS included."""
    lm = _tokeniser(tokenizer, batch_size)
    with _quiet():
        requests = lm.loglikelihood([SimpleNamespace(args=pair) for pair in pairs], disable_tqdm=True)
    return [(context, continuation) for _, context, continuation in requests]


def _messages(tokenizer: Any, batch_size: int) -> Messages:
    """The tokenizer's chat template as lm-eval applies it."""
    return _tokeniser(tokenizer, batch_size).apply_chat_template


def _conversation(messages: Messages | None) -> dict[str, Any]:
    """What lm-eval's prompt builders are told, as its command line tells them."""
    if messages is None:
        return {}
    return {"apply_chat_template": True, "fewshot_as_multiturn": True, "chat_template": messages}


def _possible_metrics(task: Any) -> list[str]:
    """Metrics that are a mean over documents and better when higher, with each filter where those have names."""
    from lm_eval.api.metrics import mean

    higher = task.higher_is_better()
    metrics = [m for m, aggregate in task.aggregation().items() if aggregate is mean and higher.get(m)]
    filters = [f.name for f in task._filters]
    return [m if f == "none" else f"{m},{f}" for m in metrics for f in filters]


def _accuracy_metric(name: str, task: Any, asked: str | None) -> tuple[str, str]:
    """Which metric is the accuracy, and after which filter."""
    possible = _possible_metrics(task)
    if not possible:
        raise StudyError(
            f"task '{name}' has no accuracy: none of its metrics ({', '.join(task.aggregation())}) is a mean over "
            "documents that is better when higher; name one in the metric_list of a task file"
        )
    for one in possible:
        metric, _, filtered = one.partition(",")
        if asked in (None, one, metric):
            return metric, filtered or "none"
    raise unknown(f"accuracy of task '{name}':", str(asked), possible)


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
