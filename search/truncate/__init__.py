"""Points of a study that cost no training: trained adapters, cut to the ranks that they need.

    for line in truncate("studies/demo", Request(point="front", energy="0.9")): print(line)

The command is `__main__.py`, a cut `cut.py`, its arithmetic `trainers/adapter/module_ranks/truncate.py`.
"""

from search.truncate.cut import ALLOCATOR, Request, truncate

__all__ = ["ALLOCATOR", "Request", "truncate"]
