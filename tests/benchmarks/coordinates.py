"""What is a search worth in the papers' coordinates and in ours? Both, trained, judged by a table's front.

    python -m tests.benchmarks.coordinates                             10 seeds of both, 16 trainings each; resumes
    python -m tests.benchmarks.coordinates studies=3 seeds=3           and every member of a front with three seeds
    python -m tests.benchmarks.coordinates show=true                   what is finished, nothing is trained

papers   `papers_coordinates.py`: rank 4 .. 32, lora_alpha = 2·rank, learning_rate 1e-4 .. 2e-2
ours     `space=sieve` as it is: rank 1 .. 32, lora_alpha and scaled rate of their own

Both have the same allocators and knobs, the same sampler and the same task; a study of a seed is one training after
another in this process (`workers=process`), so that its result depends on nothing but the seed. A study selects on the
validation split; its front is judged by the test split: the hypervolume (log parameters, accuracy above the table's
worst) as a share of that of the recorded table (`replay=tiny-moe`), test accuracy averaged over its five seeds. Points
smaller than the table's smallest count as that one, and accuracies above its best as that. With `seeds=1` a member of a
front is judged by its own training, which flatters both sides alike; with more by the mean over as many.

Printed: means over the seeds ± their standard errors, and the paired difference. The JSON line's `ratios` are the same:
papers, ours, gain, each with its error as NAME_error; papers_broken and ours_broken, trainings within two standard
errors of the untrained model or below it, a share of all.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from allocators.core import words
from allocators.core.errors import StudyError, unknown
from search import replay
from search.records import Records, read
from tests.benchmarks._shared import parse
from tests.benchmarks._trained import FOLDER
from tests.benchmarks.optimism import Judge, Place, summary
from trainers.versions import versions

OLD = Path(__file__).with_name("papers_coordinates.py")
SIDES = {"papers": [f"plugins={OLD}", "space=papers_coordinates"], "ours": ["space=sieve"]}


@dataclass(frozen=True)
class Settings:
    """The keys of the command line."""

    studies: int = words.key(10, "studies of each side, one a seed", least=1)
    trials: int = words.key(16, "trainings of a study", least=1)
    seeds: int = words.key(1, "trainings behind each member of a front", least=1)
    table: str = words.key("tiny-moe", "the table that judges")
    sides: tuple[str, ...] = words.key(tuple(SIDES), "papers, ours: one of them leaves the other to a second process")
    storage: str = words.key(str(FOLDER / "coordinates"), "folder of the studies")
    show: bool = words.key(False, "only show what is finished")


def trained(settings: Settings, side: str, seed: int) -> Records | None:
    """The records of one study, of which missing trainings are run first; with `show` None where some are missing.

    Raises StudyError where the study fails.
    """
    from search.run import main as run

    name = f"{side}-{seed}"
    storage = Path(settings.storage) / side  # two processes never write to one MLflow database
    asked = [f"seed={seed}", f"trials={settings.trials}", f"seeds={settings.seeds}"]
    asked += [f"name={name}", f"storage={storage}", "workers=process", "evaluations=1"]
    if not settings.show:
        storage.mkdir(parents=True, exist_ok=True)
        with (storage / f"{name}.log").open("a") as log, contextlib.redirect_stdout(log):
            code = run([*SIDES[side], *asked])
        if code:
            raise StudyError(f"the study {name} ended with exit code {code}: {name}.log beside it may say why")
    elif not (storage / name).is_dir():
        return None
    records = read(storage / name)
    return records if len(records.trained) >= settings.trials else None


def share_of(judge: Judge, records: Records) -> float:
    """Of the table's hypervolume, what the front of a study has by test accuracy."""
    return judge.share_of(Place(one.trainable_params, one.test_accuracy) for one in records.points.front if one.tested)


def broken(records: Records) -> float:
    """Share of the trainings that learnt nothing: within two standard errors of the untrained model, or diverged."""
    base = records.untrained
    assert base is not None
    done = [outcome.accuracy for outcome in records.trained.values()]
    return statistics.fmean(one is None or one <= base["accuracy"] + 2 * base["stderr"] for one in done)


def report(shares: Mapping[str, Mapping[int, float]], bad: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """Prints what the studies so far say; seeds that only one side has are left out of the difference."""
    ratios: dict[str, float] = {}
    for side, found in shares.items():
        if found:
            mean, error = summary(list(found.values()))
            lost = statistics.fmean(bad[side].values())
            print(f"{side:<8}{len(found):>3} studies: share {mean:.3f} ± {error:.3f}, {lost:.0%} of trainings broken")
            ratios |= {side: round(mean, 4), f"{side}_error": round(error, 4), f"{side}_broken": round(lost, 3)}
    if both := sorted(shares["papers"].keys() & shares["ours"].keys()):
        mean, error = summary([shares["ours"][seed] - shares["papers"][seed] for seed in both])
        print(f"{'gain':<8}{len(both):>3} pairs: {mean:+.3f} ± {error:.3f}")
        ratios |= {"gain": round(mean, 4), "gain_error": round(error, 4)}
    return ratios


def main(arguments: list[str]) -> None:
    """Trains what is missing, seed by seed, and prints each study's share, then the summary and the JSON line."""
    settings = parse(arguments, Settings)
    for side in settings.sides:
        if side not in SIDES:
            raise unknown("side", side, SIDES)
    judge = Judge(replay.load(settings.table))
    shares: dict[str, dict[int, float]] = {side: {} for side in SIDES}
    bad: dict[str, dict[int, float]] = {side: {} for side in SIDES}
    for seed in range(settings.studies):
        for side in settings.sides:
            if (records := trained(settings, side, seed)) is not None:
                shares[side][seed], bad[side][seed] = share_of(judge, records), broken(records)
                print(f"{side} {seed}: {shares[side][seed]:.3f}", file=sys.stderr, flush=True)
    record = {"benchmark": "coordinates", "device": "cpu", "versions": versions(), "settings": vars(settings)}
    print(json.dumps(record | {"ratios": report(shares, bad)}))


if __name__ == "__main__":
    words.run(main)
