"""The one door to all signals: measured by kind on a source, and nothing loaded that is not needed."""

from __future__ import annotations

import pytest

from allocators import signals
from allocators.core.errors import StudyError
from allocators.signals.routing import measure, pad
from tests.allocators import tiny

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]


class Tokenizer:
    pad_token_id = 0


class Documents:
    data_hash = "abc"

    def prompts(self, tokenizer, samples, seed):
        return PROMPTS[:samples]


class Source:
    """A model and a task that count how often they are asked for."""

    name, identity, task_name, samples, seed = "tiny", "sha", "documents", 2, 0
    tokenizer, task = Tokenizer(), Documents()

    def __init__(self) -> None:
        self.loads = 0

    @property
    def model(self):
        self.loads += 1
        return tiny.model("olmoe")


def test_measures_once_and_needs_no_model_after(tmp_path):
    source = Source()
    first = signals.measured("routing", source, folder=tmp_path)
    assert source.loads == 1
    assert signals.measured("routing", source, folder=tmp_path) == first
    assert source.loads == 1
    direct = measure(tiny.model("olmoe"), pad(PROMPTS[:2], pad_token_id=0), provenance=first.provenance)
    assert first == direct


@pytest.mark.parametrize("change", [{"identity": "other"}, {"samples": 3}, {"seed": 1}, {"task_name": "t"}])
def test_whatever_the_numbers_depend_on_measures_again(tmp_path, change):
    source = Source()
    signals.measured("routing", source, folder=tmp_path)
    for attribute, value in change.items():
        setattr(source, attribute, value)
    signals.measured("routing", source, folder=tmp_path)
    assert source.loads == 2


def test_an_unknown_kind_is_named(tmp_path):
    with pytest.raises(StudyError, match=r"unknown signal 'rooting': choose from .*did you mean 'routing'"):
        signals.measured("rooting", Source(), folder=tmp_path)
    with pytest.raises(StudyError, match="unknown signal 'cache'"):
        signals.measured("cache", Source(), folder=tmp_path)
