"""The live view: a table in a terminal, one line a trial elsewhere, never in the way of the study."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from search import report
from search.front import candidates
from search.report import live as module
from search.report.live import Progress
from search.report.tables import front_table
from tests.search.studies import open_study, outcome, rung, selection, started


@pytest.fixture(autouse=True)
def a_terminal_that_can_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tests run in: nothing is drawn over in a dumb one."""
    monkeypatch.setenv("TERM", "xterm")


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120, highlight=False)


def text(of: Console) -> str:
    assert isinstance(of.file, io.StringIO)
    return of.file.getvalue()


def test_elsewhere_one_line_a_finished_trial() -> None:
    out = console(terminal=False)
    small, large = outcome(selection(2), accuracy=0.4), outcome(selection(8), accuracy=0.6, allocator="random")
    worse = outcome(selection(9), accuracy=0.3)
    bad = started(outcome(selection(3))).updated(status="failed", message="worker lost")
    with Progress(5, console=out) as progress:
        progress.message("workers are up")
        for point_, rungs in ((small, 3), (large, 3), (worse, 3), (bad, 0)):
            progress.started(started(point_))
            for step in range(rungs):
                progress.rung(point_.digest, rung(step, 0.1))
            progress.finished(point_)
        for _ in range(300):
            progress.answered("duplicate")
        progress.answered("infeasible")
    lines = text(out).splitlines()
    assert lines[0] == "workers are up"
    assert len(lines) == 6
    assert lines[1].startswith("[1/5]  accuracy 0.400")
    assert "sieve fraction=0.125" in lines[1]
    assert "on the front" in lines[1]
    assert "random fraction=0.5" in lines[2]
    assert "on the front" not in lines[3]
    assert "failed" in lines[4]
    assert "worker lost" in lines[4]
    assert lines[5] == "4 of 5 finished · 1 failed · 301 answered without training (300 duplicate, 1 infeasible)"


def test_repeats_with_other_seeds_count_apart() -> None:
    out = console(terminal=False)
    with Progress(2, seed=0, done=[outcome(selection(2))], console=out) as progress:
        progress.expect(2, 3)
        for done in (outcome(selection(5)), outcome(selection(5), seed=1)):
            progress.started(started(done))
            progress.finished(done)
    lines = text(out).splitlines()
    assert lines[0].startswith("[2/5]")
    assert lines[1].startswith("[3/5]")
    assert "  seed 1  " in lines[1]
    assert lines[2] == "2 of 2 finished · 1 of 3 repeats with other seeds"


def test_a_terminal_shows_the_front_what_runs_and_the_counts() -> None:
    out = console(terminal=True)
    with Progress(4, time_budget=600, done=[outcome(selection(2), accuracy=0.4)], console=out) as progress:
        progress.started(started(outcome(selection(5))))
        progress.rung(outcome(selection(5)).digest, rung(30, 0.25))
        progress.answered("duplicate")
        assert progress._live is not None
        progress._live.refresh()
    shown = text(out)
    assert "Pareto front so far" in shown
    assert "0.400 ± 0.035" in shown
    assert "step 30, accuracy 0.250" in shown
    assert "1 running · 1 of 4 finished · 1 answered without training (1 duplicate)" in shown
    assert "left" in shown


def test_a_long_front_is_cut_in_the_live_view_only() -> None:
    out = console(terminal=True)
    many = [outcome(selection(n), accuracy=0.3 + n / 100) for n in range(1, 17)]
    with Progress(16, done=many, console=out) as progress:
        assert progress._live is not None
        progress._live.refresh()
    assert "4 smaller ones not shown" in text(out)


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_shows_messages_only(terminal: bool) -> None:
    out = console(terminal=terminal)
    with Progress(2, quiet=True, console=out) as progress:
        progress.started(started(outcome()))
        progress.finished(outcome())
        progress.message("a warning")
    assert text(out).splitlines() == ["a warning"]


def test_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Progress(6, time_budget=1_000, done=[outcome(selection(1))], console=console(terminal=False)) as progress:
        assert progress.seconds_left == 1_000
        now[0] += 20  # workers start: not a trial's pace
        progress.started(started(outcome(selection(2))))
        now[0] += 10
        progress.finished(outcome(selection(2)))
        assert progress.seconds_left == 4 * 10
        progress._budget = 35
        assert progress.seconds_left == 5
        now[0] += 100
        assert progress.seconds_left == 0
    with Progress(6, console=console(terminal=False)) as progress:
        assert progress.seconds_left is None


def test_markup_in_names_is_text() -> None:
    out = console(terminal=False)
    odd = outcome(allocator="[red]x[/red]").updated(message="[/bold] :smile:")
    with Progress(1, console=out) as progress:
        progress.finished(odd)
    assert "[red]x[/red]" in text(out)
    assert "[/bold] :smile:" in text(out)
    table = console(terminal=True)
    table.print(front_table(candidates([odd]), [odd], title="[b]front[/b]"))
    assert "[red]x[/red]" in text(table)
    assert "[b]front[/b]" in text(table)


def test_a_long_measurement_shows_how_far_it_is_in_the_live_view_and_is_gone_after() -> None:
    out = console(terminal=True)
    with Progress(5, console=out) as progress:
        progress.measuring("spectrum", 7, 224, "model.layers.1.mlp.up_proj")
        shown = console(terminal=True)
        shown.print(progress.view())
        assert "measuring spectrum: 7 of 224  model.layers.1.mlp.up_proj" in text(shown)
        progress.measured()
        shown = console(terminal=True)
        shown.print(progress.view())
        assert "measuring" not in text(shown)


def test_in_a_low_window_the_bar_stays() -> None:
    many = [outcome(selection(n), accuracy=0.3 + n / 100) for n in range(1, 17)]
    for height in (8, 14, 24):
        out = Console(file=io.StringIO(), force_terminal=True, width=100, height=height, highlight=False)
        progress = Progress(20, done=many, console=out)
        lines = out.render_lines(progress.view())
        assert len(lines) <= height
        shown = "".join(part.text for part in lines[-2])
        assert "16/20" in shown
        assert "elapsed" in shown


def test_a_stage_has_a_clock_until_the_first_training(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    out = console(terminal=True)
    progress = Progress(5, console=out)
    progress._live = None
    progress.stage("loading the model")
    now[0] += 12
    out.print(progress.view())
    assert "loading the model: 12 s" in text(out)
    progress.started(started(outcome()))
    assert progress._stage == ""


@pytest.mark.parametrize("width", [40, 80, 150])
def test_ids_parameters_accuracies_and_knobs_are_never_cut(width: int, tmp_path: Path) -> None:
    with open_study(tmp_path) as study:
        for n in (2, 6, 12):
            long = outcome(selection(n), accuracy=n / 20, allocator="a_rule_with_a_long_name" * 2)
            study.append_finished(long, {})
    out = Console(file=io.StringIO(), width=width, highlight=False)
    report.show(tmp_path, console=out)
    shown = re.sub(r"[\s│]", "", text(out).partition("\n\n")[0])
    for run in study.finished.values():
        assert run.digest[:8] in shown
        assert f"{run.accuracy:.3f}" in shown
    assert "…" not in shown
    if width < 150:
        assert f"{long.trial.allocator}fraction=" in shown
