"""The report: everything from the records, honest words, one safe HTML file; nothing heavy is loaded for it."""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
from rich.console import Console

from allocators.core.errors import StudyError
from allocators.core.types import ExpertSelection, ModuleRanks, Outcome
from search.records import LINES
from search.report import Report, show, write
from search.report.__main__ import main
from search.report.words import load_code
from tests import ROOT
from tests.search.report.written import data_of, rows_of
from tests.search.studies import (
    CONFIG,
    EXPERTS,
    LAYERS,
    counts,
    dense_shape,
    fill,
    identity_of,
    open_study,
    outcome,
    selection,
    started,
)
from trainers import storage


def study_of(folder: Path, *outcomes: Outcome, **changes: Any) -> Report:
    with open_study(folder, identity=identity_of(outcomes[0].trial), **changes) as study:
        for done in outcomes:
            study.append_finished(done, {})
    return write(folder)


def test_a_whole_study(tmp_path: Path) -> None:
    with open_study(tmp_path / "demo") as study:
        fill(study)
        written = write(study.folder)  # while the study holds its lock
        finished = study.finished
    data, front, points = data_of(study.folder), *(rows_of(study.folder / n) for n in ("front.csv", "points.csv"))

    assert {row["digest"] for row in points} == set(finished)
    assert {row["digest"] for row in front} == {row["digest"] for row in points if row["on_front"] == "True"}
    assert [int(row["trainable_params"]) for row in front] == sorted(int(row["trainable_params"]) for row in front)
    assert [p["digest"] for p in data["points"] if p["front"]] == [
        c.best.digest for c in written.points if c in written.front
    ]
    assert {a["reason"]: a["count"] for a in data["answered"]} == {"duplicate": 3, "infeasible": 1, "over budget": 1}
    assert data["command"] == "python -m search.run space=sieve"
    assert "torch" in data["versions"]
    statuses = {p["status"] for p in data["points"]}
    assert statuses == {"complete", "stopped", "diverged", "failed", "out of memory"}
    assert all(not p["front"] for p in data["points"] if p["status"] != "complete")
    picture = (study.folder / "front.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", picture[16:24]) == (1200, 750)
    assert written.metrics["runs_finished"] == len(finished)
    assert written.metrics["best_accuracy"] == max(float(row["accuracy"]) for row in front)


def test_the_allocation_map_is_the_allocation(tmp_path: Path) -> None:
    done = outcome(selection(5, seed=3))
    study_of(tmp_path / "moe", done)
    data = data_of(tmp_path / "moe")
    assert data["map"] == {
        "rows": [f"layer {n}" for n in range(LAYERS)],
        "exists": [list(range(EXPERTS))] * LAYERS,
        "across": "expert",
    }
    shown = {n: tuple(i for i, c in enumerate(row) if c == "1") for n, row in enumerate(data["points"][0]["cells"])}
    assert isinstance(done.trial.allocation, ExpertSelection)
    assert shown == dict(done.trial.allocation.experts)

    study_of(tmp_path / "dense", outcome(counts(24)), shape=dense_shape())
    data = data_of(tmp_path / "dense")
    assert data["map"]["rows"] == ["q_proj", "up_proj", "down_proj"]
    assert [[ord(c) - ord("0") for c in row] for row in data["points"][0]["cells"]] == [[12, 24, 36, 48]] * 3


def test_the_map_of_ranks_is_the_ranks_and_the_tables_have_their_sum(tmp_path: Path) -> None:
    ranks = ModuleRanks({"model.layers.0.self_attn.q_proj": 3, "model.layers.2.mlp.up_proj": 70})
    study_of(tmp_path, outcome(ranks, allocator="dmole"), shape=dense_shape())
    assert main([str(tmp_path)]) == 0
    data = data_of(tmp_path)
    point = data["points"][0]
    assert (point["ranks"], point["amount"]) == (True, "total rank 73")
    cells = dict(zip(data["rank_map"]["rows"], point["cells"], strict=True))
    assert [ord(c) - ord("0") for c in cells["q_proj"]] == [3, 0, 0, 0]
    assert [ord(c) - ord("0") for c in cells["up_proj"]] == [0, 0, 70, 0]
    assert rows_of(tmp_path / "points.csv")[0]["total_rank"] == "73"


def test_no_finished_trial_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_study(tmp_path) as study:
        study.append_started(started(outcome()), {})
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "No finished trial yet" in printed
    assert "1 run is in flight" in printed
    assert (tmp_path / "front.csv").read_text() == ""
    assert data_of(tmp_path)["points"] == []


def test_a_point_without_trainable_parameters(tmp_path: Path) -> None:
    """Possible on a dense base: nothing is added."""
    study_of(tmp_path, outcome(counts(0)), outcome(counts(4), accuracy=0.7), shape=dense_shape())
    assert [row["trainable_params"] for row in rows_of(tmp_path / "front.csv")] == [
        "0",
        "17280",
    ]  # 60 experts of 4 (32 + 32) + 32


def test_only_failures(tmp_path: Path) -> None:
    bad = started(outcome()).updated(status="diverged", message="loss became NaN at step 3")
    written = study_of(tmp_path, bad)
    assert written.front == []
    assert "No finished trial yet" in written.words[0]
    assert any("1 diverged" in sentence for sentence in written.words)
    assert data_of(tmp_path)["points"][0]["runs"][0]["message"] == "loss became NaN at step 3"


@pytest.mark.parametrize("damage", ["absent", "file", "empty", "torn header", "no lines"])
def test_what_is_no_study_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    folder = tmp_path / "s"
    match damage:
        case "file":
            folder.write_text("")
        case "empty":
            folder.mkdir()
        case "torn header":
            open_study(folder).close()
            (folder / "study.json").write_text('{"id": "1"')
        case "no lines":
            open_study(folder).close()
            (folder / LINES).unlink()
    assert main([str(folder)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_damaged_lines_are_in_the_report(tmp_path: Path) -> None:
    with open_study(tmp_path) as study:
        study.append_finished(outcome(), {})
    text = (tmp_path / LINES).read_text()
    (tmp_path / LINES).write_text("garbage\n" + text)
    assert any("line 1 is damaged" in sentence for sentence in write(tmp_path).words)


def test_text_of_a_study_is_never_markup(tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    study_of(tmp_path, started(outcome(allocator=evil)).updated(status="failed", message=evil), command=evil)
    page = (tmp_path / "report.html").read_text()
    assert "<img" not in page
    assert page.count("</script>") == 2
    assert data_of(tmp_path)["points"][0]["allocator"] == evil


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    study_of(tmp_path, outcome())
    page = (tmp_path / "report.html").read_text()
    addresses = set(re.findall(r"https?://[^\"'\s]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<link|<script[^>]+src|@import|url\(|fetch\(|innerHTML", page)


def test_no_ray_no_torch_no_model(tmp_path: Path) -> None:
    study_of(tmp_path, outcome())
    code = (
        "import sys; from search.report.__main__ import main; main(sys.argv[1:]);"
        "heavy = {'ray', 'torch', 'mlflow', 'transformers', 'optuna', 'matplotlib.pyplot'};"
        "sys.exit(str(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.stderr.strip() == "set()"


def test_how_to_load_the_winner_is_told_only_where_its_adapter_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(location: storage.Location) -> NoReturn:  # as without a network, after its timeouts
        raise StudyError(f"cannot open '{location}'")

    monkeypatch.setattr(storage, "_filesystem", unreachable)
    best, other = outcome(selection(8), accuracy=0.6), outcome(selection(4), accuracy=0.5)
    remote = outcome(selection(2), accuracy=0.4, adapter="s3://elsewhere/x")
    with open_study(tmp_path) as study:
        (study.folder / "adapters" / best.digest).mkdir(parents=True)
    study_of(tmp_path, best, other)
    loads = {p["digest"]: p["load"] for p in data_of(tmp_path)["points"]}
    assert loads[best.digest].splitlines() == [
        "from trainers import adapter, models",
        'model = models.load("tiny-moe").model',
        f'adapter.load(model, "{tmp_path}/adapters/{best.digest}")',
    ]
    assert loads[other.digest] == ""
    other_settings = {"dtype": "auto", "quantization": "nf4", "gradient_checkpointing": True, "seed": 3}
    assert "models.load(\"m\", quantization='nf4').model" in load_code("m", "a", settings=other_settings)
    study_of(tmp_path / "far", remote, config=CONFIG | {"storage": "s3://me:pw@bucket"})
    [far] = data_of(tmp_path / "far")["points"]
    assert f'"s3://bucket/far/adapters/{remote.digest}"' in far["load"], "in the study's part of its storage"
    printed = io.StringIO()
    out = Console(file=printed, width=160)
    show(tmp_path, console=out)
    assert loads[best.digest] in printed.getvalue()
    exports = {p["digest"]: p["export"] for p in data_of(tmp_path)["points"]}
    assert exports[best.digest] == f"python -m search.export {tmp_path} point={best.digest[:8]} to=winner"
    assert exports[other.digest] == ""
    assert f"python -m search.export {tmp_path} to=winner" in printed.getvalue()
    assert f"│ {best.digest[:8]} │" in printed.getvalue()
