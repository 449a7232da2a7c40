"""Ray Tune's side of a study, where it can be asked without a search."""

from __future__ import annotations

from ray.tune.experiment import Trial

from search.engine.tune import Forgetting


def test_a_trial_of_tune_that_has_ended_keeps_no_results() -> None:
    """Tune keeps every trial, and of each the statistics of every number: memory of a driver that only grows."""
    trial = Trial("a trainable", stub=True, config={"job": "one"})
    trial.update_last_result({"report": object(), "training_iteration": 1, "time_total_s": 0.5})
    assert trial.run_metadata.last_result
    assert trial.metric_analysis
    name = str(trial)
    Forgetting().on_trial_complete(1, [trial], trial)
    assert not trial.run_metadata.last_result
    assert not trial.metric_analysis
    assert not trial.metric_n_steps
    assert not trial.config
    assert str(trial) == name
