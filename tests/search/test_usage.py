"""Memory of a process tree: what a child holds is counted, also by the watch."""

from __future__ import annotations

import subprocess
import sys

from search.usage import PeakMemory, memory_of_tree

HOLD = "import sys; held = bytearray(200_000_000); print('held', flush=True); sys.stdin.read()"


def test_what_a_child_holds_is_counted_while_it_lives():
    before = memory_of_tree()
    with PeakMemory() as memory:
        child = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert child.stdout.readline() == b"held\n"
        during = memory_of_tree()
        while memory.peak_bytes < during - 50_000_000:
            pass  # until the watch has looked as well
        child.communicate()
    assert during - before > 190_000_000
    assert memory_of_tree() < during - 190_000_000
    assert memory.peak_bytes > before + 190_000_000
