"""Scoring choices: each with its whole question by lm-eval, against questions that run once (tasks/scoring.py).

    python -m tests.benchmarks.evaluation                           # tiny-moe and tiny-dense on their task
    python -m tests.benchmarks.evaluation model=smollm2-135m task=arc_easy limit=50 dtype=bfloat16
    python -m tests.benchmarks.evaluation model=allenai/OLMoE-1B-7B-0924 task=hellaswag limit=200 device=cuda

Both sides score the same requests with the same `batch_size`, by turns; medians of `repeats`. Time is CPU seconds of
the process (what else the machine does counts less), or wall clock on a GPU. Tokens are those that go through the first
decoder layer, padding included; logits are the positions that go through the head.

In the JSON line, for each model: `faster` lm-eval's time over ours, `tokens` and `logits` lm-eval's over ours, `gap`
the largest difference of a log-likelihood, `differ` how many of `questions` are answered otherwise, by the likelier
choice. In fp32 gaps are rounding; in bf16 lm-eval takes its softmax in bf16 too, ours is in fp32.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tests.benchmarks._shared import clock, parse
from trainers import models, tasks
from trainers.tasks import harness, scoring


@dataclass(frozen=True)
class Settings:
    model: tuple[str, ...] = ("tiny-moe", "tiny-dense")
    task: str = "default"
    limit: int = 0
    batch_size: int = 32
    repeats: int = 5
    device: str = "cpu"
    dtype: str = "auto"
    threads: int = 1


def counted(model: Any, score: Callable[[], Any]) -> tuple[Any, int, int]:
    """What `score` returns, the tokens through the first decoder layer and the positions through the head meanwhile."""
    count = {"tokens": 0, "logits": 0}

    def layer(module: Any, args: Any, kwargs: Any) -> None:
        count["tokens"] += (args[0] if args else kwargs["hidden_states"]).shape[:2].numel()

    def head(module: Any, args: Any) -> None:
        count["logits"] += args[0].shape[:2].numel()

    hooks = [
        model.get_decoder().layers[0].register_forward_pre_hook(layer, with_kwargs=True),
        model.get_output_embeddings().register_forward_pre_hook(head),
    ]
    try:
        return score(), count["tokens"], count["logits"]
    finally:
        for hook in hooks:
            hook.remove()


def compare(name: str, settings: Settings) -> dict[str, Any]:
    """One model: prints its row, returns its ratios."""
    loaded = models.load(name, device=settings.device, dtype=settings.dtype)
    model, batch_size = loaded.model, settings.batch_size
    task = tasks.load_task(settings.task, limit=settings.limit or None, batch_size=batch_size)
    assert isinstance(task, tasks.Task), "one task at a time"
    task.prepare(loaded.tokenizer)
    prepared = task._prepared
    assert prepared is not None
    assert prepared.tokens is not None, f"task={settings.task} generates text: nothing here is scored"
    requests = prepared.tokens
    lm: Any = task._lm_around(model, loaded.tokenizer)
    sides: dict[str, Callable[[], Any]] = {
        "theirs": lambda: lm._loglikelihood_tokens(requests, disable_tqdm=True),
        "ours": lambda: scoring.loglikelihoods(model, requests, max_length=lm.max_length, batch_size=batch_size),
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    found, tokens, logits = {}, {}, {}
    with harness.quiet(), torch.no_grad():
        for side, score in sides.items():  # warms up too
            found[side], tokens[side], logits[side] = counted(model, score)
        for _ in range(settings.repeats):
            for side, score in sides.items():
                start = clock(model.device)
                score()
                seconds[side].append(clock(model.device) - start)
    median = {side: statistics.median(values) for side, values in seconds.items()}
    best: dict[str, dict[int, tuple[float, int]]] = {side: {} for side in sides}
    for side, answers in found.items():
        for i, (instance, (logp, _)) in enumerate(zip(prepared.asked, answers, strict=True)):
            best[side][instance.doc_id] = max(best[side].get(instance.doc_id, (-float("inf"), 0)), (logp, -i))
    row = {
        "faster": round(median["theirs"] / median["ours"], 2),
        "tokens": round(tokens["theirs"] / tokens["ours"], 2),
        "logits": round(logits["theirs"] / logits["ours"], 2),
        "gap": max(abs(a - b) for (a, _), (b, _) in zip(found["theirs"], found["ours"], strict=True)),
        "differ": sum(best["theirs"][doc][1] != best["ours"][doc][1] for doc in best["ours"]),
        "questions": len(best["ours"]),
    }
    print(
        f"{name:13} {str(model.dtype).removeprefix('torch.'):8} {len(requests):6,} choices  "
        f"tokens {tokens['theirs']:8,} → {tokens['ours']:7,}  logits {logits['theirs']:8,} → {logits['ours']:7,}  "
        f"{row['faster']:5.2f}× faster  "
        f"gap {row['gap']:.1e}, {row['differ']} of {row['questions']} answers differ",
        flush=True,
    )
    return row


def main(argv: list[str]) -> None:
    settings = parse(argv, Settings)
    torch.set_num_threads(settings.threads)
    ratios = {name: compare(name, settings) for name in settings.model}
    cuda = settings.device.startswith("cuda")
    print(
        json.dumps(
            {
                "benchmark": "evaluation",
                "device": torch.cuda.get_device_name(settings.device) if cuda else platform.machine(),
                "versions": {"torch": torch.__version__, "python": platform.python_version()},
                "options": asdict(settings),
                "ratios": ratios,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
