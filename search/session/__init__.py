"""One run of a study, from checked words to the report: prepare.py, dry_run.py (with estimate.py), make_workers.py,
session.py.
"""
