"""The command that shows what each allocator would do: answers, views, and one line for what cannot be answered."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocators import show, sieve
from allocators.core import plugins
from allocators.core.shapes import shape_of
from allocators.core.types import ExpertCounts, ExpertSelection, ModelShape, ModuleShape, Signal
from allocators.signals.cache import cached
from tests.allocators.models import dense_shape, moe_shape, routing

ROOT = Path(__file__).parents[2]
CONFIG = {"model_type": "olmoe", "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 3, "num_experts": 8}
CONFIG |= {"num_attention_heads": 4}
LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 4}
LLAMA |= {"num_attention_heads": 4}


@pytest.fixture
def model(tmp_path) -> str:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path / "model")


@pytest.fixture
def signal(tmp_path, model) -> str:
    measured = routing(shape_of(CONFIG, name="x"))
    measured = Signal("routing", measured.rows, "expert", "tokens", {"model": model, "samples": 4, "task": "t"})
    cached("routing", measured.provenance, folder=tmp_path, measure=lambda: measured)
    return str(next(tmp_path.glob("*.json")))


@pytest.fixture
def dense(tmp_path) -> str:
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text(json.dumps(LLAMA))
    return str(tmp_path / "dense")


def output(capsys, *words: str) -> str:
    code = show.main(words)
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def refusal(capsys, *words: str) -> str:
    assert show.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_a_signal_file_alone_answers_for_every_moe_allocator(capsys, signal):
    text = output(capsys, f"signal={signal}", "rank=4")
    shape = shape_of(CONFIG, name="x")
    for name in plugins.names("allocators"):
        assert (f"│ {name} " in text) == plugins.fits(plugins.load("allocators", name), shape), name
    hot = sieve.allocate(routing(shape), shape)
    assert f"{hot.trainable_params(shape, rank=4):,}" in text
    assert "2×3" in text  # a quarter of eight experts in each of three layers
    assert "100% (100%–100%)" in text
    assert "rank correlation of routing.count and routing.mass: 1.00" in text  # masses are half the counts
    assert "layer 2 " in text


def test_smaller_before_larger(capsys, signal):
    text = output(capsys, f"signal={signal}")
    order = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    assert order[0] == "none"
    assert order[-1] == "all"


def test_knobs_go_to_whoever_has_them_and_by_name_to_one(capsys, signal):
    text = output(capsys, f"signal={signal}", "allocator=sieve,greedy,esft", "fraction=0.5", "greedy.fraction=1")
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert "fraction=0.5" in rows["sieve"]
    assert " 4×3 " in rows["sieve"]
    assert "fraction=1" in rows["greedy"]
    assert " 8×3 " in rows["greedy"]
    assert "fraction" not in rows["esft"]


def test_an_impossible_allocation_is_a_row_with_the_reason(capsys, signal):
    text = " ".join(output(capsys, f"signal={signal}", "fraction=0.1").replace("│", " ").split())
    assert "no expert:" in text
    assert "raise fraction" in text


def test_a_single_allocator_is_drawn(capsys, signal):
    text = output(capsys, f"signal={signal}", "allocator=sieve")
    drawn = text.split("sieve: experts\n")[1].splitlines()[:3]
    assert [line.count("█") for line in drawn] == [2 * 2] * 3  # two experts a layer, two characters each


def test_a_dense_model(capsys, dense):
    text = output(capsys, f"model={dense}", "allocator=random", "total_experts=4")
    assert "1×4" in text
    assert "random: experts" in text


def test_views_hold_every_panel(capsys, signal, tmp_path):
    page, picture = tmp_path / "new" / "show.html", tmp_path / "show.png"
    output(capsys, f"signal={signal}", f"html={page}", f"png={picture}")
    text = page.read_text(encoding="utf-8")
    assert text.count("<h2>") == 2 + len(plugins.fitting(shape_of(CONFIG, name="x")))  # count, mass, each allocator
    assert "http" not in text  # self-contained
    assert "<script" not in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_help_names_every_key_allocator_and_knob(capsys):
    text = output(capsys, "help")
    assert all(f"  {f.name}" in text for f in fields(show.ShowConfig))
    for name in plugins.names("allocators"):
        assert f"  {name} " in text
        for knob in plugins.knobs_of(plugins.load("allocators", name)):
            assert f"{knob}=" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["modle=tiny-moe"], "unknown key 'modle'.*did you mean 'model'"),
        (["fractoin=0.5"], "unknown key 'fractoin'.*did you mean 'fraction'"),
        (["allocator=seive"], "unknown allocator 'seive'.*did you mean 'sieve'"),
        (["sieve.fractoin=0.5"], "unknown knob of sieve 'fractoin'.*did you mean 'fraction'"),
        (["seive.fraction=0.5"], "'seive.fraction' is for 'seive'.*did you mean 'sieve'"),
        (["sieve"], "'sieve' is not key=value"),
        (["rank=0"], "rank must be a whole number of at least 1, got '0'"),
        (["rank=high"], "rank must be a whole number"),
        (["samples=-3"], "samples must be a whole number"),
        (["model=no-such-model"], "unknown model 'no-such-model'"),
        (["model={dense}", "allocator=sieve"], "sieve answers for an MoE model, and .* has no routed experts"),
        (["allocator=sieve", "fraction=7"], "sieve: fraction must be above 0 and at most 1, got 7"),
        (["signal=nowhere.json"], "signal file 'nowhere.json' cannot be read: No such file"),
        (["signal={model}/config.json"], "is damaged"),
        (["html={model}/config.json/page.html"], "cannot be written"),
        (["plugins=nowhere.py"], "no such file"),
    ],
)
def test_what_cannot_be_answered_is_one_line(capsys, signal, model, dense, words, message):
    words = [word.format(model=model, dense=dense) for word in words]
    if not any(word.startswith(("signal=", "model=")) for word in words):
        words.append(f"signal={signal}")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(refusal(capsys, *words))


def test_a_signal_of_another_model_is_refused(capsys, signal, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(CONFIG | {"num_experts": 4}))
    assert "measured on another model" in refusal(capsys, f"signal={signal}", f"model={tmp_path / 'other'}")


def test_errors_and_help_load_nothing_heavy():
    heavy = ("torch", "numpy", "transformers", "rich", "matplotlib", "datasets", "lm_eval", "ray")
    code = (
        "import sys\nfrom allocators.show import main\n"
        "codes = [main(['help']), main(['allocator=seive']), main(['modle=x'])]\n"
        f"print(codes, [name for name in {heavy!r} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[0, 2, 2] []"


def test_a_user_plugin_is_shown_with_the_others(capsys, signal, tmp_path, monkeypatch):
    monkeypatch.setattr(plugins, "_added", {"allocators": {}, "spaces": {}})
    file = tmp_path / "first_two.py"
    file.write_text(
        "from allocators.core.types import ExpertSelection\nNEEDS, BASE, FIXED_COST = None, 'moe', True\n"
        "def allocate(signal, shape):\n    return ExpertSelection({n: (0, 1) for n in shape.moe_layers})\n"
    )
    assert "│ first_two " in output(capsys, f"signal={signal}", f"plugins={file}")


# --- what the views are made of ---------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_runs_say_every_number(numbers):
    said = [part.partition("×") for part in show.in_runs(numbers).split()]
    assert [int(n) for n, _, times in said for _ in range(int(times or 1))] == numbers


def test_by_layer_is_the_papers_count_on_a_dense_base():
    shape = dense_shape(layers=2)
    counts = ExpertCounts({m.path: 3 if m.layer else 2 for m in shape.modules})
    assert show.per_layer(counts, shape) == [2, 3]
    only_q = ExpertCounts({"model.layers.0.self_attn.q_proj": 7})
    assert show.per_layer(only_q, shape) == [1, 0]  # seven experts over seven modules


@given(st.integers(1, 600), st.integers(60, 200))
def test_a_heat_map_fits_the_terminal(columns, width):
    values = tuple(float(i + 1) for i in range(columns))
    panel = show.Panel("p", ("layer 10",), tuple(map(str, range(columns))), (values,), ("top quarter 44%",))
    (line,) = show._terminal_lines(panel, width)
    assert len(line.plain) <= width
    assert "█" in line.plain


def test_panels_of_signals_by_layer_and_by_module():
    shape = moe_shape(layers=2, experts=4)
    count, mass = show.signal_panels(routing(shape, {0: [1, 3, 0, 0], 1: [1, 1, 1, 1]}), shape)
    assert count.values == ((0.25, 0.75, 0, 0), (0.25, 0.25, 0.25, 0.25))
    assert count.beside == ("top quarter 75%", "top quarter 25%")
    assert mass.title.startswith("routing: mass")
    dense = dense_shape(layers=2)
    rows = {m.path: {"hill": (float(m.layer + len(m.name)),)} for m in dense.modules}
    (hill,) = show.signal_panels(Signal("spectrum", rows, "module", "1", {}), dense)
    assert hill.columns == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert hill.values[1][0] == 1 + len("q_proj")
    assert (hill.level(hill.lowest), hill.level(max(map(max, hill.values)))) == (0, 1)


def test_an_empty_choice_is_drawn_empty():
    shape = moe_shape(layers=2, experts=4)
    panel = show.allocation_panel(show.Row("none", {}, ExpertSelection({})), shape)
    assert {panel.level(v) for row in panel.values for v in row} == {0.0}


def test_rank_correlation_by_hand():
    """x = 1 2 3 4, y = 1 3 2 4: one neighbouring swap of four, 1 − 6·2/(4·15) = 0.8; z runs against x."""
    rows = {"0": {"x": (1, 2, 3, 4), "y": (10, 30, 20, 40), "z": (9, 7, 5, 1), "flat": (2, 2, 2, 2)}}
    found = {(a, b): v for a, b, v in show.correlations({"s": Signal("routing", rows, "expert", "1", {})})}
    assert found[("routing.x", "routing.y")] == pytest.approx(0.8)
    assert found[("routing.x", "routing.z")] == pytest.approx(-1)
    assert not any("flat" in key for pair in found for key in pair)
    assert show._ranks([5, 1, 5, 7]) == [2.5, 1, 2.5, 4]


def test_signals_about_other_things_are_not_correlated():
    by_layer = Signal("routing", {"0": {"count": (1, 2)}}, "expert", "1", {})
    by_module = Signal("spectrum", {"m": {"hill": (1,)}, "n": {"hill": (2,)}}, "module", "1", {})
    same = Signal("sensitivity", {"m": {"s": (4,)}, "n": {"s": (3,)}}, "module", "1", {})
    signals = {s.kind: s for s in (by_layer, by_module, same)}
    assert show.correlations(signals) == [("sensitivity.s", "spectrum.hill", pytest.approx(-1))]


def test_layers_without_experts_are_left_out():
    shape = moe_shape(layers=3, experts=4, dense_first=1)
    panel = show.allocation_panel(show.Row("x", {}, ExpertSelection({2: (1,)})), shape)
    assert panel.lines == ("layer 1", "layer 2")
    assert panel.values == ((0, 0, 0, 0), (0, 1, 0, 0))


def test_a_model_with_partial_layers_keeps_columns_aligned():
    modules = tuple(ModuleShape(f"model.layers.{n}.mlp.{m}", n, 4, 4) for n, m in itertools.product((0, 1), "ab"))
    panel = show.allocation_panel(
        show.Row("x", {}, ExpertCounts({"model.layers.1.mlp.b": 3})), ModelShape("m", modules, 2)
    )
    assert panel.columns == ("a", "b")
    assert panel.values == ((0, 0), (0, 3))


# --- measured on a model ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_end_to_end_on_the_embedded_model(tmp_path):
    """Measures once, answers from the cache the second time, without loading the model again."""
    rows = [{"question": word, "choices": [word[::-1], word], "label": 0} for word in ("abc", "bcda", "edcba")]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(
        "task: reversed\ndataset_path: json\n"
        "dataset_kwargs:\n  data_files: {train: train.jsonl, test: test.jsonl}\n"
        "training_split: train\ntest_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{question}} ="\ndoc_to_choice: "{{choices}}"\ndoc_to_target: label\n'
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    words = ["model=tiny-moe", f"task={tmp_path / 'task.yaml'}", f"cache={tmp_path}", "samples=3"]
    command = [sys.executable, "-m", "allocators.show", *words]
    first, second = (subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True) for _ in range(2))
    assert "loading tiny-moe" in first.stderr
    assert "loading" not in second.stderr
    assert len(list(tmp_path.glob("routing-*.json"))) == 1
    table = [line for line in first.stdout.splitlines() if line.startswith("│")]
    assert table == [line for line in second.stdout.splitlines() if line.startswith("│")]
    assert any("sieve" in line for line in table)
