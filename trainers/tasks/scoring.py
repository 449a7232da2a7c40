"""Log-likelihoods of continuations, as lm-eval's HFLM returns them, with each context run once for all that follow it.

    answers = loglikelihoods(model, [(("2+2=", " 4"), [5, 9, 5, 2], [7]), ...], max_length=2048, batch_size=32)
    answers[0]                               # (Σ log p of the continuation's tokens, whether greedy decoding writes it)

lm-eval runs every choice of a question with the whole question, and takes logits and their softmax at every position.
Here a batch of contexts of like length, the shortest of L + 1 tokens, runs in two steps:

    trunk      the first L tokens of every context, equally long: no padding, no mask, no logits; keys and values stay
    branches   for every continuation what is left of its context and the continuation itself, padded on the right,
               behind a copy of its context's keys and values that each layer makes and lets go (`_Branches`)

so places in the cache are places in the sequence, which sliding windows need, and attention is causal throughout.
Logits are taken only from where the first continuation begins. Continuations that differ in their last token alone are
one branch. Where nothing is shared (one continuation to a context, models that `shares_contexts` refuses) there is no
trunk.

Answers are lm-eval's, but for a text that it is asked for twice at once with the border between context and
continuation at two places: it reads both from one border on (0.4.13), here each is read from its own.

Memory: keys and values of at most `batch_size` contexts, without their continuations, are held; a pass has no more
tokens than `batch_size` times the longest sequence of its batch, which is what lm-eval's pass has.

Shapes: B branches, S tokens, K positions with logits, N requests, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from trainers.models import sharding
from trainers.waiting import one_sample_a_row, send

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TokenisedRequest = tuple[Any, list[int], list[int]]  # what was asked, context, continuation: as lm-eval tokenises them
Answer = tuple[float, bool]

MANY = 4  # × batch_size branches in a pass, at most: each has a copy of its context's keys and values in one layer
# What a pass costs besides its tokens, in tokens: no more are run in vain (padding, contexts again) to spare one.
PASS = {"cpu": 64, "else": 4096}
AT_ONCE = 1024  # positions whose V logits are summed up in fp32 together


def shares_contexts(model: Any) -> bool:
    """Whether what a context leaves behind is keys and values by position, that continuations can start from.

    Not so with recurrent, convolutional or indexed states, layers that share keys and values, rotations that depend on
    the whole length, and code of the hub's own. A sharded base runs as few passes as it can. A quantised one may round
    by what else is in the batch, so its batches stay whole sequences.
    """
    config = model.config.get_text_config(decoder=True)
    return (
        type(model).__module__.startswith("transformers.")
        and not sharding.is_sharded(model)
        and getattr(model, "hf_quantizer", None) is None
        and not model._is_stateful
        and model._supports_default_dynamic_cache()
        and not any(kind in str(getattr(config, "rope_parameters", None)) for kind in ("dynamic", "longrope"))
        and "chunked_attention" not in (getattr(config, "layer_types", None) or ())
        and {type(layer) for layer in DynamicCache(config=model.config).layers}
        <= {DynamicLayer, DynamicSlidingWindowLayer}
    )


@torch.no_grad()
@one_sample_a_row()
def loglikelihoods(
    model: PreTrainedModel, requests: Sequence[TokenisedRequest], *, max_length: int, batch_size: int
) -> list[Answer]:
    """(Σ log p, greedy) of every request, in order. Sequences above max_length + 1 lose their beginning, as in lm-eval.

    The model should be in eval mode. log p is summed in fp32 whatever its dtype (lm-eval's stays in that dtype).
    """
    places, results = [], []
    spare = PASS["cpu" if model.device.type == "cpu" else "else"]
    share = shares_contexts(model)
    for contexts, trunk in _batches(requests, share, max_length=max_length, batch_size=batch_size, spare=spare):
        for branches, past in _passes(model, contexts, trunk, batch_size=batch_size, spare=spare):
            places += [place for branch in branches for place in branch.places]
            results.append(_scores(model, branches, past, requests))
    answers: list[Any] = [None] * len(requests)
    if results:  # the device is waited for once, here
        for place, logp, greedy in zip(places, *torch.cat(results, dim=1).tolist(), strict=True):
            answers[place] = (logp, bool(greedy))
    return answers


@dataclass(frozen=True)
class _Branch:
    """What runs behind a trunk.

    tokens    those of the whole sequence that the trunk does not have, without the last one, which predicts nothing
    first     place in `tokens` that predicts the continuation's first token
    context   the trunk's row
    places    of the requests that are answered here: they differ in their last token
    """

    tokens: tuple[int, ...]
    first: int
    context: int
    places: list[int]


class _Branches(DynamicCache):
    """A trunk's cache as branches see it: row context_B[b] for branch b, copied in a layer while that layer runs."""

    def __init__(self, trunk: DynamicCache, context_B: Tensor) -> None:
        super().__init__()
        self.layers, self.layer_class_to_replicate = trunk.layers, None
        self.context_B = context_B

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        layer: Any = copy.copy(self.layers[layer_idx])  # the trunk's own layer stays as it was, for the next pass
        layer.batch_select_indices(self.context_B)
        return layer.update(key_states, value_states, *args, **kwargs)


_Contexts = list[tuple[tuple[int, ...], dict[tuple[int, ...], list[int]]]]  # context, its branches: heads to places


def _batches(
    requests: Sequence[TokenisedRequest], share: bool, *, max_length: int, batch_size: int, spare: int
) -> Iterator[tuple[_Contexts, int]]:
    """At most batch_size contexts each, of like length, the longest first; and the length of the trunk."""
    by_context: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
    for place, (_, context, continuation) in enumerate(requests):
        cut = max(0, len(context) + len(continuation) - (max_length + 1))
        assert continuation, "an empty continuation has no probability"
        assert cut < len(context), "max_length has no room for the continuation and a token before it"
        heads = by_context.setdefault(tuple(context[cut:]), {})
        heads.setdefault(tuple(continuation[:-1]), []).append(place)
    shared: _Contexts = []
    alone: _Contexts = []
    for tokens, heads in sorted(by_context.items(), key=lambda item: -len(item[0])):
        if share and len(heads) > 1:
            shared.append((tokens, heads))
        else:
            alone += [(tokens, {head: places}) for head, places in heads.items()]
    batch: _Contexts = []
    for tokens, heads in shared:
        again = sum((len(longer) - len(tokens)) * len(branches) for longer, branches in batch)
        if len(batch) == batch_size or again > spare:
            yield batch, len(batch[-1][0]) - 1
            batch = []
        batch.append((tokens, heads))
    if batch:
        yield batch, len(batch[-1][0]) - 1
    for start in range(0, len(alone), batch_size):
        yield alone[start : start + batch_size], 0


def _passes(
    model: PreTrainedModel, contexts: _Contexts, trunk: int, *, batch_size: int, spare: int
) -> Iterator[tuple[list[_Branch], _Branches | None]]:
    """Runs the trunk of a batch, and says which branches go through the model together behind it."""
    past = None
    if trunk:
        past = DynamicCache(config=model.config)
        ids_BS = send([context[:trunk] for context, _ in contexts], model.device)
        none_K = torch.arange(0, device=model.device)
        model(input_ids=ids_BS, past_key_values=past, use_cache=True, logits_to_keep=none_K)
    branches = [
        _Branch(context[trunk:] + head, len(context) - 1 - trunk, row, places)
        for row, (context, heads) in enumerate(contexts)
        for head, places in heads.items()
    ]
    branches.sort(key=lambda branch: -len(branch.tokens))
    most_tokens = batch_size * (trunk + len(branches[0].tokens))
    while branches:
        width, count, padding = len(branches[0].tokens), 0, 0
        most = min(MANY * batch_size, most_tokens // width, len(branches))
        while count < most and padding <= spare:
            padding += width - len(branches[count].tokens)
            count += 1
        together, branches = branches[:count], branches[count:]
        rows_B = send([branch.context for branch in together], model.device)
        yield together, _Branches(past, rows_B) if past is not None else None


def _scores(
    model: PreTrainedModel, branches: list[_Branch], past: _Branches | None, requests: Sequence[TokenisedRequest]
) -> Tensor:
    """[Σ log p, greedy] of the requests of these branches, [2, N] in fp32."""
    width, first = len(branches[0].tokens), min(branch.first for branch in branches)
    padded = [branch.tokens + (0,) * (width - len(branch.tokens)) for branch in branches]
    # For each request: its branch, and place among the kept logits and token for every token of its continuation.
    row_N, at_NK, token_NK = [], [], []
    for row, branch in enumerate(branches):
        for place in branch.places:
            continuation = requests[place][2]
            padding = width - first - len(continuation)
            row_N.append(row)
            at_NK.append([*range(branch.first - first, branch.first - first + len(continuation)), *[0] * padding])
            token_NK.append([*continuation, *[-1] * padding])
    ids_BS, rows, at, token = (send(x, model.device) for x in (padded, row_N, at_NK, token_NK))
    keep_K = torch.arange(first, width, device=model.device)
    logits_BKV = model(input_ids=ids_BS, past_key_values=past, use_cache=past is not None, logits_to_keep=keep_K).logits
    parts = logits_BKV.split(max(1, AT_ONCE // len(keep_K)))
    norm_BK = torch.cat([part.float().logsumexp(-1) for part in parts])
    real, rows = token >= 0, rows[:, None]
    logp_NK = logits_BKV[rows, at, token.clamp(min=0)].float() - norm_BK[rows, at]
    greedy_NK = logits_BKV.argmax(-1)[rows, at] == token
    return torch.stack([logp_NK.masked_fill(~real, 0).sum(-1), (greedy_NK | ~real).all(-1).float()])
