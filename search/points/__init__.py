"""Points of a space: how a space is asked for them (asked.py), and which it starts from (starting.py)."""
