"""What a process keeps between messages. All of it can be rebuilt: losing it costs time, never a result.

Clients' own parts are the exception: a client that loses them is out of the round, see ``client/own.py``. Over messages
they are kept in the node's Flower state as well, see ``client/keeping.py``, like the secrets and keys of clients.

Note [Process state]: Flower's simulation sends the ClientApp to the Ray actor with every message and unpickles it
afresh, so its handlers, their attributes and the globals they name are copies, and a cache there stays empty. State
must live in a plain module, reached through an importable function. This is that module.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from psl_flower.client.client import SplitClient
from psl_flower.client.context import ClientContext
from psl_flower.client.own import OwnParts
from psl_flower.client.part import ClientPart, LossFn
from psl_flower.exchange.codec import WeightStore
from psl_flower.methods import SplitMethod
from psl_flower.privacy import DPSGD, LabelNoise, Party, Secret, SecureAggregation
from psl_flower.privacy.defences import Defence
from psl_flower.refusals import Refusals

# Bytes of activations whose graphs are kept for the backward pass; a graph that was dropped is computed again.
MAX_GRAPH_BYTES = 512 * 2**20

# Runs whose parts and data are kept; a process of the simulation serves one, a notebook may alternate between two.
_MAX_RUNS = 2


class ContextCache:
    """What the stages of a step kept, bounded by the bytes of it; the oldest go first.

    What identifies the work is a tuple, and its first item names weights and step. What belongs to another step than
    the latest can never be used again: it is dropped, however much room there is.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._step: Hashable = None
        self._contexts: OrderedDict[Hashable, tuple[ClientContext, int]] = OrderedDict()

    def put(self, work: tuple[Hashable, ...], context: ClientContext) -> None:
        """Keep what a step's work left."""
        if work[0] != self._step:
            self._step, self._bytes = work[0], 0
            self._contexts.clear()
        self.pop(work)
        size = context.num_bytes()
        self._contexts[work] = (context, size)
        self._bytes += size
        while self._bytes > self._max_bytes:
            _, (_, dropped) = self._contexts.popitem(last=False)
            self._bytes -= dropped

    def pop(self, work: tuple[Hashable, ...]) -> ClientContext | None:
        """Return it if it is there, and forget it."""
        context, size = self._contexts.pop(work, (None, 0))
        self._bytes -= size
        return context

    def __len__(self) -> int:
        return len(self._contexts)


class RunState:
    """What a process keeps of one run: the parts of the model, the clients, and what steps under way need."""

    def __init__(self) -> None:
        self.parts: dict[str, ClientPart] | None = None
        self.signature = ""
        self.loss: LossFn | None = None
        self.method: SplitMethod | None = None  # where the run's configuration names it
        self.clients: dict[tuple[int, Hashable], SplitClient] = {}  # by node and configuration
        self.contexts = ContextCache(MAX_GRAPH_BYTES)
        self.weights = WeightStore()
        self.own = OwnParts()
        self.own_versions: dict[int, str] = {}  # by node, of what its Flower state holds, see keeping.py
        self.secure: SecureAggregation | None = None
        self.parties: dict[int, Party] = {}  # by node
        self.keys_told: set[bytes] = set()
        self.label_noise: LabelNoise | None = None
        self.defences: tuple[Defence, ...] = ()
        self.private: DPSGD | None = None
        self.secrets: dict[int, Secret] = {}  # by node
        self.one_at_a_time = False
        self.refusals = Refusals("what the server asks of {}")

    def secret(self, node: int) -> Secret:
        """Return a client's secret in the run, made when it is first needed."""
        if node not in self.secrets:
            self.secrets[node] = Secret()
        return self.secrets[node]


_runs: OrderedDict[int, RunState] = OrderedDict()


def run_state(run_id: int) -> RunState:
    """Return what this process keeps of a run."""
    if run_id not in _runs:
        _runs[run_id] = RunState()
    _runs.move_to_end(run_id)
    while len(_runs) > _MAX_RUNS:
        _runs.popitem(last=False)
    return _runs[run_id]


def forget_runs() -> None:
    """Drop everything: the next message finds a process as good as new."""
    _runs.clear()
