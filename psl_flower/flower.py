"""What is needed of Flower beyond its public modules: names that move between releases are only here."""

from __future__ import annotations

import sys
from typing import Any

from flwr.common.constant import ErrorCode

try:
    from flwr.supercore.run import Run as Run
except ImportError:  # before flwr 1.30 or so
    from flwr.common.typing import Run as Run  # type: ignore[attr-defined, no-redef]

# the code of an error reply for a ClientApp that raised
ERROR_CLIENT_APP: int = ErrorCode.CLIENT_APP_RAISED_EXCEPTION


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
    ray = sys.modules.get("ray")  # a process of Ray's has imported it
    if ray is None or not ray.is_initialized():
        return False
    return ray.get_runtime_context().get_actor_id() is not None
