"""What tests of schedules share: the severe split, delays of the tables, and the best schedule by enumeration."""

import itertools
from functools import cache

import numpy as np

from psl_flower.partition import extended_dirichlet_split
from psl_flower.samplers import Delays, Population
from psl_flower.stragglers import LognormalDelays, SlowFractionDelays

NUM_CLASSES = 10
LABELS = np.repeat(np.arange(NUM_CLASSES), 5000)


def delays_of(kind, seed):
    return {
        "latency 10 %": SlowFractionDelays(seed=seed),
        "latency 20 %": SlowFractionDelays(fraction=0.2, seed=seed),
        "per-sample 10 %": SlowFractionDelays(latency=0.0, per_sample=1.0, seed=seed),
        "lognormal": LognormalDelays(seed=seed),
    }[kind]


def severe_population(num_clients, kind, seed, classes_per_client=2, labels=LABELS):
    """Return clients with two classes each, and their delays."""
    parts = extended_dirichlet_split(labels, num_clients, classes_per_client, 3.0, np.random.default_rng(seed))
    counts = np.array([np.bincount(labels[part], minlength=labels.max() + 1) for part in parts])
    ids = np.arange(num_clients)
    return Population(ids, counts.sum(axis=1), counts, delays_of(kind, seed).delays(ids))


def class_table(plan):
    """Return the classes of every batch, (T, C)."""
    return np.array([step.class_quotas.sum(axis=0) for step in plan])


def best_time(population, targets):
    """Return the least time of all schedules with these targets, by trying them all: for a handful of examples."""
    counts, latency, per_sample = population.label_counts, population.delays.latency, population.delays.per_sample
    shape = counts.shape

    def shares(total, room):
        if len(room) == 1:
            return [(total,)] if total <= room[0] else []
        return [(x, *rest) for x in range(min(total, room[0]) + 1) for rest in shares(total - x, room[1:])]

    @cache
    def best(step, left):
        if step == len(targets):
            return 0.0
        table = np.reshape(left, shape)
        result = np.inf
        columns = [shares(int(targets[step, c]), tuple(table[:, c].tolist())) for c in range(shape[1])]
        for deal in itertools.product(*columns):
            given = np.array(deal).T
            loads = given.sum(axis=1)
            time = np.where(loads > 0, latency + per_sample * loads, 0).max()
            if time < result:
                result = min(result, time + best(step + 1, tuple((table - given).ravel().tolist())))
        return result

    return best(0, tuple(counts.ravel().tolist()))


def tiny_populations(number, seed=0):
    """Yield random populations whose best schedule can be found by trying."""
    rng = np.random.default_rng(seed)
    while number:
        counts = rng.integers(0, 4, (rng.integers(1, 4), rng.integers(1, 3)))
        if not counts.sum() or counts.sum() > 12:
            continue
        number -= 1
        size = len(counts)
        latency = rng.choice([0.0, 1.0, 4.0, 10.0], size)
        per_sample = rng.choice([0.0, 0.5, 3.0], size)
        yield Population(np.arange(size), counts.sum(axis=1), counts, Delays(latency, per_sample))
