"""Memory of a process tree: what a child holds is counted, also by the watch."""

from __future__ import annotations

import json
import subprocess
import sys

HELD = 200_000_000
NEAR = 10_000_000  # an interpreter's own pages, and those that it shares with its child

# in a process of its own: what other tests started (Ray's processes, MLflow's threads) grows and ends when it likes
MEASURE = f"""
import json, subprocess, sys
from search.engine.memory import PeakMemory, memory_of_tree

hold = "import sys; held = bytearray({HELD}); print('held', flush=True); sys.stdin.read()"
before = memory_of_tree()
with PeakMemory() as memory:
    child = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"held\\n"
    during = memory_of_tree()
    while memory.peak_bytes < during - {NEAR}:
        pass  # until the watch has looked as well
    child.communicate()
print(json.dumps(dict(before=before, during=during, after=memory_of_tree(), peak=memory.peak_bytes)))
"""


def test_what_a_child_holds_is_counted_while_it_lives() -> None:
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    assert abs(seen["during"] - seen["before"] - HELD) < NEAR
    assert abs(seen["after"] - seen["before"]) < NEAR
    assert abs(seen["peak"] - seen["during"]) < NEAR
