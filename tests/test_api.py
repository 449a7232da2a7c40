"""The Python API: the same keys, checks and results as the command line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lora_expert_search as les
from allocators.core import words
from lora_expert_search.values import as_words
from search import interrupts
from search.session import session
from trainers import adapter


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> les.Study:
    return les.search(
        space="sieve",
        workers="process",
        trials=2,
        limit=40,
        storage=tmp_path_factory.mktemp("studies"),
        recipe={"steps": 4},
        pins={"allocator": "none"},
    )


def test_a_study_has_its_points_as_a_frame_with_a_column_a_setting(study: les.Study) -> None:
    assert list(study.points["allocator"]) == ["none", "none"]
    assert {"digest", "accuracy", "test_accuracy", "trainable_params", "recipe.rank"} <= set(study.points.columns)
    assert set(study.front["digest"]) <= set(study.points["digest"])
    assert study.front["trainable_params"].is_monotonic_increasing
    assert repr(study).startswith("Study(")


def test_knobs_are_columns_and_ids_stay_text(tmp_path: Path) -> None:
    replayed = les.search(replay="tiny-moe", trials=8, storage=tmp_path)
    assert "knobs.fraction" in replayed.points.columns
    assert replayed.points["digest"].map(len).eq(16).all()


def test_the_best_point_loads_and_computes(study: les.Study) -> None:
    point = study.best()
    assert point.trainable_params == study.front["trainable_params"].iloc[-1]
    loaded = point.load()
    assert loaded.num_trainable == point.trainable_params
    with torch.no_grad():
        assert torch.isfinite(loaded.model(torch.tensor([[1, 2, 3]])).logits).all()


def test_a_budget_below_every_point_is_one_line(study: les.Study) -> None:
    with pytest.raises(les.StudyError, match="no point with at most 10 parameters: the smallest has"):
        study.best(max_params=10)


def test_a_point_is_exported_and_loads_back(study: les.Study, tmp_path: Path) -> None:
    lines: list[str] = []
    folder = study.point("best").export(tmp_path / "winner", say=lines.append, format="adapter")
    assert json.loads((folder / "adapter.json").read_text())["metadata"]["accuracy"] == study.best().run.accuracy
    assert any("format=adapter" in line for line in lines)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"format": "pfet"}, "did you mean 'peft'"),
        ({"fromat": "peft"}, "did you mean 'format'"),
        ({"dtype": "half", "format": "merged"}, "float32"),
        ({"overwrite": "please"}, "overwrite must be true or false"),
        ({"point": "knee"}, "export has its point already"),
    ],
)
def test_an_export_is_refused_as_the_command_refuses_it(
    study: les.Study, tmp_path: Path, request_: dict[str, Any], says: str
) -> None:
    with pytest.raises(les.StudyError, match=says):
        study.best().export(tmp_path / "out", say=lambda _: None, **request_)
    assert not (tmp_path / "out").exists()


def test_overwrite_that_is_typed_as_false_overwrites_nothing(study: les.Study, tmp_path: Path) -> None:
    study.best().export(tmp_path / "out", say=lambda _: None, format="config")
    with pytest.raises(les.StudyError, match="is not empty"):
        study.best().export(tmp_path / "out", say=lambda _: None, format="config", overwrite="false")


def test_points_are_asked_for_by_numbers_and_names(study: les.Study) -> None:
    for number in ("50k", float("nan")):
        with pytest.raises(les.StudyError, match="max_params must be a number"):
            study.best(max_params=number)  # type: ignore[arg-type]
    int_of_numpy: Any = np.int64(10**9)
    assert study.best(max_params=int_of_numpy).id == study.best().id
    with pytest.raises(les.StudyError, match="a point is named by best, knee or the id of a run, got 3"):
        study.point(3)  # type: ignore[arg-type]


def test_in_a_notebook_a_study_is_its_report_and_a_figure(study: les.Study) -> None:
    assert "<iframe" in study._repr_html_()
    assert study.plot().axes


def test_the_same_call_goes_on_and_an_open_study_reads_what_is_there(study: les.Study) -> None:
    again = les.search(
        workers="process",
        trials=3,
        limit=40,
        storage=study.folder.parent,
        recipe={"steps": 4},
        pins={"allocator": "none"},
    )
    assert len(again.points) == 3
    assert len(les.open_study(study.folder).points) == 3
    assert len(study.points) == 2
    assert len(study.refresh().points) == 3


def test_an_interrupt_returns_what_is_there(study: les.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "run_study", interrupted)
    there = les.search(workers="process", limit=40, storage=study.folder.parent, recipe={"steps": 4})
    assert len(there.points) >= 2


def test_sigterm_ends_the_search_in_order_and_then_the_process(
    study: les.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = []

    def stopped(*_: object) -> int:
        with interrupts.ending(lambda: ended.append("reported")):
            signal.raise_signal(signal.SIGTERM)
        return 0

    monkeypatch.setattr(session, "run_study", stopped)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as error:
        les.search(workers="process", limit=40, storage=study.folder.parent, recipe={"steps": 4})
    assert error.value.code == 128 + signal.SIGTERM
    assert ended == ["reported"]
    assert signal.getsignal(signal.SIGTERM) is before
    with interrupts.watched():  # which forgets the signal
        assert not interrupts.came()


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"trails": 3}, "trails"),
        ({"trials": 0}, "trials"),
        ({"space": "seive"}, "sieve"),
        ({"dry_run": True}, "dry_run"),
        ({"recipe": "steps=3"}, "recipe must be a mapping"),
        ({"pins": [("rank", 2)]}, "pins must be a mapping"),
        ({"limit": {16}}, "limit takes a text, a number"),
        ({"limit": np.arange(2)}, "limit takes a text, a number"),
    ],
)
def test_what_the_command_line_refuses_the_api_refuses(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(les.StudyError, match=says):
        les.search(**keys)


def test_values_are_the_words_of_the_command_line() -> None:
    keys = {"limit": np.int64(16), "yes": np.bool_(True), "rate": np.float64(0.1), "no": None, "at": Path("a b")}
    assert as_words(keys) == ["limit=16", "yes=true", "rate=0.1", "at=a b"]
    assert as_words({"two": ["a", Path("b")], "flags": (True, 1)}) == ["two=a,b", "flags=true,1"]
    [word] = as_words({"files": ["a,b.py", "c.py"]})
    assert words.read_list(word.partition("=")[2]) == ["a,b.py", "c.py"]


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    seed: Any = np.int32(1)
    given = les.allocate("random_ranks", model="tiny-dense", rank=np.int64(3), share=np.float64(0.5), seed=seed)
    assert given == les.allocate("random_ranks", model="tiny-dense", rank=torch.tensor(3), share=0.5, seed=1)
    with pytest.raises(les.StudyError, match="rank of random_ranks must be a whole number, got '3', a text"):
        les.allocate("random_ranks", model="tiny-dense", rank="3")
    for wrong in (None, ["sieve"]):
        with pytest.raises(les.StudyError, match="allocate takes the name of one rule"):
            les.allocate(wrong)  # type: ignore[arg-type]
    with pytest.raises(les.StudyError, match="options must be a mapping"):
        les.allocate("all", options="samples=16")  # type: ignore[arg-type]


def test_settings_that_attach_is_not_given_are_the_papers() -> None:
    model, allocation = les.load_model("tiny-dense").model, les.allocate("uniform_ranks", model="tiny-dense", rank=2)
    attached = les.attach(model, allocation, rank=np.int64(2))
    assert (attached.lora.rank, attached.lora.lora_alpha) == (2, 16.0)
    attached.detach()
    with pytest.raises(les.StudyError, match="attach takes a causal language model of transformers, got a Linear"):
        les.attach(torch.nn.Linear(2, 2), allocation)  # type: ignore[arg-type]
    with pytest.raises(les.StudyError, match="attach takes an allocation"):
        les.attach(model, allocation.to_json())  # type: ignore[arg-type]


def test_only_the_rules_inside_ones_own_training(tmp_path: Path) -> None:
    allocation = les.allocate("uniform", model="tiny-dense", total_experts=16)
    assert allocation.total_experts == 16 * 7
    model = les.load_model("tiny-dense").model
    attached = les.attach(model, allocation, rank=4, lora_alpha=8)
    assert attached.num_trainable == allocation.trainable_params(attached.shape, rank=4)
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in attached.parameters())
    adapter.save(attached, tmp_path / "saved", metadata={})
    assert adapter.read(tmp_path / "saved").allocation == allocation


def test_rules_that_do_not_fit_are_one_line() -> None:
    with pytest.raises(les.StudyError, match="rank"):
        les.attach(les.load_model("tiny-moe").model, les.allocate("all"), rnk=3)
    with pytest.raises(les.ToolkitError, match="dense"):
        les.allocate("mola", model="tiny-moe")


def test_importing_loads_neither_torch_nor_ray() -> None:
    heavy = "('torch', 'ray', 'mlflow', 'transformers', 'pandas')"
    code = f"import sys, lora_expert_search; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
