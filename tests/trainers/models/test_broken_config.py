"""config.json as somebody may have left it: one line that names the file, or the sizes that transformers builds.

python -m pytest tests/trainers/models/test_broken_config.py
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from allocators.core import shapes
from allocators.core.errors import StudyError
from allocators.core.types import ModelShape
from tests.trainers.reference import _COMMON, FAMILIES
from trainers import models
from trainers.models import discover

DENSE: dict[str, dict[str, Any]] = {
    family: {} for family in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
}
LISTED = {family: {"model_type": family, **_COMMON, **more} for family, more in (FAMILIES | DENSE).items()}
WALKED = {family: {"model_type": family, **_COMMON} for family in ("phi", "opt", "phimoe", "starcoder2")}


def refused(folder: Path) -> str:
    with pytest.raises(StudyError) as error:
        models.shape_of(str(folder))
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    return str(error.value)


GOOD = json.dumps(LISTED["llama"])
TEXTS = {
    "empty": (b"", "is empty"),
    "blank": (b" \n", "is empty"),
    "number": (b"5", "holds int, not a JSON object"),
    "list": (b"[]", "holds list, not"),
    "text": (b'"llama"', "holds str, not"),
    "null": (b"null", "holds NoneType, not"),
    "cut": (GOOD[:-20].encode(), "is no JSON: .* is it cut short"),
    "comment": (b"/* llama */" + GOOD.encode(), "is no JSON: .*line 1 column 1"),
    "trailing comma": (GOOD[:-1].encode() + b",}", "is no JSON"),
    "utf-16": (GOOD.encode("utf-16"), "UTF-16 or UTF-32: save it as UTF-8"),
    "utf-16 without mark": (GOOD.encode("utf-16-le"), "UTF-16 or UTF-32"),
    "latin-1": (GOOD.encode()[:-1] + ', "author": "Zoë"}'.encode("latin-1"), "not written in UTF-8"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.*git lfs pull"),
    "deep": (b'{"a": ' + b"[" * 100_000, "cannot be read as JSON|is no JSON"),
    "huge number": (b'{"hidden_size": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
    "page": (b"<!DOCTYPE html><html></html>", "is no JSON"),
}


@pytest.mark.parametrize(("text", "said"), TEXTS.values(), ids=TEXTS)
def test_what_is_no_config_is_one_line_with_the_file(text: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text)
    message = refused(tmp_path)
    assert "config.json" in message
    with pytest.raises(StudyError, match=said):
        models.config_of(str(tmp_path))


VALUES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"model_type": ["llama"]}),
    ("llama", {"model_type": 5}),
    ("llama", {"num_attention_heads": 0}),
    ("llama", {"num_key_value_heads": "2"}),
    ("llama", {"num_key_value_heads": [2, 2]}),
    ("llama", {"num_key_value_heads": 2.0}),
    ("llama", {"num_key_value_heads": -2}),
    ("llama", {"num_key_value_heads": 0}),
    ("llama", {"head_dim": 8.0}),
    ("llama", {"head_dim": -2}),
    ("llama", {"head_dim": 0}),
    ("llama", {"hidden_size": 0}),
    ("llama", {"hidden_size": 3}),
    ("llama", {"num_hidden_layers": 0}),
    ("llama", {"num_hidden_layers": 10**9}),
    ("llama", {"num_hidden_layers": True}),
    ("llama", {"transformers_weights": "other.safetensors"}),
    ("qwen2_moe", {"decoder_sparse_step": 0}),
    ("qwen2_moe", {"mlp_only_layers": 3}),
    ("qwen2_moe", {"mlp_only_layers": ["0"]}),
    ("deepseek_v3", {"n_shared_experts": None}),
    ("deepseek_v3", {"q_lora_rank": 0}),
    ("olmoe", {"num_experts": 0}),
    ("olmoe", {"num_experts_per_tok": 0}),
    ("qwen3_moe", {"num_experts_per_tok": 99}),
    ("mixtral", {"num_experts_per_tok": "2"}),
    ("phi", {"hidden_size": "32"}),
    ("phi", {"hidden_size": None}),
    ("phi", {"num_attention_heads": 0}),
    ("phi", {"hidden_act": "nope"}),
    ("phi", {"rope_parameters": {"rope_type": "nope"}}),
    ("phi", {"num_hidden_layers": 0}),
    ("phi", {"num_hidden_layers": 10**9}),
    ("phi", {"num_hidden_layers": -1}),
    ("phi", {"pad_token_id": 99}),
    ("phi", {"model_type": "no-such-family"}),
    ("phi", {"model_type": None}),
]


@pytest.mark.parametrize(("family", "change"), VALUES, ids=lambda value: str(value)[:50])
def test_a_value_that_no_model_can_have_is_one_line(family: str, change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps((LISTED | WALKED)[family] | change))
    refused(tmp_path)


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    for family in ("llama", "phi"):
        config = (LISTED | WALKED)[family]
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8-sig")
        marked = models.shape_of(str(tmp_path))
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert models.shape_of(str(tmp_path)) == marked


odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([10**6, 10**9, 2**63, 10**30]),
    st.floats(allow_nan=False, allow_infinity=False, width=16),
    st.sampled_from(["", "2", "32", "silu", "nope", "a\nb", "\ud800"]),
    st.lists(st.integers(-1, 5), max_size=3),
    st.dictionaries(st.sampled_from(["rope_type", "a"]), st.integers(0, 3), max_size=2),
)


def keys_of(configs: dict[str, dict[str, Any]]) -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    return st.sampled_from(sorted(configs)).flatmap(
        lambda family: st.tuples(
            st.just(family),
            st.dictionaries(
                st.sampled_from(sorted({*configs[family], *more_keys(family), "layer_types", "quantization_config"})),
                odd,
                min_size=1,
                max_size=2,
            ),
        )
    )


def more_keys(family: str) -> list[str]:
    listed = shapes.FAMILIES.get(family)
    return ["head_dim", *(listed.defaults if listed else ("hidden_act", "rope_parameters", "partial_rotary_factor"))]


def small(change: dict[str, Any]) -> bool:
    """Whether transformers builds it within the time of a test."""
    return not any(isinstance(value, int) and abs(value) > 10**5 for value in change.values())


def shape_of(folder: Path) -> ModelShape | None:
    """None where it is refused, which must take one line; any other exception is a fault."""
    with suppress(StudyError):
        return models.shape_of(str(folder))
    refused(folder)
    return None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changed=keys_of(LISTED))
@example(changed=("gemma", {"num_key_value_heads": None}))
@example(changed=("mistral", {"head_dim": None, "num_key_value_heads": None}))
def test_sizes_from_any_config_are_refused_or_those_that_transformers_builds(
    changed: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    family, change = changed
    (tmp_path / "config.json").write_text(json.dumps(LISTED[family] | change))
    listed = shape_of(tmp_path)
    if listed is None or not small(change):
        return
    with suppress(StudyError):  # transformers refuses it, and so does `load`
        model = discover.without_weights(tmp_path, str(tmp_path), False)
        built = discover.shape_from_modules(model, name=str(tmp_path))
        assert set(built.modules) == set(listed.modules)
        assert built.num_layers == listed.num_layers


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changed=keys_of(WALKED))
def test_any_config_of_another_family_is_one_line_or_a_shape(
    changed: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    family, change = changed
    (tmp_path / "config.json").write_text(json.dumps(WALKED[family] | change))
    shape = shape_of(tmp_path)
    assert shape is None or shape.modules


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.binary(max_size=60) | st.integers(0, len(GOOD)).map(lambda end: GOOD[:end].encode()))
def test_any_bytes_are_one_line(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text)
    assert (shape_of(tmp_path) is None) == (text != GOOD.encode())
