"""Pins: every choice of every space survives the command line and the printed command."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocators.core import plugins
from allocators.core.errors import StudyError
from allocators.core.shapes import shape_from_config
from allocators.core.words import Value
from search.config import RunConfig, parse
from search.points.asked import PinnedTrial, out_of_range
from search.problem import Problem, check_pins, corners, load_space
from search.session.prepare import prepare

SPACES = plugins.names("spaces")
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 8, "vocab_size": 64}
OLMOE = SIZES | {"model_type": "olmoe", "intermediate_size": 32, "num_experts": 16, "num_experts_per_tok": 2}
LLAMA = SIZES | {"model_type": "llama", "intermediate_size": 128, "num_key_value_heads": 4}


def problem_of(name: str) -> Problem:
    base = plugins.load("spaces", name, "space").BASE
    shape = shape_from_config(OLMOE if base == "moe" else LLAMA, name=base)  # of `any`: a dense one
    return Problem(space=load_space(name, shape), shape=shape, model=base, task="t")


def printed_and_parsed(config: RunConfig) -> RunConfig:
    """What the shell hands over of the command that is printed for a study."""
    return parse(shlex.split(config.command())[3:])


@pytest.mark.parametrize("name", SPACES)
def test_every_choice_of_every_space_survives_the_printed_command(name: str) -> None:
    problem = problem_of(name)
    for high in (False, True):
        for point, params in corners(problem, high=high):
            config = RunConfig(space=name, pins=params)
            again = printed_and_parsed(config)
            matched = check_pins(replace(problem, pins=again.pins))
            assert replace(again, pins=matched) == config
            assert {k: type(v) for k, v in matched.items()} == {k: type(v) for k, v in params.items()}
            pinned = replace(problem, pins=again.pins)
            assert [(p, q) for p, q in corners(pinned)] == [(point, params)]
            assert again.command() == config.command()


@pytest.mark.parametrize("space", [name for name in SPACES if "mola" in problem_of(name).space.ALLOCATORS])
def test_a_layout_of_mola_is_pinned_as_it_is_printed(space: str) -> None:
    for pattern in ("2468", "8642", "8228", "2882", "5555", "8888"):
        config = parse([f"space={space}", "space.allocator=mola", f"space.pattern={pattern}"])
        if pattern in {params.get("pattern") for _, params in corners(problem_of(space))}:
            assert check_pins(replace(problem_of(space), pins=config.pins))["pattern"] == pattern


class Anything:
    """A trial that must not be asked: the knob is pinned."""


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
KNOBS = st.one_of(TEXTS, st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.none())


@given(KNOBS)
def test_any_choice_survives_the_printed_command(value: Value) -> None:
    again = printed_and_parsed(RunConfig(pins={"x": value}))
    matched = PinnedTrial(Anything(), again.pins).suggest_categorical("x", [value, object()])
    assert matched == value
    assert type(matched) is type(value)


@given(st.floats(-1.7e308, 1.7e308), st.integers(-(10**18), 10**18))
def test_any_number_survives_the_printed_command(number: float, whole: int) -> None:
    again = PinnedTrial(Anything(), printed_and_parsed(RunConfig(pins={"x": number, "n": whole})).pins)
    assert again.suggest_float("x", -1.7e308, 1.7e308) == number
    assert again.suggest_int("n", -(10**18), 10**18) == whole


@given(TEXTS, st.lists(TEXTS.map(str.strip).filter(bool), max_size=3))
def test_any_text_survives_the_printed_command(text: str, plugins_: list[str]) -> None:
    config = RunConfig(model=text, storage=text, metric=text, plugins=plugins_)
    assert printed_and_parsed(config) == config


def test_a_pin_means_the_choice_that_is_typed_like_it() -> None:
    def chosen(pin: Value, choices: list[Value]) -> Value:
        choice: Value = PinnedTrial(Anything(), {"x": pin}).suggest_categorical("x", choices)
        return choice

    assert chosen(2468, ["2468", "8642"]) == "2468"
    assert chosen(1000.0, ["1e3", "1000"]) == "1e3"
    assert chosen(1000, ["1e3", "1000"]) == "1000"
    assert chosen("007", ["007", "7"]) == "007"
    assert chosen(2, ["2", 2]) == 2
    assert chosen(1, [0.25, 1.0]) == 1.0
    assert chosen(True, ["true", "false"]) == "true"
    assert chosen("None", [None, 1]) is None
    assert chosen("1.10", ["1.10", "1.1"]) == "1.10"  # quoted in a file
    with pytest.raises(StudyError, match=r"space.x=1.1 is one of '1.10', '1.1'"):
        chosen(1.1, ["1.10", "1.1"])
    with pytest.raises(StudyError, match="choose from 2468, 8642; did you mean '2468'"):
        chosen(24680, ["2468", "8642"])


@pytest.mark.parametrize("text", ["2.0", "2", "2e0"])
def test_a_whole_number_may_be_written_with_a_point(text: str) -> None:
    assert PinnedTrial(Anything(), parse([f"space.x={text}"]).pins).suggest_int("x", 1, 8) == 2


@pytest.mark.parametrize("text", ["inf", "nan", "1e400", "half", "true", "null"])
def test_a_pinned_number_is_finite(text: str) -> None:
    pinned = PinnedTrial(Anything(), parse([f"space.x={text}"]).pins)
    with pytest.raises(StudyError, match=r"space.x=.* is not possible: it must be a number, the space uses 0 .. 1"):
        pinned.suggest_float("x", 0, 1)
    with pytest.raises(StudyError, match=r"space.x=.* is not possible: it must be whole"):
        pinned.suggest_int("x", 0, 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["space.rank=64"],
            "space.rank=64 is not possible: it must be in 1 .. 32; recipe.rank=64 fixes it all the same",
        ),
        (["space.rank=0"], "space.rank=0 is not possible: it must be in 1 .. 32"),
        (
            ["space.scaled_rate=9"],
            "space.scaled_rate=9 is not possible: it must be in 0.0005 .. 0.5; recipe.",
        ),
        (["space.fraction=0.3"], "on the grid 0.0625 .. 0.9375 in steps of 0.0625, for example 0.25 or 0.3125"),
        (["space.fraction=1"], "space.fraction=1 is not possible: it must be in 0.0625 .. 0.9375"),
        (["space.allocator=seive"], "unknown value of space.allocator 'seive': choose from"),
        (["recipe.rank=4", "space.rank=8"], "recipe.rank and space.rank both fix rank: leave one of them out"),
        (["recipe.learning_rate=1e-3", "space.scaled_rate=0.1"], "both fix learning_rate: leave one of them out"),
        (["replay=tiny-moe", "space.rank=3"], "unknown value of space.rank '3': choose from 16, 2, 4"),
        (["replay=tiny-moe", "space.fraction=0.3"], "unknown value of space.fraction '0.3': choose from"),
    ],
)
def test_a_pin_that_the_space_could_not_suggest_is_one_line(words: list[str], said: str) -> None:
    with pytest.raises(StudyError) as error:
        prepare(parse(words))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_what_the_command_line_fixes_of_the_recipe_may_lie_outside_the_space() -> None:
    assert prepare(parse(["recipe.rank=64", "recipe.scaled_rate=0.7"]))[1].pins == {"rank": 64, "scaled_rate": 0.7}


def test_a_knob_with_one_value_has_a_default_that_a_pin_changes() -> None:
    words = ["space=smoe_table", "model=tiny-dense", "space.experts_per_block=1"]
    assert prepare(parse(words))[1].pins == {"experts_per_block": 1}


@given(st.integers(1, 40), st.integers(1, 7), st.integers(0, 40))
def test_what_lies_on_a_grid_may_be_pinned_and_nothing_else(low: int, step: int, place: int) -> None:
    high = low + 10 * step
    assert (out_of_range(low + place, low, high, step=step) == "") == (place % step == 0 and place <= 10 * step)
    fine = [low / 16 + k * step / 16 for k in range(11)]
    assert all(out_of_range(value, fine[0], fine[-1], step=step / 16) == "" for value in fine)
    assert out_of_range(fine[1] + step / 40, fine[0], fine[-1], step=step / 16)
