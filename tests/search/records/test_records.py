"""The study folder: nothing finished is ever lost or run twice, whatever is killed or damaged."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from allocators.core.errors import StudyError
from allocators.core.types import Rung, Score, digest_of
from search import records
from search.records import LINES, read
from search.records.folder import StudyFolder
from search.records.redact import redacted
from tests import ROOT
from tests.search.studies import CONFIG, IDENTITY, fill, moe_shape, open_study, outcome, rung, selection, started

POINTS = [outcome(selection(n, seed=n), accuracy=n / 10) for n in range(1, 6)]

# What a driver may do, as (verb, number of the point)
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["started", "rung", "finished", "diverged", "answered", "tested"]),
        st.integers(0, len(POINTS) - 1),
    ),
    max_size=8,
)
FOLDERS = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def play(study: StudyFolder, events: list[tuple[str, int]]) -> None:
    for step, (verb, number) in enumerate(events):
        point, params = POINTS[number], {"fraction": number}
        match verb:
            case "started":
                study.append_started(started(point), params)
            case "rung":
                study.append_rung(point.digest, rung(step, 0.1 * step))
            case "finished":
                study.append_finished(point, params)
            case "diverged":
                study.append_finished(started(point).updated(status="diverged", message="loss is NaN"), params)
            case "answered":
                study.append_answered(params, reason="duplicate", digest=point.digest)
            case "tested":
                study.append_tested(point.digest, Score(number / 10, 0.01, {"a": {"accuracy": 0.5, "stderr": 0.02}}))


def state(seen: records.Records) -> str:
    """Everything the records say, comparable."""
    return digest_of(
        [
            [o.to_json() for o in seen.outcomes.values()],
            [seen.params_of(digest) for digest in seen.outcomes],
            [[a.params, a.reason, a.digest, a.message] for a in seen.answered],
        ]
    )


@FOLDERS
@given(events=EVENTS, draw=st.randoms(use_true_random=False))
def test_lines_in_another_order_are_the_same_study(
    tmp_path_factory: pytest.TempPathFactory, events: list[tuple[str, int]], draw: random.Random
) -> None:
    folder = tmp_path_factory.mktemp("study") / "s"
    with open_study(folder) as study:
        play(study, events)
    lines = (folder / LINES).read_text().splitlines(keepends=True)
    draw.shuffle(lines)
    (folder / LINES).write_text("".join(lines))
    seen = read(folder)
    assert set(seen.finished) == set(study.finished)
    assert {o.digest for o, _ in seen.in_flight} == {o.digest for o, _ in study.in_flight}
    assert seen.tried == study.tried
    assert not seen.problems


@FOLDERS
@given(events=EVENTS)
def test_memory_a_reader_and_a_reopened_study_say_the_same(
    tmp_path_factory: pytest.TempPathFactory, events: list[tuple[str, int]]
) -> None:
    folder = tmp_path_factory.mktemp("study") / "s"
    with open_study(folder) as study:
        play(study, events)
        assert state(study) == state(read(folder))  # while it is open, too
    with open_study(folder) as again:
        assert state(again) == state(study)


@FOLDERS
@given(events=EVENTS.filter(len), cut=st.floats(0, 1))
def test_a_file_cut_at_any_byte_holds_the_lines_before_the_cut_and_can_be_continued(
    tmp_path_factory: pytest.TempPathFactory, events: list[tuple[str, int]], cut: float
) -> None:
    folder = tmp_path_factory.mktemp("study") / "s"
    with open_study(folder) as study:
        play(study, events)
    data = (folder / LINES).read_bytes()
    kept = data[: round(cut * len(data))]
    (folder / LINES).write_bytes(kept)
    # a line that only lost its newline lost nothing
    whole = kept.count(b"\n") + (not kept.endswith(b"\n") and data[len(kept) :].startswith(b"\n"))
    with open_study(folder.with_name("reference")) as reference, open_study(folder) as again:
        play(reference, events[:whole])
        assert state(again) == state(read(folder)) == state(reference)
        play(reference, events[:2])
        play(again, events[:2])
        assert state(again) == state(read(folder)) == state(reference)
        assert not again.problems


@FOLDERS
@given(events=EVENTS.filter(lambda e: len(e) > 1), data=st.data())
def test_a_damaged_line_in_the_middle_is_named_and_costs_only_itself(
    tmp_path_factory: pytest.TempPathFactory, events: list[tuple[str, int]], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("study") / "s"
    with open_study(folder) as study:
        play(study, events)
    lines = (folder / LINES).read_bytes().splitlines(keepends=True)
    bad = data.draw(st.integers(0, len(lines) - 2))
    (folder / LINES).write_bytes(b"".join([*lines[:bad], b'{"event": "fin\xff\x00\n', *lines[bad + 1 :]]))
    without = folder.with_name("without")
    open_study(without).close()
    (without / LINES).write_bytes(b"".join([*lines[:bad], *lines[bad + 1 :]]))
    seen = read(folder)
    assert state(seen) == state(read(without))
    assert len(seen.problems) == 1
    assert f"line {bad + 1} " in seen.problems[0]


@pytest.mark.parametrize(
    "test", [{"accuracy": "high", "stderr": 0.1}, {"accuracy": 0.5}, [], {"accuracy": 0.5, "stderr": -1}]
)
def test_a_score_that_is_none_is_named_and_skipped(tmp_path: Path, test: object) -> None:
    with open_study(tmp_path) as study:
        study.append_finished(POINTS[0], {})
    with (tmp_path / LINES).open("a") as file:
        file.write(json.dumps({"event": "tested", "digest": POINTS[0].digest, "test": test}) + "\n")
    seen = read(tmp_path)
    assert seen.outcomes[POINTS[0].digest].test is None
    assert len(seen.problems) == 1


def test_a_score_is_of_its_training_on_the_front_and_in_what_was_trained(tmp_path: Path) -> None:
    score, point = Score(0.4, 0.02), POINTS[0]
    with open_study(tmp_path) as study:
        study.append_finished(point, {})
        study.append_finished(POINTS[1], {})
        study.append_tested(point.digest, score)
        assert list(study.finished) == [point.digest, POINTS[1].digest], "the order of their ends stays"
        for seen in (study, read(tmp_path)):
            assert seen.outcomes[point.digest].test == seen.trained[point.digest].test == score
            assert seen.points.candidate_of(point.digest).test_accuracy == 0.4
            assert seen.outcomes[POINTS[1].digest].test is None


def test_what_it_took_to_propose_a_point_is_kept(tmp_path: Path) -> None:
    with open_study(tmp_path) as study:
        study.append_started(started(POINTS[0]), {}, sampler_seconds=0.25)
        study.append_started(started(POINTS[1]), {})  # a study of an earlier version did not say
        assert study.sampler_seconds == [0.25]
    assert read(tmp_path).sampler_seconds == [0.25]


def test_what_a_driver_left_behind(tmp_path: Path) -> None:
    done, cut, never = POINTS[:3]
    with open_study(tmp_path) as study:
        study.append_started(started(done), {"n": 1})
        study.append_started(started(cut), {"n": 2})
        study.append_rung(cut.digest, rung(30, 0.2))
        study.append_rung(cut.digest, rung(60, 0.3))
        study.append_rung(cut.digest, rung(30, 0.25))  # went on from its checkpoint and passed the rung again
        study.append_finished(done, {"n": 1})
    seen = read(tmp_path)
    assert seen.finished == {done.digest: done}
    [(left, params)] = seen.in_flight
    assert (left.digest, params, left.status) == (cut.digest, {"n": 2}, "started")
    assert [(r.step, r.accuracy) for r in left.rungs] == [(30, 0.25), (60, 0.3)]
    assert never.digest not in seen.outcomes
    assert seen.params_of(done.digest) == {"n": 1}


def test_a_loss_that_is_not_a_number_is_null_in_the_file(tmp_path: Path) -> None:
    with open_study(tmp_path) as study:
        study.append_started(started(POINTS[0]), {})
        study.append_rung(POINTS[0].digest, Rung(1, 5, None, loss=float("nan")))
    assert b"NaN" not in (tmp_path / LINES).read_bytes()
    [(left, _)] = read(tmp_path).in_flight
    assert left.rungs[0].loss is None


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = open_study(tmp_path)
    study.append_finished(POINTS[0], {})
    write, room = os.write, [10]

    def until_full(descriptor: int, data: bytes) -> int:
        if not room:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[: room.pop()])

    monkeypatch.setattr(os, "write", until_full)
    with pytest.raises(StudyError, match=r"No space left.*same command again"):
        study.append_finished(POINTS[1], {})
    monkeypatch.undo()
    assert list(study.finished) == list(read(tmp_path).finished) == [POINTS[0].digest]
    study.append_finished(POINTS[2], {})
    assert not read(tmp_path).problems
    study.close()


def test_one_driver_at_a_time(tmp_path: Path) -> None:
    with open_study(tmp_path / "s"), pytest.raises(StudyError, match=r"/s is in use by another driver.*name=NEW"):
        open_study(tmp_path / "s")
    open_study(tmp_path / "s").close()


def test_another_identity_is_refused_with_the_changed_keys(tmp_path: Path) -> None:
    open_study(tmp_path).close()
    other = IDENTITY | {"seed": 1, "recipe": {"rank": 8}}
    with pytest.raises(StudyError, match=r"recipe\.rank \(4 -> 8\), seed \(0 -> 1\); start .* name=NEW"):
        open_study(tmp_path, identity=other)
    # Tuples are lists in JSON, and more trials do not change what a result means.
    open_study(tmp_path, identity=dict(IDENTITY), config=CONFIG | {"trials": 99}).close()
    header = read(tmp_path).header
    assert header["config"]["trials"] == 99
    assert len(header["resumed"]) == 1


def test_a_key_that_an_older_study_did_not_know_had_its_default(tmp_path: Path) -> None:
    open_study(tmp_path).close()
    defaults = {"dtype": "auto", "seed": 5}
    open_study(tmp_path, identity=IDENTITY | {"dtype": "auto"}, defaults=defaults).close()
    assert read(tmp_path).header["identity"]["dtype"] == "auto"
    with pytest.raises(StudyError, match=r"other settings: dtype \(auto -> float16\);"):
        open_study(tmp_path, identity=IDENTITY | {"dtype": "float16"}, defaults=defaults)


def test_identity_may_hold_tuples(tmp_path: Path) -> None:
    for _ in range(2):
        open_study(tmp_path, identity={"ranks": (4, 8)}).close()


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/no/such"])
def test_a_folder_that_cannot_be_written(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match=r"cannot be written .*storage=FOLDER"):
        open_study(tmp_path / where)


def test_reading_what_is_no_study(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no study in"):
        read(tmp_path)
    open_study(tmp_path).close()
    (tmp_path / "study.json").write_text('{"id": ')
    for attempt in (lambda: read(tmp_path), lambda: open_study(tmp_path)):
        with pytest.raises(StudyError, match=r"study\.json is damaged"):
            attempt()


def test_results_without_their_header_are_not_taken_for_a_new_study(tmp_path: Path) -> None:
    with open_study(tmp_path) as study:
        study.append_finished(POINTS[0], {})
    (tmp_path / "study.json").unlink()
    with pytest.raises(StudyError, match=r"no study\.json"):
        open_study(tmp_path)


def test_passwords_stay_out(tmp_path: Path) -> None:
    config = {
        "tracking": "https://me:hunter2@host/x",
        "storage": "s3://b/p?secret_key=hunter2&region=x",
        "hf_token": "hunter2",
    }
    open_study(tmp_path, config=config, command="run tracking=https://me:hunter2@host/x").close()
    assert "hunter2" not in (tmp_path / "study.json").read_text()
    assert redacted({"tokens": "many", "max_tokens": 5, "path": "a@b"}) == {
        "tokens": "many",
        "max_tokens": 5,
        "path": "a@b",
    }


DRIVER = """
import sys
from tests.search.records.test_records import POINTS, open_study, started
from tests.search.studies import outcome, selection
study = open_study(sys.argv[1])
for n in range(100_000):
    point = outcome(selection(1 + n % 16, seed=n), seed=n)
    study.append_started(started(point), {"n": n})
    study.append_finished(point, {"n": n})
    print(point.digest, flush=True)
"""


def test_kill_minus_nine_loses_nothing_that_was_finished(tmp_path: Path) -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT)
    assert driver.stdout is not None
    told = [driver.stdout.readline().decode().strip() for _ in range(25)]
    driver.send_signal(signal.SIGKILL)
    told += driver.stdout.read().decode().split()
    driver.wait()
    with open_study(tmp_path) as study:  # the lock died with its owner
        assert set(told) <= set(study.finished)
        assert len(study.finished) - len(told) <= 1  # finished, but killed before it could say so
        assert len(study.in_flight) <= 1
        assert not study.problems


def test_the_layout(tmp_path: Path) -> None:
    with open_study(tmp_path / "demo") as study:
        fill(study)
        assert study.name == "demo"
        assert study.shape == moe_shape()
    assert sorted(p.name for p in (tmp_path / "demo").iterdir()) == ["outcomes.jsonl", "study.json"]
    assert "torch" in study.header["versions"]


def test_records_and_fronts_load_neither_numpy_nor_torch() -> None:
    heavy = "{'numpy', 'torch', 'ray', 'mlflow'}"
    code = f"import sys, search.records, search.front; sys.exit(str({heavy} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert loaded.stderr.strip() == "set()"


def test_a_secret_in_a_quoted_word_of_the_command_ends_before_the_quote(tmp_path: Path) -> None:
    command = "run 'tracking_uri=http://host/?a=b&token=hunter2' 'name=my study' storage=s3://me:pw@bucket/x"
    open_study(tmp_path, command=command).close()
    words = shlex.split(json.loads((tmp_path / "study.json").read_text())["command"])
    assert words == [
        *("run", "tracking_uri=http://host/?a=b&token=***", "name=my study", "storage=s3://***@bucket/x"),
    ]
