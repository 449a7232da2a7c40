"""Looks at this machine, and where they are named at a model, a task and a cluster, and says what would not work.

    for finding in examine(Asked(model="tiny-moe")): print(finding.state, finding.what, finding.says)

Nothing is trained, no Ray is started and no weights are loaded or fetched. The command is `__main__.py`, what is looked
at `examine.py`.
"""

from search.doctor.examine import Asked, Finding, examine

__all__ = ["Asked", "Finding", "examine"]
