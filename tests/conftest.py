"""Settings of all tests."""

import os

from leftovers import pytest_configure  # noqa: F401 (a hook)

# Several processes, each with as many torch threads as there are cores, take five times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_xdist_auto_num_workers(config):
    """Return how many processes ``-n auto`` means: one a core, containers' quotas included, and memory for each."""
    from psl_flower.threads import available_cores

    return min(available_cores(), 4)
