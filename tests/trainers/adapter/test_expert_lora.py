"""LoRA on chosen experts: laws first (formula, gradients, what must not change), then counts that speed rests on.

python -m pytest tests/trainers/adapter/test_expert_lora.py
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from allocators.core.errors import StudyError, TrialError
from allocators.core.types import ExpertSelection, LoraSettings
from tests.trainers.reference import (
    FAMILIES,
    PEFT_STACKS,
    adapted_weights,
    digest,
    every_expert,
    experts_loop,
    fill,
    from_peft,
    gradient,
    logits,
    peft_factors,
    shape_of_model,
    share_first_factor,
    some_experts,
    tiny_model,
    tokens,
)
from trainers.adapter import attach
from trainers.adapter.expert_lora import ExpertLora, experts_forward, weight_stacks

families = pytest.mark.parametrize("family", FAMILIES)
SELECTIONS = {"some": some_experts, "every": every_expert, "none": lambda shape: ExpertSelection({})}
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def attached(model: Any, selection: ExpertSelection | None = None, **changes: Any) -> Any:
    shape = shape_of_model(model)
    lora = LoraSettings(**({"rank": 3, "lora_alpha": 6.0} | changes))
    return attach(model, some_experts(shape) if selection is None else selection, shape=shape, lora=lora)


def run_every_row(adapter: Any) -> None:
    """As on a GPU: no rows are picked."""
    for lora in adapter.experts.values():
        lora.every_row = True


# --- counts, names, exactness of a fresh adapter ---


@families
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("rank", [1, 4])
def test_trainable_parameters_are_as_counted(family: str, selection: str, rank: int) -> None:
    model = tiny_model(family)
    shape = shape_of_model(model)
    chosen = SELECTIONS[selection](shape)
    adapter = attached(model, chosen, rank=rank)
    assert adapter.num_trainable == chosen.trainable_params(shape, rank=rank)
    assert sum(p.numel() for p in adapter.parameters() if p.requires_grad) == adapter.num_trainable


def test_what_is_adapted_and_what_is_not() -> None:
    def adapted(family: str) -> set[str]:
        return {name.removeprefix("model.layers.") for name, _ in attached(tiny_model(family)).named_parameters()}

    qwen = adapted("qwen2_moe")
    assert {"0.mlp.gate.lora_A", "1.mlp.shared_expert.up_proj.lora_B", "0.mlp.experts.gate_proj.lora_A"} <= qwen
    assert not any("shared_expert_gate" in name for name in qwen)
    deepseek = adapted("deepseek_v3")  # its first layer is dense
    assert {"0.self_attn.q_a_proj.lora_A", "1.mlp.shared_experts.up_proj.lora_A"} <= deepseek
    assert not any(name.startswith("0.mlp") for name in deepseek)


@families
@pytest.mark.parametrize("every_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_nothing_bit_for_bit(family: str, every_row: bool, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    expected = logits(model)
    adapter = attached(model)
    if every_row:
        run_every_row(adapter)
    assert torch.equal(logits(model), expected)


# --- the formula ---


@families
@pytest.mark.parametrize("selection", ["some", "every"])
@pytest.mark.parametrize("every_row", [False, True])
def test_forward_and_gradients_are_those_of_the_summed_weights(family: str, selection: str, every_row: bool) -> None:
    model = tiny_model(family)
    shape = shape_of_model(model)
    chosen = SELECTIONS[selection](shape)
    adapter = attached(model, chosen)
    fill(adapter)
    if every_row:
        run_every_row(adapter)
    out = model(tokens()).logits
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    out.backward(weight)
    adapter.check_gradients()

    reference = tiny_model(family)
    reference.set_experts_implementation("eager")
    factors = {name: p.detach().clone().requires_grad_() for name, p in adapter.named_parameters()}
    weights = adapted_weights(reference, shape, chosen, factors, scale=2.0)
    expected = torch.func.functional_call(reference, weights, (tokens(),)).logits
    expected.backward(weight)
    torch.testing.assert_close(out, expected, **CLOSE)
    for name, parameter in adapter.named_parameters():
        wanted = gradient(factors[name])
        size = wanted.abs().max()
        torch.testing.assert_close(gradient(parameter) / size, wanted / size, **CLOSE, msg=partial("{}{}".format, name))


def expert_layer(
    num_experts: int,
    chosen: tuple[int, ...],
    rank: int,
    *,
    hidden: int = 8,
    width: int = 4,
    dropout: float = 0.0,
    seed: int = 0,
) -> tuple[Any, ExpertLora]:
    """One layer's experts as transformers builds them, LoRA with random factors on the chosen ones."""
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(*size, generator=generator) * 0.4)

    config = OlmoeConfig(hidden_size=hidden, intermediate_size=width, num_experts=num_experts)
    config._experts_implementation = "grouped_mm"
    module = OlmoeExperts(config)
    for name, parameter in module.named_parameters():
        setattr(module, name, random(*parameter.shape).requires_grad_(False))
    sizes = {"gate_proj": (hidden, width), "up_proj": (hidden, width), "down_proj": (width, hidden)}
    pairs = {n: (random(len(chosen), rank, i), random(len(chosen), o, rank)) for n, (i, o) in sizes.items()}
    return module, ExpertLora(module, chosen, pairs, path="layer", scale=0.5, dropout=dropout)


def forward(module: Any, lora: Any, *inputs: Tensor) -> Tensor:
    vars(module)["lora"] = lora
    return experts_forward(module, *inputs)


# num_experts, chosen, rank, index_TK, every_row
Layer = tuple[int, tuple[int, ...], int, Tensor, bool]


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    num_experts = draw(st.integers(1, 6))
    chosen = tuple(sorted(draw(st.sets(st.integers(0, num_experts - 1), min_size=1))))
    picks = st.permutations(range(num_experts)).map(lambda order: order[: min(2, num_experts)])
    index = draw(st.lists(picks, min_size=1, max_size=5))  # some draws give a chosen expert no token, or all of them
    return num_experts, chosen, draw(st.integers(1, 5)), torch.tensor(index), draw(st.booleans())


@settings(deadline=None, max_examples=60)
@given(layers())
def test_one_layer_is_the_loop_over_tokens(layer: Layer) -> None:
    num_experts, chosen, rank, index, every_row = layer
    module, lora = expert_layer(num_experts, chosen, rank)
    lora.every_row |= every_row
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(len(index), 8, generator=generator).requires_grad_()
    weight = torch.rand(index.shape, generator=generator).requires_grad_()
    grad = torch.randn(len(index), 8, generator=generator)
    leaves = [hidden, weight, *(p for pair in lora.pairs.values() for p in pair)]

    out = forward(module, lora, hidden, index, weight)
    actual = torch.autograd.grad(out, leaves, grad)
    by_expert = {name: {expert: (a[c], b[c]) for c, expert in enumerate(chosen)} for name, (a, b) in lora.pairs.items()}
    expected = experts_loop(hidden, index, weight, module.gate_up_proj, module.down_proj, by_expert, scale=0.5)
    torch.testing.assert_close(out, expected, **CLOSE)
    wanted = torch.autograd.grad(expected, leaves, grad, allow_unused=True)
    for mine, theirs in zip(actual, wanted, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if theirs is None else theirs, **CLOSE)


def test_experts_without_a_gate() -> None:
    from transformers.integrations.moe import use_experts_implementation

    @use_experts_implementation(has_gate=False)
    class Plain(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts, self.act_fn = 2, torch.relu
            self.up_proj = nn.Parameter(torch.randn(2, 4, 8), requires_grad=False)
            self.down_proj = nn.Parameter(torch.randn(2, 8, 4), requires_grad=False)

    module = Plain(SimpleNamespace(_experts_implementation="grouped_mm"))
    assert weight_stacks(module, path="layer") == {"up_proj": ("up_proj",), "down_proj": ("down_proj",)}
    a, b, c, d = (torch.randn(*size) for size in ((1, 2, 8), (1, 4, 2), (1, 2, 4), (1, 8, 2)))
    pairs = {"up_proj": (nn.Parameter(a), nn.Parameter(b)), "down_proj": (nn.Parameter(c), nn.Parameter(d))}
    lora = ExpertLora(module, (1,), pairs, path="layer", scale=0.5, dropout=0.0)
    x = torch.randn(3, 8)
    out = forward(module, lora, x, torch.tensor([[0], [1], [1]]), torch.ones(3, 1))
    up, down = module.up_proj[1] + 0.5 * b[0] @ a[0], module.down_proj[1] + 0.5 * d[0] @ c[0]
    torch.testing.assert_close(out[1:], torch.relu(x[1:] @ up.T) @ down.T)
    torch.testing.assert_close(out[:1], torch.relu(x[:1] @ module.up_proj[0].T) @ module.down_proj[0].T)


def test_peft_gives_the_same_where_both_can_say_it() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_model("olmoe")
    shape = shape_of_model(model)
    experts_only = type(shape)(shape.name, shape.of_role("expert"), shape.num_layers)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=[], target_parameters=PEFT_STACKS)
    wrapped = get_peft_model(tiny_model("olmoe"), config)
    pairs = peft_factors(wrapped)
    assert len(pairs) == 4  # two stacks in two layers
    generator = torch.Generator().manual_seed(2)
    for pair in pairs.values():
        for factor in pair:
            factor.data.copy_(torch.randn(factor.shape, generator=generator) * 0.1)
    adapter = attach(model, every_expert(shape), shape=experts_only, lora=LoraSettings(rank=4, lora_alpha=8))
    adapter.load_state_dict({n: v for stack, pair in pairs.items() for n, v in from_peft(stack, *pair, rank=4).items()})
    mine, theirs = model(tokens()).logits, wrapped(tokens()).logits
    weight = torch.randn(mine.shape, generator=generator)
    mine.backward(weight)
    theirs.backward(weight)
    torch.testing.assert_close(mine, theirs, **CLOSE)
    gradients = share_first_factor({name: gradient(p) for name, p in adapter.named_parameters()})
    for stack, (a, b) in pairs.items():
        for name, theirs in from_peft(stack, gradient(a), gradient(b), rank=4).items():
            torch.testing.assert_close(gradients[name], theirs, **CLOSE)


# --- what must not change ---


@pytest.mark.parametrize("every_row", [False, True])
def test_tokens_of_other_experts_are_untouched_bit_for_bit(every_row: bool) -> None:
    module, lora = expert_layer(8, (1, 4), rank=4)
    lora.every_row = every_row
    index = torch.tensor([[0, 2], [1, 2], [3, 7], [5, 4], [6, 0]])
    hidden, weight = torch.randn(5, 8), torch.rand(5, 2)
    changed = forward(module, lora, hidden, index, weight) != forward(module, None, hidden, index, weight)
    assert changed.any(dim=1).tolist() == [False, True, False, True, False]


@families
def test_detach_gives_back_the_very_same_model(family: str) -> None:
    model = tiny_model(family)
    before = digest(model)
    adapter = attached(model)
    fill(adapter)
    assert digest(model) != before
    model(tokens()).logits.sum().backward()
    adapter.detach()
    assert digest(model) == before
    assert all(p.grad is None for p in model.parameters())


def test_a_worker_attaches_again_and_again_and_nothing_stays_behind() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    model = tiny_model("qwen2_moe")
    model.set_experts_implementation("eager")
    shape = shape_of_model(model)

    def traces() -> Any:
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        attributes = Counter(name for m in model.modules() for name in vars(m))
        return hooks, attributes, model.get_experts_implementation(), digest(model)

    attached(model).detach()  # registers our function, once and for all
    before, known = traces(), list(ALL_EXPERTS_FUNCTIONS)
    gone = []
    for layer_experts in ({0: (1, 2)}, {0: (0,), 1: (5, 6, 7)}, {}, {1: tuple(range(8))}):
        adapter = attached(model, ExpertSelection(layer_experts), rank=2, lora_dropout=0.5)
        fill(adapter)
        model(tokens()).logits.sum().backward()
        adapter.detach()
        gone.append(weakref.ref(adapter))
        assert traces() == before
    del adapter
    gc.collect()
    assert [ref() for ref in gone] == [None] * 4
    assert list(ALL_EXPERTS_FUNCTIONS) == known
    assert before[2] == {"": "eager"}
    assert shape == shape_of_model(model)


# --- gradients arrive, or it is said ---


def test_the_first_gradient_of_b_is_there_and_that_of_a_is_zero() -> None:
    model = tiny_model("olmoe")
    adapter = attached(model, every_expert(shape_of_model(model)))
    model(tokens()).logits.pow(2).sum().backward()
    adapter.check_gradients()
    for name, parameter in adapter.named_parameters():
        assert bool(parameter.grad.any()) == name.endswith("lora_B"), name


def test_an_expert_whose_lora_is_not_reached_is_named() -> None:
    model = tiny_model("olmoe")
    adapter = attached(model, ExpertSelection({1: (2, 6)}))
    model.set_experts_implementation("grouped_mm")  # what another library could do behind our back
    model(tokens()).logits.pow(2).sum().backward()
    with pytest.raises(TrialError, match=r"expert 2 of layer 1 received \d+ tokens but its LoRA no gradient \(2 such"):
        adapter.check_gradients()


def test_one_expert_without_gradient_among_others_is_named() -> None:
    model = tiny_model("olmoe")
    adapter = attached(model, ExpertSelection({0: (2, 6)}))
    model(tokens()).logits.pow(2).sum().backward()
    for name, parameter in adapter.named_parameters():
        if ".experts." in name:
            parameter.grad[1] = 0
    with pytest.raises(TrialError, match=r"expert 6 of layer 0 received \d+ tokens"):
        adapter.check_gradients()


def test_experts_that_cannot_learn_from_this_batch_are_not_accused() -> None:
    model = tiny_model("olmoe")
    adapter = attached(model, every_expert(shape_of_model(model)))
    used = set()
    handle = model.model.layers[1].mlp.experts.register_forward_pre_hook(lambda _, a: used.update(a[1][-1].tolist()))
    model(tokens()).logits[-1, -1].pow(2).sum().backward()  # in the last layer only the last token counts
    handle.remove()
    adapter.check_gradients()
    grad = gradient(dict(adapter.named_parameters())["model.layers.1.mlp.experts.down_proj.lora_B"])
    assert set(grad.flatten(1).any(dim=1).nonzero().flatten().tolist()) == used
    assert len(used) == 2


def test_the_check_costs_nothing_afterwards() -> None:
    model = tiny_model("olmoe")
    adapter = attached(model)
    model(tokens()).logits.sum().backward()
    adapter.check_gradients()
    assert not any(layer.mlp.experts._forward_hooks for layer in model.model.layers)


# --- merging ---


@families
def test_a_merged_model_is_plain_and_computes_the_same(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model(family)
    implementation = model.get_experts_implementation()
    names = set(model.state_dict())
    adapter = attached(model)
    fill(adapter)
    expected = logits(model)
    adapter.merge()
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    assert model.get_experts_implementation() == implementation
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)


def test_merging_leaves_unchosen_experts_alone() -> None:
    model = tiny_model("olmoe")
    before = {name: p.clone() for name, p in model.named_parameters()}
    adapter = attached(model, ExpertSelection({1: (2, 6)}))
    fill(adapter)
    adapter.merge()
    for name, p in model.named_parameters():
        if ".experts." in name:
            changed = (p != before[name]).flatten(1).any(dim=1).nonzero().flatten().tolist()
            assert changed == ([2, 6] if "layers.1." in name else [])


# --- dropout, precision, checkpointing ---


def test_dropout_acts_on_the_input_of_lora_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module, lora = expert_layer(3, (0, 2), rank=2, dropout=0.25)
    index, weight = torch.tensor([[0, 1], [2, 0], [1, 2]]), torch.rand(3, 2)
    hidden = torch.randn(3, 8)
    masks: dict[int, Tensor] = {}

    def kept(route: Any, num_features: int) -> Tensor:
        masks[num_features] = torch.rand(len(route.rows_Q), num_features) >= 0.25
        return masks[num_features]

    monkeypatch.setattr(lora, "kept", kept)
    leaves = [p for pair in lora.pairs.values() for p in pair]
    out = forward(module, lora, hidden, index, weight)
    actual = torch.autograd.grad(out.pow(2).sum(), leaves)

    route = lora.route(index)
    expected = torch.zeros_like(hidden)
    row = 0
    for position, (expert, token) in enumerate(zip(route.ids_S.tolist(), route.token_S.tolist(), strict=True)):

        def linear(x: Tensor, frozen: Tensor, name: str, mask: Tensor | None, expert: int = expert) -> Tensor:
            if expert not in lora.ids:
                return frozen @ x
            assert mask is not None
            a, b = (factor[lora.ids.index(expert)] for factor in lora.pairs[name])
            return frozen @ x + 0.5 * (b @ (a @ (x * mask / 0.75)))

        mask_in, mask_out = (masks[8][row], masks[4][row]) if expert in lora.ids else (None, None)
        row += expert in lora.ids
        x, (gate, up) = hidden[token], module.gate_up_proj[expert].chunk(2)
        inner = F.silu(linear(x, gate, "gate_proj", mask_in)) * linear(x, up, "up_proj", mask_in)
        scale = weight.flatten()[route.order_S[position]]
        expected[token] += scale * linear(inner, module.down_proj[expert], "down_proj", mask_out)
    torch.testing.assert_close(out, expected, **CLOSE)
    for mine, theirs in zip(actual, torch.autograd.grad(expected.pow(2).sum(), leaves), strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


@pytest.mark.parametrize("path", ["self_attn.q_proj", "mlp.gate"])
def test_dropout_of_plain_lora_and_of_a_router_zeroes_a_share_and_scales_the_rest(path: str) -> None:
    model = tiny_model("olmoe")
    layer = model.model.layers[0]
    module = layer.get_submodule(path)
    weight = module.weight.detach()
    adapter = attached(model, rank=8, lora_alpha=8.0, lora_dropout=0.25)
    factors = dict(adapter.named_parameters())
    with torch.no_grad():  # A passes the first eight inputs on, B hands them to the first eight outputs
        for factor in (factors[f"model.layers.0.{path}.lora_A"], factors[f"model.layers.0.{path}.lora_B"]):
            factor.copy_(torch.eye(*factor.shape))
    x = torch.rand(1000, 32) + 1
    torch.manual_seed(0)
    out = module.train()(x)
    delta = (out if path == "self_attn.q_proj" else out[0]).detach()[:, :8] - x @ weight[:8].T
    dropped = delta.abs() < 1e-4
    assert 0.22 < dropped.float().mean() < 0.28
    torch.testing.assert_close(delta[~dropped], (x[:, :8] / 0.75)[~dropped])


def test_dropout_of_experts_zeroes_a_share() -> None:
    module, lora = expert_layer(3, (0, 2), rank=2, dropout=0.25)
    torch.manual_seed(0)
    kept = lora.kept(lora.route(torch.tensor([[0, 1], [2, 0]] * 100)), 100)
    assert kept is not None
    assert kept.shape == (300, 100)
    assert 0.74 < kept.float().mean() < 0.76
    module.eval()
    assert lora.kept(lora.route(torch.tensor([[0, 1]])), 100) is None


def test_dropout_draws_from_the_global_seed_and_is_off_in_eval() -> None:
    model = tiny_model("qwen2_moe")
    adapter = attached(model, lora_dropout=0.5)
    fill(adapter)
    model.train()
    torch.manual_seed(0)
    first = logits(model)
    second = logits(model)
    torch.manual_seed(0)
    assert torch.equal(logits(model), first)
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(logits(model), logits(model))


def gradients(model: Any, adapter: Any, **forward_options: Any) -> dict[str, Tensor]:
    for parameter in adapter.parameters():
        parameter.grad = None
    torch.manual_seed(0)
    model(tokens(), labels=tokens(), **forward_options).loss.backward()
    return {name: p.grad.clone() for name, p in adapter.named_parameters()}


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_no_gradient(family: str, dropout: float) -> None:
    model = tiny_model(family).train()
    adapter = attached(model, lora_dropout=dropout)
    fill(adapter)
    expected = gradients(model, adapter)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    actual = gradients(model, adapter)
    adapter.check_gradients()
    for name, wanted in expected.items():
        torch.testing.assert_close(actual[name], wanted, rtol=1e-6, atol=1e-7)


@families
@pytest.mark.parametrize("how", ["base", "autocast"])
def test_bf16_trains_fp32_factors(family: str, how: str) -> None:
    model = tiny_model(family)
    if how == "base":
        model.to(torch.bfloat16)
    adapter = attached(model)
    fill(adapter)
    exact_model = tiny_model(family)
    exact_model.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    exact_adapter = attached(exact_model)
    exact_adapter.load_state_dict(adapter.state_dict())
    exact = gradients(exact_model, exact_adapter)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        rough = gradients(model, adapter)
    adapter.check_gradients()
    similar = 0
    for name, grad in rough.items():
        assert grad.dtype == torch.float32
        assert grad.isfinite().all()
        similar += F.cosine_similarity(grad.flatten(), exact[name].flatten(), dim=0).item() > 0.9
    assert similar >= 0.8 * len(rough)  # bf16 sends some tokens to other experts: not every gradient can agree


# --- what speed rests on: counts that do not depend on the machine ---


class Launches(TorchDispatchMode):
    """ATen calls that compute or copy (views and allocations left out), and rows given to grouped_mm."""

    FREE: tuple[str, ...] = (
        "view",
        "reshape",
        "transpose",
        "t",
        "expand",
        "slice",
        "select",
        "detach",
        "alias",
        "unsqueeze",
        "squeeze",
    )
    FREE += (
        "empty",
        "empty_like",
        "new_empty",
        "split",
        "permute",
        "as_strided",
        "_unsafe_view",
        "unbind",
        "_reshape_alias",
    )

    def __enter__(self) -> Launches:
        self.calls: Counter[str] = Counter()
        self.rows: list[int] = []
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name not in self.FREE:
            self.calls[name] += 1
        if name == "_grouped_mm" and args[0].dim() == 2 and args[1].dim() == 3:
            self.rows.append(args[0].size(0))
        return func(*args, **(kwargs or {}))


def launches(
    num_experts: int, chosen: tuple[int, ...], *, every_row: bool = False, index: Tensor | None = None
) -> Launches:
    module, lora = expert_layer(num_experts, chosen, rank=3)
    lora.stop_watching()
    lora.every_row |= every_row
    index = (
        torch.stack([torch.arange(12) % num_experts, (torch.arange(12) + 1) % num_experts], 1)
        if index is None
        else index
    )
    hidden, weight = torch.randn(len(index), 8, requires_grad=True), torch.rand(index.shape, requires_grad=True)
    with Launches() as count:
        forward(module, lora, hidden, index, weight).sum().backward()
    return count


def test_launches_do_not_grow_with_experts_or_with_those_chosen() -> None:
    few = launches(4, (1, 2)).calls
    assert few == launches(12, (1, 2)).calls == launches(12, tuple(range(11))).calls
    assert few["_grouped_mm"] == 2 * 3 + 2 * 5  # forward: base, A, B; backward: the base's x, and x, rank, A, B of LoRA
    assert sum(few.values()) <= 90


def test_nothing_waits_for_the_device_where_every_row_runs() -> None:
    waits = ("nonzero", "_local_scalar_dense", "item", "bincount", "unique", "_unique2", "masked_select", "equal")
    assert not [name for name in launches(8, (1, 2), every_row=True).calls if name in waits]
    assert not [name for name in launches(8, tuple(range(8))).calls if name in waits]
    assert [name for name in launches(8, (1, 2)).calls if name in waits] == ["nonzero"]  # on a CPU: nothing to wait for


def test_lora_runs_over_the_rows_of_chosen_experts_only() -> None:
    index = torch.tensor([[0, 1], [1, 2], [3, 2], [0, 3]])  # expert 1 has two of eight rows, expert 3 two
    assert sorted(launches(4, (1, 3), index=index).rows) == [4] * 8 + [8] * 4
    assert sorted(launches(4, (1,), index=index).rows) == [2] * 8 + [8] * 4


def test_less_is_kept_for_backward_than_frozen_experts_keep() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    module, lora = expert_layer(8, tuple(range(8)), rank=4, hidden=64, width=32)
    index = torch.stack([torch.randperm(8)[:4] for _ in range(256)])
    hidden, weight = torch.randn(256, 64, requires_grad=True), torch.rand(256, 4, requires_grad=True)

    def kept(run: Callable[[], Any]) -> int:
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = run()
        own = {p.untyped_storage().data_ptr() for p in module.parameters()}
        del out
        return sum(size for pointer, size in storages.items() if pointer not in own)

    frozen = kept(lambda: ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, hidden, index, weight))
    assert kept(lambda: forward(module, lora, hidden, index, weight)) < 0.8 * frozen


# --- refusals ---


def test_a_model_outside_of_the_experts_interface_is_refused() -> None:
    model = tiny_model("olmoe")

    class Own(nn.Module):
        pass

    model.model.layers[0].mlp.experts = Own()
    with pytest.raises(StudyError, match=r"experts \(Own\) does not use transformers' experts interface"):
        attached(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_experts_spread_over_devices_are_refused() -> None:
    model = tiny_model("olmoe")
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(StudyError, match="spread over devices"):
        attached(model)
