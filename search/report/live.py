"""What a user sees while a study runs: the front so far, what is running, a bar with the time left.

    with Progress(total=16, time_budget=600, done=records.finished.values()) as progress:
        progress.started(outcome); progress.rung(digest, rung); progress.finished(outcome)
        progress.answered("duplicate"); progress.message("workers are up")

In a terminal a live table; elsewhere (a file, CI) one line for every finished trial.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from allocators.core.types import Outcome, Rung
from search.front import Points
from search.propose.halving import tokens_saved
from search.records.redact import redacted
from search.report.tables import front_table
from search.text import clock, human, point, varying

ROWS = 12  # of the live front; the report has all of it
RUNNING = 4  # trainings that are shown
AROUND = 11  # lines of the live view that are no row of the front


class Progress:
    """The live view of one study; use it as a context manager.

    total        trainings that the study is to have in the end, those of earlier runs included, repeats left out
    seed         the study's seed: outcomes with another one repeat a point, and count apart (None: none do)
    evaluations  of a whole training: what one that was stopped early would still have taken
    time_budget  seconds after which no trial is started; None or 0: no limit
    done         outcomes of earlier runs of the same study; or the study's points, to which its writer adds results
                 before it tells of them here
    reused       digests of those that another study trained: they have a result and count apart, not as trainings
    quiet        show nothing but messages
    """

    def __init__(
        self,
        total: int,
        time_budget: float | None = None,
        *,
        done: Iterable[Outcome] | Points = (),
        reused: Iterable[str] = (),
        seed: int | None = None,
        evaluations: int = 1,
        quiet: bool = False,
        console: Console | None = None,
    ) -> None:
        self._console = console or Console(highlight=False)
        self._trials = total
        self._repeats = 0
        self._seed = seed
        self._budget = time_budget
        self._quiet = quiet
        self._points = done if isinstance(done, Points) else Points(done)
        self._reused = set(reused)
        self._tally = _Tally(seed, evaluations)
        trainings = (outcome for outcome in self._points.outcomes.values() if not outcome.trial.parent)
        for outcome in trainings:
            self._tally.add(outcome, trained=outcome.digest not in self._reused)
        self._earlier = self._tally.trained
        self._running: dict[str, tuple[Outcome, Rung | None]] = {}
        self._paused: set[str] = set()
        self._answered: Counter[str] = Counter()
        self._lost = 0
        self._measuring, self._measuring_told = "", time.monotonic()
        self._stage, self._stage_began = "", time.monotonic()
        self._began = time.monotonic()
        self._first_start: float | None = None
        show = self._console.is_terminal and not quiet
        self._live = (
            Live(get_renderable=self.view, console=self._console, refresh_per_second=2, transient=True)
            if show
            else None
        )

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
        if not self._quiet:
            self._console.print(self._counts(), soft_wrap=True)

    def measuring(self, kind: str, done: int, total: int, what: str) -> None:
        """A signal is being measured; without a live view, a line every 10 seconds."""
        now = time.monotonic()
        self._measuring = f"measuring {kind}: {done} of {total}  {what}"
        if self._live is None and now - self._measuring_told >= 10:
            self._measuring_told = now
            self.message(self._measuring)

    def measured(self) -> None:
        """The measurement that was shown is over."""
        self._measuring = ""

    def stage(self, what: str) -> None:
        """What a study does before its first training; the live view shows for how long, elsewhere it is a line."""
        self._stage, self._stage_began = what, time.monotonic()
        if self._live is None:
            self.message(f"[{clock(self._stage_began - self._began)}] {what}")

    def started(self, outcome: Outcome) -> None:
        """A training begins, or goes on after a pause; the clock of the remaining time starts with the first."""
        self._first_start, self._stage = self._first_start or time.monotonic(), ""
        self._running[outcome.digest] = (outcome, None)
        self._paused.discard(outcome.digest)

    def rung(self, digest: str, rung: Rung) -> None:
        """Shows an evaluation; one of a training that is not running changes nothing."""
        if digest in self._running:
            self._running[digest] = (self._running[digest][0], rung)

    def paused(self, digest: str) -> None:
        """It waits at a rung and holds no worker; `started` again when it goes on."""
        self._running.pop(digest, None)
        self._paused.add(digest)

    def finished(self, outcome: Outcome, *, reused: str = "") -> None:
        """A training has ended; `reused` names the study that trained it, where it was another one."""
        if reused:
            self._reused.add(outcome.digest)
        self._running.pop(outcome.digest, None)
        self._paused.discard(outcome.digest)
        if self._points.outcomes.get(outcome.digest) is not outcome:
            self._points.add(outcome)
        self._tally.add(outcome, trained=outcome.digest not in self._reused)
        if self._quiet:
            return
        if self._live is None or outcome.status in ("diverged", "failed", "out_of_memory"):
            self._console.print(self._line(outcome, reused), soft_wrap=True)

    def lost(self, digest: str, reason: str) -> None:
        """The platform took a training away; it is trained again."""
        self._running.pop(digest, None)
        self._lost += 1
        self.message(f"lost, and to be trained again: {digest} ({reason})")

    def answered(self, reason: str) -> None:
        """A point that needed no training. Counted only: a sampler near its end repeats itself by the hundred."""
        self._answered[reason] += 1

    def expect(self, trials: int, repeats: int) -> None:
        """How many trainings and how many repeats with other seeds there are to be in the end, as far as is known."""
        self._trials, self._repeats = trials, repeats

    @property
    def _total(self) -> int:
        return self._trials + self._repeats

    def message(self, text: str) -> None:
        """Prints a line above the table, without secrets that an error may quote."""
        self._console.print(Text(redacted(text)), soft_wrap=True)

    @property
    def seconds_left(self) -> float | None:
        """By the pace since the first start, and by the budget; None before either is known."""
        now, guesses = time.monotonic(), []
        new = self._tally.trained - self._earlier
        if new and self._first_start:
            guesses.append((now - self._first_start) / new * max(self._total - self._tally.trained, 0))
        if self._budget:
            guesses.append(max(self._began + self._budget - now, 0.0))
        return min(guesses, default=None)

    def _line(self, outcome: Outcome, reused: str) -> Text:
        on_front = self._points.is_on_front(self._points.candidate_of(outcome.digest))
        result = f"accuracy {outcome.accuracy:.3f}" if outcome.accuracy is not None else outcome.status
        parts = [
            f"[{self._tally.trained:>{len(str(self._total))}}/{self._total}]",
            f"{result:<14}",
            f"{human(outcome.trainable_params):>8}",
            point(outcome),
            f"seed {outcome.trial.seed}" if self._seed not in (None, outcome.trial.seed) else "",
            f"reused from {reused}" if reused else clock(outcome.seconds),
            "stopped early" if outcome.status == "stopped" else "on the front" if on_front else "",
            outcome.message,
            f"({_left(self.seconds_left)})" if self.seconds_left is not None else "",
        ]
        return Text("  ".join(part for part in parts if part))

    def _counts(self) -> Text:
        tally = self._tally
        lost = {s: n for s, n in tally.by_status.items() if s in ("diverged", "failed", "out_of_memory", "stopped")}
        parts = [
            f"{len(self._running)} running" if self._running else "",
            f"{len(self._paused)} paused" if self._paused else "",
            f"{tally.trained - tally.repeats} of {self._trials} finished",
            f"{tally.repeats} of {self._repeats} repeats with other seeds" if self._repeats else "",
        ]
        parts += [f"{len(self._reused)} reused from other studies"] if self._reused else []
        parts += [f"{self._lost} times lost and tried again"] if self._lost else []
        parts += [f"{n} {status.replace('_', ' ')}" for status, n in sorted(lost.items())]
        parts += [f"{tally.tokens_saved / tally.tokens:.0%} of all tokens not trained"] if tally.tokens_saved else []
        if self._answered:
            reasons = ", ".join(f"{n} {r.replace('_', ' ')}" for r, n in sorted(self._answered.items()))
            parts.append(f"{self._answered.total()} answered without training ({reasons})")
        return Text(" · ".join(part for part in parts if part))

    def view(self) -> RenderableType:
        """The live table: front so far, running trainings, a bar, counts."""
        parts: list[RenderableType] = []
        rows = min(ROWS, self._console.height - AROUND)  # in a low window the bar stays
        if rows > 0 and (front := self._points.front):
            parts.append(front_table(front, self._tally.examples, title="Pareto front so far", rows=rows))
        for outcome, rung in list(self._running.values())[: RUNNING if rows > 0 else 1]:
            accuracy = rung.accuracy if rung else None
            now = f"step {rung.step}, accuracy {accuracy:.3f}" if rung and accuracy is not None else "..."
            parts.append(Text(f"  {human(outcome.trainable_params):>8}  {point(outcome)}  {now}", style="dim"))
        if self._measuring:
            parts.append(Text(f"  {self._measuring}", style="dim"))
        if self._stage:
            parts.append(Text(f"  {self._stage}: {clock(time.monotonic() - self._stage_began)}", style="dim"))
        grid = Table.grid(padding=(0, 2))
        left = self.seconds_left
        bar = ProgressBar(total=self._total, completed=self._tally.trained, width=30)
        elapsed = f"{clock(time.monotonic() - self._began)} elapsed"
        grid.add_row(bar, f"{self._tally.trained}/{self._total}", elapsed, _left(left) if left is not None else "")
        return Group(*parts, grid, self._counts())


class _Tally:
    """Numbers over all finished trainings, kept up to date one by one.

    trained        trainings that were run here, `repeats` of them with another seed than the study's
    by_status      of all, those of other studies included
    tokens         of what was trained here had nothing been stopped, `tokens_saved` of them left untrained
    examples       few outcomes in which every recipe setting varies that varies over all
    """

    def __init__(self, seed: int | None, evaluations: int) -> None:
        self._seed = seed
        self._evaluations = evaluations
        self.trained = self.repeats = self.tokens = self.tokens_saved = 0
        self.by_status: Counter[str] = Counter()
        self.examples: list[Outcome] = []

    def add(self, outcome: Outcome, *, trained: bool) -> None:
        self.by_status[outcome.status] += 1
        if trained:
            self.trained += 1
            self.repeats += self._seed is not None and outcome.trial.seed != self._seed
            saved, whole = tokens_saved([outcome], evaluations=self._evaluations)
            self.tokens_saved, self.tokens = self.tokens_saved + saved, self.tokens + whole
        if len(varying([*self.examples, outcome])) > len(varying(self.examples)) or not self.examples:
            self.examples.append(outcome)


def _left(seconds: float) -> str:
    return f"about {clock(seconds)} left" if seconds >= 1 else "finishing"
