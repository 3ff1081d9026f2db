"""Settings of all tests."""

import os

# Several processes, each with as many torch threads as there are cores, take five times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
