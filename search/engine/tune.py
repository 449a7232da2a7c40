"""Ray Tune's side of a study: a searcher that asks it, a scheduler that obeys it, a trainable that waits for a warm
worker. Edge file: Ray.

Tune never trains and never remembers: the driver's records are the truth, so Tune's own snapshots hold only names.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import ray
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from allocators.core.types import Outcome, Rung, Trial
from search.engine.workers import NAMESPACE, Pool, TablePool, driver_node
from search.propose.sampler import Proposal

_STAGES: dict[str, _Stage] = {}  # Tune pickles and copies its searcher; a name survives that


class Conductor(Protocol):
    """What Tune asks of the study (implemented in `search/study.py`)."""

    def propose(self) -> Proposal | Literal["wait"] | None:
        """The next training for a free worker, a new one or one that was paused."""

    def rung(self, digest: str, rung: Rung) -> bool:
        """An evaluation; False pauses the training until it is proposed again."""

    def finished(self, outcome: Outcome) -> None: ...
    def lost(self, digest: str, reason: str) -> None: ...


@dataclass
class _Stage:
    """What Tune's searcher and its scheduler have to know of each other.

    digests   Tune trial -> training, of all that have not ended
    paused    training -> Tune trial that waits for the conductor to propose it again
    resumed   Tune trials that were proposed again and that Tune has not started yet
    over      the conductor has nothing more to propose
    """

    conductor: Conductor
    places: int
    digests: dict[str, str] = field(default_factory=dict)
    paused: dict[str, TuneTrial] = field(default_factory=dict)
    resumed: list[TuneTrial] = field(default_factory=list)
    over: bool = False

    @property
    def full(self) -> bool:
        return len(self.digests) - len(self.paused) >= self.places


class AskTheStudy(Searcher):
    """A Tune searcher whose suggestions and results go through the study's conductor."""

    def __init__(self, study: str) -> None:
        super().__init__()
        self._study = study

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        return True  # kept here: Tune's own limiter counts paused trials as if they had a worker

    def suggest(self, trial_id: str) -> Any:
        stage = _STAGES[self._study]
        if stage.full:
            return None  # Tune asks again at its next step
        proposal = stage.conductor.propose()
        if proposal is None:
            stage.over = True
            return Searcher.FINISHED
        if proposal == "wait":
            return None
        digest = proposal.trial.digest
        if digest in stage.paused:
            stage.resumed.append(stage.paused.pop(digest))
            return None
        stage.digests[trial_id] = digest
        return {"trial": json.dumps(proposal.trial.to_json()), "trainable_params": proposal.trainable_params}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        stage = _STAGES[self._study]
        digest = stage.digests.pop(trial_id)
        if stage.paused.pop(digest, None) is not None and not error:
            return  # the search is over, and the conductor knows what it left paused
        if result and result.get("outcome"):
            stage.conductor.finished(Outcome.from_json(json.loads(result["outcome"])))
        else:
            stage.conductor.lost(digest, (result or {}).get("error") or "its Tune trial ended without a result")

    def save(self, checkpoint_path: str) -> None:  # our records are the truth; nothing here is worth a file
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        pass


class ObeyTheStudy(TrialScheduler):
    """A Tune scheduler that pauses and goes on with trials as the study's conductor decides."""

    def __init__(self, study: str) -> None:
        super().__init__()
        self._study = study

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict) -> str:
        stage = _STAGES[self._study]
        digest = stage.digests[trial.trial_id]
        if not result.get("rung") or stage.conductor.rung(digest, result["rung"]):
            return TrialScheduler.CONTINUE
        stage.paused[digest] = trial
        return TrialScheduler.PAUSE

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrial | None:
        """A paused trial to go on with; Tune starts pending ones by itself."""
        stage = _STAGES[self._study]
        if stage.over:
            for trial in [trial for trial in stage.paused.values() if trial.status == TuneTrial.PAUSED]:
                tune_controller.stop_trial(trial)
        ready = (trial for trial in stage.resumed if trial.status == TuneTrial.PAUSED)  # not: about to be paused
        if (chosen := next(ready, None)) is not None:
            stage.resumed.remove(chosen)
        return chosen

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        pass

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        pass

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict) -> None:
        pass

    def on_trial_remove(self, tune_controller: Any, trial: TuneTrial) -> None:
        pass

    def debug_string(self) -> str:
        return "as the study decides"


class TrialHandle(tune.Trainable):
    """What Tune sees of a trial. Trains nothing: submits, waits, cancels."""

    def setup(self, config: dict) -> None:
        self.board = ray.get_actor(config["board"], namespace=NAMESPACE)
        self.reset_config(config)

    def reset_config(self, new_config: dict) -> bool:  # with reuse_actors one process serves trial after trial
        self.job_id = Trial.from_json(json.loads(new_config["trial"])).digest
        self.job = {"kind": "trial", **{key: new_config[key] for key in ("trial", "trainable_params", "asks")}}
        self.under_way = False
        return True

    def step(self) -> dict:
        if not self.under_way:
            # Not in `setup`: Tune may start a new process for a trial, and give the trial to another one that became
            # free meanwhile. What is not submitted need not be cancelled under the other one's feet.
            ray.get(self.board.submit.remote(self.job_id, self.job))
            self.under_way = True
        report: Any = ray.get(self.board.next_report.remote(self.job_id))
        self.under_way = not report["done"]
        return {"rung": None, "outcome": "", "error": "", **report}

    def _leave(self) -> None:
        """Frees the worker. Once: the training may be resumed by another handle before this one is cleaned up."""
        if self.under_way:
            ray.get(self.board.cancel.remote(self.job_id))
            self.under_way = False

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        self._leave()  # Tune asks for one when it pauses a trial (and at its end); the workers keep the real ones

    def load_checkpoint(self, checkpoint: Any) -> None:
        pass

    def cleanup(self) -> None:
        self._leave()


def search(conductor: Conductor, pool: Pool | TablePool, *, study: str, trials: int, pausing: bool) -> None:
    """Runs trials through Tune until `trials` are done or the conductor has nothing more to propose.

    pausing   whether the conductor may pause a training: workers then wait at every evaluation for its answer
    """
    _STAGES[study] = _Stage(conductor, pool.plan.places)
    resources = tune.PlacementGroupFactory([{driver_node(): 0.001}])  # no CPU: the workers have them all
    try:
        with tempfile.TemporaryDirectory(prefix="tune-") as folder:
            tune.Tuner(
                tune.with_resources(TrialHandle, resources),
                param_space={"board": pool.board_name, "asks": pausing},
                tune_config=tune.TuneConfig(
                    search_alg=AskTheStudy(study),
                    scheduler=ObeyTheStudy(study),
                    num_samples=trials,
                    max_concurrent_trials=pool.plan.places,
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(name="study", storage_path=folder, verbose=0),
            ).fit()
    finally:
        del _STAGES[study]
