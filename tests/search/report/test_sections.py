"""Tables of the report: rows beside what was published, and comparisons that say no more than their test."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from scipy import stats

import spaces.sieve_ablation as space
from allocators.core.tables import facts
from allocators.core.types import ExpertSelection, Outcome, Score
from search.report import Report, show, write
from search.report.sections import Section
from tests.search.report.written import data_of
from tests.search.studies import APART, BOTH, CONFIG, EXPERTS, IDENTITY, open_study, outcome, score, selection

ROWS: dict[str, tuple[dict[str, Any], ExpertSelection]] = {
    "all": ({"allocator": "all", "recipe": "paper"}, selection(EXPERTS)),
    "hot": ({"allocator": "sieve", "fraction": 0.25, "score": "count", "recipe": "paper"}, selection(4, seed=1)),
    "random": ({"allocator": "random", "fraction": 0.25, "recipe": "paper"}, selection(4, seed=2)),
    "greedy": ({"allocator": "greedy", "fraction": 0.25, "recipe": "paper"}, selection(4, seed=3)),
}
HOT = (0.60, 0.62, 0.61, 0.63)
MEASURED = {
    "all": tuple(a + d for a, d in zip(HOT, (0.004, -0.006, 0.002, 0.0), strict=True)),
    "hot": HOT,
    "random": tuple(a - d for a, d in zip(HOT, (0.09, 0.12, 0.08, 0.11), strict=True)),
    "greedy": tuple(a + d for a, d in zip(HOT, (0.05, -0.06, 0.04, -0.02), strict=True)),
}


def table_study(
    folder: Path,
    measured: Mapping[str, tuple[float, ...]] = MEASURED,
    *,
    model: str = "tiny-moe",
    task: str = "shift",
    mass_is_hot: bool = True,
    tests: Mapping[str, tuple[float, ...]] | None = None,
) -> Report:
    """`tests`: accuracies on the test split, of the first seeds of each row; None: the study selects on it."""
    apart = BOTH if tests is not None else {}
    config = apart | CONFIG | {"space": "sieve_ablation", "model": model, "task": task, "trials": 4, "seeds": 4}
    with open_study(folder, config=config, identity=IDENTITY | apart, table=facts(space)) as study:
        for name, accuracies in measured.items():
            params, allocation = ROWS[name]
            for seed, accuracy in enumerate(accuracies):
                done = outcome(allocation, accuracy=accuracy, seed=seed, allocator=name)
                study.append_finished(done, params)
                if seed < len((tests or {}).get(name, ())):
                    study.append_tested(done.digest, score((tests or {})[name][seed]))
        if mass_is_hot:
            hot = next(o.digest for o in study.finished.values() if o.trial.allocator == "hot")
            study.append_answered(ROWS["hot"][0] | {"score": "mass"}, reason="duplicate", digest=hot)
        return Report(study)


def rows_of(section: Section) -> dict[str, dict[str, str]]:
    return {row[0]: dict(zip(section.head, row, strict=True)) for row in section.rows}


def test_every_row_has_mean_and_spread_over_its_seeds(tmp_path: Path) -> None:
    rows, *_ = table_study(tmp_path).sections
    (hot,) = [row for label, row in rows_of(rows).items() if label.startswith("hot")]
    assert (hot["accuracy"], hot["s.d."], hot["seeds"]) == ("0.615", "0.013", "4")


def test_rows_of_a_grid_name_the_settings_that_differ(tmp_path: Path) -> None:
    """One allocation with two ranks is two rows, and says which is which."""
    config = CONFIG | {"space": "sieve_ablation", "trials": 2, "seeds": 1}
    with open_study(tmp_path, config=config, table=facts(space)) as study:
        for rank in (4, 8):
            study.append_finished(outcome(selection(4), rank=rank, accuracy=0.5), {"rank": rank})
        rows, *_ = Report(study).sections
    assert [row[0] for row in rows.rows] == [f"sieve fraction=0.25, rank {rank}" for rank in (4, 8)]


def test_comparisons_are_the_paired_tests_and_say_their_n(tmp_path: Path) -> None:
    found = rows_of(table_study(tmp_path).sections[1])
    random = found["hot 25 % − random 25 %, paper"]
    reference = stats.ttest_rel(HOT, MEASURED["random"])
    interval = reference.confidence_interval(0.95)
    assert random["n"] == "4"
    assert (random["difference"], random["95 % interval"]) == ("+0.100", f"{interval.low:+.3f} … {interval.high:+.3f}")
    assert float(random["p"]) == pytest.approx(reference.pvalue, abs=5e-4)
    assert random["reading"] == "the first is better"
    assert random["parameters"] == "14.08k / 14.08k"
    assert found["hot 25 % − greedy 25 %, paper"]["reading"] == "cannot be told apart"


def test_equality_is_shown_by_equivalence_and_not_by_failing_to_see_a_difference(tmp_path: Path) -> None:
    close = rows_of(table_study(tmp_path / "a").sections[1])["hot 25 % − all, paper"]
    assert close["reading"] == "equal to within 2 points"
    assert close["p"].startswith("TOST ")
    wide = MEASURED | {"all": tuple(a + d for a, d in zip(HOT, (0.05, -0.06, 0.04, -0.02), strict=True))}
    loose = rows_of(table_study(tmp_path / "b", wide).sections[1])["hot 25 % − all, paper"]
    assert loose["reading"] == "not shown to be equal to within 2 points"
    worse = MEASURED | {"all": tuple(a + 0.1 + d for a, d in zip(HOT, (0.01, -0.01, 0.0, 0.0), strict=True))}
    apart = rows_of(table_study(tmp_path / "c", worse).sections[1])["hot 25 % − all, paper"]
    assert apart["reading"] == "further apart than 2 points"


def test_rows_that_coincide_are_absent_or_have_one_seed_are_not_tested(tmp_path: Path) -> None:
    one = {name: values[:1] for name, values in MEASURED.items()}
    found = rows_of(table_study(tmp_path, one).sections[1])
    assert found["hot 25 % − mass 25 %, paper"]["reading"] == "both rows are one allocation"
    assert found["hot 25 % − coverage of half, paper"]["reading"] == "not both rows were trained"
    assert found["hot 25 % − random 25 %, paper"]["reading"] == "one seed: no test"
    assert {row["p"] for row in found.values()} == {""}


def test_published_numbers_stand_beside_only_where_model_and_task_are_the_papers(tmp_path: Path) -> None:
    here, *_ = table_study(tmp_path / "a").sections
    assert "published" not in here.head
    same = "Not trained: allocator=sieve fraction=0.25 score=mass recipe=paper (the allocation of hot"
    assert here.notes[0].startswith(same)
    assert "this study has tiny-moe on shift, so none stands beside" in here.notes[1]
    assert "OLMoE-1B-7B-0924, Qwen1.5-MoE-A2.7B on spider, gsm8k, hellaswag" in here.notes[1]
    papers, *_ = table_study(tmp_path / "b", model="allenai/OLMoE-1B-7B-0924", task="gsm8k").sections
    found = {label.split()[0]: row for label, row in rows_of(papers).items()}
    assert (found["random"]["published"], found["random"]["difference"]) == ("0.279", "+0.236")
    assert found["greedy"]["published"] == ""
    assert papers.notes[-1] == "Published: MoE-Sieve, arXiv:2603.24044."


def test_a_table_speaks_of_no_selection_and_a_search_has_no_table(tmp_path: Path) -> None:
    report = table_study(tmp_path / "a")
    assert not any("picked" in sentence for sentence in report.words)
    assert report.bias is None
    with open_study(tmp_path / "b") as study:
        study.append_finished(outcome(), {})
        assert Report(study).sections == []


def test_terminal_and_page_show_the_tables(tmp_path: Path) -> None:
    table_study(tmp_path)
    printed = io.StringIO()
    show(tmp_path, console=Console(file=printed, width=200))
    assert "Comparisons, paired seed by seed" in printed.getvalue()
    assert "Corrected for their number (Holm)" in printed.getvalue()
    write(tmp_path)
    data = data_of(tmp_path)
    assert [section["title"] for section in data["sections"]][1] == "Comparisons, paired seed by seed"


# --- both splits

LOWER = {name: tuple(a - 0.05 for a in accuracies) for name, accuracies in MEASURED.items()}
LOWER["random"] = tuple(a - 0.02 for a in LOWER["hot"][::-1])


def test_rows_and_comparisons_are_by_test_accuracy_where_every_run_has_one(tmp_path: Path) -> None:
    report = table_study(tmp_path / "a", tests=LOWER)
    rows, comparisons, *_ = report.sections
    assert rows.head == ("row", "trainable parameters", "validation", "test", "s.d. of test", "seeds")
    (hot,) = [row for label, row in rows_of(rows).items() if label.startswith("hot")]
    assert (hot["validation"], hot["test"], hot["s.d. of test"]) == ("0.615", "0.565", "0.013")
    random = rows_of(comparisons)["hot 25 % − random 25 %, paper"]
    interval = stats.ttest_rel(LOWER["hot"], LOWER["random"]).confidence_interval(0.95)
    assert (random["difference"], random["95 % interval"]) == ("+0.020", f"{interval.low:+.3f} … {interval.high:+.3f}")
    assert "Accuracy is that on the test split." in comparisons.notes
    said = "\n".join(report.words)
    assert "Nothing was selected: on the test split the 4 rows have 0.561 on average and on validation 0.591" in said
    assert "picked" not in said


def test_a_comparison_of_which_a_run_was_not_tested_is_by_validation_and_says_so(tmp_path: Path) -> None:
    report = table_study(tmp_path / "a", tests=LOWER | {"greedy": LOWER["greedy"][:3]})
    rows, comparisons, *_ = report.sections
    greedy = rows_of(comparisons)["hot 25 % − greedy 25 %, paper"]
    reference = stats.ttest_rel(MEASURED["hot"], MEASURED["greedy"])
    assert float(greedy["p"]) == pytest.approx(reference.pvalue, abs=5e-4)
    assert (
        "Accuracy is that on the test split, but on the validation split for hot 25 % − greedy 25 %, paper, since not "
        "every training of both rows was evaluated on the test split." in comparisons.notes
    )
    untested = table_study(tmp_path / "b", tests={})
    rows, comparisons, *_ = untested.sections
    assert rows.head[2:4] == ("validation", "s.d. of validation")
    assert any(note.startswith("Accuracy is that on the validation split, since") for note in comparisons.notes)
    assert any(sentence.startswith("No row has been evaluated on the test split") for sentence in untested.words)


def test_published_numbers_are_compared_with_test_accuracy_alone(tmp_path: Path) -> None:
    model, task = "allenai/OLMoE-1B-7B-0924", "gsm8k"
    papers, *_ = table_study(tmp_path / "a", model=model, task=task, tests=LOWER).sections
    found = {label.split()[0]: row for label, row in rows_of(papers).items()}
    assert (found["random"]["published"], found["random"]["difference"]) == ("0.279", "+0.266")  # .545 on test
    papers, *_ = table_study(tmp_path / "b", model=model, task=task, tests={}).sections
    found = {label.split()[0]: row for label, row in rows_of(papers).items()}
    assert (found["random"]["published"], found["random"]["difference"]) == ("0.279", "")


# --- several tasks


def several(number: int, accuracy: float, *, seed: int = 0, **more: Any) -> Outcome:
    """An outcome on two tasks: one at `accuracy` − .1, one at + .1, with the standard errors .03 and .04."""
    done = outcome(selection(number), accuracy=accuracy, seed=seed, **more)
    by_task = {
        "easy": {"accuracy": accuracy + 0.1, "stderr": 0.03},
        "hard": {"accuracy": accuracy - 0.1, "stderr": 0.04},
    }
    return done.updated(rungs=tuple(replace(rung, by_task=by_task, stderr=0.025) for rung in done.rungs))


def test_each_task_has_a_column(tmp_path: Path) -> None:
    with open_study(tmp_path / "demo", config=CONFIG | {"task": "easy,my/hard.yaml"}) as study:
        for done in (several(2, 0.4), several(4, 0.5), several(4, 0.6, seed=1), several(9, 0.3)):
            study.append_finished(done, {})
        study.append_finished(outcome(selection(1), status="failed", accuracy=None), {})
    report = write(tmp_path / "demo")
    (section,) = report.sections
    assert section.head == ("point", "trainable parameters", "easy", "hard", "mean")
    assert [row[2:4] for row in section.rows] == [
        ("0.500 ± 0.030", "0.300 ± 0.040"),
        ("0.650 ± 0.058", "0.450 ± 0.064"),  # √(.03² + .05²): two seeds, .05 apart from their mean
    ]
    front, points = (list(csv.DictReader((tmp_path / "demo" / f"{name}.csv").open())) for name in ("front", "points"))
    assert [float(row["accuracy.hard"]) for row in front] == pytest.approx([0.3, 0.45])
    assert [row["accuracy.easy"] for row in points if row["status"] == "failed"] == [""]
    assert [float(row["stderr.hard"]) for row in points if row["status"] == "complete"] == [0.04] * 4
    out = io.StringIO()
    show(tmp_path / "demo", console=Console(file=out, width=150))
    assert "Accuracy by task" in out.getvalue()
    assert "task easy, hard, model tiny-moe" in out.getvalue()


def test_each_task_has_a_column_a_split(tmp_path: Path) -> None:
    tested = Score(0.45, 0.02, {"easy": {"accuracy": 0.55, "stderr": 0.03}, "hard": {"accuracy": 0.35, "stderr": 0.04}})
    with open_study(tmp_path / "demo", **APART) as study:
        study.append_finished(several(2, 0.4), {})
        study.append_finished(several(4, 0.5).updated(test=tested), {})
    report = write(tmp_path / "demo")
    section, *_ = report.sections
    names = ("easy", "hard", "mean")
    assert section.head[2:] == tuple(f"{name}, {split}" for name in names for split in ("validation", "test"))
    assert [row[2:] for row in section.rows] == [
        ("0.500 ± 0.030", "", "0.300 ± 0.040", "", "0.400 ± 0.025", ""),
        ("0.600 ± 0.030", "0.550 ± 0.030", "0.400 ± 0.040", "0.350 ± 0.040", "0.500 ± 0.025", "0.450 ± 0.020"),
    ]
    for name in ("front", "points"):
        rows = list(csv.DictReader((tmp_path / "demo" / f"{name}.csv").open()))
        assert [row["test_accuracy.hard"] for row in rows] == ["", "0.35"]
        assert [row["test_stderr.easy"] for row in rows] == ["", "0.03"]
