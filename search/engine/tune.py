"""Ray Tune's side of a study: a searcher that asks the conductor, a scheduler that obeys it, a trainable that waits for
a warm worker. Edge file: Ray.

Tune never trains and never remembers: the driver's records are the truth, so Tune's own snapshots hold only names.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import tune
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from allocators.core.errors import StudyError
from allocators.core.messages import Failed, Finished, RungReached, TrainJob, is_end
from search.engine import StudyConductor
from search.engine.connect import GOES_ON, NAMESPACE

T = TypeVar("T")
MOST_PENDING = 1000  # trials whose processes start at once; how many there are, the searcher says

_searches: dict[str, _SearchState] = {}  # Tune pickles and copies its searcher; a name survives that


@dataclass
class _SearchState:
    """What Tune's searcher and its scheduler have to know of each other.

    slots     trainings that run at once, as of now: worker groups may come and go
    pausing   whether the conductor may pause a training
    digests   Tune trial -> training, of all that have not ended
    paused    training -> Tune trial that waits for the conductor to propose it again
    resumed   Tune trials that were proposed again and that Tune has not started yet
    over      the conductor has nothing more to propose
    fault     what the conductor raised: it ends the search, and is no affair of Tune's
    """

    conductor: StudyConductor
    queue: Any
    slots: Callable[[], int]
    pausing: bool
    digests: dict[str, str] = field(default_factory=dict)
    paused: dict[str, TuneTrial] = field(default_factory=dict)
    resumed: list[TuneTrial] = field(default_factory=list)
    over: bool = False
    fault: Exception | None = None

    def ask(self, question: Callable[..., T], *arguments: Any, otherwise: T) -> T:
        """What the conductor answers; after a fault of its own it is asked no more."""
        if self.fault is None:
            try:
                return question(*arguments)
            except Exception as error:
                self.fault, self.over = error, True
        return otherwise

    @property
    def full(self) -> bool:
        return len(self.digests) - len(self.paused) >= self.slots()


class StudySearcher(Searcher):
    """A Tune searcher whose suggestions and results go through the study's conductor."""

    def __init__(self, study: str) -> None:
        super().__init__()
        self._study = study

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """True: the limit is kept here, because Tune's own counts paused trials as if they had a worker."""
        return True

    def suggest(self, trial_id: str) -> Any:  # Any: Tune's signature leaves out its own FINISHED
        """The next training's config; None: no new one now; FINISHED: there is nothing left to do."""
        state = _searches[self._study]
        if state.full:
            return None  # Tune asks again at its next step
        proposal = state.ask(state.conductor.propose, otherwise=None)
        if proposal is None:
            state.over = True
            return Searcher.FINISHED
        if proposal == "wait":
            return None
        digest = proposal.trial.digest
        if digest in state.paused:
            state.resumed.append(state.paused.pop(digest))
            return None
        state.digests[trial_id] = digest
        return {"job": TrainJob(proposal.trial, proposal.trainable_params, asks=state.pausing, tests=proposal.tests)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Hands the outcome to the conductor, or the reason why there is none."""
        state = _searches[self._study]
        digest = state.digests.pop(trial_id)
        if state.paused.pop(digest, None) is not None:
            if error:  # its process died when it was to be paused: the worker still waits for an answer
                state.queue.cancel.remote(digest)
            return  # the conductor knows what is paused
        conductor = state.conductor
        match (result or {}).get("report") if not error else None:
            case Finished(outcome) if outcome.status == "lost":
                state.ask(conductor.lost, digest, outcome.message, otherwise=None)
            case Finished(outcome):
                state.ask(conductor.finished, outcome, otherwise=None)
            case Failed(reason):
                state.ask(partial(conductor.lost, again=False), digest, reason, otherwise=None)
            case _:
                state.ask(conductor.lost, digest, "the process of its Tune trial died", otherwise=None)

    def save(self, checkpoint_path: str) -> None:  # our records are the truth; nothing here is worth a file
        """Does nothing."""

    def restore(self, checkpoint_path: str) -> None:
        """Does nothing: a study resumes from its own records."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Does nothing, as `save`."""


class StudyScheduler(TrialScheduler):
    """A Tune scheduler that pauses and goes on with trials as the study's conductor decides."""

    def __init__(self, study: str) -> None:
        super().__init__()
        self._study = study

    def on_trial_result(self, tune_controller: TuneController, trial: TuneTrial, result: dict[str, Any]) -> str:
        """PAUSE where the conductor pauses the training at this evaluation, else CONTINUE."""
        state = _searches[self._study]
        digest, report = state.digests[trial.trial_id], result.get("report")
        if not isinstance(report, RungReached) or state.ask(state.conductor.rung, digest, report.rung, otherwise=True):
            return TrialScheduler.STOP if state.fault is not None else TrialScheduler.CONTINUE
        state.paused[digest] = trial
        return TrialScheduler.PAUSE

    def choose_trial_to_run(self, tune_controller: TuneController) -> TuneTrial | None:
        """A paused trial to go on with; Tune starts pending ones by itself."""
        state = _searches[self._study]
        if state.over:
            for trial in [trial for trial in state.paused.values() if trial.status == TuneTrial.PAUSED]:
                tune_controller.stop_trial(trial)
        ready = (trial for trial in state.resumed if trial.status == TuneTrial.PAUSED)  # not: about to be paused
        if (chosen := next(ready, None)) is not None:
            state.resumed.remove(chosen)
        return chosen

    def on_trial_add(self, tune_controller: TuneController, trial: TuneTrial) -> None:
        """Does nothing: the searcher has noted the trial."""

    def on_trial_error(self, tune_controller: TuneController, trial: TuneTrial) -> None:
        """Does nothing: the searcher hears of the error."""

    def on_trial_complete(self, tune_controller: TuneController, trial: TuneTrial, result: dict[str, Any]) -> None:
        """Does nothing: the searcher hears of the end."""

    def on_trial_remove(self, tune_controller: TuneController, trial: TuneTrial) -> None:
        """Does nothing."""

    def debug_string(self) -> str:
        """What Tune's status shows of a scheduler."""
        return "as the study decides"


class Forgetting(tune.Callback):
    """Takes the results from Tune's ended trials: Tune keeps every trial, and the records have its results."""

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Leaves a trial its name and how it ended."""
        known = trial.run_metadata
        known.last_result, known.metric_analysis, known.metric_n_steps = {}, {}, {}
        trial.config, trial.evaluated_params = {}, {}


class TrialHandle(tune.Trainable):
    """What Tune sees of a trial. Trains nothing: submits, waits, cancels."""

    def setup(self, config: dict[str, Any]) -> None:
        """Takes the first trial of this process."""
        self.queue: Any = ray.get_actor(config["queue"], namespace=NAMESPACE)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:  # with reuse_actors one process serves many trials
        """Takes the next trial; True: it could be done without a new process."""
        self.job: TrainJob = new_config["job"]
        self.under_way = False
        return True

    def step(self) -> dict[str, Any]:
        """Waits for the trial's next report; the queue takes the trial in where it does not know it."""
        # Not in `setup`: Tune may start a new process for a trial, and give the trial to another one that became free
        # meanwhile. What is not submitted need not be cancelled under the other one's feet.
        self.under_way = True
        report = ray.get(self.queue.next_report.remote(self._job_id, self.job))
        self.under_way = not is_end(report)
        return {"done": is_end(report), "report": report}

    @property
    def _job_id(self) -> str:
        return self.job.trial.digest

    def _leave(self) -> None:
        """Frees the worker. Once: the training may be resumed by another handle before this one is cleaned up."""
        if self.under_way:
            ray.get(self.queue.cancel.remote(self._job_id))
            self.under_way = False

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Cancels the job where it is under way."""
        self._leave()  # Tune asks for one when it pauses a trial; the workers keep the real ones

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Does nothing: the workers go on from their own checkpoints."""

    def cleanup(self) -> None:
        """Cancels the job where it is under way."""
        self._leave()


def search(
    conductor: StudyConductor, *, study: str, queue: str, slots: Callable[[], int], pausing: bool, notes: Path
) -> None:
    """Runs trials through Tune until the conductor has nothing more to propose.

    queue     name of the job queue's actor
    slots     trainings that run at once, as of now: worker groups may come and go
    pausing   whether the conductor may pause a training: workers then wait at every evaluation for its answer
    notes     a folder of this machine for Tune's own notes, of which nothing is needed later

    Raises what the conductor raises, and StudyError where Tune cannot go on.
    """
    state = _searches[study] = _SearchState(conductor, ray.get_actor(queue, namespace=NAMESPACE), slots, pausing)
    # No CPU: the workers have them all. On this node: then Tune needs no shared folder.
    resources = tune.PlacementGroupFactory([{f"node:{ray.util.get_node_ip_address()}": 0.001}])
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # its stacks: what went wrong is said in one line
    try:
        tune.Tuner(
            tune.with_resources(TrialHandle, resources),
            param_space={"queue": queue},
            tune_config=tune.TuneConfig(
                search_alg=StudySearcher(study),
                scheduler=StudyScheduler(study),
                num_samples=-1,  # the conductor ends the search
                max_concurrent_trials=MOST_PENDING,  # else Tune starts one at a time
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="study",
                storage_path=str(notes),
                verbose=0,
                callbacks=[Forgetting()],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the workers keep the real ones
            ),
        ).fit()
    except Exception as error:
        if state.fault is None:
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1][:200]
            raise StudyError(f"Ray Tune ended ({reason}), its notes are in {notes}: {GOES_ON}") from error
    finally:
        del _searches[study]
    if state.fault is not None:
        raise state.fault
