"""What may leave the machine: no secret, in whatever form a message quotes it, and nothing else lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from search.records.redact import portable, redacted
from tests.search.studies import open_study, outcome, started


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("https://me:hunter2@host/x", "https://***@host/x"),
        ("https://me:hun@ter2@host/x", "https://***@host/x"),
        ("git+https://hunter2@github.com/a/b.git@main", "git+https://***@github.com/a/b.git@main"),
        ("no study in s3:/me:hunter2@bucket/s (study.json)", "no study in s3:/***@bucket/s (study.json)"),
        ("s3://b/p?secret_key=hunter2&region=x", "s3://b/p?secret_key=***&region=x"),
        ("https://host/x?private_token=hunter2;depth=1", "https://host/x?private_token=***;depth=1"),
        ("https://host/x?sv=1&sig=hunter2", "https://host/x?sv=1&sig=***"),
        ("https://host/#access_token=hunter2", "https://host/#access_token=***"),
        ("env: HF_TOKEN=hunter2 HOME=/root", "env: HF_TOKEN=*** HOME=/root"),
        (
            "environ({'AWS_SECRET_ACCESS_KEY': 'hunter2', 'A': 'b'})",
            "environ({'AWS_SECRET_ACCESS_KEY': '***', 'A': 'b'})",
        ),
        ("Authorization: Bearer hunter2", "Authorization: Bearer ***"),
        ("401 for hf_hunter2hunter2hunter2", "401 for hf_***"),
    ],
)
def test_a_secret_is_taken_out_of_a_text_and_nothing_else(text: str, said: str) -> None:
    assert redacted(text) == said
    assert "hunter2" not in portable(text)


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens=5",
        "sqlite:////home/a@b/mlflow.db",
        "a@b.c: no such task",
        "KeyError: 'x'",
        "tokens: many",
        "file:///a/b",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text


def test_messages_on_record_have_none(tmp_path: Path) -> None:
    with open_study(tmp_path) as study:
        failed = started(outcome()).updated(status="failed", message="s3://me:hunter2@b: HF_TOKEN=hunter2")
        study.append_finished(failed, {})
        study.append_answered({}, reason="infeasible", message="https://me:hunter2@host")
        assert study.finished[failed.digest].message == "s3://***@b: HF_TOKEN=***"
    assert "hunter2" not in (tmp_path / "outcomes.jsonl").read_text()
