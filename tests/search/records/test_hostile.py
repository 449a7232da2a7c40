"""Study folders of somebody else: whatever they hold is read, reported, resumed, exported and reused, and nothing
outside of them is read as theirs, written or deleted.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from allocators.core.errors import StudyError, ToolkitError
from allocators.core.types import Outcome
from search import export as adapter_export
from search import replay, report
from search.export.__main__ import parse as parse_words
from search.records import LINES, read
from search.records.files import EVALUATIONS, append_line
from search.records.folder import StudyFolder
from search.records.reuse import OtherStudies
from tests.search.export.test_export import MOE, run_of, some, trained, write_study
from tests.search.propose.test_sampler import problem
from tests.search.studies import fill, identity_of, moe_shape, open_study, outcome, selection, started
from tests.search.test_seeds import TRIALS, drive

DEEP = 100_000


@pytest.fixture(scope="module")
def mlflow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture
def sentinel(tmp_path: Path) -> Path:
    """A tree that belongs to no study."""
    tree = tmp_path / "precious"
    for name in ("adapter.json", "deep/er/file", outcome().digest + "/adapter.safetensors"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(f"precious {name}")
    (tree / LINES).write_text("")
    return tree


def contents(tree: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(tree)): path.read_bytes() if path.is_file() else None for path in tree.rglob("*")}


def every_use(folder: Path) -> None:
    """All that can be done with a folder but to go on with it; a refusal is one line."""
    uses = (
        lambda: report.write(folder),
        lambda: report.show(folder),
        lambda: replay.export([folder], folder.parent / "table.parquet"),
        lambda: list(adapter_export.write(*parse_words([str(folder), f"to={folder.parent / 'winner'}"]))),
        lambda: reuse(folder),
    )
    refusals = []
    for use in uses:
        try:
            use()
        except ToolkitError as error:
            refusals.append(str(error))
    assert not any("\n" in refusal for refusal in refusals)


def reuse(folder: Path) -> None:
    mine = folder.parent / "mine"
    others = OtherStudies(mine, identity=identity_of(problem()), defaults={}, facts={}, place=str(mine))
    len(others)
    for done in read(folder).finished.values():
        others.take(done.trial, done.trainable_params)


# --- lines


def finished(done: Outcome, **changes: Any) -> dict[str, Any]:
    return {"event": "finished", "outcome": done.to_json() | changes, "params": {}}


def of_trial(done: Outcome, **changes: Any) -> dict[str, Any]:
    line = finished(done)
    line["outcome"]["trial"] |= changes
    return line


def damaged_lines() -> dict[str, bytes]:
    """Lines that are no line of ours, each damaged in one way."""
    done = outcome(selection(3), accuracy=0.9)
    experts, counts = {"kind": "expert_selection"}, {"kind": "expert_counts", "gating": "routed"}
    lines: dict[str, object] = {
        "a digest that is a path": of_trial(done, digest="../../../precious"),
        "a rung's digest that is a path": {"event": "rung", "digest": "../x", "rung": done.rungs[0].to_json()},
        "an answer's digest": {"event": "answered", "params": {}, "reason": "duplicate", "digest": "/", "message": ""},
        "text for a number": finished(done, trainable_params="abc"),
        "a list for a number": finished(done, trainable_params=[1]),
        "a number that no column holds": finished(done, trainable_params=10**30),
        "a negative number": finished(done, trainable_params=-1),
        "parameters that its allocation does not have": finished(done, trainable_params=5),
        "an expert that the model does not have": of_trial(done, allocation=experts | {"experts": {"0": [9999]}}),
        "a rank that other parameters go with": of_trial(done, recipe=done.trial.recipe.to_json() | {"rank": 8}),
        "no whole number": finished(done, tokens=0.5),
        "true for a number": finished(done, seconds=True),
        "accuracy as text": finished(done, accuracy="0.9"),
        "accuracy beyond all sums": finished(done, accuracy=1e200),
        "an unknown status": finished(done, status="won"),
        "a status that is a list": finished(done, status=[]),
        "rungs that are none": finished(done, rungs=[1, 2]),
        "rungs that are text": finished(done, rungs="rungs"),
        "a rung with a long step": finished(done, rungs=[done.rungs[0].to_json() | {"step": 10**20}]),
        "tasks that are none": finished(done, rungs=[done.rungs[0].to_json() | {"by_task": {"a": 1}}]),
        "versions that are numbers": finished(done, versions={"torch": 2}),
        "half a surrogate pair": finished(done, message="\ud800"),
        "an adapter that is a list": finished(done, adapter=["/"]),
        "an unknown allocation": of_trial(done, allocation={"kind": "expert_everything"}),
        "an allocation that is none": of_trial(done, allocation=[]),
        "a negative expert": of_trial(done, allocation=experts | {"experts": {"0": [-1]}}),
        "a layer that is none": of_trial(done, allocation=experts | {"experts": {"first": [1]}}),
        "half an expert": of_trial(done, allocation=experts | {"experts": {"0": [1.5]}}),
        "negative counts": of_trial(done, allocation=counts | {"counts": {"a": -1}}),
        "huge counts": of_trial(done, allocation=counts | {"counts": {"a": 10**9}}),
        "a rank that is text": of_trial(done, recipe=done.trial.recipe.to_json() | {"rank": "8"}),
        "a rank of zero": of_trial(done, recipe=done.trial.recipe.to_json() | {"rank": 0}),
        "an unknown setting": of_trial(done, recipe=done.trial.recipe.to_json() | {"rnak": 8}),
        "a seed that is text": of_trial(done, seed="0"),
        "a model that is a number": of_trial(done, model=3),
        "another study's model": of_trial(done, model="tiny-dense"),
        "another study's task": of_trial(done, task="tiny_pairs"),
        "knobs in knobs": of_trial(done, knobs={"a": {"b": 1}}),
        "params that are a list": finished(done) | {"params": [1]},
        "params that are deep": finished(done) | {"params": {"a": [[[]]]}},
        "an unknown reason": {"event": "answered", "params": {}, "reason": "because", "digest": None, "message": ""},
        "an unknown event": {"event": "delete", "digest": done.digest},
        "no event": {},
        "no mapping": [1, 2, 3],
        "nothing": None,
    }
    texts = {name: json.dumps(line).encode() for name, line in lines.items()}
    whole = json.dumps(finished(done)).encode()
    texts["a number beyond floats"] = whole.replace(b'"seconds": 12.5', b'"seconds": 1e400')
    texts["NaN"] = whole.replace(b'"seconds": 12.5', b'"seconds": NaN')
    texts["digits without end"] = whole.replace(b'"seconds": 12.5', b'"seconds": ' + b"9" * 5_000)
    texts["deep JSON"] = b'{"event": ' + b"[" * DEEP + b"]" * DEEP + b"}"
    texts["no JSON"] = b"\xff\x00 rm -rf"
    return texts


@pytest.mark.parametrize("name", damaged_lines())
def test_a_damaged_line_is_named_and_costs_only_itself(name: str, tmp_path: Path) -> None:
    with open_study(tmp_path / "s") as study:
        fill(study)
    good = read(tmp_path / "s")
    lines = (tmp_path / "s" / LINES).read_bytes().splitlines(keepends=True)
    (tmp_path / "s" / LINES).write_bytes(b"".join([*lines[:3], damaged_lines()[name] + b"\n", *lines[3:]]))
    seen = read(tmp_path / "s")
    [problem_] = seen.problems
    assert " line 4 is damaged" in problem_
    assert len(problem_) < 500
    assert problem_.isascii()
    assert list(seen.outcomes.items()) == list(good.outcomes.items())
    assert seen.answered == good.answered


def test_all_damage_at_once_is_reported_exported_and_gone_on_with(
    tmp_path: Path, mlflow_folder: Path, sentinel: Path
) -> None:
    folder, before = tmp_path / "s", contents(sentinel)
    drive(problem(), folder, mlflow_folder, seeds=1, trials=3)
    known = set(read(folder).finished)
    base = next(iter(read(folder).finished.values()))
    three, two, five = (base.updated(trial=replace(base.trial, seed=seed)) for seed in (7, 8, 9))
    own = {"model": problem().model, "task": problem().task}
    strange = [  # well-formed, and impossible in this space
        of_trial(three.updated(adapter=str(sentinel)), **own) | {"params": {"allocator": "evil", "fraction": "all"}},
        of_trial(two.updated(adapter="../../precious"), **own) | {"params": {"learning_rate": -1.0}},
        of_trial(started(five), **own) | {"event": "started", "params": {"fraction": 1e9}},
    ]
    with (folder / LINES).open("ab") as file:
        for text in (*damaged_lines().values(), *(json.dumps(line).encode() for line in strange)):
            file.write(text + b"\n")
    every_use(folder)
    _, records, _, _ = drive(problem(), folder, mlflow_folder, seeds=2)
    assert known <= set(records.finished)
    assert sum(done.trial.seed == 0 for done in records.trained.values()) >= TRIALS
    assert len(records.problems) == len(damaged_lines())
    every_use(folder)
    assert contents(sentinel) == before


# --- adapters


def test_an_adapter_is_never_dropped_or_taken_by_a_recorded_path(
    tmp_path: Path, mlflow_folder: Path, sentinel: Path
) -> None:
    folder = tmp_path / "s"
    drive(problem(), folder, mlflow_folder, seeds=1)
    lines = []
    for text in (folder / LINES).read_text().splitlines():
        line = json.loads(text)
        if line["event"] == "finished":
            line["outcome"]["adapter"] = str(sentinel)
        lines.append(json.dumps(line) + "\n")
    (folder / LINES).write_text("".join(lines))
    shutil.rmtree(folder / "adapters")
    before = contents(sentinel)
    every_use(folder)
    assert str(sentinel) not in (folder / "front.csv").read_text() + (folder / "report.html").read_text()
    drive(problem(), folder, mlflow_folder, seeds=1, trials=TRIALS + 4)
    assert contents(sentinel) == before


def test_a_copy_and_its_original_never_touch_each_other(tmp_path: Path, mlflow_folder: Path) -> None:
    first, copy = tmp_path / "first", tmp_path / "copy"
    drive(problem(), first, mlflow_folder, seeds=1, trials=3)
    # as an earlier version wrote it: absolute paths, and no mark of which file it is
    texts = (first / LINES).read_text().replace('"adapters/', f'"{first}/adapters/')
    (first / LINES).write_text(texts)
    header = json.loads((first / "study.json").read_text())
    (first / "study.json").write_text(json.dumps({key: value for key, value in header.items() if key != "inode"}))
    shutil.copytree(first, copy)
    for resumed, other in ((copy, first), (first, copy)):
        before = contents(other)
        drive(problem(), resumed, mlflow_folder, seeds=2, trials=TRIALS)
        report.write(resumed)
        assert contents(other) == before
        assert str(other) not in (resumed / "front.csv").read_text()
        assert str(resumed) in (resumed / "front.csv").read_text()
    assert read(first).header["id"] == header["id"] != read(copy).header["id"], "MLflow's runs go by it"
    again = tmp_path / "again"
    shutil.copytree(first, again / "first")
    own = {"identity": identity_of(problem())}
    open_study(again / "first", **own).close()
    assert read(again / "first").header["id"] != header["id"], "a copy of the same name"
    (again / "first").rename(again / "renamed")
    moved = read(again / "renamed").header["id"]
    open_study(again / "renamed", **own).close()
    assert (read(again / "renamed").header["id"], read(again / "renamed").name) == (moved, "renamed")


def test_a_valid_adapter_at_a_recorded_path_is_not_handed_out(tmp_path: Path) -> None:
    run, _ = trained(run_of("tiny-moe", some(MOE)), str(tmp_path / "elsewhere"))
    study = write_study(tmp_path / "s", [run])
    for reason in ("is gone", f"{run.digest} is a link that leads out of the study folder"):
        with pytest.raises(StudyError, match=reason):
            list(adapter_export.write(*parse_words([str(study), f"to={tmp_path / 'out'}"])))
        (study / "adapters").mkdir(exist_ok=True)
        if not (study / "adapters" / run.digest).is_symlink():
            (study / "adapters" / run.digest).symlink_to(tmp_path / "elsewhere")
    (study / "adapters" / run.digest).unlink()
    shutil.copytree(tmp_path / "elsewhere", study / "adapters" / run.digest)
    assert list(adapter_export.write(*parse_words([str(study), f"to={tmp_path / 'out'}"])))
    weights = study / "adapters" / run.digest / "adapter.safetensors"
    weights.unlink()
    weights.symlink_to(tmp_path / "elsewhere" / "adapter.safetensors")
    with pytest.raises(StudyError, match=r"adapter\.safetensors is a link that leads out of the study folder"):
        list(adapter_export.write(*parse_words([str(study), f"to={tmp_path / 'more'}"])))


@pytest.mark.parametrize("storage", ["", "file://"])
def test_workers_files_are_deleted_in_the_studys_own_place_alone(storage: str, tmp_path: Path, sentinel: Path) -> None:
    store = f"file://{tmp_path / 'store'}" if storage else str(tmp_path)
    base = tmp_path / "store" if storage else tmp_path
    place = f"{store}/s" if storage else ""
    digest, before = outcome().digest, contents(sentinel)
    for study in ("s", "other"):
        for kind in ("adapters", "checkpoints"):
            (base / study / kind / digest).mkdir(parents=True)
    with open_study(tmp_path / "s", place=place) as records:
        assert records.has_adapter(digest)
        records.drop_adapter(digest)
        records.drop_checkpoint(digest)
        records.drop_ray_notes()
        assert not records.has_adapter(digest)
        assert sorted(str(path.relative_to(base)) for path in base.rglob(digest)) == [
            f"other/adapters/{digest}",
            f"other/checkpoints/{digest}",
            *([] if storage else [f"precious/{digest}"]),
        ]
        for name in ("../../precious", "..", "", "/", digest.upper()):
            with pytest.raises(ValueError, match="16 hex digits"):
                records.drop_adapter(name)
        if not storage:  # put there while the study runs
            (base / "s" / "adapters" / digest).symlink_to(sentinel)
            records.drop_adapter(digest)
            assert not os.path.lexists(base / "s" / "adapters" / digest)
            (base / "s" / "checkpoints").rmdir()
            (base / "s" / "checkpoints").symlink_to(sentinel)
            with pytest.raises(StudyError, match="checkpoints is a link that leads out"):
                records.drop_checkpoint(digest)
    assert contents(sentinel) == before


# --- links

LINKS = {
    "outcomes.jsonl": "outcomes.jsonl",
    "study.json": "adapter.json",
    "untrained.json": "adapter.json",
    "evaluations.jsonl": "adapter.json",
    ".lock": "adapter.json",
    ".ray": "deep",
    "adapters": ".",
    f"adapters/{outcome().digest}": outcome().digest,
    "adapters/0123456789abcdef/adapter.json": "adapter.json",
    "checkpoints": ".",
    f"checkpoints/{outcome().digest}": "deep",
    "signals": "deep",
    "signals/routing.json": "adapter.json",
}


@pytest.mark.parametrize("name", LINKS)
def test_a_link_that_leads_out_is_not_followed_and_a_study_is_not_opened_over_it(
    name: str, tmp_path: Path, sentinel: Path
) -> None:
    folder = tmp_path / "s"
    with open_study(folder) as study:
        study.append_finished(outcome(), {})
    link, before = folder / name, contents(sentinel)
    link.unlink(missing_ok=True)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(sentinel / LINKS[name])
    every_use(folder)
    with pytest.raises(StudyError, match=f"{name} is a link that leads out of the study folder") as refused:
        open_study(folder)
    assert "\n" not in str(refused.value)
    assert contents(sentinel) == before
    assert link.is_symlink()
    if name in ("outcomes.jsonl", "study.json"):
        with pytest.raises(StudyError, match="leads out of the study folder"):
            read(folder)
    else:
        records = read(folder)
        assert (records.untrained, records.signals, len(records.finished)) == (None, {}, 1)


def test_links_of_report_files_are_replaced_and_links_to_the_study_are_fine(tmp_path: Path, sentinel: Path) -> None:
    folder, before = tmp_path / "real" / "s", contents(sentinel)
    with open_study(folder) as study:
        fill(study)
    for name in report.FILES:
        (folder / name).symlink_to(sentinel / "adapter.json")
        (folder / f".{name}.{os.getpid()}").symlink_to(sentinel / "adapter.json")
    report.write(folder)
    assert not any((folder / name).is_symlink() for name in report.FILES)
    assert contents(sentinel) == before
    (folder / "adapters.2").mkdir()
    (folder / "adapters").symlink_to("adapters.2")
    (tmp_path / "s").symlink_to(folder)
    open_study(tmp_path / "s").close()


def test_an_evaluation_is_not_written_through_a_link_or_into_a_pipe(tmp_path: Path, sentinel: Path) -> None:
    folder, before = tmp_path / "s", contents(sentinel)
    folder.mkdir()
    for number in range(2):
        append_line(f"{number}", folder, EVALUATIONS)
    assert (folder / EVALUATIONS).read_text() == "0\n1\n"
    for place in ("adapter.json", "new.json"):
        (folder / EVALUATIONS).unlink()
        (folder / EVALUATIONS).symlink_to(sentinel / place)
        with pytest.raises(StudyError, match="leads out of the study folder"):
            append_line("x", folder, EVALUATIONS)
    (folder / EVALUATIONS).unlink()
    os.mkfifo(folder / EVALUATIONS)
    with pytest.raises(StudyError, match="is no plain file"):
        append_line("x", folder, EVALUATIONS)
    assert contents(sentinel) == before


def test_a_pipe_is_no_file_to_wait_for(tmp_path: Path) -> None:
    open_study(tmp_path / "s").close()
    (tmp_path / "s" / LINES).unlink()
    os.mkfifo(tmp_path / "s" / LINES)
    for attempt in (lambda: read(tmp_path / "s"), lambda: open_study(tmp_path / "s")):
        with pytest.raises(StudyError, match="is no plain file"):
            attempt()


# --- headers

HEADERS: dict[str, object] = {
    "id": "../../precious",
    "name": "../precious",
    "started": 5,
    "resumed": None,
    "config": [],
    "identity": {"recipe": {"rank": {"a": 1}}},
    "command": {"rm": "-rf"},
    "shape": {"name": "m", "num_layers": 10**12, "modules": []},
    "versions": {"torch": 2},
    "table": {"published": [{"row": 1}], "comparisons": []},
    "contents": {"weights": 5},
    "inode": "5",
}
FURTHER: list[tuple[str, object]] = [
    *HEADERS.items(),
    ("name", ".."),
    ("name", "a\nb"),
    ("name", "\ud800"),
    ("id", None),
    ("resumed", [1]),
    ("config", {"trials": "many"}),
    ("config", {"max_trainable_params": [1]}),
    ("config", {"seed": 10**400}),
    ("config", {"storage": 1e5}),
    ("shape", {"name": "m", "num_layers": 1, "modules": [{"path": "p", "layer": 7}]}),
    ("shape", "small"),
    ("contents", None),
    ("contents", {"a\nb": "1"}),
    ("contents", {"a": "1\n2"}),
    ("contents", [1]),
    ("command", None),
    ("versions", None),
    ("config", None),
    ("identity", None),
    ("shape", None),
    ("started", None),
    ("inode", 1e300),
    ("table", None),
    ("table", {"published": []}),
    ("config", {"model": 5}),
    ("config", {"task": 5}),
    ("identity", {"dtype": 5}),
]


@pytest.mark.parametrize(("field", "value"), FURTHER)
def test_a_field_of_the_header_that_is_none_is_one_line(
    field: str, value: object, tmp_path: Path, sentinel: Path
) -> None:
    folder, before = tmp_path / "s", contents(sentinel)
    with open_study(folder) as study:
        study.append_finished(outcome(), {})
    header = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps(header | {field: value}))
    for attempt in (lambda: read(folder), lambda: open_study(folder)):
        with pytest.raises(StudyError, match=r"study\.json is damaged") as refused:
            attempt()
        assert "\n" not in str(refused.value)
    every_use(folder)
    assert contents(sentinel) == before


def test_a_deep_header_is_one_line(tmp_path: Path) -> None:
    open_study(tmp_path / "s").close()
    (tmp_path / "s" / "study.json").write_text("[" * DEEP + "]" * DEEP)
    with pytest.raises(StudyError, match=r"study\.json is damaged"):
        read(tmp_path / "s")


@pytest.mark.parametrize("text", ["null", "[]", '{"accuracy": "x", "stderr": 0}', '{"accuracy": 0.5}', "[" * DEEP])
def test_a_damaged_evaluation_of_the_base_and_damaged_signals_are_left_out(text: str, tmp_path: Path) -> None:
    with open_study(tmp_path / "s") as study:
        fill(study)
    (tmp_path / "s" / "untrained.json").write_text(text)
    (tmp_path / "s" / "signals").mkdir()
    (tmp_path / "s" / "signals" / "routing.json").write_text(text)
    (tmp_path / "s" / "signals" / "spectrum.json").write_text(
        '{"kind": "spectrum", "axis": "a", "unit": "1", "provenance": {}, "rows": {"m": {"hill": [NaN]}}}'
    )
    records = read(tmp_path / "s")
    assert records.untrained is None
    assert records.signals == {}
    assert len(records.problems) == 3
    every_use(tmp_path / "s")


def test_a_storage_that_climbs_is_not_followed(tmp_path: Path) -> None:
    config = {"storage": "file:///srv/store/../../home", "model": "tiny-moe", "task": "t"}
    with StudyFolder.open(tmp_path / "s", config=config, identity={}, shape=moe_shape()) as study:
        study.append_finished(outcome(), {})
    records = read(tmp_path / "s")
    assert records.place == str(tmp_path / "s")
    assert records.adapter_of(outcome()) is None
