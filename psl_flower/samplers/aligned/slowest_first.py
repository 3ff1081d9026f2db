"""Whose examples fill the places of an epoch whose steps have their durations: slow clients' first, evenly spread."""

from __future__ import annotations

import numpy as np

from psl_flower.samplers.aligned.durations import Durations
from psl_flower.samplers.allocation import Allocation
from psl_flower.samplers.rounding import spread_evenly
from psl_flower.samplers.suppliers import Suppliers
from psl_flower.typing import FloatArray, IntArray


def slowest_first_allocation(
    suppliers: Suppliers, targets: IntArray, durations: Durations, rng: np.random.Generator
) -> Allocation:
    """Fill every place of every step.

    Clients come from the slowest down. Each delivers in each level what the relaxation has it deliver there; then what
    is left, wherever there are places and time; and what is still left wherever there are places, in the steps that
    this prolongs least.

    Parameters
    ----------
    suppliers : Suppliers
        K clients.
    targets : (T, C) int64
        Places for each class; columns add up to the clients' examples.
    durations : Durations
        Durations of the steps, and the work of each level.
    rng : np.random.Generator
        Orders equally slow clients, and decides where evenly spread examples begin.
    """
    most = int(targets.sum(axis=1).max())
    places = targets.copy()
    seconds = durations.seconds[durations.level]
    all_steps = np.arange(len(targets))
    steps_of = [np.flatnonzero(durations.level == g) for g in range(len(durations.seconds))]
    clients, labels = suppliers.pairs
    first_pair = np.searchsorted(clients, np.arange(len(suppliers.sizes) + 1))
    left = suppliers.counts[clients, labels]
    parts: list[tuple[IntArray, int, int, IntArray]] = []
    for client in np.lexsort((rng.random(len(suppliers.sizes)), -suppliers.per_sample, -suppliers.first_reply)):
        pairs = np.arange(first_pair[client], first_pair[client + 1])
        loads = np.zeros(len(targets), dtype=np.int64)
        # in whole examples, such that the client's sum in each level, or several in a row, is right within one
        ends = np.floor(durations.work[:, pairs].cumsum().clip(0) + rng.random())
        planned = np.diff(ends, prepend=0).astype(np.int64).clip(0).reshape(-1, len(pairs))
        for g in np.flatnonzero(planned.any(axis=1))[::-1]:
            steps = steps_of[g]
            room = suppliers.capacity_of(client, durations.seconds[g], most) - loads[steps]
            for pair, wanted in zip(pairs, planned[g], strict=True):
                free = np.minimum(places[steps, labels[pair]], room)
                count = min(int(wanted), int(left[pair]), int(free.sum()))
                if not count:
                    continue
                taken = spread_evenly(free, count, rng)
                room -= taken
                loads[steps] += taken
                places[steps, labels[pair]] -= taken
                left[pair] -= count
                parts.append((steps, client, labels[pair], taken))

        pairs = pairs[left[pairs] > 0]
        if not len(pairs):
            continue
        room = (suppliers.capacity_of(client, seconds, most) - loads).clip(0)
        spare = np.minimum(places[:, labels[pairs]], room[:, None]).sum(axis=0) - left[pairs]
        for pair in pairs[np.argsort(spare, kind="stable")]:  # the class that has least to choose from goes first
            free = np.minimum(places[:, labels[pair]], room)
            taken = spread_evenly(free, min(int(left[pair]), int(free.sum())), rng)
            loads += taken
            vacant = places[:, labels[pair]] - taken
            prolong(suppliers, client, loads, vacant, seconds, taken, int(left[pair] - taken.sum()))
            room = (suppliers.capacity_of(client, seconds, most) - loads).clip(0)
            places[:, labels[pair]] = vacant
            parts.append((all_steps, client, labels[pair], taken))
    return Allocation.joined(parts)


def prolong(
    suppliers: Suppliers,
    client: int,
    loads: IntArray,
    places: IntArray,
    seconds: FloatArray,
    taken: IntArray,
    count: int,
) -> None:
    """Put `count` more examples of a client where they prolong steps least, an example; changes its array arguments.

    Parameters
    ----------
    suppliers : Suppliers
        K clients.
    client : int
        Row of the client.
    loads : (T,) int64
        What it delivers in each step already; raised.
    places : (T,) int64
        Free places of the class, at least `count` in all; lowered.
    seconds : (T,) float64
        Duration of each step; raised.
    taken : (T,) int64
        What it delivers of the class; raised.
    count : int
        How many more.
    """
    while count > 0:
        more = np.arange(1, min(count, int(places.max())) + 1)
        replies = suppliers.latency[client] + suppliers.per_sample[client] * (loads[:, None] + more)
        extra = (replies - seconds[:, None]).clip(0) / more
        extra[more > places[:, None]] = np.inf
        step, index = np.unravel_index(np.argmin(extra), extra.shape)
        moved = int(more[index])
        seconds[step] = max(seconds[step], replies[step, index])
        loads[step] += moved
        places[step] -= moved
        taken[step] += moved
        count -= moved
