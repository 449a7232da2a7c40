"""Whether a model that was loaded is whole: tensors, values, tokenizer.

    notes = checks.check_report(report, name="tiny-moe")                    # what the user should know, a line each
    checks.check_runs(model, name="tiny-moe", numbers="float32")            # StudyError, in one line

transformers draws a weight that the files lack at random, and looks no token up before it is used: either would go
wrong in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from allocators.core.errors import NotFiniteError, StudyError
from trainers.models import files, sharding
from trainers.models.tokenizer import check_reads

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENS = 16  # of the pass that shows whether logits are finite


def check_report(report: Mapping[str, Any], *, name: str) -> list[str]:
    """Notes on tensors that were read for nothing.

    report   what transformers gives for `output_loading_info`

    Raises StudyError for tensors that the files lack, have in another size, or that could not be converted.
    """
    if mismatched := sorted(report.get("mismatched_keys", ())):
        tensor, found, wanted = mismatched[0]
        raise StudyError(
            f"{tensor} of '{name}' is {list(found)} in its files, and config.json makes it {list(wanted)}"
            f"{files.more(mismatched)}: is config.json another model's?"
        )
    if missing := sorted(report.get("missing_keys", ())):
        example = sorted(report.get("unexpected_keys", ()))
        instead = f"; they hold {example[0]}, which the model does not have" if example else ""
        raise StudyError(
            f"the files of '{name}' lack {missing[0]}{files.more(missing)}, which would be drawn at random{instead}: "
            "save the whole model with save_pretrained(...)"
        )
    if errors := report.get("error_msgs") or report.get("conversion_errors"):
        text = " ".join(str(next(iter(errors.items())) if isinstance(errors, Mapping) else errors[0]).split())
        raise StudyError(f"tensors of '{name}' cannot be read: {text[:300]}")
    if unused := sorted(report.get("unexpected_keys", ())):
        what = f"{len(unused)} tensors" if len(unused) > 1 else "1 tensor"
        return [f"{what} of the files of '{name}' unused, e.g. {unused[0]}: config.json has no place for them"]
    return []


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: Any, *, name: str) -> None:
    """Gives the tokenizer a pad token whose id the embedding has: padding is masked, so any known token serves.

    Raises StudyError where the tokenizer has no eos token, or another token has an id outside of the embedding.
    """
    check_reads(tokenizer, name)
    rows: int = model.get_input_embeddings().num_embeddings
    if tokenizer.eos_token is None or tokenizer.eos_token_id is None:
        raise StudyError(
            f"the tokenizer of '{name}' has no eos token: name one of its tokens in tokenizer_config.json (eos_token)"
        )
    outside = {token: number for token, number in tokenizer.get_vocab().items() if not 0 <= number < rows}
    pad = tokenizer.pad_token_id
    if pad is None or not 0 <= pad < rows:
        outside.pop(tokenizer.pad_token or "", None)
        tokenizer.pad_token = tokenizer.eos_token
    if outside:
        number, token = min((number, token) for token, number in outside.items())
        raise StudyError(
            f"token {token}{files.more(outside)} of '{name}' is {number}, the embedding has {rows} rows: resize "
            "the embedding, or take the tokenizer that belongs to this model"
        )


def check_runs(model: Any, *, name: str, numbers: str) -> None:
    """Looks at every weight, and at the logits of a pass as an evaluation, a training and a written answer make it.

    Of a sharded model all workers call this. Raises NotFiniteError where a weight or a logit is not finite, StudyError
    where the model does not run: config.json may hold values that nothing asks for before.
    """
    if bad := _not_finite(model):
        raise NotFiniteError(
            f"the base's logits are not finite: {bad} of '{name}' holds values that are not finite in {numbers}"
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 0
    count = min(_TOKENS, positions) if positions > 0 else _TOKENS
    tokens = (torch.arange(count, device=model.device) * 7919 % vocabulary).unsqueeze(0)
    try:
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False).logits
    except Exception as error:  # whatever sizes do not fit
        raise StudyError(f"model '{name}' does not run: {files.reason_of(error)}") from error
    if not logits.isfinite().all():
        raise NotFiniteError(
            f"the base's logits are not finite: '{name}' overflows in {numbers}; try dtype=float32, or bfloat16"
        )
    _check_modes(model, tokens, name)


def _check_modes(model: Any, tokens: torch.Tensor, name: str) -> None:
    """Raises StudyError for a model that evaluates a text whole, and fails in training or behind a known context."""
    mode, devices = "", [model.device] if model.device.type == "cuda" else []
    padded = torch.ones_like(tokens)
    padded[:, : tokens.shape[1] // 4] = 0
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            mode = "train"
            model.train()(input_ids=tokens, attention_mask=padded, use_cache=False)
            mode = "write answers"
            _read_on(model.eval(), tokens, last=1)
            mode = "read on from a context"
            _read_on(model, tokens, last=tokens.shape[1] // 2)
    except Exception as error:  # dropout that is no probability, a window without room
        raise StudyError(f"model '{name}' does not {mode}: {files.reason_of(error)}: correct config.json") from error
    finally:
        model.eval()


def _read_on(model: Any, tokens: torch.Tensor, *, last: int) -> None:
    """Reads the tokens up to the last ones, and these behind them."""
    if 0 < last < tokens.shape[1]:
        past = model(input_ids=tokens[:, :-last], use_cache=True).past_key_values
        model(input_ids=tokens[:, -last:], past_key_values=past, use_cache=True)


def _not_finite(model: Any) -> str:
    """The first weight with a value that is not finite, "" where there is none; all workers say the same."""
    parts = ((path, sharding.local_rows(parameter.detach())[0]) for path, parameter in model.named_parameters())
    bad = next((path for path, rows in parts if rows.is_floating_point() and rows.numel() and not _is_finite(rows)), "")
    if sharding.is_sharded(model):
        found = [""] * dist.get_world_size()
        dist.all_gather_object(found, bad)
        bad = next(filter(None, found), "")
    return bad


def _is_finite(rows: torch.Tensor) -> bool:
    """Without a tensor of booleans as large as the weights: extremes are not finite where a value is not."""
    lowest, highest = rows.aminmax()
    return bool(lowest.isfinite() and highest.isfinite())
