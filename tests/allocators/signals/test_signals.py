"""The one door to all signals: measured by kind on a source, and nothing loaded that is not needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from allocators import signals
from allocators.core.errors import StudyError
from allocators.core.shapes import shape_from_config
from allocators.signals import spectrum
from allocators.signals.routing import measure, pad
from tests.allocators import tiny
from tests.allocators.models import moe_shape

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]


class Tokenizer:
    pad_token_id = 0


class Documents:
    data_hash = "abc"

    def prompts(self, tokenizer: Any, samples: int, seed: int) -> list[list[int]]:
        return PROMPTS[:samples]


class Source:
    """A model and a task that count how often they are asked for."""

    name, identity, task_name, samples, seed = "tiny", "sha", "documents", 2, 0
    device, dtype, folder = "cpu", "float32", None
    shape, scratch = moe_shape(), Path()
    tokenizer, tokenizer_identity, task = Tokenizer(), "words", Documents()

    def __init__(self) -> None:
        self.loads = 0
        self.heard: list[tuple[int, int, str]] = []

    def progress(self, done: int, total: int, what: str) -> None:
        self.heard.append((done, total, what))

    @property
    def model(self) -> Any:
        self.loads += 1
        return tiny.model("olmoe")


def test_measures_once_and_needs_no_model_after(tmp_path: Path) -> None:
    source = Source()
    first = signals.measured("routing", source, folder=tmp_path)
    assert source.loads == 1
    assert signals.measured("routing", source, folder=tmp_path) == first
    assert source.loads == 1
    assert source.heard == [(2, 2, "samples")]  # told once a batch, and nothing for what the cache knows
    direct = measure(tiny.model("olmoe"), pad(PROMPTS[:2], pad_token_id=0), provenance=first.provenance)
    assert first == direct


def test_what_surrounds_a_measurement_is_entered_only_where_one_is_made(tmp_path: Path) -> None:
    entered = []

    @contextmanager
    def during() -> Iterator[None]:
        entered.append("in")
        yield
        entered.append("out")

    for _ in range(2):
        signals.measured("routing", Source(), folder=tmp_path, during=during)
    assert entered == ["in", "out"]


@pytest.mark.parametrize(
    "change",
    [
        {"identity": "other"},
        {"samples": 3},
        {"seed": 1},
        {"task_name": "t"},
        {"dtype": "bfloat16"},
        {"tokenizer_identity": "bytes"},
    ],
)
def test_whatever_the_numbers_depend_on_measures_again(tmp_path: Path, change: dict[str, Any]) -> None:
    source = Source()
    signals.measured("routing", source, folder=tmp_path)
    for attribute, value in change.items():
        setattr(source, attribute, value)
    signals.measured("routing", source, folder=tmp_path)
    assert source.loads == 2


def test_an_unknown_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"unknown signal 'rooting': choose from .*did you mean 'routing'"):
        signals.measured("rooting", Source(), folder=tmp_path)
    with pytest.raises(StudyError, match="unknown signal 'cache'"):
        signals.measured("cache", Source(), folder=tmp_path)


def dense_source(
    model: Any,
    folder: Callable[[], Path] | None,
    scratch: Path,
    *,
    dtype: str = "float32",
    progress: Callable[[int, int, str], None] = lambda *what: None,
) -> Any:
    return SimpleNamespace(
        name="dense", identity="sha", model=model, shape=shape_from_config(model.config, name="dense"), folder=folder,
        device="cpu", dtype=dtype, scratch=scratch, progress=progress,
    )  # fmt: skip


def test_the_spectrum_is_that_of_the_stored_weights_whatever_is_resident(tmp_path: Path) -> None:
    """A float32 checkpoint on a device that rounds it: one cache file, and in it the numbers of the checkpoint."""
    model = tiny.model("llama")
    model.save_pretrained(tmp_path / "model")
    kept = partial(signals.measured, "spectrum", folder=tmp_path / "signals")
    told = []
    rounded = dense_source(
        model.bfloat16(),
        lambda: tmp_path / "model",
        tmp_path,
        dtype="bfloat16",
        progress=lambda *what: told.append(what),
    )
    signal = kept(rounded)
    assert signal.rows == spectrum.measure(tiny.model("llama"), rounded.shape, provenance={}).rows
    assert [(done, total) for done, total, _ in told] == [(n + 1, len(signal.rows)) for n in range(len(signal.rows))]
    assert kept(SimpleNamespace(**vars(rounded) | {"dtype": "float32", "folder": lambda: 1 / 0})) == signal
    assert len(list((tmp_path / "signals").glob("spectrum-*.json"))) == 1


def test_weights_that_are_stored_nowhere_are_told_apart_by_their_dtype(tmp_path: Path) -> None:
    model = tiny.model("llama")
    exact = signals.measured("spectrum", dense_source(model, None, tmp_path), folder=tmp_path)
    half = dense_source(tiny.model("llama").bfloat16(), None, tmp_path, dtype="bfloat16")
    rounded = signals.measured("spectrum", half, folder=tmp_path)
    assert exact.rows != rounded.rows
    assert len(list(tmp_path.glob("spectrum-*.json"))) == 2


def test_a_spectrum_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    model = tiny.model("llama")
    model.save_pretrained(tmp_path / "model")

    def cut_off(done: int, total: int, what: str) -> None:
        if done == 5:
            raise KeyboardInterrupt

    source = dense_source(model, lambda: tmp_path / "model", tmp_path / "signals", progress=cut_off)
    with pytest.raises(KeyboardInterrupt):
        signals.measured("spectrum", source, folder=tmp_path / "signals")
    (part,) = (tmp_path / "signals").glob("*.part")
    assert part.read_text().count("stable_rank") == 5
    source.progress = lambda *what: None
    signal = signals.measured("spectrum", source, folder=tmp_path / "signals")
    assert signal.rows == spectrum.measure(tiny.model("llama"), source.shape, provenance={}).rows
    assert not part.exists()
