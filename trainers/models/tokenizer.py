"""A model's tokenizer without its weights: `tokenizer_of("tiny-moe")`. Imports transformers when it is called."""

from __future__ import annotations

from typing import TYPE_CHECKING

from allocators.core.errors import StudyError
from trainers.models import hub
from trainers.models.base import config_file, hash_of, matching

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "*.model",
    "*.tiktoken",
    "added_tokens.json",
    "special_tokens_map.json",
)
TEMPLATES = ("chat_template*", "additional_chat_templates/*")


def identity_of_tokenizer(name: str) -> str:
    """What turns text into tokens, for provenance: the commit of a hub model, else `sha256:` of the tokenizer's files
    and its chat template.

    Raises StudyError as `config_of` does, and for a file that cannot be read.
    """
    config = config_file(name)
    if hub.is_cached(config):
        return config.parent.name
    try:
        return hash_of(matching(config.parent, (*FILES, *TEMPLATES)))
    except OSError as error:
        raise StudyError(f"'{error.filename}' cannot be read: {error.strerror}") from None


def tokenizer_of(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Of a model that `config_of` knows. Of a hub model the tokenizer's files alone are fetched, of the same commit.

    Raises StudyError as `config_of` does, and with transformers' reason where there is no tokenizer that it can read.
    """
    from transformers import AutoTokenizer

    config = config_file(name)
    cached = hub.is_cached(config) and not hub.is_complete(config.parent)
    place, revision = (name, config.parent.name) if cached else (str(config.parent), None)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            place, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except Exception as error:  # tokenizers' own errors have no base but Exception
        reason = _reason(error)
        hint = "; trust_remote_code=true runs it" if "custom code" in reason else ""
        raise StudyError(f"the tokenizer of model '{name}' cannot be read: {reason}{hint}") from error
    check_reads(tokenizer, name)
    return tokenizer


def check_reads(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises StudyError for a tokenizer that loads and reads no text."""
    try:
        read = tokenizer("a b")
    except Exception as error:  # as above
        raise StudyError(
            f"the tokenizer of '{name}' reads no text: {_reason(error)}: fetch tokenizer.json and "
            "tokenizer_config.json again"
        ) from error
    # What transformers makes of a folder without a tokenizer's files: one that has special tokens alone.
    if not read["input_ids"] and tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
        raise StudyError(
            f"the tokenizer of '{name}' makes no token of a text: are its files there? Fetch tokenizer.json"
        )


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
