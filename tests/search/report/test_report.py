"""The report: everything from the records, honest words, one safe HTML file; nothing heavy is loaded for it."""

from __future__ import annotations

import csv
import io
import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from search import report as module
from search.records import LINES, UNTRAINED
from search.report import Report, main, show, write
from tests import ROOT
from tests.search.studies import (
    CONFIG,
    EXPERTS,
    LAYERS,
    QUESTIONS,
    counts,
    dense_shape,
    fill,
    open_study,
    outcome,
    selection,
    started,
)


def study_of(folder: Path, *outcomes, **changes):
    with open_study(folder, **changes) as study:
        for done in outcomes:
            study.append_finished(done, {})
    return write(folder)


def data_of(folder: Path) -> dict:
    """What the page's script reads."""
    page = (folder / "report.html").read_text()
    return json.loads(re.search(r'<script id="study" type="application/json">(.*?)</script>', page, re.DOTALL)[1])


def rows_of(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(file.read_text())))


def test_a_whole_study(tmp_path):
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


def test_the_allocation_map_is_the_allocation(tmp_path):
    done = outcome(selection(5, seed=3))
    study_of(tmp_path / "moe", done)
    data = data_of(tmp_path / "moe")
    assert data["map"] == {
        "rows": [f"layer {n}" for n in range(LAYERS)],
        "exists": [list(range(EXPERTS))] * LAYERS,
        "across": "expert",
    }
    shown = {n: tuple(i for i, c in enumerate(row) if c == "1") for n, row in enumerate(data["points"][0]["cells"])}
    assert shown == dict(done.trial.allocation.experts)

    study_of(tmp_path / "dense", outcome(counts(24)), shape=dense_shape())
    data = data_of(tmp_path / "dense")
    assert data["map"]["rows"] == ["q_proj", "up_proj", "down_proj"]
    assert [[ord(c) - ord("0") for c in row] for row in data["points"][0]["cells"]] == [[12, 24, 36, 48]] * 3


def test_no_finished_trial_yet(tmp_path, capsys):
    with open_study(tmp_path) as study:
        study.append_started(started(outcome()), {})
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "No finished trial yet" in printed
    assert "1 run is in flight" in printed
    assert (tmp_path / "front.csv").read_text() == ""
    assert data_of(tmp_path)["points"] == []


def test_a_point_without_trainable_parameters(tmp_path):
    """Possible on a dense base: nothing is added."""
    study_of(tmp_path, outcome(counts(0)), outcome(counts(4), accuracy=0.7), shape=dense_shape())
    assert [row["trainable_params"] for row in rows_of(tmp_path / "front.csv")] == [
        "0",
        "17280",
    ]  # 60 experts of 4 (32 + 32) + 32


def test_only_failures(tmp_path):
    bad = started(outcome()).updated(status="diverged", message="loss became NaN at step 3")
    written = study_of(tmp_path, bad)
    assert written.front == []
    assert "No finished trial yet" in written.words[0]
    assert any("1 diverged" in sentence for sentence in written.words)
    assert data_of(tmp_path)["points"][0]["runs"][0]["message"] == "loss became NaN at step 3"


@pytest.mark.parametrize("damage", ["absent", "file", "empty", "torn header", "no lines"])
def test_what_is_no_study_is_one_line_and_exit_code_2(tmp_path, capsys, damage):
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


def test_damaged_lines_are_in_the_report(tmp_path):
    with open_study(tmp_path) as study:
        study.append_finished(outcome(), {})
    text = (tmp_path / LINES).read_text()
    (tmp_path / LINES).write_text("garbage\n" + text)
    assert any("line 1 is damaged" in sentence for sentence in write(tmp_path).words)


def test_text_of_a_study_is_never_markup(tmp_path):
    evil = "</script><img src=x onerror=alert(1)>"
    study_of(tmp_path, started(outcome(allocator=evil)).updated(status="failed", message=evil), command=evil)
    page = (tmp_path / "report.html").read_text()
    assert "<img" not in page
    assert page.count("</script>") == 2
    assert data_of(tmp_path)["points"][0]["allocator"] == evil


def test_the_page_loads_nothing(tmp_path):
    study_of(tmp_path, outcome())
    page = (tmp_path / "report.html").read_text()
    addresses = set(re.findall(r"https?://[^\"'\s]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<link|<script[^>]+src|@import|url\(|fetch\(|innerHTML", page)


def test_no_ray_no_torch_no_model(tmp_path):
    study_of(tmp_path, outcome())
    code = (
        "import sys; from search.report import main; main(sys.argv[1:]);"
        "heavy = {'ray', 'torch', 'mlflow', 'transformers', 'optuna', 'matplotlib.pyplot'};"
        "sys.exit(str(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.stderr.strip() == "set()"


def test_how_to_load_the_winner_is_told_only_where_its_adapter_is(tmp_path):
    best, other = outcome(selection(8), accuracy=0.6), outcome(selection(4), accuracy=0.5)
    remote = outcome(selection(2), accuracy=0.4, adapter="s3://bucket/adapters/x")
    with open_study(tmp_path) as study:
        (study.folder / "adapters" / best.digest).mkdir(parents=True)
    study_of(tmp_path, best, other, remote)
    loads = {p["digest"]: p["load"] for p in data_of(tmp_path)["points"]}
    assert loads[best.digest].splitlines() == [
        "from trainers import adapter, models",
        'model = models.load("tiny-moe").model',
        f'adapter.load(model, "{tmp_path}/adapters/{best.digest}")',
    ]
    assert loads[other.digest] == ""
    other_settings = {"dtype": "auto", "quantization": "nf4", "gradient_checkpointing": True, "seed": 3}
    assert "models.load(\"m\", quantization='nf4').model" in module.load_code("m", "a", settings=other_settings)
    assert '"s3://bucket/adapters/x"' in loads[remote.digest]
    out = Console(file=io.StringIO(), width=140)
    show(tmp_path, console=out)
    assert loads[best.digest] in out.file.getvalue()
    exports = {p["digest"]: p["export"] for p in data_of(tmp_path)["points"]}
    assert exports[best.digest] == f"python -m search.export {tmp_path} point={best.digest[:8]} to=winner"
    assert exports[other.digest] == ""
    assert f"python -m search.export {tmp_path} to=winner" in out.file.getvalue()
    assert f"│ {best.digest[:8]} │" in out.file.getvalue()


# --- what is said in words


def words_of(folder: Path, *outcomes, **changes) -> str:
    with open_study(folder, **changes) as study:
        for done in outcomes:
            study.append_finished(done, {})
        return "\n".join(Report(study).words)


def test_differences_inside_the_noise_are_called_that(tmp_path):
    # 200 questions at 0.5: a standard error of .035 each, .05 of a difference; .06 is less than two of those
    close = words_of(tmp_path / "a", outcome(selection(2), accuracy=0.47), outcome(selection(9), accuracy=0.53))
    assert QUESTIONS == 200
    assert "rises by 0.060, within two standard errors of a difference (0.100)" in close
    assert "cannot be told apart" in close
    far = words_of(
        tmp_path / "b",
        outcome(selection(2), accuracy=0.3),
        outcome(selection(6), accuracy=0.55),
        outcome(selection(9), accuracy=0.57),
    )
    assert "1 of 2 differences are within two standard errors" in far
    assert "cannot be told apart" not in far


def test_an_unknown_error_is_said_to_be_unknown(tmp_path):
    bare = [outcome(selection(n), accuracy=n / 10).updated(rungs=()) for n in (2, 6)]
    assert "standard error of the evaluation was not recorded" in words_of(tmp_path, *bare)


@pytest.mark.parametrize(("base", "reading"), [(0.3, "more than noise"), (0.56, "inside the noise")])
def test_what_training_gained_over_the_base_is_said_and_drawn(tmp_path, base, reading):
    assert "ntrained, the base" not in words_of(tmp_path / "a", outcome(accuracy=0.6))
    folder = tmp_path / "b"
    with open_study(folder) as study:
        study.append_finished(outcome(accuracy=0.6), {})
        (folder / UNTRAINED).write_text(json.dumps({"accuracy": base, "stderr": 0.035, "by_task": {}}))
        said, report = "\n".join(Report(study).words), write(folder)
    assert f"Untrained, the base has {base:.3f} ± 0.035: training is worth {0.6 - base:+.3f}" in said
    assert reading in said
    assert data_of(folder)["untrained"]["accuracy"] == base
    assert report.metrics["untrained_accuracy"] == base


def test_seeds_are_named(tmp_path):
    assert "One seed stands behind each point" in words_of(tmp_path / "a", outcome())
    several = [outcome(selection(4), seed=s, accuracy=0.5 + s / 100) for s in range(3)]
    assert "3 seeds stand behind each point" in words_of(tmp_path / "b", *several)
    mixed = words_of(tmp_path / "c", *several, outcome(selection(9), accuracy=0.7))
    assert "1 to 3 seeds stand behind each point" in mixed


def test_the_winners_curse_is_measured_where_seeds_are_fresh(tmp_path):
    lucky = [outcome(selection(4), seed=s, accuracy=a) for s, a in enumerate((0.6, 0.5, 0.52))]
    said = words_of(tmp_path / "a", *lucky)
    assert "accuracy 0.600 at the seed they were picked at, 0.510 on average over 2 fresh trainings of 1 picked" in said
    assert "picking flattered them by 0.090, so the front goes by the means" in said
    assert "between seeds of one point accuracy has a standard deviation of 0.053, estimated with 2 degrees" in said
    modest = [outcome(selection(4), seed=s, accuracy=a) for s, a in enumerate((0.5, 0.52))]
    assert "picking did not flatter them (difference -0.020)" in words_of(tmp_path / "b", *modest)
    assert "Winner's curse" not in words_of(tmp_path / "c", outcome())


def test_runs_of_the_search_and_repeats_are_counted_apart(tmp_path):
    runs = [outcome(selection(4), seed=s) for s in range(3)]
    said = words_of(tmp_path, *runs, config=CONFIG | {"seeds": 3})
    assert "1 of 24 runs are finished, and 2 repeats with other seeds: 3 complete." in said


def test_probabilities_agree_with_the_words(tmp_path):
    close = outcome(selection(2), accuracy=0.47), outcome(selection(9), accuracy=0.53)
    with open_study(tmp_path) as study:
        for done in close:
            study.append_finished(done, {})
        report = Report(study)
        assert list(report.chances) == [close[1].digest]
        assert 0.5 < report.chances[close[1].digest] < 0.977  # two standard errors
    write(tmp_path)
    assert [row["better_than_next_smaller"][:3] for row in rows_of(tmp_path / "front.csv")] == ["", "0.8"]


def early(first: list[float], last: list[float]):
    for n, (a, b) in enumerate(zip(first, last, strict=True), start=2):
        done = outcome(selection(n), accuracy=b)
        yield done.updated(rungs=({**done.rungs[0], "accuracy": a}, *done.rungs[1:]))


def test_a_first_rung_that_misleads_is_warned_of_with_its_n(tmp_path):
    last = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    assert "Warning" not in words_of(tmp_path / "a", *early([x / 2 for x in last], last))
    said = words_of(tmp_path / "b", *early([0.4, 0.1, 0.3, 0.2, 0.5, 0.25], last))
    assert "(rank correlation 0.09, n = 6, below 0.8)" in said
    assert "Warning" not in words_of(tmp_path / "c", *early([0.4, 0.1], last[:2])), "two runs have no ranks"


def test_baselines_are_compared_at_equal_parameters_and_recipe(tmp_path):
    hot, random = (
        outcome(selection(4, seed=1), accuracy=0.6),
        outcome(selection(4, seed=2), accuracy=0.4, allocator="random"),
    )
    smaller = outcome(selection(2), accuracy=0.9)
    other_rank = outcome(selection(4, seed=3), accuracy=0.8, rank=8)
    said = words_of(tmp_path / "a", hot, random, smaller, other_rank)
    assert "At 14.08k parameters (rank 4) sieve fraction=0.25 has 0.600 and random 0.400 (difference +0.200, " in said
    assert "standard error 0.049: more than noise" in said
    losing = words_of(tmp_path / "b", hot.updated(accuracy=0.38), random)
    assert "(difference -0.020, standard error 0.049: inside the noise)" in losing


def test_of_many_comparisons_inside_the_noise_only_the_number_is_told(tmp_path):
    pairs = [
        (outcome(selection(n), accuracy=0.5), outcome(selection(n, seed=9), accuracy=0.49, allocator="random"))
        for n in (1, 2, 3, 5, 6, 7)
    ]
    loser = outcome(selection(4, seed=2), accuracy=0.2, allocator="random")
    said = words_of(tmp_path, outcome(selection(4), accuracy=0.5), loser, *(run for pair in pairs for run in pair))
    assert said.count(" and random ") == 1
    assert "In 6 more comparisons of random or uniform with the best other rule" in said


def test_the_budget_of_the_study_or_round_numbers(tmp_path):
    points = [outcome(selection(n), accuracy=0.2 + n / 30) for n in (1, 4, 12)]  # 7.17k, 14.08k, 32.51k parameters
    limited = words_of(tmp_path / "a", *points, config=CONFIG | {"max_trainable_params": 15_000})
    assert "Best under 15k parameters: sieve fraction=0.25 (14.08k" in limited
    free = words_of(tmp_path / "b", *points)
    assert re.findall(r"Best under (\w+) parameters: (\S+ \S+)", free) == [
        ("10k", "sieve fraction=0.0625"),
        ("20k", "sieve fraction=0.25"),
    ]
    two = words_of(tmp_path / "c", points[0], outcome(selection(16), accuracy=0.9))  # nothing between 7.17k and 42k
    assert re.findall(r"Best under (\w+)", two) == ["20k"]


def test_the_knee_in_words(tmp_path):
    bent = [outcome(selection(n), accuracy=a) for n, a in ((1, 0.3), (4, 0.55), (14, 0.6))]
    assert "The knee, after which parameters buy less: sieve fraction=0.25" in words_of(tmp_path / "a", *bent)
    hollow = [outcome(selection(n), accuracy=a) for n, a in ((1, 0.3), (4, 0.31), (14, 0.6))]
    assert "has no knee" in words_of(tmp_path / "b", *hollow)


def test_one_colour_an_allocator():
    palette = module.colours(["sieve", "random", "esft", "sieve"])
    assert palette["sieve"] != palette["esft"]
    assert palette["random"] == module.GREYS["random"]
