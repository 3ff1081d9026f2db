"""How many threads torch computes with.

Note [Waiting threads]: the threads of a parallel region wait for each other at its end. OpenMP has them spin for some
milliseconds, which costs nothing on idle cores, and a factor of three to ten where another process needs one: that it
runs holds a thread up, and the others keep their cores busy waiting for it. In a simulation ServerApp, actors and Ray's
own processes share the cores, so waiting threads must sleep: ``OMP_WAIT_POLICY=passive``, which OpenMP reads once, when
torch is first imported. Then those may have the same cores that take turns: while the server half computes the clients
wait, and the other way round.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path

from psl_flower.checks import check_int

log = logging.getLogger("flwr.psl_flower")

# For the environment of processes that are going to import torch.
SLEEP_WHILE_WAITING = {"OMP_WAIT_POLICY": "passive"}


def set_threads(count: int = 0) -> int:
    """Set the number of torch's threads in a ServerApp; return it.

    Clients need no such call: Ray gives each actor of a simulation as many threads as CPUs
    (``client-resources-num-cpus``), and in a deployment a ClientApp has its machine to itself.

    Parameters
    ----------
    count : int
        0: all cores this process may use, which its clients do not compute on at the same time; but only one where
        clients share the cores and waiting threads spin, see Note [Waiting threads]. ``OMP_NUM_THREADS``, if it is set,
        comes before that.
    """
    import torch  # here: what starts such processes needs the rest of this module only

    check_int(count, "threads", least=0)
    if not count and "OMP_NUM_THREADS" not in os.environ:
        shared = "ray" in sys.modules  # a process of the simulation
        count = 1 if shared and _spin() else available_cores()
    if count:
        torch.set_num_threads(count)
    return torch.get_num_threads()


def warn_of_spinning() -> None:
    """Warn if threads spin that nobody has set; for a ServerApp whose clients compute on the same cores."""
    import torch

    if torch.get_num_threads() > 1 and "OMP_NUM_THREADS" not in os.environ and _spin():
        log.warning(
            "This ServerApp computes with %d threads, which keep cores busy while they wait, and clients need those: a "
            "step can take several times as long. Call psl_flower.threads.set_threads() first in main; for all cores "
            "set OMP_WAIT_POLICY=passive where the SuperLink is started, as psl-flower run does",
            torch.get_num_threads(),
        )


def _spin() -> bool:
    return os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive"


def available_cores() -> int:
    """Return how many cores this process may use: those it is bound to, as far as its container's quota goes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *_quotas()]))


def _quotas(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Return the CPUs that control groups allow, by either of their interfaces; empty without a limit."""
    pairs = []
    with suppress(OSError):
        pairs.append((root / "cpu.max").read_text().split())
    with suppress(OSError):
        pairs.append([(root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")])
    # "max" or -1: no limit
    return [int(quota) // int(period) for quota, period in pairs if quota.strip().isdigit()]
