"""Last improvements of a schedule: same-class swaps between steps that let a step's slowest client do one less."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from psl_flower.samplers.allocation import Allocation
from psl_flower.samplers.suppliers import SAME_TIME, Suppliers
from psl_flower.typing import FloatArray, IntArray

# Cells of the table that are looked at in all: half a second to a second. Schedules of 400 steps and 100 clients with
# few classes each run out of gains before.
_MOST_WORK = 1e8

# Cells of the steps x (client, class) table that swaps are looked up in; larger schedules are left as they are.
_MOST_CELLS = 1 << 22


def local_search(suppliers: Suppliers, allocation: Allocation, num_steps: int) -> Allocation:
    """Return a schedule with the same targets that takes no longer.

    The slowest client of a step gives one example of some class less, in exchange for one more in a step where it has
    time to spare; another client makes up for it in both.

    Parameters
    ----------
    suppliers : Suppliers
        K clients, none without data.
    allocation : Allocation
        The schedule.
    num_steps : int
        T.
    """
    clients, labels = suppliers.pairs
    if not suppliers.per_sample.any() or num_steps * len(clients) > _MOST_CELLS:
        return allocation
    table = np.zeros((num_steps, len(clients)), dtype=np.int32)
    num_classes = suppliers.counts.shape[1]
    pair = np.searchsorted(clients * num_classes + labels, allocation.rows * num_classes + allocation.classes)
    np.add.at(table, (allocation.steps, pair), allocation.counts)
    _LocalSearch(suppliers, table).run()
    steps, pair = np.nonzero(table)
    return Allocation(steps, clients[pair], labels[pair], table[steps, pair].astype(np.int64))


class _LocalSearch:
    """Swaps examples in a (T, P) table of steps and (client, class) pairs."""

    def __init__(self, suppliers: Suppliers, table: NDArray[np.int32]) -> None:
        self.suppliers, self.table, self.work = suppliers, table, _MOST_WORK
        self.clients, self.labels = suppliers.pairs
        self.first_pair = np.searchsorted(self.clients, np.arange(len(suppliers.sizes) + 1))
        self.pairs_of_label = [np.flatnonzero(self.labels == c) for c in range(suppliers.counts.shape[1])]
        self.seconds = np.array([self.replies(t).max() for t in range(len(table))])

    def loads(self, step: int) -> IntArray:
        """Return what each client delivers in a step, (K,)."""
        return np.add.reduceat(self.table[step], self.first_pair[:-1])

    def replies(self, step: int) -> FloatArray:
        return self.suppliers.reply(self.loads(step))

    def run(self) -> None:
        """Go through the steps, the longest first, until the work is used up or a whole pass shortens nothing."""
        before = np.inf
        while self.work > 0 and self.seconds.sum() < before * (1 - SAME_TIME):
            before = self.seconds.sum()
            for step in np.argsort(-self.seconds, kind="stable"):
                while self.work > 0 and self.swap(int(step)):
                    pass

    def swap(self, step: int) -> bool:
        """Let the slowest client of a step deliver one example less, and return whether that was possible.

        No step takes longer afterwards; this one takes less, or fewer clients take as long.
        """
        suppliers, seconds = self.suppliers, self.seconds
        loads = self.loads(step)
        slowest = int(suppliers.reply(loads).argmax())
        below = seconds[step] * (1 - SAME_TIME)
        self.work -= len(self.table)
        one_less = suppliers.latency[slowest] + suppliers.per_sample[slowest] * (loads[slowest] - 1)
        if one_less >= below and loads[slowest] > 1:
            return False
        own = slice(self.first_pair[slowest], self.first_pair[slowest + 1])
        elsewhere = suppliers.latency[slowest] + suppliers.per_sample[slowest] * (self.table[:, own].sum(axis=1) + 1)
        takes = elsewhere <= seconds
        takes[step] = False
        steps = np.flatnonzero(takes)
        one_more = suppliers.latency + suppliers.per_sample * (loads + 1)
        best = None
        for pair in np.flatnonzero(self.table[step, own]) + own.start:
            partners = self.pairs_of_label[self.labels[pair]]
            partners = partners[one_more[self.clients[partners]] < below]
            partners = partners[self.clients[partners] != slowest]
            self.work -= len(steps) * len(partners)
            gives = self.table[np.ix_(steps, partners)] > 0
            possible = np.flatnonzero(gives.any(axis=0))
            if not len(possible):
                continue
            found = possible[one_more[self.clients[partners[possible]]].argmin()]
            partner = partners[found]
            if best is None or one_more[self.clients[partner]] < best[0]:
                best = one_more[self.clients[partner]], pair, partner, steps[gives[:, found].argmax()]
        if best is None:
            return False
        _, pair, partner, other = best
        self.table[[step, other], [pair, partner]] -= 1
        self.table[[step, other], [partner, pair]] += 1
        for t in (step, other):
            self.seconds[t] = self.replies(t).max()
        return True
