"""How numbers, names and clocks are written: the same everywhere, and never more certain than they are."""

from __future__ import annotations

import doctest

from hypothesis import given
from hypothesis import strategies as st

from allocators.core.types import Score
from search import text
from search.front import Candidate
from search.text import accuracy_text, both_text, clock, human, label, point, probability, varying
from tests.search.studies import outcome, selection


def test_the_examples_in_the_docstrings() -> None:
    assert doctest.testmod(text).failed == 0


def test_words() -> None:
    assert [clock(s) for s in (0.4, 59.4, 61, 3_723)] == ["0 s", "59 s", "1:01", "1:02:03"]
    assert point(outcome(selection(4))) == "sieve fraction=0.25"
    assert varying([outcome(rank=4), outcome(rank=8)]) == ["rank"]
    assert varying([outcome()]) == []


def test_a_label_names_the_settings_that_vary() -> None:
    both = [outcome(selection(4), rank=4), outcome(selection(4), rank=8)]
    assert [label(one, varying(both)) for one in both] == [f"sieve fraction=0.25, rank {rank}" for rank in (4, 8)]
    assert label(outcome(selection(4), allocator=""), []) == "unnamed fraction=0.25"


def test_an_accuracy_names_its_error_where_it_is_known() -> None:
    run = outcome()
    assert accuracy_text(Candidate((run,), 0.5, 0.035)) == "0.500 ± 0.035"
    assert accuracy_text(Candidate((run,), 0.5, None)) == "0.500"
    assert accuracy_text(Candidate((run,), None, None)) == ""
    tested = Candidate((run.updated(test=Score(0.498, 0.036)),), 0.5, 0.035)
    assert accuracy_text(tested, "test") == "0.498 ± 0.036"
    assert both_text(tested, ("validation", "test")) == "validation 0.500 ± 0.035, test 0.498 ± 0.036"
    assert both_text(Candidate((run,), 0.5, None), ("validation", "test")) == "validation 0.500"


@given(st.floats(0, 1))
def test_no_probability_reads_as_certainty(chance: float) -> None:
    text = probability(chance)
    assert text in ("> .99", "< .01") or (text.startswith(".") and 0.01 <= float(text) <= 0.99)


@given(st.floats(1, 9e11))
def test_a_size_is_within_half_a_percent_of_what_is_meant(count: float) -> None:
    written = human(count)
    unit = {"k": 1e3, "M": 1e6, "B": 1e9}.get(written[-1], 1.0)
    assert abs(float(written.rstrip("kMB")) * unit - count) <= 0.005 * count
