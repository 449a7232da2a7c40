"""What the records of a study come to, in numbers: points, the front, the noise between seeds, what was saved.

    Results(read("studies/demo")).front

`words.py`, `tables.py`, `plot.py` and `page/` say and draw it.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from allocators.core.types import Outcome
from search import early
from search.front import Candidate, bend
from search.front import front as unbeaten
from search.records import Records
from search.report import allocations, attribution, broken, gains
from search.report.sections import is_table
from search.report.splits import Optimism, optimism, same_split, splits_of, tested
from search.report.uncertainty import Bias, Difference, Noise, compare, pooled, selection_bias
from search.text import Split, both_text, label, run_id, varying


@dataclass(frozen=True)
class Results:
    """`points` has one entry a point (all its seeds), `front` those that no other point beats."""

    records: Records

    @cached_property
    def title(self) -> str:
        """`demo, task arc_easy, model tiny-moe`."""
        config = self.records.header["config"]
        # tasks and model may be files or folders: their names are enough here, the settings have all of it
        facts = [
            f"{what} {', '.join(Path(word).name.removesuffix('.yaml') for word in config[what].split(','))}"
            for what in ("task", "model")
            if config.get(what)
        ]
        return ", ".join([self.records.name, *facts])

    # --- points

    @cached_property
    def points(self) -> list[Candidate]:
        """All finished trainings, grouped by point."""
        return list(self.records.points)

    @cached_property
    def trained(self) -> list[Candidate]:
        """Those of `points` that are trainings, and not cut from one: what is said of settings goes by these."""
        return [candidate for candidate in self.points if not candidate.parent]

    @cached_property
    def front(self) -> list[Candidate]:
        """The points that no other point beats, ascending in parameters."""
        return self.records.points.front

    @cached_property
    def rising(self) -> list[Candidate]:
        """The members of the front that no other beats in accuracy and parameters alone."""
        return self.records.points.rising

    @cached_property
    def _risen(self) -> set[str]:
        return {candidate.point for candidate in self.rising}

    def spares(self, candidate: Candidate) -> bool:
        """Whether it is on the front because it forgets less than what is as accurate and as small."""
        return candidate.point not in self._risen and self.records.points.is_on_front(candidate)

    @cached_property
    def winners(self) -> set[str]:
        """Digests of all runs behind the front."""
        return {run.digest for candidate in self.front for run in candidate.runs}

    @cached_property
    def knee(self) -> Candidate | None:
        """The point of the front after which parameters buy less accuracy; None where the front has no bend."""
        return bend(self.rising)

    @cached_property
    def forgets(self) -> bool:
        """Whether what trainings forget was measured."""
        return any(run.forgetting is not None for run in self.records.finished.values())

    @cached_property
    def tasks(self) -> list[str]:
        """Labels of the tasks, where there are several."""
        return list(dict.fromkeys(label for run in self.records.finished.values() for label in run.by_task))

    @cached_property
    def settings(self) -> list[str]:
        """Recipe settings that vary within the study."""
        return varying(self.records.finished.values())

    def label(self, run: Outcome) -> str:
        """`sieve fraction=0.25, rank 8`: allocator, knobs, and the settings that vary."""
        return label(run, self.settings)

    # --- the two splits

    @cached_property
    def splits(self) -> tuple[Split, ...]:
        """("validation", "test"); without "test" before any evaluation there, ("accuracy",) with select_on=test."""
        return splits_of(self.records, self.points)

    @cached_property
    def tested(self) -> dict[str, Candidate]:
        """By point those that were evaluated on the test split, as it has them; empty with select_on=test."""
        return tested(self.records, self.points)

    def judged(self, candidate: Candidate) -> Candidate:
        """The point as the test split has it, where it was evaluated there, else as the search saw it."""
        return self.tested.get(candidate.point, candidate)

    def is_judged(self, candidate: Candidate) -> bool:
        """False where others were evaluated on the test split and this point was not."""
        return not self.tested or candidate.point in self.tested

    @cached_property
    def step(self) -> list[Candidate]:
        """What the front is drawn over: of its tested members, judged, those that no other of them beats.

        In accuracy and parameters, whatever the objectives. Its rising members where none was tested.
        """
        judged = [self.tested[candidate.point] for candidate in self.front if candidate.point in self.tested]
        return unbeaten(judged) or self.rising

    @cached_property
    def optimism(self) -> Optimism | None:
        """Validation less test accuracy over the front; None where none of it was tested, or test selected it."""
        return optimism(self.front) if self.tested else None

    def accuracy_words(self, candidate: Candidate) -> str:
        """`validation 0.840 ± 0.030, test 0.810 ± 0.031`."""
        return both_text(candidate, self.splits)

    # --- how sure they are

    @cached_property
    def noise(self) -> Noise | None:
        """How much accuracy moves between the seeds of one point, over all points that have several."""
        return pooled(self.trained)

    def difference(self, lower: Candidate, higher: Candidate) -> Difference:
        """How sure it is that `higher` is more accurate than `lower`, with the study's noise between seeds.

        By test accuracy where both were evaluated on the test split (`split_of`). Where one was cut from a training of
        the other, or both from one, a seed moves both alike, and only the questions make noise.
        """
        split, sides = same_split((lower, higher), self.tested, otherwise=self.splits[0])
        related = _origins(lower) & _origins(higher)
        return compare(*sides, noise=None if related else self.test_noise if split == "test" else self.noise)

    def split_of(self, *candidates: Candidate) -> Split:
        """The split that `difference` compares these points on."""
        return same_split(candidates, self.tested, otherwise=self.splits[0])[0]

    @cached_property
    def test_noise(self) -> Noise | None:
        """`noise` of test accuracy; that of the accuracy which the search saw, where no point has two tested seeds."""
        return pooled(self.tested.values()) or self.noise

    @cached_property
    def chances(self) -> dict[str, float]:
        """By digest of a front point's best run: the probability that it is better than the next smaller point."""
        steps = {high.best.digest: self.difference(low, high).chance for low, high in pairwise(self.rising)}
        return {digest: chance for digest, chance in steps.items() if chance is not None}

    @cached_property
    def bias(self) -> Bias | None:
        """What was picked at one seed against fresh seeds of the same points; None in a table, where nothing is."""
        return None if is_table(self.records) else selection_bias(self.points, seed=self.records.seed)

    @cached_property
    def early(self) -> list[early.Early]:
        """How evaluations on the way rank the points beside the end; of every point its first complete training."""
        return early.signals(run for candidate in self.trained for run in candidate.complete[:1])

    # --- what made the difference, what was saved

    @cached_property
    def tried(self) -> allocations.Tried:
        """Every allocation with the recipes that it was tried with."""
        return allocations.allocations(self.trained)

    @cached_property
    def worths(self) -> list[allocations.Worth]:
        """What the choice of the allocation is worth, size by size."""
        return allocations.worths(self.trained, noise=self.tried.noise)

    @cached_property
    def broken(self) -> broken.Broken:
        """Trainings that came to nothing, and by which setting."""
        trainings = (run for run in self.records.finished.values() if not run.trial.parent)
        return broken.broken(trainings, broken.base_of(self.records))

    @cached_property
    def importance(self) -> attribution.Importance | None:
        """Which settings accuracy goes with."""
        return attribution.importance(self.trained)

    @cached_property
    def tokens_saved(self) -> tuple[int, int]:
        """Left untrained by stopping early, and what all trainings would have taken (`gains.tokens_cut`)."""
        return gains.tokens_cut(self.records)

    # --- adapters

    def adapter_folder(self, run: Outcome) -> str | None:
        """Where the trained adapter lies, None where it is not kept."""
        return self.records.adapter_of(run)

    def loadable(self, candidate: Candidate) -> tuple[Outcome, str] | None:
        """The most accurate run of a point whose adapter is still there, and where."""
        places = ((run, self.adapter_folder(run)) for run in candidate.by_accuracy)
        return next(((run, where) for run, where in places if where), None)

    @cached_property
    def ids(self) -> dict[str, str]:
        """By digest of a front point's best run: the id of the run to export."""
        return {c.best.digest: run_id((self.loadable(c) or (c.best,))[0]) for c in self.front}

    # --- for MLflow

    @property
    def metrics(self) -> dict[str, float]:
        """Numbers of the whole study, for the parent run in MLflow."""
        numbers: dict[str, float] = {"runs_finished": len(self.records.finished), "points_on_front": len(self.front)}
        numbers |= {f"answered_{reason}": n for reason, n in Counter(a.reason for a in self.records.answered).items()}
        if seconds := self.records.sampler_seconds:
            numbers["sampler_seconds_per_suggestion"] = statistics.fmean(seconds)
        for name, candidate in (("best", self.rising[-1] if self.front else None), ("knee", self.knee)):
            if candidate is not None and candidate.accuracy is not None:
                numbers[f"{name}_accuracy"] = candidate.accuracy
                numbers[f"{name}_trainable_params"] = candidate.trainable_params
                if candidate.test_accuracy is not None:
                    numbers[f"{name}_test_accuracy"] = candidate.test_accuracy
        if (base := self.records.untrained) is not None:
            numbers["untrained_accuracy"] = base["accuracy"]
            if base.get("test"):
                numbers["untrained_test_accuracy"] = base["test"]["accuracy"]
        if (measured := self.optimism) is not None:
            numbers |= {"optimism": measured.value, "optimism_stderr": measured.stderr}
            numbers["optimism_points"] = measured.points
        for at in self.early:
            if at.correlation is not None:
                numbers[f"rank_correlation_{at.signal}_{at.part}"] = at.correlation
        numbers |= {"trainings_broken": self.broken.count, "trainings_judged": self.broken.trainings}
        if self.front and (forgotten := self.rising[-1].forgetting) is not None:
            numbers["best_forgetting"] = forgotten
        if self.records.points.of_three and self.front:
            numbers["least_forgetting"] = min(candidate.forgetting or 0.0 for candidate in self.front)
        if self.records.reused:
            numbers["runs_reused"] = len(self.records.reused)
        if self.tokens_saved[0]:
            numbers["tokens_saved"], numbers["tokens_without_stopping"] = self.tokens_saved
        if self.noise is not None:
            numbers["seed_standard_deviation"] = math.sqrt(self.noise.variance)
        if self.bias is not None:
            numbers["selection_bias"] = self.bias.picked - self.bias.mean
        return numbers


def _origins(candidate: Candidate) -> set[str]:
    """Digests of the trainings that stand behind a point."""
    return {candidate.parent} if candidate.parent else {run.digest for run in candidate.runs}
