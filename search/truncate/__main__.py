"""Cuts trained adapters to the ranks that they need, evaluates what is left, and adds it to the study.

    python -m search.truncate studies/sieve-tiny-moe-default point=front energy=0.9        # the members of the front
    python -m search.truncate studies/sieve-tiny-moe-default point=3f2a91bc energy=0.5,0.7,0.9,0.99
    python -m search.truncate studies/sieve-tiny-moe-default point=all energy=0.9          # every adapter that is kept
    python -m search.truncate help

Every B·A is cut by its singular value decomposition. One threshold holds for all modules: the largest singular values
are kept whose squares are a share `energy` of all. What is left has a rank of its own for every module, the scale
lora_alpha/rank of the training, and is evaluated on the validation and the test split. It becomes a point of the study,
marked as cut from its training: the front shows it, `search.export` takes it, and it counts as no training: not among
the trials, not for the sampler, not in what is attributed to settings.

Adapters of chosen experts and of module ranks can be cut. LoRA-MoE on a dense model cannot: the experts of a module
share one rank. Nothing is trained; a training that was cut to the same ranks before is not evaluated again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from allocators.core import words
from allocators.core.errors import StudyError, ToolkitError
from search.records.redact import redacted
from search.truncate import Request, truncate
from trainers import command


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 the request cannot work."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        if not given or words.asks_for_help(given):
            print(help_text(), file=sys.stdout if given else sys.stderr)
            return 0 if given else 2
        folders, pairs = words.split(given)
        if len(folders) != 1:
            raise StudyError(
                f"give the folder of one study, got {len(folders)}: python -m search.truncate STUDY point=front"
            )
        for line in truncate(folders[0], words.build(Request, pairs)):
            print(line, flush=True)
    except ToolkitError as error:
        print(f"error: {redacted(str(error))}", file=sys.stderr)
        return 2
    return 0


def help_text() -> str:
    """Usage, keys with their defaults, and the rest of this file's docstring."""
    lines = ["usage: python -m search.truncate STUDY [key=value ...]", "", "keys (default):", *words.help_of(Request)]
    return "\n\n".join(["\n".join(lines), *(__doc__ or "").strip().split("\n\n")[2:]])


if __name__ == "__main__":
    sys.exit(command.run(main))
