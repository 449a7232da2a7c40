"""The search: its command, problem and study; proposing, running, recording and reporting in folders below."""
