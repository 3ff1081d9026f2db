"""What the server and the clients say to each other: one form of request, one form of reply.

Pure data: how it becomes bytes is the business of ``psl_flower.exchange``, what a stage does that of
``psl_flower.methods``. Everything is in columns, an entry a client: one client is a group of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from psl_flower import tree
from psl_flower.data import ClassNumbers
from psl_flower.errors import ProtocolError
from psl_flower.failures import Failure
from psl_flower.orders import Orders, WorkOrder
from psl_flower.precision import FULL
from psl_flower.privacy import Cohort
from psl_flower.seeds import PutOff, client_epoch_rng, step_seed
from psl_flower.tree import Tree
from psl_flower.typing import IntArray

DESCRIBE = "describe"  # the one stage that every client has, whatever its method

# the part of Flower's message type that tells a node it is not let in; nobody waits for an answer
REFUSED = "refused"

# Flower message type of the invitation to open a stream, over which everything else then travels.
ATTACH = "train.attach"

Config = Mapping[str, Any]

# What clients report decides how much memory a plan and a (clients, classes) table take: bound it.
MAX_EXAMPLES = 10**9
MAX_CLASSES = 100_000


class Kind(Enum):
    """What becomes of a leaf on its way between one server and many clients."""

    ROWS = "rows"  # a row an example: joined over clients, split by quotas
    SUM = "sum"  # added up over clients on the way
    EACH = "each"  # one a client
    SHARED = "shared"  # the same for all


@dataclass(frozen=True, eq=False)
class Leaf:
    """A tree that travels.

    Parameters
    ----------
    kind : Kind
    value : tree
        ROWS: the rows of all clients, in their order. SUM, SHARED: one tree. EACH: a list with a tree a client.
    exact : bool
        Whether rows always travel in full precision; activations and gradients may travel in fewer bits.
    packing : int, optional
        Of rows that tell little: bits that an entry has; 0 where few are other than zero. They may be packed then.
    """

    kind: Kind
    value: Any
    exact: bool = False
    packing: int | None = None


# --- requests --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Weights:
    """The state of one part of the model that lives on the clients, by whole-model name.

    Parameters
    ----------
    parameters : dict of str to Tensor
        Those to return gradients for.
    constants : dict of str to Tensor
        Buffers and frozen parameters.
    version, constants_version : str
        Name these values: no two states of any run share them. Constants keep their version where they do not change.
    """

    parameters: Mapping[str, Tensor]
    constants: Mapping[str, Tensor]
    version: str
    constants_version: str


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """The same question to several clients.

    Parameters
    ----------
    stage : str
        A stage of the method, or `DESCRIBE`.
    nodes : tuple of int
        Whom it is for; Flower's node ids on the wire.
    orders : Orders, optional
        Which examples of each it is about, in the order of `nodes`; None to describe.
    weights : dict of str to Weights
        Of the model's parts on the clients.
    inputs : dict of str to Leaf
        What the stage takes.
    delays : tuple of float
        Seconds each client waits first, as a simulated straggler; empty: none.
    separate : bool
        Whether sums are wanted client by client.
    label_counts : bool
        To describe: whether to count the examples of each class.
    session : str
        To describe: names the run that a key is made for; empty without secure aggregation.
    cohort : Cohort, optional
        Who gives the sums together, where they are masked.
    kept : bool
        Whether what comes is kept by example, so that it must depend on nothing but the example and frozen weights.
    precision : str
        In which the clients' parts compute, one of `psl_flower.precision.PRECISIONS`.
    config, evaluate_config : dict
        The strategy's `train_config`, and what comes on top in evaluation.
    """

    stage: str
    nodes: tuple[int, ...]
    orders: Orders | None = None
    weights: Mapping[str, Weights] = field(default_factory=dict)
    inputs: Mapping[str, Leaf] = field(default_factory=dict)
    delays: tuple[float, ...] = ()
    separate: bool = False
    label_counts: bool = False
    session: str = ""
    cohort: Cohort | None = None
    kept: bool = False
    precision: str = FULL
    config: Config = field(default_factory=dict)
    evaluate_config: Config = field(default_factory=dict)

    @property
    def message_type(self) -> str:
        """Flower's name for it, ``category.action``."""
        if self.orders is None:
            return f"query.{self.stage}"
        return f"{'evaluate' if self.orders.test else 'train'}.{self.stage}"

    def counts(self) -> list[int]:
        """Return how many examples are asked of each node."""
        return [0] * len(self.nodes) if self.orders is None else self.orders.counts.tolist()

    def take(self, positions: Sequence[int]) -> Request:
        """Return the request to some of the nodes, by position."""
        if list(positions) == list(range(len(self.nodes))):
            return self
        chosen, orders = np.asarray(positions, dtype=np.int64), self.orders
        rows = None if orders is None else torch.from_numpy(orders.rows(chosen))

        def part(leaf: Leaf) -> Leaf:
            if leaf.kind is Kind.EACH:
                return Leaf(Kind.EACH, [leaf.value[i] for i in positions])
            return leaf if leaf.kind is not Kind.ROWS or rows is None else Leaf(Kind.ROWS, tree.take(leaf.value, rows))

        return replace(
            self,
            nodes=tuple(self.nodes[i] for i in positions),
            orders=None if orders is None else orders.take(chosen),
            inputs={name: part(leaf) for name, leaf in self.inputs.items()},
            delays=tuple(self.delays[i] for i in positions) if self.delays else (),
        )


# --- replies ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Description:
    """What a client says of itself.

    Parameters
    ----------
    partition_id : int, optional
        From its node configuration.
    num_examples, num_test_examples : int
        Sizes of its training and test data.
    labels, counts : (m,) int64, optional
        The classes it holds and how many examples of each; only if asked for.
    left_out : dict of int to str
        Examples that it found it cannot read, and why; they are not in `counts`.
    method : str
        The way of splitting it was built for.
    model : str
        The parts of its model, as `psl_flower.split` describes them.
    key : bytes
        Its public key; empty without secure aggregation.
    private : str
        Its options of DP-SGD; empty without.
    classes : ClassNumbers, optional
        The numbers of its classes by digests of their names, where its data name them and labels are sent anyway.
    """

    partition_id: int | None
    num_examples: int
    num_test_examples: int
    labels: IntArray | None = None
    counts: IntArray | None = None
    left_out: Mapping[int, str] = field(default_factory=dict)
    method: str = ""
    model: str = ""
    key: bytes = b""
    private: str = ""
    classes: ClassNumbers | None = None

    def same_data(self, other: Description) -> bool:
        """Return whether `other` speaks of as many training examples, of the same classes."""
        mine, theirs = ((d.num_examples, _listed(d.labels), _listed(d.counts)) for d in (self, other))
        return mine == theirs

    def check(self, *, label_counts: bool) -> None:
        """Raise ProtocolError if the numbers are impossible."""
        for name, size in (("num_examples", self.num_examples), ("num_test_examples", self.num_test_examples)):
            if not 0 <= size <= MAX_EXAMPLES:
                raise ProtocolError(f"{name} must be from 0 to {MAX_EXAMPLES}, got {size}")
        if self.partition_id is not None and self.partition_id < 0:
            raise ProtocolError(f"partition-id must not be negative, got {self.partition_id}")
        if not label_counts:
            return
        labels, counts = self.labels, self.counts
        if labels is None or counts is None or labels.shape != counts.shape or labels.ndim != 1:
            raise ProtocolError("label counts were asked for: expected one count for each label")
        if labels.size and (labels.min() < 0 or counts.min() < 0):
            raise ProtocolError("labels and their counts must not be negative")
        if labels.size and labels.max() >= MAX_CLASSES:
            raise ProtocolError(f"labels must be below {MAX_CLASSES}, got {labels.max()}")
        if len(np.unique(labels)) != len(labels):
            raise ProtocolError("labels must be unique")
        # each count on its own first: the sum of huge ones wraps around
        readable = self.num_examples - len(self.left_out)
        if (counts > readable).any() or counts.sum() != readable:
            raise ProtocolError(f"label counts add up to {counts.sum()}, {readable} examples can be read")


@dataclass(frozen=True, eq=False)
class Part:
    """A piece of a reply.

    Parameters
    ----------
    nodes : tuple of int
        Whose it is: rows are in this order, sums are over these.
    outputs : dict of str to Leaf
        What the stage returned.
    step : int, optional
        Echo of the orders' step.
    checksums : (A,) int64, optional
        Tags of the batches the clients drew, each made with its client's secret: they say nothing to others.
    """

    nodes: tuple[int, ...]
    outputs: Mapping[str, Leaf] = field(default_factory=dict)
    step: int | None = None
    checksums: IntArray | None = None


@dataclass(eq=False)
class Reply:
    """What came of a request: parts for some nodes, failures or descriptions for others.

    Parameters
    ----------
    parts : list of Part
    failures : dict of int to Failure
    descriptions : dict of int to Description
        Only to `DESCRIBE`.
    seconds : dict of int to float
        How long each client worked; of what was done for several at once, its share by examples.
    busy : float
        Seconds that the process which took longest was at work, by its own clock.
    bytes_sent, bytes_received : int
        Bytes of tensors.
    """

    parts: list[Part] = field(default_factory=list)
    failures: dict[int, Failure] = field(default_factory=dict)
    descriptions: dict[int, Description] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    busy: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0

    def add(self, other: Reply) -> None:
        """Add what came of the same request from other nodes."""
        self.parts += other.parts
        self.failures |= other.failures
        self.descriptions |= other.descriptions
        self.seconds |= other.seconds
        self.busy = max(self.busy, other.busy)
        self.bytes_sent += other.bytes_sent
        self.bytes_received += other.bytes_received

    def answered(self) -> set[int]:
        """Return the nodes it says something of."""
        return {n for part in self.parts for n in part.nodes} | self.failures.keys() | self.descriptions.keys()

    def renamed(self, names: Mapping[int, int]) -> Reply:
        """Return the reply with other names for the nodes."""
        return replace(
            self,
            parts=[replace(part, nodes=tuple(names[n] for n in part.nodes)) for part in self.parts],
            failures={names[n]: failure for n, failure in self.failures.items()},
            descriptions={names[n]: d for n, d in self.descriptions.items()},
            seconds={names[n]: s for n, s in self.seconds.items() if n in names},
        )


def _listed(values: IntArray | None) -> list[int] | None:
    return None if values is None else [int(v) for v in values]


__all__ = [
    "ATTACH",
    "DESCRIBE",
    "MAX_CLASSES",
    "MAX_EXAMPLES",
    "REFUSED",
    "Config",
    "Description",
    "Kind",
    "Leaf",
    "Orders",
    "Part",
    "PutOff",
    "Reply",
    "Request",
    "Tree",
    "Weights",
    "WorkOrder",
    "client_epoch_rng",
    "step_seed",
]
