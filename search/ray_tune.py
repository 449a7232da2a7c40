"""Ray Tune's side of a study: a searcher that asks it, a trainable that waits for a warm worker. Edge file: Ray.

Tune never trains and never remembers: the driver's records are the truth, so Tune's own snapshots hold only names.
"""

from __future__ import annotations

import json
import tempfile
from typing import Any, Literal, Protocol

import ray
from ray import tune
from ray.tune.search import Searcher

from allocators.core.types import Outcome, Trial
from search.pool import NAMESPACE, Pool, TablePool, driver_node
from search.sampler import Proposal

_CONDUCTORS: dict[str, Conductor] = {}  # Tune pickles and copies its searcher; a name survives that


class Conductor(Protocol):
    """What Tune asks of the study (implemented in `search/study.py`)."""

    def propose(self) -> Proposal | Literal["wait"] | None: ...
    def rung(self, digest: str, rung: dict[str, Any]) -> None: ...
    def finished(self, outcome: Outcome) -> None: ...
    def lost(self, digest: str, reason: str) -> None: ...


class AskTheStudy(Searcher):
    """A Tune searcher whose suggestions and results go through the study's conductor."""

    def __init__(self, study: str) -> None:
        super().__init__()
        self._study = study
        self._digests: dict[str, str] = {}

    def suggest(self, trial_id: str) -> Any:
        proposal = _CONDUCTORS[self._study].propose()
        if proposal is None:
            return Searcher.FINISHED
        if proposal == "wait":
            return None  # Tune asks again at its next step
        self._digests[trial_id] = proposal.trial.digest
        return {"trial": json.dumps(proposal.trial.to_json()), "trainable_params": proposal.trainable_params}

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        if result.get("rung"):
            _CONDUCTORS[self._study].rung(self._digests[trial_id], json.loads(result["rung"]))

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        conductor, digest = _CONDUCTORS[self._study], self._digests.pop(trial_id)
        if result and result.get("outcome"):
            conductor.finished(Outcome.from_json(json.loads(result["outcome"])))
        else:
            conductor.lost(digest, (result or {}).get("error") or "its Tune trial ended without a result")

    def save(self, checkpoint_path: str) -> None:  # our records are the truth; nothing here is worth a file
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        pass


class TrialHandle(tune.Trainable):
    """What Tune sees of a trial. Trains nothing: submits, waits, cancels."""

    def setup(self, config: dict) -> None:
        self.board = ray.get_actor(config["board"], namespace=NAMESPACE)
        self._submit(config)

    def reset_config(self, new_config: dict) -> bool:  # with reuse_actors one process serves trial after trial
        self._submit(new_config)
        return True

    def _submit(self, config: dict) -> None:
        self.job_id = Trial.from_json(json.loads(config["trial"])).digest
        job = {"kind": "trial", "trial": config["trial"], "trainable_params": config["trainable_params"]}
        ray.get(self.board.submit.remote(self.job_id, job))

    def step(self) -> dict:
        report: Any = ray.get(self.board.next_report.remote(self.job_id))
        return {"rung": "", "outcome": "", "error": "", **report}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        pass  # Tune asks for one at the end of every trial; the workers keep the real ones

    def load_checkpoint(self, checkpoint: Any) -> None:
        pass

    def cleanup(self) -> None:
        ray.get(self.board.cancel.remote(self.job_id))


def search(conductor: Conductor, pool: Pool | TablePool, *, study: str, trials: int) -> None:
    """Runs trials through Tune until `trials` are done or the conductor has nothing more to propose."""
    _CONDUCTORS[study] = conductor
    resources = tune.PlacementGroupFactory([{driver_node(): 0.001}])  # no CPU: the workers have them all
    try:
        with tempfile.TemporaryDirectory(prefix="tune-") as folder:
            tune.Tuner(
                tune.with_resources(TrialHandle, resources),
                param_space={"board": pool.board_name},
                tune_config=tune.TuneConfig(
                    search_alg=AskTheStudy(study),
                    num_samples=trials,
                    max_concurrent_trials=pool.plan.groups,
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(name="study", storage_path=folder, verbose=0),
            ).fit()
    finally:
        del _CONDUCTORS[study]
