"""Whether a ranking is stable: agreement by hand and by chance, and one line for what cannot be answered."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from search.show.stability import main, stability
from tests import ROOT


def test_stability_of_equal_samples_is_perfect_and_of_noise_is_chance() -> None:
    torch.manual_seed(0)
    truth = torch.rand(200).double()
    equal = {str(i): truth[i].expand(12) for i in range(200)}
    for row in stability(equal, sizes=[2, 6, 12], share=0.5):
        assert all(pair == pytest.approx((1.0, 1.0)) for pair in (row.nested, *row.disjoint))
    noise = {str(i): torch.rand(12).double() for i in range(200)}
    few, half, all_ = stability(noise, sizes=[2, 6, 12], share=0.5)
    assert (len(few.disjoint), len(half.disjoint), len(all_.disjoint)) == (15, 1, 0)
    assert abs(sum(s for s, _ in few.disjoint) / 15) < 0.15
    assert sum(o for _, o in few.disjoint) / 15 == pytest.approx(0.5, abs=0.05)
    assert all_.nested == pytest.approx((1.0, 1.0))


def test_spearman_by_hand() -> None:
    """Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5."""
    values = {"a": [1.0, 1.0], "b": [2.0, 5.0], "c": [2.0, 6.0], "d": [3.0, 7.0]}
    (row,) = stability({k: torch.tensor(v).double() for k, v in values.items()}, sizes=[1], share=0.5)
    assert row.disjoint[0][0] == pytest.approx(4.5 / (4.5 * 5) ** 0.5)


def test_a_wrong_request_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words, told in (
        (["sample=3"], "did you mean 'samples'"),
        (["samples=few"], "samples must be a whole number, got 'few'"),
        (["score=fischer"], "did you mean 'fisher'"),
        (["share=2"], "share between 0 and 1"),
    ):
        assert main(words) == 2
        out, err = capsys.readouterr()
        assert told in err
        assert (out, err.count("\n")) == ("", 1)
    assert main(["help"]) == 0
    assert "share (0.6)" in capsys.readouterr().out


@pytest.mark.slow
def test_one_command_answers_how_stable_the_ranking_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "stability.png"
    assert main(["model=tiny-moe", "task=tiny_cipher", "samples=8,16,32", f"plot={plot}"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[3:7] if line[:8].strip().isdigit()] == ["8", "16", "32"]
    assert plot.stat().st_size > 10_000


def test_blocks_that_all_score_the_same_have_no_ranks() -> None:
    values = {name: torch.tensor([1.0, 2.0 + number]).double() for number, name in enumerate("abc")}
    flat, whole = stability(values, sizes=[1, 2], share=0.5)
    assert math.isnan(flat.nested[0])
    assert whole.nested[0] == pytest.approx(1)


@given(st.integers(3, 12), st.integers(0, 10_000))
def test_spearman_is_pearson_of_ranks_that_ties_share(blocks: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    few = torch.randint(0, 4, (2, blocks), generator=draw).double()
    ranks = torch.stack([(row[:, None] > row).sum(1) + ((row[:, None] == row).sum(1) + 1) / 2 for row in few])
    expected = torch.corrcoef(ranks.double())[0, 1].item()
    (row,) = stability({str(i): few[:, i] for i in range(blocks)}, sizes=[1], share=0.5)
    assert row.disjoint[0][0] == pytest.approx(expected, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("door", ["allocators.signals.sensitivity", "search.show.stability"])
def test_two_doors_to_one_command(door: str) -> None:
    command = [sys.executable, "-m", door, "sample=3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "did you mean 'samples'" in done.stderr
