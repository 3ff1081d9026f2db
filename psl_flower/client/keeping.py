"""Clients' own parts between two messages: kept in the node's Flower state, which goes to whichever process is next.

A deployment answers each message in a new process, and the simulation in any of its actors.
"""

from __future__ import annotations

import secrets

from flwr.app import ConfigRecord, Context

from psl_flower import checkpoint
from psl_flower.client.process import RunState

_RECORD = "psl_flower.own"


def take_own(state: RunState, context: Context) -> None:
    """Let a client go on with what it keeps, if that was last changed in another process."""
    record, node = context.state.get(_RECORD), context.node_id
    if not isinstance(record, ConfigRecord) or record["version"] == state.own_versions.get(node):
        return
    assert state.parts is not None  # of a client that has been made
    state.own.load_state_dict(node, checkpoint.loads(str(record["tree"]), bytes(record["tensors"])), state.parts)  # type: ignore[arg-type]
    state.own_versions[node] = str(record["version"])


def keep_own(state: RunState, context: Context) -> None:
    """Keep what a client has of its own for the next message."""
    kept, node = state.own.state_dict(context.node_id), context.node_id
    if kept is None:
        return
    text, tensors = checkpoint.dumps(kept)
    state.own_versions[node] = secrets.token_hex(8)
    record: dict[str, str | bytes] = {"version": state.own_versions[node], "tree": text, "tensors": tensors}
    context.state[_RECORD] = ConfigRecord(record)  # type: ignore[arg-type]  # its value type is invariant
