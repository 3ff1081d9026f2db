"""LDS's trade-off of time against deviation, and what building a plan costs.

Run it as ``python tests/bench/bench_dirichlet.py [SEEDS]`` (5 by default): 50,000 examples of 10 classes in the severe
split, a tenth of the clients with 10 times the latency, batches of 128. For each number of clients, c and delta it
prints the epoch time relative to UGS, the mean and 95th percentile of the batch deviation, the processor seconds of a
plan (single-threaded: its time on an idle machine; the least over seeds), and their ratio to UGS's.
"""

import sys
import time

import numpy as np

from psl_flower.metrics.deviation import batch_deviation
from psl_flower.metrics.simulate import draw_class_counts
from psl_flower.partition import extended_dirichlet_split
from psl_flower.samplers import LatentDirichletSampler, Population, UniformGlobalSampler
from psl_flower.stragglers import SlowFractionDelays, step_times

NUM_CLASSES, BATCH_SIZE = 10, 128
LABELS = np.repeat(np.arange(NUM_CLASSES), 5000)


def population(num_clients, seed):
    """Return the severe split of `LABELS` among clients, a tenth of them slow."""
    parts = extended_dirichlet_split(LABELS, num_clients, 2, 3.0, np.random.default_rng(seed))
    counts = np.array([np.bincount(LABELS[part], minlength=NUM_CLASSES) for part in parts])
    ids = np.arange(num_clients)
    return Population(ids, counts.sum(axis=1), counts, SlowFractionDelays(seed=seed).delays(ids))


def timed(sampler, clients):
    """Return a plan and the processor seconds it took."""
    begin = time.process_time()
    plan = sampler.plan(clients)
    return plan, time.process_time() - begin


def main():
    """Print the table."""
    seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
    print("   K    c  delta | time vs UGS  deviation mean  p95 | plan ms  vs UGS's")
    for num_clients in (16, 64, 128, 1000):
        cases = [population(num_clients, seed) for seed in seeds]
        uniform = [timed(UniformGlobalSampler(BATCH_SIZE, seed=seed), cases[seed]) for seed in seeds]
        floor = min(seconds for _, seconds in uniform)
        for c in (1.0, 0.1):
            for delta in (0.0, 0.25, 0.5, 1.0, 2.0):
                times, deviations, seconds = [], [], []
                for seed in seeds:
                    plan, took = timed(LatentDirichletSampler(BATCH_SIZE, seed=seed, delta=delta, c=c), cases[seed])
                    counts = draw_class_counts(plan, np.random.default_rng(seed))
                    times.append(step_times(plan).sum() / step_times(uniform[seed][0]).sum())
                    deviations.append(batch_deviation(counts, np.bincount(LABELS)))
                    seconds.append(took)
                print(
                    f"{num_clients:4d} {c:4g} {delta:6g} | {np.mean(times):11.3f} {np.mean(deviations):15.3f} "
                    f"{np.percentile(deviations, 95, axis=1).mean():5.3f} | {min(seconds) * 1e3:7.1f} "
                    f"{min(seconds) / floor:9.1f} x",
                    flush=True,
                )


if __name__ == "__main__":
    main()
