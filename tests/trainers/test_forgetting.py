"""Loss on general text: what is measured, before and after, and which points a limit keeps off the front.

python -m pytest tests/trainers/test_forgetting.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from allocators.core.errors import StudyError
from allocators.core.messages import TrainJob
from allocators.core.types import ExpertSelection, Forgetting, Outcome, Recipe, Trial
from search import run
from search.config import parse
from search.front import Points
from search.records import read
from search.session.prepare import prepare
from tests.search.studies import outcome, selection
from tests.trainers.conftest import worker_setup
from trainers import forgetting, models
from trainers.worker_state import WorkerState


@pytest.fixture(scope="module")
def base() -> models.Loaded:
    return models.load("tiny-dense", device="cpu")


def test_the_loss_is_the_mean_over_tokens_whatever_the_rows(base: models.Loaded, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("add 3 4 > 7\n" * 60)  # 720 characters, a token each: rows of 256, 256 and 208
    measure, digest = forgetting.load(str(text), model="tiny-dense", tokenizer=base.tokenizer)
    loss = measure(base.model)
    assert [tokens for _, tokens in loss.by_row] == [255, 255, 207]
    ids = base.tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    expected = 0.0
    for start in range(0, 720, 256):
        row = torch.tensor([ids[start : start + 256]])
        with torch.no_grad():
            logits = base.model(input_ids=row).logits[0, :-1].log_softmax(-1)
        expected -= float(logits.gather(1, row[0, 1:, None]).sum())
    assert loss.mean == pytest.approx(expected / 717, rel=1e-4)
    text.write_text("something else entirely")
    assert forgetting.load(str(text), model="tiny-dense", tokenizer=base.tokenizer)[1] != digest


def test_the_held_out_rows_are_those_of_the_generator_and_of_every_domain(base: models.Loaded) -> None:
    rows = [json.loads(line) for line in forgetting.FILE.read_text().splitlines()]
    domains: dict[str, int] = {}
    for row in rows:
        domains[row["domain"]] = domains.get(row["domain"], 0) + 1
    assert set(domains.values()) == {4}
    measure, _ = forgetting.load("held_out", model="tiny-dense", tokenizer=base.tokenizer)
    assert 0.5 < measure(base.model).mean < 2.5  # it was trained on such rows; untrained it would be log 97 = 4.6


def test_the_error_of_the_rise_is_that_of_a_paired_mean() -> None:
    """Rows of equal length: the standard error of the mean of their differences."""
    before = forgetting.Loss(1.0, ((10.0, 10), (12.0, 10), (8.0, 10)))
    after = forgetting.Loss(1.2, ((11.0, 10), (15.0, 10), (10.0, 10)))
    error = forgetting.difference(before, after)
    assert error == pytest.approx(0.1 / math.sqrt(3))  # differences .1 .3 .2 a token, s.d. .1
    assert forgetting.difference(forgetting.Loss(1.0), forgetting.Loss(1.1)) is None


def test_points_above_the_limit_are_on_no_front_and_come_back_without_it() -> None:
    runs = [
        outcome(selection(n), accuracy=accuracy).updated(
            forgetting=None if rise is None else Forgetting(1.0, 1.0 + rise)
        )
        for n, accuracy, rise in ((1, 0.4, 0.01), (2, 0.9, 0.5), (3, 0.6, 0.02), (4, 0.7, None))
    ]
    free, limited = Points(runs), Points(runs, max_forgetting=0.1)
    assert [c.accuracy for c in free.front] == [0.4, 0.9]
    assert [c.accuracy for c in limited.front] == [0.4, 0.6]
    limited.update(runs[3].updated(forgetting=Forgetting(1.0, 1.05)))
    assert [c.accuracy for c in limited.front] == [0.4, 0.6, 0.7]
    assert Outcome.from_json(json.loads(json.dumps(runs[0].to_json()))) == runs[0]
    assert "forgetting" not in runs[3].to_json()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["max_forgetting=0.1"], "limits what is not measured"),
        (["forgetting=nosuch.txt"], "no such file"),
        (["forgetting=held_out", "model=gpt2"], "is for the embedded models"),
    ],
)
def test_what_cannot_be_measured_is_one_line(given: list[str], says: str) -> None:
    with pytest.raises(StudyError, match=says) as error:
        parse(given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text": null}\n'),
        ("a.jsonl", b'{"text": 5}\n'),
        ("a.jsonl", b'{"text": "a \\ud800"}\n'),
        ("a.jsonl", b'["text"]\n'),
        ("a.jsonl", b"[" * 100_000),
        ("a.jsonl", b""),
        ("a.txt", b"a b c".decode().encode("utf-16")),
        ("a.txt", b" "),
    ],
)
def test_what_is_no_text_is_one_line(base: models.Loaded, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StudyError, match=rf"{name} (cannot be read as text|holds no text)") as error:
        forgetting.load(str(tmp_path / name), model="tiny-dense", tokenizer=base.tokenizer)
    assert "\n" not in str(error.value)


def test_what_cannot_be_measured_is_said_before_anything_starts(tmp_path: Path) -> None:
    from tests.trainers.tasks.test_check import GEN, say, write

    (tmp_path / "a.jsonl").write_text('{"text": null}\n')
    for name, says in (
        ("nosuch.yaml", "task file 'nosuch.yaml' does not exist"),
        (tmp_path / "a.jsonl", "cannot be read as text"),
        (write(tmp_path, GEN, say("a", "b"), say("c")), "has no loss: its model writes its answers"),
    ):
        with pytest.raises(StudyError, match=says):
            prepare(parse(["space=sieve", "model=tiny-moe", f"forgetting={name}", f"storage={tmp_path}"]))


def test_a_mark_before_a_text_and_line_separators_in_it_are_no_part_of_its_form(
    base: models.Loaded, tmp_path: Path
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "red and blue"}\n', encoding="utf-8")
    plain = forgetting.load(str(file), model="tiny-dense", tokenizer=base.tokenizer)[1]
    file.write_text('{"text": "red and blue"}\r\n', encoding="utf-8-sig")
    assert forgetting.load(str(file), model="tiny-dense", tokenizer=base.tokenizer)[1] == plain
    file.write_text('{"text": "red \u2028 and \x85 blue"}\n', encoding="utf-8")
    assert forgetting.load(str(file), model="tiny-dense", tokenizer=base.tokenizer)[1] != plain


@pytest.mark.slow
def test_a_study_records_it_and_a_limit_that_nothing_meets_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"space=sieve space.allocator=none workers=process recipe.steps=6 limit=40 trials=2 storage={tmp_path}"
    given = [*words.split(), "untrained=false", "forgetting=held_out"]
    assert run.main(given) == 0
    finished = list(read(tmp_path / "sieve-tiny-moe-default").finished.values())
    rises = [o.forgetting for o in finished if o.forgetting is not None]
    assert len(rises) == len(finished) == 2
    assert len({lost.before for lost in rises}) == 1  # the base is one
    assert all(lost.after != lost.before and lost.stderr for lost in rises)
    assert "Forgetting: the base's loss on general text (held_out)" in capsys.readouterr().out
    header = (tmp_path / "sieve-tiny-moe-default" / "points.csv").read_text().splitlines()[0]
    assert "forgetting,forgetting_stderr,general_loss" in header
    assert run.main([*given, "reuse=true", "name=again"]) == 0
    again = read(tmp_path / "again")
    assert len(again.reused) == 2
    assert {d: o.forgetting for d, o in again.finished.items() if d in again.reused} == {
        o.digest: o.forgetting for o in finished
    }
    capsys.readouterr()
    assert run.main([*given, "max_forgetting=1e-9"]) == 0
    said = capsys.readouterr().out
    assert "max_forgetting=1e-09" in said


def member_of_a_group(rank: int, world_size: int, folder: str) -> None:
    """One of the workers of a trial, on the CPU: writes what it measured."""
    import torch.distributed as dist

    meeting = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    state = WorkerState(worker_setup(Path(folder), **OF_A_GROUP), "cpu")
    outcome = state.train(job(state), report=lambda rung: True, leads=rank == 0)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(outcome.to_json()))
    dist.destroy_process_group()


OF_A_GROUP: dict[str, Any] = {"task": "tiny_cipher", "task_options": {"limit": 8}, "forgetting": "held_out"}


def job(state: WorkerState) -> TrainJob:
    recipe = Recipe(rank=4, steps=4, batch_size=4, micro_batch_size=2, learning_rate=1e-2)
    chosen = ExpertSelection(dict.fromkeys(state.shape.moe_layers, (0, 3)))
    trial = Trial(chosen, recipe, "tiny-moe", "tiny_cipher", 0)
    return TrainJob(trial, chosen.trainable_params(state.shape, rank=4))


@pytest.mark.slow
def test_the_workers_of_a_trial_share_the_text_and_all_have_the_number_of_one_alone(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(member_of_a_group, args=(2, str(tmp_path)), nprocs=2)
    first, second = (Outcome.from_json(json.loads((tmp_path / f"{rank}.json").read_text())) for rank in range(2))
    state = WorkerState(worker_setup(tmp_path / "alone", **OF_A_GROUP), "cpu")
    alone = state.train(job(state), report=lambda rung: True).forgetting
    assert first.forgetting == second.forgetting is not None
    assert alone is not None
    assert first.forgetting is not None
    assert first.forgetting.before == pytest.approx(alone.before, rel=1e-6)
    assert first.forgetting.after == pytest.approx(alone.after, rel=1e-5)
