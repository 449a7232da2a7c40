"""Tests mirror the folders of the packages; `tests/benchmarks/` holds the measurements."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
