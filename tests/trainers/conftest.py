"""A tiny random OLMoE with a character tokenizer, and small tasks over generated text."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from trainers.worker_state import WorkerSetup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    from trainers.tasks import AnyTask

# Places of an adapter on the tiny Llama, two a layer.
PATHS = [f"model.layers.{layer}.{name}" for layer in range(3) for name in ("self_attn.q_proj", "mlp.down_proj")]
CHARACTERS = string.ascii_lowercase + string.digits + " :.?\n"


def char_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; `<unk>`, `<pad>` and `<eos>` besides."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<unk>", "<pad>", "<eos>", *CHARACTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>", model_max_length=128
    )


def tiny_olmoe(seed: int = 0) -> Any:
    """A fresh, random OLMoE: 2 layers, hidden 32, 8 experts of width 16, top-2."""
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        pad_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,  # a spread-out router, and answers that differ between documents
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = OlmoeForCausalLM(config)
    return model.requires_grad_(False).eval()


def tiny_llama(seed: int = 0) -> Any:
    """A fresh, random Llama: 3 layers, hidden 32; its head is its embedding, of 67 rows."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return char_tokenizer()


@pytest.fixture(scope="module")
def task(choice_task: Path) -> AnyTask:
    """Eight questions of the task below."""
    from trainers import tasks

    return tasks.load_task(str(choice_task), limit=8, select_on="test")


@pytest.fixture
def model() -> Any:
    return tiny_olmoe()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as save_pretrained writes it."""
    folder = tmp_path_factory.mktemp("tiny-olmoe")
    tiny_olmoe().save_pretrained(folder)
    char_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def choice_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four choices, one of which repeats the question's word; 48 rows to train on, 30 to test."""
    rng = random.Random(0)

    def rows(count: int) -> Iterator[dict[str, Any]]:
        for _ in range(count):
            choices = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 6))) for _ in range(4)]
            label = rng.randrange(4)
            yield {"question": choices[label], "choices": choices, "label": label}

    return write_task(
        tmp_path_factory.mktemp("choice"),
        "choice",
        {"train": rows(48), "test": rows(30)},
        output_type="multiple_choice",
        description="Pick one.\n",
        doc_to_text="which is {{question}}?",
        doc_to_choice="{{choices}}",
        doc_to_target="label",
        metric_list=[
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        ],
        metadata={"version": 1, "recipe": {"steps": 7}},
    )


@pytest.fixture(scope="session")
def copy_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Say a letter again: a task that generates text, with a filter of its own before the default one."""
    rng = random.Random(1)

    def rows(count: int) -> Iterator[dict[str, Any]]:
        for _ in range(count):
            yield {"question": rng.choice("ab") * 2, "answer": rng.choice("ab")}

    return write_task(
        tmp_path_factory.mktemp("copy"),
        "copy",
        {"train": rows(20), "validation": rows(12)},
        output_type="generate_until",
        validation_split="validation",
        doc_to_text="copy {{question}}:",
        doc_to_target="answer",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        filter_list=[
            {
                "name": "letter",
                "filter": [{"function": "regex", "regex_pattern": "([ab])"}, {"function": "take_first"}],
            },
            {"name": "whole", "filter": [{"function": "take_first"}]},
        ],
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        metadata={"version": 1},
    )


def write_task(folder: Path, name: str, splits: dict[str, Iterable[dict[str, Any]]], **config: Any) -> Path:
    """Writes a task file and its data, one JSON object a line, side by side."""
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {split: f"{split}.jsonl" for split in splits}},
        "training_split": "train" if "train" in splits else None,
        "test_split": "test" if "test" in splits else None,
        **config,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return path


@pytest.fixture(autouse=True, scope="session")
def _own_dataset_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Test data does not belong into the user's cache of data sets."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


def worker_setup(folder: Path, **changes: Any) -> WorkerSetup:
    """Of a worker with the embedded MoE model; `folder` takes all that it writes."""
    settings: dict[str, Any] = {
        "model": "tiny-moe",
        "options": {},
        "task": "default",
        "task_options": {},
        "seed": 0,
        "evaluations": 1,
        "calibration_samples": 8,
        "cpus_per_worker": 1,
        **{name: str(folder / name) for name in ("signals", "adapters", "checkpoints")},
    }
    return WorkerSetup(**(settings | changes))
