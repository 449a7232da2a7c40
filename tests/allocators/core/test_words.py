"""Words of a command line: what is read, what is refused, and what the help shows."""

from __future__ import annotations

import doctest
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocators.core import words
from allocators.core.errors import StudyError


@dataclass(frozen=True)
class Settings:
    name: str = words.key("", "of the study")
    rank: int = words.key(8, "LoRA rank", least=1)
    share: float = words.key(-1.0, "of the experts (-1: all)", least=0, unset=-1)
    score: str = words.key("count", "what is counted", choices=("count", "mass"))
    loud: bool = words.key(False, "says more")
    sizes: tuple[int, ...] = words.key((1, 2), "of the matrices")
    plain: int = 3
    places: int = words.key(2, "after the point", most=9)


def test_its_examples_run() -> None:
    assert doctest.testmod(words).failed == 0


def test_values_are_read_by_the_type_of_their_key() -> None:
    read = words.parse(
        ["name= 1e3", "rank=1_6", "share=.5", "score=mass", "loud=True", "sizes=[3, 4]", "plain=5"], Settings
    )
    assert read == Settings(" 1e3", 16, 0.5, "mass", True, (3, 4), 5)
    assert words.parse(["share=-1", "sizes=", "name="], Settings) == Settings(sizes=())


@pytest.mark.parametrize(
    ("given_words", "said"),
    [
        (["rank=0"], "rank must be at least 1, got 0"),
        (["places=10"], "places must be at most 9, got 10"),
        (["rank=8.0"], "rank must be a whole number, got '8.0'"),
        (["rank=٣"], "rank must be a whole number"),
        (["share=inf"], "share must be a finite number, got 'inf'"),
        (["share=-2"], "share must be at least 0, got -2.0 (or -1, the default)"),
        (["score=mas"], "unknown score 'mas': choose from count, mass; did you mean 'mass'?"),
        (["loud=yes"], "loud must be true or false, got 'yes'"),
        (["sizes=1,x"], "sizes must be a whole number, got 'x'"),
        (["rnk=3"], "unknown key 'rnk'; did you mean 'rank'? (help lists the keys)"),
        (["rank"], "'rank' is not key=value, for example rank=8 (help lists the keys)"),
        (["rank=3", "rank=3"], "rank is given twice: leave one of them out"),
    ],
)
def test_a_mistake_is_one_line(given_words: list[str], said: str) -> None:
    with pytest.raises(StudyError) as error:
        words.parse(given_words, Settings)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_words_without_a_key_are_kept_where_a_command_takes_them() -> None:
    assert words.split(["export", "studies/a=b", "to=x=y"]) == (["export", "studies/a=b"], [("to", "x=y")])


def test_help_shows_defaults_choices_and_meanings() -> None:
    lines = words.help_of(Settings)
    assert len(lines) == 8
    text = "\n".join(lines)
    for part in (
        "rank (8)",
        "score (count)",
        "[count | mass]",
        "loud (false)",
        "sizes (1,2)",
        "plain (3)",
        "of the study",
    ):
        assert part in text
    assert "share (" not in text  # as the program decides
    assert all(words.asks_for_help(["rank=3", word]) for word in ("help", "-h", "--help"))


@given(st.lists(st.text(max_size=8).map(str.strip).filter(bool), max_size=4))
def test_a_list_is_read_as_it_was_written(items: list[str]) -> None:
    assert words.read_list(words.write_list(items)) == items


def test_what_python_calls_blank_is_no_part_of_a_number() -> None:
    assert words.read_value("0\x1f") == 0
    assert words.parse(["rank=8\x1f", "share=.5\x1f"], Settings) == Settings(rank=8, share=0.5)


@given(st.text())
def test_any_text_is_a_value(text: str) -> None:
    value = words.read_value(text)
    assert value is None or isinstance(value, str | int | float)
    words.read_list(text)


@dataclass(frozen=True)
class Named:
    """A number that may be left to the program, by a word."""

    seeds: int = words.key(-1, "seeds", least=1, unset=-1, names={"auto": -2})


def test_a_word_may_stand_for_a_number_that_the_bounds_leave_out() -> None:
    auto = words.parse(["seeds=auto"], Named)
    assert auto == Named(-2)
    assert words.written(auto, "seeds") == "auto"
    assert words.written(words.parse(["seeds=3"], Named), "seeds") == "3"
    for wrong in ("seeds=0", "seeds=-3", "seeds=Auto"):
        with pytest.raises(StudyError, match="seeds must be"):
            words.parse([wrong], Named)


def test_whole_numbers_may_be_said_in_thousands_millions_and_billions() -> None:
    for text, number in (
        ("100M", 100_000_000),
        ("1e8", 100_000_000),
        ("1.5M", 1_500_000),
        ("2k", 2_000),
        ("7B", 7_000_000_000),
        ("1_000K", 1_000_000),
        ("9007199254740991", 9_007_199_254_740_991),  # no float on the way
    ):
        assert words.parse([f"rank={text}"], Settings).rank == number
    for text in (
        "1.5",
        "8.0",
        "M",
        "1m",
        "1MM",
        "1e-3",
        "1.0001k",
        "1e999999999",
        "1e8 M",
        "0x10",
        "nan",
        "inf",
        "9" * 5_000,
    ):
        with pytest.raises(StudyError, match=r"^rank must be a whole number, got"):
            words.parse([f"rank={text}"], Settings)


def test_fractions_are_read_to_the_nearest_float() -> None:
    for text in (".1", "3e-4", "0.30000000000000004", "1e308", "5e-324", "2.5k", "-1e-3"):
        wanted = float(text.removesuffix("k")) * (1000 if text.endswith("k") else 1)
        assert words.read("share", text, float) == wanted
    for text in ("1e309", "1e-999999999", "1e400"):
        with pytest.raises(StudyError, match="share must be a finite number"):
            words.read("share", text, float)
