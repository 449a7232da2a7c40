"""Scores are lm-eval's, request by request, and contexts run once.

python -m pytest tests/trainers/tasks/test_scoring.py
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allocators.core.types import ExpertCounts, LoraSettings
from tests.trainers import reference
from tests.trainers.conftest import char_tokenizer
from tests.trainers.models import test_families
from trainers import adapter as adapters
from trainers import models
from trainers.tasks import scoring

ASKED = ("", "")
SHARED = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8},
    **{family: reference.FAMILIES[family] for family in ("olmoe", "qwen3_moe", "deepseek_v3")},
    "gpt_oss": reference.FAMILIES["gpt_oss"],  # sliding windows of 8 too
}
WHOLE = {
    "qwen3_next": test_families.OTHER_MOE["qwen3_next"],  # linear attention
    "lfm2_moe": test_families.OTHER_MOE["lfm2_moe"],  # convolutions
    "minimax": test_families.OTHER_MOE["minimax"],  # a cache of its own
}


def build(family: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    known = vars(type(AutoConfig.for_model(family))())
    sizes = {key: value for key, value in (reference._COMMON | test_families._MOE).items() if key in known}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **(sizes | {**SHARED, **WHOLE}[family])), dtype=torch.float32
    ).eval()


tiny = cache(build)


@cache
def _lm(model: Any, batch_size: int, max_length: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    tokenizer = char_tokenizer()
    return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, max_length=max_length)


def by_lm_eval(
    model: Any, requests: list[scoring.TokenisedRequest], *, max_length: int = 64, batch_size: int = 3
) -> Any:
    return _lm(model, batch_size, max_length)._loglikelihood_tokens(requests, disable_tqdm=True)


def assert_equal(
    model: Any, requests: list[scoring.TokenisedRequest], *, max_length: int = 64, batch_size: int = 3
) -> None:
    ours = scoring.loglikelihoods(model, requests, max_length=max_length, batch_size=batch_size)
    assert_same(ours, by_lm_eval(model, requests, max_length=max_length))


def assert_same(ours: Sequence[scoring.Answer], theirs: Sequence[scoring.Answer]) -> None:
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [p for p, _ in ours] == pytest.approx([p for p, _ in theirs], abs=1e-4)


def questions(seed: int = 0) -> list[scoring.TokenisedRequest]:
    """Questions with choices of one to nine tokens, with choices of one token, without choices, and one asked twice."""
    rng = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, 64) for _ in range(count)]

    def question(length: int, choices: int, longest: int) -> list[scoring.TokenisedRequest]:
        context = tokens(length)
        return [(ASKED, context, tokens(rng.randint(1, longest))) for _ in range(choices)]

    asked = [question(rng.randint(2, 30), 4, 9) for _ in range(7)]
    asked += [question(rng.randint(1, 12), 3, 1) for _ in range(3)]
    asked += [question(rng.randint(1, 20), 1, 5) for _ in range(3)]
    asked += [question(1, 3, 4), asked[0], asked[1][:2] + question(9, 2, 3)]
    requests = [request for one in asked for request in one]
    rng.shuffle(requests)
    return requests


def greedy_request(model: Any, context: list[int], length: int) -> scoring.TokenisedRequest:
    """A continuation that greedy decoding writes."""
    ids = torch.tensor([context])
    for _ in range(length):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ASKED, context, ids[0, len(context) :].tolist()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], list[tuple[int, ...]]]]:
    """Notes the [rows, tokens] that go through the first layer of a model, and the positions through its head."""
    noted, hooks = [], []

    def watch(model: Any) -> list[tuple[int, ...]]:
        def layer(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            noted.append(tuple(hidden.shape[:2]))

        def head(module: Any, args: tuple[Any, ...]) -> None:
            noted[-1] = (*noted[-1], args[0].shape[1])

        hooks.append(model.model.layers[0].register_forward_pre_hook(layer, with_kwargs=True))
        hooks.append(model.lm_head.register_forward_pre_hook(head))
        return noted

    yield watch
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("max_length", [64, 14])  # 14: most contexts lose their beginning
@pytest.mark.parametrize("family", [*SHARED, *WHOLE])
def test_scores_are_those_of_lm_eval(family: str, max_length: int) -> None:
    model = tiny(family)
    requests = [*questions(), greedy_request(model, [5, 6, 7, 8], 3), greedy_request(model, [5, 6, 7, 8], 1)]
    assert scoring.shares_contexts(model) == (family in SHARED)
    assert sum(greedy for _, greedy in by_lm_eval(model, requests)) >= 2
    assert_equal(model, requests, max_length=max_length)


token = st.integers(3, 5)
context = st.lists(token, min_size=1, max_size=6)
continuation = st.lists(token, min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(requests=st.lists(st.tuples(st.just(ASKED), context, continuation), max_size=12), batch_size=st.integers(1, 5))
def test_any_requests_in_any_order_are_answered_in_theirs(
    requests: list[scoring.TokenisedRequest], batch_size: int
) -> None:
    """lm-eval is asked for each alone: see the next test."""
    model = tiny("llama")
    ours = scoring.loglikelihoods(model, requests, max_length=8, batch_size=batch_size)
    assert_same(ours, [by_lm_eval(model, [request], max_length=8)[0] for request in requests])


def test_one_text_divided_in_two_ways() -> None:
    """Where lm-eval errs: asked for both at once it reads the second at the place where the first begins."""
    model, requests = tiny("llama"), [(ASKED, [4], [3, 3]), (ASKED, [4, 3], [3])]
    logs_SV = model(torch.tensor([[4, 3, 3]])).logits[0].detach().log_softmax(-1)
    expected = [float(logs_SV[0, 3] + logs_SV[1, 3]), float(logs_SV[1, 3])]
    ours = scoring.loglikelihoods(model, requests, max_length=8, batch_size=2)
    assert [p for p, _ in ours] == pytest.approx(expected)
    assert [by_lm_eval(model, [request])[0][0] for request in requests] == pytest.approx(expected, abs=1e-5)
    assert by_lm_eval(model, requests)[1][0] == pytest.approx(float(logs_SV[0, 3]), abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "olmoe"])
def test_an_adapter_counts(family: str) -> None:
    model = build(family)
    before = scoring.loglikelihoods(model, questions(), max_length=64, batch_size=3)
    shape = models.shape_of_model(model, name="tiny")
    dense = ExpertCounts({module.path: 3 for module in shape.modules})
    allocation = reference.some_experts(shape) if shape.is_moe else dense
    adapter = adapters.attach(model, allocation, shape=shape, lora=LoraSettings(rank=2, lora_alpha=4))
    reference.fill(adapter)
    model.eval()
    assert scoring.loglikelihoods(model, questions(), max_length=64, batch_size=3) != before
    assert_equal(model, questions())
    adapter.detach()
    assert scoring.loglikelihoods(model, questions(), max_length=64, batch_size=3) == before


def test_contexts_run_once_and_only_answers_have_logits(passes: Callable[[Any], list[tuple[int, ...]]]) -> None:
    model = tiny("qwen3_moe")
    long, short = [7] * 7, [5] * 5
    requests = [(ASKED, c, [9, 3, 4][:n]) for c in (long, short) for n in (1, 2, 3)]
    seen = passes(model)
    scoring.loglikelihoods(model, requests, max_length=64, batch_size=4)
    # What both contexts have behind the trunk of 4 tokens, less the last token: 3, 4, 5 and 1, 2, 3. The shorter one's
    # first token is predicted by the first place of these, so that all of them have logits.
    assert seen == [(2, 4, 0), (6, 5, 5)]


def test_equal_contexts_of_several_documents_are_one(passes: Callable[[Any], list[tuple[int, ...]]]) -> None:
    requests = [(ASKED, [7] * 6, [9, k]) for k in range(3, 9)] + [(ASKED, [7] * 6, [8, 3])]
    seen = passes(tiny("llama"))
    scoring.loglikelihoods(tiny("llama"), requests, max_length=64, batch_size=4)
    assert seen == [(1, 5, 0), (2, 2, 2)]  # six continuations differ in their last token alone


def test_one_token_continuations_are_read_off_their_context(passes: Callable[[Any], list[tuple[int, ...]]]) -> None:
    requests = [(ASKED, [c] * 6, [k]) for c in (7, 8) for k in range(3, 7)]
    seen = passes(tiny("llama"))
    scoring.loglikelihoods(tiny("llama"), requests, max_length=64, batch_size=4)
    assert seen == [(2, 6, 1)]


def test_contexts_that_differ_by_choice_share_nothing(passes: Callable[[Any], list[tuple[int, ...]]]) -> None:
    requests = [(ASKED, [7] * n + [k] * 3, [5, 6, 4]) for n in (4, 5) for k in (8, 9)]
    seen = passes(tiny("llama"))
    scoring.loglikelihoods(tiny("llama"), requests, max_length=64, batch_size=4)
    assert seen == [(4, 10, 4)]  # 3 for the continuation, one more for the shorter context


def test_a_pass_has_no_more_tokens_than_whole_sequences_would(passes: Callable[[Any], list[tuple[int, ...]]]) -> None:
    model, requests = tiny("llama"), questions()
    seen = passes(model)
    for batch_size in (1, 2, 5):
        seen.clear()
        scoring.loglikelihoods(model, requests, max_length=64, batch_size=batch_size)
        longest = max(len(c) + len(a) - 1 for _, c, a in requests)
        assert max(rows * tokens for rows, tokens, _ in seen) <= batch_size * longest
        assert max(rows for rows, *_ in seen) <= scoring.MANY * batch_size


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        {"sliding_window": 8, "layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 8},
    ],
    ids=["dynamic rope", "chunks"],
)
def test_what_depends_on_more_than_places_shares_nothing(changes: dict[str, Any]) -> None:
    from transformers import AutoConfig

    model = tiny("llama")
    assert scoring.shares_contexts(model)
    before, model.config = model.config, AutoConfig.for_model("llama", **(reference._COMMON | changes))
    try:
        assert not scoring.shares_contexts(model)
    finally:
        model.config = before


def test_bfloat16_is_summed_in_fp32() -> None:
    model = build("llama").to(torch.bfloat16)
    request = (ASKED, [5, 6, 7], [8, 9, 10])
    ((logp, _),) = scoring.loglikelihoods(model, [request], max_length=64, batch_size=1)
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7, 8, 9]])).logits[0, 2:].float()
    expected = logits.log_softmax(-1)[range(3), request[2]].sum().item()
    assert logp == pytest.approx(expected, abs=1e-5)
