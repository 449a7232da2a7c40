"""One run of a study, from checked words to the report: prepare.py, dry_run.py, make_workers.py, session.py."""
