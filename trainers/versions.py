"""Installed versions of what a result can depend on. Reads package metadata, imports none of the packages."""

from __future__ import annotations

import contextlib
import platform
from importlib import metadata

PACKAGES = (
    "lora-expert-search",
    *("torch", "transformers", "peft", "ray", "optuna", "mlflow", "lm-eval", "datasets", "moocore", "safetensors"),
)


def versions(**more: str) -> dict[str, str]:
    """Package name → version, `python` included; `more` adds facts such as device="NVIDIA H100"."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed | more
