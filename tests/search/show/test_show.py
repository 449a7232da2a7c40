"""The command that shows what each allocator would do: answers, views, and one line for what cannot be answered."""

from __future__ import annotations

import itertools
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocators import lora_smoe, sieve, signals, uniform_ranks
from allocators.core import plugins
from allocators.core.layers import layer_values
from allocators.core.shapes import shape_from_config
from allocators.core.types import ExpertCounts, ExpertSelection, ModelShape, ModuleShape, Signal
from allocators.signals.cache import cached
from search.show import __main__ as show
from search.show import panels, ranks, terminal, views
from search.show.config import ShowConfig
from search.show.source import Source
from tests import ROOT
from tests.allocators.models import dense_shape, moe_shape, routing
from tests.trainers import reference
from tests.trainers.conftest import char_tokenizer
from trainers import models

CONFIG = {"model_type": "olmoe", "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 3, "num_experts": 8}
CONFIG |= {"num_attention_heads": 4}
LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 4}
LLAMA |= {"num_attention_heads": 4}


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path / "model")


@pytest.fixture
def signal(tmp_path: Path, model: str) -> str:
    measured = routing(shape_from_config(CONFIG, name="x"))
    measured = Signal("routing", measured.rows, "expert", "tokens", {"model": model, "samples": 4, "task": "t"})
    cached("routing", measured.provenance, folder=tmp_path, measure=lambda: measured)
    return str(next(tmp_path.glob("*.json")))


@pytest.fixture
def dense(tmp_path: Path) -> str:
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text(json.dumps(LLAMA))
    return str(tmp_path / "dense")


def output(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    code = show.main(words)
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert show.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_a_signal_file_alone_answers_for_every_moe_allocator(capsys: pytest.CaptureFixture[str], signal: str) -> None:
    text = output(capsys, f"signal={signal}", "rank=4")
    shape = shape_from_config(CONFIG, name="x")
    for name in plugins.names("allocators"):
        module = plugins.load("allocators", name)
        assert (f"│ {name} " in text) == (plugins.fits(module, shape) and plugins.gives(module) == "experts"), name
    hot = sieve.allocate(routing(shape), shape)
    assert f"{hot.trainable_params(shape, rank=4):,}" in text
    assert "2×3" in text  # a quarter of eight experts in each of three layers
    assert "100% (100%–100%)" in text
    assert "rank correlation (Spearman) of signals, by expert" in text
    assert "2 routing.mass    1.00" in text  # masses are half the counts
    assert "layer 2 " in text


def test_smaller_before_larger(capsys: pytest.CaptureFixture[str], signal: str) -> None:
    text = output(capsys, f"signal={signal}")
    order = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    assert order[0] == "none"
    assert order[-1] == "all"


def test_knobs_go_to_whoever_has_them_and_by_name_to_one(capsys: pytest.CaptureFixture[str], signal: str) -> None:
    text = output(capsys, f"signal={signal}", "allocator=sieve,greedy,esft", "fraction=0.5", "greedy.fraction=1")
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert "fraction=0.5" in rows["sieve"]
    assert " 4×3 " in rows["sieve"]
    assert "fraction=1" in rows["greedy"]
    assert " 8×3 " in rows["greedy"]
    assert "fraction" not in rows["esft"]


def test_an_impossible_allocation_is_a_row_with_the_reason(capsys: pytest.CaptureFixture[str], signal: str) -> None:
    text = " ".join(output(capsys, f"signal={signal}", "fraction=0.1").replace("│", " ").split())
    assert "no expert:" in text
    assert "raise fraction" in text


def test_a_single_allocator_is_drawn(capsys: pytest.CaptureFixture[str], signal: str) -> None:
    text = output(capsys, f"signal={signal}", "allocator=sieve")
    drawn = text.split("experts that are adapted; a column for each of 8 experts\n         sieve\n")[1].splitlines()[:3]
    assert [line.count("█") for line in drawn] == [2 * 2] * 3  # two experts a layer, two characters each


def test_rules_for_ranks_are_shown_at_equal_parameters(capsys: pytest.CaptureFixture[str], signal: str) -> None:
    text = output(capsys, f"signal={signal}", "gives=ranks", "rank=2")
    shape = shape_from_config(CONFIG, name="x")
    budget = uniform_ranks.allocate(None, shape, rank=2).trainable_params(shape)
    assert "total rank" in text
    assert "of rank 2 everywhere" in text
    assert re.search(rf"uniform_ranks .* {budget:,} .* 100\.0%", text)
    assert "random_ranks" in text
    assert "│ sieve" not in text
    assert "choose from all, experts, ranks" in refusal(capsys, f"signal={signal}", "gives=rank")


def test_several_allocators_are_drawn_where_two_have_room(
    capsys: pytest.CaptureFixture[str], signal: str, tmp_path: Path, model: str
) -> None:
    assert "experts that are adapted" in output(capsys, f"signal={signal}", "allocator=sieve,esft")
    wide = Path(model) / "config.json"
    wide.write_text(json.dumps(CONFIG | {"num_experts": 60}))
    counts = routing(shape_from_config(json.loads(wide.read_text()), name="x"))
    measured = Signal("routing", counts.rows, "expert", "tokens", {"model": model, "samples": 5, "task": "t"})
    cached("routing", measured.provenance, folder=tmp_path / "wide", measure=lambda: measured)
    file = next((tmp_path / "wide").glob("*.json"))
    assert "experts that are adapted" not in output(capsys, f"signal={file}", "allocator=sieve,esft")


def test_views_hold_every_panel(capsys: pytest.CaptureFixture[str], signal: str, tmp_path: Path) -> None:
    page, picture = tmp_path / "new" / "show.html", tmp_path / "show.png"
    output(capsys, f"signal={signal}", f"html={page}", f"png={picture}")
    text = page.read_text(encoding="utf-8")
    fitting = sum(
        plugins.gives(plugins.load("allocators", name)) == "experts"
        for name in plugins.fitting(shape_from_config(CONFIG, name="x"))
    )
    assert text.count("<div class='p'>") == 2 + fitting  # count, mass, each allocator
    assert text.count("rank correlation (Spearman)") == 2
    assert "http" not in text  # self-contained
    assert "<script" not in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_help_names_every_key_allocator_and_knob(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "help")
    assert all(f"  {f.name}" in text for f in fields(ShowConfig))
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
        (["rank=0"], "rank must be at least 1, got 0"),
        (["rank=high"], "rank must be a whole number"),
        (["samples=-3"], "samples must be at least 1, got -3"),
        (["model=no-such-model"], "unknown model 'no-such-model'"),
        (["model={dense}", "allocator=sieve"], "sieve answers for an MoE model, and .* has no routed experts"),
        (["allocator=sieve", "fraction=7"], "sieve: fraction must be above 0 and at most 1, got 7"),
        (["sieve.fraction=much"], "fraction of sieve must be a number, got 'much'"),
        (["greedy.total_experts=2.5"], "total_experts of greedy must be a whole number, got '2.5'"),
        (["greedy.total_experts=true"], "total_experts of greedy must be a whole number, got 'True'"),
        (
            ["sieve.score=cuont"],
            "choose from count, ean, mass, reap; did you mean 'count'",
        ),
        (["signal=nowhere.json"], "signal file 'nowhere.json' cannot be read: No such file"),
        (["signal={model}/config.json"], "is damaged"),
        (["html={model}/config.json/page.html"], "cannot be written"),
        (["plugins=nowhere.py"], "no such file"),
    ],
)
def test_what_cannot_be_answered_is_one_line(
    capsys: pytest.CaptureFixture[str], signal: str, model: str, dense: str, words: list[str], message: str
) -> None:
    words = [word.format(model=model, dense=dense) for word in words]
    if not any(word.startswith(("signal=", "model=")) for word in words):
        words.append(f"signal={signal}")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(refusal(capsys, *words))


# --- dense models -----------------------------------------------------------------------------------------------------


def layered(shape: ModelShape, values: Sequence[Sequence[float]]) -> dict[str, tuple[float, ...]]:
    """A value of every module: its layer's, from the list of each data set, times 1 + its place in the layer / 100."""
    at = {m.path: i for i, m in enumerate(shape.modules)}
    return {m.path: tuple(v[m.layer] * (1 + at[m.path] % 7 / 100) for v in values) for m in shape.modules}


@pytest.fixture
def dense_files(tmp_path: Path, dense: str) -> list[str]:
    """A spectrum and two data sets' sensitivities of one model, as files."""
    shape = shape_from_config(LLAMA, name=dense)
    common = {"model": dense, "weights": "sha", "code": 1}
    hill = {path: {"hill": v, "stable_rank": (3.0,)} for path, v in layered(shape, [[2, 5, 3, 4]]).items()}
    kept = [Signal("spectrum", hill, "module", "1", common)]
    for name, values in (("a", [1, 10, 100, 1000]), ("b", [40, 30, 20, 10])):
        provenance = common | {"samples": 8, "task": name, "datasets": [{"task": name, "data": name}]}
        rows = {path: {"sum_sq_grad": v} for path, v in layered(shape, [values]).items()}
        kept.append(Signal("sensitivity", rows, "dataset", "1", provenance))
    for number, signal in enumerate(kept):
        cached(signal.kind, signal.provenance, folder=tmp_path / str(number), measure=lambda: signal)  # noqa: B023 - called at once
    return [str(next((tmp_path / str(number)).glob("*.json"))) for number in range(len(kept))]


def table(text: str) -> dict[str, list[str]]:
    """Cells of the table by allocator."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    return {row[0]: row[1:] for row in rows if row[0]}


@pytest.mark.parametrize("total", [4, 9, 20, 33])
def test_all_that_take_a_total_cost_exactly_the_budget(
    capsys: pytest.CaptureFixture[str], dense_files: list[str], total: int
) -> None:
    """A layer of one expert, rank 2: q, k, v, o 2·(16+16) + 16 = 80, gate, up 2·(16+8) + 16 = 64, down 56: 504."""
    rows = table(output(capsys, f"signal={','.join(dense_files)}", f"total_experts={total}", "rank=2"))
    assert {*rows} == {"uniform", "random", "mola", "alphalora", "sensitivity", "lora_smoe"}
    for name in ("uniform", "random", "alphalora", "sensitivity"):
        assert rows[name][-2:] == [f"{504 * total:,}", "100.0%"], name
        assert rows[name][1] == str(total)
    assert rows["mola"][-2:] == [f"{504 * 20:,}", f"{20 / total:.1%}"]  # 2468 on four layers, whatever T is


def test_without_a_total_it_is_five_a_layer(capsys: pytest.CaptureFixture[str], dense: str) -> None:
    text = output(capsys, f"model={dense}", "allocator=uniform,random,mola")
    assert "of T = 20" in text
    assert {row[-1] for row in table(text).values()} == {"100.0%"}


def test_data_sets_in_several_files_vote_together(
    capsys: pytest.CaptureFixture[str], dense_files: list[str], dense: str
) -> None:
    shape = shape_from_config(LLAMA, name=dense)
    _, first, second = dense_files
    one = table(output(capsys, f"signal={first}", "allocator=lora_smoe", "retention=0.5"))
    both = table(output(capsys, f"signal={first},{second}", "allocator=lora_smoe", "retention=0.5"))
    assert one["lora_smoe"][2] == "0×2 1×2"  # the upper half of the layers, by data set a
    assert both["lora_smoe"][2] == "1×4"  # the lower half, by data set b
    rows = {path: {"sum_sq_grad": v} for path, v in layered(shape, [[1, 10, 100, 1000], [40, 30, 20, 10]]).items()}
    counts = lora_smoe.allocate(Signal("sensitivity", rows, "dataset", "1", {}), shape, retention=0.5)
    assert both["lora_smoe"][3] == f"{counts.trainable_params(shape, rank=8):,}"


def test_signals_and_allocators_of_a_dense_model_are_compared_by_layer(
    capsys: pytest.CaptureFixture[str], dense_files: list[str]
) -> None:
    text = output(capsys, f"signal={','.join(dense_files[:2])}", "sensitivity.beta=0.5")
    signals, allocators = text.split("rank correlation (Spearman) of ")[1:]
    assert signals.startswith("signals, by layer\n")
    # hill 2 5 3 4 against 1 10 100 1000: one way 1 4 2 3, the other 1 2 3 4: 1 − 6·(4+1+1)/(4·15) = 0.4
    assert "2 spectrum.hill             0.40\n" in signals
    assert "stable_rank" not in signals  # equal everywhere: no ranks
    assert allocators.startswith("allocators' experts by layer\n")
    assert "uniform" not in allocators
    assert "spectrum: 28 matrices, from " in text
    assert "sensitivity: 8 samples of a, from " in text


def test_heat_maps_of_a_dense_model_stand_beside_each_other(
    capsys: pytest.CaptureFixture[str], dense_files: list[str]
) -> None:
    text = output(capsys, f"signal={','.join(dense_files)}", "total_experts=4")
    lines = text.splitlines()
    heads = {line.partition(";")[0]: place for place, line in enumerate(lines)}
    begin = heads["experts that are added"]
    assert lines[begin].endswith("; columns: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj")
    names, initials, *drawn = lines[begin + 1 : begin + 7]
    assert names.split() == [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    numbers = [line.split()[2:] for line in drawn]
    columns = dict(zip(names.split(), range(len(names.split())), strict=True))
    assert initials.split().count("all") == 5  # one column stands for all modules, but for lora_smoe's
    assert initials.split().count("q") == 1
    wide = columns["lora_smoe"]
    uniform = columns["uniform"] + (6 if columns["uniform"] > wide else 0)
    assert [row[uniform] for row in numbers] == ["1"] * 4
    begin = heads["sensitivity by module"]
    assert lines[begin + 2].split()[-1] != "log"  # means of both data sets span less than two orders of magnitude


def test_views_of_a_dense_model_hold_every_panel_and_number(
    capsys: pytest.CaptureFixture[str], dense_files: list[str], tmp_path: Path
) -> None:
    page, picture = tmp_path / "show.html", tmp_path / "show.png"
    output(capsys, f"signal={','.join(dense_files)}", f"html={page}", f"png={picture}")
    text = page.read_text(encoding="utf-8")
    assert text.count("<div class='p'>") == 3 + 6  # hill, stable_rank, sum_sq_grad; six allocators
    assert text.count("title='q_proj: 5'>5</td>") == 4  # uniform, five in every layer
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["total_experts=many"], "total_experts of alphalora must be a whole number, got 'many'"),
        (["beta=steep"], "beta of alphalora must be a number, got 'steep'"),
        (["beta=null"], "beta of alphalora must be a number, got 'None'"),
        (["rounding=papper"], "unknown rounding of alphalora 'papper'.*did you mean 'paper'"),
        (["metric=hil"], "alphalora: spectrum signal has no 'hil'.*alphalora.KNOB=VALUE"),
        (["strategy=X"], "unknown strategy of lora_smoe 'X': choose from S, U"),
        (["allocator=sieve"], "sieve answers for an MoE model, and .* has no routed experts"),
        (["allocator=mola", "pattern=12345"], "mola: pattern '12345' has 5 groups"),
        (["allocator=lora_smoe", "retention=1.5"], "lora_smoe: retention must be above 0 and at most 1"),
    ],
)
def test_what_a_dense_model_cannot_answer_is_one_line(
    capsys: pytest.CaptureFixture[str], dense_files: list[str], words: list[str], message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(refusal(capsys, f"signal={','.join(dense_files)}", *words))


def test_knobs_within_the_annotations_are_let_through(
    capsys: pytest.CaptureFixture[str], dense_files: list[str]
) -> None:
    words = ["allocator=alphalora,uniform", "alphalora.beta=2", "uniform.experts_per_layer=null", "rounding=paper"]
    assert {*table(output(capsys, f"signal={dense_files[0]}", *words))} == {"alphalora", "uniform"}


def test_signal_files_that_do_not_belong_together_are_refused(
    capsys: pytest.CaptureFixture[str], dense_files: list[str], signal: str, tmp_path: Path
) -> None:
    spectrum = dense_files[0]
    assert "2 of the signal files hold spectrum" in refusal(capsys, f"signal={spectrum},{spectrum}")
    assert "the signal files are of different models" in refusal(capsys, f"signal={spectrum},{signal}")


def test_the_spectrum_of_a_folder_is_measured_once_and_loads_no_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from tests.allocators import tiny

    tiny.model("llama").save_pretrained(tmp_path / "model")
    words = (f"model={tmp_path / 'model'}", "allocator=alphalora,uniform", f"cache={tmp_path / 'signals'}")
    answers = []
    for said in ("measured in", "kept in"):
        assert show.main(words) == 0
        out, err = capsys.readouterr()
        assert f"spectrum: 21 matrices, {said}" in out
        assert "loading" not in err  # the weights are streamed
        answers.append(table(out))
    assert answers[0] == answers[1]
    assert len(list((tmp_path / "signals").glob("spectrum-*.json"))) == 1


def test_a_folder_with_config_json_alone_shows_the_rules_that_need_no_weights(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from tests.allocators import tiny

    tiny.model("olmoe").config.save_pretrained(tmp_path / "model")
    out = output(capsys, f"model={tmp_path / 'model'}", f"cache={tmp_path / 'signals'}")
    shown = table(out)
    assert "no weights in" in out
    assert {name for name, answer in shown.items() if answer[-1].isdigit() or "," in answer[-1]} == {
        "all",
        "none",
        "random",
    }
    assert "reads routing" in "".join(shown["sieve"])
    refused = refusal(capsys, f"model={tmp_path / 'model'}", "allocator=sieve")
    assert f"error: sieve: reads routing, and '{tmp_path / 'model'}' has no weights: fetch" in refused


@pytest.mark.parametrize(
    ("family", "tensor", "value", "without"),
    [
        ("llama", "model.layers.0.mlp.up_proj", 0.0, {"alphalora": "up_proj has no hill"}),
        ("llama", "model.layers.0.mlp.up_proj", float("nan"), {"alphalora": "up_proj has no hill"}),
        ("olmoe", "model.layers.1.mlp.gate", float("nan"), {"sieve": "not finite: model.layers.1.mlp.gate.weight"}),
    ],
)
def test_a_rule_that_a_matrix_makes_impossible_is_a_row_and_the_others_answer(
    family: str, tensor: str, value: float, without: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from tests.allocators import tiny

    made = reference.tiny_model(family) if family in reference.FAMILIES else tiny.model(family)
    made.get_parameter(f"{tensor}.weight").data.fill_(value)
    made.save_pretrained(tmp_path / "model")
    char_tokenizer().save_pretrained(tmp_path / "model")
    capsys.readouterr()
    ((name, reason),) = without.items()
    words = (f"model={tmp_path / 'model'}", f"cache={tmp_path}")
    rows = table(output(capsys, *words, f"allocator={name},random", f"html={tmp_path / 'a.html'}"))
    assert (rows[name][0], rows["random"][0] != "") == ("", True)
    assert reason in (tmp_path / "a.html").read_text()
    assert show.main((*words, f"allocator={name}")) == 2
    assert reason in capsys.readouterr().err.splitlines()[-1]


def test_parts_of_a_model_without_a_role_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = CONFIG | {"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention", "attention"]}
    config |= {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "num_local_experts": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    answer = output(capsys, f"model={tmp_path}", "allocator=all")
    assert "left out, as parts without a role" in answer
    assert "mamba.in_proj (1 of 3 layers), mamba.out_proj (1 of 3 layers)" in answer


def test_a_signal_of_another_model_is_refused(capsys: pytest.CaptureFixture[str], signal: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(CONFIG | {"num_experts": 4}))
    assert "measured on another model" in refusal(capsys, f"signal={signal}", f"model={tmp_path / 'other'}")


def test_errors_and_help_load_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "transformers", "rich", "matplotlib", "datasets", "lm_eval", "ray")
    code = (
        "import sys\nfrom search.show.__main__ import main\n"
        "codes = [main(['help']), main(['allocator=seive']), main(['modle=x'])]\n"
        f"print(codes, [name for name in {heavy!r} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[0, 2, 2] []"


def test_a_user_plugin_is_shown_with_the_others(
    capsys: pytest.CaptureFixture[str], signal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins, "_added", {"allocators": {}, "spaces": {}})
    file = tmp_path / "first_two.py"
    file.write_text(
        "from allocators.core.types import ExpertSelection\nNEEDS, BASE, FIXED_COST = None, 'moe', True\n"
        "def allocate(signal, shape):\n    return ExpertSelection({n: (0, 1) for n in shape.moe_layers})\n"
    )
    assert "│ first_two " in output(capsys, f"signal={signal}", f"plugins={file}")


# --- what the views are made of ---------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_runs_say_every_number(numbers: list[int]) -> None:
    said = [part.partition("×") for part in views.in_runs(numbers).split()]
    assert [int(n) for n, _, times in said for _ in range(int(times or 1))] == numbers


def test_by_layer_is_the_papers_count_on_a_dense_base() -> None:
    shape = dense_shape(layers=2)
    counts = ExpertCounts({m.path: 3 if m.layer else 2 for m in shape.modules})
    assert views.per_layer(counts, shape) == [2, 3]
    only_q = ExpertCounts({"model.layers.0.self_attn.q_proj": 7})
    assert views.per_layer(only_q, shape) == [1, 0]  # seven experts over seven modules


@given(st.lists(st.integers(1, 100), min_size=1, max_size=6), st.integers(60, 200), st.booleans(), st.booleans())
def test_heat_maps_fit_the_terminal(sizes: list[int], width: int, remark: bool, counts: bool) -> None:
    drawn = [
        panels.Panel(
            "group", f"p{i}", ("layer 10",), tuple(map(str, range(size))), (tuple(float(n + 1) for n in range(size)),),
            ("top quarter 44%",) if remark else (), counts=counts,
        )
        for i, size in enumerate(sizes)
    ]  # fmt: skip
    rows = terminal.side_by_side(drawn, width)
    assert [panel for row in rows for panel in row] == drawn
    for row in rows:
        heads, line = terminal.terminal_lines(row, width)
        assert heads.plain.split() == [panel.name for panel in row]
        assert len(heads.plain) <= width
        assert len(line.plain) <= width
        if counts and len(row[0].columns) < 10:
            assert line.plain.split()[2:][: len(row[0].columns)] == [str(n + 1) for n in range(len(row[0].columns))]


def test_colours_are_logarithmic_where_values_span_orders_of_magnitude() -> None:
    steps = panels.Panel("g", "p", ("layer 0",), ("a", "b", "c"), ((1.0, 30.0, 900.0),), lowest=1.0)
    assert [steps.level(v) for v in steps.values[0]] == pytest.approx([0, 0.5, 1])
    even = panels.Panel("g", "p", ("layer 0",), ("a", "b", "c"), ((1.0, 5.0, 9.0),), lowest=1.0)
    assert [even.level(v) for v in even.values[0]] == pytest.approx([0, 0.5, 1])
    flat = panels.Panel("g", "p", ("layer 0",), ("a", "b"), ((7.0, 7.0),), lowest=7.0)
    assert [flat.level(7.0), flat.logarithmic] == [0, False]


def test_panels_of_signals_by_layer_and_by_module() -> None:
    shape = moe_shape(layers=2, experts=4)
    count, mass = panels.signal_panels(routing(shape, {0: [1, 3, 0, 0], 1: [1, 1, 1, 1]}), shape)
    assert count.values == ((0.25, 0.75, 0, 0), (0.25, 0.25, 0.25, 0.25))
    assert count.beside == ("top quarter 75%", "top quarter 25%")
    assert mass.title == "mass: routing, share of the layer by expert"
    dense = dense_shape(layers=2)
    rows = {m.path: {"hill": (float(m.layer + len(m.name)),)} for m in dense.modules}
    (hill,) = panels.signal_panels(Signal("spectrum", rows, "module", "1", {}), dense)
    assert hill.columns == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert hill.values[1][0] == 1 + len("q_proj")
    assert (hill.level(hill.lowest), hill.level(max(map(max, hill.values)))) == (0, 1)


def test_an_empty_choice_is_drawn_empty() -> None:
    shape = moe_shape(layers=2, experts=4)
    panel = panels.allocation_panel(views.Answer("none", {}, ExpertSelection({})), shape)
    assert {panel.level(v) for row in panel.values for v in row} == {0.0}


def test_rank_correlation_by_hand() -> None:
    """x = 1 2 3 4, y = 1 3 2 4: one neighbouring swap of four, 1 − 6·2/(4·15) = 0.8; z runs against x."""
    rows = {"0": {"x": (1, 2, 3, 4), "y": (10, 30, 20, 40), "z": (9, 7, 5, 1), "flat": (2, 2, 2, 2)}}
    signal = Signal("routing", rows, "expert", "1", {})
    found = ranks.correlations(ranks.signal_columns({"routing": signal}, moe_shape(layers=1, experts=4)))
    assert found["routing.x", "routing.y"] == pytest.approx(0.8)
    assert found["routing.x", "routing.z"] == pytest.approx(-1)
    assert not any("flat" in key for pair in found for key in pair)


def ranks_of(values: list[int]) -> list[float]:
    """Ranks from 1, ties sharing their mean rank."""
    return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]


@given(st.integers(2, 12).flatmap(lambda n: st.tuples(*[st.lists(st.integers(0, 5), min_size=n, max_size=n)] * 2)))
def test_rank_correlation_is_pearson_of_ranks_that_ties_share(columns: tuple[list[int], list[int]]) -> None:
    assert ranks_of([5, 1, 5, 7]) == [2.5, 1, 2.5, 4]
    left, right = columns
    found = ranks.correlations({"a": dict(enumerate(left)), "b": dict(enumerate(right))})
    if len({*left}) == 1 or len({*right}) == 1:
        assert found == {}
    else:
        expected = statistics.correlation(ranks_of(left), ranks_of(right))
        assert found["a", "b"] == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.lists(st.floats(0.1, 10), min_size=28, max_size=28), min_size=1, max_size=3))
def test_a_layer_is_compared_by_what_allocators_read(datasets: list[list[float]]) -> None:
    shape = dense_shape(layers=4)
    rows = {m.path: {"s": tuple(d[i] for d in datasets)} for i, m in enumerate(shape.modules)}
    signal = Signal("sensitivity", rows, "dataset", "1", {})
    (column,) = ranks.signal_columns({"sensitivity": signal}, shape).values()
    assert [column[layer] for layer in range(4)] == layer_values(signal, shape, metric="s")


def test_what_is_about_other_things_is_not_correlated() -> None:
    shape = dense_shape(layers=2)
    by_expert = Signal("routing", {"0": {"count": (1, 2)}}, "expert", "1", {})
    by_module = {m.path: {"hill": (1 + m.layer,), "odd": (1,)} for m in shape.modules}
    del by_module[shape.modules[0].path]["odd"]  # a matrix without the metric: the layer has no mean
    same = Signal("sensitivity", {m.path: {"s": (4 - m.layer,)} for m in shape.modules}, "dataset", "1", {})
    signals: dict[str, Signal] = {
        s.kind: s for s in (by_expert, Signal("spectrum", by_module, "module", "1", {}), same)
    }
    found = ranks.correlations(ranks.signal_columns(signals, shape))
    assert found == {("sensitivity.s", "spectrum.hill"): pytest.approx(-1)}


def test_a_matrix_is_a_lower_triangle() -> None:
    found = {("a", "b"): 0.5, ("a", "c"): -1.0, ("b", "c"): 0.25}
    assert ranks.triangle(found) == [["", "1", "2"], ["1 a"], ["2 b", "0.50"], ["3 c", "-1.00", "0.25"]]
    assert ranks.triangle({("a", "b"): 1.0, ("c", "d"): 0.0})[-1] == ["4 d", "", "", "0.00"]


def test_experts_of_a_stack_are_drawn_by_their_projection() -> None:
    shape = moe_shape(layers=2, experts=4)
    rows = {f"{m.path}.{e}": {"s": (float(e + m.layer),)} for m in shape.of_role("expert") for e in range(4)}
    (panel,) = panels.signal_panels(Signal("sensitivity", rows, "dataset", "1", {}), shape)
    assert panel.columns == ("gate_proj", "up_proj", "down_proj")
    assert panel.values == ((1.5, 1.5, 1.5), (2.5, 2.5, 2.5))


def test_layers_without_experts_are_left_out() -> None:
    shape = moe_shape(layers=3, experts=4, dense_first=1)
    panel = panels.allocation_panel(views.Answer("x", {}, ExpertSelection({2: (1,)})), shape)
    assert panel.lines == ("layer 1", "layer 2")
    assert panel.values == ((0, 0, 0, 0), (0, 1, 0, 0))


def test_a_model_with_partial_layers_keeps_columns_aligned() -> None:
    modules = tuple(ModuleShape(f"model.layers.{n}.mlp.{m}", n, 4, 4) for n, m in itertools.product((0, 1), "ab"))
    panel = panels.allocation_panel(
        views.Answer("x", {}, ExpertCounts({"model.layers.1.mlp.b": 3})), ModelShape("m", modules, 2)
    )
    assert panel.columns == ("a", "b")
    assert panel.values == ((0, 0), (0, 3))


# --- measured on a model ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_end_to_end_on_the_embedded_model(tmp_path: Path) -> None:
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["routing", "sensitivity"])
def test_progress_counts_samples_once(tmp_path: Path, kind: str) -> None:
    config = ShowConfig(samples=20, cache=str(tmp_path))
    source = Source(config, shape_from_config(models.config_of("tiny-moe"), name="tiny-moe"))
    told = []
    source.progress = lambda *what: told.append(what)
    signals.measurement_of(kind, source).measure()
    assert {(total, what) for _, total, what in told} == {(20, "samples")}
    done = [done for done, _, _ in told]
    assert (done, done[-1]) == (sorted(set(done)), 20)


def test_a_picture_of_no_known_format_is_one_line(dense_files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    picture = Path(dense_files[0]).with_name("picture.txt")
    assert show.main([f"signal={','.join(dense_files)}", f"png={picture}"]) == 2
    err = capsys.readouterr().err
    assert "'txt' is not supported" in err
    assert err.count("error: ") == 1


def test_a_picture_is_the_file_that_was_named(dense_files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """matplotlib would write picture.png, and folder.png beside the folder."""
    folder = Path(dense_files[0]).parent / "pictures"
    folder.mkdir()
    words = f"signal={','.join(dense_files)}"
    assert show.main([words, f"png={folder / 'picture'}"]) == 0
    assert show.main([words, f"png={folder}"]) == 2
    assert "pictures is a folder: name a file in it" in capsys.readouterr().err
    assert [file.name for file in folder.iterdir()] == ["picture"]
    assert not folder.with_suffix(".png").exists()


@pytest.mark.parametrize("key", ["png", "html"])
def test_a_picture_takes_the_place_of_a_picture_alone(
    dense_files: list[str], key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    records = Path(dense_files[0]).with_name(f"outcomes.{key}")
    records.write_text('{"event": "started"}\n')
    words = [f"signal={','.join(dense_files)}", f"{key}={records}"]
    assert show.main(words) == 2
    assert "it is left as it is" in capsys.readouterr().err
    assert records.read_text() == '{"event": "started"}\n'
    records.unlink()
    assert [show.main(words), show.main(words)] == [0, 0]


def test_a_signal_of_matrices_and_layers_has_a_panel_for_each_metric() -> None:
    shape = dense_shape(layers=2)
    rows: dict[str, dict[str, tuple[float, ...]]] = {m.path: {"explained": (0.5, 0.1)} for m in shape.modules}
    rows |= {"0": {"similarity": (0.25,)}, "1": {"similarity": (0.75,)}}
    signal = Signal("representation", rows, axis="component", unit="1", provenance={})
    explained, similarity = panels.signal_panels(signal, shape)
    assert set(itertools.chain.from_iterable(explained.values)) == {0.5}, "of the components the largest"
    assert (similarity.columns, similarity.values) == (("layer",), ((0.25,), (0.75,)))
