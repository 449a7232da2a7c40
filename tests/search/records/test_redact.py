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
        ("401 for sk-hunter2hunter2hunter2", "401 for sk-***"),
        ("s3://AKIA:hun/ter2/hunter2@bucket/x", "s3://***@bucket/x"),
        ("DB_PASSWORD='it is hunter2' A=b", "DB_PASSWORD='***' A=b"),
        ('MY_AUTH="hunter2 hunter2" GITHUB_PAT=hunter2', 'MY_AUTH="***" GITHUB_PAT=***'),
        ('{"password": "hunter2", "user": "me"}', '{"password": "***", "user": "me"}'),
        ("wandb_api_key=hunter2 wandb_mode=x", "wandb_api_key=*** wandb_mode=x"),
        ("mlflow_tracking_password: hunter2", "mlflow_tracking_password: ***"),
        ("AccountKey=hunter2==;EndpointSuffix=x", "AccountKey=***;EndpointSuffix=x"),
        ("pip --token hunter2 --user", "pip --token *** --user"),
        ("connect(host='h', token='hunter2')", "connect(host='h', token='***')"),
        ("GET /v1/api_key=hunter2", "GET /v1/api_key=***"),
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
        "http://host:5000/a/b@v1",
        "https://github.com/a/b@main",
        "eos_token: '</s>'",
        "the keys q_proj, k_proj: no such module",
        "accuracy of tokens 3: a token of the answer",
        "unknown model '/tmp/password': it is no folder here",
        "'my/api_key': not found; /etc/passwd: no text",
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


def test_a_long_message_takes_no_longer_than_its_length_is_worth() -> None:
    for text in ("A_" * 20_000, "-a" * 20_000, "password" * 5_000, "://" * 10_000, "'" * 40_000, "a:b/" * 10_000):
        assert redacted(text) == text
