"""What a client must have again at its next message, kept in its node's Flower state, which stays with the node.

A deployment answers each message in a new process, and the simulation in any of its actors.
"""

from __future__ import annotations

import logging
import secrets
from typing import Any

from flwr.app import ConfigRecord, Context

from psl_flower import checkpoint
from psl_flower.client.process import RunState
from psl_flower.exchange.codec import CONSTANTS
from psl_flower.exchange.limits import MAX_KEPT
from psl_flower.exchange.streams.security import PROCESS_ID
from psl_flower.privacy import GradientScrutiny, Party, Secret
from psl_flower.tree import num_bytes

_SECRET, _PARTY, _OWN = "psl_flower.secret", "psl_flower.party", "psl_flower.own"
_PROCESS, _WEIGHTS = "psl_flower.process", "psl_flower.weights"

log = logging.getLogger("flwr.psl_flower")


def restore(state: RunState, context: Context) -> None:
    """Take up a client's secret, its key and what it has given: another process may have been last."""
    node = context.node_id
    if secret := _read(context, _SECRET):
        state.secrets[node] = Secret(secret["value"])
    if kept := _read(context, _PARTY):
        party = state.parties.get(node)
        if party is None or party.private != kept["private"]:
            party = state.parties[node] = Party(kept["session"], kept["private"])
        party.load_state_dict(kept)


def keep(state: RunState, context: Context) -> None:
    """Keep a client's secret, its key and what it has given for the next message."""
    node = context.node_id
    if node in state.secrets:
        _write(context, _SECRET, {"value": state.secrets[node].value})
    if node in state.parties:
        _write(context, _PARTY, state.parties[node].state_dict())


def keep_weights(state: RunState, context: Context) -> None:
    """Keep the weights that do not change for the process that answers the next message, unless they are too large."""
    kept = state.weights.state_dict(CONSTANTS)
    if sum(num_bytes(part["tensors"]) for part in kept.values()) > MAX_KEPT:
        return
    text, tensors = checkpoint.dumps(kept)
    _write(context, _WEIGHTS, {"tree": text, "tensors": tensors})


def restore_weights(state: RunState, context: Context) -> None:
    """Take up the weights that do not change, if an earlier message's process has kept them."""
    if kept := _read(context, _WEIGHTS):
        state.weights.load_state_dict(CONSTANTS, checkpoint.loads(kept["tree"], kept["tensors"]))


def warn_of_processes(state: RunState, context: Context) -> None:
    """Log once where one process after another answers for a client: what each has seen comes to little."""
    if not any(isinstance(each, GradientScrutiny) for each in state.defences):
        return
    before = _read(context, _PROCESS)
    if before.get("of", PROCESS_ID) != PROCESS_ID and not before["warned"]:
        log.warning(
            "GradientScrutiny judges too little here, perhaps nothing: messages to this client come to one process "
            "after another, and it knows only what its own has seen. It needs streams, or a process that stays"
        )
        before["warned"] = True
    _write(context, _PROCESS, {"of": PROCESS_ID, "warned": before.get("warned", False)})


def take_own(state: RunState, context: Context) -> None:
    """Let a client go on with its own parts of the model, if those were last changed in another process."""
    record, node = _read(context, _OWN), context.node_id
    if not record or record["version"] == state.own_versions.get(node):
        return
    assert state.parts is not None  # of a client that has been made
    state.own.load_state_dict(node, checkpoint.loads(record["tree"], record["tensors"]), state.parts)
    state.own_versions[node] = record["version"]


def keep_own(state: RunState, context: Context) -> None:
    """Keep a client's own parts of the model for the next message."""
    kept, node = state.own.state_dict(context.node_id), context.node_id
    if kept is None:
        return
    text, tensors = checkpoint.dumps(kept)
    state.own_versions[node] = secrets.token_hex(8)
    _write(context, _OWN, {"version": state.own_versions[node], "tree": text, "tensors": tensors})


def _read(context: Context, name: str) -> dict[str, Any]:
    record = context.state.get(name)
    return dict(record) if isinstance(record, ConfigRecord) else {}


def _write(context: Context, name: str, values: dict[str, Any]) -> None:
    context.state[name] = ConfigRecord(values)
