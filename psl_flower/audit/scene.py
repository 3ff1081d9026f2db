"""What an attack is given: what the server has of a run, and apart from it what is true."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from psl_flower import tree
from psl_flower.audit.recording import Exchange, Recording
from psl_flower.protocol import Kind, Leaf, Weights
from psl_flower.split.model import Halves
from psl_flower.typing import IntArray

BoolArray = NDArray[np.bool_]
_TOGETHER = 256  # rows that a part is run on at once, about


@dataclass(frozen=True, eq=False, kw_only=True)
class Rows:
    """Rows of one leaf that crossed in training, with what is true of each.

    Parameters
    ----------
    where : str
        The stage that it belongs to.
    crossed : list of tree
        What was seen, as it crossed in each exchange. It is large: `seen` has what an attack looks at.
    inputs : (N, ...) Tensor
        True: the clients' inputs, as the model was given them.
    labels : (N,) int64
        True.
    shadow : (N,) bool
        Rows of clients that are in league with the server, who told it inputs and labels; or of clients that it
        invented, with public data. All else is to be found out.
    exchanges : list of Exchange
        Where they are from, in their order.
    """

    where: str
    crossed: list[tree.Tree]
    inputs: Tensor
    labels: IntArray
    shadow: BoolArray
    exchanges: list[Exchange]

    def seen(self, positions: IntArray) -> Tensor:
        """Return what was seen of some rows, (n, ...) float32; what crosses as several tensors, flattened into one."""
        counts = [exchange.order.count for exchange in self.exchanges]
        where, ends = np.argsort(positions, kind="stable"), np.cumsum(counts)
        found: Tensor | None = None
        for crossed, end, count in zip(self.crossed, ends, counts, strict=True):
            first, last = np.searchsorted(positions[where], (end - count, end))
            its = where[first:last]
            if len(its):
                rows = one_tensor(crossed)[torch.from_numpy(positions[its] - (end - count))]
                found = rows.new_empty(len(positions), *rows.shape[1:]) if found is None else found
                found[torch.from_numpy(its)] = rows
        return torch.empty(0) if found is None else found

    def __len__(self) -> int:
        return len(self.labels)

    def chosen(self, most: int, rng: np.random.Generator) -> IntArray:
        """Return the positions, in ascending order, of at most so many rows of the attacker's, and of others, each."""
        both = (np.flatnonzero(self.shadow), np.flatnonzero(~self.shadow))
        return np.sort(np.concatenate([rng.permutation(of)[:most] for of in both]))


@dataclass(frozen=True, eq=False, kw_only=True)
class Scene:
    """A run that was recorded, seen by an attacker.

    Parameters
    ----------
    recording : Recording
        Of the last round.
    halves : Halves
        The model's parts with their final weights, all of which the server has: it steps the one optimizer.
    test : tuple of Tensor
        Inputs and labels that nobody trained on.
    shadow : frozenset of int
        Clients in league with the server.
    num_classes : int
    seed : int
        Of the attacks.
    """

    recording: Recording
    halves: Halves
    test: tuple[Tensor, Tensor]
    shadow: frozenset[int]
    num_classes: int
    seed: int = 0

    def rng(self) -> np.random.Generator:
        """Return a generator for an attack."""
        return np.random.default_rng(self.seed)

    def rows(self, name: str, where: str = "") -> Rows | None:
        """Return the rows of a leaf of that name; None if none crosses."""
        return next((rows for rows in self.every(name) if where in ("", rows.where)), None)

    def every(self, name: str, *, test: bool = False) -> list[Rows]:
        """Return the rows of all leaves of that name, a stage each: of training, or of evaluation."""
        found: dict[str, list[tuple[Exchange, Any]]] = {}
        for exchange in self.recording.exchanges if test else self.training:
            if exchange.order.test != test:
                continue
            leaf = {**exchange.sent, **exchange.received}.get(name)
            if leaf is not None and leaf.kind is Kind.ROWS and leaf.value is not None:
                found.setdefault(exchange.stage, []).append((exchange, leaf.value))
        return [self._rows(stage, seen) for stage, seen in found.items()]

    def sums(self, name: str) -> list[tuple[Exchange, Leaf]]:
        """Return every sum of that name that a client has given, with its exchange."""
        seen = ((exchange, exchange.received.get(name)) for exchange in self.training)
        return [(exchange, leaf) for exchange, leaf in seen if leaf is not None and leaf.kind is Kind.SUM]

    @cached_property
    def training(self) -> list[Exchange]:
        """The exchanges of training."""
        return [each for each in self.recording.exchanges if not each.order.test]

    def answers(self, *, test: bool) -> tuple[IntArray, Rows] | None:
        """Return what the final model says of the examples that crossed, (N,) classes, and their rows.

        None where that takes something that does not cross.
        """
        outputs, seen = self.every("outputs", test=test), self.every("activations", test=test)
        last, behind = (seen, self.halves.server) if not outputs else (outputs, self.tail)
        if not last or behind is None:
            return None
        with torch.no_grad():
            joined = (tree.join(crossed, "what crossed") for crossed in _groups(last[0].crossed, len(last[0])))
            said: IntArray = torch.cat([run(behind.eval(), of).argmax(dim=1) for of in joined]).numpy()
        return said, last[0]

    @property
    def tail(self) -> nn.Module | None:
        """The tail, where all that it takes crosses from the server: nothing is handed to it past that."""
        skipping = any(leaf.value is not None for _, leaf in self.sums("past"))
        return None if skipping else self.halves.tail

    @cached_property
    def data_range(self) -> float:
        """The span of the inputs' values: what one in league with the server has, who knows how they are scaled."""
        shadow = [self.recording.inputs(e.order) for e in self.training if e.order.client in self.shadow]
        return float(max(t.max() for t in shadow) - min(t.min() for t in shadow))

    def _rows(self, stage: str, seen: list[tuple[Exchange, Any]]) -> Rows:
        orders = [exchange.order for exchange, _ in seen]
        clients = np.repeat([order.client for order in orders], [order.count for order in orders])
        return Rows(
            where=stage,
            crossed=[value for _, value in seen],
            inputs=torch.cat([self.recording.inputs(order) for order in orders]),
            labels=torch.cat([self.recording.labels(order) for order in orders]).numpy(),
            shadow=np.isin(clients, sorted(self.shadow)),
            exchanges=[exchange for exchange, _ in seen],
        )


def _groups(crossed: list[tree.Tree], rows: int) -> list[list[tree.Tree]]:
    """Return exchanges in groups of about as many: a model may take no single row, and all at once take much memory."""
    ends = np.linspace(0, len(crossed), min(len(crossed), -(-rows // _TOGETHER)) + 1).astype(int)
    return [crossed[begin:end] for begin, end in pairwise(ends)]


def one_tensor(value: Any) -> Tensor:
    """Return rows that crossed as one float32 tensor."""
    leaves = [leaf.float() for leaf in tree.leaves(value)]
    return leaves[0] if len(leaves) == 1 else torch.cat([leaf.flatten(1) for leaf in leaves], dim=1)


def run(part: nn.Module, crossed: tree.Tree) -> Any:
    """Return what a part makes of what crosses to it."""
    return part(*crossed) if isinstance(crossed, tuple) else part(crossed)


def with_weights(part: nn.Module, weights: Weights) -> nn.Module:
    """Return a copy of a part with weights that were sent, in evaluation mode and without gradients of its own."""
    made = copy.deepcopy(part)
    made.load_state_dict({**made.state_dict(), **weights.parameters, **weights.constants})
    return made.eval().requires_grad_(False)


def crossing(head: nn.Module, inputs: Tensor) -> Tensor:
    """Return what a head sends of some inputs, as one tensor."""
    sent = head(inputs)
    if isinstance(sent, tuple) and len(sent) == 2 and isinstance(sent[0], tuple):
        sent = sent[0]  # of three parts: what is kept for the tail does not cross
    return one_tensor(sent)


def mean_image(rows: Rows) -> Tensor:
    """Return the mean of the inputs that the attacker has, as often as there are others, (N, ...)."""
    victims = rows.inputs[~rows.shadow]
    return rows.inputs[rows.shadow].mean(dim=0, keepdim=True).expand_as(victims)
