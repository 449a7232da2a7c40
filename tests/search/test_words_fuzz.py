"""Any words and any file come to a configuration or to one line: no other exception, and no hang."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from allocators.core.errors import StudyError
from search.config import RunConfig, keys, parse
from trainers.recipes import SETTINGS

KEYS = [*keys(), *(f"recipe.{name}" for name in SETTINGS), "space.rank", "space.x", "recipe.", "space.", "", "config"]
ODD = ["", " ", "nan", ".nan", "inf", "-inf", "1e400", "-1", "0", "1_000", "٣", "0x10", "1:30", "null", "~", "true"]
ODD += ["Yes", "9" * 5000, "1e308", "-0", "1.", ".5", "[", "]", "[a,b]", '["a', "{a: 1}", "*x", "&x", "%41", "${b}"]
ODD += ["???", "#", "a\nb", "a\tb", "\x1b[2J", "\0", "\ud800", "..", "../up", "/abs", "auto", "a" * 300, "é", "16 "]
VALUES = st.one_of(st.sampled_from(ODD), st.text(max_size=12), st.integers().map(str), st.floats().map(repr))
WORDS = st.one_of(
    st.builds("{}={}".format, st.sampled_from(KEYS), VALUES),
    st.builds("{}={}".format, st.text(max_size=8), VALUES),
    st.text(max_size=12),
)


def parsed(words: list[str]) -> RunConfig | None:
    """What came of the words; None for one line."""
    try:
        config = parse(words)
    except StudyError as error:
        text = str(error)
    else:
        return config
    assert text.isprintable()
    assert len(text) < 2_000
    return None


@settings(max_examples=400, deadline=None)
@given(st.lists(WORDS, max_size=5))
def test_any_words_are_a_configuration_or_one_line(words: list[str]) -> None:
    config = parsed([word for word in words if not word.startswith("config=")])
    if config is not None:
        assert parse(shlex.split(config.command())[3:]) == config
        json.dumps(config.to_json(), allow_nan=False)
        for name in keys():
            value = getattr(config, name)
            assert not isinstance(value, float) or math.isfinite(value)


SCALARS = st.one_of(
    st.sampled_from(ODD), st.text(max_size=8), st.integers(), st.floats(), st.booleans(), st.none(), st.dates()
)
NESTED: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=4), part, max_size=3),
    max_leaves=6,
)
NAMES = st.one_of(st.sampled_from([*KEYS, "recipe", "pins", "<<"]), st.text(max_size=6))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(NAMES, NESTED, max_size=5), st.booleans())
def test_any_mapping_in_a_file_is_a_configuration_or_one_line(
    tmp_path: Path, content: dict[str, Any], flow: bool
) -> None:
    file = tmp_path / "study.yaml"
    file.write_bytes(
        yaml.safe_dump(content, default_flow_style=flow, allow_unicode=True).encode(errors="surrogatepass")
    )
    parsed([f"config={file}"])


PIECES = [
    *("trials", "recipe", "pins", "name", "steps", "3", ": ", ":", "\n", "  ", "- ", "[", "]", "{", "}", ", ", "&a "),
    *("*a", "<<: ", "'", '"', "|", ">", "!!", "!!int ", "!!binary ", "!!set ", "!!timestamp ", "!x ", "? ", "---\n"),
    *("...\n", "%YAML 9\n", "#", "\t", "\0", "\ufeff", "\x85", "1e400", ".nan", "2001-13-45", "=", "~", "\\x"),
]
TEXTS = st.one_of(st.lists(st.sampled_from(PIECES), max_size=14).map("".join), st.text(max_size=20))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXTS | st.binary(max_size=20))
def test_any_file_is_a_configuration_or_one_line(tmp_path: Path, text: str | bytes) -> None:
    file = tmp_path / "study.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
    parsed([f"config={file}"])


@pytest.mark.parametrize(
    ("line", "start"),
    [
        ("{0}: &{0} {{{1}}}", "a: &a {k0: 1, k1: 2}"),  # mappings of mappings
        ("{0}: &{0} [{2}]", "a: &a [x, x]"),  # lists of lists
        ("{0}: &{0} {{<<: [{2}]}}", "a: &a {k0: 1, k1: 2}"),  # merges of merges
    ],
)
def test_a_small_file_that_unfolds_to_a_billion_values_is_no_hang(tmp_path: Path, line: str, start: str) -> None:
    lines, before = [start], "a"
    for name in "bcdefghijklmn":
        mapped = ", ".join(f"k{i}: *{before}" for i in range(9))
        lines.append(line.format(name, mapped, ", ".join([f"*{before}"] * 9)))
        before = name
    file = tmp_path / "study.yaml"
    file.write_text("\n".join(lines))
    assert parsed([f"config={file}"]) is None


def test_files_that_give_no_end_are_refused() -> None:
    with pytest.raises(StudyError, match="larger than 1 MiB"):
        parse(["config=/dev/zero"])
