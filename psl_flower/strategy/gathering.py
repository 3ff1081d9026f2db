"""What clients sent, as the method sees it: rows joined, sums added up; and whose rows are at fault."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from psl_flower import tree
from psl_flower.data import IGNORED
from psl_flower.errors import LabelError, StepError
from psl_flower.failures import Failure, Kind
from psl_flower.methods.base import Stage
from psl_flower.protocol import Kind as LeafKind
from psl_flower.protocol import Orders, Part
from psl_flower.tree import Tree


def gather(
    stage: Stage, parts: list[Part], orders: Orders, asked: Orders, clip: Any, *, texts: bool = False
) -> SimpleNamespace:
    """Return what clients sent as the method sees it, in ascending client id whoever sent it with whom.

    Parameters
    ----------
    orders : Orders
        Of the clients whose rows are wanted.
    asked : Orders
        Of all whose rows may be in the parts.
    texts : bool
        Whether rows may differ in length: they are padded to the longest, see `psl_flower.split.lengths`.
    """
    parts = sorted(parts, key=lambda part: min(part.nodes))
    nodes = [node for part in parts for node in part.nodes]
    position = {node: i for i, node in enumerate(nodes)}
    order = np.array([position[client] for client in orders.clients.tolist()], dtype=np.int64)
    chosen = None
    if not np.array_equal(order, np.arange(len(nodes))):
        counts = asked.counts[np.searchsorted(asked.clients, nodes)]
        starts = np.cumsum(counts) - counts
        chosen = torch.from_numpy(np.concatenate([np.arange(starts[i], starts[i] + counts[i]) for i in order]))
    found: dict[str, Any] = {}
    for name, kind in stage.outputs.items():
        if kind is LeafKind.ROWS:
            fill = IGNORED if name in stage.exact and stage.trains else 0  # labels; predictions end in zeros
            joined = tree.join([part.outputs[name].value for part in parts], name, fill=fill if texts else None)
            found[name] = joined if chosen is None else tree.take(joined, chosen)
        elif kind is LeafKind.SUM:
            total: Tree = None
            for part in clip(parts, name) if clip else parts:
                total = tree.add(total, part.outputs[name].value)
            found[name] = total
        else:
            values = [value for part in parts for value in part.outputs[name].value]
            found[name] = [values[i] for i in order]
    return SimpleNamespace(**found)


def by_client(error: LabelError, orders: Orders) -> dict[int, Failure]:
    """Return the failures of the clients whose rows cannot be used; raise StepError where it cannot be told whose."""
    if not error.rows:
        raise StepError(str(error)) from error
    failures: dict[int, Failure] = {}
    for row in error.rows:
        failures.setdefault(orders.client_of(row), Failure(Kind.LABELS, str(error)))
    return failures
