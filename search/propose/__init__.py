"""Which points are tried, and which trainings go on: samplers and successive halving.

User attributes of an Optuna trial, by which a sampler that knows noise hears of it:

    RUN      which training its result is of; two trials with one run were trained once
    STDERR   standard error of its accuracy over the questions
"""

RUN = "run"
STDERR = "stderr"
