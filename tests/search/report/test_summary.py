"""A study's numbers as one file: complete, small, and of no machine."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from allocators.core.errors import StudyError
from search.records import read
from search.records.files import EVALUATIONS
from search.report import Report, summary
from search.report.__main__ import main
from tests.search.report.test_sections import HOT, MEASURED, table_study
from tests.search.studies import CONFIG, fill, open_study

TESTED = {name: tuple(accuracy - 0.01 for accuracy in accuracies) for name, accuracies in MEASURED.items()}


def test_rows_and_comparisons_are_those_of_the_report(tmp_path: Path) -> None:
    report = table_study(tmp_path, tests=TESTED)
    data = json.loads(summary.text(summary.summary(report, said=report.words)))
    rows = {row["id"]: row for row in data["rows"]}
    (hot,) = [row for row in data["rows"] if row["allocator"] == "hot"]
    assert list(hot["test"].values()) == pytest.approx([a - 0.01 for a in HOT])
    assert list(hot["accuracy"].values()) == pytest.approx(HOT)
    assert {"score": "mass"}.items() <= hot["asked"][1].items()  # was answered by the same allocation
    assert hot["stderr"]["test"] >= statistics.stdev(HOT) / 2
    (beside,) = [one for one in data["comparisons"] if one["name"] == "hot 25 % − random 25 %, paper"]
    assert [rows[side]["allocator"] for side in beside["rows"]] == ["hot", "random"]
    assert (beside["split"], beside["n"], beside["difference"]) == ("test", 4, pytest.approx(0.1))
    absent = [one for one in data["comparisons"] if len(one["rows"]) < 2]
    assert absent
    assert all("difference" not in one for one in absent)
    assert data["front"]
    assert set(data["front"]) <= set(rows)
    assert data["said"] == report.words


def test_later_seeds_can_be_left_out_and_the_folder_keeps_them(tmp_path: Path) -> None:
    folder = table_study(tmp_path).records.folder
    records = read(folder)
    summary.keep_seeds(records, 2)
    data = summary.summary(Report(records))
    assert data["seeds"] == [0, 1]
    assert {len(row["accuracy"]) for row in data["rows"]} == {2}
    assert len(read(folder).finished) == 16


def test_what_was_forgotten_comes_from_the_study_or_from_what_was_measured_later(tmp_path: Path) -> None:
    report = table_study(tmp_path)
    assert not any("forgotten" in row for row in summary.summary(report)["rows"])
    run, lines = report.points[0].runs[0], report.records.folder / EVALUATIONS
    line = {"digest": run.digest, "asked": {"forgetting": "held_out"}, "data": "0", "results": [{"rise": 0.5}]}
    other = line | {"asked": {"task": "arc_easy"}, "results": [{"accuracy": 0.9}]}
    lines.write_text("".join(json.dumps(one) + "\n" for one in (line | {"results": [{"rise": 0.7}]}, line, other)))
    rows = [row for row in summary.summary(report)["rows"] if "forgotten" in row]
    assert [row["forgotten"] for row in rows] == [{str(run.trial.seed): 0.5}]
    for broken in ("{", "[]", json.dumps(line | {"asked": None}), json.dumps(line | {"results": [{}]})):
        lines.write_text(broken + "\n")
        with pytest.raises(StudyError, match=r"evaluations.jsonl.*delete"):
            summary.summary(report)


def test_the_command_writes_the_file_without_folders_of_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"python -m search.run space=sieve model={tmp_path}/olmoe storage={tmp_path}/studies trials=3"
    with open_study(tmp_path / "s", config=CONFIG | {"trials": 3}, command=command) as study:
        fill(study)
    to = tmp_path / "deep" / "s.json"
    assert main([str(tmp_path / "s"), f"results={to}"]) == 0
    assert f"Numbers: {to}" in capsys.readouterr().out
    text = to.read_text()
    assert str(tmp_path) not in text
    data = json.loads(text)
    assert data["command"].startswith("python -m search.run space=sieve")
    assert len(data["rows"]) == len(read(tmp_path / "s").points)


@pytest.mark.parametrize("name", ["outcomes.jsonl", "study.json", "untrained.json", "front.png", "."])
def test_results_take_the_place_of_results_alone(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A study's records are nowhere else, and what is written over them is lost."""
    with open_study(tmp_path / "s", config=CONFIG) as study:
        fill(study)
    (tmp_path / "s" / "untrained.json").write_text('{"accuracy": 0.25, "stderr": 0.02, "by_task": {}}')
    assert main([str(tmp_path / "s")]) == 0
    to = tmp_path / "s" / name
    before = to.read_bytes() if to.is_file() else b""
    capsys.readouterr()
    assert main([str(tmp_path / "s"), f"results={to}"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert str(to) in err
    assert not to.is_file() or to.read_bytes() == before
    again = tmp_path / "again.json"
    for _ in range(2):  # a file of results may be written anew, and an empty one filled
        assert main([str(tmp_path / "s"), f"results={again}"]) == 0
    assert json.loads(again.read_text())["rows"]


@pytest.mark.parametrize(
    "words", [["results=x.json"], ["a", "b"], ["a", "result=x.json"], ["a", "seeds=-1"], ["a", "seeds=2"]]
)
def test_words_that_it_does_not_take_are_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1
