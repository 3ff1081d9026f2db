"""LB: class targets first, then for each step the suppliers that complete it soonest."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from psl_flower.batch_plan import BatchPlan
from psl_flower.checks import check_choice
from psl_flower.population import Population
from psl_flower.samplers.allocation import Allocation
from psl_flower.samplers.suppliers import Suppliers
from psl_flower.samplers.targeted import TargetedSampler, epoch_time
from psl_flower.typing import FloatArray, IntArray

# Note [What a flow schedule costs]: a step needs about three maximum flows; one takes about this long and this much an
# edge (K = 64 to 1,000, scipy 1.17, measured). "auto" must not read a clock: its plan would not be reproducible.
_FLOWS_A_STEP, _SECONDS_A_FLOW, _SECONDS_AN_EDGE = 3, 2e-4, 5e-7


class LatencyBudgetedSampler(TargetedSampler):
    """LB (arXiv 2609.32132): each step, in turn, gets the suppliers that complete its class targets soonest.

    Every step's class targets are met exactly and every example is used once; what each client delivers is decided
    class by class (``class_quotas``). A step knows only what earlier ones left: slow clients' data are put off for as
    long as anybody else has the class. `AlignedSampler`, which looks at the whole epoch, is faster.

    Parameters
    ----------
    batch_size, seed, targets, order
        See `TargetedSampler`. In its natural order, the last steps hold the slow clients' data.
    method : {"auto", "flow", "greedy"}
        "flow": the least time for which a maximum flow from classes to clients meets the targets, found by bisection.
        "greedy": one example after the other goes to the client that would complete it first, ties at random; several
        times quicker to build. "auto" (default) builds the greedy schedule, builds the other too unless that costs more
        seconds than it could save, and keeps the faster.

    Raises
    ------
    ConfigError
        If an argument is out of range.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        method: str = "auto",
        targets: str = "random",
        order: str = "shuffled",
    ) -> None:
        super().__init__(batch_size, seed=seed, targets=targets, order=order)
        self.method = check_choice(method, "method", ("auto", "flow", "greedy"))

    def _schedule(
        self,
        population: Population,
        suppliers: Suppliers,
        targets: IntArray,
        for_greedy: np.random.Generator,
        for_search: np.random.Generator,
    ) -> BatchPlan:
        plans = []
        if self.method != "flow":
            plans.append(greedy_allocation(suppliers, targets, for_greedy).plan(population))
        if self.method == "flow" or (self.method == "auto" and _flow_may_pay(suppliers, plans[0])):
            plans.append(flow_allocation(suppliers, targets, for_search).plan(population))
        return min(plans, key=epoch_time)


def _flow_may_pay(suppliers: Suppliers, greedy: BatchPlan) -> bool:
    """Return whether a flow schedule could save more seconds than building it takes; Note [What a flow schedule costs].

    It can save no more than what the greedy one takes beyond the plainest lower bounds: every step waits for someone,
    and every client computes all of its examples.
    """
    num_edges = len(suppliers.pairs[0]) + len(suppliers.sizes)
    cost = len(greedy) * _FLOWS_A_STEP * (_SECONDS_A_FLOW + num_edges * _SECONDS_AN_EDGE)
    alone = suppliers.latency + suppliers.per_sample * suppliers.sizes
    least = max(len(greedy) * float(suppliers.first_reply.min()), float(alone.max()))
    return epoch_time(greedy) - least > cost


def greedy_allocation(suppliers: Suppliers, targets: IntArray, rng: np.random.Generator) -> Allocation:
    """Give each example, class by class in random order, to the client that would complete it first.

    Parameters
    ----------
    suppliers : Suppliers
        K clients.
    targets : (T, C) int64
        Columns add up to the clients' examples of each class.
    rng : np.random.Generator
        Orders a step's classes, breaks ties.
    """
    left = suppliers.counts.copy()
    holders = [np.flatnonzero(column) for column in left.T]
    units = np.arange(1, int(targets.max()) + 1)
    parts = []
    for step, target in enumerate(targets):
        loads = np.zeros(len(left), dtype=np.int64)
        for label in rng.permutation(np.flatnonzero(target)):
            wanted = int(target[label])
            clients = holders[label] = holders[label][left[holders[label], label] > 0]
            # the completion of each client's next, second next, ... example: ascending, so the first ones of all are
            # what one example at a time would choose
            more = units[:wanted]
            after = loads[clients, None] + more
            replies = suppliers.latency[clients, None] + suppliers.per_sample[clients, None] * after
            replies[more > left[clients, label][:, None]] = np.inf
            taken = _smallest(replies.ravel(), wanted, rng)
            counts = np.bincount(taken // wanted, minlength=len(clients))
            left[clients, label] -= counts
            loads[clients] += counts
            parts.append((step, clients, label, counts))
    return Allocation.joined(parts)


def _smallest(values: FloatArray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return the indices of the `count` smallest values, ties at random."""
    limit = np.partition(values, count - 1)[count - 1]
    below, ties = np.flatnonzero(values < limit), np.flatnonzero(values == limit)
    return np.concatenate((below, rng.permutation(ties)[: count - len(below)]))


def flow_allocation(suppliers: Suppliers, targets: IntArray, rng: np.random.Generator) -> Allocation:
    """Complete each step in the least time in which a flow from classes to clients meets its targets.

    Parameters
    ----------
    suppliers : Suppliers
        K clients.
    targets : (T, C) int64
        Columns add up to the clients' examples of each class.
    rng : np.random.Generator
        Orders equally slow clients.
    """
    # Of the flows that meet a step's targets in its time, scipy finds one that leans toward the first clients: the slow
    # ones go first, since what they deliver within that time is one thing less to wait for later.
    order = np.lexsort((rng.random(len(suppliers.sizes)), -suppliers.first_reply))
    shuffled = Suppliers(suppliers.counts[order], suppliers.latency[order], suppliers.per_sample[order])
    left = shuffled.counts.copy()
    graph = _StepGraph(shuffled, int(targets.sum(axis=1).max()))
    clients, labels = shuffled.pairs
    parts = []
    at = 0
    for step, target in enumerate(targets):
        at, counts = _least_time(partial(graph.deliveries, target, left), at, len(graph.times) - 1)
        left[clients, labels] -= counts
        parts.append((step, order[clients], labels, counts))
    return Allocation.joined(parts)


class _StepGraph:
    """The flow network of a step: source, classes, clients, sink; only its capacities change.

    Parameters
    ----------
    suppliers : Suppliers
        K clients.
    most : int
        Examples in the largest batch.

    Attributes
    ----------
    times : (n,) float64
        All durations a step can have, ascending.
    """

    def __init__(self, suppliers: Suppliers, most: int) -> None:
        self.suppliers, self.most = suppliers, most
        units = np.arange(1, most + 1)
        replies = suppliers.latency[:, None] + suppliers.per_sample[:, None] * units
        self.times = np.unique(replies[units <= suppliers.sizes[:, None]])
        self.clients, self.labels = suppliers.pairs
        num_clients, num_classes = suppliers.counts.shape
        self.num_nodes = num_classes + num_clients + 2
        self.sink = self.num_nodes - 1
        classes = np.arange(1, num_classes + 1)
        client_nodes = np.arange(num_classes + 1, self.sink)
        tails = np.concatenate((np.zeros(num_classes, dtype=np.int64), self.labels + 1, client_nodes))
        heads = np.concatenate((classes, client_nodes[self.clients], np.full(num_clients, self.sink)))
        self.order = np.lexsort((heads, tails))
        self.heads = heads[self.order].astype(np.int32)
        self.starts = np.searchsorted(tails[self.order], np.arange(self.num_nodes + 1)).astype(np.int32)
        self.shape = (self.num_nodes, self.num_nodes)
        self.rows, self.columns = self.labels + 1, client_nodes[self.clients]

    def deliveries(self, target: IntArray, left: IntArray, index: int) -> IntArray | None:
        """Return examples of each (client, class) pair, (P,), that meet a (C,) target in ``times[index]``, or None.

        `left` (K, C) is what clients still have.
        """
        from scipy.sparse import csr_array  # here: see linear_program.py
        from scipy.sparse.csgraph import maximum_flow

        capacity = self.suppliers.capacity(self.times[index], self.most)
        room = np.minimum(left, capacity[:, None])
        enough = (room.sum(axis=0) >= target).all() and np.minimum(room.sum(axis=1), capacity).sum() >= target.sum()
        if not enough:  # most times that are too short are found out here, without a flow
            return None
        capacities = np.concatenate((target, room[self.clients, self.labels], capacity))[self.order].astype(np.int32)
        result = maximum_flow(csr_array((capacities, self.heads, self.starts), shape=self.shape), 0, self.sink)
        if result.flow_value < target.sum():
            return None
        flows: IntArray = np.asarray(result.flow[self.rows, self.columns]).ravel().astype(np.int64)
        return flows


def _least_time(attempt: Callable[[int], IntArray | None], start: int, last: int) -> tuple[int, IntArray]:
    """Return the least index in [0, last] at which `attempt` succeeds, and what it returns there.

    It succeeds at `last`, and from the least such index on. The search begins near `start`, where it often ends.
    """
    low, high, stride = -1, start, 1
    result = attempt(high)
    while result is None:
        low, high, stride = high, min(high + stride, last), 2 * stride
        result = attempt(high)
    stride = 1 if low < 0 else high - low
    while high - low > 1:
        probe = max(high - stride, (low + high) // 2)
        found = attempt(probe)
        if found is None:
            low = probe
        else:
            high, result, stride = probe, found, 2 * stride
    return high, result
