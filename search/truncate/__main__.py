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
from collections.abc import Iterator, Sequence

from search import door
from search.truncate import Request, truncate
from trainers import command


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 the request cannot work."""
    return door.answer(argv, told=help_text, act=_truncate)


def _truncate(given: Sequence[str]) -> Iterator[str]:
    return truncate(*door.one_study(given, Request, example="search.truncate STUDY point=front"))


def help_text() -> str:
    """Usage, keys with their defaults, and the rest of this file's docstring."""
    return door.help_text("search.truncate STUDY [key=value ...]", Request, __doc__)


if __name__ == "__main__":
    sys.exit(command.run(main))
