"""Which examples every step of a round trains on: a plan's quotas filled with rows of the pooled data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from psl_flower.batch_plan import BatchPlan
from psl_flower.partition.split import Rows
from psl_flower.population import Population
from psl_flower.protocol import client_epoch_rng
from psl_flower.typing import IntArray


@dataclass(frozen=True, eq=False)
class Schedule:
    """A plan and the examples that fill it.

    Parameters
    ----------
    plan : BatchPlan
        T steps with E entries. It need not use every example once: clients may pass over their data several times.
    rows : (M,) int64
        Rows of the training data, entry after entry; M is the sum of the quotas.
    """

    plan: BatchPlan
    rows: IntArray

    def bounds(self) -> IntArray:
        """Return where each step's rows begin, and where the last one's end: (T + 1,) int64."""
        return np.concatenate(([0], np.cumsum(self.plan.batch_sizes())))

    def class_counts(self, labels: IntArray, num_classes: int) -> IntArray:
        """Return the examples of each class in every step, (T, C), given the labels of all training data."""
        num_steps = len(self.plan)
        step = np.repeat(np.arange(num_steps), self.plan.batch_sizes())
        counts = np.bincount(step * num_classes + labels[self.rows], minlength=num_steps * num_classes)
        return counts.reshape(num_steps, num_classes)


def fill_plan(plan: BatchPlan, shares: Sequence[Rows], labels: IntArray, *, seed: int, epoch: int) -> Schedule:
    """Fill an epoch's plan with exactly the examples that the clients would draw (see `WorkOrder`), all at once.

    Client k takes its epoch's order from the front, a quota at a time; with class quotas, each class's order. So its
    orders one behind the other name, example by example, the entry that takes it: the entries of the client by step,
    each as often as its quota says. A stable sort by entry then gives the batches.

    Parameters
    ----------
    plan : BatchPlan
        Uses every example of its population once, as every sampler's does.
    shares : sequence of (n_k,) int arrays
        The rows of the training data that each client holds, by client id.
    labels : (N,) int64
        Of the training data.
    seed, epoch : int
        Of the clients' orders.
    """
    clients = plan.population.client_ids.tolist()
    orders = [shares[k][client_epoch_rng(seed, epoch, k).permutation(len(shares[k]))] for k in clients]
    rows = np.concatenate(orders)  # (N,)
    quotas = plan.quotas[:, None] if plan.class_quotas is None else plan.class_quotas  # (E, C), C = 1: any class
    num_classes = quotas.shape[1]
    if num_classes > 1:
        owner = np.repeat(np.arange(len(clients)), [len(order) for order in orders])
        rows = rows[np.lexsort((labels[rows], owner))]  # stable: within a class the epoch's order stays
    cells = plan.rows()[:, None] * num_classes + np.arange(num_classes)  # (E, C): by client, then class
    order = np.argsort(cells, axis=None, kind="stable")  # then by step
    entry = np.repeat(order // num_classes, quotas.reshape(-1)[order])  # (N,): who takes each of `rows`
    return Schedule(plan, rows[np.argsort(entry, kind="stable")].astype(np.int64))


def client_turns(
    population: Population,
    shares: Sequence[Rows],
    clients: Iterable[int],
    *,
    batch_size: int,
    local_epochs: int,
    seed: int,
    epoch: int,
) -> Schedule:
    """Let clients train one after another, each on batches of its own data.

    Parameters
    ----------
    population : Population
        All clients.
    shares : sequence of (n_k,) int arrays
        The rows of the training data that each client holds, by client id.
    clients : iterable of int
        In the order of their turns; those without data have none.
    batch_size : int
        At most so many examples a batch. A client's n_k examples make ceil(n_k / batch_size) batches that differ in
        size by at most 1: a last batch of a single example would break batch norm.
    local_epochs : int
        Passes over its data in a turn, each in an order of its own.
    seed, epoch : int
        Of the orders; the first pass's is that of every other algorithm.
    """
    rows, steps, sizes = [], [], []
    for k in clients:
        rng, share = client_epoch_rng(seed, epoch, k), shares[k]
        num_batches = -(-len(share) // batch_size)
        for _ in range(local_epochs if len(share) else 0):
            rows.append(share[rng.permutation(len(share))])
            steps += [k] * num_batches
            sizes += [len(part) for part in np.array_split(share, num_batches)]
    plan = BatchPlan(population, np.arange(len(steps) + 1), np.array(steps), np.array(sizes))
    return Schedule(plan, np.concatenate(rows).astype(np.int64))
