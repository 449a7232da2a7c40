"""What a search was worth, by hand: one-line recipes against the front, trainings and tokens that were saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from allocators.core.types import Outcome, Recipe, Rung, Score, Trial
from search.front import candidates, front
from search.report.gains import recipes, saved
from tests.search.studies import APART, CONFIG, open_study, outcome, selection


def recipe_point(allocator: str, knobs: dict[str, Any], params: int, accuracy: float, number: int) -> Outcome:
    trial = Trial(selection(2, seed=number), Recipe(steps=9), "m", "t", 0, allocator, knobs)
    rungs = (Rung(9, 9, accuracy, stderr=0.03),)
    return Outcome(trial, "complete", params, accuracy=accuracy, rungs=rungs)


def test_recipes_against_the_front_by_hand(tmp_path: Path) -> None:
    outcomes = [
        recipe_point("esft", {"p": 0.1}, 1_000, 0.50, 1),
        recipe_point("esft", {"p": 0.3}, 3_000, 0.70, 2),
        recipe_point("random", {"fraction": 0.25}, 4_000, 0.45, 3),
        recipe_point("random", {"fraction": 0.5}, 4_500, 0.69, 4),
        recipe_point("sieve", {"fraction": 0.25, "score": "count"}, 4_000, 0.68, 5),
        recipe_point("all", {}, 9_000, 0.80, 6),
    ]
    with open_study(tmp_path / "demo") as study:
        points = candidates(outcomes)
        (section,) = recipes(study, points, front(points), noise=None)
        found = {row[0]: dict(zip(section.head, row, strict=True)) for row in section.rows}
        assert list(found) == ["top 25 % routed", "random 25 %", "all experts"]
        # √(.03² + .03²) = .042: .02 is inside two of it, .25 is not
        assert found["top 25 % routed"]["front − recipe"] == "+0.020 ± 0.042"
        assert found["top 25 % routed"]["reading"] == "inside the noise"
        assert found["random 25 %"]["front − recipe"] == "+0.250 ± 0.042"
        assert found["random 25 %"]["reading"] == "more than noise"
        assert found["random 25 %"]["parameters of the front"] == "0.25 (0.25 … 0.25)"
        assert found["top 25 % routed"]["parameters of the front"] == "0.75 (0.75 … 2.25)"
        assert (found["all experts"]["reading"], found["all experts"]["parameters of the front"]) == (
            "on the front",
            "1.00",
        )


def test_recipes_are_compared_by_test_accuracy_where_both_sides_have_one(tmp_path: Path) -> None:
    outcomes = [
        recipe_point("esft", {"p": 0.1}, 1_000, 0.50, 1).updated(test=Score(0.40, 0.03)),
        recipe_point("esft", {"p": 0.3}, 3_000, 0.70, 2).updated(test=Score(0.60, 0.03)),
        recipe_point("esft", {"p": 0.4}, 3_500, 0.71, 3),
        recipe_point("sieve", {"fraction": 0.25, "score": "count"}, 3_200, 0.65, 4).updated(test=Score(0.62, 0.04)),
        recipe_point("random", {"fraction": 0.25}, 3_300, 0.45, 5),
        recipe_point("all", {}, 9_000, 0.69, 6).updated(test=Score(0.39, 0.03)),
    ]
    with open_study(tmp_path / "demo", **APART) as study:
        points = candidates(outcomes)
        (section,) = recipes(study, points, front(points), noise=None)
    found = {row[0]: dict(zip(section.head, row, strict=True)) for row in section.rows}
    hot = found["top 25 % routed"]
    assert (hot["validation"], hot["test"], hot["split"]) == ("0.650 ± 0.030", "0.620 ± 0.040", "test")
    assert hot["front − recipe"] == "-0.020 ± 0.050"  # .60 − .62, √(.03² + .04²)
    assert hot["parameters of the front"] == "– (0.94 … –)"  # of the tested: .58 has the one with 3,000, none has .62
    random = found["random 25 %"]
    assert (random["test"], random["split"], random["front − recipe"]) == ("", "validation", "+0.250 ± 0.042")
    # its rival, the front's best by validation, was not tested
    assert (found["all experts"]["split"], found["all experts"]["front − recipe"]) == ("validation", "+0.020 ± 0.042")


def test_trainings_and_tokens_that_were_not_needed(tmp_path: Path) -> None:
    done, stopped, taken = outcome(), outcome(selection(5), status="stopped"), outcome(selection(6))
    with open_study(tmp_path / "demo", config=CONFIG | {"evaluations": 3}) as study:
        assert saved(study) == []
        study.append_finished(done.updated(tokens=600, pack=4), {})
        study.append_finished(stopped.updated(tokens=200), {})  # after two of three rungs: 100 were left
        study.append_finished(taken.updated(tokens=700), {}, reused="first")
        for _ in range(2):
            study.append_answered({}, reason="duplicate", digest=done.digest)
        study.append_answered({}, reason="infeasible", message="no experts")
        (section,) = saved(study)
    assert section.rows == (
        ("trained", "2", "800", "29 %"),
        ("answered as a repeat", "2", "1.20k", "43 %"),
        ("reused from other studies", "1", "700", "25 %"),
        ("stopped early", "1", "100", "4 %"),
        ("trained, but in a pack", "1", "", ""),
    )
    assert "up to 4 trainings share each pass" in section.notes[-2]
    assert "1 more points could not exist" in section.notes[-1]
