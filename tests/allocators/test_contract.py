"""What every allocator must keep, walked over all files of the folder: one that is added is tested without a line here.

Who may import what: tests/test_import_graph.py.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from allocators._ranks import matrices_of
from allocators.core import plugins
from allocators.core.errors import StudyError
from allocators.core.types import ExpertCounts, ExpertSelection, ModelShape, ModuleRanks, Signal, allocation_from_json
from tests import ROOT
from tests.allocators.models import dense_shape, moe_shape, routing

NAMES = plugins.names("allocators")
SHAPES = {"moe": moe_shape(layers=4, experts=8, dense_first=1), "dense": dense_shape(layers=4)}


def shapes_for(module: ModuleType) -> list[ModelShape]:
    return [shape for shape in SHAPES.values() if plugins.fits(module, shape)]


def signal_for(module: ModuleType, shape: ModelShape, *, seed: int = 0) -> Signal | None:
    """A signal the allocator reads; dense signals have every metric of their kind, one value a row."""
    if module.NEEDS is None:
        return None
    if module.NEEDS == "routing":
        return routing(shape, seed=seed)
    if module.NEEDS == "representation":
        return representation(shape, seed=seed)
    metrics = {
        "spectrum": ("hill", "alpha_hat", "stable_rank", "snr", "condition"),
        "sensitivity": ("sum_sq_grad", "weight_grad", "fisher", "hutchinson"),
    }[module.NEEDS]
    rows = {
        key: {metric: (1.0 + (31 * i + 17 * seed + len(metric)) % 7,) for metric in metrics}
        for i, key in enumerate(m.key for m in matrices_of(shape))
    }
    return Signal(module.NEEDS, rows, "module", "1", {"seed": seed})


def representation(shape: ModelShape, *, seed: int) -> Signal:
    rows = {
        m.key: {"explained": tuple(1 / (2 + c + (7 * i + seed) % 5) for c in range(64)), "feature_norm": (1 + i % 7,)}
        for i, m in enumerate(matrices_of(shape))
    }
    rows |= {str(layer): {"similarity": (1 / (1 + (layer + seed) % 3),)} for layer in range(shape.num_layers)}
    return Signal("representation", rows, "component", "1", {"seed": seed})


@pytest.mark.parametrize("name", NAMES)
class TestEveryAllocator:
    def test_declares_what_it_is(self, name: str) -> None:
        module = plugins.load("allocators", name)
        plugins.check_allocator(module)
        assert isinstance(module.FIXED_COST, bool)
        assert module.__doc__
        assert f"allocator={name}" in module.__doc__, "the docstring opens with what it is for, then how to run it"
        assert module.allocate.__doc__

    def test_every_knob_has_a_default_and_is_in_the_docstring(self, name: str) -> None:
        module = plugins.load("allocators", name)
        for knob, default in plugins.knobs_of(module).items():
            assert default is not inspect.Parameter.empty, knob
            assert knob in module.allocate.__doc__, knob

    def test_answers_with_what_its_base_needs(self, name: str) -> None:
        module = plugins.load("allocators", name)
        assert shapes_for(module)
        for shape in shapes_for(module):
            allocation = plugins.call(module, signal_for(module, shape), shape, {})
            ranks = plugins.gives(module) == "ranks"
            assert isinstance(allocation, ModuleRanks if ranks else ExpertSelection if shape.is_moe else ExpertCounts)
            allocation.check(shape)
            assert allocation_from_json(json.loads(json.dumps(allocation.to_json()))) == allocation

    def test_is_a_pure_function(self, name: str) -> None:
        module = plugins.load("allocators", name)
        for shape in shapes_for(module):
            signal = signal_for(module, shape)
            before = signal.digest if signal else None
            once, again = (plugins.call(module, signal, shape, {}) for _ in range(2))
            assert once.digest == again.digest
            assert before == (signal.digest if signal else None)

    def test_keeps_the_promise_of_a_fixed_cost(self, name: str) -> None:
        module = plugins.load("allocators", name)
        for shape in shapes_for(module):
            costs = {
                plugins.call(module, signal_for(module, shape, seed=seed), shape, {}).trainable_params(shape, rank=4)
                for seed in range(12)
            }
            assert not module.FIXED_COST or len(costs) == 1
            assert module.FIXED_COST or module.NEEDS is not None

    def test_a_misspelt_knob_is_named(self, name: str) -> None:
        module = plugins.load("allocators", name)
        shape = shapes_for(module)[0]
        with pytest.raises(StudyError, match="experts_keptt"):
            plugins.call(module, signal_for(module, shape), shape, {"experts_keptt": 1})

    def test_the_other_kind_of_model_is_refused_in_one_line(self, name: str) -> None:
        module = plugins.load("allocators", name)
        for shape in SHAPES.values():
            if not plugins.fits(module, shape):
                with pytest.raises(StudyError, match=rf"^{name} answers for .* choose from .*random"):
                    plugins.call(module, signal_for(module, shapes_for(module)[0]), shape, {})


def test_no_allocator_and_nothing_of_the_core_loads_torch_or_numpy() -> None:
    modules = ["allocators", *(f"allocators.{Path(f).stem}" for f in sorted(ROOT.glob("allocators/*.py")))]
    modules += [f"allocators.core.{f.stem}" for f in sorted(ROOT.glob("allocators/core/*.py"))]
    heavy = ("torch", "numpy", "ray", "transformers", "mlflow", "rich")
    code = (
        f"import importlib, sys\nfor name in {[m for m in modules if not m.endswith('__')]!r}:\n"
        f"    importlib.import_module(name)\n    print(name, [h for h in {heavy!r} if h in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    guilty = [line for line in done.stdout.splitlines() if not line.endswith("[]")]
    assert not guilty
    assert len(done.stdout.splitlines()) >= len(NAMES)


def test_a_rule_is_one_file() -> None:
    """HILO as an example: beside its file it is named in the spaces that ask for it, and nowhere in the program."""
    packages = ("allocators", "trainers", "spaces", "search", "lora_expert_search")
    files = [file for package in packages for file in sorted((ROOT / package).rglob("*.py"))]
    named = {str(file.relative_to(ROOT)) for file in files if "hilo" in file.read_text(encoding="utf-8").lower()}
    assert named == {"allocators/hilo.py", "spaces/ranks.py", "spaces/ranks_table.py"}
