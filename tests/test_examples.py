"""The examples of the docs run as they are.

python -m pytest tests/test_examples.py
"""

from __future__ import annotations

import ast
import json
import runpy
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

from tests import ROOT

EXAMPLES = ROOT / "docs" / "examples"


def run_cell(source: str, space: dict[str, Any]) -> Any:
    """Runs a cell; gives the value of its last line, as a notebook shows it."""
    tree = ast.parse(source)
    last = tree.body[-1]
    if not isinstance(last, ast.Expr):
        return exec(compile(tree, "cell", "exec"), space)
    exec(compile(ast.Module(tree.body[:-1], []), "cell", "exec"), space)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), space)


def test_every_cell_of_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mpl.use("agg")
    notebook = json.loads((EXAMPLES / "search.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    space: dict[str, Any] = {}
    shown = [run_cell(cell, space) for cell in cells]
    assert len(space["study"].points) >= 10  # a point may be asked for twice
    assert "iframe" in shown[1]._repr_html_()
    assert len(space["study"].front) >= 2
    assert len(space["short"].points) == 2
    assert (tmp_path / "winner" / "adapter_model.safetensors").is_file()
    assert shown[-1] == 16


def test_a_rule_works_inside_the_trainer_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    losses = runpy.run_path(str(EXAMPLES / "own_trainer.py"))["main"](24)
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.5


def test_a_rule_works_inside_the_trainer_of_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="pip install trl: it is no dependency of this package")
    monkeypatch.chdir(tmp_path)
    losses = runpy.run_path(str(EXAMPLES / "sft_trainer.py"))["main"](24)
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.5
