"""The picture: one colour an allocator, whatever the study."""

from __future__ import annotations

from search.report.plot import GREYS, colours


def test_one_colour_an_allocator() -> None:
    palette = colours(["sieve", "random", "esft", "sieve"])
    assert palette["sieve"] != palette["esft"]
    assert palette["random"] == GREYS["random"]
