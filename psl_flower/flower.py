"""What is needed of Flower beyond its public modules: names that move between releases are only here."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from flwr.common.constant import ErrorCode
from packaging.version import Version

from psl_flower.failures import Kind

try:
    from flwr.supercore.run import Run as Run
except ImportError:  # before flwr 1.30 or so
    from flwr.common.typing import Run as Run  # type: ignore[attr-defined, no-redef]

try:
    from flwr.supercore.exit import add_exit_handler
except ImportError:  # before flwr 1.30 or so
    from flwr.common.exit import add_exit_handler  # type: ignore[import-not-found, no-redef]

log = logging.getLogger("flwr.psl_flower")

# Note [Flower's exit]: Flower ends the simulation's process by force 5 seconds after a signal. Until then a run must
# have ended, and Flower have shut Ray down. After ``flwr stop`` it never does: it waits for its heartbeat, which sleeps
# for 6 seconds. Then Ray dies with the process, all but some agents of its that go on for minutes: so we shut it down.
_RUN_SECONDS, _RAY_SECONDS = 2.0, 1.5

# the code of an error reply for a ClientApp that raised
ERROR_CLIENT_APP: int = ErrorCode.CLIENT_APP_RAISED_EXCEPTION

# error replies for code of the client's that raised; all others tell of processes and nodes that are gone
_MISTAKES = (
    ErrorCode.LOAD_CLIENT_APP_EXCEPTION,
    ErrorCode.CLIENT_APP_RAISED_EXCEPTION,
    getattr(ErrorCode, "MOD_FAILED_PRECONDITION", None),
    getattr(ErrorCode, "INVALID_FAB", None),
)


# since this release a SuperLink has one address for all of its APIs; before, options and ports changed each time
FIRST_WITH_ONE_ADDRESS = "1.40"


def has_one_address() -> bool:
    """Return whether the installed Flower's SuperLink has one address, at which our launchers start it."""
    return Version(version("flwr")) >= Version(FIRST_WITH_ONE_ADDRESS)


def error_kind(code: int) -> Kind:
    """Return what kind of failure an error reply tells of."""
    return Kind.RAISED if code in _MISTAKES else Kind.UNREACHABLE


def is_deployment(grid: Any) -> bool:
    """Return whether a grid's nodes are other people's: processes that come and go, not this program's own."""
    names = {kind.__name__ for kind in type(grid).__mro__}
    return names.isdisjoint(("InMemoryGrid", "InProcessGrid")) and not getattr(grid, "own_nodes", False)


def is_simulation(grid: Any) -> bool:
    """Return whether a grid's nodes are those of Flower's simulation, on Ray."""
    return any(kind.__name__ == "InMemoryGrid" for kind in type(grid).__mro__)


def simulated_nodes(grid: Any) -> dict[int, dict[str, int]] | None:
    """Return the node configuration of each node of Flower's simulation, by node id; None of any other grid.

    The simulation numbers its nodes in the order in which it makes them, which is that of its store. Empty where the
    store does not tell: releases differ. To be compared with what some nodes say themselves.
    """
    if not is_simulation(grid):
        return None
    try:
        ids = [node.node_id for node in grid.state.get_node_info()]
    except (AttributeError, TypeError):
        return {}
    return {node: {"partition-id": i, "num-partitions": len(ids)} for i, node in enumerate(ids)}


def cluster_host(grid: Any, patience: float = 60.0) -> str:
    """Return this machine's address for the others of a Ray cluster; "" where a simulation's Ray has one machine only.

    The ServerApp starts beside Ray, and nothing tells it of clients before Ray is there: this waits for it.
    """
    if not (is_simulation(grid) and type(grid).__module__.startswith("flwr.")):
        return ""
    begin, told = time.monotonic(), False
    while (ray := _ray()) is None:
        waited = time.monotonic() - begin
        if waited > patience:
            return ""
        if waited > 5.0 and not told:
            told = True
            log.info("Ray is starting")
        time.sleep(0.02)
    if sum(node["Alive"] for node in ray.nodes()) < 2:
        return ""
    host = str(ray.util.get_node_ip_address())
    return f"[{host}]" if ":" in host else host


def make_run(run_id: int) -> Run:
    """Return a run of which only the id is known."""
    return Run.create_empty(run_id)


def become_server(run_id: int, node_id: int) -> None:
    """Let this process make messages as a ServerApp does, unless it is one already.

    Flower's ``Message`` reads the sender's identity from a process-wide place that Flower fills in the processes it
    starts. Releases without that place need nothing.
    """
    try:
        from flwr.supercore.task_identity import TaskIdentity
    except ImportError:
        return
    values: dict[str, Any] = {"task_id": 1, "run_id": run_id, "node_id": node_id}
    for name, value in values.items():
        if getattr(TaskIdentity, f"_{name}", None) is None:
            setattr(TaskIdentity, name, value)


def outlives_messages() -> bool:
    """Return whether this process goes on after the ClientApp has replied, as the simulation's Ray actors do.

    A deployment starts a process for each message, and ends it with the reply.
    """
    ray = _ray()
    return ray is not None and ray.get_runtime_context().get_actor_id() is not None


@contextmanager
def stopped_by_flower() -> Iterator[list[Callable[[], None]]]:
    """Let Flower stop what runs within, when it ends the process: on Ctrl-C, or ``flwr stop``.

    In a deployment Flower raises SystemExit in the main thread, where the ServerApp runs. In the simulation it runs in
    another thread, which nothing tells of the end; there, the functions in the list that this yields are called, and
    Flower's exit waits for the end of the context, a few seconds at most. See Note [Flower's exit].
    """
    stops: list[Callable[[], None]] = []
    over, runner = threading.Event(), threading.get_ident()

    def stop() -> None:
        if not over.is_set() and threading.get_ident() != runner:
            for each in stops:
                each()
            over.wait(_RUN_SECONDS)
            timer = threading.Timer(_RAY_SECONDS, _shut_ray_down)
            timer.daemon = True
            timer.start()

    add_exit_handler(stop)
    try:
        yield stops
    finally:
        over.set()
        stops.clear()


def _shut_ray_down() -> None:
    if (ray := _ray()) is not None:
        ray.shutdown()


def _ray() -> Any:
    """Return Ray, where this process has started it; None as well while another thread is importing it."""
    ray = sys.modules.get("ray")
    started = getattr(ray, "is_initialized", None)  # not there yet in a module that is being imported
    return ray if started is not None and started() else None
