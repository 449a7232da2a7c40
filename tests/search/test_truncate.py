"""Points that were cut from trainings are on the front, and count as no training anywhere else.

python -m pytest tests/search/test_truncate.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from allocators.core.errors import StudyError
from allocators.core.types import ModuleRanks, Outcome, Trial
from search import front as pareto
from search import run
from search.export import retrain
from search.records import read
from search.report import Report
from search.study import missing_repeats
from search.truncate import Request
from search.truncate.__main__ import main
from search.truncate.cut import _line, _parents
from tests.search.propose.test_sampler import problem
from tests.search.studies import moe_shape, open_study, outcome, score, selection


def cut_of(parent: Outcome, *, accuracy: float, energy: float = 0.9) -> Outcome:
    """What `search.truncate` records: fewer parameters, the recipe and the seed of the parent."""
    allocation = ModuleRanks({moe_shape().modules[0].path: 2})
    knobs = {"energy": energy, "of": parent.digest[:8]}
    trial = replace(parent.trial, allocation=allocation, allocator="cut", knobs=knobs, parent=parent.digest)
    cost = allocation.trainable_params(moe_shape())
    return parent.updated(trial=trial, trainable_params=cost, accuracy=accuracy)


def test_a_cut_adapter_is_another_run_than_a_training_with_its_ranks_and_survives_json() -> None:
    parent = outcome(selection(4), accuracy=0.8)
    cut = cut_of(parent, accuracy=0.79)
    trained = replace(cut.trial, parent="")
    assert len({cut.digest, trained.digest, parent.digest}) == 3
    assert cut.trial.point != trained.point
    assert Trial.from_json(cut.trial.to_json()) == cut.trial
    assert "parent" not in trained.to_json()


def test_its_line_says_both_splits_where_they_agree_too() -> None:
    parent = outcome(selection(4), accuracy=0.8).updated(test=score(0.7))
    cut = cut_of(parent, accuracy=0.5).updated(test=score(0.5))
    assert "validation 0.800 -> 0.500, test 0.700 -> 0.500" in _line(parent, 0.9, cut, one_split=False)
    assert "validation" not in _line(parent, 0.9, cut, one_split=True)


def test_the_front_shows_it_and_nothing_counts_it_as_a_training(tmp_path: Path) -> None:
    with open_study(tmp_path / "study") as study:
        parent, other = outcome(selection(4), accuracy=0.8), outcome(selection(4), accuracy=0.7, seed=1)
        for trained in (parent, other):
            study.append_finished(trained, {"allocator": "sieve"})
        cut = cut_of(parent, accuracy=0.79)
        study.append_finished(cut, {"cut_from": parent.digest, "energy": 0.9})
        assert set(study.trained) == {parent.digest, other.digest}
        wanted = missing_repeats(problem(), study, seeds=3)
        assert {p.trial.point for p in wanted} <= {parent.trial.point}  # no repeat of what was not trained
    report = Report(read(tmp_path / "study"))
    assert [c.parent for c in report.front] == [parent.digest, ""][: len(report.front)]
    assert [c.point for c in report.trained] == [parent.trial.point]
    assert report.noise is not None  # of the two seeds that were trained
    assert report.noise.freedom == 1
    small, large = next(c for c in report.points if c.parent), report.trained[0]
    alone = pareto.candidates([replace(cut, trial=replace(cut.trial, parent="0" * 16))])[0]
    assert (report.difference(small, large).stderr or 0) < (report.difference(alone, large).stderr or 0)
    assert any("no training but cut from one" in sentence for sentence in report.words)
    assert f"point={parent.digest[:8]} energy=0.9" in retrain(report, cut)
    from search.report.tables import points_csv

    header, *rows = points_csv(report).splitlines()
    place = header.split(",").index("cut_from")
    assert sum(parent.digest in row for row in rows) >= 2
    assert place > 0


def test_of_a_front_of_cut_points_their_trainings_are_cut(tmp_path: Path) -> None:
    """The second run of `point=front`: the points that the first made have pushed their trainings off the front."""
    folder = tmp_path / "study"
    with open_study(folder) as study:
        with pytest.raises(StudyError, match="no finished trial"):
            _parents(Report(read(folder)), "front")
        parent = outcome(selection(4), accuracy=0.8, adapter="here")
        cuts = [cut_of(parent, accuracy=0.9, energy=energy) for energy in (0.5, 0.9)]
        for run_, extra in ((parent, {}), *((cut, {"cut_from": parent.digest}) for cut in cuts)):
            study.append_finished(run_, extra)
        (folder / "adapters" / parent.digest).mkdir(parents=True)
    report = Report(read(folder))
    assert all(point.parent for point in report.front)
    for name in ("front", "all", "best"):
        assert [run_.digest for run_, _ in _parents(report, name)] == [parent.digest]
    with pytest.raises(StudyError, match="cut that training"):
        _parents(report, cuts[0].digest)


@pytest.mark.parametrize(("energy", "says"), [("1.5", "at most 1"), ("much", "shares such as"), ("0", "above 0")])
def test_shares_that_are_none_are_refused(energy: str, says: str) -> None:
    with pytest.raises(StudyError, match=says):
        _ = Request(energy=energy).energies
    assert Request(energy="0.9,0.5").energies == [0.5, 0.9]


@pytest.mark.slow
def test_from_a_training_to_a_smaller_point_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = f"space=sieve space.allocator=all workers=process recipe.steps=4 limit=10 trials=1 storage={tmp_path}"
    assert run.main([*given.split(), "keep=all", "untrained=false"]) == 0
    study = tmp_path / "sieve-tiny-moe-default"
    assert main([str(study), "point=all", "energy=0.5,0.9"]) == 0
    small, large = sorted(
        (o for o in read(study).finished.values() if o.trial.parent), key=lambda o: o.trainable_params
    )
    [parent] = read(study).trained.values()
    assert small.trainable_params < large.trainable_params < parent.trainable_params
    assert small.test is not None
    assert "at energy 0.5" in capsys.readouterr().out
    from trainers import adapter, models

    loaded = adapter.load(models.load("tiny-moe", device="cpu").model, study / "adapters" / small.digest)
    assert loaded.num_trainable == small.trainable_params
    assert main([str(study), f"point={small.digest}"]) == 2  # what was cut is not cut again
    assert "cut that training" in capsys.readouterr().err
