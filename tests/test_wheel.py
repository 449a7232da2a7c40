"""What is installed is whole: a wheel built from the sources, installed elsewhere, answers without the sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

SOURCES = ("allocators", "lora_expert_search", "search", "spaces", "trainers", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel holds. Built from a copy: setuptools would reuse what an earlier build left."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "sources"
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(copy)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    install = [*pip, "install", "--no-deps", "--no-index", "--no-compile", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return site


def python(site: Path, *words: str) -> str:
    """What Python prints with the installed packages alone, far from the sources."""
    environment = os.environ | {"PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, *words], cwd=site.parent, env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_the_packages_come_from_the_wheel(installed: Path) -> None:
    names = ", ".join(SOURCES[:5])
    code = f"import {names}; print(*(package.__path__[0] for package in ({names})))"
    assert all(Path(path).is_relative_to(installed) for path in python(installed, "-c", code).split())


def test_help_answers(installed: Path) -> None:
    told = python(installed, "-m", "search.run", "help")
    assert "usage: python -m search.run" in told
    assert "sieve_ablation" in told


@pytest.mark.parametrize("words", [("space=sieve",), ("space=dense", "model=tiny-dense"), ("replay=tiny-moe",)])
def test_models_tasks_and_tables_are_in_it(installed: Path, words: tuple[str, ...]) -> None:
    assert "4 points, nothing is trained" in python(installed, "-m", "search.run", *words, "trials=4", "dry_run=true")


def test_no_file_is_missing(installed: Path) -> None:
    for package in SOURCES[:5]:
        sources = {
            f.relative_to(ROOT) for f in (ROOT / package).rglob("*") if f.is_file() and "__pycache__" not in f.parts
        }
        assert not {file for file in sources if not (installed / file).is_file()}
