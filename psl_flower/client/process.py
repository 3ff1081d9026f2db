"""What a process keeps between messages. All of it can be rebuilt: losing it costs time, never a result.

Note [Process state]: Flower's simulation sends the ClientApp to the Ray actor with every message and unpickles it
afresh, so its handlers, their attributes and the globals they name are copies, and a cache there stays empty. State
must live in a plain module, reached through an importable function. This is that module.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import nn

from psl_flower.client.client import SplitClient
from psl_flower.client.worker import Graph

T = TypeVar("T")

# Bytes of activations whose graphs are kept for the backward pass; a graph that was dropped is computed again.
MAX_GRAPH_BYTES = 512 * 2**20

# Runs whose halves and data are kept; a process of the simulation serves one, a notebook may alternate between two.
_MAX_RUNS = 2


class GraphCache:
    """The last forward pass of each client, bounded by the bytes of activations; the oldest go first.

    What identifies the work of a forward pass is a tuple, and its first item names the weights. A graph of other
    weights than the latest can never be used again: it is dropped, however much room there is.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._weights: Hashable = None
        self._graphs: OrderedDict[Hashable, tuple[Hashable, Graph]] = OrderedDict()

    def put(self, client: Hashable, work: tuple[Hashable, ...], graph: Graph) -> None:
        """Keep the graph of a client's work in place of the client's previous one."""
        if work[0] != self._weights:
            self._weights, self._bytes = work[0], 0
            self._graphs.clear()
        self.pop(client, work)
        self._graphs[client] = (work, graph)
        self._bytes += graph.num_bytes()
        while self._bytes > self._max_bytes:
            _, (_, dropped) = self._graphs.popitem(last=False)
            self._bytes -= dropped.num_bytes()

    def pop(self, client: Hashable, work: tuple[Hashable, ...]) -> Graph | None:
        """Return the graph of a client's work if it is there, and forget whatever there is of that client."""
        found = self._graphs.pop(client, None)
        if found is None:
            return None
        self._bytes -= found[1].num_bytes()
        return found[1] if found[0] == work else None

    def __len__(self) -> int:
        return len(self._graphs)


class RunState:
    """What a process keeps of one run: one client half for all its clients, the clients, and their graphs."""

    def __init__(self) -> None:
        self.half: nn.Module | None = None
        self.clients: dict[Hashable, SplitClient] = {}
        self.graphs = GraphCache(MAX_GRAPH_BYTES)


_runs: OrderedDict[int, RunState] = OrderedDict()


def run_state(run_id: int) -> RunState:
    """Return what this process keeps of a run."""
    return _remember(_runs, run_id, RunState, _MAX_RUNS)


def forget_runs() -> None:
    """Drop everything: the next message finds a process as good as new."""
    _runs.clear()


def _remember(kept: OrderedDict[Any, T], key: Any, make: Callable[[], T], limit: int) -> T:
    if key not in kept:
        kept[key] = make()
    kept.move_to_end(key)
    while len(kept) > limit:
        kept.popitem(last=False)
    return kept[key]
