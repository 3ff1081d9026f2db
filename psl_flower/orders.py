"""Which examples of their own clients take to a step: what the server orders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from psl_flower.seeds import PutOff, client_epoch_rng, epoch_order, step_seed, step_seeds
from psl_flower.typing import IntArray


@dataclass(frozen=True, eq=False, kw_only=True)
class WorkOrder:
    """Which examples of its own one client takes to a step; see `Orders`."""

    client: int
    seed: int
    epoch: int
    step: int
    start: int
    count: int
    class_starts: IntArray | None = None
    class_counts: IntArray | None = None
    left_out: tuple[int, ...] = ()
    put_off: PutOff = ()
    drawing: int | None = None
    test: bool = False

    def epoch_rng(self) -> np.random.Generator:
        """Return the generator of the client's order of examples for the epoch."""
        return client_epoch_rng(self.seed, self.epoch, self.client)

    def order_of(self, size: int) -> IntArray:
        """Return the client's order of so many examples, (n,) int64; by class, if at all, it is put off later."""
        if self.test:
            return np.setdiff1d(np.arange(size), self.left_out)
        return epoch_order(self.epoch_rng(), size, self.left_out, self.put_off)

    def lot(self) -> bytes:
        """Return what a client draws its examples for, with a secret of its own: the same for an order repeated."""
        return f"examples {self.drawing} {self.epoch} {self.step} {self.start}".encode()

    def step_seed(self) -> int:
        """Return the seed of everything random in the client's step (augmentation, dropout)."""
        return 0 if self.test else step_seed(self.seed, self.epoch, self.step, self.client)


@dataclass(frozen=True, eq=False, kw_only=True)
class Orders:
    """Which examples of their own the clients take to a step.

    Client k's order for an epoch is ``default_rng([seed, epoch, k]).permutation(n_k)`` without the rows left out; the
    batch is ``order[start:start + count]``. With class quotas, class c's order is the label-c subsequence and the batch
    is ``order_c[class_starts[c]:class_starts[c] + class_counts[c]]``, in ascending c. With a `drawing` there is no
    order of an epoch: each client draws its examples for the step by a secret of its own. Clients keep no state: the
    same order always gives the same batch, on any process. Test data is taken in its own order.

    Parameters
    ----------
    clients : (A,) int64
        Client ids, ascending.
    starts, counts : (A,) int64
        Examples used before in this epoch, and examples to draw (at least 1).
    seed, epoch, step : int
        Not negative.
    class_starts, class_counts : (A, C) int64, optional
        The same for each class; both or neither.
    left_out : dict of int to tuple of int
        By client: indices in its training data that it cannot read.
    put_off : dict of int to PutOff
        By client: what of its order comes last instead, since a step with it was given up.
    drawing : int, optional
        Names the draws of an epoch, so that those of another are others.
    checksums : (A,) int64, optional
        What the clients gave as tags of the batches as first drawn: one that is drawn again must have the same.
    test : bool
        Whether it is test data, which is evaluated, not trained on.
    """

    clients: IntArray
    starts: IntArray
    counts: IntArray
    seed: int = 0
    epoch: int = 0
    step: int = 0
    class_starts: IntArray | None = None
    class_counts: IntArray | None = None
    left_out: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    put_off: Mapping[int, PutOff] = field(default_factory=dict)
    drawing: int | None = None
    checksums: IntArray | None = None
    test: bool = False

    def __len__(self) -> int:
        return len(self.clients)

    @property
    def num_rows(self) -> int:
        """Examples of all clients together."""
        return int(self.counts.sum())

    def take(self, positions: IntArray) -> Orders:
        """Return the orders of some of the clients, by position."""
        ids = set(self.clients[positions].tolist())
        return replace(
            self,
            clients=self.clients[positions],
            starts=self.starts[positions],
            counts=self.counts[positions],
            class_starts=None if self.class_starts is None else self.class_starts[positions],
            class_counts=None if self.class_counts is None else self.class_counts[positions],
            left_out={client: rows for client, rows in self.left_out.items() if client in ids},
            put_off={client: moved for client, moved in self.put_off.items() if client in ids},
            checksums=None if self.checksums is None else self.checksums[positions],
        )

    def examples(self) -> dict[int, int]:
        """Return how many examples each client takes."""
        return dict(zip(self.clients.tolist(), self.counts.tolist(), strict=True))

    def without(self, clients: Iterable[int]) -> Orders:
        """Return the orders of all but some clients."""
        return self.take(np.flatnonzero(~np.isin(self.clients, list(clients))))

    def each(self) -> Iterator[WorkOrder]:
        """Yield each client's own order."""
        yield from self._each

    @cached_property
    def _each(self) -> list[WorkOrder]:
        columns = (self.clients.tolist(), self.starts.tolist(), self.counts.tolist())
        return [
            WorkOrder(
                client=client,
                seed=self.seed,
                epoch=self.epoch,
                step=self.step,
                start=start,
                count=count,
                class_starts=None if self.class_starts is None else self.class_starts[i],
                class_counts=None if self.class_counts is None else self.class_counts[i],
                left_out=self.left_out.get(client, ()),
                put_off=self.put_off.get(client, ()),
                drawing=self.drawing,
                test=self.test,
            )
            for i, (client, start, count) in enumerate(zip(*columns, strict=True))
        ]

    def step_seeds(self) -> list[int]:
        """Return the `WorkOrder.step_seed` of each client."""
        if self.test:
            return [0] * len(self)
        steps = np.full(len(self), self.step, dtype=np.int64)
        return list(step_seeds(self.seed, self.epoch, steps, self.clients).tolist())

    def rows(self, positions: IntArray) -> IntArray:
        """Return which rows of the joint batch those of some clients are, (n,) int64."""
        ends = np.cumsum(self.counts)
        counts = self.counts[positions]
        offsets = np.repeat(ends[positions] - np.cumsum(counts), counts)
        return np.asarray(np.arange(len(offsets)) + offsets, dtype=np.int64)

    def client_of(self, row: int) -> int:
        """Return whose a row of the joint batch is."""
        return int(self.clients[np.searchsorted(np.cumsum(self.counts), row, side="right")])
