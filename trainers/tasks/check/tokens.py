"""What a tokenizer makes of prompts and answers: nothing, the same twice, too much, or ids that the model lacks."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from allocators.core.errors import StudyError, did_you_mean
from allocators.core.words import shown
from trainers.tasks import harness
from trainers.tasks.check.scores import Ending
from trainers.tasks.harness import HarnessTask, Tokens
from trainers.tasks.task_file import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

POSITIONS = 2048  # lm-eval's, of a model whose config says none
MOST_WRITTEN = 256  # lm-eval's, where a task file says nothing
# Keys of generation_kwargs that lm-eval reads itself; the others are transformers'.
_LM_EVAL = ("until", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclass(frozen=True)
class Limits:
    """What a model and a recipe have room for.

    max_length   tokens of a training row
    asked        whether somebody asked for that max_length, or it is the default
    positions    tokens of a sequence that the model knows places for; None: its config does not say
    rows         of the embedding; None: the config does not say
    """

    max_length: int = 512
    asked: bool = False
    positions: int | None = None
    rows: int | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], *, recipe: Mapping[str, Any], max_length: int = 0) -> Limits:
        """Of a model's config.json and recipe settings; a `max_length` above 0 wins over theirs."""
        asked = max_length or recipe.get("max_length")
        text = config.get("text_config")
        both = [part for part in (text, config) if isinstance(part, Mapping)]
        names = ("n_positions", "max_position_embeddings", "n_ctx")
        positions = [part[name] for part in both for name in names if part.get(name) is not None]
        if wrong := [value for value in positions if not isinstance(value, int) or value == 1]:
            raise StudyError(f"config.json gives the model {shown(str(wrong[0]))} positions: at least 2 are needed")
        positions = [value for value in positions if value > 0]  # 0 and -1 say that there is no such number
        rows = [part["vocab_size"] for part in both if isinstance(part.get("vocab_size"), int)]
        return cls(asked or cls.max_length, bool(asked), next(iter(positions), None), next(iter(rows), None))


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, tasks: Sequence[HarnessTask]) -> None:
    """Raises StudyError for a tokenizer that ends every text, and one without an end where text is written."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    with_ends = tokenizer.encode("a")
    added = with_ends[_place(plain, with_ends) + len(plain) :] if plain else []
    if added:
        raise StudyError(
            f"the tokenizer ends every text with {''.join(_token(tokenizer, one) for one in added)}, which would stand "
            "between a prompt and its answer: save it without that (add_eos_token=false, or another post_processor in "
            "tokenizer.json)"
        )
    writes = any(task.OUTPUT_TYPE == "generate_until" for task in tasks)
    if tokenizer.eos_token_id is None and (writes or tokenizer.bos_token_id is None):
        role = "ends an answer" if writes else "stands for an empty prompt"
        raise StudyError(
            f"the tokenizer has no eos token, which {role}: name one of its tokens as eos_token in "
            "tokenizer_config.json"
        )


def _place(part: Sequence[int], whole: Sequence[int]) -> int:
    places = range(len(whole) - len(part) + 1)
    return next((place for place in places if list(whole[place : place + len(part)]) == list(part)), len(whole))


def check_ids(tokenizer: PreTrainedTokenizerBase, sequences: Iterable[Sequence[int]], limits: Limits) -> None:
    """Raises StudyError for a token that the model's embedding has no row for."""
    largest = max((max(ids) for ids in sequences if ids), default=0)
    if limits.rows is not None and largest >= limits.rows:
        raise StudyError(
            f"token {_token(tokenizer, largest)} is {largest}, and the model's embedding has {limits.rows:,} rows: the "
            "tokenizer is not that of the model, or the model was saved before tokens were added"
        )


def _token(tokenizer: PreTrainedTokenizerBase, number: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(number))


def ending(name: str, task: HarnessTask, limits: Limits) -> Ending:
    """Where a task that writes its answers stops. Raises StudyError for generation_kwargs that cannot be."""
    from transformers import GenerationConfig

    given = dict(task.config.generation_kwargs)

    def refuse(key: str, why: str) -> StudyError:
        return StudyError(f"task '{name}': generation_kwargs has {key}: {given[key]!r}, {why}")

    known = {*_LM_EVAL, *(key for key in vars(GenerationConfig()) if not key.startswith("_"))}
    for key in given:
        if key not in known:
            near = did_you_mean(key, known)
            raise refuse(key, f"which neither lm-eval nor transformers knows{near}")
    for key in ("do_sample", "early_stopping"):
        if key in given and not isinstance(given[key], bool):
            raise refuse(key, "which must be true or false, without quotes")
    until = given.get("until") or []
    stops = [until] if isinstance(until, str) else until
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise refuse("until", "which must be a text or a list of texts")
    if "" in stops and len(stops) > 0 and until != "":
        raise refuse("until", "whose empty text would stop every answer at once")
    key = next((one for one in _LM_EVAL[1:] if given.get(one) is not None), "")
    most = given[key] if key else MOST_WRITTEN
    positions = limits.positions or POSITIONS
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise refuse(key, "which must be a whole number of at least 1")
    if most >= positions:
        if not key:
            raise StudyError(
                f"task '{name}': an answer may have {most} tokens, as generation_kwargs says no max_gen_toks, and the "
                f"model takes {positions} with the prompt: set max_gen_toks to less"
            )
        raise refuse(key, f"and the model takes {positions} tokens with the prompt: ask for less")
    for least in ("min_new_tokens", "min_length"):
        if isinstance(given.get(least), int) and given[least] > most:
            raise refuse(least, f"and an answer has at most {most} tokens: ask for less")
    return Ending(most, tuple(stop for stop in stops if stop))


_written: dict[tuple[str, int], str] = {}  # by settings and size of the vocabulary: what is wrong with them


def check_writing(name: str, task: HarnessTask, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises StudyError for `generation_kwargs` with which no model could write: all trials would fail."""
    import torch

    from trainers.models import files

    given = task.config.generation_kwargs
    ends = given.get("eos_token_id")
    if ends is not None and tokenizer.eos_token_id not in (ends if isinstance(ends, list) else [ends]):
        raise StudyError(
            f"task '{name}': generation_kwargs has eos_token_id: {ends}, and the answers that are trained end with "
            f"{tokenizer.eos_token_id}, the tokenizer's: leave it out"
        )
    key = (repr(given), len(tokenizer))
    if key not in _written:
        _written[key] = ""
        try:
            with harness.quiet(), torch.random.fork_rng(devices=[]), files.quiet(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                harness.try_to_write(tokenizer, given)
        except Exception as error:  # of any of three libraries
            _written[key] = one_line(error)
    if _written[key]:
        raise StudyError(f"task '{name}': no answer can be written with generation_kwargs {given}: {_written[key]}")


def wrong_row(context: Sequence[int], completion: Sequence[int]) -> str:
    """Why the tokens of a prompt and its answer cannot be trained on; "" where they can."""
    if not context and not completion:
        return "its prompt and its right answer are empty"
    if not completion:
        return "its right answer has no tokens: nothing could be learnt from it"
    return "" if context else "its prompt is empty"


def wrong_question(tokens: Sequence[Tokens], positions: int, *, local: bool) -> str:
    """Why the tokens of a question, prompt and continuation of each choice, cannot be scored; "" where they can.

    local   choices that are the same are wrong; else they are as a public data set has them
    """
    same: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = defaultdict(list)
    for number, (context, continuation) in enumerate(tokens):
        if not continuation:
            return f"choice {number} has no tokens" if len(tokens) > 1 else "its answer has no tokens"
        if not context:
            return "its prompt is empty"
        if len(context) + len(continuation) - (positions + 1) >= len(context):
            what = f"choice {number}" if len(tokens) > 1 else "its answer"
            return f"{what} has {len(continuation)} tokens, and the model takes {positions} with the prompt"
        same[tuple(context), tuple(continuation)].append(number)
    if local and (twice := next((numbers for numbers in same.values() if len(numbers) > 1), None)):
        return f"choices {twice[0]} and {twice[1]} are the same tokens"
    return ""


def is_unknown(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> bool:
    """Whether a text has characters that the tokenizer does not know."""
    return tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """The tokens of prompts that an answer is written behind."""
    with harness.quiet():
        return harness.encode(tokenizer, prompts)


def quoted(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of tokens, for a message."""
    return shown(repr(str(tokenizer.decode(list(ids)))))
