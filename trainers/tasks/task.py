"""One lm-eval task: its documents, training rows and evaluation.

    task = load_task("arc_easy", limit=40)
    task.training_rows(tokenizer, max_length=512)
    task.prepare(tokenizer)
    task.evaluate(model).accuracy                   # on the split that selects
    task.test.prepare(tokenizer)
    task.test.evaluate(model).accuracy              # on the test split

`load_task` (trainers/tasks/) makes it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any, cast

from allocators.core.errors import FAULTS, StudyError, unknown
from trainers.tasks import harness
from trainers.tasks.data.origin import Origin
from trainers.tasks.data.parse import exact
from trainers.tasks.evaluation import Counted, Evaluation, Questions, Share, gathered
from trainers.tasks.files import FEWSHOT_SEED
from trainers.tasks.harness import Document, HarnessTask, LanguageModel
from trainers.tasks.rows import Row, TrainingData
from trainers.tasks.splits import Selection
from trainers.tasks.task_file import PROMPT, TaskFile, one_line, training_config

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What prompts and scores depend on besides the documents.
_HASHED = (
    *PROMPT,
    "process_results",
    "fewshot_delimiter",
    "num_fewshot",
    "metric_list",
    "generation_kwargs",
    "filter_list",
    "repeats",
)


class Task:
    """Documents, training rows and evaluation of one lm-eval task.

    split   what accuracy is counted on, in words
    test    the same task counted on its test split; the task itself where that is what it is counted on
    """

    def __init__(
        self,
        file: TaskFile,
        task: HarnessTask,
        training: TrainingData,
        *,
        limit: int | None,
        metric: str | None,
        num_fewshot: int | None,
        fewshot_seed: int,
        chat_template: bool,
        batch_size: int,
        strict: bool,
        selection: Selection | None = None,
        test: Task | None = None,
    ) -> None:
        self.file, self.split = file, selection.words if selection else "test split"
        self.test = test or self
        self.name, self.label = file.name, file.label
        self.limit = limit
        self.batch_size = batch_size
        self.chat_template = chat_template
        self.training = training
        self._task = task
        held_out = selection.held_out if selection else None
        self._origin = Origin.of(
            held_out.task if held_out else task,
            self.label,
            selection.split if selection else file.evaluation_split,
            held_out.places if held_out else None,
        )
        self._fewshot_seed = fewshot_seed
        if task.config.num_fewshot is None or (num_fewshot is not None and task.config.num_fewshot != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(fewshot_seed)
        self._check_fewshot()
        asked = metric if metric and (strict or self.has_metric(metric)) else file.metric or None
        self._metric, self._filter = _accuracy_metric(self.name, task, asked)
        self._prepared: Share | None = None
        self._lm: LanguageModel | None = None

    def _check_fewshot(self) -> None:
        config, pool = self._task.config, len(harness.examples_of(self._task))
        # Where examples come from the evaluated split, the question itself is left out.
        needed = self.num_fewshot + (config.fewshot_split is not None and config.fewshot_split == config.test_split)
        if self.num_fewshot and needed > pool:
            raise StudyError(
                f"num_fewshot={self.num_fewshot} asks for more examples than the {pool} that task '{self.name}' has: "
                "ask for fewer, or name a fewshot_split in its task file"
            )

    @property
    def num_fewshot(self) -> int:
        """The number of solved examples before each question."""
        num_fewshot: int = self._task.config.num_fewshot
        return num_fewshot

    @property
    def metric(self) -> str:
        """Name of the accuracy, with its filter where the task has named ones: `acc`, `exact_match,strict-match`."""
        return self._metric if self._filter == "none" else f"{self._metric},{self._filter}"

    @property
    def metrics(self) -> list[str]:
        """All that `metric` may be."""
        return harness.possible_metrics(self._task)

    def has_metric(self, metric: str) -> bool:
        """Whether the task is scored so; a filter's name (`exact_match,strict`) may be left out."""
        return any(metric in (one, one.partition(",")[0]) for one in self.metrics)

    @functools.cached_property
    def data_hash(self) -> str:
        """16 hex digits over the training and evaluation documents and everything that turns them into prompts."""
        config = self._task.dump_config()
        value: dict[str, Any] = {
            "config": {key: config.get(key) for key in _HASHED},
            "training": exact(self.training.documents),
            "evaluation": exact(self._documents),
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
        """The task itself; a mixture has several."""
        return (self,)

    @property
    def datasets(self) -> tuple[Task, ...]:
        """One task for every data set that is trained on."""
        return (self,)

    @property
    def num_training(self) -> int:
        """The number of training documents."""
        return len(self.training)

    @property
    def num_evaluation(self) -> int:
        """The number of questions, `limit` of them at most."""
        total = len(self._task.task_docs)
        return min(total, self.limit) if self.limit else total

    @functools.cached_property
    def _documents(self) -> list[Document]:
        """Those that are evaluated."""
        return [self._task.task_docs[i] for i in range(self.num_evaluation)]

    @property
    def trains_on_other_data(self) -> bool:
        """Whether the training rows have a form of their own, that of the file's `training:` block."""
        return training_config(self.file.config) is not None

    @property
    def questions(self) -> Questions:
        """What is evaluated, for a look at it."""
        return Questions(self._task, self._documents, self._origin, self._metric, self._filter)

    @property
    def chance(self) -> float | None:
        """Accuracy of answers drawn at random, the mean of 1/choices; None where a model writes its answer."""
        if self._task.OUTPUT_TYPE != "multiple_choice" or not self._metric.startswith("acc"):
            return None
        return sum(1 / len(self._task.doc_to_choice(doc)) for doc in self._documents) / len(self._documents)

    # --- training -------------------------------------------------------------------------------------------------

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises StudyError where a chat template is asked for and the tokenizer has none."""
        if self.chat_template and not tokenizer.chat_template:
            raise StudyError(
                "chat_template=true needs a tokenizer with a chat template, and this model's has none: leave it out, "
                "or take a model that was trained on conversations"
            )

    def training_rows(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
        """Every training document as tokens, in the order of the split. Long rows lose their beginning.

        Raises StudyError naming a document whose right answer is not among its choices.
        """
        return self.training.rows(tokenizer, max_length)

    def prompts(
        self, tokenizer: PreTrainedTokenizerBase, samples: int, seed: int, *, max_length: int = 512
    ) -> list[list[int]]:
        """Tokens (prompt and completion) of `samples` training documents drawn with `seed`, for calibration."""
        return self.training.prompts(tokenizer, samples, seed, max_length)

    # --- evaluation -----------------------------------------------------------------------------------------------

    def prepare(self, tokenizer: PreTrainedTokenizerBase, *, rank: int = 0, world_size: int = 1) -> Share:
        """Builds and tokenises this worker's share of the evaluation requests; a second call changes nothing."""
        if self._prepared is not None and self._prepared.fits(tokenizer, rank, world_size):
            return self._prepared
        # All requests on every worker, then a share of them: the examples of few-shot prompts are drawn in sequence.
        self.check_tokenizer(tokenizer)
        self._task.set_fewshot_seed(self._fewshot_seed)
        messages = harness.chat_template(tokenizer, self.batch_size) if self.chat_template else None
        try:
            requests = harness.requests_of(self._task, self.limit, messages)
        except StudyError:
            raise
        except FAULTS as error:  # documents were looked at before: the templates around them are left
            raise StudyError(
                f"task '{self.label}' makes no prompts (description, fewshot_config, gen_prefix): {one_line(error)}"
            ) from error
        self._prepared = Share.of(
            self._task,
            requests,
            tokenizer,
            rank=rank,
            world_size=world_size,
            batch_size=self.batch_size,
        )
        return self._prepared

    def evaluate(self, model: nn.Module) -> Evaluation:
        """Accuracy of a transformers model as it is now, adapter included. Call `prepare` first.

        Text is generated by lm-eval's model class; choices are scored by `scoring.py`, which gives that class's
        numbers from fewer tokens: a question runs once for all of its choices, and only answers have logits.

        With several workers each answers its share; every one of them returns the whole result, and an out-of-memory
        error on one is raised on all, unless they share one sharded model.
        """
        began = time.perf_counter()
        prepared = self._prepared
        assert prepared is not None, "prepare(tokenizer) comes before evaluate(model)"
        counted = self._counted_by_all(cast("PreTrainedModel", model), prepared)
        correct = tuple(counted.scores[i] for i in sorted(counted.scores))
        return Evaluation(
            accuracy=float(self._task.aggregation()[self._metric](correct)),
            stderr=harness.standard_error(correct) if len(correct) > 1 else 0.0,
            correct=correct,
            metric=self.metric,
            seconds=time.perf_counter() - began,
            loss=counted.loss(self.num_evaluation),
        )

    def _counted_by_all(self, model: PreTrainedModel, prepared: Share) -> Counted:
        """What all workers counted on all documents. Raises torch.OutOfMemoryError as `evaluate` says."""
        import torch

        from trainers.models import sharding

        counted = Counted()
        failure: torch.OutOfMemoryError | None = None
        was_training = model.training
        try:
            with harness.quiet(), torch.no_grad(), sharding.in_step(model):
                counted = self._count(self._lm_around(model, prepared.tokenizer), prepared)
        except torch.OutOfMemoryError as error:
            if sharding.is_sharded(model):  # the others wait in this pass, and not for what is gathered below
                raise
            failure = error
        finally:
            model.train(was_training)
        if prepared.world_size > 1:
            counted, failed = gathered(counted, self.num_evaluation, failed=failure is not None, device=model.device)
            if failed and failure is None:
                failure = torch.OutOfMemoryError("another worker ran out of memory during the evaluation")
        if failure is not None:
            raise failure
        return counted

    def _lm_around(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> LanguageModel:
        """lm-eval's model class around the resident model, kept from one evaluation to the next; in eval mode."""
        if self._lm is None or self._lm.model is not model:
            self._lm = harness.language_model(model, tokenizer, self.batch_size)
        model.eval()
        return self._lm

    def _count(self, lm: LanguageModel, prepared: Share) -> Counted:
        """What is counted on this worker's share of the documents."""
        from trainers.tasks import scoring

        if not prepared.asked:
            return Counted()
        answers: Sequence[object]
        nats: dict[int, tuple[float, int]] = {}
        if prepared.tokens is None:
            with _own_randomness(lm.model):
                answers = lm.generate_until(prepared.asked, disable_tqdm=True)
        else:
            answers = scored = scoring.loglikelihoods(
                lm.model, prepared.tokens, max_length=lm.max_length, batch_size=self.batch_size
            )
            nats = {doc_id: (-scored[place][0], tokens) for doc_id, (place, tokens) in prepared.right.items()}
        scores = harness.scores_of(
            self._task,
            prepared.documents,
            zip(prepared.asked, answers, strict=True),
            metric=self._metric,
            filtered=self._filter,
        )
        return Counted(scores, nats)


def _accuracy_metric(name: str, task: HarnessTask, asked: str | None) -> tuple[str, str]:
    """Which metric is the accuracy, and after which filter."""
    possible = harness.possible_metrics(task)
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


@contextlib.contextmanager
def _own_randomness(model: PreTrainedModel) -> Iterator[None]:
    """Answers that are drawn (`do_sample`) are the same for the same model, and draw nothing from a training."""
    import torch

    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def _stable_text(value: Any) -> str:
    """For the data hash: text that does not hold a memory address."""
    return value.__qualname__ if callable(value) else str(value)
