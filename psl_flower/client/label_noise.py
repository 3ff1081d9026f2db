"""Class counts that a client tells with noise, where labels stay with it; see ``psl_flower.privacy.LabelNoise``."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from flwr.app import ConfigRecord, Context

from psl_flower.client.process import RunState
from psl_flower.errors import ConfigError
from psl_flower.methods.base import SplitMethod
from psl_flower.protocol import Description

_RECORD = "psl_flower.label_noise"  # in a node's state, which stays with the node


def with_noise(method: SplitMethod, state: RunState, node: int, described: Description) -> Description:
    """Return a description whose class counts have noise, where the method leaves labels with the clients.

    Raises
    ------
    ConfigError
        If there is a class that the noise knows nothing of.
    """
    options = state.label_noise
    if options is None or described.labels is None or described.counts is None or method.sends_labels():
        return described
    if described.labels.size and described.labels[-1] >= options.classes:
        raise ConfigError(f"label_noise is for {options.classes} classes: there is a label beyond them")
    counts = np.zeros(options.classes, dtype=np.int64)
    counts[described.labels] = described.counts
    if node not in state.noises:
        state.noises[node] = options.draw()
    return replace(described, labels=np.arange(options.classes), counts=options.add(counts, state.noises[node]))


def restore(state: RunState, context: Context) -> None:
    """Take up the noise that a node's state holds, for another process may have drawn it."""
    record = context.state.get(_RECORD)
    if isinstance(record, ConfigRecord) and isinstance(noise := record.get("noise"), bytes):
        state.noises[context.node_id] = np.frombuffer(noise, dtype=np.int64)


def keep(state: RunState, context: Context) -> None:
    """Put a client's noise into its node's state."""
    if context.node_id in state.noises:
        context.state[_RECORD] = ConfigRecord({"noise": state.noises[context.node_id].tobytes()})
