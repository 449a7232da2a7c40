"""Trainings that another study of the same storage has done already: `reuse=true` takes their results.

    python -m search.run space=sieve reuse=true name=second sampler=tpe     # points that `first` trained cost nothing

    others = OtherStudies(folder, identity=config.identity(), facts={"model": ..., "numbers": ..., "data": ...}, ...)
    if taken := others.take(trial, trainable_params): outcome, study = taken

Equal digests are one training (allocation, recipe, model, task, seed). That one of another study may stand for one of
ours, everything else that decides a result has to agree too: what a rerun in the same folder must share (`identity`),
less what only says which points are proposed, and what the worker that trained it wrote into the outcome's versions:
hash of the stored weights, number format, hash of the data. Of tokenizer, chat template and code the headers have the
hashes, but for those of an earlier version. Versions of libraries and the device may differ, as they
may between two runs of one study. Only what ended by itself is taken, complete or diverged, which the same seed does
again; what failed, was stopped, or ran out of memory there may end otherwise here. A score on the test split comes
along where that split is the same; else the training is tested again, from its adapter.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from allocators.core.errors import StudyError
from allocators.core.types import Outcome, Status, Trial
from search.config import keys
from search.records import Records
from search.records.files import ADAPTERS, HEADER, LINES, plain_file
from search.records.following import Following
from search.records.header import read_header
from search.records.redact import redacted
from trainers import storage

log = logging.getLogger(__name__)

# Keys of a study's identity that need not agree: allocation, recipe and seed are in a training's digest.
INDIFFERENT = frozenset(keys(decides="proposals"))
FACTS = ("model", "numbers", "data")  # of an outcome's versions
TEST_DATA = "test_data"  # the same, where a study selects on other questions than those of the test split
TAKEN: tuple[Status, ...] = ("complete", "diverged")


def same_settings(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether two identities agree in all that decides what a training comes to."""
    deciding = (mine.keys() | theirs.keys()) - INDIFFERENT
    return all(key in mine and key in theirs and mine[key] == theirs[key] for key in deciding)


class NoOtherStudies:
    """No other study is asked."""

    def __len__(self) -> int:
        return 0

    def take(self, trial: Trial, trainable_params: int) -> tuple[Outcome, str] | None:
        """None: every trial is trained."""
        return None


NO_OTHER_STUDIES = NoOtherStudies()


class OtherStudies:
    """Finished trainings of the studies whose folders lie beside this one's, those of running studies included.

    identity   of this study; `defaults` of its keys, which a study of an earlier version may lack
    facts      what the versions of an outcome have to say about model, numbers and data
    contents   hashes of this study's model, tokenizer, task files and data, as its header has them
    place      where this study's workers write: an adapter that is taken over is copied there, so that the other study
               can be deleted
    """

    def __init__(
        self,
        folder: Path,
        *,
        identity: Mapping[str, Any],
        defaults: Mapping[str, Any],
        facts: Mapping[str, str],
        place: str,
        contents: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._folder = folder
        self._identity = redacted(identity)  # as it was written by the others
        self._defaults = redacted(defaults)
        self._facts = {key: fact for key, fact in facts.items() if key != TEST_DATA}
        self._test_data = facts.get(TEST_DATA)  # None: this study's trainings have no score beside their accuracy
        self._place = place
        self._contents = contents
        self._followed: dict[Path, Following | None] = {folder: None}  # None: of no use

    def __len__(self) -> int:
        """How many trainings could be taken as of now."""
        return len({digest for records in self._studies() for digest, o in records.finished.items() if self._fits(o)})

    def take(self, trial: Trial, trainable_params: int) -> tuple[Outcome, str] | None:
        """A trial's outcome and the name of the study that trained it; its adapter is copied where it is kept.

        Looks at the others' records as they are now: a study that runs beside this one may have trained it just now.
        """
        digest = trial.digest
        equal = [(r, o) for r in self._studies() if (o := r.outcomes.get(digest)) is not None and self._fits(o)]
        for records, outcome in sorted(equal, key=lambda pair: (pair[0].adapter_of(pair[1]) is None, not pair[1].test)):
            source, target = records.adapter_of(outcome), storage.join(self._place, ADAPTERS, digest)
            kept = target if source and _copied(source, target) else ""
            # the other study may know it by another allocator's name: this one's records keep to what it asked
            same_test = self._test_data is not None and outcome.versions.get(TEST_DATA) == self._test_data
            test = outcome.test if same_test else None
            taken = outcome.updated(trial=trial, trainable_params=trainable_params, adapter=kept, test=test)
            return taken, records.reused.get(digest, records.name)
        return None

    def _fits(self, outcome: Outcome) -> bool:
        trained = outcome.status in TAKEN and not outcome.trial.parent
        return trained and all(outcome.versions.get(key) == fact for key, fact in self._facts.items())

    def _studies(self) -> Iterator[Records]:
        for header in sorted(self._folder.parent.glob(f"*/{HEADER}")):
            other = header.parent
            if other not in self._followed:
                self._followed[other] = self._follow(other)
            if (followed := self._followed[other]) is not None:
                with contextlib.suppress(StudyError):  # without a line yet, deleted, or made a link since it was listed
                    yield followed.read()

    def _follow(self, folder: Path) -> Following | None:
        try:
            header = read_header(folder)
            with contextlib.suppress(FileNotFoundError):  # its first line may not be written yet
                plain_file(folder, LINES)
        except StudyError as error:
            log.warning("nothing is reused from %s: %s", folder.name, error)
            return None
        if not same_settings(self._identity, {**self._defaults, **header["identity"]}):
            return None
        theirs = header.get("contents", {})
        if other := [name for name, mine in self._contents.items() if mine and theirs.get(name, "") not in ("", mine)]:
            log.warning("nothing is reused from %s: it was made with another %s", folder.name, other[0])
            return None
        return Following(folder)


def _copied(source: str, target: str) -> bool:
    """Copies an adapter; False where the other study has let it go, before or while it was copied."""
    try:
        with storage.reading_folder(source) as local:
            if not local.exists():
                return False
            storage.put_folder(local, target)
    except StudyError:
        if storage.exists(source):
            raise
    if storage.exists(source):
        return True
    storage.delete_folder(target)
    return False
