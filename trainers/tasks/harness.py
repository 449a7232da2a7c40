"""Every name of lm-evaluation-harness that this toolkit touches; nothing else imports it.

    with quiet():
        task = build(read_config(Path("arc_easy.yaml")))       # documents, prompts, requests, metrics
    pairs = tokenise(tokenizer, [("2+2=", " 4")], batch_size=8) # as lm-eval splits a prompt and its continuation
    lm = language_model(model, tokenizer, batch_size=8)

Some of these names are private to lm-eval (`_yaml_loader`, `_filters`, `_loglikelihood_tokens`): where a new version
breaks, this is the file to mend. lm-eval is imported by the functions, so that importing this file is cheap. Tried with
the version in constraints.txt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import logging
import math
import random
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

from allocators.core import plugins
from allocators.core.errors import StudyError, ToolkitWarning, shown
from trainers.tasks.task_file import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Document = Mapping[str, Any]  # one question of a data set, as its columns say
Messages = Callable[..., str]  # a conversation to the text of a prompt
Tokens = tuple[list[int], list[int]]  # of a prompt, of its continuation


class Request(Protocol):
    """One question to a model (lm-eval's `Instance`): a prompt and what may follow it, for one document."""

    doc: Document
    doc_id: int
    repeats: int  # how often the task asks it
    resps: list[Any]
    filtered_resps: dict[str, Any]

    @property
    def args(self) -> tuple[Any, ...]:
        """What the model is asked with: a prompt and a continuation, or a prompt and settings of generation."""


class HarnessTask(Protocol):
    """What is used of lm-eval's `ConfigurableTask`. Its documents are a `datasets.Dataset`."""

    OUTPUT_TYPE: str
    multiple_input: bool
    instances: list[Any]
    task_docs: Sequence[Document]  # those that are evaluated, read once
    dataset: Mapping[str, Any]  # by split

    @property
    def config(self) -> Any:
        """The settings of the task's YAML."""

    @property
    def eval_docs(self) -> Sequence[Document]:
        """Documents that are evaluated, made anew."""

    def training_docs(self) -> Sequence[Document]:
        """Documents of the training split."""

    def validation_docs(self) -> Sequence[Document]:
        """Documents of the validation split."""

    def doc_to_prefix(self, doc: Document) -> str | None:
        """What the answer begins with; None or empty: nothing."""

    def doc_to_text(self, doc: Document) -> Any:
        """The prompt; the number of the right choice where a document has several prompts."""

    def doc_to_target(self, doc: Document) -> Any:
        """The right answer: a text, or the number of a choice."""

    def doc_to_choice(self, doc: Document) -> list[str]:
        """The texts to choose from."""

    def fewshot_context(self, doc: Document, num_fewshot: int, **options: Any) -> str:
        """The prompt with so many solved examples before it."""

    def construct_requests(self, doc: Document, ctx: str, **options: Any) -> Any:
        """One request, or a list with one for each choice."""

    def process_results(self, doc: Document, results: Any) -> Mapping[str, Any]:
        """The score of a document by metric."""

    def aggregation(self) -> Mapping[str, Callable[..., float]]:
        """By metric, what makes one number of all scores."""

    def higher_is_better(self) -> Mapping[str, bool]:
        """By metric, whether more is better."""

    def dump_config(self) -> dict[str, Any]:
        """The settings of the task as plain values."""

    def set_config(self, key: str, value: Any) -> None:
        """Changes one setting."""

    def set_fewshot_seed(self, seed: int) -> None:
        """Sets the seed that draws the solved examples."""


class LanguageModel(Protocol):
    """What is used of lm-eval's `HFLM`: a model and its tokenizer, asked as lm-eval asks them."""

    @property
    def model(self) -> PreTrainedModel:
        """The resident model itself."""

    @property
    def max_length(self) -> int:
        """The largest number of tokens that the model takes at once."""

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """The tokens of a text."""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation."""

    def generate_until(self, requests: list[Request], disable_tqdm: bool = False) -> list[str]:
        """The generated text for each request."""

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        """For each request, the log-likelihood of its continuation and whether it is the greedy one."""


# --- tasks ------------------------------------------------------------------------------------------------------------


def read_config(path: Path) -> dict[str, Any]:
    """A task file with its includes, its functions imported. Raises whatever the user's file raises."""
    from lm_eval.tasks._yaml_loader import load_yaml

    return dict(load_yaml(path))


def task_keys() -> list[str]:
    """The keys that a task file can have."""
    from lm_eval.config.task import TaskConfig

    return [field.name for field in dataclasses.fields(TaskConfig)]


@functools.cache
def templates() -> Any:
    """lm-eval's environment of templates, with two differences: a template is compiled once and not once a document,
    which takes most of the time, and runs in a sandbox, without a way from a text to Python's own modules.
    """
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    class Templates(SandboxedEnvironment):
        """Compiles a text once."""

        @functools.lru_cache(maxsize=512)  # noqa: B019 - there is one of these in a process, and one for checks
        def _compiled(self, source: Any) -> Any:
            return super().from_string(source)

        def from_string(self, source: Any, *_: Any, **__: Any) -> Any:
            return self._compiled(source)

    environment = Templates(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters.update(utils.env.filters)
    utils.env = environment
    return environment


def build(config: Mapping[str, Any], splits: Mapping[str, Any] | None = None) -> HarnessTask:
    """The task of a config over documents by split (None: those that it loads itself).

    Raises whatever the user's functions and data raise.
    """
    from lm_eval.tasks import TaskManager

    templates()
    few_shot = config.get("fewshot_config")
    config = {**config, **_repeatable(config)}
    if few_shot:
        config["fewshot_config"] = {**few_shot, **_repeatable(few_shot)}
    if splits is not None:
        config |= _with_data(splits)
    task: HarnessTask
    (task,) = TaskManager(include_defaults=False).load([dict(config)])["tasks"].values()
    return task


def _repeatable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The functions of a config that make documents, so that they draw the same in every call and every process."""
    functions = {key: config.get(key) for key in ("process_docs", "custom_dataset")}
    return {key: _drawing_the_same(function) for key, function in functions.items() if callable(function)}


@functools.lru_cache(maxsize=256)  # one function stays one: lm-eval's own are compared
def _drawing_the_same(function: Any) -> Any:
    if hasattr(function, "draws_the_same"):
        return function

    @functools.wraps(function)
    def drawing(*args: Any, **kwargs: Any) -> Any:
        with _own_draws():
            return function(*args, **kwargs)

    drawing.draws_the_same = True  # type: ignore[attr-defined]
    return drawing


@contextlib.contextmanager
def _own_draws() -> Iterator[None]:
    """Seeds Python's, numpy's and torch's draws as lm-eval's command does, for the block."""
    import numpy
    import torch

    of_python, of_numpy = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(0)
        numpy.random.seed(1234)
        torch.manual_seed(1234)
        try:
            yield
        finally:
            random.setstate(of_python)
            numpy.random.set_state(of_numpy)


def unbuilt(config: Mapping[str, Any], features: Iterable[str]) -> HarnessTask:
    """A task that makes prompts and answers of documents with these fields, and does nothing else.

    lm-eval tries the first document while it builds a task, and does not say what is wrong with it: this one can be
    asked.
    """
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.config.task import TaskConfig

    task: Any = ConfigurableTask.__new__(ConfigurableTask)
    task._config = TaskConfig(**config)
    task.OUTPUT_TYPE, task.prompt, task.multiple_input = task.config.output_type, None, 0
    task.features = list(features)
    asked: HarnessTask = task
    return asked


def on_validation_split(task: HarnessTask, config: Mapping[str, Any]) -> HarnessTask:
    """The task as it is where its file names the validation split as its test split; its data are not read again."""
    split = config["validation_split"]
    changes: dict[str, Any] = {"test_split": split}
    few_shot = task.config.fewshot_config
    if not config.get("training_split") and few_shot.split is None and few_shot.samples is None:
        changes["fewshot_split"] = split  # lm-eval would take it anyway; said, a question is no example of itself
    return build({**config, **changes}, task.dataset)


def on_documents(config: Mapping[str, Any], documents: Sequence[Document], examples: Sequence[Document]) -> HarnessTask:
    """The task of a config as it is where its test split has these documents, and its few-shot split those examples."""
    few_shot = {
        **(config.get("fewshot_config") or {}),
        "split": None,
        "process_docs": None,
        "samples": lambda: examples,
    }
    splits = {"training_split": None, "validation_split": None, "test_split": "documents", "fewshot_split": None}
    ready = {"process_docs": None, "fewshot_config": few_shot}
    return build({**config, **splits, **ready}, {"documents": documents})


def _with_data(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a task whose data are at hand."""
    return {"custom_dataset": lambda **_: dataset, "dataset_kwargs": None}


def examples_of(task: HarnessTask) -> Sequence[Document]:
    """The documents that few-shot examples are drawn from."""
    examples: Sequence[Document] = task.sampler.df  # type: ignore[attr-defined]
    return examples


def examples_have_a_form_of_their_own(task: HarnessTask) -> bool:
    """Whether few-shot examples are made into text otherwise than questions are."""
    few_shot = task.config.fewshot_config
    return any(
        getattr(few_shot, key) not in (None, getattr(task.config, key))
        for key in ("doc_to_text", "doc_to_choice", "doc_to_target")
    )


def unknown_metric(config: Mapping[str, Any]) -> str:
    """A metric that neither lm-eval nor `evaluate` has here, and what lm-eval has, for a message; "" for none."""
    from lm_eval.api import metrics  # noqa: F401 - which registers them
    from lm_eval.api.registry import get_metric, metric_registry

    own = config.get("process_results") is not None
    for part in () if own else config.get("metric_list") or ():
        name = part.get("metric") if isinstance(part, Mapping) else None
        if isinstance(name, str) and name not in metric_registry and get_metric(name) is None:
            return f"asks for the metric '{name}', which is not here: lm-eval has {', '.join(sorted(metric_registry))}"
    return ""


def learns_from_training_split(task: HarnessTask) -> bool:
    """Whether few-shot examples are drawn from the training documents, place by place."""
    config = task.config
    few_shot = config.fewshot_config
    split = few_shot.split or (config.training_split if few_shot.samples is None else None)
    return split is not None and split == config.training_split and few_shot.process_docs is config.process_docs


def requests_of(task: HarnessTask, limit: int | None, messages: Messages | None) -> list[Request]:
    """Every evaluation request of the first `limit` documents (None: of all), in the order of the documents."""
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # no argument turns this progress bar off
        task.build_all_requests(limit=limit, **conversation(messages))  # type: ignore[attr-defined]
    return task.instances


def possible_metrics(task: HarnessTask) -> list[str]:
    """Metrics that are a mean over documents and better when higher, with each filter where those have names."""
    from lm_eval.api.metrics import mean

    higher = task.higher_is_better()
    metrics = [m for m, aggregate in task.aggregation().items() if aggregate is mean and higher.get(m)]
    filters = [f.name for f in task._filters]  # type: ignore[attr-defined]
    return [m if f == "none" else f"{m},{f}" for m in metrics for f in filters]


def standard_error(scores: Sequence[float]) -> float:
    """Of the mean of at least two scores, as lm-eval reports it."""
    from lm_eval.api.metrics import mean_stderr

    return float(mean_stderr(scores))


def scores_of(
    task: HarnessTask,
    documents: Mapping[int, Sequence[Request]],
    answers: Iterable[tuple[Request, Any]],
    *,
    metric: str,
    filtered: str,
) -> dict[int, float]:
    """The metric of every document whose requests were answered, after the task's filter of that name.

    documents   requests by document; a task may give a document no score
    answers     (request, what the model said), a request as often as it was asked
    """
    requests = [request for share in documents.values() for request in share]
    for request in requests:
        request.resps, request.filtered_resps = [], {}
    for request, answer in answers:
        request.resps.append(answer)
    for ensemble in task._filters:  # type: ignore[attr-defined]
        ensemble.apply(requests)
    scores = {}
    for doc_id, share in documents.items():
        metrics = task.process_results(share[0].doc, [request.filtered_resps[filtered] for request in share])
        if metric in metrics:
            scores[doc_id] = float(metrics[metric])
    return scores


# --- models and tokens ------------------------------------------------------------------------------------------------


def language_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> LanguageModel:
    """lm-eval's own model class around a resident model; keep it, as its constructor ties weights anew."""
    from lm_eval.models.huggingface import HFLM

    language_model: Any = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    if language_model.max_length < 1:  # a config that says 0 or -1 says none
        language_model._max_length = HFLM._DEFAULT_MAX_LENGTH
    made: LanguageModel = language_model
    return made


def try_to_write(tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]) -> None:
    """Writes one token or two with these `generation_kwargs`, by a model that knows nothing and is as small as can be.

    Raises whatever lm-eval, transformers or torch make of the settings; which they take, their versions decide.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    rows = max(len(tokenizer), 1 + max(tokenizer.all_special_ids, default=0))
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=rows, **sizes)).eval()
    given = {key: value for key, value in settings.items() if key != "max_gen_toks"} | {"max_gen_toks": 2}
    request: Any = SimpleNamespace(args=("a b", given))
    language_model(model, tokenizer, 1).generate_until([request], disable_tqdm=True)


def tokenise(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], batch_size: int) -> list[Tokens]:
    """(prompt, continuation) as lm-eval splits them into tokens, its treatment of spaces and BOS included.

    Where there is neither a prompt nor a token of a continuation, both are empty: lm-eval raises IndexError there.
    """
    lm = _without_model(tokenizer, batch_size)
    nothing = {pair for pair in pairs if not pair[0] and not lm.tok_encode(pair[1], add_special_tokens=False)}
    asked = [SimpleNamespace(args=pair) for pair in pairs if pair not in nothing]
    with quiet():
        requests = iter(lm.loglikelihood(asked, disable_tqdm=True))
    return [([], []) if pair in nothing else next(requests)[1:] for pair in pairs]


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, as lm-eval reads a prompt."""
    lm = _without_model(tokenizer, 1)
    return [lm.tok_encode(text) for text in texts]


def chat_template(tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Messages:
    """The tokenizer's chat template as lm-eval applies it. Where it fails, or takes for ever, what it gives raises
    StudyError.
    """
    written, what = _without_model(tokenizer, batch_size).apply_chat_template, "the chat template of the tokenizer"
    spent: list[float] = []  # seconds of each conversation, until it is said that they are many

    def applied(*messages: Any, **options: Any) -> str:
        began = time.perf_counter()
        try:
            with plugins.watched(None, what, ends=True):
                text = written(*messages, **options)
        except Exception as error:  # a template may raise what it likes
            raise StudyError(
                f"{what} cannot write a conversation: {one_line(error)}: mend it, or leave chat_template=true out"
            ) from error
        if lost := _left_out(text, *messages):
            raise StudyError(
                f"{what} leaves out the question '{shown(lost)}': mend it, or leave chat_template=true out"
            )
        spent.append(time.perf_counter() - began)
        if (long := sum(spent[-100:])) > plugins.PATIENCE:
            each = f"{long / len(spent[-100:]):.1f} s for a conversation"
            warnings.warn(f"{what} takes {each}: mend it, or leave chat_template=true out", ToolkitWarning, 1)
            spent[:] = [-math.inf]
        return text

    return applied


def _left_out(text: str, turns: Sequence[Mapping[str, str]], *_: Any) -> str:
    """What is asked in a conversation and does not stand in its text, white space aside."""
    written = " ".join(text.split())
    asked = (turn["content"] for turn in turns if turn["role"] == "user")
    return next((one for one in asked if " ".join(one.split()) not in written), "")


def conversation(messages: Messages | None) -> dict[str, Any]:
    """The arguments of lm-eval's prompt builders, as its command line sets them; none without a chat template."""
    if messages is None:
        return {}
    return {"apply_chat_template": True, "fewshot_as_multiturn": True, "chat_template": messages}


def _without_model(tokenizer: PreTrainedTokenizerBase, batch_size: int) -> LanguageModel:
    """lm-eval's model class around the tokenizer alone."""
    with quiet():
        from lm_eval.models.huggingface import HFLM

        class Tokeniser(HFLM):
            """Hands back the tokens that it should have scored. A prompt is read once for all of its choices."""

            @functools.lru_cache(maxsize=8)  # noqa: B019 - it lives as long as one call
            def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> Any:
                return super().tok_encode(string, *args, **kwargs)

            def _loglikelihood_tokens(self, requests: Any, **_: Any) -> Any:
                return requests

        model = SimpleNamespace(device="cpu", config=SimpleNamespace())
        return Tokeniser(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """lm-eval logs and datasets draws progress bars, which would end up in the live table."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    loggers = {logging.getLogger("lm_eval"): logging.CRITICAL, logging.getLogger("datasets"): logging.CRITICAL}
    levels, bars = [(logger, logger.level) for logger in loggers], not are_progress_bars_disabled()
    for logger, lowest in loggers.items():
        logger.setLevel(lowest)
    disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)
        if bars:
            enable_progress_bars()
