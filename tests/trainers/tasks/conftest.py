"""What lm-eval itself says about a task file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.trainers.conftest import char_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@pytest.fixture
def by_lm_eval(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What lm-eval itself says about a local task file: accuracy, standard error, one score a document."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    # Seconds of git, pip and lscpu in every call, for a record that is not looked at here.
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)

    def run(
        paths: list[Path],
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        metric: str = "acc",
        filter_name: str = "none",
        **options: Any,
    ) -> Any:
        configs = []
        for path in paths:
            config = yaml.safe_load(path.read_text())
            files = config["dataset_kwargs"]["data_files"]
            config["dataset_kwargs"]["data_files"] = {split: str(path.parent / file) for split, file in files.items()}
            configs.append(config)
        result = evaluator.simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=5),
            tasks=configs,
            bootstrap_iters=10,
            task_manager=TaskManager(include_defaults=False),
            **options,
        )
        answers = {}
        for config in configs:
            label = config["task"]
            samples = [s for s in result["samples"][label] if s["filter"] == filter_name]
            scores = tuple(float(s[metric]) for s in sorted(samples, key=lambda s: s["doc_id"]))
            numbers = result["results"][label]
            answers[label] = numbers[f"{metric},{filter_name}"], numbers[f"{metric}_stderr,{filter_name}"], scores
        return answers if len(paths) > 1 else answers[label]

    return run


@pytest.fixture(scope="module")
def chatty() -> PreTrainedTokenizerBase:
    """The character tokenizer with a chat template."""
    tokenizer = char_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% if not loop.last or add_generation_prompt %}\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return tokenizer
