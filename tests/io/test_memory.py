"""What is given back to the system is no longer in the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import torch
from mergeid.basics.memory import _trim, give_back

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

del_first = torch.ones(7_000_000)  # its release makes glibc keep blocks of its size
del del_first
kept = [torch.ones(250_000) for _ in range(200)]
last = kept.pop()
before = resident()
del kept
held = resident()
give_back()
print(before, held, resident(), _trim() is not None)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_blocks_leave_the_process():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    before, held, after, trims = done.stdout.split()
    assert int(after) <= int(held)
    if trims == "True":
        assert int(before) - int(after) > 150e6
