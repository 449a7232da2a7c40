"""LoRA experts on dense layers: against a slow, obvious reference, then whole models.

python -m pytest tests/trainers/adapter/test_lora_moe.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from allocators.core.errors import InfeasibleError, StudyError, TrialError
from allocators.core.types import ExpertCounts, Gating, LoraSettings, ModelShape, ModuleShape
from tests import GOLDEN
from tests.benchmarks.lora_moe import Ours, count, train, variants
from tests.trainers.reference import gradient
from trainers import adapter as adapters
from trainers.adapter import lora_moe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PUBLISHED = json.loads((GOLDEN / "routing.json").read_text())

# --- the layer against loops over tokens and experts -----------------------------------------------------------------


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    router: Tensor,
    *,
    top_k: int,
    scale: float,
    keep: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """MoLA and HydraLoRA, word by word. a: N matrices [R, I], or one for hydra; b: N matrices [O, R]; x [T, I]."""
    rows = []
    for t, token in enumerate(x):
        probs = torch.softmax(router @ token, dim=0)
        chosen = range(len(b)) if len(a) == 1 < len(b) else sorted(range(len(b)), key=lambda j: -probs[j])[:top_k]
        total = sum(probs[j] for j in chosen)
        dropped = token if keep is None else token * keep[t] / (1 - dropout)
        y = weight @ token + bias
        for j in chosen:
            y = y + scale * (probs[j] / total) * (b[j] @ (a[j if len(a) > 1 else 0] @ dropped))
        rows.append(y)
    return torch.stack(rows)


def leaves(
    hydra: bool, n: int, r: int, i: int, o: int, tokens: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(dtype)

    a = [draw(r, i, scale=i**-0.5).requires_grad_() for _ in range(1 if hydra else n)]
    b = [draw(o, r, scale=0.3).requires_grad_() for _ in range(n)]
    router = draw(n, i, scale=i**-0.5).requires_grad_()
    return draw(tokens, i).requires_grad_(), draw(o, i, scale=i**-0.5), draw(o), a, b, router, draw(tokens, o)


def stacked(a: Sequence[Tensor], b: Sequence[Tensor], router: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([*a, router]), torch.cat([*b], dim=1)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * max(1.0, want.abs().max().item())


@settings(max_examples=40, deadline=None)
@given(
    hydra=st.booleans(),
    n=st.integers(1, 6),
    top_k=st.integers(1, 7),
    r=st.integers(1, 5),
    i=st.integers(1, 12),
    o=st.integers(1, 12),
    tokens=st.integers(1, 9),
    dropout=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 1000),
)
def test_forward_and_all_gradients_equal_the_reference(
    hydra: bool, n: int, top_k: int, r: int, i: int, o: int, tokens: int, dropout: float, seed: int
) -> None:
    x, weight, bias, a, b, router, dy = leaves(hydra, n, r, i, o, tokens, seed)
    torch.manual_seed(seed)
    keep = torch.empty(tokens, i, dtype=torch.bool).bernoulli_(1 - dropout) if dropout else None
    want = reference(x, weight, bias, a, b, router, top_k=top_k, scale=1.7, keep=keep, dropout=dropout)
    want_grads = torch.autograd.grad(want, [x, *a, *b, router], dy, materialize_grads=True)

    down, up = (t.detach().requires_grad_() for t in stacked(a, b, router))
    torch.manual_seed(seed)
    got, logits = lora_moe.lora_moe_linear(
        x, weight, bias, down, up, rank=r, top_k=n if hydra else top_k, scale=1.7, dropout=dropout
    )
    close(got, want)
    assert logits is None
    dx, ddown, dup = torch.autograd.grad(got, [x, down, up], dy)
    close(dx, want_grads[0])
    want_down, want_up = stacked(want_grads[1 : 1 + len(a)], want_grads[1 + len(a) : -1], want_grads[-1])
    close(ddown, want_down)
    close(dup, want_up)


@pytest.mark.parametrize("hydra", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck_with_the_balance_loss(hydra: bool, dropout: float) -> None:
    x, weight, bias, a, b, router, _ = leaves(hydra, 4, 2, 5, 3, 6, seed=3, dtype=torch.float64)
    down, up = (t.detach().requires_grad_() for t in stacked(a, b, router))

    def function(x: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)  # the same mask every time
        y, logits = lora_moe.lora_moe_linear(
            x, weight, bias, down, up, rank=2, top_k=4 if hydra else 2, scale=1.5, dropout=dropout, want_logits=True
        )
        assert logits is not None
        return y, lora_moe.balance_loss(logits, top_k=2)

    assert torch.autograd.gradcheck(function, (x, down, up))


def test_three_dimensional_input_is_the_flat_one() -> None:
    x, weight, bias, a, b, router, _ = leaves(False, 3, 2, 5, 4, 6, seed=1)
    down, up = stacked(a, b, router)
    kwargs: dict[str, Any] = {"rank": 2, "top_k": 2, "scale": 2.0}
    flat, _ = lora_moe.lora_moe_linear(x, weight, bias, down, up, **kwargs)
    deep, logits = lora_moe.lora_moe_linear(x.view(2, 3, 5), weight, bias, down, up, **kwargs, want_logits=True)
    assert torch.equal(deep.flatten(0, 1), flat)
    assert logits is not None
    assert logits.shape == (6, 3)


def test_one_expert_has_gate_one_and_a_router_without_gradient() -> None:
    x, weight, bias, a, b, router, dy = leaves(False, 1, 3, 7, 5, 4, seed=2)
    down, up = (t.detach().requires_grad_() for t in stacked(a, b, router))
    y, _ = lora_moe.lora_moe_linear(x, weight, bias, down, up, rank=3, top_k=2, scale=2.0)
    close(y, F.linear(x, weight, bias) + 2.0 * x @ a[0].T @ b[0].T)
    y.backward(dy)
    assert torch.equal(gradient(down)[3:], torch.zeros(1, 7))
    assert gradient(down)[:3].abs().min() > 0


def test_the_frozen_input_of_the_first_layer_costs_no_gradient() -> None:
    layer = variants(16, 4, device="cpu")["routed"]
    x = torch.randn(8, 16)
    layer(x).sum().backward()
    assert x.grad is None
    assert layer.down.grad is not None


@pytest.mark.parametrize("hydra", [False, True])
def test_bf16_base_with_fp32_adapter(hydra: bool) -> None:
    x, weight, bias, a, b, router, dy = leaves(hydra, 4, 4, 64, 32, 50, seed=5)
    low = [t.detach().bfloat16() for t in (x, weight, bias, dy)]
    x16 = low[0].requires_grad_()
    down, up = (t.detach().requires_grad_() for t in stacked(a, b, router))
    top_k = 4 if hydra else 2
    y, logits = lora_moe.lora_moe_linear(
        x16, low[1], low[2], down, up, rank=4, top_k=top_k, scale=2.0, want_logits=True
    )
    y.backward(low[3])
    assert logits is not None
    assert y.dtype == gradient(x16).dtype == torch.bfloat16
    assert gradient(down).dtype == gradient(up).dtype == logits.dtype == torch.float32

    down32, up32 = (t.detach().bfloat16().float().requires_grad_() for t in (down, up))
    x32 = x16.detach().float().requires_grad_()
    exact, logits32 = lora_moe.lora_moe_linear(
        x32, low[1].float(), low[2].float(), down32, up32, rank=4, top_k=top_k, scale=2.0, want_logits=True
    )
    exact.backward(low[3].float())
    assert logits32 is not None
    assert (logits - logits32).abs().max() < 0.02  # bf16 keeps 8 bits of numbers around 1
    gradients = [(gradient(t), gradient(t32)) for t, t32 in ((down, down32), (up, up32), (x16, x32))]
    for got, want in ((y, exact), *gradients):
        # A token whose second and third expert nearly tie may go elsewhere in bf16: compare norms, not maxima.
        assert (got.float() - want).norm() < (0.02 if hydra else 0.15) * want.norm()


def test_softmax_runs_in_fp32_under_bf16() -> None:
    logits = torch.tensor([[4.0, 3.99, -1.0]]).bfloat16()
    gates = lora_moe.route(logits, top_k=3)
    assert gates.dtype == torch.float32
    assert torch.allclose(gates, torch.softmax(logits.float(), -1), atol=1e-7)


# --- routing and balance ---------------------------------------------------------------------------------------------


def test_golden_routing() -> None:
    logits = torch.tensor(PUBLISHED["softmax_probs"]).log()
    gates = lora_moe.route(logits, top_k=PUBLISHED["top_k"])
    assert gates.nonzero()[:, 1].view(2, 2).tolist() == PUBLISHED["selected"]
    assert torch.allclose(gates[gates > 0].view(2, 2), torch.tensor(PUBLISHED["combine"]))
    loss = lora_moe.balance_loss(logits, top_k=PUBLISHED["top_k"])
    assert loss.item() == pytest.approx(PUBLISHED["mola_layer_loss"])
    assert loss.item() * PUBLISHED["top_k"] == pytest.approx(PUBLISHED["hf_mixtral_style_loss"])


@given(seed=st.integers(0, 1000), n=st.integers(2, 6), top_k=st.integers(1, 6), padding=st.integers(0, 4))
@settings(max_examples=25, deadline=None)
def test_padding_changes_nothing(seed: int, n: int, top_k: int, padding: int) -> None:
    logits = torch.randn(9, n, generator=torch.Generator().manual_seed(seed))
    real = torch.arange(9) >= padding
    want = lora_moe.balance_loss(logits[padding:], top_k=top_k)
    assert torch.allclose(lora_moe.balance_loss(logits, top_k=top_k, real_T=real), want, rtol=1e-5)
    if top_k >= n:
        assert torch.allclose(want, torch.ones(()))


def test_a_favoured_expert_costs_more() -> None:
    even = torch.eye(4).repeat(5, 1)
    skewed = even.clone()
    skewed[:, 0] += 3
    assert lora_moe.balance_loss(even, top_k=1) < lora_moe.balance_loss(skewed, top_k=1)


# --- counts that do not depend on the machine ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "forward", "backward"), [("routed", 9, 12), ("hydra", 6, 13)])
def test_launches_do_not_grow_with_the_number_of_experts(name: str, forward: int, backward: int) -> None:
    for n in (3, 8, 16):
        layer: Any = variants(32, n, device="cpu")[name]
        counts = count(layer, torch.randn(64, 32), parameters=[layer.weight, *layer.parameters()])
        assert counts.forward <= forward
        assert counts.backward <= backward
        assert counts.syncs == 0


def test_saves_rank_space_and_gates_only() -> None:
    tokens, d, n, r = 512, 256, 8, 8
    layers: dict[str, Any] = variants(d, n, device="cpu")
    x = torch.randn(tokens, d)
    saved = {k: count(v, x, parameters=[v.weight, *v.parameters()]).saved_bytes for k, v in layers.items()}
    assert saved["routed"] == 4 * tokens * (n * r + n + n)
    assert saved["hydra"] == 4 * tokens * (r + n + n)
    assert 10 * saved["routed"] < saved["mola"]
    assert 10 * saved["hydra"] < saved["hydra_loop"]


def test_trains_like_the_loops() -> None:
    layers = variants(48, 4, device="cpu")
    for loop, ours in (("mola", "routed"), ("hydra_loop", "hydra")):
        assert isinstance(layers[ours], Ours)
        assert train(layers[ours], device="cpu", steps=10) == pytest.approx(
            train(layers[loop], device="cpu", steps=10), rel=1e-5
        )


# --- the adapter on a model ------------------------------------------------------------------------------------------

VOCABULARY, WIDTH, INNER = 17, 12, 20
MAPS = {
    "q_proj": (WIDTH, 8),
    "v_proj": (WIDTH, 8),
    "o_proj": (8, WIDTH),
    "up_proj": (WIDTH, INNER),
    "down_proj": (INNER, WIDTH),
}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, (i, o) in MAPS.items():
            self.add_module(name, nn.Linear(i, o, bias=name == "q_proj"))

    def forward(self, x: Tensor) -> Tensor:
        maps: dict[str, Any] = dict(self.named_children())
        x = x + maps["o_proj"](torch.tanh(maps["q_proj"](x)) * maps["v_proj"](x).cumsum(1))
        out: Tensor = x + maps["down_proj"](F.silu(maps["up_proj"](x)))
        return out


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.checkpoint: bool | None = None  # or use_reentrant

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x: Tensor = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x) if self.checkpoint is None else checkpoint(layer, x, use_reentrant=self.checkpoint)
        return x


class Tiny(nn.Module):
    """Shaped like a Hugging Face causal model: a body under a head, called with an attention mask by name."""

    config = SimpleNamespace(model_type="tiny")

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model = Body()
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    @property
    def base_model(self) -> Body:
        return self.model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.head(self.model(input_ids, attention_mask=attention_mask))
        return out


SHAPE = ModelShape(
    "tiny",
    tuple(
        ModuleShape(
            f"model.layers.{layer}.{name}", layer, i, o, role="mlp" if name.startswith(("up", "down")) else "attention"
        )
        for layer in range(2)
        for name, (i, o) in MAPS.items()
    ),
    2,
)
PATHS = [m.path for m in SHAPE.modules]
MIXED = {path: n for path, n in zip(PATHS, [4, 2, 4, 0, 1, 3, 3, 2, 5, 3], strict=True) if n}
IDS = torch.randint(0, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[0, :4] = MASK[2, :1] = 0


def attach(
    model: Any, counts: dict[str, int] | None = None, *, gating: Gating = "routed", seed: int = 3, **changes: Any
) -> Any:
    lora = LoraSettings(**({"rank": 2, "lora_alpha": 4.0, "top_k": 2} | changes))
    allocation = ExpertCounts(MIXED if counts is None else counts, gating)
    return adapters.attach(model, allocation, shape=SHAPE, lora=lora, seed=seed)


def grow(adapter: Any, seed: int = 0) -> None:
    """Values as in the middle of a training: B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))


def loss_of(model: Any) -> Tensor:
    return F.cross_entropy(model(IDS, attention_mask=MASK).flatten(0, 1), IDS.flatten())


@pytest.mark.parametrize("gating", ["routed", "hydra"])
def test_fresh_adapter_changes_nothing_and_detach_restores_everything(gating: Gating) -> None:
    model = Tiny()
    before = model(IDS).detach()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    adapter = attach(model, gating=gating)
    assert torch.equal(model(IDS), before)
    assert model.state_dict().keys() == state.keys()
    grow(adapter)
    assert not torch.allclose(model(IDS), before)
    adapter.detach()
    assert torch.equal(model(IDS), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any("forward" in vars(m) or m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


@given(
    counts=st.lists(st.integers(0, 4), min_size=len(PATHS), max_size=len(PATHS)),
    gating=st.sampled_from(["routed", "hydra"]),
    rank=st.integers(1, 4),
)
@settings(max_examples=15, deadline=None)
def test_holds_exactly_the_counted_parameters(counts: Sequence[int], gating: Gating, rank: int) -> None:
    allocation = ExpertCounts(dict(zip(PATHS, counts, strict=True)), gating)
    adapter = adapters.attach(Tiny(), allocation, shape=SHAPE, lora=LoraSettings(rank=rank, lora_alpha=1.0))
    assert adapter.num_trainable == allocation.trainable_params(SHAPE, rank=rank)


def test_start_values_follow_seed_path_and_expert_alone() -> None:
    torch.manual_seed(5)
    one = attach(Tiny(), {PATHS[0]: 2, PATHS[3]: 1}).state_dict()[f"{PATHS[0]}.down"]
    torch.manual_seed(6)
    more = attach(Tiny(), {PATHS[0]: 3, PATHS[1]: 2}).state_dict()[f"{PATHS[0]}.down"]
    assert torch.equal(one[:4], more[:4])  # A of experts 0 and 1
    assert torch.equal(one[4:], more[6:8])  # their rows of the router
    other = attach(Tiny(), {PATHS[0]: 2}, seed=4).state_dict()[f"{PATHS[0]}.down"]
    assert not torch.isclose(one, other).any()
    assert one.abs().max() <= WIDTH**-0.5


@pytest.mark.parametrize("gating", ["routed", "hydra"])
def test_whole_model_equals_the_reference(gating: Gating) -> None:
    model = Tiny()
    adapter = attach(model, gating=gating)
    grow(adapter)
    got = loss_of(model)
    got.backward()
    adapter.check_gradients()
    grads = {name: gradient(p) for name, p in adapter.named_parameters()}
    state = adapter.state_dict()
    adapter.detach()

    params: dict[str, Tensor] = {}
    for path, n in MIXED.items():
        module = model.get_submodule(path)
        down, up = (state[f"{path}.{part}"].clone().requires_grad_() for part in ("down", "up"))
        params |= {f"{path}.down": down, f"{path}.up": up}

        def forward(x: Tensor, module: Any = module, down: Tensor = down, up: Tensor = up, n: int = n) -> Tensor:
            bias = module.bias if module.bias is not None else torch.zeros(module.out_features)
            a, b = down[:-n].split(2), up.split(2, dim=1)
            y = reference(x.flatten(0, 1), module.weight, bias, a, b, down[-n:], top_k=2, scale=2.0)
            return y.view(*x.shape[:-1], -1)

        module.forward = forward
    want = loss_of(model)
    want.backward()
    close(got, want)
    for name, p in params.items():
        close(grads[name], gradient(p))


@pytest.mark.parametrize("balance", ["layer", "module"])
def test_balance_loss_of_a_model(balance: str) -> None:
    model = Tiny()
    adapter = attach(model, balance_coef=0.5, seed=0)
    adapter.balance = balance
    grow(adapter)
    inputs: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(lambda m, args, path=path: inputs.update({path: args[0]}))
        for path in MIXED
    ]
    loss_of(model)
    for hook in hooks:
        hook.remove()
    got = adapter.extra_loss()

    pools: dict[tuple[str, int], list[Tensor]] = {}
    for path, n in MIXED.items():
        probs = torch.softmax(inputs[path][MASK.bool()] @ adapter.state_dict()[f"{path}.down"][-n:].T, -1)
        layer = path.split(".")[2]
        pools.setdefault((layer if balance == "layer" else path, n), []).append(probs)
    want = torch.zeros(())
    for (_, n), members in pools.items():
        probs = torch.cat(members)
        picks = [e for row in probs.tolist() for e in sorted(range(n), key=lambda e: -row[e])[:2]]
        want += n * sum(picks.count(e) / len(picks) * probs[:, e].mean() for e in range(n))
    assert got.item() == pytest.approx(0.5 * want.item(), rel=1e-5)

    got.backward()  # reaches the routers of every module, and through their inputs what lies below
    moved = [path for path, n in MIXED.items() if n > 2 and adapter._tensors[f"{path}.down"].grad[-n:].any()]
    assert moved == [path for path, n in MIXED.items() if n > 2]


def test_where_every_expert_is_picked_the_balance_loss_is_constant() -> None:
    model = Tiny()
    adapter = attach(model, dict.fromkeys(MIXED, 2), top_k=2, balance_coef=0.5)
    grow(adapter)
    loss_of(model)
    extra = adapter.extra_loss()
    assert extra.item() == pytest.approx(0.5 * len({path.split(".")[2] for path in MIXED}), rel=1e-5)
    assert not extra.requires_grad, "a gradient of rounding errors would be a whole step of AdamW"


def gradients(model: Any, adapter: Any) -> list[Tensor]:
    for p in adapter.parameters():
        p.grad = None
    loss = loss_of(model)
    extra = adapter.extra_loss()
    (loss if extra is None else loss + extra).backward()
    return [p.grad.clone() for p in adapter.parameters()]


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_gradient_checkpointing_is_exact_and_counts_routers_once(dropout: float) -> None:
    model = Tiny()
    adapter = attach(model, balance_coef=0.3, lora_dropout=dropout)
    grow(adapter)
    torch.manual_seed(9)
    want = gradients(model, adapter)
    model.model.checkpoint = False
    for _ in range(2):  # a second step must not see what the recomputation of the first left behind
        torch.manual_seed(9)
        got = gradients(model, adapter)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
        assert not adapter._logits


def test_reentrant_checkpointing_is_refused_where_it_would_lose_the_balance_loss() -> None:
    model = Tiny()
    adapter = attach(model, balance_coef=0.3)
    model.model.checkpoint = True
    with pytest.warns(UserWarning, match="requires_grad"):
        loss_of(model)
    with pytest.raises(TrialError, match="use_reentrant=False"):
        adapter.extra_loss()


def test_no_balance_loss_where_there_is_nothing_to_balance() -> None:
    for changes in ({"balance_coef": 0.0}, {"balance_coef": 0.1, "gating": "hydra"}):
        model = Tiny()
        adapter = attach(model, **changes)
        loss_of(model)
        assert adapter.extra_loss() is None


def test_evaluation_keeps_no_logits_and_no_dropout() -> None:
    model = Tiny()
    adapter = attach(model, balance_coef=0.1, lora_dropout=0.5)
    grow(adapter)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(IDS), model(IDS))
        assert adapter.extra_loss() is None
    assert not adapter._logits
    model.train()
    assert not torch.equal(model(IDS), model(IDS))


def test_every_expert_that_saw_a_token_gets_a_gradient() -> None:
    model = Tiny()
    adapter = attach(model)
    grow(adapter)
    loss_of(model).backward()
    adapter.check_gradients()
    for path, n in MIXED.items():
        seen = adapter._tensors[f"{path}.up"].grad.view(-1, n, 2).abs().sum((0, 2)) > 0
        assert seen.all(), path


def test_no_gradient_is_named() -> None:
    model = Tiny()
    adapter = attach(model)
    with pytest.raises(TrialError, match=r"model\.layers\.0\.q_proj\.down got no gradient"):
        adapter.check_gradients()


@pytest.mark.parametrize("gating", ["routed", "hydra"])
def test_save_and_load(gating: Gating, tmp_path: Path) -> None:
    model = Tiny()
    adapter = attach(model, gating=gating, balance_coef=0.1, lora_dropout=0.2, top_k=3)
    grow(adapter)
    model.eval()
    want = model(IDS)
    adapters.save(adapter, tmp_path, metadata={})
    adapter.detach()
    loaded = adapters.load(model, tmp_path)
    assert torch.equal(model(IDS), want)
    assert loaded.settings == adapter.settings
    assert loaded.allocation == adapter.allocation


@pytest.mark.parametrize("gating", ["routed", "hydra"])
def test_merge_of_single_experts(gating: Gating) -> None:
    model = Tiny()
    adapter = attach(model, dict.fromkeys(PATHS[::2], 1), gating=gating)
    grow(adapter)
    want = model(IDS).detach()
    adapter.merge()
    assert not hasattr(model, "lora_adapter")
    close(model(IDS), want)


def test_merge_of_several_experts_is_refused_and_nothing_happens() -> None:
    model = Tiny()
    adapter = attach(model)
    grow(adapter)
    want = model(IDS)
    with pytest.raises(TrialError, match=r"o_proj and 7 more modules have several experts"):
        adapter.merge()
    assert torch.equal(model(IDS), want)


def test_refusals_leave_the_model_as_it_was() -> None:
    model = Tiny()
    with pytest.raises(InfeasibleError, match="no dense module"):
        attach(model, {"model.layers.9.q_proj": 2})
    model.model.layers[0].q_proj = nn.Sequential(nn.Linear(WIDTH, 8))
    with pytest.raises(StudyError, match="is a Sequential"):
        attach(model)
    assert not hasattr(model, "lora_adapter")
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("gating", ["routed", "hydra"])
def test_llama(gating: Gating) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from allocators.core.shapes import shape_from_config

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    shape = shape_from_config(config, name="llama")
    allocation = ExpertCounts({m.path: 1 + i % 4 for i, m in enumerate(shape.modules)}, gating)
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK == 0, -100)}
    before = model(**batch).logits
    lora = LoraSettings(rank=4, lora_alpha=8.0, balance_coef=0.01)
    adapter = adapters.attach(model, allocation, shape=shape, lora=lora)
    assert torch.equal(model(**batch).logits, before)
    assert adapter.num_trainable == allocation.trainable_params(shape, rank=4)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    losses, steps = [], []
    for checkpointing in (False, True):
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(**batch).loss
        steps.append([loss.item(), (extra := adapter.extra_loss()) is not None and extra.item()])
    assert steps[0] == steps[1]
    for _ in range(20):
        loss = model(**batch).loss
        losses.append(loss.item())
        extra = adapter.extra_loss()
        optimizer.zero_grad()
        (loss if extra is None else loss + extra).backward()
        adapter.check_gradients()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    adapter.detach()
    model.eval()
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.slow
@pytest.mark.parametrize("gating", ["routed", "hydra"])
def test_the_training_loop_runs_it(gating: Gating, tokenizer: PreTrainedTokenizerBase, choice_task: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from allocators.core.shapes import shape_from_config
    from allocators.core.types import Recipe
    from trainers.loop import train as run
    from trainers.tasks import load_task

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, pad_token_id=1, **sizes)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    shape = shape_from_config(config, name="llama")
    allocation = ExpertCounts({m.path: i % 4 for i, m in enumerate(shape.modules)}, gating)
    recipe = Recipe(
        rank=4, steps=12, batch_size=8, micro_batch_size=4, learning_rate=1e-2, balance_coef=0.01, lora_dropout=0.05
    )
    losses = []
    for _ in range(2):
        adapter = adapters.attach(model, allocation, shape=shape, lora=replace(recipe.lora, lora_alpha=8.0))
        task = load_task(str(choice_task))
        result = run(
            model,
            adapter,
            task,
            recipe,
            seed=0,
            tokenizer=tokenizer,
            device="cpu",
            on_rung=lambda r: True,
            evaluations=1,
        )
        assert result.status == "complete"
        losses.append(result.losses)
        adapter.detach()
    assert losses[0] == losses[1]
    assert losses[0][-1] < 0.98 * losses[0][0]
