"""Memory that is freed stays with the process."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, threading
import numpy as np
from psl_flower.freed_memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        blocks = [np.ones(2**20) for _ in range(4)]  # 8 MB each: what a step's tensors are like
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if not keep_freed_memory():
    print("not kept")
    sys.exit()
found = []
for where in ("main", "thread"):
    if where == "main":
        faults()  # the first time
        found.append(faults())
    else:
        thread = threading.Thread(target=lambda: (faults(), found.append(faults())))
        thread.start()
        thread.join()
print(*found)
"""


def test_blocks_as_large_as_a_step_s_are_not_asked_of_the_system_again():
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    if ran.stdout.strip() == "not kept":
        pytest.skip("this allocator has no such options")
    pages = 20 * 4 * 2**23 / 4096  # that are written to
    for faults in map(int, ran.stdout.split()):
        assert faults < pages / 100
