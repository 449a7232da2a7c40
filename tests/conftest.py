"""What every test process needs set before Ray, MLflow or a tokenizer is imported."""

from __future__ import annotations

import os

os.environ |= {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_OFFLINE": "1",
    "RAY_worker_niceness": "0",  # by default 15: beside a busy program the trials that a test waits for would starve
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # tiny tensors: a second thread costs more than it brings, ten times as much under load
}

from hypothesis import settings  # after the environment: a plug-in could import any of these

settings.register_profile("no clock", deadline=None)  # a busy machine is not a failure
settings.load_profile("no clock")
