"""What would each allocator do to my model, and at what cost? A table and a heat map; nothing is trained.

    python -m allocators.show model=tiny-moe                              every allocator that fits, embedded task
    python -m allocators.show model=tiny-moe fraction=0.5 rank=16         a knob goes to every allocator that has it
    python -m allocators.show model=tiny-moe allocator=sieve,esft esft.p=0.3 html=show.html
    python -m allocators.show model=smollm2-135m total_experts=90         a dense model: all at the same T
    python -m allocators.show model=huggyllama/llama-7b allocator=alphalora,mola png=llama.png       needs no task
    python -m allocators.show signal=studies/signals/routing-0123456789abcdef.json                   no weights, no task

Signals are measured once and kept under `cache`; with `signal=FILE` (comma-separated) only those files are read and
allocators that need another signal are left out. Several files of sensitivity are several data sets that vote together.
`python -m allocators.show help` lists keys, allocators and knobs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from allocators import _roles
from allocators.core import plugins, words
from allocators.core.errors import StudyError, ToolkitError
from search.records.redact import redacted
from search.show.config import ShowConfig
from search.show.files import draw_png, write_html
from search.show.look import look
from search.show.terminal import show_in_terminal
from trainers import command


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line on stderr where the request cannot be answered."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        if words.asks_for_help(given):
            print(help_text())
            return 0
        config, knobs = parse(given)
        shown = look(config, knobs)
        if config.png:
            _saving(config.png, lambda file: draw_png(shown, file))
        if config.html:
            _saving(config.html, partial(write_html, shown))
        show_in_terminal(shown, single=len(shown.answers) == 1)
    except ToolkitError as error:
        print(f"error: {redacted(str(error))}", file=sys.stderr)
        return 2
    return 0


def parse(given: Sequence[str]) -> tuple[ShowConfig, dict[str, Any]]:
    """Words `key=value` to the keys of `ShowConfig` and all others, which must prove to be knobs.

    Raises StudyError for a word without `=`, a key that is given twice, or a value of the wrong type.
    """
    known = {f.name for f in fields(ShowConfig)}
    pairs = words.split(given, example="model=tiny-moe")[1]
    config = words.build(ShowConfig, [pair for pair in pairs if pair[0] in known])
    return config, {name: words.read_value(text) for name, text in pairs if name not in known}


def help_text() -> str:
    """Keys with their defaults, then every allocator with its knobs."""
    lines = [(__doc__ or "").strip(), "", "keys:"]
    lines += words.help_of(ShowConfig)
    lines += ["", "knobs of every allocator on an MoE model (allocators/_roles.py says what they mean):"]
    lines.append(f"  roles=default (all, or of {', '.join(_roles.ROLES)} some, joined by +)")
    lines.append(f"  expert_rank=r ({', '.join(_roles.EXPERT_RANKS[1:])})")
    lines += ["", "allocators and knobs:"]
    for name in plugins.names("allocators"):
        module = plugins.load("allocators", name)
        base = {"moe": "MoE", "dense": "dense", "any": "any base"}[module.BASE]
        first = (module.__doc__ or "").strip().splitlines()[0]
        lines.append(
            f"  {name:<12} [{base}{', ' + module.NEEDS if module.NEEDS else ''}] {first.partition(': ')[2] or first}"
        )
        knobs = plugins.knobs_of(module)
        if knobs:
            lines.append(f"  {'':<12} {' '.join(f'{knob}={default}' for knob, default in knobs.items())}")
    return "\n".join(lines)


def _saving(name: str, save: Callable[[Path], object]) -> None:
    """Raises StudyError where the file cannot be written."""
    file = Path(name)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save(file)
    except (OSError, ValueError) as error:  # ValueError: no format that matplotlib draws
        raise StudyError(f"'{name}' cannot be written: {getattr(error, 'strerror', None) or error}") from error


if __name__ == "__main__":
    sys.exit(command.run(main))
