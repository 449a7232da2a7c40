"""Search spaces: one file a space, found by its name; nothing is registered.

A space defines

    BASE        "moe", "dense" or "any": the kind of base model it asks about
    ALLOCATORS  the allocators it may propose; their NEEDS are the signals that are measured
    suggest(trial, shape) -> Point            `trial` is an Optuna trial; bounds come from the model's shape
    starting_points(shape) -> list[dict]      sampler parameters tried first; recipe settings left out of a
                                              starting point take the study's own values

or is a table, a fixed grid like those of the papers, whose every point is trained and compared seed by seed

    BASE, ALLOCATORS, suggest                 as above, all knobs categorical: every combination is a row
    TABLE       True
    SEEDS       seeds behind each row unless `seeds=` says otherwise
    PUBLISHED   published accuracies, COMPARISONS  pairs of rows that are tested; both may be left out
                      (`allocators/core/tables.py`)
    starting_points   where its recorded rows are searched (`replay=`); may be left out

A knob has one range or one list of choices wherever it is asked for, and one name stands for one knob; a table may give
a branch fewer choices. A range with one value is a default, which `space.NAME=` may change. What is wrong with a space,
or with a starting point, is said before anything starts.

Its docstring is a data sheet: the question, the command, the knobs, what was measured.
"""
