"""Pretrains the small models that live in this repository, from nothing but Python's standard library and a seed.

    python -m trainers.pretrain model=tiny-moe           50 minutes on one shared core; type it again to go on
    python -m trainers.pretrain model=tiny-dense         600 steps: enough for spectra that differ by layer
    python -m trainers.pretrain model=tiny-moe steps=50 folder=build/try      a quick look

The data are the thirteen domains of `domains.py` in equal parts, drawn afresh for every step, so nothing is
seen twice and a step's rows depend on (seed, step) alone. A checkpoint is kept beside the result while it trains:
an interrupted run goes on from it and ends with the same losses. Written into `folder`: `config.json`,
`model.safetensors`, the tokenizer, and `pretraining.json` (recipe, versions, loss curve, loss and routing by domain,
all measured on the file as saved). Weights are stored as float16 (a file under 10 MB) and load as float32.

A rerun gives the same rows and the same first losses; it gives the same bits only on the same machine, thread count
and library versions, because floating-point sums are ordered differently elsewhere. The real text among the domains
comes from the running Python: its version and a digest of the text are recorded.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocators.core import words
from allocators.core.errors import StudyError
from trainers.embedded import domains

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<eos>", "<unk>")
VOCABULARY = (*SPECIAL, *domains.ALPHABET)
EMBEDDED = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Pretraining:
    """One model from scratch. `architecture` is a transformers config class's model type, `sizes` its arguments.

    rows_per_step     four rows of each of the thirteen domains
    balance_coef      weight of the router balance loss, applied per layer (0 for dense models)
    """

    architecture: str
    sizes: dict[str, Any]
    steps: int
    rows_per_step: int = 4 * len(domains.MIXTURE)
    row_length: int = 96
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    balance_coef: float = 0.0
    seed: int = 0
    common: dict[str, Any] = field(
        default_factory=lambda: {
            "vocab_size": 8 * math.ceil(len(VOCABULARY) / 8),
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": None,
            "tie_word_embeddings": False,
        }
    )


MODELS = {
    "tiny-moe": Pretraining(
        architecture="olmoe",
        sizes={
            "hidden_size": 128,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_experts": 16,
            "num_experts_per_tok": 2,
        },
        steps=3000,
        balance_coef=0.02,
    ),
    "tiny-dense": Pretraining(
        architecture="llama",
        sizes={
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 6,
        },
        steps=600,
    ),
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character: printable ASCII, newline and tab; anything else is `<unk>`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()  # without it the characters come back with spaces between them
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def build_model(recipe: Pretraining) -> PreTrainedModel:
    """A freshly initialised model; the seed fixes its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(recipe.architecture, **recipe.common, **recipe.sizes)
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(recipe.seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


_IDS = {token: i for i, token in enumerate(VOCABULARY)}
_END = "\0"  # stands for the end-of-text token in rows, where it is one character like the others


def batch(recipe: Pretraining, step: int) -> tuple[list[str], torch.Tensor]:
    """Domain names and token ids [rows_per_step, row_length] of one step; step -1 is the validation set."""
    import torch

    rows = domains.rows(recipe.seed, step, recipe.rows_per_step, recipe.row_length, end=_END)
    ids = [[_IDS["<eos>"] if c == _END else _IDS[c] for c in text] for _, text in rows]
    return [name for name, _ in rows], torch.tensor(ids)


def balance_loss(router_logits: tuple[torch.Tensor, ...], *, top_k: int) -> torch.Tensor:
    """E · Σ_e f_e P_e, averaged over layers; 1 when every layer is balanced (Switch Transformers, equation 4).

    f is the share of picks and P the mean probability of an expert, both within one layer. transformers' own loss
    pools the layers first: then an expert number may be dead in one layer as long as it is busy in another, and in a
    model of four layers one is.

    Args: router_logits, one [T, E] a layer.
    """
    import torch

    from trainers.adapter import lora_moe

    return torch.stack([lora_moe.balance_loss(logits, top_k=top_k) for logits in router_logits]).mean()


def learning_rate_at(step: int, recipe: Pretraining) -> float:
    """Linear warm-up, then a cosine down to a tenth of a percent."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * (0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * done)))


def _show(line: str) -> None:
    print(line, flush=True)


def optimiser_of(model: PreTrainedModel, recipe: Pretraining) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    import torch

    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]  # norms: decay would pull them to zero
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=recipe.betas,
    )


@dataclass(slots=True)
class _Training:
    """A pretraining as far as it has come: `step` steps are done, and `curve` holds their means."""

    recipe: Pretraining
    model: PreTrainedModel
    optimiser: torch.optim.AdamW
    step: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)

    def resume(self, checkpoint: Path) -> None:
        """Goes on from a checkpoint. Raises StudyError for that of another recipe."""
        import torch

        saved = torch.load(checkpoint, weights_only=True)
        if saved["recipe"] != json.dumps(asdict(self.recipe)):
            raise StudyError(f"{checkpoint} belongs to another recipe: delete it or choose another folder=")
        self.model.load_state_dict(saved["model"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.step, self.curve = saved["step"], saved["curve"]

    def keep(self, checkpoint: Path) -> None:
        """Writes a checkpoint, whole or not at all."""
        import torch

        state = {
            "recipe": json.dumps(asdict(self.recipe)),
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "curve": self.curve,
        }
        torch.save(state, checkpoint.with_suffix(".tmp"))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)

    def take_step(self) -> tuple[float, float]:
        """(loss, balance) of one step on fresh rows."""
        import torch

        top_k = self.recipe.sizes.get("num_experts_per_tok", 0)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate_at(self.step, self.recipe)
        _, ids = batch(self.recipe, self.step)
        out = self.model(input_ids=ids, **({"output_router_logits": True} if top_k else {}))
        loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        balance = balance_loss(out.router_logits, top_k=top_k) if top_k else loss.new_zeros(())
        (loss + self.recipe.balance_coef * balance).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item(), balance.item()


def pretrain(
    recipe: Pretraining,
    folder: Path,
    *,
    report_every: int = 25,
    checkpoint_every: int = 250,
    show: Callable[[str], None] = _show,
) -> list[dict[str, float]]:
    """Trains and saves; returns the loss curve, means of `report_every` steps.

    Raises StudyError when `folder` holds the checkpoint of another recipe.
    """
    assert checkpoint_every % report_every == 0  # a checkpoint holds whole entries of the curve
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.pt"
    model = build_model(recipe).train()
    training = _Training(recipe, model, optimiser_of(model, recipe))
    if checkpoint.exists():
        training.resume(checkpoint)
        show(f"going on from step {training.step}")

    start, began = training.step, time.monotonic()
    losses: list[tuple[float, float]] = []  # since the last report
    while training.step < recipe.steps:
        losses.append(training.take_step())
        ended = training.step == recipe.steps
        if training.step % report_every == 0 or ended:
            mean, mean_balance = (sum(column) / len(losses) for column in zip(*losses, strict=True))
            training.curve.append({"step": training.step, "loss": round(mean, 4), "balance": round(mean_balance, 4)})
            losses.clear()
            left = (time.monotonic() - began) / (training.step - start) * (recipe.steps - training.step)
            show(
                f"step {training.step}/{recipe.steps}  loss {mean:.3f}  balance {mean_balance:.3f}  "
                f"left {int(left // 60)}:{int(left % 60):02}"
            )
        if training.step % checkpoint_every == 0 or ended:
            training.keep(checkpoint)
    save(model, folder)
    return training.curve


def save(model: PreTrainedModel, folder: Path) -> None:
    """Writes the weights as float16, to be loaded as float32, and the tokenizer."""

    # float16 keeps 11 significant bits where bfloat16 keeps 8; no weight of these models is near its limits.
    model.half().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"  # how it loads: float16 arithmetic is slow and coarse on a CPU
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def examine(model: PreTrainedModel, recipe: Pretraining, *, batches: int = 8) -> dict[str, Any]:
    """Loss by domain and, for an MoE model, the share of picks of every expert by domain, on rows not trained on.

    Returns {"loss": {domain: nats a character}, "routing": {domain: [layer][expert] share of picks}}; the domain
    "mixture" is all of them in equal parts. Shares of a layer sum to 1.
    """
    import torch

    model.eval()
    top_k = recipe.sizes.get("num_experts_per_tok", 0)
    losses: dict[str, list[float]] = {name: [] for name in domains.MIXTURE}
    picks: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for number in range(1, batches + 1):
            names, ids = batch(recipe, -number)
            out = model(input_ids=ids, **({"output_router_logits": True} if top_k else {}))
            loss = torch.nn.functional.cross_entropy(
                out.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
            ).mean(1)
            for row, name in enumerate(names):
                losses[name].append(loss[row].item())
            for layer, logits in enumerate(out.router_logits if top_k else ()):
                experts = logits.shape[1]
                chosen = logits.topk(top_k).indices.view(len(names), -1)
                for row, name in enumerate(names):
                    table = picks.setdefault(name, torch.zeros(recipe.sizes["num_hidden_layers"], experts))
                    table[layer] += torch.bincount(chosen[row], minlength=experts)
    result: dict[str, Any] = {"loss": {name: round(sum(v) / len(v), 4) for name, v in losses.items()}}
    result["loss"]["mixture"] = round(sum(result["loss"].values()) / len(losses), 4)
    if top_k:
        picks["mixture"] = torch.stack(list(picks.values())).sum(0)
        result["routing"] = {
            name: [[round(x, 5) for x in layer] for layer in (table / table.sum(1, keepdim=True)).tolist()]
            for name, table in picks.items()
        }
    return result


def record(name: str, recipe: Pretraining, folder: Path, curve: list[dict[str, float]]) -> dict[str, Any]:
    """Measures the saved model and writes `pretraining.json` beside it."""
    import tokenizers
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    data = {
        "model": name,
        "command": f"python -m trainers.pretrain model={name}",
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": recipe.steps * recipe.rows_per_step * recipe.row_length,
        "data": {
            "domains": list(domains.MIXTURE),
            "parts": "equal",
            "real_text": list(domains.REAL_TEXT),
            "library_digest": domains.library_digest(),
            "held_out": list(domains.HELD_OUT),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "threads": torch.get_num_threads(),
        "curve": curve,
        **examine(model, recipe),
    }
    (folder / "pretraining.json").write_text(json.dumps(data) + "\n")
    return data


@dataclass(frozen=True)
class Request:
    """The keys of the command line."""

    model: str = words.key("tiny-moe", "which embedded model", choices=tuple(MODELS))
    steps: int = words.key(-1, "optimiser steps (-1: as its recipe says)", least=1, unset=-1)
    seed: int = words.key(-1, "of weights and data (-1: as its recipe says)", least=0, unset=-1)
    folder: str = words.key("", "where the model goes (empty: beside this file)")
    threads: int = words.key(1, "threads of torch", least=1)


def main(arguments: list[str]) -> None:
    """Trains one model, or says what the keys are."""
    if words.asks_for_help(arguments):
        print("\n".join(["usage: python -m trainers.pretrain [key=value ...]", *words.help_of(Request)]))
        return
    request = words.parse(arguments, Request)
    name, recipe = request.model, MODELS[request.model]
    recipe = replace(
        recipe,
        steps=recipe.steps if request.steps == -1 else request.steps,
        seed=recipe.seed if request.seed == -1 else request.seed,
    )
    folder = Path(request.folder) if request.folder else EMBEDDED / name.replace("-", "_")

    import torch

    torch.set_num_threads(request.threads)
    data = record(name, recipe, folder, pretrain(recipe, folder))
    (folder / "checkpoint.pt").unlink()
    print(f"{name}: {data['parameters']:,} parameters in {folder}, loss {data['loss']['mixture']} on fresh rows")
